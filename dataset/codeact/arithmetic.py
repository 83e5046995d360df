"""Arithmetic, percentages and units: the numbers of the question, computed by Python.

What the code must print is computed in exact fractions.
"""
import math
import operator
import random
from fractions import Fraction

from .kinds import KINDS, Task, amount, whole

SIGNS = (  # of ordinary writing: + - × ÷
    (("+", "-", "×", "÷"), 4), (("+", "-", "*", "/"), 4), (("+", "-", "x", "/"), 1),
    (("+", "-", "×", "/"), 1),
)
WORDS = {
    "zh": ("加", "减", "乘", "除以"), "en": ("plus", "minus", "times", "divided by"),
}
OPERATIONS = (operator.add, operator.sub, operator.mul, operator.truediv)
PYTHON = "+-*/"
THINGS = (  # Chinese, its measure word, English plural
    ("苹果", "斤", "apples"), ("梨", "斤", "pears"), ("橙子", "斤", "oranges"),
    ("鸡蛋", "个", "eggs"), ("笔记本", "本", "notebooks"), ("铅笔", "支", "pencils"),
    ("杯子", "个", "cups"), ("面包", "个", "loaves"), ("书", "本", "books"),
    ("毛巾", "条", "towels"), ("椅子", "把", "chairs"), ("票", "张", "tickets"),
)
# Chinese, Chinese target, English, English target, Python with the number as {n}, the factor.
UNITS = (
    ("公里", "英里", "kilometers", "miles", "{n} / 1.609344", "1/1.609344"),
    ("英里", "公里", "miles", "kilometers", "{n} * 1.609344", "1.609344"),
    ("千米", "米", "kilometers", "meters", "{n} * 1000", "1000"),
    ("米", "千米", "meters", "kilometers", "{n} / 1000", "1/1000"),
    ("米", "厘米", "meters", "centimeters", "{n} * 100", "100"),
    ("厘米", "米", "centimeters", "meters", "{n} / 100", "1/100"),
    ("米", "英尺", "meters", "feet", "{n} / 0.3048", "1/0.3048"),
    ("英尺", "米", "feet", "meters", "{n} * 0.3048", "0.3048"),
    ("英寸", "厘米", "inches", "centimeters", "{n} * 2.54", "2.54"),
    ("厘米", "英寸", "centimeters", "inches", "{n} / 2.54", "1/2.54"),
    ("千克", "磅", "kilograms", "pounds", "{n} / 0.45359237", "1/0.45359237"),
    ("磅", "千克", "pounds", "kilograms", "{n} * 0.45359237", "0.45359237"),
    ("千克", "克", "kilograms", "grams", "{n} * 1000", "1000"),
    ("克", "千克", "grams", "kilograms", "{n} / 1000", "1/1000"),
    ("小时", "分钟", "hours", "minutes", "{n} * 60", "60"),
    ("分钟", "小时", "minutes", "hours", "{n} / 60", "1/60"),
    ("小时", "秒", "hours", "seconds", "{n} * 3600", "3600"),
    ("分钟", "秒", "minutes", "seconds", "{n} * 60", "60"),
    ("天", "小时", "days", "hours", "{n} * 24", "24"),
    ("周", "天", "weeks", "days", "{n} * 7", "7"),
    ("升", "毫升", "liters", "milliliters", "{n} * 1000", "1000"),
    ("公顷", "平方米", "hectares", "square meters", "{n} * 10000", "10000"),
    ("米每秒", "千米每小时", "m/s", "km/h", "{n} * 3.6", "3.6"),
    ("千米每小时", "米每秒", "km/h", "m/s", "{n} / 3.6", "1/3.6"),
    ("度", "弧度", "degrees", "radians", "{n} * 3.141592653589793 / 180", "3.141592653589793/180"),
)


def exact(number: Fraction) -> int | float:
    return int(number) if number.denominator == 1 else float(number)


def result(python: str) -> str:
    return f"result = {python}\nprint(result)"


def task(slots: dict, python: str, value: Fraction | float) -> Task:
    """A task whose answer is one number that stays in `result`."""
    number = exact(value) if isinstance(value, Fraction) else value
    return Task(slots, result(python), numbers=(number,), state={"result": float(value)})


# ---- Expressions ---------------------------------------------------------------------------------


@KINDS.add("arithmetic", weight=7)
def expression(rng: random.Random, language: str, state: dict) -> Task | None:
    """Two to four numbers, sometimes with brackets or a power."""
    styles, weights = zip(*SIGNS, strict=True)
    signs = rng.choices(styles, weights)[0]
    count = rng.choices((2, 3, 4), (45, 35, 20))[0]
    space = rng.choice(("", "", " "))
    if count == 2 and rng.random() < 0.3:
        signs, space = WORDS[language], " "
    numbers = [amount(rng, 6 if count == 2 else 3) for _ in range(count)]
    choices = [rng.randrange(4) for _ in range(count - 1)]
    bracket = rng.randrange(count - 1) if count > 2 and rng.random() < 0.5 else None
    written = python = ""
    for i, number in enumerate(numbers):
        before, after = "(" if i == bracket else "", ")" if i - 1 == bracket else ""
        # The bracket stands around the two numbers i and i + 1.
        operation = choices[i] if i < count - 1 else None
        written += f"{before}{number}{after}" + (
            "" if operation is None else f"{space}{signs[operation]}{space}")
        python += f"{before}{number}{after}" + ("" if operation is None else PYTHON[operation])
    value = evaluate([Fraction(n) for n in numbers], choices, bracket)
    if value is None or abs(value) > 10**15:
        return None
    whole_numbers = "." not in python and "/" not in python
    return task({"e": written}, python, value if whole_numbers else float(value))


def evaluate(numbers: list[Fraction], choices: list[int], bracket: int | None) -> Fraction | None:
    """The value, brackets first, then × and ÷, then + and -; None for a division by zero."""
    numbers, choices = list(numbers), list(choices)
    order = [bracket] if bracket is not None else []
    try:
        for i in order:
            numbers[i : i + 2] = [OPERATIONS[choices.pop(i)](*numbers[i : i + 2])]
        for level in ((2, 3), (0, 1)):
            i = 0
            while i < len(choices):
                if choices[i] in level:
                    numbers[i : i + 2] = [OPERATIONS[choices.pop(i)](*numbers[i : i + 2])]
                else:
                    i += 1
    except ZeroDivisionError:
        return None
    return numbers[0]


@KINDS.add("arithmetic")
def power(rng: random.Random, language: str, state: dict) -> Task | None:
    a, n = whole(rng, 2, 3), rng.randint(2, 40)
    value = math.prod([a] * n)
    return Task({"a": a, "n": n}, result(f"{a}**{n}"), numbers=(value,)) if (
        value < 10**24) else None


@KINDS.add("arithmetic")
def remainder(rng: random.Random, language: str, state: dict) -> Task:
    b = whole(rng, 2, 3)
    quotient, rest = whole(rng, 2, 4), rng.randrange(b)
    a = quotient * b + rest
    return Task({"a": a, "b": b}, f"print({a} // {b}, {a} % {b})", numbers=(quotient, rest))


@KINDS.add("arithmetic")
def root(rng: random.Random, language: str, state: dict) -> Task:
    n = whole(rng, 2, 6)
    return Task({"n": n}, f"from math import *\n\nresult = sqrt({n})\nprint(result)",
                numbers=(n**0.5,), state={"result": n**0.5})


@KINDS.add("arithmetic", weight=1.5)
def shopping(rng: random.Random, language: str, state: dict) -> Task:
    (thing, unit, things), (other, _, others) = rng.sample(THINGS, 2)
    a, b, m, n = amount(rng, 2), amount(rng, 2), rng.randint(2, 30), rng.randint(2, 30)
    return task(
        {"thing": thing, "unit": unit, "things": things, "other": other, "others": others,
         "a": a, "b": b, "m": m, "n": n},
        f"{m} * {a} + {n} * {b}", m * Fraction(a) + n * Fraction(b),
    )


# ---- Percentages ---------------------------------------------------------------------------------


def percentage(rng: random.Random) -> str:
    return rng.choices((str(rng.randint(1, 99)), f"{rng.randint(0, 40)}.{rng.randint(1, 9)}",
                        str(rng.randint(100, 250))), (75, 20, 5))[0]


@KINDS.add("percentage", weight=1.5)
def percent_of(rng: random.Random, language: str, state: dict) -> Task:
    n, p = amount(rng), percentage(rng)
    return task({"n": n, "p": p}, f"{n} * {p} / 100", Fraction(n) * Fraction(p) / 100)


@KINDS.add("percentage")
def what_percent(rng: random.Random, language: str, state: dict) -> Task:
    a, b = whole(rng, 1), whole(rng, 2)
    return task({"a": a, "b": b}, f"{a} / {b} * 100", Fraction(a, b) * 100)


@KINDS.add("percentage")
def increase(rng: random.Random, language: str, state: dict) -> Task:
    n, p = amount(rng), percentage(rng)
    return task({"n": n, "p": p}, f"{n} * (100 + {p}) / 100",
                Fraction(n) * (100 + Fraction(p)) / 100)


@KINDS.add("percentage")
def decrease(rng: random.Random, language: str, state: dict) -> Task:
    n, p = amount(rng), rng.randint(1, 95)
    return task({"n": n, "p": p}, f"{n} * (100 - {p}) / 100", Fraction(n) * (100 - p) / 100)


@KINDS.add("percentage")
def change(rng: random.Random, language: str, state: dict) -> Task | None:
    a, b = whole(rng), whole(rng)
    return task({"a": a, "b": b}, f"({b} - {a}) / {a} * 100", Fraction(b - a, a) * 100) if (
        a != b) else None


@KINDS.add("percentage")
def compound(rng: random.Random, language: str, state: dict) -> Task:
    n, p, k = whole(rng, 100, 6), f"{rng.randint(1, 9)}.{rng.randint(0, 9)}", rng.randint(2, 30)
    p = p.removesuffix(".0")
    value = n * (1 + Fraction(p) / 100) ** k
    return task({"n": n, "p": p, "k": k}, f"round({n} * (1 + {p} / 100)**{k}, 2)",
                round(float(value), 2))


# ---- Units ---------------------------------------------------------------------------------------


@KINDS.add("units", weight=4)
def convert(rng: random.Random, language: str, state: dict) -> Task:
    if rng.random() < 0.15:
        return temperature(rng, language)
    zh, zh_target, en, en_target, python, factor = rng.choice(UNITS)
    n = amount(rng)
    top, _, bottom = factor.partition("/")
    u, t = (zh, zh_target) if language == "zh" else (en, en_target)
    value = Fraction(n) * Fraction(top) / Fraction(bottom or "1")
    return task({"n": n, "u": u, "t": t}, python.format(n=n), float(value))


def temperature(rng: random.Random, language: str) -> Task:
    n = str(rng.randint(-40, 250))
    celsius, fahrenheit = ("摄氏度", "华氏度") if language == "zh" else (
        "degrees Celsius", "degrees Fahrenheit")
    if rng.random() < 0.5:
        return task({"n": n, "u": celsius, "t": fahrenheit}, f"{n} * 9 / 5 + 32",
                    float(Fraction(n) * 9 / 5 + 32))
    return task({"n": n, "u": fahrenheit, "t": celsius}, f"({n} - 32) * 5 / 9",
                float((Fraction(n) - 32) * 5 / 9))


# ---- Going on with the result --------------------------------------------------------------------


def operated(state: dict, k: str | int, python: str, value: float, **slots) -> Task | None:
    """The next task on `result`; None where the number gets out of hand."""
    if not 1e-4 < abs(value) < 1e15:
        return None
    return Task({"k": k, **slots}, f"result = {python}\nprint(result)", numbers=(value,),
                state={"result": value})


@KINDS.add("follow-up", needs="result")
def then_add(rng: random.Random, language: str, state: dict) -> Task | None:
    k = amount(rng, 3)
    return operated(state, k, f"result + {k}", state["result"] + float(k))


@KINDS.add("follow-up", needs="result")
def then_subtract(rng: random.Random, language: str, state: dict) -> Task | None:
    k = amount(rng, 3)
    return operated(state, k, f"result - {k}", state["result"] - float(k))


@KINDS.add("follow-up", needs="result")
def then_multiply(rng: random.Random, language: str, state: dict) -> Task | None:
    k = amount(rng, 2)
    return operated(state, k, f"result * {k}", state["result"] * float(k))


@KINDS.add("follow-up", needs="result")
def then_divide(rng: random.Random, language: str, state: dict) -> Task | None:
    k = amount(rng, 2)
    return operated(state, k, f"result / {k}", state["result"] / float(k))


@KINDS.add("follow-up", needs="result", weight=0.5)
def then_square(rng: random.Random, language: str, state: dict) -> Task | None:
    return operated(state, "", "result**2", state["result"] ** 2)


@KINDS.add("follow-up", needs="result", weight=0.7)
def then_percent(rng: random.Random, language: str, state: dict) -> Task | None:
    p = percentage(rng)
    return operated(state, "", f"result * {p} / 100", state["result"] * float(p) / 100, p=p)


@KINDS.add("follow-up", needs="result", weight=0.7)
def then_round(rng: random.Random, language: str, state: dict) -> Task | None:
    k = rng.randint(1, 4)
    value = round(state["result"], k)
    if value == int(value):
        return None
    return operated(state, k, f"round(result, {k})", value)
