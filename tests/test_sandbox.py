"""codeact/: steps, their state and output, limits, tools, and what ends a process.

One sandbox serves all tests that leave its process alone; each test has a conversation of its own
where it must not see another's variables. Attacks are in test_sandbox_attacks.py.
"""
import ast
import asyncio
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import psutil
import pytest
from langchain_core.tools import StructuredTool, ToolException, tool
from pydantic import BaseModel, Field

from codeact.pyodide import OfflinePyodideSandbox
from codeact.sandbox import Limits, Sandbox, SandboxError
from codeact.tools import describe, in_sandbox, make_tools

ROOT = Path(__file__).resolve().parents[1]
EPSILON = 1e-5


def processes() -> set[int]:
    """Every living process that this one started, and theirs."""
    return {child.pid for child in psutil.Process().children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE}


# ---- Tools of the tests -------------------------------------------------------------------------

def derivative(f, x, h=1e-5):
    """
    Compute the numerical derivative of function f at point x using central difference.
    """
    return (f(x + h) - f(x - h)) / (2 * h)


def integral(f: Callable[[float], float], a: float, b: float) -> float:
    """By the trapezoidal rule; uses a module, a number and a function of this file."""
    return math.fsum(EPSILON * half(f(x) + f(x + EPSILON)) for x in steps_between(a, b))


def half(value):
    return value / 2


def steps_between(a, b):
    return [a + EPSILON * i for i in range(round((b - a) / EPSILON))]


def weather(city: str, days: int = 3, *, detailed: bool = False) -> dict:
    """The weather of a city."""
    if city == "Atlantis":
        raise ValueError("no such city")
    return {"city": city, "days": days, "detailed": detailed}


async def double(x: float) -> float:
    """Twice x."""
    await asyncio.sleep(0.01)
    return 2 * x


def sleepy(seconds: float) -> str:
    """Comes late."""
    time.sleep(seconds)
    return "late"


def echo(value):
    """The value."""
    return value


def add(*numbers: int, **named: int) -> int:
    return sum(numbers) + sum(named.values())


def strange() -> object:
    return {1, 2}, 2**70, float("inf"), Path("a"), None


class Order(BaseModel):
    item: str = Field(description="what")
    count: int = 1


@tool(args_schema=Order)
def order(item: str, count: int = 1) -> str:
    """Order something."""
    if item == "nothing":
        raise ToolException("sold out")
    return f"{count} x {item}"


def from_server(**arguments) -> list:
    return [{"type": "text", "text": str(arguments)}]


mcp_like = StructuredTool(  # as langchain-mcp-adapters makes them: a JSON schema, text blocks
    name="search", description="Search.", func=from_server,
    args_schema={"type": "object", "required": ["query"], "properties": {
        "query": {"type": "string", "description": "words"},
        "limit": {"type": "integer", "maximum": 10}}})

TOOLS = [derivative, integral, weather, double, sleepy, echo, add, strange, order, mcp_like,
         math.gcd]


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def run(loop):
    """`run(code)`: the observation of a step in the shared conversation, or another."""
    limits = Limits(seconds=10, tool_seconds=0.5, tool_calls=200)

    async def opened():
        return Sandbox(TOOLS, limits)

    sandbox = loop.run_until_complete(opened())
    yield lambda code, name="shared": loop.run_until_complete(sandbox.run(code, name))
    loop.run_until_complete(sandbox.close())


@pytest.fixture
def output(run):
    """`output(code)`: what a step prints; it must run through."""
    def printed(code, name="shared"):
        observation = run(code, name)
        assert observation.error is None
        return observation.output
    return printed


@pytest.fixture
def error(run):
    """`error(code)`: the last line of a step's error; its process must live on."""
    def last(code, name="shared"):
        observation = run(code, name)
        assert not observation.state_lost
        return observation.error.splitlines()[-1]
    return last


def with_sandbox(work, tools=(), **limits):
    """Run `work(sandbox)` in a sandbox of its own; all of its processes must be gone after."""
    before = processes()

    async def main():
        async with Sandbox(tools, Limits(**limits), spare=False) as sandbox:
            return await work(sandbox)

    result = asyncio.run(main())
    assert processes() <= before
    return result


# ---- What a step prints -------------------------------------------------------------------------

@pytest.mark.parametrize("code, printed", [
    ("print('a')\nprint('b')", "a\nb\n"),  # newlines between prints were lost
    ("print('a\\nb', r'c\\nd')", "a\nb c\\nd\n"),  # and those in literals changed
    ('s = """one\n  two\n    three"""\nprint(s)', "one\n  two\n    three\n"),
    ("import sys\nprint(1)\nprint(2, file=sys.stderr)\nprint(3)", "1\n2\n3\n"),
    ("import warnings\nwarnings.warn('careful')", None),  # on stderr, and no error
    ("1 + 1", "2\n"), ("x = 3\nx", "3\n"), ("None", ""), ("x = 1", ""), ("'é'; 'ß'", "'ß'\n"),
    ("", ""), ("# nothing", ""), ("print('中文 🤖')", "中文 🤖\n"),
    ("print('\\ud800')", "\\ud800\n"),
    ("print('no newline', end='')", "no newline"),
    ("float('nan'), float('inf')", "(nan, inf)\n"),  # crashed the reference
    ("import sys\nsys.exit()", ""), ("exit(0)", ""),
    ("from string import *\ndigits", "'0123456789'\n"),
    ("from __future__ import annotations\ndef f(x: Nowhere): return 1\nf(0)", "1\n"),
    ("import asyncio\nawait asyncio.sleep(0.01)\nprint('waited')", "waited\n"),
    ("import asyncio\nawait asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0, 2))", "[1, 2]\n"),
    ("x = 1\nx = x + 1\nx", "2\n"),
    ("import sys\nsys.stdout.buffer.write(b'raw\\n')\nprint('cooked')", "raw\ncooked\n"),
    ("def f(n):\n    return n if n < 2 else f(n-1) + f(n-2)\nf(15)", "610\n"),
    ("import inspect\ndef g(x):\n    return x  # mark\nprint(inspect.getsource(g))",
     "def g(x):\n    return x  # mark\n\n"),
    ("import inspect\nh = lambda x: x + 1\nprint(inspect.getsource(h))",
     "h = lambda x: x + 1\n\n"),
    ("import sympy\nsympy.integrate(sympy.Symbol('x')**2)", "x**3/3\n"),
    ("import mpmath\nmpmath.mp.dps = 30\nprint(mpmath.pi)", "3.14159265358979323846264338328\n"),
    ("import math\nlen(str(math.factorial(2000)))", "5736\n"),
    ("__name__", "'__main__'\n"),
    ("import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\nP(1)", "P(x=1)\n"),
    ("import pickle\nclass Q: pass\ntype(pickle.loads(pickle.dumps(Q()))).__name__", "'Q'\n"),
])
def test_a_step_prints_what_it_would_in_a_notebook(output, code, printed):
    if printed is None:
        assert "careful" in output(code)
    else:
        assert output(code).removesuffix("8\n" if "buffer" in code else "") == printed


def test_output_is_kept_when_the_step_fails(run):
    observation = run("print('before')\n1/0")
    assert observation.output == "before\n"
    assert observation.error == (
        'Traceback (most recent call last):\n  File "<step '
        + observation.error.split("<step ")[1].split(">")[0]
        + '>", line 2, in <module>\n    1/0\n    ~^~\nZeroDivisionError: division by zero')


@pytest.mark.parametrize("code, last", [
    ("def f():\n    g()\ndef g():\n    raise KeyError('k')\nf()", "KeyError: 'k'"),
    ("x = (1", "SyntaxError: '(' was never closed"),
    ("raise SystemExit(3)", "SystemExit: 3"), ("raise SystemExit('why')", "SystemExit: why"),
    ("import sys\nsys.exit(2)", "SystemExit: 2"),
    ("assert 1 == 2, 'unequal'", "AssertionError: unequal"),
    ("undefined_name", "NameError: name 'undefined_name' is not defined"),
    ("import numpy", "ModuleNotFoundError: numpy is not available in this sandbox: it has "
                     "Python's standard library and mpmath, sympy."),
    ("import numpy.linalg as la", "ModuleNotFoundError: numpy is not available in this sandbox: "
                                  "it has Python's standard library and mpmath, sympy."),
    ("from pandas import DataFrame", "ModuleNotFoundError: pandas is not available in this "
                                     "sandbox: it has Python's standard library and mpmath, "
                                     "sympy."),
    ("input('name? ')", "EOFError: nobody is at a keyboard here: ask your question in the answer "
                        "instead"),
    ("def f(n):\n    return f(n + 1)\nf(0)",
     "RecursionError: maximum recursion depth exceeded"),
    ("class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E",
     "E: <exception str() failed>"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
])
def test_an_error_is_shown_with_the_steps_own_frames(run, code, last):
    observation = run(code)
    assert observation.error.splitlines()[-1] == last and not observation.state_lost
    assert "_steps" not in observation.error and "pyodide" not in observation.error
    assert observation.error.count("File ") <= 4


def test_an_error_in_a_library_shows_no_frames_of_it(error, run):
    text = run("import json\njson.loads('{')").error
    assert text.count("File ") == 1 and "json/decoder" not in text
    assert text.splitlines()[-1].startswith("json.decoder.JSONDecodeError: ")


def test_causes_are_shown(run):
    text = run("try:\n    1/0\nexcept ZeroDivisionError as e:\n"
               "    raise ValueError('v') from e").error
    assert "ZeroDivisionError: division by zero" in text and "direct cause" in text


def test_a_long_error_is_cut(run):
    text = run("raise ValueError('x' * 100_000)").error
    assert 3000 < len(text) < 4100 and text.startswith("Traceback") and "\n…\n" in text


def test_output_is_cut_and_counted(run):
    observation = run("for i in range(100_000): print(i)")
    assert observation.output.startswith("0\n1\n2\n")
    assert observation.output.endswith("… [cut: the step printed 588,890 bytes]")
    assert len(observation.output) < 10_100
    observation = run("print('中' * 10_001)")
    assert observation.output.startswith("中" * 10_000 + "\n… [cut")


def test_what_a_step_does_to_its_output_ends_with_it(output):
    output("import sys\nsys.stdout = None")  # persisted in the reference
    assert output("print(1)") == "1\n"
    output("import sys\nsys.stdout.close()")
    assert output("print(2)") == "2\n"
    output("import sys, io\nsys.stdout = sys.stderr = io.StringIO()")
    assert output("print(3)") == "3\n"
    output("import os\nos.close(1)\nos.close(2)")
    assert output("print(4)") == "4\n"
    assert "5" in output("import os\nos.write(2, b'5')", "descriptors")


def test_deep_values_can_be_shown(run, output):
    output("x = []\nfor _ in range(2_000): x = [x]", "deep")
    assert output("x", "deep").startswith("[[[[")
    run("for _ in range(100_000): x = [x]", "deep")
    deep = run("x", "deep")  # beyond what WebAssembly's stack holds
    assert deep.state_lost
    assert deep.error == "RecursionError: a nesting that is too deep ended the process"
    assert run("print('still', 'here')", "deep").output == "still here\n"
    assert output("a = []\na.append(a)\na") == "[[...]]\n"


def test_a_long_program_fits(output):
    """Beyond what an argument list takes, where the reference passed the code."""
    code = "\n".join(f"value_{i} = {i}" for i in range(20_000)) + "\nvalue_19999"
    assert len(code) > 300_000 and output(code, "long") == "19999\n"


# ---- State --------------------------------------------------------------------------------------

def test_everything_lives_on(output):
    output("import collections, datetime, itertools\n"
           "numbers = {1, 2, 3}\nday = datetime.date(2024, 2, 29)\n"
           "def outer(n):\n    def inner(): return n\n    return inner\n"
           "closure = outer(5)\nsquare = lambda x: x * x\n"
           "class Thing:\n    value = 7\nthing = Thing()\ncounter = itertools.count(3)\n"
           "generator = (i * i for i in range(5))\nnext(generator)")
    assert output("sorted(numbers), day.isoformat(), closure(), square(4), thing.value, "
                  "next(counter), next(generator), collections.Counter('aab')['a']"
                  ) == "([1, 2, 3], '2024-02-29', 5, 16, 7, 3, 1, 2)\n"
    assert output("next(counter)") == output("_") == "4\n"


def test_state_survives_an_error(output, run):
    output("kept = 1")
    assert run("kept = 2\n1/0\nkept = 3").error
    assert output("kept") == "2\n"


def test_conversations_do_not_share(output, run):
    output("secret = 1\nopen('/tmp/note', 'w').write('x')\nimport math\nmath.pi = 3", "one")
    text = run("secret", "two").error
    assert text.splitlines()[-1] == "NameError: name 'secret' is not defined"
    assert output("import os, math\nos.listdir('/tmp'), math.pi == 3", "two") == "([], False)\n"


def test_chance_differs_between_processes(output):
    code = "import random, uuid\nrandom.random(), uuid.uuid4(), random.Random().random()"
    first, second = output(code, "chance one"), output(code, "chance two")
    assert all(a != b for a, b in zip(first.split(", "), second.split(", ")))


# ---- Limits -------------------------------------------------------------------------------------

def test_a_loop_is_interrupted_and_keeps_its_variables():
    async def work(sandbox):
        await sandbox.run("x = 0")
        stopped = await sandbox.run("print('begun')\nwhile True:\n    x += 1")
        return stopped, await sandbox.run("x > 1000")

    stopped, after = with_sandbox(work, seconds=1)
    assert stopped.output == "begun\n" and not stopped.state_lost and 1 < stopped.seconds < 30
    assert stopped.error.splitlines()[-1] == (
        "TimeoutError: the step was stopped after 1 s; its variables are kept")
    assert "line 3" in stopped.error and "KeyboardInterrupt" not in stopped.error
    assert after.output == "True\n" and not after.state_lost


def test_what_waits_is_interrupted_too():
    async def work(sandbox):
        return [await sandbox.run(code) for code in (
            "import asyncio, time\nx = 1", "await asyncio.sleep(1000)", "time.sleep(1000)",
            "await asyncio.gather(*[asyncio.sleep(1000) for _ in range(9)])", "x")]

    steps = with_sandbox(work, seconds=0.5, grace=10)
    assert ["TimeoutError" in (step.error or "") for step in steps] == [0, 1, 1, 1, 0]
    assert not any(step.state_lost for step in steps) and steps[-1].output == "1\n"


def test_what_cannot_be_interrupted_is_ended_and_says_so():
    async def work(sandbox):
        await sandbox.run("x = 1")
        stubborn = await sandbox.run(
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass")
        return stubborn, await sandbox.run("1 + 1"), await sandbox.run("x")

    stubborn, next_step, lost = with_sandbox(work, seconds=0.5, grace=0.5)
    assert stubborn.state_lost and stubborn.error == (
        "TimeoutError: the step ran for more than 0.5 s, could not be interrupted, and its process "
        "was ended")
    assert next_step.output == "2\n" and not next_step.state_lost
    assert lost.error.splitlines()[-1] == "NameError: name 'x' is not defined"


def test_python_memory_is_capped_and_its_variables_are_kept():
    async def work(sandbox):
        await sandbox.run("x = 1")
        return await sandbox.run("y = bytearray(300 << 20)"), await sandbox.run(
            "z = bytearray(50 << 20)\nx"), await sandbox.run(
                "q = []\nwhile True: q.append('a' * 2**20)")

    big, small, slow = with_sandbox(work, memory=200 << 20)
    assert big.error.splitlines()[-1] == "MemoryError" and not big.state_lost
    assert small.output == "1\n" and not small.state_lost
    assert slow.error.splitlines()[-1] == "MemoryError"


def test_the_whole_process_is_capped():
    async def work(sandbox):
        bomb = await sandbox.run("from pyodide.code import run_js\n"
                                 "run_js('globalThis.a = []; for (;;) a.push(new "
                                 "Uint8Array(1 << 24).fill(1))')")
        return bomb, await sandbox.run("1")

    bomb, after = with_sandbox(work, resident=700 << 20)
    assert bomb.state_lost and bomb.error == (
        "MemoryError: the process took more than 700 MiB and was ended")
    assert after.output == "1\n"


def test_a_step_that_ends_its_process_says_so():
    async def work(sandbox):
        return [await sandbox.run(code) for code in ("x = 1", "import os\nos._exit(1)", "2", "x")]

    steps = with_sandbox(work)
    assert [step.state_lost for step in steps] == [False, True, False, False]
    assert "ended its process" in steps[1].error and steps[2].output == "2\n"


def test_an_idle_process_is_ended_and_its_next_step_says_so():
    async def work(sandbox):
        await sandbox.run("x = 1")
        pid = sandbox.conversations["default"].interpreter.process.pid
        for _ in range(200):
            if not psutil.pid_exists(pid):
                break
            await asyncio.sleep(0.05)
        return psutil.pid_exists(pid), await sandbox.run("2"), await sandbox.run("3")

    alive, after, next_step = with_sandbox(work, idle_seconds=0.3)
    assert not alive and after.output == "2\n" and after.state_lost
    assert next_step.output == "3\n"


def test_the_longest_idle_makes_room():
    async def work(sandbox):
        for name in ("a", "b", "a", "c"):
            await sandbox.run("x = 1", name)
        alive = [name for name, entry in sandbox.conversations.items() if entry.interpreter]
        return alive, (await sandbox.run("1", "b")).state_lost

    assert with_sandbox(work, conversations=2) == (["a", "c"], True)


def test_too_many_at_once_is_said():
    async def work(sandbox):
        first = asyncio.ensure_future(sandbox.run("await __import__('asyncio').sleep(3)", "a"))
        while "a" not in sandbox.conversations or not sandbox.conversations["a"].interpreter:
            await asyncio.sleep(0.05)
        with pytest.raises(SandboxError, match="all 1 conversations are running code"):
            await sandbox.run("1", "b")
        await first
        return await sandbox.run("1", "b")

    assert with_sandbox(work, conversations=1).output == "1\n"


def test_nothing_goes_on_between_two_steps(output):
    output("import asyncio\nticks = 0\nasync def tick():\n    global ticks\n    while True:\n"
           "        ticks += 1\n        await asyncio.sleep(0.001)\n"
           "task = asyncio.ensure_future(tick())\nawait asyncio.sleep(0.05)", "idle")
    first = int(output("ticks", "idle"))
    time.sleep(0.5)
    assert int(output("ticks", "idle")) < first + 100


# ---- Ends ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("code", [
    "while True: pass", "import asyncio\nawait asyncio.sleep(1000)", "sleepy(1000)",
    "await double(1)\nwhile True: double(1)",
])
def test_a_cancelled_step_leaves_no_process(code):
    async def work(sandbox):
        await sandbox.run("x = 1")
        running = asyncio.ensure_future(sandbox.run(code))
        await asyncio.sleep(0.3)
        mine = sandbox.conversations["default"].interpreter.process
        assert psutil.pid_exists(mine.pid)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not psutil.pid_exists(mine.pid) and not mine.alive
        return await sandbox.run("1")

    after = with_sandbox(work, [sleepy, double])
    assert after.output == "1\n" and after.state_lost


@pytest.mark.parametrize("spare", [False, True])
def test_a_start_that_is_cancelled_at_any_moment_leaves_no_process(spare):
    before = processes()

    async def main(delay):
        async with Sandbox(spare=spare) as sandbox:
            running = asyncio.ensure_future(sandbox.run("1"))
            await asyncio.sleep(delay)
            running.cancel()
            try:
                await running
            except asyncio.CancelledError:
                pass

    for delay in (0, 0.005, 0.05, 0.3, 0.6, 0.9):
        asyncio.run(main(delay))
        assert processes() <= before


def test_timeouts_of_the_caller_leave_no_process():
    async def work(sandbox):
        await sandbox.run("1")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sandbox.run("while True: pass"), 0.3)
        entry = sandbox.conversations["default"]
        assert entry.interpreter is None and processes() <= before

    before = processes()
    with_sandbox(work)


def test_end_during_a_step():
    async def work(sandbox):
        await sandbox.run("1", "a")
        running = asyncio.ensure_future(sandbox.run("while True: pass", "a"))
        await asyncio.sleep(0.2)
        await sandbox.end("a")
        assert processes() <= before
        await sandbox.end("unknown")
        return await running, await sandbox.run("1", "a")

    before = processes()
    running, after = with_sandbox(work)
    assert running.state_lost and after.output == "1\n" and not after.state_lost


def test_end_and_close_during_a_start():
    async def work(sandbox):
        running = asyncio.ensure_future(sandbox.run("1", "a"))
        await asyncio.sleep(0.1)
        await sandbox.end("a")
        with pytest.raises(SandboxError, match="was ended"):
            await running
        running = asyncio.ensure_future(sandbox.run("1", "b"))
        await asyncio.sleep(0.1)
        await sandbox.close()
        with pytest.raises(SandboxError):
            await running
        with pytest.raises(SandboxError, match="closed"):
            await sandbox.run("1")

    with_sandbox(work)


def test_a_process_that_is_killed_from_outside():
    async def work(sandbox):
        await sandbox.run("x = 1")
        os.kill(sandbox.conversations["default"].interpreter.process.pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        return await sandbox.run("2")

    after = with_sandbox(work)
    assert after.output == "2\n" and after.state_lost


@pytest.mark.parametrize("layer", ["auto", "no"])
def test_no_process_outlives_ours(layer, tmp_path):
    """Not even a stopped one, when we are killed."""
    script = ("import asyncio, sys\nfrom codeact.sandbox import Limits, Sandbox\n"
              "async def main():\n"
              f"    sandbox = Sandbox(limits=Limits(second_layer={layer!r}))\n"
              "    await sandbox.run('x = 1', 'idle')\n"
              "    asyncio.ensure_future(sandbox.run('while True: pass', 'busy'))\n"
              "    await asyncio.sleep(0.5)\n    print('up', flush=True)\n"
              "    await asyncio.sleep(100)\nasyncio.run(main())\n")
    ours = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert ours.stdout.readline() == b"up\n"
    children = psutil.Process(ours.pid).children(recursive=True)
    assert len(children) >= 2
    ours.kill()
    ours.wait()
    ours.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


def test_steps_of_one_conversation_wait_for_each_other_and_others_do_not():
    async def work(sandbox):
        for name in "ab":
            await sandbox.run("log = []", name)
        await asyncio.gather(*[sandbox.run(f"log.append({i})", name)
                               for i in range(10) for name in "ab"])
        return [(await sandbox.run("log", name)).output for name in "ab"]

    assert with_sandbox(work) == [f"{list(range(10))}\n"] * 2


# ---- Tools --------------------------------------------------------------------------------------

def test_the_specifications_example(output):
    assert output("from math import pi, log\n\ndef f(x):\n    return x * log(x)\n\n"
                  "derivative_value = derivative(f, x=pi)\nprint(derivative_value)"
                  ) == "2.144729885888985\n"
    assert output("derivative(abs, 1), round(derivative(lambda t: t ** 2, 3), 6)"
                  ).endswith(", 6.0)\n")


def test_a_tool_that_takes_a_function_brings_what_it_uses(output):
    assert output("round(integral(lambda x: 2 * x, 0, 1), 6)") == "1.0\n"


@pytest.mark.parametrize("code, printed", [
    ("weather('北京')", "{'city': '北京', 'days': 3, 'detailed': False}"),
    ("weather(days=5, city='x', detailed=True)", "{'city': 'x', 'days': 5, 'detailed': True}"),
    ("weather('x', '4')['days']", "4"),  # as pydantic converts
    ("double(4)", "8.0"), ("await double(4)", "8.0"),
    ("[await double(i) for i in (1, 2)]", "[2.0, 4.0]"),
    ("async def f():\n    return await double(1) + double(2)\nawait f()", "6.0"),
    ("add(1, 2, c=3)", "6"), ("gcd(12, 18)", "6"),
    ("order('tea', 2)", "'2 x tea'"), ("order(item='tea')", "'1 x tea'"),
    ("await search('words', limit=3)", "\"{'query': 'words', 'limit': 3}\""),
    ("echo(2**80)", str(2**80)),
    ("echo((1, [2.5, None, True, 'x']))", "[1, [2.5, None, True, 'x']]"),
    ("echo({3, 1, 2})", "[1, 2, 3]"), ("echo(float('inf'))", "inf"),
    ("echo({'a': {'b': 1}})", "{'a': {'b': 1}}"),
    ("import datetime\necho(datetime.date(2024, 1, 2))", "'2024-01-02'"),
    ("import fractions, decimal\necho([fractions.Fraction(1, 4), decimal.Decimal('0.5')])",
     "[0.25, 0.5]"),
    ("import sympy\necho([sympy.Integer(3), sympy.pi.evalf(5)])[0]", "3"),
    ("echo('\\ud800 \\x00 🤖 \\u2028') == '\\ud800 \\x00 🤖 \\u2028'", "True"),
    ("echo(value=range(3))", "[0, 1, 2]"),
    ("len(echo('x' * 1_000_000))", "1000000"),
    ("strange()", "[[1, 2], 1180591620717411303424, inf, 'a', None]"),
    ("list(map(double, [1, 2]))", "[2.0, 4.0]"),
    ("weather.__name__, weather.__doc__.split(chr(10))[0]",
     "('weather', 'def weather(city: str, days: int = 3, *, detailed: bool = False) -> dict:')"),
])
def test_tools_take_and_return_data(output, code, printed):
    assert output(code) == printed + "\n"


@pytest.mark.parametrize("code, last", [
    ("weather()", "TypeError: weather: missing a required argument: 'city'"),
    ("weather('a', 1, 2)", "TypeError: weather: too many positional arguments"),
    ("weather('a', town='b')", "TypeError: weather: got an unexpected keyword argument 'town'"),
    ("weather('a', days='many')", "TypeError: weather: days: Input should be a valid integer, "
                                  "unable to parse string as an integer"),
    ("weather(3)", "TypeError: weather: city: Input should be a valid string"),
    ("weather('Atlantis')", "ValueError: weather: no such city"),
    ("order('nothing')", "ToolError: order: sold out"),
    ("order('tea', 'two')", "TypeError: order: count: 'two' is not of type 'integer'"),
    ("order()", "TypeError: order: 'item' is a required property"),
    ("order('a', 1, 2)", "TypeError: order: takes 2 arguments, but 3 were given"),
    ("order('a', item='b')", "TypeError: order: got item twice"),
    ("search('q', limit=11)", "TypeError: search: limit: 11 is greater than the maximum of 10"),
    ("search('q', page=1)", "TypeError: search: has no argument 'page'; it has: query, limit"),
    ("sleepy(5)", "TimeoutError: sleepy: no result after 0.5 s"),
    ("echo(print)", "TypeError: echo: tools take only data (numbers, text, lists, dicts), and "
                    "print is not"),
    ("gcd('a')", "TypeError: gcd: 'str' object cannot be interpreted as an integer"),
    ("echo('x' * 5_000_000)", "ToolError: echo: the arguments are too large"),
    ("for i in range(300): echo(i)", "RuntimeError: echo: too many calls of tools in one step "
                                     "(at most 200)"),
])
def test_an_error_of_a_tool_is_shown_as_the_tools(run, code, last):
    observation = run(code)
    final = observation.error.splitlines()[-1]
    assert final == last
    assert not observation.state_lost and str(ROOT) not in observation.error
    assert observation.error.count("File ") == 1


def test_an_error_of_a_tool_can_be_caught(output):
    assert output("try:\n    weather('Atlantis')\nexcept ValueError as e:\n    print(e)"
                  ) == "weather: no such city\n"
    assert output("try:\n    order('nothing')\nexcept ToolError as e:\n    print('caught')"
                  ) == "caught\n"
    assert output("isinstance(ToolError('x'), RuntimeError)") == "True\n"


def test_a_slow_tool_does_not_use_up_the_steps_time():
    async def work(sandbox):
        return [await sandbox.run(code) for code in (
            "x = 5", "sleepy(1.5)", "x", "while True: pass", "x")]

    steps = with_sandbox(work, [sleepy], seconds=0.7, tool_seconds=5)
    assert [step.output for step in steps] == ["", "'late'\n", "5\n", "", "5\n"]
    assert not any(step.state_lost for step in steps) and "TimeoutError" in steps[3].error


def test_a_tool_may_be_replaced_by_the_code(output):
    output("def echo(x): return 'mine'", "own tools")
    assert output("echo(1)", "own tools") == "'mine'\n"
    assert output("echo(1)") == "1\n"


def test_an_async_tool_that_is_cancelled_by_its_own_doing_is_an_error():
    async def gives_up():
        raise asyncio.CancelledError

    async def work(sandbox):
        return await sandbox.run("gives_up()"), await sandbox.run("1")

    failed, after = with_sandbox(work, [gives_up])
    assert failed.error.splitlines()[-1] == "RuntimeError: gives_up: the tool was cancelled"
    assert after.output == "1\n"


@pytest.mark.parametrize("made, message", [
    ([lambda x: x], "a tool needs a name that Python code can use, not '<lambda>'"),
    ([3], "a tool is a function or a BaseTool, not int"),
    ([echo, echo], "two tools are called echo"),
    ([StructuredTool(name="a-b", description="x", func=echo, args_schema=Order)],
     "a tool needs a name that Python code can use, not 'a-b'"),
])
def test_what_can_be_no_tool_is_refused(made, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_tools(made)


HELD = object()


@in_sandbox
def uses_held():
    return HELD


def test_a_tool_that_cannot_be_shipped_is_refused():
    with pytest.raises(ValueError, match="uses HELD, which cannot be shipped"):
        make_tools([uses_held])
    factor = 2

    @in_sandbox
    def closed_over(x):
        return factor * x

    with pytest.raises(ValueError, match="without variables of another function"):
        make_tools([closed_over])


def test_tools_are_described_as_the_prompt_shows_them():
    assert describe(derivative) == (
        'def derivative(f, x, h=1e-05):\n    """Compute the numerical derivative of function f at '
        'point x using central difference."""')
    assert describe(double) == 'def double(x: float) -> float:\n    """Twice x."""'
    assert describe(order) == ('def order(item: str, count: int = 1):\n    """Order something.\n\n'
                               '    - item: what"""')
    assert describe(mcp_like).startswith("def search(query: str, limit: int = None):")
    assert describe(add) == "def add(*numbers: int, **named: int) -> int:\n    ..."


NOTHING = object()


def documented(path: str = "C:\\new", mark=NOTHING) -> "list[Path]":
    """Says \\n, \"\"\" and "quoted\""""


@pytest.mark.parametrize("tool", [*TOOLS, documented])
def test_a_description_is_python(tool):
    tree = ast.parse(describe(tool))
    assert isinstance(tree.body[0], ast.FunctionDef) and len(tree.body) == 1


def test_the_tools_of_an_mcp_server(tmp_path):
    """A real server on stdio, through langchain-mcp-adapters."""
    from langchain_mcp_adapters.client import MultiServerMCPClient

    server = tmp_path / "server.py"
    server.write_text("from mcp.server.fastmcp import FastMCP\nserver = FastMCP('math')\n"
                      "@server.tool()\ndef plus(a: int, b: int) -> int:\n    'a + b'\n"
                      "    if a < 0:\n        raise ValueError('negative')\n    return a + b\n"
                      "server.run()\n")

    async def main():
        client = MultiServerMCPClient({"math": {
            "transport": "stdio", "command": sys.executable, "args": [str(server)]}})
        async with Sandbox(await client.get_tools(), spare=False) as sandbox:
            return [await sandbox.run(code) for code in (
                "plus(2, b=3)", "plus('x', 1)", "plus(-1, 1)", "1")]

    good, wrong, failed, after = asyncio.run(main())
    assert good.error is None and good.output == "'5'\n"
    assert wrong.error.splitlines()[-1] == "TypeError: plus: a: 'x' is not of type 'integer'"
    assert "negative" in failed.error.splitlines()[-1] and after.output == "1\n"


# ---- langchain-sandbox's class ------------------------------------------------------------------

def test_the_class_of_langchain_sandbox():
    before = processes()

    async def main():
        sandbox = OfflinePyodideSandbox(stateful=True, tools=[derivative])
        first = await sandbox.execute("x = 2\nprint('hello\\nyou')")
        second = await sandbox.execute("x + 1", session_metadata=first.session_metadata)
        failed = await sandbox.execute("1/0", session_metadata=first.session_metadata)
        late = await sandbox.execute("while True: pass", timeout_seconds=0.5)
        await sandbox.aclose()
        small = await OfflinePyodideSandbox().execute("b = bytearray(80 << 20)",
                                                      memory_limit_mb=100)
        return first, second, failed, late, small

    first, second, failed, late, small = asyncio.run(main())
    assert (first.status, first.stdout, first.stderr) == ("success", "hello\nyou\n", None)
    assert second.stdout == "3\n" and not second.session_metadata["state_lost"]
    assert failed.status == "error"
    assert failed.stderr.endswith("ZeroDivisionError: division by zero")
    assert "TimeoutError" in late.stderr and small.stderr.endswith("MemoryError")
    assert processes() <= before
    with pytest.raises(ValueError, match="allow_net: this sandbox gives no permissions"):
        OfflinePyodideSandbox(allow_net=True)


def test_limits_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().seconds = 3
