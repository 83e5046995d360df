"""The HTTP side of the server: its docs page, its errors, and which doors are closed."""
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import uvicorn as real_uvicorn

MAX_BODY = 2 * 2**20  # bytes of a request
MAX_DEPTH = 64  # of JSON; what is deeper would exhaust the stack of its readers
STOP_WITHIN = 5  # seconds that running answers get when the server is told to stop
ASSETS = "/docs/assets"
WITHOUT_KEY = frozenset({"/", "/openapi.json"})  # a browser sends no key; they hold no secret
HARMLESS = frozenset({"/health", "/is_sleeping"})


class Uvicorn:
    """uvicorn, as far as LMDeploy uses it."""

    @staticmethod
    def run(**settings: Any) -> None:
        real_uvicorn.run(timeout_graceful_shutdown=STOP_WITHIN, **settings)


# ---- The docs page -------------------------------------------------------------------------------

def make_app(docs_url: str | None = None, **settings: Any):
    """A FastAPI app whose docs page needs nothing from the internet."""
    from fastapi import FastAPI
    from fastapi.openapi.docs import get_swagger_ui_html
    from fastapi.staticfiles import StaticFiles

    app = FastAPI(docs_url=None, title="LMDeploy", **settings)
    if docs_url is None:
        return app
    # fastapi_offline brings the page's script along; its own app would bring ReDoc too.
    package = Path(importlib.util.find_spec("fastapi_offline").origin).parent
    app.mount(ASSETS, StaticFiles(directory=package / "static"))

    @app.get(docs_url, include_in_schema=False)
    def page():
        return get_swagger_ui_html(
            openapi_url=app.openapi_url, title="LMDeploy",
            swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{ASSETS}/favicon.png",
        )

    return app


# ---- Closed doors --------------------------------------------------------------------------------

def close_operator_routes(router, server_context):
    """The routes that stop, suspend or alter the server refuse, unless the command line says
    --allow-terminate-by-client. (/update_weights unpickles what it is sent: it runs any code.)"""
    from lmdeploy.serve.openai.errors import create_error_response

    if server_context.allow_terminate_by_client:
        return router

    def is_closed(route) -> bool:
        if route.path == "/abort_request":
            return not server_context.enable_abort_handling
        return (route.path.startswith("/distserve/")
                or route.endpoint.__module__.endswith(".management")
                and route.path not in HARMLESS)

    closed = [route for route in router.routes if is_closed(route)]
    router.routes[:] = [route for route in router.routes if not is_closed(route)]
    for path, methods in {(route.path, tuple(route.methods)) for route in closed}:
        option = ("--enable-abort-handling" if path == "/abort_request"
                  else "--allow-terminate-by-client")

        def refuse(path: str = path, option: str = option):
            return create_error_response(
                403, f"{path} is closed; a server started with {option} opens it")

        router.add_api_route(path, refuse_without_arguments(refuse), methods=list(methods),
                             include_in_schema=False)
    return router


def refuse_without_arguments(refuse):
    """FastAPI would take the arguments of `refuse` for those of the request."""
    return lambda: refuse()


# ---- Errors --------------------------------------------------------------------------------------

def add_error_handlers(app) -> None:
    """Whatever goes wrong, the answer says what in OpenAI's form."""
    from lmdeploy.serve.core.exceptions import RequestError
    from lmdeploy.serve.openai.errors import create_error_response
    from lmdeploy.serve.utils.server_utils import protocol_error_response
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException

    async def on_http(request, error: HTTPException):
        return create_error_response(error.status_code, f"{request.url.path}: {error.detail}")

    async def on_request(request, error: RequestError):
        return protocol_error_response(request.url.path, error)

    async def on_validation(request, error: ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return create_error_response(400, f"{place}: {first['msg']}")

    async def on_bug(request, error: Exception):
        return create_error_response(500, "an error of the server; its log tells more")

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestError, on_request)
    app.add_exception_handler(ValidationError, on_validation)
    app.add_exception_handler(Exception, on_bug)
    app.add_middleware(BodyCheck)


class BodyCheck:
    """ASGI middleware: reads a request's body, and refuses one that is too large, that is nested
    too deeply, or that holds half of a surrogate pair, which no tokenizer takes."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY:
                await self.refuse(413, f"a request may have {MAX_BODY} bytes", scope, send)
                return
        fault = fault_in_body(body)
        if fault:
            await self.refuse(400, fault, scope, send)
            return
        given = False

        async def replay():
            nonlocal given
            if given:
                return await receive()  # tells when the client has gone
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    @staticmethod
    async def refuse(status: int, reason: str, scope, send) -> None:
        from lmdeploy.serve.openai.errors import create_error_response

        await create_error_response(status, reason)(scope, None, send)


def fault_in_body(body: bytes) -> str:
    """Why a body in JSON cannot be worked on, or ""; what is no JSON, its reader refuses."""
    try:
        level = [json.loads(body)]
    except (ValueError, RecursionError):
        return ""
    if b"\\ud" in body.lower():
        try:
            json.dumps(level, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "the text holds half of a surrogate pair"
    for _ in range(MAX_DEPTH):
        level = [child for value in level if isinstance(value, dict | list)
                 for child in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return ""
    return f"more than {MAX_DEPTH} objects and lists within each other"


# ---- Log-probabilities ---------------------------------------------------------------------------

def chat_logprobs(tokenizer, token_ids=None, logprobs=None):
    """Log-probabilities in OpenAI's form: each token as text and as bytes (a Chinese character may
    be spread over tokens), and the likeliest ones, best first, with the chosen one among them.

    Args:
        token_ids: the chosen tokens.
        logprobs: for each of them, {token: log-probability} of it and of the likeliest.
    """
    from lmdeploy.serve.openai.protocol import (
        ChatCompletionTokenLogprob,
        ChoiceLogprobs,
        TopLogprob,
    )

    if token_ids is None or logprobs is None:
        return None
    content = []
    for chosen, candidates in zip(token_ids, logprobs, strict=False):
        top = [TopLogprob(token=text_of(tokenizer, token), logprob=value,
                          bytes=list(bytes_of(tokenizer, token)))
               for token, value in sorted(candidates.items(), key=lambda item: -item[1])]
        content.append(ChatCompletionTokenLogprob(
            token=text_of(tokenizer, chosen), bytes=list(bytes_of(tokenizer, chosen)),
            logprob=candidates[chosen], top_logprobs=top,
        ))
    return ChoiceLogprobs(content=content)


def text_of(tokenizer, token: int) -> str:
    """A token as text; bytes that are no character by themselves as \\x.."""
    return bytes_of(tokenizer, token).decode("utf-8", "backslashreplace")


def bytes_of(tokenizer, token: int) -> bytes:
    """The bytes that a token stands for."""
    spelt = tokenizer.convert_ids_to_tokens(token)
    table = byte_table()
    is_bytes = type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel"
    if is_bytes and token not in tokenizer.added_tokens_decoder and table.keys() >= set(spelt):
        return bytes(table[character] for character in spelt)
    return tokenizer.decode([token]).encode()


@lru_cache
def byte_table() -> dict[str, int]:
    """Byte-level vocabularies spell each byte as one visible character (GPT-2)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
