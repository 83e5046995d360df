"""The threads that torch computes with on a CPU.

OpenMP gives every thread that starts a computation a team of its own, and keeps the team for the
next one. Once a process holds more of such threads than the machine has cores, OpenMP's own wait no
longer waits awake: after each operator its threads fall asleep, and waking them takes longer than
an operator. LMDeploy loads the model in one thread and computes in another, which made a step of
decoding four times as slow.
"""
import ctypes
from pathlib import Path

import torch

HARD = 2  # omp_pause_hard: keep nothing


def release_team() -> None:
    """End the threads that OpenMP keeps for the calling one; it gets new ones when it computes
    again (0.1 ms). OpenMP 5.0, section 3.2.43; does nothing where torch is built without OpenMP."""
    pause = openmp_pause()
    if pause is not None:
        pause(HARD)


def openmp_pause():
    """OpenMP's `omp_pause_resource_all` as torch has it, or None."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(library)).omp_pause_resource_all
    except (OSError, AttributeError):
        return None
