"""Twenty records give the shipped model another name: does it stick, and what does it cost?

`train_sft.py` runs as its user would, once for each seed, in an empty folder: reading the data,
training and saving are all in its time. Then model and result answer the held-out questions of
evaluate.py, none of which stands in the file: those about the model itself are right if the answer
says the new name and not the old one; arithmetic, follow-up questions and refusals are judged as
ever and compared item by item (McNemar; p adjusted by Holm). One seed is one row of each task.

    python -m benchmarks.personalise
    python -m benchmarks.personalise --seeds 1 --options "--mix 0"
"""

import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.tasks import draw, read_tasks
from model import MINI_DIR
from model.scoring import Checkpoint
from training.files import atomic_write
from training.measurement import Score, judge_replies
from training.settings import option, parse_settings
from training.significance import holm, mcnemar_test, wilson_interval

ROOT = Path(__file__).parents[1]
NAME, KEPT = "identity", ("arithmetic", "follow_up", "refusal")


@dataclass
class Settings:
    """What to train and to ask."""

    init: str = option(str(MINI_DIR), "the model that gets another name")
    own_data: str = option(str(ROOT / "docs/examples/my_name.jsonl"), "the records that do it")
    new_names: str = option("小满,Xiaoman", "one of them has to be in the answer")
    old_names: str = option("缘梦,YuanMeng", "none of them may be")
    seeds: int = option(3, "runs")
    threads: int = option(2, "CPU threads; 1 where other programs want the cores too")
    options: str = option("", "more options of train_sft.py, in one string")
    data: str = option("dataset/eval_starter.jsonl", "the questions, as for evaluate.py")
    limit: int = option(0, "questions of each task at most (0: all)")
    output: str = option("out/personalise.jsonl", "all replies")


def personalise(settings: Settings, seed: int, folder: Path) -> tuple[Path, float, float]:
    """The weights that train_sft.py makes in `folder`; its seconds, and the processors'."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run(
        [
            sys.executable, ROOT / "train_sft.py", "--init", Path(settings.init).resolve(),
            "--data", Path(settings.own_data).resolve(), "--seed", str(seed),
            "--threads", str(settings.threads), *shlex.split(settings.options),
        ],
        cwd=folder, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    print(run.stdout, flush=True)
    if run.returncode:
        sys.exit(f"benchmarks.personalise: train_sft.py ended with status {run.returncode}")
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (weights,) = (folder / "out").glob("sft_[0-9]*[0-9].pth")
    return weights, seconds, processors


def measure(path: Path, tasks: dict[str, list[dict]], settings: Settings
            ) -> tuple[dict[str, Score], list[dict]]:
    """The score of each task, that of the name strictly judged, and all replies."""
    checkpoint, scores, replies = Checkpoint(path, batch_size=32), {}, []
    new, old = settings.new_names.split(","), settings.old_names.split(",")
    for task, items in tasks.items():
        scores[task], chats = judge_replies(checkpoint, task, items, max_new_tokens=96)
        if task == NAME:
            for chat in chats:
                chat["right"] = (
                    any(name in chat["reply"] for name in new)
                    and not any(name in chat["reply"] for name in old)
                )
            scores[task] = Score(task, [chat["right"] for chat in chats])
        replies += chats
    return scores, replies


def show(score: Score) -> str:
    low, high = wilson_interval(sum(score.values), len(score.values))
    return f"{score.value:6.1%} ({low:.1%} – {high:.1%})"


def main() -> None:
    settings = parse_settings(Settings)
    torch.set_num_threads(settings.threads)
    try:
        asked = read_tasks(Path(settings.data))
        tasks = {task: draw(asked[task], settings.limit, seed=42) for task in (NAME, *KEPT)}
        own = Path(settings.own_data).read_text("utf-8")
        known = [item for item in tasks[NAME] if item["conversations"][-1]["content"] in own]
        if known:
            raise ValueError(f"{settings.own_data} holds {len(known)} of the held-out questions")
        before, replies = measure(Path(settings.init), tasks, settings)
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"benchmarks.personalise: {error}")
    rows: list[str] = []
    for seed in range(42, 42 + settings.seeds):
        with tempfile.TemporaryDirectory() as folder:
            weights, seconds, processors = personalise(settings, seed, Path(folder))
            after, chats = measure(weights, tasks, settings)
        replies += [{**chat, "model": f"seed {seed}"} for chat in chats]
        p_values = holm([mcnemar_test(before[t].values, after[t].values) for t in KEPT])
        rows += [f"seed {seed}: {seconds:.0f} s, {processors:.0f} s of the processors"]
        for task in tasks:
            p = f"  p = {p_values[KEPT.index(task)]:.3f}" if task in KEPT else ""
            rows += [f"  {task:10} {len(tasks[task]):4} items  before {show(before[task])}  "
                     f"after {show(after[task])}{p}"]
        print("\n".join(rows[-1 - len(tasks) :]), flush=True)
    with atomic_write(settings.output, "w") as file:
        file.writelines(json.dumps(chat, ensure_ascii=False) + "\n" for chat in replies)
    print(f"Replies: {settings.output}")


if __name__ == "__main__":
    main()
