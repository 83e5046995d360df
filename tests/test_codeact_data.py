"""The conversations of `python -m dataset.codeact`: real outputs, nothing held out in training."""
import asyncio
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mpmath
import numpy as np
import pytest
from transformers import AutoTokenizer

from codeact.prompts import describe_output, system_prompt
from codeact.sandbox import Sandbox
from codeact_pipeline import EXAMPLE, tools
from dataset.codeact import kinds
from dataset.codeact.__main__ import answered_by_question
from dataset.codeact.conversations import SPLITS, evaluation, make
from dataset.codeact.derivatives import OWN_FUNCTION, key
from dataset.codeact.facts import says
from dataset.codeact.functions import Builder, Part, Point, derivative_at, draw_point
from dataset.codeact.kinds import KINDS, LANGUAGES, read_phrasings, variants
from dataset.codeact.verification import Process, WrongTask, fenced, messages_of, verified
from dataset.rows import join_rows, prepare_rows
from dataset.shapes import conversation_of
from model import TOKENIZER_DIR
from model.conversation import encode_conversation

ROOT = Path(__file__).parents[1]
SEED = 42
TRAINING = 3000  # conversations looked through for what they must not have


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


@pytest.fixture(scope="module")
def training():
    return [make(SEED, number) for number in range(TRAINING)]


def build(folder: Path, *options: str) -> subprocess.CompletedProcess:
    files = ["--output", str(folder / "train.jsonl"), "--eval_output", str(folder / "eval.jsonl")]
    return subprocess.run(
        [sys.executable, "-m", "dataset.codeact", *files, *options], cwd=ROOT, text=True,
        capture_output=True, encoding="utf-8", timeout=300,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    done = build(folder, "--conversations", "120", "--evaluation", "8", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "Evaluation" in done.stdout and "24 held-out items" in done.stdout
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---- Functions -----------------------------------------------------------------------------------


def test_the_derivative_is_the_analytic_one():
    function = Part("xlnx", "x * log(x)", lambda x: x * mpmath.log(x))
    assert derivative_at(function, Point("π", "pi", +mpmath.pi)) == pytest.approx(
        math.log(math.pi) + 1, rel=1e-14)
    assert derivative_at(function, Point("-1", "-1", mpmath.mpf(-1))) is None  # outside
    assert derivative_at(function, Point("0", "0", mpmath.mpf(0))) is None


def test_what_is_written_means_what_the_python_does():
    """Python's own reading of the notation, with brackets and signs of times, is the same value."""
    rng, seen = random.Random(1), 0
    names = {name: getattr(math, name) for name in ("sin", "cos", "tan", "exp", "sqrt", "pi", "e")}
    while seen < 300:
        builder = Builder(rng)
        if builder.style.power != "**":  # only this style is Python as it stands
            continue
        function, point = builder.function(), draw_point(rng)
        if derivative_at(function, point) is None:
            continue
        seen += 1
        names |= {"ln": math.log, "log": math.log, "arctan": math.atan, "atan": math.atan,
                  "x": float(point.value)}
        written, python = (eval(text, dict(names)) for text in (function.written, function.python))
        assert written == pytest.approx(python, rel=1e-12), function
        assert python == pytest.approx(float(function.at(point.value)), rel=1e-9), function


@pytest.mark.parametrize("written, python", [
    ("xlnx", "x * log(x)"), ("x^2sinx", "x**2 * sin(x)"), ("e^xcosx", "exp(x) * cos(x)"),
    ("lnx/x", "log(x) / x"), ("x²", "x**2"), ("√x", "sqrt(x)"), ("e^(-x)", "exp(-x)"),
])
def test_the_notation_of_textbooks_is_drawn(written, python):
    rng = random.Random(0)
    for _ in range(200_000):
        function = Builder(rng).function()
        if function.written == written:
            assert function.python == python
            return
    pytest.fail(f"{written} was never drawn")


# ---- What is held out ----------------------------------------------------------------------------


def test_every_kind_has_phrasings_and_no_other():
    assert set(read_phrasings()) == set(KINDS)
    for name, wordings in read_phrasings().items():
        for language in LANGUAGES:
            wording = wordings[language]
            assert wording.asks and wording.held_out and wording.answer, (name, language)


def test_held_out_phrasings_are_not_taught_phrasings():
    def plain(phrasings):
        return {variant.lower().rstrip(".?!。？！") for p in phrasings for variant in variants(p)}

    for name, wordings in read_phrasings().items():
        for language in LANGUAGES:
            wording = wordings[language]
            assert not plain(wording.asks) & plain(wording.held_out), (name, language)


def test_a_broken_line_of_the_phrasings_is_named(tmp_path, monkeypatch):
    path = tmp_path / "phrasings.txt"
    path.write_text("[sort]\nzh 排序\nfr trier\n", "utf-8")
    monkeypatch.setattr(kinds, "PHRASINGS", path)
    with pytest.raises(ValueError, match=r"phrasings.txt:3: is neither"):
        read_phrasings.__wrapped__()


def test_training_has_no_held_out_task_or_phrasing(training):
    held_out = {
        (name, language): wordings[language].held_out
        for name, wordings in read_phrasings().items() for language in LANGUAGES
    }
    tasks = 0
    for conversation in training:
        for turn in conversation.turns:
            assert turn.kind.needs or turn.task.code is None or not turn.task.is_held_out
            tasks += turn.task.code is not None
            phrasings = held_out[turn.kind.name, conversation.language]
            asked = {" ".join(v.format(**turn.task.slots).split())
                     for p in phrasings for v in variants(p)}
            assert not any(text in turn.question for text in asked if len(text) > 12), turn
    assert tasks > TRAINING


def test_evaluation_has_only_held_out_tasks_and_training_none_of_them(training):
    taught = {turn.task.key or turn.task.code for c in training for turn in c.turns
              if not turn.kind.needs}
    for split in SPLITS:
        for conversation, _ in zip(evaluation(SEED, split), range(300)):
            first = conversation.turns[0]
            assert first.task.is_held_out and (first.task.key or first.task.code) not in taught
            assert (first.mistaken is not None) == (split == "recovery")


def test_the_specifications_question_is_in_no_training_row(training):
    functions = 0
    for conversation in training:
        for turn in conversation.turns:
            assert EXAMPLE not in turn.question
            function = turn.task.state.get("f")
            if function is not None and key(function, turn.task.state["v"]) == OWN_FUNCTION:
                functions += 1
                assert not re.search(r"(?:, |\[)pi[,)\]]", turn.task.code), turn.task.code
    assert functions > 0  # the function itself is taught at other points


# ---- The files -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(built, tmp_path):
    done = build(tmp_path, "--conversations", "120", "--evaluation", "8", "--workers", "1")
    assert done.returncode == 0, done.stderr
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.jsonl", "train.jsonl"]


def test_another_seed_gives_others(built, tmp_path):
    done = build(tmp_path, "--conversations", "20", "--evaluation", "1", "--seed", "7")
    assert done.returncode == 0, done.stderr
    first = (built / "train.jsonl").read_text("utf-8").splitlines()
    assert not set(first) & set((tmp_path / "train.jsonl").read_text("utf-8").splitlines())


def test_every_output_is_what_a_fresh_process_prints(built):
    """Each conversation again, in a process of its own, as an agent would run it."""
    chosen = records(built / "train.jsonl")[:25]
    assert any(m.get("learn") is False for r in chosen for m in r["conversations"])

    async def again() -> int:
        compared = 0
        async with Sandbox(tools) as sandbox:
            for number, record in enumerate(chosen):
                messages = record["conversations"]
                language = language_of_prompt(messages[0]["content"])
                for said, read in zip(messages, messages[1:]):
                    if said["role"] == "assistant" and said["content"].startswith("```python"):
                        code = said["content"].removeprefix("```python\n").removesuffix("\n```")
                        assert said["content"] == fenced(code)
                        observation = await sandbox.run(code, str(number))
                        assert read == {
                            "role": "user", "content": describe_output(observation, language)}
                        compared += 1
                await sandbox.end(str(number))
        return compared

    assert asyncio.run(again()) > 25


def language_of_prompt(system: str) -> str:
    (language,) = (name for name in LANGUAGES for own in ((), tools)
                   if system == system_prompt(own, name, short=True))
    return language


def test_records_are_conversations_that_end_with_an_answer(built):
    for record in records(built / "train.jsonl"):
        assert conversation_of(record, mended := Counter())[1]["messages"] and not mended
        assert record["conversations"][0]["role"] == "system"
        assert "```" not in record["conversations"][-1]["content"]


def test_conversations_fit(tmp_path, tokenizer):
    done = build(tmp_path, "--conversations", "40", "--max_tokens", "260", "--evaluation", "1")
    assert done.returncode == 0, done.stderr
    lengths = [len(encode_conversation(tokenizer, record["conversations"])[0])
               for record in records(tmp_path / "train.jsonl")]
    assert len(lengths) == 40 and max(lengths) <= 260


def test_answers_quote_the_output_and_items_ask_for_it(built):
    for item in records(built / "eval.jsonl"):
        assert item["questions"] and not answered_by_question(item)
        for question in item["questions"]:
            assert question["numbers"] or question["texts"]


def test_an_item_that_its_question_answers_is_left_out():
    question = {"numbers": [5], "texts": [], "verdict": ""}
    assert answered_by_question({"questions": [{"content": "3, 5: maximum?", **question}]})
    assert not answered_by_question({"questions": [{"content": "3, 50: mean?", **question}]})


@pytest.mark.parametrize("option, complaint", [
    (("--conversations", "0"), "--conversations must be at least 1"),
    (("--max_tokens", "0"), "--max_tokens must be at least 1"),
    (("--rows", "5"), "unknown option --rows"),
])
def test_bad_settings_are_one_line(tmp_path, option, complaint):
    done = build(tmp_path, *option)
    assert done.returncode == 1 and complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


# ---- Wrong tasks ---------------------------------------------------------------------------------


def test_wrong_tasks_are_dropped_and_leave_nothing_behind():
    right = make(SEED, 0, kind=KINDS["percent_of"], language="en")
    right = replace(right, turns=right.turns[:1])
    (turn,) = right.turns
    task = turn.task
    wrong = {
        "printed": replace(task, numbers=(task.numbers[0] + 1,)),
        "NameError": replace(task, code=f"secret = 1\n{task.code}\nprint(undefined)"),
        "mistake works": None,
    }

    def with_turn(**changes):
        return replace(right, turns=(replace(turn, mistaken=None, **changes),))

    conversations = [
        with_turn(task=wrong["printed"]), with_turn(task=wrong["NameError"]),
        replace(right, turns=(replace(turn, mistaken="print(1)"),)),
        with_turn(task=replace(task, code="print('secret' in globals())", numbers=(),
                               texts=("False",))),
        with_turn(),
    ]

    async def results() -> list:
        async with Sandbox(tools, spare=False) as sandbox:
            return [r async for _, r in verified(conversations, sandbox, tools, workers=1)]

    printed, failed, works, forgotten, fine = asyncio.run(results())
    assert isinstance(printed, WrongTask) and "printed" in str(printed)
    assert isinstance(failed, WrongTask) and "NameError" in str(failed)
    assert isinstance(works, WrongTask) and "works" in str(works)
    assert isinstance(forgotten, list), forgotten  # no variable of the conversation before
    assert isinstance(fine, list) and fine[1][0]["content"] == turn.question


def test_a_process_that_ends_is_replaced():
    conversation = make(SEED, 3, kind=KINDS["sum_to"])
    (turn, *_) = conversation.turns
    deadly = replace(turn, task=replace(turn.task, code="x = [0] * 10**10"), mistaken=None)
    good = replace(turn, mistaken=None)

    async def both() -> list:
        async with Sandbox(tools, spare=False) as sandbox:
            process = Process(sandbox, "one")
            with pytest.raises(WrongTask):
                await messages_of(replace(conversation, turns=(deadly,)), process, tools)
            return await messages_of(replace(conversation, turns=(good,)), process, tools)

    assert asyncio.run(both())[1][-1]["content"] == good.answer.format(
        output=good.task.numbers[0])


# ---- What counts as said -------------------------------------------------------------------------


@pytest.mark.parametrize("text, numbers, right", [
    ("The result is 36.0.", [36], True), ("It is 1,598,581,128.", [1598581128], True),
    ("It is 1598581129.", [1598581128], False), ("about 2.14473", [2.144729885888985], True),
    ("about 2.1448", [2.144729885888985], False), ("2.14", [2.144729885888985], False),
    ("[2, 3, 5]", [2, 3, 5], True), ("2 3 5 7", [3, 5], True), ("[2, 5, 3]", [2, 3, 5], False),
    ("-4", [4], False), ("1e-05", [0.00001], True), ("none", [4], False),
    ("12.0000001", [12.0], True), ("12", [12.0], True), ("12", [12.4], False),
])
def test_numbers_are_found_as_they_are_written(text, numbers, right):
    assert says(text, numbers, []) is right


def test_verdicts_are_not_their_opposites():
    assert says("97 是质数。", [], ["True"], "是质数")
    assert not says("91 不是质数。", [], ["False"], "是质数")
    assert says("91 不是质数。", [], ["False"], "不是质数")
    assert not says("91 is not a prime.", [], ["False"], "is a prime")
    assert says("2024-03-05", [], ["2024-03-05"]) and not says("2024-03-06", [], ["2024-03-05"])


# ---- Rows ----------------------------------------------------------------------------------------


def test_mistaken_code_is_read_and_not_learnt(tokenizer):
    messages = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "wrong", "learn": False},
        {"role": "user", "content": "error"}, {"role": "assistant", "content": "right"},
    ]
    ids, loss = encode_conversation(tokenizer, messages)
    learnt = tokenizer.decode([i for i, taught in zip(ids, loss) if taught])
    assert learnt == "right</s>" and "wrong" in tokenizer.decode(ids)
    del messages[1]["learn"]
    assert sum(encode_conversation(tokenizer, messages)[1]) > sum(loss)


def test_outputs_are_not_learnt(built, tokenizer):
    for record in records(built / "train.jsonl")[:40]:
        messages = record["conversations"]
        ids, loss = encode_conversation(tokenizer, messages)
        learnt = tokenizer.decode([i for i, taught in zip(ids, loss) if taught])
        said = [m["content"] for m in messages
                if m["role"] == "assistant" and m.get("learn", True)]
        assert learnt == "".join(f"{text}</s>" for text in said)


def test_rows_of_two_files_are_mixed_evenly(tmp_path):
    def rows(name: str, count: int):
        talk = [{"role": "user", "content": name}, {"role": "assistant", "content": name * 20}]
        talks = ([talk[0], {**talk[1], "content": f"{name * 20}{i}"}] for i in range(count))
        lines = [json.dumps({"conversations": messages}) for messages in talks]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return prepare_rows(path, "sft", TOKENIZER_DIR, 64, cache_dir=tmp_path / "cache")

    few, many = rows("a", 400), rows("b", 1200)
    joined = join_rows(few, many)
    n = len(joined.train)
    assert n == len(few.train) + len(many.train)
    assert len(joined.heldout) == len(few.heldout) + len(many.heldout)
    everything = np.sort(np.concatenate([few.train.tokens, many.train.tokens]), axis=0)
    assert (np.sort(joined.train.tokens[np.arange(n)], axis=0) == everything).all()
    x, y, segments = joined.train.batch([0, n - 1, 5])
    for i, row in enumerate((0, n - 1, 5)):
        alone = joined.train.batch([row])
        assert all((got[i] == one[0]).all() for got, one in zip((x, y, segments), alone))
    firsts = [row[:64].tobytes() for row in few.train.tokens]
    half = [joined.train.tokens[i][:64].tobytes() in firsts for i in range(n // 2)]
    assert sum(half) == pytest.approx(len(few.train) / 2, abs=1)  # of the first half of the rows

    halved = join_rows(few, many, share=0.5)
    assert len(halved.train) == 2 * len(few.train) and halved.sources != joined.sources
    assert len(join_rows(few, many, share=0.99).train) == n


# ---- Fine-tuning ---------------------------------------------------------------------------------


def fine_tune(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Two steps on chats, in a folder of its own."""
    talks = [[{"role": "user", "content": f"{i}加1？"}, {"role": "assistant", "content": f"{i + 1}"}]
             for i in range(900)]
    (folder / "talks.jsonl").write_text(
        "".join(json.dumps({"conversations": talk}) + "\n" for talk in talks), "utf-8")
    fixed = ["--preset", "mini", "--init", str(ROOT / "model/yuanmeng-mini-instruct"), "--compile",
             "no", "--max_steps", "2", "--batch_size", "4", "--threads", "1", "--eval_rows", "2",
             "--final_eval_rows", "2", "--tensorboard", "no", "--data", "talks.jsonl"]
    return subprocess.run([sys.executable, str(ROOT / "train_sft.py"), *fixed, *options],
                          cwd=folder, capture_output=True, encoding="utf-8", timeout=300)


def test_fine_tuning_mixes_the_agents_conversations_in(built, tmp_path):
    done = fine_tune(tmp_path, "--agent_data", str(built / "train.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "(the agent's, " in done.stdout
    assert f"talks.jsonl + {built / 'train.jsonl'}" in done.stdout
    with_agent = rows_trained(done.stdout)
    alone = fine_tune(tmp_path, "--agent_data", "none", "--row_length", "1024")
    assert alone.returncode == 0, alone.stderr
    assert "the agent's" not in alone.stdout and rows_trained(alone.stdout) < with_agent
    shared = fine_tune(tmp_path, "--agent_data", str(built / "train.jsonl"), "--agent_share", "0.5")
    assert rows_trained(shared.stdout) == 2 * rows_trained(alone.stdout), shared.stderr


def rows_trained(output: str) -> int:
    return int(re.search(r"Training on .*: ([\d,]+) rows", output)[1].replace(",", ""))


@pytest.mark.parametrize("options, complaint", [
    (("--agent_data", "missing.jsonl"), "`python -m dataset.codeact` makes it"),
    (("--agent_share", "1.5"), "--agent_share must lie between 0 and 1"),
])
def test_bad_settings_of_the_mixture_are_one_line(tmp_path, options, complaint):
    done = fine_tune(tmp_path, *options)
    assert done.returncode == 1 and complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
