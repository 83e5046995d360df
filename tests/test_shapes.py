"""Shapes of records: each becomes the internal form, by rules that a user would expect."""
import json
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest

from dataset.files import BrokenData, open_as, read_blocks
from dataset.records import FileReport, read_block, read_records, reading_of
from dataset.shapes import Fault, conversation_of, text_of

QUESTION, ANSWER = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
CHAT = {"messages": [QUESTION, ANSWER]}
CALL = {"name": "multiply", "arguments": {"a": 7, "b": 8}}
TOOLS = [{"type": "function", "function": {"name": "multiply", "parameters": {"type": "object"}}}]
CALLED = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]},
          {"role": "tool", "content": "56"}, ANSWER]


def converted(record: dict) -> dict:
    return conversation_of(record, Counter())[1]


@pytest.mark.parametrize("record, expected", [
    ({"conversations": [QUESTION, ANSWER]}, CHAT),
    ({"messages": [QUESTION, ANSWER], "id": 5}, CHAT),
    ({"messages": json.dumps([QUESTION, ANSWER])}, CHAT),  # a column of a CSV file
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}, CHAT),
    ({"conversations": [{"from": "user", "value": "问"}, {"from": "bing", "value": "答"}]}, CHAT),
    ({"instruction": "问", "input": "", "output": "答"}, CHAT),
    ({"instruction": "问", "output": "答", "history": None, "system": None}, CHAT),
    ({"instruction": "", "input": "问", "output": "答"}, CHAT),
    ({"instruction": "问", "input": "甲", "output": "答"},
     {"messages": [{"role": "user", "content": "问\n甲"}, ANSWER]}),
    ({"instruction": "问", "output": "答", "system": "系统", "history": [["早", "早上好"]]},
     {"messages": [{"role": "system", "content": "系统"}, {"role": "user", "content": "早"},
                   {"role": "assistant", "content": "早上好"}, QUESTION, ANSWER]}),
    ({"messages": [{"role": "developer", "content": "短"},
                   {"role": "user", "content": [{"type": "text", "text": "甲"},
                                                {"type": "text", "value": "乙"}]}, ANSWER]},
     {"messages": [{"role": "system", "content": "短"}, {"role": "user", "content": "甲\n乙"},
                   ANSWER]}),
    # Calls of tools: OpenAI's objects, minimind's JSON text, ShareGPT's turns
    ({"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function",
         "function": {"name": "multiply", "arguments": '{"a": 7, "b": 8}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "56"}, ANSWER], "tools": TOOLS},
     {"messages": CALLED, "tools": TOOLS}),
    ({"conversations": [{"role": "system", "content": "", "tools": json.dumps(TOOLS)}, QUESTION,
                        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
                        {"role": "tool", "content": "56"}, ANSWER]},
     {"messages": CALLED, "tools": TOOLS}),
    ({"conversations": [{"from": "human", "value": "问"},
                        {"from": "function_call", "value": json.dumps(CALL)},
                        {"from": "observation", "value": "56"}, {"from": "gpt", "value": "答"}],
      "tools": json.dumps(TOOLS)}, {"messages": CALLED, "tools": TOOLS}),
    ({"messages": [QUESTION, {"role": "assistant", "content": None, "function_call": {
        "name": "multiply", "arguments": '{"a": 7, "b": 8}'}},
        {"role": "function", "name": "multiply", "content": "56"}, ANSWER]}, {"messages": CALLED}),
    ({"conversations": [QUESTION, {**ANSWER, "reasoning_content": "想"}]},
     {"messages": [QUESTION, {**ANSWER, "reasoning_content": "想"}]}),
    ({"conversations": [QUESTION, {**ANSWER, "learn": False}, QUESTION, ANSWER]},
     {"messages": [QUESTION, {**ANSWER, "learn": False}, QUESTION, ANSWER]}),
])
def test_shapes_become_one(record, expected):
    assert converted(record) == expected
    # With the reader of `datasets` the fields that others have come back as None.
    absent = dict.fromkeys(("conversations", "messages", "instruction", "chosen", "rejected", "gt",
                            "tools", "text"))
    assert converted({**absent, **record}) == expected


def turns(*pairs: tuple[str, str]) -> list[dict]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[role], "content": content} for role, content in pairs]


@pytest.mark.parametrize("given, expected, counted", [
    ([("u", "一"), ("u", "二"), ("a", "三")], [("u", "一\n二"), ("a", "三")],
     "user turns in a row joined"),
    ([("u", "一"), ("a", "二"), ("a", "三")], [("u", "一"), ("a", "二\n三")],
     "assistant turns in a row joined"),
    ([("s", " "), ("u", "一"), ("a", "二")], [("u", "一"), ("a", "二")],
     "empty system messages skipped"),
    ([("s", "甲"), ("s", "乙"), ("u", "一"), ("a", "二")], [("s", "甲\n乙"), ("u", "一"), ("a", "二")],
     "system turns in a row joined"),
    ([("u", "一"), ("a", "二"), ("u", "三")], [("u", "一"), ("a", "二")],
     "last user turns without an answer cut"),
    ([("u", "一"), ("a", "二"), ("u", "三"), ("a", "四"), ("t", "五")],
     [("u", "一"), ("a", "二"), ("u", "三"), ("a", "四")], "last tool turns without an answer cut"),
    ([("a", "零"), ("u", "一"), ("a", "二")], [("u", "一"), ("a", "二")],
     "assistant turns before the first question cut"),
])
def test_turns_are_brought_into_order_and_counted(given, expected, counted):
    mended = Counter()
    _, conversation = conversation_of({"messages": turns(*given)}, mended)
    assert conversation == {"messages": turns(*expected)}
    assert mended == {counted: 1}


@pytest.mark.parametrize("record, reason", [
    ({"question": "a", "answer": "b"}, "unknown shape: its fields are question, answer"),
    ({}, "unknown shape: its fields are none"),
    ({"text": "a"}, "data for pretraining"),
    ({"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}, "preference pairs"),
    ({"conversations": [QUESTION, {**ANSWER, "content": ""}], "gt": ["1"]}, "prompts with gt"),
    ({"conversations": "hello"}, 'message text, but no JSON|"conversations" is text, but no JSON'),
    ({"conversations": None}, '"conversations" is null'),
    ({"conversations": {}}, '"conversations" must be a list, found an object'),
    ({"conversations": []}, "empty conversation"),
    ({"conversations": ["hello"]}, "message 1: wrong type: must be an object, found a string"),
    ({"conversations": [{"content": "x"}]}, 'message 1: missing field "role"'),
    ({"messages": [QUESTION, {"role": "assistant"}]}, 'message 2: missing field "content"'),
    ({"messages": [QUESTION, {**ANSWER, "content": 5}]}, 'message 2: .*a string, found a number'),
    ({"messages": [QUESTION, {**ANSWER, "content": " "}]}, 'message 2: empty "content"'),
    ({"messages": [{**QUESTION, "content": [{"type": "image_url"}]}, ANSWER]},
     "message 1: a part of its content is 'image_url'"),
    ({"messages": [QUESTION, ANSWER], "images": ["a.jpg"]}, "comes with images: this model reads"),
    ({"messages": [QUESTION, ANSWER], "label": False}, "answers labelled good or bad"),
    ({"chosen_messages": [QUESTION], "rejected_messages": [QUESTION]}, "preference pairs"),
    ({"messages": [QUESTION, {"role": "bot", "content": "x"}]}, 'message 2: unknown role "bot"'),
    ({"messages": [QUESTION, {"role": ["user"], "content": "x"}]}, "message 2: unknown role"),
    ({"messages": [QUESTION]}, "no assistant turn"),
    ({"messages": [{"role": "system", "content": "x"}]}, "no assistant turn"),
    ({"messages": [ANSWER, QUESTION]}, "no assistant turn"),
    ({"messages": [QUESTION, {"role": "system", "content": "x"}, ANSWER]},
     "message 2: a system message after the conversation has begun"),
    ({"messages": [QUESTION, {"role": "tool", "content": "x"}, ANSWER]},
     "message 2: a tool's result without a call"),
    ({"messages": [QUESTION, {**ANSWER, "tool_calls": "{oops"}]}, '"tool_calls" is text, but no JSON'),
    ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{"arguments": {}}]}]}, "a tool call must be"),
    ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
     "a tool call must be"),
    ({"messages": [QUESTION, ANSWER], "tools": "nonsense"}, '"tools" is text, but no JSON'),
    ({"messages": [QUESTION, ANSWER], "tools": '["f"]'}, '"tools" must be a list of objects'),
    ({"instruction": "a", "output": 5}, '"output" must be a string'),
    ({"instruction": "a", "output": "b", "history": "x"}, '"history" is text, but no JSON'),
    ({"messages": [QUESTION, {**ANSWER, "content": "\ud83d"}]}, "half of a surrogate pair"),
])
def test_faults_say_where_and_why(record, reason):
    with pytest.raises(Fault, match=reason) as caught:
        converted(record)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record, reason", [
    ({"messages": [QUESTION, ANSWER]}, "OpenAI messages: data for fine-tuning"),
    ({"txt": "a"}, "unknown shape: its fields are txt"),
    ({"text": None}, '"text" must be a string, found null'),
    ({"text": " \n\u3000"}, 'empty "text"'),
])
def test_faults_of_texts(record, reason):
    with pytest.raises(Fault, match=reason):
        text_of(record)


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
                    encoding="utf-8")
    return path


def notes(path: Path, kind: str, marks: str = "auto") -> list[str]:
    """What a user is told of a file."""
    file = open_as(path)
    reading, told = reading_of(file, kind, marks)
    report = FileReport(file, reading)
    for block in read_blocks(file):
        report.add(block.num_bytes, read_block(block, reading))
    return told + report.finish()


def test_a_file_of_an_unknown_shape_is_refused_once_with_an_example(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"q": "a", "a": "b"}] * 500)
    with pytest.raises(BrokenData) as caught:
        notes(path, "sft")
    message = str(caught.value)
    assert message.startswith(f"{path}:1: unknown shape: its fields are q, a. Known are")
    assert '"role": "user"' in message and "\n" not in message


def test_one_line_says_what_was_recognised(tmp_path):
    path = write(tmp_path / "d.jsonl", [
        CHAT, {"conversations": [QUESTION, ANSWER]}, {"instruction": "a", "output": "b"}, CHAT,
        {"messages": [QUESTION, QUESTION, ANSWER, QUESTION]}])
    assert notes(path, "sft") == [
        f"{path}: 3 OpenAI messages, 1 conversations (role, content), 1 Alpaca; "
        "1 user turns in a row joined, 1 last user turns without an answer cut"]


def test_marks_of_other_templates_and_placeholders_are_named(tmp_path):
    foreign = {"messages": [{"role": "user", "content": "[INST] 问 [/INST]"}, ANSWER]}
    path = write(tmp_path / "d.jsonl", [CHAT, CHAT, foreign])
    assert "1 conversations hold marks of another template ([INST]); they are learnt as plain " \
        "text" in notes(path, "sft")[1]
    path = write(tmp_path / "p.jsonl", [
        {"conversations": [{"role": "user", "content": f"问题{i}"}, {**ANSWER, "content": "无"}]}
        for i in range(30)])
    assert notes(path, "sft")[1].endswith("30 of 30 conversations end with the same answer '无': "
                                          "is it a placeholder?")


# ---- Marks between documents --------------------------------------------------------------------

DOCUMENTS = ["桂花开了。", "水在一百度沸腾。", "nums[::-1]"]


@pytest.mark.parametrize("joined, name", [
    (" ".join(f"<s>{text}</s>" for text in DOCUMENTS), "<s>…</s>"),
    ("".join(f"<s>{text}</s>\n" for text in DOCUMENTS), "<s>…</s>"),
    (" ".join(f"<|im_start|>{text}<|im_end|>" for text in DOCUMENTS), "<|im_start|>…<|im_end|>"),
    (" ".join(f"{text}<|im_end|>" for text in DOCUMENTS), "<|im_start|>…<|im_end|>"),
    (" ".join(f"<|im_start|>{text}<|im_end|>" for text in DOCUMENTS)[:-5], None),  # cut off
    ("<|endoftext|>".join(DOCUMENTS) + "<|endoftext|>", "…<|endoftext|>"),
])
def test_marks_are_borders(joined, name, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": joined}] * 4)
    found = [text for _, text in read_records(path, "pretrain")]
    if name is None:
        assert found[:2] == DOCUMENTS[:2]
        return
    assert found == DOCUMENTS * 4
    assert notes(path, "pretrain") == [
        f"{path}: 4 texts with 12 documents, 3.0 documents a record, marks of {name} removed"]
    assert [text for _, text in read_records(path, "pretrain", marks="keep")] == [joined] * 4


def test_two_generations_in_one_file(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": "<s>甲</s> <s>乙</s>"}] * 3
                 + [{"text": "丙<|im_end|> 丁<|im_end|>"}] * 3)
    assert [text for _, text in read_records(path, "pretrain")] == ["甲", "乙"] * 3 + ["丙", "丁"] * 3


@pytest.mark.parametrize("texts", [
    ["在 HTML 里 <s>旧价</s> 是删除线。", "普通的文字。"] * 20,
    ["说明：<|im_end|> 是 ChatML 的结束标记。"] * 5,
    ["<s>", "a </s> b"],
    [f"第{i}篇" for i in range(95)] + ["<s>一篇以删除线收尾的网页</s>"] * 5,  # 5 %: a theme, no border
])
def test_marks_in_the_middle_of_a_text_are_text(texts, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    assert [text for _, text in read_records(path, "pretrain")] == texts


def test_rendered_conversations_are_not_split(tmp_path):
    text = "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n你好！<|im_end|>"
    path = write(tmp_path / "d.jsonl", [{"text": text}] * 5)
    assert [found for _, found in read_records(path, "pretrain")] == [text] * 5
    assert "give them to train_sft.py as messages" in notes(path, "pretrain")[0]


def test_the_reader_of_datasets_gives_the_same(tmp_path):
    """Absent fields come back as None from `datasets`, and all the same here."""
    records = [CHAT, {"messages": CALLED[:1] + [ANSWER]}]
    path = write(tmp_path / "d.jsonl", records)
    loaded = datasets.Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    assert [converted(record) for record in loaded] == [c for _, c in read_records(path, "sft")]


# ---- The documents ------------------------------------------------------------------------------

@pytest.mark.parametrize("document", ["docs/own-data.md", "docs/en/own-data.md"])
def test_every_example_of_the_documents_can_be_used_as_it_stands(document, tmp_path):
    text = (Path(__file__).parents[1] / document).read_text(encoding="utf-8")
    examples = re.findall(r"^```json\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert len(examples) == 6
    data = tmp_path / "d.jsonl"
    data.write_text(examples[0], encoding="utf-8")
    assert len(list(read_records(data, "pretrain"))) == 1
    data.write_text("\n".join(examples[1:]), encoding="utf-8")
    assert len(list(read_records(data, "sft", strict=True))) == 5
    assert notes(data, "sft") == [f"{data}: 2 conversations (role, content), 1 OpenAI messages, "
                                  "1 ShareGPT (from, value), 1 Alpaca; "
                                  "1 empty system messages skipped"]
