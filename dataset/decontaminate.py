"""Keeping evaluation honest: no question whose key text still stands in the training text.

Splitting by hash alone leaks, for a poem or a definition also comes in through other sources. The
training text is read once, record by record, and every place in it is looked up among the keys of
the questions, so memory holds the questions and never the corpus.
"""
import json
from collections import Counter

from dataset.text import han

KEY = 24  # Han characters that identify a text
ANCHOR = 4  # and the first few of them, by which a key is found


class Decontaminator:
    """Collects evaluation items, reads the training records, and tells which items are clean."""

    def __init__(self, items: list[dict]) -> None:
        self.items = items
        self.keys_by_anchor: dict[str, list[str]] = {}
        self.keys: list[list[str]] = []  # for each item
        self.seen: set[str] = set()  # keys and prompts met in the training data
        self.prompts: set[str] = set()
        for item in items:
            keys = item_keys(item)
            self.keys.append(keys)
            for key in keys:
                known = self.keys_by_anchor.setdefault(key[:ANCHOR], [])
                if key not in known:
                    known.append(key)
            if item["kind"] == "chat":
                self.prompts.add(prompt(item["conversations"]))

    def read_text(self, text: str) -> None:
        """Look for every key in the Han characters of one training text."""
        found, anchors = self.seen, self.keys_by_anchor
        if text.isascii():
            return
        text = han(text)
        for i in range(len(text) - ANCHOR + 1):
            if text[i : i + ANCHOR] in anchors:
                for key in anchors[text[i : i + ANCHOR]]:
                    if text.startswith(key, i):
                        found.add(key)

    def read_chat(self, messages: list[dict[str, str]]) -> None:
        self.read_text("".join(message["content"] for message in messages))
        for i, message in enumerate(messages):
            if message["role"] == "user" and (asked := prompt(messages[: i + 1])) in self.prompts:
                self.seen.add(asked)

    def clean(self) -> tuple[list[dict], Counter]:
        """The items that training does not contain, and how many of each task were removed."""
        kept: list[dict] = []
        removed: Counter = Counter()
        for item, keys in zip(self.items, self.keys):
            if item["kind"] == "chat":
                leaked = prompt(item["conversations"]) in self.seen
            elif item["kind"] == "choice":
                leaked = (not keys or any(key in self.seen for key in keys)
                          or len(set(item["choices"])) < len(item["choices"]))
            else:
                leaked = any(key in self.seen for key in keys)
            if leaked:
                removed[item["task"]] += 1
            else:
                kept.append({name: value for name, value in item.items() if name != "key"})
        return kept, removed


def item_keys(item: dict) -> list[str]:
    """What must not stand in the training text: the given key, or parts of a held-out text."""
    if item["kind"] == "chat":
        return []
    if item["kind"] == "choice":
        key = han(item["key"])[:KEY]
        return [key] if len(key) >= ANCHOR else []
    # A text begins with a title that others share, so its middle and end count too.
    text = han(item["text"])
    starts = {len(text) // 4, len(text) // 2, max(0, len(text) - KEY)}
    return [text[i : i + KEY] for i in sorted(starts) if len(text) >= 2 * KEY]


def prompt(messages: list[dict[str, str]]) -> str:
    return json.dumps([message["content"] for message in messages], ensure_ascii=False)
