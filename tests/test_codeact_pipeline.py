"""codeact_pipeline.py as users start it: a scripted model, the real sandbox, a terminal or a pipe;
and once the shipped model behind the real server."""
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from benchmarks.scripted_endpoint import Reply, Script, in_order, scripted_endpoint
from codeact_pipeline import EXAMPLE
from model import MINI_DIR

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds that a busy machine may take
PROGRAM = """\
```python
from math import pi, log

def f(x):
    return x * log(x)

# Using the provided derivative function to calculate the derivative of f at x=pi
derivative_value = derivative(f, x=pi)

print(f"The derivative of f(x)=xlnx at x=π is: {derivative_value}")
```
"""
ANSWER = "The result is approximately \\(2.144729885888985\\)."
TRANSCRIPT = f"""\
🤔: {EXAMPLE}
🤖:
{PROGRAM}
******************************** System Message ********************************

The code has been executed, and the output is as follows:
The derivative of f(x)=xlnx at x=π is: 2.144729885888985

********************************************************************************

{ANSWER}
"""
SLEEP = "```python\nimport time\nprint('asleep')\ntime.sleep(1000)\n```"


def command(url: str, *options: str) -> list[str]:
    return [sys.executable, "-u", "codeact_pipeline.py", "--base-url", url, *options]


def run(url: str, *options: str, text: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(command(url, *options), cwd=ROOT, input=text, capture_output=True,
                          encoding="utf-8", timeout=PATIENCE)


def lines(error: str) -> list[str]:
    return error.strip().splitlines()


# ---- What is printed -----------------------------------------------------------------------------

def test_the_example_prints_what_the_specification_shows(tmp_path):
    script, trace = Script(in_order(PROGRAM, ANSWER)), tmp_path / "run.json"
    with scripted_endpoint(script) as url:
        done = run(url, "--question", EXAMPLE, "--trace", str(trace))
    assert (done.stdout, done.stderr, done.returncode) == (TRANSCRIPT, "", 0)
    assert [message["role"] for message in script.requests[-1]["messages"]] == [
        "system", "user", "assistant", "user"]
    assert "def derivative(f, x, h=1e-05)" in script.requests[0]["messages"][0]["content"]

    kept = json.loads(trace.read_text("utf-8"))
    assert kept["model"] == "scripted/model" and kept["settings"]["max_steps"] == 8
    (kept_run,) = kept["runs"]
    assert (kept_run["question"], kept_run["answer"]) == (EXAMPLE, ANSWER)
    assert [event["kind"] for event in kept_run["events"]] == [
        "message", "code", "observation", "message", "answer"]
    assert kept_run["events"][0]["text"] == PROGRAM
    assert list(tmp_path.iterdir()) == [trace]


def test_a_pipe_gets_an_answer_to_each_line_and_variables_stay():
    define, show = "```python\nx = 41\nprint('set')\n```", "```python\nprint(x + 1)\n```"
    script = Script(in_order(define, "好了。", show, "42", "forgotten", show, "?"))
    with scripted_endpoint(script) as url:
        done = run(url, text="令x等于41\n\nWhat is x + 1?\n/clear\nAre you there?\nAnd x?\n")
    boxes = done.stdout.split("*" * 32 + " System Message " + "*" * 32)
    assert done.returncode == 0 and len(boxes) == 4
    assert "代码已执行，输出如下：\nset\n" in boxes[1]
    assert "as follows:\n42\n" in boxes[2]
    assert "NameError" in boxes[3]
    assert done.stdout.startswith("🤔: 令x等于41\n🤖:\n```python\n")
    assert len(script.requests[4]["messages"]) == 2  # after /clear nothing came along


def test_the_key_is_sent_and_never_kept(tmp_path):
    script, trace = Script(in_order("Hello."), key="a-secret"), tmp_path / "run.json"
    with scripted_endpoint(script) as url:
        done = run(url, "--question", "Hi", "--api-key", "a-secret", "--trace", str(trace))
        assert (done.stdout, done.returncode) == ("🤔: Hi\n🤖:\nHello.\n", 0)
        assert "a-secret" not in trace.read_text()
        refused = run(url, "--question", "Hi", "--api-key", "another")
    assert refused.returncode == 1 and len(lines(refused.stderr)) == 1
    assert "refuses the key" in refused.stderr


@pytest.mark.parametrize("options, words", [
    (["--base-url", "http://127.0.0.1:9"], "nothing answers at http://127.0.0.1:9/v1; start"),
    (["--base-url", "localhost"], "'localhost' is no URL"),
    (["--model", "other"], "serves no other, but scripted/model"),
    (["--max-steps", "0"], "max_steps is 0"),
    (["--context", "100", "--max-tokens", "100"], "leaves no room"),
    (["--trace", "/proc/no/trace.json"], "cannot write the trace /proc/no/trace.json: "),
    (["--checkpoints", "/proc/no/a.sqlite"], "/proc/no/a.sqlite: unable to open"),
    (["--no-such-option"], "unknown option --no-such-option"),
    (["--context", "60", "--max-tokens", "8"], "the question is too long"),
])
def test_what_cannot_work_is_one_line(options, words):
    with scripted_endpoint(Script(in_order("Hello."))) as url:
        done = run(url, "--question", "Hi" * 90, *options)
    assert done.returncode == 1 and words in done.stderr
    assert len(lines(done.stderr)) == 1 and done.stderr.startswith("codeact_pipeline.py: ")


def test_a_conversation_goes_on_from_its_file(tmp_path):
    script, file = Script(in_order("I will.", "42")), str(tmp_path / "agent.sqlite")
    with scripted_endpoint(script) as url:
        for question in ("Remember 42.", "Which number?"):
            assert run(url, "--question", question, "--checkpoints", file).returncode == 0
    assert [message["content"] for message in script.requests[1]["messages"]][1:] == [
        "Remember 42.", "I will.", "Which number?"]


# ---- Ctrl-C --------------------------------------------------------------------------------------

def children(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=PATIENCE)[1]


@contextmanager
def on_terminal(url: str, *options: str) -> Iterator[tuple[subprocess.Popen, "Terminal"]]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(url, *options), cwd=ROOT, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        yield process, Terminal(ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


class Terminal:
    def __init__(self, descriptor: int):
        self.descriptor, self.seen = descriptor, b""

    def wait_for(self, text: str) -> None:
        """Read on until this has come after all that was waited for before."""
        while text.encode() not in self.seen:
            readable, _, _ = select.select([self.descriptor], [], [], PATIENCE)
            assert readable, f"no {text!r} after {self.seen.decode(errors='replace')!r}"
            self.seen += os.read(self.descriptor, 4096)
        self.seen = self.seen.partition(text.encode())[2]

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())


@pytest.mark.timeout(3 * PATIENCE)
def test_on_a_terminal_the_example_comes_first_and_ctrl_c_ends_only_an_answer():
    script = Script(in_order(PROGRAM, ANSWER, SLEEP, "```python\nprint(derivative)\n```", "Done."))
    with scripted_endpoint(script) as url, on_terminal(url) as (process, terminal):
        terminal.wait_for("2.144729885888985")
        terminal.wait_for("The result is approximately")
        terminal.wait_for("🤔: ")
        terminal.type("sleep\n")
        terminal.wait_for("time.sleep(1000)")
        terminal.wait_for("```")
        sandbox = wait_for_children(process)
        while any(child.status() == psutil.STATUS_STOPPED for child in sandbox):
            time.sleep(0.05)  # so it is between two steps
        os.kill(process.pid, signal.SIGINT)
        terminal.wait_for("🤔: ")
        assert gone(sandbox)
        terminal.type("again\n")
        terminal.wait_for("System Message")
        terminal.wait_for("earlier variables")  # the model is told that they are gone
        terminal.wait_for("Done.")
        left = children(process)
        terminal.type("/exit\n")
        assert process.wait(PATIENCE) == 0 and gone(left)


def wait_for_children(process: subprocess.Popen) -> list[psutil.Process]:
    deadline = time.monotonic() + PATIENCE
    while not (found := children(process)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("reply", [SLEEP, Reply("on and on", endless=True)], ids=["code", "model"])
def test_ctrl_c_leaves_no_process_behind(reply, tmp_path):
    script = Script(lambda _: reply, pieces_per_second=50)
    trace = tmp_path / "run.json"
    with scripted_endpoint(script) as url:
        process = subprocess.Popen(command(url, "--question", "Q", "--trace", str(trace)),
                                   cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for line in process.stdout:
            if b"1000" in line or "🤖".encode() in line and reply is not SLEEP:
                break
        if reply is not SLEEP:
            assert process.stdout.read(1)  # the answer has begun
        left = wait_for_children(process) if reply is SLEEP else []
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        error = process.stderr.read().decode()
        assert process.wait(PATIENCE) == 130 and "Traceback" not in error
        assert gone(left)
    (kept,) = json.loads(trace.read_text())["runs"]
    assert kept["error"] == "interrupted"


# ---- The real server -----------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_shipped_model_answers_behind_the_real_server(tmp_path):
    """How well it acts is measured by evaluate.py; here, that it answers as the README shows."""
    pytest.importorskip("lmdeploy", reason="LMDeploy is published for Linux on x86-64 only")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    trace, log = tmp_path / "run.json", tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "lmdeploy_cli.py", "serve", "api_server", str(MINI_DIR),
             "--server-port", str(port), "--model-name", "yuanmeng-mini",
             "--chat-template", "chat_templates.json"],
            cwd=ROOT, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 300
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        done = run(f"http://127.0.0.1:{port}", "--trace", str(trace), "--max-steps", "2",
                   text=f"{EXAMPLE}\n你是谁\n" + "很长的问题" * 1500 + "\n")
    finally:
        server.terminate()
        server.wait(60)
    assert done.returncode == 0, done.stderr
    kept = json.loads(trace.read_text("utf-8"))
    assert kept["model"] == "yuanmeng-mini"
    assert kept["system"]["zh"].startswith("需要计算时")  # the short prompt, by its name
    assert [run["error"] for run in kept["runs"]] == [None] * 3
    assert all(run["answer"] for run in kept["runs"])
    assert "2.144729885888985" in kept["runs"][0]["answer"]
    assert "缘梦" in kept["runs"][1]["answer"]
    transcript = done.stdout.split("🤔: 你是谁")[0].strip()
    assert transcript.count("```python") == 1
    for readme in ("README.md", "README_en.md"):
        assert transcript in (ROOT / readme).read_text("utf-8"), transcript


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=10).ok
    except requests.ConnectionError:
        return False
