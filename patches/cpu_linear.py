"""Products with matrices on a CPU: of bfloat16 numbers, and of 4-bit weights (AWQ).

A bfloat16 matrix is packed once into the order in which the processor's tiles read it; torch would
do so anew in each product (26m, all matrices once, 2 cores: 8 rows 4.0 ms against 3.0, 32 rows 4.8
against 3.6; python -m benchmarks.products).

A 4-bit weight is (q - zero) · scale, with q and zero from 0 to 15, and one scale and zero for each
group of input channels. A step that decodes few tokens spends its time on reading weights: torch's
kernel for a few rows, and the compiled step's for one (model/kernels.cpp), read the 4 bits as they
are and beat a bfloat16 product although they compute more. With many rows, as in reading a prompt,
computing counts: then a matrix is first turned back into numbers. In float32 torch's kernel is slow
(one row of 512 x 2816: 2.1 ms, 0.6 ms by way of numbers), so it is not used.

Shapes in names: M rows, I input channels, O output channels, G groups of input channels.
"""
import torch
import torch.nn.functional as F
from lmdeploy.pytorch.backends.awq_modules import LinearW4A16BuildSpec, LinearW4A16Impl
from lmdeploy.pytorch.backends.default.awq_modules import unpack_awq
from lmdeploy.pytorch.backends.default.linear import DefaultLinearImpl

from model.kernels import pack_4_bits, unpack_4_bits

# Up to so many rows the kernel wins. 512 x 2816 on one core: 0.52 ms against 1.00 at 32 rows, 1.04
# against 1.14 at 64, 2.12 against 1.71 at 128 (python -m benchmarks.products).
MOST_ROWS = 64
KERNEL_GROUPS = (32, 64, 128, 256)


# ---- bfloat16 ------------------------------------------------------------------------------------

def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies packed matrices of this dtype."""
    return (dtype is torch.bfloat16 and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.library.custom_op("yuanmeng::multiply_packed", mutates_args=())
def multiply_packed(x_MI: torch.Tensor, packed_OI: torch.Tensor) -> torch.Tensor:
    """x Wᵀ, [M, O], with a packed matrix."""
    return torch.ops.mkldnn._linear_pointwise(x_MI, packed_OI, None, "none", [], "")


@multiply_packed.register_fake
def _(x_MI: torch.Tensor, packed_OI: torch.Tensor) -> torch.Tensor:
    return x_MI.new_empty(x_MI.shape[0], packed_OI.shape[0])


def teach_compiler() -> None:
    """torch's compiler learns what to put in the place of `multiply_packed`: the same call as for
    its own packed matrices, which have to be constants, where ours are arguments."""
    from torch._inductor import ir, mkldnn_ir  # a second that only a build needs
    from torch._inductor.lowering import register_lowering

    def lower(x_MI, packed_OI):
        node = mkldnn_ir.LinearUnary.create(x_MI, packed_OI, None, "none", [], "")
        return ir.TensorBox.create(node)

    register_lowering(multiply_packed._opoverload, type_promotion_kind=None)(lower)


class CpuLinear(DefaultLinearImpl):
    """y = x Wᵀ (+ bias), packed where the processor gains by it: the matrix is in memory twice."""

    packed_OI: torch.Tensor | None = None

    def update_weights(self, weight, bias=None):
        """Called when all is loaded, and when it has changed."""
        self.packed_OI = None
        return weight, bias

    def pack(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The packed matrix; at the first call it is made."""
        if self.packed_OI is None:
            self.packed_OI = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), None)
        return self.packed_OI

    def forward(self, x, weight, bias=None, all_reduce=False, *others, **named):
        if all_reduce or not can_pack(weight.dtype):
            return super().forward(x, weight, bias, all_reduce, *others, **named)
        return torch.ops.mkldnn._linear_pointwise(x, self.pack(weight), bias, "none", [], "")


# ---- 4 bits --------------------------------------------------------------------------------------

def multiply_4_bits(
    x_MI: torch.Tensor, kernel_weight: torch.Tensor, scales_offsets_GO2: torch.Tensor
) -> torch.Tensor:
    """x Wᵀ, [M, O], by torch's kernel."""
    group = x_MI.shape[1] // scales_offsets_GO2.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(
        x_MI, kernel_weight, group, scales_offsets_GO2)


class CpuLinearW4A16(LinearW4A16Impl):
    """y = x Wᵀ (+ bias) with 4-bit W, kept in 1 byte a weight: once for each way of computing."""

    def __init__(self, spec: LinearW4A16BuildSpec):
        if spec.w_bit != 4:
            raise NotImplementedError(f"the cpu device has no {spec.w_bit}-bit weights (patches/)")
        self.outputs, self.group = spec.out_features, spec.group_size
        self.has_kernel = self.group in KERNEL_GROUPS and self.outputs % 16 == 0

    def update_weights(self, qweight, scales, qzeros, bias=None):
        """Called once when all is loaded: repack, and give the original's memory back."""
        q_IO, zeros_GO = unpack_awq(qweight.data, qzeros.data, 4)
        q_OI = q_IO.t().contiguous()
        if self.has_kernel:
            self.kernel_weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_OI.int(), 1)
            # torch's weight is (q - 8) · scale + offset.
            offset_GO = (8 - zeros_GO.float()) * scales.data.float()
            scales_offsets = torch.stack((scales.data.float(), offset_GO), dim=-1)
            self.scales_offsets_GO2 = scales_offsets.bfloat16().contiguous()
        self.words = pack_4_bits(q_OI)
        self.scales_GO, self.zeros_GO = scales.data.float(), zeros_GO.float()
        nothing = qweight.data.new_empty(0)
        return nothing, scales.data.new_empty(0), nothing.clone(), bias

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [O, I] in this dtype."""
        q_OGi = unpack_4_bits(self.words)[: self.outputs].to(dtype).unflatten(1, (-1, self.group))
        scales_OG1, zeros_OG1 = (
            x_GO.t().to(dtype)[:, :, None] for x_GO in (self.scales_GO, self.zeros_GO))
        return q_OGi.sub_(zeros_OG1).mul_(scales_OG1).flatten(1)

    def forward(self, x, qweight, scales, qzeros, bias=None, all_reduce=False, group=None):
        x_MI = x.flatten(0, -2)
        if self.has_kernel and x.dtype is torch.bfloat16 and len(x_MI) <= MOST_ROWS:
            y_MO = multiply_4_bits(x_MI, self.kernel_weight, self.scales_offsets_GO2)
        else:
            y_MO = F.linear(x_MI, self.numbers(x.dtype))
        if bias is not None:
            y_MO += bias.to(y_MO.dtype)
        if all_reduce:
            torch.distributed.all_reduce(y_MO, group=group)
        return y_MO.unflatten(0, x.shape[:-1])

    def num_bytes(self) -> int:
        """Memory of the weights as they are kept."""
        held = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
