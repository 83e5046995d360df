"""Conversations as token ids: the chat template applied safely, and trimmed until they fit.

`apply_chat_template` would read a `</s>` that a user typed as the end of the message. Here each
message's text is encoded as text whatever it contains; for ordinary text the ids are the same.
"""
import bisect
import re

from transformers import PreTrainedTokenizerBase

# Longer than any token of the vocabulary: text beyond limit x this cannot fit into limit tokens.
LONGEST_TOKEN = 128


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> list[int]:
    """The ids of `messages` ({"role", "content"} each) in the tokenizer's own chat template,
    ended by the line that asks the assistant to speak.

    An answer's text is encoded apart from what precedes it, as it was when it was generated (and
    in training: `dataset/rows.py` makes the same ids).
    """
    # The template gets marks in place of the texts; only then are its special tokens told apart.
    marked = [
        {"role": message["role"], "content": f"\ue000{i}\ue001"}
        for i, message in enumerate(messages)
    ]
    template = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    answers = [m["content"] for m in marked if m["role"] == "assistant"]
    borders = "|".join(map(re.escape, [*tokenizer.all_special_tokens, *answers]))
    ids = []
    for piece in re.split(f"({borders})", template):
        if piece in tokenizer.all_special_tokens:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            text = re.sub("\ue000(\\d+)\ue001", lambda m: messages[int(m[1])]["content"], piece)
            ids += encode_text(tokenizer, text)
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text: nothing added, and no special token even if its name is in the text."""
    # verbose=False: a text beyond the model's positions is trimmed later, it needs no warning.
    return tokenizer.encode(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    )


def fit_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], max_tokens: int
) -> tuple[list[int], list[dict[str, str]]]:
    """The ids of what fits into `max_tokens`, and the messages that these are.

    The oldest turns go first, each question with its answer; a system line stays. If the last
    message is too long even alone, its beginning is cut away.

    Args:
        messages: an optional system line, then user and assistant in turns, a user's last.

    Raises:
        ValueError: not even an empty message would fit.
    """
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    ids = encode_conversation(tokenizer, system + turns)
    while len(ids) > max_tokens and len(turns) > 2:
        turns = turns[2:]
        ids = encode_conversation(tokenizer, system + turns)
    if len(ids) <= max_tokens:
        return ids, system + turns

    text = turns[-1]["content"][-max_tokens * LONGEST_TOKEN :]

    def with_text_from(start: int) -> list[dict[str, str]]:
        return [*system, {"role": "user", "content": text[start:]}]

    def fits(start: int) -> bool:
        return len(encode_conversation(tokenizer, with_text_from(start))) <= max_tokens

    # Bisection finds a border between "too long" and "fits"; the search space ends with "".
    start = bisect.bisect_left(range(len(text) + 1), True, key=fits)
    if start > len(text):
        needed = len(encode_conversation(tokenizer, with_text_from(len(text))))
        raise ValueError(
            f"the system line and the template alone need {needed} tokens, max_seq_len leaves "
            f"{max_tokens}; raise --max_seq_len or shorten --system"
        )
    messages = with_text_from(start)
    return encode_conversation(tokenizer, messages), messages
