"""One sandbox process: Deno without permissions, on Linux inside bubblewrap if that works here.

Notable: `kill` returns once the process is gone, without awaiting anything, so that no cancelled
task leaves one behind; and a process whose step is over is stopped, so that nothing that the
model's code left running does anything between two steps.
"""
import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import psutil

from codeact.install import RUNTIME, find_deno

RUNNER = Path(__file__).parent / "runner"
# No prompt, no configuration, no download; and no folder in which a cache or localStorage of one
# conversation could wait for the next: below a file there can be none.
DENO_FLAGS = ["--quiet", "--no-prompt", "--no-config", "--no-lock", "--no-npm", "--no-remote",
              "--cached-only", "--no-code-cache", "--unstable-worker-options",
              "--v8-flags=--max-old-space-size=256"]
ENVIRONMENT = {"DENO_DIR": "/dev/null/none", "DENO_NO_UPDATE_CHECK": "1",
               "DENO_WEBGPU_BACKEND": "none",  # else any code may ask the graphics driver
               "HOME": "/nonexistent", "NO_COLOR": "1", "PATH": "/usr/bin:/bin"}
NOISE_LIMIT = 2**20  # bytes that the model's code may write past the protocol


class ProcessEnded(Exception):
    """The process is no more; the message says why."""


class Process:
    """Starts at once. `read` and `send` carry lines of JSON; see runner/main.js."""

    def __init__(self, second_layer: bool, line_limit: int):
        self.nonce = secrets.token_hex(16)
        self.reason = "the step ended its process"  # what `read` raises once it has
        folders = {"pyodide": RUNTIME / "pyodide", "built": RUNTIME / "built", "runner": RUNNER}
        deno, info = find_deno(), None
        prefix, descriptors = [], ()
        if second_layer:
            info, theirs = os.pipe()
            prefix = bubblewrap(deno, folders, theirs)
            deno, descriptors = "/deno", (theirs,)
            folders = {name: Path("/") / name for name in folders}
        self.folders = folders
        readable = ",".join(str(folder) for folder in folders.values())
        command = [*prefix, deno, "run", *DENO_FLAGS, f"--allow-read={readable}",
                   str(folders["runner"] / "main.js")]
        # Not a session of its own: when we die, the kernel then ends even a stopped process.
        group = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            bufsize=0, env=ENVIRONMENT, cwd="/", pass_fds=descriptors, **group)
        self.pid, self.descriptor = self.process.pid, None
        if info is not None:
            os.close(theirs)
            with open(info, "rb") as file:
                text = file.read()
            try:
                self.pid = json.loads(text)["child-pid"]
                self.descriptor = os.pidfd_open(self.pid)
            except (ValueError, ProcessLookupError):
                self.process.kill()
                self.process.wait()
        self.lines = Lines(self.nonce.encode(), line_limit, self.end)
        self.reader = self.writer = None

    async def connect(self) -> None:
        """Make the pipes the running loop's."""
        loop = asyncio.get_running_loop()
        self.reader, _ = await loop.connect_read_pipe(lambda: self.lines, self.process.stdout)
        self.writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, self.process.stdin)

    async def read(self) -> dict:
        """The next message. Raises `ProcessEnded`."""
        message = await self.lines.queue.get()
        if message is None:
            self.lines.queue.put_nowait(None)
            raise ProcessEnded(self.reason)
        return message

    def send(self, message: dict) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")

    def resident(self) -> int:
        """Bytes of memory that the process has; 0 if it is gone."""
        try:
            return psutil.Process(self.pid).memory_info().rss
        except psutil.Error:
            return 0

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, number: int) -> None:
        """To Deno itself: bubblewrap's monitor would not pass it on."""
        try:
            if self.descriptor is not None:
                signal.pidfd_send_signal(self.descriptor, number)
            elif self.alive:
                self.process.send_signal(number)
        except ProcessLookupError:
            pass

    def end(self, reason: str) -> None:
        """End the process, for that reason."""
        self.reason = reason
        self.kill()

    def kill(self) -> None:
        """End the process; it is gone when this returns."""
        self.signal(signal.SIGKILL)
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:  # the monitor alone is left
            self.process.kill()
            self.process.wait()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
        for pipe in (self.reader, self.writer):
            if pipe is not None:
                pipe.close()
        if self.reader is None:
            self.process.stdin.close()
            self.process.stdout.close()
        self.lines.queue.put_nowait(None)


class Lines(asyncio.Protocol):
    """Puts each message that begins with the nonce into `queue`, and None at the end."""

    def __init__(self, nonce: bytes, limit: int, end: Callable[[str], None]):
        self.nonce, self.limit, self.end = nonce, limit, end
        self.queue: asyncio.Queue[dict | None] = asyncio.Queue()
        self.unread, self.noise = b"", 0

    def data_received(self, data: bytes) -> None:
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            if not line.startswith(self.nonce):
                self.noise += len(line)
                continue
            try:
                self.queue.put_nowait(json.loads(line[len(self.nonce):]))
            except ValueError:  # the model's code wrote into the middle of it
                self.noise += NOISE_LIMIT
        ours = self.unread.startswith(self.nonce[:len(self.unread)])
        if self.noise + (0 if ours else len(self.unread)) >= NOISE_LIMIT:
            self.end("the process was ended: the code wrote into the sandbox's own channel")
        elif len(self.unread) > self.limit:
            self.end("the process was ended: a message was too long")

    def connection_lost(self, error: Exception | None) -> None:
        self.queue.put_nowait(None)


# ---- The second layer ---------------------------------------------------------------------------

def bubblewrap(deno: str, folders: dict[str, Path], info: int) -> list[str]:
    """The command that runs another in namespaces of its own: no network, no other processes, and
    of the file system only the system's libraries, Deno and `folders`, all read-only."""
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--as-pid-1", "--cap-drop", "ALL",
               "--info-fd", str(info), "--proc", "/proc", "--ro-bind", deno, "/deno"]
    for name in ("/usr", "/lib", "/lib64", "/nix/store"):
        command += ["--ro-bind-try", name, name]
    for name, folder in folders.items():
        command += ["--ro-bind", str(folder), f"/{name}"]
    return [*command, "--remount-ro", "/", "--"]


@lru_cache
def has_second_layer() -> bool:
    """Whether bubblewrap is here and may make namespaces (containers often forbid it)."""
    if shutil.which("bwrap") is None or not hasattr(os, "pidfd_open"):
        return False
    deno = find_deno()
    reader, writer = os.pipe()
    try:
        command = [*bubblewrap(deno, {}, writer), "/deno", "--version"]
        found = subprocess.run(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                               capture_output=True, pass_fds=(writer,), timeout=20)
        return found.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
    finally:
        os.close(reader)
        os.close(writer)
