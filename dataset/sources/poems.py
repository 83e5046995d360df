"""Poems and the lives of their authors, from the `chinese-poetry` package.

Three hundred thousand poems would drown modern Chinese, so only those that search engines find
most often are kept (the package ranks them), which is also where the well-known ones are.
"""
import json
import math
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import opencc

from dataset.text import UNREADABLE, bucket, cut, finish, han, is_specific, pack, sentences, tidy

KEPT = {"唐诗": 16_000, "宋诗": 11_000, "宋词": 7_000, "元曲": 1_000}
UNTITLED = {"句", "诗", "失题", "无题诗", "残句", "断句", "缺题", "诗句", "偈", "颂", "颂古", "诗一首"}
EMPERORS = {
    "太宗皇帝": "唐太宗", "高宗皇帝": "唐高宗", "中宗皇帝": "唐中宗", "睿宗皇帝": "唐睿宗",
    "明皇帝": "唐玄宗", "肃宗皇帝": "唐肃宗", "德宗皇帝": "唐德宗", "文宗皇帝": "唐文宗",
    "宣宗皇帝": "唐宣宗", "昭宗皇帝": "唐昭宗", "则天皇后": "武则天", "武则天皇后": "武则天",
    "文德皇后": "长孙皇后", "章怀太子": "李贤",
}
EMPEROR = ("唐太宗", "唐高宗", "唐中宗", "唐睿宗", "唐玄宗", "唐肃宗", "唐德宗", "唐文宗", "唐宣宗",
           "唐昭宗", "武则天", "宋太祖", "宋太宗", "宋真宗", "宋仁宗", "宋英宗", "宋神宗", "宋哲宗",
           "宋徽宗", "宋钦宗", "宋高宗", "宋孝宗", "宋光宗", "宋宁宗", "宋理宗", "宋度宗")
NAMELESS = ("佚名", "不详", "无名氏", "无名", "失名", "阙名")
KINDS = {"唐诗": ("唐代", "诗"), "宋诗": ("宋代", "诗"), "宋词": ("宋代", "词"), "元曲": ("元代", "曲"),
         "诗经": ("先秦", "诗"), "楚辞": ("先秦", "楚辞")}


@dataclass(frozen=True)
class Poem:
    collection: str
    author: str
    title: str
    lines: tuple[str, ...]

    @property
    def dynasty(self) -> str:
        return KINDS[self.collection][0]

    @property
    def kind(self) -> str:
        return KINDS[self.collection][1]

    @property
    def key(self) -> str:
        """The first 24 Han characters: what tells one poem from another."""
        return han("".join(self.lines))[:24]

    @property
    def passages(self) -> list[str]:
        """What must not be quoted where the poem is held out: each line, and the whole."""
        return [*self.lines, "".join(self.lines)]

    @property
    def held_out(self) -> bool:
        return bucket(self.key, 40) == 0


@dataclass(frozen=True)
class Author:
    name: str
    dynasty: str
    role: str
    life: str


def read(archive: zipfile.ZipFile, kept: Mapping[str, int] = KEPT) -> list[Poem]:
    """The best-ranked readable poems of each collection, in simplified characters."""
    simplify = opencc.OpenCC("t2s").convert
    poems: list[Poem] = []
    seen: set[str] = set()
    for collection, raw in collections(archive):
        raw.sort(key=lambda entry: (-entry[0], entry[2], "".join(entry[3])))
        taken = 0
        for _, author, title, lines in raw:
            if taken == kept.get(collection, 10**9):
                break
            poem = clean(collection, *(simplify(x) for x in (author, title, "\n".join(lines))))
            if poem and poem.key not in seen:
                seen.add(poem.key)
                poems.append(poem)
                taken += 1
    return poems


def clean(collection: str, author: str, title: str, body: str) -> Poem | None:
    """A poem worth keeping, or None: damaged, untitled, a fragment, or without a real author."""
    author = EMPERORS.get(author, author).strip()
    title = re.sub(r"\s+其?([一二三四五六七八九十百]+)$", r"·其\1", title.split("/")[-1].split("・")[-1])
    title = tidy(title)
    lines = tuple(line for line in map(tidy, body.split("\n")) if line)
    text = "".join(lines)
    if not 16 <= len(text) <= 360 or UNREADABLE.search(text + title):
        return None
    if title.split("·")[0] in UNTITLED:
        return None
    if collection not in ("诗经",) and not 2 <= len(han(author)) == len(author) <= 5:
        return None
    if re.search(r"[()（）\[\]【】/a-zA-Z0-9-]", text + title):  # stage directions, editors' notes
        return None
    if not title or len(title) > 20 or len(lines) < 2 or len(han(text)) < 0.7 * len(text):
        return None
    return Poem(collection, author, title, lines)


def collections(archive: zipfile.ZipFile) -> Iterator[tuple[str, list[tuple]]]:
    """Each collection as (rank, author, title, lines) entries."""
    def load(name: str) -> list[dict]:
        return json.loads(archive.read(name))

    names = set(archive.namelist())
    for collection, mark in (("唐诗", "tang"), ("宋诗", "song")):
        entries = []
        for name in sorted(n for n in names if n.startswith(f"dist/quantangshi/poet.{mark}.")):
            number = name.split(".")[-2]
            ranks = f"dist/rank/poet/poet.{mark}.rank.{number}.json"
            found = load(ranks) if ranks in names else []
            for i, poem in enumerate(load(name)):
                hits = found[i] if i < len(found) else {}
                rank = sum(math.log1p(hits.get(engine) or 0)
                           for engine in ("baidu", "so360", "bing", "google"))
                entries.append((rank, poem["author"], poem["title"], poem["paragraphs"]))
        yield collection, entries
    for collection, prefix, title in (
        ("宋词", "dist/songci/ci.song.", "rhythmic"), ("元曲", "dist/yuanqu/", "title"),
        ("诗经", "dist/shijing/", "title"), ("楚辞", "dist/chuci/", "title"),
    ):
        raw = [poem for name in sorted(n for n in names if n.startswith(prefix))
               for poem in load(name)]
        yield collection, [(-i, poem.get("author", "佚名"), poem[title],
                            poem.get("paragraphs") or poem.get("content") or [])
                           for i, poem in enumerate(raw)]


def read_authors(archive: zipfile.ZipFile) -> list[Author]:
    """Lives of Tang and Song authors; the later, modern ones (of the ci writers) come first."""
    simplify = opencc.OpenCC("t2s").convert
    authors: dict[str, Author] = {}
    for entry in json.loads(archive.read("dist/songci/author.song.json")):
        name, life = simplify(entry["name"]), tidy(simplify(entry["description"]).split("--")[0])
        life = life.removeprefix(f"{name}：").removeprefix(f"{name}，").strip()
        if readable(name, life):
            authors.setdefault(name, Author(name, "宋代", "词人", life))
    for mark, dynasty in (("tang", "唐代"), ("song", "宋代")):
        for entry in json.loads(archive.read(f"dist/quantangshi/authors.{mark}.json")):
            name = simplify(entry["name"])
            name = EMPERORS.get(name, name)
            life = tidy(simplify(entry["desc"])).removeprefix(f"{name}，").strip()
            if readable(name, life):
                role = "皇帝" if name in EMPEROR else "诗人"
                authors.setdefault(name, Author(name, dynasty, role, life))
    return list(authors.values())


def readable(name: str, life: str) -> bool:
    return 2 <= len(han(name)) == len(name) <= 5 and len(life) > 25 and not UNREADABLE.search(life)


def author_texts(authors: list[Author]) -> Iterator[str]:
    for author in authors:
        role = "女皇帝" if author.name == "武则天" else author.role
        opening = f"{author.name}是{author.dynasty}{role}。"
        life = author.life
        if not life.startswith(author.name):
            life = f"{author.name}，{life}"
        first, *rest = sentences(finish(life), 420)
        yield opening + first
        yield from (piece for piece in rest if len(piece) > 60)


def unambiguous(poems: list[Poem]) -> list[Poem]:
    """Training poems by a known author whose title no other kept poem has (《秋日》, ci tunes)."""
    written = Counter(poem.title for poem in poems)
    return [poem for poem in poems if written[poem.title] == 1 and not poem.held_out
            and poem.author not in NAMELESS]


def texts(poems: list[Poem]) -> Iterator[str]:
    for poem in poems:
        author = "" if poem.author in NAMELESS else f"·{poem.author}"
        yield f"《{poem.title}》 {poem.dynasty}{author}\n" + "\n".join(poem.lines)


def fact_texts(poems: list[Poem], rng: random.Random) -> Iterator[str]:
    """Plain modern sentences about the poems and who wrote them, a few to a text."""
    forms = (
        "《{title}》是{dynasty}{author}的一首{kind}，开头一句是“{first}”",
        "《{title}》的作者是{dynasty}的{author}。",
        "{dynasty}的{author}写过一首{kind}，题目叫《{title}》。",
        "“{first}”这一句出自{author}的《{title}》。",
    )
    facts = []
    for poem in unambiguous(poems):
        if len(poem.title) <= 8:
            facts.append(rng.choice(forms).format(
                title=poem.title, author=poem.author, dynasty=poem.dynasty, kind=poem.kind,
                first=poem.lines[0]))
    rng.shuffle(facts)
    yield from pack(facts[:9_000], 160)


def classics_texts(archive: zipfile.ZipFile) -> Iterator[str]:
    """论语, 孟子 and the primers, in texts of about 300 characters."""
    simplify = opencc.OpenCC("t2s").convert

    def strings(node: object) -> Iterator[str]:
        if isinstance(node, str):
            if len(node) > 8:
                yield tidy(simplify(node))
        elif isinstance(node, list):
            for child in node:
                yield from strings(child)
        elif isinstance(node, dict):
            for key, child in node.items():
                if key in ("content", "paragraphs", "text"):
                    yield from strings(child)

    for name in sorted(archive.namelist()):
        if name.startswith(("dist/lunyu/", "dist/sishuwujing/", "dist/mengxue/",
                            "dist/youmengying/")) and "shisanbaishou" not in name:
            kept = (s for s in strings(json.loads(archive.read(name))) if not UNREADABLE.search(s))
            yield from pack((piece for s in kept for piece in sentences(s, 300)), 300)


def appreciation_texts(archive: zipfile.ZipFile) -> Iterator[str]:
    """Modern explanations of well-known Tang poems."""
    for entry in json.loads(archive.read("dist/shuimotangshi/shuimotangshi.json")):
        if entry["prologue"] and len(entry["author"]) > 1:
            yield f"{entry['author']}的《{entry['title']}》：{cut(tidy(entry['prologue']), 400)}"


def well_known(poems: list[Poem], authors: list[Author], count: int) -> list[tuple[str, str, str]]:
    """(name, dynasty, role) of the authors with most kept poems: few enough to be learned."""
    lives = {author.name: author for author in authors}
    written = Counter(poem.author for poem in poems if poem.author not in NAMELESS)
    home: dict[str, Counter] = {}
    for poem in poems:
        home.setdefault(poem.author, Counter())[poem.collection] += 1
    roles = {"唐诗": "诗人", "宋诗": "诗人", "宋词": "词人", "元曲": "曲作家", "楚辞": "诗人"}
    found = []
    for name, _ in written.most_common():
        collection = home[name].most_common(1)[0][0]
        if name not in lives and collection in ("唐诗", "宋诗"):
            continue
        role = "皇帝" if name in EMPEROR else roles.get(collection, "诗人")
        found.append((name, KINDS[collection][0], role))
        if len(found) == count:
            break
    return found


def choices(poems: list[Poem], rng: random.Random) -> Iterator[dict]:
    """Four-way questions on the poems held out of training: the next line, and the author."""
    held = [poem for poem in poems if poem.held_out]
    written = Counter(poem.author for poem in poems if poem.author not in NAMELESS)
    famous = [name for name, _ in written.most_common(60)]
    for poem in held:
        if poem.author in famous and len(famous) > 3:
            options = rng.sample([name for name in famous if name != poem.author], 3)
            options.append(poem.author)
            rng.shuffle(options)
            yield {"task": "poem_author", "kind": "choice", "passages": poem.passages,
                   "question": f"下面这首{poem.kind}的作者是谁？\n" + "\n".join(poem.lines) + "\n",
                   "choices": options, "answer": options.index(poem.author)}
        right = poem.lines[1]
        others = [p.lines[1] for p in rng.sample(held, min(12, len(held)))
                  if p is not poem and abs(len(p.lines[1]) - len(right)) <= 2]
        if len(others) >= 3:
            options = others[:3] + [right]
            rng.shuffle(options)
            # A short line stands in many poems; behind the line before it, it is this one.
            passage = right if is_specific(right) else poem.lines[0] + right
            yield {"task": "poem_next", "kind": "choice", "passages": [passage],
                   "question": f"“{poem.lines[0]}”的下一句是：", "choices": options,
                   "answer": options.index(right)}
