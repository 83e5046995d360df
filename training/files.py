"""Writing a file so that a crash at any moment leaves either the old one or the new one, whole."""

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success flush it and rename it over `path`.

    If the body raises, or the disk is full, `path` keeps what it held before and the temporary
    file is removed. That of a killed process is removed by the next write of the same `path`; two
    threads of one process must not write the same one. Text modes are UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.{os.getpid()}-"
    )
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        usual_permissions(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writes of `path` whose process was killed."""
    prefix = f".{path.name}."
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*-*"):
        pid = leftover.name.removeprefix(prefix).split("-")[0]
        # Our own number: a predecessor's, as in a container, where every run may have number 1.
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            leftover.unlink(missing_ok=True)


def usual_permissions(path: str | Path) -> None:
    """Give a file that was made private the permissions that any new file would have."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def move_files(source: str | Path, target: str | Path) -> list[Path]:
    """Move the files of one folder into another, each taking its place whole and on the disk.

    Returns their new paths, sorted. Files of other names stay in `target` as they were.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    moved = []
    for file in sorted(Path(source).iterdir()):
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        usual_permissions(file)
        moved.append(target / file.name)
        os.replace(file, moved[-1])
    flush_folder(target)
    return moved


def flush_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable; file systems without this keep their own promise."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
