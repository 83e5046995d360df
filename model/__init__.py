"""The network, its configuration, and the tokenizer and small trained model shipped beside them."""
from transformers import AutoConfig, AutoModelForCausalLM

from .cache import KVCache
from .config import (
    MINI_DIR,
    PRESETS,
    TOKENIZER_DIR,
    YuanMengConfig,
    default_preset,
    preset_config,
)
from .model import RMSNorm, YuanMengDecoderLayer, YuanMengModel

# transformers' own registry: "yuanmeng" becomes a model type that Auto classes know.
AutoConfig.register("yuanmeng", YuanMengConfig, exist_ok=True)
AutoModelForCausalLM.register(YuanMengConfig, YuanMengModel, exist_ok=True)

__all__ = [
    "KVCache",
    "MINI_DIR",
    "PRESETS",
    "RMSNorm",
    "TOKENIZER_DIR",
    "YuanMengConfig",
    "YuanMengDecoderLayer",
    "YuanMengModel",
    "default_preset",
    "preset_config",
]
