"""What 4-bit weights and an 8- or 4-bit KV cache cost in quality, and what they save in memory.

LMDeploy's engine answers evaluate.py's tasks: held-out texts, multiple choice and conversations,
once for each way of keeping weights and cache, beside transformers on the same weights. All answer
the same items, so each is compared with transformers item by item (training/significance.py).

How a text is scored: a quantized cache is noticed only where attention reads it. A prompt's tokens
see each other's keys and values before these are rounded, so scoring a text as a prompt, as
`pipeline.get_ppl` does, would find the cache without a fault. Here each text is *written*: the
engine decodes, as in a chat, but each token is chosen for it (`Dictation`), which costs nothing
but notes how likely it found that token. So every token is predicted from the cache, the context
of a multiple-choice question being its prompt.

    python -m benchmarks.quantization
    python -m benchmarks.quantization --model Yuanmeng_Models/yuanmeng-26m-instruct --limit 100
    python -m benchmarks.quantization --awq Yuanmeng_Models/yuanmeng-mini-instruct-w4a16-4bit
"""
import asyncio
import gc
import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import patches
from dataset.tasks import draw, read_tasks
from evaluate import Settings as Evaluation
from evaluate import measure
from lmdeploy_pipeline import after_prompt
from model import MINI_DIR, TOKENIZER_DIR
from model.conversation import encode_text, fit_conversation
from model.export import save_llama
from model.loading import load_model, load_tokenizer
from model.scoring import Checkpoint, windows
from training.files import atomic_write
from training.measurement import Score, grouped
from training.report_card import Difference, compare, show_p
from training.settings import option, parse_settings
from training.significance import bootstrap_interval, holm

TOTAL = "bits per byte: total"


@dataclass
class Settings:
    """What to measure."""

    model: str = option(str(MINI_DIR), "a folder that convert_to_transformers.py wrote")
    awq: str | None = option(None, "the same model in 4 bits; default: quantize it first")
    calib_samples: int = option(128, "rows of calibration text for that")
    group_size: int = option(128, "inputs that share a scale, at most, for that")
    data: str = option("dataset/eval_starter.jsonl", "the tasks, as for evaluate.py")
    limit: int = option(0, "items per task and source of texts at most (0: all)")
    seed: int = option(42, "of the items drawn and of the tests")
    max_new_tokens: int = option(96, "longest reply")
    batch_size: int = option(64, "sequences at a time; above 64 rows 4-bit weights use no kernel")
    threads: int = option(2, "CPU threads")
    output: str = option("out/quantization.md", "the tables")


@dataclass
class Variant:
    """One way of keeping weights and cache, and what was measured of it."""

    name: str
    folder: str
    dtype: str
    quant_policy: int = 0
    scores: dict[str, Score] | None = None
    weights_bytes: int = 0
    cache_bytes: float = 0.0  # of one token
    file_bytes: int = 0


# ---- The engine, measured like a checkpoint ------------------------------------------------------

class Dictation:
    """Tells the engine what to write, and notes how unlikely it found each token.

    LMDeploy hands a logits processor all ids of the sequence so far and the next token's logits,
    and samples from what it returns.
    """

    def __init__(self, prompt: Sequence[int], continuation: Sequence[int]):
        self.prompt, self.continuation = prompt, continuation
        self.nats = [math.nan] * len(continuation)

    def __deepcopy__(self, memo: dict) -> "Dictation":
        """Itself: LMDeploy copies the settings of each request, and the notes must come back."""
        return self

    def __call__(self, ids_S: torch.Tensor, logits_V: torch.Tensor) -> torch.Tensor:
        place = len(after_prompt(ids_S, self.prompt))
        if place >= len(self.continuation):  # the engine computes a step ahead of the end
            return logits_V
        token = self.continuation[place]
        self.nats[place] = -logits_V.float().log_softmax(-1)[token].item()
        forced_V = torch.full_like(logits_V, -torch.inf)
        forced_V[token] = 0
        return forced_V


class EngineCheckpoint:
    """A model in LMDeploy's engine, to be measured as `model.scoring.Checkpoint` is."""

    kinds, left_out = frozenset({"text", "choice", "chat"}), ""

    def __init__(self, folder: str | Path, batch_size: int, dtype: str, quant_policy: int = 0):
        from lmdeploy import PytorchEngineConfig, pipeline

        self.name, self.source = Path(folder).name, str(folder)
        self.tokenizer = load_tokenizer(folder, TOKENIZER_DIR)
        self.batch_size = batch_size
        self.pipe = pipeline(
            str(folder), log_level="ERROR",
            backend_config=PytorchEngineConfig(
                device_type=patches.default_device(), dtype=dtype, quant_policy=quant_policy,
                max_batch_size=batch_size,
            ),
        )
        self.positions = self.pipe.async_engine.session_len

    def close(self) -> None:
        self.pipe.close()

    def losses(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """As `Checkpoint.losses`."""
        encoded = [
            ([self.tokenizer.bos_token_id, *encode_text(self.tokenizer, context)],
             encode_text(self.tokenizer, continuation))
            for context, continuation in pairs
        ]
        return [sum(nats) for nats in self.token_losses(encoded)]

    def token_losses(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list:
        """Nats of each token of each continuation, for pairs (context ids, continuation ids)."""
        rows = [(i, Dictation(*cut)) for i, pair in enumerate(pairs)
                for cut in windows(*pair, self.positions)]
        written = self.write_all([
            (row.prompt, dict(max_new_tokens=len(row.continuation), ignore_eos=True,
                              logits_processors=[row])) for _, row in rows
        ])
        losses: list[list[float]] = [[] for _ in pairs]
        for (i, row), (ids, _) in zip(rows, written, strict=True):
            if ids != list(row.continuation) or any(map(math.isnan, row.nats)):
                raise RuntimeError(f"the engine did not write what it was told in text {i}")
            losses[i] += row.nats
        return losses

    def replies(
        self, conversations: Sequence[list[dict[str, str]]], max_new_tokens: int
    ) -> list[tuple[str, bool]]:
        """As `Checkpoint.replies`."""
        written = self.write_all([
            (fit_conversation(self.tokenizer, messages, self.positions - max_new_tokens)[0],
             dict(max_new_tokens=max_new_tokens)) for messages in conversations
        ])
        return [(self.tokenizer.decode(ids, skip_special_tokens=True), ended)
                for ids, ended in written]

    def write_all(self, requests: Sequence[tuple[Sequence[int], dict]]) -> list:
        """(ids, whether it ended by itself) for each (prompt ids, generation settings), greedy."""
        from lmdeploy import GenerationConfig

        engine, places = self.pipe.async_engine, asyncio.Semaphore(2 * self.batch_size)
        bar = tqdm(total=len(requests), desc="writing", leave=False, disable=None)

        async def write(prompt: Sequence[int], settings: dict) -> tuple[list[int], bool]:
            async with places:
                request = await engine.preprocess(
                    None, self.pipe.session(), input_ids=list(prompt),
                    gen_config=GenerationConfig(do_sample=False, **settings),
                )
                ids, reason = [], None
                async for output in engine.generate(request, stream_response=False):
                    ids += output.token_ids or []
                    reason = output.finish_reason or reason
                bar.update()
                return ids, reason == "stop"

        async def gather() -> list:
            return await asyncio.gather(*(write(*request) for request in requests))

        return self.run(gather())

    def run(self, work: Coroutine):
        """The result of a coroutine on the engine's own event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.pipe.internal_thread.loop).result()


# ---- Memory --------------------------------------------------------------------------------------

def weights_in_memory(pipe) -> int:
    """Bytes that the engine's weights take, each piece of memory counted once."""
    network = pipe.async_engine.engine.executor.model_agent.patched_model.get_model()
    tensors = list(network.parameters())
    for module in network.modules():  # 4-bit matrices are kept in a form of their own
        if impl := getattr(module, "impl", None):
            tensors += [value for value in vars(impl).values() if isinstance(value, torch.Tensor)]
    # A packed matrix does not tell where it lies, but is always one by itself.
    pieces = {id(one) if one.is_mkldnn else one.data_ptr(): one.numel() * one.element_size()
              for one in tensors}
    return sum(pieces.values())


def cache_per_token(pipe) -> float:
    """Bytes of keys and values that a token leaves in the cache, in all layers."""
    agent = pipe.async_engine.engine.executor.model_agent
    return agent.block_cache_plan.logical_block_nbytes / agent.cache_config.block_size


def weights_on_disk(folder: str | Path) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


# ---- Measuring -----------------------------------------------------------------------------------

def measure_transformers(settings: Settings, tasks: dict, dtype: str) -> Variant:
    """The same weights as a plain Llama in transformers' own class, which reads whole texts."""
    variant = Variant(f"transformers, {dtype}", settings.model, dtype)
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(settings.model, dtype=getattr(torch, dtype))[0]
        save_llama(model, load_tokenizer(settings.model, TOKENIZER_DIR), folder)
        variant.file_bytes = weights_on_disk(folder)
        checkpoint = Checkpoint(
            folder, settings.batch_size, patches.default_device(), getattr(torch, dtype))
    scores, _ = measure(checkpoint, tasks, Evaluation(max_new_tokens=settings.max_new_tokens))
    variant.scores = {score.name: score for score in scores}
    variant.weights_bytes = sum(
        weight.numel() * weight.element_size() for weight in checkpoint.model.parameters())
    config = checkpoint.model.config
    variant.cache_bytes = (2 * config.num_hidden_layers * config.num_key_value_heads
                           * config.head_dim * getattr(torch, dtype).itemsize)
    return variant


def measure_engine(variant: Variant, settings: Settings, tasks: dict) -> Variant:
    """Fill in what the engine makes of a variant."""
    checkpoint = EngineCheckpoint(
        variant.folder, settings.batch_size, variant.dtype, variant.quant_policy)
    try:
        scores, _ = measure(checkpoint, tasks, Evaluation(max_new_tokens=settings.max_new_tokens))
        variant.scores = {score.name: score for score in scores}
        variant.weights_bytes = weights_in_memory(checkpoint.pipe)
        variant.cache_bytes = cache_per_token(checkpoint.pipe)
        variant.file_bytes = weights_on_disk(variant.folder)
    finally:
        checkpoint.close()
        gc.collect()
    print(f"{variant.name}: {variant.scores[TOTAL].value:.4f} bits per byte", flush=True)
    return variant


def assert_cache_is_read(variants: Sequence[Variant]) -> None:
    """RuntimeError if a quantized cache gives the very numbers of one that is not quantized."""
    for variant, other in itertools.product(variants, variants):
        same_weights = (variant.folder, variant.dtype) == (other.folder, other.dtype)
        if same_weights and variant.quant_policy and not other.quant_policy:
            if variant.scores[TOTAL].values == other.scores[TOTAL].values:
                raise RuntimeError(f"{variant.name} and {other.name} agree in every text")


def quantize(settings: Settings, folder: str) -> None:
    """The model's weights in 4 bits, as the command of stage Ⅷ makes them."""
    command = [sys.executable, "lmdeploy_cli.py", "lite", "auto_awq", settings.model,
               "--work-dir", folder, "--calib-samples", str(settings.calib_samples),
               "--w-group-size", str(settings.group_size)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"auto_awq failed: {done.stderr.strip().splitlines()[-1]}")


# ---- Tables --------------------------------------------------------------------------------------

def add_all_choices(variant: Variant, tasks: dict[str, list[dict]]) -> None:
    """All multiple-choice items together: differences that are too small for 300 items to show."""
    names = [name for name, items in tasks.items() if items[0]["kind"] == "choice"]
    values = [value for name in names for value in variant.scores[name].values]
    variant.scores["all choices"] = Score("all choices", values)


def all_differences(variants: Sequence[Variant], seed: int) -> list[dict[str, Difference]]:
    """Of each variant to the first one, Holm's correction being made for all of them together."""
    kept = [score for name, score in variants[0].scores.items() if name == TOTAL or not score.sizes]
    found = [compare(kept, list(variant.scores.values()), seed) for variant in variants[1:]]
    every = [difference for differences in found for difference in differences.values()]
    for difference, adjusted in zip(every, holm([one.p for one in every]), strict=True):
        difference.adjusted = adjusted
    return found


def perplexity_change(
    first: Score, second: Score, tokens: Sequence[int], seed: int
) -> tuple[float, float, float]:
    """In per cent, with its 95 % interval over the texts. A perplexity is e to the mean nats of a
    token, so the ratio of two is e to the mean difference."""
    nats = [math.log(2) * (b - a) for a, b in zip(first.values, second.values, strict=True)]
    ends = (sum(nats) / sum(tokens), *bootstrap_interval(nats, tokens, seed))
    change, low, high = (100 * math.expm1(end) for end in ends)
    return change, low, high


def memory_rows(variants: Sequence[Variant]) -> list[list[str]]:
    return [["", "weights on disk, MB", "weights in memory, MB", "cache, bytes a token"]] + [
        [one.name, f"{one.file_bytes / 1e6:.1f}", f"{one.weights_bytes / 1e6:.1f}",
         f"{one.cache_bytes:,.0f}"] for one in variants
    ]


def text_rows(
    variants: Sequence[Variant], differences: Sequence[dict], tokens: dict, seed: int
) -> list[list[str]]:
    rows = [["", "bits per byte", "perplexity of a token", "change", "95 % interval", "p (Holm)"]]
    first = variants[0].scores[TOTAL]
    for variant, difference in zip(variants, [None, *differences], strict=True):
        total = variant.scores[TOTAL]
        nats = math.log(2) * sum(total.values) / sum(tokens[TOTAL])
        row = [variant.name, f"{total.value:.4f}", f"{math.exp(nats):.2f}", "", "", ""]
        if difference:
            change, low, high = perplexity_change(first, total, tokens[TOTAL], seed)
            row[3:] = [f"{change:+.2f} %", f"{low:+.2f} – {high:+.2f} %",
                       show_p(difference[TOTAL].adjusted)]
        rows.append(row)
    return rows


def rate_rows(variants: Sequence[Variant], differences: Sequence[dict]) -> list[list[str]]:
    names = [name for name, score in variants[0].scores.items() if not score.sizes]
    rows = [["", *(f"{name} ({len(variants[0].scores[name].values)})" for name in names)]]
    for variant, difference in zip(variants, [None, *differences], strict=True):
        row = [variant.name]
        for score in map(variant.scores.get, names):
            p = difference and difference[score.name].adjusted
            shown = f" ({show_p(p)})" if p is not None and p < 1 else ""
            row.append(f"{score.value:.1%}{shown}")
        rows.append(row)
    return rows


def source_rows(variants: Sequence[Variant], tokens: dict, seed: int) -> list[list[str]]:
    rows = [["", *(variant.name for variant in variants[1:])]]
    for name, own in tokens.items():
        first = variants[0].scores[name]
        changes = (perplexity_change(first, variant.scores[name], own, seed)[0]
                   for variant in variants[1:])
        rows.append([name.removeprefix("bits per byte: "), *(f"{x:+.2f} %" for x in changes)])
    return rows


def token_counts(tasks: dict[str, list[dict]], tokenizer) -> dict[str, list[int]]:
    """Tokens of each text, by the name of the score that they belong to."""
    texts = [item for items in tasks.values() for item in items if item["kind"] == "text"]
    counts = [len(encode_text(tokenizer, item["text"])) for item in texts]
    own = grouped(texts, "source").items()
    return {f"bits per byte: {source}": [counts[i] for i in places] for source, places in own} | {
        TOTAL: counts}


def main() -> None:
    settings = parse_settings(Settings)
    torch.set_num_threads(settings.threads)
    try:
        tasks = {name: draw(items, settings.limit, settings.seed)
                 for name, items in read_tasks(Path(settings.data)).items()}
        patches.register()
        with tempfile.TemporaryDirectory() as folder:
            awq = settings.awq or folder
            if settings.awq is None:
                quantize(settings, folder)
            ways = [
                Variant("engine, float32", settings.model, "float32"),
                Variant("engine, bfloat16", settings.model, "bfloat16"),
                Variant("KV int8", settings.model, "bfloat16", 8),
                Variant("KV int4", settings.model, "bfloat16", 4),
                Variant("W4A16", awq, "bfloat16"),
                Variant("W4A16, KV int4", awq, "bfloat16", 4),
            ]
            if patches.default_device() == "cuda":
                del ways[0]  # there LMDeploy computes in 16 bits
            variants = [measure_transformers(settings, tasks, "bfloat16"),
                        *(measure_engine(variant, settings, tasks) for variant in ways)]
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.quantization: {error}")
    assert_cache_is_read(variants)
    for variant in variants:
        add_all_choices(variant, tasks)
    tokens = token_counts(tasks, load_tokenizer(settings.model, TOKENIZER_DIR))
    differences = all_differences(variants, settings.seed)
    tables = {
        "Memory": memory_rows(variants),
        f"Held-out texts ({len(tokens[TOTAL])}, {sum(tokens[TOTAL]):,} tokens)": text_rows(
            variants, differences, tokens, settings.seed),
        "Rates (number of items; in brackets p by McNemar and Holm, where below 1)": rate_rows(
            variants, differences),
        "Change of perplexity by source": source_rows(variants, tokens, settings.seed),
    }
    with atomic_write(settings.output, "w") as file:
        for title, (header, *rows) in tables.items():
            lines = [f"**{title}**", ""]
            lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
            file.write("\n".join(lines) + "\n\n")
            print("\n".join(lines), flush=True)
    print(f"Tables: {settings.output}")


if __name__ == "__main__":
    main()
