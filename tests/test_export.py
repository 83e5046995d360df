"""The exported model is the trained one: the same logits and the same tokens in every format.

The judges are transformers' own Llama, its own reader of GGUF, and llama.cpp.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import convert_to_transformers
from model import MINI_DIR, YuanMengConfig, YuanMengModel
from model.export import gguf_merges, gguf_template
from model.loading import load_model, load_tokenizer
from training.files import move_files

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    "你好，世界！", "李白是谁？他写过《静夜思》。", "def f(x):\n    return x * 2\n",
    "if a:\n        b = 1  # two spaces\n\tc\n\n\nd", "36+47=83, 2025 年", "Hello there, 世界 mixed",
    "饕餮龘", "ひらがな カタカナ", "naïve café — “quotes”…", " leading", "trailing  ", "\r\n", "🤔🤖",
    "</s> typed by a user",
]
CHAT = [
    {"role": "user", "content": "李白是谁？"},
    {"role": "assistant", "content": "李白是唐代诗人。"},
    {"role": "user", "content": "那杜甫呢？"},
]


def convert(monkeypatch, *arguments) -> None:
    """Run convert_to_transformers.py in this process."""
    monkeypatch.setattr(sys, "argv", ["convert_to_transformers.py", *map(str, arguments)])
    convert_to_transformers.main()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """The shipped model in all three formats, in float32."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("yuanmeng", "llama", "gguf"):
            convert(monkeypatch, "--model", MINI_DIR, "--format", name, "--dtype", "float32",
                    "--output_dir", folder / name)
    return {name: folder / name for name in ("yuanmeng", "llama", "gguf")}


@pytest.fixture(scope="module")
def original() -> YuanMengModel:
    return load_model(MINI_DIR)[0]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINI_DIR, MINI_DIR)


@pytest.fixture(scope="module")
def ids(tokenizer) -> torch.Tensor:
    """A conversation's tokens and a longer text's, [1, T]."""
    text = tokenizer.apply_chat_template(CHAT, tokenize=False) + "床前明月光，疑是地上霜。" * 20
    return torch.tensor([tokenizer.encode(text)])


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(ids).logits


def greedy(model, ids: torch.Tensor) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32
        )
    return output[0, ids.shape[1] :].tolist()


# ---- yuanmeng ------------------------------------------------------------------------------------

def test_another_folder_loads_it_with_the_code_that_it_carries(exported, original, ids, tmp_path):
    """A process that cannot import this repository gets the same logits, to the bit."""
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import importlib.util, torch\n"
        "assert importlib.util.find_spec('model') is None\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(exported['yuanmeng'])!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "assert model.__module__ == type(model).__module__ != 'model.model'\n"
        "ids = torch.load('ids.pt', weights_only=True)\n"
        "with torch.inference_mode():\n"
        "    logits = model(ids).logits\n"
        f"text = tokenizer.apply_chat_template({CHAT!r}, add_generation_prompt=True)\n"
        "text = torch.tensor(text['input_ids'] if hasattr(text, 'keys') else text)\n"
        "save_file({'logits': logits, 'chat': text}, 'result.safetensors')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = load_file(tmp_path / "result.safetensors")
    assert torch.equal(result["logits"], logits_of(original, ids))
    here = AutoTokenizer.from_pretrained(MINI_DIR)
    expected = here.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    assert result["chat"].tolist() == expected["input_ids"]


def test_here_it_loads_as_our_own_class(exported, original, ids):
    """With the repository imported, its class is used, whatever the folder carries."""
    model = AutoModelForCausalLM.from_pretrained(exported["yuanmeng"], trust_remote_code=True)
    assert type(model) is YuanMengModel and type(model.config) is YuanMengConfig
    assert torch.equal(logits_of(model, ids), logits_of(original, ids))
    again, name = load_model(exported["yuanmeng"])  # as model_chat.py --model does
    assert name == "yuanmeng" and torch.equal(logits_of(again, ids), logits_of(original, ids))


# ---- llama ---------------------------------------------------------------------------------------

def test_transformers_llama_gives_the_same_logits_and_tokens(exported, original, ids):
    model = AutoModelForCausalLM.from_pretrained(exported["llama"])
    assert type(model) is LlamaForCausalLM
    torch.testing.assert_close(logits_of(model, ids), logits_of(original, ids), atol=1e-4, rtol=0)
    assert greedy(model, ids) == greedy(original, ids)
    assert model.generation_config.temperature == 0.75
    assert not list(exported["llama"].glob("*.py"))


def test_a_program_that_knows_only_the_old_field_names_finds_them(exported, original):
    config = json.loads((exported["llama"] / "config.json").read_text("utf-8"))
    assert config["rope_theta"] == original.config.rope_theta
    assert config["torch_dtype"] == "float32"


@pytest.mark.parametrize("name", ["yuanmeng", "llama"])
def test_the_tokenizer_travels_with_it(exported, tokenizer, name):
    loaded = AutoTokenizer.from_pretrained(exported[name])
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(
        CHAT, tokenize=False)
    assert loaded.eos_token_id == 2 and loaded.pad_token_id == 0


# ---- gguf ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def fields(exported) -> dict:
    (path,) = exported["gguf"].iterdir()
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_transformers_reads_the_same_model_from_gguf(exported, original, ids):
    """transformers undoes llama.cpp's order of rows by itself: a second opinion on ours."""
    (path,) = exported["gguf"].iterdir()
    assert path.name == "yuanmeng-mini-instruct.gguf"
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(path)["config"]))
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unknown = model.load_state_dict(tensors, strict=False, assign=True)
    assert missing == ["lm_head.weight"] and not unknown
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)  # its table was on meta, too
    torch.testing.assert_close(logits_of(model, ids), logits_of(original, ids), atol=1e-4, rtol=0)


def test_gguf_holds_the_template_and_the_special_tokens(fields, tokenizer):
    template = fields["tokenizer.chat_template"]  # test_conversation.py tells what it writes
    assert template == gguf_template(tokenizer.chat_template)
    assert "generation %}" not in template and "<tool_call>" in template
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [
        1, 2, 0]
    kinds = fields["tokenizer.ggml.token_type"]
    assert [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == [0, 1, 2]
    assert fields["tokenizer.ggml.add_bos_token"] is False


def tokenizer_of(fields: dict) -> Tokenizer:
    """What llama.cpp does with the entries and merges in the file, done by `tokenizers`: nothing
    is cut but runs of digits."""
    vocabulary = {entry: i for i, entry in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(line.split(" ")) for line in fields["tokenizer.ggml.merges"]]
    rebuilt = Tokenizer(models.BPE(vocabulary, merges))
    rebuilt.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    return rebuilt


def test_merges_alone_cut_text_as_our_pattern_does(fields, tokenizer):
    rebuilt = tokenizer_of(fields)
    sources = [path.read_text("utf-8") for path in sorted(ROOT.glob("*.py"))]
    documents = [path.read_text("utf-8") for path in sorted(ROOT.glob("docs/**/*.md"))]
    lines = [line for text in sources + documents for line in text.splitlines(keepends=True)]
    for text in [*TEXTS, *lines]:
        ours = tokenizer.encode(text, split_special_tokens=True)
        if "     " not in text:  # a run of spaces may leave one over, which joins the next word
            assert rebuilt.encode(text).ids == ours, text


def test_the_order_of_merges_changes_only_runs_of_spaces(tokenizer):
    before = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    after = gguf_merges(tokenizer)
    assert sorted(map(tuple, before)) == sorted(after)
    words = [pair for pair in after if "".join(pair).strip("Ġ")]
    assert words == [tuple(pair) for pair in before if "".join(pair).strip("Ġ")]


def test_gguf_in_bfloat16_holds_the_weights_exactly(monkeypatch, original, tmp_path):
    convert(monkeypatch, "--model", MINI_DIR, "--format", "gguf", "--output_dir", tmp_path)
    (path,) = tmp_path.glob("*.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert path.stat().st_size < 10_000_000
    embedding = tensors["token_embd.weight"]
    assert embedding.tensor_type == gguf.GGMLQuantizationType.BF16
    for name, ours in (
        ("token_embd", "tok_embeddings"), ("blk.3.ffn_down", "layers.3.feed_forward.w2"),
        ("blk.0.attn_v", "layers.0.attention.wv"), ("output_norm", "norm"),
    ):
        tensor = tensors[f"{name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, original.state_dict()[f"{ours}.weight"].numpy())


# ---- Files ---------------------------------------------------------------------------------------

def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(SystemExit) as stop:
        convert(monkeypatch, "--model", MINI_DIR, "--output_dir", tmp_path / "taken")
    assert str(stop.value).startswith("convert_to_transformers.py: cannot write ")
    assert (tmp_path / "taken").read_text() == "a file where a folder should be"
    assert not list(tmp_path.glob(".converting.*"))


def test_moving_files_keeps_the_neighbours_and_replaces_its_own(tmp_path):
    source, target = tmp_path / "new", tmp_path / "old"
    for folder, text in ((source, "new"), (target, "old")):
        folder.mkdir()
        (folder / "model").write_text(text)
    (target / "mine").write_text("mine")
    assert move_files(source, target) == [target / "model"]
    assert (target / "model").read_text() == "new" and (target / "mine").read_text() == "mine"
    assert not list(source.iterdir())
