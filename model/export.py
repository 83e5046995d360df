"""A trained model in the layouts that other programs read: three functions, one for each.

Every one of them fills a folder; `convert_to_transformers.py` chooses which, and moves the files to
their place only when all are written.
"""
import json
import re
from pathlib import Path

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .config import YuanMengConfig
from .model import YuanMengModel

# The parts of a layer under the names of transformers' Llama and of llama.cpp (GGUF).
LAYER_NAMES = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
}
# llama.cpp knows how to cut text into words only by the name of a known tokenizer. This one cuts
# nothing but numbers out of the text, and so leaves the merges to decide (see `gguf_merges`).
PRE_TOKENIZER = "superbpe"
SPACE = "Ġ"  # how byte-level BPE spells a space
# llama-server sets enable_thinking to true for every template that asks for it, unless it is told
# otherwise; thoughts must not be forced on a model that has learnt none.
# (ggml-org/llama.cpp, common/chat.cpp, common_chat_templates_support_enable_thinking, 2026-11)
THINKING_IS_NO_ORDER = (
    "{%- if enable_thinking is defined and enable_thinking is true -%}"
    "{%- set enable_thinking = none -%}"
    "{%- endif -%}"
)


def save_yuanmeng(
    model: YuanMengModel, tokenizer: PreTrainedTokenizerFast, folder: str | Path
) -> None:
    """The network as it is, with a copy of its code: `AutoModelForCausalLM.from_pretrained(folder,
    trust_remote_code=True)` works where this repository is not."""
    # transformers copies the modules of registered classes and notes them under `auto_map`.
    YuanMengConfig.register_for_auto_class()
    YuanMengModel.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_llama(
    model: YuanMengModel, tokenizer: PreTrainedTokenizerFast, folder: str | Path
) -> None:
    """The same weights under Llama's names, which every program loads without any code of ours."""
    config = model.config
    with torch.device("meta"):
        llama = LlamaForCausalLM(llama_config(config))
    llama.load_state_dict(llama_state(model), assign=True)
    llama.tie_weights()
    llama.generation_config = model.generation_config
    llama.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    # transformers 5 writes new field names only. A program that looks for the old ones would take
    # Llama's default of 10,000 for the rotary base, and be wrong without a word.
    dtype = str(model.dtype).removeprefix("torch.")
    update_json(Path(folder) / "config.json", rope_theta=config.rope_theta, torch_dtype=dtype)


def llama_config(config: YuanMengConfig) -> LlamaConfig:
    """The same shape as a configuration of transformers' Llama."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def llama_state(model: YuanMengModel) -> dict[str, torch.Tensor]:
    """The weights under the names of `LlamaForCausalLM`; none changes, for both turn halves of a
    head against each other (`rotate` in model.py)."""
    names = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for layer in range(model.config.num_hidden_layers):
        for ours, (theirs, _) in LAYER_NAMES.items():
            names[f"layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    return {names[name]: tensor for name, tensor in model.state_dict().items()}


def save_gguf(
    model: YuanMengModel, tokenizer: PreTrainedTokenizerFast, folder: str | Path, name: str
) -> None:
    """One file `name`.gguf for llama.cpp and what is built on it (Ollama, LM Studio), with the
    tokenizer and the chat template inside. Matrices keep the model's dtype, norms are float32."""
    config = model.config
    writer = gguf.GGUFWriter(Path(folder) / f"{name}.gguf", "llama")
    writer.add_name(name)
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_BF16 if model.dtype == torch.bfloat16
        else gguf.LlamaFileType.ALL_F32
    )
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_gguf_tokenizer(writer, tokenizer)
    for tensor_name, tensor in gguf_state(model).items():
        if tensor.dim() == 2 and tensor.dtype == torch.bfloat16:
            kind = gguf.GGMLQuantizationType.BF16
        else:
            kind = gguf.GGMLQuantizationType.F32
        # numpy has no bfloat16: exact in float32, and packed back by gguf.
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(tensor_name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_state(model: YuanMengModel) -> dict[str, torch.Tensor]:
    """The weights under llama.cpp's names. The tied head is left out: llama.cpp takes the
    embeddings. Its rotary positions turn neighbours, so the rows of the query and key projections
    are interleaved: first half and second half in turns."""
    config = model.config
    state = model.state_dict()
    tensors = {
        "token_embd.weight": state["tok_embeddings.weight"],
        "output_norm.weight": state["norm.weight"],
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = state["output.weight"]
    for layer in range(config.num_hidden_layers):
        for ours, (_, theirs) in LAYER_NAMES.items():
            tensor = state[f"layers.{layer}.{ours}.weight"]
            if ours in ("attention.wq", "attention.wk"):
                halves = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
                tensor = halves.transpose(1, 2).flatten(0, 2)
            tensors[f"blk.{layer}.{theirs}.weight"] = tensor
    return tensors


def add_gguf_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    """Entries, merges, special tokens and the chat template."""
    entries = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if entry in special else gguf.TokenType.NORMAL
             for entry in entries]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(entries)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in gguf_merges(tokenizer)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # the template writes <s> itself
    writer.add_chat_template(gguf_template(tokenizer.chat_template))


def gguf_template(template: str) -> str:
    """The chat template for readers other than transformers: what it writes stays the same.

    The marks `generation` around the assistant's words are transformers' own. llama.cpp passes over
    them (common/jinja/parser.cpp), llama-cpp-python since its pull request 2226 of May 2026; what
    is older, or reads templates with plain Jinja2, refuses the whole file for them.
    """
    without_marks = re.sub(r"{%([-+]?)\s*generation\s*([-+]?)%}", r"{%\1 if true \2%}", template)
    without_marks = re.sub(
        r"{%([-+]?)\s*endgeneration\s*([-+]?)%}", r"{%\1 endif \2%}", without_marks)
    return THINKING_IS_NO_ORDER + without_marks


def gguf_merges(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """The merges in an order that needs no cutting into words: those of spaces alone first.

    The words of our own pattern meet where no token was ever learnt across, so that cutting there
    changes nothing, with one exception: a run of spaces is a word of its own, but a single space
    belongs to the word after it. Merging spaces first keeps a run together. What remains is a run
    that leaves one space over (of 5, 9, 10 … spaces): that one joins the next word.
    """
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    of_spaces = [tuple(pair) for pair in merges if not "".join(pair).strip(SPACE)]
    others = [tuple(pair) for pair in merges if "".join(pair).strip(SPACE)]
    return of_spaces + others


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """The tokenizer under the class name that transformers 4 knows as well as 5."""
    tokenizer.save_pretrained(folder)
    update_json(Path(folder) / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def update_json(path: Path, **fields) -> None:
    """Set fields of the object in a JSON file."""
    content = json.loads(path.read_text("utf-8")) | fields
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
