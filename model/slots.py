"""A key/value cache as a row of slots, in numbers or quantized.

A slot holds one token. A sequence's slots may lie anywhere, so the same code serves LMDeploy's
paged cache (vLLM, arXiv 2309.06180) and the chat's.

Shapes in names: N tokens, S slots, K key/value heads, E head width.
"""
from collections.abc import Sequence

import torch


class Slots:
    """A layer's keys, or values: a row of slots [S, K, E]."""

    scales_zeros_SK2: torch.Tensor | None = None

    def __init__(self, rows_SKE: torch.Tensor):
        self.rows_SKE = rows_SKE

    def write(self, slots_N: torch.Tensor, x_NKE: torch.Tensor) -> None:
        self.rows_SKE.index_copy_(0, slots_N, x_NKE)

    def read(self, slots_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.rows_SKE.index_select(0, slots_N)


class QuantizedSlots(Slots):
    """The same as integers of 8 or 4 bits.

    A slot holds each head's vector as unsigned integers q, with its own scale and zero point:
    x ≈ (q - zero) · scale. Two int4 share a byte: the first half of the vector the low bits.
    """

    def __init__(self, rows_SKE: torch.Tensor, scales_zeros_SK2: torch.Tensor, bits: int):
        super().__init__(rows_SKE)
        self.scales_zeros_SK2, self.bits = scales_zeros_SK2, bits

    def write(self, slots_N: torch.Tensor, x_NKE: torch.Tensor) -> None:
        q_NKE, scales_zeros = quantize(x_NKE, self.bits)
        super().write(slots_N, q_NKE)
        self.scales_zeros_SK2.index_copy_(0, slots_N, scales_zeros)

    def read(self, slots_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scales_zeros = self.scales_zeros_SK2.index_select(0, slots_N)
        return dequantize(super().read(slots_N, dtype), scales_zeros, self.bits, dtype)


def open_slots(cache: Sequence[torch.Tensor], head_dim: int) -> tuple[Slots, Slots]:
    """Keys and values of a layer: of (keys, values), or of (keys, values, scales of keys, of
    values) if they are quantized."""
    keys, values, *scales = cache
    if not scales:
        return Slots(keys), Slots(values)
    bits = 8 * keys.shape[-1] // head_dim
    return tuple(QuantizedSlots(*parts, bits) for parts in zip((keys, values), scales, strict=True))


def quantize(x_NKE: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unsigned integers of so many bits, and (scale, zero) [N, K, 2], in the layout of LMDeploy's
    own kernels."""
    x = x_NKE.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    zero = -low / scale
    q = (x / scale + zero).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        first, second = q.chunk(2, dim=-1)
        q = first | (second << 4)
    return q, torch.cat((scale, zero), dim=-1).to(x_NKE.dtype)


def dequantize(
    q: torch.Tensor, scales_zeros: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """The inverse of `quantize`, up to rounding."""
    if bits == 4:
        q = torch.cat((q & 0xF, q >> 4), dim=-1)
    scale, zero = scales_zeros.to(dtype).chunk(2, dim=-1)
    return (q.to(dtype) - zero) * scale
