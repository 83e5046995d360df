"""Derivatives by the tool `derivative(f, x)`, of functions written as in mathematics."""
import random
import re

from .functions import Builder, Part, Point, derivative_at, draw_point
from .kinds import KINDS, Task

TOOL = "derivative"
OWN_FUNCTION, OWN_POINT = "x * log(x)", "pi"  # the specification's question


def is_own(function: Part, v: str, points: list[Point]) -> bool:
    """Whether this is the specification's function at its point: in no training row."""
    return key(function, v) == OWN_FUNCTION and any(p.python == OWN_POINT for p in points)


def drawn(rng: random.Random, v: str, count: int) -> tuple[Part, list[Point], list[float]]:
    """A function, points of its domain and its derivatives there."""
    while True:
        function = Builder(rng, v).function()
        for _ in range(4):
            points = [draw_point(rng) for _ in range(count)]
            slopes = [derivative_at(function, point) for point in points]
            if None not in slopes and len({p.python for p in points}) == count:
                if not is_own(function, v, points):
                    return function, points, slopes


def definition(function: Part, v: str) -> str:
    return f"from math import *\n\ndef f({v}):\n    return {function.python}\n\n"


def key(function: Part, v: str) -> str:
    """What a function is held out by, whatever its variable is called."""
    return re.sub(rf"\b{v}\b", "x", function.python)


def own_task(function: Part, point: Point, v: str, slope: float, head: str) -> Task:
    """The task of one function at one point."""
    return Task(
        {"F": head + function.written, "w": function.written, "v": v, "p": point.written},
        definition(function, v) + f"print(derivative(f, {point.python}))",
        numbers=(slope,), key=key(function, v),
        state={"f": function, "v": v},
    )


@KINDS.add("derivative", weight=14)
def derivative(rng: random.Random, language: str, state: dict) -> Task:
    v = rng.choices(("x", "t", "u"), (90, 7, 3))[0]
    function, (point,), (slope,) = drawn(rng, v, 1)
    heads = (f"f({v})=", f"f({v}) = ", f"g({v})=", "y=")
    return own_task(function, point, v, slope, rng.choices(heads, (60, 15, 10, 15))[0])


@KINDS.add("derivative", weight=1.5)
def derivatives(rng: random.Random, language: str, state: dict) -> Task:
    """At several points, rounded."""
    function, points, slopes = drawn(rng, "x", rng.randint(2, 4))
    k = rng.randint(2, 5)
    code = definition(function, "x") + (
        f"print([round(derivative(f, x), {k}) for x in [{', '.join(p.python for p in points)}]])"
    )
    separator = "、" if language == "zh" else ", "
    return Task(
        {"F": f"f(x)={function.written}", "w": function.written, "v": "x", "k": k,
         "points": separator.join(p.written for p in points)},
        code, numbers=tuple(round(slope, k) for slope in slopes), key=key(function, "x"),
        state={"f": function, "v": "x"},
    )


@KINDS.add("derivative", weight=1.5)
def speed(rng: random.Random, language: str, state: dict) -> Task:
    function, (point,), (slope,) = drawn(rng, "t", 1)
    return own_task(function, point, "t", slope, "s(t)=")


@KINDS.add("derivative", needs="f", weight=4)
def then_at(rng: random.Random, language: str, state: dict) -> Task | None:
    function, v, point = state["f"], state["v"], draw_point(rng)
    slope = derivative_at(function, point)
    if slope is None or is_own(function, v, [point]):
        return None
    return Task({"v": v, "p": point.written}, f"print(derivative(f, {point.python}))",
                numbers=(slope,), key=key(function, v), state=state)


@KINDS.add("derivative", needs="f", weight=1.5)
def then_value(rng: random.Random, language: str, state: dict) -> Task | None:
    function, v, point = state["f"], state["v"], draw_point(rng)
    if derivative_at(function, point) is None:
        return None
    return Task({"v": v, "p": point.written}, f"print(f({point.python}))",
                numbers=(float(function.at(point.value)),), key=key(function, v), state=state)
