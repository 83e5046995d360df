"""Several machines, played by two `torchrun --nnodes 2` with a folder each and no file in common:
on loopback, and in two network namespaces.

What is compared: the weights of two processes with each other, bit for bit (a sum of two numbers
has one order); with those of one process, within float32's rounding.
"""

import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

import training.distributed
from test_trainers import (
    LIMIT,
    LOG_LINE,
    ROOT,
    TINY,
    TWO_PROCESSES,
    assert_one_line,
    assert_same_weights,
    command,
    data,  # noqa: F401 (a fixture)
    finish,
    losses,
    run_here,  # noqa: F401 (a fixture)
    start,
)
from model import YuanMengModel, preset_config
from training.checkpoint import Saver
from training.distributed import FailedElsewhere, LostContact, World

WEIGHTS, STATE = "out/pretrain_256.pth", "out/pretrain_256.resume.pth"
FLOAT32 = ("--dtype", "float32")


# ---- Two nodes ----------------------------------------------------------------------------------


class Node:
    """A machine: a folder with the data in it, and a `torchrun` that starts one process there."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.log = folder, folder / "log.txt"
        folder.mkdir(parents=True)
        shutil.copy(data / "text.jsonl", folder)

    def start(
        self, rendezvous: list[str], *options: str, prefix: tuple[str, ...] = (), **environment: str
    ) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        script = [str(ROOT / "train_pretrain.py"), "--data", "text.jsonl", *TINY, *FLOAT32]
        with self.log.open("w") as log:
            self.torchrun = subprocess.Popen(
                [*prefix, *launcher, "--nproc_per_node", "1", *rendezvous, *script, *options],
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8")

    def is_main(self) -> bool:
        return (self.folder / "out").exists()

    def worker(self) -> psutil.Process:
        (worker,) = psutil.Process(self.torchrun.pid).children()
        return worker


@pytest.fixture
def nodes(data, tmp_path):  # noqa: F811
    """Two machines; whatever still runs on them is killed at the end."""
    nodes = [Node(tmp_path / f"node{i}", data) for i in range(2)]
    yield nodes
    stop(nodes)


def stop(nodes: list[Node]) -> None:
    for node in nodes:
        if hasattr(node, "torchrun") and node.torchrun.poll() is None:
            for process in psutil.Process(node.torchrun.pid).children(recursive=True):
                process.kill()
            node.torchrun.kill()
            node.torchrun.wait()


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def start_both(nodes: list[Node], *options: str, address: str = "127.0.0.1", others=({}, {})):
    port = free_port()
    for number, (node, other) in enumerate(zip(nodes, others, strict=True)):
        rendezvous = ["--node_rank", str(number), "--master_addr", address, "--master_port", port]
        node.start(rendezvous, *options, **other)


def finish_both(nodes: list[Node]) -> None:
    for node in nodes:
        assert node.torchrun.wait(LIMIT) == 0, "\n".join(node.output for node in nodes)


def wait_for_steps(nodes: list[Node], steps: int) -> Node:
    """Return the node that shows the log, once it shows so many steps."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        for node in nodes:
            if len(LOG_LINE.findall(node.output)) >= steps:
                return node
        time.sleep(0.05)
    raise AssertionError("\n".join(node.output for node in nodes))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:  # noqa: F811
    """The folder of a run of one process. Do not write into it."""
    folder = tmp_path_factory.mktemp("alone")
    finish(start(command(data, *FLOAT32), folder))
    return folder


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory) -> list[Node]:  # noqa: F811
    """Two nodes after a whole run. Do not write into their folders."""
    folder = tmp_path_factory.mktemp("pair")
    nodes = [Node(folder / f"node{i}", data) for i in range(2)]
    start_both(nodes)
    try:
        finish_both(nodes)
    finally:
        stop(nodes)
    return nodes


def assert_same_but_for_rounding(folder: Path, other: Path) -> None:
    """The same run with its sums in another order.

    Muon turns each update into an orthogonal matrix, in bfloat16, and so blows up directions in
    which there is nothing but rounding: after twelve, the weights are apart by 2 % of their way.
    """
    assert losses(folder) == pytest.approx(losses(other), rel=2e-3)
    torch.manual_seed(42)
    begin = YuanMengModel(preset_config("mini")).state_dict()
    ends, others = (torch.load(path / WEIGHTS, weights_only=True) for path in (folder, other))
    assert ends.keys() == others.keys()
    way, apart = (
        torch.cat([(ends[name] - x[name]).flatten() for name in ends]) for x in (begin, others)
    )
    assert apart.norm() < 0.05 * way.norm()


@pytest.mark.slow
def test_two_nodes_learn_what_one_process_does_and_only_one_saves(alone, pair):
    first, second = pair
    assert "4 rows a step on 2 × cpu" in first.output
    assert second.output == ""  # one log, on the first node
    assert {path.name for path in second.folder.iterdir()} == {"text.jsonl", "log.txt", "dataset"}
    assert_same_but_for_rounding(first.folder, alone)


# ---- What ends, and how it goes on --------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory) -> Path:  # noqa: F811
    """The first node's folder after the second's process was killed. Do not write into it."""
    folder = tmp_path_factory.mktemp("killed")
    nodes = [Node(folder / f"node{i}", data) for i in range(2)]
    start_both(nodes)
    try:
        wait_for_steps(nodes, 8)
        workers = [node.worker() for node in nodes]
        workers[1].send_signal(signal.SIGKILL)
        alive = psutil.wait_procs([*workers, *(node.torchrun for node in nodes)], timeout=60)[1]
        assert not alive
        assert all(node.torchrun.wait() == 1 for node in nodes)
    finally:
        stop(nodes)
    (line,) = re.findall(r"^train_pretrain.py: .*", nodes[0].output, re.MULTILINE)
    assert "lost contact with another process (" in line and "--resume" in line
    return nodes[0].folder


@pytest.mark.slow
def test_a_killed_process_ends_all_and_resume_goes_on_without_a_file_elsewhere(killed, pair, nodes):
    """The second node is a new one: what it needs comes from the first."""
    state = torch.load(killed / STATE, weights_only=True)
    assert state["step"] in (3, 6)
    shutil.copytree(killed / "out", nodes[0].folder / "out")
    start_both(nodes, "--resume")
    finish_both(nodes)
    assert f"Resuming {STATE} at step {state['step']}.\n" in nodes[0].output
    assert_same_weights(nodes[0].folder / WEIGHTS, pair[0].folder / WEIGHTS)
    assert losses(nodes[0].folder) == losses(pair[0].folder)
    assert not nodes[1].is_main()


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_all_go_on_by_themselves(pair, nodes):
    """An earlier run's state lies there: it is not this run's and must not be taken for it."""
    for node in nodes:
        shutil.copytree(pair[0].folder / "out", node.folder / "out")
        (node.folder / STATE).write_bytes((pair[0].folder / STATE).read_bytes())
    elastic = ["--max_restarts", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    endpoint = ["--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    for node in nodes:
        node.start([*elastic, *endpoint])
    main = wait_for_steps(nodes, 8)  # which node is the first one, this rendezvous decides
    assert [step for step, *_ in LOG_LINE.findall(main.output)][:8] == [str(i) for i in range(8)]
    main.worker().send_signal(signal.SIGKILL)
    finish_both(nodes)
    (again,) = (node for node in nodes if "Done: 12 steps" in node.output)
    said = re.search(
        r"^Resuming \S+ at step ([36]): torchrun has started the processes again\.$",
        again.output,
        re.MULTILINE,
    )
    assert said, again.output
    assert_same_weights(again.folder / WEIGHTS, pair[0].folder / WEIGHTS)
    assert losses(again.folder) == losses(pair[0].folder)


@pytest.mark.slow
def test_two_processes_begin_and_one_goes_on(killed, alone, data, tmp_path, run_here):  # noqa: F811
    shutil.copytree(killed / "out", tmp_path / "out")
    code, output = run_here([*command(data), *FLOAT32, "--resume"])
    assert code is None, output
    assert "with 1 processes instead of 2." in output
    assert_same_but_for_rounding(tmp_path, alone)


@pytest.mark.slow
def test_one_process_begins_and_two_go_on(
    alone, data, tmp_path, run_here, monkeypatch  # noqa: F811
):
    def save_and_die(self, files):
        save(self, files)
        self.wait()
        if any(state.get("step") == 6 for state in files.values()):
            raise SystemExit("power cut")

    save = Saver.save
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", save_and_die)
        assert run_here([*command(data), *FLOAT32])[0] == "power cut"
    output = finish(start([*command(data), *FLOAT32, "--resume"], tmp_path, TWO_PROCESSES))
    assert "at step 6, with 2 processes instead of 1." in output
    assert_same_but_for_rounding(tmp_path, alone)


# ---- Nodes that do not fit together -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["other data", "no data", "unknown option"])
def test_a_node_that_does_not_fit_ends_all_in_one_line(fault, nodes):
    first, second = nodes
    others = ["--sed", "7"] if fault == "unknown option" else []
    if fault == "other data":
        with (second.folder / "text.jsonl").open("a") as file:
            file.write('{"text": "one more"}\n')
    elif fault == "no data":
        (second.folder / "text.jsonl").unlink()
    told = {
        "other data": r"data and tokenizer is 'text-\S+' there and 'text-\S+' on the main process",
        "no data": "No such data file: text.jsonl",
        "unknown option": "train_pretrain.py: unknown option --sed; --help lists them",
    }[fault]
    port = free_port()
    for number, (node, options) in enumerate(((first, []), (second, others))):
        static = ["--node_rank", str(number), "--master_addr", "127.0.0.1", "--master_port", port]
        node.start(static, *options)
    assert [node.torchrun.wait(LIMIT) for node in nodes] == [1, 1]
    (line,) = re.findall(r"^train_pretrain.py: .*", first.output, re.MULTILINE)
    assert re.match(rf"train_pretrain.py: node 1 \(\S+\), process 1: {told}", line), first.output
    assert len(re.findall(r"^train_pretrain.py: ", second.output, re.MULTILINE)) == 1
    for node in nodes:
        assert "train_pretrain.py\", line" not in node.output  # no trace of ours
        assert not node.is_main() and not LOG_LINE.search(node.output)


# ---- Two network namespaces ---------------------------------------------------------------------


@pytest.fixture
def namespaces():
    """Two network namespaces joined by a cable: their names; removed at the end."""
    names = [f"yuanmeng-{os.getpid()}-{i}" for i in range(2)]
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` command (Debian: iproute2)")
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"`ip netns add` is not permitted here: {made.stderr.strip()}")
    try:
        ends = [f"ym{os.getpid()}-{i}"[-15:] for i in range(2)]
        inside = [["-n", name] for name in names]
        for words in (
            ["netns", "add", names[1]],
            [*inside[0], "link", "add", ends[0], "type", "veth", "peer", ends[1]],
            [*inside[0], "link", "set", ends[1], "netns", names[1]],
            [*inside[0], "link", "set", ends[0], "name", "cable"],
            [*inside[1], "link", "set", ends[1], "name", "cable"],
            [*inside[0], "address", "add", "10.231.17.1/30", "dev", "cable"],
            [*inside[1], "address", "add", "10.231.17.2/30", "dev", "cable"],
            *([*where, "link", "set", "cable", "up"] for where in inside),
            *([*where, "link", "set", "lo", "up"] for where in inside),
        ):
            subprocess.run(["ip", *words], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
def test_two_network_namespaces(namespaces, pair, nodes):
    """Neither sees the other's loopback: all travels over the interface that the variable names."""
    others = [
        {"prefix": ("ip", "netns", "exec", name), "GLOO_SOCKET_IFNAME": "cable"}
        for name in namespaces
    ]
    start_both(nodes, address="10.231.17.1", others=others)
    finish_both(nodes)
    assert_same_weights(nodes[0].folder / WEIGHTS, pair[0].folder / WEIGHTS)


# ---- Single calls, in two forked processes ------------------------------------------------------


def in_two_processes(work: Callable[[World], object], store: dist.Store | None = None) -> list:
    """What `work(world)` returns on each of two nodes of one process; None where one died."""
    fork = multiprocessing.get_context("fork")  # a spawned one would import torch again
    port = free_port() if store is None else str(store.port)

    def run(rank: int, pipe) -> None:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            GROUP_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            TORCHELASTIC_USE_AGENT_STORE=str(store is not None),
        )
        world = World.from_environment()
        world.join()
        pipe.send(work(world))
        pipe.recv()  # stay until the other one is done too
        os._exit(0)

    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = fork.Pipe()
        processes.append(fork.Process(target=run, args=(rank, theirs)))
        processes[-1].start()
        theirs.close()  # so that its end is seen
        pipes.append(ours)
    results = []
    try:
        for pipe in pipes:
            assert pipe.poll(60), "a process hangs"
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(None)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def error_of(call: Callable[[], object]) -> tuple[str, str] | None:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)


def test_messages_and_files_reach_every_process(tmp_path, monkeypatch):
    monkeypatch.setattr(training.distributed, "FILE_CHUNK", 1000)
    content = bytes(range(256)) * 11

    def work(world: World):
        path = tmp_path / f"only{world.rank}"
        if world.rank == 1:
            path.write_bytes(content)
        gathered = world.gather({"很长": "x" * 100 * world.rank, "number": world.rank})
        file = world.file_of(1, path)
        return gathered, file.read_bytes() if isinstance(file, Path) else file.read()

    expected = [{"很长": "", "number": 0}, {"很长": "x" * 100, "number": 1}]
    assert in_two_processes(work) == [(expected, content)] * 2


def test_together_fails_on_all_with_the_message_of_the_first():
    def work(world: World):
        def part() -> None:
            with world.together():
                if world.rank == 1:
                    raise ValueError("no more paper")

        def ending() -> None:
            with world.together():
                if world.rank == 0:
                    sys.exit("unknown option")

        found = [error_of(part)]
        try:
            ending()
        except SystemExit as end:
            found.append(("SystemExit", end.code))
        except FailedElsewhere as error:
            found.append(("FailedElsewhere", str(error)))
        with world.together():  # and those that all can do go on
            found.append(world.gather(world.rank))
        return found

    host = socket.gethostname()
    assert in_two_processes(work) == [
        [
            ("FailedElsewhere", f"node 1 ({host}), process 1: no more paper"),
            ("SystemExit", "unknown option"),
            [0, 1],
        ],
        [
            ("ValueError", "no more paper"),
            ("FailedElsewhere", f"node 0 ({host}), process 0: unknown option"),
            [0, 1],
        ],
    ]


def test_alone_together_raises_what_was_raised():
    with pytest.raises(ValueError, match="no more paper"), World().together():
        raise ValueError("no more paper")


def test_all_must_agree():
    def work(world: World):
        world.must_agree({"seed": 1, "preset": "mini"})
        return error_of(lambda: world.must_agree({"seed": world.rank, "preset": "mini"}))

    one, two = in_two_processes(work)
    assert one == two and one[0] == "ValueError"
    assert_one_line(one[1], r"^node 1 \(.*\), process 1: seed is 1 there and 0 on the main process")
    assert "preset" not in one[1]


@pytest.mark.parametrize("call", ["sum_numbers", "gather", "broadcast_"])
def test_the_end_of_a_process_is_told_to_the_other(call):
    def work(world: World):
        if world.rank == 1:
            os._exit(9)
        argument = {"sum_numbers": 1.0, "gather": 1, "broadcast_": torch.zeros(1)}[call]
        source = (1,) if call == "broadcast_" else ()
        return error_of(lambda: getattr(world, call)(argument, *source))

    one, two = in_two_processes(work)
    assert two is None
    assert one[0] == "LostContact"
    pattern = r"lost contact with another process \((Connection|Read|Write).*--resume"
    assert_one_line(one[1], pattern)


def test_a_silent_process_is_given_up(monkeypatch):
    """It closes nothing, as a machine without power."""
    monkeypatch.setattr(training.distributed, "SILENCE", timedelta(seconds=3))

    def work(world: World):
        if world.rank == 1:
            return os.getpid()  # and then it only waits
        return error_of(lambda: world.sum_numbers(1.0))

    (name, message), _ = in_two_processes(work)
    assert name == "LostContact"
    assert_one_line(message, r"lost contact with another process \(.*[Tt]imed out.*\); the one")


def test_waiting_for_a_call_ends_in_one_line(capfd):
    """gloo has no limit of its own there; the time is up in its code, not in Python's."""

    def work(world: World):
        with training.distributed._at_most(timedelta(seconds=1)):
            if world.rank == 0:
                world.gather(None)  # the other one sends nothing
        return "ended in time"

    assert in_two_processes(work) == [None, "ended in time"]
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert_one_line(told, r"reach each other \(nobody called within 1 s\).*GLOO_SOCKET_IFNAME")


def test_restarted_processes_do_not_read_what_dead_ones_wrote(monkeypatch):
    """The store is the launcher's and outlives them, with the addresses of the first two in it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert in_two_processes(lambda world: world.sum_numbers(1), store) == [[2], [2]]
    meet = World._meet

    def late(self) -> dist.Store:
        if self.is_main:
            time.sleep(1)  # so the other finds only the old entries at first
        return meet(self)

    monkeypatch.setattr(World, "_meet", late)
    assert in_two_processes(lambda world: world.sum_numbers(1), store) == [[2], [2]]


def test_more_processes_than_gpus_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes and 1 GPUs on node 0: set --nproc_per_node"):
        World(rank=0, size=2, local_rank=0, local_size=2).join()


def test_processes_that_cannot_meet_name_the_variables(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[/source/pair.cc:152] timed out connecting: refused. More words")

    monkeypatch.setattr(training.distributed, "rendezvous", fail)
    with pytest.raises(LostContact) as caught:
        World(rank=0, size=2).join()
    assert_one_line(str(caught.value), r"\(timed out connecting: refused\).*GLOO_SOCKET_IFNAME")
