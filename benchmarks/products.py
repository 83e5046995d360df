"""Which product with a matrix is the fastest, for how many rows: in 4 bits by torch's kernel, in 4
bits by way of numbers, in numbers as they are, or packed?

Many equal matrices are multiplied one after the other, as in a model: they come from memory.

    python -m benchmarks.products
    python -m benchmarks.products --threads 1 --dtype float32
"""
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from lmdeploy.pytorch.backends.awq_modules import LinearW4A16BuildSpec

from model.config import preset_config
from patches.cpu_linear import CpuLinear, CpuLinearW4A16, can_pack, multiply_4_bits
from training.settings import option, parse_settings


@dataclass
class Settings:
    """The matrix is the largest of the 26m model's layers: w1 and w3 together."""

    inputs: int = option(512, "input channels")
    outputs: int = option(2816, "output channels")
    group: int = option(128, "input channels that share a scale")
    matrices: int = option(16, "that are read in turn")
    threads: int = option(2, "CPU threads")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of what is multiplied")


def microseconds(product: Callable[[object], object], matrices: list) -> float:
    """Of one product, in the best of a few runs: what the machine can do when nothing else wants
    it."""
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for matrix in matrices:
            product(matrix)
        best = min(best, time.perf_counter() - start)
    return best * 1e6 / len(matrices)


def matrix_of_4_bits(inputs: int, outputs: int, group: int) -> CpuLinearW4A16:
    words = [torch.randint(-2**31, 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)
             for shape in ((inputs, outputs // 8), (inputs // group, outputs // 8))]
    linear = CpuLinearW4A16(
        LinearW4A16BuildSpec(inputs, outputs, 4, group, False, torch.float16)
    )
    linear.update_weights(words[0], torch.rand(inputs // group, outputs).half() * 0.01, words[1])
    return linear


def main() -> None:
    settings = parse_settings(Settings)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    linears = [matrix_of_4_bits(settings.inputs, settings.outputs, settings.group)
               for _ in range(settings.matrices)]
    dense = [linear.numbers(dtype) for linear in linears]
    packed = [(CpuLinear(), matrix) for matrix in dense] if can_pack(dtype) else []
    print(f"{settings.inputs} x {settings.outputs}, {settings.dtype}, {settings.threads} threads; "
          "microseconds")
    print("  rows   4-bit kernel   back to numbers   numbers alone   packed")
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 512):
        x = torch.randn(rows, settings.inputs).to(dtype)
        times = (
            microseconds(lambda linear, x=x: multiply_4_bits(
                x, linear.kernel_weight, linear.scales_offsets_GO2.to(dtype)), linears),
            microseconds(lambda linear, x=x: F.linear(x, linear.numbers(dtype)), linears),
            microseconds(lambda matrix, x=x: F.linear(x, matrix), dense),
        )
        line = f"{rows:6d} {times[0]:14.0f} {times[1]:17.0f} {times[2]:15.0f}"
        if packed:
            line += f" {microseconds(lambda pair, x=x: pair[0].forward(x, pair[1]), packed):8.0f}"
        print(line)
    if packed:
        compare_whole_model()


def compare_whole_model() -> None:
    """All matrices of the 26m shape, each once, as in a step of decoding."""
    config = preset_config("26m")
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    keys = 2 * config.num_key_value_heads * width // heads
    shapes = [(width + keys, width), (width, width), (2 * inner, width), (width, inner)]
    shapes = config.num_hidden_layers * shapes + [(config.vocab_size, width)]
    dense = [torch.randn(shape).bfloat16() for shape in shapes]
    packed = [(CpuLinear(), matrix) for matrix in dense]
    print(f"all {len(shapes)} matrices of 26m, bfloat16; milliseconds\n  rows   numbers   packed")
    for rows in (1, 8, 32):
        inputs = {size: torch.randn(rows, size).bfloat16() for size in (width, inner)}
        times = (
            microseconds(lambda matrix, x=inputs: F.linear(x[matrix.shape[1]], matrix), dense),
            microseconds(lambda pair, x=inputs: pair[0].forward(x[pair[1].shape[1]], pair[1]),
                         packed),
        )
        alone, fast = (time * len(shapes) / 1000 for time in times)
        print(f"{rows:6d} {alone:9.2f} {fast:8.2f}")


if __name__ == "__main__":
    main()
