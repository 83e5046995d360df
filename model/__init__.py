"""The network, its configuration, and the tokenizer and small trained model shipped beside them."""
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import KVCache
from .config import PRESETS, YuanMengConfig, default_preset, preset_config
from .model import RMSNorm, YuanMengDecoderLayer, YuanMengModel

TOKENIZER_DIR = Path(__file__).parent / "yuanmeng_tokenizer"
MINI_DIR = Path(__file__).parent / "yuanmeng-mini-instruct"

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
