"""Attention for packed training rows: block-causal on a CPU, torch's fused kernel elsewhere.

A causal mask throws half of a T×T product away, and torch's CPU kernel computes it anyway. Here the
queries are cut into blocks and each block multiplies only the keys up to its own end. All query
heads that share a key/value head are laid under one another, so that one product serves them all.
Compiled, a whole step of the mini preset then takes 0.58 of its time with SDPA; not compiled, 0.92
(`python -m benchmarks.step`).
"""

import torch

from model.model import sdpa_attention


def block_causal_attention(
    q_BTHE: torch.Tensor,
    k_BTKE: torch.Tensor,
    v_BTKE: torch.Tensor,
    segments_BT: torch.Tensor,
    num_blocks: int = 4,
) -> torch.Tensor:
    """Causal attention inside each document of a packed row; [B, T, H, E].

    Args:
        q_BTHE: queries of H heads; k_BTKE, v_BTKE: keys and values of K heads, K dividing H.
        segments_BT: the number of the document that each token belongs to.
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
    positions = torch.arange(T, device=q.device)
    blocks = []
    for start in range(0, T, size):
        end = start + size
        scores = torch.bmm(
            q[:, :, :, start:end].reshape(B * K, G * size, E), k[:, :end].transpose(1, 2)
        ).view(B, K, G, size, end)
        allowed = positions[start:end, None] >= positions[None, :end]
        allowed = allowed & (segments_BT[:, start:end, None] == segments_BT[:, None, :end])
        scores = scores.float().masked_fill(~allowed[:, None, None], float("-inf"))
        weights = scores.softmax(-1).to(v.dtype).view(B * K, G * size, end)
        blocks.append(torch.bmm(weights, v[:, :end]).view(B, K, G, size, E))
    return torch.cat(blocks, dim=3).permute(0, 3, 1, 2, 4).reshape(B, T, H, E)


def packed_sdpa_attention(
    q_BTHE: torch.Tensor,
    k_BTKE: torch.Tensor,
    v_BTKE: torch.Tensor,
    segments_BT: torch.Tensor,
) -> torch.Tensor:
    """The same result through torch's fused kernel with a boolean mask; [B, T, H, E]."""
    T = segments_BT.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    same_document = segments_BT[:, :, None] == segments_BT[:, None, :]
    return sdpa_attention(q_BTHE, k_BTKE, v_BTKE, (causal & same_document)[:, None])
