"""Makes the host's tools callable from the sandbox.

A tool is a function, an async function, or a `BaseTool` of langchain (those of an MCP server are
such, see langchain-mcp-adapters). It runs on the host: the sandbox sends its arguments as JSON,
they are checked here, and its result goes back as JSON. A function that takes a *function*, like
`derivative(f, x)`, cannot work so; it is shipped into the sandbox as source.
"""
import ast
import asyncio
import contextvars
import dataclasses
import datetime
import functools
import inspect
import json
import queue
import re
import sys
import textwrap
import threading
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import jsonschema
from langchain_core.tools import BaseTool
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

ToolLike = Callable | BaseTool
IN_SANDBOX = "_runs_in_sandbox"
TYPE_NAMES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool",
              "array": "list", "object": "dict", "null": "None"}


class ToolFailure(Exception):
    """What the sandbox shall see of a failed call: the exception's name and its message."""

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)
        self.kind, self.message = kind, message


class ToolThread:
    """Runs the calls of one conversation in a thread. A daemon: a call that hangs does not hold up
    the end of the program, as one in a pool would; the next call then gets a new thread."""

    def __init__(self):
        self.calls: queue.SimpleQueue | None = None  # of the thread that is free

    async def run(self, call: Callable[[], Any]) -> Any:
        """The call's result, or what it raised."""
        if self.calls is None:
            self.calls = queue.SimpleQueue()
            threading.Thread(target=work, args=(self.calls,), daemon=True, name="tools").start()
        calls, self.calls = self.calls, None
        loop = asyncio.get_running_loop()
        future: asyncio.Future = loop.create_future()
        calls.put((loop, future, functools.partial(contextvars.copy_context().run, call)))
        try:
            result = await future
        finally:
            if future.done() and not future.cancelled():
                self.calls = calls
            else:
                calls.put(None)  # ends once the call has
        return result

    def end(self) -> None:
        if self.calls is not None:
            self.calls.put(None)
            self.calls = None


def work(calls: queue.SimpleQueue) -> None:
    """What the thread does, until it gets None."""
    while (job := calls.get()) is not None:
        loop, future, call = job
        try:
            settle, value = set_result, call()
        except StopIteration as error:  # a future refuses it
            settle, value = set_exception, RuntimeError(f"StopIteration: {error}")
        except BaseException as error:
            settle, value = set_exception, error
        try:
            loop.call_soon_threadsafe(settle, future, value)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass
        del job, future, call, value  # not kept until the next call


def set_result(future: asyncio.Future, value: Any) -> None:
    if not future.done():
        future.set_result(value)


def set_exception(future: asyncio.Future, error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool in the one form that the sandbox knows."""

    name: str
    description: str  # signature and docstring, as the prompt shows it
    source: str | None = None  # of a tool that runs in the sandbox
    # Arguments by place and by name → the call with them checked. Raises TypeError, ValueError.
    bind: Callable[[list, dict], Callable[[], Any]] | None = None
    asynchronous: bool = False  # that call returns an awaitable, and may run in the loop

    def shipped(self) -> dict[str, str | None]:
        """What the process is told of it."""
        return {"name": self.name, "description": self.description, "source": self.source}

    async def call(self, args: list, kwargs: dict, seconds: float, thread: ToolThread) -> Any:
        """The result as plain data. Raises `ToolFailure`; it names no frame of the host."""
        if self.bind is None:
            raise ToolFailure("NameError", f"there is no tool {self.name!r}")
        try:
            call = self.bind(args, kwargs)
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolFailure("TypeError", message_of(error)) from None
        work = asyncio.ensure_future(self.result(call, thread))
        try:
            await asyncio.wait({work}, timeout=seconds)
            if not work.done():
                raise ToolFailure("TimeoutError", f"no result after {seconds:g} s")
            return work.result()
        except ToolFailure:
            raise
        except asyncio.CancelledError:
            if work.cancelled():  # the tool's own doing, not ours
                raise ToolFailure("RuntimeError", "the tool was cancelled") from None
            raise
        except Exception as error:
            raise ToolFailure(type(error).__name__, message_of(error)) from None
        finally:
            work.cancel()

    async def result(self, call: Callable[[], Any], thread: ToolThread) -> Any:
        value = call() if self.asynchronous else await thread.run(call)
        if inspect.isawaitable(value):
            value = await value
        try:
            return json.loads(json.dumps(value, default=plain))
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolFailure("TypeError", f"its result is no plain data: {error}") from None


def message_of(error: BaseException) -> str:
    """The exception's message, short."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])[:500]
    return str(error)[:500]


def plain(value: Any) -> Any:
    """For `json.dumps`: data that JSON has no form for. Raises TypeError if it is none."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if hasattr(value, "tolist"):  # numpy, torch
        return value.tolist()
    if hasattr(value, "__float__"):
        return float(value)
    return str(value)


# ---- What is a tool -----------------------------------------------------------------------------

def in_sandbox(function: Callable) -> Callable:
    """Decorator: ship the function into the sandbox as source, rather than call it on the host."""
    setattr(function, IN_SANDBOX, True)
    return function


def make_tools(tools: Iterable[ToolLike]) -> dict[str, Tool]:
    """By name. Raises ValueError, TypeError: one of them can be no tool."""
    made = {}
    for tool in map(make_tool, tools):
        if tool.name in made:
            raise ValueError(f"two tools are called {tool.name}")
        made[tool.name] = tool
    return made


def make_tool(tool: ToolLike) -> Tool:
    """Raises ValueError, TypeError: it can be no tool."""
    if isinstance(tool, BaseTool):
        return from_base_tool(tool)
    if not callable(tool):
        raise TypeError(f"a tool is a function or a BaseTool, not {type(tool).__name__}")
    name = getattr(tool, "__name__", type(tool).__name__)
    if not name.isidentifier():
        raise ValueError(f"a tool needs a name that Python code can use, not {name!r}")
    try:
        signature = inspect.signature(tool)
    except (TypeError, ValueError):  # some built-ins tell nothing
        signature = inspect.Signature([
            inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])
    shown = description_of(name, readable(signature), inspect.getdoc(tool))
    if getattr(tool, IN_SANDBOX, False) or takes_function(tool, signature):
        return Tool(name, shown, source=shipped_source(tool))
    asynchronous = inspect.iscoroutinefunction(tool) or inspect.iscoroutinefunction(
        getattr(tool, "__call__", None))
    return Tool(name, shown, bind=binder(tool, signature), asynchronous=asynchronous)


def describe(tool: ToolLike) -> str:
    """The signature and docstring of a tool, as a prompt shows them."""
    return make_tool(tool).description


def description_of(name: str, signature: str, documentation: str | None) -> str:
    """Valid Python, since a prompt may take it apart as such."""
    lines = [f"def {name}{signature}:"]
    if documentation:
        text = documentation.strip().replace("\\", "\\\\").replace('"""', "'''")
        text = text[:-1] + '\\"' if text.endswith('"') else text
        lines.append(textwrap.indent(f'"""{text}"""', "    "))
    else:
        lines.append("    ...")
    return "\n".join(lines)


def readable(signature: inspect.Signature) -> str:
    """The signature without modules' names: `date`, not `datetime.date`; valid Python."""
    text = re.sub(r"\b(typing|datetime|collections\.abc)\.", "", str(signature))
    if is_python(text):
        return text
    plain_parameters = [
        parameter.replace(annotation=parameter.empty, default=default_of(parameter))
        for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain_parameters,
                                 return_annotation=signature.empty))


def default_of(parameter: inspect.Parameter) -> Any:
    """Its default, or an ellipsis for one whose form is no Python: `<object object>`."""
    if parameter.default is parameter.empty or is_python(f"(a={parameter.default!r})"):
        return parameter.default
    return ...


def is_python(signature: str) -> bool:
    try:
        ast.parse(f"def f{signature}: ...")
    except SyntaxError:
        return False
    return True


# ---- Tools that run on the host -----------------------------------------------------------------

def binder(tool: Callable, signature: inspect.Signature) -> Callable:
    """Binds a call's arguments, and converts each as its annotation says."""
    try:
        hints = typing.get_type_hints(tool, include_extras=True)
    except (NameError, TypeError):  # a name that only a type checker knows; a built-in
        hints = {}
    adapters = {name: adapter(hints[name]) for name in signature.parameters if name in hints}
    variadic = {parameter.name: parameter.kind for parameter in signature.parameters.values()
                if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)}

    def converted(name: str, value: Any) -> Any:
        if name not in adapters:
            return value
        convert = adapters[name].validate_python
        if variadic.get(name) is inspect.Parameter.VAR_POSITIONAL:
            return tuple(convert(item) for item in value)
        if variadic.get(name) is inspect.Parameter.VAR_KEYWORD:
            return {key: convert(item) for key, item in value.items()}
        return convert(value)

    def bind(args: list, kwargs: dict) -> Callable[[], Any]:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            try:
                bound.arguments[name] = converted(name, value)
            except ValidationError as error:
                raise TypeError(f"{name}: {error.errors()[0]['msg']}") from None
        return functools.partial(tool, *bound.args, **bound.kwargs)

    return bind


def adapter(annotation: Any) -> TypeAdapter:
    try:
        return TypeAdapter(annotation)
    except PydanticSchemaGenerationError:  # a class that pydantic does not know
        return TypeAdapter(Any)


def from_base_tool(tool: BaseTool) -> Tool:
    """A `BaseTool`, also one of an MCP server: its arguments are checked against its schema."""
    if not tool.name.isidentifier():
        raise ValueError(f"a tool needs a name that Python code can use, not {tool.name!r}")
    # A failure shall be an exception in the sandbox, not a text that looks like a result.
    tool = tool.model_copy(update={"handle_tool_error": False, "handle_validation_error": False})
    schema = tool.tool_call_schema
    if not isinstance(schema, dict):
        schema = schema.model_json_schema()
    validator = jsonschema.validators.validator_for(schema)(schema)
    names = list(schema.get("properties", {}))

    def bind(args: list, kwargs: dict) -> Callable[[], Any]:
        if len(args) > len(names):
            raise TypeError(f"takes {len(names)} arguments, but {len(args)} were given")
        named = dict(zip(names, args))
        if twice := named.keys() & kwargs.keys():
            raise TypeError(f"got {twice.pop()} twice")
        named.update(kwargs)
        if unknown := named.keys() - names:
            raise TypeError(f"has no argument {sorted(unknown)[0]!r}; it has: {', '.join(names)}")
        fault = jsonschema.exceptions.best_match(validator.iter_errors(named))
        if fault is not None:
            place = ".".join(map(str, fault.absolute_path))
            raise TypeError(f"{place}: {fault.message}" if place else fault.message)
        return functools.partial(content_of, tool, named)

    shown = description_of(tool.name, schema_signature(schema), schema_documentation(tool, schema))
    return Tool(tool.name, shown, bind=bind, asynchronous=True)


async def content_of(tool: BaseTool, arguments: dict) -> Any:
    """The tool's result; of a list of text blocks, as MCP servers return it, their text."""
    value = await tool.ainvoke(arguments)
    if isinstance(value, list) and value and all(
            isinstance(item, dict) and item.get("type") == "text" for item in value):
        return "\n".join(item["text"] for item in value)
    return value


def schema_signature(schema: dict) -> str:
    """`(city: str, days: int = 3)` of a JSON schema."""
    required, parts = schema.get("required", []), []
    for name, entry in schema.get("properties", {}).items():
        kinds = [entry.get("type")] if "anyOf" not in entry else [
            option.get("type") for option in entry["anyOf"]]
        kind = " | ".join(TYPE_NAMES[item] for item in kinds if item in TYPE_NAMES)
        part = f"{name}: {kind}" if kind else name
        if name not in required:
            part += f" = {entry['default']!r}" if "default" in entry else " = None"
        parts.append(part)
    return f"({', '.join(parts)})"


def schema_documentation(tool: BaseTool, schema: dict) -> str:
    """The tool's description, and what its schema says of each argument."""
    lines = [f"- {name}: {entry['description']}"
             for name, entry in schema.get("properties", {}).items() if entry.get("description")]
    text = (tool.description or "").strip()
    return "\n".join([text, "", *lines]) if lines else text


# ---- Tools that run in the sandbox --------------------------------------------------------------

def takes_function(tool: Callable, signature: inspect.Signature) -> bool:
    """Whether a parameter is annotated as a callable, or the body calls one: `f(x)`."""
    if not isinstance(tool, types.FunctionType):
        return False
    if any("Callable" in str(parameter.annotation) for parameter in signature.parameters.values()):
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(tool)))
    except (OSError, SyntaxError):  # typed at a prompt; part of an expression
        return False
    return any(isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
               and node.func.id in signature.parameters for node in ast.walk(tree))


def shipped_source(function: types.FunctionType) -> str:
    """The function's source, after what it uses of its module: imports, numbers, functions.

    Raises:
        ValueError: there is no source, or it uses something that cannot be shipped.
    """
    parts: dict[str, str] = {}
    collect(function, function.__name__, parts)
    return "\n\n".join(parts.values()) + "\n"


def collect(function: types.FunctionType, tool: str, parts: dict[str, str]) -> None:
    """Put into `parts`, by name, what the function needs, and it last."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        raise ValueError(f"{tool} runs in the sandbox, but {function.__name__} has no source "
                         "that could be shipped: write it as a function in a file") from None
    definition = tree.body[0]
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            function.__closure__ and function.__code__.co_freevars != ("__class__",)):
        raise ValueError(f"{tool} runs in the sandbox: {function.__name__} must be a plain "
                         "function of a module, without variables of another function")
    definition.decorator_list = []
    own, parts[function.__name__] = function.__name__, ""
    used = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    for name in sorted(used & function.__globals__.keys() - parts.keys()):
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType):
            parts[name] = f"import {value.__name__} as {name}"
        elif isinstance(value, types.FunctionType) and value.__module__ == function.__module__:
            collect(value, tool, parts)
        elif getattr(value, "__module__", None) in sys.stdlib_module_names:
            parts[name] = f"from {value.__module__} import {value.__name__} as {name}"
        elif isinstance(value, (bool, int, float, str, type(None))):
            parts[name] = f"{name} = {value!r}"
        else:
            raise ValueError(f"{tool} runs in the sandbox and uses {name}, which cannot be "
                             "shipped there: import or define it inside the function")
    del parts[own]
    parts[own] = ast.unparse(definition)
