"""Stage Ⅸ: an agent that acts by writing Python, on whatever an OpenAI-style endpoint serves.

In:   a served model, such as `python lmdeploy_cli.py serve api_server` offers on port 23333.
Out:  the example below, then a conversation in this terminal; in a pipe, an answer to each line;
      with `--question`, one answer. What the code has printed stands in a System Message box.

    python codeact_pipeline.py
    python codeact_pipeline.py --question "How many primes are there up to 1000?"
    python codeact_pipeline.py --base-url http://127.0.0.1:23333/v1 --trace run.json
"""
import dataclasses
import json
import sqlite3
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Literal

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from transformers.hf_argparser import HfArg

from codeact.agents import Agents
from codeact.console import AgentChat, Run, running_loop
from codeact.endpoint import find_served
from codeact.install import InstallError
from codeact.sandbox import Sandbox, SandboxError
from training.files import atomic_write
from training.settings import parse_settings
from training.terminal import note, talk, use_utf8

EXAMPLE = (
    "Calculate the derivative of the function f(x)=xlnx at x=π. Please directly use the existing "
    "utility function 'derivative()' for computation; you do not need to import any packages or "
    "redefine it—just use it directly."
)


# Define your tool function
def derivative(f, x, h=1e-5):
    """
    Compute the numerical derivative of function f at point x using central difference.

    Parameters:
    - f: callable, the function to differentiate
    - x: float, the point at which to evaluate the derivative
    - h: float, optional, the step size for the finite difference (default: 1e-5)

    Returns:
    - float, the approximate derivative f'(x)
    """
    return (f(x + h) - f(x - h)) / (2 * h)


tools = [derivative]


@dataclass
class Settings:
    """Ask an agent that writes Python. Change a default here, or give `--name value`."""

    question: str | None = HfArg(default=None, help="ask this and leave")
    base_url: str = HfArg(default="http://127.0.0.1:23333/v1", help="an OpenAI-style endpoint")
    model: str | None = HfArg(default=None, help="its model; default: the first that it serves")
    api_key: str | None = HfArg(default=None, help="for an endpoint that wants one")
    max_steps: int = HfArg(default=8, help="pieces of code that may be run for one question")
    max_tokens: int | None = HfArg(default=None, help="longest message of the model in tokens")
    context: int | None = HfArg(default=None, help="the model's context in tokens, if it is known")
    temperature: float = HfArg(default=0.0, help="randomness; lower is surer, 0 is none at all")
    prompt: Literal["auto", "long", "short"] = HfArg(
        default="auto", help="auto: the short one for this repository's own models"
    )
    language: Literal["auto", "en", "zh"] = HfArg(
        default="auto", help="of the prompt and the system messages; auto: the question's"
    )
    checkpoints: str | None = HfArg(default=None, help="an SQLite file that keeps conversations")
    conversation: str = HfArg(default="default", help="the name of this one in that file")
    trace: str | None = HfArg(default=None, help="a JSON file that keeps the run")
    stats: bool = HfArg(default=False, help="print the time after each answer")


async def open_agents(settings: Settings, stack: AsyncExitStack) -> Agents:
    """The served model, a sandbox and the checkpoints; the stack closes them."""
    served = await find_served(settings.base_url, settings.api_key, settings.model)
    checkpointer = InMemorySaver()
    if settings.checkpoints is not None:
        checkpointer = await stack.enter_async_context(
            AsyncSqliteSaver.from_conn_string(settings.checkpoints)
        )
    sandbox = await stack.enter_async_context(Sandbox(tools, spare=False))
    return Agents(
        served, sandbox, tools, settings.api_key, settings.max_steps, settings.max_tokens,
        settings.temperature, settings.context, settings.prompt, checkpointer,
    )


def write_trace(settings: Settings, agents: Agents, runs: list[Run]) -> None:
    """Keep what was asked, done and answered so far; never the key."""
    if settings.trace is None:
        return
    options = {name: value for name, value in vars(settings).items() if name != "api_key"}
    languages = {run.language for run in runs}
    content = {
        "model": agents.served.name, "settings": options,
        "system": {language: agents.system(language) for language in sorted(languages)},
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    try:
        with atomic_write(settings.trace, "w") as file:
            json.dump(content, file, ensure_ascii=False, indent=2)
            file.write("\n")
    except OSError as error:
        raise ValueError(f"cannot write the trace {settings.trace}: {error.strerror}") from error


def answer(chat: AgentChat, question: str) -> None:
    """One question and its answer, as `talk` shows them."""
    print(f"🤔: {question}\n🤖:", flush=True)
    speed = chat.reply(question, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    if chat.settings.stats:
        note(speed)


def main() -> None:
    use_utf8()
    settings = parse_settings(Settings)
    with running_loop() as loop:
        stack = AsyncExitStack()
        try:
            agents = loop.run(open_agents(settings, stack))
            write_trace(settings, agents, [])  # if it cannot be written, say so before any work
            chat = AgentChat(agents, loop, settings, settings.conversation,
                             lambda runs: write_trace(settings, agents, runs))
            if settings.question is not None:
                answer(chat, settings.question)
                return
            note(f"{agents.served.name} at {agents.served.base_url}; /help lists the commands")
            if sys.stdin.isatty():
                answer(chat, EXAMPLE)
            talk(chat, mark="🤖:\n")
        except sqlite3.Error as error:
            sys.exit(f"codeact_pipeline.py: {settings.checkpoints}: {error}")
        except (OSError, ValueError, SandboxError, InstallError) as error:
            sys.exit(f"codeact_pipeline.py: {error}")
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            loop.run(stack.aclose())


if __name__ == "__main__":
    main()
