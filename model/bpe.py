"""The tokenizer's ids, three to four times as fast: the same byte-level BPE by `tiktoken`.

`tokenizers` keeps a list of merges, `tiktoken` a rank for every token; both always join the
adjacent pair that was learnt first. They give the same ids for every text exactly if

- the tokens are numbered in the order of the merges, each made by one merge, and
- every token, cut into bytes, is put together again by the merges: then the only pair that can
  make it is the one that the list of merges names (whatever stands beside it, for a merge across
  its border would have to come first in both), and
- both cut a text into the same pieces first. Here the regular expressions are by two libraries,
  with two tables of Unicode; `tests/test_tokenizer.py` compares them on every code point.

`tiktoken_of` checks the first two for the tokenizer at hand and demands the project's own pattern
for the third. Any other tokenizer stays with `tokenizers`.
"""
import json
from collections.abc import Iterator

import tiktoken
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

# BPE merges bytes only inside the pieces that this pattern cuts; the first alternative that fits
# wins. In the spirit of GPT-4's pattern, with the differences that a small Chinese model needs.
SPLIT_PATTERN = "|".join([
    r"\n",  # alone, so each line (and so "user\n" in a chat) has the same tokens in any company
    r" {2,}",  # a run of spaces is one piece: an indentation of 4, 8 or 12 costs one token
    r"\p{N}",  # digits one by one, so that 7 is the same token in 17 and in 1789
    r"\p{Han}+",  # apart from other scripts: 用Python写 is three pieces, and 用 is always 用
    r" ?[\p{L}\p{M}&&[^\p{Han}]]+",  # a word with the space before it
    r" ?[^\s\p{L}\p{M}\p{N}]+",  # punctuation, ASCII or Chinese, never glued to a word
    r"[^\S\n]+",  # whatever space is left: single ones, tabs, the ideographic space
])
# What a tokenizer of `train_tokenizer.py` does to a text before its merges.
PRE_TOKENIZER = [
    {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated",
     "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]


class TextEncoder:
    """Texts to token ids; special tokens written in a text stay text, and none is added.

    By `tiktoken`, in the calling thread alone, if it is sure to give the same ids; else by
    `tokenizers`, on all cores.
    """

    def __init__(self, backend: Tokenizer):
        self.tiktoken = tiktoken_of(backend)
        # A copy of our own, because transformers changes the settings of its backend at each call.
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()

    def __call__(self, texts: list[str]) -> Iterator[list[int]]:
        """The ids of each text in turn."""
        if self.tiktoken is not None:
            return map(self.tiktoken.encode_ordinary, texts)
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)


def tiktoken_of(backend: Tokenizer) -> tiktoken.Encoding | None:
    """The same tokenizer for `tiktoken`, or None if its ids might differ."""
    description = json.loads(backend.to_str())
    bpe, steps = description["model"], (description["pre_tokenizer"] or {}).get("pretokenizers", ())
    same_pieces = description["normalizer"] is None and len(steps) == len(PRE_TOKENIZER) and all(
        wanted.items() <= step.items() for wanted, step in zip(PRE_TOKENIZER, steps))
    plain_bpe = bpe["type"] == "BPE" and not any(bpe[name] for name in (
        "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
        "ignore_merges"))
    if not (same_pieces and plain_bpe):
        return None

    special = {token["content"] for token in description["added_tokens"]}
    vocabulary = {token: id for token, id in bpe["vocab"].items() if token not in special}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    made = [vocabulary.get("".join(pair)) for pair in bpe["merges"]]
    in_order = None not in made and all(a < b for a, b in zip(made, made[1:]))
    whole = byte_of.keys() <= vocabulary.keys() and all(
        [part.id for part in backend.model.tokenize(token)] == [id]
        for token, id in vocabulary.items())
    if not (in_order and whole):
        return None
    ranks = {bytes(byte_of[character] for character in token): id
             for token, id in vocabulary.items()}
    return tiktoken.Encoding("yuanmeng", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                             special_tokens={})
