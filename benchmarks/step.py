"""Where the time of a training step goes: CPU-seconds of its terms, on one thread.

Each variant runs in turn, round after round, and the median is printed, so that a drift of the
machine's speed hits all alike. CPU time, not wall time: other processes then disturb less.

    python -m benchmarks.step
    python -m benchmarks.step --preset 26m --rounds 3
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from model import YuanMengModel, preset_config
from training.attention import block_causal_attention, packed_sdpa_attention
from training.hardware import compile_layers, flops_per_token, peak_flops
from training.loss import chunked_cross_entropy, softmax_gradient
from training.optimizer import MasterOptimizer, Recipe
from training.settings import option


@dataclass
class Settings:
    """The shape of a step."""

    preset: str = option("mini", "26m or mini")
    rows: int = option(16, "rows in a step")
    row_length: int = option(512, "tokens in a row")
    rounds: int = option(5, "of which the median is taken")


def build(settings: Settings, attend: Callable) -> YuanMengModel:
    torch.manual_seed(0)
    model = YuanMengModel(preset_config(settings.preset)).bfloat16()
    for layer in model.layers:
        layer.attention.attend = attend
    return model


def main() -> None:
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    shape = (settings.rows, settings.row_length)
    x_BT = torch.randint(3, 6400, shape)
    segments_BT = torch.ones(shape, dtype=torch.long)
    segments_BT[:, settings.row_length // 2 :] = 2  # two documents in each row
    positions = torch.arange(settings.row_length)[None]
    num_tokens = x_BT.numel()

    def network(model: YuanMengModel, gradient: Callable) -> Callable[[], None]:
        def run() -> None:
            h_BTD = model.hidden_states(model.tok_embeddings(x_BT), positions, segments_BT)
            head = model.tok_embeddings.weight
            chunked_cross_entropy(
                h_BTD.flatten(0, 1), head, x_BT.flatten(), 1 / num_tokens, gradient
            ).backward()

        return run

    sdpa = build(settings, packed_sdpa_attention)
    blocks = build(settings, block_causal_attention)
    compiled = build(settings, block_causal_attention)
    compile_layers(compiled, True)
    compiled_gradient = torch.compile(softmax_gradient, dynamic=False)
    h_ND = torch.randn(num_tokens, sdpa.config.hidden_size).bfloat16().requires_grad_()
    head_VD = sdpa.tok_embeddings.weight

    def head(gradient: Callable) -> Callable[[], None]:
        return lambda: chunked_cross_entropy(
            h_ND, head_VD, x_BT.flatten(), 1 / num_tokens, gradient
        ).backward()

    optimizer = MasterOptimizer(sdpa, Recipe(True, 0.02, 3e-3))

    def update() -> None:
        optimizer.gradients_flat.normal_()
        optimizer.step(0.1)

    variants = {
        "SDPA, eager": network(sdpa, softmax_gradient),
        "block-causal, eager": network(blocks, softmax_gradient),
        "block-causal, compiled": network(compiled, compiled_gradient),
        "  of which head and loss, eager": head(softmax_gradient),
        "  of which head and loss, compiled": head(compiled_gradient),
        "update (Muon and AdamW)": update,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()  # compiles, warms up
    for _ in range(settings.rounds):
        for name, run in variants.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)

    peak = peak_flops(torch.device("cpu"), torch.bfloat16)
    work = flops_per_token(sdpa, settings.row_length) * num_tokens
    table = Table("term", "CPU-seconds", "tokens per CPU-second", "share of the matmul peak")
    for name, times in seconds.items():
        median = statistics.median(times)
        share = f"{work / median / peak:.0%}" if "," in name and "which" not in name else ""
        table.add_row(name, f"{median:.3f}", f"{num_tokens / median:,.0f}", share)
    console = Console(width=max(Console().width, 90))
    console.print(
        f"{settings.preset}, {settings.rows} × {settings.row_length} tokens, one of "
        f"{os.cpu_count()} cores; matmul peak {peak / 1e9:.0f} GFLOP/s in bfloat16"
    )
    console.print(table)


if __name__ == "__main__":
    main()
