"""Conversations made from templates and facts: what a small chat model can really learn.

Each module yields `Chat`s for training and the held-out questions for evaluation. What is held out
is decided by a hash of its content, so that training and evaluation can never meet.
"""
from typing import NamedTuple


class Chat(NamedTuple):
    source: str
    messages: list[dict[str, str]]


def chat(source: str, *turns: str) -> Chat:
    """`turns` alternate user, assistant, user, …"""
    roles = ("user", "assistant")
    return Chat(source, [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)])


def test_item(task: str, *turns: str, **expected: object) -> dict:
    """An evaluation item: the turns end with the user's; `expected` says what a right reply is."""
    return {"task": task, "kind": "chat", "conversations": chat(task, *turns).messages, **expected}
