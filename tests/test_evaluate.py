"""The script as a whole, on a tiny model: what it writes, and what it says of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
from model import TOKENIZER_DIR, YuanMengConfig, YuanMengModel

ROOT = Path(__file__).parents[1]
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
}
KINDS = ("md", "jsonl", "png")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return YuanMengModel(YuanMengConfig(**TINY, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    """Two tiny models, `eval.jsonl`, and an `exam` of two subjects."""
    folder = tmp_path_factory.mktemp("evaluation")
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    torch.manual_seed(1)
    other = YuanMengModel(YuanMengConfig(**{**TINY, "hidden_size": 128}))
    torch.save(other.state_dict(), folder / "other.pth")
    chat = {"conversations": [{"role": "user", "content": "你是谁"}], "accept": ["缘梦"]}
    choices = {"choices": ["甲乙", "丙丁", "戊己", "庚辛"], "answer": 1}
    items = [{"task": "bits_per_byte", "kind": "text", "source": "law", "text": "第一条 为了保护。"}]
    items += [{"task": "idiom", "kind": "choice", "question": f"成语{i}：", **choices}
              for i in range(5)]
    items += [{"task": "identity", "kind": "chat", **chat}]
    (folder / "eval.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    (folder / "exam").mkdir()
    (folder / "exam/law_val.csv").write_text(
        "id,question,A,B,C,D,answer\n0,一,甲,乙,丙,丁,C\n1,二,甲,乙,丙,丁,A\n", "utf-8")
    (folder / "exam/anatomy.csv").write_text(
        ",Question,A,B,C,D,Answer\n0,一,甲,乙,丙,丁,B\n", "utf-8")
    return folder


def run(folder: Path, *options, monkeypatch, model="tiny") -> str:
    """The report of a run in this process."""
    arguments = ["--data", folder / "eval.jsonl", "--output", folder / "out/report.md"]
    arguments += ["--model", folder / model] if model else []
    arguments += ["--max_new_tokens", 8, *options]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()
    return (folder / "out/report.md").read_text("utf-8")


def test_two_runs_are_alike_to_the_byte(folder, tmp_path):
    command = [sys.executable, ROOT / "evaluate.py", "--model", folder / "tiny"]
    command += ["--data", folder / "eval.jsonl", "--exam_dir", folder / "exam", "--limit", "3"]
    command += ["--compare", folder / "other.pth", "--max_new_tokens", "8", "--output"]
    outputs = []
    for name in ("first", "second"):
        done = subprocess.run(
            [*command, tmp_path / name / "report.md"],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.append([(tmp_path / name / f"report.{kind}").read_bytes() for kind in KINDS])
    assert outputs[0] == outputs[1]
    report = outputs[0][0].decode()
    assert "| idiom | 3 |" in report and "| 25.0% |" in report
    for row in ("bits per byte: law | 1", "bits per byte: total | 1", "exam: anatomy | 1",
                "exam: law | 2", "exam: total | 3", "identity | 1", "replies that loop | 1"):
        assert f"| {row} |" in report
    assert f"- exam_dir: {folder / 'exam'} (SHA-256 " in report
    assert "limit: 3, seed: 42" in report and "no difference shown" in report and "Holm" in report
    assert outputs[0][2].startswith(b"\x89PNG")
    replies = [json.loads(line) for line in outputs[0][1].decode().splitlines()]
    assert [reply["model"] for reply in replies] == ["tiny", "other"]


def test_scores_are_those_of_the_items(folder, model, tokenizer, monkeypatch):
    report = run(folder, "--tasks", "bits_per_byte,idiom", monkeypatch=monkeypatch)
    text = "第一条 为了保护。"
    ids = torch.tensor([[1, *tokenizer.encode(text, add_special_tokens=False)]])
    with torch.no_grad():
        nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    bits = nats / torch.tensor(2.0).log().item() / len(text.encode())
    assert f"| bits per byte: law | 1 | {bits:.3f} |" in report
    right = 0
    for i in range(5):
        losses = []
        for choice in ("甲乙", "丙丁", "戊己", "庚辛"):
            context = [1, *tokenizer.encode(f"成语{i}：", add_special_tokens=False)]
            ids = torch.tensor([context + tokenizer.encode(choice, add_special_tokens=False)])
            labels = ids.clone()
            labels[:, : len(context)] = -100
            with torch.no_grad():
                losses.append(model(ids, labels=labels).loss.item() * (ids.shape[1] - len(context)))
        right += losses.index(min(losses)) == 1
    assert f"| idiom | 5 | {right / 5:.1%} |" in report


def test_a_checkpoint_against_itself_shows_no_difference(folder, monkeypatch):
    report = run(folder, "--compare", folder / "tiny", monkeypatch=monkeypatch)
    rows = [line for line in report.splitlines() if line.endswith("no difference shown |")]
    assert len(rows) == 5 and all("| 1.000 | 1.000 |" in row for row in rows)
    assert "| tiny (2): score |" in report and f"- model tiny (2): {folder / 'tiny'}\n" in report


def test_an_endpoint_is_measured_by_its_replies(folder, endpoint_server, monkeypatch):
    report = run(folder, "--base_url", endpoint_server.url, "--compare", folder / "tiny",
                 monkeypatch=monkeypatch, model=None)
    assert "- left out for yuanmeng: an endpoint tells no likelihoods" in report
    assert "| identity | 1 | 100.0% |" in report and "not compared" in report
    assert f"- model yuanmeng: {endpoint_server.url}" in report


@pytest.mark.parametrize(("options", "message"), [
    (["--tasks", "nonsense"], "holds bits_per_byte, idiom, identity"),
    (["--tasks", "exam"], "--tasks exam"),
    (["--data", "no.jsonl"], "no.jsonl does not exist; `python -m dataset.starter`"),
    (["--model", "no.pth"], "there is no no.pth"),
    (["--model", str(ROOT / "docs")], "docs is not a model folder: it has no config.json"),
    (["--compare", "no.pth"], "there is no no.pth"),
    (["--exam_dir", str(ROOT / "docs")], "docs holds no .csv file"),
    (["--base_url", "http://127.0.0.1:1/v1"], "--base_url and --model are two models"),
    (["--limit", "-1"], "--limit must be at least 0"),
    (["--batch_size", "0"], "--batch_size must be at least 1"),
    (["--max_new_tokens", "3000"], "max_new_tokens 3000 leaves no room"),
    (["--output", "/proc/report.md"], "cannot write /proc/report.md"),
])
def test_bad_input_is_one_line(options, message, folder, monkeypatch):
    with pytest.raises(SystemExit) as error:
        run(folder, *options, monkeypatch=monkeypatch)
    assert str(error.value).startswith("evaluate.py: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_url_is_one_line(folder, monkeypatch):
    with pytest.raises(SystemExit, match="is no URL; it begins with http://"):
        run(folder, "--base_url", "127.0.0.1:23333", monkeypatch=monkeypatch, model=None)


def test_conversion_keeps_the_model(model, tokenizer, tmp_path):
    config = YuanMengConfig(**{**TINY, "hidden_size": 128})
    torch.manual_seed(1)
    small = YuanMengModel(config).eval()
    weights = {name: x for name, x in small.state_dict().items() if name != "output.weight"}
    torch.save(weights, tmp_path / "sft_128.pth")
    folder = tmp_path / "folder"
    command = [sys.executable, ROOT / "convert_to_transformers.py", "--dtype", "float32"]
    command += ["--model", tmp_path / "sft_128.pth", "--output_dir", folder]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, small(ids).logits)
    again = AutoTokenizer.from_pretrained(folder)
    assert again.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False) == (
        tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    )


@pytest.mark.parametrize(
    "script", ["evaluate.py", "convert_to_transformers.py", "model_chat.py", "train_tokenizer.py"]
)
def test_an_unknown_option_is_one_line(script):
    run = subprocess.run(
        [sys.executable, ROOT / script, "--no_such_option", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.strip() == (
        f"{script}: unknown option --no_such_option; --help lists them"
    )
