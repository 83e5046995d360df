"""The page on a port of this computer, in the language of whoever opens it."""
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .client import ChatClient, is_loopback
from .page import build_page
from .texts import LANGUAGES, preferred_language
from .workshop import Workshop

HERE = Path(__file__).parent
SECONDS_TO_STOP = 3  # after Ctrl-C, for answers that still come

# A model's answer may name a picture elsewhere; showing it would tell that server what was said.
# Gradio's own scripts are inline and are built at run time.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
MONOSPACE = ["ui-monospace", "Consolas", "Noto Sans Mono CJK SC", "monospace"]


class ContentSecurityPolicy:
    """Adds that header to every answer. No `BaseHTTPMiddleware`: that one hides from Gradio that a
    browser has gone, and the model would speak on to nobody."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(part: Message) -> None:
            if part["type"] == "http.response.start":
                MutableHeaders(scope=part)["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
            await send(part)

        await self.app(scope, receive, send_with_policy)


def build_app(
    client: ChatClient, language: str | None = None, workshop: Workshop | None = None
) -> FastAPI:
    """The page at /zh/ and /en/; / leads to `language`, or to the browser's own. The workshop is
    where the agent's code runs; it is closed with the server."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if workshop is not None:
            await workshop.close()

    app = FastAPI(openapi_url=None, lifespan=lifespan)

    app.add_middleware(ContentSecurityPolicy)

    @app.get("/")
    def choose_language(request: Request):
        chosen = language or preferred_language(request.headers.get("accept-language", ""))
        return RedirectResponse(f"{chosen}/")

    for name in LANGUAGES:
        gr.mount_gradio_app(
            app, build_page(client, name, workshop), f"/{name}", footer_links=[], show_error=False,
            max_file_size="1kb", css_paths=HERE / "page.css",
            head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
            theme=gr.themes.Default(primary_hue="indigo", font=FONTS, font_mono=MONOSPACE),
        )
    return app


def serve(
    api_server_url: str, *, server_name: str = "127.0.0.1", server_port: int = 6006,
    api_key: str | None = None, model_name: str | None = None, language: str | None = None,
    tools: Sequence = (),
) -> None:
    """Serve the page until Ctrl-C; `tools` are the agent's. Exits with one line if it cannot."""
    try:
        client = ChatClient(api_server_url, api_key, model_name)
        app = build_app(client, language, Workshop(client.url, tools, api_key, model_name))
        listener = socket.create_server((server_name, server_port))
    except ValueError as error:
        sys.exit(f"serve gradio: {error}")
    except OSError as error:
        sys.exit(f"serve gradio: cannot listen at {server_name}:{server_port} ({error.strerror}); "
                 "stop what is there, or choose another --server-port")
    print(f"Open http://{server_name}:{listener.getsockname()[1]} in a browser to chat with "
          f"{api_server_url} (Ctrl-C stops)", flush=True)
    if not is_loopback(server_name):
        print("Whoever reaches this computer can use the page: it asks for no password.",
              flush=True)
    config = uvicorn.Config(  # what is below critical: the open tabs that Ctrl-C cuts off
        app, log_level="critical", timeout_graceful_shutdown=SECONDS_TO_STOP, access_log=False
    )
    uvicorn.Server(config).run(sockets=[listener])
