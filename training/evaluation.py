"""Held-out loss in bits per byte, which compares runs whatever their tokenizer."""

import math

import torch
from transformers import PreTrainedTokenizerBase

from model.model import IGNORED_LABEL
from training.attention import AttentionKernel


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """UTF-8 bytes that each token id stands for; special tokens stand for none.

    In a byte-level vocabulary every character of a token's name is one byte.
    """
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if i in special else len(name) for i, name in enumerate(names)])


@torch.no_grad()
def sum_losses(model: torch.nn.Module, x_BT, y_BT, mask, byte_lengths) -> tuple[float, int]:
    """(nats, bytes) of a batch's targets. `mask` is what the layers' attention reads."""
    positions = torch.arange(x_BT.shape[1], device=x_BT.device)[None]
    h_BTD = model.hidden_states(model.tok_embeddings(x_BT), positions, mask)
    counted = y_BT != IGNORED_LABEL
    logits = (h_BTD[counted] @ model.tok_embeddings.weight.t()).float()
    targets = y_BT[counted]
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return nats.item(), int(byte_lengths[targets.cpu()].sum())


def nats_per_token(
    model, rows, indices: list[int], kernel: AttentionKernel, world, batch_size=8
) -> float:
    """Loss on the rows of a `RowSet` that are named by `indices`, as the training log counts it.

    Every process of `world` takes its share; `kernel` is how the layers attend meanwhile.
    """
    device = next(model.parameters()).device
    byte_lengths = torch.ones(model.config.vocab_size)  # so that "bytes" are tokens
    nats, num_tokens = 0.0, 0
    with kernel.used_by(model):
        for start in range(world.rank * batch_size, len(indices), world.size * batch_size):
            batch = rows.batch(indices[start : start + batch_size])
            x, y, segments = (tensor.to(device) for tensor in batch)
            part = sum_losses(model, x, y, kernel.make_mask(segments), byte_lengths)
            nats, num_tokens = nats + part[0], num_tokens + part[1]
    nats, num_tokens = world.sum_numbers(nats, num_tokens)
    return nats / max(1, num_tokens)


def bits_per_byte(
    model, rows, kernel: AttentionKernel, byte_lengths, world, max_rows=None, batch_size=8
) -> float:
    """Bits the model needs per byte of held-out target text; NaN without held-out rows.

    Args:
        rows: a `RowSet`; every process of `world` takes its share.
        kernel: how the layers attend meanwhile.
        max_rows: only the first so many rows.
    """
    device = next(model.parameters()).device
    total = min(len(rows), max_rows or len(rows))
    nats, num_bytes = 0.0, 0
    with kernel.used_by(model):
        for start in range(world.rank * batch_size, total, world.size * batch_size):
            batch = rows.batch(range(start, min(start + batch_size, total)))
            x, y, segments = (tensor.to(device) for tensor in batch)
            part = sum_losses(model, x, y, kernel.make_mask(segments), byte_lengths)
            nats, num_bytes = nats + part[0], num_bytes + part[1]
    nats, num_bytes = world.sum_numbers(nats, num_bytes)
    return nats / math.log(2) / num_bytes if num_bytes else math.nan
