"""YuanMeng in LMDeploy: everything is registered from outside, at run time.

`import patches` changes nothing. `patches.register()` makes LMDeploy know the model (model.py,
network.py), how to quantize it (quantization.py), commands that suit both (command_line.py), a
server that nobody's request can stop (serving.py and its helpers) and, on a machine without a GPU,
a device named "cpu" (device.py, cpu_backend.py, cpu_linear.py, cuda_stand_in.py). No file of
LMDeploy is edited, so that it can be upgraded or reinstalled at any time. `python -m
patches.doctor` tells what is registered.
"""
from functools import cache

from .upstream import SUPPORTED, Patch, UpstreamChanged

__all__ = ["SUPPORTED", "Patch", "UpstreamChanged", "default_device", "register"]


@cache
def register() -> tuple[Patch, ...]:
    """Replace what LMDeploy lacks, once; later calls return the same list.

    All symbols are looked at before the first is replaced, so that a LMDeploy in which one of
    them has changed stays as it was.

    Raises:
        UpstreamChanged: LMDeploy is missing, or a symbol is not what the patch was written for.
    """
    from . import command_line, device, model, quantization, serving

    patches = [*model.patches(), *quantization.patches(), *command_line.patches(),
               *serving.patches()]
    if default_device() == "cpu":
        patches += device.patches()
    for patch in patches:
        patch.apply()
    return tuple(patches)


def default_device() -> str:
    """The device that LMDeploy's engine uses here: "cuda" if there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
