"""Blocks of data files become token ids, on all cores.

Reading a file, splitting it into blocks and packing rows is quick; parsing and tokenising is not,
and Python runs one thread at a time. So blocks go to as many processes as there are cores, and
come back in their order: the rows are the same for any number of processes.
"""
import gc
import hashlib
import json
import os
import signal
import sys
import threading
import time
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from transformers import PreTrainedTokenizerFast

from dataset.files import Block, DataFile, read_blocks
from dataset.records import PRETRAIN, Reading, Records, read_block
from model.conversation import LONGEST_TOKEN, ConversationEncoder

LEAST_PARALLEL_BYTES = 8 << 20  # less is tokenised before other processes have started
BLOCKS_AHEAD = 2  # for each process
BYTES_AHEAD = 64 << 20  # in all, should the blocks be large
RECORD_BITS = 40  # a record's number: that of its file above these bits, its line in them


@dataclass
class Documents:
    """Some tokenised documents, laid end to end."""

    ids: np.ndarray  # [tokens] uint16
    loss: np.ndarray  # [tokens] uint8: 1 where the token is to be learnt
    lengths: np.ndarray  # [documents] int64
    records: np.ndarray  # [documents] int64: where each comes from (`record_number`)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """(ids, loss, record) of each document."""
        ends = np.cumsum(self.lengths).tolist()
        for start, end, record in zip([0, *ends], ends, self.records.tolist()):
            yield self.ids[start:end], self.loss[start:end], record

    def only(self, wanted: np.ndarray) -> "Documents":
        """Those documents for which `wanted` (bool [documents]) is true."""
        tokens = np.repeat(wanted, self.lengths)
        return Documents(self.ids[tokens], self.loss[tokens], self.lengths[wanted],
                         self.records[wanted])


@dataclass
class Encoded:
    """What became of a block."""

    file: int  # the number of its file
    num_bytes: int
    documents: Documents
    hashes: np.ndarray  # [documents] uint64: of the content
    found: Records  # without the records themselves
    shortened: int = 0  # conversations longer than a row that keep their first turns
    dropped: int = 0  # those whose first answer does not fit


def record_number(file: int, line: int) -> int:
    return file << RECORD_BITS | line


def file_and_line(record: int) -> tuple[int, int]:
    """The number of the file and the line in it, from `record_number`."""
    return record >> RECORD_BITS, record & ((1 << RECORD_BITS) - 1)


class BlockEncoder:
    """Turns blocks of one kind of data into documents.

    Args:
        tokenizer: with a chat template.
        readings: of each file.
        row_length: conversations may have one token more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, readings: list[Reading],
                 row_length: int):
        self.encoder = ConversationEncoder(tokenizer)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.readings, self.capacity = readings, row_length + 1

    def encode(self, file: int, block: Block) -> Encoded:
        reading = self.readings[file]
        make = self._texts if reading.kind == PRETRAIN else self._conversations
        with garbage_collection_off():
            found = read_block(block, reading)
            encoded = make(file, block, found)
            found.records = []  # they need not travel
        return encoded

    def _texts(self, file: int, block: Block, found: Records) -> Encoded:
        """Pretraining documents: `<s>` + text + `</s>`."""
        ids, lengths, hashes = array("H"), [], []
        texts = [text for _, text in found.records]
        for text, text_ids in zip(texts, self.encoder.texts(texts)):
            before = len(ids)
            ids.append(self.bos)
            ids.extend(iter(text_ids))
            ids.append(self.eos)
            lengths.append(len(ids) - before)
            hashes.append(_hash(text.encode()))
        lengths = np.array(lengths, np.int64)
        loss = np.ones(len(ids), np.uint8)
        loss[np.cumsum(lengths) - lengths] = 0  # `<s>` is given, not learnt
        records = np.array([record_number(file, line) for line, _ in found.records], np.int64)
        documents = Documents(np.frombuffer(ids, np.uint16), loss, lengths, records)
        return Encoded(file, block.num_bytes, documents, np.array(hashes, np.uint64), found)

    def _conversations(self, file: int, block: Block, found: Records) -> Encoded:
        """Conversations by the chat template; one too long for a row keeps its first turns.

        They come longest first: long ones open rows, short ones then fill the gaps.
        """
        encoded = Encoded(file, block.num_bytes, None, None, found)
        records = [(line, self._that_may_fit(conversation)) for line, conversation in found.records]
        made = []
        for (line, conversation), (ids, loss) in zip(
                records, self.encoder.conversations(conversation for _, conversation in records)):
            content = _content(conversation)
            if len(ids) > self.capacity or conversation.get("cut"):
                encoded.shortened += 1
                ids, loss = self._first_turns(conversation)
                if not ids:
                    encoded.shortened -= 1
                    encoded.dropped += 1
                    continue
            made.append((ids, loss, record_number(file, line), _hash(content)))
        made.sort(key=lambda document: -len(document[0]))
        lengths = np.array([len(ids) for ids, *_ in made], np.int64)
        ids, loss = array("H"), array("B")
        for document_ids, document_loss, *_ in made:
            ids.extend(document_ids)
            loss.extend(document_loss)
        encoded.documents = Documents(
            np.frombuffer(ids, np.uint16), np.frombuffer(loss, np.uint8), lengths,
            np.array([record for *_, record, _ in made], np.int64))
        encoded.hashes = np.array([content_hash for *_, content_hash in made], np.uint64)
        return encoded

    def _that_may_fit(self, conversation: dict) -> dict:
        """The conversation without the turns that cannot fit into a row however they are encoded,
        so that one of a hundred megabytes is not encoded for nothing."""
        room = self.capacity * LONGEST_TOKEN
        for number, message in enumerate(conversation["messages"]):
            room -= len(message["content"])
            if room < 0:
                kept = conversation["messages"][:max(1, number)]
                kept = [{**message, "content": message["content"][:self.capacity * LONGEST_TOKEN]}
                        for message in kept]
                return {**conversation, "messages": kept, "cut": True}
        return conversation

    def _first_turns(self, conversation: dict) -> tuple[list[int], list[int]]:
        """(ids, loss) of the turns that fit into a row; nothing if the first answer does not."""
        messages = conversation["messages"]
        ends = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]

        def encode(end: int) -> tuple[list[int], list[int]]:
            first = {**conversation, "messages": messages[:end]}
            return self.encoder.conversations([first])[0]
        fitting = bisect_right(ends, self.capacity, key=lambda end: len(encode(end)[0]))
        return encode(ends[fitting - 1]) if fitting else ([], [])


@contextmanager
def garbage_collection_off() -> Iterator[None]:
    """Look for no reference cycles: a block makes some hundred thousand small objects and no
    cycle, and looking through them all again and again takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _content(conversation: dict) -> bytes:
    """What tells one conversation from another."""
    plain = [[message["role"], message["content"]] for message in conversation["messages"]]
    rest = [conversation.get("tools")] if "tools" in conversation else []
    for message in conversation["messages"]:
        rest += [message[name] for name in ("reasoning_content", "tool_calls") if name in message]
    return json.dumps([*plain, *rest]).encode()


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest()[:8], "big")


# ---- On all cores -------------------------------------------------------------------------------

def encode_files(files: list[DataFile], encoder: BlockEncoder, processes: int | None = None
                 ) -> Iterator[Encoded]:
    """All blocks of the files in order, encoded by so many processes (by default: all cores).

    Raises:
        BrokenData: a file cannot be read on.
        MemoryError: the system has ended a process.
    """
    if processes is None:
        small = sum(file.size_bytes for file in files) < LEAST_PARALLEL_BYTES
        processes = 1 if small else num_cores()
    blocks = ((number, block) for number, file in enumerate(files) for block in read_blocks(file))
    if processes == 1:
        for number, block in blocks:
            yield encoder.encode(number, block)
        return
    # A forked process has all that this one has loaded; a spawned one loads it for seconds.
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(processes, get_context(method), _start_worker,
                               (encoder, os.getpid()))
    waiting, bytes_ahead = deque(), 0
    try:
        for number, block in blocks:
            size = len(block.content) if isinstance(block.content, bytes) else block.num_bytes
            waiting.append((pool.submit(_encode, number, block), size))
            bytes_ahead += size
            while len(waiting) > BLOCKS_AHEAD * processes or bytes_ahead > BYTES_AHEAD:
                future, size = waiting.popleft()
                bytes_ahead -= size
                yield future.result()
        while waiting:
            yield waiting.popleft()[0].result()
    except BrokenProcessPool as error:
        raise MemoryError("a process that tokenises was ended by the system, for want of memory no "
                          "doubt: close other programs and run again") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def num_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_worker_encoder: BlockEncoder | None = None  # of this process, if it is a worker


def _start_worker(encoder: BlockEncoder, parent: int) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends its workers

    def end_with_parent() -> None:  # also if the parent was killed
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode(file: int, block: Block) -> Encoded:
    return _worker_encoder.encode(file, block)
