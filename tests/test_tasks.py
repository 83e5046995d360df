"""The questions of a report card: reading, drawing and judging them."""

import json

import pytest

from dataset.tasks import TasksError, draw, is_right, loops, read_exams, read_tasks

CHOICE = {
    "task": "idiom", "kind": "choice", "question": "成语：", "choices": ["甲", "乙"], "answer": 1,
}
CHAT = {
    "task": "identity", "kind": "chat", "accept": ["缘梦"],
    "conversations": [{"role": "user", "content": "你是谁"}],
}
TEXT = {"task": "bits_per_byte", "kind": "text", "source": "law", "text": "第一条 为了保护。"}
CEVAL = "id,question,A,B,C,D,answer\n"
CMMLU = ",Question,A,B,C,D,Answer\n"


# ---- Judging -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "reply", "right"),
    [
        ({"accept": ["48"], "match": "number"}, "3+45=48。", True),
        ({"accept": ["48"], "match": "number"}, "48+3=51", False),
        ({"accept": ["48"], "match": "number"}, "不知道", False),
        ({"accept": ["-3"], "match": "number"}, "等于-3。", True),
        ({"accept_all": ["杜甫", "唐代"]}, "杜甫是唐代诗人。", True),
        ({"accept_all": ["杜甫", "唐代"]}, "李白是唐代诗人。", False),
        ({"accept": ["缘梦"]}, "我是缘梦。", True),
        ({"accept": ["缘梦"]}, "我是谁？", False),
    ],
)
def test_judgement(item, reply, right):
    assert is_right(item, reply) is right


def test_loops():
    assert loops("好的", ended=False)
    assert loops("春天春天春天来了", ended=True)
    assert not loops("春天来了，春天又走了。", ended=True)
    assert not loops("1000000", ended=True)
    assert loops("1, 1, 1, 1, 1", ended=True)


# ---- Reading -------------------------------------------------------------------------------------


def write(path, items) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")


def test_items_come_by_task(tmp_path):
    write(tmp_path / "eval.jsonl", [CHOICE, TEXT, CHAT, {**CHOICE, "answer": 0}])
    tasks = read_tasks(tmp_path / "eval.jsonl")
    assert list(tasks) == ["idiom", "bits_per_byte", "identity"]
    assert [item["answer"] for item in tasks["idiom"]] == [1, 0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([], "names no task"),
        ({"kind": "text"}, "names no task"),
        ({**CHOICE, "kind": "riddle"}, "kind is 'riddle'"),
        ({**CHOICE, "question": ""}, "has no question"),
        ({**CHOICE, "choices": ["甲", ""]}, "an empty choice"),
        ({**CHOICE, "answer": 2}, "answer 2 is none"),
        ({**TEXT, "text": 3}, "has no text"),
        ({**CHAT, "accept": None, "conversations": [{"role": "user"}]}, "without role or content"),
        ({key: CHAT[key] for key in CHAT if key != "accept"}, "neither accept nor accept_all"),
        ({**TEXT, "task": "idiom"}, "items of another kind"),
    ],
)
def test_a_broken_item_is_named_by_its_line(item, message, tmp_path):
    write(tmp_path / "eval.jsonl", [CHOICE, item])
    with pytest.raises(TasksError, match=message) as error:
        read_tasks(tmp_path / "eval.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'eval.jsonl'}:2: ")
    assert "\n" not in str(error.value)


def test_what_is_not_json_and_what_is_not_there(tmp_path):
    path = tmp_path / "eval.jsonl"
    for content in (b'{"task": \n', b'"\xff\xfe"\n'):
        path.write_bytes(content)
        with pytest.raises(TasksError, match=r"eval\.jsonl:1: is not JSON"):
            read_tasks(path)
    path.write_bytes(b"")
    with pytest.raises(TasksError, match="is empty"):
        read_tasks(path)
    with pytest.raises(FileNotFoundError, match="does not exist; `python -m dataset.starter`"):
        read_tasks(tmp_path / "other.jsonl")


# ---- C-Eval and CMMLU ----------------------------------------------------------------------------


def test_both_formats_are_read(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val/law_val.csv").write_text(
        CEVAL + '0,"下列____, 正确的是",甲,乙,"丙, 丁",戊,C\n1,第二题,1,2,3,4,A\n', "utf-8"
    )
    (tmp_path / "val/law_dev.csv").write_text(  # a dev file explains its answers
        "id,question,A,B,C,D,answer,explanation\n0,三,1,2,3,4,D,因为\n", "utf-8"
    )
    (tmp_path / "anatomy.csv").write_text(CMMLU + '0,"两\n行",甲,乙,丙,丁,B\n\n', "utf-8-sig")
    items, notes = read_exams(tmp_path)
    assert [(item["subject"], item["answer"]) for item in items] == [
        ("anatomy", 1), ("law", 3), ("law", 2), ("law", 0),
    ]
    assert items[0]["question"] == "两\n行\n答案：" and items[2]["choices"][2] == "丙, 丁"
    assert all(item["kind"] == "choice" and item["task"] == "exam" for item in items)
    assert notes == []


def test_a_file_without_answers_is_left_out_and_said(tmp_path):
    (tmp_path / "law_test.csv").write_text("id,question,A,B,C,D\n0,一,1,2,3,4\n", "utf-8")
    with pytest.raises(TasksError, match="no question with an answer"):
        read_exams(tmp_path)
    (tmp_path / "law_val.csv").write_text(CEVAL + "0,一,1,2,3,4,A\n", "utf-8")
    items, notes = read_exams(tmp_path)
    assert len(items) == 1
    assert notes == [f"{tmp_path / 'law_test.csv'} has no column of answers, so it is left out"]


def test_broken_rows_are_named_by_file_and_line(tmp_path):
    (tmp_path / "a.csv").write_text(
        CEVAL + '0,"一\n行",1,2,3,4,A\n1,二,1,2,3,4\n2,三,1,,3,4,B\n3,四,1,2,3,4,E\n', "utf-8"
    )
    (tmp_path / "b.csv").write_text("id,text\n0,一\n", "utf-8")
    (tmp_path / "c.csv").write_bytes((CMMLU + "0,汉字,1,2,3,4,A\n").encode("gbk"))
    (tmp_path / "d.csv").write_text(CMMLU + '0,"一"二,1,2,3,4,A\n', "utf-8")
    with pytest.raises(TasksError) as error:
        read_exams(tmp_path)
    lines = str(error.value).split("\n")
    starts = ("a.csv:4: has 6 columns", "a.csv:5: has an empty", "a.csv:6: answer is 'E'",
              "b.csv:1: has no column a", "c.csv: is not UTF-8", "d.csv:2: ")
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(str(tmp_path / start))


def test_a_hundred_broken_rows_are_ten_lines(tmp_path):
    (tmp_path / "a.csv").write_text(CMMLU + "0,一,1,2,3,4,X\n" * 100, "utf-8")
    with pytest.raises(TasksError) as error:
        read_exams(tmp_path)
    assert str(error.value).count("\n") == 10 and str(error.value).endswith("… and 90 more")


def test_no_exam_is_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "other"):
        with pytest.raises(FileNotFoundError, match="holds no .csv file"):
            read_exams(folder)


# ---- Drawing -------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_items_in_the_order_of_the_file():
    items = [{**CHOICE, "question": str(i)} for i in range(200)]
    drawn = draw(items, 50, seed=1)
    assert len(drawn) == 50 and drawn == draw(items, 50, seed=1)
    assert drawn == [item for item in items if item in drawn]
    assert drawn != items[:50] and drawn != draw(items, 50, seed=2)
    # not by place: half of what is drawn from the second half of the items, about
    late = sum(int(item["question"]) >= 100 for item in drawn)
    assert 12 <= late <= 38
    # what else is there changes nothing, nor does another order
    more = [TEXT, *reversed(items)]
    assert draw(more, 50, seed=1)[1:] == drawn[::-1]
    assert draw(items, 0, seed=1) == draw(items, 500, seed=1) == items


def test_the_limit_is_of_each_source_and_subject():
    items = [{**TEXT, "source": source, "text": str(i)} for i in range(5) for source in "ab"]
    items += [{**CHOICE, "subject": subject, "answer": i % 2} for i in range(5) for subject in "xy"]
    drawn = draw(items, 2, seed=0)
    assert [item.get("source", item.get("subject")) for item in drawn].count("a") == 2
    assert len(drawn) == 8
