"""Muon for the matrices, AdamW for the rest, over float32 master weights laid end to end.

Training multiplies in bfloat16, but an update is often smaller than bfloat16's spacing and would
round to nothing: so every weight has a float32 master that takes the updates and is copied into
the network after each. Masters and gradients are one flat tensor each. Gradients can then be
clipped, checked and summed over processes in one call, and matrices of one shape form a batch
without a copy.

Muon (Keller Jordan, 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found by a
few Newton-Schulz steps in bfloat16: every direction of the update gets the same length.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from training.checkpoint import difference


@dataclass
class Recipe:
    """How weights are updated.

    `learning_rate` is Muon's for matrices if `muon`, else AdamW's for everything;
    `adam_learning_rate` is AdamW's for embeddings and norms beside Muon. Both are peaks that the
    schedule scales.
    """

    muon: bool
    learning_rate: float
    adam_learning_rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0

    def with_learning_rate(self, learning_rate: float) -> "Recipe":
        """The same recipe with another peak; AdamW's beside Muon keeps its ratio to it."""
        ratio = learning_rate / self.learning_rate
        return replace(
            self,
            learning_rate=learning_rate,
            adam_learning_rate=self.adam_learning_rate * ratio,
        )


def newton_schulz(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximately orthogonalise a batch of matrices [n, rows, columns]; same shape, bfloat16.

    The quintic's coefficients are Muon's: they push every singular value into about [0.7, 1.2].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16()
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT.contiguous()  # a transposed view would make every product a fifth slower
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        polynomial = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A²
        X = torch.baddbmm(X, polynomial, X, beta=a)
    return X.mT if tall else X


class MasterOptimizer:
    """Float32 masters of a model's parameters and the state that updates them."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.recipe = recipe
        named = list(model.named_parameters())
        is_matrix = {
            name: recipe.muon and name.startswith("layers.") and p.dim() == 2 for name, p in named
        }
        # Matrices first, equal shapes side by side: a group of them is then a view [n, r, c].
        named.sort(key=lambda item: (not is_matrix[item[0]], tuple(item[1].shape)))
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        size = sum(p.numel() for p in self.parameters)
        device = self.parameters[0].device
        self.masters_flat = torch.empty(size, dtype=torch.float32, device=device)
        self.gradients_flat = torch.zeros(size, dtype=torch.float32, device=device)
        self.masters = self._views(self.masters_flat)
        self.gradients = self._views(self.gradients_flat)
        torch._foreach_copy_(self.masters, [p.detach() for p in self.parameters])

        self.matrix_groups = self._matrix_groups(is_matrix)
        self.momenta = [torch.zeros_like(weights) for weights, _ in self.matrix_groups]
        others = [i for i, name in enumerate(self.names) if not is_matrix[name]]
        for i in others:
            self.masters[i].grad = self.gradients[i]
        decayed = [
            self.masters[i] for i in others if not recipe.muon and self.masters[i].dim() == 2
        ]
        plain = [self.masters[i] for i in others if recipe.muon or self.masters[i].dim() != 2]
        groups = [dict(params=plain, weight_decay=0.0)]
        if decayed:
            groups.append(dict(params=decayed, weight_decay=recipe.weight_decay))
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, fused=True)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        pieces = flat.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def _matrix_groups(self, is_matrix: dict[str, bool]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(weights, gradients) per matrix shape: views [n, rows, columns] of the flat tensors."""
        shapes = [
            p.shape for name, p in zip(self.names, self.parameters, strict=True) if is_matrix[name]
        ]
        groups, start = [], 0
        for shape in dict.fromkeys(shapes):
            count = shapes.count(shape)
            end = start + count * shape.numel()
            groups.append(
                tuple(
                    x[start:end].view(count, *shape)
                    for x in (self.masters_flat, self.gradients_flat)
                )
            )
            start = end
        return groups

    def collect_gradients(self) -> None:
        """Add the parameters' gradients to the float32 ones, and drop them."""
        used = [
            (g, p)
            for g, p in zip(self.gradients, self.parameters, strict=True)
            if p.grad is not None
        ]
        torch._foreach_add_([g for g, _ in used], [p.grad for _, p in used])
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, scale: float) -> torch.Tensor:
        """One update with learning rates `scale` times their peak; returns the gradient's norm.

        The gradients are clipped to the recipe's norm before and zeroed after. One that is not
        finite counts as zero, so that the weights stay good until the caller has seen the norm.
        """
        norm = self.gradients_flat.norm()
        clip = (self.recipe.max_gradient_norm / (norm + 1e-6)).clamp(max=1.0)
        self.gradients_flat.mul_(clip).masked_fill_(norm.isfinite().logical_not(), 0.0)
        lr = self.recipe.learning_rate * scale
        for (weights, gradients), momentum in zip(self.matrix_groups, self.momenta, strict=True):
            momentum.lerp_(gradients, 1 - self.recipe.momentum)
            update = newton_schulz(gradients.lerp_(momentum, self.recipe.momentum))  # Nesterov
            rows, columns = weights.shape[1:]
            weights.mul_(1 - lr * self.recipe.weight_decay)
            weights.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)
        for group in self.adam.param_groups:
            group["lr"] = (
                self.recipe.adam_learning_rate if self.recipe.muon else self.recipe.learning_rate
            ) * scale
        self.adam.step()
        self.gradients_flat.zero_()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        return norm

    def state_dict(self) -> dict:
        """Everything an update depends on; tensors are the live ones, not copies."""
        return {
            "names": self.names,
            "masters": self.masters_flat,
            "gradients": self.gradients_flat,
            "momenta": self.momenta,
            "adam": self.adam.state_dict(),
        }

    def _adam_state(self, saved: dict) -> dict:
        """AdamW's state dict as it has to be; torch keeps nothing before the first update."""
        state = self.adam.state_dict()
        parameters = [p for group in self.adam.param_groups for p in group["params"]]
        was_updated = not isinstance(saved.get("adam"), dict) or bool(saved["adam"].get("state"))
        moments = {
            i: {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p}
            for i, p in enumerate(parameters)
        }
        return {**state, "state": moments if was_updated else {}}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`; the network's weights are set as well.

        Raises:
            ValueError: the state belongs to another network or recipe.
        """
        # Everything is checked before the first tensor is copied: never half a state.
        expected = {**self.state_dict(), "adam": self._adam_state(state)}
        fault = difference(state, expected)
        if fault or state["names"] != self.names:
            raise ValueError(
                "the saved optimizer state belongs to another network or recipe, or is damaged: "
                f"{fault or 'other names'}"
            )
        self.masters_flat.copy_(state["masters"])
        self.gradients_flat.copy_(state["gradients"])
        for momentum, saved in zip(self.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
