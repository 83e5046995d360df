"""Stage Ⅵ, first step: trained weights become a model folder in Hugging Face's layout.

In:   out/sft_512.pth (or out/sft_256.pth).
Out:  Yuanmeng_Models/yuanmeng-26m-instruct (yuanmeng-mini-instruct): config, safetensors in
      bfloat16, tokenizer with its chat template, generation settings.
Next: the folder goes wherever model_chat.py --model and transformers' Auto classes read one
      (after `import model`, which registers the network).

    python convert_to_transformers.py
    python convert_to_transformers.py --model out/sft_256.pth --output_dir /tmp/my-model
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig

from model import PRESETS, TOKENIZER_DIR
from model.loading import find_weights, load_model, load_tokenizer
from training.files import flush_folder, usual_permissions
from training.settings import option, parse_settings


@dataclass
class Settings:
    """What to convert, and where to."""

    model: str | None = option(None, "weights to convert; default: those model_chat.py would use")
    output_dir: str | None = option(None, "default: Yuanmeng_Models/yuanmeng-PRESET-instruct")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of the saved weights")


def main() -> None:
    settings = parse_settings(Settings)
    try:
        path = find_weights("sft", settings.model)
        model, _ = load_model(path, dtype=getattr(torch, settings.dtype))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"convert_to_transformers.py: {error}")
    tokenizer = load_tokenizer(path, TOKENIZER_DIR)
    width = model.config.hidden_size
    preset = next((name for name, shape in PRESETS.items() if shape["hidden_size"] == width), width)
    output = Path(settings.output_dir or f"Yuanmeng_Models/yuanmeng-{preset}-instruct")
    # Sampling as the chat does it, so that generate() answers alike.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.75,
        top_p=0.9,
    )

    # Written beside the old folder; each file then takes its place whole.
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".converting.") as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            output.mkdir(exist_ok=True)
            for file in sorted(Path(temporary).iterdir()):
                usual_permissions(file)
                os.replace(file, output / file.name)
            flush_folder(output)
    except OSError as error:
        sys.exit(f"convert_to_transformers.py: cannot write {output}: {error.strerror}")
    size = sum(file.stat().st_size for file in output.glob("*.safetensors")) / 1e6
    print(f"{path} → {output} ({size:.1f} MB of weights in {settings.dtype})")


if __name__ == "__main__":
    main()
