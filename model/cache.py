"""A key/value cache that is allocated once, so that decoding never copies the past.

`torch.cat` per token copies the whole cache for every token generated. Here each layer owns one
buffer of fixed capacity; a step writes its new rows in place and attends to a view of the filled
part. The buffers never move, which is what a compiled decode step needs.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class KVCacheLayer(CacheLayerMixin):
    """One layer's keys and values, each [B, H_kv, capacity, D]; the first `length` rows count."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        B, H, _, D = key_states.shape
        self.keys = key_states.new_zeros(B, H, self.capacity, D)
        self.values = value_states.new_zeros(B, H, self.capacity, D)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append T new rows [B, H_kv, T, D]; return views of everything held, [B, H_kv, length, D].

        Raises:
            ValueError: the rows do not fit.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens and {end} are needed; "
                "make the cache larger or the prompt shorter"
            )
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        # Rows past `length` are never read: forgetting them needs no zeroing.
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `tokens_to_remove` tokens (negative, transformers' convention), or keep
        the first `tokens_to_remove` if it is positive."""
        kept = tokens_to_remove if tokens_to_remove > 0 else self.length + tokens_to_remove
        self.length = max(0, min(self.length, kept))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


class KVCache(Cache):
    """The caches of all layers. `capacity` is in tokens, prompt and answer together."""

    def __init__(self, num_layers: int, capacity: int):
        super().__init__(layers=[KVCacheLayer(capacity) for _ in range(num_layers)])
