"""Asking an OpenAI-style endpoint for answers that stream, with whatever can go wrong named."""
import ipaddress
import re
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import urlsplit

import openai

from ..endpoint import TIMEOUT

CONNECT_TIMEOUT = 5.0  # seconds
Messages = list[dict[str, str]]


class AnswerError(Exception):
    """No answer, or not all of it. `kind` is a key of the texts, `detail` the endpoint's words."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind)
        self.kind, self.detail = kind, " ".join(detail.split())[:200]


@dataclass
class Parameters:
    """How an answer is drawn; in the order of the page's controls."""

    system: str = ""  # "": the model's own
    temperature: float = 0.75
    top_p: float = 0.9
    max_tokens: int = 512
    repetition_penalty: float = 1.05
    seed: int | None = None


@dataclass
class Answer:
    """An answer while it comes; the counts are known once it is complete."""

    model: str = ""
    text: str = ""
    forgotten: int = 0  # earliest turns of the conversation that were not sent
    first_seconds: float = 0.0  # until its first piece
    seconds: float = 0.0  # until its last one
    prompt_tokens: int = 0
    tokens: int = 0
    cut: bool = False  # ended by a limit, not by the model

    def tokens_per_second(self) -> float | None:
        """Of the whole answer, the wait for its first piece included: a short answer may arrive at
        once when this computer is busy, and the pieces' own times then tell nothing."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


class ChatClient:
    """The model behind a URL like http://127.0.0.1:23333, with or without /v1.

    Raises:
        ValueError: that is no such URL.
    """

    def __init__(self, url: str, api_key: str | None = None, model_name: str | None = None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no URL like http://localhost:23333")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.fixed_name = model_name
        self.client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=api_key or "none", max_retries=0,
            # A proxy in the environment cannot reach this computer's own ports.
            http_client=openai.DefaultAsyncHttpxClient(
                trust_env=not is_loopback(parts.hostname),
                timeout=openai.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT),
            ),
        )

    async def model_name(self) -> str:
        """The name it was made with, else the first model served, asked anew each time: the server
        may have been restarted.

        Raises:
            AnswerError: nothing answers there, or not as it should.
        """
        if self.fixed_name:
            return self.fixed_name
        try:
            served = [model.id async for model in self.client.models.list()]
        except (openai.OpenAIError, ValueError, AttributeError) as error:
            raise explain(error) from error
        if not served:
            raise AnswerError("no_model")
        return served[0]

    async def answer(
        self, turns: list[Messages], parameters: Parameters, forgotten: int = 0
    ) -> AsyncIterator[Answer]:
        """The answer to the last of `turns`, again and again as it grows. Turns are left out from
        the earliest on until the endpoint takes the rest, the first `forgotten` in any case.

        Closing this iterator closes the connection, by which the server knows to stop.

        Raises:
            AnswerError: it fails, or the last turn alone is too long.
        """
        name = await self.model_name()
        forgotten = min(forgotten, len(turns) - 1)
        while True:
            try:
                async with aclosing(self.stream(name, turns[forgotten:], parameters)) as answers:
                    async for answer in answers:
                        answer.forgotten = forgotten
                        yield answer
                return
            except AnswerError as error:
                if error.kind != "too_long" or forgotten == len(turns) - 1:
                    raise
            forgotten += 1

    async def stream(
        self, name: str, turns: list[Messages], parameters: Parameters
    ) -> AsyncIterator[Answer]:
        """As `answer`, with all of `turns`."""
        system = [{"role": "system", "content": parameters.system}] if parameters.system else []
        answer, start = Answer(name), time.perf_counter()
        try:
            async with await self.client.chat.completions.create(
                model=name, messages=[*system, *(message for turn in turns for message in turn)],
                temperature=parameters.temperature, top_p=parameters.top_p,
                max_tokens=parameters.max_tokens, seed=parameters.seed,
                extra_body={"repetition_penalty": parameters.repetition_penalty},
                stream=True, stream_options={"include_usage": True},
            ) as pieces:
                async for piece in pieces:
                    if piece.usage:
                        answer.prompt_tokens = piece.usage.prompt_tokens
                        answer.tokens = piece.usage.completion_tokens
                    for choice in piece.choices:
                        answer.cut |= choice.finish_reason == "length"
                        if choice.delta.content:
                            answer.seconds = time.perf_counter() - start
                            answer.first_seconds = answer.first_seconds or answer.seconds
                            answer.text += choice.delta.content
                            yield answer
                yield answer
        except (openai.OpenAIError, ValueError, AttributeError) as error:
            begun = answer.text and isinstance(error, openai.APIConnectionError)
            raise AnswerError("broken_off") if begun else explain(error) from error


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this computer."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def explain(error: Exception) -> AnswerError:
    """What a client's error means to whoever reads the page."""
    if isinstance(error, openai.APIConnectionError):
        return AnswerError("no_server")
    if not isinstance(error, openai.APIError):
        return AnswerError("not_openai", type(error).__name__)
    status = getattr(error, "status_code", None)
    told = error.body.get("message") if isinstance(error.body, dict) else None
    detail = f"{status or ''} {told or error.message}"
    if status in (401, 403):
        return AnswerError("bad_key")
    if status in (429, 503):
        return AnswerError("busy")
    if status in (400, 413, 422) and re.search(r"context|too long|input length", detail, re.I):
        return AnswerError("too_long", detail)
    return AnswerError("refused", detail)
