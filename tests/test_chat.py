"""The chat: what it loads, what it feeds the model, what it prints, and how it ends."""
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast, RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

import model_chat
from model import TOKENIZER_DIR, YuanMengConfig, YuanMengModel, preset_config
from model.conversation import encode_conversation, encode_text, fit_conversation
from model.generation import TextStream, generate_tokens, sample
from model import loading
from model.loading import WeightsError, find_weights, load_model, load_tokenizer, load_weights
from model_chat import Chat, Settings

SCRIPT = Path(model_chat.__file__)
TOKENIZER = PreTrainedTokenizerFast.from_pretrained(TOKENIZER_DIR)
BOS, EOS = 1, 2


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def prompt_of(messages: list[dict]) -> list[int]:
    return encode_conversation(TOKENIZER, messages, add_generation_prompt=True)[0]


@pytest.fixture(scope="module")
def tiny() -> YuanMengModel:
    """A model of random weights that never says `</s>` when it is greedy, nor any special token."""
    torch.manual_seed(4)
    model = YuanMengModel(YuanMengConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64,
    )).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        model.tok_embeddings.weight[:3] = 0  # their logit is 0, and the highest is above it
    return model


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def run_chat(*arguments, stdin: str = "", cwd: Path, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        input=stdin.encode(), capture_output=True, cwd=cwd, env={**os.environ, **variables},
    )


def greedy(model: YuanMengModel, prompt_ids: list[int], **settings) -> list[int]:
    return list(generate_tokens(model, prompt_ids, temperature=0, eos_token_id=EOS, **settings))


# ---- Sampling -----------------------------------------------------------------------------------


def test_greedy_equals_transformers(tiny):
    prompt = prompt_of([user("李白是谁")])
    expected = tiny.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=EOS
    )[0, len(prompt):].tolist()
    assert greedy(tiny, prompt, max_new_tokens=30) == expected
    assert len(expected) == 30


def test_repetition_penalty_equals_transformers_on_generated_tokens(tiny):
    prompt = prompt_of([user("你好")])
    plain = greedy(tiny, prompt, max_new_tokens=40)
    penalized = greedy(tiny, prompt, max_new_tokens=40, repetition_penalty=1.4)
    processor = RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=len(prompt))
    expected = tiny.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=EOS,
        logits_processor=[processor],
    )[0, len(prompt):].tolist()
    assert penalized == expected
    assert len(set(penalized)) > len(set(plain))


def test_stops_before_eos(tiny):
    prompt = [BOS, 100, 200]
    answer = greedy(tiny, prompt, max_new_tokens=20)
    stop = answer[7]
    shortened = list(generate_tokens(tiny, prompt, max_new_tokens=20, temperature=0,
                                     eos_token_id=stop))
    assert shortened == answer[: answer.index(stop)]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.5, 0.9)])
def test_samples_follow_the_distribution(temperature, top_p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    scores = TopPLogitsWarper(top_p)(None, logits[None] / temperature)[0]
    expected = torch.softmax(scores, -1)
    generator = torch.Generator().manual_seed(2)
    draws = torch.cat([sample(logits, temperature, top_p, generator) for _ in range(5000)])
    found = torch.bincount(draws, minlength=40) / 5000
    assert (found[expected == 0] == 0).all()  # nothing from outside the nucleus
    assert (found - expected).abs().sum() / 2 < 0.04
    assert (expected == 0).any() == (top_p < 1)


def test_tiny_top_p_and_temperature_are_greedy():
    logits = torch.randn(500)
    for temperature, top_p in [(1, 1e-9), (0, 1), (1e-30, 1)]:
        assert sample(logits, temperature, top_p).item() == logits.argmax()


def test_same_generator_same_text(tiny):
    texts = [
        list(generate_tokens(tiny, [BOS, 50], max_new_tokens=20, temperature=1.0, top_p=0.9,
                             generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_inference_mode_does_not_leak_to_the_caller(tiny):
    for _ in generate_tokens(tiny, [BOS], max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "prompt is empty"),
        ([BOS], {"temperature": -1}, "temperature must be"),
        ([BOS], {"temperature": float("nan")}, "temperature must be"),
        ([BOS], {"top_p": 0}, "top_p must be"),
        ([BOS], {"top_p": 1.1}, "top_p must be"),
        ([BOS], {"repetition_penalty": 0}, "repetition_penalty must be"),
        ([BOS], {"max_new_tokens": 0}, "max_new_tokens must be"),
        ([BOS] * 2000, {"max_new_tokens": 49}, "do not fit into the model's 2048 positions"),
    ],
)
def test_settings_out_of_range(tiny, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        generate_tokens(tiny, prompt, **settings)


# ---- Streaming text -----------------------------------------------------------------------------


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_stream_of_any_tokens_equals_decode(ids):
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token_id) for token_id in ids] + [stream.finish()]
    for piece in pieces:
        piece.encode()  # a lone surrogate would raise
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_stream_of_real_text_shows_whole_characters_only(text):
    stream, shown = TextStream(TOKENIZER), ""
    for token_id in encode_text(TOKENIZER, text):
        shown += stream.push(token_id)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


def test_stream_holds_back_half_a_character():
    ids = encode_text(TOKENIZER, "🀄")  # rare: several tokens for one character
    assert len(ids) > 1
    stream = TextStream(TOKENIZER)
    assert [stream.push(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["🀄"]
    cut = TextStream(TOKENIZER)
    assert cut.push(ids[0]) == ""
    assert cut.finish() == "\ufffd"


# ---- Conversations ------------------------------------------------------------------------------

def test_oldest_turns_are_trimmed_in_pairs():
    system = {"role": "system", "content": "你是缘梦。"}
    turns = [message for i in range(6) for message in (user(f"问题{i}"), assistant(f"回答{i}"))]
    messages = [system, *turns, user("最后的问题")]
    lengths = []
    for limit in range(30, len(prompt_of(messages)) + 1):
        ids, kept = fit_conversation(TOKENIZER, messages, limit)
        assert len(ids) <= limit
        assert ids == prompt_of(kept)
        assert kept[0] == system and kept[-1] == messages[-1]
        assert kept[1:] == messages[len(messages) - len(kept) + 1:]  # the latest, in order
        assert kept[1]["role"] == "user"
        if len(kept) < len(messages):  # one more turn would not have fitted
            longer = [system, *messages[-(len(kept) + 1):]]
            assert len(prompt_of(longer)) > limit
        lengths.append(len(kept))
    assert set(lengths) == {2, 4, 6, 8, 10, 12, 14}


def test_overlong_message_loses_its_beginning():
    text = "开头" + "很长的话" * 3000 + "结尾🀄"
    ids, (kept,) = fit_conversation(TOKENIZER, [user("旧"), assistant("旧"), user(text)], 60)
    assert 55 <= len(ids) <= 60
    assert text.endswith(kept["content"]) and kept["content"].endswith("结尾🀄")
    with pytest.raises(ValueError, match="template alone need"):
        fit_conversation(TOKENIZER, [user(text)], 10)


def test_chat_keeps_the_conversation_and_clears_it(tiny):
    chat = Chat(tiny, TOKENIZER, Settings(temperature=0.0, max_new_tokens=12,
                                          repetition_penalty=1.0))
    shown = []
    for question in ("李白是谁", "那杜甫呢"):
        expected = greedy(tiny, prompt_of([*chat.messages, user(question)]),
                          max_new_tokens=12)
        chat.reply(question, shown.append)
        answer = TOKENIZER.decode(expected).rstrip("\ufffd")
        assert chat.messages[-2:] == [user(question), assistant(answer)]
    assert len(chat.messages) == 4
    assert "".join(shown) == "".join(m["content"] for m in chat.messages[1::2])
    chat.clear()
    assert chat.messages == []


def test_chat_prompt_stays_within_its_limit(tiny, capsys):
    chat = Chat(tiny, TOKENIZER, Settings(max_seq_len=80, max_new_tokens=20, system="你是缘梦。"))
    for number in range(12):
        prompt = chat.prompt_ids(f"第{number}个问题")
        assert len(prompt) <= 80
        chat.messages.append(assistant("一个不长也不短的回答。"))
        assert chat.messages[0]["role"] == "system"
    assert capsys.readouterr().err == ""
    assert len(chat.prompt_ids("长" * 500)) <= 80
    assert "its beginning was left out" in capsys.readouterr().err


def test_pretrained_mode_continues_the_raw_text(tiny, capsys):
    chat = Chat(tiny, TOKENIZER, Settings(mode=0, max_seq_len=20))
    ids = encode_text(TOKENIZER, "李白是</s>")
    assert chat.prompt_ids("李白是</s>") == [BOS, *ids]
    chat.reply("李白是", lambda piece: None)
    assert chat.messages == []
    long = encode_text(TOKENIZER, "长诗" * 100)
    assert chat.prompt_ids("长诗" * 100) == [BOS, *long[-19:]]
    assert f"only the last 19 of {len(long)} tokens fit" in capsys.readouterr().err


def test_interrupted_answer_is_kept_as_shown(tiny):
    chat = Chat(tiny, TOKENIZER, Settings(temperature=0.0, max_new_tokens=30))
    shown = ""

    def show(piece: str) -> None:
        nonlocal shown
        shown += piece
        if len(shown) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.reply("说点什么", show)
    assert chat.messages == [user("说点什么"), assistant(shown)]


def test_wordless_answer_is_forgotten(tiny, monkeypatch):
    monkeypatch.setattr(model_chat, "generate_tokens", lambda *_, **__: iter(()))
    chat = Chat(tiny, TOKENIZER, Settings())
    chat.reply("在吗", lambda piece: None)
    assert chat.messages == []


def test_impossible_settings(tiny):
    for settings, message in [
        (Settings(max_new_tokens=2048), "leave no room for a prompt"),
        (Settings(max_seq_len=12), "raise --max_seq_len"),
        (Settings(system="话" * 400), "shorten --system"),
        (Settings(top_p=3.0), "top_p must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            Chat(tiny, TOKENIZER, settings)


# ---- Weights ------------------------------------------------------------------------------------


def trained(model: YuanMengModel) -> dict[str, torch.Tensor]:
    """What the trainers save: the head, tied to the embedding, is left out."""
    return {k: v.clone() for k, v in model.state_dict().items() if k != "output.weight"}


def test_pth_round_trip_with_preset(tmp_path):
    torch.manual_seed(0)
    model = YuanMengModel(preset_config("mini")).eval()
    torch.save({k: v.bfloat16() for k, v in trained(model).items()}, tmp_path / "sft_256.pth")
    loaded, name = load_model(tmp_path / "sft_256.pth")
    assert name == "sft_256"
    assert loaded.config.to_dict() == model.config.to_dict()
    assert loaded.dtype == torch.float32 and not loaded.training
    assert loaded.output.weight.data_ptr() == loaded.tok_embeddings.weight.data_ptr()
    x = torch.arange(3, 40)[None]
    torch.testing.assert_close(loaded(x).logits, model.bfloat16().float()(x).logits)


def test_pth_of_another_shape(tiny, tmp_path):
    torch.save(trained(tiny), tmp_path / "my.pth")
    loaded, _ = load_model(tmp_path / "my.pth", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.num_attention_heads == 2 and loaded.config.num_hidden_layers == 2
    torch.testing.assert_close(loaded.float()(torch.tensor([[5, 6]])).logits,
                               tiny(torch.tensor([[5, 6]])).logits, rtol=0.1, atol=0.3)


def test_folder_round_trip(tiny, tiny_folder):
    loaded, name = load_model(tiny_folder)
    assert name == "tiny"
    x = torch.arange(3, 40)[None]
    assert torch.equal(loaded(x).logits, tiny(x).logits)
    assert load_tokenizer(tiny_folder, "nowhere").get_vocab() == TOKENIZER.get_vocab()


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="python train_tokenizer.py"):
        load_tokenizer(tmp_path, tmp_path)


def break_weights(model: YuanMengModel, how: str, path: Path) -> None:
    state = trained(model)
    if how == "foreign":
        state = {"model.embed_tokens.weight": torch.zeros(5, 4)}
    elif how == "resume":
        state = {"model": state, "step": 7}
    elif how == "list":
        state = [1, 2]
    elif how == "code":
        state = subprocess.Popen  # a pickle that names code
    elif how == "lacking":
        del state["layers.1.ffn_norm.weight"]
    elif how == "surplus":
        state["layers.1.lora"] = torch.zeros(2)
    elif how == "shape":
        state["layers.1.feed_forward.w2.weight"] = torch.zeros(3, 3)
    elif how == "nan":
        state["norm.weight"][3] = float("nan")
    elif how == "untied":
        state["output.weight"] = torch.zeros_like(state["tok_embeddings.weight"])
    torch.save(state, path)
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "truncated or not a weights file"),
        ("empty", "truncated or not a weights file"),
        ("text", "truncated or not a weights file"),
        ("code", "truncated or not a weights file"),
        ("list", "holds a list"),
        ("resume", "entry 'model' is not a tensor"),
        ("foreign", "not a YuanMeng model: it has no matrix tok_embeddings.weight"),
        ("lacking", "lacks 1 tensors of the model, first layers.1.ffn_norm.weight"),
        ("surplus", "1 unknown tensors, first layers.1.lora"),
        ("shape", r"layers.1.feed_forward.w2.weight has shape \[3, 3\]"),
        ("nan", "norm.weight holds NaN"),
        ("untied", "output.weight differs"),
    ],
)
def test_broken_pth(tiny, tmp_path, how, message):
    path = tmp_path / "sft_32.pth"
    break_weights(tiny, how, path)
    with pytest.raises(WeightsError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value) and "sft_32.pth" in str(error.value)


def test_broken_folders(tiny, tmp_path):
    def message(folder: Path) -> str:
        with pytest.raises(WeightsError) as error:
            load_model(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    folder = tmp_path / "model"
    folder.mkdir()
    assert "has no config.json" in message(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "type 'llama', not 'yuanmeng'" in message(folder)
    (folder / "config.json").write_text("{")
    assert "not readable JSON" in message(folder)
    tiny.config.save_pretrained(folder)
    assert "no .safetensors" in message(folder)
    tiny.save_pretrained(folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    assert "model.safetensors is truncated" in message(folder)


def test_missing_pth(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none.pth")


def test_which_weights_are_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "default_preset", lambda: "mini")
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(loading, "MINI_DIR", shipped)
    with pytest.raises(FileNotFoundError, match="sft_256.pth; `python train_sft.py"):
        find_weights("sft")
    with pytest.raises(FileNotFoundError, match="pretrain_256.pth; `python train_pretrain.py"):
        find_weights("pretrain")
    with pytest.raises(FileNotFoundError, match="sft_512.pth; `python train_sft.py --preset 26m`"):
        find_weights("sft", preset="26m")
    with pytest.raises(ValueError, match="unknown preset 'big'"):
        find_weights("sft", preset="big")
    for name in ("pretrain", "sft"):
        with pytest.raises(FileNotFoundError, match=f"`python train_{name}.py`"):
            find_weights("sft", f"out/{name}_512.pth")

    shipped.mkdir()
    assert find_weights("sft") == shipped
    with pytest.raises(FileNotFoundError):
        find_weights("pretrain")  # the shipped model is fine-tuned

    out = tmp_path / "out"
    out.mkdir()
    for age, name in enumerate(["sft_512", "sft_128", "pretrain_256", "sft_64"]):
        (out / f"{name}.pth").touch()
        os.utime(out / f"{name}.pth", (1000 - age, 1000 - age))
    assert find_weights("sft") == Path("out/sft_512.pth")  # the newest of them
    assert find_weights("pretrain") == Path("out/pretrain_256.pth")
    (out / "sft_256.pth").touch()
    os.utime(out / "sft_256.pth", (1, 1))
    assert find_weights("sft") == Path("out/sft_256.pth")  # the default preset's comes first
    assert find_weights("sft", preset="26m") == Path("out/sft_512.pth")
    assert find_weights("sft", "shipped") == Path("shipped")


# ---- The program --------------------------------------------------------------------------------


def test_pipe(tiny, tiny_folder, tmp_path):
    """A whole conversation, byte for byte; under a locale that knows no Chinese at that."""
    run = run_chat(
        "--model", tiny_folder, "--temperature", 0, "--repetition_penalty", 1, "--dtype", "float32",
        "--max_new_tokens", 16, "--stats",
        stdin="你是谁\n\n那杜甫呢\n/clear\n/help\n你是谁\n/exit\n不会被回答\n",
        cwd=tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
    )
    history, transcript = [], ""
    for question in ("你是谁", "那杜甫呢", None, "你是谁"):
        if question is None:
            history = []
            continue
        ids = greedy(tiny, prompt_of([*history, user(question)]),
                     max_new_tokens=16)
        answer = TOKENIZER.decode(ids).rstrip("\ufffd")
        history += [user(question), assistant(answer)]
        transcript += f"🤔: {question}\n🤖: {answer}\n"
    assert run.stdout.decode() == transcript, run.stderr.decode()
    assert run.returncode == 0
    status = run.stderr.decode()
    assert "[tiny: " in status and "forgotten" in status and "/exit leaves" in status
    assert len(re.findall(r"the next 15 at [\d.]+ tokens/s", status)) == 3


def test_missing_weights_are_one_line(tmp_path):
    run = run_chat("--mode", 0, "--preset", "mini", stdin="你好\n", cwd=tmp_path)
    assert (run.returncode, run.stdout.decode(), run.stderr.decode()) == (1, "", (
        "model_chat.py: there is no out/pretrain_256.pth; "
        "`python train_pretrain.py --preset mini` makes it\n"
    ))


def read_until(terminal: int, mark: str) -> str:
    """What the program writes to the terminal, up to `mark`."""
    seen = b""
    while mark.encode() not in seen:
        # Only a guard against waiting forever.
        assert select.select([terminal], [], [], 120)[0], f"no {mark!r} after {seen.decode()!r}"
        seen += os.read(terminal, 1)
    return seen.decode(errors="replace")  # it may begin inside a character


def interrupt_until_it_ends(process: int, terminal: int) -> int:
    """Press Ctrl-C, again if need be, and return the exit status.

    Readline loses a Ctrl-C that comes after it has shown its prompt and before it waits for a key.
    """
    for _ in range(6):
        os.write(terminal, b"\x03")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.05)
    raise AssertionError("the program does not end at Ctrl-C")


def test_interrupt_returns_to_the_prompt(tiny, tiny_folder, tmp_path):
    process, terminal = pty.fork()  # a child with a terminal of its own, where Ctrl-C means SIGINT
    if process == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [
            sys.executable, str(SCRIPT), "--model", str(tiny_folder), "--temperature", "0",
            "--max_new_tokens", "1900", "--max_seq_len", "100", "--stats", "--eager",
        ])
    try:
        read_until(terminal, "🤔: ")
        os.write(terminal, "讲个故事\n".encode())
        read_until(terminal, "🤖: ")
        os.write(terminal, b"\x03")
        answer = read_until(terminal, "🤔: ")
        assert "[interrupted]" in answer
        assert "Traceback" not in answer
        status = interrupt_until_it_ends(process, terminal)  # and at the prompt it leaves
        process = 0
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        os.close(terminal)
