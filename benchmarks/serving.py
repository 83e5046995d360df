"""Many clients at once on `lmdeploy_cli.py serve api_server`: is anything lost or wrong, does its
memory grow, does it stay responsive?

Each client streams one answer after the other (float32, the likeliest tokens), and compares each
with what a single client got before. A thread asks for /health ten times a second meanwhile.

    python -m benchmarks.serving
    python -m benchmarks.serving --clients 16 --minutes 0.5
"""
import asyncio
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import openai
import psutil
import requests

from model import MINI_DIR
from training.settings import option, parse_settings

MODEL = "yuanmeng"  # as clients call it
QUESTIONS = [
    "你好", "你是谁？", "李白是谁", "一年有几个季节？", "What is water?", "用一句话介绍北京。",
    "1加1等于几", "写一句关于春天的话", "为什么天空是蓝色的？", "推荐一本书", "怎样学好英语？",
    "太阳系有几颗行星", "谢谢你", "杜甫和李白是什么关系？", "怎么做番茄炒蛋", "再见",
]


@dataclass
class Settings:
    """What to measure."""

    model: str = option(str(MINI_DIR), "a folder of convert_to_transformers.py or auto_awq")
    dtype: str = option("float32", "of weights and activations; only float32 is compared strictly")
    clients: int = option(64, "that stream at once")
    minutes: float = option(5.0, "that they do it for")
    max_tokens: int = option(64, "of an answer")


@dataclass
class Report:
    """What happened."""

    answers: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)  # seconds
    first_token: list[float] = field(default_factory=list)  # seconds
    memory: list[float] = field(default_factory=list)  # MiB, each five seconds


def main() -> None:
    settings = parse_settings(Settings)
    with ServerProcess(settings.model, settings.dtype) as server:
        report, seconds = asyncio.run(load(server, settings))
    print(f"{settings.clients} clients, {seconds:.0f} s: {report.answers} answers, "
          f"{report.tokens / seconds:.0f} tokens/s, {len(report.failed)} lost, "
          f"{len(report.wrong)} other than alone")
    first = report.first_token
    print(f"first token after {statistics.median(first):.2f} s (median), {max(first):.2f} s (most)")
    health = sorted(1000 * value for value in report.health)
    print(f"/health, {len(health)} times: {statistics.median(health):.0f} ms (median), "
          f"{health[int(0.95 * len(health))]:.0f} ms (95 of 100), {health[-1]:.0f} ms (most)")
    memory = report.memory
    print(f"memory: {memory[0]:.0f} MiB at first, {memory[len(memory) // 2]:.0f} in the middle, "
          f"{memory[-1]:.0f} at the end")
    for text in (report.failed + report.wrong)[:5]:
        print("  " + text)
    if report.failed or report.wrong:
        sys.exit(1)


class ServerProcess:
    """A server on a free port of this computer, for as long as the context lasts."""

    def __init__(self, model: str, dtype: str):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "lmdeploy_cli.py", "serve", "api_server", model, "--model-name", MODEL,
             "--dtype", dtype, "--server-port", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> "ServerProcess":
        while self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/health", timeout=10).ok:
                    return self
            except requests.ConnectionError:
                time.sleep(0.2)
        sys.exit("the server did not start; `python -m patches.doctor` may tell why")

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()


async def load(server, settings: Settings) -> tuple[Report, float]:
    """What a single client gets; then, what happens when many ask at once, and for how long."""
    report = Report()
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0,
                                timeout=120)
    expected = {}
    for question in QUESTIONS:
        expected[question] = await answer(client, question, settings.max_tokens, Report())
    stop = threading.Event()
    watchers = [threading.Thread(target=watch, args=(server, report, stop))
                for watch in (watch_health, watch_memory)]
    for watcher in watchers:
        watcher.start()
    start = time.monotonic()
    end = start + 60 * settings.minutes

    async def keep_asking(number: int) -> None:
        while time.monotonic() < end:
            question = QUESTIONS[number % len(QUESTIONS)]
            number += 1
            try:
                text = await answer(client, question, settings.max_tokens, report)
            except openai.OpenAIError as error:
                report.failed.append(f"{question}: {error!r}")
                continue
            report.answers += 1
            if text != expected[question]:
                report.wrong.append(f"{question}: {text!r}, alone {expected[question]!r}")

    await asyncio.gather(*(keep_asking(number) for number in range(settings.clients)))
    seconds = time.monotonic() - start
    stop.set()
    for watcher in watchers:
        watcher.join()
    await client.close()
    return report, seconds


async def answer(client: openai.AsyncOpenAI, question: str, max_tokens: int, report: Report) -> str:
    """One streamed answer; what it took goes into the report."""
    text, start, usage = "", time.monotonic(), None
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=max_tokens,
        temperature=0, stream=True, stream_options={"include_usage": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            if not text:
                report.first_token.append(time.monotonic() - start)
            text += chunk.choices[0].delta.content
    if usage is None:
        raise openai.OpenAIError("the stream broke off")
    report.tokens += usage.completion_tokens
    return text


def watch_health(server, report: Report, stop: threading.Event) -> None:
    """How long /health takes. A new connection each time, as of a new client."""
    while not stop.wait(0.1):
        start = time.monotonic()
        try:
            requests.get(f"{server.url}/health", timeout=30).raise_for_status()
        except requests.RequestException as error:
            report.failed.append(f"/health: {error!r}")
        report.health.append(time.monotonic() - start)


def watch_memory(server, report: Report, stop: threading.Event) -> None:
    """The server's resident memory. It grows in the first seconds: torch and the interpreter keep
    what they once needed."""
    process = psutil.Process(server.process.pid)
    while True:
        report.memory.append(process.memory_info().rss / 2**20)
        if stop.wait(5):
            report.memory.append(process.memory_info().rss / 2**20)
            return


if __name__ == "__main__":
    main()
