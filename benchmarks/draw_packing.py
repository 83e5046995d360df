"""Draw images/packing.png: the first conversations of the corpus as rows, padded and packed.

Notable: nothing is drawn by hand. The rows come from `dataset/rows.py` as in training; every cell
is a token, dark where the loss counts it.

    python -m benchmarks.draw_packing [--data dataset/sft_starter.jsonl] [--conversations 48]
"""
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from transformers import HfArgumentParser

from dataset.rows import RowSet, prepare_rows
from model import TOKENIZER_DIR
from training.files import atomic_write


@dataclass
class Settings:
    data: str = field(default="dataset/sft_starter.jsonl", metadata={"help": "conversations"})
    conversations: int = field(default=48, metadata={"help": "how many, from the file's beginning"})
    output: str = field(default="images/packing.png", metadata={"help": "the PNG to write"})


# padding; then a colour for odd and one for even documents, read only and learnt
COLORS = ["#ffffff", "#cfe3f7", "#fbe6c2", "#1f6fb2", "#c98a17"]


def read_rows(settings: Settings, folder: Path) -> RowSet:
    """Pack the first conversations as the trainer does."""
    sample = folder / "sample.jsonl"
    with open(settings.data, encoding="utf-8") as source:
        sample.write_text("".join(islice(source, settings.conversations)), encoding="utf-8")
    return prepare_rows(sample, "sft", TOKENIZER_DIR, cache_dir=folder / "cache").train


def padded(rows: RowSet) -> tuple[np.ndarray, np.ndarray]:
    """(segments, loss) of the same documents with a row each, numbered in their order."""
    documents = [(row, number) for row in range(len(rows))
                 for number in range(1, int(rows.segments[row].max()) + 1)]
    shape = (len(documents), rows.tokens.shape[1])
    segments, loss = np.zeros(shape, int), np.zeros(shape, int)
    for target, (row, number) in enumerate(documents):
        chosen = rows.segments[row] == number
        segments[target, : chosen.sum()] = target + 1
        loss[target, : chosen.sum()] = rows.loss[row][chosen]
    return segments, loss


def color_numbers(segments: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Each token's index into COLORS."""
    return np.where(segments == 0, 0, 2 - segments % 2 + 2 * loss)


def main() -> None:
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    if not Path(settings.data).exists():
        sys.exit(f"{settings.data} does not exist: `python -m dataset.starter` makes it")
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(settings, Path(folder))
        packed = np.array(rows.segments, dtype=int), np.array(rows.loss, dtype=int)
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    panels = padded(rows), packed
    heights = [len(segments) + 4 for segments, _ in panels]
    both = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    for axes, name, (segments, loss) in zip(both, ("padded", "packed"), panels, strict=True):
        axes.imshow(color_numbers(segments, loss), aspect="auto", interpolation="nearest",
                    cmap=ListedColormap(COLORS), vmin=0, vmax=len(COLORS) - 1)
        axes.set_yticks(np.arange(len(segments) + 1) - 0.5, [])
        axes.set_xlim(-0.5, segments.shape[1] - 0.5)
        axes.grid(axis="y", color="#d7dde3", linewidth=0.5)
        axes.tick_params(length=0)
        used = f"{(segments > 0).mean():.0%} of the positions hold a token"
        axes.set_title(f"{name}: {len(segments)} rows, {used}", loc="left", fontsize=12)
    both[-1].set_xlabel("position in the row    (light: read only; dark: counted in the loss; "
                        "blue and yellow: neighbouring conversations; white: padding)")
    with atomic_write(Path(settings.output)) as file:
        figure.savefig(file, format="png", dpi=110, facecolor="white")
    print(f"Wrote {settings.output}")


if __name__ == "__main__":
    main()
