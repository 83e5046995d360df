"""The questions of a report card: reading them, drawing some of them, and judging replies.

An item is a dictionary with a `task`, a `kind` and what its kind needs (`FIELDS`): a text to be
predicted, a question with choices, a conversation with the facts that its answer must contain, or
questions to an agent that runs code.
"""

import csv
import hashlib
import heapq
import json
import re
from collections import defaultdict
from pathlib import Path

from dataset.text import bucket

FIELDS = {
    "text": {"source": str, "text": str},
    "choice": {"question": str, "choices": list, "answer": int},
    "chat": {"conversations": list},
    "agent": {"questions": list, "split": str, "family": str, "name": str, "language": str},
}
STARTER, AGENT_MAKER = "python -m dataset.starter", "python -m dataset.codeact"
EXAM, AGENT = "exam", "codeact"
LETTERS = "ABCD"
SHOWN_FAULTS = 10


class TasksError(ValueError):
    """The questions cannot be used; the message says where and why, a line for each fault."""


# ---- Reading -------------------------------------------------------------------------------------


def read_items(names: list[str], data: Path, agent_data: Path, exam_dir: Path | None
               ) -> tuple[dict[str, list[dict]], list[str]]:
    """The items of the tasks named, and what a report must say about where they come from.

    Args:
        names: of tasks; ["all"] stands for all but the agent's.
        data: the file of all tasks but the agent's, `agent_data` that of the agent's.
        exam_dir: a folder of C-Eval or CMMLU files, for the task `exam`.

    Raises:
        FileNotFoundError, ValueError: a file is not there or faulty, or has no task of that name.
    """
    tasks, notes = {}, []
    if names != [AGENT]:
        tasks = read_tasks(data)
        notes = [f"data: {data} (SHA-256 {digest(data)})"]
    if exam_dir:
        tasks[EXAM], left_out = read_exams(exam_dir)
        notes += [f"exam_dir: {exam_dir} (SHA-256 {digest(*sorted(exam_dir.rglob('*.csv')))})"]
        notes += left_out
    if AGENT in names:
        tasks |= read_tasks(agent_data, AGENT_MAKER)
        notes += [f"agent_data: {agent_data} (SHA-256 {digest(agent_data)})"]
    names = list(tasks) if names == ["all"] else names
    for name in names:
        if name not in tasks:
            raise ValueError(f"--tasks {name}: {data} holds {', '.join(tasks)}")
    return {name: tasks[name] for name in names}, notes


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def read_tasks(path: Path, made_by: str = STARTER) -> dict[str, list[dict]]:
    """Items by task, in the order of the file, which the command `made_by` makes.

    Raises:
        FileNotFoundError, TasksError: the file is not there, or a line of it is no item.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; `{made_by}` makes it")
    tasks: dict[str, list[dict]] = defaultdict(list)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                item = json.loads(line)
                fault = fault_of(item)
            except ValueError:
                fault = "is not JSON in UTF-8"
            if fault is None and tasks[item["task"]][:1]:
                if tasks[item["task"]][0]["kind"] != item["kind"]:
                    fault = f"task {item['task']!r} has items of another kind"
            if fault:
                raise TasksError(f"{path}:{number}: {fault}; `{made_by}` makes the file anew")
            tasks[item["task"]].append(item)
    if not tasks:
        raise TasksError(f"{path} is empty; `{made_by}` makes it")
    return dict(tasks)


def fault_of(item: object) -> str | None:
    """Why this is no item, or None."""
    if not isinstance(item, dict) or not isinstance(item.get("task"), str):
        return "names no task"
    if item.get("kind") not in FIELDS:
        return f"kind is {item.get('kind')!r}, not {', '.join(FIELDS)}"
    for name, type_ in FIELDS[item["kind"]].items():
        if not isinstance(item.get(name), type_) or item[name] in ("", []):
            return f"has no {name}"
    if item["kind"] == "choice":
        if not all(isinstance(choice, str) and choice for choice in item["choices"]):
            return "has an empty choice"
        if not 0 <= item["answer"] < len(item["choices"]):
            return f"answer {item['answer']} is none of the choices"
    if item["kind"] == "agent" and "mistaken" not in item:
        return "has no mistaken"
    if item["kind"] == "agent" and not all(
        isinstance(question, dict)
        and {"content", "numbers", "texts", "verdict"} <= question.keys()
        for question in item["questions"]
    ):
        return "has a question without content, numbers, texts or verdict"
    if item["kind"] == "chat":
        if "accept" not in item and "accept_all" not in item:
            return "has neither accept nor accept_all"
        for turn in item["conversations"]:
            if not isinstance(turn, dict) or not all(
                isinstance(turn.get(name), str) for name in ("role", "content")
            ):
                return "has a turn without role or content"
    return None


def read_exams(folder: Path) -> tuple[list[dict], list[str]]:
    """The rows of all C-Eval or CMMLU files below `folder`, and notes on files left out.

    Both benchmarks (arXiv 2305.08322 and 2306.09212) are CSV files with the columns question, A,
    B, C, D and answer, whatever their case. A subject is a file's name without its split.

    The choices are scored as texts, like those of the other tasks: not as the letters A to D
    after a list of all four. Small models cannot tie a letter to the text beside it and stay at
    chance, whatever they know (OLMES, arXiv 2406.08446). So these scores do not compare with
    published ones, which ask for the letter.

    Raises:
        FileNotFoundError: there is no such folder, or no CSV file in it.
        TasksError: rows are broken.
    """
    paths = sorted(folder.rglob("*.csv"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no .csv file of C-Eval or CMMLU")
    items, notes, faults = [], [], []
    for path in paths:
        subject = re.sub(r"_(dev|val|test)$", "", path.stem)
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.reader(file, strict=True)
                columns = {name.strip().lower(): i for i, name in enumerate(next(rows, []))}
                missing = {"question", *"abcd", "answer"} - columns.keys()
                if missing == {"answer"}:  # C-Eval keeps the answers of its test split to itself
                    notes.append(f"{path} has no column of answers, so it is left out")
                    continue
                if missing:
                    faults.append(f"{path}:1: has no column {min(missing)}; is it C-Eval's?")
                    continue
                for row in filter(None, rows):  # an empty line is no row
                    item = exam_item(row, columns, subject)
                    if isinstance(item, str):
                        faults.append(f"{path}:{rows.line_num}: {item}; mend or remove the row")
                    else:
                        items.append(item)
        except UnicodeDecodeError:
            faults.append(f"{path}: is not UTF-8; save it as UTF-8")
        except csv.Error as error:
            faults.append(f"{path}:{rows.line_num}: {error}; mend or remove the row")
    if faults:
        more = [f"… and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        raise TasksError("\n".join(faults[:SHOWN_FAULTS] + more))
    if not items:
        raise TasksError(f"{folder} holds no question with an answer")
    return items, notes


def exam_item(row: list[str], columns: dict[str, int], subject: str) -> dict | str:
    """The item that a row of an exam holds, or what is wrong with it."""
    if len(row) != len(columns):
        return f"has {len(row)} columns, the first line has {len(columns)}"
    question, *choices, answer = (
        row[columns[name]].strip() for name in ("question", *"abcd", "answer")
    )
    if not question or not all(choices):
        return "has an empty question or choice"
    if answer not in tuple(LETTERS):
        return f"answer is {answer!r}, not A, B, C or D"
    return {
        "task": EXAM, "kind": "choice", "subject": subject, "question": f"{question}\n答案：",
        "choices": choices, "answer": LETTERS.index(answer),
    }


# ---- Drawing -------------------------------------------------------------------------------------


def draw(items: list[dict], limit: int, seed: int) -> list[dict]:
    """At most `limit` items of each task (0: all), of each source, subject and split.

    The seed and an item's own content decide: the same ones are drawn whatever else is in the file.
    """
    parts: dict[tuple, list[dict]] = defaultdict(list)
    for item in items:
        part = (item["task"], item.get("source"), item.get("subject"), item.get("split"))
        parts[part].append(item)

    def rank(item: dict) -> int:
        return bucket(f"{seed} {json.dumps(item, sort_keys=True)}", 2**60)

    drawn = {
        id(item) for part in parts.values()
        for item in (heapq.nsmallest(limit, part, key=rank) if limit else part)
    }
    return [item for item in items if id(item) in drawn]


# ---- Judging -------------------------------------------------------------------------------------


def is_right(item: dict, reply: str) -> bool:
    """Whether a reply says what the item asks for."""
    if item.get("match") == "number":
        numbers = re.findall(r"-?\d+(?:\.\d+)?", reply)
        return bool(numbers) and numbers[-1] in item["accept"]
    if "accept_all" in item:
        return all(text in reply for text in item["accept_all"])
    return any(text in reply for text in item["accept"])


def loops(reply: str, ended: bool) -> bool:
    """Whether a reply runs in circles: it never ends, or says something three times in a row.

    A number may have as many zeros as it likes.
    """
    repeated = re.finditer(r"(.{2,}?)\1\1", reply, re.DOTALL)
    return not ended or any(not match[1].isdigit() for match in repeated)
