"""Tokens per second of LMDeploy's engine here, at several batch sizes, beside transformers.

    python -m benchmarks.engine
    python -m benchmarks.engine --model Yuanmeng_Models/yuanmeng-mini-instruct-w4a16-4bit
    python -m benchmarks.engine --quant_policy 8
"""
import time
from dataclasses import dataclass
from typing import Literal

import torch

import patches
from benchmarks.quantization import cache_per_token, weights_in_memory
from model import MINI_DIR, TOKENIZER_DIR
from model.loading import WeightsError, choose_dtype, load_model, load_tokenizer
from training.settings import option, parse_settings


@dataclass
class Settings:
    """What to measure."""

    model: str = option(str(MINI_DIR), "a folder of convert_to_transformers.py or auto_awq")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of weights and activations")
    quant_policy: Literal[0, 8, 4] = option(0, "bits of the KV cache; 0: those of dtype")
    new_tokens: int = option(128, "of each answer")
    threads: int = option(2, "CPU threads")


def main() -> None:
    settings = parse_settings(Settings)
    torch.set_num_threads(settings.threads)
    patches.register()
    from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline

    tokenizer = load_tokenizer(settings.model, TOKENIZER_DIR)
    chat = [{"role": "user", "content": "请介绍一下你自己，并说说你会做什么。" * 2}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    device = patches.default_device()
    dtype = choose_dtype(settings.dtype, device)
    pipe = pipeline(
        settings.model, log_level="ERROR",
        backend_config=PytorchEngineConfig(
            device_type=device, dtype=str(dtype).removeprefix("torch."), session_len=1024,
            quant_policy=settings.quant_policy,
        ),
    )
    print(f"{settings.model}, {dtype}, KV policy {settings.quant_policy}, {device}: weights "
          f"{weights_in_memory(pipe) / 1e6:.1f} MB, {cache_per_token(pipe):.0f} bytes of cache a "
          "token")
    try:
        reference = load_model(settings.model, dtype=dtype, device=device)[0]
    except WeightsError:  # quantized: transformers does not run it here
        reference = None
    greedy = GenerationConfig(
        max_new_tokens=settings.new_tokens, do_sample=False, ignore_eos=True)
    for batch in (1, 8, 32):
        speeds = {"engine": lambda batch=batch: pipe([chat] * batch, gen_config=greedy)}
        if reference is not None:
            ids = torch.tensor([prompt["input_ids"]] * batch, device=device)
            speeds["transformers"] = lambda ids=ids: reference.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=settings.new_tokens, min_new_tokens=settings.new_tokens)
        line = f"  batch {batch:2d}:"
        for name, run in speeds.items():
            run()
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                run()
                best = min(best, time.perf_counter() - start)
            line += f"  {name} {batch * settings.new_tokens / best:7,.0f} tokens/s"
        print(line, flush=True)
    pipe.close()


if __name__ == "__main__":
    main()
