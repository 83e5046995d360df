"""Set the sandbox up: `python -m codeact.install` (setup.sh does it). Afterwards no network.

Deno comes with requirements.txt. This fetches Pyodide from npm, through Deno's own client, and the
wheels that the sandbox has, through pip; compares every file with the hash in runtime.py; compiles
the wheels; and takes a picture of Python's memory with them imported, from which a process starts
in a fraction of the time. All of it is built aside and put into its place at the end.

    python -m codeact.install --add tabulate     one more pure wheel, from the index or a file
"""
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from codeact.runtime import (
    BUILD,
    PACKAGE,
    PRELOAD,
    PYODIDE,
    PYODIDE_FILES,
    RUNTIME,
    WARM_UP,
    WHEELS,
    InstallError,
    check_installed,
    find_deno,
    read_installed,
    version,
)
from training.settings import option, parse_settings


@dataclass
class InstallSettings:
    """What `python -m codeact.install` takes."""

    add: str | None = option(None, "a pure wheel to add: a file, or a name for pip")
    again: bool = option(False, "build everything anew")


def main() -> None:
    settings = parse_settings(InstallSettings)
    try:
        install(settings)
    except (InstallError, OSError) as error:
        sys.exit(f"codeact.install: {error}")


def install(settings: InstallSettings) -> None:
    """Raises `InstallError`, OSError."""
    deno = find_deno()
    with only_one():
        installed = read_installed()
        if installed is not None and not settings.again and settings.add is None:
            print(f"The sandbox is set up: Pyodide {PYODIDE} with {installed['packages']}.")
            return
        with tempfile.TemporaryDirectory(dir=PACKAGE, prefix=".runtime-new-") as folder:
            new = Path(folder) / "runtime"
            for name in ("pyodide", "wheels", "built"):
                (new / name).mkdir(parents=True)
            fetch_pyodide(deno, new / "pyodide")
            fetch_wheels(new / "wheels")
            keep_added(new / "wheels")
            if settings.add is not None:
                add_wheel(settings.add, new / "wheels")
            build(deno, new)
            write_installed(new)
            put_into_place(new)
    print(f"The sandbox is set up: Pyodide {PYODIDE} with {check_installed()['packages']}.")


def write_installed(new: Path) -> None:
    wheels = sorted(path.name.split("-")[0] for path in (new / "wheels").iterdir())
    files = [path for path in sorted(new.rglob("*")) if path.is_file()]
    record = {
        "version": version(), "packages": ", ".join(wheels),
        "built": sorted(path.name for path in (new / "built").glob("*.zip")),
        "sizes": {str(path.relative_to(new)): path.stat().st_size for path in files},
    }
    (new / "installed.json").write_text(json.dumps(record, indent=1), "utf-8")


# ---- Steps --------------------------------------------------------------------------------------

@contextmanager
def only_one() -> Iterator[None]:
    """Two set-ups at once would undo each other: the second waits."""
    with open(PACKAGE / ".install.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch_pyodide(deno: str, target: Path) -> None:
    """Pyodide's files from npm, each with the hash in runtime.py."""
    with tempfile.TemporaryDirectory(prefix="codeact-") as folder:
        environment = {**os.environ, "DENO_DIR": f"{folder}/cache", "NO_COLOR": "1"}
        command([deno, "install", "--quiet", "--no-lock", "--node-modules-dir=auto",
                 f"npm:pyodide@{PYODIDE}"], "npm's registry cannot be reached, or has no Pyodide "
                f"{PYODIDE}; NPM_CONFIG_REGISTRY names a mirror", folder, environment)
        for name, expected in PYODIDE_FILES.items():
            source = Path(folder) / "node_modules/pyodide" / name
            if not source.is_file() or hash_of(source) != expected:
                raise InstallError(f"Pyodide's {name} did not arrive whole, or is not the one that "
                                   "is expected; run it again, or use another mirror")
            shutil.copyfile(source, target / name)


def fetch_wheels(target: Path) -> None:
    wanted = [f"{name} --hash=sha256:{expected}\n" for name, expected in WHEELS.items()]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(wanted)
        file.flush()
        download(["--require-hashes", "-r", file.name], target)


def download(what: list[str], target: Path) -> None:
    command([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
             "--no-input", "--no-deps", "--only-binary=:all:", "-d", str(target), *what],
            "pip could not fetch a wheel; PIP_INDEX_URL names a mirror")


def keep_added(target: Path) -> None:
    """The wheels that the user added earlier."""
    ours = {name.split("==")[0] for name in WHEELS}
    for path in (RUNTIME / "wheels").glob("*.whl"):
        if path.name.split("-")[0] not in ours:
            shutil.copyfile(path, target / path.name)


def add_wheel(what: str, target: Path) -> None:
    """A wheel file, or what pip finds under the name. Raises `InstallError`: it is not pure."""
    with tempfile.TemporaryDirectory(prefix="codeact-") as folder:
        if what.endswith(".whl"):
            shutil.copy(what, folder)
        else:
            download([what], Path(folder))
        for path in Path(folder).glob("*.whl"):
            if not path.name.endswith("-none-any.whl") or not zipfile.is_zipfile(path):
                raise InstallError(f"{path.name} is not a pure Python wheel (…-none-any.whl); "
                                   "only such can run in the sandbox")
            for older in target.glob(f"{path.name.split('-')[0]}-*.whl"):
                older.unlink()
            shutil.copyfile(path, target / path.name)


def build(deno: str, new: Path) -> None:
    """The compiled wheels, then the picture with them imported."""
    out, pyodide = str(new / "built"), str(new / "pyodide")
    run = [deno, "run", "--quiet", "--no-prompt", "--no-config", "--no-lock", "--no-remote",
           f"--allow-read={new},{BUILD.parent}", f"--allow-write={out}", str(BUILD)]
    wheels = [str(path) for path in sorted((new / "wheels").iterdir())]
    for order in ({"wheels": wheels}, {"preload": PRELOAD, "warmUp": WARM_UP}):
        settings = json.dumps({"pyodide": pyodide, "out": out, **order})
        command([*run, settings], "Pyodide could not be started, which needs 2 GB of memory")


def put_into_place(new: Path) -> None:
    """Replace the old folder by the new one; a crash in between leaves none, and one says so."""
    for path in new.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if RUNTIME.exists():
        RUNTIME.rename(new.parent / "old")
    new.rename(RUNTIME)


def command(words: list[str], trouble: str, folder: str | None = None,
            environment: dict[str, str] | None = None) -> None:
    """Run a program. Raises `InstallError`: `trouble` and the last line that it printed."""
    done = subprocess.run(words, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        said = errors[-1][:200] if errors else f"exit status {done.returncode}"
        raise InstallError(f"{trouble} ({said})")


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
