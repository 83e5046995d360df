"""The tokenizer: what ids text gets, that nothing is lost, and that training it is safe.

The references are independent of our code: Python's own str.encode for round trips, the template
written out by hand, and LMDeploy's own ChatTemplateConfig for chat_templates.json.
"""
import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lmdeploy.model import ChatTemplateConfig
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

import train_tokenizer
from dataset.catalog import find_data
from dataset.files import data_files
from dataset.sampling import MAX_LINE_BYTES, Reservoir
from dataset.sampling import sample_texts as sample_of_files
from model.bpe import TextEncoder, tiktoken_of
from training.tokenizer_report import broken_characters, find_faults, template_faults, text_kind

ROOT = Path(__file__).parent.parent
DEFAULT_LINE = "<s>system\n你是缘梦，一个人工智能助手。</s>\n"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "model" / "yuanmeng_tokenizer")


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def sample_texts(paths: list, *arguments, **options):
    with data_files(paths, Path("unused")) as files:
        return sample_of_files(files, *arguments, **options)


def write_jsonl(path: Path, records: list) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


# --- The shipped tokenizer -----------------------------------------------------------------------


def test_size_special_ids_and_settings(tokenizer):
    assert len(tokenizer) == 6400
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert tokenizer.unk_token_id == tokenizer.pad_token_id == 0
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.model_max_length == 2048
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer("你好")["input_ids"] == encode(tokenizer, "你好")  # no automatic BOS or EOS


def test_every_byte_has_a_token(tokenizer):
    seen = set()
    for code in (*range(0x80), *range(0x80, 0xD800, 61),
                 *range(0xE000, 0x10000, 61), *range(0x10000, 0x110000, 4093)):
        text = chr(code)
        ids = encode(tokenizer, text)
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
        seen.update(text.encode())
    # All bytes that UTF-8 uses: 0xC0, 0xC1 and 0xF5 to 0xFF never occur in it.
    assert seen == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


@given(ANY_TEXT)
@example("  两个空格 \t\r\n\n\u3000\ufeff\x00 </s><s><unk>")
@example("𠮷野家 👩‍👩‍👧 e\u0301 \U0010ffff")
@settings(deadline=None)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


@given(ANY_TEXT, ANY_TEXT)
@example("user", "    缩进")
@example("a  ", "\n\n b")
@settings(deadline=None)
def test_lines_are_independent(tokenizer, first, second):
    newline = encode(tokenizer, "\n")
    assert len(newline) == 1
    assert (encode(tokenizer, first + "\n" + second)
            == encode(tokenizer, first) + newline + encode(tokenizer, second))


def test_digits_are_single(tokenizer):
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "1949年10月")) == [
        *"1949", *tokenizer.tokenize("年"), *"10", *tokenizer.tokenize("月")]
    for token in tokenizer.get_vocab():
        assert sum(char.isdigit() and char.isascii() for char in token) <= 1, token


@pytest.mark.parametrize("width", [2, 4, 8, 12, 16])
def test_an_indentation_is_one_token(tokenizer, width):
    line = "return x"
    assert len(encode(tokenizer, " " * width)) == 1
    assert (encode(tokenizer, " " * width + line)
            == encode(tokenizer, " " * width) + encode(tokenizer, line))


def test_scripts_and_punctuation_stay_apart(tokenizer):
    separate = encode(tokenizer, "用") + encode(tokenizer, "Python") + encode(tokenizer, "写")
    assert encode(tokenizer, "用Python写") == separate
    comma = encode(tokenizer, "，")
    assert len(comma) == 1
    assert encode(tokenizer, "你好，世界") == (
        encode(tokenizer, "你好") + comma + encode(tokenizer, "世界"))


@pytest.mark.parametrize("special", ["<unk>", "<s>", "</s>"])
def test_special_tokens_in_data_stay_text(tokenizer, special):
    ids = encode(tokenizer, f"前{special}后")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == f"前{special}后"
    assert tokenizer.convert_tokens_to_ids(special) in tokenizer.encode(special)  # in a template


def test_shipped_tokenizer_has_no_fault(tokenizer):
    assert find_faults(tokenizer, train_tokenizer.DEFAULT_SYSTEM) == []


def test_faults_are_found():
    faulty = AutoTokenizer.from_pretrained(
        ROOT / "model" / "yuanmeng_tokenizer",
        pad_token="</s>", chat_template="{{ messages[0]['content'] }}")
    padding, *template = find_faults(faulty, train_tokenizer.DEFAULT_SYSTEM)
    assert padding == "pad, bos, eos are (2, 1, 2), not (0, 1, 2)"
    assert len(template) == 5 and all("chat template" in fault for fault in template)


@pytest.mark.parametrize("old, new, fault", [
    ("'</s>' -}}\n        {%- endgeneration", "'' -}}\n        {%- endgeneration", "gives for tools"),
    ("{%- endgeneration -%}\n        {{- '\\n' -}}", "{{- '\\n' -}}{%- endgeneration -%}",
     "marks as said by the assistant"),
    ("'<think>\\n' -}}", "'<think>' -}}", "gives for thoughts"),
    ("'<think>\\n\\n</think>", "'<think>\\n</think>", "gives without thoughts"),
    ("{%- endfor -%}\n\n{#- enable", "\n\n{#- enable", "fails: Unexpected end of template"),
    ("| tojson", "| tojson(indent=1)", "gives for tools"),
])
def test_faults_of_the_template_are_found(tokenizer, old, new, fault):
    assert old in tokenizer.chat_template
    broken = AutoTokenizer.from_pretrained(
        ROOT / "model" / "yuanmeng_tokenizer",
        chat_template=tokenizer.chat_template.replace(old, new))
    assert any(fault in found
               for found in template_faults(broken, train_tokenizer.DEFAULT_SYSTEM))


def test_a_lost_byte_is_found():
    faulty = AutoTokenizer.from_pretrained(ROOT / "model" / "yuanmeng_tokenizer")
    faulty.backend_tokenizer.normalizer = normalizers.NFC()  # composes e + U+0301 into one
    assert broken_characters(faulty, plane=0)


# --- The same ids by tiktoken ---------------------------------------------------------------------


@pytest.mark.parametrize("context", ["{0}", "a{0}b  {0} 好{0}。{0}1"])
def test_tiktoken_cuts_every_character_as_tokenizers_does(tokenizer, context):
    """Two libraries for regular expressions, with two tables of Unicode: one result."""
    fast, slow = tiktoken_of(tokenizer.backend_tokenizer), tokenizer.backend_tokenizer
    slow.encode_special_tokens = True
    for plane in (0, 1, 2, 3, 14, 15):  # the others have no assigned character
        texts = ["".join(context.format(chr(code)) + "\n" for code in range(start, start + 64)
                         if not 0xD800 <= code <= 0xDFFF)
                 for start in range(plane << 16, plane + 1 << 16, 64)]
        expected = slow.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, expected):
            assert fast.encode_ordinary(text) == encoding.ids, text


@given(st.text(st.sampled_from("用 Python写</s><unk>12\n\t  。，你好世界é\u0301\u200d👩🀄𠮷"), max_size=300))
@settings(deadline=None)
def test_tiktoken_gives_the_same_ids(tokenizer, text):
    (ids,) = TextEncoder(tokenizer.backend_tokenizer)([text])
    assert ids == encode(tokenizer, text)


def test_a_tokenizer_that_tiktoken_might_read_otherwise_stays_with_tokenizers(tokenizer):
    def changed(change) -> Tokenizer:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        change(description)
        return Tokenizer.from_str(json.dumps(description))

    def swap_merges(description):  # the order of two merges: other ids for some texts
        merges = description["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    def other_pattern(description):
        description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += r"|\d+"

    def normalise(description):
        description["normalizer"] = {"type": "NFC"}

    def unreachable(description):  # a token that no merge makes any more
        description["model"]["merges"].pop(2000)
    assert tiktoken_of(tokenizer.backend_tokenizer) is not None
    for change in (swap_merges, other_pattern, normalise, unreachable):
        backend = changed(change)
        assert tiktoken_of(backend) is None, change
        text = "你好，世界 </s> 12"
        (ids,) = TextEncoder(backend)([text])
        backend.encode_special_tokens = True
        assert ids == backend.encode(text, add_special_tokens=False).ids


# --- The chat template ---------------------------------------------------------------------------

QUESTION = {"role": "user", "content": "你是谁？"}
ANSWER = {"role": "assistant", "content": "我是缘梦。\n  很高兴认识你！"}
FOLLOW_UP = {"role": "user", "content": "\n 1+1=?  "}
SYSTEM = {"role": "system", "content": "用一个词回答。"}
CHATS = [
    [QUESTION],
    [SYSTEM, QUESTION],
    [QUESTION, ANSWER, FOLLOW_UP],
    [SYSTEM, QUESTION, ANSWER, FOLLOW_UP],
    [QUESTION, ANSWER, FOLLOW_UP, ANSWER, QUESTION],
]


def test_template_text(tokenizer):
    def text(messages, prompt=False):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt)

    first = "<s>user\n你是谁？</s>\n"
    assert text([QUESTION], prompt=True) == DEFAULT_LINE + first + "<s>assistant\n"
    assert text([QUESTION, ANSWER, FOLLOW_UP]) == (
        DEFAULT_LINE + first + "<s>assistant\n我是缘梦。\n  很高兴认识你！</s>\n"
        "<s>user\n\n 1+1=?  </s>\n")
    assert text([SYSTEM, QUESTION]) == "<s>system\n用一个词回答。</s>\n" + first


def test_template_names_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="unknown role: robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": ""}], tokenize=False)


@pytest.mark.parametrize("messages", CHATS)
def test_lmdeploy_template_gives_the_same_ids(tokenizer, messages):
    config = ChatTemplateConfig.from_json(str(ROOT / "chat_templates.json"))
    template = config.chat_template()
    prompt = template.messages2prompt(messages, sequence_start=True)
    own = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(prompt, add_special_tokens=False) == own
    assert template.stop_words == [tokenizer.eos_token]


def test_lmdeploy_template_for_a_bare_question(tokenizer):
    template = ChatTemplateConfig.from_json(str(ROOT / "chat_templates.json")).chat_template()
    assert template.messages2prompt("你是谁？", sequence_start=True) == (
        tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True))


# --- Sampling ------------------------------------------------------------------------------------


def test_sample_is_capped_in_bytes_and_in_order(tmp_path):
    records = [{"text": f"{index:05d} " + "字" * (index % 50)} for index in range(5000)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    sample = sample_texts([path], 40_000, heldout_bytes=500, seed=3)
    num_bytes = sum(len(json.dumps({"text": text}, ensure_ascii=False).encode()) + 1
                    for text in sample.train)
    longest = max(map(len, path.read_bytes().splitlines())) + 1
    assert 40_000 - longest < num_bytes <= 40_000
    assert sample.train == sorted(sample.train)
    assert 0 < len(sample.heldout) and not set(sample.heldout) & set(sample.train)
    assert (sample.lines_seen, sample.bytes_seen) == (5000, path.stat().st_size)
    assert sample_texts([path], 40_000, heldout_bytes=500, seed=3) == sample
    assert sample_texts([path], 40_000, heldout_bytes=500, seed=4).train != sample.train


def test_sample_takes_everything_that_fits_from_all_files(tmp_path):
    records = [{"text": f"第{index}行"} for index in range(400)]
    paths = [write_jsonl(tmp_path / "a.jsonl", records[:100]),
             write_jsonl(tmp_path / "b.jsonl", records[100:])]
    read = []
    sample = sample_texts(paths, 10**6, progress=read.append)
    assert sorted(sample.train + sample.heldout) == sorted(r["text"] for r in records)
    assert sum(read) == sum(path.stat().st_size for path in paths)


def test_sample_of_every_shape_and_without_marks(tmp_path):
    """Texts and conversations of other projects, in files of other formats."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": "<s>甲</s> <s>乙</s>"}])
    (tmp_path / "b.txt").write_text("丙\n丁", encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps([
        {"instruction": "问", "output": "答"},
        {"conversations": [{"from": "human", "value": "早"}, {"from": "gpt", "value": "早上好"}]},
        {"chosen": [{"role": "user", "content": "戊"}, {"role": "assistant", "content": "己"}],
         "rejected": []}]))
    (tmp_path / "d.csv").write_text("text\n庚\n", encoding="utf-8")
    sample = sample_texts([tmp_path], 10**6)
    assert not sample.broken
    assert sorted(sample.train + sample.heldout) == sorted([
        "甲\n乙", "丙", "丁", "user\n问\nassistant\n答", "user\n早\nassistant\n早上好",
        "user\n戊\nassistant\n己", "庚"])


def test_reservoir_is_uniform_over_place_and_length():
    lines = [b"x" * (1 + index % 40) for index in range(1000)]
    counts = [0] * len(lines)
    rng = random.Random(0)
    rounds = 400
    for _ in range(rounds):
        reservoir = Reservoir(4000)  # about a fifth of all bytes
        for index, line in enumerate(lines):
            reservoir.offer(rng.random(), 0, index, line)
        for _, index, _ in reservoir.lines():
            counts[index] += 1
    share = sum(counts) / rounds / len(lines)
    assert 0.18 < share < 0.20
    # Chi-squared with about 999 degrees of freedom: mean 999, standard deviation 45.
    expected = rounds * share
    chi_squared = sum((count - expected) ** 2 for count in counts) / (expected * (1 - share))
    assert 800 < chi_squared < 1200
    quarters = [sum(counts[start:start + 250]) / sum(counts) for start in range(0, 1000, 250)]
    assert all(abs(quarter - 0.25) < 0.006 for quarter in quarters)
    long_half = sum(count for count, line in zip(counts, lines) if len(line) > 20)
    assert abs(long_half / sum(counts) - 0.5) < 0.01


def test_broken_lines_are_named_and_skipped(tmp_path):
    path = tmp_path / "broken.jsonl"
    chat = {"conversations": [{"role": "user", "content": "问"},
                              {"role": "assistant", "content": "答"}]}
    path.write_bytes(b"\n".join([
        '{"text": "好"}'.encode(), b"{oops", b'{"title": "x"}', b'{"text": "\xff\xfe"}', b"[1]",
        b'{"text": " "}', b'{"conversations": [{"role": "user"}]}', json.dumps(chat).encode(),
        b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}', b'{"text": "last, without newline"}']))
    sample = sample_texts([path], 10**7)
    assert sorted(sample.train + sample.heldout) == [
        "last, without newline", "user\n问\nassistant\n答", "好"]
    assert sorted(int(line.split(":")[1]) for line in sample.broken) == [2, 3, 4, 5, 6, 7, 9]
    assert all(line.startswith(f"{path}:") for line in sample.broken)
    assert (sample.lines_seen, sample.bytes_seen) == (10, path.stat().st_size)


# --- Training ------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(0)
    words = ["春眠不觉晓", "处处闻啼鸟", "夜来风雨声", "return", "value", "    if x:\n", "，", "。"]
    records = [{"text": "".join(rng.choices(words, k=30))} for _ in range(600)]
    return write_jsonl(tmp_path / "corpus.jsonl", records)


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *map(str, arguments)])
    train_tokenizer.main()


def test_the_script_is_deterministic_and_replaces_the_previous_tokenizer(
        tmp_path, corpus, monkeypatch, capsys):
    for name in ("one", "two"):
        run_script(monkeypatch, "--data", corpus, "--vocab_size", 300,
                   "--output_dir", tmp_path / name)
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    trained = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(trained) == 300
    assert len(encode(trained, "春眠不觉晓")) == 1
    assert "No faults" in capsys.readouterr().out

    run_script(monkeypatch, "--data", corpus, "--vocab_size", 280, "--output_dir", tmp_path / "two")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "two")) == 280
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "one", "two"]
    row = next(line for line in capsys.readouterr().out.splitlines() if "zh" in line)
    _, _, previous, new, change = row.strip("│ ").split("│")
    assert float(new) < float(previous)  # fewer entries, fewer bytes per token
    assert change.strip().startswith("-")


@pytest.mark.parametrize("failure", ["fault", "full disk"])
def test_a_failed_run_keeps_the_previous_tokenizer(
        tmp_path, corpus, monkeypatch, tokenizer, failure):
    output = tmp_path / "out" / "tokenizer"
    tokenizer.save_pretrained(output)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    if failure == "fault":  # a template that forgets the newline must be found out
        broken = tmp_path / "broken.jinja"
        broken.write_text(
            train_tokenizer.CHAT_TEMPLATE.read_text("utf-8").replace("</s>\\n", "</s>"), "utf-8")
        monkeypatch.setattr(train_tokenizer, "CHAT_TEMPLATE", broken)
        message = "Not saved"
    else:
        def save(*arguments):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(train_tokenizer.PreTrainedTokenizerFast, "save_pretrained", save)
        message = "No space left on device"
    with pytest.raises(SystemExit, match=message):
        run_script(monkeypatch, "--data", corpus, "--vocab_size", 280, "--output_dir", output)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert [path.name for path in output.parent.iterdir()] == ["tokenizer"]


def test_a_damaged_previous_tokenizer_does_not_stop_the_run(tmp_path, corpus, monkeypatch, capsys):
    output = tmp_path / "tokenizer"
    output.mkdir()
    (output / "tokenizer.json").write_text('{"version": ', encoding="utf-8")
    run_script(monkeypatch, "--data", corpus, "--vocab_size", 300, "--output_dir", output)
    assert "cannot be read" in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(output)) == 300


@pytest.mark.parametrize(("arguments", "message"), [
    (["--data", "absent.jsonl"], "No such data file: absent.jsonl"),
    (["--data", "bad.jsonl"], "Stopped"),
    (["--data", "corpus.jsonl", "--vocab_size", "100"], "too small"),
    ([], "python -m dataset.starter"),
])
def test_bad_input_gets_a_clear_line(tmp_path, corpus, monkeypatch, capsys, arguments, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "好"}\nnot json\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find_data, "__defaults__", (tmp_path,))
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, *arguments, "--output_dir", "t")
    assert message in str(stopped.value)
    assert not (tmp_path / "t").exists()
    if arguments[:2] == ["--data", "bad.jsonl"]:
        assert "bad.jsonl:2" in capsys.readouterr().out


def test_text_kind():
    assert text_kind("床前明月光，疑是地上霜。") == "zh"
    assert text_kind("It was the best of times,\nit was the worst of times.") == "en"
    assert text_kind("import os\n\ndef main():\n    return os.getcwd()\n") == "code"
