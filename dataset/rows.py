"""Records become rows of tokens: tokenised once into memory-mapped files, packed, never padded to
waste.

A row holds T + 1 tokens, so that T inputs each have their next token (`dataset/packing.py` fills
them). `segments` numbers the documents of a row, so that attention and loss stop at their borders.
The cache folder is keyed by what went in, content not dates: data, tokenizer, template, settings.
"""
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset.encoding import BlockEncoder, encode_files, file_and_line, record_number
from dataset.files import BrokenData, DataFile, data_files, read_blocks
from dataset.packing import ARRAYS, BestFitPacker, StreamPacker
from dataset.records import MARKS_CHOICES, PRETRAIN, SFT, FileReport, read_block, reading_of, say

FORMAT_VERSION = 2
HELDOUT_ONE_IN = 200
HELDOUT_MAX_ROWS = 2000
REPEATS_WORTH_NAMING = 0.1  # of the records
MAX_COUNTED = 1 << 22  # hashes in memory to count repeats by; with more records, a part of them
IGNORED = -100  # torch's cross-entropy leaves these targets out


class CacheError(OSError):
    """The row cache is missing, or could not be written; the message says what to do."""


@dataclass(frozen=True)
class RowSet:
    """Rows of tokens in memory-mapped arrays; N rows of T + 1 tokens."""

    tokens: np.ndarray  # [N, T+1] uint16
    segments: np.ndarray  # [N, T+1] uint16: 1, 2, … for the documents of a row, 0 for padding
    loss: np.ndarray  # [N, T+1] uint8: 1 where this token is to be learnt
    records: np.ndarray  # [N] int64: where the row's first document comes from (`PackedRows.where`)
    num_tokens: int  # real tokens, each counted once

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int] | torch.Tensor
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (x_BT, y_BT, segments_BT), all int64, for the rows named by `indices`.

        y is the token after x; -100 where it is not to be learnt, or belongs to another document.
        """
        indices = np.asarray(indices, dtype=np.int64)
        tokens, segments = self.tokens[indices].astype(np.int64), self.segments[indices]
        same_document = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        learnt = same_document & (self.loss[indices][:, 1:] == 1)
        y = np.where(learnt, tokens[:, 1:], IGNORED)
        x = np.ascontiguousarray(tokens[:, :-1])
        return (torch.from_numpy(x), torch.from_numpy(y),
                torch.from_numpy(segments[:, :-1].astype(np.int64)))


@dataclass(frozen=True)
class PackedRows:
    """The rows of some data files: to train on, and held out for measuring."""

    train: RowSet
    heldout: RowSet  # may be empty if the file has few records
    meta: dict  # what the cache was made from, and counts
    path: Path  # the cache folder
    sources: dict[str, str]  # hashes of what the rows were made from: "data" and "tokenizer"

    def where(self, records: Iterable[int]) -> str:
        """Where these records stand, for a message: `lines 3, 7 of a.jsonl`."""
        lines = defaultdict(set)
        for record in records:
            file, line = file_and_line(int(record))
            lines[self.meta["files"][file]].add(line)
        return "; ".join(f"lines {', '.join(map(str, sorted(numbers)))} of {name}"
                         for name, numbers in lines.items())


def prepare_rows(
    data: str | Path | Sequence[str | Path], kind: str, tokenizer_dir: str | Path,
    row_length: int = 512, *, marks: str = "auto", cache_dir: Path = Path("dataset/.cache"),
    strict: bool = False, build: bool = True, processes: int | None = None, quiet: bool = False,
) -> PackedRows:
    """Tokenise and pack data files into rows, or open their cache; say what they hold.

    About one record in 200, chosen by a hash of its content, is held out (at most 2,000 rows; none
    of fewer records than that).
    With several processes, let the first of each machine call first and the others, after a
    barrier, with `build=False`: that only opens, and raises `CacheError` if there is nothing to
    open. Machines that share the disk build the same rows beside each other, and the first to
    finish wins.

    Args:
        data: one or more files, folders or pipes (`dataset/files.py`).
        kind: "pretrain" or "sft".
        row_length: T, the number of positions a row trains.
        marks: "auto" splits pretraining texts at marks of other projects, "keep" reads them as text.
        strict: stop at the first broken record.
        processes: that tokenise; by default one for each core, where there is enough to do.
        quiet: do not say what the files hold.

    Raises:
        BrokenData, FileNotFoundError: the data cannot be used (see `dataset/records.py`).
        CacheError: the disk is full.
    """
    names = [data] if isinstance(data, str | Path) else list(data)
    if not 1 <= row_length < 2**16:
        raise ValueError(f"row_length must lie in 1…65535, not {row_length}")
    if marks not in MARKS_CHOICES:
        raise ValueError(f"--marks {marks}: choose one of {', '.join(MARKS_CHOICES)}")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    if len(tokenizer) > 2**16:
        raise ValueError(f"{tokenizer_dir}: {len(tokenizer):,} tokens do not fit into 16 bits")

    with data_files(names, Path(cache_dir)) as files:
        key, sources = cache_key(files, tokenizer, kind, row_length, marks)
        stem = Path(str(files[0])).name.split(".")[0] + (f"+{len(files) - 1}" if files[1:] else "")
        folder = Path(cache_dir) / f"{stem}-{kind}-{row_length}-{key}"
        rows = _open_if_sound(folder, sources)
        if rows is None:
            if not build:
                raise CacheError(f"No usable row cache for {files[0]} in {cache_dir}: "
                                 "the first process has to build it.")
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            _build(files, kind, tokenizer, row_length, marks, folder, strict, processes)
            rows = _open_rows(folder, sources)
        elif strict and rows.meta["broken"]:  # the cache was made without strict: name the line
            for file in files:
                reading, _ = reading_of(file, kind, marks)
                report = FileReport(file, reading, strict=True)
                for block in read_blocks(file):
                    report.add(block.num_bytes, read_block(block, reading))
        if not quiet:
            say(rows.meta["notes"])
    return rows


class Interleaved:
    """The rows of several arrays as one, mixed evenly, without a copy of them all.

    `offsets`, one for each array, are added to what is read.
    """

    def __init__(self, arrays: Sequence[np.ndarray], offsets: Sequence[int] | None = None):
        self.arrays, self.offsets = arrays, offsets or [0] * len(arrays)
        # Row i of n stands at (i + ½) / n of its array, and there in the whole.
        places = np.concatenate([(np.arange(len(a)) + 0.5) / max(1, len(a)) for a in arrays])
        order = np.argsort(places, kind="stable")
        self.owner = np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])[order]
        self.row = np.concatenate([np.arange(len(a)) for a in arrays])[order]

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, indices: int | np.ndarray) -> np.ndarray:
        owner, row = self.owner[indices], self.row[indices]
        found = np.empty((*np.shape(indices), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        for number, array in enumerate(self.arrays):
            mine = owner == number
            found[mine] = array[row[mine]] + self.offsets[number]
        return found


def join_rows(first: PackedRows, second: PackedRows, share: float | None = None) -> PackedRows:
    """The rows of two data files as one set.

    `share` is the most that `second` may have of the rows to train on; what is over is left out.
    """
    used = len(second.train)
    if share is not None:
        used = min(used, round(len(first.train) * share / (1 - share)))
    sides = {}
    for side in ("train", "heldout"):
        a, b = getattr(first, side), getattr(second, side)
        part = used / max(1, len(b)) if side == "train" else 1.0
        length = used if side == "train" else len(b)
        files_before = record_number(len(first.meta["files"]), 0)
        arrays = {name: Interleaved((getattr(a, name), getattr(b, name)[:length]),
                                    (0, files_before) if name == "records" else None)
                  for name in ARRAYS}
        sides[side] = RowSet(**arrays, num_tokens=a.num_tokens + round(part * b.num_tokens))
    meta = {**first.meta, "data_path": f"{first.meta['data_path']} + {second.meta['data_path']}",
            "files": first.meta["files"] + second.meta["files"]}
    sources = {**first.sources, "data": f"{first.sources['data']}+{second.sources['data']}@{used}"}
    return PackedRows(sides["train"], sides["heldout"], meta,
                      Path(f"{first.path.name}+{second.path.name}@{used}"), sources)


def cache_key(files: list[DataFile], tokenizer: PreTrainedTokenizerFast, kind: str,
              row_length: int, marks: str) -> tuple[str, dict[str, str]]:
    """Hash everything that the rows depend on (the data files by their content).

    Returns the hash of all of it, and those of the data and of the tokenizer alone.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        with file.path.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    data = digest.hexdigest()
    ours = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    settings = [*ours, kind, row_length, marks, [[file.size_bytes, file.format] for file in files],
                FORMAT_VERSION, HELDOUT_ONE_IN, HELDOUT_MAX_ROWS]
    digest.update(json.dumps(settings).encode())
    tokenizer_hash = hashlib.blake2b(json.dumps(ours).encode(), digest_size=16).hexdigest()
    return digest.hexdigest(), {"data": data, "tokenizer": tokenizer_hash}


# ---- Building the cache -------------------------------------------------------------------------

def _build(files: list[DataFile], kind: str, tokenizer: PreTrainedTokenizerFast, row_length: int,
           marks: str, folder: Path, strict: bool, processes: int | None) -> None:
    """Write the rows into a temporary folder beside `folder`, then rename it."""
    before = [file.path.stat() for file in files]
    # On a disk that several machines share, each builds in a folder of its own.
    temporary = folder.with_name(f".building-{os.getpid()}@{socket.gethostname()}@{folder.name}")
    try:
        temporary.mkdir(parents=True)
        _remove_abandoned(folder.parent)
        meta = _write_rows(files, kind, tokenizer, row_length, marks, temporary, strict, processes)
        for file, stat in zip(files, before):
            after = file.path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise CacheError(f"{file} changed while it was being read: run again.")
        _write_file(temporary / "meta.json", json.dumps(meta, indent=1, ensure_ascii=False))
        try:
            os.rename(temporary, folder)
        except OSError as error:  # another process has finished the same rows before us
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                raise
            shutil.rmtree(temporary)
    except BaseException as error:  # Ctrl-C too: nothing half-made stays
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            tqdm.write("Interrupted: the half-made row cache was removed.", file=sys.stderr)
        if isinstance(error, OSError) and not isinstance(error, CacheError):
            raise CacheError(f"Could not write the row cache in {folder.parent}: {error}. "
                             "It needs about 1.3 times the size of the data file; free some space, "
                             "or choose another cache_dir.") from error
        raise
    _remove_outdated(folder, meta)


def _write_rows(files: list[DataFile], kind: str, tokenizer: PreTrainedTokenizerFast,
                row_length: int, marks: str, folder: Path, strict: bool, processes: int | None
                ) -> dict:
    """Tokenise and pack all records into arrays in `folder`; return the cache's meta data."""
    notes: list[str] = []
    readings = []
    for file in files:
        reading, told = reading_of(file, kind, marks)
        readings.append(reading)
        notes += told
    reports = [FileReport(file, reading, strict) for file, reading in zip(files, readings)]
    encoder = BlockEncoder(tokenizer, readings, row_length)
    packer = {PRETRAIN: StreamPacker, SFT: BestFitPacker}[kind]
    counts = {"records": 0, "heldout_records": 0, "heldout_repeats": 0, "shortened": 0,
              "dropped": 0}
    heldout_hashes: set[int] = set()
    first, repeats = None, Repeats()
    total_bytes = sum(file.size_bytes for file in files)
    name = Path(str(files[0])).name + (f" and {len(files) - 1} more" if files[1:] else "")
    with packer(folder, "train", row_length) as train, \
            packer(folder, "heldout", row_length) as heldout, \
            tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None,
                 desc=f"Tokenising {name}") as progress:
        for block in encode_files(files, encoder, processes):
            reports[block.file].add(block.num_bytes, block.found)
            documents, hashes = block.documents, block.hashes
            counts["records"] += len(hashes)
            counts["shortened"] += block.shortened
            counts["dropped"] += block.dropped
            repeats.add(hashes)
            if first is None and len(hashes):
                first = hashes[0]  # is trained on, so that a file of one record has a row
            # Decided by content: a repeated record cannot stand on both sides. Of a few records of
            # one's own each is wanted.
            few = block.num_bytes == total_bytes and len(hashes) < HELDOUT_ONE_IN
            chosen = (hashes % HELDOUT_ONE_IN == 0) & (hashes != first) & (not few)
            kept = ~chosen
            for i in np.flatnonzero(chosen).tolist():
                content_hash = int(hashes[i])
                if heldout.rows_with(int(documents.lengths[i])) <= HELDOUT_MAX_ROWS:
                    heldout_hashes.add(content_hash)
                    counts["heldout_records"] += 1
                    heldout.add(documents.only(np.arange(len(hashes)) == i))
                elif content_hash in heldout_hashes:
                    counts["heldout_repeats"] += 1  # that side is full; it stays off this one
                else:
                    kept[i] = True
            train.add(documents if kept.all() else documents.only(kept))
            progress.update(block.num_bytes)
    for report in reports:
        notes += report.finish()
    if train.num_rows == 0:
        raise BrokenData(
            f"{name}: no row to train on; {counts['records'] + counts['dropped']} records were "
            f"read, {counts['dropped']} of them longer than a row of {row_length} "
            "(--row_length takes longer ones).")
    if counts["shortened"] or counts["dropped"]:
        notes.append(
            f"{name}: of {counts['records'] + counts['dropped']:,} conversations, "
            f"{counts['shortened']:,} were longer than a row of {row_length} and keep their first "
            f"turns; {counts['dropped']:,} were left out because their first answer does not fit. "
            "A larger --row_length keeps them.")
    if repeats.share() > REPEATS_WORTH_NAMING:
        what = "documents" if kind == PRETRAIN else "conversations"
        notes.append(f"{name}: {repeats.share():.0%} of the {what} repeat an earlier one word for "
                     "word; they count as often as they stand there.")
    return {
        "format": FORMAT_VERSION, "files": [str(file) for file in files],
        "data_path": ", ".join(str(file.path.resolve()) for file in files),
        "data_bytes": total_bytes, "kind": kind, "row_length": row_length, **counts,
        "broken": sum(report.num_broken for report in reports), "notes": notes,
        "train": train.summary(), "heldout": heldout.summary(),
    }


class Repeats:
    """Counts how many records are equal to an earlier one, by their hashes, in bounded memory.

    Beyond some millions only the hashes that end in zeros are kept: a fair sample of the contents.
    """

    def __init__(self):
        self.hashes, self.num_hashes, self.mask = [], 0, 0

    def add(self, hashes: np.ndarray) -> None:
        self.hashes.append(hashes[hashes & np.uint64(self.mask) == 0])
        self.num_hashes += len(self.hashes[-1])
        while self.num_hashes > MAX_COUNTED:
            self.mask = self.mask << 1 | 1
            kept = np.concatenate(self.hashes)
            self.hashes = [kept[kept & np.uint64(self.mask) == 0]]
            if len(self.hashes[0]) == self.num_hashes:  # all equal
                break
            self.num_hashes = len(self.hashes[0])

    def share(self) -> float:
        """The share of the records that repeat an earlier one."""
        hashes = np.concatenate([np.empty(0, np.uint64), *self.hashes])
        return 1 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0


# ---- The cache folder ---------------------------------------------------------------------------

def _open_if_sound(folder: Path, sources: dict[str, str]) -> PackedRows | None:
    """Open a cache; if there is none, or it is damaged (then say so), return None."""
    if not folder.is_dir():
        return None
    try:
        return _open_rows(folder, sources)
    except (OSError, ValueError, KeyError) as damage:
        print(f"The row cache {folder} is damaged ({damage}); it has to be built again.",
              file=sys.stderr)
        return None


def _open_rows(folder: Path, sources: dict[str, str]) -> PackedRows:
    """Memory-map a finished cache; raise ValueError, KeyError or OSError if it is damaged."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    sides = {}
    for side in ("train", "heldout"):
        rows, width = meta[side]["rows"], meta["row_length"] + 1
        arrays = {}
        for name, dtype in ARRAYS.items():
            path = folder / f"{side}.{name}.bin"
            shape = (rows,) if name == "records" else (rows, width)
            expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
            if path.stat().st_size != expected:
                raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {expected}")
            arrays[name] = (np.memmap(path, dtype, "r", shape=shape) if rows
                            else np.empty(shape, dtype))  # an empty file cannot be mapped
        sides[side] = RowSet(**arrays, num_tokens=meta[side]["tokens"])
    return PackedRows(sides["train"], sides["heldout"], meta, folder, sources)


def _write_file(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove what killed builds left, but not another machine's: it may still be at work."""
    for folder in cache_dir.glob(f".building-*@{glob.escape(socket.gethostname())}@*"):
        pid = folder.name.removeprefix(".building-").split("@")[0]
        if not (pid.isdigit() and psutil.pid_exists(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)


def _remove_outdated(folder: Path, meta: dict) -> None:
    """Remove caches that an earlier state of the same file or tokenizer left."""
    for other in folder.parent.glob(f"{glob.escape(folder.name.rsplit('-', 1)[0])}-*"):
        if other == folder:
            continue
        try:
            other_meta = json.loads((other / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if other_meta.get("data_path") == meta["data_path"]:
            shutil.rmtree(other, ignore_errors=True)
