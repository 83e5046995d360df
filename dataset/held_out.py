"""What is held out of the starter corpus: the smallest unit, before anything is made of it.

A sentence pair becomes a text, a line of a text beside its English, and a translation task; a poem
becomes a text, a fact about its author, and a question for its next line. Were the texts split, the
same sentence would still train in another form. So the entries of a source are split, and pieces
that are too short to be measured alone are packed into texts only after decontamination has looked
at each.
"""
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from dataset.sources import dictionary, prose
from dataset.text import bucket, pack

SHORT = 40  # characters that a held-out text has at least
Entry = TypeVar("Entry")


def parted(entries: Iterable[Entry], chosen: Callable[[Entry], bool]
           ) -> tuple[list[Entry], list[Entry]]:
    """(the entries chosen, the others)."""
    entries = list(entries)
    return ([entry for entry in entries if chosen(entry)],
            [entry for entry in entries if not chosen(entry)])


def held_back(
    entries: Iterable[Entry], count: int, name: Callable[[Entry], str],
    fit: Callable[[Entry], bool] = lambda entry: True,
) -> tuple[list[Entry], list[Entry]]:
    """(`count` fit entries held out, but a quarter at most; the others), chosen by a hash of the
    name. Entries of one name stay together."""
    entries = list(entries)
    names = sorted({name(entry) for entry in entries if fit(entry)},
                   key=lambda name: bucket(f"held out {name}", 2**60))
    chosen = set(names[: min(count, len(entries) // 4)])
    return parted(entries, lambda entry: name(entry) in chosen)


def unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def text_items(
    source: str, entries: Iterable[Entry], texts: Callable[[list[Entry]], Iterable[str]],
    passages: Callable[[Entry], list[str]] = lambda entry: [],
) -> Iterator[dict]:
    """What is made of each held-out entry by itself; `passages` must not be quoted either."""
    for entry in entries:
        for text in texts([entry]):
            if len(text) >= SHORT:
                yield {"task": "bits_per_byte", "kind": "text", "source": source, "text": text,
                       "passages": [text, *passages(entry)]}


def drawn(items: Iterable[dict], count: int) -> list[dict]:
    """At most `count` items of each task and source, drawn by content, in their order."""
    items = list(items)
    taken: Counter = Counter()
    kept = set()
    for item in sorted(items, key=lambda item: bucket(item.get("question", item.get("text", "")),
                                                      2**60)):
        part = item["task"], item.get("source")
        taken[part] += 1
        if taken[part] <= count:
            kept.add(id(item))
    return [item for item in items if id(item) in kept]


def saying_pieces(sayings: Iterable[tuple[str, str]]) -> Iterator[dict]:
    """Shuffled by content, for the list is sorted and neighbours begin alike."""
    for saying in sorted(sayings, key=lambda saying: bucket(saying[0], 2**60)):
        yield {"task": "bits_per_byte", "kind": "text", "source": "saying",
               "text": dictionary.saying_text(saying), "passages": ["".join(saying)],
               "pack": dictionary.SAYINGS_SIZE}


def pair_pieces(pairs: Iterable[prose.Pair]) -> Iterator[dict]:
    """Two sentences of three stand alone, for they are shorter than those with their English."""
    for pair in pairs:
        alone = bucket(f"alone {pair.chinese}", 3) > 0
        yield {"task": "bits_per_byte", "kind": "text", "source": "everyday",
               "text": pair.chinese if alone else prose.pair_text(pair),
               "passages": [pair.chinese, pair.english],
               "pack": prose.CHINESE_SIZE if alone else prose.PAIR_SIZE}


def joined(items: list[dict]) -> list[dict]:
    """The items, with the pieces of each source packed into texts."""
    whole = [item for item in items if "pack" not in item]
    pieces: dict[tuple[str, int], list[str]] = {}
    for item in items:
        if "pack" in item:
            pieces.setdefault((item["source"], item["pack"]), []).append(item["text"])
    for (source, size), found in pieces.items():
        whole += [{"task": "bits_per_byte", "kind": "text", "source": source, "text": text}
                  for text in pack(found, size) if len(text) >= SHORT]
    return whole
