"""Saving without stopping, and never losing the last good copy.

Two files per stage: `pretrain_512.pth`, the weights that the next stage and the chat read, and
`pretrain_512.resume.pth`, all that continuing needs (float32 masters, momenta, random state,
position in the data). The state is copied in memory, which takes milliseconds, and a thread writes
the copy to a temporary file, flushes it and renames it.
"""

import copy
import os
import shutil
import threading
from pathlib import Path

import torch

from training.files import atomic_write


class SaveError(RuntimeError):
    """A save did not reach the disk; what was saved before it is intact."""


def snapshot(value):
    """A copy of nested dicts, lists and tensors, on the CPU, that later updates do not touch."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(item) for item in value)
    return copy.copy(value)


def model_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict to save: the head is tied to the embeddings and is left out."""
    return {name: x for name, x in model.state_dict().items() if name != "output.weight"}


class Saver:
    """Writes snapshots in the background, one at a time."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, files: dict[Path, dict]) -> None:
        """Start writing each `path: state`, after the save before it has ended.

        Raises:
            SaveError: the save before this one failed.
        """
        self.wait()
        copies = {path: snapshot(state) for path, state in files.items()}
        self._thread = threading.Thread(target=self._write, args=(copies,), name="saver")
        self._thread.start()

    def _write(self, files: dict[Path, dict]) -> None:
        try:
            for path, state in files.items():
                with atomic_write(path) as file:
                    torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            self._error = error

    def wait(self) -> None:
        """Return once nothing is being written.

        Raises:
            SaveError: the last save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise SaveError(
                f"the checkpoint could not be written ({error}); the last good one is kept"
            )


def keep_previous(path: Path) -> None:
    """Before a new run writes over an earlier one's weights, keep those as `*.previous.pth`."""
    if path.exists():
        previous = path.with_suffix(".previous.pth")
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)  # the save renames over `path`; this name keeps the old file
        except OSError:  # a file system without hard links
            shutil.copy2(path, previous)
