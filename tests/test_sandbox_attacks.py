"""What hostile code tries from within the sandbox: each attempt is blocked or bounded, by Deno and
the process alone (`no`) and inside bubblewrap too (`auto`); and the next conversation works.

An attack that leaves the process alive runs in one conversation per layer; one that ends it, or
floods something, gets a sandbox of its own. `js(...)` is the strongest attacker: it runs JavaScript
in the worker, where Pyodide is no boundary at all.
"""
import asyncio
import json
import os
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from codeact.process import has_second_layer
from codeact.runtime import RUNTIME
from codeact.sandbox import Limits, Sandbox

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["no", "auto"]
SECRET = "sesame-7c1f"


def secret() -> str:
    """A tool that returns what only the host may know."""
    return SECRET


def greet(name: str, times: int = 1) -> str:
    """A tool with a schema."""
    return ", ".join([f"hello {name}"] * times)


def js(body: str) -> str:
    """Python that runs JavaScript: an async function's body, whose result or error is shown."""
    code = ("(async () => { try { return String(await (async () => {" + body + "})()) }"
            " catch (error) { return 'blocked: ' + error } })()")
    return f"from pyodide.code import run_js\nprint(await run_js({code!r}))"


@pytest.fixture(scope="module", params=LAYERS)
def run(request):
    """`run(code, conversation)` in a sandbox of either layer."""
    os.environ["CODEACT_TEST_SECRET"] = SECRET
    loop = asyncio.new_event_loop()

    async def opened():
        return Sandbox([greet], Limits(seconds=15, second_layer=request.param))

    sandbox = loop.run_until_complete(opened())
    yield lambda code, name="attacker": loop.run_until_complete(sandbox.run(code, name))
    assert loop.run_until_complete(sandbox.run("greet('next')", "next")).output == "'hello next'\n"
    loop.run_until_complete(sandbox.close())
    loop.close()
    del os.environ["CODEACT_TEST_SECRET"]


@pytest.fixture(scope="module")
def alone():
    """`alone(code, …)`: the steps' observations in a conversation of their own; each time another
    conversation, which began before, goes on as if nothing had happened."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    loop = asyncio.new_event_loop()

    async def opened():
        return Sandbox([greet], Limits(grace=0.5, resident=800 << 20), spare=False)

    async def attack(steps, seconds):
        observations = [await sandbox.run(code, "attacker", seconds) for code in steps]
        await sandbox.end("attacker")
        attacks.append(steps)
        after = await sandbox.run("count += 1\ngreet(str(count))", "other")
        assert after.error is None and after.output == f"'hello {len(attacks)}'\n"
        return observations

    attacks = []
    sandbox = loop.run_until_complete(opened())
    loop.run_until_complete(sandbox.run("count = 0", "other"))
    yield lambda *steps, seconds=1: loop.run_until_complete(attack(steps, seconds))
    loop.run_until_complete(sandbox.close())
    loop.close()
    left = {child.pid for child in psutil.Process().children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE}
    assert left <= before


def test_this_machine_tests_the_second_layer():
    """Where bubblewrap is installed and may work, `auto` does use it."""
    probe = os.system("bwrap --unshare-all --ro-bind / / --proc /proc true 2>/dev/null") == 0
    assert has_second_layer() == probe


# ---- The host's files, environment, processes, network -----------------------------------------

BLOCKED = {
    "read a file": "return Deno.readTextFileSync('/etc/passwd')",
    "read a file of node": "return (await import('node:fs')).readFileSync('/etc/passwd')",
    "fetch a file": "return (await fetch('file:///etc/passwd')).text()",
    "import a file": "return import('file:///etc/passwd')",
    "list a folder": "return [...Deno.readDirSync('/')]",
    "stat": "return Deno.statSync('/etc/passwd').size",
    "write a file": "return Deno.writeTextFileSync('/tmp/codeact-attack', 'x')",
    "a temporary file": "return Deno.makeTempFileSync()",
    "a link": "return Deno.symlinkSync('/etc/passwd', '/tmp/codeact-attack')",
    "a database": "const { DatabaseSync } = await import('node:sqlite');"
                  "return new DatabaseSync('/tmp/codeact-attack')",
    "a database attached": "const { DatabaseSync } = await import('node:sqlite');"
                           "new DatabaseSync(':memory:').exec(`attach '/tmp/codeact-attack' as a;"
                           "create table a.b(c)`); return 'attached'",
    "the heap to a file":
        "return (await import('node:v8')).writeHeapSnapshot('/tmp/codeact-attack')",
    "the environment": "return JSON.stringify(Deno.env.toObject())",
    "a process": "return new Deno.Command('id').outputSync().stdout",
    "a process of node": "return (await import('node:child_process')).execSync('id')",
    "kill the host": "return Deno.kill(HOST)",
    "kill everything": "return process.kill(-1, 'SIGKILL')",
    "fetch": "return (await fetch('http://127.0.0.1:PORT')).text()",
    "a socket": "return (await Deno.connect({ port: PORT })).write(new Uint8Array(1))",
    "a datagram": "return Deno.listenDatagram({ port: 0, transport: 'udp' })",
    "a server": "return Deno.serve({ port: 0 }, () => new Response('x'))",
    "a Unix socket": "return Deno.connect({ transport: 'unix', path: '/run/x' })",
    "a socket of node": "const net = await import('node:net'); return new Promise((done, fail) =>"
                        "net.connect(PORT, '127.0.0.1').on('connect', done).on('error', fail))",
    "a WebSocket": "return new Promise((done, fail) => { const socket = new WebSocket("
                   "'ws://127.0.0.1:PORT'); socket.onopen = () => done('open');"
                   "socket.onerror = (event) => fail(event.message); })",
    "a name": "return (await import('node:dns/promises')).lookup('localhost')",
    "a library": "return Deno.dlopen('/lib/x86_64-linux-gnu/libc.so.6', {})",
    "a native module": "const { createRequire } = await import('node:module');"
                       "return createRequire('file:///')('/tmp/x.node')",
    "the computer's name": "return Deno.hostname()",
    "the user": "return JSON.stringify((await import('node:os')).userInfo())",
    "the network's interfaces": "return JSON.stringify(Deno.networkInterfaces())",
    "the mask of new files": "return Deno.umask(0)",
    "the inspector": "(await import('node:inspector')).open(0); return 'open'",
    "the inspector of itself": "const { Session } = await import('node:inspector');"
                               "const session = new Session(); session.connect(); return 'open'",
    "a package": "return import('npm:lodash')",
    "a module of the network": "return import('http://127.0.0.1:PORT/x.js')",
    "storage": "return localStorage.length",
    "caches": "return (await caches.open('x')).put('http://a/b', new Response('x'))",
    "a key-value store": "return Deno.openKv()",
    "more permissions": "const { state } = await Deno.permissions.request({ name: 'read' });"
                        "if (state !== 'granted') throw state",
    "a question on the terminal": "return prompt('password?')",
    "a worker with permissions": "return new Worker('data:text/javascript,1', { type: 'module',"
                                 "deno: { permissions: { read: true } } })",
    "a file by a new worker": "return new Promise((done, fail) => { const worker = new Worker("
                              "'data:text/javascript,try{postMessage(Deno.readTextFileSync(`/etc/"
                              "passwd`))}catch(e){postMessage(`E`+e)}', { type: 'module' });"
                              "worker.onmessage = ({ data }) => data[0] === 'E' ? fail(data) :"
                              "done(data) })",
    "a file by a worker thread": "const { Worker } = await import('node:worker_threads');"
                                 "return new Promise((done, fail) => new Worker(`const { parentPort"
                                 " } = require('worker_threads'); try { parentPort.postMessage("
                                 "Deno.readTextFileSync('/etc/passwd')) } catch (e) { parentPort"
                                 ".postMessage('E' + e) }`, { eval: true }).on('message', (text) =>"
                                 "text[0] === 'E' ? fail(text) : done(text)).on('error', fail))",
    "a file by a constructor": "return (() => {}).constructor('return Deno.readTextFileSync("
                               "`/etc/passwd`)')()",
    "the engine's operations": "return Deno[Deno.internal].core.ops.op_fs_read_file_sync("
                               "'/etc/passwd')",
    "a binding of node": "return process.binding('fs').readFileUtf8('/etc/passwd', 0)",
    "the runner's folder": "return Deno.readTextFileSync('RUNNER/worker.js')",
    "its own Pyodide": "return Deno.readTextFileSync('PYODIDE/pyodide-lock.json')",
    "the runner as a module": "return import('file://RUNNER/main.js')",
    "writing its own Pyodide": "return Deno.writeTextFileSync('PYODIDE/pyodide.mjs', 'x')",
    "writing the runner": "return Deno.writeTextFileSync('RUNNER/worker.js', 'x')",
    "its own memory": "return Deno.readFileSync('/proc/self/mem')",
    "its own standard input by name": "return Deno.readTextFileSync('/dev/stdin')",
}


@pytest.fixture(scope="module")
def port():
    """A server that notes whether anyone reached it."""
    reached = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def accept():
            try:
                while True:
                    server.accept()[0].close()
                    reached.append(1)
            except OSError:
                pass

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        with socket.create_connection(server.getsockname()):
            pass
        while not reached:  # the server does notice
            time.sleep(0.01)
        assert reached == [1]


@pytest.mark.parametrize("attack", BLOCKED)
def test_javascript_reaches_nothing_of_the_host(run, port, attack):
    for runner, pyodide in ((ROOT / "codeact/runner", RUNTIME / "pyodide"),
                            ("/runner", "/pyodide")):
        body = BLOCKED[attack].replace("PORT", str(port)).replace("HOST", str(os.getpid()))
        body = body.replace("RUNNER", str(runner)).replace("PYODIDE", str(pyodide))
        observation = run(js(body))
        assert observation.error is None and observation.output.startswith("blocked: ")
        if "RUNNER" not in BLOCKED[attack] and "PYODIDE" not in BLOCKED[attack]:
            break
    assert not Path("/tmp/codeact-attack").exists()


@pytest.mark.parametrize("code, name", [
    ("open('/etc/passwd')", "FileNotFoundError"), ("import os\nos.fork()", "OSError"),
    ("import os\nos.execv('/bin/id', ['id'])", "OSError"),
    ("import subprocess\nsubprocess.run(['id'])", "OSError"),
    ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
    ("import multiprocessing\nmultiprocessing.Process(target=print).start()", ""),
    ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "OSError"),
    ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", "urllib.error.URLError"),
    ("import pyodide_js\npyodide_js.mountNodeFS('/host', '/etc')", "pyodide.ffi.JsException"),
    ("import micropip", "ModuleNotFoundError"),
    ("import sys\nsys.stdin.read()", "AttributeError"), ("open(0).read()", "OSError"),
])
def test_python_reaches_nothing_of_the_host(run, code, name):
    observation = run(code)
    assert observation.error.splitlines()[-1].startswith(name) and not observation.state_lost


def test_the_environment_holds_nothing_of_the_host(run):
    observation = run("import os\nprint(dict(os.environ))\nimport sys\nprint(sys.argv, sys.path)")
    assert observation.error is None and SECRET not in observation.output
    assert str(ROOT) not in observation.output and str(Path.home()) not in observation.output
    shown = run(js("return JSON.stringify(Deno.args) + Deno.mainModule + Deno.cwd()")).output
    assert str(ROOT) not in shown and SECRET not in shown


def test_graphics_cannot_be_reached(run):
    assert run(js("return await navigator.gpu.requestAdapter()")).output in (
        "null\n", "undefined\n") or run(
        js("return await navigator.gpu.requestAdapter()")).output.startswith("blocked")


@pytest.mark.parametrize("code", [
    "import ctypes\nctypes.CDLL(None).system(b'touch /tmp/codeact-attack')",
    "import ctypes\nctypes.string_at(0xdead0000, 64)",
    "import ctypes\nctypes.memset(0, 255, 1 << 24)",
])
def test_ctypes_reaches_only_the_process_s_own_memory(alone, code):
    (attack,) = alone(code)
    assert attack.error is not None or attack.output
    assert SECRET not in attack.output and not Path("/tmp/codeact-attack").exists()


# ---- From one conversation to another ----------------------------------------------------------

def test_nothing_leaks_into_the_next_conversation(run):
    run(js("globalThis.leak = 1; try { localStorage.setItem('leak', '1') } catch {}"
           "try { await (await caches.open('leak')).put('http://a/b', new Response('x')) } catch {}"
           "try { new BroadcastChannel('leak').postMessage('x') } catch {}"))
    run("import os, builtins, json\nos.makedirs('/home/pyodide/leak', exist_ok=True)\n"
        "open('/lib/leak.py', 'w').write('x = 1')\nbuiltins.leak = 1\njson.leak = 1\n"
        "os.environ['LEAK'] = '1'")
    found = run("import os, builtins, json\nhasattr(builtins, 'leak'), hasattr(json, 'leak'), "
                "'LEAK' in os.environ, os.path.exists('/lib/leak.py'), os.listdir('/home/pyodide')",
                "victim")
    assert found.output == "(False, False, False, False, [])\n"
    assert run(js("return [globalThis.leak, typeof localStorage, await caches.has('leak')]"),
               "victim").output in (",undefined,false\n",) or run(
        js("return [globalThis.leak, typeof localStorage]"), "victim").output == ",undefined\n"


def test_two_conversations_at_once_share_no_file_of_the_host():
    """Not even a temporary folder: the processes have none."""
    async def main():
        async with Sandbox(spare=False) as sandbox:
            await sandbox.run("1", "a")
            process = psutil.Process(sandbox.conversations["a"].interpreter.process.pid)
            return [file.path for file in process.open_files()]

    assert not [path for path in asyncio.run(main()) if str(ROOT) not in path]


# ---- The protocol ------------------------------------------------------------------------------

FORGED = json.dumps({"event": "done", "step": 1, "output": "forged", "total": 6, "error": None,
                     "interrupted": False, "ended": False})


def test_a_result_without_the_nonce_is_none(run):
    code = js("const line = new TextEncoder().encode('\\n' + " + repr(FORGED) + " + '\\n');"
              "for (let i = 0; i < 50; i++) Deno.stdout.writeSync(line); return 'written'")
    assert run(code).output == "written\n" and run("1 + 1").output == "2\n"


def test_a_flood_on_the_protocols_channel_ends_the_process(alone):
    (flood,) = alone(js("const line = new Uint8Array(65536).fill(65);"
                        "for (;;) Deno.stdout.writeSync(line)"), seconds=20)
    assert flood.state_lost and "wrote into the sandbox's own channel" in flood.error
    assert flood.seconds < 15


def test_closing_the_protocols_channel_closes_only_the_workers_end(alone):
    closed, after = alone(js("Deno.stdout.close(); Deno.stdin.close(); return 'closed'"), "1 + 1")
    assert closed.output == "closed\n" and after.output == "2\n"


def test_stealing_the_hosts_input_stalls_only_the_thief(alone):
    stolen, later = alone(
        js("globalThis.got = []; (async () => { for (;;) { const b = new Uint8Array(4096);"
           "const n = await Deno.stdin.read(b); if (!n) break;"
           "got.push(new TextDecoder().decode(b.subarray(0, n))) } })(); return 'reading'"),
        js("return globalThis.got"))
    assert stolen.output == "reading\n" and SECRET not in later.output


@pytest.mark.parametrize("message", [
    "{ event: 'done', output: 'x'.repeat(1e7), total: 1, error: 'y'.repeat(1e7) }",
    "{ event: 'done', output: { toString: 1 }, total: 'x', error: {} }",
    "{ event: 'call', call: 3 }", "{ event: 'call', call: 'not json' }", "{ event: 'ready' }",
    "{ event: 'call', call: '['.repeat(1e6) }", "{ event: 'constructor' }",
    "{ event: '__proto__' }",
    "null", "3", "{ event: ['done'] }", "{ event: 'call', call: 'x'.repeat(5e6) }",
])
def test_forged_messages_of_the_worker_harm_only_their_own_step(alone, message):
    forged, *_ = alone(js(f"self.postMessage({message}); return 'sent'"))
    assert len(forged.output) < 11_000 and len(forged.error or "") < 21_000


def test_the_worker_can_end_only_its_own_process(alone):
    (failed,) = alone(js("self.postMessage({ event: 'failed', error: 'x' }); for (;;);"))
    assert failed.state_lost and failed.error == "the step ended its process: x"


@pytest.mark.parametrize("request_text", [
    '{"tool": "secret", "args": [], "kwargs": {}}',
    '{"tool": "os.system", "args": ["touch /tmp/codeact-attack"], "kwargs": {}}',
    '{"tool": "__class__", "args": [], "kwargs": {}}',
    '{"tool": ["greet"], "args": [], "kwargs": {}}',
    '{"tool": null, "args": [], "kwargs": {}}', '{"tool": "greet"}', '{}', '[]', '3', 'null', '',
    '{"tool": "greet", "args": {}, "kwargs": {}}', '{"tool": "greet", "args": [], "kwargs": []}',
    '{"tool": "greet", "args": ["a", "many"], "kwargs": {}}',
    '{"tool": "greet", "args": [{"a": 1}], "kwargs": {}}',
    '{"tool": "greet", "args": [], "kwargs": {"__class__": 1}}',
    '{"tool": "greet", "args": ["a", 1, 2, 3], "kwargs": {"self": 1}}',
    '{"tool": "greet", "args": ["a", 1e999], "kwargs": {}}',
    '{"tool": "greet", "args": ["a", ' + "9" * 5000 + '], "kwargs": {}}',
    '{"tool": "greet", "args": [' + "[" * 100_000 + "]" * 100_000 + '], "kwargs": {}}',
])
def test_forged_calls_are_refused(run, request_text):
    observation = run(f"import _host\nprint(_host.call({request_text!r}))")
    answer = json.loads(observation.output)
    assert set(answer) == {"kind", "error"} and SECRET not in observation.output
    assert str(ROOT) not in observation.output and not Path("/tmp/codeact-attack").exists()
    assert run("greet('x')").output == "'hello x'\n"


def test_a_tool_cannot_be_made_to_return_more_than_the_limit(run):
    text = run("greet('x' * 1000, 5_000)").error.splitlines()[-1]
    assert text == "ValueError: greet: the result is larger than 4 MiB"


# ---- Bombs -------------------------------------------------------------------------------------

@pytest.mark.parametrize("code", [
    "while True: pass", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "10 ** 10 ** 9",
    "sum(range(10 ** 12))", "import time\ntime.sleep(10 ** 6)",
    js("for (;;);"), js("Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0)"),
    js("await new Promise(() => {})"), js("Deno.exit(0)"), js("self.close()"),
    js("process.reallyExit(0); for (;;);"),
    "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
    "def again():\n    try:\n        while True: pass\n    finally: again()\nagain()",
    "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "import faulthandler\nfaulthandler._sigsegv()", "import os\nos.abort()",
])
def test_a_step_that_does_not_end_is_ended(alone, code):
    (bomb,) = alone(code)
    assert bomb.error and bomb.seconds < 30


@pytest.mark.parametrize("code", [
    "'x' * 10**10", "x = 'x'\nwhile True: x += x", "list(range(10**9))", "bytearray(2**31 - 1)",
    js("const all = []; for (;;) all.push(new Uint8Array(2 ** 26).fill(1))"),
    js("const all = []; for (;;)"
       "all.push(new WebAssembly.Memory({ initial: 1000 }).buffer.slice())"),
    js("const all = []; for (;;) all.push({ text: Math.random() })"),
    js("for (;;) self.postMessage(new Uint8Array(2 ** 24))"),
    js("const url = 'data:text/javascript,' + encodeURIComponent('const a = []; for (;;) a.push("
       "new Uint8Array(2 ** 24).fill(1))'); for (let i = 0; i < 50; i++) new Worker(url, "
       "{ type: 'module' }); for (;;);"),
])
def test_a_step_that_takes_all_memory_is_ended(alone, code):
    most = []
    done = threading.Event()

    def watch():
        while not done.wait(0.02):
            sizes = [0]
            for child in psutil.Process().children(recursive=True):
                try:
                    sizes.append(child.memory_info().rss)
                except psutil.Error:
                    pass  # it has just ended
            most.append(max(sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        (bomb,) = alone(code, seconds=20)
    finally:
        done.set()
        watcher.join()
    assert bomb.error and 0 < max(most) < 2400 << 20


def test_much_output_takes_little_memory_of_the_host(alone):
    before = psutil.Process().memory_info().rss
    out, raw = alone("for i in range(2000): print('x' * 100_000)",
                     "import os\nfor i in range(2000): os.write(1, b'x' * 100_000)", seconds=20)
    for observation in (out, raw):
        assert observation.error is None and len(observation.output) < 11_000
        assert "cut: the step printed 200,0" in observation.output
    assert psutil.Process().memory_info().rss - before < 100 << 20


def test_nothing_burns_between_two_steps():
    """A timer that never ends has no time when no step runs."""
    async def main():
        async with Sandbox(spare=False) as sandbox:
            await sandbox.run(js("setTimeout(() => { for (;;); }, 300)"))
            process = psutil.Process(sandbox.conversations["default"].interpreter.process.pid)
            first = sum(process.cpu_times()[:2])
            await asyncio.sleep(1)
            status = process.status()
            return status, sum(process.cpu_times()[:2]) - first

    status, used = asyncio.run(main())
    assert status == psutil.STATUS_STOPPED and used < 0.1
