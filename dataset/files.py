"""Data files as people have them, read in order, a block at a time, in bounded memory.

    lines     .jsonl, .ndjson, or .json with one record a line
    array     .json: one array of records
    csv       .csv or .tsv: a record a row, named by the first row
    parquet   .parquet: a record a row
    text      .txt: a document a line, or between blank lines if there are any

Each but Parquet may be compressed (gz, bz2, xz, zst). What a file is, its first bytes tell, and its
name where they cannot; so a pipe works too. Nothing here looks into a record. Parquet is decoded by
`datasets`. Its readers of JSON and CSV do not say on which line a record stands, and of an array
they read the whole; so these are read here, lines as raw blocks that many processes parse at once.
"""
import codecs
import csv
import glob
import io
import itertools
import json
import lzma
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datasets import Dataset
from datasets.exceptions import DatasetsError

BLOCK_BYTES = 1 << 20
BLOCK_RECORDS = 1000
MAX_LINE_BYTES = 32 << 20
LINES, ARRAY, CSV, PARQUET, TEXT = "lines", "array", "csv", "parquet", "text"
FORMAT_OF = {".jsonl": LINES, ".ndjson": LINES, ".json": LINES, ".csv": CSV, ".tsv": CSV,
             ".parquet": PARQUET, ".txt": TEXT}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BORDER = re.compile(rb"\n[ \t\r]*\n")  # between two documents of a .txt
UTF16_NULS = 0.01  # share of NUL bytes, mostly at odd or at even places, of UTF-16


class BrokenData(ValueError):
    """The data cannot be used; the message is a report that can be shown as it is."""


@dataclass(frozen=True)
class DataFile:
    """One file, and how it is read."""

    path: Path
    format: str  # LINES, ARRAY, CSV, PARQUET or TEXT
    codec: str | None = None
    name: str = ""  # what messages call it

    def __str__(self) -> str:
        return self.name or str(self.path)

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Block:
    """Some records of a file that follow each other, not yet looked into."""

    first: int  # number of the first one: its line, or its row, from 1
    # LINES and TEXT: raw bytes, whole lines. Else: (number, record) pairs.
    content: bytes | list[tuple[int, object]]
    num_bytes: int  # of the file that were read for it
    num_lines: int
    by_paragraph: bool = False  # TEXT: documents stand between blank lines


def is_pipe(name: str | Path) -> bool:
    """Whether `name` is standard input (`-`) or a pipe, which can be read only once."""
    return str(name) == "-" or Path(name).is_fifo()


@contextmanager
def data_files(names: list[str | Path], spool_dir: Path) -> Iterator[list[DataFile]]:
    """The data files that these names mean: files, folders of files, pipes, `-`.

    A pipe is copied into `spool_dir` for as long as the context lasts.

    Raises:
        FileNotFoundError, BrokenData: a name means nothing that can be read.
    """
    with ExitStack() as stack:
        files = []
        for name in names:
            if is_pipe(name):
                copy = stack.enter_context(_spooled(name, spool_dir))
                files.append(open_as(copy, "standard input" if str(name) == "-" else str(name)))
            elif Path(name).is_dir():
                files += [open_as(path) for path in _files_in(Path(name))]
            else:
                files.append(open_as(Path(name)))
        yield files


def open_as(path: Path, name: str = "") -> DataFile:
    """Find out how a file is to be read, from its first bytes and its name.

    Raises:
        FileNotFoundError, BrokenData: there is no such file, or nothing in it.
    """
    name = name or str(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such data file: {name}")
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise BrokenData(f"{name}: the file is empty.")
    if head.startswith(b"PAR1"):
        return DataFile(path, PARQUET, None, name)
    codec = next((codec for magic, codec in MAGIC.items() if head.startswith(magic)), None)
    format = _format_named(Path(name))
    if format == PARQUET:
        raise BrokenData(f"{name}: is no Parquet file, whatever its name says: copy it again.")
    if format not in (CSV, TEXT):
        file = DataFile(path, LINES, codec, name)
        with _explained(file), _opened(file) as (stream, _):
            start = _checked(stream.read(BLOCK_BYTES), file).lstrip()
        if start.startswith(b"["):
            format = ARRAY
        elif format is None:
            format = LINES if start.startswith(b"{") else TEXT
    return DataFile(path, format, codec, name)


def read_blocks(file: DataFile) -> Iterator[Block]:
    """The blocks of a file in order; their `num_bytes` add up to its size.

    Raises:
        BrokenData: it cannot be read on: damaged, of another encoding, a line without end.
    """
    readers = {LINES: _line_blocks, TEXT: _text_blocks, ARRAY: _array_blocks, CSV: _csv_blocks,
               PARQUET: _parquet_blocks}
    with _explained(file):
        yield from readers[file.format](file)


def sample_blocks(file: DataFile, places: int = 4) -> Iterator[Block]:
    """Some blocks of a file: the first one, and of uncompressed lines also later ones.

    The numbers in those others are not the file's.
    """
    yield from itertools.islice(read_blocks(file), 1)
    if file.format != LINES or file.codec or file.size_bytes < places * BLOCK_BYTES:
        return
    with file.path.open("rb") as stream:
        for place in range(1, places):
            stream.seek(place * file.size_bytes // places)
            stream.readline(MAX_LINE_BYTES)  # the rest of a line
            content = stream.read(BLOCK_BYTES)
            yield Block(1, content[:content.rfind(b"\n") + 1], 0, 0)


# ---- Opening ------------------------------------------------------------------------------------

def _files_in(folder: Path) -> list[Path]:
    """The data files in a folder and below it, in the order of their names; no hidden ones."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if _format_named(path) and path.is_file() and not hidden:
            found.append(path)
    if not found:
        raise FileNotFoundError(
            f"{folder}: no data file in this folder; known are {' '.join(FORMAT_OF)}, "
            f"compressed ones too ({' '.join(COMPRESSED)})")
    return found


def _format_named(path: Path) -> str | None:
    """The format that a file's name tells, compressed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMAT_OF.get(suffixes[-1]) if suffixes else None


@contextmanager
def _spooled(name: str | Path, folder: Path) -> Iterator[Path]:
    """A copy of what comes through a pipe, in a file that can be read more than once."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".piped-") as copy:
        source = sys.stdin.buffer if str(name) == "-" else open(name, "rb")
        with source if str(name) != "-" else nullcontext():
            shutil.copyfileobj(source, copy, BLOCK_BYTES)
        copy.flush()
        yield Path(copy.name)


@contextmanager
def _explained(file: DataFile) -> Iterator[None]:
    """Turn what the readers raise at a damaged file into one line."""
    try:
        yield
    except (DatasetsError, EOFError, OSError, lzma.LZMAError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise BrokenData(f"{file}: cannot be read: {error.strerror}.") from error
        reason = " ".join(str(error).split())[:200]
        raise BrokenData(f"{file}: is damaged or was cut off ({reason}). Copy it again.") from error


@contextmanager
def _opened(file: DataFile) -> Iterator[tuple[object, Callable[[], int]]]:
    """A stream of the file's bytes, decompressed, and a function: bytes of the file read so far."""
    with file.path.open("rb") as raw:
        if file.codec is None:
            yield raw, raw.tell
        elif file.codec == "xz":
            with lzma.open(raw) as stream:
                yield stream, raw.tell
        else:  # unlike Python's zstd and gzip, Arrow's notice a file that was cut off
            yield (pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), file.codec), raw.tell)


def _checked(start: bytes, file: DataFile) -> bytes:
    """The first bytes of a text without a byte order mark.

    Raises:
        BrokenData: they are not UTF-8 but an encoding that can be named.
    """
    if start.startswith(codecs.BOM_UTF8):
        start = start[len(codecs.BOM_UTF8):]
    marked = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    nuls = [half.count(0) for half in (start[::2], start[1::2])]  # of each "\n" is one
    if marked or max(nuls) > 4 * min(nuls) and max(nuls) > UTF16_NULS * len(start):
        raise BrokenData(_convert(file, "UTF-16", "UTF-16"))
    lines = start.split(b"\n")[:-1] or [start]  # the last one may be cut within a character
    foreign = [line for line in lines if not line.isascii()]
    wrong = [line for line in foreign if not _decodes(line, "utf-8")]
    if len(wrong) > len(foreign) / 2 and all(_decodes(line, "gb18030") for line in wrong):
        raise BrokenData(_convert(file, "GBK", "GB18030"))
    return start


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(line)  # it may end within a character
    except UnicodeDecodeError:
        return False
    return True


def _convert(file: DataFile, found: str, iconv_name: str) -> str:
    name = shlex.quote(str(file))
    return (f"{file}: is in {found}, not UTF-8. Convert it: "
            f"iconv -f {iconv_name} -t UTF-8 {name} > {shlex.quote(f'{file}.utf8')}")


# ---- Reading ------------------------------------------------------------------------------------

def _line_blocks(file: DataFile, cut: Callable[[bytes], int] | None = None, **marks
                 ) -> Iterator[Block]:
    """Raw blocks that end where a line ends, or where `cut` says; `marks` go into each."""
    cut = cut or (lambda block: block.rfind(b"\n") + 1)
    number, before, rest = 1, 0, b""
    with _opened(file) as (stream, position):
        while True:
            block = stream.read(BLOCK_BYTES)
            if number == 1 and not rest:
                block = _checked(block, file)
            rest = rest + block if rest else block
            end = cut(rest) if block else len(rest)
            if end:
                content, rest = rest[:end], rest[end:]
                lines = content.count(b"\n") + (not content.endswith(b"\n"))
                yield Block(number, content, position() - before, lines, **marks)
                number, before = number + lines, position()
            if len(rest) > MAX_LINE_BYTES:
                raise BrokenData(f"{file}:{number}: longer than {MAX_LINE_BYTES >> 20} MB. Is this "
                                 "one record on each line? Split it, or remove it.")
            if not block:
                return


def _text_blocks(file: DataFile) -> Iterator[Block]:
    """Blocks of plain text that end between two documents."""
    with _opened(file) as (stream, _):
        by_paragraph = bool(BORDER.search(stream.read(BLOCK_BYTES).strip()))

    def last_border(block: bytes) -> int:
        ends = [match.end() for match in BORDER.finditer(block)]
        return ends[-1] if ends else 0
    yield from _line_blocks(file, last_border if by_paragraph else None, by_paragraph=by_paragraph)


def _array_blocks(file: DataFile) -> Iterator[Block]:
    """The records of a JSON array, each with the number of the line on which it begins."""
    with _opened(file) as (stream, position):
        yield from _record_blocks(_array_records(stream, file), position)


def _array_records(stream, file: DataFile) -> Iterator[tuple[int, object]]:
    parse = json.JSONDecoder().raw_decode
    between = re.compile(r"[\s,]*")
    utf8 = codecs.getincrementaldecoder("utf-8")()
    start = _checked(stream.read(BLOCK_BYTES), file)
    before, _, more = start.partition(b"[")
    line, text, at, ended = 1 + before.count(b"\n"), "", 0, False
    while True:
        space = between.match(text, at)
        line += text.count("\n", at, space.end())
        at, fault = space.end(), "the array does not end: was the file cut off?"
        if text.startswith("]", at):
            return
        if at < len(text):
            try:
                record, end = parse(text, at)
            except (ValueError, RecursionError) as error:  # perhaps only the rest is missing
                fault = f"bad JSON in the array: {getattr(error, 'msg', error)}"
            else:
                yield line, record
                line += text.count("\n", at, end)
                at = end
                continue
        if ended or len(text) - at > MAX_LINE_BYTES:
            raise BrokenData(f"{file}:{line}: {fault} What follows cannot be read; mend it there.")
        try:
            more = more or stream.read(max(BLOCK_BYTES, len(text) - at))
            ended, text, at, more = not more, text[at:] + utf8.decode(more, not more), 0, b""
        except UnicodeDecodeError as error:
            raise BrokenData(f"{file}:{line}: not UTF-8 from here on.") from error


def _csv_blocks(file: DataFile) -> Iterator[Block]:
    """The rows of a CSV file as dictionaries, each with the number of its last line."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the module's own limit is 128 kB
    with _opened(file) as (stream, position):
        _checked(stream.read(BLOCK_BYTES), file)
    with _opened(file) as (stream, position), \
            io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        delimiter = "\t" if ".tsv" in str(file).lower() else ","
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)

        def records() -> Iterator[tuple[int, object]]:
            try:
                for row in rows:
                    yield rows.line_num, row
            except (csv.Error, UnicodeDecodeError) as error:
                raise BrokenData(f"{file}:{rows.line_num + 1}: cannot be read as CSV ({error}); "
                                 "mend or remove the row.") from error
        yield from _record_blocks(records(), position)


def _parquet_blocks(file: DataFile) -> Iterator[Block]:
    """The rows of a Parquet file as dictionaries, numbered from 1."""
    total, told, number = pyarrow.parquet.read_metadata(file.path).num_rows, 0, 1
    with tempfile.TemporaryDirectory() as scratch:  # `datasets` wants a folder for a lock file
        # Not load_dataset("parquet"): that counts its uses by asking a server, offline or not.
        rows = Dataset.from_parquet(glob.escape(str(file.path)), split="train", streaming=True,
                                    cache_dir=scratch)
        for table in rows.with_format("arrow").iter(batch_size=BLOCK_RECORDS):
            records = list(enumerate(table.to_pylist(), number))
            number += len(records)
            position = file.size_bytes * (number - 1) // total
            yield Block(records[0][0], records, position - told, len(records))
            told = position


def _record_blocks(records: Iterator[tuple[int, object]], position: Callable[[], int]
                   ) -> Iterator[Block]:
    before = 0
    while batch := list(itertools.islice(records, BLOCK_RECORDS)):
        yield Block(batch[0][0], batch, position() - before, len(batch))
        before = position()
