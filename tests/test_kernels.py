"""The operators in C++ against the same ones computed by torch."""
import pytest
import torch

from model import compilation, kernels
from model.slots import open_slots, quantize

SLOTS, HEADS, KV_HEADS, INPUTS = 40, 8, 2, 200  # 200 is no multiple of any vector's length


def make_cache(dtype: torch.dtype, width: int, bits: int) -> list[torch.Tensor]:
    """Keys and values, [slots, heads, width], quantized to so many bits (0: not at all)."""
    numbers = [torch.randn(SLOTS, KV_HEADS, width).to(dtype) for _ in range(2)]
    if not bits:
        return numbers
    (keys, key_scales), (values, value_scales) = (quantize(x, bits) for x in numbers)
    return [keys, values, key_scales, value_scales]


def step(cache, q_BHE, slots_BL, positions_B, x_1I, weight_OI, four_bits):
    keys, values = open_slots(cache, q_BHE.shape[-1])
    return (kernels.attend(q_BHE, keys, values, slots_BL, positions_B),
            kernels.multiply_vector(x_1I, weight_OI),
            kernels.multiply_vector_4_bits(x_1I, *four_bits))


def test_four_bits_come_back_from_their_packing():
    q_OI = torch.randint(0, 16, (40, 24))
    words = kernels.pack_4_bits(q_OI)
    assert words.shape == (3, 3, 16) and words.dtype is torch.int32
    unpacked = kernels.unpack_4_bits(words)
    assert torch.equal(unpacked[:40], q_OI.to(torch.uint8)) and not unpacked[40:].any()
    # The place of each number, which the C++ counts on.
    for output, i, place in ((0, 0, 0), (17, 9, 8), (39, 23, 28)):
        word = words[output // 16, i // 8, output % 16].item()
        assert word >> place & 15 == q_OI[output, i]


@pytest.mark.parametrize(("dtype", "width", "bits"), [
    (torch.float32, 64, 0), (torch.bfloat16, 64, 0), (torch.bfloat16, 48, 0),
    (torch.bfloat16, 64, 8), (torch.float32, 64, 4),
])
def test_the_machine_code_computes_what_torch_computes(dtype, width, bits, tmp_path, monkeypatch):
    """Sequences of different lengths, in slots anywhere; what lies behind a sequence's length is
    not looked at."""
    monkeypatch.setattr(compilation, "FOLDER", tmp_path)
    torch.manual_seed(0)
    positions_B = torch.tensor([0, 16, 5])
    slots_BL = torch.randint(1, SLOTS, (3, 17))
    cache = make_cache(dtype, width, bits)
    arguments = (cache, torch.randn(3, HEADS, width).to(dtype), slots_BL, positions_B,
                 torch.randn(1, INPUTS).to(dtype), torch.randn(30, INPUTS).to(dtype),
                 [kernels.pack_4_bits(torch.randint(0, 16, (48, INPUTS))),
                  torch.rand(5, 48), torch.randint(0, 16, (5, 48)).float()])
    said = []
    function = compilation.compiled(
        step, arguments, (None,) * 7, name="kernels", key="", sources=[],
        kernels=kernels.source(dtype, HEADS, KV_HEADS, width, cache), say=said.append)
    assert function is not None, said
    # The reference computes in float32 what the operators were given.
    wide = [x.float() if x.is_floating_point() else x for x in cache]
    expected = step(
        wide, *(x.float() if x.is_floating_point() else x for x in arguments[1:-1]), arguments[-1])
    for slots_L, position in zip(slots_BL, positions_B, strict=True):
        slots_L[position + 1 :] = 0  # a slot of which nothing may be seen
    for tensor in cache[:2]:
        tensor[0] = 77
    limit = 2e-2 if dtype is torch.bfloat16 else 1e-5
    for found, right in zip(
            function([*cache, *arguments[1:-1], *arguments[-1]]), expected, strict=True):
        assert found.dtype is dtype
        torch.testing.assert_close(found.float(), right, rtol=limit, atol=limit)
