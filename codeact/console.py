"""The agent in a terminal: what it writes as it writes it, what its code has printed in a box."""
import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from training.terminal import note

from .agents import Agents, language_of
from .context import ContextFull
from .endpoint import EndpointError
from .graph import Event, ask
from .sandbox import SandboxError

WIDTH = 80
TITLE = " System Message "


class Screen:
    """Puts events on a screen. Blank space that ends a message is held back: what follows decides
    how many lines there are between."""

    def __init__(self, show: Callable[[str], None]):
        self.show, self.held = show, ""
        self.forgotten = ""  # as it was last said

    def write(self, text: str) -> None:
        text = self.held + text
        said = text.rstrip()
        self.show(said)
        self.held = text[len(said):]

    def event(self, event: Event) -> None:
        if event.kind == "token":
            self.write(event.text)
        elif event.kind == "observation":
            self.held = ""
            self.show(f"\n\n{box(event.text)}\n\n")
        elif event.kind == "limit":
            self.held = ""
            self.show(f"\n\n{event.text}")
        elif event.kind == "retry":
            self.held = ""
            self.show("\n")
            note(f"{event.text}; asking again")
        elif event.kind == "forgotten" and event.text != self.forgotten:
            self.forgotten = event.text
            note(f"the context is full: {event.text} earlier messages were left out")


def box(text: str) -> str:
    """The System Message: a title between stars, the text, a line of stars."""
    return f"{TITLE:*^{WIDTH}}\n\n{text}\n\n{'*' * WIDTH}"


@dataclass
class Run:
    """What came of a question, for `--trace`."""

    question: str
    language: str
    events: list[dict]
    answer: str | None = None
    error: str | None = None
    seconds: float = 0.0

    def add(self, event: Event, seconds: float) -> None:
        """Keep an event; the pieces of a message become one entry."""
        if event.kind == "token" and self.events and self.events[-1]["kind"] == "message":
            self.events[-1]["text"] += event.text
            return
        kind = "message" if event.kind == "token" else event.kind
        if event.kind in ("answer", "limit"):
            self.answer = event.text
        self.events.append(
            {"kind": kind, "text": event.text, "step": event.step, "seconds": round(seconds, 3)}
        )


class AgentChat:
    """A conversation with the agent, for `training.terminal.talk`.

    The event loop has a thread of its own: the sandbox is looked after while the user types, and
    Ctrl-C ends a run as it ends any other call.
    """

    def __init__(self, agents: Agents, loop: "Loop", settings: Any, conversation: str,
                 keep: Callable[[list[Run]], None]):
        self.agents, self.loop, self.settings = agents, loop, settings
        self.conversation, self.cleared, self.keep = conversation, 0, keep
        self.runs: list[Run] = []

    def clear(self) -> None:
        """Forget the conversation, its variables included."""
        self.loop.run(self.agents.sandbox.end(self.thread()))
        self.agents.has_run.discard(self.thread())
        self.cleared += 1

    def thread(self) -> str:
        return f"{self.conversation}-{self.cleared}" if self.cleared else self.conversation

    def reply(self, text: str, show: Callable[[str], None]) -> str:
        """Answer `text` on the screen; returns a line about the time it took."""
        language = language_of(text) if self.settings.language == "auto" else self.settings.language
        run, start = Run(text, language, []), time.perf_counter()
        self.runs.append(run)
        try:
            self.loop.run(self.follow(run, Screen(show)))
        except (EndpointError, ContextFull, SandboxError) as error:
            run.error = str(error)
            if not sys.stdin.isatty() or self.settings.question is not None:
                raise
            note(run.error)  # the user may start the server and ask again
        except KeyboardInterrupt:
            run.error = "interrupted"
            raise
        finally:
            run.seconds = round(time.perf_counter() - start, 3)
            self.keep(self.runs)
        steps = sum(event["kind"] == "observation" for event in run.events)
        return f"code was run {steps} times; {run.seconds:.2f} s in all"

    async def follow(self, run: Run, screen: Screen) -> None:
        start = time.perf_counter()
        events: AsyncIterator[Event] = ask(
            self.agents.agent(run.language), run.question, self.thread()
        )
        async with aclosing(events):
            async for event in events:
                run.add(event, time.perf_counter() - start)
                screen.event(event)


class Loop:
    """An event loop in a thread, with calls that Ctrl-C can end."""

    def __init__(self):
        self.ready = threading.Event()

    async def live(self) -> None:
        """Run until `left` is set; asyncio.run then ends what is still going on."""
        self.loop, self.left = asyncio.get_running_loop(), asyncio.Event()
        self.ready.set()
        await self.left.wait()

    def run(self, coroutine: Coroutine) -> Any:
        """The coroutine's result. Ctrl-C cancels it, and is raised when it has ended."""
        async def start() -> asyncio.Task:
            return asyncio.create_task(coroutine)

        task = asyncio.run_coroutine_threadsafe(start(), self.loop).result()
        ended = asyncio.run_coroutine_threadsafe(asyncio.wait([task]), self.loop)
        try:
            ended.result()
        except KeyboardInterrupt:
            self.loop.call_soon_threadsafe(task.cancel)
            ended.result()
            raise
        return task.result()


@contextmanager
def running_loop() -> Iterator[Loop]:
    """A loop that runs, and has ended all that is in it when this is left."""
    loop = Loop()
    thread = threading.Thread(target=lambda: asyncio.run(loop.live()), daemon=True)
    thread.start()
    loop.ready.wait()
    try:
        yield loop
    finally:
        loop.loop.call_soon_threadsafe(loop.left.set)
        thread.join()
