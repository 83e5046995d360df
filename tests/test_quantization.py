"""benchmarks/quantization.py measures what it says: likelihoods by way of the KV cache.

The judge is model/scoring.py over transformers, which reads a text as a whole, without a cache.
"""
import math
import sys

import pytest

pytest.importorskip("lmdeploy", reason="LMDeploy is published for Linux on x86-64 only")

import patches
from benchmarks.quantization import (
    TOTAL,
    EngineCheckpoint,
    Settings,
    Variant,
    all_differences,
    assert_cache_is_read,
    cache_per_token,
    main,
    measure_engine,
    measure_transformers,
    memory_rows,
    perplexity_change,
    rate_rows,
    text_rows,
    token_counts,
    weights_in_memory,
)
from model import MINI_DIR
from model.conversation import encode_text
from model.loading import load_tokenizer
from model.scoring import Checkpoint, continuation_losses, windows
from training.measurement import Score
from training.significance import holm, mcnemar_test, sign_flip_test

PAIRS = [
    ("", "床前明月光，疑是地上霜。举头望明月，低头思故乡。"),
    ("下面这首诗的作者是谁？\n床前明月光，疑是地上霜。\n", "李白"),
    ("“锲而不舍”的意思是", "雕刻一件东西，一直刻下去不放手。比喻做事有恒心、有毅力。"),
    ("", "春"),
    ("", "def add(a, b):\n    return a + b\n"),
    ("水的化学式是", "H2O。"),
    ("中华人民共和国公民", "有劳动的权利和义务。国家通过各种途径，创造劳动就业条件，加强劳动保护。"),
]


@pytest.fixture(scope="module")
def judge() -> Checkpoint:
    return Checkpoint(MINI_DIR, batch_size=4)


def opened(quant_policy: int):
    """An engine in float32 with fewer places than there are pairs, so that later ones join."""
    patches.register()
    checkpoint = EngineCheckpoint(MINI_DIR, 4, "float32", quant_policy)
    yield checkpoint
    checkpoint.close()


@pytest.fixture(scope="module")
def engine():
    yield from opened(0)


@pytest.fixture(scope="module")
def four_bit_cache():
    yield from opened(4)


# ---- Through the engine --------------------------------------------------------------------------

@pytest.mark.slow
def test_texts_are_as_likely_as_transformers_finds_them(engine, judge):
    assert engine.losses(PAIRS) == pytest.approx(judge.losses(PAIRS), abs=1e-3)


@pytest.mark.slow
def test_each_token_is_scored_once_also_beyond_the_positions(engine, judge, monkeypatch):
    ids = encode_text(judge.tokenizer, PAIRS[2][1])
    monkeypatch.setattr(engine, "positions", 8)
    (nats,) = engine.token_losses([([1], ids)])
    assert len(ids) > 16 and len(nats) == len(ids)
    expected = continuation_losses(judge.model, list(windows([1], ids, 8)), 4)
    assert sum(nats) == pytest.approx(sum(expected), abs=1e-3)


@pytest.mark.slow
def test_a_quantized_cache_is_read_where_reading_a_prompt_would_not_notice(engine, four_bit_cache):
    ids = [1, *encode_text(engine.tokenizer, PAIRS[0][1])]
    as_prompt = [checkpoint.pipe.get_ppl(ids)[0] for checkpoint in (engine, four_bit_cache)]
    assert as_prompt[0] == pytest.approx(as_prompt[1], abs=1e-6)
    exact, rounded = (checkpoint.token_losses([(ids[:1], ids[1:])])[0]
                      for checkpoint in (engine, four_bit_cache))
    assert sum(exact) / len(exact) == pytest.approx(as_prompt[0], abs=1e-3)
    changes = [abs(a - b) for a, b in zip(exact, rounded, strict=True)]
    assert sum(change > 1e-3 for change in changes) > 0.8 * len(changes)
    assert sum(changes) / len(changes) < 0.5  # and it is still the same model


@pytest.mark.slow
def test_replies_are_transformers_own(engine, judge):
    chats = [[{"role": "user", "content": text}]
             for text in ("你是谁", "李白是谁？", "3加5等于多少", "写一个Python函数，求两个数的和。", "你好")]
    assert engine.replies(chats, 12) == judge.replies(chats, 12)
    assert {ended for _, ended in engine.replies(chats, 12)} == {True, False}


@pytest.mark.slow
def test_bytes_are_counted_once(engine, four_bit_cache, judge):
    numbers = sum(weight.numel() for weight in judge.model.parameters())
    assert weights_in_memory(engine.pipe) == 4 * numbers
    # Of each token in 4 layers: keys and values of 2 heads of 64; in 4 bits with a scale and a zero
    # point for each head.
    assert cache_per_token(engine.pipe) == 4 * 2 * 2 * 64 * 4
    assert cache_per_token(four_bit_cache.pipe) == 4 * 2 * 2 * (64 // 2 + 2 * 4)


@pytest.mark.slow
def test_both_ways_of_measuring_fill_the_same_tables():
    tasks = {
        "bits_per_byte": [{"kind": "text", "source": "poem", "text": text}
                          for context, text in PAIRS if not context],
        "poem_author": [{"kind": "choice", "question": PAIRS[1][0], "answer": 1,
                         "choices": ["杜甫", "李白"]}],
        "identity": [{"kind": "chat", "accept": ["缘梦"],
                      "conversations": [{"role": "user", "content": "你是谁"}]}],
    }
    settings = Settings(model=str(MINI_DIR), max_new_tokens=24)
    patches.register()
    ways = [measure_transformers(settings, tasks, "bfloat16"),
            measure_engine(Variant("engine", str(MINI_DIR), "bfloat16"), settings, tasks)]
    assert ways[0].scores.keys() == ways[1].scores.keys() > {TOTAL, "poem_author", "identity"}
    # Rounding apart, and that the product with many rows lies in memory once more.
    totals = [way.scores[TOTAL].value for way in ways]
    assert totals[0] == pytest.approx(totals[1], rel=0.01)
    rows = memory_rows(ways)[1:]
    assert [row[0] for row in rows] == ["transformers, bfloat16", "engine"]
    assert rows[0][1] == rows[0][2] == rows[1][1] == "9.2" and rows[0][3] == rows[1][3] == "2,048"
    assert float(rows[1][2]) in (9.2, 18.4)


# ---- Tables --------------------------------------------------------------------------------------

def variant(name: str, bits: list[float], right: list[bool], **settings) -> Variant:
    scores = [Score(TOTAL, bits, [10] * len(bits)), Score("idiom", right)]
    return Variant(name, "folder", "bfloat16", scores={s.name: s for s in scores}, **settings)


def test_a_change_of_perplexity_is_the_ratio_of_two():
    first = Score(TOTAL, [2.0, 4.0, 6.0], [10, 10, 10])
    second = Score(TOTAL, [3.0, 6.0, 9.0], [10, 10, 10])
    tokens = [2, 4, 6]

    def perplexity(score: Score) -> float:
        return math.exp(math.log(2) * sum(score.values) / sum(tokens))

    change, low, high = perplexity_change(first, second, tokens, seed=0)
    assert change == pytest.approx(100 * (perplexity(second) / perplexity(first) - 1))
    # Each text changes by half a bit a token, so that other texts would have shown the same.
    assert low == pytest.approx(change) and high == pytest.approx(change)
    assert perplexity_change(first, first, tokens, seed=0) == (0, 0, 0)


def test_all_comparisons_are_corrected_together():
    first = variant("a", [5.0] * 8, [True] * 8)
    worse = variant("b", [6.0] * 8, [True] * 2 + [False] * 6)
    alike = variant("c", [5.1, 4.9] * 4, [True] * 8)
    found = all_differences([first, worse, alike], seed=1)
    p_values = [sign_flip_test([1.0] * 8, 1), mcnemar_test([True] * 8, worse.scores["idiom"].values),
                sign_flip_test([0.1, -0.1] * 4, 1), 1.0]
    expected = holm(p_values)
    assert [one.adjusted for one in found[0].values()] == pytest.approx(expected[:2])
    assert [one.adjusted for one in found[1].values()] == pytest.approx(expected[2:])
    rows = text_rows([first, worse, alike], found, {TOTAL: [4] * 8}, seed=1)
    assert rows[1][1] == "0.5000" and rows[2][3] == f"{100 * (2**0.25 - 1):+.2f} %"
    assert rate_rows([first, worse, alike], found) == [
        ["", "idiom (8)"], ["a", "100.0%"], ["b", f"25.0% ({expected[1]:.3f})"], ["c", "100.0%"]]


def test_a_cache_that_is_not_read_is_found_out():
    plain = variant("plain", [1.0, 2.0], [True, False])
    other = variant("KV int4", [1.0, 2.5], [True, False], quant_policy=4)
    assert_cache_is_read([plain, other])
    unread = variant("KV int4", [1.0, 2.0], [True, False], quant_policy=4)
    with pytest.raises(RuntimeError, match="KV int4 and plain agree in every text"):
        assert_cache_is_read([plain, unread])


def test_tokens_belong_to_the_texts_of_their_score():
    tokenizer = load_tokenizer(MINI_DIR, MINI_DIR)
    tasks = {"bits_per_byte": [{"kind": "text", "source": source, "text": text}
                               for source, text in (("b", "春"), ("a", "春眠不觉晓"), ("b", "ab"))],
             "idiom": [{"kind": "choice"}]}
    counts = [len(encode_text(tokenizer, item["text"])) for item in tasks["bits_per_byte"]]
    assert token_counts(tasks, tokenizer) == {
        "bits per byte: a": [counts[1]], "bits per byte: b": [counts[0], counts[2]], TOTAL: counts}


def test_missing_tasks_are_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quantization.py", "--data", "nowhere.jsonl"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert "nowhere.jsonl does not exist" in str(stop.value) and "\n" not in str(stop.value)
