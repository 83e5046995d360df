"""How fast the same weights write: transformers, model_chat.py, LMDeploy's engine, llama.cpp.

Every contestant loads in a process of its own and answers to the same call: so many equal prompts,
so many new tokens, how many seconds. The calls go round, so that a busy moment of the machine hits
all alike, and the best of a few rounds counts. Reading a prompt is the time to one new token;
writing is the time of the others. Then the server, with clients that stream.

    python -m benchmarks.inference                        the 26m shape with random weights
    python -m benchmarks.inference --model Yuanmeng_Models/yuanmeng-mini-instruct
    PYTHONPATH=.venv/llama python -m benchmarks.inference     with llama.cpp (benchmarks.llama_cpp)
"""
import asyncio
import gc
import json
import multiprocessing as mp
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import torch
from rich.console import Console
from rich.table import Table

import patches
from model import TOKENIZER_DIR, YuanMengModel
from model.config import preset_config
from model.export import save_gguf, save_yuanmeng
from model.generation import generate_tokens
from model.loading import load_model, load_tokenizer
from model.step import OneSequence
from training.hardware import peak_flops, set_threads
from training.settings import option, parse_settings

BATCHES = (1, 8, 32)
PROMPT, LONG_PROMPT = 64, 512  # tokens: before writing, and for the speed of reading
DEVICE = patches.default_device()
GPU_SHARE = 0.1  # of what is free, for each engine's cache: they are all there at once


@dataclass
class Settings:
    """What to measure."""

    model: str | None = option(None, "an exported folder; default: the 26m shape, random weights")
    work_dir: str = option("out/inference", "where its other formats are written")
    threads: int = option(2, "CPU threads for each contestant")
    new_tokens: int = option(64, "written in each answer")
    rounds: int = option(3, "the best one counts")
    only: str = option("", "contestants whose names contain this; all if empty")
    server: bool = option(True, "also measure api_server")


# ---- The contestants: each is called with (batch, prompt length, new tokens) ---------------------

def transformers_bf16(folder: Path) -> Callable[[int, int, int], None]:
    model = load_model(folder, dtype=torch.bfloat16, device=DEVICE)[0]

    def run(batch: int, length: int, new_tokens: int) -> None:
        ids = torch.tensor([prompt(length)] * batch, device=DEVICE)
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                pad_token_id=0, max_new_tokens=new_tokens,
                                min_new_tokens=new_tokens)
        answer.cpu()  # waits for a GPU

    return run


def model_chat(folder: Path) -> Callable[[int, int, int], None]:
    model = load_model(folder, dtype=torch.bfloat16, device=DEVICE)[0]
    step = OneSequence.build(model, say=print)

    def run(batch: int, length: int, new_tokens: int) -> None:
        if batch > 1:
            raise NotImplementedError
        answer = generate_tokens(model, prompt(length), max_new_tokens=new_tokens, temperature=0,
                                 eos_token_id=None, step=step)
        assert len(list(answer)) == new_tokens

    return run


def engine(folder: Path, quant_policy: int = 0) -> Callable[[int, int, int], None]:
    patches.register()
    from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline

    share = {"cache_max_entry_count": GPU_SHARE} if DEVICE == "cuda" else {}
    pipe = pipeline(str(folder), log_level="ERROR", backend_config=PytorchEngineConfig(
        device_type=DEVICE, dtype="bfloat16", max_batch_size=max(BATCHES), session_len=1024,
        quant_policy=quant_policy, max_prefill_token_num=8192, **share))

    async def answer(length: int, new_tokens: int) -> None:
        request = await pipe.async_engine.preprocess(
            None, pipe.session(), input_ids=prompt(length), gen_config=GenerationConfig(
                max_new_tokens=new_tokens, do_sample=False, ignore_eos=True))
        async for _ in pipe.async_engine.generate(request, stream_response=False):
            pass

    async def answers(batch: int, length: int, new_tokens: int) -> None:
        await asyncio.gather(*(answer(length, new_tokens) for _ in range(batch)))

    def run(*sizes: int) -> None:
        asyncio.run_coroutine_threadsafe(answers(*sizes), pipe.internal_thread.loop).result()

    return run


def llama_cpp(file: Path) -> Callable[[int, int, int], None]:
    """llama.cpp by its own interface, which is the one that writes several answers at once."""
    import llama_cpp as llama
    import numpy as np

    threads = torch.get_num_threads()
    silent = hush(llama)
    model = llama.llama_model_load_from_file(
        str(file).encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.kv_unified = 32 * 256, max(BATCHES), True
    settings.n_batch = settings.n_ubatch = 32 * PROMPT
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch_data = llama.llama_batch_init(settings.n_batch, 0, 1)

    def decode(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """One step over (token, position, sequence, wanted); the likeliest token of the wanted."""
        batch_data.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch_data.token[i], batch_data.pos[i] = token, position
            batch_data.n_seq_id[i], batch_data.seq_id[i][0] = 1, sequence
            batch_data.logits[i] = wanted
        if llama.llama_decode(context, batch_data):
            raise RuntimeError("llama.cpp refuses the batch")
        return [
            int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i),
                                      (vocabulary,)).argmax())
            for i, (*_, wanted) in enumerate(tokens) if wanted
        ]

    def run(batch: int, length: int, new_tokens: int, silent=silent) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        tokens = decode([(token, i, sequence, i == length - 1) for sequence in range(batch)
                         for i, token in enumerate(prompt(length))])
        for position in range(length, length + new_tokens - 1):
            tokens = decode([(token, position, sequence, True)
                             for sequence, token in enumerate(tokens)])

    return run


def hush(llama):
    """Make llama.cpp keep its log to itself, as long as what is returned lives."""
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, None)
    return silent


def prompt(length: int) -> list[int]:
    return [10 + i % 6000 for i in range(length)]


# ---- A process for each --------------------------------------------------------------------------

class Worker:
    """A contestant in its own process."""

    def __init__(self, name: str, make: Callable, arguments: tuple, threads: int):
        self.name = name
        self.pipe, other = mp.Pipe()
        self.process = mp.get_context("spawn").Process(
            target=serve, args=(other, make, arguments, threads), daemon=True)
        self.process.start()
        other.close()

    def loads(self) -> bool:
        """Waits until it is loaded, or has failed."""
        try:
            self.memory = self.pipe.recv()
        except EOFError:
            print(f"{self.name} ended while loading and is left out")
            return False
        return True

    def seconds(self, *sizes: int) -> float | None:
        """How long one call takes; None where the contestant has no such call, or has crashed."""
        try:
            self.pipe.send(sizes)
            seconds, self.memory = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            return None
        return seconds

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(60)

    @property
    def crashed(self) -> bool:
        return not self.process.is_alive()


def serve(pipe, make: Callable, arguments: tuple, threads: int) -> None:
    """The loop of a worker's process."""
    torch.set_num_threads(threads)
    run = make(*arguments)
    own = psutil.Process()
    pipe.send(own.memory_info().rss)
    while sizes := pipe.recv():
        gc.collect()
        start = time.perf_counter()
        try:
            run(*sizes)
        except NotImplementedError:
            pipe.send((None, own.memory_info().rss))
            continue
        pipe.send((time.perf_counter() - start, own.memory_info().rss))
    os._exit(0)  # the engine's threads need not be waited for


# ---- The files -----------------------------------------------------------------------------------

def prepare(settings: Settings) -> dict[str, Path]:
    """The model in every format that the contestants read; made once."""
    folder = Path(settings.work_dir)
    files = {"bf16": Path(settings.model) if settings.model else folder / "26m",
             "w4a16": folder / "w4a16", "gguf": folder / "bf16.gguf", "q4": folder / "q4_0.gguf"}
    tokenizer = load_tokenizer(TOKENIZER_DIR, TOKENIZER_DIR)
    if not files["bf16"].exists():
        torch.manual_seed(0)
        model = YuanMengModel(preset_config("26m")).bfloat16()
        files["bf16"].mkdir(parents=True)
        save_yuanmeng(model, tokenizer, files["bf16"])
    folder.mkdir(parents=True, exist_ok=True)
    if not files["w4a16"].exists():
        subprocess.run([sys.executable, "lmdeploy_cli.py", "lite", "auto_awq", str(files["bf16"]),
                        "--work-dir", str(files["w4a16"]), "--calib-samples", "16"], check=True)
    try:
        import llama_cpp as llama
    except ImportError:
        print("llama-cpp-python is not installed; benchmarks/llama_cpp.py says how to")
        del files["gguf"], files["q4"]
        return files
    if not files["q4"].exists():
        model = load_model(files["bf16"], dtype=torch.bfloat16)[0]
        save_gguf(model, tokenizer, folder, "bf16")
        silent = hush(llama)
        wanted = llama.llama_model_quantize_default_params()
        wanted.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_0
        if llama.llama_model_quantize(*(str(files[name]).encode() for name in ("gguf", "q4")),
                                      wanted):
            raise RuntimeError(f"llama.cpp could not quantize {files['gguf']}")
        del silent
    return files


def contestants(files: dict[str, Path]) -> dict[str, tuple[Callable, tuple]]:
    found = {
        "transformers bf16": (transformers_bf16, (files["bf16"],)),
        "model_chat bf16": (model_chat, (files["bf16"],)),
        "engine bf16": (engine, (files["bf16"],)),
        "engine W4A16": (engine, (files["w4a16"],)),
        "engine KV int8": (engine, (files["bf16"], 8)),
        "engine KV int4": (engine, (files["bf16"], 4)),
    }
    if "gguf" in files:
        found["llama.cpp bf16"] = (llama_cpp, (files["gguf"],))
        found["llama.cpp Q4_0"] = (llama_cpp, (files["q4"],))
    return found


# ---- The server ----------------------------------------------------------------------------------

@contextmanager
def api_server(folder: Path):
    """The address of a server over this model, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "lmdeploy_cli.py", "serve", "api_server", str(folder), "--server-port",
         str(port), "--max-batch-size", str(max(BATCHES)), "--log-level", "ERROR",
         *(["--cache-max-entry-count", str(GPU_SHARE)] if DEVICE == "cuda" else [])],
        stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(60)


async def stream(session: aiohttp.ClientSession, url: str, name: str, tokens: int) -> float:
    """Ask for one answer and read it to its end; seconds to its first piece."""
    start, first = time.perf_counter(), None
    body = {"model": name, "prompt": "春眠不觉晓" * 12, "max_tokens": tokens, "temperature": 0,
            "stream": True, "ignore_eos": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for _ in response.content.iter_any():
            first = first or time.perf_counter() - start
    return first


async def measure_server(url: str, process, settings: Settings, table: Table) -> dict:
    results = {}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        while True:
            try:
                async with session.get(f"{url}/v1/models") as response:
                    name = (await response.json())["data"][0]["id"]
                    break
            except aiohttp.ClientConnectionError:
                if process.poll() is not None:
                    raise RuntimeError("the server ended; run it by hand to see why") from None
                await asyncio.sleep(0.5)
        for clients in BATCHES:
            best, first = float("inf"), []
            for _ in range(settings.rounds + 1):  # the first one warms up
                start = time.perf_counter()
                firsts = await asyncio.gather(*(
                    stream(session, url, name, settings.new_tokens) for _ in range(clients)))
                seconds = time.perf_counter() - start
                if seconds < best:
                    best, first = seconds, sorted(firsts)
            rate = clients * settings.new_tokens / best
            results[clients] = rate
            memory = psutil.Process(process.pid).memory_info().rss / 2**20
            table.add_row(str(clients), f"{rate:,.0f}", f"{1e3 * first[len(first) // 2]:,.0f}",
                          f"{1e3 * first[-1]:,.0f}", f"{memory:,.0f}")
    return results


# ---- The whole -----------------------------------------------------------------------------------

def read_bandwidth() -> float:
    """Bytes a second that all threads together read from memory."""
    numbers = torch.ones(1 << 26, device=DEVICE)  # 256 MiB, more than any cache
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - start)
    return numbers.numel() * 4 / best


def main() -> None:
    settings = parse_settings(Settings)
    set_threads(settings.threads)
    console = Console()
    files = prepare(settings)
    weights = sum(file.stat().st_size for file in files["bf16"].glob("*.safetensors"))
    bandwidth, flops = read_bandwidth(), peak_flops(torch.device(DEVICE), torch.bfloat16)
    place = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{settings.threads} threads"
    console.print(f"{files['bf16']}: {weights / 1e6:.1f} MB; {place}; this "
                  f"machine reads {bandwidth / 1e9:.0f} GB/s and multiplies bfloat16 at "
                  f"{flops / 1e9:.0f} GFLOP/s")
    workers = [Worker(name, make, arguments, settings.threads)
               for name, (make, arguments) in contestants(files).items() if settings.only in name]
    workers = [worker for worker in workers if worker.loads()]
    calls = [(batch, PROMPT, tokens) for batch in BATCHES for tokens in (1, settings.new_tokens)]
    calls.append((1, LONG_PROMPT, 1))
    best: dict = {}
    for round_number in range(settings.rounds + 1):
        for call in calls:
            for worker in workers:
                seconds = worker.seconds(*call)
                if seconds is not None and round_number:  # the first round warms up
                    key = (worker.name, call)
                    best[key] = min(best.get(key, seconds), seconds)
    for worker in workers:
        if worker.crashed:
            print(f"{worker.name} crashed and is left out")
    workers = [worker for worker in workers if not worker.crashed]
    table = Table("", *(f"{b} at once" for b in BATCHES), f"reading {LONG_PROMPT}", "GB/s at 1",
                  f"GFLOP/s at {BATCHES[-1]}", "GFLOP/s reading", "MiB",
                  title="tokens a second: writing after 64, and reading")
    results: dict = {"decode": {}, "end to end": {}, "prefill": {}}
    for worker in workers:
        rates = {}
        for batch in BATCHES:
            whole = best.get((worker.name, (batch, PROMPT, settings.new_tokens)))
            if whole is not None:
                rest = whole - best[worker.name, (batch, PROMPT, 1)]
                rates[batch] = batch * (settings.new_tokens - 1) / rest
                results["end to end"].setdefault(worker.name, {})[batch] = (
                    batch * settings.new_tokens / whole)
        reading = LONG_PROMPT / best[worker.name, (1, LONG_PROMPT, 1)]
        results["decode"][worker.name], results["prefill"][worker.name] = rates, reading
        size = weights if "bf16" in worker.name or "KV" in worker.name else None
        table.add_row(
            worker.name, *(f"{rates[b]:,.0f}" if b in rates else "-" for b in BATCHES),
            f"{reading:,.0f}", f"{rates[1] * size / 1e9:.0f}" if size else "-",
            f"{rates[BATCHES[-1]] * weights / 1e9:.0f}" if BATCHES[-1] in rates else "-",
            f"{reading * weights / 1e9:.0f}", f"{worker.memory / 2**20:,.0f}")
    for worker in workers:
        worker.close()
    console.print(table)
    if settings.server:
        table = Table("clients", "tokens/s", "first piece: median ms", "slowest ms", "MiB",
                      title="api_server, bf16, streaming")
        with api_server(files["bf16"]) as (url, process):
            results["server"] = asyncio.run(measure_server(url, process, settings, table))
        console.print(table)
        of_engine = results["end to end"].get("engine bf16", {})
        for clients in BATCHES:
            if clients in of_engine:
                share = results["server"][clients] / of_engine[clients]
                console.print(f"{clients} clients: {share:.0%} of the engine's own throughput")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
