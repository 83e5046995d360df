"""Intervals and p-values against published ones, and what the report says of them."""

import itertools
import math
import random
import statistics

import pytest

from training.measurement import Score
from training.report_card import compare, draw_chart, report_rows, write_report
from training.significance import (
    ROUNDS,
    bootstrap_interval,
    holm,
    mcnemar_test,
    sign_flip_test,
    wilson_interval,
)

# Darwin's maize, crossed minus self-fertilized, in eighths of an inch (Fisher, 1935, § 17).
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_wilson_interval_matches_published_values():
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29 by the score method without correction.
    for right, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [  # twice the tail of the binomial distribution with p = 1/2, from its tables
        (1, 9, 0.0215), (9, 1, 0.0215), (5, 15, 0.0414), (7, 18, 0.0433), (0, 5, 0.0625),
        (4, 4, 1.0), (0, 0, 1.0),
    ],
)
def test_mcnemar_matches_the_tables_of_the_sign_test(only_first, only_second, p):
    agreed = [True] * 30 + [False] * 20  # tell nothing
    first = agreed + [True] * only_first + [False] * only_second
    second = agreed + [False] * only_first + [True] * only_second
    assert mcnemar_test(first, second) == pytest.approx(p, abs=5e-5)


def test_mcnemar_of_many_items_nears_its_chi_square():
    first = [True] * 5200 + [False] * 4800
    chi = (5200 - 4800 - 1) / math.sqrt(10_000)  # corrected for continuity
    p = 2 * (1 - statistics.NormalDist().cdf(chi))
    assert mcnemar_test(first, [not x for x in first]) == pytest.approx(p, rel=0.01)


def test_sign_flip_matches_fishers_own_count():
    # He counted the 32,768 signs: 1,726 of them are as far from 0 as what Darwin found.
    p = 1726 / 32768
    spread = math.sqrt(p * (1 - p) / ROUNDS)
    assert sign_flip_test(MAIZE, seed=1) == pytest.approx(p, abs=5 * spread)
    assert sign_flip_test([-x for x in MAIZE], seed=1) == pytest.approx(p, abs=5 * spread)
    assert sign_flip_test(MAIZE, seed=1) == sign_flip_test(MAIZE, seed=1)


def test_sign_flip_matches_all_signs_of_fractions():
    differences = [0.1, 0.2, 0.3, -0.1, 0.7, 0.05, 0.4]
    sums = [abs(sum(s * x for s, x in zip(signs, differences, strict=True)))
            for signs in itertools.product((-1, 1), repeat=7)]
    p = sum(x >= sum(differences) - 1e-9 for x in sums) / len(sums)
    spread = math.sqrt(p * (1 - p) / ROUNDS)
    assert sign_flip_test(differences, seed=3) == pytest.approx(p, abs=5 * spread)
    assert sign_flip_test([0.0, 0.0], seed=3) == 1 == sign_flip_test([2.5], seed=3)


def test_bootstrap_interval_is_the_normal_one_for_equal_sizes():
    draw = random.Random(0)
    bits = [draw.gauss(200, 30) for _ in range(400)]
    low, high = bootstrap_interval(bits, [100] * 400, seed=0)
    margin = 1.96 * statistics.pstdev(bits) / math.sqrt(400) / 100
    mean = statistics.fmean(bits) / 100
    assert (low, high) == pytest.approx((mean - margin, mean + margin), abs=0.05 * margin)


def test_holm_matches_rs_p_adjust():
    # p.adjust(c(0.04, 0.01, 0.03, 0.02, 0.05), "holm")
    found = holm([0.04, 0.01, 0.03, 0.02, 0.05])
    assert found == pytest.approx([0.09, 0.05, 0.09, 0.08, 0.09])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


# ---- The report ----------------------------------------------------------------------------------


def score(right: int, total: int = 100, name: str = "idiom", **more) -> Score:
    return Score(name, [i < right for i in range(total)], **more)


def test_verdicts():
    first = [score(50), score(50, name="law"), score(50, name="loops", lower_is_better=True),
             score(50, name="parable"), Score("bits", [250.0] * 20, [100] * 20)]
    second = [score(70), score(50, name="law"), score(80, name="loops", lower_is_better=True),
              score(57, name="parable"), Score("bits", [230.0] * 20, [100] * 20)]
    found = compare(first, second, seed=0)
    assert {name: d.verdict("B") for name, d in found.items()} == {
        "idiom": "B is better", "law": "no difference shown", "loops": "B is worse",
        "parable": "B is better", "bits": "B is better",
    }
    assert found["idiom"].change == "+20.0 points" and found["bits"].change == "-0.200"
    # 0 against 6 has p = 0.03: alone a difference, not among ten tests
    alone = compare([score(50)], [score(56)], seed=0)["idiom"]
    assert alone.p == alone.adjusted == pytest.approx(0.03125)
    assert alone.verdict("B") == "B is better"
    tests = [score(50, name=str(i)) for i in range(9)]
    among = compare([score(50), *tests], [score(56), *tests], seed=0)["idiom"]
    assert among.adjusted == pytest.approx(0.3125)
    assert among.verdict("B") == "no difference shown after Holm's correction"


def test_a_task_that_only_one_has_is_not_compared(tmp_path):
    columns = {"A": [score(30, chance=0.25), score(90, name="identity")],
               "B|C": [score(80, name="identity")]}
    rows = report_rows(columns, seed=0)
    assert rows[0][2:7] == ["A: score", "95 % interval", "B|C: score", "95 % interval", "chance"]
    assert rows[1] == ["idiom", "100", "30.0%", "21.9% – 39.6%", "–", "", "25.0%", "", "", "",
                       "not compared"]
    assert rows[2][-4:] == ["-10.0 points", "0.002", "0.002", "B|C is worse"]
    write_report(tmp_path / "report.md", rows, columns, ["seed: 0"], "report.png")
    text = (tmp_path / "report.md").read_text("utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4 and {line.count("|") for line in table} == {12}
    assert "- seed: 0\n" in text and "](report.png)" in text and "Holm" in text


def test_the_chart_shows_every_score(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: shown.append(figure))
    subjects = [score(30, name=f"exam: {i}", chance=0.25) for i in range(13)]
    scores = [score(40, chance=0.25), Score("bits per byte: law", [250.0] * 9, [100] * 9)]
    draw_chart({"A": scores, "B": scores[:1]}, 0, tmp_path / "chart.png")
    draw_chart({"A": [*subjects, score(30, name="exam: total")]}, 0, tmp_path / "chart.png")
    rates, bits = shown[0].axes
    assert [text.get_text() for text in rates.get_yticklabels()] == ["idiom"]
    assert [text.get_text() for text in bits.get_yticklabels()] == ["law"]
    dots = [line.get_xdata()[0] for line in rates.get_lines() if line.get_marker() == "o"]
    assert dots == [40, 40]
    (chance,) = [line for line in rates.get_lines() if line.get_label() == "guessing"]
    assert list(chance.get_xdata()) == [25]
    legend = [text.get_text() for text in shown[0].legends[0].get_texts()]
    assert legend == ["A", "B", "guessing"]
    (total,) = shown[1].axes  # thirteen subjects are too many
    assert [text.get_text() for text in total.get_yticklabels()] == ["exam: total"]
