"""The trainer against what a user would otherwise run, in one interleaved run on one text.

The baseline is a trainer as small projects write it: transformers' `LlamaForCausalLM` of the same
shape in float32, AdamW on a cosine, one document per row padded to 512, tokenised in the loader.
Ours is `training.loop.Trainer` as `train_pretrain.py` runs it. Each lives in a process of its own,
and they take turns, so that a drift of the machine's speed hits both alike. Without a GPU what is
counted is CPU time: other programs then disturb less, and on one thread it is the wall time of a
quiet machine.

    python -m benchmarks.train                               # mini: rates, then time to equal loss
    python -m benchmarks.train --preset 26m --minutes 0      # rates only
    python -m benchmarks.train --profile 15                  # and ours' 15 dearest operators

Raw tokens are positions computed, padding included; useful ones are those of the text.
"""

import math
import multiprocessing
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dataset.catalog import pick_data
from dataset.records import read_records
from dataset.rows import prepare_rows
from model import TOKENIZER_DIR, YuanMengModel, preset_config
from train_pretrain import RECIPES
from train_pretrain import Settings as TrainSettings
from training.distributed import World
from training.evaluation import token_byte_lengths
from training.files import atomic_write
from training.hardware import choose_device, flops_per_token, peak_flops
from training.loop import Trainer
from training.schedule import reference_cosine
from training.settings import option, parse_settings
from training.stage import fill_in_defaults

ROW_LENGTH = 512
HELDOUT = 256  # documents
SLICES = 10  # turns that a training is cut into


@dataclass
class Settings:
    """What is compared."""

    preset: str = option("mini", "26m or mini")
    data: str | None = option(None, "JSONL file; default: as train_pretrain.py")
    records: int = option(60_000, "of it that are used")
    threads: int = option(1, "per process")
    rounds: int = option(5, "turns in which the rates are measured; the median is printed")
    profile: int = option(0, "operators of ours to list")
    minutes: float = option(10.0, "minutes (of CPU time) of the baseline's training; 0: rates only")
    shares: str = option("6,12,24", "ours also trains for this fraction of them: 1/6, 1/12, …")
    baseline_rows: int = option(32, "documents in one of the baseline's steps")
    baseline_accumulation: int = option(1, "its steps per update (8 in minimind, which is slower)")
    seed: int = option(0, "of the weights and of the data's order")


class Documents(Dataset):
    """One document per row, tokenised when it is asked for, padded to the row."""

    def __init__(self, texts: list[str], tokenizer):
        self.texts, self.tokenizer = texts, tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer(
            f"{self.tokenizer.bos_token}{self.texts[index]}{self.tokenizer.eos_token}",
            max_length=ROW_LENGTH,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return {name: tensor[0] for name, tensor in encoded.items()}


class Baseline:
    """The trainer that most projects write."""

    def __init__(self, settings: Settings, train: Path, minutes: float):
        torch.manual_seed(settings.seed)
        ours = preset_config(settings.preset)
        names = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
        )  # fmt: skip
        shape = {name: getattr(ours, name) for name in names}
        self.device = choose_device()
        self.model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4)
        self.settings, self.minutes, self.steps = settings, minutes, 0
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
        texts = [text for _, text in read_records(train, "pretrain")]
        loader = DataLoader(
            Documents(texts, tokenizer), batch_size=settings.baseline_rows, shuffle=True
        )
        self.batches = iter(loader)

    def step(self, spent: float) -> tuple[int, int]:
        """Train on one batch, `spent` seconds after the start; (raw, useful) tokens."""
        batch = next(self.batches)
        useful = int(batch["attention_mask"].sum())
        ids, mask = (batch[name].to(self.device) for name in ("input_ids", "attention_mask"))
        labels = ids.masked_fill(mask == 0, -100)
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        (loss / self.settings.baseline_accumulation).backward()
        self.steps += 1
        if self.steps % self.settings.baseline_accumulation == 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            progress = min(1.0, spent / 60 / self.minutes) if self.minutes else 0.0
            for group in self.optimizer.param_groups:
                group["lr"] = 5e-4 * reference_cosine(progress)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return ids.numel(), useful


class Ours:
    """The project's trainer, driven step by step and told the time."""

    def __init__(self, settings: Settings, train: Path, minutes: float):
        options = TrainSettings(
            preset=settings.preset, max_minutes=minutes or None, tensorboard=False,
            seed=settings.seed, out_dir=str(train.parent / "out"), epochs=100, compile="yes",
        )  # fmt: skip
        fill_in_defaults(options, RECIPES)
        rows = prepare_rows(train, "pretrain", TOKENIZER_DIR, cache_dir=train.parent / "cache")
        torch.manual_seed(settings.seed)
        self.model = YuanMengModel(preset_config(settings.preset))
        self.model.to(choose_device(), torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
        recipe = RECIPES[options.recipe]
        self.trainer = Trainer(options, "pretrain", recipe, self.model, rows, tokenizer, World())
        self.trainer.prepare_speed()

    def step(self, spent: float) -> tuple[int, int]:
        """Train on one batch, `spent` seconds after the start; (raw, useful) tokens."""
        trainer = self.trainer
        trainer.elapsed = spent
        x_BT, y_BT, segments_BT = trainer.batch(trainer.step)
        trainer.learn((x_BT, y_BT, segments_BT), int((y_BT >= 0).sum()))
        trainer.step += 1
        return x_BT.numel(), int((segments_BT > 0).sum())


@torch.no_grad()
def heldout_bits_per_byte(model, texts: list[str]) -> float:
    """Each document by itself, cut to the row; for either network, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    lengths = token_byte_lengths(tokenizer)
    fresh = type(model)(model.config)  # neither compiled nor with a trainer's attention
    fresh.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    nats, num_bytes = 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)[: ROW_LENGTH - 1]
        ids = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
        logits = fresh(input_ids=ids, use_cache=False).logits[0, :-1]
        nats += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        num_bytes += int(lengths[ids[0, 1:]].sum())
    return nats / math.log(2) / num_bytes


def clock() -> float:
    """Seconds of CPU time of this process; with a GPU, of wall time once it has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Run:
    """One training, and the time it has had."""

    def __init__(self, kind: type, settings: Settings, train: Path, minutes: float):
        torch.compiler.reset()
        begin = time.perf_counter()  # not CPU time: compilers are processes of their own
        self.trainer = kind(settings, train, minutes)
        self.start_up = time.perf_counter() - begin  # reading, packing, compiling
        self.spent = 0.0

    def train(self, seconds: float) -> tuple[float, int, int]:
        """Train for so many seconds; those used, raw tokens, useful tokens."""
        raw = useful = 0
        begin, used = clock(), 0.0
        while used < seconds:
            for _ in range(10 if torch.cuda.is_available() else 1):  # each look makes a GPU wait
                more = self.trainer.step(self.spent + used)
                raw, useful = raw + more[0], useful + more[1]
            used = clock() - begin
        self.spent += used
        return used, raw, useful

    def profile(self, num_operators: int) -> str:
        """A table of the dearest operators of three steps."""
        kinds = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(ProfilerActivity.CUDA)
        with profile(activities=kinds) as profiler:
            for _ in range(3):
                self.trainer.step(self.spent)
        order = "self_cuda_time_total" if len(kinds) > 1 else "self_cpu_time_total"
        return profiler.key_averages().table(
            sort_by=order, row_limit=num_operators, max_name_column_width=50
        )


def serve(pipe, kind: type, settings: Settings, train: Path, heldout: list[str]) -> None:
    """A process of one kind of trainer: answers the orders that come through `pipe`."""
    torch.set_num_threads(settings.threads)
    runs: dict[str, Run] = {}
    while (order := pipe.recv()) is not None:
        verb, name, *numbers = order
        if verb == "start":
            runs[name] = Run(kind, settings, train, *numbers)
            pipe.send(runs[name].start_up)
        elif verb == "train":
            pipe.send(runs[name].train(*numbers))
        elif verb == "loss":
            pipe.send(heldout_bits_per_byte(runs[name].trainer.model, heldout))
        elif verb == "profile":
            pipe.send(runs[name].profile(*numbers))
        elif verb == "memory" and torch.cuda.is_available():
            pipe.send(torch.cuda.max_memory_allocated() / 2**30)
        elif verb == "memory":
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


class Worker:
    """The other end of `serve`."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self.process.start()

    def ask(self, *order):
        self.pipe.send(order)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def measure_rates(baseline: Worker, ours: Worker, settings: Settings, console: Console) -> None:
    """Turn by turn, six seconds each; then the medians, beside the machine's ceilings."""
    device = choose_device()
    shape = flops_per_token(YuanMengModel(preset_config(settings.preset)), ROW_LENGTH)
    turns: dict[str, list] = {"baseline": [], "ours": []}
    ceilings = []
    torch.set_num_threads(1)
    for worker in (baseline, ours):
        worker.ask("start", "rates", 0)
        worker.ask("train", "rates", 1)  # warms up
    for _ in range(settings.rounds):
        turns["baseline"].append(baseline.ask("train", "rates", 6))
        turns["ours"].append(ours.ask("train", "rates", 6))
        ceilings.append(peak_flops(device, torch.bfloat16) / 1e9)
    ceiling = median(ceilings)
    unit = "second" if device.type == "cuda" else f"CPU-second; {settings.threads} thread(s) each"
    table = Table(title=f"{settings.preset}, per {unit}")
    for column in ("", "raw tokens", "useful tokens", "GFLOP/s", "of bf16 matmul", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    medians = {}
    for worker, (name, results) in zip((baseline, ours), turns.items(), strict=True):
        raw = median([result[1] / result[0] for result in results])
        useful = median([result[2] / result[0] for result in results])
        medians[name] = (raw, useful)
        gflops = raw * shape / 1e9
        memory = worker.ask("memory", "rates")
        table.add_row(
            name, f"{raw:,.0f}", f"{useful:,.0f}", f"{gflops:,.0f}", f"{gflops / ceiling:.0%}",
            f"{memory:.2f} GiB",
        )  # fmt: skip
    ratios = [a / b for a, b in zip(medians["ours"], medians["baseline"], strict=True)]
    table.add_row("ratio", *(f"{ratio:.2f}×" for ratio in ratios), "", "", "")
    console.print(table)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one core"
    console.print(f"Matmul ceiling of {where}: {ceiling:,.0f} GFLOP/s in bfloat16.\n")
    if settings.profile:
        console.print(ours.ask("profile", "rates", settings.profile), highlight=False)


def measure_losses(baseline: Worker, ours: Worker, settings: Settings, console: Console) -> None:
    """Train the baseline for the given CPU time and ours for fractions of it, in turns."""
    runs = {"baseline": (baseline, settings.minutes)}
    for share in settings.shares.split(","):
        runs[f"ours, 1/{share}"] = (ours, settings.minutes / float(share))
    start_up = {
        name: worker.ask("start", name, minutes) for name, (worker, minutes) in runs.items()
    }
    for _ in range(SLICES):
        for name, (worker, minutes) in runs.items():
            worker.ask("train", name, minutes * 60 / SLICES)
    table = Table(title=f"Held-out loss on {HELDOUT} documents")
    for column in ("", "minutes", "bits per byte"):
        table.add_column(column, justify="right" if column else "left")
    losses = {name: worker.ask("loss", name) for name, (worker, _) in runs.items()}
    for name, (_, minutes) in runs.items():
        table.add_row(name, f"{minutes:.2f}", f"{losses[name]:.4f}")
    console.print(table)
    ours_start_up = max(seconds for name, seconds in start_up.items() if name != "baseline")
    console.print(
        f"Not counted: starting takes {start_up['baseline']:.0f} seconds (baseline) and "
        f"{ours_start_up:.0f} (ours packs and compiles; a second run finds both in its caches)."
    )
    reached = [
        settings.minutes / minutes
        for name, (_, minutes) in runs.items()
        if name != "baseline" and losses[name] <= losses["baseline"]
    ]
    if reached:
        console.print(f"Ours reaches the baseline's loss in 1/{max(reached):g} of its time.")
    else:
        console.print("None of ours reached the baseline's loss: try smaller --shares.")


def median(values) -> float:
    return sorted(values)[len(values) // 2]


def write_texts(settings: Settings, folder: Path) -> tuple[Path, list[str]]:
    """A JSONL file with the first records, and the texts held out of it (one in every so many)."""
    (data,) = pick_data("pretrain", [settings.data] if settings.data else None)
    with data.open(encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(settings.records))]
    every = max(2, len(lines) // HELDOUT)
    train = folder / "train.jsonl"
    with atomic_write(train, "w") as file:
        file.writelines(line for i, line in enumerate(lines) if i % every)
    heldout = folder / "heldout.jsonl"
    with atomic_write(heldout, "w") as file:
        file.writelines(lines[::every])
    return train, [text for _, text in read_records(heldout, "pretrain")]


def main() -> None:
    settings = parse_settings(Settings)
    if not Path(TOKENIZER_DIR).is_dir():
        sys.exit(f"no tokenizer in {TOKENIZER_DIR}: python train_tokenizer.py")
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        train, heldout = write_texts(settings, Path(folder))
        workers = [Worker(kind, settings, train, heldout) for kind in (Baseline, Ours)]
        measure_rates(*workers, settings, console)
        if settings.minutes:
            measure_losses(*workers, settings, console)
        for worker in workers:
            worker.close()


if __name__ == "__main__":
    main()
