"""Which matrices suffer from 4 bits: each is rounded alone, the others stay as they are.

Rounded as AWQ does it (a scale and a zero point for each group of inputs), but without its
smoothing, so that a matrix shows what it is like by itself. Held-out texts are scored as prompts,
by PyTorch; what one matrix costs is a difference of bits per byte.

    python -m benchmarks.sensitivity
"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.quantization import TOTAL
from dataset.tasks import draw, read_tasks
from model import MINI_DIR
from model.scoring import Checkpoint
from training.measurement import score_texts
from training.settings import option, parse_settings


@dataclass
class Settings:
    """What to measure."""

    model: str = option(str(MINI_DIR), "a .pth file or a model folder")
    group_size: int = option(64, "inputs that share a scale")
    data: str = option("dataset/eval_starter.jsonl", "the tasks, as for evaluate.py")
    limit: int = option(50, "texts of each source at most (0: all)")
    threads: int = option(2, "CPU threads")


def bits_per_byte(checkpoint: Checkpoint, texts: list[dict]) -> float:
    return next(score.value for score in score_texts(checkpoint, texts) if score.name == TOTAL)


def main() -> None:
    settings = parse_settings(Settings)
    torch.set_num_threads(settings.threads)
    from lmdeploy.lite.quantization.awq import pseudo_quantize_tensor

    try:
        texts = draw(read_tasks(Path(settings.data))["bits_per_byte"], settings.limit, seed=42)
        checkpoint = Checkpoint(settings.model, batch_size=64)
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.sensitivity: {error}")
    matrices = {name: parameter for name, parameter in checkpoint.model.named_parameters()
                if name.startswith("layers.") and parameter.dim() == 2}
    before = bits_per_byte(checkpoint, texts)
    print(f"{before:.4f} bits per byte as it is; what 4 bits add, in one kind of matrix and in all:")

    def cost(pattern: str) -> str:
        """Bits per byte more when the matrices of this name are rounded."""
        kept = {}
        for name, parameter in matrices.items():
            if re.fullmatch(pattern, name):
                kept[name] = parameter.detach().clone()
                parameter.data = pseudo_quantize_tensor(
                    parameter.data.float(), 4, settings.group_size).to(parameter.dtype)
        found = bits_per_byte(checkpoint, texts) - before
        for name, values in kept.items():
            matrices[name].data = values
        return f"{found:+9.4f}"

    layers = range(checkpoint.model.config.num_hidden_layers)
    print("         all   " + "".join(f"layer {layer:<3}" for layer in layers), flush=True)
    for kind in ("wq", "wk", "wv", "wo", "w1", "w3", "w2", "w."):
        row = [cost(rf"layers\.{layer}\..*\.{kind}\.weight") for layer in (r"\d+", *layers)]
        print(f"{'all' if kind == 'w.' else kind:4}{''.join(row)}", flush=True)


if __name__ == "__main__":
    main()
