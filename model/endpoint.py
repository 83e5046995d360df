"""A model behind an OpenAI-style endpoint, such as `lmdeploy serve api_server` offers."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import openai
from tqdm import tqdm

CONCURRENT_REQUESTS = 8  # the server makes a batch of them
MAX_RETRIES = 3  # of a request that failed on the way or that the server was too busy for
TIMEOUT = 120.0  # seconds


class EndpointError(ConnectionError):
    """The endpoint does not answer, or not as it should; the message is one line."""


class Endpoint:
    """The first model that is served at a URL like http://127.0.0.1:23333/v1; as `Checkpoint`.

    Raises:
        EndpointError: nothing answers there, or no model is served.
    """

    kinds = frozenset({"chat", "agent"})
    left_out = "an endpoint tells no likelihoods, so only conversations are measured"

    def __init__(self, base_url: str, api_key: str | None = None):
        self.source = base_url
        try:
            # A server on one's own machine wants no key, the client wants one all the same.
            self.client = openai.OpenAI(
                base_url=base_url, api_key=api_key or "none", max_retries=MAX_RETRIES,
                timeout=TIMEOUT,
            )
            served = [model.id for model in self.client.models.list()]
        except (openai.OpenAIError, ValueError) as error:
            raise EndpointError(explain(base_url, error)) from error
        if not served:
            raise EndpointError(f"{base_url} serves no model")
        self.name = served[0]

    def replies(
        self, conversations: Sequence[list[dict[str, str]]], max_new_tokens: int
    ) -> list[tuple[str, bool]]:
        """(reply, whether it ended by itself) to each conversation, the likeliest tokens.

        Raises:
            EndpointError: it fails for good while it is asked.
        """

        def ask(messages: list[dict[str, str]]) -> tuple[str, bool]:
            completion = self.client.chat.completions.create(
                model=self.name, messages=messages, max_tokens=max_new_tokens, temperature=0,
            )
            choice = completion.choices[0]
            return choice.message.content or "", choice.finish_reason != "length"

        replies = []
        bar = tqdm(total=len(conversations), desc="asking", leave=False, disable=None)
        pool = ThreadPoolExecutor(CONCURRENT_REQUESTS)
        try:
            for reply in pool.map(ask, conversations):
                replies.append(reply)
                bar.update()
        except (openai.OpenAIError, IndexError, TypeError) as error:
            raise EndpointError(explain(self.source, error)) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, ask nothing more
            bar.close()
        return replies


def explain(base_url: str, error: Exception) -> str:
    """An error of the client in one line."""
    if isinstance(error, openai.APIConnectionError):  # timeouts are among them
        return f"nothing answers at {base_url}; start the server there, or correct --base_url"
    if isinstance(error, openai.APIStatusError):
        text = " ".join(str(error.message).split())[:200]
        return f"{base_url} answers with status {error.status_code}: {text}"
    return f"{base_url} does not answer as an OpenAI-style endpoint ({type(error).__name__})"
