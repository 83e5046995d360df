"""Set the sandbox up: `python -m codeact.install` (setup.sh does it). Afterwards no network.

Deno comes with requirements.txt. This fetches Pyodide from npm, through Deno's own client, and the
wheels that the sandbox has, through pip; compares every file with the hash written here; compiles
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

from training.settings import option, parse_settings

PYODIDE = "314.0.7"  # of npm; Python 3.14
PYODIDE_FILES = {
    "pyodide.mjs": "6f1d60f7bf529beb300f0f47983c921d3982363640ba20af0e38efdddbc66109",
    "pyodide.asm.mjs": "f7cdc8ece80678ceb712f8e65ebe6d3a83203a180c399865f49612a051693635",
    "pyodide.asm.wasm": "cc36e3cab04fdfc9a63ff13eb52eae2b911bf46c025cc7b281f394bd3de1d5e6",
    "pyodide-lock.json": "5dc2fc119108bc148c7457dc86e7675b5c87e1cafd420b9c34c1eaef7b36c010",
    "python_stdlib.zip": "fa1957e5777068fc4f7437f96d860ae2fbe9c19732ba06c84e004ec16dd7dd7a",
}
WHEELS = {
    "mpmath==1.3.0": "a0b2b9fe80bbcd81a6647ff13108738cfb482d481d826cc0e02f5b35e5c88d2c",
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
}
# Imported in the picture, so that no step waits for them.
PRELOAD = [
    "ast", "asyncio", "calendar", "cmath", "collections", "copy", "csv", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "inspect", "io", "itertools",
    "json", "linecache", "math", "operator", "pprint", "random", "re", "statistics", "string",
    "sympy", "textwrap", "time", "traceback", "types", "typing", "unicodedata", "zoneinfo",
]
PACKAGE = Path(__file__).parent
RUNTIME = PACKAGE / ".runtime"
BUILD = PACKAGE / "runner" / "build.js"


@dataclass
class InstallSettings:
    """What `python -m codeact.install` takes."""

    add: str | None = option(None, "a pure wheel to add: a file, or a name for pip")
    again: bool = option(False, "build everything anew")


class InstallError(Exception):
    """The message says what is wrong, and what to do next."""


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


def find_deno() -> str:
    """Deno's path: beside this Python, or on PATH. Raises `InstallError`."""
    beside = Path(sys.executable).with_name("deno")
    found = str(beside.resolve()) if beside.exists() else shutil.which("deno")
    if found is None:
        raise InstallError("Deno is not there: pip install -r requirements.txt, or bash setup.sh")
    return found


def check_installed() -> dict:
    """What the install step left: `built`, `packages`. Raises `InstallError`: nothing that fits."""
    installed = read_installed()
    if installed is None:
        raise InstallError("the sandbox is not set up: python -m codeact.install")
    return installed


def read_installed() -> dict | None:
    """The record of the install step, if it is of this version and its files are there."""
    try:
        installed = json.loads((RUNTIME / "installed.json").read_text("utf-8"))
        complete = installed["version"] == version() and all(
            (RUNTIME / name).stat().st_size == size for name, size in installed["sizes"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return installed if complete else None


def version() -> str:
    """Changes with all that decides what is built."""
    recipe = json.dumps([PYODIDE, PYODIDE_FILES, WHEELS, PRELOAD]) + BUILD.read_text("utf-8")
    return hashlib.sha256(recipe.encode()).hexdigest()


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
    """Pyodide's files from npm, each with the hash written above."""
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
    for order in ({"wheels": wheels}, {"preload": PRELOAD}):
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
