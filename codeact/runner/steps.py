"""Runs inside Pyodide: executes the steps of one conversation in one namespace, as a notebook does.

Nothing here is trusted: the model's code can change any of it, and then harms only itself.
"""
import ast
import asyncio
import builtins
import dataclasses
import datetime
import inspect
import io
import json
import linecache
import os
import random
import sys
import time
import traceback
import types

import _host

FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
OUR_FILES = "<step ", "<tool "  # the frames that a traceback shows
main = types.ModuleType("__main__")
state = types.SimpleNamespace(steps=0, limit=0, packages="", task=None)


class ToolError(RuntimeError):
    """A tool failed; the message is the tool's."""

    __module__ = "__main__"  # so that tracebacks show the name alone


class Output(io.RawIOBase):
    """Keeps the first `limit` characters of what is written (as bytes), and counts the rest."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.kept, self.total = 4 * limit, bytearray(), 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.total += len(data)
        self.kept += bytes(data[:max(0, self.limit - len(self.kept))])
        return len(data)


# ---- Tools --------------------------------------------------------------------------------------

def plain(value):
    """For `json.dumps`: what JSON has no form for, as data that it has one for.

    Raises:
        TypeError: the value is no data: a function, an open file.
    """
    if isinstance(value, (set, frozenset)):
        return sorted(value) if all(type(item) in (int, float) for item in value) else list(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    for kind, method in ((int, "__index__"), (float, "__float__"), (list, "__iter__")):
        if hasattr(value, method) and not isinstance(value, type):
            return kind(value)
    name = getattr(value, "__name__", type(value).__name__)
    raise TypeError(f"tools take only data (numbers, text, lists, dicts), and {name} is not")


def error_of(tool: str, kind: str, message: str) -> Exception:
    """The built-in exception of that name, so that `except ValueError` works; else ToolError."""
    if kind in ("ToolError", "ToolException"):
        return ToolError(f"{tool}: {message}")
    if kind in ("ArithmeticError", "ConnectionError", "FileNotFoundError", "IndexError",
                "KeyError", "LookupError", "OSError", "OverflowError", "PermissionError",
                "RuntimeError", "TimeoutError", "TypeError", "ValueError", "ZeroDivisionError"):
        return getattr(builtins, kind)(f"{tool}: {message}")
    return ToolError(f"{tool}: {kind}: {message}")


def stub(name: str, description: str):
    """A function that has the host call the tool `name`."""
    def tool(*args, **kwargs):
        try:
            request = json.dumps({"tool": name, "args": args, "kwargs": kwargs}, default=plain)
        except TypeError as error:  # without json's notes on where it was
            raise TypeError(f"{name}: {error}") from None
        answer = json.loads(_host.call(request))
        if "error" in answer:
            raise error_of(name, answer["kind"], answer["error"])
        return answer["value"]

    tool.__name__ = tool.__qualname__ = name
    tool.__doc__ = description
    tool.__module__ = "__main__"
    return tool


async def finished(value):
    """`await tool(...)` works, though the tools have already waited themselves."""
    return await value if inspect.isawaitable(value) else value


class LenientAwait(ast.NodeTransformer):
    """Turns `await f(x)` into `await __finished__(f(x))`."""

    def visit_Await(self, node: ast.Await) -> ast.Await:
        self.generic_visit(node)
        if isinstance(node.value, ast.Call):
            name = ast.copy_location(ast.Name("__finished__", ast.Load()), node)
            node.value = ast.copy_location(ast.Call(name, [node.value], []), node.value)
        return node


# ---- Before the first step ----------------------------------------------------------------------

def prepare(tools: str, limit: int, recursion: int, packages: str, seed: str) -> None:
    """Makes the namespace; `tools` is a JSON list of {name, description, source or null}."""
    state.limit, state.packages = limit, packages
    random.seed(seed)  # the snapshot gave every process the same
    sys.setrecursionlimit(recursion)
    sys.set_int_max_str_digits(100_000)
    sys.meta_path[:] = [finder for finder in sys.meta_path  # without Pyodide's advice to download
                        if type(finder).__module__.partition(".")[0] not in ("pyodide", "_pyodide")
                        or "Js" in type(finder).__name__]
    sys.modules["__main__"] = main
    main.__dict__.update(__builtins__=builtins, ToolError=ToolError)
    builtins.input = no_input
    time.sleep = sleep
    builtins.__finished__ = finished
    for tool in json.loads(tools):
        if tool["source"]:
            file = f"<tool {tool['name']}>"
            remember(file, tool["source"])
            exec(compile(tool["source"], file, "exec", dont_inherit=True), main.__dict__)
        else:
            main.__dict__[tool["name"]] = stub(tool["name"], tool["description"])
    os.environ.pop("_", None)  # a path of the host
    os.chdir("/home/pyodide")


def no_input(prompt="", /):
    raise EOFError("nobody is at a keyboard here: ask your question in the answer instead")


def sleep(seconds, /):
    """`time.sleep`, which an interrupt ends; Pyodide's own does not see one."""
    if not seconds >= 0:
        raise ValueError("sleep length must be non-negative")
    if _host.sleep(1000 * float(seconds)):
        raise KeyboardInterrupt


def remember(file: str, source: str) -> None:
    """Lets tracebacks and `inspect.getsource` find the source."""
    lines = source.splitlines(keepends=True)
    linecache.cache[file] = (len(source), None, lines, file)


# ---- One step -----------------------------------------------------------------------------------

async def run(code: str) -> str:
    """Executes a step. Returns JSON: output, total (characters), error, interrupted, ended."""
    state.steps += 1
    file = f"<step {state.steps}>"
    remember(file, code)
    sys.modules["__main__"] = main  # whatever the last step did to these
    output = Output(state.limit)
    buffer = io.BufferedWriter(output)
    sys.stdin = None
    sys.stdout = sys.stderr = stream = io.TextIOWrapper(
        buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)
    sys.__stdout__ = sys.__stderr__ = stream
    state.task = asyncio.current_task()
    error, interrupted = None, False
    try:
        await execute(code, file)
    except SystemExit as ending:  # the process lives on, as in a notebook
        if ending.code not in (None, 0):
            error = f"SystemExit: {ending.code}"
    except (KeyboardInterrupt, asyncio.CancelledError) as ending:
        error, interrupted = show(ending), True
    except BaseException as ending:
        error = show(ending)
    state.task = None
    try:
        stream.flush()
    except ValueError:
        pass  # the step closed it
    text = output.kept.decode("utf-8", errors="replace")[:state.limit]
    return json.dumps({"output": text, "total": output.total, "error": error,
                       "interrupted": interrupted, "ended": False})


async def execute(code: str, file: str) -> None:
    """Runs the statements; prints the value of a last expression that is not None."""
    tree = compile(code, file, "exec", ast.PyCF_ONLY_AST | FLAGS, dont_inherit=True)
    tree = LenientAwait().visit(tree)
    parts = [(ast.Module(tree.body, []), "exec")]
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        parts = [(ast.Module(tree.body[:-1], []), "exec"),
                 (ast.Expression(tree.body[-1].value), "eval")]
    value = None
    for part, mode in parts:
        compiled = compile(part, file, mode, FLAGS, dont_inherit=True)
        value = eval(compiled, main.__dict__)
        if compiled.co_flags & inspect.CO_COROUTINE:
            value = await value
    if value is not None:
        main.__dict__["_"] = value
        print(repr(value))


def cancel() -> None:
    """Ends a step that awaits something."""
    if state.task is not None:
        state.task.cancel()


def show(error: BaseException) -> str:
    """The traceback with the step's own frames only, at most 4,000 characters."""
    try:
        summary = traceback.TracebackException.from_exception(error)
        trim(summary, 0)
        text = "".join(summary.format()).rstrip()
    except Exception:  # an exception whose __str__ fails, or too deep a nesting
        text = type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        text = text[:text.rfind("\n") + 1] + missing(error.name.split(".")[0])
    return text if len(text) <= 4000 else f"{text[:2000]}\n…\n{text[-1900:]}"


def trim(summary: traceback.TracebackException, depth: int) -> None:
    summary.stack[:] = [frame for frame in summary.stack if frame.filename.startswith(OUR_FILES)]
    for other in (summary.__cause__, summary.__context__, *(summary.exceptions or ())):
        if other is not None and depth < 10:
            trim(other, depth + 1)


def missing(name: str) -> str:
    """One sentence about a module that cannot be imported."""
    return (f"ModuleNotFoundError: {name} is not available in this sandbox: it has Python's "
            f"standard library and {state.packages}.")
