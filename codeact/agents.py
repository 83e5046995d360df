"""An agent put together: a served model, tools, a sandbox, and a prompt that fits the model."""
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph.state import CompiledStateGraph

from .context import estimate_tokens
from .endpoint import Served, chat_model
from .graph import build_agent
from .prompts import is_small, system_prompt

OWN_CONTEXT = 2048  # tokens that this repository's models were trained on
OWN_TOKENIZER = Path(__file__).parents[1] / "model/yuanmeng_tokenizer/tokenizer.json"
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@dataclass
class Agents:
    """The agents over one served model and one sandbox: one for each language."""

    served: Served
    sandbox: object  # codeact.sandbox.Sandbox
    tools: Sequence = ()
    api_key: str | None = None
    max_steps: int = 8
    max_tokens: int | None = None  # of an answer; None: as the model's context allows
    temperature: float = 0.0
    context: int | None = None  # tokens; None: what the endpoint tells, else what is known of it
    prompt: Literal["auto", "long", "short"] = "auto"
    checkpointer: BaseCheckpointSaver | None = None
    built: dict[str, CompiledStateGraph] = field(default_factory=dict)
    has_run: set[str] = field(default_factory=set)  # conversations that the sandbox knows

    def __post_init__(self):
        small = is_small(self.served.name)
        self.short = small if self.prompt == "auto" else self.prompt == "short"
        self.context = self.context or self.served.context or (OWN_CONTEXT if small else None)
        if self.max_tokens is None:
            self.max_tokens = min(2048, self.context // 4) if self.context else 2048
        if self.context is not None and self.max_tokens >= self.context:
            raise ValueError(f"max_tokens {self.max_tokens} leaves no room for a question in a "
                             f"context of {self.context}")
        self.count_tokens = own_tokens() if small else estimate_tokens

    def system(self, language: str) -> str:
        """The system line in "en" or "zh"."""
        return system_prompt(self.tools, language, self.short)

    def agent(self, language: str) -> CompiledStateGraph:
        """The agent that is told everything in that language."""
        if language not in self.built:
            self.built[language] = build_agent(
                chat_model(self.served, api_key=self.api_key, max_tokens=self.max_tokens,
                           temperature=self.temperature),
                self.sandbox, system=self.system(language), max_steps=self.max_steps,
                checkpointer=self.checkpointer, language=language,
                room=None if self.context is None else self.context - self.max_tokens,
                count_tokens=self.count_tokens, has_run=self.has_run,
            )
        return self.built[language]


def language_of(question: str) -> str:
    """The language in which a question is asked."""
    return "zh" if CHINESE.search(question) else "en"


@cache
def own_tokens() -> Callable[[str], int]:
    """Counts as this repository's models do; a guess where their tokenizer was not copied along."""
    if not OWN_TOKENIZER.is_file():
        return estimate_tokens
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(OWN_TOKENIZER))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
