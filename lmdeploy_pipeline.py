"""Stage Ⅵ: talk to the exported model through LMDeploy's engine.

In:   Yuanmeng_Models/yuanmeng-26m-instruct, which convert_to_transformers.py makes (until then,
      the small model shipped in model/yuanmeng-mini-instruct).
Out:  a conversation in this terminal, as in model_chat.py; in a pipe, an answer to each line;
      with `--prompts`, the answers to all lines of a file, computed side by side.
Next: lmdeploy_cli.py (quantization and serving)

    python lmdeploy_pipeline.py
    python lmdeploy_pipeline.py --temperature 0 --dtype float32
    python lmdeploy_pipeline.py --prompts questions.txt
"""
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig
from transformers.hf_argparser import HfArg

import patches
from model import MINI_DIR, TOKENIZER_DIR
from model.conversation import fit_conversation
from model.generation import check_sampling, penalize_repetition
from model.loading import load_tokenizer
from training.settings import parse_settings
from training.terminal import note, talk, use_utf8

model = "Yuanmeng_Models/yuanmeng-26m-instruct"
PADDING = 1  # <s>


@dataclass
class Settings:
    """Talk to a model in LMDeploy's engine. Change a default here, or give `--name value`."""

    model: str = HfArg(default=model, help="a folder that convert_to_transformers.py wrote")
    prompts: str | None = HfArg(default=None, help="a file of questions, one in each line")
    max_seq_len: int = HfArg(default=256, help="longest prompt in tokens; what is over is cut off")
    max_new_tokens: int = HfArg(default=64, help="longest answer in tokens")
    temperature: float = HfArg(default=0.75, help="randomness; lower is surer, 0 is none at all")
    top_p: float = HfArg(default=0.90, help="sample among the likeliest tokens of this probability")
    repetition_penalty: float = HfArg(default=1.05, help="above 1: say the same less often")
    system: str | None = HfArg(default=None, help="system line instead of the template's own")
    batch_size: int = HfArg(default=32, help="answers computed at once, at most")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto", help="auto: bfloat16 where the processor computes in it"
    )
    eager: bool = HfArg(default=False, help="do not compile the step that writes a token")
    stats: bool = HfArg(default=False, help="print the speed after each answer")


class EngineChat:
    """An engine, and the conversation so far."""

    def __init__(self, pipe, tokenizer, settings: Settings, max_prompt: int):
        self.pipe, self.tokenizer, self.settings = pipe, tokenizer, settings
        self.max_prompt = max_prompt
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system line."""
        self.messages = opening(self.settings)

    def reply(self, text: str, show: Callable[[str], None]) -> str:
        """Answer `text`, giving the answer to `show` piece by piece, and remember both.

        Returns a line about the speed, for `--stats`. An answer that Ctrl-C breaks off is
        remembered as far as it was shown.
        """
        before, answer, start = self.messages, "", time.perf_counter()
        ids, self.messages = fit_conversation(
            self.tokenizer, [*before, {"role": "user", "content": text}], self.max_prompt
        )
        first, response = None, None
        try:
            # Leaving this loop in any way also makes the engine stop working on the answer.
            for response in self.pipe.chat(
                self.messages, session=self.pipe.session(), stream_response=True,
                gen_config=sampling(self.settings, ids),
            ):
                check(response)
                first = first or time.perf_counter()
                answer += response.text
                show(response.text)
        finally:
            if answer.strip():
                self.messages = [*self.messages, {"role": "assistant", "content": answer}]
            else:
                self.messages = before
        now = time.perf_counter()
        if response is None or response.generate_token_len < 2:
            return f"answered in {now - start:.2f} s"
        count = response.generate_token_len - 1
        return (f"{response.input_token_len} tokens read and the first written in "
                f"{first - start:.2f} s, the next {count} at {count / (now - first):.1f} tokens/s")


def opening(settings: Settings) -> list[dict[str, str]]:
    """How each conversation begins: with the system line, if there is one of one's own."""
    return [{"role": "system", "content": settings.system}] if settings.system else []


def sampling(settings: Settings, prompt: Sequence[int]):
    """model_chat.py's settings in LMDeploy's terms, for a prompt of these tokens."""
    from lmdeploy import GenerationConfig

    def penalize(ids_S: torch.Tensor, logits_V: torch.Tensor) -> torch.Tensor:
        """LMDeploy's own repetition_penalty learns of a token one step too late, when it may have
        been said twice; what it hands to a function of one's own is up to date."""
        generated_V = torch.zeros_like(logits_V, dtype=torch.bool)
        generated_V[after_prompt(ids_S, prompt)] = True
        return penalize_repetition(logits_V, generated_V, settings.repetition_penalty)

    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        temperature=settings.temperature or 1.0,
        top_p=settings.top_p,
        top_k=0,  # LMDeploy would cut at 50 tokens
        logits_processors=[penalize] if settings.repetition_penalty != 1 else None,
    )


def after_prompt(ids_S: torch.Tensor, prompt: Sequence[int]) -> torch.Tensor:
    """What a sequence has written so far, of the ids that LMDeploy shows a logits processor.

    To make the sequences of a batch equally long it puts <s> before them, and also between what
    they had and what they write once others have joined: so <s> says nothing, wherever it stands.
    """
    return ids_S[ids_S != PADDING][sum(token != PADDING for token in prompt) :]


def check(response: Any) -> None:
    """Raise a ValueError with the engine's own words if it could not answer."""
    if response.finish_reason == "error":
        raise ValueError(f"the engine refuses: {response.error_message}")


def read_questions(path: str) -> list[str]:
    """The lines of a file that hold something."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def answer_all(
    pipe, tokenizer, settings: Settings, questions: list[str], max_prompt: int
) -> str:
    """Print each question with its answer, in order; returns a line about the speed."""
    chats = [[*opening(settings), {"role": "user", "content": text}] for text in questions]
    fitted = [fit_conversation(tokenizer, chat, max_prompt) for chat in chats]
    start = time.perf_counter()
    responses = pipe(
        [messages for _, messages in fitted],
        gen_config=[sampling(settings, ids) for ids, _ in fitted],
    )
    seconds = time.perf_counter() - start
    for question, response in zip(questions, responses, strict=True):
        check(response)
        print(f"🤔: {question}\n🤖: {response.text}", flush=True)
    written = sum(response.generate_token_len for response in responses)
    return f"{len(questions)} answers, {written} tokens at {written / seconds:.1f} tokens/s"


def find_model(path: str) -> Path:
    """The folder to load: the one asked for, or, for the default, what there is instead.

    Raises:
        FileNotFoundError: it is missing; the message names the command that makes one.
    """
    if (Path(path) / "config.json").is_file():
        return Path(path)
    if path != model:
        raise FileNotFoundError(
            f"{path} is no model folder; `python convert_to_transformers.py` makes one"
        )
    for other in (Path("Yuanmeng_Models/yuanmeng-mini-instruct"), MINI_DIR):
        if (other / "config.json").is_file():
            note(f"there is no {path} (`python convert_to_transformers.py` makes it); "
                 f"using {other.name}")
            return other
    raise FileNotFoundError(f"there is no {path}; `python convert_to_transformers.py` makes it")


def longest_prompt(path: Path, settings: Settings) -> int:
    """Tokens that a prompt may have; ValueError if the settings leave no room for one."""
    positions = AutoConfig.from_pretrained(path).max_position_embeddings
    longest = min(settings.max_seq_len, positions - settings.max_new_tokens)
    if longest < 2:
        raise ValueError(
            f"max_seq_len {settings.max_seq_len} and max_new_tokens {settings.max_new_tokens} "
            f"leave no room for a prompt in the model's {positions} positions"
        )
    return longest


def start_engine(path: Path, settings: Settings, max_prompt: int):
    """LMDeploy's pipeline over the model at `path`, on the GPU or else on the CPU."""
    if settings.dtype == "float32" and patches.default_device() == "cuda":
        raise ValueError("LMDeploy computes in 16 bits on a GPU; leave out --dtype float32")
    patches.register()
    from lmdeploy import PytorchEngineConfig, pipeline

    engine = PytorchEngineConfig(
        device_type=patches.default_device(),
        dtype=settings.dtype,
        max_batch_size=settings.batch_size,
        session_len=max_prompt + settings.max_new_tokens,
        eager_mode=settings.eager,
        enable_prefix_caching=True,  # what an earlier turn has read is not read again
    )
    return pipeline(str(path), backend_config=engine, log_level="ERROR")


def main() -> None:
    use_utf8()
    settings = parse_settings(Settings)
    try:
        check_sampling(settings.max_new_tokens, settings.temperature, settings.top_p,
                       settings.repetition_penalty)
        questions = None if settings.prompts is None else read_questions(settings.prompts)
        path = find_model(settings.model)
        max_prompt = longest_prompt(path, settings)
        tokenizer = load_tokenizer(path, TOKENIZER_DIR)
        pipe = start_engine(path, settings, max_prompt)
        try:
            if questions is not None:
                note(answer_all(pipe, tokenizer, settings, questions, max_prompt))
            else:
                note(f"{path.name} in LMDeploy on {patches.default_device()}; "
                     "/help lists the commands")
                talk(EngineChat(pipe, tokenizer, settings, max_prompt))
        finally:
            pipe.close()
    except (OSError, ValueError, patches.UpstreamChanged) as error:
        sys.exit(f"lmdeploy_pipeline.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
