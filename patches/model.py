"""LMDeploy learns the model: which network to build, and with which shapes. One function each."""
from .upstream import Patch, find, look_at, refuse

ARCHITECTURE = "YuanMengModel"  # what config.json calls it


def patches() -> list[Patch]:
    """All of this file, checked and not applied."""
    return [transformers_classes(), network(), config_builder()]


def transformers_classes() -> Patch:
    """transformers' registry: LMDeploy reads config.json and the tokenizer through Auto classes."""

    def apply() -> None:
        import model  # noqa: F401  (registers itself on import)

    return Patch("transformers.AutoConfig", 'knows no model type "yuanmeng"', apply)


def network() -> Patch:
    """`MODULE_MAP`: architecture name to the class that the engine builds."""
    symbol = "lmdeploy.pytorch.models.module_map.MODULE_MAP"
    _, _, modules = find(symbol)
    llama = modules.get("LlamaForCausalLM") if isinstance(modules, dict) else None
    if llama != "lmdeploy.pytorch.models.llama.LlamaForCausalLM":
        raise refuse(symbol, "does not name classes by their path")

    def apply() -> None:
        modules[ARCHITECTURE] = "patches.network.YuanMengModel"

    return Patch(symbol, f"names no network for {ARCHITECTURE}", apply)


def config_builder() -> Patch:
    """`AutoModelConfigBuilder`: from config.json to the shapes that the KV cache is laid out by."""
    symbol = "lmdeploy.pytorch.configurations.builder.AutoModelConfigBuilder"
    base = look_at(symbol, contains=["def __init_subclass__", "builder.condition(hf_config)"])
    _, _, model_config = find("lmdeploy.pytorch.config.ModelConfig")

    def apply() -> None:
        # A subclass registers itself by being defined.
        class YuanMengConfigBuilder(base):
            @classmethod
            def condition(cls, hf_config) -> bool:
                return hf_config.model_type == "yuanmeng"

            @classmethod
            def build(cls, hf_config, model_path: str | None = None, **kwargs):
                kv_heads = cls.update_num_kv_heads(
                    hf_config, kwargs.get("tp", 1), hf_config.num_key_value_heads
                )
                return model_config(
                    hidden_size=hf_config.hidden_size,
                    num_layers=hf_config.num_hidden_layers,
                    num_attention_heads=hf_config.num_attention_heads,
                    num_key_value_heads=kv_heads,
                    bos_token_id=hf_config.bos_token_id,
                    eos_token_id=hf_config.eos_token_id,
                    head_dim=hf_config.head_dim,
                    k_head_dim=hf_config.head_dim,
                    v_head_dim=hf_config.head_dim,
                    vocab_size=hf_config.vocab_size,
                    llm_config=hf_config,
                )

    return Patch(symbol, "builds no configuration for yuanmeng", apply)
