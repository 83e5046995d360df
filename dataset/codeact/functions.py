"""Functions as people write them, and the same functions in Python: xlnx is `x * log(x)`.

A function is built from parts that know three things: how they are written, their Python, and
their value (in mpmath, so that the derivative can be known to 30 digits whatever the code says).
"""
import random
from collections.abc import Callable
from dataclasses import dataclass

import mpmath

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
DIGITS = 30
LARGEST = 1e4  # of values and derivatives: beyond, the difference quotient loses digits
SMALLEST = 1e-3


@dataclass(frozen=True)
class Style:
    """How somebody writes functions.

    Args:
        call: between a function's name and its argument: "", " " or "(".
        times: between two factors: "", " ", "*" or "·".
        power: "^", "**" or "superscript".
    """

    call: str
    times: str
    power: str


STYLES = (  # with weights
    (Style("", "", "^"), 8), (Style("(", "", "^"), 4), (Style("(", "*", "^"), 4),
    (Style(" ", " ", "^"), 3), (Style("", "", "superscript"), 2), (Style("", "·", "^"), 2),
    (Style("(", "*", "**"), 3),
)


@dataclass(frozen=True)
class Part:
    """A function of one variable, or a piece of one; `at` takes and gives mpmath numbers."""

    written: str
    python: str
    at: Callable
    is_sum: bool = False  # needs brackets inside a product

    def in_product(self) -> tuple[str, str]:
        """(written, python) as a factor."""
        if self.is_sum:
            return f"({self.written})", f"({self.python})"
        return self.written, self.python


# Name in Python, how it is written, the function itself, how often it is drawn.
ELEMENTARY = (
    ("sin", "sin", mpmath.sin, 6), ("cos", "cos", mpmath.cos, 6), ("log", "ln", mpmath.log, 7),
    ("exp", "e^", mpmath.exp, 6), ("sqrt", "√", mpmath.sqrt, 3), ("tan", "tan", mpmath.tan, 2),
    ("atan", "arctan", mpmath.atan, 1),
)


class Builder:
    """Draws functions of the variable `v` in one style."""

    def __init__(self, rng: random.Random, v: str = "x"):
        self.rng, self.v = rng, v
        styles, weights = zip(*STYLES, strict=True)
        self.style = rng.choices(styles, weights)[0]

    def function(self) -> Part:
        """A whole function: a term, a sum or difference of two, or a polynomial."""
        make = self.rng.choices((self.term, self.sum, self.polynomial), (70, 17, 13))[0]
        return make()

    def term(self) -> Part:
        rng = self.rng
        shape = rng.choices(
            ("power", "call", "power·call", "call·call", "quotient", "composite"),
            (6, 14, 34, 14, 22, 10),
        )[0]
        if shape == "power":
            return self.monomial()
        if shape == "call":
            return self.call()
        if shape == "power·call":
            return self.product(self.monomial(), self.call())
        if shape == "call·call":
            first, second = self.call(0.8), self.call(0.8)
            while second.python == first.python:
                second = self.call(0.8)
            return self.product(first, second)
        if shape == "composite":
            return self.composite()
        return self.quotient()

    def variable(self) -> Part:
        return Part(self.v, self.v, lambda x: x)

    def number(self, n: int) -> Part:
        return Part(str(n), str(n), lambda x: mpmath.mpf(n))

    def power(self, n: int) -> Part:
        """x^n."""
        if n == 1:
            return self.variable()
        return Part(self.raised(self.v, n), f"{self.v}**{n}", lambda x: x**n)

    def raised(self, base: str, n: int) -> str:
        if self.style.power == "superscript":
            return base + str(n).translate(SUPERSCRIPTS)
        return f"{base}{self.style.power}{n}"

    def monomial(self) -> Part:
        """c·x^n, often x alone."""
        rng = self.rng
        power = self.power(rng.choices((1, 2, 3, 4, 5, 6), (10, 8, 4, 2, 1, 1))[0])
        if rng.random() < 0.7:
            return power
        c = rng.randint(2, 9)
        star = "*" if self.style.times == "*" else ""
        return Part(f"{c}{star}{power.written}", f"{c} * {power.python}",
                    lambda x: c * power.at(x))

    def call(self, plain: float = 0.7) -> Part:
        """sin x, ln(x+1), e^(2x), …; with the bare variable in a share `plain` of the cases."""
        rng = self.rng
        name, written, function, _ = rng.choices(
            ELEMENTARY, [weight for *_, weight in ELEMENTARY]
        )[0]
        inner = self.variable() if rng.random() < plain else self.argument()
        return self.applied(name, written, function, inner)

    def applied(self, name: str, written: str, function: Callable, inner: Part) -> Part:
        bare = not inner.is_sum
        if self.style.power == "**":  # someone who writes Python
            text = f"{name if name != 'log' else 'ln'}({inner.written})"
        elif written == "e^":
            text = f"e^{inner.written}" if inner.written == self.v else f"e^({inner.written})"
        elif written == "√":
            text = f"√{inner.written}" if inner.written == self.v else f"√({inner.written})"
        elif self.style.call == "(" or not bare:
            text = f"{written}({inner.written})"
        else:
            text = f"{written}{self.style.call}{inner.written}"
        return Part(text, f"{name}({inner.python})", lambda x: function(inner.at(x)))

    def argument(self) -> Part:
        """What may stand inside a function instead of the variable."""
        rng, v = self.rng, self.v
        k = rng.randint(2, 9)
        star = "*" if self.style.times == "*" else ""
        shape = rng.randrange(5)
        if shape == 0:
            return Part(f"{k}{star}{v}", f"{k} * {v}", lambda x: k * x)
        if shape == 1:
            return Part(f"{v}+{k}", f"{v} + {k}", lambda x: x + k, is_sum=True)
        if shape == 2:
            square = self.power(2)
            return Part(square.written, square.python, square.at, is_sum=True)  # in brackets
        if shape == 3:
            return Part(f"-{v}", f"-{v}", lambda x: -x, is_sum=True)
        return Part(f"{v}/{k}", f"{v} / {k}", lambda x: x / k, is_sum=True)

    def product(self, first: Part, second: Part) -> Part:
        (a, a_python), (b, b_python) = first.in_product(), second.in_product()
        times = self.style.times
        if times == "" and a.startswith(("e^", "√")) and len(a) < 4:
            times = self.rng.choice(("", " "))
        return Part(f"{a}{times}{b}", f"{a_python} * {b_python}",
                    lambda x: first.at(x) * second.at(x))

    def quotient(self) -> Part:
        rng = self.rng
        bottom = rng.choice((self.monomial, self.power_plus, self.call))()
        top = self.number(1) if rng.random() < 0.35 else rng.choice((self.call, self.power_any))()
        while top.python == bottom.python:
            top = self.call()
        if " * " in bottom.python:
            bottom = self.power(rng.randint(1, 3))
        (a, a_python), (b, b_python) = top.in_product(), bottom.in_product()
        return Part(f"{a}/{b}", f"{a_python} / {b_python}", lambda x: top.at(x) / bottom.at(x))

    def power_any(self) -> Part:
        return self.power(self.rng.randint(1, 4))

    def power_plus(self) -> Part:
        """x^n + k."""
        n, k = self.rng.randint(1, 3), self.rng.randint(1, 9)
        power, sign = self.power(n), self.rng.choice("++-")
        return Part(f"{power.written}{sign}{k}", f"{power.python} {sign} {k}",
                    lambda x: power.at(x) + (k if sign == "+" else -k), is_sum=True)

    def composite(self) -> Part:
        """(3x+1)^4, √(x^2+1), ln(x^2+3), (sin x)^2, sin(cos x)."""
        rng, v = self.rng, self.v
        shape = rng.randrange(4)
        if shape == 0:
            k, b, n = rng.randint(2, 9), rng.randint(1, 9), rng.randint(2, 5)
            star = "*" if self.style.times == "*" else ""
            return Part(self.raised(f"({k}{star}{v}+{b})", n), f"({k} * {v} + {b})**{n}",
                        lambda x: (k * x + b) ** n)
        if shape == 1:
            name, written, function, _ = rng.choice(ELEMENTARY[:5])
            return self.applied(name, written, function, self.power_plus())
        name, written, function, _ = rng.choice(ELEMENTARY[:3])
        if shape == 2:
            call = self.applied(name, written, function, self.variable())
            n = rng.randint(2, 4)
            return Part(self.raised(f"({call.written})", n), f"{call.python}**{n}",
                        lambda x: call.at(x) ** n)
        inner = self.call(1.0)
        bracketed = Part(inner.written, inner.python, inner.at, is_sum=True)
        return self.applied(name, written, function, bracketed)

    def sum(self) -> Part:
        first = self.rng.choice((self.term, self.monomial))()
        second = self.rng.choice((self.call, self.monomial, lambda: self.number(
            self.rng.randint(1, 20))))()
        while second.python == first.python:
            second = self.call()
        sign = self.rng.choice("+-")
        return Part(f"{first.written}{sign}{second.written}",
                    f"{first.python} {sign} {second.python}",
                    lambda x: first.at(x) + (1 if sign == "+" else -1) * second.at(x),
                    is_sum=True)

    def polynomial(self) -> Part:
        """Two to four powers with coefficients, the highest first."""
        rng = self.rng
        powers = sorted(rng.sample(range(5), rng.randint(2, 3)), reverse=True)
        terms = [(rng.choice((1, 1, *range(2, 10))), n, rng.choice("++-")) for n in powers]
        star = "*" if self.style.times == "*" else ""
        written = python = ""
        for i, (c, n, sign) in enumerate(terms):
            power = self.power(n) if n else None
            text = str(c) if power is None else power.written if c == 1 else (
                f"{c}{star}{power.written}")
            code = str(c) if power is None else power.python if c == 1 else f"{c} * {power.python}"
            if i == 0:
                written, python = text, code
            else:
                written, python = f"{written}{sign}{text}", f"{python} {sign} {code}"
        signs = [1, *(1 if sign == "+" else -1 for _, _, sign in terms[1:])]

        def at(x):
            return sum(s * c * x**n for s, (c, n, _) in zip(signs, terms, strict=True))

        return Part(written, python, at, is_sum=True)


@dataclass(frozen=True)
class Point:
    """A place on the axis: as it is written, in Python, and its value."""

    written: str
    python: str
    value: mpmath.mpf


def draw_point(rng: random.Random) -> Point:
    shape = rng.choices(("whole", "decimal", "pi", "e", "root", "ln", "fraction"),
                        (42, 16, 22, 6, 5, 3, 6))[0]
    with mpmath.workdps(DIGITS):
        if shape == "whole":
            n = rng.choices((rng.randint(0, 12), rng.randint(-9, -1), rng.randint(13, 99)),
                            (80, 12, 8))[0]
            return Point(str(n), str(n), mpmath.mpf(n))
        if shape == "decimal":
            text = f"{rng.randint(0, 9)}.{rng.randint(1, 99)}"
            text = f"-{text}" if rng.random() < 0.1 else text
            return Point(text, text, mpmath.mpf(text))
        if shape == "pi":
            letter, k = rng.choice(("π", "π", "π", "pi")), rng.choice((2, 3, 4, 6))
            return rng.choices((
                Point(letter, "pi", +mpmath.pi), Point(f"{letter}/{k}", f"pi / {k}", mpmath.pi / k),
                Point(f"{k}{letter}", f"{k} * pi", k * mpmath.pi),
            ), (5, 4, 1))[0]
        if shape == "e":
            return Point("e", "e", +mpmath.e)
        k = rng.choice((2, 3, 5, 7))
        if shape == "root":
            return Point(f"√{k}", f"sqrt({k})", mpmath.sqrt(k))
        if shape == "ln":
            return Point(f"ln{k}", f"log({k})", mpmath.log(k))
        top = rng.randint(1, 9)
        while top % k == 0:
            top = rng.randint(1, 9)
        return Point(f"{top}/{k}", f"{top} / {k}", mpmath.mpf(top) / k)


def derivative_at(function: Part, point: Point) -> float | None:
    """The derivative to many digits; None where there is none, or it is too large or too small
    for a difference quotient in double precision."""
    with mpmath.workdps(DIGITS):
        try:
            slope = mpmath.diff(function.at, point.value)
            value = function.at(point.value)
        except (ArithmeticError, ValueError):  # a pole
            return None
        if isinstance(slope, mpmath.mpc) or isinstance(value, mpmath.mpc):
            return None  # outside of the domain
        if not SMALLEST < abs(slope) < LARGEST or abs(value) > LARGEST:
            return None
        return float(slope)
