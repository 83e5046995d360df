"""What the sandbox is made of, and where `python -m codeact.install` has put it."""
import hashlib
import json
import shutil
import sys
from pathlib import Path

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
# Executed in it too: sympy imports most of itself, and fills its tables, only when first used.
WARM_UP = """
from sympy import Symbol, diff, integrate, limit, log, simplify, sin, solve
x = Symbol("x")
diff(x * log(x), x), integrate(x * log(x), x), limit(sin(x) / x, x, 0), solve(x**2 - 2, x)
simplify(sin(x)**2 + sin(x)**2)
"""
PACKAGE = Path(__file__).parent
RUNTIME = PACKAGE / ".runtime"
BUILD = PACKAGE / "runner/build.js"


class InstallError(Exception):
    """The message says what is wrong, and what to do next."""


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
    recipe = json.dumps([PYODIDE, PYODIDE_FILES, WHEELS, PRELOAD, WARM_UP])
    recipe += BUILD.read_text("utf-8")
    return hashlib.sha256(recipe.encode()).hexdigest()
