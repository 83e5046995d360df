"""setup.sh, quickstart.sh and run_tests.sh, run for real in a copy of the repository's scripts.

Notable: nothing is installed or trained. `PATH` holds only the few tools the scripts may use and a
stand-in for Python, which notes how it is called and does what the real command would leave behind.
"""
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SCRIPTS = ["setup.sh", "quickstart.sh", "run_tests.sh", ".ci/run"]
TOOLS = ["awk", "bash", "cat", "chmod", "cmp", "cp", "cut", "dirname", "flock", "grep", "id",
         "kill", "mkdir", "mv", "rm", "sed", "sleep", "tail", "uname"]

FAKE_PYTHON = """#!/usr/bin/env bash
# Stands in for Python: notes its arguments, leaves behind what the command would.
echo "$*" >>"$CALLS"
case "$*" in
    -c*'(3, 10)'*) exit "${TOO_OLD:-0}" ;;
    -c*'print("python'*) echo python3.11 ;;
    -c*ensurepip*) exit "${NO_VENV:-0}" ;;
    -c*executable_path*) [ -n "${FETCHED:-}" ]; exit ;;
    "-m playwright install chromium")
        if [ -n "${PLAYWRIGHT_FAILS:-}" ]; then echo "$PLAYWRIGHT_FAILS" && exit 1; fi
        ;;
    "-m venv "*)
        mkdir -p "$3/bin" && cp "$FAKES/python" "$3/bin/python"
        printf '#!/usr/bin/env bash\\necho deno 2.9.8\\n' >"$3/bin/deno" && chmod +x "$3/bin/deno"
        ;;
    "-m pip "*install*)
        if [ -n "${PIP_FAILS:-}" ]; then echo "$PIP_FAILS" && exit 1; fi
        ;;
    "-m benchmarks.peak_memory "*) shift 2 && exec "$REAL_PYTHON" benchmarks/peak_memory.py "$@" ;;
    "-m codeact.install")
        if [ -n "${SANDBOX_FAILS:-}" ]; then echo "$SANDBOX_FAILS" && exit 1; fi
        mkdir -p codeact/.runtime && echo {} >codeact/.runtime/installed.json
        ;;
    "-m dataset.catalog --ready") exec "$REAL_PYTHON" "$@" ;;
    "-m dataset.starter")
        mkdir -p dataset
        for name in pretrain sft eval; do echo '{}' >"dataset/${name}_starter.jsonl"; done
        ;;
    "-m dataset.codeact "*) echo '{}' >dataset/codeact.jsonl ;;
    codeact_pipeline.py*) echo "the agent's answer to $(cat)" ;;
    train_*)
        stage=${1#train_} && stage=${stage%.py}
        if [ "${DIES_IN:-}" = "$stage" ] && [ -n "${HANGS:-}" ]; then
            trap 'echo state >out/"$stage"_256.resume.pth; exit 0' INT # saves, ends well
            echo "step 1" && while [ -e "$CALLS" ]; do sleep 0.1; done
        fi
        mkdir -p out && echo state >"out/${stage}_256.resume.pth"
        if [ "${DIES_IN:-}" = "$stage" ]; then echo "the loss is NaN" >&2 && exit 1; fi
        echo weights >"out/${stage}_256.pth"
        ;;
    model_chat.py*) echo "answer to $(cat)" ;;
    convert_to_transformers.py*) mkdir -p "$5" && echo {} >"$5/tokenizer_config.json" ;;
    *'find_spec("lmdeploy")'*) exit "${NO_LMDEPLOY:-0}" ;;
    lmdeploy_pipeline.py*) echo "the engine's answer to $(cat)" ;;
    "lmdeploy_cli.py lite auto_awq "*) mkdir -p "$6" && echo {} >"$6/tokenizer_config.json" ;;
    *socket.create_server*) echo 23334 ;;
    "lmdeploy_cli.py serve "*)
        echo "$$" >"$CALLS.server"
        case "${SERVER:-}" in
            ends) echo "no such model" && exit 1 ;;
            mute) ;;
            stubborn) trap '' TERM && echo up >"$CALLS.up" ;;
            *) echo up >"$CALLS.up" ;;
        esac
        while [ -e "$CALLS" ]; do sleep 0.1; done
        ;;
    "- http://127.0.0.1:23334/v1") [ -e "$CALLS.up" ] ;;
    "- http://127.0.0.1:23334/v1 "*)
        if [ "${SERVER:-}" = forgetful ]; then exit 1; fi
        if [ -n "${HANGS:-}" ]; then echo waiting && while [ -e "$CALLS" ]; do sleep 0.1; done; fi
        echo "the server's answer to $3"
        ;;
esac
"""


class Sandbox:
    """A copy of the scripts in a folder with an awkward name, and a PATH of stand-ins."""

    def __init__(self, folder: Path):
        self.root = folder / "缘 梦"
        self.fakes = folder / "bin"
        self.calls_file = folder / "calls.txt"
        self.root.mkdir()
        self.fakes.mkdir()
        for name in ["setup.sh", "quickstart.sh", "requirements.txt", "benchmarks/peak_memory.py",
                     "dataset/catalog.py",
                     "codeact/runtime.py", "codeact/runner/build.js"]:
            target = self.root / name
            target.parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(ROOT / name, target)
        tokenizer = self.root / "model" / "yuanmeng_tokenizer" / "tokenizer.json"
        tokenizer.parent.mkdir(parents=True)
        tokenizer.write_text("{}")
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.fakes / tool).symlink_to(found)
        self.add_tool("python", FAKE_PYTHON)
        self.add_tool("python3", FAKE_PYTHON)

    def add_tool(self, name: str, text: str) -> None:
        tool = self.fakes / name
        tool.unlink(missing_ok=True)  # a link to the real one: writing would go through it
        tool.write_text(text)
        tool.chmod(0o755)

    def environment(self, **extra: str) -> dict[str, str]:
        return {"PATH": str(self.fakes), "FAKES": str(self.fakes), "CALLS": str(self.calls_file),
                "REAL_PYTHON": sys.executable, "LC_ALL": "C.UTF-8", **extra}

    def run(self, *command: str, **extra: str) -> subprocess.CompletedProcess:
        """Run a script from another folder; `extra` are environment variables."""
        script, *options = command
        return subprocess.run(
            ["bash", str(self.root / script), *options], cwd="/", env=self.environment(**extra),
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )

    def calls(self, *beginnings: str) -> list[str]:
        """Since the last look, how Python was called with arguments that begin so."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.write_text("")
        return [line for line in lines if line.startswith(beginnings)]

    def installs(self) -> list[str]:
        """Since the last look, the arguments of `pip install`."""
        return [line.split(" install ", 1)[1] for line in self.calls("-m pip ")]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture
def ready(sandbox: Sandbox) -> Sandbox:
    """A sandbox after a finished set-up."""
    assert sandbox.run("setup.sh", "--cpu").returncode == 0
    sandbox.calls()
    return sandbox


# -- all scripts -----------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses_and_is_executable(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
    assert os.access(ROOT / script, os.X_OK)
    if shellcheck := shutil.which("shellcheck"):
        found = subprocess.run([shellcheck, ROOT / script], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("command, expected", [
    (("setup.sh", "--tpu"), "unknown option '--tpu'"),
    (("setup.sh", "--cpu", "--gpu"), "exclude each other"),
    (("quickstart.sh", "--fast"), "unknown option '--fast'"),
    (("quickstart.sh", "--preset", "7b"), "unknown preset '7b'"),
    (("quickstart.sh", "--preset"), "--preset needs a value"),
    (("quickstart.sh", "--minutes", "-3"), "not a number of minutes"),
    (("quickstart.sh", "--minutes", "0"), "not a number of minutes"),
])
def test_wrong_options_are_refused_before_anything_is_done(sandbox, command, expected):
    result = sandbox.run(*command)
    assert result.returncode != 0 and expected in result.stderr
    assert not (sandbox.root / ".venv").exists()


# -- requirements.txt ------------------------------------------------------------------------------

def requirements() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def test_every_requirement_is_pinned():
    for requirement in requirements():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, requirement
        assert requirement.url is None


def test_each_requirement_holds_once_on_every_python():
    for python in ("3.10", "3.11", "3.12", "3.13"):
        names = [r.name for r in requirements()
                 if r.marker is None or r.marker.evaluate({"python_version": python})]
        assert len(names) == len(set(names)) and {"torch", "numpy", "matplotlib"} <= set(names)


def test_the_installed_packages_are_the_pinned_ones():
    for requirement in requirements():
        if requirement.marker is None or requirement.marker.evaluate():
            if requirement.name != "torch":  # on a GPU, LMDeploy decides
                assert requirement.specifier.contains(version(requirement.name)), requirement


# -- setup.sh --------------------------------------------------------------------------------------

def test_cpu_profile_installs_lmdeploy_without_its_dependencies(sandbox):
    result = sandbox.run("setup.sh")  # no nvidia-smi on this PATH
    assert result.returncode == 0, result.stderr
    installs = sandbox.installs()
    assert installs[0].startswith("--no-deps torch==")
    assert installs[1] == "-r requirements.txt"
    assert installs[2].startswith("--no-deps lmdeploy==0.18.0") or os.uname().machine != "x86_64"


def test_gpu_profile_leaves_torch_to_lmdeploy(sandbox):
    sandbox.add_tool("nvidia-smi", "#!/usr/bin/env bash\necho GPU 0\n")
    assert "profile: gpu" in sandbox.run("setup.sh").stdout
    assert sandbox.installs()[0] == "lmdeploy==0.18.0 -r .venv/requirements-gpu.txt"
    listed = (sandbox.root / ".venv/requirements-gpu.txt").read_text()
    assert "torch==" not in listed and "transformers==" in listed


def test_a_driver_without_a_gpu_is_a_cpu(sandbox):
    sandbox.add_tool("nvidia-smi", "#!/usr/bin/env bash\nexit 9\n")
    assert "profile: cpu" in sandbox.run("setup.sh").stdout


def test_second_run_installs_nothing_and_keeps_the_forced_profile(sandbox):
    sandbox.add_tool("nvidia-smi", "#!/usr/bin/env bash\necho GPU 0\n")
    sandbox.run("setup.sh", "--cpu")
    sandbox.calls()
    result = sandbox.run("setup.sh")
    assert result.returncode == 0
    assert result.stdout == "Set-up is complete (profile: cpu); nothing to install.\n"
    assert sandbox.calls("-m ") == []


@pytest.mark.parametrize("change", ["requirements", "profile", "python"])
def test_a_change_sets_up_again(ready, change):
    options = []
    if change == "requirements":
        with open(ready.root / "requirements.txt", "a") as file:
            file.write("another==1.0\n")
    elif change == "profile":
        options = ["--gpu"]
    else:
        (ready.root / ".venv/bin/python").unlink()
        (ready.root / ".venv/bin/python").symlink_to("/nowhere/python3.9")
    assert ready.run("setup.sh", *options).returncode == 0
    assert ready.installs()


def test_torch_index_is_used_for_torch_alone(sandbox):
    sandbox.run("setup.sh", "--cpu", TORCH_INDEX_URL="https://torch.example/cpu")
    first, *others = sandbox.installs()
    assert first.startswith("--no-deps --index-url https://torch.example/cpu torch==")
    assert others and not any("torch.example" in install for install in others)


@pytest.mark.parametrize("output, advice", [
    ("OSError: [Errno 28] No space left on device", "The disk is full"),
    ("Retrying: NewConnectionError: Temporary failure in name resolution", "PIP_INDEX_URL"),
    ("ERROR: No matching distribution found for torch==2.13.0", "use Python 3.10 to 3.13"),
    ("something unheard of", "The last lines of the log say why"),
])
def test_a_failure_names_step_log_and_remedy_and_the_next_run_goes_on(sandbox, output, advice):
    result = sandbox.run("setup.sh", "--cpu", PIP_FAILS=output)
    assert result.returncode == 1
    assert "failed: PyTorch" in result.stderr and ".venv/setup.log" in result.stderr
    assert advice in result.stderr and "bash setup.sh" in result.stderr
    assert output in (sandbox.root / ".venv/setup.log").read_text()
    sandbox.calls()
    again = sandbox.run("setup.sh")
    assert again.returncode == 0 and "nothing to install" not in again.stdout
    assert len(sandbox.installs()) >= 2


def test_a_failure_of_the_sandboxs_step_is_told_in_its_own_words(sandbox):
    line = "npm's registry cannot be reached; NPM_CONFIG_REGISTRY names a mirror"
    result = sandbox.run("setup.sh", "--cpu", SANDBOX_FAILS=f"codeact.install: {line}")
    assert result.returncode == 1 and "failed: the agent's sandbox" in result.stderr
    assert f"  {line}\n" in result.stderr and "Traceback" not in result.stderr
    sandbox.calls()
    assert sandbox.run("setup.sh").returncode == 0
    assert len(sandbox.calls("-m codeact.install")) == 1


def test_a_sandbox_that_was_deleted_is_set_up_again(ready):
    shutil.rmtree(ready.root / "codeact/.runtime")
    assert ready.run("setup.sh").returncode == 0
    assert len(ready.calls("-m codeact.install")) == 1


def test_no_recent_python_says_how_to_get_one(sandbox):
    for name in ("python3.12", "python3.13"):  # a pyenv shim for a version that is not there
        sandbox.add_tool(name, "#!/usr/bin/env bash\necho 'pyenv: not found' >&2; exit 127\n")
    result = sandbox.run("setup.sh", TOO_OLD="1")
    assert result.returncode == 1
    assert "no Python 3.10 or newer was found" in result.stderr and "apt install" in result.stderr


def test_missing_venv_module_names_the_package(sandbox):
    result = sandbox.run("setup.sh", NO_VENV="1")
    assert result.returncode == 1 and "sudo apt install python3.11-venv" in result.stderr


def test_a_second_set_up_waits_for_the_first(ready):
    with open(ready.root / ".venv/setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(["bash", str(ready.root / "setup.sh")], env=ready.environment(),
                                  stdout=subprocess.PIPE, text=True)
        assert "waiting" in second.stdout.readline()
        assert second.poll() is None
    assert "nothing to install" in second.communicate()[0]


# -- setup.sh --browser ----------------------------------------------------------------------------

APT = """#!/usr/bin/env bash
echo "apt-get $*" >>"$CALLS"
exit "${APT_FAILS:-0}"
"""


def as_root(sandbox: Sandbox) -> None:
    sandbox.add_tool("apt-get", APT)
    sandbox.add_tool("id", "#!/usr/bin/env bash\necho 0\n")


def browser_calls(sandbox: Sandbox) -> list[str]:
    return sandbox.calls("apt-get", "-m playwright")


def test_no_browser_is_looked_for_unless_asked(sandbox):
    assert sandbox.run("setup.sh").returncode == 0
    assert browser_calls(sandbox) == []


@pytest.mark.parametrize("name", ["chromium", "chromium-browser", "google-chrome",
                                  "google-chrome-stable"])
def test_an_installed_browser_is_used(ready, name):
    as_root(ready)
    ready.add_tool(name, "#!/usr/bin/env bash\necho Chromium 140\n")
    result = ready.run("setup.sh", "--browser")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("nothing to install.\n") and browser_calls(ready) == []


def test_a_browser_fetched_before_is_used(ready):
    as_root(ready)
    assert ready.run("setup.sh", "--browser", FETCHED="1").returncode == 0
    assert browser_calls(ready) == []


def test_root_installs_the_browser_of_the_distribution(ready):
    as_root(ready)
    assert ready.run("setup.sh", "--browser").returncode == 0
    assert browser_calls(ready) == [
        "apt-get update",
        "apt-get install -y --no-install-recommends chromium fonts-noto-cjk",
    ]


@pytest.mark.parametrize("why", ["not root", "apt-get fails", "an empty shell"])
def test_else_playwright_fetches_one(ready, why):
    as_root(ready)
    if why == "not root":
        ready.add_tool("id", "#!/usr/bin/env bash\necho 1000\n")
    elif why == "an empty shell":
        ready.add_tool("chromium-browser", "#!/usr/bin/env bash\necho needs snap >&2; exit 10\n")
    assert ready.run("setup.sh", "--browser", APT_FAILS="100").returncode == 0
    assert browser_calls(ready)[-1] == "-m playwright install chromium"


def test_without_any_browser_it_says_what_to_install_and_the_next_run_goes_on(sandbox):
    sandbox.add_tool("id", "#!/usr/bin/env bash\necho 1000\n")
    failed = sandbox.run("setup.sh", "--browser", PLAYWRIGHT_FAILS="getaddrinfo ENOTFOUND")
    assert failed.returncode == 1
    assert "failed: browser for the tests" in failed.stderr
    assert "sudo apt install chromium" in failed.stderr
    assert "ENOTFOUND" in (sandbox.root / ".venv/setup.log").read_text()
    sandbox.calls()
    assert sandbox.run("setup.sh", "--browser").returncode == 0  # and the rest is kept
    assert sandbox.calls("-m ") == ["-m playwright install chromium"]


# -- quickstart.sh ---------------------------------------------------------------------------------

def trainings(sandbox: Sandbox) -> list[str]:
    return sandbox.calls("train_")


def test_quickstart_runs_the_flow_and_a_second_run_skips_it(ready):
    result = ready.run("quickstart.sh")
    assert result.returncode == 0, result.stderr
    folder = "Yuanmeng_Models/yuanmeng-mini-instruct"
    shown_again = [
        *["model_chat.py --preset mini --temperature 0"] * 3,
        f"lmdeploy_pipeline.py --model {folder} --temperature 0",
        f"lmdeploy_cli.py serve api_server {folder}-w4a16-4bit --quant-policy 4 "
        "--chat-template chat_templates.json --server-port 23334",
        "lmdeploy_cli.py serve api_server model/yuanmeng-mini-instruct --quant-policy 4 "
        "--chat-template chat_templates.json --server-port 23334",
        "codeact_pipeline.py --base-url http://127.0.0.1:23334/v1 --max-steps 3",
    ]
    stages = ("-m dataset.starter", "train_", "model_chat", "convert", "lmdeploy", "codeact_pipeline")
    calls = ready.calls(*stages)
    assert sorted(calls) == sorted([
        "-m dataset.starter",
        "train_pretrain.py --preset mini --max_minutes 6",
        "train_sft.py --preset mini --max_minutes 4",
        f"convert_to_transformers.py --model out/sft_256.pth --output_dir {folder}",
        f"lmdeploy_cli.py lite auto_awq {folder} --work-dir {folder}-w4a16-4bit "
        "--calib-samples 16",
        *shown_again,
    ])
    assert "$ python train_pretrain.py --preset mini --max_minutes 6" in result.stdout
    assert "answer to 你是谁" in result.stdout and "Peak memory" in result.stdout
    assert "the engine's answer to 你是谁" in result.stdout
    assert "the server's answer to 你是谁" in result.stdout
    assert "the agent's answer to Calculate the derivative of the function f(x)=xlnx at x=π." in (
        result.stdout)
    assert not is_running(ready)

    again = ready.run("quickstart.sh")
    assert again.returncode == 0
    assert sorted(ready.calls(*stages)) == sorted(shown_again)
    assert again.stdout.count("Finished before") == 6


def test_a_longer_training_teaches_the_agent_and_asks_its_own_model(ready):
    result = ready.run("quickstart.sh", "--minutes", "60")
    assert result.returncode == 0, result.stderr
    (served,) = ready.calls("lmdeploy_cli.py serve")
    assert "yuanmeng-mini-instruct-w4a16-4bit" in served
    assert "the agent's answer to Calculate" in result.stdout
    again = ready.run("quickstart.sh", "--minutes", "60")
    assert "Finished before: dataset/codeact.jsonl" in again.stdout


def test_newer_weights_are_exported_and_quantized_anew(ready):
    assert ready.run("quickstart.sh").returncode == 0
    ready.calls()
    (ready.root / "out/sft_256.pth").write_text("trained by hand")
    assert ready.run("quickstart.sh").returncode == 0
    assert [call.split()[:2] for call in ready.calls("convert", "lmdeploy_cli.py lite")] == [
        ["convert_to_transformers.py", "--model"], ["lmdeploy_cli.py", "lite"]]


def test_where_lmdeploy_is_missing_the_model_is_exported_all_the_same(ready):
    result = ready.run("quickstart.sh", NO_LMDEPLOY="1")
    assert result.returncode == 0 and "need Linux on x86-64" in result.stdout
    assert len(ready.calls("convert")) == 1
    assert "Export" in result.stdout.split("Peak memory")[1]
    assert not (ready.root / "out/server.log").exists()


@pytest.mark.parametrize("pair, enough", [
    (("pretrain_t2t_mini", "sft_t2t_mini"), True), (("pretrain_hq", "sft_mini_512"), True),
    (("pretrain_t2t_mini", "sft_mini_512"), True), (("pretrain_t2t_mini", "dpo"), False)])
def test_quickstart_takes_the_hubs_files_where_they_are(ready, pair, enough):
    for name in pair:
        (ready.root / f"dataset/{name}.jsonl").write_text("{}\n")
    result = ready.run("quickstart.sh")
    assert result.returncode == 0, result.stderr
    assert ready.calls("-m dataset.starter") == ([] if enough else ["-m dataset.starter"])
    there = f"Finished before: dataset/{pair[0]}.jsonl and dataset/{pair[1]}.jsonl"
    assert (there in result.stdout) == enough


@pytest.mark.parametrize("stage, before", [("pretrain", 0), ("sft", 1)])
def test_a_failed_stage_stops_and_is_resumed(ready, stage, before):
    failed = ready.run("quickstart.sh", "--minutes", "20", DIES_IN=stage)
    assert failed.returncode == 1
    assert "━━━ Ⅴ" not in failed.stdout
    assert "failed" in failed.stderr and "bash quickstart.sh --minutes 20" in failed.stderr
    assert f"python train_{stage}.py" in failed.stderr
    assert len(trainings(ready)) == before + 1
    assert ready.run("quickstart.sh", "--minutes", "20").returncode == 0
    expected = ["train_pretrain.py --preset mini --max_minutes 12",
                "train_sft.py --preset mini --max_minutes 8"][before:]
    expected[0] += " --resume"
    assert trainings(ready) == expected


def test_a_trial_run_does_not_pass_for_the_real_one(ready):
    assert ready.run("quickstart.sh", "--short").returncode == 0
    assert trainings(ready) == ["train_pretrain.py --preset mini --max_minutes 0.6",
                                "train_sft.py --preset mini --max_minutes 0.4"]
    ready.run("quickstart.sh")  # longer: both anew, neither of them resumed
    assert trainings(ready) == ["train_pretrain.py --preset mini --max_minutes 6",
                                "train_sft.py --preset mini --max_minutes 4"]
    ready.run("quickstart.sh", "--short")  # shorter: what is there is better
    assert trainings(ready) == []


def test_what_it_says_about_training_anew_is_true(ready):
    ready.run("quickstart.sh")
    trainings(ready)
    advice = ready.run("quickstart.sh").stdout
    (command,) = [line for line in advice.splitlines() if "anew: rm" in line and "pretrain" in line]
    for name in command.split(" rm ")[1].split():
        (ready.root / name).unlink()
    ready.run("quickstart.sh")  # and fine-tuning follows, because its start has changed
    assert trainings(ready) == ["train_pretrain.py --preset mini --max_minutes 6",
                                "train_sft.py --preset mini --max_minutes 4"]


def test_ctrl_c_ends_the_flow_although_the_trainer_ends_well(ready):
    (ready.root / "out").mkdir()
    flow = subprocess.Popen(
        ["bash", str(ready.root / "quickstart.sh")], start_new_session=True, text=True,
        env=ready.environment(DIES_IN="pretrain", HANGS="1"), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    while "step 1" not in flow.stdout.readline():
        assert flow.poll() is None
    os.killpg(flow.pid, signal.SIGINT)
    _, errors = flow.communicate()
    assert flow.returncode != 0
    assert "interrupted" in errors and "bash quickstart.sh" in errors
    assert not list((ready.root / "out").glob(".done_*"))
    trainings(ready)
    assert ready.run("quickstart.sh").returncode == 0
    assert trainings(ready)[0].endswith("--resume")


def is_running(sandbox: Sandbox) -> bool:
    """Whether the stand-in for the server is; its own process id is taken from its first line."""
    number = int(sandbox.calls_file.with_name("calls.txt.server").read_text())
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("server, message", [
    ("ends", "the server ended before it answered"),
    ("mute", "the server does not answer"),
    ("forgetful", "the server did not answer the question"),
])
def test_a_server_that_fails_is_reported_and_stopped(ready, server, message):
    failed = ready.run("quickstart.sh", SERVER=server, QUICKSTART_PATIENCE="1")
    assert failed.returncode == 1 and message in failed.stderr
    assert "out/server.log" in failed.stderr and "bash quickstart.sh" in failed.stderr
    assert "By hand:  python lmdeploy_cli.py serve api_server" in failed.stderr
    assert ("no such model" in failed.stderr) == (server == "ends")
    assert not is_running(ready)
    ready.calls()
    assert ready.run("quickstart.sh").returncode == 0  # and nothing that was finished is repeated
    assert ready.calls("train_", "convert", "lmdeploy_cli.py lite") == []


def test_a_server_that_will_not_end_is_killed(ready):
    assert ready.run("quickstart.sh", SERVER="stubborn").returncode == 0
    assert not is_running(ready)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_server_is_left_behind(ready, number):
    """To the whole group as a terminal does it, in which the server ignores SIGINT."""
    assert ready.run("quickstart.sh").returncode == 0
    ready.calls_file.with_name("calls.txt.up").unlink()  # or it would take the next one for up
    flow = subprocess.Popen(
        ["bash", str(ready.root / "quickstart.sh")], start_new_session=True, text=True,
        env=ready.environment(HANGS="1"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup would have it ignored
    )
    try:
        while "waiting" not in (line := flow.stdout.readline()):
            assert line
        assert is_running(ready)
        os.killpg(flow.pid, number)
        _, errors = flow.communicate(timeout=60)
    finally:
        if flow.poll() is None:
            os.killpg(flow.pid, signal.SIGKILL)
    # Whichever the script hears of first, the signal or that the question was not answered.
    assert flow.returncode != 0 and "stage Ⅷ" in errors and "bash quickstart.sh" in errors
    assert not is_running(ready)


# -- benchmarks/peak_memory.py ---------------------------------------------------------------------

def test_peak_memory_is_the_commands_and_so_is_the_status(tmp_path):
    report = tmp_path / "peak.txt"

    def measure(mebibytes: int, status: int) -> float:
        code = f"import sys; block = b'x' * ({mebibytes} << 20); sys.exit({status})"
        wrapper = [sys.executable, ROOT / "benchmarks/peak_memory.py", report]
        assert subprocess.run([*wrapper, sys.executable, "-c", code]).returncode == status
        return float(report.read_text())

    small, large = measure(1, 3), measure(201, 0)
    assert 190 < large - small < 210
