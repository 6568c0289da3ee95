"""The learning rate's course, as a share of its peak."""

from __future__ import annotations

import math

from ratoon.train.settings import TrainSettings


def share(step: int, steps: int | None, settings: TrainSettings) -> float:
    """Share of the peak learning rate for the update number `step` (from 0) of `steps`.

    Linear warm-up, then as `schedule` says; the last update is the one before `final_fraction` would be reached.
    `steps` None (a time budget that is still being measured): level after the warm-up.
    """
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant" or steps is None:
        return 1.0
    floor = settings.final_fraction
    if settings.schedule == "cosine":
        done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay = max(1, round(steps * settings.decay_fraction))
    left = max(0, steps - step)
    return 1.0 if left > decay else floor + (1 - floor) * left / decay
