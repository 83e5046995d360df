"""Facts asked singly and in follow-up turns: 李白是谁？… 那杜甫呢？

A `Relation` is one kind of fact with the ways to ask for it. A follow-up names only the next
subject, so the model must carry the kind of question over from the turn before.
"""
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataset.dialogues import Chat, chat, test_item
from dataset.text import bucket, pack

FACTS = Path(__file__).with_name("facts.txt")
FOLLOW_UPS = ("那{}呢？", "{}呢？", "那么{}呢？", "还有{}呢？", "换成{}呢？", "那{}呢?", "{}呢",
              "那你知道{}吗？", "再说说{}。", "我还想问{}。", "如果是{}呢？")


@dataclass
class Relation:
    """One kind of fact: how to ask, how to ask on, and the answer and its key for every subject."""

    name: str
    ask: tuple[str, ...]
    follow: tuple[str, ...] = FOLLOW_UPS
    answers: dict[str, str] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)  # what a right answer must contain


def read(path: Path = FACTS) -> list[Relation]:
    """The relations of `facts.txt`; a bad line raises ValueError with its number."""
    relations: list[Relation] = []
    say = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if section := re.fullmatch(r"\[(\w+)\]", line):
            relations.append(Relation(section[1], ()))
        elif not relations:
            raise ValueError(f"{path.name}:{number}: a [section] must come first")
        elif line.startswith("ask:"):
            relations[-1].ask = tuple(part.strip() for part in line[4:].split("|"))
        elif line.startswith("say:"):
            say = line[4:].strip()
        elif line.startswith("follow:"):
            forms = tuple(part.strip() for part in line[7:].split("|"))
            relations[-1].follow = () if forms == ("-",) else forms
        else:
            for pair in line.split():
                subject, separator, value = pair.replace("_", " ").partition("=")
                if not separator or not value:
                    raise ValueError(f"{path.name}:{number}: {pair!r} is not subject=value")
                add(relations[-1], say, subject, value)
    return relations


def add(relation: Relation, say: str, subject: str, value: str) -> None:
    if relation.name == "measure_word":
        answer = say.format(subject, value, value, subject)
    else:
        answer = say.format(subject, value)
    relation.answers[subject] = answer
    key = re.split("[，（]", value)[0]
    relation.keys[subject] = [subject, key] if subject in answer else [key.rstrip(".")]


def add_people(known: Iterable[tuple[str, str, str]], relations: list[Relation]) -> None:
    """Add the poets of the corpus to the relation that says who people are."""
    relation = next(relation for relation in relations if relation.name == "person")
    for name, dynasty, role in known:
        if name not in relation.answers:
            relation.answers[name] = f"{name}是{dynasty}{role}。"
            relation.keys[name] = [name, dynasty]


def held_out(relation: Relation, first: str, second: str) -> bool:
    """True for the pairs of neighbouring subjects kept for evaluation."""
    return bucket(f"{relation.name} {first} {second}", 15) == 0


def single_chats(relations: list[Relation], count: int, rng: random.Random) -> Iterator[Chat]:
    """Every fact in every wording about equally often, `count` chats in all."""
    rows = [(relation, subject, form) for relation in relations for subject in relation.answers
            for form in relation.ask]
    while count > 0:
        rng.shuffle(rows)
        for relation, subject, form in rows[:count]:
            yield chat("facts", form.format(subject), relation.answers[subject])
        count -= len(rows)


def follow_up_chats(relations: list[Relation], count: int, rng: random.Random) -> Iterator[Chat]:
    """Chains of two to four subjects of one relation, sometimes then a second relation."""
    usable = [relation for relation in relations if relation.follow and len(relation.answers) > 3]
    # The square root keeps the large relations (people, books) ahead without starving the small.
    weights = [len(relation.answers) ** 0.5 for relation in usable]
    for _ in range(count):
        relation = rng.choices(usable, weights)[0]
        turns = chain(relation, rng.choices((2, 3, 4), (60, 30, 10))[0], rng)
        if len(turns) == 4 and rng.random() < 0.15:
            turns += chain(rng.choices(usable, weights)[0], 1, rng)
        yield chat("follow_up", *turns)


def chain(relation: Relation, length: int, rng: random.Random) -> list[str]:
    subjects = list(relation.answers)
    subject = rng.choice(subjects)
    turns = [rng.choice(relation.ask).format(subject), relation.answers[subject]]
    used = {subject}
    while len(used) < length:
        following = rng.choice(subjects)
        if following in used or held_out(relation, subject, following):
            continue
        subject = following
        used.add(subject)
        turns += [rng.choice(relation.follow).format(subject), relation.answers[subject]]
    return turns


def texts(relations: list[Relation], rng: random.Random, repeats: int = 4) -> Iterator[str]:
    """The facts as plain sentences, differently mixed each time."""
    for _ in range(repeats):
        for relation in relations:
            sentences = list(relation.answers.values())
            rng.shuffle(sentences)
            yield from pack(sentences, 120)


def tests(relations: list[Relation], count: int, rng: random.Random) -> list[dict]:
    """Follow-up turns whose pair of subjects training never shows side by side."""
    pairs = []
    for relation in relations:
        if relation.follow and len(relation.answers) > 3:
            found = [(relation, a, b) for a in relation.answers for b in relation.answers
                     if a != b and relation.answers[a] != relation.answers[b]
                     and relation.keys[a] != relation.keys[b] and held_out(relation, a, b)]
            pairs.append(rng.sample(found, min(len(found), 12)))
    items = []
    for relation, first, second in rng.sample([p for group in pairs for p in group],
                                              min(count, sum(map(len, pairs)))):
        items.append(test_item(
            "follow_up", rng.choice(relation.ask).format(first), relation.answers[first],
            rng.choice(relation.follow[:5]).format(second), accept_all=relation.keys[second],
            relation=relation.name, passages=[relation.answers[second]]))
    return items
