"""What of a conversation a model reads, when its context has no room for all.

The system line and the question at hand always stay. First go earlier questions with all that came
of them, then the oldest steps of this question: their variables are still in the sandbox. Last, a
long output loses its middle.
"""
import bisect
from collections.abc import Callable, Sequence

from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage

from .fences import text_of

TOKENS_AROUND = 6  # of a message: its role and its borders, in the chat template
FEWEST_TOKENS = 32  # that are worth keeping of a message
CUT = "\n[…]\n"


class ContextFull(ValueError):
    """Not even the question fits."""


def estimate_tokens(text: str) -> int:
    """A guess for tokenizers that are not at hand, rather too high: three bytes are a Chinese
    character, or less than an English token has on average; digits are often tokens of their own.
    """
    return len(text.encode()) // 3 + sum(map(str.isdigit, text)) // 2 + 1


def is_observation(message: AnyMessage) -> bool:
    """Whether a message holds what code has printed, not what the user said."""
    return message.additional_kwargs.get("codeact") == "observation"


def observation_message(text: str) -> HumanMessage:
    """What the code has printed, as the model reads it. The role is the user's: chat templates
    refuse a second system line, and many know no role for tools."""
    return HumanMessage(text, additional_kwargs={"codeact": "observation"})


def split_turns(messages: Sequence[AnyMessage]) -> list[list[AnyMessage]]:
    """The messages by question: each with its steps and its answer. A question that was given up
    before anything came of it is left out, and so is an output that the model never read."""
    turns: list[list[AnyMessage]] = []
    for message in messages:
        if message.type == "human" and not is_observation(message):
            if turns and turns[-1][-1].type == "human":
                turns[-1].pop()
            turns = [turn for turn in turns if turn]
            turns.append([])
        if turns:
            turns[-1].append(message)
    return turns


def fit_context(
    system: str, messages: Sequence[AnyMessage], room: int | None,
    count: Callable[[str], int] = estimate_tokens,
) -> tuple[list[AnyMessage], int]:
    """The messages to send, the system line first, and how many of the others were left out.

    Args:
        room: tokens that they may take together; None: no limit.

    Raises:
        ContextFull: the system line and the question alone are too long.
    """
    turns = split_turns(messages)
    if room is not None:
        sizes = {id(message): count(text_of(message.content)) + TOKENS_AROUND
                 for turn in turns for message in turn}
        left = room - count(system) - 2 * TOKENS_AROUND

        def over() -> int:
            return sum(sizes[id(message)] for turn in turns for message in turn) - left

        while len(turns) > 1 and over() > 0:
            turns.pop(0)
        while len(turns[0]) > 3 and over() > 0:  # the question, at least two steps
            del turns[0][1:3]
        if over() > 0:
            turns[0] = shorten_messages(turns[0], left, sizes, count)
    kept = [message for turn in turns for message in turn]
    return [SystemMessage(system), *kept], len(messages) - len(kept)


def shorten_messages(
    turn: list[AnyMessage], room: int, sizes: dict[int, int], count: Callable[[str], int]
) -> list[AnyMessage]:
    """The turn with its last message cut, then its question, until it fits."""
    turn = list(turn)
    for position in dict.fromkeys((len(turn) - 1, 0)):
        message = turn[position]
        rest = sum(sizes[id(other)] for other in turn if other is not message)
        wanted = max(room - rest - TOKENS_AROUND, FEWEST_TOKENS)
        text = shorten(text_of(message.content), wanted, count)
        turn[position] = message.model_copy(update={"content": text})
        sizes[id(turn[position])] = count(text) + TOKENS_AROUND
        if sum(sizes[id(other)] for other in turn) <= room:
            return turn
    raise ContextFull("the question is too long for the model's context; shorten it, or raise "
                      "--context if the server allows more")


def shorten(text: str, room: int, count: Callable[[str], int]) -> str:
    """The text without as much of its middle as it takes to have at most `room` tokens."""
    if count(text) <= room:
        return text

    def with_ends(length: int) -> str:
        head = text[: length - length // 2]
        return head + CUT + (text[-(length // 2):] if length > 1 else "")

    # The first length that is too long, searched among those that `room` tokens could have.
    longest = min(len(text), room * 64)
    too_long = bisect.bisect_left(
        range(longest), True, key=lambda length: count(with_ends(length)) > room
    )
    return with_ends(max(too_long - 1, 0))
