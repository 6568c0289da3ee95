"""The pictures of a measured task: calibration, score by strength, numbers against numbers.

Decides what each picture shows and how large it is. How SVG becomes part of a page is `plots.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ratoon.report.plots import INKS, Floats, number_label, on_ground, picture
from ratoon.report.task_records import CurvePoint

SQUARE = (440, 320)
SMALL = (300, 170)
MOST_DOTS = 1500
"""Dots of the picture of numbers; of more records an even choice is drawn."""
TRAIN, HELD, SOFT, FAINT, PAPER = (INKS[name] for name in ("train", "held-out", "ink-soft", "faint", "paper"))


def calibration(bins: Sequence[dict[str, Any]]) -> str:
    """Accuracy by confidence, a point for each bin that holds a record (its area grows with the number of records),
    and the diagonal on which they would lie if the model were as right as it is sure."""
    held = [one for one in bins if one["n"]]
    sizes = np.sqrt(np.array([one["n"] for one in held], dtype=np.float64))
    x, y = (np.array([one[key] for one in held], dtype=np.float64) for key in ("confidence", "accuracy"))

    def paint(axes: Any) -> None:
        _plain(axes)
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.0, dashes=(4, 4), zorder=1)
        for low, high in zip(x, y, strict=True):
            axes.plot([low, low], [low, high], color=HELD, linewidth=2.2, alpha=0.5, zorder=2, solid_capstyle="butt")
        axes.plot(x, y, color=TRAIN, linewidth=1.6, zorder=3, clip_on=False)
        axes.scatter(
            x, y, s=18 + 200 * (sizes / sizes.max()) ** 2, color=TRAIN, edgecolors=PAPER, zorder=4, clip_on=False
        )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)

    return picture(*SQUARE, paint, key="calibration", room=(38, 16, 26, 16))


def numbers(expected: Floats, answered: Floats) -> str:
    """Answered by expected numbers, a dot for each record, and the line on which both are equal."""
    step = max(1, -(-len(expected) // MOST_DOTS))
    x, y = expected[::step], answered[::step]
    low = float(min(expected.min(), answered.min()))
    high = float(max(expected.max(), answered.max()))
    room = 0.04 * (high - low) or 1.0

    def paint(axes: Any) -> None:
        _plain(axes)
        axes.plot([low, high], [low, high], color=SOFT, linewidth=1.0, dashes=(4, 4), zorder=1)
        axes.scatter(x, y, s=20, color=TRAIN, alpha=0.35, linewidths=0, zorder=3)
        axes.set_xlim(low - room, high + room)
        axes.set_ylim(low - room, high + room)

    return picture(*SQUARE, paint, key="numbers", room=(44, 16, 26, 16))


def limits(points: Sequence[CurvePoint]) -> tuple[float, float]:
    """The lowest and highest place that points with their intervals take up."""
    places = [end for one in points for end in (one.value, *(one.interval or ())) if end is not None]
    low, high = min(places, default=0.0), max(places, default=1.0)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 0.05
    return low - room, high + room


def strength(points: Sequence[CurvePoint], between: tuple[float, float], key: str) -> str:
    """The score of one perturbation by its strength, its interval as a band; `between`: the y axis, the same for all
    perturbations of a page. `key` is the beginning of the picture's ids."""
    there = [one for one in points if one.value is not None]
    x = np.array([one.strength for one in there], dtype=np.float64)
    y = np.array([one.value for one in there], dtype=np.float64)

    def paint(axes: Any) -> None:
        _plain(axes, wide=SMALL[0])
        if len(y):
            axes.axhline(y[0], color=SOFT, linewidth=1.0, dashes=(4, 4), zorder=1)
        banded = [one for one in there if one.interval is not None]
        if len(banded) > 1:
            lows, highs = zip(*(one.interval for one in banded if one.interval is not None), strict=True)
            axes.fill_between([one.strength for one in banded], lows, highs, color=TRAIN, alpha=0.16, linewidth=0)
        axes.plot(x, y, color=TRAIN, linewidth=2.0, zorder=3, clip_on=False)
        axes.plot(
            x, y, "o", color=TRAIN, markersize=6, markeredgecolor=PAPER, markeredgewidth=1.2, zorder=4, clip_on=False
        )
        axes.set_xlim(0, max(float(x.max(initial=0.0)), 0.05))
        axes.set_ylim(*between)

    return picture(*SMALL, paint, key=key, room=(42, 14, 24, 10))


def _plain(axes: Any, wide: int = SQUARE[0]) -> None:
    """The look of all pictures, with few ticks."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    on_ground(axes, pad=6)
    for axis, ticks in ((axes.xaxis, max(3, wide // 80)), (axes.yaxis, 5)):
        axis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(number_label))
