"""The network: Llama under other names, in one file that reads from the bottom up.

RMSNorm (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245) and
SwiGLU (2002.05202). Rotary positions turn halves of a head against each other, the convention of
transformers, so that the weights load into `LlamaForCausalLM` unchanged (`tests/test_model.py`).

Shapes in names: B batch, T new tokens, S tokens attended to, D hidden width, H heads, K key/value
heads, E head width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import KVCache
from .config import YuanMengConfig

IGNORED_LABEL = -100


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, in float32 whatever the input's dtype."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x = x_BTD.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(x_BTD.dtype)


def rope_tables(
    positions_BT: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position's rotation, each [B, T, 1, E]."""
    exponents = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32)
    inverse_frequencies = 1.0 / (theta ** (exponents / head_dim))
    angles = positions_BT[:, :, None, None].float() * inverse_frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first half of each head against the second by its position's angles."""
    first, second = x_BTHE.chunk(2, dim=-1)
    return x_BTHE * cos + torch.cat((-second, first), dim=-1) * sin


def sdpa_attention(
    q_BTHE: torch.Tensor, k_BSKE: torch.Tensor, v_BSKE: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention by torch's fused kernel; [B, T, H, E].

    `mask` is boolean, [B or 1, 1, T, S], true where a query may look. None means causal for a whole
    sequence and no restriction for a single new token.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=True
    )
    return y.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query self-attention. `attend` is the kernel: a trainer can set a faster one."""

    def __init__(self, config: YuanMengConfig, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.wq = nn.Linear(config.hidden_size, query_size, bias=False)
        self.wk = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.wv = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.wo = nn.Linear(query_size, config.hidden_size, bias=False)
        self.wo.writes_to_residual = True
        self.attend: Callable[..., torch.Tensor] = sdpa_attention

    def forward(
        self,
        x_BTD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        B, T, _ = x_BTD.shape
        q_BTHE = rotate(self.wq(x_BTD).view(B, T, -1, self.head_dim), *rope)
        k_BSKE = rotate(self.wk(x_BTD).view(B, T, -1, self.head_dim), *rope)
        v_BSKE = self.wv(x_BTD).view(B, T, -1, self.head_dim)
        if cache is not None:
            # The cache lies [B, K, S, E]: one head's past is contiguous, as attention reads it.
            k, v = cache.update(k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2), self.layer_index)
            k_BSKE, v_BSKE = k.transpose(1, 2), v.transpose(1, 2)
        y_BTHE = self.attend(q_BTHE, k_BSKE, v_BSKE, mask)
        return self.wo(y_BTHE.reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, config: YuanMengConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2.writes_to_residual = True

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class YuanMengDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: YuanMengConfig, layer_index: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer_index)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, mask, cache)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


class YuanMengModel(PreTrainedModel, GenerationMixin):
    """Token embeddings, the layers, a last norm, and a head tied to the embeddings."""

    config_class = YuanMengConfig
    _no_split_modules = ["YuanMengDecoderLayer"]
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}
    _supports_sdpa = True

    def __init__(self, config: YuanMengConfig):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            YuanMengDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "writes_to_residual", False):
            # These add to the residual stream: starting smaller keeps its variance from growing
            # with depth (GPT-2).
            scale = (2 * self.config.num_hidden_layers) ** -0.5
            nn.init.normal_(module.weight, std=self.config.initializer_range * scale)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def num_unique_parameters(self) -> int:
        """Parameters, the tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden_states(
        self,
        x_BTD: torch.Tensor,
        positions_BT: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Embedded tokens through all layers and the last norm; [B, T, D].

        `mask` goes to each layer's `attend` as it is.
        """
        rope = rope_tables(positions_BT, self.config.head_dim, self.config.rope_theta, x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rope=rope, mask=mask, cache=cache)
        return self.norm(x_BTD)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        segment_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] for the tokens given, in transformers' interface.

        Args:
            input_ids: [B, T] token ids (or `inputs_embeds`, [B, T, D]).
            attention_mask: [B, S] with 1 for real tokens and 0 for padding, past included.
            position_ids: [B, T]; by default a real token's position counts the real ones before it.
            past_key_values: the cache to read and extend; a new one is made if `use_cache`.
            labels: [B, T], already aligned with `input_ids` (shifted here); -100 is ignored.
            logits_to_keep: only the last so many positions (0 = all), or their indices.
            segment_ids: [B, T] document numbers of a packed row (0 = padding); tokens attend only
                within their own document.
        """
        x_BTD = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x_BTD.shape
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and segment_ids is None
        if use_cache and past_key_values is None:
            past_key_values = KVCache(
                self.config.num_hidden_layers, self.config.max_position_embeddings
            )
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask = attention_mask_for(x_BTD, past, attention_mask, segment_ids)
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x_BTD.device)[None]
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        h_BTD = self.hidden_states(x_BTD, position_ids, mask, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(h_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                labels[:, 1:].flatten(),
                ignore_index=IGNORED_LABEL,
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """Give `generate()` the preallocated cache unless its caller chose another one."""
        chosen = model_kwargs.get("past_key_values") is not None
        if chosen or generation_config.cache_implementation or not generation_config.use_cache:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        model_kwargs["past_key_values"] = KVCache(self.config.num_hidden_layers, max_cache_length)


def attention_mask_for(
    x_BTD: torch.Tensor,
    past: int,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
) -> torch.Tensor | None:
    """The boolean mask [B or 1, 1, T, past + T] of who may look where, or None where causal is all.

    A padding token may look at itself only, so that no row of the softmax is empty.
    """
    T, device = x_BTD.shape[1], x_BTD.device
    if attention_mask is not None and attention_mask.dim() == 4:
        # transformers also writes these as numbers to add: 0 where allowed, else very negative.
        return attention_mask >= 0 if attention_mask.is_floating_point() else attention_mask.bool()
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and segment_ids is None and (past == 0 or T == 1):
        return None
    own = torch.arange(past, past + T, device=device)[:, None]
    everyone = torch.arange(past + T, device=device)[None, :]
    mask = (everyone <= own)[None, None]
    if padded:
        mask = (mask & attention_mask[:, None, None, :].bool()) | (everyone == own)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return mask
