"""What a second team of OpenMP threads costs: the compiled step of the 26m shape, random weights.

    python -m benchmarks.threads

The same step is timed in the thread that loaded the model, in a second thread while the first one
keeps its team, and there again once the first has let its team go (patches/cpu_threads.py).
"""
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from model import YuanMengModel
from model.cache import KVCache
from model.config import preset_config
from model.step import OneSequence
from patches.cpu_threads import release_team
from training.hardware import set_threads
from training.settings import option, parse_settings

PROMPT = 64  # tokens


@dataclass
class Settings:
    """What to measure."""

    threads: int = option(2, "CPU threads")
    steps: int = option(128, "of decoding, each time")
    rounds: int = option(3, "the best one counts")


@torch.inference_mode()
def milliseconds(model: YuanMengModel, step: OneSequence, settings: Settings) -> float:
    """A step of decoding, in the thread that calls."""
    prompt_1T, best = torch.arange(10, 10 + PROMPT)[None], float("inf")
    for _ in range(settings.rounds):
        cache = KVCache(model.config.num_hidden_layers, PROMPT + settings.steps)
        model(prompt_1T, past_key_values=cache, use_cache=True)
        step.take_over(cache)
        start = time.perf_counter()
        for _ in range(settings.steps):
            step.logits(prompt_1T[0, :1])
        best = min(best, (time.perf_counter() - start) / settings.steps)
    return 1e3 * best


def main() -> None:
    settings = parse_settings(Settings)
    set_threads(settings.threads)
    torch.manual_seed(0)
    model = YuanMengModel(preset_config("26m")).bfloat16().eval()
    step = OneSequence.build(model, say=print)
    arguments = (model, step, settings)
    print(f"the thread that loaded the model: {milliseconds(*arguments):.2f} ms a step")
    with ThreadPoolExecutor(1) as second:
        beside = second.submit(milliseconds, *arguments).result()
        second.submit(release_team).result()
        print(f"a second thread, while the first keeps its team: {beside:.2f} ms")
        release_team()
        alone = second.submit(milliseconds, *arguments).result()
        print(f"the second thread, once the first has let go: {alone:.2f} ms "
              f"({beside / alone:.1f} times as fast)")


if __name__ == "__main__":
    main()
