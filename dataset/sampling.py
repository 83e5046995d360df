"""A uniform sample of lines from JSONL files of any size: one pass, bounded memory, fixed seed.

Every line draws a random key, and the sample is the lines with the smallest keys that fit into the
cap, that is, the beginning of a random shuffle of the whole corpus. Only kept lines are in memory
and only kept lines are parsed, so a pass runs at nearly the speed of the disk. This is reservoir
sampling by random keys (Efraimidis & Spirakis, 2006) with a reservoir measured in bytes.
"""
import heapq
import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_LINE_BYTES = 2**20  # a longer line is no record, and must not fill the memory
HELDOUT_SHARE = 200  # one line in 200 is set aside; by content, so that duplicates stay together
CHUNK_BYTES = 2**20


class Reservoir:
    """Keeps the beginning of a random shuffle of what is offered, at most `cap_bytes` of it."""

    def __init__(self, cap_bytes: int):
        self.cap_bytes = cap_bytes
        self.num_bytes = 0
        self.threshold = 1.0  # nothing with a key from here on can belong to the sample
        self._heap: list[tuple[float, int, int, bytes]] = []  # largest key on top (keys negated)

    def offer(self, key: float, file_index: int, line_number: int, line: bytes) -> None:
        """Take a line with its random key in [0, 1), and drop the largest keys if over the cap."""
        if key >= self.threshold:
            return
        heapq.heappush(self._heap, (-key, file_index, line_number, line))
        self.num_bytes += len(line)
        while self.num_bytes > self.cap_bytes:
            negated_key, _, _, dropped = heapq.heappop(self._heap)
            self.num_bytes -= len(dropped)
            # Without this line a short latecomer could slip into the gap that a long line left,
            # and the sample would favour short lines.
            self.threshold = -negated_key

    def lines(self) -> list[tuple[int, int, bytes]]:
        """The kept lines as (file index, line number, bytes), in the order of the corpus."""
        return sorted(entry[1:] for entry in self._heap)


@dataclass
class Sample:
    """Texts to train on, texts set aside to judge by, and what was wrong on the way."""

    train: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # "file:line: reason"
    lines_seen: int = 0
    bytes_seen: int = 0


def record_text(record: object) -> str:
    """The text of a pretraining or SFT record; ValueError with the reason if it is neither.

    A conversation keeps its role names, for a chat repeats them in every turn.
    """
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    text, turns = record.get("text"), record.get("conversations")
    if isinstance(turns, list):
        try:
            text = "\n".join(turn["role"] + "\n" + turn["content"] for turn in turns)
        except (KeyError, TypeError):
            raise ValueError('a turn lacks "role" or "content" (strings)') from None
    if not isinstance(text, str):
        raise ValueError('neither "text" (a string) nor "conversations" (a list)')
    if not text.strip():
        raise ValueError("empty")
    return text


def sample_texts(
    paths: Sequence[str | Path],
    cap_bytes: int,
    *,
    heldout_bytes: int = 2 * 10**6,
    seed: int = 0,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> Sample:
    """Sample at most `cap_bytes` of lines from JSONL files, and at most `heldout_bytes` of others.

    `progress` is told the bytes read since it was last told. Of the broken lines only those drawn
    can be seen; they are named in `Sample.broken`. Raises OSError if a file cannot be read.
    """
    draw = random.Random(seed).random
    train, heldout, sample = Reservoir(cap_bytes), Reservoir(heldout_bytes), Sample()
    for file_index, path in enumerate(paths):
        with open(path, "rb") as file:
            line_number = unreported = 0
            while line := file.readline(MAX_LINE_BYTES):
                line_number += 1
                num_bytes = len(line)
                key = draw()
                if num_bytes == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while rest := file.readline(CHUNK_BYTES):
                        num_bytes += len(rest)
                        if rest.endswith(b"\n"):
                            break
                    sample.broken.append(
                        f"{path}:{line_number}: longer than {MAX_LINE_BYTES} bytes"
                    )
                elif zlib.crc32(line) % HELDOUT_SHARE == 0:
                    heldout.offer(key, file_index, line_number, line)
                elif key < train.threshold:
                    train.offer(key, file_index, line_number, line)
                sample.bytes_seen += num_bytes
                unreported += num_bytes
                if unreported >= CHUNK_BYTES:
                    progress(unreported)
                    unreported = 0
            progress(unreported)
            sample.lines_seen += line_number
    for reservoir, texts in ((train, sample.train), (heldout, sample.heldout)):
        for file_index, line_number, line in reservoir.lines():
            try:
                texts.append(record_text(json.loads(line)))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                sample.broken.append(f"{paths[file_index]}:{line_number}: {error}")
    return sample
