"""LMDeploy learns a device named "cpu". One function for each symbol of the engine that stands in
the way; the work itself is in cpu_backend.py, which one of them (`backend`) hands over.

Registered only where torch finds no GPU; there, nothing of this file is used.
"""
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch

from model.loading import choose_dtype

from .cpu_threads import release_team
from .cuda_stand_in import Torch, memory
from .upstream import Patch, exchange, find, look_at, refuse

MAX_BATCH_SIZE = 32  # more sequences at once make a CPU no faster
ENGINE = "lmdeploy.pytorch.engine"


def patches() -> list[Patch]:
    """All of this file, checked and not applied."""
    stand_in = Torch()
    return [
        engine_settings(),
        batch_size(),
        bfloat16_support(),
        weight_dtype(),
        backend(),
        environment_check(),
        likeliest_token(),
        forbidden_tokens(),
        *(streams(module, stand_in) for module in MODULES_WITH_STREAMS),
        key_value_cache(),
        state_cache(),
        transfer(),
        outputs(),
        sampling_state(),
        stream_of_inputs(),
        *(profiler_mark(symbol) for symbol in MARKED),
        profiler_marks_of_agent(),
        free_memory(),
        agent(),
        warm_up_inputs(),
        engine_process(),
    ]


# ---- Settings ------------------------------------------------------------------------------------

def engine_settings() -> Patch:
    """`PytorchEngineConfig` asserts that the device is one of four and the dtype of 16 bits."""
    symbol = "lmdeploy.messages.PytorchEngineConfig.__post_init__"
    original = look_at(
        symbol,
        parameters=["self"],
        contains=["assert self.dtype in ['auto', 'float16', 'bfloat16']",
                  "assert self.device_type in ['cuda',"],
    )

    def post_init(self) -> None:
        if self.device_type != "cpu":
            return original(self)
        dtype = self.dtype
        # The other checks are the original's, made as for the device that may do everything.
        self.device_type, self.dtype = "cuda", "auto"
        try:
            original(self)
        finally:
            self.device_type, self.dtype = "cpu", dtype
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, not {dtype!r}")
        if max(self.tp, self.dp, self.ep) > 1:
            raise ValueError("the cpu device is one device: tp, dp and ep must be 1")
        if self.quant_policy not in (0, 8, 4):
            raise ValueError(
                f"quant_policy must be 0, 8 or 4 on the cpu device, not {int(self.quant_policy)}"
            )

    return exchange(symbol, "refuses the device cpu and the dtype float32", post_init)


def batch_size() -> Patch:
    """`get_max_batch_size` knows only GPUs."""
    symbol = "lmdeploy.utils.get_max_batch_size"
    original = look_at(symbol, parameters=["device_type"], contains=["assert device_type in"])

    def get_max_batch_size(device_type: str) -> int:
        return MAX_BATCH_SIZE if device_type == "cpu" else original(device_type)

    return exchange(
        symbol, "asserts that the device is a GPU", get_max_batch_size,
        also=[f"{ENGINE}.config_builder.get_max_batch_size",
              "lmdeploy.cli.serve.get_max_batch_size"],
    )


def bfloat16_support() -> Patch:
    """`is_bf16_supported` answers None for a device that it does not know."""
    symbol = "lmdeploy.utils.is_bf16_supported"
    original = look_at(symbol, parameters=["device_type"])

    def is_bf16_supported(device_type: str = "cuda") -> bool:
        return True if device_type == "cpu" else original(device_type)

    return exchange(
        symbol, "does not know the device cpu", is_bf16_supported,
        also=["lmdeploy.pytorch.config.is_bf16_supported"],
    )


def weight_dtype() -> Patch:
    """`_update_torch_dtype` turns float32 into float16, in which a CPU is slowest of all."""
    symbol = "lmdeploy.pytorch.config._update_torch_dtype"
    original = look_at(
        symbol, parameters=["config", "dtype", "device_type"],
        contains=["config.dtype = torch.float16", "config.dtype = resolved_dtype"],
    )

    def update_torch_dtype(config, dtype: str, device_type: str = "auto"):
        if device_type != "cpu":
            return original(config, dtype, device_type)
        config.dtype = choose_dtype(dtype, "cpu")
        return config

    return exchange(symbol, "knows only 16-bit weights", update_torch_dtype)


# ---- Operators -----------------------------------------------------------------------------------

def backend() -> Patch:
    """`_get_backend` chooses the operators of a device: the one hook that all layers go through."""
    symbol = "lmdeploy.pytorch.backends.selector._get_backend"
    original = look_at(symbol, parameters=[], contains=["device_mgr.current_context()"])

    def get_backend():
        from lmdeploy.pytorch.devices import get_device_manager

        if get_device_manager().current_context().device_type != "cpu":
            return original()
        from .cpu_backend import CpuBackend

        return CpuBackend

    return exchange(symbol, "has no operators for the device cpu", get_backend)


def environment_check() -> Patch:
    """`TorchChecker` tries torch on a GPU before the engine starts."""
    symbol = "lmdeploy.pytorch.check_env.torch.TorchChecker.__init__"
    original = look_at(symbol, parameters=["self", "device", "logger"])

    def init(self, device: str = "cuda", logger=None) -> None:
        original(self, device="cpu", logger=logger)

    return exchange(symbol, "makes its test tensor on a GPU", init)


def likeliest_token() -> Patch:
    """`FusedLogitsProcessor.sampling` takes `argmax`, which torch computes number by number; `max`
    uses the processor's vectors (32 x 6400 in bfloat16: 0.38 ms against 0.08)."""
    symbol = f"{ENGINE}.logits_process.FusedLogitsProcessor.sampling"
    original = look_at(symbol, parameters=["self", "logits"],
                       contains=["if sampling_inputs.max_top_k == 1:", "logits.argmax(-1)"])

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        if self.sampling_inputs.max_top_k == 1:
            return logits.max(-1).indices
        return original(self, logits)

    return exchange(symbol, "is slow at finding the likeliest token", sample)


def forbidden_tokens() -> Patch:
    """`_process_bad_words_` writes to the logits in each step, whether or not a token is forbidden:
    0.2 ms for 32 sequences. (A GPU does not wait for it, but would have to for the question.)"""
    symbol = f"{ENGINE}.logits_process._process_bad_words_"
    look_at(symbol, parameters=["scores", "bad_words", "mask", "filter_value"],
            contains=["scores.scatter_(1, valid_bad_words, filtered_scores)"])

    def forbid(scores, bad_words, mask, filter_value: float = -float("inf")) -> torch.Tensor:
        if mask.any():
            rows, places = mask.nonzero(as_tuple=True)
            scores[rows, bad_words[rows, places]] = filter_value
        return scores

    return exchange(symbol, "writes to the logits though nothing is forbidden", forbid)


# ---- Streams, memory and the literal "cuda" ------------------------------------------------------

MODULES_WITH_STREAMS = (
    f"{ENGINE}.model_agent.agent",
    f"{ENGINE}.model_agent.inputs_maker",
    f"{ENGINE}.cache_engine.engine",
    f"{ENGINE}.logits_process",
)


def streams(module: str, stand_in: Torch) -> Patch:
    """A module's own name `torch`: with it, `torch.cuda.Stream()` works without a GPU."""
    symbol = f"{module}.torch"
    if look_at(symbol) is not torch:
        raise refuse(symbol, "is not torch")
    return exchange(symbol, "makes CUDA streams and events", stand_in)


def on_cpu(device: Any) -> Any:
    """The device to use where LMDeploy names "cuda"."""
    return "cpu" if str(device).startswith("cuda") else device


def key_value_cache() -> Patch:
    """`BlockCachePlan.allocate` is called with the literal "cuda"."""
    symbol = f"{ENGINE}.cache_engine.plan.BlockCachePlan.allocate"
    original = look_at(symbol, parameters=["self", "num_logical_blocks", "device"])

    def allocate(self, num_logical_blocks: int, device):
        return original(self, num_logical_blocks, on_cpu(device))

    return exchange(symbol, 'is asked for memory on "cuda"', allocate)


def state_cache() -> Patch:
    """`_allocate_state_caches` likewise; it is called even for models that have no such state."""
    symbol = f"{ENGINE}.cache_engine.state._allocate_state_caches"
    original = look_at(symbol, parameters=["tensor_specs", "num_caches", "device"])

    def allocate(tensor_specs, num_caches: int, device):
        return original(tensor_specs, num_caches, on_cpu(device))

    return exchange(symbol, 'is asked for memory on "cuda"', allocate)


def transfer() -> Patch:
    """`_try_to_cuda` sends a step's inputs to the GPU; here most are where they are needed."""
    symbol = f"{ENGINE}.model_agent.agent._try_to_cuda"
    look_at(symbol, parameters=["val", "non_blocking"], contains=["val.to_device('cuda'"])
    _, _, sampling = find(f"{ENGINE}.logits_process.SamplingInputs")
    _, _, delta = find("lmdeploy.pytorch.model_inputs.ModelInputsDelta")
    look_at(f"{ENGINE}.logits_process.SamplingInputs.to_device",
            contains=["self.generated_ids is None and self.generated_ids_cpu is not None"])
    look_at("lmdeploy.pytorch.model_inputs.ModelInputsDelta.to_device",
            contains=["self.fill_tensors()"])

    def try_to_cpu(val, non_blocking: bool = False):
        if val is None or isinstance(val, torch.Tensor):
            return val
        if isinstance(val, sampling) and val.generated_ids_cpu is None:
            return val
        if isinstance(val, delta):
            val.fill_tensors()
            return val
        return val.to_device("cpu")

    return exchange(symbol, "copies inputs to a GPU", try_to_cpu)


def outputs() -> Patch:
    """`BatchedOutputs.to_cpu` fetches a step's outputs from the GPU."""
    symbol = f"{ENGINE}.model_agent.agent.BatchedOutputs.to_cpu"
    look_at(symbol, parameters=["self"], contains=["v = v.cpu().detach()"])
    return exchange(symbol, "copies outputs from a GPU", lambda self: self)


def sampling_state() -> Patch:
    """`SamplingInputs.get_delta` copies all its tensors, of which three are read."""
    symbol = f"{ENGINE}.logits_process.SamplingInputs.get_delta"
    look_at(symbol, parameters=["self"], contains=["setattr(delta, k, v)"])
    look_at(f"{ENGINE}.logits_process.SamplingInputs.update_delta",
            contains=["for f in fields(delta):"])
    _, _, delta = find(f"{ENGINE}.logits_process.SamplingInputsDelta")
    names = [field.name for field in dataclasses.fields(delta)]

    def get_delta(self):
        return delta(*(getattr(self, name) for name in names))

    return exchange(symbol, "copies all its fields in each step", get_delta)


def stream_of_inputs() -> Patch:
    """`_record_forward_input_stream` tells each tensor of a step which CUDA stream uses it."""
    symbol = f"{ENGINE}.model_agent.agent._record_forward_input_stream"
    look_at(symbol, parameters=["forward_inputs", "stream"], contains=["record_stream(stream)"])
    return exchange(symbol, "looks through all inputs of each step", lambda *inputs: None)


# What each step calls. A mark takes as long as the call of a small operator.
MARKED = (
    "lmdeploy.pytorch.paging.scheduler.Scheduler.schedule_running",
    f"{ENGINE}.inputs_maker.InputsMakerAsync.create_model_inputs_delta",
    f"{ENGINE}.inputs_maker.InputsMakerAsync._make_forward_inputs",
    f"{ENGINE}.engine_loop.EngineLoop._make_infer_outputs",
    f"{ENGINE}.model_agent.agent.BaseModelAgent.get_logits",
    "lmdeploy.pytorch.strategies.ar.sampling.ARSamplingStrategy.make_sampling_inputs",
    "lmdeploy.pytorch.strategies.ar.step_inputs.ARStepInputs.step_decode",
    "lmdeploy.pytorch.strategies.ar.model_agent.ARStoppingCriteria.step",
    "lmdeploy.pytorch.strategies.ar.model_agent.ARModelAgentStrategy.step_sampling_inputs",
    "lmdeploy.pytorch.model_inputs.StepContextManager.build_context",
)


def profiler_mark(symbol: str) -> Patch:
    """`@record_function` shows a function in a profile of the GPU's work. In some places
    `@torch.inference_mode()` stands outside it, and stays."""
    held = look_at(symbol)
    marked = held.__func__ if isinstance(held, staticmethod) else held
    outside = Path(marked.__code__.co_filename).name == "_contextlib.py"  # torch's, not Python's
    mark = getattr(marked, "__wrapped__", None) if outside else marked
    plain = getattr(mark, "__wrapped__", None)
    if plain is None or Path(mark.__code__.co_filename).name != "contextlib.py":
        raise refuse(symbol, "is not marked for the profiler")
    if outside:
        plain = torch.inference_mode()(plain)
    return exchange(symbol, "is marked for a profiler in each step",
                    staticmethod(plain) if isinstance(held, staticmethod) else plain)


def profiler_marks_of_agent() -> Patch:
    """`with record_function(…)` inside the agent's functions does the same."""
    symbol = f"{ENGINE}.model_agent.agent.record_function"
    if look_at(symbol) is not torch.profiler.record_function:
        raise refuse(symbol, "is not torch.profiler.record_function")
    return exchange(symbol, "marks parts of each step for a profiler", contextlib.nullcontext)


def free_memory() -> Patch:
    """`get_gpu_memory`: the KV cache is laid out to fit into what it reports as free."""
    symbol = "lmdeploy.pytorch.utils.get_gpu_memory"
    look_at(symbol, parameters=["device_id"], contains=["torch.cuda.mem_get_info"])
    return exchange(symbol, "asks a GPU for its free memory", memory,
                    also=[f"{ENGINE}.model_agent.agent.get_gpu_memory"])


def agent() -> Patch:
    """`BaseModelAgent` builds the network on the device that it notes in `self.device`."""
    symbol = f"{ENGINE}.model_agent.agent.BaseModelAgent.__init__"
    original = look_at(symbol, contains=["device = 'cuda'", "self.device = device"])

    def init(self, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        self.device = "cpu"

    return exchange(symbol, 'builds the network on "cuda"', init)


def warm_up_inputs() -> Patch:
    """`ARModelInputsStrategy.make_dummy` makes the inputs of a trial run, on "cuda"."""
    symbol = "lmdeploy.pytorch.strategies.ar.model_inputs.ARModelInputsStrategy.make_dummy"
    original = look_at(symbol, parameters=[
        "self", "batch_size", "is_decoding", "device", "dummy_block_id", "vocab_size",
        "max_q_seqlen", "meta"])

    def make_dummy(self, batch_size: int, is_decoding: bool, device="cpu", **kwargs):
        return original(self, batch_size, is_decoding, device=on_cpu(device), **kwargs)

    return exchange(symbol, 'is asked for inputs on "cuda"', make_dummy)


# ---- Processes -----------------------------------------------------------------------------------

def engine_process() -> Patch:
    """`Engine.from_pretrained`: the server wants the engine in a process of its own. That process
    imports the entry script again, and on a busy machine of few cores the two lost each other."""
    symbol = f"{ENGINE}.engine.Engine.from_pretrained"
    original = look_at(symbol, contains=["engine_config.enable_mp_engine"]).__func__

    def from_pretrained(cls, path, engine_config=None, *args, **kwargs):
        if engine_config is not None and engine_config.device_type == "cpu":
            engine_config.enable_mp_engine = False
        engine = original(cls, path, engine_config, *args, **kwargs)
        release_team()  # what loaded the model is not what computes
        return engine

    return exchange(symbol, "starts the engine in another process", classmethod(from_pretrained))
