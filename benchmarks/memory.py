"""Memory of a training over 10,000 steps: the real script, watched from outside.

The steps are small (a few rows of a few tokens), so that 10,000 of them take minutes; logs, saves
and held-out losses come as in any run. A leak of any of these would show, whatever the step's size.
Two curves: all resident memory, and that without the pages of mapped files. Of the row cache, each
page that was read counts as resident, until the system needs the memory for something else.

    python -m benchmarks.memory
    python -m benchmarks.memory --steps 2000 --output ""
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from matplotlib.figure import Figure
from transformers import HfArgumentParser

from training.files import atomic_write
from training.settings import option

ROOT = Path(__file__).resolve().parents[1]
LOG_EVERY = 10


@dataclass
class Settings:
    """The run that is watched."""

    data: str = option("dataset/pretrain_starter.jsonl", "JSONL file; its beginning is used")
    steps: int = option(10_000, "of the training")
    batch_size: int = option(2, "rows in a step")
    row_length: int = option(64, "tokens in a row")
    accumulation_steps: int = option(10, "steps per update; the update is most of a small step")
    warmup: int = option(1_000, "first steps, left out of the fit")
    interval: float = option(1.0, "seconds between two readings")
    output: str = option("images/memory.png", "the curve; empty: none")


def first_megabytes(source: Path, target: Path, num_bytes: int) -> None:
    """Copy whole lines from the beginning of a file."""
    with source.open("rb") as lines, target.open("wb") as copy:
        while copy.tell() < num_bytes and (line := lines.readline()):
            copy.write(line)


def watch(settings: Settings, folder: Path) -> np.ndarray:
    """Train in `folder`; returns [n, 3]: step, resident MiB, MiB of them in no file."""
    num_tokens = settings.steps * settings.batch_size * settings.row_length
    first_megabytes(Path(settings.data), folder / "text.jsonl", num_tokens * 4)
    options = dict(
        preset="mini", data="text.jsonl", epochs=100, max_steps=settings.steps,
        batch_size=settings.batch_size, row_length=settings.row_length, compile="no",
        accumulation_steps=settings.accumulation_steps, log_every=LOG_EVERY, threads=1,
    )  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    training = subprocess.Popen(
        [sys.executable, ROOT / "train_pretrain.py", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    step, readings = 0, []
    process = psutil.Process(training.pid)

    def read_memory() -> None:
        while training.poll() is None:
            if step:
                memory = process.memory_info()
                mapped = getattr(memory, "shared", 0)
                readings.append((step, memory.rss / 2**20, (memory.rss - mapped) / 2**20))
            time.sleep(settings.interval)

    reader = threading.Thread(target=read_memory, daemon=True)
    reader.start()
    for line in training.stdout:
        if line.startswith("Epoch:"):
            step += 1 if step == 0 else LOG_EVERY
            if (step - 1) % 1000 == 0:
                print(f"step {step - 1}", flush=True)
    if training.wait():
        sys.exit(f"the training ended with status {training.returncode}")
    reader.join()
    return np.array(readings)


def draw(readings: np.ndarray, settings: Settings, text: str) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, resident, anonymous = readings.T
    axes.plot(steps, resident, color="#9aa5b1", label="resident")
    axes.plot(steps, anonymous, color="#1f77b4", label="resident, without mapped files")
    axes.axvline(settings.warmup, color="#d7dde3", linewidth=0.8)
    axes.set(title=text, xlabel="step", ylabel="MiB", ylim=(0, resident.max() * 1.15))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic_write(settings.output) as file:
        figure.savefig(file, format="png", dpi=110)


def main() -> None:
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    if not Path(settings.data).exists():
        sys.exit(f"{settings.data} does not exist: `python -m dataset.starter` makes it")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        readings = watch(settings, Path(folder).resolve())
    after = readings[readings[:, 0] >= settings.warmup]
    slopes = [np.polyfit(after[:, 0] / 1000, after[:, column], 1)[0] for column in (1, 2)]
    text = (f"mini, {settings.steps:,} steps: {slopes[1]:+.2f} MiB per 1,000 steps "
            f"({slopes[0]:+.2f} with mapped files)")  # fmt: skip
    print(f"{text}; resident {after[:, 1].min():.0f} to {after[:, 1].max():.0f} MiB")
    if settings.output:
        draw(readings, settings, text)
        print(f"Wrote {settings.output}")


if __name__ == "__main__":
    main()
