"""Training records, streamed from JSON Lines and checked one by one, in bounded memory.

Hugging Face `datasets` reads the file as a stream of lines (no Arrow copy lands on the disk, no
hub is asked). Parsing is ours, because the JSON loaders there stop at the first broken line, and
a learner needs the whole list: which file, which line, what is wrong with it.

    pretrain   {"text": "..."}
    sft        {"conversations": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}

Other keys are allowed and ignored, but for `"learn": false` in an assistant's message, which is
then read and not learnt (`dataset/rows.py`).
"""
import codecs
import glob
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.compute
from datasets import Dataset, Features, Value
from tqdm import tqdm

LISTED_FAULTS = 20  # how many broken lines a report names
EARLY_STOP_LINES = 10_000  # before this many lines, wait for the end of the file to judge it
READ_CHARACTERS = 1 << 20
LINES_PER_READ = 1000
MAX_LINE_BYTES = 64 << 20


class BrokenData(ValueError):
    """Too many records are broken; the message is a report that can be shown as it is."""


def read_records(path: str | Path, kind: str, *, strict: bool = False,
                 max_broken: float = 0.01) -> Iterator[dict]:
    """Stream the valid records of a JSONL file, `kind` being "pretrain" or "sft".

    Broken lines are left out, counted, and listed on stderr at the end of the file. Raises
    `BrokenData` if more than the fraction `max_broken` of the lines is broken (as soon as this is
    clear), at the first one with `strict`, or if the file holds no record at all.
    """
    for _, record in read_numbered(path, kind, strict=strict, max_broken=max_broken):
        yield record


def read_numbered(path: str | Path, kind: str, *, strict: bool = False, max_broken: float = 0.01,
                  on_bytes: Callable[[int], object] | None = None,
                  on_broken: Callable[[str], object] | None = None) -> Iterator[tuple[int, dict]]:
    """As `read_records`, with the 1-based line number of each record.

    `on_bytes` is called with the number of bytes read since its last call (for a progress bar),
    `on_broken` with "file:line: reason" for each broken line.
    """
    path = Path(path)
    check = {"pretrain": text_fault, "sft": conversation_fault}[kind]
    size = _check_file(path)
    faults: list[str] = []
    line_number = broken = position = 0

    for lines, num_bytes in _read_lines(path):
        position += num_bytes
        for line in lines:
            line_number += 1
            record, fault = parse_line(line, check)
            if fault is None:
                yield line_number, record
                continue
            broken += 1
            fault = f"{path}:{line_number}: {fault}"
            if strict:
                raise BrokenData(f"{fault}\nStopped at the first broken line (strict).")
            if len(faults) < LISTED_FAULTS:
                faults.append(fault)
            if on_broken is not None:
                on_broken(fault)
        if on_bytes is not None:
            on_bytes(num_bytes)
        # Too many already, even if every line still to come were good.
        expected_lines = max(line_number, line_number * size / max(1, position))
        if line_number >= EARLY_STOP_LINES and broken > max_broken * expected_lines:
            raise BrokenData(_report(faults, broken, line_number, max_broken, "so far"))

    if broken > max_broken * line_number:
        raise BrokenData(_report(faults, broken, line_number, max_broken))
    if broken == line_number:
        raise BrokenData(f"{path}: no records in this file.")
    if broken:
        tqdm.write(_report(faults, broken, line_number), file=sys.stderr)


def parse_line(line: str, check: Callable[[object], str | None]) -> tuple[object, str | None]:
    """Parse one line; return (record, None), or (None, why it is broken)."""
    if "\0" in line:
        return None, "not UTF-8 (or a NUL byte)"
    if not line.strip():
        return None, "blank line"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return None, f"bad JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets
        return None, f"bad JSON: {error}"
    fault = check(record)
    return (record, None) if fault is None else (None, fault)


def text_fault(record: object) -> str | None:
    """Say what is wrong with a pretraining record, or None."""
    if not isinstance(record, dict):
        return f"wrong type: expected an object, found {_json_type(record)}"
    if "text" not in record:
        return 'missing field "text"'
    return _string_fault('"text"', record["text"])


def conversation_fault(record: object) -> str | None:
    """Say what is wrong with an SFT record, or None.

    A conversation is an optional system message (which may be empty), then user and assistant in
    turn, and the assistant has the last word.
    """
    if not isinstance(record, dict):
        return f"wrong type: expected an object, found {_json_type(record)}"
    if "conversations" not in record:
        return 'missing field "conversations"'
    messages = record["conversations"]
    if not isinstance(messages, list):
        return f'wrong type: "conversations" must be a list, found {_json_type(messages)}'
    if not messages:
        return "empty conversation"

    expected = "user"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"wrong type: message {number} must be an object, found {_json_type(message)}"
        for field in ("role", "content"):
            if field not in message:
                return f'message {number}: missing field "{field}"'
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            return f"message {number}: unknown role {json.dumps(role)[:40]}"
        if not (role == "system" and number == 1):
            if role != expected:
                return f"message {number}: roles out of order: {role} where {expected} is expected"
            expected = "assistant" if role == "user" else "user"
        fault = _string_fault('"content"', content, may_be_empty=role == "system")
        if fault is not None:
            return f"message {number}: {fault}"

    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return "no assistant turn"
    if roles[-1] != "assistant":
        return "the last message is not the assistant's"
    return None


def _read_lines(path: Path) -> Iterator[tuple[list[str], int]]:
    """Yield (lines, bytes they took in the file), a thousand at a time.

    A byte that is not UTF-8 becomes NUL, the one character that no JSON may contain in any place:
    the line cannot slip through as valid. A lone carriage return counts as a line break, as in
    most editors; other Unicode line separators do not.
    """
    codecs.register_error("nul", lambda error: ("\0", error.end))
    with tempfile.TemporaryDirectory() as scratch:  # `datasets` wants a folder for a lock file
        # Not load_dataset("text"): that counts its uses by asking a server, offline or not.
        stream = Dataset.from_text(
            glob.escape(str(path)), split="train", streaming=True, cache_dir=scratch,
            features=Features({"line": Value("string")}),
            encoding="utf-8-sig", encoding_errors="nul", chunksize=READ_CHARACTERS)
        for table in stream.with_format("arrow").iter(batch_size=LINES_PER_READ):
            column = table["line"]
            num_bytes = pyarrow.compute.sum(pyarrow.compute.binary_length(column)).as_py()
            yield column.to_pylist(), num_bytes + len(column)


def _check_file(path: Path) -> int:
    """Return the size in bytes; raise if there is nothing to read line by line."""
    if not path.is_file():
        raise FileNotFoundError(f"No such data file: {path}")
    with path.open("rb") as file:
        first_line = file.readline(MAX_LINE_BYTES + 1)
    if not first_line:
        raise BrokenData(f"{path}: the file is empty.")
    if len(first_line) > MAX_LINE_BYTES:
        raise BrokenData(f"{path}:1: longer than {MAX_LINE_BYTES >> 20} MB. Is this JSON Lines, "
                         "one record on each line?")
    return path.stat().st_size


def _string_fault(name: str, value: object, may_be_empty: bool = False) -> str | None:
    if not isinstance(value, str):
        return f"wrong type: {name} must be a string, found {_json_type(value)}"
    if not may_be_empty and not value.strip():
        return f"empty {name}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"{name} holds half of a surrogate pair (\\u{ord(value[error.start]):04x})"
    return None


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
             int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]


def _report(faults: list[str], broken: int, total: int, max_broken: float | None = None,
            so_far: str = "") -> str:
    """Write the list of broken lines; with `max_broken`, as the reason for stopping."""
    lines = list(faults)
    if broken > len(faults):
        lines.append(f"... and {broken - len(faults):,} more")
    summary = f"{broken:,} of {total:,} lines {so_far} are broken".replace("  ", " ")
    if max_broken is None:
        lines.append(f"{summary}: left out.")
    else:
        lines.append(f"{summary}, more than {max_broken:.0%}: fix or remove them, then run again.")
    return "\n".join(lines)
