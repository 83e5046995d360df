"""The ladder of a training step: one trick at a time, and where the rest of the time goes.

Every rung runs in turn, round after round, and medians are printed, so that a drift of the
machine's speed hits all alike. CPU time on one thread, not wall time: other processes then disturb
less. The rungs compute the same loss; packing, which saves padding, and Muon, which saves steps,
are measured in `benchmarks/train.py`.

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

from model import YuanMengModel, preset_config
from training.attention import BLOCK_CAUSAL, SDPA, AttentionKernel
from training.hardware import compile_layers, flops_per_token, peak_flops
from training.loss import chunked_cross_entropy, softmax_gradient
from training.optimizer import MasterOptimizer, Recipe, newton_schulz
from training.settings import option, parse_settings


@dataclass
class Settings:
    """The shape of a step."""

    preset: str = option("mini", "26m or mini")
    rows: int = option(16, "rows in a step")
    part_rows: int = option(4, "rows at a time, on the last rung")
    row_length: int = option(512, "tokens in a row")
    rounds: int = option(5, "of which the median is taken")


class Step:
    """Forward and backward of a batch, on one rung of the ladder."""

    def __init__(
        self,
        settings: Settings,
        kernel: AttentionKernel,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool = False,
        part_rows: int | None = None,
        whole_logits: bool = False,
    ):
        torch.manual_seed(0)
        self.model = YuanMengModel(preset_config(settings.preset)).to(dtype)
        for layer in self.model.layers:
            layer.attention.attend = kernel.attend
        self.kernel, self.part_rows = kernel, part_rows or settings.rows
        self.chunk = settings.rows * settings.row_length if whole_logits else 1024
        self.gradient = softmax_gradient
        if compiled:
            compile_layers(self.model, True)
            self.gradient = torch.compile(softmax_gradient, dynamic=False)
        shape = (settings.rows, settings.row_length)
        self.x_BT = torch.randint(3, self.model.config.vocab_size, shape)
        self.segments_BT = torch.ones(shape, dtype=torch.long)
        self.segments_BT[:, settings.row_length // 2 :] = 2  # two documents in each row

    def __call__(self) -> None:
        model, scale = self.model, 1 / self.x_BT.numel()
        positions = torch.arange(self.x_BT.shape[1])[None]
        parts = (x.split(self.part_rows) for x in (self.x_BT, self.segments_BT))
        for x, segments in zip(*parts, strict=True):
            mask = self.kernel.make_mask(segments)
            h_BTD = model.hidden_states(model.tok_embeddings(x), positions, mask)
            head_VD = model.tok_embeddings.weight
            chunked_cross_entropy(
                h_BTD.flatten(0, 1), head_VD, x.flatten(), scale, self.gradient, self.chunk
            ).backward()


def make_ladder(settings: Settings) -> dict[str, Step]:
    """From a plain step to ours; each rung keeps the tricks of those above it."""
    part = settings.part_rows
    return {
        "float32, SDPA, all logits at once": Step(
            settings, SDPA, torch.float32, whole_logits=True
        ),
        "+ bfloat16": Step(settings, SDPA, whole_logits=True),
        "+ loss in chunks": Step(settings, SDPA),
        "+ compiled": Step(settings, SDPA, compiled=True),
        "+ block-causal attention": Step(settings, BLOCK_CAUSAL, compiled=True),
        f"+ {part} rows at a time": Step(settings, BLOCK_CAUSAL, compiled=True, part_rows=part),
    }


def make_terms(settings: Settings, step: Step) -> dict[str, Callable[[], None]]:
    """What a step consists of besides the layers, each alone and for the whole batch."""
    optimizer = MasterOptimizer(step.model, Recipe(True, 0.02, 3e-3))
    head_VD = step.model.tok_embeddings.weight
    shape = (step.x_BT.numel(), head_VD.shape[1])
    h_ND = torch.randn(shape, dtype=head_VD.dtype).requires_grad_()

    def head() -> None:
        chunked_cross_entropy(
            h_ND, head_VD, step.x_BT.flatten(), 1e-4, step.gradient, step.chunk
        ).backward()

    def masks() -> None:
        for segments in step.segments_BT.split(step.part_rows):
            step.kernel.make_mask(segments)

    def update() -> None:
        optimizer.gradients_flat.copy_(optimizer.masters_flat)
        optimizer.step(0.1)

    def orthogonalise() -> None:
        for weights, _ in optimizer.matrix_groups:
            newton_schulz(weights)

    return {
        "head and loss": head,
        "masks": masks,
        "update (Muon and AdamW)": update,
        "  of which Newton-Schulz": orthogonalise,
    }


def main() -> None:
    settings = parse_settings(Settings)
    torch.set_num_threads(1)
    ladder = make_ladder(settings)
    terms = make_terms(settings, list(ladder.values())[-1])
    seconds: dict[str, list[float]] = {name: [] for name in (*ladder, *terms)}
    peaks = []
    for run in (*ladder.values(), *terms.values()):
        run()  # compiles, warms up
    for _ in range(settings.rounds):
        peaks.append(peak_flops(torch.device("cpu"), torch.bfloat16))
        for name, run in (*ladder.items(), *terms.items()):
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}

    peak = statistics.median(peaks)
    num_tokens = settings.rows * settings.row_length
    model = next(iter(ladder.values())).model
    work = flops_per_token(model, settings.row_length) * num_tokens
    console = Console(width=100)
    console.print(
        f"{settings.preset}, {settings.rows} × {settings.row_length} tokens, one of "
        f"{os.cpu_count()} cores; matmul peak {peak / 1e9:.0f} GFLOP/s in bfloat16"
    )
    table = Table("rung", "CPU-seconds", "gain", "tokens per CPU-second", "of the matmul peak")
    before = None
    for name in ladder:
        median = medians[name]
        gain = f"{before / median:.2f}×" if before else ""
        rate, share = f"{num_tokens / median:,.0f}", f"{work / median / peak:.0%}"
        table.add_row(name, f"{median:.3f}", gain, rate, share)
        before = median
    console.print(table)
    whole = before + medians["update (Muon and AdamW)"]
    table = Table("term of a whole step", "CPU-seconds", "share")
    for name in terms:
        table.add_row(name, f"{medians[name]:.3f}", f"{medians[name] / whole:.1%}")
    table.add_row("whole step", f"{whole:.3f}", f"{work / whole / peak:.0%} of the matmul peak")
    console.print(table)


if __name__ == "__main__":
    main()
