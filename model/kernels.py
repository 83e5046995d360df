"""What torch is slow at when a token is written, in C++: kernels.cpp.

- A matrix times a vector reads the matrix once and computes little; the library's product is made
  for many rows and reaches half of the memory's speed. So it is with a matrix of 4-bit numbers.
- Attention in torch wants each sequence's keys in a row of their own, for which they would be
  copied out of the cache for every token.

Here are the operators as torch sees them, each computed by torch; a compiled step (step.py,
compilation.py) has the C++ in their place, built along with it.

Shapes in names: B sequences, L longest past with the new token, S slots, H heads, K key/value
heads, E head width, C = H · E; I and O inputs and outputs of a product, G groups of inputs.
"""
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from .compilation import Kernels
from .slots import Slots, open_slots

SOURCE = Path(__file__).with_suffix(".cpp")
C_TYPES = {torch.float32: "float", torch.bfloat16: "c10::BFloat16", torch.float16: "c10::Half"}


@torch.library.custom_op("yuanmeng::multiply_vector", mutates_args=())
def multiply_vector(x_1I: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x Wᵀ, [1, O]."""
    return F.linear(x_1I, weight_OI)


@multiply_vector.register_fake
def _(x_1I, weight_OI) -> torch.Tensor:
    return x_1I.new_empty(1, weight_OI.shape[0])


@torch.library.custom_op("yuanmeng::multiply_vector_4_bits", mutates_args=())
def multiply_vector_4_bits(
    x_1I: torch.Tensor, words: torch.Tensor, scales_GO: torch.Tensor, zeros_GO: torch.Tensor
) -> torch.Tensor:
    """x Wᵀ, [1, O], where W is (q - zero) · scale, with a zero and a scale for each group of inputs
    and `pack_4_bits(q)` for q. O is a multiple of 16; scales and zeros are float32."""
    q_GOi = unpack_4_bits(words).unflatten(1, (len(scales_GO), -1)).transpose(0, 1)
    weight_GOi = (q_GOi - zeros_GO[..., None]) * scales_GO[..., None]
    return F.linear(x_1I, weight_GOi.transpose(0, 1).flatten(1).to(x_1I.dtype))


@multiply_vector_4_bits.register_fake
def _(x_1I, words, scales_GO, zeros_GO) -> torch.Tensor:
    return x_1I.new_empty(1, scales_GO.shape[1])


def pack_4_bits(q_OI: torch.Tensor) -> torch.Tensor:
    """Whole numbers from 0 to 15 in the order in which the kernel reads them, int32 [O / 16, I / 8,
    16]: sixteen outputs side by side, of each eight inputs in 32 bits, the first four in the lower
    halves of the bytes. I is a multiple of 8; O is filled up to a multiple of 16."""
    filled_OI = F.pad(q_OI.int(), (0, 0, 0, -len(q_OI) % 16))
    parts = filled_OI.unflatten(1, (-1, 8)).unflatten(0, (-1, 16)).transpose(1, 2)
    places = torch.tensor([0, 8, 16, 24, 4, 12, 20, 28], dtype=torch.int32)
    return (parts << places).sum(-1, dtype=torch.int32)


def unpack_4_bits(words: torch.Tensor) -> torch.Tensor:
    """The numbers that `pack_4_bits` packed, uint8 [O, I]."""
    rows = words.transpose(1, 2).flatten(0, 1)
    lower, upper = rows & 0x0F0F0F0F, rows >> 4 & 0x0F0F0F0F
    return torch.stack((lower, upper), dim=-1).view(torch.uint8).flatten(1)


def attend(
    q_BHE: torch.Tensor, keys: Slots, values: Slots, slots_BL: torch.Tensor,
    positions_B: torch.Tensor,
) -> torch.Tensor:
    """Each sequence's newest token attends to all its tokens, [B, C].

    Args:
        slots_BL: the slots of its tokens in order, the newest included. What stands behind a
            sequence's length is not looked at, but has to be the number of a slot in use.
        positions_B: how many tokens came before the newest.
    """
    return paged_attention(q_BHE, keys.rows_SKE, values.rows_SKE, keys.scales_zeros_SK2,
                           values.scales_zeros_SK2, slots_BL, positions_B)


@torch.library.custom_op("yuanmeng::paged_attention", mutates_args=())
def paged_attention(
    q_BHE: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    slots_BL: torch.Tensor,
    positions_B: torch.Tensor,
) -> torch.Tensor:
    """`attend`, by copies."""
    B, L = slots_BL.shape
    cache = [tensor for tensor in (keys, values, key_scales, value_scales) if tensor is not None]
    k_BKLE, v_BKLE = (
        slots.read(slots_BL.flatten(), q_BHE.dtype).unflatten(0, (B, L)).transpose(1, 2)
        for slots in open_slots(cache, q_BHE.shape[-1])
    )
    seen_B11L = (torch.arange(L) <= positions_B[:, None])[:, None, None]
    # The query heads of a key head take the place of query positions: nothing is copied.
    q_BKGE = q_BHE.unflatten(1, (k_BKLE.shape[1], -1))
    y_BKGE = F.scaled_dot_product_attention(q_BKGE, k_BKLE, v_BKLE, attn_mask=seen_B11L)
    return y_BKGE.flatten(1)


@paged_attention.register_fake
def _(q_BHE, keys, values, key_scales, value_scales, slots_BL, positions_B) -> torch.Tensor:
    return q_BHE.new_empty(q_BHE.shape[0], q_BHE.shape[1] * q_BHE.shape[2])


def source(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int,
    cache: Sequence[torch.Tensor],
) -> Kernels:
    """The operators in C++, for queries and a cache of these shapes."""
    bits = 8 * cache[0].shape[-1] // head_dim if len(cache) > 2 else 0
    known = (
        f"using T = {C_TYPES[dtype]};\n"
        f"constexpr int E = {head_dim}, K = {num_kv_heads}, G = {num_heads // num_kv_heads}, "
        f"BITS = {bits}, THREADS = {torch.get_num_threads()};\n"
    )
    operators = tuple(operator._opoverload for operator in (
        multiply_vector, multiply_vector_4_bits, paged_attention))
    return Kernels(operators, known + SOURCE.read_text(encoding="utf-8"))
