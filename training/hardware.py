"""What this machine is, and how fast it could be at best."""

import os
import shutil
import time
from pathlib import Path

import torch

# Dense bfloat16 tensor-core peaks, FLOP/s, from the vendors' data sheets.
GPU_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 4080": 97e12,
    "RTX 3090": 71e12,
}


def choose_device(local_rank: int = 0) -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def set_threads(threads: int | None, processes_here: int = 1) -> int:
    """Give torch the cores this process may use, shared among the processes of this machine."""
    if threads is None:
        threads = (
            max(1, len(os.sched_getaffinity(0)) // processes_here)
            if hasattr(os, "sched_getaffinity")
            else max(1, (os.cpu_count() or 1) // processes_here)
        )
    torch.set_num_threads(threads)
    return threads


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can build here: on a CPU it needs a C++ compiler."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s to hold a run against: the data sheet's for a known GPU, else the best large matmul
    measured here within about half a second."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in GPU_PEAKS.items():
            if known in name:
                return peak
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def flops_per_token(model: torch.nn.Module, row_length: int) -> float:
    """Forward and backward FLOPs of one token: 6 per weight it is multiplied with, plus attention's
    12 · layers · width · T, halved because it is causal (PaLM, arXiv 2204.02311, appendix B)."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # the tied head, once
    width = config.num_attention_heads * config.head_dim
    return 6 * weights + 6 * config.num_hidden_layers * width * row_length


def compile_layers(model: torch.nn.Module, wanted: bool) -> None:
    """Compile each decoder layer and the last norm (or undo it); one compilation serves all layers.

    The build is cached in the project, so that the next run starts at once.
    """
    if wanted:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.cwd() / ".compile-cache"))
    for module in (*model.layers, model.norm):
        if wanted:
            module.compile(dynamic=False)
        else:
            module._compiled_call_impl = None
