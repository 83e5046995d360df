"""Ending an answer before its time.

Gradio can cancel an event itself, but an update that is under way then still arrives, perhaps after
what replaced it. Here the answer is asked to end, and whoever asked waits until it has.
"""
import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager

from .client import Answer


class RunningAnswers:
    """The answers that come at this moment, at most one in each browser tab."""

    def __init__(self):
        self.by_tab: dict[str, tuple[asyncio.Event, asyncio.Event]] = {}

    @contextmanager
    def begin(self, tab: str) -> Iterator[asyncio.Event]:
        """Within this an answer comes, which should end when the event is set."""
        stopped, ended = asyncio.Event(), asyncio.Event()
        self.by_tab[tab] = stopped, ended
        try:
            yield stopped
        finally:
            ended.set()
            if self.by_tab.get(tab) == (stopped, ended):
                del self.by_tab[tab]

    async def stop(self, tab: str) -> None:
        """End the tab's answer, if there is one; returns when nothing more of it comes."""
        if tab in self.by_tab:
            stopped, ended = self.by_tab[tab]
            stopped.set()
            await ended.wait()


async def until(stopped: asyncio.Event, answers: AsyncIterator[Answer]) -> AsyncIterator[Answer]:
    """The newest of `answers` again and again, to the last of them or until `stopped` is set; then,
    and whenever this is closed, they are closed too.

    They are read as they come, however long each takes to show: or the times in them were not true.
    """
    newest, news = None, asyncio.Event()

    async def read() -> None:
        nonlocal newest
        async with aclosing(answers):
            async for newest in answers:
                news.set()

    reading, stopping = asyncio.create_task(read()), asyncio.create_task(stopped.wait())
    for task in (reading, stopping):
        task.add_done_callback(lambda _: news.set())
    try:
        while not stopped.is_set() and not reading.done():
            await news.wait()
            news.clear()
            if newest is not None and not stopped.is_set():
                yield newest
        if not stopped.is_set():
            reading.result()  # raises what ended them
            yield newest
    finally:
        reading.cancel()
        stopping.cancel()
        await asyncio.gather(reading, stopping, return_exceptions=True)
