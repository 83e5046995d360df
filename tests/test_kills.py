"""SIGKILL at any moment, and disks that are full: what a training had saved is there afterwards.

A training here is the real script in a process of its own, forked from a server that has done the
imports: it starts in a second, so that it can be killed dozens of times.
"""

import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.loading import load_weights, read_checkpoint
from test_trainers import LIMIT, assert_same_weights, command, data, losses
from training import loop
from training.reporting import Reporter
from training.settings import TrainSettings

ALL_STEPS = ("--max_steps", "36", "--save_every", "2", "--eval_every", "5")
SFT = ("--accumulation_steps", "3", "--init", "first.pth")
SHORT = ("--max_steps", "2", "--final_eval_rows", "4")
FULL = 20 << 20  # bytes a file may have on the full disk: weights fit, a resume state does not


# ---- Trainings that start fast ------------------------------------------------------------------


@pytest.fixture(scope="module")
def forks():
    """Makes processes by forking one that has the trainers' modules loaded."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # no threads before a fork
            patch.setenv(name, "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["training.stage", "matplotlib.figure", "torch.utils.tensorboard"]
        )
        yield context


def child(arguments: list[str], folder: Path, before: Callable[[], None] | None) -> None:
    """Run a script in `folder`, its output in `folder`/log.txt; the body of the forked process."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = arguments
    loop.peak_flops = lambda *_: 1e12  # measuring it takes longer than two steps
    if before is not None:
        before()
    runpy.run_path(arguments[0], run_name="__main__")


class Training:
    """One process that trains in `folder`."""

    def __init__(self, forks, folder: Path, arguments: list[str], before=None):
        folder.mkdir(exist_ok=True)
        self.folder, self.log = folder, folder / "log.txt"
        self.log.write_text("")
        self.process = forks.Process(target=child, args=(arguments, folder, before))
        self.process.start()

    def wait(self) -> int:
        """Its exit status, negative for a signal."""
        self.process.join(LIMIT)
        return self.process.exitcode

    def finish(self) -> str:
        """Its output, once it has ended well."""
        assert self.wait() == 0, self.log.read_text("utf-8")
        return self.log.read_text("utf-8")

    def kill_when(self, sight: Callable[[], bool], delay: float) -> None:
        """SIGKILL so long after `sight` came true; not at all if the process ends before."""
        deadline = time.monotonic() + LIMIT
        while self.process.is_alive() and not sight():
            assert time.monotonic() < deadline, self.log.read_text("utf-8")
            time.sleep(0.0005)
        time.sleep(delay)
        self.process.kill()
        self.wait()


def slow_disk() -> None:
    """A flush takes a while, as on real disks under load: more kills then fall into a save."""
    fsync = os.fsync

    def slowly(descriptor: int) -> None:
        time.sleep(0.05)
        fsync(descriptor)

    os.fsync = slowly


class DieAt:
    """SIGKILL right before the n-th change to the names in a folder.

    A flush is no such change: what a killed process has written is the kernel's already.
    """

    def __init__(self, n: int):
        self.n = n

    def __call__(self) -> None:
        for name in ("replace", "rename", "link", "unlink"):
            setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, function: Callable) -> Callable:
        def call(*arguments, **options):
            self.n -= 1
            if self.n == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call


def full_disk() -> None:
    """No file can grow over FULL bytes: the write itself fails, in torch's own writer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))


def state_of(folder: Path, stage: str = "pretrain") -> dict:
    return read_checkpoint(folder / f"out/{stage}_256.resume.pth")


def assert_same_run(folder: Path, other: Path, stage: str = "pretrain") -> None:
    """Weights, masters, momenta, random state and curves are equal to the last bit."""
    weights = f"out/{stage}_256.pth"
    assert_same_weights(folder / weights, other / weights)
    ours, theirs = state_of(folder, stage), state_of(other, stage)
    for state in (ours, theirs):
        assert state.pop("finished")
        del state["elapsed"]
    assert_equal(ours, theirs, stage)
    assert losses(folder, stage) == losses(other, stage)
    left = [path.name for path in folder.rglob(".*") if path.name != ".cache"]
    assert not left, "temporary files of killed writes are still there"


def assert_equal(one, two, name: str) -> None:
    assert type(one) is type(two), name
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), name
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), name
        for key in one:
            assert_equal(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), name
        for i, pair in enumerate(zip(one, two)):
            assert_equal(*pair, f"{name}[{i}]")
    else:
        assert one == two, name


def run_options(data: Path, stage: str) -> list[str]:
    options = (*ALL_STEPS, *SFT) if stage == "sft" else ALL_STEPS
    return command(data, *options, script=f"train_{stage}.py")


@pytest.fixture(scope="module")
def unbroken(data, forks, tmp_path_factory) -> Path:
    """The folder in which pretraining, then fine-tuning from its weights, ran to the end."""
    folder = tmp_path_factory.mktemp("unbroken")
    seldom = ("--save_every", "100")
    Training(forks, folder, [*run_options(data, "pretrain"), *seldom]).finish()
    shutil.copy(folder / "out/pretrain_256.pth", folder / "first.pth")
    Training(forks, folder, [*run_options(data, "sft"), *seldom]).finish()
    return folder


# ---- Kills --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage, seed", [("pretrain", 1), ("sft", 2)])
def test_killed_again_and_again_equals_unbroken(stage, seed, data, unbroken, forks, tmp_path):
    """Eight kills a stage: while the rows are built, inside saves, between two files, anywhere."""
    shutil.copy(unbroken / "first.pth", tmp_path)
    out, cache = tmp_path / "out", tmp_path / "dataset/.cache"
    chance = random.Random(seed)
    places = [
        (cache, ".building-*"),
        *[(out, f".{stage}_256.resume.pth.*")] * 3,
        *[(out, f".{stage}_256.pth.*")] * 2,  # the new resume state is there, its weights are not
        *[(out, f"{stage}_256.pth")] * 2,  # any time after the first save
    ]
    middle = places[1:]
    chance.shuffle(middle)
    inside, options, told = 0, run_options(data, stage), []
    for folder, pattern in [places[0], *middle]:
        hidden = pattern.startswith(".")
        delay = chance.uniform(0, 0.02 if hidden else 0.5)
        told.append(f"{pattern} + {delay:.3f} s")
        known = set(folder.glob(pattern)) if hidden else set()
        training = Training(forks, tmp_path, options, slow_disk)
        training.kill_when(lambda: set(folder.glob(pattern)) - known, delay)
        output = training.log.read_text("utf-8")
        assert training.wait() == -signal.SIGKILL, (told, output)
        assert "Traceback" not in output, (told, output)
        inside += hidden and bool(set(folder.glob(pattern)) - known)
        for path in out.glob("*.pth"):
            read_checkpoint(path)  # whatever stands there is whole
        if (out / f"{stage}_256.resume.pth").exists() and "--resume" not in options:
            options.append("--resume")
    assert inside >= 4, f"only {inside} kills hit what they were aimed at: {told}"
    assert "Resuming" in Training(forks, tmp_path, options).finish(), told
    assert_same_run(tmp_path, unbroken, stage)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.slow
def test_a_kill_before_each_step_of_writing_loses_nothing(data, forks, tmp_path):
    """A new run over an earlier one's files dies before its 1st, 2nd, … rename or link."""
    earlier, right = tmp_path / "earlier", tmp_path / "right"
    Training(forks, earlier, command(data, *SHORT, "--seed", "7")).finish()
    arguments = command(data, *SHORT)
    shutil.copytree(earlier / "dataset", right / "dataset")  # the row cache
    Training(forks, right, arguments).finish()
    old = (earlier / "out/pretrain_256.pth").read_bytes()
    for n in range(1, 100):
        folder = tmp_path / f"kill {n}"
        shutil.copytree(earlier, folder)
        status = Training(forks, folder, arguments, DieAt(n)).wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL, (n, (folder / "log.txt").read_text("utf-8"))
        kept = [path for path in folder.glob("out/pretrain_256*") if path.read_bytes() == old]
        assert kept, f"event {n}: the earlier run's weights are gone"
        for path in folder.glob("out/*.pth"):
            read_checkpoint(path)
        begun = state_of(folder)["fingerprint"]["seed"] != 7
        Training(forks, folder, [*arguments, *["--resume"] * begun]).finish()
        assert_same_run(folder, right)
        assert (folder / "out/pretrain_256.previous.pth").read_bytes() == old
        shutil.rmtree(folder)
    assert 8 <= n < 99, f"{n - 1} events were seen: two links and four renames are the least"


# ---- Full disks ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_during_a_save_is_told_and_loses_nothing(data, unbroken, forks, tmp_path):
    arguments = run_options(data, "pretrain")
    training = Training(forks, tmp_path, arguments, full_disk)  # full from the start
    assert training.wait() == 1
    assert_told(training.log)
    assert not list(tmp_path.glob("out/*256*")) and not list(tmp_path.glob("out/.*"))

    training = Training(forks, tmp_path, arguments)
    training.kill_when((tmp_path / "out/pretrain_256.pth").exists, 0.3)
    before = {path: path.read_bytes() for path in tmp_path.glob("out/*.pth")}
    training = Training(forks, tmp_path, [*arguments, "--resume"], full_disk)
    assert training.wait() == 1
    assert_told(training.log)
    assert {path: path.read_bytes() for path in tmp_path.glob("out/*.pth")} == before
    assert not list(tmp_path.glob("out/.*"))
    load_weights(tmp_path / "out/pretrain_256.pth")

    Training(forks, tmp_path, [*arguments, "--resume"]).finish()
    assert_same_run(tmp_path, unbroken)


def assert_told(log: Path) -> None:
    output = log.read_text("utf-8")
    last = output.strip().splitlines()[-1]
    assert last.startswith("train_pretrain.py: out/pretrain_256.resume.pth could not be written: ")
    assert "File too large" in last and "room on the disk" in last and "--resume" in last
    assert "Traceback" not in output


@pytest.mark.slow
def test_curves_that_find_no_room_end_no_training(forks, tmp_path):
    process = forks.Process(target=report_onto_a_full_disk, args=(tmp_path,))
    process.start()
    process.join(LIMIT)
    said = (tmp_path / "log.txt").read_text("utf-8")
    assert process.exitcode == 0, said
    assert said.count("TensorBoard's events could not be written") == 1
    assert said.count("The loss curve could not be written") == 1
    assert not list(tmp_path.glob("out/.*")) and not list(tmp_path.glob("out/loss*"))


def report_onto_a_full_disk(folder: Path) -> None:
    os.dup2(os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT), 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    reporter = Reporter("pretrain", folder / "out", TrainSettings(), is_main=True)
    for step in range(2000):
        reporter.record("loss", step, 1.0)
    reporter.draw()
    reporter.close()
    assert len(reporter.points("loss")) == 2000
