"""What a kind of task is, and how the phrasings of `phrasings.txt` are read.

A drawn task is held out from training by a hash of its code, which has all its numbers in it.
"""
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dataset.text import bucket

PHRASINGS = Path(__file__).with_name("phrasings.txt")
LANGUAGES = ("zh", "en")
HELD_OUT_ONE_IN = 10
CHOICE = re.compile(r"<([^<>]*\|[^<>]*)>")


@dataclass(frozen=True)
class Wording:
    """How a kind is asked for in one language, and how its answer is worded."""

    asks: tuple[str, ...]
    held_out: tuple[str, ...]  # asked in evaluation only
    answer: str


@dataclass(frozen=True)
class Task:
    """One drawn task.

    Args:
        slots: what the phrasings and the answer name.
        code: solves it; None where there is nothing to compute.
        numbers: that the code must print in this order, found by a way of its own.
        texts: that it must print.
        verdict: what the answer must say, where the printed value alone is no answer.
        key: what is held out by; the code if empty.
        state: the variable that stays for a follow-up and its value.
    """

    slots: dict[str, object]
    code: str | None
    numbers: tuple[int | float, ...] = ()
    texts: tuple[str, ...] = ()
    verdict: str = ""
    key: str = ""
    state: dict[str, object] = field(default_factory=dict)

    @property
    def is_held_out(self) -> bool:
        return held_out(self.key or self.code or "")


Draw = Callable[[random.Random, str, dict], Task | None]


@dataclass(frozen=True)
class Kind:
    """A sort of task.

    Args:
        draw: (rng, language, state of the turn before) -> a task, or None to be asked again.
        needs: the variable of an earlier turn it goes on with; "" for a first question.
        weight: how often it is drawn.
    """

    name: str
    family: str
    draw: Draw
    needs: str = ""
    weight: float = 1.0

    def wording(self, language: str) -> Wording:
        return read_phrasings()[self.name][language]


class Registry(dict[str, Kind]):
    """All kinds by name; `@KINDS.add("family")` adds the function below it."""

    def add(self, family: str, needs: str = "", weight: float = 1.0):
        def decorate(draw: Draw) -> Draw:
            self[draw.__name__] = Kind(draw.__name__, family, draw, needs, weight)
            return draw

        return decorate


KINDS = Registry()


def held_out(key: str) -> bool:
    """Whether a task with this key is for evaluation only."""
    return bucket(f"codeact {key}", HELD_OUT_ONE_IN) == 0


# ---- Phrasings -----------------------------------------------------------------------------------


@cache
def read_phrasings() -> dict[str, dict[str, Wording]]:
    """The wordings by kind and language.

    Raises:
        ValueError: a line of the file is none of those it explains.
    """
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    name = ""
    for number, line in enumerate(PHRASINGS.read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            name = line.strip("[]")
            found[name] = {language: {"": [], "!": [], "=": []} for language in LANGUAGES}
            continue
        match = re.fullmatch(r"(zh|en)([!=]?) (.+)", line)
        if match is None:
            raise ValueError(f"{PHRASINGS}:{number}: is neither a phrasing nor an answer")
        found[name][match[1]][match[2]].append(match[3])
    return {
        name: {
            language: Wording(tuple(lines[""]), tuple(lines["!"]), lines["="][0])
            for language, lines in languages.items()
        }
        for name, languages in found.items()
    }


def chosen(phrasing: str, rng: random.Random) -> str:
    """The phrasing with one of each `<a|b>`."""
    return CHOICE.sub(lambda match: rng.choice(match[1].split("|")), phrasing)


def variants(phrasing: str) -> Iterator[str]:
    """All that `chosen` can make of it."""
    parts = [part.split("|") if i % 2 else [part] for i, part in enumerate(CHOICE.split(phrasing))]
    yield from map("".join, itertools.product(*parts))


# ---- Numbers -------------------------------------------------------------------------------------


def whole(rng: random.Random, low: int = 2, digits: int = 4) -> int:
    """A whole number of 1 to `digits` digits, short and long ones alike, at least `low`."""
    while True:
        size = rng.randint(1, digits)
        number = rng.randint(10 ** (size - 1), 10**size - 1)
        if number >= low:
            return number


def amount(rng: random.Random, digits: int = 4) -> str:
    """A positive number as it is written: whole, or with one or two decimals."""
    number = str(whole(rng, 2, digits))
    places = rng.choices((0, 1, 2), (65, 20, 15))[0]
    if places:
        decimals = f"{rng.randint(1, 10**places - 1):0{places}}"
        number += f".{decimals}"
    return number
