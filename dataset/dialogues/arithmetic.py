"""One-step arithmetic on small whole numbers, with the right answer always computed.

Pairs of operands are held out by a hash; a+b and b+a share it. The multiplication table and sums
of two digits are never held out as pairs (nobody can derive 7×8), only in one of their phrasings.
"""
import random
from collections.abc import Iterator

from dataset.dialogues import Chat, chat, test_item
from dataset.text import bucket, pack, spoken

WORDS = {"+": "加", "-": "减", "×": "乘", "÷": "除以"}
FORMS = (
    "{a}{op}{b}等于多少？", "{a}{op}{b}等于几？", "{a}{op}{b}=？", "{a}{op}{b}=", "计算{a}{op}{b}。",
    "计算：{a}{op}{b}", "算一下{a}{op}{b}。", "请计算{a}{op}{b}。", "{a} {op} {b} = ?",
    "{a} {op} {b} 等于多少？", "{a}{word}{b}等于多少？", "{a}{word}{b}是多少？", "{a} {word} {b} 是多少？",
    "请问{a}{op}{b}等于多少？", "{a}{op}{b}是多少？", "{a}{op}{b}得多少？", "帮我算一下{a}{op}{b}。",
    "你知道{a}{op}{b}等于多少吗？", "{a}{op}{b}的结果是多少？", "{a}{word}{b}等于几？", "{a}{op}{b}",
    "what is {a}{op}{b}?", "What is {a} {op} {b}?", "Calculate {a} {op} {b}.",
)
FOLLOW_UPS = (
    "那{a}{op}{b}呢？", "{a}{op}{b}呢？", "那么{a}{op}{b}呢？", "那{a}{word}{b}呢？", "还有{a}{op}{b}呢？",
    "换成{a}{op}{b}呢？", "再算一下{a}{op}{b}。", "那{a}{op}{b}等于多少？", "{a}{word}{b}呢？",
)
SPOKEN = {"*": "×", "x": "×", "/": "÷"}


def solve(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "×": a * b, "÷": a // b if b else 0}[op]


def held_out(a: int, op: str, b: int) -> bool:
    """True for the pairs kept for evaluation."""
    if op in "×÷" or (op == "+" and a < 10 and b < 10) or (op == "-" and a < 20 and b < 10):
        return False
    low, high = (min(a, b), max(a, b)) if op == "+" else (a, b)
    return bucket(f"{low}{op}{high}", 20) == 0


def held_out_form(form: str, a: int, op: str, b: int) -> bool:
    """True for the wordings kept for evaluation; marks and spaces make no other wording."""
    return bucket(f"{spoken(form)} {a}{op}{b}", 12) == 0


def problem(rng: random.Random) -> tuple[int, str, int]:
    """A random problem with a result of 0 to 100 (table products apart), small ones more often."""
    kind = rng.random()
    if kind < 0.40:
        if rng.random() < 0.4:
            return rng.randint(0, 9), "+", rng.randint(0, 9)
        a = rng.randint(0, 99)
        return a, "+", rng.randint(0, 100 - a)
    if kind < 0.72:
        a = rng.randint(0, 20) if rng.random() < 0.4 else rng.randint(10, 99)
        return a, "-", rng.randint(0, a)
    if kind < 0.90:
        return rng.randint(0, 9), "×", rng.randint(0, 9)
    if kind < 0.93:
        return rng.randint(11, 30), "×", rng.randint(2, 5)
    b = rng.randint(1, 9)
    return b * rng.randint(0, 9), "÷", b


def word_problem(rng: random.Random) -> tuple[str, str, tuple[int, str, int]]:
    """(question, answer, problem) of one step in words."""
    who = rng.choice(("小明", "小红", "小华", "妈妈", "老师", "小李", "爷爷"))
    what, unit = rng.choice((("苹果", "个"), ("糖", "颗"), ("书", "本"), ("铅笔", "支"), ("气球", "个"),
                             ("花", "朵"), ("鸡蛋", "个"), ("橘子", "个")))
    while True:
        if rng.random() < 0.5:
            a, b = rng.randint(1, 30), rng.randint(1, 20)
            kind, question = "+", f"{who}有{a}{unit}{what}，又买了{b}{unit}，现在一共有多少{unit}{what}？"
        else:
            a = rng.randint(2, 30)
            b = rng.randint(1, a)
            kind, question = "-", f"{who}有{a}{unit}{what}，送给别人{b}{unit}，还剩多少{unit}{what}？"
        if not held_out(a, kind, b):
            value = solve(a, kind, b)
            tail = f"一共有{value}{unit}{what}" if kind == "+" else f"还剩{value}{unit}{what}"
            return question, f"{a}{kind}{b}={value}，{tail}。", (a, kind, b)


def written(form: str, a: int, op: str, b: int, rng: random.Random | None = None) -> str:
    sign = op
    if rng and op == "×" and rng.random() < 0.3:
        sign = rng.choice("*x")
    elif rng and op == "÷" and rng.random() < 0.3:
        sign = "/"
    return form.format(a=a, b=b, op=sign, word=WORDS[op])


def answer(a: int, op: str, b: int) -> str:
    return f"{a}{op}{b}={solve(a, op, b)}。"


def draw(forms: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    """(question, answer) of a problem that training may show."""
    while True:
        (a, op, b), form = problem(rng), rng.choice(forms)
        if not held_out(a, op, b) and not held_out_form(form, a, op, b):
            return written(form, a, op, b, rng), answer(a, op, b)


def chats(count: int, rng: random.Random) -> Iterator[Chat]:
    for _ in range(count):
        kind = rng.random()
        if kind < 0.04:
            question, reply, _ = word_problem(rng)
            yield chat("arithmetic", question, reply)
            continue
        if kind < 0.07:
            a, b = rng.randint(0, 100), rng.randint(0, 100)
            sign = "大于" if a > b else "小于" if a < b else "等于"
            question = rng.choice(("{}和{}哪个大？", "{}和{}比，哪个更大？", "比较{}和{}的大小。"))
            yield chat("arithmetic", question.format(a, b), f"{a}{sign}{b}。")
            continue
        turns = list(draw(FORMS, rng))
        for _ in range(rng.choices((0, 1, 2, 3), (50, 30, 14, 6))[0]):
            turns += draw(FOLLOW_UPS, rng)
        yield chat("arithmetic", *turns)


def texts(count: int, rng: random.Random) -> Iterator[str]:
    """Sums for the pretraining text, in figures and in words, about 20 to a text."""
    def lines() -> Iterator[str]:
        for _ in range(count):
            a, op, b = problem(rng)
            if held_out(a, op, b):
                continue
            value = solve(a, op, b)
            yield rng.choice((f"{a}{op}{b}={value}", f"{a}{op}{b}={value}", f"{a}{op}{b}={value}",
                              f"{a}{WORDS[op]}{b}等于{value}。"))
    yield from pack(lines(), 150)


def tests(count: int, rng: random.Random) -> list[dict]:
    """Half held-out pairs; a quarter held-out phrasings of taught pairs; a quarter second turns."""
    items: list[dict] = []
    seen: set[str] = set()
    while len(items) < count:
        a, op, b = problem(rng)
        level = ("pair", "phrasing", "pair", "second turn")[len(items) % 4]
        form = rng.choice(FOLLOW_UPS if level == "second turn" else FORMS)
        if (level == "pair") != held_out(a, op, b):
            continue
        if level != "pair" and not held_out_form(form, a, op, b):
            continue
        question = written(form, a, op, b)
        if spoken(question) in seen:
            continue
        seen.add(spoken(question))
        before = draw(FORMS, rng) if level == "second turn" else ()
        sums = {"passages": [answer(a, op, b)]} if level == "pair" else {}
        items.append(test_item("arithmetic", *before, question, accept=[str(solve(a, op, b))],
                               match="number", held_out=level, **sums))
    return items
