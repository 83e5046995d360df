"""How long the agent's sandbox takes, and how much memory, against one process per call.

"Stock" is what langchain-sandbox's script does (stock_runner.js), with the wheels placed: it starts
Pyodide for each call, and forgets everything after it. Medians and 95th percentiles.

    python -m benchmarks.sandbox
"""
import asyncio
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil

from codeact.runtime import PACKAGE, RUNTIME, find_deno
from codeact.sandbox import Limits, Sandbox, SandboxError
from training.settings import option, parse_settings

STOCK_RUNNER = PACKAGE.parent / "benchmarks/stock_runner.js"
STEP = "total = sum(range(10))\nprint(total)"
SYMPY = "import sympy\nx = sympy.Symbol('x')\nprint(sympy.diff(x * sympy.log(x), x))"
GIB = 2**30


@dataclass
class Settings:
    """What to measure."""

    starts: int = option(15, "processes to start, one after the other")
    steps: int = option(300, "warm steps")
    rounds: int = option(15, "of 100 calls of a tool")
    conversations: int = option(20, "at once")
    stock: int = option(5, "calls of the stock runner; 0: none")
    second_layer: str = option("auto", "bubblewrap: auto, yes or no")


def echo(value: int) -> int:
    """The value."""
    return value


def main() -> None:
    settings = parse_settings(Settings)
    try:
        if settings.stock:
            measure_stock(settings.stock)
        asyncio.run(measure(settings))
    except SandboxError as error:
        sys.exit(f"benchmarks.sandbox: {error}")


def measure_stock(calls: int) -> None:
    for name, code in (("one step", STEP), ("one step with sympy", SYMPY)):
        wheels = sorted(map(str, (RUNTIME / "wheels").glob("*.whl"))) if code is SYMPY else []
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            subprocess.run([find_deno(), "run", "--quiet", "--no-prompt", "--allow-read",
                            str(STOCK_RUNNER), str(RUNTIME / "pyodide"), code, *wheels],
                           check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        report(f"stock: {name}", seconds)


async def measure(settings: Settings) -> None:
    limits = Limits(second_layer=settings.second_layer,
                    conversations=settings.conversations)
    async with Sandbox([echo], limits, spare=False) as sandbox:
        seconds = []
        for number in range(settings.starts):
            began = time.perf_counter()
            await checked(sandbox, "", str(number))
            seconds.append(time.perf_counter() - began)
            await sandbox.end(str(number))
        report("ours: ready, no spare process", seconds)
        report("ours: ready, step with sympy", [await timed(sandbox, SYMPY)])
        report("ours: warm step", [await timed(sandbox, STEP) for _ in range(settings.steps)])
        report("ours: warm step with sympy", [await timed(sandbox, SYMPY) for _ in range(100)])
        calls = "for i in range(100): echo(i)"
        report("ours: 100 tool calls", [
            await timed(sandbox, calls) for _ in range(settings.rounds)])
        await sandbox.end("default")
        await measure_conversations(sandbox, settings.conversations)
    async with Sandbox([echo], limits) as sandbox:
        seconds = []
        for number in range(settings.starts):
            await sandbox.spare
            seconds.append(await timed(sandbox, STEP, str(number)))
            await sandbox.end(str(number))
        report("ours: first step, spare process", seconds)


async def measure_conversations(sandbox: Sandbox, count: int) -> None:
    """All at once: how long until each has done a step with sympy, and their memory."""
    began = time.perf_counter()
    names = [str(number) for number in range(count)]
    await asyncio.gather(*[checked(sandbox, SYMPY, name) for name in names])
    seconds = time.perf_counter() - began
    found = [psutil.Process(sandbox.conversations[name].interpreter.process.pid) for name in names]
    memory = [process.memory_full_info() for process in found]
    print(f"ours: {count} conversations at once: all had run a step with sympy after "
          f"{seconds:.1f} s; {sum(item.rss for item in memory) / GIB:.1f} GiB resident, "
          f"{sum(item.uss for item in memory) / GIB:.1f} GiB of it their own")
    seconds = [await timed(sandbox, STEP, name) for name in names for _ in range(5)]
    report(f"ours: warm step among {count}", seconds)


async def timed(sandbox: Sandbox, code: str, conversation: str = "default") -> float:
    began = time.perf_counter()
    await checked(sandbox, code, conversation)
    return time.perf_counter() - began


async def checked(sandbox: Sandbox, code: str, conversation: str) -> None:
    observation = await sandbox.run(code, conversation)
    if observation.error is not None:
        raise SandboxError(observation.error)


def report(name: str, seconds: list[float]) -> None:
    ordered = sorted(1000 * value for value in seconds)
    most = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    print(f"{name + ':':34} {statistics.median(ordered):8.1f} ms median {most:8.1f} ms 95 of 100 "
          f"({len(ordered)})", flush=True)


if __name__ == "__main__":
    main()
