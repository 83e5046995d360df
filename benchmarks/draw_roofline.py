"""Draw images/roofline.png: how far each part of a training step is from what one core can do.

The roofline (Williams, Waterman and Patterson, 2009): a computation of I FLOPs per byte of memory
cannot be faster than the memory's bytes/s times I, nor than the processor's FLOP/s. Both limits are
measured here, and so is every part, on the shapes that it has in training. Bytes are the least
possible: each input read once, each output written once. Parts that work on what still lies in a
cache may therefore stand above the slope.

    python -m benchmarks.draw_roofline --preset 26m
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from model import YuanMengModel, preset_config
from training.attention import BLOCK_CAUSAL
from training.files import atomic_write
from training.hardware import peak_flops
from training.loss import softmax_gradient
from training.optimizer import newton_schulz
from training.settings import option, parse_settings


@dataclass
class Settings:
    preset: str = option("26m", "26m or mini")
    rows: int = option(4, "rows of 512 tokens at a time")
    output: str = option("images/roofline.png", "the PNG to write")


@dataclass
class Part:
    """A computation, the FLOPs it needs and the fewest bytes it could move."""

    name: str
    flops: float
    num_bytes: float
    run: Callable[[], object]


def best_seconds(run: Callable[[], object], budget: float = 2.0) -> float:
    """The shortest CPU time of a run, among those of about `budget` seconds."""
    run()  # compiles, warms up
    best, end = float("inf"), time.thread_time() + budget
    while time.thread_time() < end:
        start = time.thread_time()
        run()
        best = min(best, time.thread_time() - start)
    return best


def memory_bandwidth() -> float:
    """Bytes/s of a copy too large for any cache, read and written bytes counted."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source))


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@torch.no_grad()
def make_parts(settings: Settings) -> list[Part]:
    """The forward of one layer's parts, the loss, and the update of one matrix."""
    config = preset_config(settings.preset)
    layer = YuanMengModel(config).bfloat16().layers[0]
    T, B, D, V = 512, settings.rows, config.hidden_size, config.vocab_size
    N, H, K, E = B * T, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x_BTD = torch.randn(B, T, D).bfloat16()
    w1 = layer.feed_forward.w1.weight
    W = config.intermediate_size
    gate_NW, up_NW = (torch.randn(N, W).bfloat16() for _ in range(2))
    q, k, v = (torch.randn(B, T, heads, E).bfloat16() for heads in (H, K, K))
    mask = BLOCK_CAUSAL.make_mask(torch.ones(B, T, dtype=torch.long))
    logits = torch.randn(N, V).bfloat16()
    scored = logits, torch.randint(V, (N,)), torch.ones(())
    attend, eager_norm = torch.compile(BLOCK_CAUSAL.attend), layer.attention_norm
    norm = torch.compile(eager_norm)
    swiglu = torch.compile(lambda gate, up: F.silu(gate) * up)
    loss = torch.compile(softmax_gradient)
    matrix = torch.randn(1, D, W)
    steps = 5 * (4 * D * D * W + 2 * D**3)
    return [
        Part("matmul", 2 * N * D * W, size(x_BTD, w1, gate_NW), lambda: F.linear(x_BTD, w1)),
        Part("attention", 2 * B * H * T * T * E, size(q, q, k, v), lambda: attend(q, k, v, mask)),
        Part("RMSNorm", 4 * N * D, 2 * size(x_BTD), lambda: norm(x_BTD)),
        Part("RMSNorm eager", 4 * N * D, 2 * size(x_BTD), lambda: eager_norm(x_BTD)),
        Part("SwiGLU", 5 * N * W, 3 * size(gate_NW), lambda: swiglu(gate_NW, up_NW)),
        Part("loss", 6 * N * V, 2 * size(logits), lambda: loss(*scored)),
        Part("loss eager", 6 * N * V, 2 * size(logits), lambda: softmax_gradient(*scored)),
        Part("Newton-Schulz", steps, 1.5 * size(matrix), lambda: newton_schulz(matrix)),
    ]


def main() -> None:
    settings = parse_settings(Settings)
    torch.set_num_threads(1)
    peak, bandwidth = peak_flops(torch.device("cpu"), torch.bfloat16), memory_bandwidth()
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    intensity = np.logspace(-0.5, 3.7, 200)
    axes.loglog(intensity, np.minimum(peak, intensity * bandwidth) / 1e9, color="#444444")
    for part in make_parts(settings):
        x, y = part.flops / part.num_bytes, part.flops / best_seconds(part.run) / 1e9
        share = y * 1e9 / min(peak, x * bandwidth)
        axes.plot(x, y, "o", color="#c98a17" if "eager" in part.name else "#1f6fb2")
        left = x > 100 or "eager" in part.name
        side = {"ha": "right" if left else "left", "xytext": (-7 if left else 7, -4)}
        label = f"{part.name}, {share:.0%}"
        axes.annotate(label, (x, y), textcoords="offset points", **side)
        print(f"{part.name:20} {x:8.1f} FLOP/byte {y:8.1f} GFLOP/s, {share:.0%} of the roof")
    axes.set_xlabel("FLOPs per byte")
    axes.set_ylabel("GFLOP/s on one core")
    axes.set_title(
        f"{settings.preset}: {peak / 1e9:.0f} GFLOP/s bfloat16 matmul, {bandwidth / 1e9:.1f} GB/s",
        loc="left",
    )
    axes.plot([], [], "o", color="#1f6fb2", label="as the trainer runs it")
    axes.plot([], [], "o", color="#c98a17", label="the same, not compiled")
    axes.legend(loc="lower right", title="percentages: of the roof above the point")
    axes.grid(color="#d7dde3", linewidth=0.5)
    with atomic_write(Path(settings.output)) as file:
        figure.savefig(file, format="png", dpi=110, facecolor="white")
    print(f"Peak {peak / 1e9:.0f} GFLOP/s, memory {bandwidth / 1e9:.1f} GB/s. {settings.output}")


if __name__ == "__main__":
    main()
