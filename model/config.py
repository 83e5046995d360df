"""The shape of a YuanMeng model. Fields carry transformers' names, which every tool can read."""

from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

TOKENIZER_DIR = Path(__file__).parent / "yuanmeng_tokenizer"
MINI_DIR = Path(__file__).parent / "yuanmeng-mini-instruct"  # a small trained model

PRESETS = {
    "26m": dict(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408
    ),
    "mini": dict(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=704
    ),
}


@strict
class YuanMengConfig(PreTrainedConfig):
    """Settings of `YuanMengModel`; the defaults are the `26m` preset (25,829,888 parameters).

    `num_layers` is an alias of `num_hidden_layers`. `rope_theta` is the base of the rotary
    frequencies (RoFormer, arXiv 2104.09864).
    """

    model_type = "yuanmeng"
    attribute_map: ClassVar[dict[str, str]] = {"num_layers": "num_hidden_layers"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 6400
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by `@strict`: refuse shapes whose heads cannot be laid out."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )


def default_preset() -> str:
    """The preset a machine can train in an evening: `26m` with a GPU, `mini` without."""
    return "26m" if torch.cuda.is_available() else "mini"


def preset_config(name: str) -> YuanMengConfig:
    """The configuration of a named preset.

    Raises:
        ValueError: the name is not one of `PRESETS`.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return YuanMengConfig(**PRESETS[name])
