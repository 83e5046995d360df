"""What needs no code: an agent is greeted and thanked, too."""
import random

from .kinds import KINDS, Task

# The answer is the wording's; there is nothing to draw.


def nothing_to_compute(rng: random.Random, language: str, state: dict) -> Task:
    return Task({}, None)


@KINDS.add("talk", weight=0.4)
def hello(rng: random.Random, language: str, state: dict) -> Task:
    return nothing_to_compute(rng, language, state)


@KINDS.add("talk", weight=0.4)
def who(rng: random.Random, language: str, state: dict) -> Task:
    return nothing_to_compute(rng, language, state)


@KINDS.add("talk", weight=0.4)
def able(rng: random.Random, language: str, state: dict) -> Task:
    return nothing_to_compute(rng, language, state)


@KINDS.add("talk", needs="thanked")
def thanks(rng: random.Random, language: str, state: dict) -> Task:
    return nothing_to_compute(rng, language, state)
