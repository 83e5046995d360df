"""How far do more GPUs help? A model of a step's time, checked against one measured all-reduce.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --gpu "RTX 4090" --strong true

A step computes for FLOPs / (peak · MFU), then sums its gradients in a ring: each of n GPUs sends
2(n-1) pieces of 1/n of them (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", 2009),

    2(n-1) · latency + 2(n-1)/n · bytes / bandwidth

(the usual cost of a message; Thakur, Rabenseifner and Gropp, 2005). Efficiency is computing time /
step time; "fewest … most" is the time of the sum on 2 and on the most GPUs. Two ways to send:

- as this trainer does: the float32 gradients in one call after the backward pass, nothing beside it
  (`MasterOptimizer.gradients_flat`, `World.sum_`);
- as PyTorch's DDP does: bfloat16 gradients in pieces beside the backward pass, which is 2/3 of the
  computing (Li et al., arXiv 2006.15704); its pieces' additional latency is left out.

Assumed, not measured (no GPU was at hand):
- peaks from the data sheets (`training/hardware.py`), MFU 40 %: about that of Llama 3's training
  (38-43 %, arXiv 2407.21783, table 4). A network of 26M will reach less: its computing then takes
  longer, and its efficiency is better than the table says.
- links at their full rate in one direction: NVLink 4 450 GB/s (within a node of 8), 200 Gb/s
  InfiniBand, 25 and 1 Gb/s Ethernet; latencies of 2, 5, 20 and 50 µs. A ring enters and leaves
  each node once, so GPUs that share a node's port do not divide its rate.
- updates, data, and waiting for the slowest GPU cost nothing.

The measured part sums tensors over gloo between two processes here, fits latency and bandwidth to
the small ones, and predicts the largest, the 26m preset's gradients.
"""

import multiprocessing
import os
import socket
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from model import YuanMengConfig, YuanMengModel, preset_config
from training.distributed import World
from training.hardware import GPU_PEAKS, flops_per_token
from training.settings import option

GPUS = (2, 4, 8, 16, 32, 64)
FP32, BF16 = 4, 2  # bytes of a gradient


@dataclass
class Settings:
    """What is assumed of the machines, and how much each step does."""

    gpu: str = option("H100", f"one of {', '.join(GPU_PEAKS)}")
    mfu: float = option(0.4, "share of the peak that computing reaches")
    tokens: int = option(16384, "in an update: of one GPU, or of all with --strong true")
    strong: bool = option(False, "the global batch stays the same: each GPU gets less to do")
    rounds: int = option(7, "of the measurement, of which the median is taken")


@dataclass(frozen=True)
class Link:
    """What connects the GPUs: bytes per second in one direction, seconds per message."""

    name: str
    bandwidth: float
    latency: float
    reach: int = 10**9  # GPUs it can connect

    def all_reduce(self, num_bytes: float, gpus: int) -> float:
        """Seconds of a ring."""
        return ring(num_bytes, gpus, self.bandwidth, self.latency)


LINKS = (
    Link("NVLink 4", 450e9, 2e-6, reach=8),
    Link("IB 200 Gb/s", 25e9, 5e-6),
    Link("Eth 25 Gb/s", 3.125e9, 20e-6),
    Link("Eth 1 Gb/s", 0.125e9, 50e-6),
)


def ring(num_bytes: float, gpus: int, bandwidth: float, latency: float) -> float:
    """Seconds to sum `num_bytes` over `gpus` processes in a ring."""
    return 2 * (gpus - 1) * (latency + num_bytes / gpus / bandwidth)


def efficiency(compute: float, talk: float, overlapped: bool) -> float:
    """Computing time / step time; a backward pass is 2/3 of the computing."""
    if overlapped:
        return compute / (compute / 3 + max(compute * 2 / 3, talk))
    return compute / (compute + talk)


def shapes() -> dict[str, tuple[YuanMengModel, int]]:
    """The networks, without memory for their weights, and the tokens in a row of theirs."""
    llama_1b = YuanMengConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return {
            "26m": (YuanMengModel(preset_config("26m")), 512),
            "1B (as Llama 3.2 1B)": (YuanMengModel(llama_1b), 2048),
        }


def scaling_table(name: str, model: YuanMengModel, row_length: int, settings: Settings) -> Table:
    """One shape over all links and numbers of GPUs."""
    parameters = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(model, row_length)
    peak = GPU_PEAKS[settings.gpu] * settings.mfu
    one_gpu = flops * settings.tokens / peak
    batch = "in all" if settings.strong else "a GPU"
    table = Table(
        "link",
        "sent",
        "ms, fewest … most",
        *(f"{gpus} GPU" for gpus in GPUS),
        title=f"{name}: {parameters / 1e6:,.1f}M parameters, {settings.tokens:,} tokens {batch}, "
        f"{one_gpu * 1e3:.1f} ms of computing on one {settings.gpu}",
    )
    for link in LINKS:
        for sent, size, overlapped in (("fp32, after", FP32, False), ("bf16, beside", BF16, True)):
            reached = [gpus for gpus in GPUS if gpus <= link.reach]
            times = [link.all_reduce(parameters * size, gpus) for gpus in reached]
            shares = [
                efficiency(one_gpu / (gpus if settings.strong else 1), talk, overlapped)
                for gpus, talk in zip(reached, times, strict=True)
            ]
            table.add_row(
                link.name,
                sent,
                f"{times[0] * 1e3:,.1f} … {times[-1] * 1e3:,.1f}",
                *(f"{share:.0%}" for share in shares),
                *["-"] * (len(GPUS) - len(reached)),
            )
    return table


def sum_times(rank: int, port: int, sizes: list[int], rounds: int, sender) -> None:
    """One of two processes: seconds of `World.sum_` of float32 tensors of these sizes."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    os.environ.update(zip(names, (str(rank), "2", str(rank), "2", "0"), strict=True))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = World.from_environment()
    world.join()
    times: list[list[float]] = [[] for _ in sizes]
    for _ in range(rounds + 1):
        for size, found in zip(sizes, times, strict=True):
            tensor = torch.zeros(size)
            world.barrier()
            start = time.perf_counter()
            world.sum_(tensor)
            found.append(time.perf_counter() - start)
    if world.is_main:
        sender.send([statistics.median(found[1:]) for found in times])  # the first warms up
    world.barrier()
    world.close()


def measure(sizes: list[int], rounds: int) -> list[float]:
    """Median seconds of the sum of float32 tensors of these sizes, over two local processes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    processes = [
        spawn.Process(target=sum_times, args=(rank, port, sizes, rounds, sender))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    times = receiver.recv()
    for process in processes:
        process.join()
    return times


def fit(sizes: list[int], times: list[float]) -> tuple[float, float]:
    """(bandwidth, latency) with the least squared relative error in `ring` of two processes."""
    seconds = np.array(times)
    num_bytes = FP32 * np.array(sizes, dtype=float)
    terms = np.stack([np.full_like(num_bytes, 2.0), num_bytes], axis=1) / seconds[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(terms, np.ones(len(sizes)), rcond=None)
    return 1 / per_byte, latency


def measured_table(largest: int, rounds: int) -> tuple[Table, str]:
    """The model of a ring against a measurement; fitted without the largest size."""
    sizes = [2**10, 2**14, 2**17, 2**20, 2**22, largest]
    times = measure(sizes, rounds)
    bandwidth, latency = fit(sizes[:-1], times[:-1])
    table = Table(
        "float32 numbers",
        "MB",
        "measured ms",
        "model ms",
        title="gloo, 2 processes on this machine",
    )
    for size, seconds in zip(sizes, times, strict=True):
        model = ring(FP32 * size, 2, bandwidth, latency)
        table.add_row(
            f"{size:,}" + (" (26m)" if size == largest else ""),
            f"{FP32 * size / 1e6:.3f}",
            f"{seconds * 1e3:.3f}",
            f"{model * 1e3:.3f}",
        )
    return table, f"fitted: {bandwidth / 1e9:.2f} GB/s, {latency * 1e6:.0f} µs a message"


def main() -> None:
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    if settings.gpu not in GPU_PEAKS:
        raise SystemExit(f"--gpu {settings.gpu}: choose one of {', '.join(GPU_PEAKS)}")
    console = Console(width=max(Console().width, 112))
    console.print(
        f"Efficiency, simulated: {settings.gpu}, {GPU_PEAKS[settings.gpu] / 1e12:.0f} TFLOP/s at "
        f"an MFU of {settings.mfu:.0%}; links at full rate. Not run on a GPU."
    )
    networks = shapes()
    for name, (model, row_length) in networks.items():
        console.print(scaling_table(name, model, row_length, settings))
    largest = sum(p.numel() for p in networks["26m"][0].parameters())
    table, fitted = measured_table(largest, settings.rounds)
    console.print(table)
    console.print(fitted)


if __name__ == "__main__":
    main()
