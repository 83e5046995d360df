"""What a report card asks of a model: how likely it finds a text, and what it replies."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .config import TOKENIZER_DIR
from .conversation import encode_text, fit_conversation
from .loading import WeightsError, load_tokenizer, load_yuanmeng_or_llama

# A model with more positions reads this many at a time, so that memory stays bounded.
MAX_WINDOW = 2048
# Logits of a batch, at most: 128 MiB in float32, whatever the vocabulary (one row always fits).
MAX_LOGITS = 2**25

Pair = tuple[Sequence[int], Sequence[int]]


class Checkpoint:
    """A model on this machine with its tokenizer, ready to be measured.

    `kinds` are the kinds of items it can be given, and `left_out` says why others are not.

    Raises:
        FileNotFoundError, WeightsError: there is no whole model, or no tokenizer that fits it.
    """

    def __init__(
        self, path: str | Path, batch_size: int, device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.model, self.name = load_yuanmeng_or_llama(path, dtype=dtype, device=device)
        own = self.model.config.model_type == "yuanmeng"
        self.tokenizer = load_tokenizer(path, TOKENIZER_DIR if own else path)
        self.source, self.batch_size = str(path), batch_size
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise WeightsError(
                f"{path} has {self.model.config.vocab_size} token embeddings, its tokenizer "
                f"{len(self.tokenizer)} tokens; put the model's tokenizer.json beside the weights"
            )
        if self.tokenizer.bos_token_id is None or self.tokenizer.eos_token_id is None:
            raise WeightsError(f"the tokenizer in {path} names no bos_token and eos_token")
        self.kinds, self.left_out = {"text", "choice"}, ""
        if self.tokenizer.chat_template:
            self.kinds.add("chat")
        else:
            self.left_out = "its tokenizer has no chat template, so it is asked no questions"

    def losses(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Nats of the second text of each pair, after the beginning of a document and the first."""
        encoded = [
            ([self.tokenizer.bos_token_id, *encode_text(self.tokenizer, context)],
             encode_text(self.tokenizer, continuation))
            for context, continuation in pairs
        ]
        return continuation_losses(self.model, encoded, self.batch_size)

    def replies(
        self, conversations: Sequence[list[dict[str, str]]], max_new_tokens: int
    ) -> list[tuple[str, bool]]:
        """As `greedy_replies`."""
        return greedy_replies(
            self.model, self.tokenizer, conversations, max_new_tokens, self.batch_size
        )


def window_size(model: PreTrainedModel) -> int:
    return min(model.config.max_position_embeddings, MAX_WINDOW)


def windows(context: Sequence[int], continuation: Sequence[int], size: int) -> Iterator[Pair]:
    """Cut what is too long for `size` positions: pairs that score each token once.

    A context loses its beginning. Of a continuation, each later window takes half as many tokens
    as fit, so that the others can be their context.
    """
    ids, done = [*context, *continuation], len(context)
    while done < len(ids):
        end = min(len(ids), max(size, done + size // 2))
        yield ids[max(0, end - size) : done], ids[done:end]
        done = end


@torch.inference_mode()
def continuation_losses(
    model: PreTrainedModel, pairs: Sequence[Pair], batch_size: int
) -> list[float]:
    """Nats of each continuation after its context, for pairs (context ids, continuation ids).

    Args:
        pairs: contexts have at least one token.
        batch_size: rows at a time, fewer where they are long.
    """
    size = window_size(model)
    rows = [(i, *cut) for i, pair in enumerate(pairs) for cut in windows(*pair, size)]
    rows.sort(key=lambda row: len(row[1]) + len(row[2]))  # rows of a batch are about as long
    losses = [0.0] * len(pairs)
    bar = tqdm(total=len(rows), desc="scoring", leave=False, disable=None)
    while rows:
        longest = len(rows[-1][1]) + len(rows[-1][2])
        fitting = max(1, MAX_LOGITS // (longest * model.config.vocab_size))
        batch = rows[-min(batch_size, fitting) :]
        del rows[-len(batch) :]
        bar.update(len(batch))
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.long, device=model.device)
        for row, (_, context, continuation) in zip(ids_BT, batch, strict=True):
            tokens = torch.tensor([*context, *continuation])
            row[: len(tokens)] = tokens  # causal: padding on the right changes nothing
        first = min(len(context) for _, context, _ in batch)  # nobody needs logits before it
        logits_BTV = model(ids_BT, use_cache=False, logits_to_keep=longest - first + 1).logits
        nats_BT = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].float().transpose(1, 2), ids_BT[:, first:], reduction="none"
        )
        for nats_T, (i, context, continuation) in zip(nats_BT, batch, strict=True):
            start = len(context) - first
            losses[i] += nats_T[start : start + len(continuation)].sum().item()
    bar.close()
    return losses


@torch.inference_mode()
def greedy_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, str]]],
    max_new_tokens: int,
    batch_size: int,
) -> list[tuple[str, bool]]:
    """(reply, whether it ended by itself) to each conversation: the likeliest token at each step.

    Raises:
        ValueError: `max_new_tokens` leaves no room for a conversation.
    """
    size = window_size(model)
    try:
        prompts = [
            fit_conversation(tokenizer, messages, size - max_new_tokens)[0]
            for messages in conversations
        ]
    except ValueError as error:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} leaves no room for a question in the {size} "
            "positions of the model; lower it"
        ) from error
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # All that a folder's own generation settings could change is said here.
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=end, pad_token_id=pad,
    )
    replies = [("", False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in tqdm(range(0, len(order), batch_size), desc="chatting", leave=False, disable=None):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids_BT = torch.full((len(chosen), width), pad)
        mask_BT = torch.zeros_like(ids_BT)
        for row, i in enumerate(chosen):  # padding on the left: all replies begin at once
            ids_BT[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask_BT[row, width - len(prompts[i]) :] = 1
        output_BT = model.generate(
            ids_BT.to(model.device), attention_mask=mask_BT.to(model.device),
            generation_config=greedy,
        )
        for i, ids_T in zip(chosen, output_BT[:, width:].tolist(), strict=True):
            text = tokenizer.decode(ids_T, skip_special_tokens=True)
            replies[i] = (text, end in ids_T)
    return replies
