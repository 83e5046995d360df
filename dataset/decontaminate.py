"""Keeping evaluation honest: no item that stands in the training text is asked.

What is held out is split off before anything is made from it (`dataset/corpus.py`), but the same
poem or definition also comes in through other sources. So the training text is read once, record
by record, and searched for the keys of every item. Memory holds the keys, never the corpus.

What "stands in the training text" means depends on what an item asks for:

* A text, or a question with choices, names its passages: a held-out text or sentence, a line of the
  poem asked about, the right answer in the words in which a dictionary would teach it. Passages are
  compared by their letters, digits and Han characters alone (`letters`). A short passage must not
  occur anywhere as a whole; of a long one no run of `RUN` bytes may, wherever it begins.
* identity, refusal, arithmetic: no user of a training conversation asks the last question, whatever
  was said before it and whatever marks and spaces stand in it (`spoken`). A sum held out as such
  may in addition be worked out nowhere, in figures or in words.
* follow_up: the facts are taught and the words (那杜甫呢？) are common, so neither can be the key.
  No training conversation gives the reply before and the reply asked for one after the other.

Nobody can say of a passage under `LEAST` bytes whether it was copied or is there by chance: 我不知道
is in every book. Such passages are no keys, and an item without a key is removed.
"""
import re
from collections import Counter
from collections.abc import Iterator

from dataset.text import LEAST, letters, spoken

# Bytes of UTF-8, which give both scripts about the same weight: 24 Han characters, or 72 letters,
# about 13 words.
RUN = 72
# Every part of a long passage is a key, so it is enough to look at every eighth place of the
# training text: what a run has left from the first such place on holds a whole part.
STRIDE = 8
PART = RUN - 3 * (STRIDE - 1)  # a Han character has three bytes
ANCHOR = 6  # characters at the beginning of a key, by which it is found
Key = tuple  # what kind of key, and what it says
SUM = re.compile(r"(\d+) ?(?:([-+])|(加|减)) ?(\d+) ?(?:=|等于) ?\d")
SIGNS = {"加": "+", "减": "-"}


class Decontaminator:
    """Collects evaluation items, reads the training records, and tells which items are clean."""

    def __init__(self, items: list[dict]) -> None:
        self.items = items
        self.keys: list[set[Key]] = [item_keys(item) for item in items]
        self.wanted: set[Key] = set().union(*self.keys)
        self.seen: set[Key] = set()  # keys met in the training data
        # For a short passage every place of a text is looked at, for parts of long ones one in
        # STRIDE.
        self.by_anchor: dict[int, dict[str, list[tuple[str, str]]]] = {1: {}, STRIDE: {}}
        for key in self.wanted:
            if key[0] in ("whole", "part"):
                found = self.by_anchor[1 if key[0] == "whole" else STRIDE]
                found.setdefault(key[1][:ANCHOR], []).append(key)

    def read_text(self, text: str) -> None:
        """Look for every passage and sum in one training text."""
        self.seen.update(self.wanted.intersection(sums(text)))
        text = letters(text)
        for stride, keys in self.by_anchor.items():
            for i in range(0, len(text) - ANCHOR + 1, stride):
                if text[i : i + ANCHOR] in keys:
                    self.seen.update(key for key in keys[text[i : i + ANCHOR]]
                                     if text.startswith(key[1], i))

    def read_chat(self, messages: list[dict[str, str]]) -> None:
        """Look for every key in one training conversation."""
        self.read_text("\n".join(message["content"] for message in messages))
        asked = [m["content"] for m in messages if m["role"] == "user"]
        replies = [m["content"] for m in messages if m["role"] == "assistant"]
        met = [question_key(question) for question in asked]
        met += [reply_key(*pair) for pair in zip(replies, replies[1:])]
        self.seen.update(self.wanted.intersection(met))

    def clean(self) -> tuple[list[dict], Counter]:
        """The items that training does not contain, and how many of each task were removed."""
        kept: list[dict] = []
        removed: Counter = Counter()
        for item, keys in zip(self.items, self.keys):
            choices = item.get("choices", ())
            if not keys or keys & self.seen or len(set(choices)) < len(choices):
                removed[item["task"]] += 1
            else:
                kept.append({name: value for name, value in item.items() if name != "passages"})
        return kept, removed


def item_keys(item: dict) -> set[Key]:
    """What must not stand in the training data: runs of letters, questions, replies, sums."""
    if item["kind"] != "chat":
        return {run for passage in item.get("passages", [item.get("text", "")])
                for run in runs(passage)}
    *before, question = (message["content"] for message in item["conversations"])
    if item["task"] == "follow_up":
        return {reply_key(before[-1], passage) for passage in item["passages"]}
    keys: set[Key] = {question_key(question)}
    for passage in item.get("passages", ()):
        keys.update(sums(passage))
    return keys


def runs(passage: str) -> Iterator[Key]:
    """The keys of a passage: its letters as a whole, or every part where they exceed RUN bytes.

    None where they are fewer than LEAST.
    """
    text = letters(passage)
    ends = [0]
    for character in text:
        ends.append(ends[-1] + len(character.encode()))
    if ends[-1] <= RUN:
        if ends[-1] >= LEAST:
            yield "whole", text
        return
    start = 0
    for end in range(len(text) + 1):
        while ends[end] - ends[start] >= PART:
            yield "part", text[start:end]
            start += 1


def question_key(question: str) -> Key:
    return "question", spoken(question)


def reply_key(before: str, after: str) -> Key:
    return "replies", spoken(before), spoken(after)


def sums(text: str) -> Iterator[Key]:
    """The additions and subtractions a text works out; a+b and b+a are the same."""
    if "=" not in text and "等于" not in text:
        return  # most texts, in a fifth of the time
    for a, sign, word, b in SUM.findall(text):
        left, right = int(a), int(b)
        if (sign or SIGNS[word]) == "+":
            yield "sum", min(left, right), "+", max(left, right)
        else:
            yield "sum", left, "-", right
