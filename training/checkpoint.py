"""Saving without stopping, and never losing the last good copy.

Two files per stage: `pretrain_512.pth`, the weights that the next stage and the chat read, and
`pretrain_512.resume.pth`, all that continuing needs (float32 masters, momenta, random state,
position in the data). The state is copied in memory, which takes milliseconds, and a thread writes
the copy to a temporary file, flushes it and renames it.

The resume state is written first. A kill between the two leaves the weights of an earlier save
beside it: whole, and made new by the next save of the run that continues.
"""

import copy
import os
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

import torch

from model.loading import read_checkpoint
from training.files import atomic_write

RESUME_FORMAT = 1  # of the resume state; to be raised when an entry changes its meaning
RESUME_ENTRIES = {
    "stage": str,
    "fingerprint": dict,
    "step": int,
    "elapsed": (int, float),
    "finished": bool,
    "optimizer": dict,
    "random": torch.Tensor,
    "history": dict,
}


class SaveError(RuntimeError):
    """A save did not reach the disk; what was saved before it is intact."""


def snapshot(value, earlier=None):
    """A copy of nested dicts, lists and tensors, on the CPU, that later updates do not touch.

    The tensors of an `earlier` snapshot of the same shapes are written over: memory that is there
    is filled several times as fast as new memory.
    """
    if isinstance(value, torch.Tensor):
        if not isinstance(earlier, torch.Tensor) or (earlier.shape, earlier.dtype) != (
            value.shape,
            value.dtype,
        ):
            earlier = torch.empty(
                value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda
            )
        return earlier.copy_(value.detach())
    if isinstance(value, dict):
        known = earlier if isinstance(earlier, dict) else {}
        return {key: snapshot(item, known.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        known = earlier if isinstance(earlier, (list, tuple)) else ()
        return type(value)(
            snapshot(item, before)
            for item, before in zip(value, [*known, *[None] * len(value)])
        )
    return copy.copy(value)


def model_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict to save: the head is tied to the embeddings and is left out."""
    return {name: x for name, x in model.state_dict().items() if name != "output.weight"}


class Saver:
    """Writes snapshots in the background, one at a time."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._failed: tuple[Path, Exception] | None = None
        self._copies: dict[Path, dict] = {}  # the last snapshot, for its memory

    def save(self, files: dict[Path, dict]) -> None:
        """Start writing each `path: state`, after the save before it has ended.

        Raises:
            SaveError: the save before this one failed.
        """
        self.wait()
        self._copies = snapshot(files, self._copies)
        self._thread = threading.Thread(target=self._write, args=(self._copies,), name="saver")
        self._thread.start()

    def _write(self, files: dict[Path, dict]) -> None:
        for path, state in files.items():
            try:
                with atomic_write(path) as file:
                    torch.save(state, file)
            except Exception as error:  # whatever it is, the training's own thread raises it
                self._failed = path, error
                return

    def wait(self) -> None:
        """Return once nothing is being written.

        Raises:
            SaveError: the last save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise SaveError if the last save has failed by now."""
        if self._failed is None:
            return
        (path, error), self._failed = self._failed, None
        # torch hides what the system said behind an error of its own.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = (getattr(cause, "strerror", None) or str(cause)).splitlines()[0]
        raise SaveError(
            f"{path} could not be written: {reason}. What was saved before it is intact: make "
            "room on the disk, then continue with --resume (without, if nothing was saved yet)"
        ) from error


def keep_previous(path: Path) -> Path | None:
    """Before a new run writes over an earlier one's file, keep that one as `*.previous.pth`.

    Returns where it is kept; None if there is none.
    """
    if not path.exists():
        return None
    previous = path.with_suffix(".previous.pth")
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)  # the save renames over `path`; this name keeps the old file
    except OSError:  # a file system without hard links
        with path.open("rb") as source, atomic_write(previous) as copied:
            shutil.copyfileobj(source, copied)
    return previous


def read_resume_state(path: Path, stage: str, content: BinaryIO | None = None) -> dict:
    """The resume state at `path`, every entry there and of its type; nothing is used before that.

    `content` is what is in the file, if another machine has it.

    Raises:
        ValueError: there is none, it is damaged, or another stage or version wrote it.
    """
    if content is None and not path.exists():
        others = sorted(path.parent.glob(f"{stage}_*.resume.pth"))
        other = f" (or choose the --preset of {others[0]})" if others else ""
        raise ValueError(f"{path} does not exist: start the run without --resume{other}")
    state = read_checkpoint(path, content)
    if "optimizer" not in state or "stage" not in state:
        raise ValueError(f"{path} is no resume state; weights alone cannot be continued")
    if state["stage"] != stage:
        raise ValueError(f"{path} is a resume state of the {state['stage']} stage, not of {stage}")
    if state.get("format") != RESUME_FORMAT:
        raise ValueError(
            f"{path} was written by another version of this code (format {state.get('format')}, "
            f"this one reads {RESUME_FORMAT}): continue with that version, or start anew without "
            "--resume"
        )
    for name, kind in RESUME_ENTRIES.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path} is damaged: its entry {name!r} is missing or of another type")
    fault = difference(state["random"], torch.get_rng_state(), "random")
    for name in ("loss", "heldout"):
        curve = state["history"].get(name)
        if not isinstance(curve, torch.Tensor) or curve.shape[1:] != (2,):
            fault = f"history.{name} is no curve"
    if fault or state["step"] < 0:
        raise ValueError(f"{path} is damaged: {fault or 'a negative step'}")
    return state


def difference(saved, expected, name: str = "") -> str | None:
    """How `saved` is built otherwise than `expected`, or that it is not finite; None if sound.

    Types, keys, lengths, shapes and dtypes are compared; values are not.
    """
    if not isinstance(saved, type(expected)):
        return f"{name} is a {type(saved).__name__}, not a {type(expected).__name__}"
    if isinstance(expected, torch.Tensor):
        if saved.shape != expected.shape or saved.dtype != expected.dtype:
            return (
                f"{name} is {list(saved.shape)} of {saved.dtype}, "
                f"not {list(expected.shape)} of {expected.dtype}"
            )
        if saved.is_floating_point() and not bool(saved.isfinite().all()):
            return f"{name} holds NaN or infinity"
    elif isinstance(expected, dict):
        if saved.keys() != expected.keys():
            return f"{name} has other entries than {', '.join(map(str, expected))}"
        pairs = [(saved[key], expected[key], f"{name}.{key}".lstrip(".")) for key in expected]
        return next(filter(None, (difference(*pair) for pair in pairs)), None)
    elif isinstance(expected, (list, tuple)):
        if len(saved) != len(expected):
            return f"{name} has {len(saved)} entries, not {len(expected)}"
        pairs = [(*pair, f"{name}[{i}]") for i, pair in enumerate(zip(saved, expected))]
        return next(filter(None, (difference(*pair) for pair in pairs)), None)
    return None


def changes(saved: dict, ours: dict) -> list[str]:
    """What differs between two fingerprints (`Trainer.fingerprint`), in a user's words."""
    found = [
        f"{key} was {saved.get(key)!r} and is {ours[key]!r}"
        for key in ours
        if key not in ("data", "data_path", "tokenizer") and ours[key] != saved.get(key)
    ]
    if saved.get("data") != ours["data"]:
        path, now = saved.get("data_path"), ours["data_path"]
        found.append(
            f"the content of {now} has changed" if path == now else f"data was {path} and is {now}"
        )
    if saved.get("tokenizer") != ours["tokenizer"]:
        found.append("the tokenizer has changed since")
    return found
