"""An honest report card: what a model knows, and how it talks, on text it was not trained on.

In:   a checkpoint (out/*.pth; a folder in Hugging Face's layout, quantized by AWQ or not; or a
      server with OpenAI's interface) and dataset/eval_starter.jsonl.
Out:  a table on the screen and in out/report.md, a chart in out/report.png, every reply in
      out/report.jsonl. The same seed gives the same files.

Held-out texts, in bits per byte; multiple choice, by the likelihood of each choice per byte, beside
the rate of guessing; conversations, answered greedily and checked against the facts they ask for;
and, if asked for, the task codeact: the whole agent, a served model and the sandbox. All scores
have 95 % intervals; two checkpoints are compared item by item (training/significance.py).

    python evaluate.py                            # the model that model_chat.py would talk to
    python evaluate.py --model out/pretrain_256.pth --tasks bits_per_byte,poem_next
    python evaluate.py --compare out/sft_256.pth
    python evaluate.py --task codeact --base_url http://127.0.0.1:23333/v1
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.tasks import AGENT, draw, read_items
from model.endpoint import Endpoint
from model.loading import find_weights
from model.scoring import Checkpoint
from training.files import atomic_write
from training.measurement import Score, judge_replies, score_choices, score_texts
from training.report_card import draw_chart, print_rows, report_rows, write_report
from training.settings import option, parse_settings

URL = ("http://", "https://")


@dataclass
class Settings:
    """What to measure."""

    model: str | None = option(None, "a .pth file or a model folder; default: as model_chat.py")
    base_url: str | None = option(None, "measure the model served there: http://127.0.0.1:23333/v1")
    api_key: str | None = option(None, "of that server, if it wants one")
    compare: str | None = option(None, "a second checkpoint: file, folder or URL")
    data: str = option(
        "dataset/eval_starter.jsonl", "the tasks; python -m dataset.starter makes them"
    )
    agent_data: str = option(
        "dataset/eval_codeact.jsonl", "those of the task codeact; python -m dataset.codeact"
    )
    tasks: str = option("all", "names separated by commas; codeact only if it is named")
    exam_dir: str | None = option(None, "folder of C-Eval or CMMLU .csv files, for the task exam")
    limit: int = option(200, "items per task, source, subject and split at most (0: all)")
    seed: int = option(42, "of the items drawn, the bootstrap and the sign-flip test")
    max_new_tokens: int = option(96, "a reply that has not ended by then counts as endless")
    batch_size: int = option(32, "sequences at a time")
    agent_steps: int = option(5, "pieces of code that the agent may run for a question")
    agent_conversations: int = option(4, "of the agent at once, about 300 MB each")
    output: str = option("out/report.md", "the report; chart and replies go beside it")


def check(settings: Settings) -> None:
    """Raise a ValueError that names the first setting that cannot be."""
    if settings.base_url and settings.model:
        raise ValueError("--base_url and --model are two models; give the second as --compare")
    if settings.base_url and not settings.base_url.startswith(URL):
        raise ValueError(f"--base_url {settings.base_url} is no URL; it begins with http://")
    served = [settings.base_url] + [settings.compare] * bool(settings.compare)
    if AGENT in settings.tasks.split(",") and not all(x and x.startswith(URL) for x in served):
        raise ValueError("the task codeact needs a served model: --base_url and --compare are URLs "
                         "(python lmdeploy_cli.py serve api_server ...)")
    least_of = {"limit": 0, "seed": 0, "max_new_tokens": 1, "batch_size": 1, "agent_steps": 1,
                "agent_conversations": 1}
    for name, least in least_of.items():
        if getattr(settings, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(settings, name)}")


def open_checkpoint(where: str | None, settings: Settings) -> Checkpoint | Endpoint:
    """The model at a path or URL; by default the one model_chat.py would talk to."""
    if where and where.startswith(URL):
        return Endpoint(where, settings.api_key)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Checkpoint(find_weights("sft", where), settings.batch_size, device)


def measure(
    checkpoint: Checkpoint | Endpoint, tasks: dict[str, list[dict]], settings: Settings
) -> tuple[list[Score], list[dict]]:
    """All scores of a checkpoint, and its replies."""
    scores: list[Score] = []
    chats: list[dict] = []
    runs: list[dict] = []
    for name, items in tasks.items():
        kind = items[0]["kind"]
        if kind not in checkpoint.kinds:
            continue  # `left_out` tells the reader
        if kind == "text":
            scores += score_texts(checkpoint, items)
        elif kind == "choice":
            scores += score_choices(checkpoint, name, items)
        elif kind == "agent":
            from codeact_pipeline import tools  # here, for the agent takes seconds to load
            from training.agent_measurement import measure_agent

            found, runs = measure_agent(items, checkpoint.source, settings.api_key, tools,
                                        settings.agent_steps, settings.agent_conversations)
            scores += found
            runs = [{"model": checkpoint.name, **run} for run in runs]
        else:
            score, replies = judge_replies(checkpoint, name, items, settings.max_new_tokens)
            scores.append(score)
            chats += replies
    if chats:
        looping = [chat["loops"] for chat in chats]
        scores.append(Score("replies that loop", looping, lower_is_better=True))
    if not scores:
        raise ValueError(f"{checkpoint.name}: nothing to measure: {checkpoint.left_out}")
    return scores, chats + runs


def main() -> None:
    settings = parse_settings(Settings)
    columns: dict[str, list[Score]] = {}
    chats: list[dict] = []
    try:
        check(settings)
        exams = Path(settings.exam_dir) if settings.exam_dir else None
        tasks, notes = read_items(settings.tasks.split(","), Path(settings.data),
                                  Path(settings.agent_data), exams)
        tasks = {task: draw(items, settings.limit, settings.seed) for task, items in tasks.items()}
        names = ("tasks", "limit", "seed", "max_new_tokens", "batch_size")
        notes.append(", ".join(f"{name}: {getattr(settings, name)}" for name in names))
        models = [settings.base_url or settings.model]
        models += [settings.compare] if settings.compare else []
        for where in models:
            checkpoint = open_checkpoint(where, settings)
            name = checkpoint.name + (" (2)" if checkpoint.name in columns else "")
            notes.append(f"model {name}: {checkpoint.source}")
            if checkpoint.left_out:
                notes.append(f"left out for {name}: {checkpoint.left_out}")
            columns[name], replies = measure(checkpoint, tasks, settings)
            chats += replies
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")

    rows = report_rows(columns, settings.seed)
    print_rows(rows, title=" and ".join(columns))
    output = Path(settings.output)
    chart, talk = output.with_suffix(".png"), output.with_suffix(".jsonl")
    try:
        draw_chart(columns, settings.seed, chart)
        write_report(output, rows, columns, notes, chart.name)
        with atomic_write(talk, "w") as file:
            file.writelines(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
    except OSError as error:
        sys.exit(f"evaluate.py: cannot write {output}: {error.strerror}")
    print(f"Report: {output}; chart: {chart}; replies: {talk}")


if __name__ == "__main__":
    main()
