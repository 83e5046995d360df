"""Cross-entropy over the vocabulary without ever holding all logits.

The logits of one update (8,192 tokens × 6,400 entries in float32) take 210 MB, and their gradient
as much again. Here the head and the loss run over a chunk of tokens at a time, and the gradients
are computed on the way forward, so that a chunk's logits can be forgotten at once (the idea of
Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
"""

from collections.abc import Callable

import torch

from model.model import IGNORED_LABEL


def softmax_gradient(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy (nats, float32) and its gradient [N, V], `(softmax - one_hot) · scale`.

    A function of its own so that it can be compiled: the passes over the logits become two.
    """
    counted = targets_N != IGNORED_LABEL
    targets = targets_N.clamp(min=0)[:, None]
    log_normaliser = logits_NV.float().logsumexp(-1, keepdim=True)
    losses = log_normaliser - logits_NV.gather(1, targets).float()
    one_hot = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets
    probabilities = (logits_NV.float() - log_normaliser).exp()
    gradient = (probabilities - one_hot.float()) * (counted * scale)[:, None]
    return (losses[:, 0] * counted).sum(), gradient.to(logits_NV.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies times `scale`; gradients for the hidden states and the head."""

    @staticmethod
    def forward(ctx, h_ND, head_VD, targets_N, scale, gradient_function, chunk_size):
        grad_h = torch.empty_like(h_ND)
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        scale = torch.full((), scale, device=h_ND.device)  # no copy that a GPU would wait for
        for start in range(0, h_ND.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            loss, gradient = gradient_function(h_ND[part] @ head_VD.t(), targets_N[part], scale)
            total += loss
            torch.mm(gradient, head_VD, out=grad_h[part])
            grad_head += gradient.t() @ h_ND[part]
        ctx.save_for_backward(grad_h, grad_head.to(head_VD.dtype))
        return total * scale

    @staticmethod
    def backward(ctx, grad_output):
        grad_h, grad_head = ctx.saved_tensors
        return grad_h * grad_output, grad_head * grad_output, None, None, None, None


def chunked_cross_entropy(
    h_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    scale: float,
    gradient_function: Callable = softmax_gradient,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """`scale` times the summed cross-entropy (nats) of N tokens; targets of -100 do not count.

    Pass `scale = 1 / number of targets` for the mean, and a compiled `softmax_gradient` for speed.
    """
    return ChunkedCrossEntropy.apply(h_ND, head_VD, targets_N, scale, gradient_function, chunk_size)
