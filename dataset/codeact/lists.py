"""Lists of numbers and their statistics; later turns go on with `data`."""
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from .kinds import KINDS, Task


def mean(data: list) -> Fraction:
    return sum(map(Fraction, data)) / len(data)


def squares(data: list) -> Fraction:
    middle = mean(data)
    return sum((Fraction(x) - middle) ** 2 for x in data)


def median(data: list) -> Fraction:
    ordered, half = sorted(map(Fraction, data)), len(data) // 2
    return ordered[half] if len(data) % 2 else (ordered[half - 1] + ordered[half]) / 2


def mode(data: list) -> Fraction | None:
    """The commonest value; None where there are two."""
    (first, count), *others = Counter(data).most_common(2)
    return None if count == 1 or (others and others[0][1] == count) else Fraction(first)


@dataclass(frozen=True)
class Statistic:
    zh: tuple[str, ...]
    en: tuple[str, ...]
    python: str
    value: Callable[[list], object]


STATISTICS = (
    Statistic(("平均数", "平均值", "均值"), ("mean", "average"), "mean(data)", mean),
    Statistic(("中位数",), ("median",), "median(data)", median),
    Statistic(("众数",), ("mode", "most frequent value"), "mode(data)", mode),
    Statistic(("最大值", "最大的数"), ("maximum", "largest number"), "max(data)", max),
    Statistic(("最小值", "最小的数"), ("minimum", "smallest number"), "min(data)", min),
    Statistic(("和", "总和"), ("sum", "total"), "sum(data)", lambda data: mean(data) * len(data)),
    Statistic(("极差",), ("range",), "max(data) - min(data)",
              lambda data: Fraction(max(data)) - Fraction(min(data))),
    Statistic(("总体方差",), ("population variance",), "pvariance(data)",
              lambda data: squares(data) / len(data)),
    Statistic(("样本方差",), ("sample variance",), "variance(data)",
              lambda data: squares(data) / (len(data) - 1)),
    Statistic(("总体标准差",), ("population standard deviation",), "pstdev(data)",
              lambda data: float(squares(data) / len(data)) ** 0.5),
    Statistic(("样本标准差", "标准差"), ("sample standard deviation", "standard deviation"),
              "stdev(data)", lambda data: float(squares(data) / (len(data) - 1)) ** 0.5),
)


def draw_list(rng: random.Random, language: str) -> tuple[str, list[int | float], str]:
    """(as written, the numbers, in Python): 3 to 9 numbers of one size."""
    count, most = rng.randint(3, 9), rng.choice((9, 20, 100, 100, 1000))
    data: list[int | float] = [rng.randint(1, most) for _ in range(count)]
    if rng.random() < 0.3:  # a number stands there twice
        data[rng.randrange(1, count)] = data[0]
    if rng.random() < 0.12:
        data = [float(f"{x}.{rng.randint(1, 9)}") for x in data]
    if rng.random() < 0.08:
        data[rng.randrange(count)] *= -1
    texts = [str(x) for x in data]
    python = ", ".join(texts)
    separators = [", ", ",", " "] + (["、", "，"] if language == "zh" else [])
    written = f"[{python}]" if rng.random() < 0.35 else rng.choice(separators).join(texts)
    return written, data, python


def number(value: object) -> int | float:
    exact = Fraction(value)
    return int(exact) if exact.denominator == 1 else float(value)


@KINDS.add("statistics", weight=7)
def statistic(rng: random.Random, language: str, state: dict) -> Task | None:
    written, data, python = draw_list(rng, language)
    wanted = rng.choice(STATISTICS)
    value = wanted.value(data)
    if value is None:
        return None
    return Task(
        {"list": written, "stat": rng.choice(getattr(wanted, language))},
        f"from statistics import *\n\ndata = [{python}]\nprint({wanted.python})",
        numbers=(number(value),), state={"data": data},
    )


@KINDS.add("statistics")
def sort(rng: random.Random, language: str, state: dict) -> Task:
    written, data, python = draw_list(rng, language)
    ordered: list[int | float] = []
    for x in data:  # by insertion
        place = sum(y <= x for y in ordered)
        ordered.insert(place, x)
    return Task({"list": written}, f"data = [{python}]\nprint(sorted(data))",
                numbers=tuple(ordered))


@KINDS.add("statistics", weight=0.7)
def sort_down(rng: random.Random, language: str, state: dict) -> Task:
    task = sort(rng, language, state)
    code = task.code.replace("sorted(data)", "sorted(data, reverse=True)")
    return Task(task.slots, code, numbers=task.numbers[::-1])


@KINDS.add("statistics")
def above(rng: random.Random, language: str, state: dict) -> Task:
    written, data, python = draw_list(rng, language)
    k = rng.randint(2, int(max(data)) + 2)
    return Task({"list": written, "k": k},
                f"data = [{python}]\nprint(sum(x > {k} for x in data))",
                numbers=(len([x for x in data if x > k]),))


@KINDS.add("follow-up", needs="data", weight=4)
def then_statistic(rng: random.Random, language: str, state: dict) -> Task | None:
    wanted = rng.choice(STATISTICS)
    value = wanted.value(state["data"])
    if value is None:
        return None
    return Task({"stat": rng.choice(getattr(wanted, language))}, f"print({wanted.python})",
                numbers=(number(value),), state=state)


@KINDS.add("follow-up", needs="data", weight=1.5)
def then_append(rng: random.Random, language: str, state: dict) -> Task | None:
    k = rng.randint(1, 100)
    data = [*state["data"], k]
    wanted = rng.choice(STATISTICS)
    value = wanted.value(data)
    if value is None:
        return None
    return Task({"k": k, "stat": rng.choice(getattr(wanted, language))},
                f"data.append({k})\nprint({wanted.python})",
                numbers=(number(value),), state={"data": data})
