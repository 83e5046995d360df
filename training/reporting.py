"""What a run tells its user: log lines, a progress bar, TensorBoard events, a loss curve."""

import json
import math
import sys
from array import array
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training.files import atomic_write


class Reporter:
    """Collects a run's figures and shows them; silent on all processes but the main one.

    The history is part of the resume state, so that the curve of a resumed run is whole. It is a
    flat array per curve (step, value, step, value, …): 16 bytes a step, copied at once by a save.

    What it writes is for the eyes: if the disk is full it says so, and the training goes on.
    """

    def __init__(self, stage: str, out_dir: Path, settings, is_main: bool):
        self.stage, self.out_dir, self.is_main = stage, out_dir, is_main
        self.history = {"loss": array("d"), "heldout": array("d")}
        self.bar: tqdm | None = None
        self.events = self.swanlab = None
        if not is_main:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with self._spared("TensorBoard's events"):
                self.events = SummaryWriter(out_dir / "tensorboard" / stage)
        if settings.swanlab:
            import swanlab

            swanlab.init(project="YuanMeng", experiment_name=stage, config=vars(settings))
            self.swanlab = swanlab

    def say(self, line: str) -> None:
        """One line on standard output, above the progress bar."""
        if self.is_main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def show_progress(self, step: int, total: int) -> None:
        """Draw the bar, on a terminal only."""
        if not self.is_main:
            return
        if self.bar is None:
            self.bar = tqdm(
                unit="step", dynamic_ncols=True, disable=None, initial=step, leave=False
            )
        self.bar.total = total
        self.bar.n = step
        self.bar.update(0)

    def record(self, name: str, step: int, value: float, **others: float) -> None:
        """Keep a point of the curve and send it, with `others`, to the dashboards."""
        self.history[name].extend((step, value))
        events, self.events = self.events, None
        with self._spared("TensorBoard's events"):
            for key, number in {name: value, **others}.items():
                if events is not None:
                    events.add_scalar(key, number, step)
            self.events = events  # still here: it goes on
        if self.swanlab is not None:
            self.swanlab.log({name: value, **others}, step=step)

    def draw(self) -> None:
        """Write `loss_{stage}.png` and the points it shows, `loss_{stage}.json`."""
        if not self.is_main or not self.history["loss"]:
            return
        points = {name: self.points(name) for name in self.history}
        with self._spared("The loss curve"):
            with atomic_write(self.out_dir / f"loss_{self.stage}.json", "w") as file:
                json.dump(points, file)
            draw_curve(points, self.stage, self.out_dir / f"loss_{self.stage}.png")

    def points(self, name: str) -> list[tuple[int, float]]:
        """A curve as (step, value) pairs."""
        flat = self.history[name].tolist()
        return [(int(step), value) for step, value in zip(flat[::2], flat[1::2], strict=True)]

    def history_tensors(self, more_losses: list[list]) -> dict[str, torch.Tensor]:
        """The history and [step, loss] pairs not yet recorded: float64 tensors [n, 2]."""
        curves = {
            name: torch.from_numpy(np.array(flat)).view(-1, 2)
            for name, flat in self.history.items()
        }
        more = torch.tensor(more_losses, dtype=torch.float64).view(-1, 2)
        return {**curves, "loss": torch.cat([curves["loss"], more])}

    def load_history(self, curves: dict[str, torch.Tensor]) -> None:
        """Continue the curves of `history_tensors`."""
        self.history = {name: array("d", x.flatten().tolist()) for name, x in curves.items()}

    @contextmanager
    def _spared(self, what: str):
        """Say that `what` could not be written, instead of ending a training for it."""
        try:
            yield
        except OSError as error:
            self.say(f"{what} could not be written ({error}); the training is not affected.")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        with self._spared("TensorBoard's events"):
            if self.events is not None:
                self.events.close()
        if self.swanlab is not None:
            self.swanlab.finish()


def draw_curve(history: dict[str, list], stage: str, path: Path) -> None:
    """Training loss (nats per token) and held-out bits per byte over the steps, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*history["loss"], strict=True)
    axes.plot(steps, losses, color="#9aa5b1", linewidth=0.8, label="training loss")
    smooth, average = [], losses[0]
    for loss in losses:
        average = 0.9 * average + 0.1 * loss
        smooth.append(average)
    axes.plot(steps, smooth, color="#1f77b4", linewidth=1.8, label="smoothed")
    axes.set(title=f"YuanMeng {stage}", xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    points = [point for point in history["heldout"] if math.isfinite(point[1])]
    if points:
        right = axes.twinx()
        right.plot(
            *zip(*points, strict=True), "o-", color="#d62728", label="held-out bits per byte"
        )
        right.set_ylabel("bits per byte")
        more_handles, more_labels = right.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    axes.legend(handles, labels, loc="upper right")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
