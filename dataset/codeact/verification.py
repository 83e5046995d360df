"""Running the code of conversations in the sandbox: what it prints becomes what the model reads.

A process for each conversation would take a second each. Here a process runs one after the other
and forgets all variables between them; the numbers of the steps in tracebacks are counted from the
beginning of the conversation, as in a process of its own (tests/test_codeact_data.py compares).
"""
import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace

from codeact.prompts import describe_output, system_prompt
from codeact.sandbox import Observation, Sandbox

from .conversations import Conversation, Turn
from .facts import says

CONVERSATIONS_PER_PROCESS = 2000  # bounds what a process piles up
REMEMBER = "_kept = {*globals(), '_kept'}"
FORGET = "for _name in {*globals()} - _kept: del globals()[_name]"
STEP = re.compile(r"<step (\d+)>")


class WrongTask(Exception):
    """The code did not do what the task says; the message is the reason."""


@dataclass
class Process:
    """One process of the sandbox, used for many conversations in turn."""

    sandbox: Sandbox
    name: str
    steps: int = 0  # that it has run
    conversations: int = 0

    async def run(self, code: str) -> Observation:
        self.steps += 1
        return await self.sandbox.run(code, self.name)

    async def begin(self) -> None:
        """Nothing of the conversation before is left."""
        if self.conversations >= CONVERSATIONS_PER_PROCESS:
            await self.end()
        await self.run(FORGET if self.conversations else REMEMBER)
        self.conversations += 1

    async def end(self) -> None:
        await self.sandbox.end(self.name)
        self.steps = self.conversations = 0


def fenced(code: str) -> str:
    """Code as the assistant says it."""
    return f"```python\n{code}\n```"


async def messages_of(
    conversation: Conversation, process: Process, tools: Sequence
) -> list[list[dict]]:
    """The messages, a list for the system line and one for each turn.

    Raises:
        WrongTask: the code fails or prints something else than it should, or a mistake works.
    """
    await process.begin()
    first_step = process.steps
    own_tools = tools if conversation.has_tools else ()
    system = system_prompt(own_tools, conversation.prompt_language, short=True)
    parts = [[{"role": "system", "content": system}]]
    for turn in conversation.turns:
        parts.append(await messages_of_turn(turn, conversation, process, first_step))
    return parts


async def messages_of_turn(
    turn: Turn, conversation: Conversation, process: Process, first_step: int
) -> list[dict]:
    messages = [{"role": "user", "content": turn.question}]
    if turn.task.code is None:
        return [*messages, {"role": "assistant", "content": turn.answer}]

    async def step(code: str, **flags) -> Observation:
        observation = await process.run(code)
        if observation.state_lost:
            await process.end()
            raise WrongTask("the process ended")
        observation = renumbered(observation, first_step)
        text = describe_output(observation, conversation.prompt_language)
        messages.append({"role": "assistant", "content": fenced(code), **flags})
        messages.append({"role": "user", "content": text})
        return observation

    if turn.mistaken is not None:
        observation = await step(turn.mistaken, learn=False)
        if observation.error is None:
            raise WrongTask("the mistake works")
    observation = await step(turn.task.code)
    if observation.error is not None:
        raise WrongTask(observation.error.splitlines()[-1])
    output = observation.output.strip()
    if not says(output, turn.task.numbers, turn.task.texts):
        raise WrongTask(f"{turn.task.code!r} printed {output!r}, "
                        f"not {turn.task.numbers or turn.task.texts}")
    messages.append({"role": "assistant", "content": turn.answer.format(output=output)})
    return messages


def renumbered(observation: Observation, first_step: int) -> Observation:
    """The steps in a traceback counted from the beginning of this conversation."""
    if observation.error is None:
        return observation
    error = STEP.sub(lambda match: f"<step {int(match[1]) - first_step}>", observation.error)
    return replace(observation, error=error)


async def verified(
    conversations: Iterable[Conversation], sandbox: Sandbox, tools: Sequence, workers: int
) -> AsyncIterator[tuple[Conversation, list[list[dict]] | WrongTask]]:
    """Each conversation, in order, with its messages or why it is none. `workers` processes."""
    free: asyncio.Queue[Process] = asyncio.Queue()
    for number in range(workers):
        free.put_nowait(Process(sandbox, f"worker {number}"))

    async def work(conversation: Conversation) -> list[list[dict]] | WrongTask:
        process = await free.get()
        try:
            return await messages_of(conversation, process, tools)
        except WrongTask as reason:
            return reason
        finally:
            free.put_nowait(process)

    running: deque[tuple[Conversation, asyncio.Task]] = deque()
    try:
        for conversation in conversations:
            running.append((conversation, asyncio.ensure_future(work(conversation))))
            if len(running) >= 8 * workers:
                first, task = running.popleft()
                yield first, await task
        while running:
            first, task = running.popleft()
            yield first, await task
    finally:
        for _, task in running:
            task.cancel()
        await asyncio.gather(*(task for _, task in running), return_exceptions=True)
