"""python -m codeact.install: whole or not at all, once, and one line for each trouble.

Nothing is fetched here: where a test needs the real files, it copies those that setup.sh fetched.
"""
import asyncio
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from codeact import install, process, runtime
from codeact.install import InstallError, InstallSettings
from codeact.sandbox import Sandbox, SandboxError

ROOT = Path(__file__).resolve().parents[1]
REAL = runtime.RUNTIME


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Install into a folder of the test's, with the files that are here in place of a download."""
    for module in (install, runtime, process):
        monkeypatch.setattr(module, "RUNTIME", tmp_path / ".runtime")
    monkeypatch.setattr(install, "PACKAGE", tmp_path)

    def copy(kind):
        def fetch(*arguments):
            for path in (REAL / kind).iterdir():
                if kind == "pyodide" or path.name.startswith(("sympy-", "mpmath-")):
                    shutil.copy(path, arguments[-1])
        return fetch

    monkeypatch.setattr(install, "fetch_pyodide", copy("pyodide"))
    monkeypatch.setattr(install, "fetch_wheels", copy("wheels"))
    return tmp_path


def wheel(folder: Path, name: str, source: str = "VALUE = 42\n") -> Path:
    """A wheel with one module, `tiny`."""
    path = folder / name
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny.py", source)
        file.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\n")
    return path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".whl")


def test_a_second_run_changes_nothing():
    before = (REAL / "installed.json").stat().st_mtime_ns
    done = subprocess.run([sys.executable, "-m", "codeact.install"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("The sandbox is set up: Pyodide 314.0.7 with mpmath, sympy")
    assert done.stdout.count("\n") == 1
    assert (REAL / "installed.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_wheel_is_added_in_one_line_and_stays(elsewhere, capsys):
    added = wheel(elsewhere, "tiny-1.0-py3-none-any.whl")
    install.install(InstallSettings(add=str(added)))
    assert "mpmath, sympy, tiny." in capsys.readouterr().out
    assert left(elsewhere) == [".install.lock", ".runtime"]

    async def main():
        async with Sandbox(spare=False) as sandbox:
            return [await sandbox.run(code) for code in (
                "import tiny, sympy\ntiny.VALUE", "import np")]

    good, missing = asyncio.run(main())
    assert good.output == "42\n" and missing.error.endswith("library and mpmath, sympy, tiny.")
    damaged = elsewhere / ".runtime/built/snapshot.bin"  # cut off: the next run builds it anew
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(InstallError, match="is not set up: python -m codeact.install"):
        runtime.check_installed()
    install.install(InstallSettings())
    assert "tiny" in runtime.check_installed()["packages"]


@pytest.mark.parametrize("name, message", [
    ("tiny-1.0-cp314-cp314-linux_x86_64.whl", "is not a pure Python wheel"),
    ("tiny-1.0-py3-none-any.whl", "is not a pure Python wheel"),
])
def test_what_is_no_pure_wheel_is_refused(elsewhere, name, message):
    path = wheel(elsewhere, name)
    if "none-any" in name:
        path.write_text("no zip")
    with pytest.raises(InstallError, match=message):
        install.install(InstallSettings(add=str(path)))
    assert left(elsewhere) == [".install.lock"]


def test_a_failed_build_leaves_what_was_there(elsewhere, monkeypatch):
    old = elsewhere / ".runtime"
    old.mkdir()
    (old / "marker").write_text("old")
    broken = elsewhere / "build.js"
    broken.write_text("throw new Error('cannot build')")
    monkeypatch.setattr(install, "BUILD", broken)
    with pytest.raises(InstallError, match="Pyodide could not be started.*cannot build"):
        install.install(InstallSettings())
    assert (old / "marker").read_text() == "old"
    assert left(elsewhere) == [".install.lock", ".runtime", "build.js"]


def test_a_registry_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(InstallError, match="npm's registry cannot be reached") as caught:
            install.fetch_pyodide(runtime.find_deno(), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_the_expected_one_is_refused(tmp_path, monkeypatch):
    def fetched(words, trouble, folder=None, environment=None):
        shutil.copytree(REAL / "pyodide", Path(folder) / "node_modules/pyodide")
        with open(Path(folder) / "node_modules/pyodide/pyodide.asm.wasm", "ab") as file:
            file.write(b"\0")

    monkeypatch.setattr(install, "command", fetched)
    with pytest.raises(InstallError, match="pyodide.asm.wasm did not arrive whole"):
        install.fetch_pyodide(runtime.find_deno(), tmp_path)


def test_the_files_that_are_here_are_the_expected_ones():
    for name, expected in runtime.PYODIDE_FILES.items():
        assert install.hash_of(REAL / "pyodide" / name) == expected
    hashes = {install.hash_of(path) for path in (REAL / "wheels").iterdir()}
    assert set(runtime.WHEELS.values()) <= hashes


def test_a_sandbox_that_is_not_set_up_says_what_to_do(elsewhere):
    async def main():
        async with Sandbox(spare=False) as sandbox:
            await sandbox.run("1")

    with pytest.raises(SandboxError, match="^the sandbox is not set up: "
                                           "python -m codeact.install$"):
        asyncio.run(main())
    (elsewhere / ".runtime").mkdir()
    (elsewhere / ".runtime/installed.json").write_text("[")
    with pytest.raises(SandboxError, match="is not set up"):
        asyncio.run(main())


def test_without_deno_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InstallError, match="^Deno is not there: pip install"):
        runtime.find_deno()
