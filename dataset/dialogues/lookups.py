"""Questions on the entries of the sources: idioms, words, poems, laws, recipes, translation.

Answers are short and end with a sentence: a small model cannot memorise a dictionary, but it
learns what such an answer looks like. Recitation is kept rare, for it teaches confident invention.
"""
import random
from collections.abc import Iterator, Sequence

from dataset.dialogues import Chat, chat
from dataset.dialogues.facts import FOLLOW_UPS
from dataset.sources.dictionary import Idiom, Word
from dataset.sources.law import Article
from dataset.sources.poems import Author, Poem, unambiguous
from dataset.sources.prose import Pair, Recipe
from dataset.text import cut, finish

SHORT = 80


def some(entries: Sequence, count: int, rng: random.Random) -> list:
    return rng.sample(list(entries), min(count, len(entries)))


def idioms(entries: list[Idiom], count: int, rng: random.Random) -> Iterator[Chat]:
    taught = [idiom for idiom in entries if len(idiom.meaning) <= SHORT]
    for idiom in some(taught, count, rng):
        kind = rng.random()
        if kind < 0.72:
            form = rng.choice(("解释成语“{}”。", "“{}”是什么意思？", "成语{}是什么意思？", "{}是什么意思？",
                               "请解释一下“{}”这个成语。", "成语“{}”怎么理解？"))
            turns = [form.format(idiom.word), f"“{idiom.word}”的意思是：{idiom.meaning}"]
            if rng.random() < 0.25:
                other = rng.choice(taught)
                turns += [rng.choice(FOLLOW_UPS[:5]).format(f"“{other.word}”"),
                          f"“{other.word}”的意思是：{other.meaning}"]
            yield chat("idiom", *turns)
        elif kind < 0.82 and idiom.example and len(idiom.example) <= SHORT:
            yield chat("idiom", rng.choice(("用“{}”造句。", "用成语{}造一个句子。", "请用“{}”造句。"))
                       .format(idiom.word), idiom.example)
        elif kind < 0.91 and idiom.origin and len(idiom.origin) <= SHORT:
            yield chat("idiom", rng.choice(("成语“{}”出自哪里？", "“{}”的出处是什么？")).format(idiom.word),
                       f"“{idiom.word}”出自{idiom.origin.removeprefix('语出')}")
        else:
            yield chat("idiom", rng.choice(("用一个成语表达：{}", "哪个成语的意思是：{}"))
                       .format(idiom.meaning), f"{idiom.word}。")


def words(entries: list[Word], count: int, rng: random.Random) -> Iterator[Chat]:
    taught = [word for word in entries if len(word.meaning) <= SHORT]
    for word in some(taught, count, rng):
        if word.example and len(word.example) <= 60 and rng.random() < 0.25:
            yield chat("word", rng.choice(("用“{}”造句。", "用{}造一个句子。", "请用“{}”写一句话。"))
                       .format(word.word), word.example)
            continue
        form = rng.choice(("“{}”是什么意思？", "{}是什么意思？", "什么是“{}”？", "解释一下“{}”。", "“{}”怎么解释？"))
        turns = [form.format(word.word), f"“{word.word}”的意思是：{word.meaning}"]
        if rng.random() < 0.2:
            other = rng.choice(taught)
            turns += [rng.choice(FOLLOW_UPS[:5]).format(f"“{other.word}”"),
                      f"“{other.word}”的意思是：{other.meaning}"]
        yield chat("word", *turns)


def poems(entries: list[Poem], count: int, rng: random.Random) -> Iterator[Chat]:
    """Author, origin and next line of well-ranked poems, and a few short poems whole."""
    for poem in some(unambiguous(entries), count, rng):
        kind, first = rng.random(), poem.lines[0].rstrip("，。；！？")
        if kind < 0.4:
            form = rng.choice(("《{}》是谁写的？", "《{}》的作者是谁？", "谁写了《{}》？"))
            yield chat("poem", form.format(poem.title),
                       f"《{poem.title}》的作者是{poem.dynasty}的{poem.author}。")
        elif kind < 0.65:
            yield chat("poem", rng.choice(("“{}”出自哪首{}？", "“{}”是哪首{}里的句子？"))
                       .format(first, poem.kind), f"出自{poem.dynasty}{poem.author}的《{poem.title}》。")
        elif kind < 0.85:
            yield chat("poem", rng.choice(("“{}”的下一句是什么？", "请接下一句：{}")).format(first),
                       f"下一句是“{poem.lines[1]}”")
        elif sum(map(len, poem.lines)) <= 64:
            form = rng.choice(("背一下{}的《{}》。", "请写出{}的《{}》。", "默写{}的《{}》。"))
            yield chat("recitation", form.format(poem.author, poem.title),
                       f"《{poem.title}》 {poem.dynasty}·{poem.author}\n" + "\n".join(poem.lines))


def lives(entries: list[Author], count: int, rng: random.Random) -> Iterator[Chat]:
    for author in some([a for a in entries if a.role == "词人"], count, rng):
        life = cut(author.life, 110)
        if len(life) > 20:
            yield chat("life", rng.choice(("介绍一下{}的生平。", "{}的生平是怎样的？")).format(author.name),
                       f"{author.name}，{life}")


def laws(entries: list[Article], count: int, rng: random.Random) -> Iterator[Chat]:
    short = [article for article in entries
             if 15 < len(article.text) <= 90 and "\n" not in article.text]
    for article in some(short, count, rng):
        law = rng.choice((article.law, article.law.removeprefix("中华人民共和国")))
        form = rng.choice(("《{}》{}是怎么规定的？", "《{}》{}的内容是什么？"))
        yield chat("law", form.format(law, article.number),
                   f"《{law}》{article.number}规定：{finish(article.text)}")


def recipes(entries: list[Recipe], rng: random.Random) -> Iterator[Chat]:
    for recipe in entries:
        ingredients = f"{recipe.name}需要的原料有：{'、'.join(recipe.ingredients)}。"
        yield chat("recipe", rng.choice(("做{}需要什么原料？", "{}需要哪些材料？")).format(recipe.name),
                   ingredients)
        steps, length = [], 0
        for i, step in enumerate(recipe.steps, 1):
            length += len(step)
            if length > 260:
                break
            steps.append(f"{i}. {step}")
        if len(steps) == len(recipe.steps):
            question = rng.choice(("{}怎么做？", "教我做{}。", "{}的做法是什么？", "怎么做{}？"))
            turns = [question.format(recipe.name), "\n".join(steps)]
            if rng.random() < 0.3:
                turns += [rng.choice(("需要什么原料？", "要准备哪些材料？")), ingredients]
            yield chat("recipe", *turns)


def translations(entries: list[Pair], count: int, rng: random.Random) -> Iterator[Chat]:
    short = [pair for pair in entries if len(pair.chinese) <= 30]
    for pair in some(short, count, rng):
        if rng.random() < 0.5:
            yield chat("translation", rng.choice(("把“{}”翻译成英文。", "“{}”用英语怎么说？", "翻译成英文：{}"))
                       .format(pair.chinese), pair.english)
        else:
            form = rng.choice(("把“{}”翻译成中文。", "翻译成中文：{}", "Translate into Chinese: {}"))
            yield chat("translation", form.format(pair.english), pair.chinese)


def sayings(entries: list[tuple[str, str]], count: int, rng: random.Random) -> Iterator[Chat]:
    for first, second in some([s for s in entries if len(s[0]) <= 16], count, rng):
        yield chat("saying", rng.choice(("歇后语“{}”的下半句是什么？", "歇后语：{}，下半句是？")).format(first),
                   f"{first}——{second}。")


def mixed(chats: list[Chat], count: int, rng: random.Random) -> Iterator[Chat]:
    """Whole visits: a greeting, one or two questions of different kinds, thanks."""
    greetings = (("你好", "你好！很高兴和你聊天，有什么可以帮你的吗？"), ("早上好", "早上好！祝你今天有个好心情。"),
                 ("晚上好", "晚上好！今天过得怎么样？"), ("在吗？", "你好！很高兴和你聊天，有什么可以帮你的吗？"))
    thanks = (("谢谢", "不客气，很高兴能帮到你！"), ("谢谢你！", "不客气，很高兴能帮到你！"),
              ("再见", "再见！欢迎随时再来找我聊天。"), ("好的，谢谢", "不客气，很高兴能帮到你！"))
    short = [c for c in chats if len(c.messages) == 2
             and sum(len(m["content"]) for m in c.messages) < 100]
    for _ in range(count):
        turns: list[str] = []
        if rng.random() < 0.6:
            turns += rng.choice(greetings)
        for c in rng.sample(short, rng.choice((1, 2, 2, 3))):
            turns += [m["content"] for m in c.messages]
        if rng.random() < 0.6:
            turns += rng.choice(thanks)
        yield chat("mixed", *turns)
