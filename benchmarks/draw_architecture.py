"""Draw images/architecture.png: a decoder layer with the names of model/model.py, both presets.

Notable: the shapes and the parameter counts on the picture come from the presets themselves, so the
picture cannot tell another story than the code.

    python -m benchmarks.draw_architecture [--output images/architecture.png]
"""
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from transformers import HfArgumentParser

from model import PRESETS, YuanMengModel, preset_config
from training.files import atomic_write


@dataclass
class Settings:
    output: str = field(default="images/architecture.png", metadata={"help": "the PNG to write"})


INK, SOFT = "#26323f", "#6b7885"
MATRIX, NORM, PLAIN, OPERATION = "#cfe3f7", "#fbe6c2", "#e9edf1", "#d9f0dc"
MONO = {"family": "DejaVu Sans Mono"}


def box(axes: Axes, x: float, y: float, width: float, label: str, color: str = PLAIN,
        height: float = 4.4, size: float = 11, note: str = "") -> None:
    """A rounded box centred on (x, y)."""
    axes.add_patch(FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.9",
        facecolor=color, edgecolor=INK, linewidth=1.1, zorder=3))
    if note:
        axes.text(x, y + 0.9, label, ha="center", va="center", size=size, color=INK, zorder=4,
                  **MONO)
        axes.text(x, y - 1.2, note, ha="center", va="center", size=8, color=SOFT, zorder=4)
    else:
        axes.text(x, y, label, ha="center", va="center", size=size, color=INK, zorder=4, **MONO)


def line(axes: Axes, *points: tuple[float, float], arrow: bool = True, color: str = INK,
         dashed: bool = False) -> None:
    """A path through the points, with a head at its end."""
    xs, ys = zip(*points, strict=True)
    style = (0, (4, 3)) if dashed else "-"
    axes.plot(xs, ys, color=color, linewidth=1.3, linestyle=style, zorder=1,
              solid_joinstyle="round")
    if arrow:
        axes.annotate("", xy=points[-1], xytext=points[-2], zorder=2,
                      arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 0,
                                  "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0})


def plus(axes: Axes, x: float, y: float, sign: str = "+") -> None:
    """A circle where two streams meet."""
    axes.plot(x, y, "o", markersize=17, markerfacecolor="white", markeredgecolor=INK, zorder=3)
    axes.text(x, y - 0.1, sign, ha="center", va="center", size=14, color=INK, zorder=4)


def draw_model(axes: Axes, x: float) -> None:
    """The whole network, from token ids at the bottom to logits at the top."""
    axes.text(x, 87, "YuanMengModel", ha="center", size=14, weight="bold", color=INK)
    axes.text(x, 6, "token ids  [B, T]", ha="center", va="center", size=10, color=SOFT)
    axes.text(x, 81, "logits  [B, T, 6400]", ha="center", va="center", size=10, color=SOFT)
    line(axes, (x, 8), (x, 12.8))
    line(axes, (x, 17.2), (x, 28))
    line(axes, (x, 52), (x, 60.8))
    line(axes, (x, 65.2), (x, 69.8))
    line(axes, (x, 74.2), (x, 79))
    box(axes, x, 15, 22, "tok_embeddings", MATRIX)
    for shift in (1.6, 0.8):  # more of the same, behind
        box(axes, x + shift, 40 + shift, 22, "", PLAIN, height=24)
    box(axes, x, 40, 22, "", "#f7f9fb", height=24)
    axes.text(x, 43, "YuanMengDecoderLayer", ha="center", va="center", size=8.8, zorder=5,
              color=INK, **MONO)
    axes.text(x, 37, "× 8 in 26m,  × 4 in mini", ha="center", va="center", size=10, zorder=5,
              color=SOFT)
    box(axes, x, 63, 22, "norm", NORM)
    box(axes, x, 72, 22, "output", MATRIX)
    left = x - 15
    line(axes, (x - 11, 15), (left, 15), (left, 72), (x - 11, 72), arrow=False, color=SOFT,
         dashed=True)
    axes.text(left - 1.2, 43.5, "tied: one matrix, used twice", rotation=90, ha="center",
              va="center", size=9, color=SOFT)


def draw_layer(axes: Axes, x: float) -> None:
    """One decoder layer: attention below, feed-forward above, the residual stream on the left."""
    axes.add_patch(FancyBboxPatch((x - 33, 4), 63, 80.5, boxstyle="round,pad=0,rounding_size=2",
                                  facecolor="#f7f9fb", edgecolor=SOFT, linewidth=1.2, zorder=0))
    axes.text(x, 87, "YuanMengDecoderLayer", ha="center", size=14, weight="bold", color=INK)
    stream = x - 26
    # the residual stream
    line(axes, (stream, 1), (stream, 44.3))
    line(axes, (stream, 47.7), (stream, 78.3))
    line(axes, (stream, 81.7), (stream, 88))
    axes.text(stream - 1.6, 27, "residual stream  [B, T, D]", rotation=90, ha="center", va="center",
              size=9, color=SOFT)

    # attention
    q, k, v = x - 12, x + 4, x + 20
    line(axes, (stream, 7), (x - 19, 7))
    box(axes, x + 4, 7, 46, "attention_norm   (RMSNorm)", NORM, height=3.8)
    for position, name, note in ((q, "wq", "H heads"), (k, "wk", "2 key/value heads"),
                                 (v, "wv", "2 key/value heads")):
        line(axes, (position, 8.9), (position, 12.3))
        box(axes, position, 14.8, 14, f"attention.{name}", MATRIX, height=5, size=9.5, note=note)
    for position in (q, k):
        line(axes, (position, 17.3), (position, 20.6))
        box(axes, position, 22.6, 14, "rope", OPERATION, height=4)
        line(axes, (position, 24.6), (position, 28))
    line(axes, (v, 17.3), (v, 28))
    box(axes, x + 4, 31, 46, "softmax( q·kᵀ / √64 ) · v", OPERATION, height=6,
        note="causal, inside one document; each k, v head serves H/2 query heads")
    line(axes, (x + 4, 34), (x + 4, 37))
    box(axes, x + 4, 39.2, 20, "attention.wo", MATRIX)
    line(axes, (x + 4, 41.4), (x + 4, 46), (stream + 1.7, 46))
    plus(axes, stream, 46)

    # feed-forward
    line(axes, (stream, 51.5), (x - 19, 51.5))
    box(axes, x + 4, 51.5, 46, "ffn_norm   (RMSNorm)", NORM, height=3.8)
    gate, up = x - 7, x + 15
    for position, name in ((gate, "w1"), (up, "w3")):
        line(axes, (position, 53.4), (position, 57))
        box(axes, position, 59.2, 20, f"feed_forward.{name}", MATRIX, size=10)
    line(axes, (gate, 61.4), (gate, 63.9))
    box(axes, gate, 65.9, 12, "silu", OPERATION, height=4)
    line(axes, (gate + 6, 65.9), (x + 13.3, 65.9))
    line(axes, (up, 61.4), (up, 64.2))
    plus(axes, up, 65.9, "×")
    line(axes, (up, 67.6), (up, 71))
    box(axes, up, 73.2, 20, "feed_forward.w2", MATRIX, size=10)
    line(axes, (up, 75.4), (up, 80), (stream + 1.7, 80))
    plus(axes, stream, 80)
    axes.text(x - 9, 73.2, "SwiGLU", ha="center", va="center", size=10, color=SOFT, style="italic")
    axes.text(x - 12, 39.2, "grouped-query\nattention", ha="center", va="center", size=10,
              color=SOFT, style="italic")


def shape_rows() -> list[tuple[str, ...]]:
    """Names and shapes, as PyTorch stores them, of each preset."""
    rows = [("", *PRESETS)]
    configs = [preset_config(name) for name in PRESETS]

    def add(name: str, value) -> None:
        rows.append((name, *(str(value(config)) for config in configs)))

    add("D  hidden_size", lambda c: c.hidden_size)
    add("layers", lambda c: c.num_hidden_layers)
    add("H  query heads", lambda c: c.num_attention_heads)
    add("key/value heads", lambda c: c.num_key_value_heads)
    add("head width", lambda c: c.head_dim)
    add("tok_embeddings", lambda c: f"{c.vocab_size} × {c.hidden_size}")
    with torch.device("meta"):  # shapes without memory
        models = [YuanMengModel(config) for config in configs]
    for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo",
                 "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"):
        shapes = [model.layers[0].get_submodule(name).weight.shape for model in models]
        rows.append((name, *(f"{height} × {width}" for height, width in shapes)))
    rows.append(("parameters", *(f"{model.num_unique_parameters():,}" for model in models)))
    return rows


def draw_table(axes: Axes, x: float) -> None:
    """The shapes of both presets, the legend under them."""
    axes.text(x + 19, 87, "Shapes  [rows × columns]", ha="center", size=14, weight="bold",
              color=INK)
    for number, (name, *values) in enumerate(shape_rows()):
        y = 80.5 - 4.1 * number
        heavy = "bold" if number == 0 or name == "parameters" else "normal"
        if number % 2:
            axes.fill_between([x - 1, x + 41], y - 2.05, y + 2.05, color="#f1f4f7", zorder=0)
        axes.text(x, y, name, va="center", size=9.5, color=INK, weight=heavy, **MONO)
        for place, value in zip((27.5, 40.3), values, strict=True):
            axes.text(x + place, y, value, va="center", ha="right", size=9.5, color=INK,
                      weight=heavy, **MONO)
    for number, (color, text) in enumerate(((MATRIX, "a weight matrix"), (NORM, "a weight vector"),
                                            (OPERATION, "no weights"))):
        y = 17 - 4.6 * number
        box(axes, x + 3, y, 6, "", color, height=2.8)
        axes.text(x + 8, y, text, va="center", size=10, color=INK)


def main() -> None:
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    figure = Figure(figsize=(15.4, 9.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 154), ylim=(-1, 91))
    axes.axis("off")
    draw_model(axes, 21)
    draw_layer(axes, 73)
    draw_table(axes, 110)
    # the layer in the column is the one drawn large
    for start, end in (((33.6, 53.6), (40, 84.5)), ((33.6, 29.6), (40, 4))):
        axes.plot(*zip(start, end, strict=True), color=SOFT, linewidth=0.9, linestyle=":", zorder=0)
    output = Path(settings.output)
    with atomic_write(output) as file:
        figure.savefig(file, format="png", dpi=110, facecolor="white")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
