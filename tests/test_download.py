"""The ModelScope download, against a stand-in hub on loopback that speaks the SDK's protocol."""
import hashlib
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import modelscope_hub._download
import modelscope_hub._legacy_api
import pytest
from modelscope_hub.config import set_default_config

from benchmarks.loopback import JsonHandler
from dataset import download as download_module
from dataset.download import DownloadError, DownloadSettings, download, main

FILES = {
    "pretrain_hq.jsonl": b'{"text": "hello"}\n' * 40_000,
    "sft_mini_512.jsonl": b'{"conversations": []}\n' * 30_000,
    "README.md": b"# a data set\n",
}
FOLDER = "/api/v1/datasets/gongjy/minimind_dataset/repo"


class StandInHub(ThreadingHTTPServer):
    """Lists and serves FILES; can be told to break off, or to lie about sizes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StandInHandler)
        self.ranges: list[tuple[str, str | None]] = []  # (file, Range header) of each request
        self.break_off_after: int | None = None  # bytes after which connections are cut
        self.break_offs_left = 0
        self.listed_size_offset = 0


class StandInHandler(JsonHandler):
    server: StandInHub

    def do_GET(self) -> None:
        url = urlparse(self.path)
        query = parse_qs(url.query)
        if query.get("Revision") != ["master"]:
            return self.answer({"Code": 404, "Message": "no revision"}, 404)
        if url.path == f"{FOLDER}/tree":
            files = [{"Path": name, "Name": name, "Type": "blob",
                      "Size": len(body) + self.server.listed_size_offset,
                      "Sha256": hashlib.sha256(body).hexdigest()} for name, body in FILES.items()]
            return self.answer({"Code": 200, "Success": True, "Data": {"Files": files}})
        assert url.path == FOLDER, self.path
        self.send_file(query["FilePath"][0])

    def send_file(self, name: str) -> None:
        body, asked = FILES[name], self.headers.get("Range")
        self.server.ranges.append((name, asked))
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.server.break_offs_left:
            self.server.break_offs_left -= 1
            self.wfile.write(body[start:start + self.server.break_off_after])
            self.close_connection = True
        else:
            self.wfile.write(body[start:])


@pytest.fixture
def hub(monkeypatch) -> Iterator[StandInHub]:
    server = StandInHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    # The SDK's waits between attempts are minutes; small blocks so that a cut leaves a part.
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_MAX_DELAY_SECONDS", 0)
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Iterator[DownloadSettings]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    set_default_config(None)  # the SDK reads the environment once: let it read ours
    yield DownloadSettings(output_dir=str(tmp_path / "data"))
    set_default_config(None)


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_both_files_arrive_and_a_second_run_fetches_nothing(hub, settings, capsys):
    paths = download(settings)
    assert [path.name for path in paths] == ["pretrain_hq.jsonl", "sft_mini_512.jsonl"]
    wanted = {path.name: FILES[path.name] for path in paths}
    assert contents(settings.output_dir) == wanted, "no partial files or lock files stay"
    assert len(hub.ranges) == 2

    others = Path(settings.output_dir) / ".downloads" / "starter.zip"
    others.parent.mkdir()
    others.touch()
    download(settings)
    assert len(hub.ranges) == 2 and others.exists()
    assert capsys.readouterr().out.count("complete already") == 2


def test_other_files_can_be_asked_for(hub, settings):
    settings.files = ["README.md"]
    download(settings)
    assert contents(settings.output_dir) == {"README.md": FILES["README.md"]}
    settings.files = ["nothing.jsonl"]
    with pytest.raises(DownloadError, match="holds no nothing.jsonl; it has: pretrain_hq.jsonl"):
        download(settings)


def test_a_run_that_broke_off_is_resumed_by_the_next(hub, settings, monkeypatch):
    hub.break_off_after, hub.break_offs_left = 100_000, 1
    with monkeypatch.context() as patch:
        patch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_TIMES", 0)
        with pytest.raises(DownloadError, match="run the same command to go on"):
            download(settings)
    assert not (Path(settings.output_dir) / "pretrain_hq.jsonl").exists()
    assert hub.ranges == [("pretrain_hq.jsonl", None)]

    download(settings)
    name, asked = hub.ranges[1]
    assert name == "pretrain_hq.jsonl" and asked is not None
    assert 0 < int(asked.removeprefix("bytes=").removesuffix("-")) <= 100_000
    assert contents(settings.output_dir)["pretrain_hq.jsonl"] == FILES["pretrain_hq.jsonl"]


def test_a_broken_connection_heals_within_a_run(hub, settings):
    hub.break_off_after, hub.break_offs_left = 200_000, 2
    download(settings)
    assert [asked is None for _, asked in hub.ranges] == [True, False, False, True]
    assert contents(settings.output_dir)["pretrain_hq.jsonl"] == FILES["pretrain_hq.jsonl"]


def test_wrong_size_is_an_error_and_leaves_no_file(hub, settings):
    hub.listed_size_offset = 5
    with pytest.raises(DownloadError, match="wrong size or content"):
        download(settings)
    assert not list(Path(settings.output_dir).glob("*.jsonl"))


def test_wrong_content_is_an_error(hub, settings, monkeypatch):
    body = FILES["pretrain_hq.jsonl"]
    send_file = StandInHandler.send_file

    def corrupt(self, name):
        with monkeypatch.context() as patch:
            patch.setitem(FILES, name, b"X" + body[1:])
            send_file(self, name)
    monkeypatch.setattr(StandInHandler, "send_file", corrupt)
    with pytest.raises(DownloadError, match="wrong size or content"):
        download(settings)
    assert not list(Path(settings.output_dir).glob("*.jsonl"))


def test_a_file_of_the_user_is_kept_unless_told_otherwise(hub, settings):
    own = Path(settings.output_dir) / "pretrain_hq.jsonl"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="--overwrite"):
        download(settings)
    assert own.read_bytes() == b"mine" and not hub.ranges
    settings.overwrite = True
    download(settings)
    assert own.read_bytes() == FILES["pretrain_hq.jsonl"]


def test_full_disk_is_found_before_the_download(hub, settings, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match="GB free"):
        download(settings)
    assert not hub.ranges


def test_without_network_one_line_names_the_starter(settings, monkeypatch, capsys):
    monkeypatch.setattr(modelscope_hub._legacy_api, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("sys.argv", ["download.py", "--output_dir", settings.output_dir])
    with pytest.raises(SystemExit) as caught:
        main()
    message = str(caught.value)
    assert message.startswith("error: Cannot reach ModelScope") and "\n" not in message
    assert "python -m dataset.starter" in message
    assert capsys.readouterr().err == ""


def test_unknown_revision_is_named(hub, settings):
    settings.revision = "v9"
    with pytest.raises(DownloadError, match="v9"):
        download(settings)
