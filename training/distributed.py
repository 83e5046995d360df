"""One process or many, on one machine or several: the same code, the same loss at the same global
batch.

Under `torchrun` every process holds the whole network and takes its share of each batch's rows.
Gradients are summed in one call over one flat tensor. Small control messages (a stop request, a
count) travel over gloo between CPUs, so that they never make a GPU wait.

The machines (nodes) need no disk in common: the first process of each makes its node's rows, and
what only one disk holds (weights to start from, a resume state) is sent to the others. What fails
on one process ends all of them, each node telling why in one line: `World.together` for what may
fail before the first step, and `LostContact` for everything else, since an ended process closes
its connections.
"""

import io
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

GREETING = timedelta(minutes=1)  # all are there and only have to connect
SILENCE = timedelta(minutes=10)  # a node without power, or behind a cut cable, closes nothing
PATIENCE = timedelta(hours=3)  # the others wait while one node tokenises a large file
FILE_CHUNK = 64 << 20


class LostContact(RuntimeError):
    """Another process ended or cannot be reached."""


class FailedElsewhere(RuntimeError):
    """Another process could not do its part; the message says which, and why."""


@contextmanager
def contact() -> Iterator[None]:
    """Turn what gloo and NCCL raise when a peer is gone into `LostContact`, in one line."""
    try:
        yield
    except RuntimeError as error:
        raise LostContact(
            f"lost contact with another process ({_reason(error)}); the one that ended first "
            "says why. Continue from the last save with --resume."
        ) from error


@dataclass
class World:
    """Where this process stands among the others."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this node
    local_size: int = 1
    node: int = 0
    # By rank. A launcher is the `torchrun` that started a process, and starts it anew when it dies.
    places: list[str] = field(default_factory=lambda: ["this process"])
    launchers: list[str | None] = field(default_factory=lambda: [None])
    group: dist.ProcessGroup | None = None  # all processes
    patient: dist.ProcessGroup | None = None  # the same, for what may take long

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_on_node(self) -> bool:
        return self.local_rank == 0

    @property
    def launcher(self) -> str | None:
        return self.launchers[self.rank]

    @classmethod
    def from_environment(cls) -> "World":
        """What `torchrun` tells a process it starts; alone without it."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        return cls(*(int(os.environ[name]) for name in names))

    def join(self) -> None:
        """Meet the other processes.

        Raises:
            ValueError: this node has fewer GPUs than processes.
            LostContact: the others cannot be reached.
        """
        # Each `torchrun` has a folder with a random name, in which each of its attempts has one.
        report = os.environ.get("TORCHELASTIC_ERROR_FILE")
        launcher = str(Path(report).parents[2]) if report else None
        if self.size == 1:
            self.launchers = [launcher]
            return
        backend = "gloo"
        if torch.cuda.is_available():
            if self.local_size > torch.cuda.device_count():
                raise ValueError(
                    f"{self.local_size} processes and {torch.cuda.device_count()} GPUs on node "
                    f"{self.node}: set --nproc_per_node to the number of GPUs"
                )
            torch.cuda.set_device(self.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        try:
            store = self._meet()
            with _at_most(GREETING):
                dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)
                self.group = dist.new_group(backend=backend, timeout=SILENCE)
                self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        except RuntimeError as error:
            raise LostContact(_unreachable(_reason(error))) from error
        place = f"node {self.node} ({socket.gethostname()}), process {self.rank}"
        self.places, self.launchers = zip(*self.gather([place, launcher]), strict=True)

    def _meet(self) -> dist.Store:
        """A key-value store that only the processes running now write into.

        `torchrun` starts processes anew with the store of those that died, where their addresses
        still stand (https://github.com/pytorch/pytorch/issues/135712). So the main process invents
        a name under which these processes keep theirs, and tells it to each that knocks with a
        number never used before. A knock of a dead process is answered too, and confirmed by none.
        """
        store, _, _ = next(rendezvous("env://", timeout=SILENCE))
        if not self.is_main:
            knock = uuid.uuid4().hex
            store.set(f"knock/{self.rank}", knock)
            name = store.get(f"answer/{knock}").decode()  # waits for it
            store.set(f"{name}/met/{self.rank}", "")
            return dist.PrefixStore(name, store)
        name = uuid.uuid4().hex
        missing, deadline = set(range(1, self.size)), time.monotonic() + SILENCE.total_seconds()
        while missing:
            for rank in [rank for rank in missing if store.check([f"knock/{rank}"])]:
                store.set(f"answer/{store.get(f'knock/{rank}').decode()}", name)
                if store.check([f"{name}/met/{rank}"]):
                    missing.remove(rank)
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {sorted(missing)} did not come")
            time.sleep(0.05)
        return dist.PrefixStore(name, store)

    def close(self, failed: bool = False) -> None:
        """Leave; after a failure without waiting for what is still under way."""
        if self.size > 1 and dist.is_initialized():
            if failed:
                for group in filter(None, (self.group, self.patient, dist.group.WORLD)):
                    group.abort()
            else:
                dist.destroy_process_group()

    # -- numbers and tensors -------------------------------------------------------------------

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by its sum over all processes, in place."""
        if self.size > 1:
            with contact():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_numbers(self, *numbers: float) -> list[float]:
        """The sums of a few numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        return self.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def broadcast_(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Replace `tensor` by the one of the process `source`, in place."""
        if self.size > 1:
            with contact():
                dist.broadcast(tensor, source, group=self.group)
        return tensor

    def barrier(self) -> None:
        self.sum_numbers(0.0)

    # -- messages, files, failures -------------------------------------------------------------

    def gather(self, value) -> list:
        """Every process's `value` (what JSON can hold), by rank. It may come hours later."""
        if self.size == 1:
            return [value]
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with contact():
            lengths = torch.zeros(self.size, dtype=torch.int64)
            lengths[self.rank] = len(message)
            dist.all_reduce(lengths, group=self.patient)
            messages_RN = torch.zeros(self.size, int(lengths.max()), dtype=torch.uint8)
            messages_RN[self.rank, : len(message)] = message
            dist.all_reduce(messages_RN, group=self.patient)
        pairs = zip(messages_RN, lengths.tolist(), strict=True)
        return [json.loads(row[:length].numpy().tobytes()) for row, length in pairs]

    def file_of(self, source: int, path: Path) -> io.BytesIO | Path:
        """The file that process `source` has at `path`: there the path, elsewhere its content."""
        if self.size == 1:
            return path
        here = self.rank == source
        size = torch.tensor(path.stat().st_size if here else 0)
        left = int(self.broadcast_(size, source))
        content = io.BytesIO()
        with path.open("rb") if here else io.BytesIO() as file:
            while left > 0:
                chunk = torch.empty(min(left, FILE_CHUNK), dtype=torch.uint8)
                if here:
                    file.readinto(chunk.numpy())
                self.broadcast_(chunk, source)
                left -= len(chunk)
                if not here:
                    content.write(chunk.numpy())
        content.seek(0)
        return path if here else content

    @contextmanager
    def together(self) -> Iterator[None]:
        """All go on, or none: if the body fails on one process, every process raises.

        Raises:
            FailedElsewhere: with the place and the message of the first that failed; a process
                whose own body failed raises its own error.
        """
        error = None
        try:
            yield
        except (Exception, SystemExit) as caught:
            error = caught
        for rank, fault in enumerate(self.gather(None if error is None else _told(error))):
            if error is not None:
                raise error
            if fault is not None:
                raise FailedElsewhere(f"{self.places[rank]}: {fault}")

    def must_agree(self, values: dict) -> None:
        """Refuse to go on if a process has other values than the main one.

        Raises:
            ValueError: naming the first such process and what differs.
        """
        everyone = self.gather(values)
        for rank, theirs in enumerate(everyone):
            different = [
                f"{key} is {theirs.get(key)!r} there and {value!r} on the main process"
                for key, value in everyone[0].items()
                if theirs.get(key) != value
            ]
            if different:
                raise ValueError(
                    f"{self.places[rank]}: {'; '.join(different)}. "
                    "Every node needs the same data and options; start all again."
                )


def _unreachable(reason: str) -> str:
    return (
        f"the processes cannot reach each other ({reason}). Between machines, set "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface that they share "
        "(`ip address` lists them), and let its ports through the firewall."
    )


@contextmanager
def _at_most(time_allowed: timedelta) -> Iterator[None]:
    """End this process if the body takes longer: gloo waits for a caller without any limit."""

    def give_up() -> None:
        reason = _unreachable(f"nobody called within {time_allowed.total_seconds():.0f} s")
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    alarm = threading.Timer(time_allowed.total_seconds(), give_up)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _reason(error: RuntimeError) -> str:
    """What gloo or NCCL say, without where in their source they say it."""
    return str(error).strip().splitlines()[0].rsplit("] ", 1)[-1].split(". ")[0]


def _told(error: BaseException) -> str:
    """An error as another process tells it."""
    if isinstance(error, SystemExit):
        return str(error.code)
    return str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
