"""The learning rate over a run, as a factor of its peak; `progress` runs from 0 to 1."""

import math

WARMUP_STEPS = 20  # by default, but at most a tenth of the run


def trapezoid(progress: float, step: int, warmup_steps: int, decay_share: float) -> float:
    """Rise over the first steps, stay at 1, and fall in a line to 0 over the last `decay_share`.

    Unlike a cosine it needs no length to start with, so that a run can be given a time budget.
    """
    rise = min(1.0, (step + 1) / max(1, warmup_steps))
    fall = min(1.0, (1.0 - progress) / decay_share)
    return rise * max(0.0, fall)


def reference_cosine(progress: float) -> float:
    """The specification's `lr/10 + 0.5·lr·(1 + cos)`: from 1.1 at the start to 0.1 at the end."""
    return 0.1 + 0.5 * (1.0 + math.cos(math.pi * progress))
