"""The sandbox that an agent uses: conversations, each with a process of its own, and a spare one.

    async with Sandbox([derivative]) as sandbox:
        observation = await sandbox.run("x = 2\nprint(x)", conversation="one")

Notable: the next conversation finds a process that is ready (`spare`); one that is idle too long,
or in the way of another, is ended, and its next step says so (`state_lost`).
"""
import asyncio
import dataclasses
import time
from collections.abc import Iterable

from codeact.interpreter import Interpreter, Observation, SandboxError
from codeact.limits import Limits
from codeact.tools import ToolLike, make_tools

__all__ = ["Limits", "Observation", "Sandbox", "SandboxError"]


REMEMBERED = 10_000  # conversations without a process of which we know that they had one


@dataclasses.dataclass
class Conversation:
    """What the sandbox knows of one."""

    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)  # held during a step
    interpreter: Interpreter | None = None
    lost: bool = False  # its process was ended since its last step
    used: float = 0.0  # when its last step ended
    ended: bool = False  # by `end`, which a step may be in the middle of


class Sandbox:
    """An async context manager; it lives in one event loop.

    Args:
        tools: functions, async functions, BaseTools; see codeact/tools.py.
        limits: what a conversation may use.
        spare: keep one process ready for the next conversation.
    Raises:
        ValueError, TypeError: one of the tools can be no tool.
    """

    def __init__(self, tools: Iterable[ToolLike] = (), limits: Limits = Limits(),
                 spare: bool = True):
        self.tools, self.limits, self.keeps_spare = make_tools(tools), limits, spare
        self.conversations: dict[str, Conversation] = {}
        self.spare: asyncio.Task[Interpreter] | None = None
        self.sweeper: asyncio.Task | None = None
        self.closed = False

    async def __aenter__(self) -> "Sandbox":
        self.prepare_spare()
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

    async def run(self, code: str, conversation: str = "default") -> Observation:
        """Execute a step of a conversation; the variables of its earlier steps are there.

        Raises:
            SandboxError: no process could be started; the message says why.
            asyncio.CancelledError: the process is gone then, and with it the variables.
        """
        if self.closed:
            raise SandboxError("this sandbox is closed")
        entry = self.conversations.setdefault(conversation, Conversation())
        async with entry.lock:
            lost = entry.lost
            if entry.interpreter is not None and not entry.interpreter.alive:
                self.drop(entry)  # ended by something from outside
                lost = True
            if entry.interpreter is None:
                self.make_room()
                entry.interpreter = await self.ready_interpreter()
            if entry.ended:
                self.drop(entry)
                raise SandboxError("the conversation was ended before its step began")
            entry.lost = False
            try:
                observation = await entry.interpreter.run(code)
            except BaseException:
                self.drop(entry)
                raise
            entry.used = time.monotonic()
            if observation.state_lost or entry.ended:
                self.drop(entry)
                entry.lost = False  # this observation says it already
            self.start_sweeper()
            if lost and not observation.state_lost:
                observation = dataclasses.replace(observation, state_lost=True)
            return observation

    async def end(self, conversation: str) -> None:
        """Forget a conversation. Its process is gone when this returns; a step that runs is cut
        short, and says that its state is lost."""
        entry = self.conversations.pop(conversation, None)
        if entry is not None:
            entry.ended = True
            if entry.interpreter is not None:
                entry.interpreter.kill()

    async def close(self) -> None:
        """End every process; they are gone when this returns."""
        self.closed = True
        for name in list(self.conversations):
            await self.end(name)
        tasks = [task for task in (self.spare, self.sweeper) if task is not None]
        if self.spare is not None:
            discard(self.spare)
        if self.sweeper is not None:
            self.sweeper.cancel()
        self.spare = self.sweeper = None
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- Processes --------------------------------------------------------------------------

    async def ready_interpreter(self) -> Interpreter:
        """The spare one, or a new one; and another is made ready meanwhile."""
        spare, self.spare = self.spare, None
        if spare is None:
            interpreter = await self.new_interpreter()
        else:
            try:
                interpreter = await spare  # cancelled with us, and then ends its process
            except BaseException:
                discard(spare)  # it may have become ready at that very moment
                raise
            if not interpreter.alive:
                interpreter = await self.new_interpreter()
        self.prepare_spare()
        return interpreter

    async def new_interpreter(self) -> Interpreter:
        interpreter = Interpreter(self.tools, self.limits)
        await interpreter.start()
        return interpreter

    def prepare_spare(self) -> None:
        if self.keeps_spare and self.spare is None and not self.closed:
            self.spare = asyncio.ensure_future(self.new_interpreter())

    def drop(self, entry: Conversation) -> None:
        if entry.interpreter is not None:
            entry.interpreter.kill()
            entry.interpreter, entry.lost = None, True

    def make_room(self) -> None:
        """End the process that is idle longest, if there are as many as there may be."""
        forgotten = [name for name, entry in self.conversations.items()
                     if entry.interpreter is None and not entry.lock.locked()]
        for name in forgotten[:-REMEMBERED]:
            del self.conversations[name]
        living = [entry for entry in self.conversations.values() if entry.interpreter is not None]
        if len(living) < self.limits.conversations:
            return
        idle = [entry for entry in living if not entry.lock.locked()]
        if not idle:
            raise SandboxError(f"all {len(living)} conversations are running code; try again "
                               "later, or raise Limits.conversations")
        self.drop(min(idle, key=lambda entry: entry.used))

    def start_sweeper(self) -> None:
        if self.sweeper is None or self.sweeper.done():
            self.sweeper = asyncio.ensure_future(self.sweep())

    async def sweep(self) -> None:
        """End the processes that have been idle too long, for as long as there are any."""
        while living := [entry for entry in self.conversations.values() if entry.interpreter]:
            for entry in living:
                idle = time.monotonic() - entry.used
                if not entry.lock.locked() and idle > self.limits.idle_seconds:
                    self.drop(entry)
            await asyncio.sleep(min(self.limits.idle_seconds / 4, 10.0))


def discard(spare: asyncio.Task[Interpreter]) -> None:
    """End the process of a task that starts one, whether or not it is ready by now."""
    if not spare.done():
        spare.cancel()
    elif not spare.cancelled() and spare.exception() is None:
        spare.result().kill()
