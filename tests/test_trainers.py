"""train_pretrain.py and train_sft.py as their users run them, on a few hundred short records.

Runs whose process matters (signals, torchrun, exit status) are processes of their own; the
others run the script inside this one, which saves its imports. All work in a temporary folder.
"""

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataset.catalog import pick_data
from training.checkpoint import Saver

ROOT = Path(__file__).parent.parent
TINY = (
    "--preset",
    "mini",
    "--compile",
    "no",
    "--row_length",
    "64",
    "--batch_size",
    "4",
    "--threads",
    "1",
    "--max_steps",
    "12",
    "--save_every",
    "3",
    "--eval_rows",
    "4",
    "--final_eval_rows",
    "8",
    "--log_every",
    "1",
    "--warmup_steps",
    "4",
)
LOG_LINE = re.compile(
    r"^Epoch:\[1/1\]\((\d+)/(\d+)\) loss:(\d+\.\d{3}) lr:(\d\.\d{12}) epoch_time:\d+\.\d+min "
    r"tokens/s:\d+ mfu:\d+\.\d%$",
    re.MULTILINE,
)
LIMIT = 300  # seconds after which a hanging process is a failure


# ---- Data, and ways to run a script -------------------------------------------------------------


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with text.jsonl and talks.jsonl: Chinese and Python, the same sentences varied."""
    folder = tmp_path_factory.mktemp("data")
    texts, talks = [], []
    for i in range(600):
        sum_ = i + i % 7
        texts.append(
            f"def add_{i}(x):\n    return x + {i}\n"
            if i % 3 == 0
            else f"第{i}课：今天学习把{i}和{i % 7}相加，答案是{sum_}。"
        )
        talks.append(
            [
                {"role": "user", "content": f"{i}+{i % 7}=?"},
                {"role": "assistant", "content": f"答案是{sum_}。"},
            ]
        )
    write_jsonl(folder / "text.jsonl", [{"text": text} for text in texts])
    write_jsonl(folder / "talks.jsonl", [{"conversations": talk} for talk in talks])
    return folder


def write_jsonl(path: Path, records: list[dict]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), "utf-8")


def command(data: Path, *options: str, script: str = "train_pretrain.py") -> list[str]:
    file = data / ("talks.jsonl" if script == "train_sft.py" else "text.jsonl")
    return [str(ROOT / script), "--data", str(file), *TINY, *options]


def start(arguments: list[str], folder: Path, launcher: tuple[str, ...] = (), **options):
    """Start a script in `folder`, with both outputs in one pipe."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        **options,
    )


def finish(process: subprocess.Popen) -> str:
    """Its output, once it has ended well."""
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    return output


def interrupt(process: subprocess.Popen, signal_number: int, log_lines: int = 1) -> str:
    """Send a signal after so many log lines; the output to the end."""
    output = []
    for line in process.stdout:
        output.append(line)
        if LOG_LINE.match(line):
            log_lines -= 1
            if log_lines == 0:
                process.send_signal(signal_number)
    process.wait(LIMIT)
    return "".join(output)


@pytest.fixture
def run_here(monkeypatch, tmp_path, capfd):
    """Run a script inside this process, in tmp_path; returns (what ended it or None, output)."""

    def run(arguments: list[str]) -> tuple[object, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        capfd.readouterr()
        code = None
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, "".join(capfd.readouterr())

    return run


def assert_same_weights(one: Path, two: Path) -> None:
    weights, others = (torch.load(path, weights_only=True) for path in (one, two))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


def losses(folder: Path, stage: str = "pretrain") -> dict[int, float]:
    points = json.loads((folder / f"out/loss_{stage}.json").read_text())["loss"]
    assert len(points) == len(dict(points)), "a step stands twice in the curve"
    return dict(points)


@pytest.fixture(scope="session")
def whole_run(data, tmp_path_factory) -> tuple[Path, str]:
    """One run from beginning to end: its folder and output. Do not write into the folder."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(start(command(data), folder))


# ---- A run from beginning to end ----------------------------------------------------------------


def test_log_is_the_specifications(whole_run):
    _, output = whole_run
    assert "The total number of parameters in the YuanMeng model is: 4.590 million\n" in output
    lines = LOG_LINE.findall(output)
    assert [(int(step), int(total)) for step, total, _, _ in lines] == [(i, 12) for i in range(12)]
    # Rises over 4 steps to 0.02; falls over the last 60 % of 12 steps.
    rates = [0.02 * min(1, (i + 1) / 4) * min(1, (1 - i / 12) / 0.6) for i in range(12)]
    assert [rate for _, _, _, rate in lines] == [f"{rate:.12f}" for rate in rates]
    assert re.search(r"held-out loss at step 12: \d\.\d{4} bits per byte", output)
    assert "Traceback" not in output and "Warning" not in output


def test_loss_starts_as_a_guess_and_falls(whole_run):
    curve = losses(whole_run[0])
    assert list(curve) == list(range(12))
    assert curve[0] == pytest.approx(8.76, abs=0.3)  # ln 6400
    assert curve[11] < 6.5


def test_files_of_a_run(whole_run):
    out = whole_run[0] / "out"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("tensorboard/pretrain/events")}
    assert len(events) == 1
    assert files - events == {
        "pretrain_256.pth",
        "pretrain_256.resume.pth",
        "loss_pretrain.json",
        "loss_pretrain.png",
    }
    assert (out / "loss_pretrain.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in whole_run[0].iterdir()} == {"out", "dataset"}  # rows' cache

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(out / "tensorboard/pretrain")).Reload()
    assert [event.step for event in log.Scalars("loss")] == list(range(12))
    assert [event.value for event in log.Scalars("loss")] == pytest.approx(
        list(losses(whole_run[0]).values())
    )


def test_weights_are_a_plain_state_dict(whole_run):
    from model import YuanMengModel, preset_config

    weights = torch.load(whole_run[0] / "out/pretrain_256.pth", weights_only=True)
    assert sum(tensor.numel() for tensor in weights.values()) == 4_589_824
    model = YuanMengModel(preset_config("mini"))
    missing = model.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["output.weight"] and not missing.unexpected_keys


def test_the_same_seed_gives_the_same_weights_and_keeps_the_earlier_ones(
    whole_run, data, tmp_path, run_here
):
    shutil.copytree(whole_run[0] / "out", tmp_path / "out")
    earlier = whole_run[0] / "out/pretrain_256.pth"
    code, output = run_here(command(data))
    assert code is None, output
    assert_same_weights(tmp_path / "out/pretrain_256.pth", earlier)
    assert (tmp_path / "out/pretrain_256.previous.pth").read_bytes() == earlier.read_bytes()
    assert losses(tmp_path) == losses(whole_run[0])

    code, output = run_here(command(data, "--seed", "1", "--max_steps", "2"))
    assert code is None, output
    assert losses(tmp_path)[0] != losses(whole_run[0])[0]

    code, output = run_here(command(data, "--seed", "1", "--max_steps", "2", "--resume"))
    assert code is None and "complete" in output and not LOG_LINE.search(output)


# ---- Stopped, killed, continued -----------------------------------------------------------------


def test_interrupted_and_resumed_equals_uninterrupted(whole_run, data, tmp_path):
    folder = tmp_path
    for signal_number, options in ((signal.SIGTERM, []), (signal.SIGINT, ["--resume"])):
        process = start(command(data, *options), folder)
        output = interrupt(process, signal_number)
        stopped = re.search(r"^Stopped at step (\d+); .*--resume", output, re.MULTILINE)
        assert process.returncode == 130 and stopped, output
        state = torch.load(folder / "out/pretrain_256.resume.pth", weights_only=True)
        assert state["step"] == int(stopped[1]) < 12
        assert "Traceback" not in output
    output = finish(start(command(data, "--resume"), folder))
    first = LOG_LINE.search(output)
    assert first[1] == stopped[1]
    assert_same_weights(folder / "out/pretrain_256.pth", whole_run[0] / "out/pretrain_256.pth")
    assert losses(folder) == losses(whole_run[0])
    assert not list(folder.glob("out/*previous*"))


def test_a_power_cut_between_two_log_lines_leaves_no_gap(
    whole_run, data, tmp_path, run_here, monkeypatch
):
    """The run dies right after the save at step 9, when steps 6 to 8 have had no log line yet."""
    save = Saver.save

    def save_and_die(self, files):
        save(self, files)
        self.wait()
        if any(state.get("step") == 9 for state in files.values()):
            raise SystemExit("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", save_and_die)
        code, _ = run_here(command(data, "--log_every", "5"))
        assert code == "power cut"
    code, output = run_here(command(data, "--log_every", "5", "--resume"))
    assert code is None and "at step 9" in output
    assert_same_weights(tmp_path / "out/pretrain_256.pth", whole_run[0] / "out/pretrain_256.pth")
    assert losses(tmp_path) == losses(whole_run[0])


def test_resume_refuses_changed_settings(whole_run, data, tmp_path, run_here):
    shutil.copytree(whole_run[0] / "out", tmp_path / "out")
    before = (tmp_path / "out/pretrain_256.pth").read_bytes()
    write_jsonl(tmp_path / "other.jsonl", [{"text": f"另一本书的第{i}页。"} for i in range(300)])
    for change, named in (
        (["--batch_size", "8"], "batch_size was 4 and is 8"),
        (["--data", "other.jsonl"], r"data was \S*text.jsonl and is other.jsonl"),
        (["--recipe", "reference"], "recipe was 'fast' and is 'reference'"),
    ):
        code, output = run_here(command(data, *change, "--resume"))
        assert_one_line(code, named)
        assert not LOG_LINE.search(output)
    assert (tmp_path / "out/pretrain_256.pth").read_bytes() == before


def test_resume_names_a_missing_or_broken_state(data, tmp_path, run_here):
    code, _ = run_here(command(data, "--resume"))
    assert_one_line(code, "pretrain_256.resume.pth does not exist.*without --resume")
    (tmp_path / "out/pretrain_256.resume.pth").write_bytes(b"PK\x03\x04 half a file")
    code, _ = run_here(command(data, "--resume"))
    assert_one_line(code, "pretrain_256.resume.pth is truncated")


# ---- Several processes --------------------------------------------------------------------------

TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_two_processes_learn_what_one_does(whole_run, data, tmp_path):
    output = finish(start(command(data), tmp_path, TWO_PROCESSES))
    assert "4 rows a step on 2 × cpu" in output and output.count("Data: ") == 1
    assert len(LOG_LINE.findall(output)) == 12  # the main process alone speaks
    # In bfloat16 the halves' gradients round apart, while the loss falls by 1.5 a step.
    assert losses(tmp_path) == pytest.approx(losses(whole_run[0]), rel=2e-3)


@pytest.mark.slow
def test_two_processes_learn_what_one_does_in_float32(data, tmp_path):
    """Accumulating too, stopped in the middle of an accumulation by Ctrl-C at the terminal."""
    options = ["--dtype", "float32", "--accumulation_steps", "4"]
    finish(start(command(data, *options), tmp_path / "one"))
    folder = tmp_path / "two"
    process = start(command(data, *options), folder, TWO_PROCESSES, start_new_session=True)
    output = []
    for line in process.stdout:
        output.append(line)
        if LOG_LINE.match(line) and "](5/" in line:
            os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group
    process.wait(LIMIT)
    assert "Stopped at step" in "".join(output), "".join(output)
    finish(start(command(data, *options, "--resume"), folder, TWO_PROCESSES))
    # Newton-Schulz is in bfloat16, which carries a different order of sums a little further.
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


# ---- What goes wrong ----------------------------------------------------------------------------


def assert_one_line(message: object, pattern: str) -> None:
    assert isinstance(message, str), message
    assert re.search(pattern, message), message
    assert "\n" not in message


def test_a_loss_that_is_not_finite_stops_the_run(whole_run, data, tmp_path):
    shutil.copytree(whole_run[0] / "out", tmp_path / "out")
    process = start(
        command(data, "--learning_rate", "1e30", "--dtype", "float32", "--save_every", "1"),
        tmp_path,
    )
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, output
    last = output.strip().splitlines()[-1]
    found = re.search(
        r"train_pretrain.py: the loss is not finite at step (\d+); .* lines "
        r"([\d, ]+) of \S*text.jsonl; the last good weights are in (\S+)\.",
        last,
    )
    assert found, output
    assert int(found[1]) < 12
    assert all(1 <= int(line) <= 600 for line in found[2].split(","))
    assert "Traceback" not in output
    weights = torch.load(tmp_path / found[3], weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert_same_weights(
        tmp_path / "out/pretrain_256.previous.pth", whole_run[0] / "out/pretrain_256.pth"
    )


@pytest.mark.parametrize(
    "options, named",
    [
        (["--preset", "huge"], "--preset huge: choose one of 26m, mini"),
        (["--recipe", "slow"], "--recipe slow: choose one of fast, reference"),
        (["--dtype", "int8"], "--dtype int8: choose bfloat16 or float32"),
        (["--compile", "perhaps"], "--compile perhaps: choose"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--row_length", "70000"], "row_length"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--max_steps", "0"], "--max_steps must be at least 1"),
        (["--log_every", "-1"], "--log_every must be at least 1"),
        (["--eval_every", "0"], "--eval_every must be at least 1"),
        (["--max_minutes", "0"], "--max_minutes must be above 0"),
        (["--decay_share", "0"], "--decay_share must be above 0"),
        (["--learning_rate", "nan"], "--learning_rate must be above 0"),
        (["--learning_rates", "1"], "unknown option --learning_rates"),
        (["--data", "nowhere.jsonl"], "No such data file: nowhere.jsonl"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_wrong_options_are_told_in_one_line(options, named, data, run_here, tmp_path):
    code, output = run_here(command(data, *options))
    assert_one_line(code, named)
    assert not LOG_LINE.search(output) and not list(tmp_path.glob("out/*.pth"))


def test_missing_data_names_the_commands(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pick_data, "__kwdefaults__", {**pick_data.__kwdefaults__, "data_dir": tmp_path}
    )
    code, _ = run_here([str(ROOT / "train_pretrain.py"), *TINY])
    assert "No training data" in code
    assert "python -m dataset.starter" in code and "python -m dataset.download" in code


def test_broken_data_is_named_by_line(run_here, tmp_path, data):
    lines = (data / "text.jsonl").read_text("utf-8").splitlines()
    lines[2:20] = ["{"] * 18
    (tmp_path / "broken.jsonl").write_text("\n".join(lines), "utf-8")
    code, _ = run_here(command(data, "--data", "broken.jsonl"))
    assert isinstance(code, str) and "broken.jsonl:3" in code


# ---- Other ways to train ------------------------------------------------------------------------


def test_sft_starts_from_pretrained_weights(whole_run, data, tmp_path, run_here):
    sft = command(data, "--max_steps", "4", script="train_sft.py")
    code, output = run_here(sft)
    assert_one_line(code, "out/pretrain_256.pth does not exist: run `python train_pretrain.py")
    assert not LOG_LINE.search(output)

    (tmp_path / "out").mkdir(exist_ok=True)
    shutil.copy(whole_run[0] / "out/pretrain_256.pth", tmp_path / "out")
    code, output = run_here(sft)
    assert code is None, output
    assert len(LOG_LINE.findall(output)) == 4
    started = losses(tmp_path, "sft")
    assert {"sft_256.pth", "sft_256.resume.pth", "loss_sft.png", "loss_sft.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }

    weights = torch.load(tmp_path / "out/pretrain_256.pth", weights_only=True)
    torch.save({n: torch.zeros_like(x) for n, x in weights.items()}, tmp_path / "zeros.pth")
    code, output = run_here([*sft, "--init", "zeros.pth", "--max_steps", "1"])
    assert code is None, output
    uniform = losses(tmp_path, "sft")[0]  # logits of zero: ln 6400
    assert uniform == pytest.approx(8.764, abs=0.01) and started[0] < uniform - 0.5


def test_reference_recipe(data, tmp_path, run_here):
    options = ["--recipe", "reference", "--max_steps", "17"]
    code, output = run_here(command(data, *options))
    assert code is None, output
    rates = [line[3] for line in LOG_LINE.findall(output)]
    assert rates == [f"{5e-5 + 2.5e-4 * (1 + math.cos(math.pi * i / 17)):.12f}" for i in range(17)]
    curve = losses(tmp_path)  # 8 steps an update
    assert curve[16] < curve[0] - 0.2


def test_max_minutes_ends_by_itself(data, tmp_path, run_here):
    code, output = run_here(command(data, "--max_minutes", "0.05", "--max_steps", "100000"))
    assert code is None, output
    assert "Done: " in output and (tmp_path / "out/pretrain_256.pth").exists()
    assert LOG_LINE.search(output)
