"""`torch.cuda` for modules that use it without asking whether there is one.

The engine orders its work with streams and events. A CPU does things in the order they are called,
so there is nothing to wait for, and every method here may do nothing. Only the modules that
device.py names see this object, as their own `torch`; for all others torch is as it was.
"""
import contextlib
import types

import psutil
import torch

# The engine takes a share of the free memory for its KV cache, meant for a GPU that does nothing
# else. Of a computer's memory it is offered this much: 1 GiB holds 260,000 tokens of the 26m model.
CACHE_BUDGET = 1 << 30


class Event:
    """A point in a stream; always reached."""

    def __init__(self, *args, **kwargs): ...

    def record(self, *args) -> None: ...

    def wait(self, *args) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Stream(Event):
    """A queue of work; always empty."""

    def wait_event(self, event: Event) -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


def memory(device: object = None) -> tuple[int, int]:
    """(free, total) bytes of which the engine may take a share for its cache."""
    machine = psutil.virtual_memory()
    return min(machine.available, CACHE_BUDGET), machine.total


class Cuda(types.ModuleType):
    """What the engine calls of `torch.cuda`. Anything else raises an AttributeError that names it,
    which is better than a silent wrong answer."""

    Event, Stream = Event, Stream
    mem_get_info = staticmethod(memory)

    def __init__(self):
        super().__init__("torch.cuda")
        self.default_stream = Stream()

    def current_stream(self, device: object = None) -> Stream:
        return self.default_stream

    def stream(self, stream: Stream) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def current_device(self) -> str:
        return "cpu"

    def is_available(self) -> bool:
        return False

    def is_bf16_supported(self) -> bool:
        return True  # the processor's own instructions or not, torch computes in it

    def synchronize(self, device: object = None) -> None: ...

    def empty_cache(self) -> None: ...

    def max_memory_allocated(self, device: object = None) -> int:
        return 0


class Torch(types.ModuleType):
    """torch with another `cuda`."""

    def __init__(self):
        super().__init__("torch")
        self.cuda = Cuda()

    def __getattr__(self, name: str):
        value = getattr(torch, name)
        setattr(self, name, value)  # the next time it is found without this function
        return value
