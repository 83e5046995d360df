"""langchain-sandbox's `PyodideSandbox`, with our process in the place of its script.

    sandbox = OfflinePyodideSandbox(stateful=True)
    first = await sandbox.execute("x = 2")
    second = await sandbox.execute("x + 1", session_metadata=first.session_metadata)
"""
import dataclasses
import secrets
from collections.abc import Iterable

from langchain_sandbox import PyodideSandbox
from langchain_sandbox.pyodide import CodeExecutionResult

from codeact.interpreter import Interpreter
from codeact.limits import MIB, Limits
from codeact.tools import ToolLike, make_tools

PROCESS = "process"  # in `session_metadata`: which one holds the variables


class OfflinePyodideSandbox(PyodideSandbox):
    """Takes and returns what `PyodideSandbox` does, and needs no network.

    The variables of a stateful one stay in its process; `session_metadata` names it, and
    `session_bytes` is None. `aclose` ends what is left. The value of a last expression is the
    last line of `stdout`, and `result` is None.

    Raises:
        ValueError: a permission is asked for; the code never has any.
    """

    def __init__(self, *, stateful: bool = False, tools: Iterable[ToolLike] = (),
                 limits: Limits = Limits(), **permissions):
        if asked := [name for name, value in permissions.items() if value]:
            raise ValueError(f"{asked[0]}: this sandbox gives no permissions; give it a tool "
                             "that does what the code needs")
        super().__init__(stateful=stateful, skip_deno_check=True)
        self.permissions = []
        self.tools, self.limits = make_tools(tools), limits
        self.interpreters: dict[str, Interpreter] = {}

    async def execute(self, code: str, *, session_bytes: bytes | None = None,
                      session_metadata: dict | None = None, timeout_seconds: float | None = None,
                      memory_limit_mb: int | None = None) -> CodeExecutionResult:
        """Execute code; `memory_limit_mb` holds for a process that this starts.

        Raises:
            SandboxError: no process can be started.
            asyncio.CancelledError: the process is gone then.
        """
        name = (session_metadata or {}).get(PROCESS)
        interpreter = self.interpreters.pop(name, None)
        lost = name is not None and interpreter is None
        if interpreter is None:
            name, limits = secrets.token_hex(8), self.limits
            if memory_limit_mb:
                limits = dataclasses.replace(limits, memory=memory_limit_mb * MIB)
            interpreter = Interpreter(self.tools, limits)
            await interpreter.start()
        observation = await interpreter.run(code, timeout_seconds)
        if self.stateful and interpreter.alive:
            self.interpreters[name] = interpreter
        else:
            interpreter.kill()
        metadata = {PROCESS: name, "state_lost": lost or observation.state_lost}
        return CodeExecutionResult(
            status="success" if observation.error is None else "error",
            stdout=observation.output or None, stderr=observation.error,
            execution_time=observation.seconds,
            session_metadata=metadata if self.stateful else None)

    async def aclose(self) -> None:
        """End the processes that are left."""
        while self.interpreters:
            self.interpreters.popitem()[1].kill()
