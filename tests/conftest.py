"""What all tests share."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.loopback import JsonHandler


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about 15 s; CI runs it all the same")
    # A shell that starts the tests in the background lets them ignore Ctrl-C, and what the tests
    # start would inherit that: programs could then not show how they answer it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class StandIn(JsonHandler):
    """Repeats the question; calls the reply to 没完 cut off; the first request of all fails."""

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "x"}
            for name in self.server.served
        ]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.headers["Authorization"], request))
        if len(self.server.requests) == 1:
            self.answer({"error": {"message": "busy"}}, 503)
            return
        if request["model"] not in self.server.served:
            self.answer({"error": {"message": "no\nsuch model"}}, 404)
            return
        if self.server.together is not None:
            self.server.together.wait()
        question = request["messages"][-1]["content"]
        endless = question == "没完"
        self.answer({
            "id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{
                "index": 0, "finish_reason": "length" if endless else "stop",
                "message": {"role": "assistant", "content": f"我是缘梦：{question}"},
            }],
        })


@pytest.fixture
def endpoint_server():
    """A stand-in for `lmdeploy serve api_server`, on this machine only: `url`, `served` names,
    `requests` as they came, and `together`, a barrier that they wait at if there is one."""
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        server.served, server.requests, server.together = ["yuanmeng"], [], None
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """The browser that is installed, else the one that Playwright has fetched."""
    from playwright.sync_api import sync_playwright  # only where a page is tested

    from benchmarks.screenshots import BROWSER_OPTIONS, find_browser

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def quantized_server():
    return serve_in_4_bits


@contextmanager
def serve_in_4_bits(folder: Path, log: Path, *options: str
                    ) -> Iterator[tuple[subprocess.Popen, str]]:
    """The server's process and address, once it listens: 4-bit weights, 4-bit cache. Afterwards it
    is dead, and has written no stack trace into its log."""
    root = Path(__file__).parents[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, root / "lmdeploy_cli.py", "serve", "api_server", folder,
             "--quant-policy", "4", "--chat-template", "chat_templates.json", "--model-name",
             "yuanmeng", "--server-port", str(port), *options],
            cwd=root, stdout=output, stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            if "Uvicorn running on" in log.read_text() or server.poll() is not None:
                break
            time.sleep(0.1)
        assert f"Uvicorn running on {address}" in log.read_text(), log.read_text()
        yield server, address
    finally:
        server.kill()
        server.wait()
    assert "Traceback" not in log.read_text(), log.read_text()
