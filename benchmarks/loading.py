"""Is making rows fast, and does it stay in bounded memory? Against the tokenizer alone, measured.

    python -m benchmarks.loading                    # the starter corpus as it is
    python -m benchmarks.loading --gigabytes 1.6    # a file of that size, made by varying its text
    python -m benchmarks.loading --line_mb 60       # records of 60 MB each, in bounded memory

Prepares the rows of a file of JSON lines in a process of its own, and beside it lets the
tokenizer's own `encode_batch_fast` (of `tokenizers`, on all cores) have the same texts, already in
memory: in turn, `rounds` times, so that the ratio means something on a machine that is not quiet.
Peak memory is the largest process's and that of all together (proportional set size, sampled).
Needs about 2.5 times the size on the disk, for a while.
"""
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
from tokenizers import Tokenizer
from transformers import HfArgumentParser

from dataset.encoding import num_cores
from dataset.records import read_records
from dataset.rows import prepare_rows
from model import TOKENIZER_DIR

LIMIT_GB = 1.5  # what the project promises for 1.6 GB of JSON lines
LIMIT_RATIO = 1.25  # and this, of the tokenizer's own time
BATCH_TEXTS = 1000  # for `encode_batch_fast`
SAMPLE_SECONDS = 0.1


@dataclass
class LoadingSettings:
    kind: str = field(default="pretrain", metadata={"help": "pretrain or sft"})
    source: str | None = field(default=None, metadata={"help": "default: the kind's starter file"})
    gigabytes: float | None = field(default=None, metadata={"help": "size of a file to make"})
    line_mb: float | None = field(default=None, metadata={"help": "size of its records"})
    rounds: int = field(default=3, metadata={"help": "pairs of measurements"})
    processes: int | None = field(default=None, metadata={"help": "default: one for each core"})
    row_length: int = 512


def main() -> None:
    (settings,) = HfArgumentParser(LoadingSettings).parse_args_into_dataclasses()
    source = Path(settings.source or f"dataset/{settings.kind}_starter.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        data = source
        if settings.gigabytes or settings.line_mb:
            data = Path(folder) / "corpus.jsonl"
            write_corpus(data, source, settings)
        size = data.stat().st_size
        print(f"{data.name}: {size / 1e6:,.1f} MB of JSON lines, {num_cores()} cores")
        ratios, peaks = [], []
        for number in range(settings.rounds):
            alone, _ = measure(tokenise_alone, data, settings.kind)
            cache_dir = Path(folder) / f"cache{number}"
            rows, peak = measure(make_rows, data, cache_dir, settings)
            ratios.append(rows["seconds"] / alone["seconds"])
            peaks.append(peak)
            cache = sum(file.stat().st_size for file in cache_dir.glob("*/*"))
            print(f"tokenizer alone {alone['seconds']:6.2f} s ({alone['cpu_seconds']:.1f} CPU s); "
                  f"rows {rows['seconds']:6.2f} s ({rows['cpu_seconds']:.1f} CPU s), "
                  f"{rows['tokens'] / rows['seconds']:,.0f} tokens/s; ratio {ratios[-1]:.2f}; "
                  f"peak {peak['largest_gb']:.2f} GB in a process, {peak['all_gb']:.2f} GB in all; "
                  f"cache {cache / 1e6:,.1f} MB")
            again, _ = measure(make_rows, data, cache_dir, settings)
            shutil.rmtree(cache_dir)
        print(f"opened again in {again['seconds']:.2f} s")
        ratio, peak_gb = median(ratios), max(peak["all_gb"] for peak in peaks)
        print(f"rows / tokenizer alone: {ratio:.2f} (median of {settings.rounds})")
    if ratio > LIMIT_RATIO or peak_gb > LIMIT_GB:
        sys.exit(f"Over the limits of {LIMIT_RATIO} times the tokenizer and {LIMIT_GB} GB.")


def write_corpus(path: Path, source: Path, settings: LoadingSettings) -> None:
    """Write records until the file has its size; sentences are shuffled so that none repeats."""
    rng = random.Random(0)
    wanted_bytes = (settings.gigabytes or 0.3) * 1e9
    line_bytes = (settings.line_mb or 0) * 1e6
    count = written = 0
    with path.open("w", encoding="utf-8") as file:
        texts = varied(source, rng)
        while written < wanted_bytes:
            text = next(texts)
            while len(text) * 2.5 < line_bytes:  # bytes: the text is not all Chinese
                text += "".join(itertools.islice(texts, 1000))
            line = json.dumps({"text": f"{count} {text}"}, ensure_ascii=False)
            file.write(line + "\n")
            count += 1
            written += len(line.encode()) + 1


def varied(source: Path, rng: random.Random) -> Iterator[str]:
    """Endless real text: the records of the source, over and over, their sentences shuffled."""
    while True:
        for _, text in read_records(source, "pretrain"):
            sentences = text.split("。")
            rng.shuffle(sentences)
            yield "。".join(sentences)


def tokenise_alone(data: Path, kind: str) -> dict:
    """Time `encode_batch_fast` on the texts of the records, which are read before."""
    texts = []
    for _, record in read_records(data, kind):
        texts += [record] if isinstance(record, str) else [
            message["content"] for message in record["messages"]]
    backend = Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))
    backend.encode_special_tokens = True
    start, cpu = time.perf_counter(), cpu_seconds()
    tokens = 0
    for first in range(0, len(texts), BATCH_TEXTS):
        encodings = backend.encode_batch_fast(texts[first:first + BATCH_TEXTS],
                                              add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in encodings)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu,
            "tokens": tokens}


def make_rows(data: Path, cache_dir: Path, settings: LoadingSettings) -> dict:
    start, cpu = time.perf_counter(), cpu_seconds()
    rows = prepare_rows(data, settings.kind, TOKENIZER_DIR, settings.row_length,
                        cache_dir=cache_dir, processes=settings.processes)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu,
            "tokens": rows.train.num_tokens + rows.heldout.num_tokens}


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(function, *arguments) -> tuple[dict, dict]:
    """Run in a fresh process; return its result and the peak memory, in gigabytes."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, arguments))
    process.start()
    sender.close()
    peak = {"largest_gb": 0.0, "all_gb": 0.0}
    while not receiver.poll(SAMPLE_SECONDS):
        sizes = []
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            root = psutil.Process(process.pid)
            for part in (root, *root.children(recursive=True)):
                memory = part.memory_full_info()  # pages that processes share count once
                sizes.append(getattr(memory, "pss", memory.uss) / 1e9)
        if sizes:
            peak = {"largest_gb": max(peak["largest_gb"], max(sizes)),
                    "all_gb": max(peak["all_gb"], sum(sizes))}
    result = receiver.recv()
    process.join()
    return result, peak


def _run(sender, function, arguments: tuple) -> None:
    sender.send(function(*arguments))


if __name__ == "__main__":
    main()
