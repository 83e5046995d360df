"""The small trained model in the repository: whole, small, and worth talking to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.tasks import loops
from model import MINI_DIR, TOKENIZER_DIR, YuanMengModel, preset_config
from model.scoring import greedy_replies

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForCausalLM.from_pretrained(MINI_DIR).eval(), AutoTokenizer.from_pretrained(
        MINI_DIR
    )


def ask(shipped, *turns: str) -> str:
    """The greedy reply to the last of `turns` (user, assistant, user, …)."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    ((reply, ended),) = greedy_replies(*shipped, [messages], max_new_tokens=96, batch_size=1)
    assert not loops(reply, ended), reply
    return reply


def test_it_is_the_mini_preset_in_at_most_ten_megabytes(shipped):
    model, tokenizer = shipped
    assert isinstance(model, YuanMengModel)
    expected = preset_config("mini")
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
        assert getattr(model.config, name) == getattr(expected, name)
    assert sum(file.stat().st_size for file in MINI_DIR.glob("*.safetensors")) <= 10_000_000
    assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}
    assert json.loads((MINI_DIR / "tokenizer.json").read_text("utf-8")) == json.loads(
        (TOKENIZER_DIR / "tokenizer.json").read_text("utf-8")
    )


@pytest.mark.parametrize(
    "question", ["你是谁", "你叫什么名字？", "介绍一下你自己", "你是ChatGPT吗？"]
)
def test_it_knows_its_name(shipped, question):
    assert "缘梦" in ask(shipped, question)


def test_it_adds_and_follows_up(shipped):
    assert ask(shipped, "3+5等于多少？").rstrip("。").endswith("8")
    assert "唐代" in ask(shipped, "李白是谁？")
    assert "杜甫" in ask(shipped, "李白是谁？", "李白是唐代诗人。", "那杜甫呢？")


def test_the_chat_uses_it_while_there_is_nothing_else(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "model_chat.py", "--temperature", "0"],
        input="你是谁\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.returncode == 0 and "shipped model" in run.stderr
    assert run.stdout.startswith("🤔: 你是谁\n🤖: ") and "缘梦" in run.stdout
