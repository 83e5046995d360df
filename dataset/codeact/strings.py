"""Work on strings, in quotation marks in the question; later turns go on with `s`."""
import random
import string

from .kinds import KINDS, Task

WORDS = (
    "apple banana orange table window garden river mountain bridge winter summer spring autumn "
    "morning evening teacher student school letter number music picture camera pencil paper book "
    "computer keyboard science history language python model token network agent sandbox memory "
    "dragon tiger rabbit monkey horse panda eagle dolphin forest desert island ocean cloud thunder "
    "silver golden purple yellow green orange black white quick brown jumps over lazy quiet happy "
    "simple little bright strong gentle careful open close begin finish travel wander discover "
    "remember believe create answer question reason logic theory method result sample data code"
).split()
CHINESE = ("春天来了", "缘梦", "人工智能", "学而时习之", "床前明月光", "北京", "长江", "黄河", "图书馆",
           "自行车", "计算机", "向日葵", "山高水长", "海阔天空", "一帆风顺", "万里长城", "白日依山尽",
           "机器学习", "神经网络", "今天天气很好", "明天去爬山", "我爱读书", "月落乌啼霜满天")
PALINDROMES = ("level radar civic noon kayak refer rotor madam stats tenet racecar deed peep "
               "solos redder 12321 45654 1001 上海自来水来自海上").split()
QUOTES = {"zh": ("“{}”", "“{}”", '"{}"', "'{}'"), "en": ('"{}"', '"{}"', "'{}'", "“{}”")}


def draw_word(rng: random.Random, chinese: bool = False) -> str:
    """A word, letters at random, or Chinese where `chinese`."""
    if chinese and rng.random() < 0.5:
        return rng.choice(CHINESE)
    if rng.random() < 0.65:
        word = rng.choice(WORDS)
        return rng.choice((word, word, word.capitalize()))
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9)))


def draw_sentence(rng: random.Random) -> str:
    return " ".join(rng.sample(WORDS, rng.randint(3, 6)))


def quoted(text: str, language: str, rng: random.Random) -> str:
    return rng.choice(QUOTES[language]).format(text)


def task(s: str, rng: random.Random, language: str, python: str, **facts) -> Task:
    """A task on the string `s`, which stays."""
    slots = {"s": quoted(s, language, rng), **facts.pop("slots", {})}
    return Task(slots, f's = "{s}"\nprint({python})', state={"s": s}, **facts)


@KINDS.add("strings")
def reverse(rng: random.Random, language: str, state: dict) -> Task:
    s = draw_word(rng, language == "zh")
    return task(s, rng, language, "s[::-1]", texts=("".join(reversed(s)),))


@KINDS.add("strings")
def length(rng: random.Random, language: str, state: dict) -> Task:
    s = rng.choice((draw_word(rng, language == "zh"), draw_sentence(rng)))
    return task(s, rng, language, "len(s)", numbers=(sum(1 for _ in s),))


@KINDS.add("strings", weight=1.3)
def count_letter(rng: random.Random, language: str, state: dict) -> Task:
    s = rng.choice((draw_word(rng), draw_sentence(rng)))
    c = rng.choice(s.replace(" ", "")) if rng.random() < 0.9 else rng.choice("aeiou")
    return task(s, rng, language, f's.count("{c}")', numbers=(len([x for x in s if x == c]),),
                slots={"c": c})


@KINDS.add("strings", weight=0.7)
def upper(rng: random.Random, language: str, state: dict) -> Task:
    s = rng.choice((draw_word(rng), draw_sentence(rng)))
    table = dict(zip(string.ascii_lowercase, string.ascii_uppercase, strict=True))
    return task(s, rng, language, "s.upper()", texts=("".join(table.get(c, c) for c in s),))


@KINDS.add("strings")
def palindrome(rng: random.Random, language: str, state: dict) -> Task:
    s = rng.choice(PALINDROMES) if rng.random() < 0.5 else draw_word(rng)
    yes = all(s[i] == s[len(s) - 1 - i] for i in range(len(s)))
    verdict = {"zh": "是回文" if yes else "不是回文",
               "en": "is a palindrome" if yes else "is not a palindrome"}[language]
    return task(s, rng, language, "s == s[::-1]", texts=(str(yes),), verdict=verdict,
                slots={"verdict": verdict})


@KINDS.add("strings", weight=0.7)
def count_words(rng: random.Random, language: str, state: dict) -> Task:
    s = draw_sentence(rng)
    return task(s, rng, language, "len(s.split())", numbers=(s.count(" ") + 1,))


@KINDS.add("strings", weight=0.7)
def sort_words(rng: random.Random, language: str, state: dict) -> Task:
    words = rng.sample(WORDS, rng.randint(3, 5))
    ordered: list[str] = []
    for word in words:  # by insertion
        ordered.insert(sum(other <= word for other in ordered), word)
    return task(" ".join(words), rng, language, '" ".join(sorted(s.split()))',
                texts=(" ".join(ordered),))


@KINDS.add("strings", weight=0.7)
def longest_word(rng: random.Random, language: str, state: dict) -> Task | None:
    s = draw_sentence(rng)
    longest, *others = sorted(s.split(), key=lambda word: -len(word))
    return task(s, rng, language, "max(s.split(), key=len)", texts=(longest,)) if (
        len(others[0]) < len(longest)) else None


@KINDS.add("strings", weight=0.7)
def replace(rng: random.Random, language: str, state: dict) -> Task:
    s = draw_word(rng)
    c, d = rng.choice(s), rng.choice(string.ascii_lowercase)
    return task(s, rng, language, f's.replace("{c}", "{d}")', slots={"c": c, "d": d},
                texts=("".join(d if x == c else x for x in s),))


@KINDS.add("follow-up", needs="s")
def then_length(rng: random.Random, language: str, state: dict) -> Task:
    return Task({}, "print(len(s))", numbers=(sum(1 for _ in state["s"]),), state=state)


@KINDS.add("follow-up", needs="s")
def then_upper(rng: random.Random, language: str, state: dict) -> Task | None:
    s = state["s"]
    return Task({}, "print(s.upper())", texts=(s.upper(),), state=state) if (
        s.isascii() and not s.isdigit()) else None


@KINDS.add("follow-up", needs="s")
def then_reverse(rng: random.Random, language: str, state: dict) -> Task:
    return Task({}, "print(s[::-1])", texts=("".join(reversed(state["s"])),), state=state)
