"""What all tests share."""

import json
import signal
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

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
