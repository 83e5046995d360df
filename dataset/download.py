"""Fetch the training data from a hub: `python -m dataset.download`.

The files are those of `dataset/catalog.py`. What has arrived is kept: an interrupted download goes
on where it was. A file counts as there when its size and SHA-256 are those of the hub's listing;
until then it stays in dataset/.downloads/, and moves into place in one step. No network? The
starter corpus is the way: `python -m dataset.starter`.

    python -m dataset.download                     # what the two trainers need
    python -m dataset.download --files dpo rlaif   # others, with or without .jsonl
    python -m dataset.download --hub huggingface

A mirror or a private hub: set MODELSCOPE_ENDPOINT or HF_ENDPOINT (`dataset/hubs.py`).
"""
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dataset.catalog import (
    DATA_DIR,
    HUB_FILES,
    STAGES,
    file_names,
    gigabytes,
    shown,
)
from dataset.hubs import HUBS, KEPT, STARTER_HINT, DownloadError, Entry, Hub
from training.files import flush_folder
from training.settings import option, parse_settings

LISTED_NAMES = 12  # how many names of a listing a message repeats
DEFAULTS, OTHERS = (
    ", ".join(f"{file.name.removesuffix('.jsonl')} ({file.size})"
              for file in HUB_FILES if file.default == default and not file.former)
    for default in (True, False))


@dataclass
class DownloadSettings:
    files: list[str] | None = option(
        None, f"names, with or without .jsonl; default: {DEFAULTS}; others: {OTHERS}")
    hub: Literal["modelscope", "huggingface"] = option(
        "modelscope", "where from; the files are the same")
    output_dir: str = field(
        default_factory=lambda: str(shown(DATA_DIR)), metadata={"help": "where to put them"})
    revision: str | None = option(
        None, "branch, tag or commit; default: the newest files (master, or main)")
    overwrite: bool = option(False, "replace a file that differs from the hub's")


def download(settings: DownloadSettings) -> list[Path]:
    """Fetch the files that are not there yet; return the paths of all. Raises `DownloadError`."""
    hub = HUBS[settings.hub]
    revision = settings.revision or hub.revision
    output_dir = Path(settings.output_dir)
    partial_dir = output_dir / ".downloads" / settings.hub
    print(f"Asking {hub.title} for {hub.repository} …", flush=True)
    listing = hub.listing(revision)
    entries = named_files(hub, listing, settings.files) if settings.files else default_files(
        hub, listing)

    paths = []
    for entry in entries:
        path = output_dir / entry.name
        size = path.stat().st_size if path.exists() else None
        if size == entry.size:
            print(f"{shown(path)}: complete already ({entry.size / 1e6:,.1f} MB)")
        elif size is not None and not settings.overwrite:  # older, newer, or edited: it may serve
            print(f"{shown(path)}: has {size:,} bytes, {hub.title}'s {entry.size:,}; kept as it is "
                  "(--overwrite replaces it)")
        else:
            _check_space(hub.partial(entry, partial_dir), entry)
            _move(hub.fetch(entry, revision, partial_dir), path)
            print(f"{shown(path)}: {entry.size / 1e6:,.1f} MB")
        paths.append(path)
    shutil.rmtree(partial_dir, ignore_errors=True)
    with suppress(OSError):  # the folder above goes too, unless another download uses it
        partial_dir.parent.rmdir()
    return paths


def default_files(hub: Hub, listing: dict[str, Entry]) -> list[Entry]:
    """Of each stage the default file, or its predecessor where the hub has only that."""
    entries, missing = [], []
    for stage in STAGES:
        files = [file for file in HUB_FILES if file.stage == stage]
        (default,) = (file.name for file in files if file.default)
        (former,) = (file.name for file in files if file.former)
        if default not in listing and former in listing:
            print(f"{hub.title} lists no {default} here: fetching its predecessor {former}.")
        if name := next((name for name in (default, former) if name in listing), None):
            entries.append(listing[name])
        else:
            missing.append(stage)
    if missing:
        raise DownloadError(
            f"{hub.title}'s {hub.repository} lists none of the files known for "
            f"{' and '.join(missing)}. {_contents(listing)}. Name one: python -m dataset.download "
            f"--hub {hub.name} --files NAME, {STARTER_HINT}")
    return entries


def named_files(hub: Hub, listing: dict[str, Entry], names: list[str]) -> list[Entry]:
    """The listed files of these names, each once; the ending .jsonl may be left out."""
    entries = {}
    for name in names:
        found = next((full for full in (name, f"{name}.jsonl") if full in listing), None)
        if found is None:
            raise DownloadError(f"{hub.title}'s {hub.repository} lists no {name}. "
                                f"{_contents(listing)}. Name one of them with --files, "
                                f"{STARTER_HINT}")
        entries[found] = listing[found]
    used = {name for stage in STAGES for name in file_names(stage)}
    if others := [name for name in entries if name not in used]:
        print(f"No stage takes {', '.join(others)} by itself: name it with --data.")
    return list(entries.values())


def _contents(listing: dict[str, Entry]) -> str:
    """What a hub has, in a few words: the data files, the largest first."""
    files = [entry for entry in listing.values() if not Path(entry.name).name.startswith(".")]
    files.sort(key=lambda entry: -entry.size)
    names = [f"{entry.name} ({gigabytes(entry.size)})" for entry in files[:LISTED_NAMES]]
    if len(files) > LISTED_NAMES:
        names.append(f"and {len(files) - LISTED_NAMES} more")
    return f"It has: {', '.join(names)}" if names else "It is empty"


def _check_space(partial: Path, entry: Entry) -> None:
    """Raise unless what is missing of a file fits on the disk."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    missing = entry.size - (partial.stat().st_size if partial.exists() else 0)
    free = shutil.disk_usage(partial.parent).free
    if free < missing:
        raise DownloadError(f"{entry.name} needs {missing / 1e9:.2f} GB more, but the disk of "
                            f"{partial.parent} has {free / 1e9:.2f} GB free.")


def _move(source: Path, target: Path) -> None:
    """Move a finished file into its place, whole and on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, target)
    flush_folder(target.parent)


def main() -> None:
    settings = parse_settings(
        DownloadSettings, "Fetch the training data from a hub into dataset/; an interrupted "
        "download goes on where it was. `python -m dataset.catalog` lists all the files, "
        "`python -m dataset.starter` builds data without a hub.")
    try:
        download(settings)
    except DownloadError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted. {KEPT}.")
    except OSError as error:  # of the folder: read-only, no such disk
        sys.exit(f"error: cannot write {settings.output_dir} ({error.strerror or error})")


if __name__ == "__main__":
    main()
