"""Does loading stay in bounded memory? A corpus of 1.6 GB, from JSONL to rows, measured.

    python -m benchmarks.loading [--gigabytes 1.6] [--source dataset/pretrain_starter.jsonl]

Makes a JSONL file of that size by varying real text in a temporary folder, prepares its rows in a
process of its own, and prints that process's peak memory (resident, from the kernel), seconds,
tokens/s and the size of the cache. Needs about 2.5 times the size on the disk, for a while.
"""
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from transformers import HfArgumentParser

from dataset.records import read_numbered, read_records
from dataset.rows import prepare_rows

LIMIT_GB = 1.5  # what the project promises for 1.6 GB of JSONL
CHINESE = ("朱自清的散文以写景见长。几天心里颇不宁静，今晚在院子里坐着乘凉，忽然想起日日走过的荷塘，在这满月的光里，"
           "总该另有一番样子吧。", "月亮渐渐地升高了，墙外马路上孩子们的欢笑，已经听不见了；妻在屋里拍着闰儿，迷迷糊糊地哼着眠歌。",
           "沿着荷塘，是一条曲折的小煤屑路。这是一条幽僻的路；白天也少人走，夜晚更加寂寞。",
           "曲曲折折的荷塘上面，弥望的是田田的叶子。叶子出水很高，像亭亭的舞女的裙。")


@dataclass
class LoadingSettings:
    gigabytes: float = field(default=1.6, metadata={"help": "size of the JSONL file"})
    source: str = field(default="dataset/pretrain_starter.jsonl", metadata={
        "help": "real text to vary; a few sentences of Zhu Ziqing if there is no such file"})
    tokenizer_dir: str = "model/yuanmeng_tokenizer"
    row_length: int = 512


def main() -> None:
    (settings,) = HfArgumentParser(LoadingSettings).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "corpus.jsonl"
        num_records = write_corpus(data, settings)
        size = data.stat().st_size
        print(f"{num_records:,} records, {size / 1e9:.2f} GB of JSONL")

        records, seconds, peak = measure(read_only, data)
        print(f"read and checked:  {seconds:6.1f} s, {records / seconds:11,.0f} records/s, "
              f"peak {peak:.2f} GB")
        tokens, seconds, peak = measure(make_rows, data, settings.tokenizer_dir,
                                        settings.row_length)
        cache = sum(file.stat().st_size for file in Path(folder).glob("cache/*/*"))
        print(f"made into rows:    {seconds:6.1f} s, {tokens / seconds:11,.0f} tokens/s,  "
              f"peak {peak:.2f} GB, cache {cache / 1e9:.2f} GB, {size / tokens:.2f} bytes/token")
        _, seconds, reopened = measure(make_rows, data, settings.tokenizer_dir,
                                       settings.row_length)
        print(f"opened again:      {seconds:6.1f} s, peak {reopened:.2f} GB")
    if peak > LIMIT_GB:
        sys.exit(f"Peak memory {peak:.2f} GB is over the limit of {LIMIT_GB} GB.")


def write_corpus(path: Path, settings: LoadingSettings) -> int:
    """Write records until the file has its size; sentences are shuffled so that none repeats."""
    rng = random.Random(0)
    source = Path(settings.source)
    count = written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts(source):
            sentences = text.split("。")
            rng.shuffle(sentences)
            line = json.dumps({"text": f"{count} {'。'.join(sentences)}"}, ensure_ascii=False)
            file.write(line + "\n")
            count += 1
            written += len(line.encode()) + 1
            if written >= settings.gigabytes * 1e9:
                return count


def texts(source: Path) -> Iterator[str]:
    """Endless real text: the records of the source, over and over."""
    if not source.exists():
        rng = random.Random(1)
        while True:
            yield "".join(rng.choices(CHINESE, k=rng.randrange(1, 9)))
    for _ in cycle((0,)):
        for record in read_records(source, "pretrain"):
            yield record["text"]


def measure(function, *arguments) -> tuple[int, float, float]:
    """Run in a fresh process; return (its result, seconds, peak resident gigabytes)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, function, arguments))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def _measured(sender, function, arguments: tuple) -> None:
    start = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    sender.send((result, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9))


def read_only(data: Path) -> int:
    return sum(1 for _ in read_numbered(data, "pretrain"))


def make_rows(data: Path, tokenizer_dir: str, row_length: int) -> int:
    rows = prepare_rows(data, "pretrain", tokenizer_dir, row_length,
                        cache_dir=data.parent / "cache")
    return rows.train.num_tokens + rows.heldout.num_tokens


if __name__ == "__main__":
    main()
