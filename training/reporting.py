"""What a run tells its user: log lines, a progress bar, TensorBoard events, a loss curve."""

import json
import math
import sys
from pathlib import Path

from tqdm import tqdm

from training.files import atomic_write


class Reporter:
    """Collects a run's figures and shows them; silent on all processes but the main one.

    The history (lists of (step, value)) is part of the resume state, so that the curve of a resumed
    run is whole.
    """

    def __init__(self, stage: str, out_dir: Path, settings, is_main: bool):
        self.stage, self.out_dir, self.is_main = stage, out_dir, is_main
        self.history: dict[str, list] = {"loss": [], "heldout": []}
        self.bar: tqdm | None = None
        self.events = self.swanlab = None
        if not is_main:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

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
        self.history[name].append([step, value])
        if self.events is not None:
            for key, number in {name: value, **others}.items():
                self.events.add_scalar(key, number, step)
        if self.swanlab is not None:
            self.swanlab.log({name: value, **others}, step=step)

    def draw(self) -> None:
        """Write `loss_{stage}.png` and the points it shows, `loss_{stage}.json`."""
        if not self.is_main or not self.history["loss"]:
            return
        with atomic_write(self.out_dir / f"loss_{self.stage}.json", "w") as file:
            json.dump(self.history, file)
        draw_curve(self.history, self.stage, self.out_dir / f"loss_{self.stage}.png")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
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
