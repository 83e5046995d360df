"""Rows of T + 1 tokens, filled with documents and written as they are finished.

Two ways to fill them:

- `StreamPacker` (pretraining): documents are laid end to end and the stream is cut every T tokens;
  a row begins with the token its predecessor ended with, so each token is a target exactly once.
- `BestFitPacker` (fine-tuning): a conversation is never split. Best-fit packing (as in "Fewer
  Truncations Improve Language Modeling", arXiv:2404.10830) puts each into the fullest open row with
  room for it.
"""
import os
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np

from dataset.encoding import Documents

OPEN_ROWS = 1024  # fine-tuning rows that wait for a conversation that fits
WRITTEN_ROWS = 256  # of them at a time
FLUSH_TOKENS = 1 << 20
ARRAYS = {"tokens": np.uint16, "segments": np.uint16, "loss": np.uint8, "records": np.int64}


class RowWriter:
    """Appends rows to the array files of one side (train or held out); a context manager."""

    def __init__(self, folder: Path, side: str, row_length: int):
        self.row_length = row_length
        self.files = {name: (folder / f"{side}.{name}.bin").open("wb") for name in ARRAYS}
        self.num_rows = self.num_tokens = 0

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
        return {"rows": self.num_rows, "tokens": self.num_tokens}


class StreamPacker(RowWriter):
    """Pretraining rows: row i is stream[i·T : i·T + T + 1]."""

    def __init__(self, folder: Path, side: str, row_length: int):
        super().__init__(folder, side, row_length)
        self.waiting: list[Documents] = []
        self.num_waiting = self.num_documents = 0
        # The rest of the stream after the last whole row: tokens, loss, document number, record.
        self.rest = [np.empty(0, dtype) for dtype in (np.uint16, np.uint8, np.int64, np.int64)]

    def rows_with(self, length: int) -> int:
        """How many rows there would be with one more document of this length."""
        return -(-(self.num_tokens + length - 1) // self.row_length)

    def add(self, documents: Documents) -> None:
        self.waiting.append(documents)
        self.num_tokens += len(documents.ids)
        self.num_waiting += len(documents.ids)
        if self.num_waiting >= FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write all whole rows of the stream so far."""
        T = self.row_length
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in self.waiting)])
        numbers = np.arange(self.num_documents, self.num_documents + len(lengths))
        records = [np.repeat(part.records, part.lengths) for part in self.waiting]
        columns = (
            [part.ids for part in self.waiting], [part.loss for part in self.waiting],
            [np.repeat(numbers, lengths)], records)
        self.rest = [np.concatenate([rest, *new]) for rest, new in zip(self.rest, columns)]
        self.num_documents += len(lengths)
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
        tokens, loss, numbers, records = (
            np.lib.stride_tricks.sliding_window_view(column, T + 1)[:(n - 1) * T + 1:T]
            for column in self.rest)
        segments = numbers - numbers[:, :1] + 1
        if real_tokens is not None:
            segments[:, real_tokens:] = 0
        self.write(tokens=tokens, segments=segments, loss=loss, records=records[:, 0])


class BestFitPacker(RowWriter):
    """Fine-tuning rows: each document whole, in the fullest open row that has room for it."""

    def __init__(self, folder: Path, side: str, row_length: int):
        super().__init__(folder, side, row_length)
        # Sorted by (room, row number); the row's documents are (ids, loss, record).
        self.open_rows: list[tuple[int, int, list[tuple]]] = []
        self.num_opened = 0
        self.closed: list[list[tuple]] = []

    def rows_with(self, length: int) -> int:
        """How many rows there may be with one more document."""
        return self.num_opened + 1

    def add(self, documents: Documents) -> None:
        self.num_tokens += len(documents.ids)
        for document in documents:
            length = len(document[0])
            place = bisect_left(self.open_rows, (length, -1))
            if place < len(self.open_rows):
                room, number, row = self.open_rows.pop(place)
            else:
                room, number, row = self.row_length + 1, self.num_opened, []
                self.num_opened += 1
            row.append(document)
            insort(self.open_rows, (room - length, number, row))
            if self.open_rows[0][0] == 0 or len(self.open_rows) > OPEN_ROWS:
                self.closed.append(self.open_rows.pop(0)[2])  # the fullest
        if len(self.closed) >= WRITTEN_ROWS:
            self._write_closed()

    def finish(self) -> None:
        self.closed += [row for _, _, row in sorted(self.open_rows, key=lambda row: row[1])]
        self._write_closed()
        super().finish()

    def _write_closed(self) -> None:
        if not self.closed:
            return
        shape = (len(self.closed), self.row_length + 1)
        rows = {name: np.zeros(shape, ARRAYS[name]) for name in ("tokens", "segments", "loss")}
        for i, row in enumerate(self.closed):
            start = 0
            for number, (ids, loss, _) in enumerate(row, 1):
                end = start + len(ids)
                rows["tokens"][i, start:end] = ids
                rows["loss"][i, start:end] = loss
                rows["segments"][i, start:end] = number
                start = end
        self.write(**rows, records=np.array([row[0][2] for row in self.closed]))
        self.closed = []
