"""The two hubs that hold the data set, behind one interface: what they list, and one file of it.

The work is done by their own libraries, which also know the user's token and mirror:

    ModelScope     MODELSCOPE_API_TOKEN or `modelscope login`;  MODELSCOPE_ENDPOINT
    Hugging Face   HF_TOKEN or `hf auth login`;                 HF_ENDPOINT

Whatever goes wrong becomes a `DownloadError` of one line that says what to do next.
"""
import logging
from dataclasses import dataclass
from pathlib import Path

import httpx
import requests
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from huggingface_hub.utils.sha import sha_fileobj
from modelscope_hub import HubApi
from modelscope_hub.errors import FileIntegrityError, HubError

from dataset.catalog import REPOSITORIES

STARTER_HINT = "or build the offline corpus, without a hub: python -m dataset.starter"
KEPT = "What has arrived is kept: run the same command to go on"
LIST_TIMEOUT_S = 30
LOCK_TIMEOUT_S = 1


class DownloadError(Exception):
    """The download cannot go on; the message says why, and what to do next."""


class WrongContent(Exception):
    """What arrived is not what the hub lists."""


@dataclass(frozen=True)
class Entry:
    """A file in a hub's listing; `sha256` where the hub knows it (large files)."""

    name: str
    size: int
    sha256: str | None


class Hub:
    """A hub; subclasses ask its library and let its exceptions through."""

    name: str  # on the command line
    title: str
    repository: str
    revision: str  # the default one
    other: str  # the other hub's name
    login: str  # how to show who one is
    failures: tuple[type[Exception], ...]

    def listing(self, revision: str) -> dict[str, Entry]:
        """The files of the repository by their names. Raises `DownloadError`."""
        try:
            return {entry.name: entry for entry in self._list(revision)}
        except self.failures as error:
            status = status_of(error)
            if status == 404:
                raise DownloadError(f"{self.title} has no {self.repository} at revision "
                                    f"{revision}, or does not show it (404). "
                                    f"{self._elsewhere()}") from error
            if status in (401, 403, 429):
                raise self._refused(status, error) from error
            raise DownloadError(f"Cannot reach {self.title} ({reason(error)}). "
                                f"{self._elsewhere()}") from error

    def fetch(self, entry: Entry, revision: str, folder: Path) -> Path:
        """Fetch one file into `folder`, going on from what an earlier call left there.

        Returns where it is, checked against the listing. Raises `DownloadError`.
        """
        try:
            return self._fetch(entry, revision, folder)
        except WrongContent as error:
            raise DownloadError(f"{entry.name} arrived with the wrong size or content ({error}). "
                                f"Try again later, {STARTER_HINT}") from error
        except (*self.failures, OSError) as error:
            if (status := status_of(error)) in (401, 403, 429):
                raise self._refused(status, error) from error
            raise DownloadError(f"The download of {entry.name} stopped ({reason(error)}). {KEPT}, "
                                f"{STARTER_HINT}") from error

    def partial(self, entry: Entry, folder: Path) -> Path:
        """Where the part of a file that has arrived lies."""
        raise NotImplementedError

    def _list(self, revision: str) -> list[Entry]:
        raise NotImplementedError

    def _fetch(self, entry: Entry, revision: str, folder: Path) -> Path:
        raise NotImplementedError

    def _elsewhere(self) -> str:
        return f"Try again later, try --hub {self.other}, {STARTER_HINT}"

    def _refused(self, status: int, error: Exception) -> DownloadError:
        if status == 429:
            return DownloadError(f"{self.title} has had too many requests from here (429). {KEPT} "
                                 f"in some minutes, try --hub {self.other}, {STARTER_HINT}")
        return DownloadError(
            f"{self.title} refuses {self.repository} ({status}): it is private, asks for consent "
            f"on its page, or the token is wrong. {self.login}; try --hub {self.other}, "
            f"{STARTER_HINT}")


class ModelScope(Hub):
    """ModelScope's SDK resumes, retries and checks by itself."""

    name, other, title = "modelscope", "huggingface", "ModelScope"
    repository = REPOSITORIES[name]
    revision = "master"
    login = "Set MODELSCOPE_API_TOKEN or run `modelscope login`"
    failures = (HubError, requests.RequestException, ValueError)

    def _list(self, revision: str) -> list[Entry]:
        log = logging.getLogger("modelscope_hub")
        log.setLevel(logging.ERROR)  # it reports each attempt; one line from us is clearer
        files = HubApi().list_repo_files(self.repository, "dataset", revision=revision)
        log.setLevel(logging.WARNING)  # from here on an attempt may take minutes: do say so
        return [Entry(file.path, file.size or 0, file.sha256) for file in files
                if file.type == "blob"]

    def partial(self, entry: Entry, folder: Path) -> Path:
        return folder / f"{entry.name}.incomplete"

    def _fetch(self, entry: Entry, revision: str, folder: Path) -> Path:
        try:
            HubApi().download_file(
                self.repository, "dataset", entry.name, revision=revision, local_dir=folder,
                cache_dir=folder,  # its lock file
                file_size=entry.size, expected_sha256=entry.sha256)
        except FileIntegrityError as error:
            raise WrongContent(reason(error)) from error
        return folder / entry.name


class HuggingFace(Hub):
    """`huggingface_hub` retries and resumes within a run; going on after one is done here.

    `hf_hub_download` has thrown away what it had when it was interrupted since version 1.18: with
    files of gigabytes and lines that break that is no way to the end. So its `http_get` appends to
    a file of ours. The hub redirects each request to a fresh address, whose age does not matter.
    """

    name, other, title = "huggingface", "modelscope", "Hugging Face"
    repository = REPOSITORIES[name]
    revision = "main"
    login = "Set HF_TOKEN or run `hf auth login`"
    failures = (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, KeyError, TypeError)

    def _list(self, revision: str) -> list[Entry]:
        info = HfApi().dataset_info(self.repository, revision=revision, files_metadata=True,
                                    timeout=LIST_TIMEOUT_S)
        return [Entry(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
                for file in info.siblings or []]

    def partial(self, entry: Entry, folder: Path) -> Path:
        version = (entry.sha256 or str(entry.size))[:16]  # a new version begins anew
        return folder / f"{entry.name}.{version}.incomplete"

    def _fetch(self, entry: Entry, revision: str, folder: Path) -> Path:
        path = self.partial(entry, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        url = hf_hub_url(self.repository, entry.name, repo_type="dataset", revision=revision,
                         endpoint=HfApi().endpoint)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # ranges count bytes
        try:
            with WeakFileLock(f"{path}.lock", timeout=LOCK_TIMEOUT_S), path.open("ab") as file:
                if file.tell() < entry.size:
                    http_get(url, file, resume_size=file.tell(), headers=headers,
                             displayed_filename=entry.name)
        except TimeoutError as error:  # the lock's; those of the network are others
            raise DownloadError(f"Another download of {entry.name} is running: wait for it, or "
                                f"end it ({path}.lock).") from error
        except HfHubHTTPError as error:
            if error.response.status_code != 416:  # no more bytes there: it is looked at below
                raise
        fault = content_fault(path, entry)
        if fault is not None:
            path.unlink()
            raise WrongContent(fault)
        return path


HUBS: dict[str, Hub] = {hub.name: hub for hub in (ModelScope(), HuggingFace())}


def content_fault(path: Path, entry: Entry) -> str | None:
    """Say how a file differs from the listing, or None; reads it whole if there is a SHA-256."""
    if (size := path.stat().st_size) != entry.size:
        return f"{size:,} bytes, {entry.size:,} are listed"
    if entry.sha256 is not None:
        with path.open("rb") as file:
            found = sha_fileobj(file).hex()
        if found != entry.sha256:
            return f"SHA-256 {found}, {entry.sha256} is listed"
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error, or what caused it, carries."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        status = getattr(cause, "status_code", None) or getattr(response, "status_code", None)
        if status is not None:
            return status
    return None


def reason(error: BaseException) -> str:
    """The root of the matter in one line: each library wraps it once more."""
    root = causes(error)[-1]
    text = " ".join(str(root).split()) or type(root).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


def causes(error: BaseException) -> list[BaseException]:
    """The error, its cause, the cause of that, and so on; an error that was raised again while
    it was handled would lead in a circle, and ends there.
    """
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) and inner not in chain:
        chain.append(inner)
    return chain
