"""How long a save holds up training, against the time between two saves.

The trainer is the real one, on rows of random tokens; it saves often here, and the stall is held
against the steps that lie between two saves by default. The stall is all of `Trainer.save`: the
copy in memory, and the wait for the save before it if that is still being written. What the
background thread takes from the CPU meanwhile is counted apart.

    python -m benchmarks.saving
    python -m benchmarks.saving --presets 26m --steps 6
"""

import os
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, HfArgumentParser

from model import TOKENIZER_DIR, YuanMengModel, preset_config
from training.checkpoint import Saver
from training.distributed import World
from training.hardware import choose_device, set_threads
from training.loop import Trainer
from training.optimizer import Recipe
from training.settings import TrainSettings, option


@dataclass
class Settings:
    """What is measured."""

    presets: list[str] = field(default_factory=lambda: ["mini", "26m"])
    steps: int = option(12, "steps of each preset")
    save_every: int = option(3, "steps between saves here")
    threads: int | None = option(None, "CPU threads; default: all cores")


class RandomRows:
    """Rows of random tokens, two documents in each, with the interface of RowSet."""

    def __init__(self, rows: int, T: int):
        self.tokens = torch.randint(3, 6400, (rows, T + 1))
        self.segments = torch.ones(rows, T, dtype=torch.long)
        self.segments[:, T // 2 :] = 2

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = self.tokens[indices]
        return tokens[:, :-1], tokens[:, 1:], self.segments[indices]


class TimedSaver(Saver):
    """A saver that keeps the seconds, and CPU-seconds, of each write."""

    def __init__(self):
        super().__init__()
        self.writes: list[tuple[float, float]] = []

    def _write(self, files) -> None:
        start, cpu = time.perf_counter(), time.thread_time()
        super()._write(files)
        self.writes.append((time.perf_counter() - start, time.thread_time() - cpu))


class TimedTrainer(Trainer):
    """A trainer that keeps when each save began and how long it held up the loop."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.saver, self.saves = TimedSaver(), []

    def save(self, wait: bool, finished: bool = False) -> None:
        start = time.perf_counter()
        super().save(wait, finished)
        if not wait:  # the last one waits: nothing is left to train
            self.saves.append((start, time.perf_counter() - start))


def measure(preset: str, settings: Settings, folder: Path) -> TimedTrainer:
    """Train a few steps of a preset as the fast recipe would."""
    options = TrainSettings(
        preset=preset,
        out_dir=str(folder),
        learning_rate=0.02,
        batch_size=16 if preset == "mini" else 32,
        accumulation_steps=1,
        compile="no",
        save_every=settings.save_every,
        tensorboard=False,
    )
    model = YuanMengModel(preset_config(preset)).to(choose_device(), torch.bfloat16)
    rows = SimpleNamespace(
        train=RandomRows(options.batch_size * settings.steps, options.row_length),
        heldout=[],
        meta={"data_path": "random"},
        sources={"data": "", "tokenizer": ""},
    )
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    recipe = Recipe(muon=True, learning_rate=0.02, adam_learning_rate=3e-3)
    trainer = TimedTrainer(options, "pretrain", recipe, model, rows, tokenizer, World())
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        trainer.run()
    return trainer


def main() -> None:
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    set_threads(settings.threads)
    every = TrainSettings.save_every
    table = Table("preset", "step", "stall", f"stall of {every} steps", "written", "write",
                  "its CPU time", f"of that of {every} steps")  # fmt: skip
    for preset in settings.presets:
        with tempfile.TemporaryDirectory(dir=".") as folder:  # this disk, not one in memory
            trainer = measure(preset, settings, Path(folder))
            size = sum(path.stat().st_size for path in Path(folder).glob("*.pth"))
        starts, stalls = zip(*trainer.saves, strict=True)
        gaps = [b - a for a, b in zip(starts, starts[1:])]
        stall = statistics.median(stalls)
        step = (statistics.median(gaps) - stall) / settings.save_every
        seconds, cpu = (statistics.median(times) for times in zip(*trainer.saver.writes))
        cores = torch.get_num_threads()
        table.add_row(preset, f"{step:.2f} s", f"{stall * 1e3:.0f} ms",
                      f"{stall / (every * step):.3%}", f"{size / 1e6:.0f} MB", f"{seconds:.2f} s",
                      f"{cpu:.2f} s", f"{cpu / (every * step * cores):.3%}")  # fmt: skip
    Console(width=max(Console().width, 110)).print(table)


if __name__ == "__main__":
    main()
