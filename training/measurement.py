"""Putting items to a checkpoint: each kind of task becomes scores that remember every item.

A checkpoint is a `model.scoring.Checkpoint` or a `model.endpoint.Endpoint`; items are those of
`dataset/tasks.py`.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from dataset.tasks import is_right, loops
from training.significance import bootstrap_interval, wilson_interval


@dataclass
class Score:
    """One task's outcome, item by item, so that two checkpoints can be compared item by item.

    Args:
        values: of each item, whether it was right; of each text, the bits it took.
        sizes: of each text, its bytes. Without sizes the score is a rate.
        unit: of a score with sizes; "steps" a question are its other kind.
        chance: the rate of guessing.
    """

    name: str
    values: list[float]
    sizes: list[int] | None = None
    chance: float | None = None
    lower_is_better: bool = False
    unit: str = "bits per byte"

    def __post_init__(self):
        if self.sizes:
            self.lower_is_better = True
        else:
            self.unit = "rate"

    @property
    def value(self) -> float:
        return sum(self.values) / (sum(self.sizes) if self.sizes else len(self.values))

    def interval(self, seed: int) -> tuple[float, float]:
        if self.sizes:
            return bootstrap_interval(self.values, self.sizes, seed)
        return wilson_interval(int(sum(self.values)), len(self.values))

    def show(self, value: float) -> str:
        return f"{value:.3f}" if self.sizes else f"{value:.1%}"


def score_texts(checkpoint, items: list[dict]) -> list[Score]:
    """Bits per byte of each source and of all texts: what a compressor with this model needs."""
    losses = checkpoint.losses([("", item["text"]) for item in items])
    bits = [loss / math.log(2) for loss in losses]
    sizes = [len(item["text"].encode()) for item in items]
    scores = [
        Score(f"bits per byte: {source}", [bits[i] for i in own], [sizes[i] for i in own])
        for source, own in grouped(items, "source").items()
    ]
    return [*scores, Score("bits per byte: total", bits, sizes)]


def score_choices(checkpoint, name: str, items: list[dict]) -> list[Score]:
    """Whether the right choice is the likeliest per byte; an exam's subjects and total apart.

    Per byte, because a longer text is less likely whatever it says.
    """
    pairs = [(item["question"], choice) for item in items for choice in item["choices"]]
    losses = iter(checkpoint.losses(pairs))
    right = []
    for item in items:
        per_byte = [next(losses) / len(choice.encode()) for choice in item["choices"]]
        right.append(per_byte.index(min(per_byte)) == item["answer"])

    def score(name: str, own: list[int]) -> Score:
        chance = sum(1 / len(items[i]["choices"]) for i in own) / len(own)
        return Score(name, [right[i] for i in own], chance=chance)

    everything = list(range(len(items)))
    if "subject" not in items[0]:
        return [score(name, everything)]
    subjects = grouped(items, "subject").items()
    return [*(score(f"{name}: {subject}", own) for subject, own in subjects),
            score(f"{name}: total", everything)]


def judge_replies(
    checkpoint, name: str, items: list[dict], max_new_tokens: int
) -> tuple[Score, list[dict]]:
    """How many replies say what was asked, and each of them with its verdicts."""
    replies = checkpoint.replies([item["conversations"] for item in items], max_new_tokens)
    chats = [
        {
            "model": checkpoint.name,
            "task": name,
            "question": item["conversations"][-1]["content"],
            "reply": reply,
            "right": is_right(item, reply),
            "loops": loops(reply, ended),
        }
        for item, (reply, ended) in zip(items, replies, strict=True)
    ]
    return Score(name, [chat["right"] for chat in chats]), chats


def grouped(items: list[dict], key: str) -> dict[str, list[int]]:
    """The places of the items with each value of `key`, sorted by value."""
    places = defaultdict(list)
    for i, item in enumerate(items):
        places[item[key]].append(i)
    return dict(sorted(places.items()))
