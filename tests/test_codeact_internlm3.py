"""InternLM3 from ModelScope, against a stand-in hub on loopback that speaks the SDK's protocol."""
import hashlib
import re
import shlex
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import modelscope_hub._download
import pytest
from modelscope_hub.config import set_default_config

from benchmarks.loopback import JsonHandler
from codeact import internlm3
from codeact.internlm3 import MODEL, FetchError, FetchSettings, fetch, main

FILES = {"config.json": b'{"model_type": "internlm3"}', "modeling_internlm3.py": b"# code\n",
         "model.safetensors": bytes(range(256)) * 400}
API = f"/api/v1/models/{MODEL}/repo"


class StandInHub(JsonHandler):
    def do_GET(self) -> None:
        url = urlparse(self.path)
        query = parse_qs(url.query)
        if url.path == f"{API}/files" and query["Revision"] == ["master"]:
            files = [{"Path": name, "Name": name, "Type": "blob", "Size": len(body),
                      "Sha256": hashlib.sha256(body).hexdigest()} for name, body in FILES.items()]
            self.answer({"Code": 200, "Success": True, "Data": {"Files": files}})
        elif url.path == API:
            name = query["FilePath"][0]
            self.server.fetched.append(name)
            start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            self.answer(FILES[name][start:], 206 if start else 200)
        else:
            self.answer({"Code": 404, "Success": False, "Message": "no such thing"}, 404)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    server.fetched = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_MAX_DELAY_SECONDS", 0)
    monkeypatch.chdir(tmp_path)
    set_default_config(None)  # the SDK reads the environment once: let it read ours
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    set_default_config(None)


def test_the_model_arrives_where_the_command_that_is_printed_serves_it(hub, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["internlm3"])
    main()
    printed = capsys.readouterr().out
    folder = Path(MODEL)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    command = shlex.split(re.search(r"^python (.*)$", printed, re.MULTILINE)[1])
    assert command == ["lmdeploy_cli.py", "serve", "api_server", MODEL, "--quant-policy", "4",
                       "--trust-remote-code"]
    fetched = len(hub.fetched)
    main()
    assert len(hub.fetched) == fetched == len(FILES)  # all is there: nothing is fetched again


def test_an_unknown_model_or_revision_is_one_line(hub):
    for settings in (FetchSettings(model="no/such"), FetchSettings(revision="other")):
        with pytest.raises(FetchError, match="from ModelScope: ") as caught:
            fetch(settings)
        assert "\n" not in str(caught.value)


def test_nobody_at_the_hub_is_one_line(hub):
    hub.server_close()
    hub.shutdown()
    with pytest.raises(FetchError, match="from ModelScope: .*run the same command"):
        fetch(FetchSettings())


def test_a_full_disk_is_noticed_before(hub, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(internlm3.shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(FetchError, match=r"needs 0\.00 GB more, but the disk of .* has 0\.00 GB"):
        fetch(FetchSettings())
    assert hub.fetched == []
