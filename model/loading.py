"""Getting a trained model back from disk: a `.pth` file of the trainers, or a Hugging Face folder.

A folder's weights may be quantized by AWQ; they come back as ordinary matrices (`model/awq.py`).
All are checked key by key and shape by shape before anything is used: a truncated download, a
resume state or somebody else's model ends in one line that says so. `.pth` files are read with
`weights_only=True`, and safetensors cannot hold code, so a file from a stranger cannot run any.
"""
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .awq import dequantize_state
from .config import MINI_DIR, PRESETS, YuanMengConfig, default_preset, preset_config
from .model import YuanMengModel

OUT = Path("out")
DEFAULT_HEAD_DIM = 64
# What a file that is damaged, or no checkpoint, has been seen to raise.
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError,
              zipfile.BadZipFile, zlib.error)


class WeightsError(ValueError):
    """The file or folder does not hold a YuanMeng model; the message is one line."""


def load_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[YuanMengModel, str]:
    """The model at `path`, ready for inference, and its name (`sft_512`, `yuanmeng-26m-instruct`).

    Args:
        path: a `.pth` state dict, or a folder with `config.json` and `*.safetensors`.

    Raises:
        FileNotFoundError: nothing is there.
        WeightsError: it is there, but it is not a whole YuanMeng model.
    """
    path = Path(path)
    if path.is_dir():
        config = read_config(path)
        if config["model_type"] != YuanMengConfig.model_type:
            raise WeightsError(
                f"{path} holds a model of type {config['model_type']!r}, not 'yuanmeng'"
            )
        state = read_tensors(path, config.pop("quantization_config", None))
        config = make_config(YuanMengConfig, config, path)
    else:
        state = load_weights(path)
        config = infer_config(state, path)
    model = build_model(config, state, path)
    return model.to(device=device, dtype=dtype).eval(), path.resolve().name.removesuffix(".pth")


def load_yuanmeng_or_llama(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, str]:
    """As `load_model`, but a folder may also hold a Llama, which transformers' own class runs.

    Raises:
        FileNotFoundError, WeightsError: as `load_model`.
    """
    path = Path(path)
    config = read_config(path) if path.is_dir() else {}
    if config.get("model_type") != LlamaConfig.model_type:
        return load_model(path, dtype=dtype, device=device)
    state = read_tensors(path, config.pop("quantization_config", None))
    config = make_config(LlamaConfig, config, path)
    try:
        model, report = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype,
            output_loading_info=True, ignore_mismatched_sizes=True,  # they are in the report
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is no Llama that transformers can load: {error}") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            first = min(report[fault])
            raise WeightsError(
                f"{path} is not a whole Llama: {len(report[fault])} {fault.replace('_', ' ')}, "
                f"first {first if isinstance(first, str) else first[0]}"
            )
    return model.to(device).eval(), path.resolve().name


def read_checkpoint(path: str | Path, content: BinaryIO | None = None) -> dict:
    """The dictionary in a `.pth` file, on the CPU; weights only, so that no code in it can run.

    Args:
        content: what is in the file, if it is not at `path` on this machine.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is truncated, or holds something else.
    """
    try:
        file = content or path
        with zipfile.ZipFile(file) as archive:  # torch's format; torch does not read its checksums
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(damaged)
        if content is not None:
            content.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise WeightsError(
            f"{path} is truncated or not a weights file ({type(error).__name__}); "
            "train again or copy it again"
        ) from error
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path} holds a {type(state).__name__}, not a model's weights")
    return state


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a `.pth` file, on the CPU.

    Raises:
        FileNotFoundError, WeightsError: as `read_checkpoint`, or not all entries are tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise WeightsError(
            f"{path} is one file of a model folder: give the folder that holds it, {path.parent}"
        )
    state = read_checkpoint(path)
    foreign = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        raise WeightsError(
            f"{path} is not a weights file: its entry {foreign[0]!r} is not a tensor "
            "(a resume state? the weights are the .pth file beside it)"
        )
    return state


def read_config(folder: Path) -> dict:
    """The entries of a Hugging Face folder's config.json, `model_type` among them.

    Raises:
        WeightsError: it is missing, damaged, or no model's.
    """
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} is not a model folder: it has no config.json")
    try:
        config, _ = PreTrainedConfig.get_config_dict(folder)
    except (OSError, TypeError) as error:
        raise WeightsError(f"{folder / 'config.json'} is not readable JSON") from error
    if "model_type" not in config:
        raise WeightsError(f"{folder / 'config.json'} names no model_type")
    return config


def make_config(
    config_class: type[PreTrainedConfig], entries: dict, folder: Path
) -> PreTrainedConfig:
    """The configuration with these entries of a folder's config.json.

    Raises:
        WeightsError: their types or sizes cannot be.
    """
    try:
        return config_class.from_dict(entries)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{folder / 'config.json'} describes no model: {reason}") from error


def read_tensors(folder: Path, quantization: dict | None) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face folder, sharded or not; quantized ones made ordinary again.

    Args:
        quantization: `quantization_config` of its config.json.

    Raises:
        WeightsError: a file is missing or damaged, or quantized in a way unknown here.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} has a config.json but no .safetensors file")
    state = {}
    for file in files:
        try:
            state.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is truncated or damaged ({error})") from error
    if quantization is None:
        return state
    try:
        return dequantize_state(state, quantization)
    except ValueError as error:
        raise WeightsError(f"{folder} {error}") from error


def infer_config(state: dict[str, torch.Tensor], path: Path) -> YuanMengConfig:
    """The configuration that tensors of these shapes were made with.

    The width names the preset. A width of no preset is taken to have heads of 64; shapes alone
    cannot tell.

    Raises:
        WeightsError: these are not the tensors of a YuanMeng model.
    """
    first = "layers.0."
    needed = [
        "tok_embeddings.weight",
        *(f"{first}{name}.weight" for name in ("attention.wq", "attention.wk", "feed_forward.w1")),
    ]
    missing = [name for name in needed if name not in state or state[name].dim() != 2]
    if missing:
        raise WeightsError(f"{path} is not a YuanMeng model: it has no matrix {missing[0]}")
    vocab_size, hidden_size = state["tok_embeddings.weight"].shape
    for name, preset in PRESETS.items():
        if preset["hidden_size"] == hidden_size:
            config = preset_config(name)
            break
    else:
        config = YuanMengConfig(hidden_size=hidden_size, num_attention_heads=1,
                                num_key_value_heads=1, head_dim=DEFAULT_HEAD_DIM)
    layer_numbers = {int(key.split(".")[1]) for key in state if key.startswith("layers.")}
    try:
        return YuanMengConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=state[f"{first}feed_forward.w1.weight"].shape[0],
            num_hidden_layers=len(layer_numbers),
            num_attention_heads=state[f"{first}attention.wq.weight"].shape[0] // config.head_dim,
            num_key_value_heads=state[f"{first}attention.wk.weight"].shape[0] // config.head_dim,
            head_dim=config.head_dim,
        )
    except (StrictDataclassError, ValueError, ZeroDivisionError) as error:
        # Zero: a matrix narrower than one head.
        raise WeightsError(f"{path}: the shapes are not those of a YuanMeng model") from error


def build_model(
    config: YuanMengConfig, state: dict[str, torch.Tensor], path: Path
) -> YuanMengModel:
    """A model of this configuration that holds exactly these tensors, in their own dtype.

    Raises:
        WeightsError: tensors are missing, unknown, of other shapes, or not finite.
    """
    # On "meta" no memory is filled with initial values that the file replaces at once.
    with torch.device("meta"):
        model = YuanMengModel(config)
    embedding = state.get("tok_embeddings.weight")
    if config.tie_word_embeddings and embedding is not None:
        head = state.setdefault("output.weight", embedding)
        if head is not embedding and not torch.equal(head, embedding):
            raise WeightsError(f"{path}: output.weight differs from tok_embeddings.weight, its tie")
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - state), sorted(state.keys() - expected.keys())
    if missing:
        raise WeightsError(f"{path} lacks {len(missing)} tensors of the model, first {missing[0]}")
    if unknown:
        raise WeightsError(f"{path} has {len(unknown)} unknown tensors, first {unknown[0]}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise WeightsError(
                f"{path}: {name} has shape {list(tensor.shape)}, "
                f"the model's is {list(expected[name].shape)}"
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise WeightsError(f"{path}: {name} holds NaN, infinity or integers")
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def load_tokenizer(path: str | Path, default: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved with the model at `path`, if any, otherwise the one in `default`.

    Raises:
        FileNotFoundError: neither is there.
    """
    folder = Path(path) if (Path(path) / "tokenizer.json").is_file() else Path(default)
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"no tokenizer in {default}; make one with `python train_tokenizer.py`"
        )
    return PreTrainedTokenizerFast.from_pretrained(folder)


def find_weights(stage: str, model: str | None = None, preset: str | None = None) -> Path:
    """The weights that were asked for, or else the best there are.

    Args:
        stage: `sft` or `pretrain`.
        model: a path; nothing else is looked for then.
        preset: a preset's weights; by default those of the machine's preset, else the newest in
            `out/`, else (for `sft`) the model shipped in the repository.

    Raises:
        FileNotFoundError: there are none; the message names the command that makes them.
        ValueError: the preset is unknown.
    """
    if model is not None:
        path = Path(model)
        if path.exists():
            return path
        stage = next((name for name in ("pretrain", "sft") if path.name.startswith(name)), stage)
        raise FileNotFoundError(
            f"there is no {path}; `python train_{stage}.py` trains weights into {OUT}/"
        )
    width = preset_config(preset or default_preset()).hidden_size
    wanted = OUT / f"{stage}_{width}.pth"
    if wanted.exists():
        return wanted
    others = sorted(OUT.glob(f"{stage}_[0-9]*[0-9].pth"), key=lambda path: path.stat().st_mtime)
    if others and preset is None:
        return others[-1]
    if stage == "sft" and preset is None and MINI_DIR.is_dir():
        return MINI_DIR
    raise FileNotFoundError(
        f"there is no {wanted}; `python train_{stage}.py --preset {preset or default_preset()}` "
        "makes it"
    )


def choose_dtype(name: str, device: str) -> torch.dtype:
    """`auto`: bfloat16 where it is computed in hardware (a decode step of `26m` is 1.7 times as
    fast as in float32 on 2 cores with AVX-512 BF16), else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities = torch.cpu.get_capabilities()
        fast = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32
