"""The agent behind the web page: a sandbox for all conversations, and what one of them shows."""
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from uuid import uuid4

from langgraph.checkpoint.memory import InMemorySaver

from codeact.agents import Agents
from codeact.context import ContextFull
from codeact.endpoint import EndpointError, find_served
from codeact.graph import Event, ask
from codeact.install import InstallError
from codeact.sandbox import Sandbox, SandboxError

SECONDS_BETWEEN_UPDATES = 0.05  # of what the model writes on the screen


class Failure(Exception):
    """There is no answer; the message is one line."""


@dataclass
class Conversation:
    """One browser tab's. Its messages are kept here, so that they go when the tab's state goes."""

    agents: Agents
    name: str
    steps: int = 0  # pieces of code that were run for the last question
    seconds: float = 0.0


class Workshop:
    """Agents over the model at `url`. The sandbox is made with the first conversation, in the event
    loop that serves the page."""

    def __init__(self, url: str, tools: Sequence = (), api_key: str | None = None,
                 model_name: str | None = None):
        self.url, self.tools, self.api_key, self.model_name = url, tools, api_key, model_name
        self.sandbox: Sandbox | None = None

    async def begin(self) -> Conversation:
        """A new conversation. Raises Failure if nothing answers at the URL."""
        try:
            served = await find_served(self.url, self.api_key, self.model_name)
            if self.sandbox is None:
                self.sandbox = Sandbox(self.tools, spare=False)
        except (EndpointError, InstallError) as error:
            raise Failure(str(error)) from error
        agents = Agents(served, self.sandbox, self.tools, self.api_key,
                        checkpointer=InMemorySaver())
        return Conversation(agents, uuid4().hex)

    async def end(self, conversation: Conversation) -> None:
        """End its process."""
        await conversation.agents.sandbox.end(conversation.name)

    async def close(self) -> None:
        """End every process."""
        if self.sandbox is not None:
            await self.sandbox.close()

    async def work(
        self, conversation: Conversation, question: str, language: str, texts: dict[str, str]
    ) -> AsyncIterator[list[dict]]:
        """The messages that follow the question, again and again as they grow. Closing this ends
        the run; whatever process ran code is gone then.

        Raises:
            Failure: the endpoint, the context or the sandbox has no answer.
        """
        transcript = Transcript(texts)
        conversation.steps, start, shown_at = 0, time.monotonic(), 0.0
        agent = conversation.agents.agent(language)
        try:
            async with aclosing(ask(agent, question, conversation.name)) as events:
                async for event in events:
                    transcript.add(event)
                    conversation.steps += event.kind == "observation"
                    now = time.monotonic()
                    conversation.seconds = now - start
                    # Pieces may wait for the next one; what precedes a long run of code may not.
                    if event.kind != "token" or now - shown_at >= SECONDS_BETWEEN_UPDATES:
                        shown_at = now
                        yield transcript.messages
        except (EndpointError, ContextFull, SandboxError, InstallError) as error:
            raise Failure(str(error)) from error


class Transcript:
    """What a run has shown so far, as messages for gr.Chatbot."""

    def __init__(self, texts: dict[str, str]):
        self.texts, self.messages = texts, []
        self.writing = False  # whether the last message is the model's and may grow

    def add(self, event: Event) -> None:
        if event.kind == "token":
            if not self.writing:
                self.messages.append(bubble(""))
            self.messages[-1]["content"][0]["text"] += event.text
            self.writing = True
        elif event.kind == "observation":
            self.messages.append(bubble(f"**{self.texts['output']}**\n\n{verbatim(event.text)}"))
            self.writing = False
        elif event.kind == "limit":
            self.messages.append(bubble(event.text))
        elif event.kind == "retry" and self.writing:
            self.messages.pop()
            self.writing = False


def bubble(text: str) -> dict:
    """A message of the agent for gr.Chatbot, which would strip a plain string."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def verbatim(text: str) -> str:
    """Markdown that shows a text as it is: a fence longer than any within."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
