"""The picture of runs side by side: score with its interval by trained parameters, names beside the points.

Decides where each name stands: near its point, over no other name or point, and over as few intervals as can be. How
SVG becomes part of a page is `plots.py`'s.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ratoon.report.compare_records import Lane
from ratoon.report.plots import INKS, number_label, on_ground, picture

WIDE, NARROW = (1000, 400), (345, 460)
ROOM = (48, 24, 30, 18)
"""Left, right, below and above the axes, in units of the view box."""
LETTERS, NARROW_LETTERS = 26, 15
"""Of a name that stand beside its point."""
FONT, LINE = 12.0, 15.0
"""Size of the names and height of their line, in units of the view box."""
DOT, APART = 6.0, 14.0
"""Radius of a point, and how far apart points of one size stand."""
ROUNDS = 6
"""Times that every name looks for a better place, the others standing."""
TRAIN, HELD, SOFT, FAINT, PAPER = (INKS[name] for name in ("train", "held-out", "ink-soft", "faint", "paper"))


@dataclass(frozen=True)
class _Box:
    """A rectangle in units of the view box, y upwards."""

    left: float
    right: float
    low: float
    high: float

    def overlap(self, other: _Box) -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.high, other.high) - max(self.low, other.low)
        return wide * high if wide > 0 and high > 0 else 0.0


@dataclass(frozen=True)
class _Place:
    """Where a name may stand: its box, the middle of it less its point, and how far from the point it is."""

    box: _Box
    dx: float
    dy: float
    reach: float


def by_parameters(lanes: Sequence[Lane], *, wide: bool) -> str:
    """Score of each line that has one, by its trained parameters (logarithmic); the best one, the first, in the second
    ink. Empty where there is none."""
    drawn = [lane for lane in lanes if lane.score.value is not None and lane.trainable_parameters]
    if not drawn:
        return ""
    width, height = WIDE if wide else NARROW
    x = [float(lane.trainable_parameters or 1) for lane in drawn]
    y = [float(lane.score.value or 0.0) for lane in drawn]
    ends = [lane.score.interval or (value, value) for lane, value in zip(drawn, y, strict=True)]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    room = 0.06 * (high - low) or abs(high) * 0.05 or 0.05
    left, right = math.log10(min(x)) - 0.3, math.log10(max(x)) + 0.3
    inside = _Box(ROOM[0], width - ROOM[1], ROOM[2], height - ROOM[3])

    def across(value: float) -> float:
        return inside.left + (math.log10(value) - left) / (right - left) * (inside.right - inside.left)

    def up(value: float) -> float:
        return inside.low + (value - low + room) / (high - low + 2 * room) * (inside.high - inside.low)

    beside = _apart([across(one) for one in x], inside)
    points = [(at, up(value)) for at, value in zip(beside, y, strict=True)]
    x = [10 ** (left + (at - inside.left) / (inside.right - inside.left) * (right - left)) for at in beside]
    bars = [_Box(at - 2, at + 2, up(end[0]), up(end[1])) for (at, _), end in zip(points, ends, strict=True)]
    names = _names([lane.name for lane in drawn], LETTERS if wide else NARROW_LETTERS)
    places = _placed(names, points, bars, _Box(2, width - 2, 2, height - 2))

    def paint(axes: Any) -> None:
        _axes(axes, (10**left, 10**right), (low - room, high + room), width, most=1.0 if high <= 1 else None)
        for number, lane in enumerate(drawn):
            ink = TRAIN if number else HELD
            if lane.score.interval is not None:
                axes.plot([x[number]] * 2, ends[number], color=ink, linewidth=5, alpha=0.28, solid_capstyle="round")
            _name(axes, names[number], (x[number], y[number]), places[number], bold=not number)
            axes.plot(
                [x[number]], [y[number]], "o", color=ink, markersize=9, markeredgecolor=PAPER, zorder=6, clip_on=False
            )

    return picture(width, height, paint, key=f"runs-{'wide' if wide else 'narrow'}", room=ROOM)


def _apart(places: Sequence[float], inside: _Box) -> list[float]:
    """Places on the axis of which no two are nearer than a point is wide: those that are stand in a row around their
    middle, in their order."""
    rows: list[list[int]] = []
    middles: list[float] = []
    for number in sorted(range(len(places)), key=lambda number: places[number]):
        rows.append([number])
        middles.append(places[number])
        while len(rows) > 1 and middles[-1] - middles[-2] < APART * (len(rows[-1]) + len(rows[-2])) / 2:
            first, second = rows[-2:]
            rows[-2:] = [first + second]
            middles[-2:] = [(len(first) * middles[-2] + len(second) * middles[-1]) / len(rows[-1])]
    found = [0.0] * len(places)
    for row, middle in zip(rows, middles, strict=True):
        for place, number in enumerate(row):
            at = middle + APART * (place - (len(row) - 1) / 2)
            found[number] = min(max(at, inside.left), inside.right)
    return found


def _axes(
    axes: Any, across: tuple[float, float], up: tuple[float, float], width: int, *, most: float | None = None
) -> None:
    """Scales, ticks and limits; no tick of the score above `most`, which no score can pass."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    on_ground(axes)
    axes.set_xscale("log")
    decades = math.log10(across[1] / across[0])
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0), numticks=width // 60))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(*up)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if most is None or tick <= most + 1e-9]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(number_label))
    axes.set_xlim(*across)
    axes.set_ylim(*up)


def _name(axes: Any, name: str, at: tuple[float, float], place: _Place, *, bold: bool) -> None:
    """A name where it was placed, with a line to its point where it is not right beside it."""
    line = None
    if place.reach > 12:
        line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 0, "shrinkB": 5}
    axes.annotate(
        name, at, xytext=(place.dx, place.dy), textcoords="offset points", ha="center", va="center", fontsize=FONT,
        fontweight="bold" if bold else "normal", color=SOFT, arrowprops=line, zorder=7, annotation_clip=False,
        parse_math=False,
    )  # fmt: skip


# -- names -------------------------------------------------------------------------------------------------------------


def _names(names: Sequence[str], letters: int) -> list[str]:
    """The names without what they all begin with, as many letters as there is room for; what is left out is the middle:
    names of runs differ at their ends."""
    parts = [name.split("-") for name in names]
    shared = 0
    while len(parts) > 1 and all(
        len(one) > shared + 1 and one[: shared + 1] == parts[0][: shared + 1] for one in parts
    ):
        shared += 1
    found = []
    for one in parts:
        name = "-".join(one[shared:])
        keep = letters - 1
        found.append(name if len(name) <= letters else f"{name[: keep // 2]}…{name[len(name) - (keep - keep // 2) :]}")
    return found


def _width(text: str) -> float:
    """About how wide a text is, on the wide side: fonts differ."""
    return FONT * sum(1.05 if unicodedata.east_asian_width(one) in "WF" else 0.62 for one in text)


def _places(name: str, at: tuple[float, float]) -> Iterator[_Place]:
    """Where a name may stand, the best first: beside, above and below its point, then farther and farther away."""
    half, tall = _width(name) / 2, LINE / 2
    for reach in (10.0, 16.0, 24.0, 34.0, 46.0, 60.0, 78.0, 100.0, 126.0):
        for degrees in (0, 180, 90, 270, 35, 145, 325, 215, 62, 118, 298, 242):
            turn = math.radians(degrees)
            dx, dy = math.cos(turn) * (reach + half), math.sin(turn) * (reach + tall)
            middle = at[0] + dx, at[1] + dy
            box = _Box(middle[0] - half, middle[0] + half, middle[1] - tall, middle[1] + tall)
            yield _Place(box, dx, dy, reach)


def _placed(
    names: Sequence[str], points: Sequence[tuple[float, float]], bars: Sequence[_Box], inside: _Box
) -> list[_Place]:
    """A place for each name: each takes the one of least cost, the others standing, a few rounds long."""
    dots = [_Box(x - DOT, x + DOT, y - DOT, y + DOT) for x, y in points]
    found: list[_Place | None] = [None] * len(names)
    for _ in range(ROUNDS):
        before = list(found)
        for number, name in enumerate(names):
            others = [one.box for at, one in enumerate(found) if one is not None and at != number]

            def cost(place: _Place, others: list[_Box] = others, number: int = number) -> float:
                outside = place.box.overlap(place.box) - place.box.overlap(inside)
                near = _Box(place.box.left - 3, place.box.right + 3, place.box.low, place.box.high)
                hard = outside + sum(near.overlap(one) for one in [*others, *dots])
                middle = points[number][0] + place.dx, points[number][1] + place.dy
                passed = [*others, *(dot for at, dot in enumerate(dots) if at != number)]
                crossed = sum(_crosses(points[number], middle, one) for one in passed) if place.reach > 12 else 0
                soft = sum(place.box.overlap(bar) for at, bar in enumerate(bars) if at != number)
                return 100 * hard + 300 * crossed + 0.4 * soft + 0.6 * place.reach

            found[number] = min(_places(name, points[number]), key=cost)
        if before == found:
            break
    return [one for one in found if one is not None]


def _crosses(start: tuple[float, float], end: tuple[float, float], box: _Box) -> bool:
    """Whether the line from a point to its name runs over another name."""
    steps = [step / 24 for step in range(25)]
    return any(
        box.left < start[0] + share * (end[0] - start[0]) < box.right
        and box.low < start[1] + share * (end[1] - start[1]) < box.high
        for share in steps
    )
