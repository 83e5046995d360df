"""An OpenAI-style endpoint on this machine that streams what it is told: for tests of the agent and
for measuring what the agent costs beside a model."""
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer

from benchmarks.loopback import JsonHandler

MODEL = "scripted/model"
PIECE = re.compile(r"\s*\S{1,4}|\s+")  # about as long as a token


@dataclass(frozen=True)
class Reply:
    """What a request gets: a text in pieces, or an error."""

    text: str = ""
    status: int = 200
    break_after: int | None = None  # pieces, then the connection is cut
    endless: bool = False  # the text again and again


@dataclass
class Script:
    """How the endpoint behaves, and what it was asked."""

    reply: Callable[[list[dict]], Reply | str]  # from the messages of the request
    pieces_per_second: float | None = None  # None: as fast as it can
    models: list[dict] = field(default_factory=lambda: [{"id": MODEL}])
    key: str = "none"
    requests: list[dict] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)  # a client went away early


class Handler(JsonHandler):
    protocol_version = "HTTP/1.1"  # with chunks, so that an end is told from a break

    def do_GET(self) -> None:
        models = [{"object": "model", "created": 0, "owned_by": "x", **model}
                  for model in self.server.script.models]
        self.answer({"object": "list", "data": models})

    def do_POST(self) -> None:
        script: Script = self.server.script
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {script.key}":
            self.answer({"error": {"message": "wrong key"}}, 401)
            return
        script.requests.append(request)
        reply = script.reply(request["messages"])
        reply = Reply(reply) if isinstance(reply, str) else reply
        if reply.status != 200:
            self.answer({"error": {"message": reply.text}}, reply.status)
            return
        try:
            self.stream(reply, script.pieces_per_second)
        except ConnectionError:
            script.left.set()
            self.close_connection = True

    def stream(self, reply: Reply, pieces_per_second: float | None) -> None:
        self.begin_stream()
        start = time.perf_counter()
        for number, piece in enumerate(pieces_of(reply)):
            if number == reply.break_after:
                self.close_connection = True
                return
            if pieces_per_second:
                time.sleep(max(0, start + number / pieces_per_second - time.perf_counter()))
            self.event({"index": 0, "delta": {"role": "assistant", "content": piece}})
        self.event({"index": 0, "delta": {}, "finish_reason": "stop"})
        self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def event(self, choice: dict) -> None:
        content = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": MODEL,
                   "choices": [choice]}
        self.chunk(f"data: {json.dumps(content)}\n\n")


def pieces_of(reply: Reply) -> Iterator[str]:
    while True:
        yield from PIECE.findall(reply.text)
        if not reply.endless:
            return


def in_order(*replies: Reply | str) -> Callable[[list[dict]], Reply | str]:
    """A script's `reply`: one after the other, whatever is asked."""
    rest = iter(replies)
    return lambda messages: next(rest, Reply("the script has ended", 400))


@contextmanager
def scripted_endpoint(script: Script, port: int = 0) -> Iterator[str]:
    """Serves the script on 127.0.0.1; gives the URL."""
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads, server.script = True, script
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
