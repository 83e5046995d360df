"""Stage Ⅴ: talk to the model you trained.

In:   out/sft_512.pth (out/sft_256.pth), or with `--mode 0` out/pretrain_512.pth; while there are no
      fine-tuned weights yet, the small model shipped in model/yuanmeng-mini-instruct.
Out:  a conversation in this terminal; in a pipe, an answer to each line.
Next: convert_to_transformers.py

    python model_chat.py
    python model_chat.py --mode 0 --temperature 0.5
    echo 你是谁 | python model_chat.py --temperature 0
"""
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from model import MINI_DIR, TOKENIZER_DIR, YuanMengModel
from model.conversation import encode_text, fit_conversation
from model.generation import TextStream, check_sampling, generate_tokens
from model.loading import choose_dtype, find_weights, load_model, load_tokenizer
from model.step import OneSequence
from training.settings import parse_settings
from training.terminal import note, talk, use_utf8


@dataclass
class Settings:
    """Talk to a trained model. Change a default here, or give `--name value` for one run."""

    mode: Literal[0, 1] = HfArg(default=1, help="0: pretrained weights; 1: fine-tuned weights")
    max_seq_len: int = HfArg(default=256, help="longest prompt in tokens; what is over is cut off")
    max_new_tokens: int = HfArg(default=64, help="longest answer in tokens")
    temperature: float = HfArg(default=0.75, help="randomness; lower is surer, 0 is none at all")
    top_p: float = HfArg(default=0.90, help="sample among the likeliest tokens of this probability")
    repetition_penalty: float = HfArg(default=1.05, help="above 1: say the same less often")
    model: str | None = HfArg(default=None, help="a .pth file or a Hugging Face folder")
    preset: str | None = HfArg(default=None, help="26m or mini: which weights in out/ to load")
    system: str | None = HfArg(default=None, help="system line instead of the template's own")
    seed: int | None = HfArg(default=None, help="makes the answers repeatable")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(
        default="auto", help="auto: bfloat16 where the processor computes in it, else float32"
    )
    eager: bool = HfArg(default=False, help="do not compile the step that writes a token")
    stats: bool = HfArg(default=False, help="print the speed after each answer")


class Chat:
    """A model, its tokenizer, and the conversation so far."""

    def __init__(
        self, model: YuanMengModel, tokenizer: PreTrainedTokenizerBase, settings: Settings,
        step: OneSequence | None = None,
    ):
        """Raises ValueError if the settings do not go together or do not fit the model."""
        check_sampling(settings.max_new_tokens, settings.temperature, settings.top_p,
                       settings.repetition_penalty)
        self.model, self.tokenizer, self.settings, self.step = model, tokenizer, settings, step
        positions = model.config.max_position_embeddings
        self.max_prompt = min(settings.max_seq_len, positions - settings.max_new_tokens)
        if self.max_prompt < 2:
            raise ValueError(
                f"max_seq_len {settings.max_seq_len} and max_new_tokens {settings.max_new_tokens} "
                f"leave no room for a prompt in the model's {positions} positions"
            )
        self.generator = torch.Generator(model.device)
        if settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(settings.seed)
        self.clear()
        if settings.mode == 1:
            question = {"role": "user", "content": ""}
            fit_conversation(tokenizer, [*self.messages, question], self.max_prompt)

    def clear(self) -> None:
        """Forget everything but the system line."""
        system = self.settings.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def prompt_ids(self, text: str) -> list[int]:
        """Tokens of the prompt that ends with the user's `text`, trimmed to `max_prompt`."""
        if self.settings.mode == 0:
            ids = encode_text(self.tokenizer, text)
            room = self.max_prompt - 1  # for <s>
            if len(ids) > room:
                note(f"only the last {room} of {len(ids)} tokens fit; the beginning was left out")
            return [self.tokenizer.bos_token_id, *ids[-room:]]
        question = {"role": "user", "content": text}
        ids, self.messages = fit_conversation(
            self.tokenizer, [*self.messages, question], self.max_prompt
        )
        if self.messages[-1]["content"] != text:
            note(f"the message is over {self.max_prompt} tokens; its beginning was left out")
        return ids

    def reply(self, text: str, show: Callable[[str], None]) -> str:
        """Answer `text`, giving the answer to `show` piece by piece, and remember both.

        Returns a line about the speed, for `--stats`.

        An answer that Ctrl-C breaks off is remembered as far as it was shown; one without any
        word is forgotten together with its question.
        """
        settings, answer, times = self.settings, "", [time.perf_counter()]
        before = self.messages
        prompt_ids = self.prompt_ids(text)
        stream = TextStream(self.tokenizer)
        try:
            for token_id in generate_tokens(
                self.model,
                prompt_ids,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                repetition_penalty=settings.repetition_penalty,
                eos_token_id=self.tokenizer.eos_token_id,
                generator=self.generator,
                step=self.step,
            ):
                times.append(time.perf_counter())
                piece = stream.push(token_id)
                answer += piece
                show(piece)
            # No stream.finish(): an answer cut by max_new_tokens may end inside a character.
        finally:
            if settings.mode == 1 and answer.strip():
                self.messages = [*self.messages, {"role": "assistant", "content": answer}]
            else:
                self.messages = before
        if len(times) < 3:
            return f"{len(prompt_ids)} tokens read, {len(times) - 1} written"
        first, rest, count = times[1] - times[0], times[-1] - times[1], len(times) - 2
        return (f"{len(prompt_ids)} tokens read and the first written in {first:.2f} s, "
                f"the next {count} at {count / rest:.1f} tokens/s")


def main() -> None:
    use_utf8()
    settings = parse_settings(Settings)
    try:
        stage = "sft" if settings.mode else "pretrain"
        path = find_weights(stage, settings.model, settings.preset)
        if path == MINI_DIR and settings.model is None:
            note("no fine-tuned weights in out/ yet (`python train_sft.py` makes them); "
                 "using the shipped model instead")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = choose_dtype(settings.dtype, device)
        model, name = load_model(path, dtype=dtype, device=device)
        step = None if settings.eager else OneSequence.build(model, say=note)
        chat = Chat(model, load_tokenizer(path, TOKENIZER_DIR), settings, step)
        note(f"{name}: {model.num_unique_parameters() / 1e6:.3f} million parameters, "
             f"{str(dtype).removeprefix('torch.')} on {device}; /help lists the commands")
        talk(chat)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"model_chat.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough; Python must not flush into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
