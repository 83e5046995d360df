"""The step that writes one more token of each sequence, as a pure function made to be compiled.

`model.py` is written to be read and trained. Writing token by token needs less and repeats it
thousands of times: here are the same equations with what costs time left out.

- Weights and cache come in as arguments. Compiled, the step is machine code that serves every
  checkpoint of the same shape.
- Matrices with the same input are one: q, k, v; w1 and w3.
- Products and attention are operators of our own where torch's are slow (kernels.py). What lies
  between them the compiler fuses.
- The residual stream stays float32 between the products.
- The cache is a row of slots, which attention reads where they lie (kernels.py).

Shapes in names: B sequences, L longest past with the new token, S slots, D hidden width, H heads, K
key/value heads, E head width, V vocabulary, I and O inputs and outputs of a product.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from . import compilation, kernels, slots
from .cache import KVCache
from .config import YuanMengConfig
from .kernels import attend, multiply_vector
from .model import YuanMengModel, rope_tables
from .slots import open_slots

SOURCES = [__file__, compilation.__file__, kernels.__file__, slots.__file__]

# A matrix [O, I], or what a product of one's own understands.
Weight = torch.Tensor | tuple[torch.Tensor, ...]


class LayerWeights(NamedTuple):
    """One decoder layer."""

    attention_norm: torch.Tensor  # [D]
    wqkv: Weight  # [(H + 2 K) · E, D]
    wo: Weight  # [D, H · E]
    ffn_norm: torch.Tensor  # [D]
    w13: Weight  # [2 · inner, D]
    w2: Weight  # [D, inner]


class StepWeights(NamedTuple):
    """All that a step reads besides the cache."""

    embeddings: torch.Tensor  # [V, D]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [D]
    output: Weight  # [V, D]
    cos: torch.Tensor  # [positions, E], float32
    sin: torch.Tensor


def multiply(x_BI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x Wᵀ, [B, O]."""
    product = multiply_vector if x_BI.shape[0] == 1 else F.linear
    return product(x_BI, weight_OI)


@dataclass(frozen=True)
class DecodeStep:
    """The step of a network of this shape.

    `product` knows other kinds of weights, of 4 bits.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    dtype: torch.dtype
    product: Callable[[torch.Tensor, Weight], torch.Tensor] = multiply

    @classmethod
    def of(cls, config: YuanMengConfig, dtype: torch.dtype, **product) -> "DecodeStep":
        return cls(config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                   config.rms_norm_eps, dtype, **product)

    @property
    def key(self) -> str:
        """All that tells this step from another."""
        values = vars(self).values()
        return " ".join(getattr(value, "__qualname__", str(value)) for value in values)

    def __call__(
        self,
        weights: StepWeights,
        caches: Sequence[Sequence[torch.Tensor]],
        ids_B: torch.Tensor,
        positions_B: torch.Tensor,
        write_B: torch.Tensor,
        read_BL: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states [B, D] and logits [B, V]; the caches take up the new tokens.

        Args:
            caches: each layer's tensors, which `open_slots` understands.
            ids_B, positions_B: the newest token of each sequence, and how many came before it.
            write_B: the slot for the newest token.
            read_BL: the slots that it reads (see `kernels.attend`).
        """
        x_BD = weights.embeddings[ids_B].float()
        cos_B1E, sin_B1E = weights.cos[positions_B][:, None], weights.sin[positions_B][:, None]
        for layer, cache in zip(weights.layers, caches, strict=True):
            q_BHE, k_BKE, v_BKE = self.enter(x_BD, layer, cos_B1E, sin_B1E)
            keys, values = open_slots(cache, self.head_dim)
            keys.write(write_B, k_BKE)
            values.write(write_B, v_BKE)
            y_BC = attend(q_BHE, keys, values, read_BL, positions_B)
            x_BD = self.leave(x_BD, y_BC, layer)
        h_BD = self.normalize(x_BD, weights.norm)
        return h_BD, self.product(h_BD, weights.output)

    def enter(self, x_ND, layer: LayerWeights, cos_N1E, sin_N1E) -> tuple[torch.Tensor, ...]:
        """The layer up to its attention: queries [N, H, E], keys and values [N, K, E]."""
        qkv_NC = self.product(self.normalize(x_ND, layer.attention_norm), layer.wqkv)
        q_NHE, k_NKE, v_NKE = qkv_NC.unflatten(-1, (-1, self.head_dim)).split(
            [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return self.rotate(q_NHE, cos_N1E, sin_N1E), self.rotate(k_NKE, cos_N1E, sin_N1E), v_NKE

    def leave(self, x_ND, y_NC, layer: LayerWeights) -> torch.Tensor:
        """The layer from its attention's result on: the residual stream, [N, D]."""
        x_ND = x_ND + self.product(y_NC, layer.wo)
        gate_up = self.product(self.normalize(x_ND, layer.ffn_norm), layer.w13)
        gate, up = gate_up.float().chunk(2, dim=-1)
        return x_ND + self.product((F.silu(gate) * up).to(self.dtype), layer.w2)

    def between(self, weights: LayerWeights, x_ND, y_NC, cos_N1E, sin_N1E):
        """From one layer's attention to the next one's, for any number of tokens: the residual
        stream, then queries, keys and values. `weights` are those that `leave` reads of the one
        layer and those that `enter` reads of the next."""
        x_ND = self.leave(x_ND, y_NC, weights)
        return x_ND, *self.enter(x_ND, weights, cos_N1E, sin_N1E)

    def normalize(self, x_BD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        """RMSNorm, as in model.py."""
        x_BD = x_BD * torch.rsqrt(x_BD.pow(2).mean(-1, keepdim=True) + self.eps)
        return x_BD.to(self.dtype) * weight_D

    def rotate(self, x_BCE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x_BCE.float().chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (x_BCE.float() * cos + turned * sin).to(self.dtype)

    def kernels(self, cache: Sequence[torch.Tensor]) -> compilation.Kernels:
        """The operators that the compiled step has in C++, with a cache like this."""
        return kernels.source(self.dtype, self.num_heads, self.num_kv_heads, self.head_dim, cache)


def rotary_tables(config: YuanMengConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of all positions, [positions, E] each, float32."""
    positions = torch.arange(config.max_position_embeddings)[None]
    return tuple(table[0, :, 0] for table in rope_tables(
        positions, config.head_dim, config.rope_theta, torch.float32))


def step_weights(model: YuanMengModel) -> StepWeights:
    """The weights of model.py's network; only the joined matrices are copies."""
    layers = [
        LayerWeights(
            layer.attention_norm.weight,
            torch.cat([layer.attention.wq.weight, layer.attention.wk.weight,
                       layer.attention.wv.weight]),
            layer.attention.wo.weight,
            layer.ffn_norm.weight,
            torch.cat([layer.feed_forward.w1.weight, layer.feed_forward.w3.weight]),
            layer.feed_forward.w2.weight,
        )
        for layer in model.layers
    ]
    return StepWeights(model.tok_embeddings.weight, layers, model.norm.weight, model.output.weight,
                       *rotary_tables(model.config))


class OneSequence:
    """The compiled step of one model for one sequence: what the chat writes with."""

    def __init__(self, model: YuanMengModel, function: compilation.FlatFunction,
                 weights: StepWeights):
        self.config, self.dtype, self.function = model.config, model.dtype, function
        self.weights = pytree.tree_leaves(weights)

    @classmethod
    @torch.no_grad()
    def build(cls, model: YuanMengModel, say: Callable[[str], None]) -> "OneSequence | None":
        """The step of this model; None on a GPU, or where there is no compiler. `say` tells the
        user what is going on."""
        if model.device.type != "cpu":
            return None
        step, weights = DecodeStep.of(model.config, model.dtype), step_weights(model)
        caches = empty_caches(model.config, model.dtype, 4)
        number, numbers = torch.zeros(1, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
        all_slots, length = (torch.export.Dim(name, min=2, max=1 << 24) for name in ("S", "L"))
        function = compilation.compiled(
            step,
            (weights, caches, number, number.clone(), number.clone(), numbers),
            (None, {0: all_slots}, None, None, None, {1: length}),
            name="step-chat", key=step.key, sources=SOURCES, kernels=step.kernels(caches[0]),
            say=say,
        )
        return None if function is None else cls(model, function, weights)

    def take_over(self, cache: KVCache) -> None:
        """Go on behind what the model has written to its cache."""
        self.length, capacity = cache.get_seq_length(), cache.get_max_length()
        caches = empty_caches(self.config, self.dtype, capacity)
        for layer, (keys_SKE, values_SKE) in zip(cache.layers, caches, strict=True):
            keys_SKE[: self.length] = layer.keys[0, :, : self.length].transpose(0, 1)
            values_SKE[: self.length] = layer.values[0, :, : self.length].transpose(0, 1)
        self.lasting = [*self.weights, *pytree.tree_leaves(caches)]
        self.slots = torch.arange(capacity)

    def logits(self, token: torch.Tensor) -> torch.Tensor:
        """Logits [V], float32, of what follows the token, shape [1]. ValueError if the cache that
        was taken over has no room for it."""
        if self.length == len(self.slots):
            raise ValueError(f"the cache holds {self.length} tokens and is full")
        newest = self.slots[self.length : self.length + 1]
        self.length += 1
        past_1L = self.slots[None, : self.length]
        _, logits_1V = self.function([*self.lasting, token, newest, newest, past_1L])
        return logits_1V[0].float()


def empty_caches(
    config: YuanMengConfig, dtype: torch.dtype, slots: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, for so many tokens."""
    shape = (slots, config.num_key_value_heads, config.head_dim)
    return [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
            for _ in range(config.num_hidden_layers)]
