"""An honest report card: what a model knows, and how it talks, on text it was not trained on.

In:   a checkpoint (out/*.pth, or a folder in Hugging Face's layout) and dataset/eval_starter.jsonl.
Out:  a table on the screen and in out/report.md, every reply in out/report.jsonl.

Three kinds of tasks: held-out texts, in bits per byte; multiple choice, by the likelihood of each
choice per byte, beside the rate of guessing; and conversations, answered greedily and checked
against the facts they ask for. Rates come with 95 % intervals (Wilson, 1927).

    python evaluate.py                            # the model that model_chat.py would talk to
    python evaluate.py --model out/pretrain_256.pth --tasks bits_per_byte,poem_next
"""

import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from model import TOKENIZER_DIR, YuanMengModel
from model.loading import find_weights, load_model, load_tokenizer
from training.files import atomic_write
from training.settings import option, parse_settings


@dataclass
class Settings:
    """What to measure."""

    model: str | None = option(None, "a .pth file or a model folder; default: as model_chat.py")
    data: str = option(
        "dataset/eval_starter.jsonl", "the tasks; python -m dataset.starter makes them"
    )
    tasks: str = option("all", "names separated by commas")
    limit: int = option(200, "items per task at most (0: all)")
    max_new_tokens: int = option(96, "a reply that has not ended by then counts as endless")
    batch_size: int = option(32, "sequences at a time")
    output: str = option("out/report.md", "the report; the replies go beside it as .jsonl")


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a rate, sound for rates near 0 and 1 as well."""
    rate, spread = right / total, z * z / total
    centre = (rate + spread / 2) / (1 + spread)
    margin = z / (1 + spread) * math.sqrt(rate * (1 - rate) / total + spread / (4 * total))
    return max(0.0, centre - margin), min(1.0, centre + margin)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


@torch.inference_mode()
def continuation_losses(
    model: YuanMengModel, pairs: list[tuple[list[int], list[int]]], batch_size: int
) -> list[float]:
    """Nats of each continuation after its context, for (context ids, continuation ids) pairs."""
    losses = [0.0] * len(pairs)
    limit = model.config.max_position_embeddings
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for start in tqdm(range(0, len(order), batch_size), desc="scoring", leave=False, disable=None):
        chosen = order[start : start + batch_size]
        rows = [(pairs[i][0] + pairs[i][1])[-limit:] for i in chosen]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=model.device)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(
                tokens
            )  # causal: padding on the right changes nothing
        logits = model(ids, use_cache=False).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), ids[:, 1:], reduction="none"
        )
        for i, row, tokens in zip(chosen, nats, rows, strict=True):
            last = len(tokens) - 1
            losses[i] = row[max(0, last - len(pairs[i][1])) : last].sum().item()
    return losses


@torch.inference_mode()
def greedy_replies(
    model: YuanMengModel, tokenizer, items: list[dict], settings: Settings
) -> list[tuple[str, bool]]:
    """(reply, whether it ended by itself) to each item's conversation, without any sampling."""
    tokenizer.padding_side = "left"
    replies: list[tuple[str, bool]] = []
    size = settings.batch_size
    for start in tqdm(range(0, len(items), size), desc="chatting", leave=False, disable=None):
        inputs = tokenizer.apply_chat_template(
            [item["conversations"] for item in items[start : start + size]],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        ).to(model.device)
        output = model.generate(
            **inputs,
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for ids in output[:, inputs["input_ids"].shape[1] :]:
            ended = bool((ids == tokenizer.eos_token_id).any())
            replies.append((tokenizer.decode(ids, skip_special_tokens=True), ended))
    return replies


def is_right(item: dict, reply: str) -> bool:
    """Whether a reply says what the item asks for."""
    if item.get("match") == "number":
        numbers = re.findall(r"-?\d+(?:\.\d+)?", reply)
        return bool(numbers) and numbers[-1] in item["accept"]
    if "accept_all" in item:
        return all(text in reply for text in item["accept_all"])
    return any(text in reply for text in item["accept"])


def loops(reply: str, ended: bool) -> bool:
    """Whether a reply runs in circles: it never ends, or says something three times in a row.

    A number may have as many zeros as it likes.
    """
    repeated = re.finditer(r"(.{2,}?)\1\1", reply, re.DOTALL)
    return not ended or any(not match[1].isdigit() for match in repeated)


def read_tasks(settings: Settings) -> dict[str, list[dict]]:
    """Items by task, the first `limit` of each (texts: of each source)."""
    path = Path(settings.data)
    if not path.exists():
        sys.exit(f"{path} does not exist: `python -m dataset.starter` makes it")
    tasks: dict[str, list[dict]] = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                item = json.loads(line)
                tasks[item["task"]].append(item)
            except (ValueError, KeyError, TypeError):
                sys.exit(f"{path}:{number}: is no task; `python -m dataset.starter` makes the file")
    wanted = list(tasks) if settings.tasks == "all" else settings.tasks.split(",")
    for name in wanted:
        if name not in tasks:
            sys.exit(f"--tasks {name}: {path} holds {', '.join(tasks)}")
    return {
        name: tasks[name][: settings.limit or None]
        if tasks[name][0]["kind"] != "text"
        else tasks[name]
        for name in wanted
    }


def measure(
    model: YuanMengModel, tokenizer, tasks: dict[str, list[dict]], settings: Settings
) -> tuple[list[tuple[str, ...]], list[dict]]:
    """The rows of the report (task, items, score, 95 % interval, chance) and all replies."""
    rows: list[tuple[str, ...]] = []
    chats: list[dict] = []
    bos = [tokenizer.bos_token_id]
    for name, items in tasks.items():
        kind = items[0]["kind"]
        if kind == "text":
            pairs = [(bos, encode(tokenizer, item["text"])) for item in items]
            nats, size = defaultdict(float), defaultdict(int)
            for item, loss in zip(items, continuation_losses(model, pairs, 8), strict=True):
                nats[item["source"]] += loss
                size[item["source"]] += len(item["text"].encode())
            for source in sorted(nats):
                bits = nats[source] / math.log(2) / size[source]
                count = sum(item["source"] == source for item in items)
                rows.append((f"bits per byte: {source}", str(count), f"{bits:.3f}", "", ""))
        elif kind == "choice":
            pairs = [
                (bos + encode(tokenizer, item["question"]), encode(tokenizer, choice))
                for item in items
                for choice in item["choices"]
            ]
            losses = iter(continuation_losses(model, pairs, settings.batch_size))
            right = 0
            for item in items:
                per_byte = [next(losses) / len(choice.encode()) for choice in item["choices"]]
                right += per_byte.index(min(per_byte)) == item["answer"]
            chance = sum(1 / len(item["choices"]) for item in items) / len(items)
            rows.append((name, *rate_columns(right, len(items)), f"{chance:.1%}"))
        else:
            replies = greedy_replies(model, tokenizer, items, settings)
            verdicts = [
                is_right(item, reply) for item, (reply, _) in zip(items, replies, strict=True)
            ]
            rows.append((name, *rate_columns(sum(verdicts), len(items)), ""))
            chats += [
                {
                    "task": name,
                    "question": item["conversations"][-1]["content"],
                    "reply": reply,
                    "right": verdict,
                    "loops": loops(reply, ended),
                }
                for item, (reply, ended), verdict in zip(items, replies, verdicts, strict=True)
            ]
    if chats:
        looping = sum(chat["loops"] for chat in chats)
        rows.append(("replies that loop", *rate_columns(looping, len(chats)), ""))
    return rows, chats


def rate_columns(right: int, total: int) -> tuple[str, str, str]:
    low, high = wilson_interval(right, total)
    return str(total), f"{right / total:.1%}", f"{low:.1%} – {high:.1%}"


def main() -> None:
    settings = parse_settings(Settings)
    try:
        path = find_weights("sft", settings.model)
        model, name = load_model(path, device="cuda" if torch.cuda.is_available() else "cpu")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")
    tokenizer = load_tokenizer(path, TOKENIZER_DIR)
    rows, chats = measure(model, tokenizer, read_tasks(settings), settings)

    header = ("task", "items", "score", "95 % interval", "chance")
    table = Table(*header, title=f"{name} ({path})")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    output = Path(settings.output)
    with atomic_write(output, "w") as file:
        file.write(f"# {name}\n\n")
        for row in (header, ("---",) * len(header), *rows):
            file.write(f"| {' | '.join(row)} |\n")
    with atomic_write(output.with_suffix(".jsonl"), "w") as file:
        file.writelines(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
    print(f"Report: {output}; replies: {output.with_suffix('.jsonl')}")


if __name__ == "__main__":
    main()
