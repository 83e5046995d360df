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
    """`answers` until `stopped` is set, even while the next one is waited for; then, and whenever
    this is closed, they are closed too."""
    stopping = piece = asyncio.ensure_future(stopped.wait())
    async with aclosing(answers):
        try:
            while True:
                piece = asyncio.ensure_future(anext(answers, None))
                await asyncio.wait({piece, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if stopped.is_set() or (answer := piece.result()) is None:
                    return
                yield answer
        finally:
            piece.cancel()
            stopping.cancel()
            await asyncio.gather(piece, stopping, return_exceptions=True)
