"""Conversations of drawn tasks: a question or a few, for training or for evaluation.

What a conversation holds depends on its number and the seed alone, so that many can be made at once
and in any order.
"""
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from . import (  # noqa: F401 (each registers its kinds)
    arithmetic,
    dates,
    derivatives,
    integers,
    lists,
    simulations,
    strings,
    talk,
)
from .kinds import KINDS, LANGUAGES, Kind, Task, chosen
from .mistakes import broken

TRAIN = "train"
# Evaluation: new numbers and functions; also in new words; also after an error.
SPLITS = ("numbers", "phrasings", "recovery")

DECORATION = 0.2  # share of questions with words before, and with words after
BEFORE = {
    "zh": ("你好，", "请问：", "题目：", "帮个忙：", "问题：", "请教一下，", "麻烦看看："),
    "en": ("Hi, ", "Please help: ", "Question: ", "Task: ", "Quick question: ", "Hello! "),
}
AFTER = {
    "zh": ("请用代码计算。", "用 Python 算。", "谢谢！", "运行代码得出结果。", "请写代码。"),
    "en": ("Please use Python.", "Use code.", "Thanks!", "Run code to get the answer.",
           "Please compute it."),
}
AFTER_DERIVATIVE = {
    "zh": ("请直接使用已有的函数 derivative()。", "直接调用 derivative() 即可。"),
    "en": ("Please directly use the existing utility function 'derivative()' for computation; you "
           "do not need to import any packages or redefine it—just use it directly.",
           "Use the tool derivative().", "Please use the existing function 'derivative()'."),
}
MORE_TURNS = 0.42  # that another question follows
GOES_ON = 0.75  # that it goes on with a variable of the last one
MISTAKEN = 0.13  # conversations with an error
FOREIGN_PROMPT = 0.08  # conversations whose system line is in the other language
NO_TOOLS = 0.15  # conversations without the tool, where it is not asked for
THANKED = 0.04  # conversations that end with thanks


@dataclass(frozen=True)
class Turn:
    """A question, and the task that it asks for."""

    kind: Kind
    task: Task
    question: str
    answer: str  # with {output} where the output belongs
    mistaken: str | None = None  # code to be run before, which fails


@dataclass(frozen=True)
class Conversation:
    number: int
    split: str
    language: str
    prompt_language: str
    has_tools: bool
    turns: tuple[Turn, ...]


def make(seed: int, number: int, split: str = TRAIN, kind: Kind | None = None,
         language: str | None = None) -> Conversation:
    """Conversation `number` of a split; of a kind and in a language, if they are given."""
    rng = random.Random(f"codeact {seed} {split} {number}")
    language = language or rng.choice(LANGUAGES)
    first = draw_turn(rng, kind or draw_kind(rng, ""), language, {}, split)
    turns = [first]
    training = split == TRAIN
    while rng.random() < MORE_TURNS and len(turns) < 5 and (training or len(turns) < 2):
        turn = next_turn(rng, turns, language, split)
        if turn is None:
            break
        turns.append(turn)
    if split == "recovery" or (training and rng.random() < MISTAKEN):
        place = 0 if split == "recovery" else rng.randrange(len(turns))
        turns[place] = with_mistake(turns[place], rng)
    if training and rng.random() < THANKED:
        turns.append(draw_turn(rng, KINDS["thanks"], language, {}, split))
    other = LANGUAGES[language == LANGUAGES[0]]
    asks_for_tool = any(turn.kind.family == "derivative" for turn in turns)
    return Conversation(
        number, split, language,
        other if training and rng.random() < FOREIGN_PROMPT else language,
        asks_for_tool or not training or rng.random() >= NO_TOOLS, tuple(turns),
    )


def draw_kind(rng: random.Random, needs: str) -> Kind:
    kinds = [kind for kind in KINDS.values() if kind.needs == needs]
    return rng.choices(kinds, [kind.weight for kind in kinds])[0]


def next_turn(rng: random.Random, turns: list[Turn], language: str, split: str) -> Turn | None:
    """A question that goes on with the last turn's variable, or, in training, a new one."""
    state = turns[-1].task.state
    if state and (split != TRAIN or rng.random() < GOES_ON):
        needs = next(iter(state))
        return draw_turn(rng, draw_kind(rng, needs), language, state, split)
    return draw_turn(rng, draw_kind(rng, ""), language, {}, split) if split == TRAIN else None


def draw_turn(rng: random.Random, kind: Kind, language: str, state: dict, split: str
              ) -> Turn | None:
    """A task of this kind in words; None if a follow-up finds nothing to ask.

    First questions are held out by their task. Follow-ups have few numbers of their own ("and the
    median?"), so in evaluation their first question is what is new, and their words.
    """
    for _ in range(1000):
        task = kind.draw(rng, language, state)
        if task is None:
            continue
        if kind.needs or task.code is None or task.is_held_out == (split != TRAIN):
            break
    else:
        return None
    wording = kind.wording(language)
    phrasing = rng.choice(wording.held_out if split == "phrasings" else wording.asks)
    text = " ".join(chosen(phrasing, rng).format(**task.slots).split())
    question = decorated(text, kind, language, rng)
    answer = wording.answer.replace("{output}", "\0").format(**task.slots)
    return Turn(kind, task, question, " ".join(answer.split()).replace("\0", "{output}"))


def decorated(question: str, kind: Kind, language: str, rng: random.Random) -> str:
    """The question, with a friendly word before or after it at times."""
    if kind.family == "talk":
        return question
    if language == "en" and rng.random() < 0.06:
        question = question[0].lower() + question[1:]
    if rng.random() < DECORATION:
        question = rng.choice(BEFORE[language]) + question
    # The specification's sentence has this already.
    if rng.random() < DECORATION and "derivative()" not in question:
        own = kind.family == "derivative" and rng.random() < 0.5
        if question[-1] not in ".?!。？！":
            question += "。" if language == "zh" else "."
        space = "" if language == "zh" else " "
        question += space + rng.choice((AFTER_DERIVATIVE if own else AFTER)[language])
    return question


def with_mistake(turn: Turn, rng: random.Random) -> Turn:
    if turn.task.code is None:
        return turn
    return Turn(turn.kind, turn.task, turn.question, turn.answer, broken(turn.task, rng))


def evaluation(seed: int, split: str) -> Iterator[Conversation]:
    """Held-out conversations without end: kinds as often as in training, half in each language."""
    kinds = [kind for kind in KINDS.values() if not kind.needs and kind.family != "talk"]
    rng = random.Random(f"codeact {seed} {split}")
    for number in itertools.count():
        kind = rng.choices(kinds, [kind.weight for kind in kinds])[0]
        yield make(seed, number, split, kind, LANGUAGES[number % 2])
