"""Machine code for a function of tensors, built once for this machine and kept on disk.

`torch.compile` traces a function anew in every process, which takes seconds. Ahead of time
(AOTInductor), the same compiler writes a package that the next process only has to load.
"""
import hashlib
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

CACHE = Path(__file__).resolve().parents[1] / ".compile-cache"
FOLDER = CACHE / "packages"
KEPT = 32  # packages of about 3 MB; those not used for the longest time go

# Takes all tensors as one flat list and returns the list of results.
FlatFunction = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class Kernels(NamedTuple):
    """Operators of one's own in C++. The text defines for each a function `aoti_torch_cpu_NAME`,
    which takes its arguments as torch's C interface has them (shim.h)."""

    operators: tuple[torch._ops.OpOverload, ...] = ()
    text: str = ""


class _Flat(torch.nn.Module):
    """A function as AOTInductor wants it: a module, called with one flat list."""

    def __init__(self, function: Callable, spec: pytree.TreeSpec):
        super().__init__()
        self.function, self.spec = function, spec

    def forward(self, tensors: list[torch.Tensor]):
        return self.function(*pytree.tree_unflatten(tensors, self.spec))


def compiled(
    function: Callable,
    arguments: Sequence[Any],
    dynamic: Sequence[dict[int, Any] | None],
    *,
    name: str,
    key: str,
    sources: Iterable[str | Path],
    kernels: Kernels = Kernels(),
    say: Callable[[str], None],
) -> FlatFunction | None:
    """Machine code for `function`, from the folder of packages, or else built now.

    Args:
        arguments: examples of them, nested lists and tuples of tensors on the CPU.
        dynamic: for each argument, what of its tensors' shapes may differ from the example:
            `{dimension: torch.export.Dim}`, or None.
        name: what the package is called, beside a hash of all that it depends on: arguments,
            torch, processor, number of threads, the files in `sources`, `kernels`, and `key` for
            the rest.
        kernels: become a part of the machine code.
        say: tells the user that a build has begun, or that none is possible and why.

    Returns:
        A function of the flat list `pytree.tree_leaves(arguments)`, or None if it cannot be built.
        It must be called under `torch.no_grad()` or `torch.inference_mode()`.
    """
    path = FOLDER / f"{name}-{_digest(arguments, dynamic, key, sources, kernels)}.pt2"
    if not path.is_file():
        say(f"building {name} for this processor: once, about half a minute")
        try:
            _build(function, arguments, dynamic, kernels, path)
        except UnicodeDecodeError:  # torch reads its own files in the locale's encoding
            say(f"{name} cannot be built under this locale, so the slower way is taken: set "
                "PYTHONUTF8=1")
            return None
        except (RuntimeError, OSError) as error:  # no C++ compiler, above all
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            say(f"{name} could not be built, so the slower way is taken: {reason}")
            return None
    os.utime(path)
    return torch._inductor.aoti_load_package(str(path)).loader.run


def _leaf_shapes(arguments: Sequence[Any], dynamic: Sequence[dict[int, Any] | None]) -> list:
    """Of each tensor in the arguments, what of its shape may change."""
    return [
        shape
        for argument, shape in zip(arguments, dynamic, strict=True)
        for _ in pytree.tree_leaves(argument)
    ]


def _digest(
    arguments: Sequence[Any],
    dynamic: Sequence[dict[int, Any] | None],
    key: str,
    sources: Iterable[str | Path],
    kernels: Kernels,
) -> str:
    """A name for all that the machine code depends on."""
    shapes = [
        (str(leaf.dtype), [str((free or {}).get(i, n)) for i, n in enumerate(leaf.shape)])
        for leaf, free in zip(pytree.tree_leaves(tuple(arguments)),
                              _leaf_shapes(arguments, dynamic), strict=True)
    ]
    digest = hashlib.sha256()
    parts = [
        key,
        str(shapes),
        kernels.text,
        torch.__version__, str(torch.get_num_threads()),
        platform.machine(), torch.backends.cpu.get_cpu_capability(), _processor_flags(),
    ]
    for part in parts:
        digest.update(part.encode() + b"\0")
    for source in sources:
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:16]


def _processor_flags() -> str:
    """What the processor can do: code is built for just that."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(
    function: Callable,
    arguments: Sequence[Any],
    dynamic: Sequence[dict[int, Any] | None],
    kernels: Kernels,
    path: Path,
) -> None:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
    leaves, spec = pytree.tree_flatten(tuple(arguments))
    shapes = _leaf_shapes(arguments, dynamic)
    # torch writes what is listed here behind `extern`, in an `extern "C"` block: once, the text.
    text = [f'"C++" {{\n{kernels.text}\n}}']
    shims = {operator: [] if i else text for i, operator in enumerate(kernels.operators)}
    FOLDER.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings(), \
            tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        # torch warns of its own use of a class that it will remove.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        exported = torch.export.export(_Flat(function, spec), (leaves,), dynamic_shapes=(shapes,))
        package = Path(folder) / path.name
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(package),
            inductor_configs={
                # Each index checked in each loop would cost a tenth of the time; callers make them.
                "assert_indirect_indexing": False,
                "aot_inductor.custom_ops_to_c_shims": shims,
            })
        with open(package, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(package, path)
    packages = sorted(FOLDER.glob("*.pt2"), key=lambda package: package.stat().st_mtime)
    for package in packages[:-KEPT]:
        package.unlink(missing_ok=True)
