"""Attention for packed training rows: block-causal on a CPU, FlexAttention or SDPA on a GPU.

Rows are packed, so a token may look at earlier tokens of its own document only. That mask is the
same for every layer and head: it is made once per batch, in the form its kernel reads fastest.

A causal mask throws half of a T×T product away, and torch's CPU kernel computes it anyway. Block-
causal attention cuts the queries into blocks, and each block multiplies only the keys up to its own
end. All query heads that share a key/value head are laid under one another, so that one product
serves them all. What each of this gains: docs/training.md, `python -m benchmarks.step`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.model import sdpa_attention


@dataclass(frozen=True)
class AttentionKernel:
    """A way to compute packed attention.

    `make_mask(segments_BT)` gives what `attend(q_BTHE, k_BTKE, v_BTKE, mask)` reads, from the
    number of the document that each token belongs to.
    """

    name: str
    attend: Callable[..., torch.Tensor]
    make_mask: Callable[[torch.Tensor], object]

    @contextmanager
    def used_by(self, model: torch.nn.Module) -> Iterator[None]:
        """All layers of `model` attend this way inside the `with` block."""
        attentions = [layer.attention for layer in model.layers]
        before = [attention.attend for attention in attentions]
        try:
            for attention in attentions:
                attention.attend = self.attend
            yield
        finally:
            for attention, attend in zip(attentions, before, strict=True):
                attention.attend = attend


def document_mask(segments_BT: torch.Tensor) -> torch.Tensor:
    """Who may look where: boolean, [B, 1, T, T]."""
    T = segments_BT.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    same_document = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (causal & same_document)[:, None]


def additive_mask(segments_BT: torch.Tensor) -> torch.Tensor:
    """The same as numbers to add to the scores: 0 or -inf, bfloat16, [B, 1, T, T]."""
    mask = document_mask(segments_BT)
    zeros = torch.zeros(mask.shape, dtype=torch.bfloat16, device=mask.device)
    return zeros.masked_fill_(~mask, float("-inf"))


def block_causal_attention(
    q_BTHE: torch.Tensor,
    k_BTKE: torch.Tensor,
    v_BTKE: torch.Tensor,
    mask_B1TT: torch.Tensor,
    num_blocks: int = 4,
) -> torch.Tensor:
    """Causal attention inside each document of a packed row; [B, T, H, E].

    Args:
        q_BTHE: queries of H heads; k_BTKE, v_BTKE: keys and values of K heads, K dividing H.
        mask_B1TT: of `additive_mask`.
        num_blocks: query blocks; it is lowered to a divisor of T.
    """
    B, T, H, E = q_BTHE.shape
    K = k_BTKE.shape[2]
    G = H // K  # query heads per key/value head
    while T % num_blocks:
        num_blocks -= 1
    size = T // num_blocks
    q = (q_BTHE * E**-0.5).reshape(B, T, K, G, E).permute(0, 2, 3, 1, 4)  # B K G T E
    k = k_BTKE.permute(0, 2, 1, 3).reshape(B * K, T, E)
    v = v_BTKE.permute(0, 2, 1, 3).reshape(B * K, T, E)
    blocks = []
    for start in range(0, T, size):
        end = start + size
        scores = torch.bmm(
            q[:, :, :, start:end].reshape(B * K, G * size, E), k[:, :end].transpose(1, 2)
        ).view(B, K, G, size, end)
        scores = scores.float() + mask_B1TT[:, :, None, start:end, :end].float()
        weights = scores.softmax(-1).to(v.dtype).view(B * K, G * size, end)
        blocks.append(torch.bmm(weights, v[:, :end]).view(B, K, G, size, E))
    return torch.cat(blocks, dim=3).permute(0, 3, 1, 2, 4).reshape(B, T, H, E)


def block_mask(segments_BT: torch.Tensor) -> BlockMask:
    """FlexAttention's mask: it skips every 128×128 block in which nobody may look."""

    def may_look(b, h, query, key):
        return (query >= key) & (segments_BT[b, query] == segments_BT[b, key])

    B, T = segments_BT.shape
    return create_block_mask(may_look, B, None, T, T, device=segments_BT.device)


def document_flex_attention(
    q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor, mask: BlockMask
) -> torch.Tensor:
    """FlexAttention (arXiv 2412.05496); [B, T, H, E]. Fast only where it is compiled."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


BLOCK_CAUSAL = AttentionKernel("block-causal", block_causal_attention, additive_mask)
FLEX = AttentionKernel("FlexAttention", document_flex_attention, block_mask)
SDPA = AttentionKernel("SDPA", sdpa_attention, document_mask)
