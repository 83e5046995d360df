"""Data files of every format and compression: the same records, in order, with their lines."""
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dataset import files as files_module
from dataset.files import BrokenData, data_files, open_as, read_blocks
from dataset.records import read_records
from dataset.sampling import sample_texts

TEXTS = [f"第{i}篇：“引号”, \"逗号\"\n换行 \u2028 \U0001f600 {'长' * (i % 50)}" for i in range(3000)]
RECORDS = [{"text": text} for text in TEXTS]


def as_lines() -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def as_csv(delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({"id": i, **record} for i, record in enumerate(RECORDS))
    return file.getvalue().encode()


def as_parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), sink, row_group_size=700)
    return sink.getvalue().to_pybytes()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def in_two_frames(content: bytes) -> bytes:
    """As parallel compressors write them."""
    middle = len(content) // 2
    return zstd(content[:middle]) + zstd(content[middle:])


CONTENTS = {
    "d.jsonl": as_lines, "d.ndjson": as_lines, "d.json": as_lines,
    "pretty.json": lambda: json.dumps(RECORDS, ensure_ascii=False, indent=1).encode(),
    "flat.json": lambda: json.dumps(RECORDS).encode(),
    "array.jsonl": lambda: b"\xef\xbb\xbf \n" + json.dumps(RECORDS).encode(),
    "d.csv": as_csv, "bom.csv": lambda: b"\xef\xbb\xbf" + as_csv(),
    "d.tsv": lambda: as_csv("\t"),
    "d.parquet": as_parquet, "named_wrongly.jsonl": as_parquet,
    "no_suffix": as_lines,
}
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": in_two_frames}


def texts_in(path: Path) -> list[str]:
    return [text for _, text in read_records(path, "pretrain")]


@pytest.mark.parametrize("block_bytes", [50_000, 1 << 20])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_records(name, block_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "BLOCK_BYTES", block_bytes)
    path = tmp_path / name
    path.write_bytes(CONTENTS[name]())
    assert texts_in(path) == TEXTS
    blocks = list(read_blocks(open_as(path)))
    assert sum(block.num_bytes for block in blocks) == path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["d.jsonl", "pretty.json", "d.csv"])
def test_compressed_files(name, suffix, tmp_path):
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESS[suffix](CONTENTS[name]()))
    assert texts_in(path) == TEXTS
    unnamed = path.rename(tmp_path / name)  # what it is, its first bytes tell
    assert texts_in(unnamed) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_cut_off_is_named(suffix, tmp_path):
    path = tmp_path / f"d.jsonl{suffix}"
    whole = COMPRESS[suffix](as_lines())
    for cut in (whole[:-20], whole[:len(whole) // 2]):
        path.write_bytes(cut)
        with pytest.raises(BrokenData, match="d.jsonl.*is damaged or was cut off") as caught:
            texts_in(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, reason", [
    (b'[{"text": "a"},\n{"text": "b"', r"f.json:2: .*What follows cannot be read"),
    (b'[{"text": "a"},\n\n{"text": oops}]', r"f.json:3: bad JSON"),
    (b'[{"text": "a"},\n', "f.json:2: the array does not end"),
    (b'[{"text": "caf\xe9"}]', r"f.json:1: not UTF-8"),
    (b"[]", "no records in this file"),
    (b"", "the file is empty"),
    (b"PAR1 and then nothing of Parquet", "is damaged or was cut off"),
])
def test_broken_arrays_and_others(content, reason, tmp_path):
    path = tmp_path / "f.json"
    path.write_bytes(content)
    with pytest.raises(BrokenData, match=reason):
        texts_in(path)


def test_broken_csv(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text('id,text\n1,"good"\n2,"never closed\n')
    with pytest.raises(BrokenData, match=r"f.csv:\d: cannot be read as CSV"):
        texts_in(path)
    path.write_text("id,text\n" + "1,a\n" * 300 + "2,b,c\n3\n")
    assert texts_in(path) == ["a"] * 300
    with pytest.raises(BrokenData, match=r"f.csv:302: the row has more columns than the first"):
        list(read_records(path, "pretrain", strict=True))
    path.write_text("question,answer\n1,2\n")
    with pytest.raises(BrokenData, match="unknown shape: its fields are question, answer"):
        texts_in(path)


@pytest.mark.parametrize("encoding, named, iconv", [
    ("utf-16", "UTF-16", "UTF-16"), ("utf-16-le", "UTF-16", "UTF-16"), ("gb18030", "GBK", "GB18030"),
])
@pytest.mark.parametrize("name", ["d.jsonl", "pretty.json", "d.csv", "d.txt"])
def test_other_encodings_are_named_once_with_the_command(encoding, named, iconv, name, tmp_path):
    texts = {"d.txt": lambda: "床前明月光，\n疑是地上霜。\n".encode()}
    content = (CONTENTS | texts)[name]().decode()
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    with pytest.raises(BrokenData, match=f"is in {named}, not UTF-8") as caught:
        texts_in(path)
    message = str(caught.value)
    assert "\n" not in message and f"iconv -f {iconv} -t UTF-8" in message
    if named == "GBK":  # the command does what it says
        command = message.split("Convert it: ")[1]
        subprocess.run(command, shell=True, check=True)
        converted = path.with_name(f"{name}.utf8")
        assert converted.read_bytes() == content.encode()


def test_plain_text_by_line_or_by_paragraph(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("一\n二\n三", encoding="utf-8")
    assert list(read_records(path, "pretrain")) == [(1, "一"), (2, "二"), (3, "三")]
    path.write_bytes("题目\r\n一行\r\n\r\n \r\n  二\r\n三\r\n".encode())
    assert list(read_records(path, "pretrain")) == [(1, "题目\r\n一行"), (5, "二\r\n三")]
    with pytest.raises(BrokenData, match="plain text: data for pretraining"):
        list(read_records(path, "sft"))


def test_a_document_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes("好\n".encode() * 5 + b"caf\xe9 \xff\n" + "好".encode())
    with pytest.raises(BrokenData, match="d.txt:6: not UTF-8"):
        texts_in(path)
    with data_files([path], tmp_path) as files:
        sample = sample_texts(files, 10**6)
    assert len(sample.train + sample.heldout) == 6
    assert [line.split(": ")[0] for line in sample.broken] == [f"{path}:6"]


@pytest.mark.parametrize("by_paragraph", [False, True])
def test_long_plain_texts_keep_every_document(by_paragraph, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "BLOCK_BYTES", 1000)
    path = tmp_path / "d.txt"
    documents = [f"{i} 甲\n乙" if by_paragraph else f"{i} 甲乙" for i in range(500)]
    path.write_text(("\n\n" if by_paragraph else "\n").join(documents), encoding="utf-8")
    assert texts_in(path) == documents


@pytest.mark.parametrize("name", ["d.jsonl", "pretty.json", "d.txt"])
def test_a_line_without_end_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "MAX_LINE_BYTES", 10_000)
    monkeypatch.setattr(files_module, "BLOCK_BYTES", 1000)
    path = tmp_path / name
    good, endless = '{"text": "a"}', json.dumps({"text": "x" * 50_000})
    path.write_text(f"[{good},\n{endless}]" if name == "pretty.json" else f"{good}\n{endless}\n")
    with pytest.raises(BrokenData, match=rf"{name}:2: (longer than|bad JSON)"):
        texts_in(path)


def test_folders_and_several_files(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("b.jsonl", "a.json.gz", "sub/c.csv", ".hidden/x.jsonl", ".y.jsonl", "read.me"):
        content = CONTENTS["d.csv" if name.endswith("csv") else "d.jsonl"]()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with data_files([folder, folder / "b.jsonl"], tmp_path) as files:
        assert [file.path.name for file in files] == ["a.json.gz", "b.jsonl", "c.csv", "b.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no data file in this folder; known are .jsonl"):
        with data_files([tmp_path / "empty"], tmp_path):
            pass
    with pytest.raises(FileNotFoundError, match="No such data file: none.jsonl"):
        with data_files(["none.jsonl"], tmp_path):
            pass


@pytest.mark.parametrize("content", [as_lines, lambda: gzip.compress(as_lines()), as_parquet])
def test_a_named_pipe_is_read_once_and_leaves_nothing(content, tmp_path):
    pipe, spool = tmp_path / "pipe", tmp_path / "spool"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(content()))
    writer.start()
    with data_files([pipe], spool) as (file,):
        assert str(file) == str(pipe)
        assert texts_in(file.path) == TEXTS
    writer.join()
    assert list(spool.iterdir()) == []


def test_standard_input(tmp_path):
    program = (
        "from pathlib import Path\n"
        "from dataset.files import data_files, read_blocks\n"
        f"with data_files(['-'], Path({str(tmp_path)!r})) as (file,):\n"
        "    print(file, file.format, sum(block.num_lines for block in read_blocks(file)))\n")
    ran = subprocess.run([sys.executable, "-c", program], input=as_lines(), capture_output=True,
                         cwd=Path(__file__).parents[1])
    assert ran.stdout.decode().strip() == "standard input lines 3000", ran.stderr.decode()
