"""LMDeploy learns to quantize the model (AWQ, arXiv 2306.00978): its structure, and what text to
calibrate on. One function for each symbol.

AWQ scales a weight's input channels by how strong their activations are, so that 4 bits go where
they matter. To move a scale out of a matrix it must be put into what comes before: the maps say
which norm, or which matrix, that is. Their keys are class names of the network in model/model.py.
"""
import inspect
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils import logging

from dataset.catalog import pick_data
from dataset.records import conversation_fault, parse_line, text_fault
from dataset.rows import encode_conversation
from dataset.sampling import MAX_LINE_BYTES, Reservoir
from training.files import move_files

from .cuda_stand_in import Torch
from .model import ARCHITECTURE
from .upstream import Patch, exchange, find, look_at, refuse

LAYER = "YuanMengDecoderLayer"
NORM_TO_LINEARS = {
    "attention_norm": ["attention.wq", "attention.wk", "attention.wv"],
    "ffn_norm": ["feed_forward.w1", "feed_forward.w3"],
}
LINEAR_TO_LINEARS = {
    "attention.wv": ["attention.wo"],  # with grouped queries LMDeploy leaves this pair out
    "feed_forward.w3": ["feed_forward.w2"],
}
# Stay as they are. Tokens' embeddings have much in common, so what rounding does to the first
# layer's values is nearly the same for all tokens, and attention, a mean over tokens, does not
# average it out. In the shipped model it did all of the harm that 4 bits did (docs/lmdeploy.md).
KEPT = [f"layers.0.attention.{name}" for name in ("wq", "wk", "wv")]
HUB_DATASET = "wikitext2"  # LMDeploy's default name; here it means the user's own data
SAMPLE_BYTES = 8 << 20  # drawn from the data, whatever its size


def patches() -> list[Patch]:
    """All of this file, checked and not applied."""
    # LMDeploy's quantizer imports image models, upon which transformers asks for torchvision.
    with quiet_transformers():
        find("lmdeploy.lite.apis.calibrate.calibrate")
    calibrate, awq = "lmdeploy.lite.apis.calibrate", "lmdeploy.lite.quantization.awq"
    found = [
        entry(f"{calibrate}.LAYER_TYPE_MAP", ARCHITECTURE, LAYER),
        entry(f"{calibrate}.NORM_TYPE_MAP", ARCHITECTURE, "RMSNorm"),
        entry(f"{calibrate}.HEAD_NAME_MAP", ARCHITECTURE, "output"),
        entry(f"{awq}.NORM_FCS_MAP", LAYER, NORM_TO_LINEARS),
        entry(f"{awq}.FC_FCS_MAP", LAYER, LINEAR_TO_LINEARS),
        kept_matrices(),
        forward(),
        scale_search(),
        data(),
        data_names(),
        auto_awq(),
    ]
    return found if torch.cuda.is_available() else [*found, bfloat16_weights()]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Only errors of transformers are shown inside."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def entry(symbol: str, key: str, value: object) -> Patch:
    """One line in a map of LMDeploy's."""
    _, _, known = find(symbol)
    if not isinstance(known, dict) or not all(isinstance(v, type(value)) for v in known.values()):
        raise refuse(symbol, f"does not hold {type(value).__name__} values")

    def apply() -> None:
        known[key] = value

    return Patch(symbol, f"does not know {key}", apply)


def kept_matrices() -> Patch:
    """`MODELS` has a class for each network of which not all matrices are quantized."""
    symbol = "lmdeploy.lite.model.MODELS"
    registry = look_at(symbol)
    if not hasattr(registry, "register_module"):
        raise refuse(symbol, "is not a registry")
    _, _, base = find("lmdeploy.lite.model.base.Base")

    class YuanMeng(base):
        @classmethod
        def skipped_modules(cls) -> list[str]:
            return list(KEPT)  # LMDeploy appends to it

    def apply() -> None:
        registry.register_module(name=ARCHITECTURE, module=YuanMeng)

    return Patch(symbol, f"does not know what of {ARCHITECTURE} stays as it is", apply)


def forward() -> Patch:
    """`CalibrationContext.calibrate` runs `self.model.model`, which only some networks have."""
    symbol = "lmdeploy.lite.quantization.calibration.CalibrationContext.calibrate"
    look_at(symbol, parameters=["self", "data"], contains=["model = self.model.model"])

    def calibrate(self, data: torch.Tensor) -> None:
        body = getattr(self.model, "transformer", None) or getattr(self.model, "model", None)
        with torch.inference_mode():
            (body or self.model)(data.to(self.device), use_cache=False)

    return exchange(symbol, "wants a network inside the network", calibrate)


def scale_search() -> Patch:
    """`auto_scale_block` keeps the weights that it tries scales on by `v.cpu()`, which copies them
    only if they are not on the CPU already: there each trial would start from the last one's."""
    symbol = "lmdeploy.lite.quantization.calibration.auto_scale_block"
    original = look_at(
        symbol, parameters=["module", "module_kwargs", "w_bit", "w_group_size", "input_feat",
                            "mod_name"],
        contains=["org_sd = {k: v.cpu() for k, v in block.state_dict().items()}"])

    def search(module: torch.nn.Module, *args, **kwargs) -> None:
        hooks = [part.register_state_dict_post_hook(copy_tensors) for part in module.modules()]
        try:
            original(module, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    return exchange(symbol, "loses the weights that it tries scales on", search)


def data() -> Patch:
    """`get_calib_loaders` downloads one of seven data sets, most of them English."""
    symbol = "lmdeploy.lite.utils.calib_dataloader.get_calib_loaders"
    look_at(symbol, parameters=["name", "tokenizer", "nsamples", "seed", "seqlen"])
    return exchange(
        symbol, "downloads its text from a hub", calibration_rows,
        also=["lmdeploy.lite.utils.get_calib_loaders",
              "lmdeploy.lite.apis.calibrate.get_calib_loaders"],
    )


def data_names() -> Patch:
    """`calibrate` asserts that the data is one of those seven."""
    symbol = "lmdeploy.lite.apis.calibrate.calibrate"
    original = look_at(
        symbol, contains=["assert calib_dataset in ['wikitext2',", "get_calib_loaders("]
    )
    calibrate_module, name, _ = find("lmdeploy.lite.apis.calibrate.get_calib_loaders")

    def calibrate(model: str, calib_dataset: str = HUB_DATASET, *args, **kwargs):
        def rows(_, tokenizer, nsamples: int = 128, seed: int = 0, seqlen: int = 2048):
            return calibration_rows(calib_dataset, tokenizer, nsamples, seed, seqlen)

        setattr(calibrate_module, name, rows)
        return original(model, HUB_DATASET, *args, **kwargs)

    return exchange(
        symbol, "accepts only names of data sets on a hub", calibrate,
        also=["lmdeploy.lite.apis.auto_awq.calibrate"],
    )


def bfloat16_weights() -> Patch:
    """`lite.utils.load` asks `torch.cuda` whether bfloat16 can be computed; for a CPU only."""
    symbol = "lmdeploy.lite.utils.load.torch"
    if look_at(symbol) is not torch:
        raise refuse(symbol, "is not torch")
    return exchange(symbol, "refuses bfloat16 weights without a GPU", Torch())


def auto_awq() -> Patch:
    """`auto_awq` fails for a width that is no multiple of the group, and fills its folder file by
    file, over what may have been there."""
    symbol = "lmdeploy.lite.apis.auto_awq.auto_awq"
    original = look_at(symbol, contains=["model.save_pretrained(work_dir", "'inputs_stats.pth'"])
    signature = inspect.signature(original)

    def auto_awq(*args, **kwargs) -> None:
        settings = signature.bind(*args, **kwargs)
        settings.apply_defaults()
        wanted = settings.arguments
        source, target = Path(wanted["model"]), Path(wanted["work_dir"])
        if not (source / "config.json").is_file():
            raise SystemExit(
                f"{source} is no model folder; `python convert_to_transformers.py` makes one"
            )
        if wanted["device"] == "cuda" and not torch.cuda.is_available():
            wanted["device"] = "cpu"
        config = AutoConfig.from_pretrained(source, trust_remote_code=wanted["trust_remote_code"])
        wanted["w_group_size"] = fitting_group(config, wanted["w_group_size"])
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".quantizing.") as temporary:
            wanted["work_dir"] = temporary
            original(*settings.args, **settings.kwargs)
            for statistics in Path(temporary).glob("*_stats.pth"):
                statistics.unlink()
            for code in source.glob("*.py"):  # what `auto_map` in config.json points at
                shutil.copy(code, temporary)
            files = move_files(temporary, target)
        before, after = (
            sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
            for folder in (source, target)
        )
        print(f"{source} ({before:.1f} MB) → {target} ({after:.1f} MB), {len(files)} files")

    return exchange(symbol, "wants widths that are multiples of 128", auto_awq)


def fitting_group(config, wanted: int) -> int:
    """The largest group of input channels, at most `wanted`, that divides every matrix's width.

    Raises:
        SystemExit: there is none of 32 or more.
    """
    widths = [config.hidden_size, config.intermediate_size]
    group = wanted
    while group >= 32 and any(width % group for width in widths):
        group //= 2
    if group < 32:
        raise SystemExit(f"--w-group-size {wanted}: neither it nor a half of it divides {widths}")
    if group != wanted:
        print(f"Groups of {group}: {wanted} does not divide {' and '.join(map(str, widths))}")
    return group


def copy_tensors(module, state: dict[str, torch.Tensor], prefix: str, metadata: dict) -> None:
    """A hook of `state_dict`: what it returns does not change with the module."""
    for name, tensor in state.items():
        state[name] = tensor.clone()


# ---- Calibration text ----------------------------------------------------------------------------

def calibration_rows(
    name: str, tokenizer, nsamples: int = 128, seed: int = 0, seqlen: int = 2048
) -> list[torch.Tensor]:
    """At most `nsamples` rows of token ids, [1, seqlen] each: records drawn at random from the
    user's data, conversations in the chat template, end to end.

    Args:
        name: a file, a folder, or `sft` (or one of LMDeploy's hub names) for the fine-tuning data.

    Raises:
        SystemExit: there is no such data, or it holds no text.
    """
    ids: list[int] = []
    for record in drawn_records(data_files(name), seed):
        if isinstance(record, str):
            ids += tokenizer.encode(record, split_special_tokens=True, verbose=False)
        else:
            ids += encode_conversation(record, tokenizer)[0]
        if len(ids) >= nsamples * seqlen:
            break
    if len(ids) < 2:
        raise SystemExit(f"--calib-dataset {name}: no text in it")
    # A short text still calibrates: one row, as long as it is.
    rows = [ids[i : i + seqlen] for i in range(0, max(1, len(ids) - seqlen + 1), seqlen)]
    print(f"Calibrating on {len(rows[:nsamples])} rows of {len(rows[0])} tokens")
    return [torch.tensor([row]) for row in rows[:nsamples]]


def data_files(name: str) -> list[Path]:
    """The files that `--calib-dataset` means."""
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".txt"))
        if not files:
            raise SystemExit(f"--calib-dataset {name}: no .jsonl or .txt file in this folder")
        return files
    if path.is_file():
        return [path]
    if path.suffix or len(path.parts) > 1:  # not a name: the user meant a file
        raise SystemExit(f"--calib-dataset {name}: no such file or folder")
    try:
        return pick_data("sft")
    except FileNotFoundError as error:
        raise SystemExit(f"--calib-dataset: {error}") from error


def drawn_records(files: Iterable[Path], seed: int) -> Iterator[str | list[dict]]:
    """Texts and conversations in random order, from a uniform sample of bounded size."""
    generator, sample = random.Random(seed), Reservoir(SAMPLE_BYTES)
    files = list(files)
    for index, file in enumerate(files):
        with file.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES), b""), 1):
                sample.offer(generator.random(), index, number, line)
    drawn = sample.lines()
    generator.shuffle(drawn)
    for index, _, line in drawn:
        text = line.decode("utf-8", errors="replace").strip()
        if files[index].suffix == ".txt":
            if text:
                yield text
            continue
        record, _ = parse_line(text, lambda record: None)
        if conversation_fault(record) is None:
            yield record["conversations"]
        elif text_fault(record) is None:
            yield record["text"]
