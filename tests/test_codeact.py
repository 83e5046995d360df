"""The agent without its real sandbox: prompts, context, graph, endpoint, against a scripted model.

The model is an endpoint on this machine that streams what the test says, so that the whole client
is in use; the sandbox here only notes what it is asked to run.
"""
import asyncio
import dataclasses
from contextlib import aclosing
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from benchmarks.scripted_endpoint import Reply, Script, in_order, scripted_endpoint
from codeact import graph
from codeact.agents import Agents, language_of, own_tokens
from codeact.context import (
    CUT,
    ContextFull,
    estimate_tokens,
    fit_context,
    is_observation,
    observation_message,
    shorten,
)
from codeact.endpoint import EndpointError, Served, api_url, chat_model, find_served
from codeact.graph import ask, build_agent
from codeact.prompts import LAST_STEP, STATE_LOST, STEP_LIMIT, describe_output, system_prompt

CODE = "Let me see.\n```python\nprint(1)\n```"
TEN_SECONDS = 10


@dataclass(frozen=True)
class Seen:
    """An observation."""

    output: str = ""
    error: str | None = None
    state_lost: bool = False
    seconds: float = 0.0


class NotedSandbox:
    """Prints 1 whatever it is asked, or waits; `ran` and `ended` tell what it was asked."""

    def __init__(self, observation: Seen = Seen("1\n"), waits: bool = False):
        self.observation, self.waits, self.ran, self.ended = observation, waits, [], []
        self.started = asyncio.Event()

    async def run(self, code: str, conversation: str = "default") -> Seen:
        self.ran.append((code, conversation))
        self.started.set()
        if self.waits:
            await asyncio.sleep(1000)
        return self.observation

    async def end(self, conversation: str) -> None:
        await asyncio.sleep(0.01)
        self.ended.append(conversation)


def agent_at(url: str, sandbox, max_steps: int = 3, **options):
    model = chat_model(Served(f"{url}/v1", "scripted/model"))
    return build_agent(model, sandbox, system="S", max_steps=max_steps, **options)


async def events_of(agent, question: str = "Q", conversation: str = "default") -> list:
    async with aclosing(ask(agent, question, conversation)) as events:
        return [event async for event in events]


def run_script(script: Script, sandbox=None, question: str = "Q", **options) -> list:
    async def main() -> list:
        with scripted_endpoint(script) as url:
            return await events_of(agent_at(url, sandbox or NotedSandbox(), **options), question)

    return asyncio.run(asyncio.wait_for(main(), 6 * TEN_SECONDS))


def kinds(events) -> list[str]:
    """The events without the pieces of messages."""
    return [event.kind for event in events if event.kind != "token"]


def sent(script: Script, request: int = -1) -> list[tuple[str, str]]:
    return [(message["role"], message["content"])
            for message in script.requests[request]["messages"]]


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(graph, "RETRY_AFTER", (0, 0, 0))


# ---- Prompts -------------------------------------------------------------------------------------

def derivative(f, x, h=1e-5):
    """Compute the numerical derivative.

    Parameters:
    - f: callable
    """


@pytest.mark.parametrize("language", ["en", "zh"])
def test_prompts_name_the_tools_and_the_short_one_is_short(language):
    long, short = (system_prompt([derivative], language, short) for short in (False, True))
    assert "def derivative(f, x, h=1e-05)" in long and "- f: callable" in long
    assert short.splitlines()[-1] == "derivative(f, x, h=1e-05): Compute the numerical derivative."
    count = own_tokens()
    assert count(short) <= 80 < count(long) <= 400
    assert "derivative" not in system_prompt([], language, True) + system_prompt([], language)
    assert "```python" in long and "```python" in short


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_model_reads_output_error_and_loss(language):
    assert describe_output(Seen("a\n b\n"), language).endswith("\na\n b")
    nothing = describe_output(Seen("\n"), language)
    assert "print(...)" in nothing
    failed = describe_output(Seen("before\n", "Traceback\nNameError: x\n"), language)
    assert failed.endswith("\nbefore\nTraceback\nNameError: x")
    assert describe_output(Seen("1", state_lost=True), language).endswith(STATE_LOST[language])
    assert "the output is as follows:\n1" in describe_output(Seen("1"))


# ---- Context -------------------------------------------------------------------------------------

def conversation(*texts: str) -> list:
    """Q: a question, C: code, O: its output, A: an answer."""
    make = {"Q": HumanMessage, "C": AIMessage, "A": AIMessage, "O": observation_message}
    return [make[text[0]](text) for text in texts]


def fitted(room: int | None, *texts: str) -> list[str]:
    messages, _ = fit_context("S", conversation(*texts), room, len)
    return [message.content for message in messages[1:]]


def test_earlier_questions_go_first_then_the_oldest_steps():
    texts = ["Q1", "C1", "O1", "A1", "Q2", "A2", "Q3", "C3", "O3", "C4", "O4", "C5", "O5"]
    around = 8  # tokens of each: two letters and its borders
    system = 1 + 12
    assert fitted(None, *texts) == texts
    assert fitted(system + 13 * around, *texts) == texts
    assert fitted(system + 13 * around - 1, *texts) == texts[4:]
    assert fitted(system + 8 * around, *texts) == texts[6:]
    assert fitted(system + 6 * around, *texts) == ["Q3", "C4", "O4", "C5", "O5"]
    assert fitted(system + 3 * around, *texts) == ["Q3", "C5", "O5"]


def test_a_long_output_loses_its_middle_and_a_question_too_long_is_refused():
    output = "O" + "x" * 500 + "end"
    kept = fitted(200, "Q1", "C1", output)
    assert kept[:2] == ["Q1", "C1"] and kept[2].startswith("Ox") and kept[2].endswith("xend")
    assert CUT in kept[2] and 130 < len(kept[2]) <= 200 - 13 - 2 * 8 - 6
    (question,) = fitted(200, "Q" + "x" * 500)
    assert CUT in question
    with pytest.raises(ContextFull, match="question is too long"):
        fitted(40, "Q" + "x" * 500)


def test_what_was_given_up_is_not_sent_again():
    assert fitted(None, "Q1", "Q2", "A2") == ["Q2", "A2"]
    assert fitted(None, "Q1", "C1", "O1", "Q2") == ["Q1", "C1", "Q2"]


@given(st.lists(st.tuples(st.lists(st.integers(0, 60), max_size=4), st.integers(0, 60)), min_size=1,
                max_size=5), st.integers(0, 60), st.integers(80, 500))
def test_what_is_sent_always_fits_and_roles_alternate(turns, length, room):
    texts = []
    for steps, answer in turns:
        texts += ["Q" + "q" * answer]
        for step in steps:
            texts += ["C" + "c" * step, "O" + "o" * step]
        texts += ["A" + "a" * answer]
    messages, forgotten = fit_context(
        "S", conversation(*texts, question := "Q" + "q" * length), room, len
    )
    assert sum(len(message.content) + 6 for message in messages) <= room
    assert forgotten == len(texts) + 2 - len(messages)
    assert [message.type for message in messages[1:]] == (
        ["human", "ai"] * len(messages))[: len(messages) - 1]
    assert messages[-1].content == question


@given(st.text(max_size=300), st.integers(8, 100))
def test_shortened_text_has_both_ends_and_the_wanted_length(text, room):
    short = shorten(text, room, len)
    assert short == text or (len(short) <= room and CUT in short)
    if short != text:
        head, tail = short.split(CUT, 1)[0], short.rsplit(CUT, 1)[-1]
        assert text.startswith(head) and text.endswith(tail)


@pytest.mark.parametrize("text", ["你是谁？", "def f(x):\n    return x * log(x)\n",
                                  "What is the sum of the primes below 1000?", "2.144729885888985"])
def test_the_estimate_is_of_the_right_size(text):
    assert 0.6 <= estimate_tokens(text) / own_tokens()(text) <= 3


# ---- Graph ---------------------------------------------------------------------------------------

def test_code_is_run_and_its_output_is_the_next_message():
    script, sandbox = Script(in_order(CODE, "It is 1.")), NotedSandbox()
    events = run_script(script, sandbox)
    assert sandbox.ran == [("print(1)", "default")]
    assert kinds(events) == ["code", "observation", "answer"]
    said = "".join(event.text for event in events if event.kind == "token")
    assert said == CODE + "It is 1." and events[-1].text == "It is 1."
    output = "The code has been executed, and the output is as follows:\n1"
    assert sent(script) == [("system", "S"), ("user", "Q"), ("assistant", CODE), ("user", output)]
    assert set(script.requests[-1]["messages"][-1]) == {"role", "content"}


def test_tokens_come_one_by_one():
    """The second piece is only sent once the first has been seen."""
    async def main() -> str:
        script = Script(lambda _: Reply("first", endless=True), pieces_per_second=50)
        with scripted_endpoint(script) as url:
            async with aclosing(ask(agent_at(url, NotedSandbox()), "Q")) as events:
                async for event in events:
                    return event.text

    assert asyncio.run(asyncio.wait_for(main(), TEN_SECONDS)) == "firs"


def test_the_step_limit_ends_a_run_in_words():
    script, sandbox = Script(lambda _: CODE), NotedSandbox()
    events = run_script(script, sandbox, max_steps=2)
    assert len(sandbox.ran) == 2
    assert kinds(events) == ["code", "observation"] * 2 + ["limit"]
    assert events[-1].text == STEP_LIMIT["en"].format(steps=2)
    assert sent(script)[-1][1].endswith(LAST_STEP["en"])  # the model was told
    assert LAST_STEP["en"] not in sent(script, 1)[-1][1]


def test_an_answer_after_the_last_step_is_an_answer():
    events = run_script(Script(in_order(CODE, CODE, "It is 1.")), max_steps=2)
    assert kinds(events)[-1] == "answer"


def test_steps_are_counted_anew_for_each_question():
    async def main() -> list:
        script = Script(in_order(CODE, CODE, "A", CODE, CODE, "B"))
        with scripted_endpoint(script) as url:
            agent = agent_at(url, NotedSandbox(), 2, checkpointer=InMemorySaver())
            return [await events_of(agent), await events_of(agent)]

    assert [run[-1].text for run in asyncio.run(main())] == ["A", "B"]


def test_no_steps_at_all_are_refused():
    with pytest.raises(ValueError, match="max_steps is 0"):
        agent_at("http://127.0.0.1:9", NotedSandbox(), 0)


def test_a_failed_request_is_repeated(no_waiting):
    script = Script(in_order(Reply("busy", 503), Reply("half of it", break_after=2), "It is 1."))
    events = run_script(script)
    assert kinds(events) == ["retry", "retry", "answer"]
    assert "503" in events[0].text and "in the middle" in events[3].text
    assert [event.text for event in events][1:3] == ["half", " of"]
    assert len(script.requests) == 3 and events[-1].text == "It is 1."


@pytest.mark.parametrize("reply, requests, words", [
    (Reply("busy", 503), 4, "status 503"),
    (Reply("no", 401), 1, "refuses the key"),
    (Reply("what?", 400), 1, "status 400: .*what"),
    (Reply("gone", 404), 1, "status 404"),
])
def test_an_endpoint_that_fails_for_good_is_one_line(no_waiting, reply, requests, words):
    script = Script(lambda _: reply)
    with pytest.raises(EndpointError, match=words) as caught:
        run_script(script)
    assert len(script.requests) == requests and "\n" not in str(caught.value)


def test_nobody_at_the_address_is_one_line(no_waiting):
    async def main() -> None:
        with scripted_endpoint(Script(in_order())) as url:
            pass
        with pytest.raises(EndpointError, match=f"nothing answers at {url}/v1; start"):
            await events_of(agent_at(url, NotedSandbox()))
        with pytest.raises(EndpointError, match="nothing answers"):
            await find_served(url)

    asyncio.run(main())


def test_a_server_that_calls_the_prompt_too_long_gets_less_of_it():
    def reply(messages: list[dict]) -> Reply | str:
        if sum(len(message["content"]) for message in messages) > 300:
            return Reply("maximum context length is 300", 400)
        return "done"

    async def main() -> tuple:
        script = Script(reply)
        with scripted_endpoint(script) as url:
            agent = agent_at(url, NotedSandbox(), checkpointer=InMemorySaver())
            for number in range(6):
                events = await events_of(agent, f"{number}" * 90)
        return events, sent(script)

    events, messages = asyncio.run(main())
    assert kinds(events)[-1] == "answer" and "forgotten" in kinds(events)
    assert messages[-1] == ("user", "5" * 90) and len(messages) < 11


# ---- Conversations and their end -----------------------------------------------------------------

def test_conversations_are_kept_in_a_file_and_apart(tmp_path):
    async def main() -> None:
        script = Script(in_order(CODE, "A1", "B1", "A2", CODE, "A3"))
        with scripted_endpoint(script) as url:
            for question, thread in (("first", "a"), ("other", "b"), ("second", "a")):
                async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "a.db")) as saver:
                    agent = agent_at(url, NotedSandbox(), checkpointer=saver)
                    await events_of(agent, question, thread)
            assert [text for _, text in sent(script, 2)] == ["S", "other"]
            assert [text for _, text in sent(script, 3)][1:] == [
                "first", CODE, describe_output(Seen("1")), "A1", "second"]
            async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "a.db")) as saver:
                agent = agent_at(url, NotedSandbox(), checkpointer=saver)
                state = await agent.aget_state({"configurable": {"thread_id": "a"}})
                assert set(state.values) == {"messages"}
                events = await events_of(agent, "third", "a")
                # Its variables are not in the file, and the model must know.
                assert STATE_LOST["en"] in [e.text for e in events if e.kind == "observation"][0]

    asyncio.run(main())


def test_cancelling_while_code_runs_ends_its_process_first():
    async def main() -> None:
        with scripted_endpoint(Script(lambda _: CODE)) as url:
            sandbox = NotedSandbox(waits=True)
            agent = agent_at(url, sandbox, checkpointer=InMemorySaver())
            task = asyncio.create_task(events_of(agent, "Q", "c"))
            await asyncio.wait_for(sandbox.started.wait(), TEN_SECONDS)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert sandbox.ended == ["c"]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_cancelling_while_the_model_writes_closes_its_connection(how):
    async def main() -> None:
        script = Script(lambda _: Reply("on and on", endless=True), pieces_per_second=100)
        with scripted_endpoint(script) as url:
            events = ask(agent_at(url, NotedSandbox()), "Q")
            first = asyncio.Event()

            async def read() -> None:
                async with aclosing(events):
                    async for _ in events:
                        first.set()
                        if how == "close":
                            return

            task = asyncio.create_task(read())
            await asyncio.wait_for(first.wait(), TEN_SECONDS)
            if how == "cancel":
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await asyncio.to_thread(script.left.wait, TEN_SECONDS)

    asyncio.run(main())


def test_a_run_that_was_cancelled_leaves_a_conversation_that_goes_on():
    async def main() -> None:
        script = Script(in_order(CODE, "A2"))
        with scripted_endpoint(script) as url:
            sandbox = NotedSandbox(waits=True)
            agent = agent_at(url, sandbox, checkpointer=InMemorySaver())
            task = asyncio.create_task(events_of(agent, "first"))
            await asyncio.wait_for(sandbox.started.wait(), TEN_SECONDS)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            events = await events_of(agent, "second")
            assert events[-1].text == "A2" and sent(script)[-1] == ("user", "second")
            roles = [role for role, _ in sent(script)]
            assert roles == ["system", *(["user", "assistant"] * 3)[: len(roles) - 1]]

    asyncio.run(main())


def test_a_sandbox_that_fails_is_ended_too():
    class Broken(NotedSandbox):
        async def run(self, code, conversation="default"):
            raise RuntimeError("no room")

    async def main() -> None:
        with scripted_endpoint(Script(lambda _: CODE)) as url:
            sandbox = Broken()
            with pytest.raises(RuntimeError, match="no room"):
                await events_of(agent_at(url, sandbox))
            assert sandbox.ended == ["default"]

    asyncio.run(main())


# ---- Endpoint and agents -------------------------------------------------------------------------

def test_the_served_models_name_and_context_are_asked():
    async def main(name: str | None = None, key: str | None = None) -> Served:
        models = [{"id": "a/b", "max_model_len": 4096}, {"id": "c"}]
        with scripted_endpoint(Script(in_order(), models=models)) as url:
            return dataclasses.replace(await find_served(f"{url}/", key, name), base_url="")

    assert asyncio.run(main()) == Served("", "a/b", 4096)
    assert asyncio.run(main("c")) == Served("", "c", None)
    with pytest.raises(EndpointError, match="serves no d, but a/b, c"):
        asyncio.run(main("d"))


def test_an_endpoint_without_models_or_with_something_else_is_one_line():
    async def main(models) -> None:
        with scripted_endpoint(Script(in_order(), models=models)) as url:
            await find_served(url)

    with pytest.raises(EndpointError, match="serves no model"):
        asyncio.run(main([]))


@pytest.mark.parametrize("url", ["127.0.0.1:23333", "ftp://x", "", "http://"])
def test_what_is_no_url_is_said(url):
    with pytest.raises(ValueError, match="is no URL like"):
        api_url(url)


def test_a_url_may_lack_its_end():
    assert api_url("http://h:1") == api_url("http://h:1/") == api_url("http://h:1/v1/") == (
        "http://h:1/v1")


def test_our_own_models_get_the_short_prompt_and_their_context():
    own = Agents(Served("http://h/v1", "yuanmeng-mini-instruct"), None, [derivative])
    other = Agents(Served("http://h/v1", "internlm3"), None, [derivative])
    assert own.short and (own.context, own.max_tokens) == (2048, 512)
    assert own.system("zh") == system_prompt([derivative], "zh", short=True)
    assert own.count_tokens("你是谁") == own_tokens()("你是谁")
    assert not other.short and (other.context, other.max_tokens) == (None, 2048)
    assert Agents(Served("", "x", 4096), None, prompt="short").short
    assert Agents(Served("", "x", 4096), None).max_tokens == 1024
    with pytest.raises(ValueError, match="leaves no room"):
        Agents(Served("", "x", 4096), None, max_tokens=4096)


def test_the_language_is_the_questions():
    assert language_of("求f(x)在π处的导数") == "zh" and language_of("f(x)=xlnx at π") == "en"


def test_observations_are_told_from_questions():
    assert is_observation(observation_message("x")) and not is_observation(HumanMessage("x"))
