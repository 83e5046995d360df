"""The network once more, out of LMDeploy's layers: compare it with model/model.py side by side.

What differs, and why:
- All tokens of a step lie in one row, whatever sequence they belong to: [1, N, D], no padding.
- q, k and v are one matrix, w1 and w3 another: two large products are faster than five small ones.
- Keys and values go into the paged cache; `Attention` finds each sequence's blocks in
  `attn_metadata`, which the device's backend builds once a step.
- A norm also adds the residual, so that the sum is read once.
- The layers know how to load a part of a weight (tensor parallelism) and int4 weights (AWQ).

Shapes in names: N tokens of all sequences, D hidden width, H heads, K key/value heads, E head
width.
"""
from collections.abc import Iterable
from typing import Any

import torch
from lmdeploy.pytorch.model_inputs import StepContext, StepContextManager
from lmdeploy.pytorch.models.utils.cudagraph import CudaGraphMixin
from lmdeploy.pytorch.nn import ApplyRotaryEmb, RMSNorm, SiluAndMul
from lmdeploy.pytorch.nn import Attention as PagedAttention
from lmdeploy.pytorch.nn.linear import (
    build_down_linear,
    build_gateup_linear,
    build_o_proj,
    build_qkv_proj,
    build_rowwise_linear,
)
from lmdeploy.pytorch.nn.rotary_embedding import build_rotary_embedding
from lmdeploy.pytorch.weight_loader.model_weight_loader import load_weight
from torch import nn

from model import YuanMengConfig

# A checkpoint's matrix, the merged one it is a part of, and which part.
MERGED = (
    (".attention.wq.", ".attention.wqkv.", "q"),
    (".attention.wk.", ".attention.wqkv.", "k"),
    (".attention.wv.", ".attention.wqkv.", "v"),
    (".feed_forward.w1.", ".feed_forward.w13.", 0),
    (".feed_forward.w3.", ".feed_forward.w13.", 1),
)


class Attention(nn.Module):
    """Grouped-query self-attention over the paged cache."""

    def __init__(self, config: YuanMengConfig, name: str, **place):
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        place["quant_config"] = getattr(config, "quantization_config", None)
        self.wqkv = build_qkv_proj(
            config.hidden_size,
            num_q_heads=heads,
            num_kv_heads=kv_heads,
            head_size=config.head_dim,
            bias=False,
            num_replicate_kv_heads=getattr(config, "num_replicate_key_value_heads", 1),
            prefix=f"{name}.wqkv",
            **place,
        )
        self.rotate = ApplyRotaryEmb()
        self.attend = PagedAttention(heads, config.head_dim, num_kv_heads=kv_heads)
        self.wo = build_o_proj(
            heads * config.head_dim, config.hidden_size, bias=False, is_tp=True,
            prefix=f"{name}.wo", **place,
        )

    def forward(self, x_1ND, rope, cache: tuple[torch.Tensor, ...], attn_metadata) -> torch.Tensor:
        q_NHE, k_NKE, v_NKE = self.wqkv.split_qkv(self.wqkv(x_1ND).flatten(0, -2))
        q_NHE, k_NKE = self.rotate(q_NHE, k_NKE, *rope, inplace=True)
        y_NHE = self.attend_cached(q_NHE, k_NKE, v_NKE, cache, attn_metadata)
        return self.wo(y_NHE.reshape(*x_1ND.shape[:-1], -1))

    def attend_cached(self, q_NHE, k_NKE, v_NKE, cache, attn_metadata) -> torch.Tensor:
        """New keys and values go into the cache, of which each query then sees its sequence's."""
        # A quantized cache holds two more tensors: scales and zero points of keys and of values.
        k_cache, v_cache, k_scales, v_scales = (*cache, None, None)[:4]
        return self.attend(
            q_NHE, k_NKE, v_NKE, k_cache, v_cache, attn_metadata,
            k_scales_zeros=k_scales, v_scales_zeros=v_scales, inplace=True,
        )


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, config: YuanMengConfig, name: str, **place):
        super().__init__()
        place |= {"quant_config": getattr(config, "quantization_config", None), "is_tp": True}
        width, inner = config.hidden_size, config.intermediate_size
        self.w13 = build_gateup_linear(
            width, [inner, inner], bias=False, prefix=f"{name}.w13", **place)
        self.gate = SiluAndMul(inplace=True)
        self.w2 = build_down_linear(inner, width, bias=False, prefix=f"{name}.w2", **place)

    def forward(self, x_1ND: torch.Tensor) -> torch.Tensor:
        return self.w2(self.gate(self.w13(x_1ND)))


class YuanMengDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the sums are the norms' work."""

    def __init__(self, config: YuanMengConfig, name: str, **place):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **place)
        self.attention = Attention(config, f"{name}.attention", **place)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **place)
        self.feed_forward = FeedForward(config, f"{name}.feed_forward", **place)

    def forward(self, x_1ND, residual_1ND, rope, cache, attn_metadata):
        if residual_1ND is None:
            residual_1ND, x_1ND = x_1ND, self.attention_norm(x_1ND)
        else:
            x_1ND, residual_1ND = self.attention_norm(x_1ND, residual_1ND)
        x_1ND = self.attention(x_1ND, rope, cache, attn_metadata)
        x_1ND, residual_1ND = self.ffn_norm(x_1ND, residual_1ND)
        return self.feed_forward(x_1ND), residual_1ND


class YuanMengModel(nn.Module, CudaGraphMixin):
    """What the engine builds for the architecture `YuanMengModel`."""

    packed_modules_mapping = {"wqkv": ["wq", "wk", "wv"], "w13": ["w1", "w3"]}

    def __init__(
        self,
        config: YuanMengConfig,
        ctx_mgr: StepContextManager,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.config, self.ctx_mgr, self.dtype = config, ctx_mgr, dtype
        place = {"dtype": dtype, "device": device}
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, **place)
        self.layers = nn.ModuleList(
            YuanMengDecoderLayer(config, f"layers.{i}", **place)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **place)
        self.output = build_rowwise_linear(
            config.hidden_size, config.vocab_size, bias=False, **place
        )
        self.rope = build_rotary_embedding(
            config.head_dim, config.max_position_embeddings, config.rope_theta, device=device
        )

    @classmethod
    def update_quant_config(cls, quant_config):
        """Called before the layers are made: a merged matrix is left as it is if its parts are."""
        if quant_config is not None:
            names = quant_config.ignored_layers or []
            quant_config.ignored_layers = names + [
                f"{name}.".replace(part, merged).removesuffix(".")
                for name in names for part, merged, _ in MERGED if f"{name}.".endswith(part)
            ]
        return quant_config

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, ...]],
        attn_metadata: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Hidden states [1, N, D] of N tokens; the engine asks for logits only where it samples."""
        x_1ND = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin = self.rope(x_1ND, position_ids)
        rope, residual_1ND = (cos[0], sin[0]), None
        for layer, cache in zip(self.layers, past_key_values, strict=True):
            x_1ND, residual_1ND = layer(x_1ND, residual_1ND, rope, cache, attn_metadata)
        return self.norm(x_1ND, residual_1ND)[0]

    def get_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.output(hidden_states.to(self.dtype))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_embeddings

    def prepare_inputs_for_generation(
        self,
        past_key_values: list[tuple[torch.Tensor, ...]],
        inputs_embeds: torch.Tensor | None = None,
        context: StepContext | None = None,
    ) -> dict[str, Any]:
        """From the scheduler's step to the arguments of `forward`."""
        return {
            "input_ids": context.input_ids,
            "position_ids": context.position_ids,
            "past_key_values": past_key_values,
            "attn_metadata": context.attn_metadata,
            "inputs_embeds": inputs_embeds,
        }

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fill the parameters from a checkpoint with model/model.py's names."""
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if self.config.tie_word_embeddings and name == "output.weight":
                continue
            for part, merged, which in MERGED:
                if part in name:
                    load_weight(parameters[name.replace(part, merged)], tensor, shard_id=which)
                    break
            else:
                load_weight(parameters[name], tensor)

    def update_weights(self) -> None:
        """Called when all is loaded: the head takes the embeddings if the two are tied."""
        if self.config.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight
