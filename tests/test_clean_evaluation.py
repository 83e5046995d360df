"""No evaluation item stands in the training text: searched without `dataset/decontaminate.py`.

Everything here reads what a user gets, records and items, and compares it by its letters and digits
in its own way. Where the built files lie in dataset/, they are searched, too.
"""
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from dataset.decontaminate import Decontaminator
from dataset.dialogues import chat, test_item as chat_item

DATASET = Path(__file__).parents[1] / "dataset"
OPERATORS = {"加": "+", "减": "-"}
HAN_RUN, LETTER_RUN = 24, 72  # characters that two texts do not share by chance
FEW = 8  # Han characters, or three times as many letters


def plain(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def is_long(text: str) -> bool:
    return sum(3 if "一" <= character <= "鿿" else 1 for character in text) >= 3 * FEW


def asked(question: str) -> str:
    """A question without marks and spaces, but with the signs of its sum."""
    question = re.sub(r"(?<=\d) *[*x] *(?=\d)", "×", question.lower()).replace("/", "÷")
    return "".join(c for c in question if c.isalnum() or c in "+-×÷")


def sums_of(texts: Iterable[str]) -> set[tuple]:
    found = set()
    for text in texts:
        if "=" in text or "等于" in text:
            for a, sign, b in re.findall(r"(\d+)([-+加减])(\d+)(?==\d|等于\d)", text.replace(" ", "")):
                pair = (int(a), int(b))
                sign = OPERATORS.get(sign, sign)
                found.add((sign, *(sorted(pair) if sign == "+" else pair)))
    return found


def needles(item: dict) -> list[str]:
    """What of an item that is no conversation must not stand anywhere, short or long."""
    if item["task"] == "poem_author":
        return item["question"].split("\n")[1:]
    if item["task"] == "parable":
        return [item["question"].rpartition("\n")[0]]
    if item["task"] == "poem_next":
        line, right = item["question"].split("”的下一句")[0], item["choices"][item["answer"]]
        return [right if is_long(plain(right)) else line + right]
    if item["kind"] == "choice":
        return [item["choices"][item["answer"]]]
    if item["source"] == "everyday":  # sentences, and sentences with their English
        parts = [re.split(r"(?<=[。！？…”]) (?=[A-Z\"'])", line) for line in item["text"].split("\n")]
        return [part for line in parts for part in line]
    if item["source"] == "saying":
        return [line.removeprefix("歇后语：") for line in item["text"].split("\n")]
    if item["source"] == "poem":
        return [*item["text"].split("\n")[1:], item["text"]]
    return [item["text"]]


def says(reply: str, item: dict) -> bool:
    """Whether a reply is the one that a follow-up asks for: of 鹅, not of 企鹅."""
    first, *others = item["accept_all"]
    return bool(re.search(f"(?<![一-鿿]){re.escape(first)}", reply)) and all(
        word in reply for word in others)


def standing(texts: list[str], wanted: set[str], length: int) -> set[str]:
    """Those of `wanted`, all of `length` characters, that stand in a text."""
    return {text[i : i + length] for text in texts for i in range(len(text) - length + 1)
            if text[i : i + length] in wanted}


def found_in_training(items: list[dict], texts: list[str], chats: list[list[dict]]) -> list[dict]:
    """The items that training contains."""
    training = texts + ["\n".join(message["content"] for message in chat) for chat in chats]
    taught_sums = sums_of(training)
    questions = {asked(m["content"]) for chat in chats for m in chat if m["role"] == "user"}
    next_turns: dict[str, list[tuple[str, str]]] = {}  # after a reply: (question, reply)
    for messages in chats:
        said = [message["content"] for message in messages]
        for before, question, after in zip(said[1::2], said[2::2], said[3::2]):
            next_turns.setdefault(before, []).append((question, after))

    training = [plain(text) for text in training]
    runs: dict[int, dict[str, list[int]]] = {HAN_RUN: {}, LETTER_RUN: {}}
    short: dict[str, list[tuple[str, int]]] = {}  # by their first characters
    found: set[int] = set()
    for number, item in enumerate(items):
        if item["kind"] == "chat":
            *before, last = (message["content"] for message in item["conversations"])
            if item["task"] == "follow_up":
                if any(says(after, item) and all(word in question for word in item["accept_all"]
                                                 if word in last)
                       for question, after in next_turns.get(before[-1], ())):
                    found.add(number)
            elif asked(last) in questions:
                found.add(number)
            elif item.get("held_out") == "pair":
                a, sign, b = re.search(r"(\d+)([-+加减])(\d+)", last.replace(" ", "")).groups()
                if sums_of([f"{a}{sign}{b}=1"]) & taught_sums:
                    found.add(number)
            continue
        for needle in map(plain, needles(item)):
            length = HAN_RUN if len(re.findall("[一-鿿]", needle)) * 2 > len(needle) else LETTER_RUN
            for i in range(len(needle) - length + 1):
                runs[length].setdefault(needle[i : i + length], []).append(number)
            if len(needle) < length and is_long(needle):
                short.setdefault(needle[:FEW], []).append((needle, number))
    for length, wanted in runs.items():
        for run in standing(training, set(wanted), length):
            found.update(wanted[run])
    everything = "\n".join(training)
    for head in standing(training, set(short), FEW):
        found.update(number for needle, number in short[head] if needle in everything)
    return [items[number] for number in sorted(found)]


def read(path: Path, name: str) -> list:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)[name] for line in file]


@pytest.mark.slow
def test_nothing_in_the_built_files_is_trained():
    names = ("eval_starter.jsonl", "pretrain_starter.jsonl", "sft_starter.jsonl")
    if not all((DATASET / name).exists() for name in names):
        pytest.skip("python -m dataset.starter has not been run")
    items = [json.loads(line) for line in (DATASET / names[0]).open(encoding="utf-8")]
    texts, chats = read(DATASET / names[1], "text"), read(DATASET / names[2], "conversations")
    found = found_in_training(items, texts, chats)
    assert not found, (f"{Counter(item['task'] for item in found)}; "
                       "if the files are of an older version: python -m dataset.starter")
    assert {item["task"] for item in items} == {
        "arithmetic", "bits_per_byte", "follow_up", "identity", "idiom", "parable", "poem_author",
        "poem_next", "refusal"}


# ---- leaks planted one by one

POEM = ["黄沙漠漠起边城，白马将军夜点兵。", "万里寒云连雪岭，一声羌笛落梅声。"]
STORY = "从前有个卖伞的老人，晴天他为雨伞发愁，雨天他又为布鞋发愁，后来邻居劝他换一个想法。"
CODE = ("def widest(rows):\n    best = max(rows, key=lambda row: row.right - row.left)\n"
        "    return best.right - best.left, best.name.strip().title()\n")
ENGLISH = ("The reader keeps one page in memory and asks for the next only when every line of the "
           "page before has been handed out to whoever waited for it.")
TEXT = {"task": "bits_per_byte", "kind": "text", "source": "everyday"}
LONG = "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"
CHOICE = {"kind": "choice", "question": "?", "choices": ["甲", "乙"], "answer": 0}
SUM = chat_item("arithmetic", "37 + 25 = ?", accept=["62"], match="number", held_out="pair",
                passages=["37+25=62。"])
FOLLOW_UP = chat_item("follow_up", "法国的首都是哪里？", "法国的首都是巴黎。", "那德国呢？",
                      accept_all=["德国", "柏林"], passages=["德国的首都是柏林。"])
LEAKS = {
    "short sentence": (TEXT | {"text": "我家门前有两棵枣树。"}, "他说，我家门前有两棵枣树！"),
    "in a conversation": (TEXT | {"text": "我家门前有两棵枣树。"},
                          chat("translation", "翻译：I have trees", "我家门前，有两棵枣树。")),
    "short English": (TEXT | {"text": "My uncle mends old wall clocks."},
                      "MY UNCLE mends\nold wall clocks"),
    "English": (TEXT | {"text": ENGLISH}, f"# {ENGLISH[20:110]}"),
    "code": (TEXT | {"text": CODE}, "x = 1\n" + CODE[10:].replace("    ", "\t")),
    "a sentence with its English": (
        TEXT | {"text": "a b", "passages": ["我家门前有两棵枣树。", "My uncle mends old wall clocks."]},
        "My uncle mends old wall clocks."),
    "line of a poem": (CHOICE | {"task": "poem_author", "passages": POEM}, f"诗云：“{POEM[1]}”"),
    "next line": (CHOICE | {"task": "poem_next", "passages": POEM[1:]},
                  chat("poem", "下一句是什么？", POEM[1])),
    "definition": (CHOICE | {"task": "idiom", "passages": ["形容做事毫无头绪。"]},
                   "“乱七八糟”的意思是：形容做事毫无头绪。"),
    "story": (CHOICE | {"task": "parable", "passages": [STORY]}, "故事：" + STORY[6:38]),
    "question, other marks": (chat_item("identity", "请问，你是谁呀？", accept=["缘梦"]),
                              chat("mixed", "你好", "你好！", "请问你是谁呀", "我是缘梦。")),
    "question of a sum": (chat_item("arithmetic", "3×4=？", accept=["12"]),
                          chat("arithmetic", "3 x 4", "3×4=12。")),
    "sum": (SUM, "1+1=2\n25+37=62\n"),
    "sum in words": (SUM, "37加25等于62。"),
    "sum in an answer": (SUM, chat("arithmetic", "小明有37个，又买了25个呢？", "37+25=62，一共有62个。")),
    "follow-up": (FOLLOW_UP, chat("follow_up", "法国首都？", "法国的首都是巴黎。", "德国呢",
                                  "德国的首都是柏林。")),
    "refusal": (chat_item("refusal", "今天会下雨吗？", accept=["不知道"]),
                chat("refusal", "今天会下雨吗", "对不起，我不知道。")),
} | {f"run that begins {i} characters on": (TEXT | {"text": LONG}, "别" * i + LONG[i : i + 24])
     for i in range(18)}
HARMLESS = [
    (SUM, "37-25=12，137+25=162，37+256=293，x37+25"),
    (FOLLOW_UP, chat("facts", "德国的首都是哪里？", "德国的首都是柏林。")),
    (FOLLOW_UP, "法国的首都是巴黎。\n德国的首都是柏林。"),  # plain sentences teach no follow-up
    (TEXT | {"text": LONG}, LONG[:12] + "，又，" + LONG[12:24]),
    (chat_item("arithmetic", "3-4等于几？", accept=["-1"]), chat("arithmetic", "3+4等于几？", "7")),
    (CHOICE | {"task": "poem_next", "passages": POEM[1:]}, f"《边城》的开头是“{POEM[0]}”"),
]


def cleaned(item: dict, training: object) -> list[dict]:
    check = Decontaminator([item])
    if isinstance(training, str):
        check.read_text(training)
    else:
        check.read_chat(training.messages)
    return check.clean()[0]


@pytest.mark.parametrize("item, training", LEAKS.values(), ids=LEAKS)
def test_a_planted_leak_is_removed(item, training):
    assert cleaned(item, training) == []
    assert cleaned(item, "这里什么也没有。") == [
        {name: value for name, value in item.items() if name != "passages"}]


@pytest.mark.parametrize("item, training", HARMLESS)
def test_what_is_no_leak_stays(item, training):
    assert len(cleaned(item, training)) == 1


@pytest.mark.parametrize("item", [
    TEXT | {"text": "我不知道。"}, TEXT | {"text": "Thank you."}, TEXT | {"text": "？！……"},
    CHOICE | {"task": "idiom", "passages": ["犹言败坏。"]},
    CHOICE | {"task": "idiom", "passages": ["形容做事毫无头绪。"], "choices": ["甲", "甲"]},
])
def test_what_nobody_can_judge_is_not_asked(item):
    assert cleaned(item, "") == []
