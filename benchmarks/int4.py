"""When does torch's 4-bit product beat turning the matrix back into numbers?

    python -m benchmarks.int4
    python -m benchmarks.int4 --threads 1 --dtype float32
"""
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from lmdeploy.pytorch.backends.awq_modules import LinearW4A16BuildSpec

from patches.cpu_linear import CpuLinearW4A16
from training.settings import option, parse_settings


@dataclass
class Settings:
    """The matrix is the largest of the 26m model's layers: w1 and w3 together."""

    inputs: int = option(512, "input channels")
    outputs: int = option(2816, "output channels")
    group: int = option(128, "input channels that share a scale")
    threads: int = option(2, "CPU threads")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of what is multiplied")


def microseconds(run: Callable[[], object]) -> float:
    """The best of a few runs: what the machine can do when nothing else wants it."""
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def main() -> None:
    settings = parse_settings(Settings)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    inputs, outputs, group = settings.inputs, settings.outputs, settings.group
    words = [torch.randint(-2**31, 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)
             for shape in ((inputs, outputs // 8), (inputs // group, outputs // 8))]
    linear = CpuLinearW4A16(
        LinearW4A16BuildSpec(inputs, outputs, 4, group, False, torch.float16)
    )
    linear.update_weights(words[0], torch.rand(inputs // group, outputs).half() * 0.01, words[1])
    dtype = getattr(torch, settings.dtype)
    dense, scales = linear.numbers(dtype), linear.scales_offsets_GO2.to(dtype)
    print(f"{inputs} x {outputs}, {settings.dtype}, {settings.threads} threads; microseconds")
    print("  rows   4-bit kernel   back to numbers   numbers alone")
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 512):
        x = torch.randn(rows, inputs).to(dtype)
        times = (
            microseconds(lambda x=x: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, linear.kernel_weight, group, scales)),
            microseconds(lambda x=x: F.linear(x, linear.numbers(dtype))),
            microseconds(lambda x=x: F.linear(x, dense)),
        )
        print(f"{rows:6d} {times[0]:14.0f} {times[1]:17.0f} {times[2]:15.0f}")


if __name__ == "__main__":
    main()
