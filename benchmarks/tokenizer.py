"""Peak memory and CPU time of train_tokenizer.py on a corpus as large as the real one (1.6 GB).

    python -m benchmarks.tokenizer [--corpus dataset/pretrain_starter.jsonl] [--size_gb 1.6]

The corpus is written into a temporary folder (and removed): the given corpus over and over, each
time without another part of its characters. So the text stays real, but no copy repeats the
"words" of another, which is what the memory of BPE training depends on.

Measured on 2 shared Zen 4 cores: 5,948,617 lines, peak memory 2.07 GB, 69.1 CPU-seconds in all,
reading included.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from tqdm import tqdm


def write_corpus(source: Path, target: Path, num_bytes: int) -> None:
    """Write JSONL of at least `num_bytes`: copy k drops one character in 7 + k of every text."""
    with open(target, "wb") as file, tqdm(total=num_bytes, unit="B", unit_scale=True) as bar:
        for copy in count():
            with open(source, encoding="utf-8") as lines:
                for line in lines:
                    chars = list(json.loads(line)["text"])
                    del chars[copy::7 + copy]
                    record = json.dumps({"text": "".join(chars)}, ensure_ascii=False)
                    bar.update(file.write(record.encode() + b"\n"))
                    if file.tell() >= num_bytes:
                        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("dataset/pretrain_starter.jsonl"))
    parser.add_argument("--size_gb", type=float, default=1.6)
    arguments = parser.parse_args()
    if not arguments.corpus.exists():
        raise SystemExit(f"{arguments.corpus} is not there. Make it: python -m dataset.starter")

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(arguments.corpus, corpus, int(arguments.size_gb * 1e9))
        start = time.perf_counter()
        with open(corpus, "rb") as file:
            while file.read(2**20):
                pass
        reading = time.perf_counter() - start

        start = time.perf_counter()
        result = subprocess.run([sys.executable, "train_tokenizer.py", "--data", corpus,
                                 "--output_dir", Path(folder) / "tokenizer"])
        wall = time.perf_counter() - start
        size = os.path.getsize(corpus)
    if result.returncode:
        raise SystemExit("train_tokenizer.py failed; see above.")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)  # its only child is the trainer
    print(f"corpus {size / 1e9:.2f} GB (plain read {reading:.1f} s), "
          f"peak memory {usage.ru_maxrss * 1024 / 1e9:.2f} GB, "
          f"CPU {usage.ru_utime + usage.ru_stime:.1f} s, wall {wall:.1f} s")


if __name__ == "__main__":
    main()
