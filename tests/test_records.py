"""Reading records: what is broken is named by file, line and reason; good text passes unchanged."""
import json
import socket
from pathlib import Path

import pytest

from dataset import records as records_module
from dataset.records import BrokenData, read_numbered, read_records

GOOD = {"text": "好"}
CHAT = [{"role": "user", "content": "你是谁"}, {"role": "assistant", "content": "我是缘梦。"}]


def write_lines(path: Path, lines: list, end: bytes = b"\n") -> Path:
    """Each item: bytes as they are, or a record to write as JSON."""
    path.write_bytes(b"".join(
        (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()) + end
        for line in lines))
    return path


def fault_of(line, kind: str, path: Path) -> str:
    """The reason given for one broken line after two good ones."""
    good = GOOD if kind == "pretrain" else {"conversations": CHAT}
    write_lines(path, [good, good, line])
    with pytest.raises(BrokenData) as caught:
        list(read_records(path, kind, strict=True))
    where, _, reason = str(caught.value).splitlines()[0].partition(f"{path}:3: ")
    assert where == "", str(caught.value)
    return reason


@pytest.mark.parametrize("line, reason", [
    (b'{"text": "a"', "bad JSON"),
    (b'{"text": "a"} {"text": "b"}', "bad JSON: Extra data"),
    (b'{"text": "\ttab"}', "bad JSON: Invalid control character"),
    (b"[" * 100_000, "bad JSON"),
    (b"1" * 5000, "bad JSON"),
    (b"", "blank line"),
    (b"  \t", "blank line"),
    (b"[]", "wrong type: expected an object, found a list"),
    (b"null", "wrong type: expected an object, found null"),
    ({"txt": "a"}, 'missing field "text"'),
    ({"text": None}, 'wrong type: "text" must be a string, found null'),
    ({"text": 5}, 'wrong type: "text" must be a string, found a number'),
    ({"text": ""}, 'empty "text"'),
    ({"text": " \n\u3000"}, 'empty "text"'),
    (b'{"text": "\\ud83d"}', "half of a surrogate pair (\\ud83d)"),
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    ('{"text": "中文"}'.encode("gbk"), "not UTF-8"),
    (b'{"text": "a\\\xff"}', "not UTF-8"),  # a backslash before it must not hide it
    (b'{"text": "\xed\xa0\xbd"}', "not UTF-8"),  # a surrogate in CESU-8
    (b'{"text": "\0\0\0"}', "NUL"),
])
def test_faults_of_texts(line, reason, tmp_path):
    assert reason in fault_of(line, "pretrain", tmp_path / "d.jsonl")


def talk(*roles: str, content="x") -> dict:
    return {"conversations": [{"role": role, "content": content} for role in roles]}


@pytest.mark.parametrize("line, reason", [
    (GOOD, 'missing field "conversations"'),
    ({"conversations": "hello"}, 'wrong type: "conversations" must be a list, found a string'),
    ({"conversations": []}, "empty conversation"),
    ({"conversations": ["hello"]}, "wrong type: message 1 must be an object, found a string"),
    ({"conversations": [{"content": "x"}]}, 'message 1: missing field "role"'),
    ({"conversations": [CHAT[0], {"role": "assistant"}]}, 'message 2: missing field "content"'),
    ({"conversations": [CHAT[0], {"role": "assistant", "content": ["x"]}]},
     'message 2: wrong type: "content" must be a string, found a list'),
    ({"conversations": [CHAT[0], {"role": "assistant", "content": " "}]},
     'message 2: empty "content"'),
    (talk("user", "bot"), 'message 2: unknown role "bot"'),
    (talk("user", ["assistant"]), "message 2: unknown role"),
    (talk("user"), "no assistant turn"),
    (talk("system"), "no assistant turn"),
    (talk("assistant", "user"), "roles out of order: assistant where user is expected"),
    (talk("user", "user", "assistant"), "message 2: roles out of order"),
    (talk("user", "assistant", "assistant"), "message 3: roles out of order"),
    (talk("user", "system", "assistant"), "message 2: roles out of order"),
    (talk("system", "system", "user", "assistant"), "message 2: roles out of order"),
    (talk("user", "assistant", "user"), "the last message is not the assistant's"),
])
def test_faults_of_conversations(line, reason, tmp_path):
    assert reason in fault_of(line, "sft", tmp_path / "d.jsonl")


def test_good_records_pass_unchanged(tmp_path):
    texts = ["a\u2028b\u2029c\u0085d", "form\x0cfeed \x1c\x1d\x1e \x0b", "tab\\t \\xff \\u0000",
             "👩‍👩‍👧‍👦 𠮷 \ufeff \ufffd", "  spaces  ", "line\r\nbreak"]
    lines = [json.dumps({"text": text, "source": i}, ensure_ascii=i % 2 == 0)
             .replace("\\f", "\\u000c").encode() for i, text in enumerate(texts)]
    path = write_lines(tmp_path / "d.jsonl", lines)
    assert [record["text"] for record in read_records(path, "pretrain")] == texts
    chats = [{"conversations": CHAT * 3}, {"conversations": [
        {"role": "system", "content": ""}, *CHAT]}]
    path = write_lines(tmp_path / "c.jsonl", chats)
    assert list(read_records(path, "sft")) == chats


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_line_numbers(end, chunk, tmp_path, monkeypatch):
    """Unicode's own line separators stand unescaped inside the strings and count for nothing."""
    monkeypatch.setattr(records_module, "READ_CHARACTERS", chunk)
    lines = [{"text": f"{i}\u2028\u2029\u0085 end"} for i in range(2500)]
    lines[1234] = b"broken"
    path = write_lines(tmp_path / "d.jsonl", lines, end)
    path.write_bytes(path.read_bytes().removesuffix(end))  # no line break at the end of the file
    numbers = [number for number, record in read_numbered(path, "pretrain")
               if record["text"] == f"{number - 1}\u2028\u2029\u0085 end"]
    assert numbers == [n for n in range(1, 2501) if n != 1235]


def test_byte_order_mark_and_odd_file_name(tmp_path):
    path = tmp_path / "数据 [1]*?.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert list(read_records(path, "pretrain")) == [GOOD]


def test_few_broken_lines_are_listed_and_left_out(tmp_path, capsys):
    lines = [GOOD] * 3000
    for number in range(100, 130):
        lines[number - 1] = b"oops"
    path = write_lines(tmp_path / "d.jsonl", lines)
    assert len(list(read_records(path, "pretrain"))) == 2970
    report = capsys.readouterr().err.splitlines()
    assert report[0].startswith(f"{path}:100: bad JSON")
    assert report[19].startswith(f"{path}:119: ") and report[20] == "... and 10 more"
    assert report[21] == "30 of 3,000 lines are broken: left out."


def test_more_than_one_percent_stops_with_the_report(tmp_path, capsys):
    lines = [GOOD] * 3000
    for number in range(2001, 2032):
        lines[number - 1] = b""
    path = write_lines(tmp_path / "d.jsonl", lines)
    with pytest.raises(BrokenData) as caught:
        list(read_records(path, "pretrain"))
    report = str(caught.value).splitlines()
    assert len(report) == 22 and report[0] == f"{path}:2001: blank line"
    assert report[-1].startswith("31 of 3,000 lines are broken, more than 1%")
    assert len(list(read_records(path, "pretrain", max_broken=0.02))) == 2969


def test_hopeless_file_stops_early_but_a_bad_beginning_does_not(tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", [b'{"text": 1}'] * 40_000)
    read = []
    with pytest.raises(BrokenData, match="so far are broken"):
        list(read_numbered(path, "pretrain", on_bytes=read.append))
    assert sum(read) < path.stat().st_size / 3

    # 150 broken of the first 10,000 lines, but under 1 % of the whole file.
    path = write_lines(tmp_path / "good.jsonl", [b'{"text": 1}'] * 150 + [GOOD] * 20_000)
    assert len(list(read_records(path, "pretrain"))) == 20_000


def test_bytes_add_up_to_the_file(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [{"text": "汉字" * i} for i in range(1, 1500)])
    read = []
    list(read_numbered(path, "pretrain", on_bytes=read.append))
    assert sum(read) == path.stat().st_size and len(read) > 1


def test_nothing_to_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="No such data file"):
        list(read_records(tmp_path / "none.jsonl", "pretrain"))
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(BrokenData, match="the file is empty"):
        list(read_records(empty, "pretrain"))
    monkeypatch.setattr(records_module, "MAX_LINE_BYTES", 1 << 20)
    array = write_lines(tmp_path / "array.json", [[GOOD] * 100_000])
    with pytest.raises(BrokenData, match="Is this JSON Lines"):
        list(read_records(array, "pretrain"))


def test_reading_asks_no_server_and_writes_no_copy(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried to use the network")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(records_module.tempfile, "tempdir", str(scratch))
    path = write_lines(tmp_path / "d.jsonl", [{"text": "汉字" * 500}] * 5000)
    copied = 0
    for _ in read_records(path, "pretrain"):
        copied = max(copied, sum(f.stat().st_size for f in scratch.rglob("*") if f.is_file()))
    assert copied < 10_000
    assert list(scratch.iterdir()) == []
