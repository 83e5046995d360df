"""A uniform sample of records from data files of any size: one pass, bounded memory, fixed seed.

Every record draws a random key, and the sample is the records with the smallest keys that fit into
the cap, that is, the beginning of a random shuffle of the whole corpus. Only kept records are in
memory and only kept ones are parsed, so a pass runs at nearly the speed of the disk. This is
reservoir sampling by random keys (Efraimidis & Spirakis, 2006) with a reservoir measured in bytes.
"""
import heapq
import json
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dataset.files import LINES, TEXT, Block, DataFile, read_blocks
from dataset.marks import find_marks, split_documents
from dataset.records import paragraphs
from dataset.shapes import PREFERENCES, TEXTS, conversation_of, shape_of, text_of

MAX_LINE_BYTES = 2**20  # a longer line must not fill the memory
HELDOUT_SHARE = 200  # one line in 200 is set aside; by content, so that duplicates stay together


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


def lines_of(block: Block, format: str) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each record in a block of a file: as it stands in a file of JSON lines;
    from files of other formats, the JSON that would stand there."""
    if format == LINES:
        lines = block.content.splitlines(keepends=True)
        yield from enumerate(lines, block.first)
    else:
        records = ((number, {"text": text}) for number, text in paragraphs(block)
                   ) if format == TEXT else block.content
        for number, record in records:
            line = json.dumps(record, ensure_ascii=False) + "\n"
            yield number, line.encode(errors="surrogatepass")  # what was not UTF-8 still is not


def usable(line: bytes) -> str | dict:
    """The text or the conversation in a line. Raises ValueError with the reason if it has none."""
    record = json.loads(line)  # JSONDecodeError and UnicodeDecodeError are ValueErrors
    shape = shape_of(record)
    if shape == TEXTS:
        return text_of(record)
    if shape == PREFERENCES:
        record = {"messages": record["chosen"]}
    return conversation_of(record, defaultdict(int))[1]


def as_text(record: str | dict) -> str:
    """A text as it is; a conversation with the names of its roles, for a chat repeats them in
    every turn."""
    if isinstance(record, str):
        return record
    parts = [json.dumps(tool, ensure_ascii=False) for tool in record.get("tools", ())]
    for message in record["messages"]:
        words = [message.get("reasoning_content", ""), message["content"]]
        words += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
        parts.append("\n".join([message["role"], *filter(None, words)]))
    return "\n".join(parts)


def sample_texts(
    files: Sequence[DataFile],
    cap_bytes: int,
    *,
    heldout_bytes: int = 2 * 10**6,
    seed: int = 0,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> Sample:
    """Sample at most `cap_bytes` of records from data files, and at most `heldout_bytes` of others.

    `progress` is told the bytes read since it was last told. Of the broken lines only those drawn
    can be seen; they are named in `Sample.broken`. Raises `BrokenData` if a file cannot be read.
    """
    draw = random.Random(seed).random
    train, heldout, sample = Reservoir(cap_bytes), Reservoir(heldout_bytes), Sample()
    for file_index, file in enumerate(files):
        for block in read_blocks(file):
            for number, line in lines_of(block, file.format):
                sample.lines_seen += 1
                key = draw()
                if len(line) >= MAX_LINE_BYTES:
                    sample.broken.append(f"{file}:{number}: longer than {MAX_LINE_BYTES} bytes")
                elif zlib.crc32(line) % HELDOUT_SHARE == 0:
                    heldout.offer(key, file_index, number, line)
                elif key < train.threshold:
                    train.offer(key, file_index, number, line)
            sample.bytes_seen += block.num_bytes
            progress(block.num_bytes)
    for reservoir, texts in ((train, sample.train), (heldout, sample.heldout)):
        found: dict[int, list[str]] = defaultdict(list)
        for file_index, number, line in reservoir.lines():
            try:
                found[file_index].append(as_text(usable(line)))
            except ValueError as error:
                sample.broken.append(f"{files[file_index]}:{number}: {error}")
        for of_file in found.values():  # marks between documents are no text
            marks, _ = find_marks(of_file)
            texts += ["\n".join(split_documents(text, marks)) for text in of_file]
    return sample
