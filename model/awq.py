"""Weights that AWQ quantized to 4 bits (arXiv 2306.00978), back as ordinary matrices.

In each group of, say, 128 inputs of an output, a weight w became a whole number q from 0 to 15:
w ≈ (q - z) · s, with one zero point z and one scale s for the group. Computing with the matrix of
these products is what a 4-bit kernel does, apart from rounding: so a model loaded this way shows
what quantization cost, on a machine that has no such kernel.

`lmdeploy lite auto_awq` writes the layout called "gemm", for a linear layer of I inputs and O
outputs:

    qweight  int32 [I, O / 8]      eight numbers q in each int32
    qzeros   int32 [I / group, O / 8]
    scales   float [I / group, O]
"""

import torch

BITS = 4
# The lowest 4 bits of an int32 hold output 0, the next output 2, and so on: GPUs unpack two at once
# into the halves of a register.
PACKING_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = ("qweight", "qzeros", "scales")


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """int32 [R, O / 8] of eight numbers each, as int32 [R, O] in the order of the outputs."""
    shifts = [BITS * PACKING_ORDER.index(output) for output in range(len(PACKING_ORDER))]
    numbers = [(packed >> shift) & (2**BITS - 1) for shift in shifts]
    return torch.stack(numbers, dim=-1).flatten(1)


def dequantize(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int
) -> torch.Tensor:
    """The matrix [O, I] in float32, which holds (q - z) · s exactly for 16-bit scales.

    Raises:
        ValueError: the shapes do not belong together.
    """
    inputs, outputs = qweight.shape[0], qweight.shape[1] * len(PACKING_ORDER)
    groups = inputs // group_size
    if (
        inputs % group_size
        or qzeros.shape != (groups, qweight.shape[1])
        or scales.shape != (groups, outputs)
    ):
        shapes = ", ".join(str(list(x.shape)) for x in (qweight, qzeros, scales))
        raise ValueError(f"qweight, qzeros and scales of shapes {shapes} do not fit together")
    q_GIO = unpack(qweight).view(groups, group_size, outputs)
    z_GIO, s_GIO = unpack(qzeros)[:, None], scales.float()[:, None]
    return ((q_GIO - z_GIO) * s_GIO).flatten(0, 1).t().contiguous()


def dequantize_state(state: dict[str, torch.Tensor], settings: dict) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, each quantized layer's three replaced by its `weight`.

    Args:
        settings: `quantization_config` of the model's config.json.

    Raises:
        ValueError: another method, bit width or layout, or a layer's tensors are not whole; the
            message is one line without the name of the folder.
    """
    bits = settings.get("bits", settings.get("w_bit"))
    kind = (settings.get("quant_method"), bits, settings.get("version"))
    if kind != ("awq", BITS, "gemm"):
        raise ValueError(
            "holds weights quantized by {} ({} bits, layout {}); "
            "only awq (4 bits, layout gemm) can be read here".format(*kind)
        )
    group_size = settings.get("group_size", settings.get("q_group_size"))
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"has a quantization_config with group_size {group_size}")
    dense = {}
    for name, tensor in state.items():
        layer, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            parts = [state.get(f"{layer}.{suffix}") for suffix in SUFFIXES]
            if any(part is None or part.dim() != 2 for part in parts):
                raise ValueError(f"lacks the matrix {layer}.qzeros or {layer}.scales")
            try:
                dense[f"{layer}.weight"] = dequantize(*parts, group_size)
            except ValueError as error:
                raise ValueError(f"has a damaged layer {layer}: {error}") from error
        elif suffix not in SUFFIXES:
            dense[name] = tensor
    return dense
