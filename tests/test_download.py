"""Fetching the data set, against a stand-in on loopback that speaks the protocols of both hubs."""
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import modelscope_hub._download
import modelscope_hub._legacy_api
import pytest
from huggingface_hub import HfApi
from modelscope_hub.config import set_default_config
from support.hubs import StandInHub, serving_hub

from dataset import catalog, hubs
from dataset import download as download_module
from dataset.download import DownloadError, DownloadSettings, download, main

ROOT = Path(__file__).parent.parent
MINI = ["pretrain_t2t_mini.jsonl", "sft_t2t_mini.jsonl"]
FORMER = ["pretrain_hq.jsonl", "sft_mini_512.jsonl"]
STARTER = "python -m dataset.starter"


@pytest.fixture(params=["modelscope", "huggingface"])
def hub_name(request) -> str:
    return request.param


@pytest.fixture
def point_at(monkeypatch, tmp_path) -> Iterator[Callable[[str], None]]:
    """Sends both libraries to a URL, without this machine's tokens and without waits."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("MODELSCOPE_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    for name in ("DOWNLOAD_RETRY_MAX_DELAY_SECONDS", "DOWNLOAD_INTEGRITY_RETRY_BACKOFF"):
        monkeypatch.setattr(modelscope_hub._download, name, 0)
    monkeypatch.setattr(modelscope_hub._legacy_api, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    # Small blocks, so that a cut leaves a part.
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)

    def point(url: str) -> None:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            url + "/{repo_id}/resolve/{revision}/{filename}")
        set_default_config(None)  # ModelScope's SDK reads the environment once: let it read ours
    yield point
    set_default_config(None)


@pytest.fixture
def hub(point_at) -> Iterator[StandInHub]:
    with serving_hub() as server:
        point_at(server.url)
        yield server


@pytest.fixture
def settings(tmp_path, hub_name) -> DownloadSettings:
    return DownloadSettings(output_dir=str(tmp_path / "data"), hub=hub_name)


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def failure(settings: DownloadSettings) -> str:
    """The one line with which a download ends."""
    with pytest.raises(DownloadError) as caught:
        download(settings)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600, line
    return line


# ---- What is fetched -----------------------------------------------------------------------------

def test_the_defaults_arrive_and_a_second_run_fetches_nothing(hub, settings, capsys):
    paths = download(settings)
    assert [path.name for path in paths] == MINI
    assert contents(settings.output_dir) == {name: hub.files[name] for name in MINI}, (
        "no partial files or lock files stay")
    assert len(hub.ranges) == 2

    others = Path(settings.output_dir) / ".downloads" / "starter.zip"
    others.parent.mkdir()
    others.touch()
    download(settings)
    assert len(hub.ranges) == 2 and others.exists()
    assert capsys.readouterr().out.count("complete already") == 2


def test_a_hub_with_the_former_files_gives_those_and_says_so(point_at, settings, capsys):
    with serving_hub("former") as hub:
        point_at(hub.url)
        assert [path.name for path in download(settings)] == FORMER
    output = capsys.readouterr().out
    for name, former in zip(MINI, FORMER):
        assert f"lists no {name} here: fetching its predecessor {former}." in output


def test_one_stage_may_have_todays_file_and_the_other_the_former(hub, settings):
    hub.files["sft_mini_512.jsonl"] = hub.files.pop("sft_t2t_mini.jsonl")
    assert [path.name for path in download(settings)] == [MINI[0], FORMER[1]]


def test_a_hub_that_knows_none_of_the_names_says_what_it_has(point_at, settings):
    with serving_hub("unknown") as hub:
        point_at(hub.url)
        line = failure(settings)
        for words in ("for pretrain and sft", "pretrain_2028.jsonl (", "sft_2028.jsonl (",
                      f"python -m dataset.download --hub {settings.hub} --files NAME", STARTER):
            assert words in line
        assert ".gitattributes" not in line and not hub.ranges

        settings.files = ["sft_2028"]  # as the line says
        download(settings)
        assert contents(settings.output_dir) == {"sft_2028.jsonl": hub.files["sft_2028.jsonl"]}


def test_a_stage_without_its_file_is_named_before_anything_is_fetched(hub, settings):
    del hub.files["sft_t2t_mini.jsonl"]  # the full one is there, but nobody asked for 14 GB
    line = failure(settings)
    assert "for sft." in line and "sft_t2t.jsonl" in line and "pretrain and" not in line
    assert not hub.ranges and not Path(settings.output_dir).exists()


@pytest.mark.parametrize("ending", ["", ".jsonl"])
def test_every_other_file_of_the_table_can_be_named(hub, settings, ending, capsys):
    others = [file.name for file in catalog.HUB_FILES if not file.default and not file.former]
    settings.files = [name.removesuffix(".jsonl") + ending for name in others] * 2  # each once
    assert [path.name for path in download(settings)] == others
    assert contents(settings.output_dir) == {name: hub.files[name] for name in others}
    assert len(hub.ranges) == len(others)
    assert "No stage takes dpo.jsonl, rlaif.jsonl, agent_rl.jsonl, agent_rl_math.jsonl" in (
        capsys.readouterr().out)


def test_a_small_file_without_a_hash_arrives_too(hub, settings):
    settings.files = ["README.md"]
    download(settings)
    assert contents(settings.output_dir) == {"README.md": hub.files["README.md"]}


def test_an_unknown_name_is_answered_with_those_that_are_there(hub, settings):
    settings.files = ["dpo", "nothing"]
    line = failure(settings)
    assert "lists no nothing. It has: pretrain_t2t.jsonl (" in line and STARTER in line
    assert not hub.ranges


def test_a_long_listing_is_cut_short(hub, settings):
    hub.files = {f"part-{number:03}.jsonl": b"{}\n" for number in range(200)}
    assert "and 188 more" in failure(settings)


def test_an_empty_hub(hub, settings):
    hub.files = {}
    assert "It is empty" in failure(settings)


# ---- Interrupted, damaged, full ------------------------------------------------------------------

def test_a_run_that_broke_off_is_resumed_by_the_next(hub, settings, monkeypatch):
    hub.break_off_after, hub.break_offs_left, hub.is_down_after_break = 100_000, 1, True
    with monkeypatch.context() as patch:
        patch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_TIMES", 1)
        line = failure(settings)
    assert "run the same command to go on" in line and STARTER in line
    assert not (Path(settings.output_dir) / MINI[0]).exists()

    hub.refuse_files = None
    hub.ranges.clear()
    download(settings)
    (name, asked), (_, no_range) = hub.ranges
    assert name == MINI[0] and asked is not None and no_range is None
    assert 0 < int(asked.removeprefix("bytes=").removesuffix("-")) <= 100_000
    assert contents(settings.output_dir) == {name: hub.files[name] for name in MINI}


def test_a_broken_connection_heals_within_a_run(hub, settings):
    hub.break_off_after, hub.break_offs_left = 200_000, 2
    download(settings)
    assert [asked is None for _, asked in hub.ranges] == [True, False, False, True]
    assert contents(settings.output_dir) == {name: hub.files[name] for name in MINI}


def test_a_server_without_ranges_sends_all_again(hub, settings):
    hub.break_off_after, hub.break_offs_left, hub.ignores_ranges = 200_000, 1, True
    download(settings)
    assert contents(settings.output_dir) == {name: hub.files[name] for name in MINI}


@pytest.mark.parametrize("lie", ["larger", "smaller", "corrupt"])
def test_wrong_size_or_content_is_an_error_and_leaves_no_file(hub, settings, lie):
    hub.listed_size_offset = {"larger": 5, "smaller": -5}.get(lie, 0)
    hub.corrupt = lie == "corrupt"
    line = failure(settings)
    assert "pretrain_t2t_mini.jsonl arrived with the wrong size or content (" in line
    assert not list(Path(settings.output_dir).glob("*.jsonl"))

    hub.listed_size_offset, hub.corrupt = 0, False
    download(settings)  # nothing of it is taken over
    assert contents(settings.output_dir) == {name: hub.files[name] for name in MINI}


def test_a_new_version_on_the_hub_is_not_appended_to_the_old(hub, settings, monkeypatch):
    hub.break_off_after, hub.break_offs_left, hub.is_down_after_break = 100_000, 1, True
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_TIMES", 1)
    failure(settings)
    hub.refuse_files = None
    hub.files[MINI[0]] = b'{"text": "new"}\n' * 20_000
    download(settings)
    assert contents(settings.output_dir) == {name: hub.files[name] for name in MINI}


def test_a_file_of_the_user_is_kept_unless_told_otherwise(hub, settings, capsys):
    own = Path(settings.output_dir) / MINI[0]
    own.parent.mkdir()
    own.write_bytes(b"mine")
    download(settings)  # the other file is fetched all the same
    assert own.read_bytes() == b"mine"
    assert "kept as it is (--overwrite replaces it)" in capsys.readouterr().out
    assert contents(settings.output_dir) == {
        MINI[0]: b"mine", MINI[1]: hub.files[MINI[1]]}
    settings.overwrite = True
    download(settings)
    assert own.read_bytes() == hub.files[MINI[0]]


def test_full_disk_is_found_before_the_download(hub, settings, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda path: usage)
    assert "GB free" in failure(settings)
    assert not hub.ranges


def test_a_disk_that_fills_up_on_the_way_is_one_line(hub, settings, monkeypatch):
    def fill_up(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(hubs.HubApi, "download_file", fill_up)
    monkeypatch.setattr(hubs, "http_get", fill_up)
    line = failure(settings)
    assert "No space left on device" in line and "run the same command to go on" in line


def test_errors_that_lead_in_a_circle_have_a_reason():
    """An error that is raised again while another is handled is the other's cause and effect."""
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    assert hubs.reason(first) == "second" and hubs.status_of(first) is None


def test_two_downloads_of_a_file_do_not_mix(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hubs, "LOCK_TIMEOUT_S", 0.01)
    settings = DownloadSettings(output_dir=str(tmp_path), hub="huggingface")
    entry = hubs.HUBS["huggingface"].listing("main")[MINI[0]]
    partial = hubs.HUBS["huggingface"].partial(entry, tmp_path / ".downloads" / "huggingface")
    partial.parent.mkdir(parents=True)
    with hubs.WeakFileLock(f"{partial}.lock"):
        assert "Another download of pretrain_t2t_mini.jsonl is running" in failure(settings)
    assert not hub.ranges


# ---- Refused, unreachable ------------------------------------------------------------------------

@pytest.mark.parametrize("status, words", [
    (401, "refuses"), (403, "refuses"), (429, "too many requests"), (404, "does not show it"),
    (500, "Cannot reach")])
def test_a_refused_listing_is_one_line(hub, settings, status, words):
    hub.refuse_listing = status
    line = failure(settings)
    assert words in line and str(status) in line and STARTER in line
    other = {"modelscope": "huggingface", "huggingface": "modelscope"}[settings.hub]
    assert f"--hub {other}" in line
    token = {"modelscope": "MODELSCOPE_API_TOKEN", "huggingface": "HF_TOKEN"}[settings.hub]
    assert (token in line) == (status in (401, 403))


@pytest.mark.parametrize("status, words", [
    (401, "refuses"), (403, "refuses"), (429, "too many requests")])
def test_a_refused_file_is_one_line(hub, settings, status, words, monkeypatch):
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_TIMES", 0)
    hub.refuse_files = status
    line = failure(settings)
    assert words in line and str(status) in line and STARTER in line


def test_the_tokens_of_the_environment_are_sent(hub, settings, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    monkeypatch.setenv("HF_TOKEN", "hf-secret")
    set_default_config(None)
    download(settings)
    assert hub.tokens == {"modelscope": {"hub": {"Bearer ms-secret"}},
                          "huggingface": {"hub": {"Bearer hf-secret"}, "storage": {None}},
                          }[settings.hub], "and none to where Hugging Face stores large files"


def test_a_web_page_instead_of_a_hub(hub, settings):
    hub.is_web_page = True
    assert "Cannot reach" in failure(settings)


def test_unknown_revision_is_named(hub, settings):
    settings.revision = "v9"
    assert "at revision v9" in failure(settings)


def test_without_network_one_line_names_the_starter(point_at, settings, monkeypatch, capsys):
    point_at("http://127.0.0.1:9")
    monkeypatch.setattr("sys.argv", ["download.py", "--output_dir", settings.output_dir,
                                     "--hub", settings.hub])
    with pytest.raises(SystemExit) as caught:
        main()
    message = str(caught.value)
    assert message.startswith(f"error: Cannot reach {hubs.HUBS[settings.hub].title} (")
    assert "\n" not in message and STARTER in message
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_one_line(hub, settings, monkeypatch, tmp_path):
    (tmp_path / "data").write_text("a file where the folder would be")
    monkeypatch.setattr("sys.argv", ["download.py", "--output_dir", settings.output_dir,
                                     "--hub", settings.hub])
    with pytest.raises(SystemExit) as caught:
        main()
    assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)


# ---- The command ---------------------------------------------------------------------------------

def command(hub: StandInHub, folder: Path, *options: str) -> subprocess.Popen:
    environment = {**os.environ, "MODELSCOPE_ENDPOINT": hub.url, "HF_ENDPOINT": hub.url,
                   "HOME": str(folder), "HF_HOME": str(folder), "no_proxy": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dataset.download", "--output_dir", str(folder / "data"), *options],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_reads_the_mirrors_of_the_environment(hub_name, tmp_path):
    with serving_hub() as hub:
        process = command(hub, tmp_path, "--hub", hub_name)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert contents(tmp_path / "data") == {name: hub.files[name] for name in MINI}
    assert "pretrain_t2t_mini.jsonl: 0.5 MB" in output and "Traceback" not in errors


def test_ctrl_c_is_one_line_and_what_has_arrived_is_kept(hub_name, tmp_path):
    with serving_hub() as hub:
        hub.stall_after = 100_000
        process = command(hub, tmp_path, "--hub", hub_name)
        assert hub.stalled.wait(60)
        process.send_signal(signal.SIGINT)
        hub.go_on.set()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and errors.rstrip().splitlines()[-1] == (
            f"Interrupted. {hubs.KEPT}.")
        assert "Traceback" not in errors
        hub.stall_after = None
        hub.ranges.clear()
        again = command(hub, tmp_path, "--hub", hub_name)
        _, errors = again.communicate()
        assert again.returncode == 0, errors
        assert contents(tmp_path / "data") == {name: hub.files[name] for name in MINI}


def test_the_help_names_every_file_and_fits_on_a_page():
    result = subprocess.run([sys.executable, "-m", "dataset.download", "--help"], cwd=ROOT,
                            capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    text = " ".join(result.stdout.split())
    for file in catalog.HUB_FILES:
        named = f"{file.name.removesuffix('.jsonl')} ({file.size})"
        assert (named in text) == (not file.former)
    assert "(default: None)" not in text and result.stdout.count("\n") < 25


def test_the_stand_in_lists_the_same_by_every_way_of_hugging_face(hub):
    """`hf` and other clients ask for the tree; what it says must not differ from the info."""
    api = HfApi(endpoint=hub.url)
    tree = {file.path: (file.size, file.lfs and file.lfs.sha256)
            for file in api.list_repo_tree("jingyaogong/minimind_dataset", repo_type="dataset")}
    info = {name: (entry.size, entry.sha256)
            for name, entry in hubs.HUBS["huggingface"].listing("main").items()}
    assert tree == info and len(tree) == len(hub.files)
