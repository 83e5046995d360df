"""Python in one sandbox process: runs the steps of a conversation, and the tools that they call."""
import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

from codeact.limits import Limits
from codeact.process import Process, ProcessEnded, has_second_layer
from codeact.runtime import InstallError, check_installed
from codeact.tools import Tool, ToolFailure, ToolThread

TICK = 0.05  # seconds between two looks at the clock and the memory


class SandboxError(Exception):
    """The sandbox cannot work here; the message says why, and what to do next."""


@dataclass(frozen=True)
class Observation:
    """What a step did. `error` is a traceback with the step's own frames, None if it ran through;
    `state_lost` says that the variables of earlier steps are gone."""

    output: str
    error: str | None
    state_lost: bool
    seconds: float


class Interpreter:
    """One process. `start` it, `run` steps one after the other, `kill` it.

    A cancelled `start` or `run` has ended the process when the cancellation arrives.
    """

    def __init__(self, tools: Mapping[str, Tool], limits: Limits):
        self.tools, self.limits = tools, limits
        self.process: Process | None = None
        self.thread = ToolThread()
        self.steps = 0
        self.tool_time, self.tool_started = 0.0, None  # of this step

    async def start(self) -> None:
        """Returns once the process is ready. Raises `SandboxError`."""
        limits = self.limits
        try:
            installed = check_installed()
        except InstallError as error:
            raise SandboxError(str(error)) from None
        second_layer = limits.second_layer == "yes" or (
            limits.second_layer == "auto" and has_second_layer())
        if second_layer and not has_second_layer():
            raise SandboxError("second_layer is 'yes', but bubblewrap (bwrap) is not installed or "
                               "may not make namespaces here; use 'auto' or 'no'")
        self.process = process = Process(second_layer, 8 * limits.message + 8 * limits.output)
        try:
            await process.connect()
            process.send({
                "nonce": process.nonce, "pyodide": str(process.folders["pyodide"]),
                "built": str(process.folders["built"]), "wheels": installed["built"],
                "packages": installed["packages"], "memory": limits.memory,
                "message": limits.message, "output": limits.output,
                "recursion": limits.recursion,
                "tools": [tool.shipped() for tool in self.tools.values()],
            })
            first = asyncio.ensure_future(process.read())
            try:
                await asyncio.wait({first}, timeout=limits.start_seconds)
            finally:
                first.cancel()
            if not first.done():
                raise SandboxError(f"a sandbox process was not ready after "
                                   f"{limits.start_seconds:g} s; is this computer very busy?")
            message = first.result()
            if message["event"] != "ready":
                raise SandboxError(f"a sandbox process did not start: {message.get('error')}; "
                                   "if it stays so: python -m codeact.install --again")
        except ProcessEnded as ending:
            process.kill()
            raise SandboxError(f"a sandbox process did not start ({ending}); "
                               "if it stays so: python -m codeact.install --again") from None
        except BaseException:
            process.kill()
            raise

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    def kill(self) -> None:
        """End the process; it is gone when this returns."""
        self.thread.end()
        if self.process is not None:
            self.process.kill()

    async def run(self, code: str, seconds: float | None = None) -> Observation:
        """Execute a step. Whatever it does, this returns; the process may be gone then.

        Args:
            code: Python, as in a cell of a notebook.
            seconds: its limit, if not `limits.seconds`.
        """
        process, limits, began = self.process, self.limits, time.monotonic()
        seconds = limits.seconds if seconds is None else seconds
        if len(code) > limits.message // 4:
            return Observation("", f"the code is longer than {limits.message // 4:,} characters",
                               False, 0.0)
        self.steps += 1
        self.tool_time, self.tool_started = 0.0, None
        interrupted = None  # when
        process.resume()
        talk = asyncio.ensure_future(self.converse(code))
        try:
            while not talk.done():
                await asyncio.wait({talk}, timeout=TICK)
                used = time.monotonic() - began - self.tool_time
                if self.tool_started is not None:
                    used -= time.monotonic() - self.tool_started
                if process.resident() > limits.resident:
                    process.end(f"MemoryError: the process took more than "
                                f"{limits.resident >> 20} MiB and was ended")
                elif interrupted is None and used > seconds:
                    process.send({"kind": "interrupt", "number": self.steps})
                    interrupted = used
                elif interrupted is not None and used > interrupted + limits.grace:
                    process.end(f"TimeoutError: the step ran for more than {seconds:g} s, "
                                "could not be interrupted, and its process was ended")
            message = talk.result()
        except ProcessEnded as ending:
            process.kill()
            return Observation("", str(ending), True, time.monotonic() - began)
        except BaseException:
            talk.cancel()
            process.kill()
            raise
        error, output = message["error"], message["output"]
        if message["total"] > len(output.encode()):
            output += f"\n… [cut: the step printed {message['total']:,} bytes]"
        if message["ended"]:
            process.kill()
            error = f"the step ended its process: {error}"
        else:
            process.stop()
            if message["interrupted"] and interrupted is not None:
                error = (error or "").rsplit("\n", 1)[0] + (
                    f"\nTimeoutError: the step was stopped after {seconds:g} s; "
                    "its variables are kept")
        return Observation(output, error, message["ended"], time.monotonic() - began)

    async def converse(self, code: str) -> dict:
        """Send the code, answer its calls, return the process's last message about it."""
        process = self.process
        process.send({"kind": "run", "number": self.steps, "code": code})
        calls = 0
        while True:
            message = await process.read()
            if message["event"] == "failed":  # the worker broke; the process ends itself
                deep = "call stack" in message["error"]
                raise ProcessEnded("RecursionError: a nesting that is too deep ended the process"
                                   if deep else f"the step ended its process: "
                                   f"{message['error'][:500]}")
            if message.get("step") != self.steps:
                continue
            if message["event"] == "done":
                return message
            if message["event"] == "call":
                calls += 1
                self.tool_started = time.monotonic()
                text = await self.answer(message["call"], calls)
                self.tool_time += time.monotonic() - self.tool_started
                self.tool_started = None
                process.send({"kind": "answer", "number": message["number"], "text": text})

    async def answer(self, request: str, calls: int) -> str:
        """Check and run one call; the answer as JSON: {value} or {kind, error}."""
        try:
            if calls > self.limits.tool_calls:
                raise ToolFailure("RuntimeError", "too many calls of tools in one step "
                                  f"(at most {self.limits.tool_calls})")
            value = await self.call(request)
            text = json.dumps({"value": value})
            if len(text) > self.limits.message:
                raise ToolFailure("ValueError", f"the result is larger than "
                                  f"{self.limits.message >> 20} MiB")
            return text
        except ToolFailure as failure:
            return json.dumps({"kind": failure.kind, "error": failure.message})

    async def call(self, request: str):
        """The tool's result, as plain data. Raises `ToolFailure`."""
        try:
            call = json.loads(request)
            name, args, kwargs = call["tool"], call["args"], call["kwargs"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ToolFailure("TypeError", "the arguments cannot be read") from None
        tool = self.tools.get(name) if isinstance(name, str) else None
        if tool is None or not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ToolFailure("NameError", f"there is no tool {str(name)[:50]!r}")
        return await tool.call(args, kwargs, self.limits.tool_seconds, self.thread)
