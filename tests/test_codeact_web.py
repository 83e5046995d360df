"""The agent's tab of the web page in a real browser: a scripted model, the real sandbox."""
import re
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
from playwright.sync_api import Page, expect

from benchmarks.loopback import serving
from benchmarks.scripted_endpoint import Reply, Script, in_order, scripted_endpoint
from codeact.graph import Event
from codeact_pipeline import tools
from model.web.client import ChatClient
from model.web.server import build_app
from model.web.texts import texts_of
from model.web.workshop import Transcript, Workshop, verbatim

ZH = texts_of("zh")
PATIENCE = 60_000  # milliseconds that a busy machine may take to show something
CODE = "看看。\n```python\nprint(derivative(lambda x: x * x, 3))\n```"
SLEEP = "```python\nkept = 1\nimport time\ntime.sleep(1000)\n```"


@pytest.fixture
def served(browser) -> Iterator[SimpleNamespace]:
    """The agent's tab, open; `script.reply` decides what the model says."""
    script = Script(in_order())
    with scripted_endpoint(script) as url:
        workshop = Workshop(url, tools)
        with serving(build_app(ChatClient(url), None, workshop)) as page_url:
            context = browser.new_context(locale="zh-CN", viewport={"width": 1200, "height": 800})
            context.set_default_timeout(PATIENCE)
            expect.set_options(timeout=PATIENCE)
            errors = []
            context.on("weberror", lambda error: errors.append(str(error.error)))
            page = context.new_page()
            page.goto(page_url)
            page.get_by_role("tab", name=ZH["agent_tab"]).click()
            yield SimpleNamespace(script=script, page=page, workshop=workshop)
            context.close()
            assert not errors


def ask(page: Page, text: str) -> None:
    page.locator("#agent-message textarea").fill(text)
    page.locator("#agent-message textarea").press("Enter")


def messages(page: Page):
    return page.locator("#agent .message")


def sandboxes() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True)
            if process.name() == "deno"]


def test_code_observation_and_answer_are_shown_in_order(served):
    served.script.reply = in_order(CODE, "斜率是 6。", CODE, "还是 6。")
    ask(served.page, "x² 在 3 处的斜率？")
    expect(messages(served.page)).to_have_count(4)
    expect(messages(served.page).nth(1)).to_contain_text("print(derivative(lambda x: x * x, 3))")
    expect(messages(served.page).nth(2)).to_contain_text("System Message")
    expect(messages(served.page).nth(2)).to_contain_text(re.compile(r"输出如下：\s*(6|5\.99|6\.0)"))
    expect(messages(served.page).nth(3)).to_have_text("斜率是 6。")
    expect(served.page.locator("#agent-status")).to_contain_text("运行了 1 次代码")
    ask(served.page, "再算一次")
    expect(messages(served.page)).to_have_count(8)
    sent = [message["role"] for message in served.script.requests[-1]["messages"]]
    assert sent == ["system", *["user", "assistant"] * 3, "user"]


def test_what_the_model_writes_is_shown_while_it_writes_and_stop_ends_it(served):
    served.script.reply = lambda _: Reply("再来 ", endless=True)
    served.script.pieces_per_second = 50
    ask(served.page, "没完")
    expect(messages(served.page).last).to_contain_text("再来 再来 再来")
    assert not served.script.left.is_set()
    served.page.get_by_role("button", name=ZH["stop"]).click()
    assert served.script.left.wait(PATIENCE / 1000)
    expect(served.page.locator("#agent-status")).to_have_text(ZH["stopped"])
    expect(messages(served.page).last).to_contain_text("再来")


def test_stop_ends_the_process_and_the_next_question_hears_of_it(served):
    served.script.reply = in_order(SLEEP, "```python\nprint(kept)\n```", "没有了。")
    ask(served.page, "睡")
    expect(messages(served.page).last).to_contain_text("time.sleep(1000)")
    served.page.wait_for_timeout(100)
    while not sandboxes():
        served.page.wait_for_timeout(50)
    running = sandboxes()
    served.page.get_by_role("button", name=ZH["stop"]).click()
    expect(served.page.locator("#agent-status")).to_have_text(ZH["stopped"])
    assert not psutil.wait_procs(running, timeout=PATIENCE / 1000)[1]
    ask(served.page, "还在吗？")
    expect(messages(served.page).last).to_have_text("没有了。")
    expect(messages(served.page).nth(-2)).to_contain_text("NameError")


def test_a_new_conversation_knows_nothing_of_the_old_and_ends_its_process(served):
    served.script.reply = in_order(CODE, "6。", "你好。")
    ask(served.page, "算")
    expect(messages(served.page).last).to_have_text("6。")
    running = sandboxes()
    assert running
    served.page.get_by_role("tabpanel").get_by_role("button", name=ZH["new"]).last.click()
    expect(messages(served.page)).to_have_count(0)
    assert not psutil.wait_procs(running, timeout=PATIENCE / 1000)[1]
    ask(served.page, "你好")
    expect(messages(served.page).last).to_have_text("你好。")
    assert len(served.script.requests[-1]["messages"]) == 2


def test_what_code_prints_is_shown_as_text(served):
    evil = "```python\nprint('`' * 3 + '<img src=x onerror=alert(1)>')\n```"
    served.script.reply = in_order(evil, "<script>alert(2)</script>好")
    ask(served.page, "坏")
    expect(messages(served.page).nth(2)).to_contain_text("```<img src=x onerror=alert(1)>")
    expect(messages(served.page).last).to_contain_text("好")
    assert served.page.locator("#agent img[src=x], #agent script").count() == 0


def test_an_endpoint_that_refuses_is_said_in_a_line(served):
    served.script.reply = lambda _: Reply("what?", 400)
    ask(served.page, "你好")
    expect(served.page.locator("#agent-status [role=alert]")).to_contain_text("status 400")
    expect(served.page.get_by_role("button", name=ZH["send"]).last).to_be_visible()


def test_the_chat_beside_it_works(served):
    served.script.reply = in_order("我是缘梦。")
    served.page.get_by_role("tab", name=ZH["chat_tab"]).click()
    served.page.locator("#message textarea").fill("你是谁")
    served.page.locator("#message textarea").press("Enter")
    expect(served.page.locator("#chat .message").last).to_have_text("我是缘梦。")
    expect(served.page.locator("#history label")).to_have_count(1)


def test_an_answer_that_is_asked_for_again_replaces_its_first_part():
    transcript = Transcript(texts_of("en"))
    for kind, text in (("token", "half"), ("retry", "broke off"), ("token", "who"),
                       ("token", "le"), ("answer", "whole"), ("limit", "end")):
        transcript.add(Event(kind, text, 0))
    assert [part["content"][0]["text"] for part in transcript.messages] == ["whole", "end"]


@pytest.mark.parametrize("text", ["plain", "```\nx\n```", "a ````` b"])
def test_a_fence_is_longer_than_any_within(text):
    shown = verbatim(text)
    fence = shown.split("text\n")[0]
    assert set(fence) == {"`"} and fence not in text and shown.endswith(f"\n{fence}")
