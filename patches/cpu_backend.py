"""LMDeploy's operators on a CPU: attention over the paged cache, and the small ones beside it.

The KV cache is cut into blocks of some tokens, and a sequence owns a list of blocks that may lie
anywhere (vLLM, arXiv 2309.06180). Seen flat, a layer's cache is a row of slots, one token in each;
a token's slot is its block's number times the block's length, plus its place in the block. All
that a step does with the cache is therefore two kinds of indexing: write the new tokens' keys and
values to their slots, and read the slots of all tokens that a sequence has so far. Which slots
these are is the same in all layers: `step_metadata` finds out once per step.

Shapes in names: N new tokens of all sequences, S slots, B sequences, L longest past with the new
token, H heads, K key/value heads, G = H / K, E head width.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from lmdeploy.pytorch.backends.activation import SiluAndMulBuildSpec, SiluAndMulImpl
from lmdeploy.pytorch.backends.apply_rotary_emb import ApplyRotaryEmbBuildSpec, ApplyRotaryEmbImpl
from lmdeploy.pytorch.backends.attention import (
    AttentionImpl,
    AttentionMetadata,
    PagedAttentionBuildSpec,
)
from lmdeploy.pytorch.backends.awq_modules import LinearW4A16BuildSpec
from lmdeploy.pytorch.backends.default import DefaultOpsBackend
from lmdeploy.pytorch.backends.default.cache import DefaultCacheBackend
from lmdeploy.pytorch.backends.linear import LinearBuildSpec
from lmdeploy.pytorch.backends.norm import RMSNormBuildSpec, RMSNormImpl
from lmdeploy.pytorch.backends.rotary_embedding import (
    RopeType,
    RotaryEmbeddingBuildSpec,
    RotaryEmbeddingImpl,
)
from lmdeploy.pytorch.engine.cache_engine.layout import ContiguousBlockCacheLayout
from lmdeploy.pytorch.model_inputs import StepContext

from model.kernels import attend
from model.slots import Slots, open_slots

from .cpu_linear import CpuLinear, CpuLinearW4A16


class CpuBackend(DefaultOpsBackend):
    """What the layers ask for their operators. Those not named here are LMDeploy's plain torch."""

    @staticmethod
    def get_name() -> str:
        return "cpu"

    @classmethod
    def build_op(cls, spec, *, enable_deterministic: bool = False):
        if isinstance(spec, PagedAttentionBuildSpec):
            return CpuAttention(spec)
        if isinstance(spec, RMSNormBuildSpec):
            return CpuRMSNorm(spec.hidden_size, spec.eps)
        if isinstance(spec, LinearBuildSpec):
            return CpuLinear()
        if isinstance(spec, LinearW4A16BuildSpec):
            return CpuLinearW4A16(spec)
        if isinstance(spec, SiluAndMulBuildSpec):
            return CpuSiluAndMul()
        if isinstance(spec, ApplyRotaryEmbBuildSpec):
            return CpuApplyRotary()
        if isinstance(spec, RotaryEmbeddingBuildSpec) and spec.emb_type is RopeType.Default:
            return CpuRotaryTable(spec)
        return super().build_op(spec, enable_deterministic=enable_deterministic)

    @staticmethod
    def get_attention_metadata_cls():
        return CpuAttentionMetadata

    @classmethod
    def get_cache_backend(cls):
        return CpuCache

    @classmethod
    def update_step_context(cls, step_context: StepContext) -> StepContext:
        step_context.attn_metadata = step_metadata(step_context)
        return step_context

    @staticmethod
    def build_graph_runner(model, model_config, cache_config, backend_config, device):
        from .cpu_step import CpuRunner  # which needs this file

        return CpuRunner(model, model_config, cache_config, backend_config, device)

    @staticmethod
    def ccl_backend() -> str:
        return "gloo"

    @staticmethod
    def device_count() -> int:
        return 1


class CpuCache(DefaultCacheBackend):
    """Each layer's keys and values contiguous, [blocks, block_size, K, E]: a flat view of slots."""

    @classmethod
    def build_block_layout(cls, tensor_specs, num_layers: int) -> ContiguousBlockCacheLayout:
        return ContiguousBlockCacheLayout(tuple(tensor_specs), num_layers=num_layers)


# ---- Attention -----------------------------------------------------------------------------------

@dataclass
class CpuAttentionMetadata(AttentionMetadata):
    """Where the step's tokens go in the cache, and what each sequence reads from it.

    Attributes:
        new_lengths, lengths: of each sequence, its new tokens and all its tokens.
        write_slots: [N], of the new tokens.
        read_slots: [B · L] while decoding, where short sequences repeat their first slot; when
            reading prompts, a list with the slots of each sequence.
    """

    new_lengths: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    write_slots: torch.Tensor | None = None
    read_slots: torch.Tensor | list[torch.Tensor] | None = None

    @property
    def reads_prompts(self) -> bool:
        """Whether some sequence has more than one new token."""
        return isinstance(self.read_slots, list)


def step_metadata(step: StepContext) -> CpuAttentionMetadata:
    """The metadata of one step; computed once and used by every layer."""
    block_size = step.cache_config.kernel_block_size
    blocks = step.block_offsets.long()
    metadata = CpuAttentionMetadata(
        is_decoding=step.is_decoding,
        block_offsets=step.block_offsets,
        q_start_loc=step.q_start_loc,
        q_seqlens=step.q_seqlens,
        kv_seqlens=step.kv_seqlens,
        quant_policy=step.kv_quant_policy,
        new_lengths=step.q_seqlens.tolist(),
        lengths=step.kv_seqlens.tolist(),
    )
    longest = max(metadata.lengths)
    blocks = blocks[:, : -(-longest // block_size), None] * block_size
    slots_BL = (blocks + torch.arange(block_size)).flatten(1)[:, :longest]
    if max(metadata.new_lengths) > 1:
        pairs = list(zip(metadata.new_lengths, metadata.lengths, strict=True))
        metadata.read_slots = [
            slots[:length] for slots, (_, length) in zip(slots_BL, pairs, strict=True)
        ]
        metadata.write_slots = torch.cat([
            slots[length - new : length]
            for slots, (new, length) in zip(slots_BL, pairs, strict=True)
        ])
    else:
        lengths_B1 = step.kv_seqlens.long()[:, None]
        metadata.write_slots = slots_BL.gather(1, lengths_B1 - 1).flatten()
        if min(metadata.lengths) < longest:
            counts_BL = torch.arange(longest) < lengths_B1
            # Behind its end a sequence's block list may name anything, also blocks of other
            # sequences: what is read there does not count, but it must be finite, and its own first
            # slot is.
            slots_BL = torch.where(counts_BL, slots_BL, slots_BL[:, :1])
        metadata.read_slots = slots_BL.flatten()
    return metadata


class CpuAttention(AttentionImpl):
    """Writes the new keys and values, then attends."""

    def __init__(self, spec: PagedAttentionBuildSpec):
        """Raises NotImplementedError for a model that needs more than causal attention."""
        lacking = [
            name
            for name, needed in {
                "ALiBi": spec.alibi,
                "a sliding window": spec.sliding_window not in (None, -1, (-1, -1)),
                "soft-capped logits": spec.logit_softcapping,
                "attention to the future": not spec.causal,
                "multi-head latent attention": spec.use_flash_mla or spec.mla_index_topk,
                "attention sinks": spec.learnable_sink,
                "block-sparse attention": spec.block_sparse_size != 1,
                "another scale": spec.scale not in (None, spec.head_dim**-0.5),
            }.items()
            if needed
        ]
        if lacking:
            raise NotImplementedError(f"the cpu device lacks {', '.join(lacking)} (patches/)")
        super().__init__(
            spec.num_heads, spec.head_dim, spec.scale, spec.num_kv_heads, spec.v_head_dim
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        attn_metadata: CpuAttentionMetadata,
        k_scales_zeros: torch.Tensor | None = None,
        v_scales_zeros: torch.Tensor | None = None,
        learnable_sink: torch.Tensor | None = None,
        nsa_indices: torch.Tensor | None = None,
        inplace: bool = False,
    ) -> torch.Tensor:
        """[N, H, E] of the new tokens; query is [N, H, E], key and value are [N, K, E]."""
        tensors = (k_cache, v_cache, k_scales_zeros, v_scales_zeros)
        cache = [x.flatten(0, 1) for x in tensors if x is not None]
        keys, values = open_slots(cache, self.head_size)
        keys.write(attn_metadata.write_slots, key)
        values.write(attn_metadata.write_slots, value)
        if attn_metadata.reads_prompts:
            return self.read_prompts(query, key, value, keys, values, attn_metadata)
        metadata = attn_metadata
        slots_BL = metadata.read_slots.unflatten(0, (len(metadata.lengths), -1))
        y_BC = attend(query, keys, values, slots_BL, metadata.kv_seqlens - 1)
        return y_BC.view_as(query)

    def read_prompts(
        self,
        q_NHE: torch.Tensor,
        k_NKE: torch.Tensor,
        v_NKE: torch.Tensor,
        keys: Slots,
        values: Slots,
        metadata: CpuAttentionMetadata,
    ) -> torch.Tensor:
        """Sequence by sequence: the new tokens attend to all before them, cached ones included."""
        outputs = []
        parts = (x.split(metadata.new_lengths) for x in (q_NHE, k_NKE, v_NKE))
        for q, k, v, slots in zip(*parts, metadata.read_slots, strict=True):
            if len(q) < len(slots):  # part was cached: by an earlier chunk, turn or sequence
                k, v = keys.read(slots, q.dtype), values.read(slots, q.dtype)
            outputs.append(self.attend_causally(q, k, v))
        return torch.cat(outputs)

    def attend_causally(self, q_NHE, k_LKE, v_LKE) -> torch.Tensor:
        """The last N of L tokens attend to all up to themselves, [N, H, E]."""
        N, L = len(q_NHE), len(k_LKE)
        q_1HNE, k_1KLE, v_1KLE = (x.transpose(0, 1)[None] for x in (q_NHE, k_LKE, v_LKE))
        mask_NL = torch.ones(N, L, dtype=torch.bool).tril(L - N) if N < L else None
        y_1HNE = F.scaled_dot_product_attention(
            q_1HNE, k_1KLE, v_1KLE, attn_mask=mask_NL, is_causal=mask_NL is None, enable_gqa=True)
        return y_1HNE[0].transpose(0, 1)


# ---- Small operators -----------------------------------------------------------------------------

class CpuRMSNorm(RMSNormImpl):
    """torch's fused norm: one call instead of six."""

    def __init__(self, hidden_size: int, eps: float):
        self.shape, self.eps = (hidden_size,), eps

    def forward(self, x, weight, residual=None):
        if residual is None:
            return F.rms_norm(x, self.shape, weight, self.eps)
        residual = residual + x
        return F.rms_norm(residual, self.shape, weight, self.eps), residual


class CpuSiluAndMul(SiluAndMulImpl):
    """silu of the first half times the second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class CpuRotaryTable(RotaryEmbeddingImpl, torch.nn.Module):
    """Cosines and sines of all positions, looked up; LMDeploy compiles code for them each time,
    for which it needs a C++ compiler on the user's machine."""

    def __init__(self, spec: RotaryEmbeddingBuildSpec):
        super().__init__()
        exponents = torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim
        positions = torch.arange(spec.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, 1.0 / spec.base**exponents).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x, position_ids):
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


class CpuApplyRotary(ApplyRotaryEmbImpl):
    """Turns the first half of each head against the second, or neighbours in `complex_mode`."""

    def forward(self, query, key, cos, sin, inplace=True, complex_mode=False):
        if complex_mode:
            raise NotImplementedError("the cpu device turns halves only (patches/cpu_backend.py)")
        cos, sin = cos[:, None], sin[:, None]
        return rotate(query, cos, sin), rotate(key, cos, sin)


def rotate(x_NHE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x · cos + (-second, first) · sin, half by half; both halves of a table are equal."""
    y_NHE = x_NHE * cos
    half = x_NHE.shape[-1] // 2
    sin = sin[..., :half]
    y_NHE[..., :half].addcmul_(x_NHE[..., half:], sin, value=-1)
    y_NHE[..., half:].addcmul_(x_NHE[..., :half], sin)
    return y_NHE
