"""The table of the data set's files: what a stage picks, what it says, and what documents say."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dataset import catalog
from dataset.catalog import HUB_FILES, STAGES, default_names, pick_agent_data, pick_data, ready_line

ROOT = Path(__file__).parent.parent
LINE = '{"text": "好"}\n'


def put(folder: Path, *names: str, text: str = LINE) -> list[Path]:
    for name in names:
        (folder / name).write_text(text, "utf-8")
    return [folder / name for name in names]


# ---- The table -----------------------------------------------------------------------------------

def test_each_stage_has_one_default_and_it_comes_first():
    for stage in STAGES:
        files = [file for file in HUB_FILES if file.stage == stage]
        assert [file.default for file in files] == [True, False, False]
        assert [file.former for file in files] == [False, False, True]
    assert default_names() == ["pretrain_t2t_mini.jsonl", "sft_t2t_mini.jsonl"]
    assert {file.stage for file in HUB_FILES} == {*STAGES, "later"}
    assert len({file.name for file in HUB_FILES}) == len(HUB_FILES)


@pytest.mark.parametrize("size, text", [(53_000_000, "53 MB"), (1_200_000_000, "1.2 GB"),
                                        (14_000_000_000, "14 GB"), (999_900_000, "1.0 GB"),
                                        (9_960_000_000, "10 GB"), (2_000_000, "2.0 MB")])
def test_sizes_in_words(size, text):
    assert catalog.gigabytes(size) == text


@pytest.mark.parametrize("name", ["README.md", "README_en.md"])
def test_the_readme_has_the_same_table(name):
    """Name, stage and size of every file, in the table's order; the defaults are in bold."""
    text = (ROOT / name).read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if re.match(r"\| \**`\w+\.jsonl`", line)]
    rows = [row for row in rows if row[0].strip("*`") in {file.name for file in HUB_FILES}]
    expected = [[f"**`{file.name}`**" if file.default else f"`{file.name}`",
                 file.stage if file.stage != "later" else "—", file.size] for file in HUB_FILES]
    assert [row[:3] for row in rows] == expected
    assert all(len(row) == 4 and row[3] for row in rows), "each says what it is for"


@pytest.mark.parametrize("name", [
    "dataset/download.py", "dataset/hubs.py", "quickstart.sh", "train_pretrain.py", "train_sft.py",
    "train_tokenizer.py", "training/settings.py", "training/stage.py"])
def test_whoever_needs_a_name_asks_the_table(name):
    text = (ROOT / name).read_text("utf-8")
    assert not [file.name for file in HUB_FILES
                if file.stage in STAGES and file.name.removesuffix(".jsonl") in text]


# ---- What a stage picks --------------------------------------------------------------------------

def test_without_data_the_message_names_the_files_and_the_commands(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        pick_data("sft", data_dir=tmp_path)
    for words in ("sft_t2t_mini.jsonl, sft_t2t.jsonl, sft_mini_512.jsonl, sft_starter.jsonl",
                  "python -m dataset.starter", "python -m dataset.download"):
        assert words in str(caught.value)


def test_the_preferred_file_is_picked_and_the_others_are_named(tmp_path, capsys):
    """From the least to the most preferred: each new file is picked before those before it."""
    before: list[str] = []
    for name in ("pretrain_starter.jsonl", "pretrain_hq.jsonl", "pretrain_t2t.jsonl",
                 "pretrain_t2t_mini.jsonl"):
        put(tmp_path, name)
        assert pick_data("pretrain", data_dir=tmp_path) == [tmp_path / name]
        line = capsys.readouterr().out
        assert line.startswith("Data: ") and line.count("\n") == 1 and "0.0 MB" in line
        assert ("starter corpus" in line) == (not before) and ("hub's" in line) == bool(before)
        left_aside = f"; left aside: {', '.join(before)} (--data chooses)\n"
        assert line.endswith(left_aside if before else "MB)\n")
        before.insert(0, name)


def test_an_empty_file_is_not_picked(tmp_path, capsys):
    put(tmp_path, "sft_t2t_mini.jsonl", text="")
    put(tmp_path, "sft_mini_512.jsonl")
    assert pick_data("sft", data_dir=tmp_path) == [tmp_path / "sft_mini_512.jsonl"]
    assert "t2t" not in capsys.readouterr().out


def test_the_user_chooses_several_files_folders_and_pipes(tmp_path, capsys, monkeypatch):
    (own,) = put(tmp_path, "own.jsonl")
    folder = tmp_path / "books"
    (folder / "old").mkdir(parents=True)
    (folder / ".git").mkdir()
    put(folder, "a.txt", "old/b.txt", ".hidden", ".git/config")
    os.mkfifo(tmp_path / "pipe")
    put(tmp_path, "sft_t2t_mini.jsonl")
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    names = [str(own), str(folder), str(tmp_path / "pipe"), "-"]
    assert pick_data("sft", names, data_dir=tmp_path) == [Path(name) for name in names]
    line = capsys.readouterr().out
    for words in ("own.jsonl (your choice, 0.0 MB)", "books (your choice, 2 files)",
                  "pipe (your choice, a pipe)", "- (your choice, the standard input)"):
        assert words in line
    assert line.count("\n") == 1
    pick_data("sft", names, data_dir=tmp_path, quiet=True)
    assert capsys.readouterr().out == ""


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    (own,) = put(tmp_path, "own.jsonl")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    for names, message in (([own, tmp_path / "none.jsonl"], r"No such data file: .*none\.jsonl"),
                           ([tmp_path / "empty"], "No data files in the folder"),
                           (["-", "-"], "only once")):
        with pytest.raises(FileNotFoundError, match=message):
            pick_data("sft", [str(name) for name in names], data_dir=tmp_path)


def test_a_terminal_is_no_data(monkeypatch):
    _, terminal = os.openpty()
    monkeypatch.setattr("sys.stdin", open(terminal))
    with pytest.raises(FileNotFoundError, match="nothing is piped"):
        pick_data("sft", ["-"])


def test_the_agents_conversations_are_added_where_they_are(tmp_path, capsys):
    assert pick_agent_data(data_dir=tmp_path) == []
    (agent,) = put(tmp_path, "codeact.jsonl")
    assert pick_agent_data(data_dir=tmp_path) == [agent]
    assert "(the agent's, 0.0 MB)" in capsys.readouterr().out
    assert pick_agent_data("none", data_dir=tmp_path) == []
    with pytest.raises(FileNotFoundError, match="python -m dataset.codeact"):
        pick_agent_data(str(tmp_path / "none.jsonl"), data_dir=tmp_path)


# ---- The command ---------------------------------------------------------------------------------

@pytest.mark.parametrize("present, ready", [
    (["pretrain_t2t_mini.jsonl", "sft_t2t_mini.jsonl"], True),
    (["pretrain_hq.jsonl", "sft_mini_512.jsonl"], True),
    (["pretrain_t2t.jsonl", "sft_mini_512.jsonl"], True),
    (["pretrain_t2t_mini.jsonl"], False),
    (["pretrain_starter.jsonl", "sft_starter.jsonl", "eval_starter.jsonl"], True),
    (["pretrain_starter.jsonl", "sft_starter.jsonl"], False),
    (["pretrain_hq.jsonl", "sft_starter.jsonl", "eval_starter.jsonl"], True),
    ([], False),
])
def test_ready_means_that_both_trainers_find_data(tmp_path, present, ready):
    put(tmp_path, *present)
    line = ready_line(tmp_path)
    assert (line is not None) == ready
    assert not ready or all(str(tmp_path / name) in line for name in present[:2])


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dataset.catalog", *options], cwd=ROOT,
                          capture_output=True, text=True)


def test_the_command_lists_every_file():
    result = run()
    assert result.returncode == 0 and result.stderr == ""
    for file in HUB_FILES:
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{file.name} ")]
        assert file.size in line and file.purpose in line and file.default == ("default" in line)


def test_the_command_answers_whether_data_is_there():
    result = run("--ready")
    line = ready_line()
    assert (result.returncode, result.stdout.strip()) == ((0, line) if line else (1, ""))
    assert "unrecognized arguments: --redy" in run("--redy").stderr
