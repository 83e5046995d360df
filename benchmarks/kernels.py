"""What the operators in C++ (model/kernels.cpp) gain over torch's, called alone: the shapes of 26m.

Every call takes other matrices, or another layer's cache, as in a model: they come from memory.

    python -m benchmarks.kernels
"""
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from benchmarks.products import matrix_of_4_bits
from model import compilation, kernels
from model.config import preset_config
from model.slots import open_slots, quantize
from model.step import empty_caches
from patches.cpu_linear import CpuLinear, can_pack
from training.settings import option, parse_settings

BYTES = 50e6  # of different matrices, more than the processor's second cache holds


@dataclass
class Settings:
    """What to measure with."""

    threads: int = option(2, "CPU threads")


def microseconds(call: Callable[[object], object], things: Iterable) -> float:
    """Of one call, the median of three hundred."""
    times = []
    for thing in itertools.islice(itertools.cycle(things), 300):
        start = time.perf_counter()
        call(thing)
        times.append(time.perf_counter() - start)
    return sorted(times)[150] * 1e6


def build(function: Callable, arguments: tuple, dynamic: tuple, cache: list) -> Callable:
    config = preset_config("26m")
    built = compilation.compiled(
        function, arguments, dynamic, name="kernel", key=function.__name__, sources=[__file__],
        kernels=kernels.source(torch.bfloat16, config.num_attention_heads,
                               config.num_key_value_heads, config.head_dim, cache), say=print)
    if built is None:
        raise SystemExit("benchmarks.kernels: nothing can be built here (see above)")
    return built


def multiply(x_1I: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    return kernels.multiply_vector(x_1I, weight_OI)


def attend_over(cache, q_BHE, slots_BL, positions_B) -> torch.Tensor:
    keys, values = open_slots(cache, q_BHE.shape[-1])
    return kernels.attend(q_BHE, keys, values, slots_BL, positions_B)


def compare_products() -> None:
    cache = make_caches(0)[0]
    print("matrix times vector, bfloat16; microseconds, and GB/s of the matrix\n"
          "      shape   torch   packed   kernels.cpp")
    inputs, outputs = torch.export.Dim("I", min=2), torch.export.Dim("O", min=2)
    ours = build(multiply, (torch.zeros(1, 512).bfloat16(), torch.zeros(768, 512).bfloat16()),
                 ({1: inputs}, {0: outputs, 1: inputs}), cache)
    for outputs, inputs in ((512, 512), (2816, 512), (512, 1408), (6400, 512)):
        size = 2 * outputs * inputs
        matrices = [torch.randn(outputs, inputs).bfloat16() for _ in range(int(BYTES / size) + 1)]
        x_1I = torch.randn(1, inputs).bfloat16()
        packed = [(CpuLinear(), matrix) for matrix in matrices]
        times = [
            microseconds(lambda weight, x=x_1I: torch.nn.functional.linear(x, weight), matrices),
            microseconds(lambda pair, x=x_1I: pair[0].forward(x, pair[1]), packed)
            if can_pack(torch.bfloat16) else float("nan"),
            microseconds(lambda weight, x=x_1I: ours([x, weight]), matrices),
        ]
        cells = "".join(f"{t:7.0f} ({size / t / 1e3:3.0f})" for t in times)
        print(f"{outputs:6d} x {inputs:4d} {cells}")


def multiply_4_bits(
    x_1I: torch.Tensor, words: torch.Tensor, scales_GO: torch.Tensor, zeros_GO: torch.Tensor
) -> torch.Tensor:
    return kernels.multiply_vector_4_bits(x_1I, words, scales_GO, zeros_GO)


def compare_4_bits() -> None:
    print("4-bit matrix times vector, bfloat16; microseconds\n      shape   torch   kernels.cpp")
    cache = make_caches(0)[0]
    for outputs, inputs in ((512, 512), (2816, 512), (512, 1408)):
        matrices = [matrix_of_4_bits(inputs, outputs, 128)
                    for _ in range(int(2 * BYTES / outputs / inputs) + 1)]
        x_1I = torch.randn(1, inputs).bfloat16()
        packed = [(one.words, one.scales_GO, one.zeros_GO) for one in matrices]
        ours = build(multiply_4_bits, (x_1I, *packed[0]), (None,) * 4, cache)
        times = [
            microseconds(lambda one, x=x_1I: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, one.kernel_weight, one.group, one.scales_offsets_GO2), matrices),
            microseconds(lambda parts, x=x_1I, f=ours: f([x, *parts]), packed),
        ]
        print(f"{outputs:6d} x {inputs:4d}{times[0]:8.0f}{times[1]:14.0f}")


def make_caches(bits: int) -> list[list[torch.Tensor]]:
    """A cache for each layer of 26m, filled at random; `bits` 0: bfloat16 numbers."""
    caches = []
    for keys_values in empty_caches(preset_config("26m"), torch.bfloat16, 16_000):
        cache = [tensor.normal_() for tensor in keys_values]
        if bits:
            (keys, key_scales), (values, value_scales) = (quantize(x, bits) for x in cache)
            cache = [keys, values, key_scales, value_scales]
        caches.append(cache)
    return caches


def compare_attention() -> None:
    print("attention over the cache, one layer; microseconds\n"
          "  cache      sequences   tokens each   torch, by copies   kernels.cpp")
    Dim = torch.export.Dim
    config = preset_config("26m")
    for bits, (sequences, length) in itertools.product(
            (0, 8, 4), ((1, 96), (1, 2000), (8, 96), (32, 96), (32, 500))):
        if (sequences, length) == (1, 96):
            caches = make_caches(bits)
        arguments = (
            caches[0],
            torch.randn(sequences, config.num_attention_heads, config.head_dim).bfloat16(),
            torch.arange(sequences * length).view(sequences, length),
            torch.full((sequences,), length - 1))
        if length == 96 and sequences < 32:  # one sequence is another build than several
            batch = {0: Dim("B", min=2, max=64)} if sequences > 1 else {}
            ours = build(attend_over, arguments, (
                None, batch, {**batch, 1: Dim("L", min=2, max=1 << 16)}, batch), caches[0])
        rest = arguments[1:]
        times = [
            microseconds(lambda cache, rest=rest: attend_over(cache, *rest), caches),
            microseconds(lambda cache, rest=rest, f=ours: f([*cache, *rest]), caches),
        ]
        name = f"int{bits}" if bits else "bfloat16"
        print(f"  {name:8}{sequences:12d}{length:14d}{times[0]:19.0f}{times[1]:14.0f}")


def main() -> None:
    settings = parse_settings(Settings)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        compare_products()
        compare_4_bits()
        compare_attention()


if __name__ == "__main__":
    main()
