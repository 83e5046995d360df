"""Rows: the chat template and its loss mask, packing without loss or mixing, and the cache."""
import errno
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset import files as files_module
from dataset import packing as packing_module
from dataset import rows as rows_module
from dataset.encoding import file_and_line
from dataset.files import BrokenData
from dataset.rows import CacheError, join_rows, prepare_rows
from model import conversation as conversation_module
from model.conversation import encode_conversation

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<s>system\n你是缘梦，一个人工智能助手。</s>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")
SYSTEM = "你是缘梦，一个人工智能助手。"
POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
MULTI_TURN = [
    {"role": "user", "content": "李白是谁？"},
    {"role": "assistant", "content": "唐代诗人，字太白。\n代表作《静夜思》。"},
    {"role": "user", "content": "那杜甫呢"},
    {"role": "assistant", "content": "也是唐代诗人 🙂"},
]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A small byte-level BPE tokenizer with the project's special tokens and template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([POEM, "system user assistant\n\n", "hello world " * 3], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<unk>", chat_template=TEMPLATE)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
                    encoding="utf-8")
    return path


def conversation(*contents: str, system: str | None = None) -> dict:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": content}
                 for i, content in enumerate(contents)]
    return {"conversations": messages}


def documents_of(row_set) -> list[tuple[int, ...]]:
    """Cut every row at its segment borders."""
    found = []
    for tokens, segments in zip(row_set.tokens, row_set.segments):
        for number in range(1, int(segments.max()) + 1):
            found.append(tuple(tokens[segments == number].tolist()))
    return found


def test_unmasked_targets_of_packed_multi_turn_samples_decode_to_the_answers(tmp_path):
    """With the tokenizer that is shipped, through the file, the packing and batch()."""
    shipped = Path(rows_module.__file__).parents[1] / "model" / "yuanmeng_tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    records = [{"conversations": MULTI_TURN},
               {"conversations": [{"role": "system", "content": "答诗。"}, *MULTI_TURN]}]
    records += [conversation(*(f"第{i}问，第{j}轮：{POEM[:j]}" for j in range(1, 7)))
                for i in range(40)]
    packed = prepare_rows(write_jsonl(tmp_path / "sft.jsonl", records), "sft", shipped, 512,
                          cache_dir=tmp_path / "cache")
    expected = sorted("".join(m["content"] + "</s>" for m in record["conversations"]
                              if m["role"] == "assistant") for record in records)
    found = []
    for side in (packed.train, packed.heldout):
        _, y_BT, segments_BT = side.batch(range(len(side)))
        for y_T, segments_T in zip(y_BT, segments_BT):
            for number in range(1, int(segments_T.max()) + 1):
                found.append(tokenizer.decode(y_T[(segments_T == number) & (y_T != -100)]))
    assert sorted(found) == expected


# ---- Packing ------------------------------------------------------------------------------------

texts = st.text(alphabet=st.sampled_from(list("明月光 a\n🙂</s>")), min_size=1, max_size=60).filter(
    str.strip)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(documents=st.lists(texts, min_size=1, max_size=30, unique=True),
       row_length=st.integers(1, 70), flush=st.sampled_from([1, 50, 1 << 20]))
def test_pretraining_rows_give_back_the_stream(documents, row_length, flush, tokenizer_dir,
                                               tokenizer, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("stream")
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in documents])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "FLUSH_TOKENS", flush)
        patch.setattr(rows_module, "HELDOUT_ONE_IN", 2**62)
        packed = prepare_rows(data, "pretrain", tokenizer_dir, row_length, marks="keep",
                              cache_dir=tmp_path / "cache").train
    encoded = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
               for text in documents]
    stream = [token for ids in encoded for token in [1, *ids, 2]]
    owner = [number for number, ids in enumerate(encoded) for _ in range(len(ids) + 2)]
    assert packed.num_tokens == len(stream)
    assert len(packed) == -(-(len(stream) - 1) // row_length)
    for i in range(len(packed)):
        real = stream[i * row_length:(i + 1) * row_length + 1]
        assert packed.tokens[i, :len(real)].tolist() == real
        owners = owner[i * row_length:(i + 1) * row_length + 1]
        assert packed.records[i] == owners[0] + 1
        assert packed.segments[i, :len(real)].tolist() == [o - owners[0] + 1 for o in owners]
        assert not packed.segments[i, len(real):].any()
    # Every token but each document's `<s>` is a target, once.
    y = packed.batch(range(len(packed)))[1]
    assert y[y != -100].tolist() == [token for ids in encoded for token in [*ids, 2]]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=40, unique=True),
       open_rows=st.integers(1, 5))
def test_sft_rows_hold_every_conversation_whole_and_once(pairs, open_rows, tokenizer_dir,
                                                         tokenizer, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("packing")
    records = [conversation(*pair) for pair in pairs]
    data = write_jsonl(tmp_path / "d.jsonl", records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "OPEN_ROWS", open_rows)
        packed = prepare_rows(data, "sft", tokenizer_dir, 700, cache_dir=tmp_path / "cache")
    rendered = [encode_conversation(tokenizer, record["conversations"]) for record in records]
    expected = sorted(tuple(ids) for ids, _ in rendered)
    assert sorted(documents_of(packed.train) + documents_of(packed.heldout)) == expected
    for side in (packed.train, packed.heldout):
        x, y, segments = side.batch(range(len(side)))
        # A target belongs to its input's document and is an answer's token.
        following = torch.from_numpy(side.segments[:, 1:].astype(np.int64))
        assert ((y == -100) | ((segments == following) & (segments > 0))).all()
    learnt = sum(int((side.batch(range(len(side)))[1] != -100).sum())
                 for side in (packed.train, packed.heldout))
    assert learnt == sum(sum(loss) for _, loss in rendered)


def test_batch_shapes_types_and_order(tokenizer_dir, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": POEM + str(i)} for i in range(30)])
    train = prepare_rows(data, "pretrain", tokenizer_dir, 16, cache_dir=tmp_path / "cache").train
    assert train.tokens.dtype == np.uint16 and isinstance(train.tokens, np.memmap)
    x, y, segments = train.batch(torch.tensor([3, 0, 3]))
    assert x.shape == y.shape == segments.shape == (3, 16)
    assert x.dtype == y.dtype == segments.dtype == torch.int64
    assert torch.equal(x[0], x[2]) and x[1].tolist() == train.tokens[0, :-1].tolist()


def test_best_fit_fills_rows(tokenizer_dir, tmp_path):
    rng = random.Random(0)
    records = [conversation("？", "".join(rng.choices(POEM, k=rng.randrange(1, 200))))
               for _ in range(500)]
    packed = prepare_rows(write_jsonl(tmp_path / "d.jsonl", records), "sft", tokenizer_dir, 512,
                          cache_dir=tmp_path / "cache")
    assert packed.train.num_tokens / packed.train.tokens.size > 0.97


def test_conversations_as_long_as_a_row_and_longer(tokenizer_dir, tokenizer, tmp_path, capsys):
    two_turns = MULTI_TURN
    ids, _ = encode_conversation(tokenizer, two_turns)
    data = write_jsonl(tmp_path / "d.jsonl", [{"conversations": two_turns}])

    exact = prepare_rows(data, "sft", tokenizer_dir, len(ids) - 1, cache_dir=tmp_path / "cache")
    assert exact.train.tokens.tolist() == [ids] and (exact.train.segments == 1).all()
    assert exact.meta["shortened"] == exact.meta["dropped"] == 0

    shorter = prepare_rows(data, "sft", tokenizer_dir, len(ids) - 2, cache_dir=tmp_path / "cache")
    assert documents_of(shorter.train) == [tuple(encode_conversation(tokenizer, two_turns[:2])[0])]
    assert shorter.meta["shortened"] == 1
    assert "keep their first turns" in capsys.readouterr().err

    with pytest.raises(BrokenData, match="1 of them longer than a row of 20"):
        prepare_rows(data, "sft", tokenizer_dir, 20, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".building*"))


def test_a_text_longer_than_a_piece_keeps_every_byte(tokenizer_dir, tokenizer, tmp_path,
                                                     monkeypatch):
    monkeypatch.setattr(conversation_module, "PIECE_CHARACTERS", 7)
    text = "👩‍👩‍👧‍👦" + POEM * 3
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": text}])
    train = prepare_rows(data, "pretrain", tokenizer_dir, 1000, cache_dir=tmp_path / "c").train
    real = train.tokens[0][train.segments[0] > 0]
    assert tokenizer.decode(real[1:-1].tolist()) == text


def test_rows_are_the_same_for_any_number_of_processes(tokenizer_dir, tmp_path, monkeypatch):
    """Also what is told of broken lines; and the processes are gone when the rows are there."""
    monkeypatch.setattr(files_module, "BLOCK_BYTES", 2000)
    lines = [json.dumps({"text": POEM * (i % 7 + 1) + str(i)}, ensure_ascii=False)
             for i in range(1000)]
    lines[500] = "broken"
    for kind, name in (("pretrain", "texts"), ("sft", "chats")):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(lines), encoding="utf-8")
        lines = [json.dumps(conversation(line, line), ensure_ascii=False) for line in lines]
        lines[500] = "broken"
        one, two = (prepare_rows(data, kind, tokenizer_dir, 512, processes=processes,
                                 cache_dir=tmp_path / f"cache{processes}") for processes in (1, 3))
        assert one.meta == two.meta and one.meta["broken"] == 1
        for side in ("train", "heldout"):
            for array in ("tokens", "segments", "loss", "records"):
                assert np.array_equal(getattr(getattr(one, side), array),
                                      getattr(getattr(two, side), array))
    assert not multiprocessing.active_children()


def test_workers_end_with_a_killed_parent(tokenizer_dir, tmp_path):
    """`kill -9` while the rows are made: nothing goes on in the background."""
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": POEM * 50 + str(i)} for i in range(40_000)])
    program = (
        "import sys; from dataset.rows import prepare_rows; from pathlib import Path\n"
        "import dataset.encoding as e; yielded = e.encode_files\n"
        "import dataset.rows as r\n"
        "def told(*arguments):\n"
        "    for block in yielded(*arguments):\n"
        "        import multiprocessing as m\n"
        "        print(*[child.pid for child in m.active_children()], flush=True)\n"
        "        yield block\n"
        "r.encode_files = told\n"
        f"prepare_rows({str(data)!r}, 'pretrain', {str(tokenizer_dir)!r}, 512, processes=2,\n"
        f"             cache_dir=Path({str(tmp_path / 'cache')!r}))\n")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parents[1])
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(workers) == 2
    gone, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=60)
    assert not alive


def test_several_files_and_where_their_records_stand(tokenizer_dir, tmp_path, capsys):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": POEM + str(i)} for i in range(10)])
    second = tmp_path / "b.txt"
    second.write_text("\n".join(f"{POEM}{i} b" for i in range(10)), encoding="utf-8")
    packed = prepare_rows([first, second], "pretrain", tokenizer_dir, 64,
                          cache_dir=tmp_path / "cache")
    assert packed.path.name.startswith("a+1-pretrain-64-")
    assert packed.meta["records"] == 20
    told = capsys.readouterr().err.splitlines()
    assert told == [f"{first}: 10 texts", f"{second}: 10 texts"]
    where = packed.where(packed.train.records)
    assert f"of {first}; lines" in where and where.endswith(f"of {second}")
    joined = join_rows(packed, packed)  # the second one's records have numbers of their own
    records = {file_and_line(int(joined.train.records[i])) for i in range(len(joined.train))}
    single = {file_and_line(int(record)) for record in packed.train.records}
    assert records == single | {(file + 2, line) for file, line in single}
    # The same files give the same rows again; in another order they are others.
    again = prepare_rows([first, second], "pretrain", tokenizer_dir, 64,
                         cache_dir=tmp_path / "cache")
    assert again.path == packed.path and capsys.readouterr().err.splitlines() == told
    other = prepare_rows([second, first], "pretrain", tokenizer_dir, 64,
                         cache_dir=tmp_path / "cache")
    assert other.path != packed.path


def test_equal_records_are_named(tokenizer_dir, tmp_path, capsys, monkeypatch):
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": POEM + str(i)} for i in range(50)] * 4)
    prepare_rows(data, "pretrain", tokenizer_dir, 64, cache_dir=tmp_path / "cache")
    assert "75% of the documents repeat an earlier one" in capsys.readouterr().err
    # In bounded memory the share is that of a sample of the contents.
    monkeypatch.setattr(rows_module, "MAX_COUNTED", 1000)
    rng, repeats = np.random.default_rng(0), rows_module.Repeats()
    for _ in range(20):
        hashes = rng.integers(0, 2**63, 1000, dtype=np.uint64)
        repeats.add(np.concatenate([hashes, hashes]))
    assert repeats.num_hashes <= 1000 and repeats.share() == 0.5


# ---- Held-out records ---------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["pretrain", "sft"])
@pytest.mark.parametrize("max_rows", [2000, 2])
def test_held_out_by_content_capped_and_never_trained_on(kind, max_rows, tokenizer_dir, tmp_path,
                                                         monkeypatch):
    monkeypatch.setattr(rows_module, "HELDOUT_ONE_IN", 4)
    monkeypatch.setattr(rows_module, "HELDOUT_MAX_ROWS", max_rows)
    make = (lambda text: {"text": text}) if kind == "pretrain" else (
        lambda text: conversation(text, text))
    records = [make(f"{POEM} {i}") for i in range(100)]
    data = write_jsonl(tmp_path / "d.jsonl", records * 2)  # each record twice
    packed = prepare_rows(data, kind, tokenizer_dir, 256, cache_dir=tmp_path / "cache")
    assert 0 < len(packed.heldout) <= max_rows
    if max_rows == 2000 and kind == "sft":
        held, trained = set(documents_of(packed.heldout)), set(documents_of(packed.train))
        assert 10 < len(held) < 45 and len(held) + len(trained) == 100 and not held & trained
    meta = packed.meta
    assert meta["records"] == 200
    if kind == "sft":
        trained = len(documents_of(packed.train))
        assert trained + meta["heldout_records"] + meta["heldout_repeats"] == 200
        assert not set(documents_of(packed.heldout)) & set(documents_of(packed.train))


# ---- The cache ----------------------------------------------------------------------------------

@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", [{"text": POEM + str(i)} for i in range(50)])


def open_or_build(data, tokenizer_dir, tmp_path, **options):
    return prepare_rows(data, "pretrain", tokenizer_dir, 32, cache_dir=tmp_path / "cache",
                        **options)


def test_second_call_opens_without_tokenising(data, tokenizer_dir, tmp_path, monkeypatch):
    first = open_or_build(data, tokenizer_dir, tmp_path)
    monkeypatch.setattr(rows_module, "_build", None)  # calling it would fail
    again = open_or_build(data, tokenizer_dir, tmp_path)
    opened = open_or_build(data, tokenizer_dir, tmp_path, build=False)
    assert np.array_equal(first.train.tokens, again.train.tokens)
    assert opened.train.num_tokens == first.train.num_tokens


def test_changed_data_or_tokenizer_or_template_is_never_stale(data, tokenizer_dir, tokenizer,
                                                              tmp_path):
    old = open_or_build(data, tokenizer_dir, tmp_path)
    before = data.stat()
    data.write_text(data.read_text(encoding="utf-8").replace("49", "94"), encoding="utf-8")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same date
    changed = open_or_build(data, tokenizer_dir, tmp_path)
    assert changed.path != old.path
    assert not np.array_equal(changed.train.tokens, old.train.tokens)
    assert not old.path.exists(), "the outdated cache still fills the disk"

    other_length = prepare_rows(data, "pretrain", tokenizer_dir, 33, cache_dir=tmp_path / "cache")
    assert other_length.path != changed.path and changed.path.exists()

    other_dir = tmp_path / "other tokenizer"
    tokenizer.save_pretrained(other_dir)
    template = other_dir / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert open_or_build(data, other_dir, tmp_path).path != changed.path


@pytest.mark.parametrize("damage", ["cut", "missing", "meta"])
def test_damaged_cache_is_rebuilt_and_said_so(damage, data, tokenizer_dir, tmp_path, capsys):
    packed = open_or_build(data, tokenizer_dir, tmp_path)
    expected = np.array(packed.train.tokens)
    victim = packed.path / ("meta.json" if damage == "meta" else "train.tokens.bin")
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-3])
    with pytest.raises(CacheError, match="first process"):
        open_or_build(data, tokenizer_dir, tmp_path, build=False)
    rebuilt = open_or_build(data, tokenizer_dir, tmp_path)
    assert np.array_equal(rebuilt.train.tokens, expected)
    assert "damaged" in capsys.readouterr().err


def test_opening_without_a_cache_names_the_reason(data, tokenizer_dir, tmp_path):
    with pytest.raises(CacheError, match="No usable row cache"):
        open_or_build(data, tokenizer_dir, tmp_path, build=False)


@pytest.mark.parametrize("failure, raised", [
    (OSError(errno.ENOSPC, "No space left on device"), CacheError),
    (KeyboardInterrupt(), KeyboardInterrupt)])
def test_failed_build_leaves_nothing(failure, raised, data, tokenizer_dir, tmp_path, monkeypatch,
                                     capsys):
    def fail(*args, **kwargs):
        raise failure
    with monkeypatch.context() as patch:
        patch.setattr(packing_module.StreamPacker, "write", fail)
        with pytest.raises(raised) as caught:
            open_or_build(data, tokenizer_dir, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    said = str(caught.value) + capsys.readouterr().err
    assert "free some space" in said if raised is CacheError else "Interrupted" in said
    open_or_build(data, tokenizer_dir, tmp_path)


def test_what_a_killed_build_left_is_removed(data, tokenizer_dir, tmp_path):
    """Of this machine: whether another one, with the same disk, still builds cannot be seen."""
    host = socket.gethostname()
    dead, alive, elsewhere = (tmp_path / "cache" / f".building-{name}@x" for name in (
        f"999999999@{host}", f"{os.getppid()}@{host}", "999999999@elsewhere"))
    for folder in (dead, alive, elsewhere):
        folder.mkdir(parents=True)
    open_or_build(data, tokenizer_dir, tmp_path)
    assert not dead.exists() and alive.exists() and elsewhere.exists()


def test_two_builders_of_the_same_rows_agree(data, tokenizer_dir, tmp_path, monkeypatch):
    """The other process finishes between our start and our rename."""
    write_rows, calls = rows_module._write_rows, []

    def slow(*args):
        if not calls:
            calls.append(1)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                open_or_build(data, tokenizer_dir, tmp_path)
        return write_rows(*args)
    monkeypatch.setattr(rows_module, "_write_rows", slow)
    packed = open_or_build(data, tokenizer_dir, tmp_path)
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [packed.path.name]


def test_broken_lines_are_left_out_or_stop(data, tokenizer_dir, tmp_path):
    lines = data.read_text(encoding="utf-8") * 4 + "{broken\n"
    data.write_text(lines, encoding="utf-8")
    meta = open_or_build(data, tokenizer_dir, tmp_path).meta
    assert meta["records"] == 200 and meta["broken"] == 1
    with pytest.raises(BrokenData, match=r"data.jsonl:201: bad JSON"):  # though a cache exists
        open_or_build(data, tokenizer_dir, tmp_path, strict=True)
    data.write_text(lines + "[]\n[]\n", encoding="utf-8")
    with pytest.raises(BrokenData, match="3 of 203 records are broken"):
        open_or_build(data, tokenizer_dir, tmp_path)
    with pytest.raises(BrokenData, match=r"data.jsonl:201: bad JSON"):
        open_or_build(data, tokenizer_dir, tmp_path, strict=True)


def test_wrong_arguments(data, tokenizer_dir, tmp_path):
    with pytest.raises(ValueError, match="row_length"):
        prepare_rows(data, "pretrain", tokenizer_dir, 65536, cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="No such data file"):
        prepare_rows(tmp_path / "none.jsonl", "pretrain", tokenizer_dir, cache_dir=tmp_path)
