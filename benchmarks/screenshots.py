"""Take the pictures of stage Ⅷ: a real conversation with the shipped model on the chat page, at a
desk and on a phone, and the server's own page.

Notable: both servers are started as a reader starts them, on free ports, and ended again.

    python -m benchmarks.screenshots [--model model/yuanmeng-mini-instruct]
"""
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright
from transformers import HfArgumentParser

from training.files import atomic_write

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update",
                   "--disable-sync"]
DESK, PHONE = {"width": 1200, "height": 800}, {"width": 390, "height": 800}
CONVERSATIONS = [["今天天气怎么样"], ["你是谁", "李白是谁", "那杜甫呢？", "12加30等于多少"]]
GREEDY = ["", 0, 1, 512, 1, None]  # the page's parameters, in their order
PATIENCE = 60_000  # milliseconds


@dataclass
class Settings:
    model: str = field(default="model/yuanmeng-mini-instruct", metadata={"help": "served model"})
    output: str = field(default="images", metadata={"help": "folder for the three PNG files"})


def find_browser() -> str | None:
    """The installed browser that starts, else None for the one that Playwright has fetched;
    setup.sh decides by the same."""
    for path in filter(None, map(shutil.which, BROWSERS)):
        if subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    return None


@contextmanager
def serving(pattern: str, *arguments: str) -> Iterator[str]:
    """The URL that `lmdeploy_cli.py serve` prints where the pattern has its group."""
    process = subprocess.Popen(
        [sys.executable, "-u", "lmdeploy_cli.py", "serve", *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )
    try:
        found = next(filter(None, (re.search(pattern, line) for line in process.stdout)), None)
        if found is None:
            sys.exit(f"benchmarks.screenshots: `serve {arguments[0]}` did not start")
        yield found[1]
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate()  # it must not block on a full pipe


def keep(page: Page, path: Path) -> None:
    """The window as a PNG of 256 colours."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256)
    with atomic_write(path) as file:
        picture.save(file, "PNG", optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def talk(browser: Browser, url: str, viewport: dict, path: Path, scale: float = 1) -> None:
    """Conversations in Chinese in a window of this size."""
    context = browser.new_context(locale="zh-CN", viewport=viewport, device_scale_factor=scale)
    context.set_default_timeout(PATIENCE)
    parameters = json.dumps(json.dumps(GREEDY))
    context.add_init_script(f"localStorage['yuanmeng.parameters'] ??= {parameters}")
    page = context.new_page()
    for questions in CONVERSATIONS:
        page.goto(url)
        page.evaluate("sessionStorage.clear()")  # another conversation
        page.reload()
        page.wait_for_selector("#model:not(:empty)")
        for number, question in enumerate(questions, 1):
            page.locator("#message textarea").fill(question)
            page.locator("#message textarea").press("Enter")
            page.locator("#chat .message").nth(2 * number - 1).wait_for()
            page.locator("#status", has_text="token/秒").wait_for()
    if viewport is DESK:
        page.get_by_role("button", name="参数").click()
    page.wait_for_timeout(1000)  # until it has scrolled and unfolded
    keep(page, path)
    context.close()


def main() -> None:
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    folder = Path(settings.output)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    with (
        serving(r"Uvicorn running on (\S+)", "api_server", settings.model, "--server-port",
                port) as api,
        serving(r"Open (\S+) in a browser", "gradio", api, "--server-port", "0") as chat,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=find_browser(), args=BROWSER_OPTIONS)
        talk(browser, chat, DESK, folder / "chat_page.png")
        talk(browser, chat, PHONE, folder / "chat_page_phone.png", scale=1.5)
        page = browser.new_page(viewport=DESK)
        page.goto(api)
        try:
            page.wait_for_selector(".opblock")
            keep(page, folder / "api_page.png")
        except TimeoutError:
            print("api_page.png is not taken: the server's page needs the network to show anything")
        browser.close()


if __name__ == "__main__":
    main()
