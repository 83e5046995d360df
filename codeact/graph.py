"""The agent: a model that acts by writing Python (CodeAct, arXiv 2402.01030).

    model ──code──▶ sandbox          model: the answer, streamed token by token
      ▲                │             sandbox: its code is run; what it printed is the next message
      └──observation───┘
      │
      ├──no code──▶ end
      └──code beyond the step limit──▶ stop ──▶ end

The graph's state holds the messages and nothing else, so that a checkpoint is small and can be read
without this code; variables live in the sandbox, one process for each conversation (the thread id).
"""
import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

import openai
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import StreamWriter

from .context import estimate_tokens, fit_context, is_observation, observation_message
from .endpoint import EndpointError, explain
from .fences import code_of, text_of
from .prompts import LAST_STEP, STEP_LIMIT, describe_output

RETRY_AFTER = (0.5, 1.0, 2.0, 4.0)  # seconds before each further attempt
TOO_BUSY = {408, 409, 429, 500, 502, 503, 504}
TOO_LONG = re.compile(r"context|too long|input length|max_model_len", re.IGNORECASE)


@dataclass(frozen=True)
class Event:
    """Something that happened in a run, as it happens.

    `kind` is one of: token (a piece of what the model writes), code (it is about to run),
    observation (what the model reads next), answer (the last words, whole), limit (the run ended
    at the step limit), retry (what was streamed of this answer is void: it is asked for again),
    forgotten (how many earlier messages the context had no room for).
    """

    kind: Literal["token", "code", "observation", "answer", "limit", "retry", "forgotten"]
    text: str
    step: int  # pieces of code that were run for this question before


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


class Nodes:
    """The three nodes of the graph and the edge between them; `build_agent` has the arguments."""

    def __init__(self, model: BaseChatModel, sandbox, system: str, max_steps: int, language: str,
                 room: int | None, count_tokens: Callable[[str], int], has_run: set[str]):
        self.model, self.sandbox, self.system, self.max_steps = model, sandbox, system, max_steps
        self.language, self.room, self.count_tokens = language, room, count_tokens
        self.has_run = has_run

    async def ask(self, state: State, config: RunnableConfig, writer: StreamWriter) -> State:
        """The model's next message, in which it acts or answers."""
        step, room = steps_of(state["messages"]), self.room
        while True:
            messages, forgotten = fit_context(
                self.system, state["messages"], room, self.count_tokens
            )
            if forgotten:
                writer(Event("forgotten", str(forgotten), step))
            try:
                answer = await self.complete(messages, step, config, writer)
                break
            except openai.BadRequestError as error:
                if not TOO_LONG.search(error.message):
                    raise EndpointError(explain(self.base_url(), error)) from error
                size = sum(self.count_tokens(text_of(message.content)) for message in messages)
                room = size * 3 // 4  # the endpoint has the last word on what it can read
        if code_of(answer.content) is None:
            writer(Event("answer", text_of(answer.content), step))
        return {"messages": [answer]}

    async def complete(self, messages: list[AnyMessage], step: int, config: RunnableConfig,
                       writer: StreamWriter) -> AIMessage:
        """The answer, each piece written out as it comes; a failed request is repeated."""
        for wait in (*RETRY_AFTER, None):
            pieces: list[str] = []
            try:
                async for chunk in self.model.astream(messages, config):
                    piece = text_of(chunk.content)
                    if piece:
                        pieces.append(piece)
                        writer(Event("token", piece, step))
                return AIMessage("".join(pieces))
            except (openai.APIError, OSError) as error:
                if isinstance(error, openai.BadRequestError):
                    raise
                reason = explain(self.base_url(), error, begun=bool(pieces))
                if wait is None or not worth_repeating(error):
                    raise EndpointError(reason) from error
                writer(Event("retry", reason, step))
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def run(self, state: State, config: RunnableConfig, writer: StreamWriter) -> State:
        """The code of the last message, run. Whoever cancels this finds the process gone."""
        step, conversation = steps_of(state["messages"]), conversation_of(config)
        code = code_of(state["messages"][-1].content)
        writer(Event("code", code, step))
        try:
            observation = await self.sandbox.run(code, conversation)
        except BaseException:
            await asyncio.shield(self.sandbox.end(conversation))
            self.has_run.discard(conversation)
            raise
        if conversation not in self.has_run:  # a conversation from a file, in a new process
            self.has_run.add(conversation)
            earlier = any(map(is_observation, state["messages"]))
            observation = dataclasses.replace(
                observation, state_lost=observation.state_lost or earlier
            )
        text = describe_output(observation, self.language)
        writer(Event("observation", text, step))
        if step + 1 >= self.max_steps:
            text += f"\n{LAST_STEP[self.language]}"
        return {"messages": [observation_message(text)]}

    async def stop(self, state: State, writer: StreamWriter) -> State:
        """An end for a run that would go on."""
        text = STEP_LIMIT[self.language].format(steps=self.max_steps)
        writer(Event("limit", text, steps_of(state["messages"])))
        return {"messages": [observation_message(LAST_STEP[self.language]), AIMessage(text)]}

    def choose(self, state: State) -> str:
        """Where to go from the model's message."""
        if code_of(state["messages"][-1].content) is None:
            return END
        return "run" if steps_of(state["messages"]) < self.max_steps else "stop"

    def base_url(self) -> str:
        return str(getattr(self.model, "openai_api_base", None) or "the endpoint")


def build_agent(
    model: BaseChatModel, sandbox, *, system: str, max_steps: int,
    checkpointer: BaseCheckpointSaver | None = None, language: str = "en",
    room: int | None = None, count_tokens: Callable[[str], int] = estimate_tokens,
    has_run: set[str] | None = None,
) -> CompiledStateGraph:
    """The compiled graph; `ask` puts a question to it.

    Args:
        model: any LangChain chat model; `codeact.endpoint.chat_model` makes one for an endpoint.
        sandbox: `codeact.sandbox.Sandbox`, or whatever has its `run` and `end`.
        system: `codeact.prompts.system_prompt`.
        max_steps: pieces of code that may be run for one question.
        checkpointer: keeps the messages; `AsyncSqliteSaver` keeps them in a file.
        language: "en" or "zh": what the model is told of its code.
        room: tokens of the prompt; what is over is left out, the oldest first. None: no limit.
        count_tokens: of a text.
        has_run: conversations whose code this sandbox has run; agents over one sandbox share it.

    The run raises EndpointError if the endpoint does not answer, ContextFull if the question is too
    long, both with one line.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; an agent needs at least one step")
    nodes = Nodes(model, sandbox, system, max_steps, language, room, count_tokens,
                  set() if has_run is None else has_run)
    graph = StateGraph(State)
    graph.add_node("ask", nodes.ask)
    graph.add_node("run", nodes.run)
    graph.add_node("stop", nodes.stop)
    graph.add_edge(START, "ask")
    graph.add_conditional_edges("ask", nodes.choose, ["run", "stop", END])
    graph.add_edge("run", "ask")
    graph.add_edge("stop", END)
    # langgraph's own limit counts nodes; ours ends the run before, in words.
    return graph.compile(checkpointer=checkpointer).with_config(
        recursion_limit=2 * max_steps + 3
    )


async def ask(
    agent: CompiledStateGraph, question: str, conversation: str = "default"
) -> AsyncIterator[Event]:
    """What happens while the agent works on a question. Closing this, or cancelling the task that
    reads it, ends the run and the conversation's process."""
    stream = agent.astream(
        {"messages": [HumanMessage(question)]},
        {"configurable": {"thread_id": conversation}},
        stream_mode="custom",
        # One checkpoint when the run ends, however it ends: in the middle of a run it would be of
        # no use without the variables, which die with this program.
        durability="exit" if agent.checkpointer else None,
    )
    async with aclosing(stream) as events:
        async for event in events:
            yield event


def steps_of(messages: list[AnyMessage]) -> int:
    """How often code has been run for the last question."""
    steps = 0
    for message in reversed(messages):
        if is_observation(message):
            steps += 1
        elif message.type == "human":
            break
    return steps


def conversation_of(config: RunnableConfig) -> str:
    """The thread id, by which the checkpoints and the sandbox's processes are told apart."""
    return config.get("configurable", {}).get("thread_id", "default")


def worth_repeating(error: Exception) -> bool:
    """Whether the same request may succeed in a moment."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in TOO_BUSY
    return True
