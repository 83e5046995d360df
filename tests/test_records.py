"""Reading records: what is broken is named by file, line and reason; good text passes unchanged."""
import json
import socket
from pathlib import Path

import pytest

from dataset import files as files_module
from dataset.files import BrokenData
from dataset.records import read_records

GOOD = {"text": "好"}
CHAT = [{"role": "user", "content": "你是谁"}, {"role": "assistant", "content": "我是缘梦。"}]


def write_lines(path: Path, lines: list, end: bytes = b"\n") -> Path:
    """Each item: bytes as they are, or a record to write as JSON."""
    path.write_bytes(b"".join(
        (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()) + end
        for line in lines))
    return path


@pytest.mark.parametrize("line, reason", [
    (b'{"text": "a"', "bad JSON"),
    (b'{"text": "a"} {"text": "b"}', "bad JSON: Extra data"),
    (b'{"text": "\ttab"}', "bad JSON: Invalid control character"),
    (b"[" * 100_000, "bad JSON"),
    (b"1" * 5000, "bad JSON"),
    (b"[]", "wrong type: expected an object, found a list"),
    (b"null", "wrong type: expected an object, found null"),
    ({"txt": "a"}, "unknown shape: its fields are txt"),
    ({"text": 5}, 'wrong type: "text" must be a string, found a number'),
    ({"text": ""}, 'empty "text"'),
    (b'{"text": "\\ud83d"}', "half of a surrogate pair (\\ud83d)"),
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    ('{"text": "中文"}'.encode("gbk"), "not UTF-8"),
    (b'{"text": "a\\\xff"}', "not UTF-8"),  # a backslash before it must not hide it
    (b'{"text": "\xed\xa0\xbd"}', "not UTF-8"),  # a surrogate in CESU-8
    (b'{"text": "\0\0\0"}', "NUL"),
])
def test_faults_are_named_by_line_and_reason(line, reason, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [GOOD, GOOD, line])
    with pytest.raises(BrokenData) as caught:
        list(read_records(path, "pretrain", strict=True))
    where, _, found = str(caught.value).splitlines()[0].partition(f"{path}:3: ")
    assert where == "" and reason in found, str(caught.value)


def test_good_records_pass_unchanged(tmp_path):
    texts = ["a\u2028b\u2029c\u0085d", "form\x0cfeed \x1c\x1d\x1e \x0b", "tab\\t \\xff \\u0000",
             "👩‍👩‍👧‍👦 𠮷 \ufeff \ufffd", "  spaces  ", "line\r\nbreak"]
    lines = [json.dumps({"text": text, "source": i}, ensure_ascii=i % 2 == 0)
             .replace("\\f", "\\u000c").encode() for i, text in enumerate(texts)]
    path = write_lines(tmp_path / "d.jsonl", lines)
    assert [text for _, text in read_records(path, "pretrain")] == texts
    chats = [{"messages": CHAT * 3}, {"messages": [{"role": "system", "content": " x "}, *CHAT]}]
    path = write_lines(tmp_path / "c.jsonl", chats)
    assert list(read_records(path, "sft")) == list(enumerate(chats, 1))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("block", [1000, 1 << 20])
def test_line_numbers(end, block, tmp_path, monkeypatch):
    """Unicode's own line separators stand unescaped inside the strings and count for nothing."""
    monkeypatch.setattr(files_module, "BLOCK_BYTES", block)
    lines = [{"text": f"{i}\u2028\u2029\u0085 end"} for i in range(2500)]
    lines[1234] = b"broken"
    path = write_lines(tmp_path / "d.jsonl", lines, end)
    path.write_bytes(path.read_bytes().removesuffix(end))  # no line break at the end of the file
    numbers = [number for number, text in read_records(path, "pretrain")
               if text == f"{number - 1}\u2028\u2029\u0085 end"]
    assert numbers == [n for n in range(1, 2501) if n != 1235]


def test_byte_order_mark_and_odd_file_name(tmp_path):
    path = tmp_path / "数据 [1]*?.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert list(read_records(path, "pretrain")) == [(1, "好")]


def test_few_broken_lines_are_listed_and_left_out(tmp_path, capsys):
    lines = [GOOD] * 3000
    for number in range(100, 130):
        lines[number - 1] = b"oops"
    path = write_lines(tmp_path / "d.jsonl", lines)
    assert len(list(read_records(path, "pretrain"))) == 2970
    report = capsys.readouterr().err.splitlines()
    assert report[0].startswith(f"{path}:100: bad JSON")
    assert report[19].startswith(f"{path}:119: ") and report[20] == "... and 10 more"
    assert report[21] == "30 of 3,000 records are broken: left out."


def test_more_than_one_percent_stops_with_the_report(tmp_path, capsys):
    lines = [GOOD] * 3000
    for number in range(2001, 2032):
        lines[number - 1] = b"[]"
    path = write_lines(tmp_path / "d.jsonl", lines)
    with pytest.raises(BrokenData) as caught:
        list(read_records(path, "pretrain"))
    report = str(caught.value).splitlines()
    assert len(report) == 22 and report[0].startswith(f"{path}:2001: wrong type")
    assert report[-1].startswith("31 of 3,000 records are broken, more than 1%")
    assert len(list(read_records(path, "pretrain", max_broken=0.02))) == 2969


def test_hopeless_file_stops_early_but_a_bad_beginning_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "BLOCK_BYTES", 50_000)
    path = write_lines(tmp_path / "bad.jsonl", [GOOD] + [b'{"text": 1}'] * 40_000)
    with pytest.raises(BrokenData, match="so far are broken"):
        list(read_records(path, "pretrain"))

    # 150 broken of the first 10,000 lines, but under 1 % of the whole file.
    path = write_lines(tmp_path / "good.jsonl", [b'{"text": 1}'] * 150 + [GOOD] * 20_000)
    assert len(list(read_records(path, "pretrain"))) == 20_000


def test_blank_lines_are_no_records(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [GOOD, b"", b" \t", {"text": "末"}, b"", b""])
    assert list(read_records(path, "pretrain", strict=True)) == [(1, "好"), (4, "末")]


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such data file"):
        list(read_records(tmp_path / "none.jsonl", "pretrain"))
    with pytest.raises(BrokenData, match="the file is empty"):
        list(read_records(write_lines(tmp_path / "empty.jsonl", []), "pretrain"))
    with pytest.raises(BrokenData, match="no records in this file"):
        list(read_records(write_lines(tmp_path / "blank.jsonl", [b"", b""]), "pretrain"))
    pretty = write_lines(tmp_path / "pretty.json", [json.dumps(GOOD, indent=1).encode()])
    with pytest.raises(BrokenData, match="pretty.json:1: bad JSON.*is this JSON Lines"):
        list(read_records(pretty, "pretrain"))


def test_reading_asks_no_server(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried to use the network")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    path = write_lines(tmp_path / "d.jsonl", [{"text": "汉字" * 500}] * 50)
    assert len(list(read_records(path, "pretrain"))) == 50
