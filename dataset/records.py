"""Training records, read from data files of every usual kind and checked one by one.

A learner needs the whole list of what is wrong with a file: which line, and why. So a broken record
is named and left out, and only a file with many of them is refused.
"""
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from dataset.files import (
    BORDER,
    LINES,
    TEXT,
    Block,
    BrokenData,
    DataFile,
    open_as,
    read_blocks,
    sample_blocks,
)
from dataset.marks import FOREIGN, Marks, find_marks, split_documents
from dataset.shapes import KNOWN_SHAPES, Fault, WrongShape, conversation_of, text_of

PRETRAIN, SFT = "pretrain", "sft"
MARKS_CHOICES = ("auto", "keep")
LISTED_FAULTS = 20  # how many broken lines a report names
EARLY_STOP_LINES = 10_000  # before this many lines, wait for the end of the file to judge it
MAX_BROKEN = 0.01  # of the lines of a file
SAMPLED_TEXTS = 1000  # of each sampled block, to find marks in
PARAGRAPH_BREAK = re.compile(BORDER.pattern.decode())
SHORT_ANSWER_CHARACTERS = 4


@dataclass(frozen=True)
class Reading:
    """How the records of a file are to be understood."""

    kind: str  # PRETRAIN or SFT
    format: str  # of the file: see `dataset/files.py`
    marks: tuple[Marks, ...] = ()  # borders between documents


@dataclass
class Records:
    """What a block holds: documents (str) or conversations (dict), and what was met on the way."""

    records: list[tuple[int, str | dict]] = field(default_factory=list)  # each with its line
    faults: list[tuple[int, str]] = field(default_factory=list)  # (line, why it is broken)
    wrong_shape: tuple[int, str] | None = None  # the first fault of this kind
    num_documents: int = 0
    shapes: Counter = field(default_factory=Counter)
    mended: Counter = field(default_factory=Counter)
    foreign_marks: Counter = field(default_factory=Counter)  # records with a mark in their words
    short_answers: Counter = field(default_factory=Counter)


# ---- From a block to records --------------------------------------------------------------------

def read_block(block: Block, reading: Reading) -> Records:
    """Parse and check what a block holds."""
    found = Records()
    for number, value in _values(block, reading.format, found):
        try:
            if reading.kind == SFT:
                shape, conversation = conversation_of(value, found.mended)
                found.records.append((number, conversation))
                _look_at_words(conversation, found)
            else:
                shape, text = "texts", value if reading.format == TEXT else text_of(value)
                documents = split_documents(text, reading.marks) if reading.marks else [text]
                found.records += [(number, document) for document in documents]
            found.shapes[shape] += 1
        except Fault as fault:
            found.faults.append((number, str(fault)))
            if isinstance(fault, WrongShape):
                found.wrong_shape = found.wrong_shape or found.faults[-1]
    found.num_documents = len(found.records)
    return found


def _values(block: Block, format: str, found: Records) -> Iterator[tuple[int, object]]:
    """The parsed records of a block, each with its number; broken lines go into `found`."""
    if format == TEXT:
        for number, document in paragraphs(block):
            if document.isascii() or is_unicode(document):
                yield number, document
            else:
                found.faults.append((number, "not UTF-8"))
    elif format == LINES:
        for number, line in enumerate(block.content.removesuffix(b"\n").split(b"\n"), block.first):
            if not line.strip():
                found.mended["blank lines skipped"] += 1
                continue
            try:
                yield number, json.loads(line.decode())
            except UnicodeDecodeError:
                found.faults.append((number, "not UTF-8"))
            except json.JSONDecodeError as error:
                nul = " (a NUL byte)" if b"\0" in line else ""
                reason = f"bad JSON: {error.msg} at column {error.colno}{nul}"
                found.faults.append((number, reason))
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets
                found.faults.append((number, f"bad JSON: {error}"))
    else:
        yield from block.content


def paragraphs(block: Block) -> Iterator[tuple[int, str]]:
    """The documents of a plain text, each with the number of the line on which it begins.

    Bytes that are not UTF-8 are half surrogate pairs in them (`is_unicode`).
    """
    text, number = block.content.decode(errors="surrogateescape"), block.first
    pattern = PARAGRAPH_BREAK if block.by_paragraph else re.compile("\n")
    start = 0
    for match in [*pattern.finditer(text), None]:
        end = match.start() if match else len(text)
        if document := text[start:end].strip():
            skipped = text[start:end].index(document[0])
            yield number + text.count("\n", start, start + skipped), document
        if match:
            number += text.count("\n", start, match.end())
            start = match.end()


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _look_at_words(conversation: dict, found: Records) -> None:
    """Count what may be a mistake in the data: marks of another template, answers all alike."""
    messages = conversation["messages"]
    answer = messages[-1]["content"]
    if len(answer) <= SHORT_ANSWER_CHARACTERS:
        found.short_answers[answer] += 1
    for message in messages:
        text = message["content"]
        if ("<" in text or "[" in text) and (mark := FOREIGN.search(text)):
            found.foreign_marks[mark[0]] += 1
            return


# ---- Reading whole files ------------------------------------------------------------------------

def reading_of(file: DataFile, kind: str, marks: str = "auto") -> tuple[Reading, list[str]]:
    """How this file is to be read, and what the user should know of it, a line each.

    Raises:
        BrokenData: nothing in the first block has a shape that this kind of training can use.
    """
    if kind == SFT and file.format == TEXT:
        raise BrokenData(f"{file}: plain text: data for pretraining (train_pretrain.py), not for "
                         f"fine-tuning. {KNOWN_SHAPES}")
    reading = Reading(kind, file.format)
    texts: list[str] = []
    for number, block in enumerate(sample_blocks(file)):
        sample = read_block(block, reading)
        if number == 0 and not sample.records and (sample.wrong_shape or len(sample.faults) > 2):
            line, reason = sample.wrong_shape or sample.faults[0]
            hint = ("; is this JSON Lines, one record on each line?"
                    if reason.startswith("bad JSON") else "")
            raise BrokenData(f"{file}:{line}: {reason}{hint}")
        texts += [text for _, text in sample.records[:SAMPLED_TEXTS] if isinstance(text, str)]
    if kind == SFT or marks == "keep":
        return reading, []
    found, chats = find_marks(texts)
    notes = [f"{file}: conversations between <|im_start|> and <|im_end|> are read as text; to learn "
             "to answer, give them to train_sft.py as messages."] if chats else []
    return Reading(kind, file.format, found), notes


class FileReport:
    """What was met in one file; stops the reading where too much of it is broken."""

    def __init__(self, file: DataFile, reading: Reading, strict: bool = False,
                 max_broken: float = MAX_BROKEN):
        self.file, self.reading, self.strict, self.max_broken = file, reading, strict, max_broken
        self.total = Records()
        self.num_records = self.num_documents = self.num_broken = self.num_bytes = 0

    def add(self, num_bytes: int, found: Records) -> None:
        """Take in what a block of so many bytes held. Raises `BrokenData`."""
        for name in ("shapes", "mended", "foreign_marks", "short_answers"):
            getattr(self.total, name).update(getattr(found, name))
        faults = [f"{self.file}:{line}: {reason}" for line, reason in found.faults]
        if faults and self.strict:
            raise BrokenData(f"{faults[0]}\nStopped at the first broken line (strict).")
        self.total.faults += faults[:max(0, LISTED_FAULTS - len(self.total.faults))]
        self.num_broken += len(faults)
        self.num_records += sum(found.shapes.values())
        self.num_documents += found.num_documents
        self.num_bytes += num_bytes
        # Too many already, even if every line still to come were good.
        seen = self.num_records + self.num_broken
        expected = seen * max(1.0, self.file.size_bytes / max(1, self.num_bytes))
        if seen >= EARLY_STOP_LINES and self.num_broken > self.max_broken * expected:
            raise BrokenData(self._list(" so far", stop=True))

    def finish(self) -> list[str]:
        """What the user should know of the file, a line each. Raises `BrokenData`."""
        seen = self.num_records + self.num_broken
        if self.num_broken > self.max_broken * seen:
            raise BrokenData(self._list("", stop=True))
        if not seen:
            raise BrokenData(f"{self.file}: no records in this file.")
        lines = [self._list("", stop=False)] if self.num_broken else []
        lines.append(f"{self.file}: {self._recognised()}")
        if self.total.foreign_marks:
            names = " ".join(mark for mark, _ in self.total.foreign_marks.most_common(5))
            lines.append(f"{self.file}: {self.total.foreign_marks.total():,} conversations hold "
                         f"marks of another template ({names}); they are learnt as plain text.")
        for answer, count in self.total.short_answers.most_common(1):
            if count > max(10, self.num_records / 2):
                lines.append(f"{self.file}: {count:,} of {self.num_records:,} conversations end "
                             f"with the same answer {answer!r}: is it a placeholder?")
        return lines

    def _recognised(self) -> str:
        shapes = ", ".join(f"{count:,} {shape}" for shape, count in self.total.shapes.most_common())
        if self.reading.marks:
            marks = ", ".join(map(str, self.reading.marks))
            shapes += (f" with {self.num_documents:,} documents, "
                       f"{self.num_documents / self.num_records:.1f} documents a record, "
                       f"marks of {marks} removed")
        mended = ", ".join(f"{count:,} {what}" for what, count in self.total.mended.most_common())
        return shapes + (f"; {mended}" if mended else "")

    def _list(self, so_far: str, stop: bool) -> str:
        """The broken lines, one below the other, and what follows from them."""
        lines = list(self.total.faults)
        if self.num_broken > len(lines):
            lines.append(f"... and {self.num_broken - len(lines):,} more")
        summary = (f"{self.num_broken:,} of {self.num_records + self.num_broken:,} records{so_far} "
                   "are broken")
        lines.append(f"{summary}, more than {self.max_broken:.0%}: fix or remove them, then run "
                     "again." if stop else f"{summary}: left out.")
        return "\n".join(lines)


def read_records(path: str | Path, kind: str, *, strict: bool = False, marks: str = "auto",
                 max_broken: float = MAX_BROKEN) -> Iterator[tuple[int, str | dict]]:
    """Stream the records of one file, each with its line: documents (`kind` "pretrain") or
    conversations ("sft"), in the internal forms of `dataset/shapes.py`.

    Broken ones are left out, counted, and listed on stderr at the end of the file. Raises
    `BrokenData` if more than the fraction `max_broken` of the lines is broken (as soon as this is
    clear), at the first one with `strict`, or if the file holds no record at all.
    """
    file = open_as(Path(path))
    reading, _ = reading_of(file, kind, marks)
    report = FileReport(file, reading, strict, max_broken)
    for block in read_blocks(file):
        found = read_block(block, reading)
        report.add(block.num_bytes, found)
        yield from found.records
    report.finish()
    if report.num_broken:
        say([report._list("", stop=False)])


def say(lines: Iterable[str]) -> None:
    """Show lines on stderr, above a progress bar if there is one."""
    for line in lines:
        tqdm.write(line, file=sys.stderr)
