"""A conversation in a terminal, or an answer to each line of a pipe; whoever answers.

`model_chat.py` and `lmdeploy_pipeline.py` share it: what differs is the `Chat` behind it.
"""
import contextlib
import sys
from collections.abc import Callable
from typing import Any, Protocol

HELP = "/clear forgets the conversation, /exit leaves (so does Ctrl-D), Ctrl-C stops an answer."


class Chat(Protocol):
    """What `talk` needs of a chat; `settings.stats` says whether to print the speed."""

    settings: Any

    def clear(self) -> None:
        """Forget the conversation."""

    def reply(self, text: str, show: Callable[[str], None]) -> str:
        """Answer `text`, giving the answer to `show` piece by piece; return a line about speed."""


def use_utf8() -> None:
    """Make this process's streams UTF-8, and give `input()` a history and line editing."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    with contextlib.suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401


def talk(chat: Chat, mark: str = "🤖: ") -> None:
    """Read questions and print answers, each after the mark, until the input ends."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("🤔: " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            if interactive:
                print()
            return
        if not text:
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/clear":
            chat.clear()
            note("the conversation is forgotten")
        elif text == "/help":
            note(HELP)
        else:
            if not interactive:  # nobody typed it on this screen: a transcript needs both sides
                print(f"🤔: {text}")
            speed = "interrupted"
            try:
                print(mark, end="", flush=True)
                speed = chat.reply(text, lambda piece: print(piece, end="", flush=True))
            except KeyboardInterrupt:
                if not interactive:
                    raise
            print(flush=True)
            if chat.settings.stats:
                note(speed)


def note(text: str) -> None:
    """Say what is not part of the conversation: on stderr, so that stdout can be piped."""
    print(f"[{text}]", file=sys.stderr, flush=True)
