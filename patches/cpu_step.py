"""The engine's steps as machine code: model/step.py over LMDeploy's weights and cache.

On a GPU the engine records a decoding step once as a CUDA graph and replays it, since starting
hundreds of small operators would take longer than their work. On a CPU it is no different; here the
step is compiled instead. So is what lies between two attentions when prompts are read: there the
small operators pass over much memory for little work, and fused they pass over it once.
"""
from itertools import pairwise

import torch
from lmdeploy.pytorch.backends.graph_runner import GraphRunner
from torch.utils import _pytree as pytree

from model import compilation, kernels, slots
from model import step as step_file
from model.compilation import FlatFunction, compiled
from model.kernels import multiply_vector_4_bits
from model.step import DecodeStep, LayerWeights, StepWeights, Weight, multiply
from training.terminal import note

from . import cpu_linear
from .cpu_linear import (
    CpuLinearW4A16,
    can_pack,
    multiply_4_bits,
    multiply_packed,
    teach_compiler,
)
from .network import YuanMengModel

SOURCES = [module.__file__ for module in (compilation, kernels, slots, step_file, cpu_linear)]


class CpuRunner(GraphRunner):
    """Runs compiled what can be, all else as the network stands."""

    def __init__(self, model, model_config, cache_config, backend_config, device, **kwargs):
        super().__init__(model, model_config, cache_config, backend_config, device, **kwargs)
        self.step = self.prompts = None
        if isinstance(model, YuanMengModel) and not backend_config.eager_mode:
            self.step, self.prompts = CompiledStep(model), CompiledPrompts.build(model)

    def get_capture_batch_sizes(self) -> list[int]:
        """Trial steps before the first request: one for each way of decoding."""
        return [1, 2][: self.cache_config.max_batches]

    def __call__(self, **inputs) -> torch.Tensor:
        metadata = inputs["attn_metadata"]
        way = self.prompts if metadata.reads_prompts else self.step
        if way is None or inputs.get("inputs_embeds") is not None:
            return self.model(**inputs)
        hidden_1ND = way(
            inputs["input_ids"], inputs["position_ids"], inputs["past_key_values"], metadata)
        return self.model(**inputs) if hidden_1ND is None else hidden_1ND

    def get_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The step has computed them along with its hidden states."""
        if self.step is not None and self.step.belongs(hidden_states):
            return self.step.logits_1NV
        return self.model.get_logits(hidden_states)


class CompiledStep:
    """The compiled steps of one network: for a single sequence, and for several."""

    def __init__(self, network: YuanMengModel):
        self.network = network
        self.functions: dict[tuple[bool, int], FlatFunction | None] = {}
        self.held: dict[bool, tuple] = {}
        self.hidden_ND = self.logits_1NV = None

    def __call__(self, ids_1N, positions_1N, caches, metadata) -> torch.Tensor | None:
        """Hidden states [1, N, D] of the N sequences' newest tokens; None if it cannot be built."""
        read_NL = metadata.read_slots.view(len(metadata.lengths), -1)
        if read_NL.shape[1] == 1:  # the shortest that the code was built for is 2
            read_NL = read_NL.repeat(1, 2)
        changing = [ids_1N[0], positions_1N[0], metadata.write_slots, read_NL]
        several = len(read_NL) > 1
        kind = (several, int(metadata.quant_policy))
        if kind not in self.functions:
            self.functions[kind] = self.build(caches, changing, several)
        function = self.functions[kind]
        if function is None:
            return None
        self.hidden_ND, logits_NV = function([*self.lasting(caches, several), *changing])
        self.logits_1NV = logits_NV[None]
        return self.hidden_ND[None]

    def belongs(self, hidden_states: torch.Tensor) -> bool:
        """Whether these are the last step's hidden states."""
        return (self.hidden_ND is not None
                and hidden_states.data_ptr() == self.hidden_ND.data_ptr()
                and hidden_states.numel() == self.hidden_ND.numel())

    def lasting(self, caches, several: bool) -> list[torch.Tensor]:
        """Weights and cache as a flat list; found anew when the engine has changed them."""
        head = self.network.output
        place = (head.weight.data_ptr(), id(head.impl.packed_OI), caches[0][0].data_ptr())
        if several not in self.held or self.held[several][0] != place:
            weights = network_weights(self.network, several)
            tensors = pytree.tree_leaves((weights, flat_caches(caches)))
            place = (place[0], id(head.impl.packed_OI), place[2])
            self.held[several] = (place, tensors)
        return self.held[several][1]

    def build(self, caches, changing: list[torch.Tensor], several: bool) -> FlatFunction | None:
        network, cache = self.network, flat_caches(caches)
        weights = network_weights(network, several, to_build=True)
        if weights is None:
            return None
        product = choose_product(network.dtype) if several else multiply_one
        step = DecodeStep.of(network.config, network.dtype, product=product)
        Dim = torch.export.Dim
        batch = {0: Dim("B", min=2, max=4096)} if several else {}
        return compiled(
            step,
            (weights, cache, *changing),
            (None, {0: Dim("S", min=2)}, batch, batch, batch,
             {**batch, 1: Dim("L", min=2, max=1 << 24)}),
            name=f"step-{'many' if several else 'one'}", key=step.key, sources=SOURCES,
            kernels=step.kernels(cache[0]), say=note,
        )


class CompiledPrompts:
    """Reads prompts: attention as the network has it, and between two layers' a compiled piece."""

    def __init__(self, network: YuanMengModel, pieces: DecodeStep, function: FlatFunction):
        self.network, self.pieces, self.function = network, pieces, function

    @classmethod
    def build(cls, network: YuanMengModel) -> "CompiledPrompts | None":
        """None if it cannot be built, or if the weights are of 4 bits: with many rows these are
        turned back into numbers first (cpu_linear.py)."""
        weights = network_weights(network, several=True, to_build=True)
        if weights is None or isinstance(weights.layers[0].wo, tuple):
            return None
        pieces = DecodeStep.of(
            network.config, network.dtype, product=choose_product(network.dtype))
        x_ND = torch.zeros(2, network.config.hidden_size)
        angles_N1E = torch.zeros(2, 1, network.config.head_dim)
        heads = network.config.num_attention_heads
        y_NC = x_ND.new_zeros(2, heads * network.config.head_dim, dtype=network.dtype)
        tokens = {0: torch.export.Dim("N", min=2, max=1 << 24)}
        function = compiled(
            pieces.between,
            (weights.layers[0], x_ND, y_NC, angles_N1E, angles_N1E.clone()),
            (None, tokens, tokens, tokens, tokens),
            name="prompts", key=pieces.key, sources=SOURCES, say=note,
        )
        return None if function is None else cls(network, pieces, function)

    def __call__(self, ids_1N, positions_1N, caches, metadata) -> torch.Tensor | None:
        """Hidden states [1, N, D] of the N new tokens; None if the weights have changed to a kind
        that the pieces do not know."""
        weights, pieces = network_weights(self.network, several=True), self.pieces
        if weights is None:
            return None
        x_ND = weights.embeddings[ids_1N[0]].float()
        cos_N1E, sin_N1E = (table[positions_1N[0]][:, None] for table in (weights.cos, weights.sin))
        qkv = pieces.enter(x_ND, weights.layers[0], cos_N1E, sin_N1E)
        attentions = [layer.attention for layer in self.network.layers]
        for attention, cache, (this, following) in zip(
                attentions, caches, pairwise(weights.layers), strict=False):
            y_NC = attention.attend_cached(*qkv, cache, metadata).flatten(1)
            both = this._replace(attention_norm=following.attention_norm, wqkv=following.wqkv)
            x_ND, *qkv = self.function([*both, x_ND, y_NC, cos_N1E, sin_N1E])
        y_NC = attentions[-1].attend_cached(*qkv, caches[-1], metadata).flatten(1)
        x_ND = pieces.leave(x_ND, y_NC, weights.layers[-1])
        return pieces.normalize(x_ND, weights.norm)[None]


def choose_product(dtype: torch.dtype):
    """The product with many rows."""
    if not can_pack(dtype):
        return multiply_several
    teach_compiler()
    return multiply_several_packed


def multiply_one(x_1I: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The product of the step, with numbers or with AWQ's 4 bits."""
    if isinstance(weight, tuple):
        return multiply_vector_4_bits(x_1I, *weight)
    return multiply(x_1I, weight)


def multiply_several(x_BI: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The same for several rows."""
    return multiply_4_bits(x_BI, *weight) if isinstance(weight, tuple) else multiply(x_BI, weight)


def multiply_several_packed(x_BI: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The same for several rows, which read packed numbers faster."""
    if isinstance(weight, tuple):
        return multiply_4_bits(x_BI, *weight)
    return multiply_packed(x_BI, weight)


def flat_caches(caches) -> list[tuple[torch.Tensor, ...]]:
    """Each layer's cache as rows of slots: the same memory, without the blocks."""
    return [tuple(tensor.flatten(0, 1) for tensor in cache) for cache in caches]


def network_weights(
    network: YuanMengModel, several: bool, to_build: bool = False
) -> StepWeights | None:
    """The weights of the network in the engine; None if a matrix is of a kind that the step does
    not know (4 bits in a layout without a kernel, an adapter beside it).

    Args:
        several: as several rows are multiplied with them, not one.
        to_build: none packed, for the code is built with those whose shapes the compiler sees.
    """
    packed = several and not to_build and can_pack(network.dtype)
    matrices = []
    for layer in network.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        for linear in (attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2):
            matrices.append(step_weight(linear, network.dtype, several, packed))
    if any(matrix is None for matrix in matrices):
        return None
    layers = [
        LayerWeights(layer.attention_norm.weight, wqkv, wo, layer.ffn_norm.weight, w13, w2)
        for layer, (wqkv, wo, w13, w2) in zip(
            network.layers, zip(*[iter(matrices)] * 4, strict=True), strict=True)
    ]
    return StepWeights(network.tok_embeddings.weight, layers, network.norm.weight,
                       step_weight(network.output, network.dtype, several, packed),
                       network.rope.cos, network.rope.sin)


def step_weight(
    linear: torch.nn.Module, dtype: torch.dtype, several: bool, packed: bool
) -> Weight | None:
    """What the step multiplies with in the place of one of LMDeploy's linear layers."""
    if getattr(linear, "lora_adapters", None):
        return None
    impl = linear.impl
    if not isinstance(impl, CpuLinearW4A16):
        return impl.pack(linear.weight) if packed else linear.weight
    if not several:
        return (impl.words, impl.scales_GO, impl.zeros_GO) if impl.outputs % 16 == 0 else None
    if impl.has_kernel and dtype is torch.bfloat16:
        return impl.kernel_weight, impl.scales_offsets_GO2
    return None
