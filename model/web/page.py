"""The page itself: what is on it, and what happens when something is pressed.

The conversation lives in the browser (page.js) and comes with every question, so that neither a
reload nor a restart of this server loses it. Everything that makes the model speak ends in a new
value of `asked`, and that alone starts `ask`.
"""
import html
import json
import time
from collections.abc import AsyncIterator

import gradio as gr

from .client import Answer, AnswerError, ChatClient, Messages, Parameters
from .running import RunningAnswers, until
from .texts import LANGUAGES, texts_of
from .workshop import Failure, Workshop

MAX_TURNS = 200  # of a conversation
MAX_CHARACTERS = 20_000  # of a message
MAX_TOKENS = 4096  # of an answer
CONCURRENT_ANSWERS = 32  # the engine's largest batch on a CPU; who comes later waits
MAX_WAITING = 256
# Tags that a model's words could do harm with, shown as text. Markdown's own stay: it makes them.
SHOWN_AS_TEXT = ["audio", "base", "embed", "form", "iframe", "img", "link", "meta", "object",
                 "picture", "script", "select", "source", "style", "textarea", "video"]
SECONDS_BETWEEN_UPDATES = 0.05  # of an answer on the screen


def build_page(
    client: ChatClient, language: str, workshop: Workshop | None = None
) -> gr.Blocks:
    """The page in "zh" or "en"; without a workshop it has no agent."""
    texts = texts_of(language)
    with gr.Blocks(title=texts["title"], analytics_enabled=False, fill_height=True) as page:
        if workshop is None:
            lay_out_chat(page, client, texts, language)
        else:
            with gr.Tabs(elem_id="tabs"):
                with gr.Tab(texts["chat_tab"], elem_classes="filled"):
                    lay_out_chat(page, client, texts, language)
                with gr.Tab(texts["agent_tab"], elem_classes="filled"):
                    lay_out_agent(workshop, texts, language)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=CONCURRENT_ANSWERS)
    return page


def lay_out_chat(
    page: gr.Blocks, client: ChatClient, texts: dict[str, str], language: str
) -> None:
    """The chat in the current block, wired up."""
    # ---- What is on it -----------------------------------------------------------------------
    with gr.Sidebar(width=320, open=False):
        new = gr.Button(texts["new"], variant="primary")
        history = gr.Radio([], label=texts["history"], elem_id="history")
        delete = gr.Button(texts["delete"], size="sm")
        with gr.Accordion(texts["parameters"], open=False):
            controls = parameter_controls(texts)
    header = gr.HTML(header_html(texts, language), elem_id="header")
    chat = gr.Chatbot(
        label=texts["conversation"], show_label=False, elem_id="chat", height=None,
        editable="user", buttons=["copy"], layout="bubble", placeholder=texts["welcome"],
        allow_tags=SHOWN_AS_TEXT, feedback_options=None, group_consecutive_messages=False,
        examples=[{"text": texts[f"example_{number}"]} for number in (1, 2, 3, 4)],
    )
    with gr.Row(elem_id="below"):
        status = gr.HTML(elem_id="status")
        retry = gr.Button(texts["retry"], size="sm", scale=0, min_width=80)
    with gr.Row(elem_id="composer"):
        box = gr.Textbox(
            label=texts["message"], show_label=False, placeholder=texts["placeholder"],
            autofocus=True, max_lines=8, max_length=MAX_CHARACTERS, scale=1, container=False,
            elem_id="message",
        )
        send = gr.Button(texts["send"], variant="primary", scale=0, min_width=80)
        stop = gr.Button(texts["stop"], variant="stop", scale=0, min_width=80, visible=False)
    asked = gr.State(0.0)  # when the model was last asked to speak
    forgotten = gr.State(0)  # how many of the earliest turns the context had no room for

    # ---- What happens ------------------------------------------------------------------------
    running = RunningAnswers()
    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    buttons = [send, stop, retry]
    outputs = [chat, status, forgotten, header, *buttons]
    nothing = (gr.skip(),) * len(outputs)
    speaking = (gr.update(visible=False), gr.update(visible=True), gr.update(interactive=False))
    resting = (gr.update(visible=True), gr.update(visible=False), gr.update(interactive=True))

    async def add_question(request: gr.Request, text: str, messages: Messages):
        """The question into the conversation, where it stays whatever happens to the answer."""
        if not text.strip():
            return (gr.skip(),) * 4
        if len(turns_of(messages)) >= MAX_TURNS:
            return *(gr.skip(),) * 3, error_html(texts["full"].format(turns=MAX_TURNS))
        await running.stop(request.session_hash)
        return "", [*messages, message("user", text)], time.time(), status_html(texts["waiting"])

    async def drop_answer(request: gr.Request, messages: Messages):
        """The conversation up to its last question."""
        await running.stop(request.session_hash)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return messages, time.time() if messages else gr.skip()

    async def edit_question(request: gr.Request, messages: Messages, edited: gr.EditData):
        """The conversation up to a question, which is another one now."""
        await running.stop(request.session_hash)
        return [*messages[: edited.index], message("user", edited.value)], time.time()

    def pick_example(picked: gr.SelectData):
        return [message("user", picked.value["text"])], time.time()

    async def stop_answer(request: gr.Request):
        await running.stop(request.session_hash)
        return status_html(texts["stopped"]), *resting

    async def leave(request: gr.Request):
        """An end to the answer of the conversation that is left, and to what was said of it."""
        await running.stop(request.session_hash)
        return 0, "", *resting

    async def ask(
        request: gr.Request, messages: Messages, forgotten: int, *values
    ) -> AsyncIterator[tuple]:
        """Show the answer as it comes, then what it took, or why there is none."""
        turns, parameters = turns_of(messages), read_parameters(values)
        if not turns or len(turns[-1]) == 2:  # answered already
            yield nothing
            return
        answer, shown_at = Answer(), 0.0

        def shown() -> Messages:
            return [*messages, message("assistant", answer.text)] if answer.text else messages

        with running.begin(request.session_hash) as stopped:
            yield gr.skip(), status_html(texts["waiting"]), gr.skip(), gr.skip(), *speaking
            try:
                async for answer in until(stopped, client.answer(turns, parameters, forgotten)):
                    if time.monotonic() - shown_at >= SECONDS_BETWEEN_UPDATES:
                        shown_at = time.monotonic()
                        yield shown(), *nothing[1:]
                line = status_html(describe(answer, texts))
            except AnswerError as error:
                reason = texts[error.kind].format(url=client.url, detail=error.detail)
                line = error_html(f"{reason} {texts['kept']}")
            if stopped.is_set():
                yield nothing  # else Gradio would send the last update once more, and too late
            else:
                forgotten = answer.forgotten
                if answer.cut and answer.tokens < parameters.max_tokens:  # the context was full
                    forgotten += (len(turns) - forgotten) // 2
                name = header_html(texts, language, answer.model) if answer.model else gr.skip()
                yield shown(), line, forgotten, name, *resting

    saved = {"fn": None, "inputs": chat, "outputs": history, "js": "yuanmeng.save", **quiet}
    for event in (
        asked.change(ask, [chat, forgotten, *controls], outputs, **quiet),
        gr.on([send.click, box.submit], add_question, [box, chat], [box, chat, asked, status],
              **quiet),
        retry.click(drop_answer, chat, [chat, asked], **quiet),
        chat.edit(edit_question, chat, [chat, asked], **quiet),
        chat.example_select(pick_example, None, [chat, asked], **quiet),
        stop.click(stop_answer, None, [status, *buttons], **quiet),
    ):
        event.then(**saved)

    confirmed = json.dumps(texts["confirm_delete"], ensure_ascii=False)
    chosen = history.input(None, history, None, js="yuanmeng.choose", **quiet)
    for trigger, js in (
        (new.click, "yuanmeng.start"),
        (chosen.then, "yuanmeng.open"),
        (delete.click, f"(chat) => yuanmeng.remove(chat, {confirmed})"),
    ):
        left = trigger(leave, None, [forgotten, status, *buttons], **quiet)
        left.then(None, chat, [chat, history], js=js, **quiet)

    async def greet():
        """Which model this is, or that nothing answers."""
        try:
            return header_html(texts, language, await client.model_name()), gr.skip()
        except AnswerError as error:
            reason = texts[error.kind].format(url=client.url, detail=error.detail)
            return header_html(texts, language), error_html(reason)

    page.load(None, None, [chat, history], js="yuanmeng.load", **quiet)
    page.load(None, controls, controls, js="yuanmeng.parameters", **quiet)
    page.load(greet, None, [header, status], **quiet)
    gr.on([control.change for control in controls], None, controls, None,
          js="yuanmeng.keepParameters", **quiet)


def lay_out_agent(workshop: Workshop, texts: dict[str, str], language: str) -> None:
    """The agent in the current block: what it writes, its code's output, and its answer."""
    # ---- What is on it -----------------------------------------------------------------------
    chat = gr.Chatbot(
        label=texts["agent_tab"], show_label=False, elem_id="agent", height=None,
        buttons=["copy"], layout="bubble", placeholder=texts["agent_welcome"],
        allow_tags=SHOWN_AS_TEXT, feedback_options=None, group_consecutive_messages=False,
        examples=[{"text": texts[f"agent_example_{number}"]} for number in (1, 2)],
    )
    with gr.Row(elem_classes="below"):
        status = gr.HTML(elem_id="agent-status", elem_classes="status")
        new = gr.Button(texts["new"], size="sm", scale=0, min_width=120)
    with gr.Row(elem_classes="composer"):
        box = gr.Textbox(
            label=texts["message"], show_label=False, placeholder=texts["agent_placeholder"],
            max_lines=8, max_length=MAX_CHARACTERS, scale=1, container=False,
            elem_id="agent-message",
        )
        send = gr.Button(texts["send"], variant="primary", scale=0, min_width=80)
        stop = gr.Button(texts["stop"], variant="stop", scale=0, min_width=80, visible=False)
    asked = gr.State(("", 0.0))  # the question, and when it was asked
    conversation = gr.State(None)  # codeact's side of it; made with the first question

    # ---- What happens ------------------------------------------------------------------------
    running = RunningAnswers()
    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    buttons = [send, stop]
    speaking = (gr.update(visible=False), gr.update(visible=True))
    resting = (gr.update(visible=True), gr.update(visible=False))
    outputs = [chat, status, conversation, *buttons]
    nothing = (gr.skip(),) * len(outputs)

    async def add_question(request: gr.Request, text: str, messages: list[dict]):
        if not text.strip():
            return (gr.skip(),) * 4
        await running.stop(request.session_hash)
        return ("", [*messages, message("user", text)], (text, time.time()),
                status_html(texts["waiting"]))

    def pick_example(picked: gr.SelectData):
        text = picked.value["text"]
        return [message("user", text)], (text, time.time())

    async def stop_answer(request: gr.Request):
        await running.stop(request.session_hash)
        return status_html(texts["stopped"]), *resting

    async def start_anew(request: gr.Request, left):
        """An empty conversation; the process of the one that is left ends."""
        await running.stop(request.session_hash)
        if left is not None:
            await workshop.end(left)
        return [], "", None, *resting

    async def act(
        request: gr.Request, asked: tuple[str, float], before: list[dict], kept
    ) -> AsyncIterator[tuple]:
        """Show what the agent does as it does it."""
        with running.begin(request.session_hash) as stopped:
            yield gr.skip(), status_html(texts["waiting"]), gr.skip(), *speaking
            steps: list[dict] = []
            try:
                kept = kept or await workshop.begin()
                async for steps in until(stopped, workshop.work(kept, asked[0], language, texts)):
                    yield [*before, *steps], gr.skip(), kept, *speaking
                line = status_html(texts["steps"].format(steps=kept.steps, seconds=kept.seconds))
            except Failure as error:
                line = error_html(str(error))
            if stopped.is_set():
                yield nothing
            else:
                yield [*before, *steps], line, kept, *resting

    asked.change(act, [asked, chat, conversation], outputs, **quiet)
    gr.on([send.click, box.submit], add_question, [box, chat], [box, chat, asked, status], **quiet)
    chat.example_select(pick_example, None, [chat, asked], **quiet)
    stop.click(stop_answer, None, [status, *buttons], **quiet)
    new.click(start_anew, conversation, [chat, status, conversation, *buttons], **quiet)


def parameter_controls(texts: dict[str, str]) -> list[gr.components.Component]:
    """A control for each field of `Parameters`, in their order."""
    default = Parameters()
    return [
        gr.Textbox(default.system, label=texts["system"], info=texts["system_info"], lines=2,
                   max_lines=6, max_length=MAX_CHARACTERS),
        gr.Slider(0, 2, default.temperature, step=0.05, label=texts["temperature"],
                  info=texts["temperature_info"]),
        gr.Slider(0.05, 1, default.top_p, step=0.05, label=texts["top_p"],
                  info=texts["top_p_info"]),
        gr.Slider(1, MAX_TOKENS, default.max_tokens, step=1, label=texts["max_tokens"]),
        gr.Slider(1, 2, default.repetition_penalty, step=0.05, label=texts["repetition_penalty"],
                  info=texts["repetition_penalty_info"]),
        gr.Number(default.seed, label=texts["seed"], info=texts["seed_info"], precision=0,
                  minimum=0),
    ]


def read_parameters(values: tuple) -> Parameters:
    """The controls' values, of which the browser may leave some empty."""
    system, temperature, top_p, max_tokens, repetition_penalty, seed = values
    return Parameters((system or "").strip(), temperature, top_p, int(max_tokens),
                      repetition_penalty, None if seed is None else int(seed))


# ---- Messages ------------------------------------------------------------------------------------

def message(role: str, text: str) -> dict:
    """A message for gr.Chatbot, which would strip a plain string."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def turns_of(messages: Messages) -> list[Messages]:
    """[question, answer] for each turn, the last perhaps without an answer. A question that got
    none and was followed by another is left out."""
    turns: list[Messages] = []
    for item in messages:
        text = "".join(part.get("text", "") for part in item["content"])
        if item["role"] == "user":
            if turns and len(turns[-1]) == 1:
                turns.pop()
            turns.append([{"role": "user", "content": text}])
        elif turns and len(turns[-1]) == 1:
            turns[-1].append({"role": "assistant", "content": text})
    return turns


def describe(answer: Answer, texts: dict[str, str]) -> str:
    """What an answer took: tokens, seconds, and what the context had no room for."""
    numbers = vars(answer) | {"speed": answer.tokens_per_second()}
    keys = ["counts"] if answer.tokens else []
    keys += ["first"] if answer.text else []
    keys += ["speed"] if numbers["speed"] else []
    keys += ["forgotten"] if answer.forgotten else []
    keys += ["cut"] if answer.cut else []
    return " · ".join(texts[key].format(**numbers) for key in keys)


# ---- HTML, in which nothing that came from elsewhere is left unescaped ---------------------------

def header_html(texts: dict[str, str], language: str, model_name: str = "") -> str:
    """The page's name, the model's, and a link to the other language."""
    (other,) = set(LANGUAGES) - {language}
    name = html.escape(model_name)
    return (f"<h1>{texts['title']}</h1><span id='model' title='{name}'>{name.split('/')[-1]}</span>"
            f"<a href='../{other}/' hreflang='{other}'>{texts['other_language']}</a>")


def status_html(text: str) -> str:
    return f"<p role='status'>{html.escape(text)}</p>"


def error_html(text: str) -> str:
    return f"<p role='alert'>{html.escape(text)}</p>"
