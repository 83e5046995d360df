"""Stage Ⅱ for stage Ⅸ: conversations in which a model acts by writing Python, all code run.

In:   the sandbox (`python -m codeact.install`, which setup.sh runs) and the tokenizer.
Out:  `dataset/codeact.jsonl` to train on and `dataset/eval_codeact.jsonl` to measure by, the same
      byte for byte for the same seed.
Next: `python train_sft.py` mixes the first in, `python evaluate.py --task codeact` asks the second.

    python -m dataset.codeact
    python -m dataset.codeact --conversations 3000 --workers 1
"""
import asyncio
import itertools
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer

from codeact.install import InstallError
from codeact.sandbox import Sandbox, SandboxError
from codeact_pipeline import tools
from dataset.codeact.conversations import SPLITS, Conversation, evaluation, make
from dataset.codeact.facts import has_numbers
from dataset.codeact.verification import WrongTask, verified
from model import TOKENIZER_DIR
from model.conversation import encode_conversation
from training.files import atomic_write
from training.settings import option, parse_settings

MOST_DROPPED = 0.1  # more would mean that a kind is wrong


@dataclass
class Settings:
    output: str = option("dataset/codeact.jsonl", "the conversations to train on")
    eval_output: str = option("dataset/eval_codeact.jsonl", "the held-out ones; none: leave out")
    conversations: int = option(100_000, "how many to train on")
    evaluation: int = option(200, "held-out ones of each split: numbers, phrasings, recovery")
    max_tokens: int = option(1024, "of a conversation; later questions that go beyond are left out")
    workers: int = option(2, "processes of the sandbox at once, about 300 MB each")
    seed: int = option(42, "same seed, same files")


@dataclass
class Tally:
    """What has been written and what was dropped."""

    families: Counter = field(default_factory=Counter)
    questions: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    longest: int = 0
    dropped: Counter = field(default_factory=Counter)

    def add(self, conversation: Conversation, turns: int, tokens: int) -> None:
        family = conversation.turns[0].kind.family
        self.families[family] += 1
        self.questions[family] += turns
        self.tokens[family] += tokens
        self.longest = max(self.longest, tokens)


async def written(settings: Settings, sandbox: Sandbox, tally: Tally) -> AsyncIterator[dict]:
    """The records to train on, without end."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    numbers = (make(settings.seed, number) for number in itertools.count())
    async with aclosing(verified(numbers, sandbox, tools, settings.workers)) as results:
        async for conversation, parts in results:
            if isinstance(parts, WrongTask):
                tally.dropped[conversation.turns[0].kind.name] += 1
                continue
            while True:
                messages = list(itertools.chain(*parts))
                tokens = len(encode_conversation(tokenizer, messages)[0])
                if tokens <= settings.max_tokens or len(parts) == 2:
                    break
                parts.pop()
            if tokens > settings.max_tokens:
                tally.dropped["too long"] += 1
                continue
            tally.add(conversation, len(parts) - 1, tokens)
            yield {"conversations": messages, "source": "codeact",
                   "family": conversation.turns[0].kind.family}


async def measured(settings: Settings, sandbox: Sandbox, split: str) -> list[dict]:
    """The evaluation items of a split: held-out tasks whose answer does not stand in a question."""
    items: dict[str, dict] = {}
    conversations = evaluation(settings.seed, split)
    async with aclosing(verified(conversations, sandbox, tools, settings.workers)) as results:
        async for conversation, parts in results:
            item = item_of(conversation)
            if not isinstance(parts, WrongTask) and not answered_by_question(item):
                items[json.dumps(item["questions"])] = item
            if len(items) == settings.evaluation:
                break
    return list(items.values())


def item_of(conversation: Conversation) -> dict:
    """What evaluation needs to know: the questions and what each answer must say."""
    turns = conversation.turns
    return {
        "task": "codeact", "kind": "agent", "split": conversation.split,
        "family": turns[0].kind.family, "name": turns[0].kind.name,
        "language": conversation.language,
        "questions": [
            {"content": turn.question, "numbers": turn.task.numbers, "texts": turn.task.texts,
             "verdict": turn.task.verdict}
            for turn in turns
        ],
        "mistaken": turns[0].mistaken,
    }


def answered_by_question(item: dict) -> bool:
    """Whether repeating a question would give its answer."""
    asked = ""
    for question in item["questions"]:
        asked += question["content"] + "\n"
        if question["numbers"] and has_numbers(asked, question["numbers"]):
            return True
        if question["texts"] and not question["verdict"] and all(
                text in asked for text in question["texts"]):
            return True
    return False


async def build(settings: Settings) -> tuple[Tally, int]:
    """Write both files; returns the tally of the first and the number of items in the second."""
    tally, num_items = Tally(), 0
    # Conversations end without a word here, so no spare process is worth its memory.
    async with Sandbox(tools, spare=False) as sandbox:
        with atomic_write(settings.output, "w") as file:
            bar = tqdm(total=settings.conversations, unit=" conversations", disable=None)
            async with aclosing(written(settings, sandbox, tally)) as records:
                async for record in records:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    bar.update()
                    done = sum(tally.families.values())
                    if done >= settings.conversations:
                        break
                    dropped = sum(tally.dropped.values())
                    if dropped > 100 and dropped > MOST_DROPPED * (done + dropped):
                        raise ValueError(f"{dropped} of {done + dropped} conversations are wrong, "
                                         f"most of them of {tally.dropped.most_common(3)}")
            bar.close()
        if settings.eval_output != "none":
            items = [item for split in SPLITS for item in await measured(settings, sandbox, split)]
            num_items = len(items)
            with atomic_write(settings.eval_output, "w") as file:
                file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    return tally, num_items


def show(tally: Tally, settings: Settings) -> Table:
    table = Table(title=f"Conversations ({settings.output})", box=SIMPLE)
    for name in ("first question", "conversations", "questions", "tokens", "tokens each"):
        table.add_column(name, justify="left" if name.startswith("first") else "right")
    for family, count in tally.families.most_common():
        tokens = tally.tokens[family]
        table.add_row(family, f"{count:,}", f"{tally.questions[family]:,}", f"{tokens:,}",
                      f"{tokens / count:.0f}")
    count, tokens = sum(tally.families.values()), sum(tally.tokens.values())
    table.add_section()
    table.add_row("total", f"{count:,}", f"{sum(tally.questions.values()):,}", f"{tokens:,}",
                  f"{tokens / count:.0f}")
    return table


def main() -> None:
    settings = parse_settings(Settings)
    for name in ("conversations", "evaluation", "workers", "max_tokens"):
        if getattr(settings, name) < 1:
            sys.exit(f"dataset.codeact: --{name} must be at least 1")
    try:
        tally, num_items = asyncio.run(build(settings))
    except (InstallError, SandboxError, OSError, ValueError) as error:
        sys.exit(f"dataset.codeact: {error}")
    except KeyboardInterrupt:
        sys.exit(f"dataset.codeact: interrupted; {settings.output} is as it was before")
    Console().print(show(tally, settings))
    dropped = ", ".join(f"{count} {name}" for name, count in tally.dropped.most_common(8))
    print(f"Longest: {tally.longest} tokens. Dropped: {sum(tally.dropped.values())} ({dropped})")
    if num_items:
        print(f"Evaluation ({settings.eval_output}): {num_items} held-out items")


if __name__ == "__main__":
    main()
