"""Fetch the full training data from ModelScope: `python -m dataset.download`.

The data sets are minimind's (gongjy/minimind_dataset, 1.6 GB + 1.2 GB), and the work is done by
ModelScope's own SDK: it resumes after an interruption, and checks each file's size and SHA-256
against the hub's listing before the file counts as there. Until then everything stays in
dataset/.downloads/modelscope/; a finished file is moved into place in one step. No network? The
starter corpus is the way: `python -m dataset.starter`.

A mirror or a private hub: set MODELSCOPE_ENDPOINT.
"""
import logging
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import requests
from modelscope_hub import HubApi
from modelscope_hub.errors import FileIntegrityError, HubError, NotExistError
from modelscope_hub.types import FileInfo

from dataset.records import DATA_DIR, DATA_FILES, shown
from training.settings import parse_settings

REPOSITORY = "gongjy/minimind_dataset"
STARTER_HINT = "Without ModelScope, build the offline corpus instead: python -m dataset.starter"


@dataclass
class DownloadSettings:
    files: list[str] = field(
        default_factory=lambda: [modelscope_file for modelscope_file, _ in DATA_FILES.values()],
        metadata={"help": "names of the files in the ModelScope data set"})
    output_dir: str = field(default=str(DATA_DIR), metadata={"help": "where to put them"})
    revision: str = field(default="master", metadata={"help": "branch, tag or commit"})
    overwrite: bool = field(
        default=False, metadata={"help": "replace a file that differs from the hub's"})


class DownloadError(Exception):
    """The download cannot go on; the message says why, and what to do next."""


def download(settings: DownloadSettings) -> list[Path]:
    """Fetch the files that are not there yet; return the paths of all. Raises `DownloadError`."""
    output_dir = Path(settings.output_dir)
    partial_dir = output_dir / ".downloads" / "modelscope"
    log = logging.getLogger("modelscope_hub")
    log.setLevel(logging.ERROR)  # the SDK reports each attempt; one line from us is clearer
    print(f"Asking ModelScope for {REPOSITORY} …", flush=True)
    api = HubApi()
    try:
        listing = {entry.path: entry for entry in api.list_repo_files(
            REPOSITORY, "dataset", revision=settings.revision)}
    except NotExistError as error:
        raise DownloadError(f"ModelScope has no {REPOSITORY} at revision {settings.revision} "
                            f"({reason(error)}). {STARTER_HINT}") from error
    except (HubError, requests.RequestException) as error:
        raise DownloadError(f"Cannot reach ModelScope ({reason(error)}). {STARTER_HINT}"
                            ) from error
    log.setLevel(logging.WARNING)  # from here on an attempt may take minutes: do say so
    for name in settings.files:
        if name not in listing:
            raise DownloadError(f"{REPOSITORY} holds no {name}; it has: {', '.join(listing)}")

    paths = []
    for name in settings.files:
        entry, path = listing[name], output_dir / name
        if _is_there(path, entry, settings.overwrite):
            print(f"{shown(path)}: complete already ({entry.size / 1e6:,.1f} MB)")
        else:
            _check_space(partial_dir, entry)
            _fetch(api, entry, settings.revision, partial_dir)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial_dir / name, path)
            print(f"{shown(path)}: {entry.size / 1e6:,.1f} MB")
        paths.append(path)
    shutil.rmtree(partial_dir, ignore_errors=True)
    with suppress(OSError):  # the folder above goes too, unless the starter corpus uses it
        partial_dir.parent.rmdir()
    return paths


def _is_there(path: Path, entry: FileInfo, overwrite: bool) -> bool:
    """Whether the file is complete; raise rather than replace one that someone may have edited."""
    if not path.exists():
        return False
    if path.stat().st_size == entry.size:
        return True
    if not overwrite:
        raise DownloadError(
            f"{path} has {path.stat().st_size:,} bytes, ModelScope's {entry.size:,}. If it is your "
            "own file, move it away; to replace it: python -m dataset.download --overwrite")
    return False


def _check_space(partial_dir: Path, entry: FileInfo) -> None:
    partial_dir.mkdir(parents=True, exist_ok=True)
    received = partial_dir / f"{entry.path}.incomplete"
    missing = entry.size - (received.stat().st_size if received.exists() else 0)
    free = shutil.disk_usage(partial_dir).free
    if free < missing:
        raise DownloadError(f"{entry.path} needs {missing / 1e9:.2f} GB more, but the disk of "
                            f"{partial_dir} has {free / 1e9:.2f} GB free.")


def _fetch(api: HubApi, entry: FileInfo, revision: str, partial_dir: Path) -> None:
    """Let the SDK fetch one file into `partial_dir`, going on from what is there."""
    try:
        api.download_file(
            REPOSITORY, "dataset", entry.path, revision=revision, local_dir=partial_dir,
            cache_dir=partial_dir,  # the SDK's lock file
            file_size=entry.size, expected_sha256=entry.sha256)
    except FileIntegrityError as error:
        raise DownloadError(f"{entry.path} arrived with the wrong size or content "
                            f"({reason(error)}). Try again later. {STARTER_HINT}") from error
    except (HubError, requests.RequestException, OSError) as error:
        raise DownloadError(
            f"The download of {entry.path} stopped ({reason(error)}). What has arrived is kept: "
            f"run the same command to go on. {STARTER_HINT}") from error


def reason(error: BaseException) -> str:
    """The root of the matter in one line: the SDK, requests and urllib3 each wrap it once more."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


def main() -> None:
    settings = parse_settings(DownloadSettings)
    try:
        download(settings)
    except DownloadError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. What has arrived is kept: run the same command to go on.")


if __name__ == "__main__":
    main()
