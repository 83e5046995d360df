"""Putting tasks to the whole agent: a served model writes code, the sandbox runs it.

The items are those of `python -m dataset.codeact`. Three splits: `numbers` (phrasings that training
has, numbers and functions that it has not), `phrasings` (neither), and `recovery` (as numbers, but
the agent's first code is given, and fails).
"""
import ast
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import AIMessageChunk
from langgraph.checkpoint.memory import InMemorySaver
from tqdm import tqdm

from codeact.agents import Agents
from codeact.context import ContextFull
from codeact.endpoint import chat_model, find_served
from codeact.fences import code_of
from codeact.graph import ask, build_agent
from codeact.install import InstallError
from codeact.sandbox import Limits, Observation, Sandbox, SandboxError
from dataset.codeact.facts import says
from dataset.codeact.verification import fenced
from training.measurement import Score, grouped

SPLITS = {  # as the report calls them
    "numbers": "new numbers", "phrasings": "new phrasings", "recovery": "after an error",
}
STEP_SECONDS = 10.0


@dataclass
class Run:
    """What the agent did with an item."""

    item: dict
    said: list[str] = field(default_factory=list)  # each whole message of the model
    steps: list[Observation] = field(default_factory=list)  # of the model's own code
    answers: list[str] = field(default_factory=list)  # to each question
    fault: str = ""  # why the run broke off

    @property
    def first_code(self) -> str | None:
        return code_of(self.said[0]) if self.said else None

    @property
    def first_is_valid(self) -> bool:
        """Whether the model's first message has Python that can be parsed."""
        try:
            return self.first_code is not None and bool(ast.parse(self.first_code).body)
        except (SyntaxError, ValueError):  # ValueError: a null character
            return False

    @property
    def first_runs(self) -> bool:
        return self.first_is_valid and bool(self.steps) and self.steps[0].error is None

    @property
    def is_right(self) -> bool:
        """Whether every question is answered rightly."""
        questions = self.item["questions"]
        return len(self.answers) == len(questions) and all(
            says(answer, question["numbers"], question["texts"], question["verdict"])
            for question, answer in zip(questions, self.answers, strict=True)
        )

    def record(self) -> dict:
        """What the report keeps of it."""
        return {
            **{key: self.item[key] for key in ("task", "split", "name", "language")},
            "questions": [question["content"] for question in self.item["questions"]],
            "mistaken": self.item["mistaken"], "said": self.said,
            "outputs": [step.error or step.output for step in self.steps],
            "answers": self.answers, "fault": self.fault, "valid": self.first_is_valid,
            "runs": self.first_runs, "right": self.is_right,
        }


class Recorded:
    """Stands between the agent and its model and sandbox for one item: notes what the model says
    and what its code does. If the item has mistaken code, the model's first message is that."""

    def __init__(self, model: Any, sandbox: Sandbox, run: Run):
        self.model, self.sandbox, self.result = model, sandbox, run
        self.mistaken = run.item["mistaken"]
        self.is_mistaken_step = False
        self.openai_api_base = model.openai_api_base  # the graph names it in its errors

    async def astream(self, messages: Sequence, config: Any) -> AsyncIterator[AIMessageChunk]:
        if self.mistaken is not None:
            text, self.mistaken, self.is_mistaken_step = fenced(self.mistaken), None, True
            yield AIMessageChunk(text)
            return
        pieces = []
        async for chunk in self.model.astream(messages, config):
            pieces.append(chunk.text)
            yield chunk
        self.result.said.append("".join(pieces))

    async def run(self, code: str, conversation: str) -> Observation:
        observation = await self.sandbox.run(code, conversation)
        if self.is_mistaken_step:
            self.is_mistaken_step = False
        else:
            self.result.steps.append(observation)
        return observation

    async def end(self, conversation: str) -> None:
        await self.sandbox.end(conversation)


async def run_item(item: dict, agents: Agents, name: str) -> Run:
    """The agent at work on one item, its conversation called `name`.

    Raises:
        EndpointError: the endpoint does not answer.
    """
    run, language = Run(item), item["language"]
    model = chat_model(agents.served, api_key=agents.api_key, max_tokens=agents.max_tokens,
                       temperature=agents.temperature)
    recorded = Recorded(model, agents.sandbox, run)
    agent = build_agent(
        recorded, recorded, system=agents.system(language), max_steps=agents.max_steps,
        checkpointer=InMemorySaver(), language=language, count_tokens=agents.count_tokens,
        room=None if agents.context is None else agents.context - agents.max_tokens,
    )
    try:
        for question in item["questions"]:
            async with aclosing(ask(agent, question["content"], name)) as events:
                async for event in events:
                    if event.kind in ("answer", "limit"):
                        run.answers.append(event.text)
    except ContextFull as error:
        run.fault = str(error)
    finally:
        await agents.sandbox.end(name)
    return run


async def run_items(items: list[dict], base_url: str, api_key: str | None, tools: Sequence,
                    max_steps: int, conversations: int) -> list[Run]:
    """The runs of all items, `conversations` of them at once."""
    served = await find_served(base_url, api_key)
    limits = Limits(seconds=STEP_SECONDS, conversations=max(2, conversations))
    bar = tqdm(total=len(items), desc="acting", leave=False, disable=None)
    places = asyncio.Semaphore(conversations)
    async with Sandbox(tools, limits) as sandbox:
        agents = Agents(served, sandbox, tools, api_key, max_steps=max_steps)

        async def work(number: int, item: dict) -> Run:
            async with places:
                run = await run_item(item, agents, f"item {number}")
            bar.update()
            return run

        tasks = [asyncio.ensure_future(work(*pair)) for pair in enumerate(items)]
        try:
            return await asyncio.gather(*tasks)
        finally:  # after an error nothing more is asked
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            bar.close()


def score_runs(runs: list[Run]) -> list[Score]:
    """The scores of each split, and of each family in it the right answers."""
    scores: list[Score] = []
    for split, called in SPLITS.items():
        own = [run for run in runs if run.item["split"] == split]
        if not own:
            continue
        first = "first code" if split != "recovery" else "code after the error"
        scores += [
            Score(f"{called}, {first} valid", [run.first_is_valid for run in own]),
            Score(f"{called}, {first} runs", [run.first_runs for run in own]),
        ]
        families = grouped([run.item for run in own], "family")
        for family, places in sorted(families.items()):
            right = [own[i].is_right for i in places]
            scores.append(Score(f"{called}, right: {family}", right))
        scores += [
            Score(f"{called}, right: total", [run.is_right for run in own]),
            Score(f"{called}, steps a question",
                  [len(run.steps) for run in own], [len(run.item["questions"]) for run in own],
                  unit="steps"),
        ]
    return scores


def measure_agent(
    items: list[dict], base_url: str, api_key: str | None, tools: Sequence, max_steps: int = 5,
    conversations: int = 4,
) -> tuple[list[Score], list[dict]]:
    """Scores and records of the agent over the model served at `base_url`.

    Args:
        max_steps: pieces of code it may run for a question.
        conversations: at once; each has a process of about 300 MB.

    Raises:
        ValueError: the endpoint or the sandbox cannot be used.
    """
    try:
        runs = asyncio.run(run_items(items, base_url, api_key, tools, max_steps, conversations))
    except (InstallError, SandboxError) as error:
        raise ValueError(str(error)) from error
    return score_runs(runs), [run.record() for run in runs]
