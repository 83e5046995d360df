"""The files of the data set, and which of them a stage trains on: `python -m dataset.catalog`.

The large files are minimind's and lie on two hubs. Names, sizes and purposes are those of the
listing in minimind's README (github.com/jingyaogong/minimind), the same on both hubs since
2026-04-01; looked up on 2026-11-28. The sizes are rounded there and are for information only:
a file that is older or newer than this table is as good as one that is not.

Nothing outside the standard library is needed here, so that a script may ask at any time:

    python -m dataset.catalog            # the table, what lies in dataset/, what would be used
    python -m dataset.catalog --ready    # exit status 0 if both trainers find data
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DATA_DIR = Path(__file__).parent
REPOSITORIES = {  # the same files, by the name of the hub
    "modelscope": "gongjy/minimind_dataset",
    "huggingface": "jingyaogong/minimind_dataset",
}
STAGES = ("pretrain", "sft")  # those that this repository trains; other files are for later ones


@dataclass(frozen=True)
class HubFile:
    """A file on the hubs.

    Args:
        name: its path in the repository.
        stage: the one of `STAGES` that trains on it, or "later".
        size_bytes: rounded, as the listing says it.
        purpose: what it is for, and in which shape.
        default: whether it is fetched unless other files are named.
        former: whether it left the hubs on 2026-04-01; old revisions and some mirrors still have
            it, and so have many disks.
    """

    name: str
    stage: str
    size_bytes: int
    purpose: str
    default: bool = False
    former: bool = False

    @property
    def size(self) -> str:
        """The size in words: "1.2 GB"."""
        return gigabytes(self.size_bytes)


# Of each stage in the order in which they are preferred.
HUB_FILES = (
    HubFile("pretrain_t2t_mini.jsonl", "pretrain", 1_200_000_000,
            "pretraining, one document a record; enough for a small model", default=True),
    HubFile("pretrain_t2t.jsonl", "pretrain", 10_000_000_000, "pretraining, the whole of it"),
    HubFile("pretrain_hq.jsonl", "pretrain", 1_600_000_000,
            "pretraining until 2026, several short documents a record", former=True),
    HubFile("sft_t2t_mini.jsonl", "sft", 1_600_000_000,
            "conversations, some with tools and thinking; enough for a small model", default=True),
    HubFile("sft_t2t.jsonl", "sft", 14_000_000_000,
            "conversations, some with tools and thinking, the whole of them"),
    HubFile("sft_mini_512.jsonl", "sft", 1_200_000_000,
            "short conversations until 2026", former=True),
    HubFile("dpo.jsonl", "later", 53_000_000,
            "pairs of a better and a worse answer, for preference training (DPO)"),
    HubFile("rlaif.jsonl", "later", 24_000_000,
            "questions for reinforcement learning from a model's judgement (PPO, GRPO)"),
    HubFile("agent_rl.jsonl", "later", 86_000_000,
            "tasks with tools and what a right answer holds, for reinforcement learning"),
    HubFile("agent_rl_math.jsonl", "later", 18_000_000,
            "the same for problems of mathematics"),
)
STARTER_FILES = {  # made by `python -m dataset.starter`, which needs no hub
    "pretrain": "pretrain_starter.jsonl",
    "sft": "sft_starter.jsonl",
    "eval": "eval_starter.jsonl",
}
AGENT_FILE = "codeact.jsonl"  # made by `python -m dataset.codeact`, mixed into fine-tuning
STANDARD_INPUT = Path("-")


def default_names() -> list[str]:
    """The files that are fetched unless others are named, one for each stage."""
    return [file.name for file in HUB_FILES if file.default]


def file_names(stage: str) -> list[str]:
    """The files that a stage can train on, the preferred first, the starter corpus last."""
    return [file.name for file in HUB_FILES if file.stage == stage] + [STARTER_FILES[stage]]


def find_data(stage: str, data_dir: Path = DATA_DIR) -> list[Path]:
    """Those of the stage's files that lie in `data_dir` and are not empty, the preferred first."""
    paths = (data_dir / name for name in file_names(stage))
    return [path for path in paths if path.is_file() and path.stat().st_size]


def pick_data(stage: str, override: Sequence[str] | None = None, *, data_dir: Path = DATA_DIR,
              quiet: bool = False) -> list[Path]:
    """Choose the data of a stage ("pretrain" or "sft"), and print what it is.

    `override` wins: files, folders, pipes, or "-" for the standard input, looked at for existence
    only. Else it is the file in `data_dir` that the table prefers, at last the starter corpus.
    Raises `FileNotFoundError` whose message names the commands that make one.
    """
    if override:
        paths = named_data(override)
        line = ", ".join(f"{shown(path)} (your choice, {size_text(path)})" for path in paths)
    else:
        found = find_data(stage, data_dir)
        if not found:
            raise FileNotFoundError(
                f"No training data: {shown(data_dir)} holds none of "
                f"{', '.join(file_names(stage))}. Run\n"
                "    python -m dataset.starter     (works without a hub, a few minutes), or\n"
                "    python -m dataset.download    (larger and better, from ModelScope or "
                "Hugging Face)")
        paths = found[:1]
        origin = ("the offline starter corpus" if paths[0].name == STARTER_FILES[stage]
                  else "the hub's")
        line = f"{shown(paths[0])} ({origin}, {size_text(paths[0])})"
        if others := [path.name for path in found[1:]]:
            line += f"; left aside: {', '.join(others)} (--data chooses)"
    if not quiet:
        print(f"Data: {line}")
    return paths


def named_data(names: Sequence[str]) -> list[Path]:
    """The data that a user names; raises `FileNotFoundError` at the first that is not there."""
    paths = [Path(name) for name in names]
    for path in paths:
        if path == STANDARD_INPUT:
            if sys.stdin is None or sys.stdin.isatty():
                raise FileNotFoundError("--data -: nothing is piped into the standard input")
        elif path.is_dir():
            if not count_files(path):
                raise FileNotFoundError(f"No data files in the folder {path}")
        elif not path.exists():
            raise FileNotFoundError(f"No such data file: {path}")
    if paths.count(STANDARD_INPUT) > 1:
        raise FileNotFoundError("--data: the standard input (-) can be read only once")
    return paths


def pick_agent_data(override: str | None = None, *, data_dir: Path = DATA_DIR,
                    quiet: bool = False) -> list[Path]:
    """The agent's conversations to be mixed into fine-tuning, if there are any: none or one file.

    `override` is another file, or "none".
    """
    path = Path(override) if override else data_dir / AGENT_FILE
    if override == "none" or not (override or path.is_file()):
        return []
    if not path.is_file():
        raise FileNotFoundError(f"No such data file: {path}; `python -m dataset.codeact` makes it")
    if not quiet:
        print(f"Data: {shown(path)} (the agent's, {size_text(path)})")
    return [path]


def shown(path: Path) -> Path:
    """The path as a user would write it: relative to where they are, if it lies below."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path


def size_text(path: Path) -> str:
    """What lies at a path, in words: "45.2 MB", "3 files", "a pipe"."""
    if path == STANDARD_INPUT:
        return "the standard input"
    if path.is_dir():
        number = count_files(path)
        return f"{number:,} file{'s' * (number != 1)}"
    return f"{path.stat().st_size / 1e6:,.1f} MB" if path.is_file() else "a pipe"


def gigabytes(num_bytes: int) -> str:
    """A number of bytes in two digits or more: "1.2 GB", "14 GB", "53 MB"."""
    unit, name = (1e9, "GB") if num_bytes >= 999.5e6 else (1e6, "MB")
    amount = num_bytes / unit
    return f"{amount:.1f} {name}" if amount < 9.95 else f"{amount:.0f} {name}"


def count_files(folder: Path) -> int:
    """How many files lie in a folder and below, hidden ones left out."""
    number = 0
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        number += sum(not name.startswith(".") for name in names)
    return number


def ready_line(data_dir: Path = DATA_DIR) -> str | None:
    """What both trainers would use, or None if a file is missing.

    The starter corpus counts only with the tasks that came with it: `evaluate.py` needs them.
    """
    chosen = [path for stage in STAGES for path in find_data(stage, data_dir)[:1]]
    starter = any(path.name in STARTER_FILES.values() for path in chosen)
    if len(chosen) < len(STAGES) or starter and not (data_dir / STARTER_FILES["eval"]).is_file():
        return None
    return " and ".join(str(shown(path)) for path in chosen)


def table(data_dir: Path = DATA_DIR) -> str:
    """The files, a line each, and a line for what each stage would train on."""
    lines = []
    for file in HUB_FILES:
        path = data_dir / file.name
        here = f"here, {size_text(path)}" if path.is_file() else "-"
        note = " [default]" * file.default + " [not on the hubs any more]" * file.former
        lines.append(f"{file.name:24} {file.stage:9} {file.size:>7}  {here:14} "
                     f"{file.purpose}{note}")
    for stage in STAGES:
        found = find_data(stage, data_dir)
        lines.append(f"{stage} would train on {shown(found[0])}" if found else
                     f"{stage} has no data yet: python -m dataset.download or dataset.starter")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dataset.catalog",
        description="List the files of the data set, and which of them the stages would train on.")
    parser.add_argument(
        "--ready", action="store_true",
        help="print only what both trainers would use; exit status 1 if a file is missing")
    if not parser.parse_args().ready:
        print(table())
    elif line := ready_line():
        print(line)
    else:
        sys.exit(1)


if __name__ == "__main__":
    main()
