"""The chat page in a real browser: against a stand-in endpoint that does what it is told, and once
against the shipped model behind the real server.

What a test waits for is what a user would see; nothing is timed.
"""
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from benchmarks.loopback import JsonHandler, serving
from model import MINI_DIR
from model.web.client import ChatClient, is_loopback
from model.web.page import MAX_TURNS, message, turns_of
from model.web.server import build_app, serve
from model.web.texts import LANGUAGES, TABLE, preferred_language, texts_of

ROOT = Path(__file__).parent.parent
ZH, EN = texts_of("zh"), texts_of("en")
DESKTOP, PHONE = {"width": 1200, "height": 800}, {"width": 390, "height": 844}
PATIENCE = 20_000  # milliseconds that a busy machine may take to show something


class StandIn(JsonHandler):
    """Answers 回答 and the question, piece by piece. 没完 has no end; 断开 breaks off; a question
    that the server has in `replies` gets that reply, and in `failures` that status and message."""

    protocol_version = "HTTP/1.1"  # with chunks, so that an end is told from a break

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [
            {"id": "some/yuanmeng", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.silent.wait(PATIENCE / 1000)
        question = request["messages"][-1]["content"]
        length = sum(len(message["content"]) for message in request["messages"])
        if self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.answer({"message": "Invalid request format"}, 401)
        elif question in self.server.failures:
            status, text = self.server.failures[question]
            self.answer({"message": text, "code": status}, status)
        elif length >= self.server.context:
            self.answer({"message": f"Input length ({length}) must be smaller than the model "
                                    f"context length ({self.server.context}).", "code": 400}, 400)
        else:
            self.stream(question, min(request["max_tokens"], self.server.context - length), length)

    def stream(self, question: str, room: int, length: int) -> None:
        self.begin_stream()
        reply = self.server.replies.get(question, f"回答：{question}")
        pieces = [f"{number} " for number in range(100_000)] if question == "没完" else list(reply)
        try:
            for piece in pieces[:room]:
                self.event({"choices": [{"index": 0, "delta": {"content": piece}}]})
                if question == "断开":
                    self.close_connection = True
                    return
                if question == "没完" and self.server.stopping.wait(0.02):
                    return
                if self.server.together is not None:
                    self.server.together.wait()
        except ConnectionError:
            self.server.left.set()
            return
        finish = "length" if len(pieces) > room else "stop"
        written = min(len(pieces), room)
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        self.event({"choices": [], "usage": {
            "prompt_tokens": length, "completion_tokens": written, "total_tokens": written}})
        self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def event(self, content: dict) -> None:
        content |= {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "x"}
        self.chunk(f"data: {json.dumps(content)}\n\n")


class Endpoint(ThreadingHTTPServer):
    """The stand-in with what tests tell it (`replies`, `failures`, `context`, `key`, `together`)
    and what they ask it (`requests`; `left`: a client went away in the middle of an answer)."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), StandIn)
        self.replies, self.failures, self.requests = {}, {}, []
        self.context, self.key, self.together = 100_000, "none", None
        self.left, self.stopping = threading.Event(), threading.Event()
        self.silent = threading.Event()  # cleared: requests wait
        self.silent.set()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_endpoint(port: int = 0) -> Iterator[Endpoint]:
    with Endpoint(port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()


@contextmanager
def running_page(url: str, port: int = 0, **options) -> Iterator[str]:
    """The page on a free port, asking `url`; its own URL."""
    language = options.pop("language", None)
    with serving(build_app(ChatClient(url, **options), language), port) as page_url:
        yield page_url


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Endpoint, str]]:
    with running_endpoint() as endpoint, running_page(endpoint.url) as url:
        yield endpoint, url


@pytest.fixture
def endpoint(served) -> Endpoint:
    """The stand-in behind the page, as new."""
    endpoint = served[0]
    endpoint.replies, endpoint.failures, endpoint.requests = {}, {}, []
    endpoint.context, endpoint.key, endpoint.together = 100_000, "none", None
    endpoint.left.clear()
    endpoint.silent.set()
    return endpoint


@pytest.fixture
def context(browser) -> Iterator[BrowserContext]:
    """A browser without a past, in Chinese, on a desk. Whatever else happens: nothing is asked of
    another server, and no error is left in the console."""
    context = browser.new_context(locale="zh-CN", viewport=DESKTOP)
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    asked, errors = [], []
    context.on("requestfinished", lambda request: asked.append(request.url))
    context.on("requestfailed", lambda request: asked.extend(
        [request.url] * (request.failure != "csp")))  # what the policy stops does not go out
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield context
    context.close()
    assert not [url for url in asked if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url)]
    assert not errors


@pytest.fixture
def page(context, endpoint, served) -> Page:
    return opened(context, served[1])


def opened(context: BrowserContext, url: str) -> Page:
    """A new tab with the page in it, ready."""
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#model")).not_to_be_empty()
    return page


def reload(page: Page) -> None:
    page.reload()
    expect(page.locator("#model")).not_to_be_empty()


def say(page: Page, text: str) -> None:
    page.locator("#message textarea").fill(text)
    page.locator("#message textarea").press("Enter")


def messages(page: Page):
    return page.locator("#chat .message")


def said(page: Page) -> list[str]:
    """What the conversation on the screen says."""
    return [text.strip() for text in messages(page).all_inner_texts()]


def ask(page: Page, question: str, answer: str | None = None) -> None:
    """Ask, and wait for the complete answer."""
    before = messages(page).count()
    say(page, question)
    expect(messages(page)).to_have_count(before + 2)
    expect(messages(page).last).to_have_text(answer or f"回答：{question}")
    expect(page.locator("#status")).to_contain_text("token")


def history(page: Page):
    return page.locator("#history label")


def run_python(*arguments: str) -> subprocess.Popen:
    """In a process group of its own, with a proxy in its environment that leads nowhere."""
    return subprocess.Popen(
        [sys.executable, "-u", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for_line(process: subprocess.Popen, pattern: str) -> re.Match:
    """The first line of its output that the pattern is found in."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(pattern, line):
            threading.Thread(target=process.stdout.read, daemon=True).start()  # it must not block
            return found
    raise AssertionError(f"ended without {pattern}:\n{''.join(seen)}")


def end(process: subprocess.Popen) -> int:
    """Ctrl-C; its exit status."""
    os.killpg(process.pid, signal.SIGINT)
    return process.wait(60)


# ---- A conversation ------------------------------------------------------------------------------

def test_answers_stream_and_the_conversation_goes_with_each_question(page, endpoint):
    expect(page.locator("#model")).to_have_text("yuanmeng")
    ask(page, "你好")
    ask(page, "再见")
    assert said(page) == ["你好", "回答：你好", "再见", "回答：再见"]
    sent = endpoint.requests[-1]
    assert [(m["role"], m["content"]) for m in sent["messages"]] == [
        ("user", "你好"), ("assistant", "回答：你好"), ("user", "再见")]
    assert sent["stream"] and sent["model"] == "some/yuanmeng"
    line = page.locator("#status").inner_text()
    assert re.fullmatch(r"读 9 写 5 token · 首字 [\d.]+ 秒 · 平均 [\d.]+ token/秒", line.strip())


def test_what_is_on_the_screen_grows_before_the_answer_ends(page, endpoint):
    say(page, "没完")
    expect(messages(page).last).to_contain_text("20")
    assert not endpoint.left.is_set()
    page.get_by_role("button", name=ZH["stop"]).click()


def test_parameters_reach_the_server_and_stay_after_a_reload(page, endpoint):
    ask(page, "你好")
    assert endpoint.requests[-1].items() >= {
        "temperature": 0.75, "top_p": 0.9, "max_tokens": 512, "repetition_penalty": 1.05}.items()
    assert endpoint.requests[-1].get("seed") is None
    page.get_by_role("button", name=ZH["parameters"]).click()
    page.get_by_label(ZH["system"]).fill("你是海盗。")
    for key, value in (("temperature", "0"), ("max_tokens", "3"), ("seed", "7")):
        page.get_by_role("spinbutton", name=re.compile(re.escape(ZH[key]))).fill(value)
        page.keyboard.press("Tab")
    ask(page, "谁", "回答：")
    reload(page)
    ask(page, "谁", "回答：")
    for sent in endpoint.requests[-2:]:
        assert sent.items() >= {"temperature": 0, "max_tokens": 3, "seed": 7}.items()
        assert sent["messages"][0] == {"role": "system", "content": "你是海盗。"}


def test_stop_ends_it_on_the_server_and_keeps_what_was_said(page, endpoint):
    say(page, "没完")
    expect(messages(page).last).to_contain_text("10")
    page.get_by_role("button", name=ZH["stop"]).click()
    assert endpoint.left.wait(PATIENCE / 1000)
    expect(page.locator("#status")).to_have_text(ZH["stopped"])
    expect(page.get_by_role("button", name=ZH["send"])).to_be_visible()
    partial = said(page)[1]
    reload(page)
    expect(messages(page).last).to_have_text(partial)
    ask(page, "继续")
    assert endpoint.requests[-1]["messages"][1]["content"].strip() == partial


def test_stop_before_the_first_word_keeps_the_question(page, endpoint):
    endpoint.silent.clear()
    say(page, "等")
    expect(page.locator("#status")).to_have_text(ZH["waiting"])
    page.get_by_role("button", name=ZH["stop"]).click()
    expect(page.locator("#status")).to_have_text(ZH["stopped"])
    endpoint.silent.set()
    expect(messages(page)).to_have_text(["等"])
    page.get_by_role("button", name=ZH["retry"]).click()
    expect(messages(page)).to_have_text(["等", "回答：等"])


def test_a_question_during_an_answer_takes_its_place(page, endpoint):
    say(page, "没完")
    expect(messages(page).last).to_contain_text("5")
    say(page, "换一个")
    expect(messages(page)).to_have_count(4)
    expect(messages(page).last).to_have_text("回答：换一个")
    assert endpoint.left.wait(PATIENCE / 1000)


def test_a_closed_tab_stops_the_answer_too(page, endpoint):
    say(page, "没完")
    expect(messages(page).last).to_contain_text("5")
    page.close()
    assert endpoint.left.wait(PATIENCE / 1000)


def test_retry_asks_the_last_question_again(page, endpoint):
    ask(page, "一")
    ask(page, "二")
    endpoint.replies["二"] = "另一个回答"
    page.get_by_role("button", name=ZH["retry"]).click()
    expect(messages(page).last).to_have_text("另一个回答")
    assert said(page) == ["一", "回答：一", "二", "另一个回答"]
    assert endpoint.requests[-1] == endpoint.requests[-2]


def test_an_edited_question_is_answered_in_place_of_what_followed(page, endpoint):
    ask(page, "一")
    ask(page, "二")
    page.get_by_role("button", name="编辑").first.click()
    page.locator("#chat textarea").fill("三")
    page.locator("#chat").get_by_role("button", name="发送").click()
    expect(messages(page)).to_have_count(2)
    expect(messages(page).last).to_have_text("回答：三")
    assert len(endpoint.requests[-1]["messages"]) == 1


def test_an_example_begins_a_conversation(page):
    page.get_by_text(ZH["example_2"]).click()
    expect(messages(page).last).to_have_text(f"回答：{ZH['example_2']}")


def test_an_empty_message_is_not_sent_and_a_long_conversation_ends(page, endpoint):
    say(page, "   ")
    page.evaluate("""(turns) => {
        const turn = [{role: "user", content: "问"}, {role: "assistant", content: "答"}];
        localStorage["yuanmeng.conversation.long"] = JSON.stringify(
            {title: "长", time: 1, messages: Array(turns).fill(turn).flat()});
        sessionStorage["yuanmeng.current"] = "long";
    }""", MAX_TURNS)
    reload(page)
    expect(messages(page)).to_have_count(2 * MAX_TURNS)
    say(page, "还有")
    expect(page.get_by_role("alert")).to_have_text(ZH["full"].format(turns=MAX_TURNS))
    expect(page.locator("#message textarea")).to_have_value("还有")
    assert not endpoint.requests


def test_two_users_are_answered_at_the_same_time(context, browser, served, endpoint):
    other = browser.new_context(locale="en-US")
    pages = [opened(context, served[1]), opened(other, served[1])]
    endpoint.together = threading.Barrier(2, timeout=PATIENCE / 1000)
    for page, question in zip(pages, "甲乙", strict=True):
        say(page, question)
    for page, question in zip(pages, "甲乙", strict=True):
        expect(messages(page).last).to_have_text(f"回答：{question}")
    other.close()


# ---- Conversations kept in the browser -----------------------------------------------------------

def test_conversations_can_be_begun_changed_and_deleted(page, endpoint):
    ask(page, "第一个")
    page.get_by_role("button", name=ZH["new"]).click()
    expect(messages(page)).to_have_count(0)
    ask(page, "第二个")
    assert len(endpoint.requests[-1]["messages"]) == 1
    expect(history(page)).to_have_text(["第二个", "第一个"])
    history(page).last.click()
    expect(messages(page).first).to_have_text("第一个")
    reload(page)
    expect(messages(page)).to_have_text(["第一个", "回答：第一个"])
    expect(page.get_by_role("radio", name="第一个")).to_be_checked()

    delete = page.get_by_role("button", name=ZH["delete"])
    with page.expect_event("dialog", lambda dialog: dialog.dismiss() or True):
        delete.click()
    expect(messages(page)).to_have_count(2)
    with page.expect_event("dialog", lambda dialog: dialog.accept() or True):
        delete.click()
    expect(messages(page)).to_have_count(0)
    expect(history(page)).to_have_text(["第二个"])
    reload(page)
    expect(history(page)).to_have_text(["第二个"])


def test_changing_the_conversation_stops_the_answer_and_keeps_it(page, endpoint):
    ask(page, "第一个")
    page.get_by_role("button", name=ZH["new"]).click()
    expect(messages(page)).to_have_count(0)
    say(page, "没完")
    expect(messages(page).last).to_contain_text("10")
    history(page).last.click()
    assert endpoint.left.wait(PATIENCE / 1000)
    expect(messages(page)).to_have_text(["第一个", "回答：第一个"])
    expect(page.get_by_role("button", name=ZH["send"])).to_be_visible()
    history(page).first.click()
    expect(messages(page).last).to_contain_text("0 1 2 3 4 5 6 7 8 9 10")


def test_tabs_do_not_overwrite_each_other(context, page, served):
    other = opened(context, served[1])
    ask(page, "甲")
    ask(other, "乙")
    ask(page, "丙")
    reload(page)
    expect(history(page)).to_have_text(["甲", "乙"])
    history(page).last.click()
    expect(messages(page)).to_have_text(["乙", "回答：乙"])


def test_a_conversation_that_goes_on_in_two_tabs_becomes_two(context, page, served):
    ask(page, "甲")
    other = opened(context, served[1])
    history(other).first.click()
    expect(messages(other)).to_have_count(2)
    ask(other, "那里")
    ask(page, "这里")
    ask(page, "还是这里")
    reload(page)
    expect(history(page)).to_have_text(["甲", "甲"])
    expect(messages(page).nth(2)).to_have_text("这里")
    history(page).last.click()
    expect(messages(page).nth(2)).to_have_text("那里")


def test_a_full_store_makes_room_by_the_oldest(page, endpoint):
    page.evaluate("""() => {
        const long = "长".repeat(50_000);
        for (let i = 0; ; i++) {
            try {
                localStorage[`yuanmeng.conversation.${i}`] = JSON.stringify(
                    {title: `旧 ${i}`, time: i, messages: [{role: "user", content: long}]});
            } catch { break; }
        }
    }""")
    endpoint.replies["新的" * 10_000] = "好"
    ask(page, "新的" * 10_000, "好")
    expect(history(page).first).to_contain_text("新的")
    expect(page.get_by_text("旧 0", exact=True)).to_have_count(0)
    expect(page.get_by_text("旧 9", exact=True)).to_have_count(1)


# ---- What goes wrong -----------------------------------------------------------------------------

def expect_one_line(page: Page, reason: str, question: str) -> None:
    """The reason, all in one line, with the question still there and nothing else amiss."""
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(f"{reason} {ZH['kept']}")
    assert "\n" not in alert.inner_text().strip()
    expect(messages(page).locator(f"text={question}").first).to_be_visible()
    expect(page.get_by_role("button", name=ZH["send"])).to_be_visible()
    assert "Traceback" not in page.content()


@pytest.mark.parametrize("failure, reason", [
    ((503, "overloaded"), ZH["busy"]),
    ((404, "The model 'x'\ndoes not exist."),
     "拒绝了这个请求：404 The model 'x' does not exist."),
    ((500, "<b>boom</b>"), "拒绝了这个请求：500 <b>boom</b>"),
])
def test_a_refusal_is_one_line_and_retry_works(page, endpoint, failure, reason):
    endpoint.failures["问"] = failure
    say(page, "问")
    expect_one_line(page, reason, "问")
    endpoint.failures.clear()
    reload(page)
    page.get_by_role("button", name=ZH["retry"]).click()
    expect(messages(page)).to_have_text(["问", "回答：问"])
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_refused_key_is_said(page, endpoint):
    endpoint.key = "secret"
    say(page, "问")
    expect_one_line(page, ZH["bad_key"], "问")


def test_the_right_key_and_name_are_sent(context, endpoint):
    endpoint.key = "secret"
    with running_page(f"{endpoint.url}/v1/", api_key="secret", model_name="mine") as url:
        page = opened(context, url)
        expect(page.locator("#model")).to_have_text("mine")
        ask(page, "问")
    assert endpoint.requests[-1]["model"] == "mine"


def test_a_break_in_the_middle_keeps_the_beginning(page):
    say(page, "断开")
    expect_one_line(page, ZH["broken_off"], "断开")
    assert said(page) == ["断开", "回"]


def test_a_server_that_is_down_and_comes_back(context):
    with running_endpoint() as first:
        port, down = first.server_port, ZH["no_server"].format(url=first.url)
    with running_page(f"http://127.0.0.1:{port}") as url:
        page = context.new_page()
        page.goto(url)
        expect(page.get_by_role("alert")).to_have_text(down)
        say(page, "在吗")
        expect_one_line(page, down, "在吗")
        with running_endpoint(port):
            page.get_by_role("button", name=ZH["retry"]).click()
            expect(messages(page)).to_have_text(["在吗", "回答：在吗"])
            expect(page.locator("#model")).to_have_text("yuanmeng")


@pytest.mark.slow
def test_a_restart_of_the_page_loses_nothing(context, endpoint):
    def start(port: int) -> subprocess.Popen:
        code = f"from model.web.server import serve; serve({endpoint.url!r}, server_port={port})"
        return run_python("-c", code)

    web = start(0)
    try:
        url = wait_for_line(web, r"Open (\S+) in a browser")[1]
        page = opened(context, url)
        ask(page, "以前")
        assert end(web) in (0, 130, -signal.SIGINT)
        web = start(int(url.rsplit(":")[-1]))
        wait_for_line(web, "Open ")
        ask(page, "以后")
    finally:
        end(web)
    assert [m["content"] for m in endpoint.requests[-1]["messages"]] == [
        "以前", "回答：以前", "以后"]


def test_what_is_no_endpoint_is_said(context, served):
    with running_page(served[1]) as url:  # the page itself
        page = context.new_page()
        page.goto(url)
        expect(page.get_by_role("alert")).to_contain_text(served[1].rstrip("/"))


def test_the_earliest_turns_are_left_out_when_the_context_is_full(page, endpoint):
    for question in ("第一问", "第二问", "第三问"):
        ask(page, question)
    endpoint.context = 20
    ask(page, "第四问")
    sent = [m["content"] for m in endpoint.requests[-1]["messages"]]
    assert sent == ["第三问", "回答：第三问", "第四问"]
    expect(page.locator("#status")).to_contain_text(ZH["forgotten"].format(forgotten=2))
    assert len(said(page)) == 8  # on the screen nothing is lost
    asked = len(endpoint.requests)
    ask(page, "第五问")
    assert len(endpoint.requests) == asked + 2  # what did not fit is not tried again


def test_an_answer_that_fills_the_context_makes_room_for_the_next(page, endpoint):
    ask(page, "一")
    ask(page, "二")
    endpoint.context = 16
    endpoint.replies["三"] = "长" * 20
    ask(page, "三", "长" * 5)
    expect(page.locator("#status")).to_contain_text(ZH["cut"])
    page.get_by_role("button", name=ZH["retry"]).click()
    expect(messages(page).last).to_have_text("长" * 10)
    expect(page.locator("#status")).to_contain_text(ZH["forgotten"].format(forgotten=1))


def test_a_message_longer_than_the_context_is_said(page, endpoint):
    endpoint.context = 5
    say(page, "太长的一条消息")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("context length (5)")
    expect(alert).to_contain_text(ZH["kept"])


# ---- Safety --------------------------------------------------------------------------------------

HOSTILE = """<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 2">
<img src="http://192.0.2.1/spy.png"> ![spy](http://192.0.2.1/spy2.png)
<iframe src="http://192.0.2.1/"></iframe> <svg onload="window.hacked = 3"></svg>
[link](javascript:window.hacked=4) <style>body { background: url(http://192.0.2.1/css) }</style>
<a href="javascript:window.hacked=5">go</a> <form action="http://192.0.2.1/"><button>b</button>

**bold** and `code < 1`

```html
<b>shown</b>
```
"""


def test_what_a_model_says_is_shown_and_never_run(page, endpoint):
    endpoint.replies["攻击"] = HOSTILE
    say(page, "攻击")
    expect(messages(page).last.locator("strong")).to_have_text("bold")
    expect(messages(page).last.locator("pre")).to_contain_text("<b>shown</b>")
    expect(page.locator("#status")).to_contain_text("token")
    for link in page.locator("#chat .message a").all():
        assert "javascript" not in (link.get_attribute("href") or "")
    harmful = messages(page).locator("iframe, script, style, form, img, [onload], [onerror]")
    assert harmful.evaluate_all("found => found.map((one) => one.outerHTML)") == []
    assert page.evaluate("window.hacked") is None
    reload(page)  # and not when it comes from the store
    expect(messages(page).last.locator("strong")).to_have_text("bold")
    assert page.evaluate("window.hacked") is None


def test_a_models_name_is_text(context, endpoint):
    with running_page(endpoint.url, model_name="<img src=x onerror='window.hacked=1'>") as url:
        page = opened(context, url)
        expect(page.locator("#model")).to_contain_text("<img")
        assert page.evaluate("window.hacked") is None


# ---- Languages, phones, readers ------------------------------------------------------------------

def test_every_text_is_in_both_languages_and_fills_the_same_places():
    for key, row in TABLE.items():
        assert len(row) == len(LANGUAGES) and all(row), key
        zh, en = (sorted(re.findall(r"{(\w+)", text)) for text in row)
        assert zh == en, key


@pytest.mark.parametrize("header, language", [
    ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-US,en;q=0.5", "en"), ("fr", "en"), ("", "zh"),
])
def test_the_language_is_the_browsers(header, language):
    assert preferred_language(header) == language


def test_the_page_in_english_and_the_way_to_the_other(browser, served, endpoint):
    context = browser.new_context(locale="en-US")
    page = opened(context, served[1])
    expect(page.get_by_role("button", name=EN["send"])).to_be_visible()
    ask(page, "hi", "回答：hi")
    expect(page.locator("#status")).to_contain_text("tokens/s")
    page.get_by_role("link", name="中文").click()
    expect(page.get_by_role("button", name=ZH["send"])).to_be_visible()
    expect(messages(page).first).to_have_text("hi")  # the conversation comes along
    assert page.title() == ZH["title"]
    context.close()


def test_a_language_can_be_insisted_on(context, endpoint):
    with running_page(endpoint.url, language="en") as url:
        page = opened(context, url)
        expect(page.get_by_role("button", name=EN["send"])).to_be_visible()


def test_on_a_phone_nothing_is_wider_than_the_screen(browser, served, endpoint):
    context = browser.new_context(locale="zh-CN", viewport=PHONE, has_touch=True, is_mobile=True)
    page = opened(context, served[1])

    def expect_to_fit() -> None:
        width, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= screen == PHONE["width"]

    expect(page.get_by_role("button", name=ZH["send"])).to_be_in_viewport()
    expect_to_fit()
    endpoint.replies["宽"] = f"{'w' * 300}\n\n```\n{'c' * 300}\n```\n\n|{'表|' * 40}\n|{'-|' * 40}\n"
    say(page, "宽")
    expect(page.locator("#status")).to_contain_text("token")
    expect_to_fit()
    expect(page.get_by_role("button", name=ZH["send"])).to_be_in_viewport()
    page.locator(".sidebar .toggle-button").click()
    expect(page.get_by_role("button", name=ZH["new"])).to_be_in_viewport()
    page.get_by_role("button", name=ZH["parameters"]).click()
    expect(page.get_by_label(ZH["system"])).to_be_visible()
    expect_to_fit()
    page.get_by_role("button", name=ZH["new"]).click()  # and the sidebar makes way
    expect(page.get_by_role("button", name=ZH["new"])).not_to_be_in_viewport()
    context.close()


def test_every_control_has_a_name(page):
    ask(page, "你好")
    page.get_by_role("button", name=ZH["parameters"]).click()
    expect(page.get_by_label(ZH["system"])).to_be_visible()
    tree = page.locator("body").aria_snapshot()
    controls = re.findall(r"- (button|textbox|slider|spinbutton|radio|link)\b(.*)", tree)
    assert len(controls) > 15
    assert not [control for control in controls if '"' not in control[1]]


# ---- The parts -----------------------------------------------------------------------------------

def test_a_question_without_an_answer_is_left_out_of_what_the_model_reads():
    chat = [message("user", "一"), message("user", "二"), message("assistant", "答"),
            message("user", "三")]
    assert [[m["content"] for m in turn] for turn in turns_of(chat)] == [["二", "答"], ["三"]]
    assert turns_of([]) == [] == turns_of([message("assistant", "答")])


@pytest.mark.parametrize("url", ["localhost:23333", "ftp://localhost", "http://", "模型"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match="is no URL like"):
        ChatClient(url)


def test_loopback_is_told_from_the_rest():
    assert is_loopback("localhost") and is_loopback("127.0.0.2") and is_loopback("::1")
    assert not is_loopback("10.0.0.1") and not is_loopback("example.com")


# ---- The command ---------------------------------------------------------------------------------

def test_what_cannot_be_served_is_one_line():
    with pytest.raises(SystemExit, match=r"^serve gradio: 'localhost:23333' is no URL like .*$"):
        serve("localhost:23333")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"cannot listen at 127.0.0.1:{port} .*--server-port"):
            serve("http://localhost:23333", server_port=port)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmdeploy") is None,
                    reason="LMDeploy is published for Linux on x86-64 only")
def test_the_shipped_model_answers_through_the_server_and_the_page(context):
    server = run_python("lmdeploy_cli.py", "serve", "api_server", str(MINI_DIR),
                        "--dtype", "float32", "--server-port", str(free_port()))
    try:
        url = wait_for_line(server, r"Uvicorn running on (\S+)")[1]
        web = run_python("lmdeploy_cli.py", "serve", "gradio", url, "--server-port", "0")
        try:
            page = opened(context, wait_for_line(web, r"Open (\S+) in a browser")[1])
            expect(page.locator("#model")).to_have_text(MINI_DIR.name)
            page.get_by_text(ZH["example_1"]).click()  # 你是谁
            expect(messages(page).last).to_contain_text("缘梦")
            expect(page.locator("#status")).to_contain_text("token/秒")
        finally:
            assert end(web) in (0, 130, -signal.SIGINT)
    finally:
        end(server)
