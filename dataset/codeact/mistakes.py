"""Code that goes wrong, so that a model can learn to mend what an error message complains of.

The wrong code is never learnt (`"learn": false`), only what follows it.
"""
import random
import re
from collections.abc import Callable

from .kinds import Task

SLIPS = {  # a name and what somebody may take it for
    "print(": "printf(", "derivative(f": "derivate(f", "mean(": "average(", "sqrt(": "root(",
    "sorted(": "sort(", "timedelta(": "days(", "sum(": "total(", "len(": "length(",
    "max(": "maximum(", "range(": "rang(", "gcd(": "hcf(", "date(": "day(", "upper()": "toupper()",
    "log(": "ln(", "exp(": "e^(", "round(": "rounded(", "count(": "counts(",
}


def without_import(task: Task, rng: random.Random) -> str:
    return re.sub(r"^from \w+ import \*\n\n?", "", task.code)


def misspelt(task: Task, rng: random.Random) -> str:
    found = [name for name in SLIPS if name in task.code]
    if not found:
        return task.code
    name = rng.choice(found)
    return task.code.replace(name, SLIPS[name])


def unclosed(task: Task, rng: random.Random) -> str:
    return task.code.removesuffix(")")


def unindented(task: Task, rng: random.Random) -> str:
    return task.code.replace("\n    ", "\n", 1)


def undefined(task: Task, rng: random.Random) -> str:
    """Without the first line that gives a variable its value."""
    return re.sub(r"^(data|s|n|d|result|money|count) = .*\n", "", task.code, count=1, flags=re.M)


def as_written(task: Task, rng: random.Random) -> str:
    """As in mathematics, which is no Python."""
    if "w" in task.slots:
        return re.sub(r"return .*", lambda _: f"return {task.slots['w']}", task.code)
    if "e" in task.slots:
        return f"result = {task.slots['e']}\nprint(result)"
    return task.code


def with_numpy(task: Task, rng: random.Random) -> str:
    return f"import numpy as np\n\n{task.code}"


def added_to_text(task: Task, rng: random.Random) -> str:
    """A number cannot be added to a text."""
    return task.code.replace("print(", 'print("= " + ') if task.numbers else task.code


MISTAKES: dict[Callable[[Task, random.Random], str], float] = {
    without_import: 3, misspelt: 4, unclosed: 2, unindented: 2, undefined: 3, as_written: 3,
    with_numpy: 1, added_to_text: 1,
}


def broken(task: Task, rng: random.Random) -> str:
    """The task's code with one mistake. Whether it fails is for the sandbox to say."""
    possible = {make(task, rng): weight for make, weight in MISTAKES.items()}
    possible.pop(task.code, None)
    return rng.choices(list(possible), list(possible.values()))[0]
