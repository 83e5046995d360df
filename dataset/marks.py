"""Marks that other projects write into the text of their data, to join documents or to end them.

In a pretraining text they are borders, not text: minimind's former `pretrain_hq.jsonl` holds about
eight unrelated documents a record, joined by `<s>…</s>` (until April 2025), then by
`<|im_start|>…<|im_end|>`, at last by `<|im_end|>` alone (its issues 168 and 686, pull request 609;
looked up 2026-11-28). Which of them a file uses, a sample of its records tells.
"""
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Marks:
    """A pair of marks around a document; the first one may be missing from the data."""

    start: str | None
    end: str

    def __str__(self) -> str:
        return f"{self.start or ''}…{self.end}"

    @cached_property
    def border(self) -> re.Pattern:
        either = "|".join(re.escape(mark) for mark in (self.start, self.end) if mark)
        return re.compile(rf"\s*(?:{either})\s*")

    def frame(self, text: str) -> bool:
        """Whether the text is built from documents between these marks."""
        text = text.strip()
        starts = self.start is not None and text.startswith(self.start)
        return text.endswith(self.end) or (starts and self.end in text)


# In the order in which they are looked for.
KNOWN = (
    Marks("<s>", "</s>"),  # Llama 2, Mistral and this project
    Marks("<|im_start|>", "<|im_end|>"),  # ChatML, Qwen
    Marks("<|begin_of_text|>", "<|end_of_text|>"),  # Llama 3
    Marks("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),  # DeepSeek
    Marks("<bos>", "<eos>"),  # Gemma
    Marks(None, "<|endoftext|>"),  # GPT-2, Qwen
)
# Inside the words of a conversation each of these is a sign of another project's template.
FOREIGN = re.compile("|".join(map(re.escape, [
    *(mark for marks in KNOWN for mark in (marks.start, marks.end) if mark),
    "<|eot_id|>", "<|start_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
    "<<SYS>>", "<|user|>", "<|assistant|>", "<|system|>",
])))
CHAT_TURN = re.compile(r"<\|im_start\|>(?:system|user|assistant|tool)\n")
LEAST_SHARE = 0.1  # of the sampled records that must be framed by marks


def find_marks(texts: Iterable[str]) -> tuple[tuple[Marks, ...], bool]:
    """The marks that frame the documents of these sampled texts; and whether there were others
    around the turns of conversations, which are no borders.
    """
    framed: Counter[Marks] = Counter()
    total = chats = 0
    for text in texts:
        total += 1
        if CHAT_TURN.match(text.lstrip()):
            chats += 1
        else:
            framed.update(marks for marks in KNOWN if marks.frame(text))
    found = tuple(marks for marks in KNOWN if framed[marks] >= max(1, LEAST_SHARE * total))
    return found, chats >= max(1, LEAST_SHARE * total)


def split_documents(text: str, marks: tuple[Marks, ...]) -> list[str]:
    """The documents of a record, without the marks and the white space around them."""
    parts = [text]
    for pair in marks:
        if any(mark in text for mark in (pair.start, pair.end) if mark):
            parts = [piece for part in parts for piece in pair.border.split(part)]
    return [part for part in parts if part.strip()] if len(parts) > 1 else parts
