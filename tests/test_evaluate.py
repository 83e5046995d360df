"""The report card: its statistics, its judgement of replies, and a whole run on a tiny model."""

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


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return YuanMengModel(YuanMengConfig(**TINY, initializer_range=0.2)).eval()


def test_wilson_interval_matches_published_values():
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29 by the score method without correction.
    for right, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert evaluate.wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("item", "reply", "right"),
    [
        ({"accept": ["48"], "match": "number"}, "3+45=48。", True),
        ({"accept": ["48"], "match": "number"}, "48+3=51", False),
        ({"accept": ["48"], "match": "number"}, "不知道", False),
        ({"accept": ["-3"], "match": "number"}, "等于-3。", True),
        ({"accept_all": ["杜甫", "唐代"]}, "杜甫是唐代诗人。", True),
        ({"accept_all": ["杜甫", "唐代"]}, "李白是唐代诗人。", False),
        ({"accept": ["缘梦"]}, "我是缘梦。", True),
        ({"accept": ["缘梦"]}, "我是谁？", False),
    ],
)
def test_judgement(item, reply, right):
    assert evaluate.is_right(item, reply) is right


def test_loops():
    assert evaluate.loops("好的", ended=False)
    assert evaluate.loops("春天春天春天来了", ended=True)
    assert not evaluate.loops("春天来了，春天又走了。", ended=True)
    assert not evaluate.loops("1000000", ended=True)
    assert evaluate.loops("1, 1, 1, 1, 1", ended=True)


def test_continuation_losses_equal_one_by_one(model, tokenizer):
    texts = [("李白是", "唐代诗人。"), ("1+1=", "2"), ("你好", "，很高兴认识你。请坐。")]
    pairs = [
        ([1, *evaluate.encode(tokenizer, a)], evaluate.encode(tokenizer, b)) for a, b in texts
    ]
    losses = evaluate.continuation_losses(model, pairs, batch_size=2)
    for (context, continuation), loss in zip(pairs, losses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0]
        log_probabilities = logits.log_softmax(-1)
        expected = -sum(
            log_probabilities[len(context) - 1 + i, token].item()
            for i, token in enumerate(continuation)
        )
        assert loss == pytest.approx(expected, abs=1e-3)


def test_greedy_replies_do_not_depend_on_the_batch(model, tokenizer):
    items = [
        {"conversations": [{"role": "user", "content": text}]}
        for text in ("你是谁", "请问3加5等于多少？", "背一首诗", "谢谢")
    ]
    settings = evaluate.Settings(max_new_tokens=12, batch_size=4)
    together = evaluate.greedy_replies(model, tokenizer, items, settings)
    settings.batch_size = 1
    assert together == evaluate.greedy_replies(model, tokenizer, items, settings)


def test_whole_run(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    chat = {"conversations": [{"role": "user", "content": "你是谁"}], "accept": ["缘梦"]}
    items = [
        {"task": "bits_per_byte", "kind": "text", "source": "law", "text": "第一条 为了保护。"},
        {
            "task": "idiom",
            "kind": "choice",
            "question": "成语：",
            "choices": ["甲乙", "丙丁", "戊己", "庚辛"],
            "answer": 1,
        },
        {"task": "identity", "kind": "chat", **chat},
    ]
    data = tmp_path / "eval.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    command = [sys.executable, ROOT / "evaluate.py", "--model", tmp_path / "tiny", "--data", data]
    command += ["--output", tmp_path / "report.md", "--max_new_tokens", "8"]
    outputs = []
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert run.returncode == 0, run.stderr
        outputs.append(
            [(tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "jsonl")]
        )
    report = outputs[0][0]
    assert "| idiom | 1 |" in report and "| 25.0% |" in report
    assert "| bits per byte: law | 1 |" in report and "replies that loop" in report
    assert outputs[0] == outputs[1]

    wrong = subprocess.run(
        [*command, "--tasks", "nonsense"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert wrong.returncode == 1 and "holds bits_per_byte, idiom, identity" in wrong.stderr
    assert "Traceback" not in wrong.stderr


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
