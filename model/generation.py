"""From logits to text: the sampling loop behind the chat, and a stream of whole characters.

`transformers.generate` does the same and much more; this loop is what is left when one sequence is
generated token by token, short enough to read and to make fast.
"""
import codecs
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .cache import KVCache
from .model import YuanMengModel
from .step import OneSequence

BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
# Dividing by less than this would overflow; the result is the most likely token anyway.
GREEDY_BELOW = 1e-5
# So many tokens nearly always hold the nucleus; sorting the whole vocabulary takes 20 times as
# long.
LIKELY = 256


def generate_tokens(
    model: YuanMengModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.75,
    top_p: float = 0.9,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = 2,
    generator: torch.Generator | None = None,
    step: OneSequence | None = None,
) -> Iterator[int]:
    """Yield the tokens that continue `prompt_ids`, one by one, each as soon as it is known.

    Stops after `max_new_tokens`, or before `eos_token_id`, which is not yielded.

    Args:
        temperature: 0 takes the most likely token; 1 samples from the model's own distribution.
        top_p: sample among the likeliest tokens that together reach this probability (nucleus
            sampling, arXiv 1904.09751).
        repetition_penalty: above 1 makes tokens generated before less likely (CTRL, 1909.05858).
            Tokens of the prompt are not penalized: an answer must be free to take up the
            question's words, and `</s>` in earlier turns must not make it harder to stop.
        generator: the source of randomness, on the model's device.
        step: the model's own compiled step, which writes several times as fast; without it the
            network is called for each token.

    Raises:
        ValueError: a setting is out of range, or the prompt is empty or too long for the model.
    """
    check_sampling(max_new_tokens, temperature, top_p, repetition_penalty)
    capacity = len(prompt_ids) + max_new_tokens
    if not prompt_ids:
        raise ValueError("the prompt is empty; begin it with the <s> token")
    if capacity > model.config.max_position_embeddings:
        raise ValueError(
            f"prompt ({len(prompt_ids)} tokens) and answer ({max_new_tokens}) do not fit into the "
            f"model's {model.config.max_position_embeddings} positions"
        )
    cache = KVCache(model.config.num_hidden_layers, capacity)
    return decode_steps(
        model, cache, prompt_ids, max_new_tokens, temperature, top_p, repetition_penalty,
        eos_token_id, generator, step,
    )


def check_sampling(
    max_new_tokens: int, temperature: float, top_p: float, repetition_penalty: float
) -> None:
    """Raise a ValueError that names the first setting out of its range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if not 0 < repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty must be above 0 (1 = none), not {repetition_penalty}")


@torch.inference_mode()
def decode_steps(
    model: YuanMengModel,
    cache: KVCache,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
    eos_token_id: int | None,
    generator: torch.Generator | None,
    step: OneSequence | None,
) -> Iterator[int]:
    """The loop itself: the whole prompt in the first step, then one token a step."""
    input_BT = torch.tensor([list(prompt_ids)], device=model.device)
    logits_V = model(input_BT, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
    if step is not None:
        step.take_over(cache)
    generated_V = torch.zeros_like(logits_V, dtype=torch.bool)
    for written in range(1, max_new_tokens + 1):
        if repetition_penalty != 1:
            logits_V = penalize_repetition(logits_V, generated_V, repetition_penalty)
        token = sample(logits_V, temperature, top_p, generator)
        token_id = int(token)
        if token_id == eos_token_id:
            return
        yield token_id
        if written == max_new_tokens:
            return
        generated_V[token_id] = True
        if step is not None:
            logits_V = step.logits(token)
        else:
            output = model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
            logits_V = output.logits[0, -1].float()


def penalize_repetition(
    logits_V: torch.Tensor, generated_V: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Lower the logits of the tokens marked in `generated_V`: positive ones are divided by
    `penalty` and negative ones multiplied, so that both move down."""
    penalized_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return torch.where(generated_V, penalized_V, logits_V)


def sample(
    logits_V: torch.Tensor,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw one token id, shape [1], from the nucleus of the distribution at this temperature."""
    if temperature < GREEDY_BELOW:
        return logits_V.argmax(-1, keepdim=True)
    probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
    if top_p == 1:
        return torch.multinomial(probabilities_V, 1, generator=generator)
    likely, token_ids = probabilities_V.topk(min(LIKELY, len(probabilities_V)))
    if likely.sum() < top_p:  # rare: the model has no idea
        likely, token_ids = probabilities_V.sort(descending=True)
    # A token stays if those before it have not reached top_p yet; so the first one always stays.
    outside = likely.cumsum(-1) - likely >= top_p
    drawn = torch.multinomial(likely.masked_fill(outside, 0), 1, generator=generator)
    return token_ids[drawn]


class TextStream:
    """Turns token ids into text as they come, never showing half a character.

    A byte-level token may end inside a character, whose bytes wait here for the rest. Bytes that
    can no longer become a character are shown as U+FFFD, as `tokenizer.decode` shows them; special
    tokens are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.special_ids = set(tokenizer.all_special_ids)
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often one or more, sometimes none."""
        if token_id in self.special_ids:
            return ""
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return self.utf8.decode(bytes(BYTE_OF_CHARACTER[character] for character in token))

    def finish(self) -> str:
        """U+FFFD if the last token ended inside a character, otherwise nothing."""
        return self.utf8.decode(b"", final=True)
