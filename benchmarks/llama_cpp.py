"""The exported GGUF in llama.cpp itself, against this repository: the same tokens, the same words.

llama-cpp-python is built from source, which takes minutes, so it is not among the requirements:

    python -m pip install --no-deps --target .venv/llama llama-cpp-python==0.3.36 diskcache==5.6.3
    PYTHONPATH=.venv/llama python -m benchmarks.llama_cpp
"""
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model.export import save_gguf
from model.generation import generate_tokens
from model.loading import find_weights, load_model, load_tokenizer
from training.settings import option, parse_settings

PACKAGES = ["llama-cpp-python==0.3.36", "diskcache==5.6.3"]
QUESTIONS = ["你是谁", "李白是谁？", "36加47等于多少", "今天天气怎么样", "“画蛇添足”是什么意思？",
             "写一个Python函数，求两个数的和。", "Who are you?", "你喜欢吃什么"]


@dataclass
class Settings:
    """What to compare."""

    model: str | None = option(None, "a .pth file or a model folder; default: as model_chat.py")
    data: str = option("dataset/pretrain_starter.jsonl", "texts whose tokens are compared")
    texts: int = option(10_000, "how many of them, drawn at random")
    max_new_tokens: int = option(64, "of each answer")


def main() -> None:
    settings = parse_settings(Settings)
    try:
        from llama_cpp import Llama
    except ImportError:
        sys.exit("benchmarks/llama_cpp.py: llama-cpp-python is missing; this file's beginning says "
                 "how to build it")
    if not Path(settings.data).is_file():
        sys.exit(f"benchmarks/llama_cpp.py: {settings.data} does not exist; "
                 "`python -m dataset.starter` makes it")
    path = find_weights("sft", settings.model)
    model, name = load_model(path)
    tokenizer = load_tokenizer(path, path)
    with tempfile.TemporaryDirectory() as folder:
        save_gguf(model, tokenizer, folder, name)
        llama = Llama(str(Path(folder) / f"{name}.gguf"), n_ctx=2048, n_threads=2, verbose=False,
                      logits_all=False)

    lines = Path(settings.data).read_text("utf-8").splitlines()
    drawn = random.Random(0).sample(lines, min(settings.texts, len(lines)))
    texts = [json.loads(line)["text"] for line in drawn]
    same = sum(
        llama.tokenize(text.encode(), add_bos=False, special=False)
        == tokenizer.encode(text, split_special_tokens=True, verbose=False)
        for text in texts
    )
    print(f"{same:,} of {len(texts):,} texts have the same tokens in llama.cpp")

    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(prompt)
        ours = list(generate_tokens(model, ids, max_new_tokens=settings.max_new_tokens,
                                    temperature=0))
        reply = llama.create_chat_completion(  # the template is llama.cpp's reading of the file's
            messages, temperature=0, max_tokens=settings.max_new_tokens, repeat_penalty=1.0)
        theirs = reply["choices"][0]["message"]["content"]
        assert reply["usage"]["prompt_tokens"] == len(ids), (reply["usage"], len(ids))
        mark = "=" if theirs == tokenizer.decode(ours) else "≠"
        print(f"{mark} {question} → {theirs}")

    prompt = tokenizer.encode("床前明月光，疑是地上霜。" * 8)
    for label, tokens in (("transformers-style loop", generate_tokens(
            model, prompt, max_new_tokens=256, temperature=0, eos_token_id=None)),
            ("llama.cpp", llama.generate(prompt, temp=0, repeat_penalty=1.0))):
        next(tokens)
        start = time.perf_counter()
        for _ in range(200):
            next(tokens)
        print(f"{label}: {200 / (time.perf_counter() - start):.0f} tokens/s, float32, "
              f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
