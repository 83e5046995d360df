"""Small Python tasks with short, right code: every answer here has been run by the tests."""
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dataset.dialogues import Chat, chat

ASK = ("用Python{}。", "写一段Python代码，{}。", "请用Python{}。", "写一个Python程序{}。", "帮我用Python{}。",
       "Python怎么{}？", "写代码{}。", "怎样用Python{}？")
ASK_FUNCTION = ("写一个函数，{}。", "用Python写一个函数{}。", "请写一个Python函数，{}。", "帮我写个函数{}。",
                "定义一个函数，{}。")
WORDS = ("你好", "hello", "缘梦", "python", "world", "apple", "春天", "banana", "Hello World", "学习")
FILE = Path(__file__).with_name("coding.txt")


class Task(NamedTuple):
    question: str
    code: str
    check: str  # "" where the code prints its result


@cache
def read(path: Path = FILE) -> tuple[list[Task], list[Task]]:
    """(tasks with numbers to fill in, functions) of `coding.txt`."""
    tasks: list[Task] = []
    functions: list[Task] = []
    for block in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
        question, _, rest = block.partition("\n")
        code, _, check = rest.partition(">>> ")
        found = Task(question.strip(), code.strip(), check.strip())
        (functions if found.check else tasks).append(found)
    return tasks, functions


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def drawn_values(rng: random.Random) -> dict[str, object]:
    """Numbers and words to fill a task with."""
    return {"word": rng.choice(WORDS), "n": rng.randint(3, 100), "k": rng.randint(2, 12),
            "j": rng.randint(2, 9), "a": rng.randint(1, 999), "b": rng.randint(1, 999),
            "list": [rng.randint(0, 99) for _ in range(rng.randint(3, 6))]}


def task(rng: random.Random) -> tuple[str, str]:
    """(what to do, code) with numbers and words drawn anew."""
    values = drawn_values(rng)
    question, code, _ = rng.choice(read()[0])
    return question.format(**values), code.format(**values)


def chats(count: int, rng: random.Random) -> Iterator[Chat]:
    for _ in range(count):
        if rng.random() < 0.35:
            question, code, _ = rng.choice(read()[1])
            turns = [rng.choice(ASK_FUNCTION).format(question), fenced(code)]
        else:
            question, code = task(rng)
            turns = [rng.choice(ASK).format(question), fenced(code)]
            if rng.random() < 0.15:
                question, code = task(rng)
                turns += [f"那{question}呢？", fenced(code)]
        yield chat("python", *turns)
