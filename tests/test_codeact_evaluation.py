"""`evaluate.py --task codeact` against a model that answers from a script: known scores."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
from benchmarks.scripted_endpoint import MODEL, Reply, Script, scripted_endpoint
from codeact_pipeline import EXAMPLE, tools
from dataset.tasks import TasksError, read_items, read_tasks
from training.agent_measurement import measure_agent

ROOT = Path(__file__).parents[1]
OWN = 2.144729885888985
CODE = {
    "right": "```python\nprint({})\n```",
    "after a slip": "```python\nprint(answer)\n```",  # NameError, and mended
    "invalid": "```python\nprint(\n```",
    "no code": None,
    "wrong answer": "```python\nprint({})\n```",
    "endless": "```python\nprint({})\n```",
}


def item(number: int, behaviour: str, split: str = "numbers", **changes) -> dict:
    """The question tells the scripted model what to do."""
    questions = changes.pop("questions", [behaviour])
    return {
        "task": "codeact", "kind": "agent", "split": split, "family": "arithmetic",
        "name": "expression", "language": "en", "mistaken": None, **changes,
        "questions": [{"content": f"{number} {text}", "numbers": [1000 + number], "texts": [],
                       "verdict": ""} for text in questions],
    }


def scripted(messages: list[dict]) -> Reply | str:
    """Acts out the behaviour that the last question names."""
    asked = [m["content"] for m in messages if m["role"] == "user"]
    own = [text for text in asked if not text.startswith("The code has been executed")]
    number, _, behaviour = own[-1].partition(" ")
    observed = messages[-1]["content"] if messages[-1]["content"] != own[-1] else ""
    value = 1000 + int(number)
    if behaviour == "endless" and "No more code" not in observed:
        return CODE["right"].format(value)
    if behaviour == "after a slip" and not observed:
        return CODE["after a slip"]
    if "error" in observed or (not observed and behaviour != "no code"):
        if behaviour == "invalid":
            return CODE["invalid"] if not observed else "I cannot do it."
        return CODE["right"].format(value)
    return f"It is {value + (behaviour == 'wrong answer')}."


def scores_of(items: list[dict], **options) -> tuple[dict, list[dict], Script]:
    script = Script(scripted)
    with scripted_endpoint(script) as url:
        scores, runs = measure_agent(items, url, None, tools, **options)
    return {score.name: score for score in scores}, runs, script


def test_each_behaviour_gets_its_score():
    behaviours = ("right", "right", "after a slip", "invalid", "no code", "wrong answer", "endless")
    scores, runs, _ = scores_of(
        [item(i, behaviour) for i, behaviour in enumerate(behaviours)], max_steps=3,
        conversations=2)
    values = {name: score.values for name, score in scores.items()}
    assert values["new numbers, first code valid"] == [1, 1, 1, 0, 0, 1, 1]
    assert values["new numbers, first code runs"] == [1, 1, 0, 0, 0, 1, 1]
    # The answer without code happens to be right: the report says how it came about.
    assert values["new numbers, right: total"] == [1, 1, 1, 0, 1, 0, 1]
    assert values["new numbers, right: arithmetic"] == values["new numbers, right: total"]
    assert values["new numbers, steps a question"] == [1, 1, 2, 1, 0, 1, 3]
    steps = scores["new numbers, steps a question"]
    assert steps.value == pytest.approx(9 / 7) and steps.unit == "steps"
    assert runs[2]["outputs"][0].startswith("Traceback") and runs[2]["right"]
    assert runs[5]["answers"] == ["It is 1006."]


def test_the_first_code_of_recovery_items_is_given_and_not_the_models():
    items = [item(i, "right", "recovery", mistaken="print(undefined)") for i in range(3)]
    scores, runs, script = scores_of(items)
    assert scores["after an error, right: total"].values == [True] * 3
    assert scores["after an error, code after the error runs"].values == [True] * 3
    assert scores["after an error, steps a question"].values == [1] * 3
    first = script.requests[0]["messages"]
    assert [m["role"] for m in first] == ["system", "user", "assistant", "user"]
    assert first[2]["content"] == "```python\nprint(undefined)\n```"
    assert "NameError: name 'undefined' is not defined" in first[3]["content"]
    assert "restarted" not in first[3]["content"]
    assert all(run["said"][0].startswith("```python\nprint(10") for run in runs)


def test_all_questions_of_an_item_must_be_answered_rightly():
    both = [item(1, "", questions=["right", "right"]),
            item(2, "", questions=["right", "wrong answer"])]
    scores, runs, _ = scores_of(both)
    assert scores["new numbers, right: total"].values == [True, False]
    assert scores["new numbers, steps a question"].sizes == [2, 2]
    assert [len(run["answers"]) for run in runs] == [2, 2]


def test_variables_live_on_within_an_item_and_not_beyond():
    def reply(messages):
        last = messages[-1]["content"]
        if last.startswith("The code"):
            return f"It says {last.splitlines()[-1]}."
        return {"1": "```python\nx = 1001\nprint(x)\n```"}.get(
            last.split()[0], "```python\nprint('x' in globals())\n```")

    def asking(*texts):
        return {**item(0, ""), "questions": [
            {"content": text, "numbers": [], "texts": [says], "verdict": ""}
            for text, says in texts]}

    script = Script(reply)
    with scripted_endpoint(script) as url:
        scores, _ = measure_agent(
            [asking(("1 set", "1001"), ("2 there?", "True")), asking(("2 there?", "False"))],
            url, None, tools, conversations=1)
    assert scores[-2].name == "new numbers, right: total" and scores[-2].values == [True, True]


def test_the_specifications_question_with_the_tool():
    replies = {
        "system": "```python\nfrom math import *\n\ndef f(x):\n    return x * log(x)\n\n"
                  "print(derivative(f, pi))\n```",
    }

    def reply(messages):
        last = messages[-1]["content"]
        return replies["system"] if last == EXAMPLE else f"It is {last.splitlines()[-1]}."

    own = {**item(0, ""), "questions": [
        {"content": EXAMPLE, "numbers": [OWN], "texts": [str(OWN)], "verdict": ""}]}
    with scripted_endpoint(Script(reply)) as url:
        _, (run,) = measure_agent([own], url, None, tools)
    assert run["right"] and run["outputs"] == [f"{OWN}\n"]


# ---- The script ----------------------------------------------------------------------------------


def write(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in items), "utf-8")
    return path


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "evaluate.py", "--output", str(folder / "report.md"), *options], cwd=ROOT,
        capture_output=True, encoding="utf-8", timeout=200)


def test_the_report_has_the_agents_scores_and_every_run(tmp_path):
    items = [item(0, "right"), item(1, "invalid"), item(2, "right", "phrasings"),
             item(3, "right", "recovery", mistaken="1/0")]
    data = write(tmp_path / "items.jsonl", items)
    with scripted_endpoint(Script(scripted)) as url:
        done = run(tmp_path, "--task", "codeact", "--base_url", f"{url}/v1",
                   "--agent_data", str(data))
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text("utf-8")
    assert "| new numbers, right: total | 2 | 50.0% | 9.5% – 90.5% |" in report
    assert "| new phrasings, first code valid | 1 | 100.0% |" in report
    assert "| after an error, right: total | 1 | 100.0% |" in report
    assert "| after an error, steps a question | 1 | 1.000 | 1.000 – 1.000 |" in report
    assert f"agent_data: {data} (SHA-256 " in report
    lines = (tmp_path / "report.jsonl").read_text("utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    assert [one["right"] for one in runs] == [True, False, True, True]
    assert {one["model"] for one in runs} == {MODEL}
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_two_agents_are_compared_item_by_item(tmp_path):
    data = write(tmp_path / "items.jsonl", [item(i, "right") for i in range(12)])

    def poor(messages):
        return "I do not know."

    with scripted_endpoint(Script(scripted)) as good, scripted_endpoint(Script(poor)) as bad:
        done = run(tmp_path, "--task", "codeact", "--base_url", f"{good}/v1", "--compare",
                   f"{bad}/v1", "--agent_data", str(data), "--limit", "8")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text("utf-8")
    (line,) = (line for line in report.splitlines() if "right: total" in line)
    assert "| 8 | 100.0% |" in line and "-100.0 points" in line and "is worse |" in line


@pytest.mark.parametrize("options, complaint", [
    (("--task", "codeact"), "needs a served model: --base_url"),
    (("--task", "codeact", "--base_url", "http://127.0.0.1:9/v1"), "nothing answers at"),
    (("--agent_conversations", "0"), "--agent_conversations must be at least 1"),
])
def test_what_cannot_be_is_one_line(tmp_path, options, complaint):
    data = write(tmp_path / "items.jsonl", [item(0, "right")])
    done = run(tmp_path, "--agent_data", str(data), *options)
    assert done.returncode == 1 and complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == [data]


def test_items_that_are_none_are_named(tmp_path):
    broken = item(0, "right")
    del broken["questions"][0]["numbers"]
    path = write(tmp_path / "items.jsonl", [item(1, "right"), broken])
    with pytest.raises(TasksError, match=r"items.jsonl:2: has a question without"):
        read_tasks(path, "python -m dataset.codeact")
    with pytest.raises(FileNotFoundError, match="`python -m dataset.codeact` makes it"):
        read_tasks(tmp_path / "none.jsonl", "python -m dataset.codeact")


def test_an_endpoint_that_fails_for_good_ends_in_one_line(tmp_path):
    data = write(tmp_path / "items.jsonl", [item(i, "right") for i in range(3)])
    with scripted_endpoint(Script(lambda messages: Reply("broken", 404))) as url:
        done = run(tmp_path, "--task", "codeact", "--base_url", f"{url}/v1", "--agent_data",
                   str(data))
    assert done.returncode == 1 and "answers with status 404: " in done.stderr
    assert done.stderr.endswith("broken\n")
    assert len(done.stderr.strip().splitlines()) == 1


def test_all_tasks_are_those_of_before():
    assert evaluate.Settings().tasks == "all"
    with pytest.raises(FileNotFoundError, match="dataset.starter"):
        read_items(["all"], ROOT / "no.jsonl", ROOT / "neither.jsonl", None)
