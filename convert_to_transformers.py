"""Stage Ⅵ, first step: trained weights become a model that other programs load.

In:   out/sft_512.pth (or out/sft_256.pth).
Out:  Yuanmeng_Models/yuanmeng-26m-instruct (yuanmeng-mini-instruct): config, weights, tokenizer
      with its chat template, generation settings, and the network's code.
      `--format llama`: the same weights as a plain Llama, in …-instruct-llama.
      `--format gguf`: one file for llama.cpp and Ollama, in …-instruct-gguf.
Next: lmdeploy_pipeline.py

    python convert_to_transformers.py
    python convert_to_transformers.py --format gguf --dtype float32
    python convert_to_transformers.py --model out/sft_256.pth --output_dir /tmp/my-model
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from model import PRESETS, TOKENIZER_DIR
from model.export import save_gguf, save_llama, save_yuanmeng
from model.loading import find_weights, load_model, load_tokenizer
from training.files import move_files
from training.settings import option, parse_settings


@dataclass
class Settings:
    """What to convert, and where to."""

    model: str | None = option(None, "weights to convert; default: those model_chat.py would use")
    format: Literal["yuanmeng", "llama", "gguf"] = option(
        "yuanmeng", "yuanmeng (for LMDeploy), llama (a plain Llama) or gguf (for llama.cpp)"
    )
    output_dir: str | None = option(None, "default: Yuanmeng_Models/yuanmeng-PRESET-instruct…")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of the saved weights")


def main() -> None:
    settings = parse_settings(Settings)
    disable_progress_bar()  # it takes a second
    try:
        path = find_weights("sft", settings.model)
        model, _ = load_model(path, dtype=getattr(torch, settings.dtype))
        tokenizer = load_tokenizer(path, TOKENIZER_DIR)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"convert_to_transformers.py: {error}")
    width = model.config.hidden_size
    preset = next((name for name, shape in PRESETS.items() if shape["hidden_size"] == width), width)
    name = f"yuanmeng-{preset}-instruct"
    suffix = "" if settings.format == "yuanmeng" else f"-{settings.format}"
    output = Path(settings.output_dir or f"Yuanmeng_Models/{name}{suffix}")
    # Sampling as the chat does it, so that generate() answers alike.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.75,
        top_p=0.9,
    )

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".converting.") as temporary:
            if settings.format == "yuanmeng":
                save_yuanmeng(model, tokenizer, temporary)
            elif settings.format == "llama":
                save_llama(model, tokenizer, temporary)
            else:
                save_gguf(model, tokenizer, temporary, name)
            files = move_files(temporary, output)
    except OSError as error:
        sys.exit(f"convert_to_transformers.py: cannot write {output}: {error.strerror}")
    weights = [file for file in files if file.suffix in (".safetensors", ".gguf")]
    size = sum(file.stat().st_size for file in weights) / 1e6
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    print(f"{path} → {output} ({size:.1f} MB of weights in {settings.dtype})")
    print("Files:", ", ".join(file.name for file in files))


if __name__ == "__main__":
    main()
