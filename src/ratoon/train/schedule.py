"""The learning rate's course, as a share of its peak."""

from __future__ import annotations

import math

from ratoon.train.settings import TrainSettings


def share(step: int, progress: float, settings: TrainSettings) -> float:
    """Share of the peak learning rate for the update number `step` (from 0).

    `progress` is how far the run is, 0 to 1: steps done over all steps, or minutes spent over the budget. Linear
    warm-up by steps; then cosine to `final_fraction`, or level with a linear decay over the last `decay_fraction`.
    """
    warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    floor, left = settings.final_fraction, max(0.0, 1.0 - progress)
    if settings.schedule == "cosine":
        return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    if settings.schedule == "wsd":
        return warm * (floor + (1 - floor) * min(1.0, left / settings.decay_fraction))
    return warm
