"""What the agent itself takes for a step, beside the model's time.

A stand-in model in a process of its own streams the same steps, at a set pace, to the plain
`openai` client and to the agent, in turn; the sandbox answers at once. What the agent takes longer
is its own: the graph, the checkpoint, the fence parser, LangChain's way of reading a stream.

    python -m benchmarks.agent
    python -m benchmarks.agent --tokens_per_second 50 --rounds 5
"""
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import openai
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from rich.console import Console
from rich.table import Table

from benchmarks.scripted_endpoint import Script, scripted_endpoint
from codeact.endpoint import chat_model, find_served
from codeact.graph import ask, build_agent
from codeact.sandbox import Observation
from training.settings import option, parse_settings

CODE = "Let me compute this with Python.\n```python\n{lines}\n```"
LINE = "total = total + values[index] * weight\n"
OUTPUT = "The code has been executed, and the output is as follows:\n42"


@dataclass
class Settings:
    """What is measured."""

    tokens_per_second: float = option(200.0, "of the stand-in model")
    lines: int = option(8, "of code in each step; a line is about 10 tokens")
    steps: int = option(4, "of code for a question")
    rounds: int = option(10, "questions of each kind")


class InstantSandbox:
    """What it costs to run code is not measured here."""

    async def run(self, code: str, conversation: str = "default") -> Observation:
        return Observation(output="42\n", error=None, state_lost=False, seconds=0.0)

    async def end(self, conversation: str) -> None:
        pass


def serve(settings: Settings, connection: Connection) -> None:
    """The stand-in: `steps` messages with code after a question, then an answer."""
    code = CODE.format(lines=LINE * settings.lines)

    def reply(messages: list[dict]) -> str:
        outputs = 0
        for message in reversed(messages):
            if message["content"].startswith(OUTPUT):
                outputs += 1
            elif message["role"] == "user":
                break
        return code if outputs < settings.steps else code.replace("```", "")

    with scripted_endpoint(Script(reply, settings.tokens_per_second)) as url:
        connection.send(url)
        connection.recv()


async def plain_client(url: str, settings: Settings) -> float:
    """Seconds that the model's messages for a question take, read by the plain client."""
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        await client.models.list()  # the connection is made, as in the agent's later questions
        start = time.perf_counter()
        for _ in range(settings.steps + 1):
            text = ""
            async with await client.chat.completions.create(
                model="scripted/model", messages=messages, stream=True
            ) as pieces:
                async for piece in pieces:
                    text += piece.choices[0].delta.content or ""
            messages += [{"role": "assistant", "content": text},
                         {"role": "user", "content": OUTPUT}]
        return time.perf_counter() - start


async def agents_time(agent, conversation: str, steps: int) -> float:
    """Seconds that the agent takes for a question."""
    start = time.perf_counter()
    async with aclosing(ask(agent, "Q", conversation)) as events:
        kinds = [event.kind async for event in events]
    seconds = time.perf_counter() - start
    assert kinds.count("observation") == steps and kinds[-1] == "answer", kinds
    return seconds


@asynccontextmanager
async def checkpointers(folder: str) -> AsyncIterator[dict]:
    async with AsyncSqliteSaver.from_conn_string(str(Path(folder, "agent.sqlite"))) as saver:
        yield {"no checkpoints": None, "in memory": InMemorySaver(), "SQLite file": saver}


async def measure(url: str, settings: Settings) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of each question: of the plain client, and of the agent by its checkpoints."""
    served = await find_served(url)
    plain, agents = [], {}
    with tempfile.TemporaryDirectory(dir=".") as folder:  # this disk, not one in memory
        async with checkpointers(folder) as savers:
            for name, saver in savers.items():
                agents[name] = build_agent(
                    chat_model(served), InstantSandbox(), system="S",
                    max_steps=settings.steps + 1, checkpointer=saver,
                )
                await agents_time(agents[name], "warm-up", settings.steps)
            times: dict[str, list[float]] = {name: [] for name in agents}
            for number in range(settings.rounds):
                plain.append(await plain_client(url, settings))
                for name, agent in agents.items():
                    times[name].append(await agents_time(agent, str(number), settings.steps))
    return plain, times


def main() -> None:
    settings = parse_settings(Settings)
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    server = context.Process(target=serve, args=(settings, theirs))
    server.start()
    try:
        plain, times = asyncio.run(measure(connection.recv(), settings))
    finally:
        connection.send("end")
        server.join()
    messages = settings.steps + 1
    model = statistics.median(plain) / messages
    table = Table("checkpoints", "model's message", "agent's own, median", "p95", "share")
    for name, seconds in times.items():
        own = sorted((agent - alone) / messages
                     for agent, alone in zip(seconds, plain, strict=True))
        median, high = statistics.median(own), own[min(len(own) - 1, int(len(own) * 0.95))]
        table.add_row(name, f"{model * 1e3:.0f} ms", f"{median * 1e3:.1f} ms",
                      f"{high * 1e3:.1f} ms", f"{median / model:.1%}")
    Console(width=max(Console().width, 90)).print(table)


if __name__ == "__main__":
    main()
