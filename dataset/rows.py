"""Records become rows of tokens: tokenised once into memory-mapped files, packed, never padded to
waste.

A row holds T + 1 tokens, so that T inputs each have their next token. Two ways to fill it:

- pretrain: documents `<s>text</s>` are laid end to end and the stream is cut every T tokens (a row
  begins with the token its predecessor ended with, so each token is a target exactly once);
- sft: a conversation is never split. Best-fit packing (as in "Fewer Truncations Improve Language
  Modeling", arXiv:2404.10830) puts each into the fullest open row with room for it.

`segments` numbers the documents of a row, so that attention and loss stop at their borders.
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
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset.records import BrokenData, read_numbered
from model.conversation import ConversationEncoder, is_learnt

FORMAT_VERSION = 1
HELDOUT_ONE_IN = 200
HELDOUT_MAX_ROWS = 2000
OPEN_ROWS = 1024  # SFT rows that wait for a conversation that fits
IGNORED = -100  # torch's cross-entropy leaves these targets out

BATCH_RECORDS = 1000
BATCH_CHARACTERS = 1 << 20
FLUSH_TOKENS = 1 << 20
ARRAYS = {"tokens": np.uint16, "segments": np.uint16, "loss": np.uint8, "records": np.int64}


class CacheError(OSError):
    """The row cache is missing, or could not be written; the message says what to do."""


@dataclass(frozen=True)
class RowSet:
    """Rows of tokens in memory-mapped arrays; N rows of T + 1 tokens."""

    tokens: np.ndarray  # [N, T+1] uint16
    segments: np.ndarray  # [N, T+1] uint16: 1, 2, … for the documents of a row, 0 for padding
    loss: np.ndarray  # [N, T+1] uint8: 1 where this token is to be learnt
    records: np.ndarray  # [N] int64: line in the data file where the row's first document stands
    num_tokens: int  # real tokens, each counted once
    target_bytes: int  # UTF-8 bytes of the text to be learnt (`</s>` counts 0)

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
    """The rows of one data file: to train on, and held out for measuring."""

    train: RowSet
    heldout: RowSet  # may be empty if the file has few records
    meta: dict  # what the cache was made from, and counts
    path: Path  # the cache folder
    sources: dict[str, str]  # hashes of what the rows were made from: "data" and "tokenizer"


def prepare_rows(data_path: str | Path, kind: str, tokenizer_dir: str | Path,
                 row_length: int = 512, *, cache_dir: Path = Path("dataset/.cache"),
                 strict: bool = False, build: bool = True) -> PackedRows:
    """Tokenise and pack a JSONL file (`kind` "pretrain" or "sft") into rows, or open its cache.

    `row_length` is T, the number of positions a row trains. About one record in 200, chosen by a
    hash of its content, is held out (at most 2,000 rows). With several processes, let the first of
    each machine call first and the others, after a barrier, with `build=False`: that only opens,
    and raises `CacheError` if there is nothing to open. Machines that share the disk build the
    same rows beside each other, and the first to finish wins.

    Raises `BrokenData` (see `read_records`), `FileNotFoundError`, `CacheError` (disk full).
    """
    data_path, cache_dir = Path(data_path), Path(cache_dir)
    if not 1 <= row_length < 2**16:
        raise ValueError(f"row_length must lie in 1…65535, not {row_length}")
    if not data_path.is_file():
        raise FileNotFoundError(f"No such data file: {data_path}")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    if len(tokenizer) > 2**16:
        raise ValueError(f"{tokenizer_dir}: {len(tokenizer):,} tokens do not fit into 16 bits")

    key, sources = cache_key(data_path, tokenizer, kind, row_length)
    folder = cache_dir / f"{data_path.stem}-{kind}-{row_length}-{key}"
    rows = _open_if_sound(folder, sources)
    if rows is None:
        if not build:
            raise CacheError(f"No usable row cache for {data_path} in {cache_dir}: "
                             "the first process has to build it.")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        _build(data_path, kind, tokenizer, row_length, folder, strict)
        rows = _open_rows(folder, sources)
    elif strict and rows.meta["broken"]:  # the cache was made without strict: name the line
        for _ in read_numbered(data_path, kind, strict=True):
            pass
    return rows


class Interleaved:
    """The rows of several arrays as one, mixed evenly, without a copy of them all."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
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
            found[mine] = array[row[mine]]
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
        arrays = {name: Interleaved((getattr(a, name), getattr(b, name)[:length]))
                  for name in ARRAYS}
        sides[side] = RowSet(**arrays, num_tokens=a.num_tokens + round(part * b.num_tokens),
                             target_bytes=a.target_bytes + round(part * b.target_bytes))
    meta = {**first.meta, "data_path": f"{first.meta['data_path']} + {second.meta['data_path']}"}
    sources = {**first.sources, "data": f"{first.sources['data']}+{second.sources['data']}@{used}"}
    return PackedRows(sides["train"], sides["heldout"], meta,
                      Path(f"{first.path.name}+{second.path.name}@{used}"), sources)


def cache_key(data_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str,
              row_length: int) -> tuple[str, dict[str, str]]:
    """Hash everything that the rows depend on (the data file by its content).

    Returns the hash of all of it, and those of the data and of the tokenizer alone.
    """
    digest = hashlib.blake2b(digest_size=8)
    with data_path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    data = digest.hexdigest()
    ours = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    settings = [*ours, kind, row_length, FORMAT_VERSION, HELDOUT_ONE_IN, HELDOUT_MAX_ROWS]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest(), {"data": data, "tokenizer": _hash(json.dumps(ours).encode()).hex()}


# ---- Building the cache -------------------------------------------------------------------------

def _build(data_path: Path, kind: str, tokenizer: PreTrainedTokenizerFast, row_length: int,
           folder: Path, strict: bool) -> None:
    """Write the rows into a temporary folder beside `folder`, then rename it."""
    before = data_path.stat()
    # On a disk that several machines share, each builds in a folder of its own.
    temporary = folder.with_name(f".building-{os.getpid()}@{socket.gethostname()}@{folder.name}")
    try:
        temporary.mkdir(parents=True)
        _remove_abandoned(folder.parent)
        meta = _write_rows(data_path, kind, tokenizer, row_length, temporary, strict)
        after = data_path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CacheError(f"{data_path} changed while it was being read: run again.")
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


def _write_rows(data_path: Path, kind: str, tokenizer: PreTrainedTokenizerFast, row_length: int,
                folder: Path, strict: bool) -> dict:
    """Tokenise and pack all records into arrays in `folder`; return the cache's meta data."""
    packer = {"pretrain": StreamPacker, "sft": BestFitPacker}[kind]
    counts = {"records": 0, "broken": 0, "heldout_records": 0, "heldout_repeats": 0,
              "shortened": 0, "dropped": 0}

    def count_broken(fault: str) -> None:
        counts["broken"] += 1

    heldout_hashes: set[bytes] = set()
    with packer(folder, "train", row_length) as train, \
            packer(folder, "heldout", row_length) as heldout, \
            tqdm(total=data_path.stat().st_size, unit="B", unit_scale=True, disable=None,
                 desc=f"Tokenising {data_path.name}") as progress:
        numbered = read_numbered(data_path, kind, strict=strict, on_bytes=progress.update,
                                 on_broken=count_broken)
        documents = {"pretrain": _documents, "sft": _conversations}[kind]
        for document in documents(numbered, ConversationEncoder(tokenizer), row_length, counts):
            counts["records"] += 1
            # Decided by content: a repeated record cannot stand on both sides.
            choice = int.from_bytes(document.content_hash[:8], "big") % HELDOUT_ONE_IN
            if choice == 0 and heldout.rows_with(len(document.ids)) <= HELDOUT_MAX_ROWS:
                heldout_hashes.add(document.content_hash)
                counts["heldout_records"] += 1
                heldout.add(document)
            elif document.content_hash in heldout_hashes:
                counts["heldout_repeats"] += 1  # the held-out side is full; it stays off the other
            else:
                train.add(document)
    if train.num_rows == 0:
        raise BrokenData(f"{data_path}: no row to train on; {counts['records']} records were read, "
                         f"{counts['dropped']} of them longer than a row of {row_length}.")
    if counts["shortened"] or counts["dropped"]:
        print(f"{data_path}: of {counts['records'] + counts['dropped']:,} conversations, "
              f"{counts['shortened']:,} were longer than a row of {row_length} and keep their "
              f"first turns; {counts['dropped']:,} were left out because their first answer does "
              "not fit.",
              file=sys.stderr)
    return {
        "format": FORMAT_VERSION, "data_path": str(data_path.resolve()),
        "data_bytes": data_path.stat().st_size, "kind": kind, "row_length": row_length, **counts,
        "train": train.summary(), "heldout": heldout.summary(),
    }


@dataclass(frozen=True)
class Document:
    """One tokenised record."""

    line: int  # 1-based, in the data file
    ids: np.ndarray  # uint16
    loss: np.ndarray  # uint8
    target_bytes: int
    content_hash: bytes


def _documents(numbered: Iterable[tuple[int, dict]], encoder: ConversationEncoder, row_length: int,
               counts: dict) -> Iterator[Document]:
    """Tokenise pretraining records: `<s>` + text + `</s>`."""
    bos, eos = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    for batch in _batches(numbered, lambda record: len(record["text"])):
        texts = [record["text"] for _, record in batch]
        for (line, _), text, text_ids in zip(batch, texts, encoder.texts(texts)):
            ids = np.array([bos, *text_ids, eos], dtype=np.uint16)
            loss = np.ones(len(ids), dtype=np.uint8)
            loss[0] = 0
            raw = text.encode()
            yield Document(line, ids, loss, len(raw), _hash(raw))


def _conversations(numbered: Iterable[tuple[int, dict]], encoder: ConversationEncoder,
                   row_length: int, counts: dict) -> Iterator[Document]:
    """Render and tokenise SFT records; one too long for a row keeps its first whole turns.

    Each batch comes out longest first: long ones open rows, short ones then fill the gaps.
    """
    capacity = row_length + 1
    for batch in _batches(
            numbered, lambda record: sum(len(m["content"]) for m in record["conversations"])):
        conversations = [{"messages": record["conversations"]} for _, record in batch]
        documents = []
        for (line, record), (ids, loss) in zip(batch, encoder.conversations(conversations)):
            messages = record["conversations"]
            content = json.dumps([[m["role"], m["content"]] for m in messages])
            if len(ids) > capacity:
                ends = [i for i, m in enumerate(messages, 1) if m["role"] == "assistant"]
                fitting = bisect_right(
                    ends, capacity, key=lambda end: len(
                        encoder.conversations([{"messages": messages[:end]}])[0][0]))
                if fitting == 0:
                    counts["dropped"] += 1
                    continue
                counts["shortened"] += 1
                messages = messages[:ends[fitting - 1]]
                ids, loss = encoder.conversations([{"messages": messages}])[0]
            target_bytes = sum(len(m["content"].encode()) for m in messages if is_learnt(m))
            documents.append(Document(line, np.array(ids, np.uint16), np.array(loss, np.uint8),
                                      target_bytes, _hash(content.encode())))
        yield from sorted(documents, key=lambda document: -len(document.ids))


def _batches(numbered: Iterable[tuple[int, dict]], size: Callable[[dict], int]
             ) -> Iterator[list[tuple[int, dict]]]:
    """Group records for the tokenizer, bounded in number and in characters."""
    batch, characters = [], 0
    for line, record in numbered:
        batch.append((line, record))
        characters += size(record)
        if len(batch) >= BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


class RowWriter:
    """Appends rows to the array files of one side (train or held out); a context manager."""

    def __init__(self, folder: Path, side: str, row_length: int):
        self.row_length = row_length
        self.files = {name: (folder / f"{side}.{name}.bin").open("wb") for name in ARRAYS}
        self.num_rows = self.num_tokens = self.target_bytes = 0

    def __enter__(self):
        return self

    def __exit__(self, error_type, *_) -> None:
        try:
            if error_type is None:
                self.finish()
        finally:
            for file in self.files.values():
                file.close()

    def write(self, **arrays: np.ndarray) -> None:
        """Append n rows: tokens, segments, loss [n, T+1] and records [n]."""
        for name, dtype in ARRAYS.items():
            self.files[name].write(np.ascontiguousarray(arrays[name], dtype=dtype))
        self.num_rows += len(arrays["records"])

    def finish(self) -> None:
        """Write what is still open, and make the files durable."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def summary(self) -> dict:
        return {"rows": self.num_rows, "tokens": self.num_tokens,
                "target_bytes": self.target_bytes}


class StreamPacker(RowWriter):
    """Pretraining rows: row i is stream[i·T : i·T + T + 1]."""

    def __init__(self, folder: Path, side: str, row_length: int):
        super().__init__(folder, side, row_length)
        self.waiting: list[tuple[Document, int]] = []  # each with its number in the stream
        self.num_waiting = self.num_documents = 0
        # The rest of the stream after the last whole row: tokens, loss, document number, line.
        self.rest = [np.empty(0, dtype) for dtype in (np.uint16, np.uint8, np.int64, np.int64)]

    def rows_with(self, length: int) -> int:
        """How many rows there would be with one more document of this length."""
        return -(-(self.num_tokens + length - 1) // self.row_length)

    def add(self, document: Document) -> None:
        self.waiting.append((document, self.num_documents))
        self.num_documents += 1
        self.num_tokens += len(document.ids)
        self.target_bytes += document.target_bytes
        self.num_waiting += len(document.ids)
        if self.num_waiting >= FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write all whole rows of the stream so far."""
        T = self.row_length
        if not self.waiting:
            return
        lengths = [len(document.ids) for document, _ in self.waiting]
        columns = (
            np.concatenate([document.ids for document, _ in self.waiting]),
            np.concatenate([document.loss for document, _ in self.waiting]),
            np.repeat([number for _, number in self.waiting], lengths),
            np.repeat([document.line for document, _ in self.waiting], lengths))
        self.rest = [np.concatenate(pair) for pair in zip(self.rest, columns)]
        self.waiting, self.num_waiting = [], 0
        n = (len(self.rest[0]) - 1) // T  # each row needs one token more than it keeps
        if n > 0:
            self._write_stream(n)
            self.rest = [column[n * T:].copy() for column in self.rest]

    def finish(self) -> None:
        self.flush()
        left = len(self.rest[0])
        if left > 1:  # a single token is the last row's last target, written already
            self.rest = [np.pad(column, (0, self.row_length + 1 - left)) for column in self.rest]
            self._write_stream(1, real_tokens=left)
        super().finish()

    def _write_stream(self, n: int, real_tokens: int | None = None) -> None:
        T = self.row_length
        tokens, loss, numbers, lines = (
            np.lib.stride_tricks.sliding_window_view(column, T + 1)[:(n - 1) * T + 1:T]
            for column in self.rest)
        segments = numbers - numbers[:, :1] + 1
        if real_tokens is not None:
            segments[:, real_tokens:] = 0
        self.write(tokens=tokens, segments=segments, loss=loss, records=lines[:, 0])


class BestFitPacker(RowWriter):
    """SFT rows: each document whole, in the fullest open row that has room for it."""

    def __init__(self, folder: Path, side: str, row_length: int):
        super().__init__(folder, side, row_length)
        self.open_rows: list[tuple[int, int, list[Document]]] = []  # sorted by (room, row number)
        self.num_opened = 0

    def rows_with(self, length: int) -> int:
        """How many rows there may be with one more document."""
        return self.num_opened + 1

    def add(self, document: Document) -> None:
        self.num_tokens += len(document.ids)
        self.target_bytes += document.target_bytes
        place = bisect_left(self.open_rows, (len(document.ids), -1))
        if place < len(self.open_rows):
            room, number, documents = self.open_rows.pop(place)
        else:
            room, number, documents = self.row_length + 1, self.num_opened, []
            self.num_opened += 1
        documents.append(document)
        insort(self.open_rows, (room - len(document.ids), number, documents))
        if self.open_rows[0][0] == 0 or len(self.open_rows) > OPEN_ROWS:
            self._close(self.open_rows.pop(0)[2])  # the fullest

    def finish(self) -> None:
        for _, _, documents in sorted(self.open_rows, key=lambda row: row[1]):
            self._close(documents)
        super().finish()

    def _close(self, documents: list[Document]) -> None:
        lengths = [len(document.ids) for document in documents]
        padding = (0, self.row_length + 1 - sum(lengths))
        rows = {
            "tokens": np.concatenate([document.ids for document in documents]),
            "segments": np.repeat(np.arange(1, len(documents) + 1), lengths),
            "loss": np.concatenate([document.loss for document in documents])}
        self.write(**{name: np.pad(row, padding)[None] for name, row in rows.items()},
                   records=np.array([documents[0].line]))


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
        sides[side] = RowSet(**arrays, num_tokens=meta[side]["tokens"],
                             target_bytes=meta[side]["target_bytes"])
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
