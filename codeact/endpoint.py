"""The model behind an OpenAI-style endpoint, as LangChain's chat model, and its errors in one line.

Everything here needs neither torch nor this repository's other packages: the agent may run on
another computer than the model.
"""
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

import openai
from langchain_openai import ChatOpenAI

CONNECT_TIMEOUT = 5.0  # seconds
READ_TIMEOUT = 120.0  # seconds without any news from a server that was reached


class EndpointError(ConnectionError):
    """The endpoint does not answer, or not as it should; the message is one line."""


@dataclass(frozen=True)
class Served:
    """A model that an endpoint offers."""

    base_url: str  # http://127.0.0.1:23333/v1
    name: str
    context: int | None = None  # tokens, where the endpoint tells


def api_url(url: str) -> str:
    """The URL with /v1 at its end, which may have been left out.

    Raises:
        ValueError: that is no such URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no URL like http://127.0.0.1:23333")
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def http_options(base_url: str) -> dict:
    """Time limits and no proxy for this computer's own ports: a proxy cannot reach them."""
    host = urlsplit(base_url).hostname
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    timeout = openai.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    return {"trust_env": not local, "timeout": timeout}


async def find_served(url: str, api_key: str | None = None, name: str | None = None) -> Served:
    """The model of that name, else the first that the endpoint serves.

    Raises:
        EndpointError: nothing answers there, or no such model is served.
        ValueError: that is no URL.
    """
    base_url = api_url(url)
    client = openai.AsyncOpenAI(
        base_url=base_url, api_key=api_key or "none", max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(**http_options(base_url)),
    )
    async with client:
        try:
            models = {model.id: model async for model in client.models.list()}
        except (openai.OpenAIError, ValueError, AttributeError) as error:
            raise EndpointError(explain(base_url, error)) from error
    if not models:
        raise EndpointError(f"{base_url} serves no model")
    name = name or next(iter(models))
    if name not in models:
        raise EndpointError(f"{base_url} serves no {name}, but {', '.join(models)}")
    length = getattr(models[name], "max_model_len", None)  # vLLM tells
    return Served(base_url, name, length if isinstance(length, int) else None)


def chat_model(
    served: Served, *, api_key: str | None = None, max_tokens: int = 512, temperature: float = 0.0,
) -> ChatOpenAI:
    """LangChain's client of a served model. The agent repeats failed requests itself."""
    options = http_options(served.base_url)
    return ChatOpenAI(
        model=served.name, base_url=served.base_url, api_key=api_key or "none", max_retries=0,
        temperature=temperature, max_tokens=max_tokens, stream_usage=False,
        timeout=options["timeout"],
        http_client=openai.DefaultHttpxClient(**options),
        http_async_client=openai.DefaultAsyncHttpxClient(**options),
        http_socket_options=(),  # or it warns that it would ignore the proxies
        # Its own clock between pieces is asyncio.wait_for, which before Python 3.12 can lose a
        # cancellation; the read timeout above does the same.
        stream_chunk_timeout=None,
    )


def explain(base_url: str, error: Exception, begun: bool = False) -> str:
    """A client's error in one line: what, where, what next; begun: after a part of the answer."""
    if isinstance(error, openai.APITimeoutError):
        return f"{base_url} has been silent for too long; is the server overloaded?"
    if begun and isinstance(error, (openai.APIConnectionError, OSError)):
        return f"{base_url} broke off in the middle of its answer; look at the server's log"
    if isinstance(error, openai.APIConnectionError):
        return f"nothing answers at {base_url}; start the server there, or correct --base-url"
    if isinstance(error, openai.APIStatusError):
        text = " ".join(str(error.message).split())[:200]
        if error.status_code in (401, 403):
            return f"{base_url} refuses the key; give the right one with --api-key ({text})"
        return f"{base_url} answers with status {error.status_code}: {text}"
    if isinstance(error, openai.APIError):
        return f"{base_url} reports: {' '.join(str(error.message).split())[:200]}"
    return f"{base_url} does not answer as an OpenAI-style endpoint ({type(error).__name__})"
