"""Curves as SVG that lives inside a page: no words in the picture, colours and fonts from the page's style sheet.

Decides how points are thinned out and smoothed, and how an axis looks. Which curves there are is decided by
`curves.py`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BUCKETS = 300
"""Stretches of the x axis of which the lowest and the highest point are drawn: about one a pixel pair."""

INKS = {"train": "#a10001", "held-out": "#a10002", "faint": "#a10003", "ink-soft": "#a10004", "paper": "#a10005"}
"""A colour that matplotlib writes for each variable of the style sheet that takes its place."""

SPREAD_FOR_LOG = 8.0
"""A highest value so many times the median would press the rest of the curve flat: the axis is then logarithmic."""


@dataclass(frozen=True)
class Curve:
    """Points to draw: `x` ascending; `style` is `line`, `thin` (behind others) or `points` (joined by a thin line)."""

    x: Floats
    y: Floats
    ink: str = "train"
    style: str = "line"


@dataclass(frozen=True)
class Frame:
    """Size (in units of the view box) and scales of a picture; a dashed `level`, a ringed point `mark`, dotted lines at
    the places `borders` of the x axis."""

    width: int
    height: int
    log: bool = False
    from_zero: bool = False
    level: float | None = None
    mark: tuple[float, float] | None = None
    mark_text: str = ""
    borders: tuple[float, ...] = ()


def envelope(x: Floats, y: Floats, buckets: int = BUCKETS) -> tuple[Floats, Floats]:
    """At most 2 · `buckets` + 2 of the points: the first, the last, and the lowest and highest of each stretch of x.

    Every extreme of the whole survives; `x` must ascend.
    """
    if len(x) <= 2 * buckets + 2:
        return x, y
    number = np.minimum(((x - x[0]) / (x[-1] - x[0]) * buckets).astype(np.int64), buckets - 1) if x[-1] > x[0] else None
    if number is None:
        kept = {0, int(y.argmin()), int(y.argmax()), len(x) - 1}
    else:
        borders = np.flatnonzero(np.diff(number)) + 1
        kept = {0, len(x) - 1}
        for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), len(x)], strict=True):
            kept |= {start + int(y[start:stop].argmin()), start + int(y[start:stop].argmax())}
    index = np.array(sorted(kept))
    return x[index], y[index]


def smooth(y: Floats, window: int) -> Floats:
    """The mean of `window` (odd) neighbouring values around each; towards the ends of fewer, as many on both sides."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(y, dtype=np.float64)])
    index = np.arange(len(y))
    reach = np.minimum(np.minimum(index, len(y) - 1 - index), half)
    means: Floats = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    return means


def smoothing_window(count: int) -> int:
    """An odd number of records to average, about a twentieth of all."""
    return max(1, count // 20 // 2 * 2 + 1)


def wants_log(y: Floats) -> bool:
    """Whether the values reach so far above their median that a linear axis would hide the curve."""
    return bool(len(y) and y.min() > 0 and y.max() > SPREAD_FOR_LOG * float(np.median(y)))


def number_label(value: float, _: int | None = None) -> str:
    """A tick's label: thousands separated, millions and billions shortened, no trailing zeros."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e4:
        for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= unit:
                return f"{value / unit:.4g}{name}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def draw(curves: Sequence[Curve], frame: Frame, *, key: str) -> str:
    """The curves as an `<svg>` element for a page: no size of its own, no outside reference; ids begin with `key`."""

    def paint(axes: Any) -> None:
        _axes(axes, frame)
        for curve in curves:
            _curve(axes, curve)
        _limits(axes, curves, frame)
        for border in frame.borders:
            axes.axvline(border, color=INKS["ink-soft"], linewidth=1.0, dashes=(1.5, 3), alpha=0.8, zorder=1)
        if frame.mark is not None:
            _mark(axes, frame)

    return picture(frame.width, frame.height, paint, key=key)


def picture(
    width: int,
    height: int,
    paint: Callable[[Any], None],
    *,
    key: str,
    room: tuple[float, float, float, float] = (50, 12, 26, 12),
) -> str:
    """What `paint` draws on matplotlib's axes as an `<svg>` element for a page; `room`: left, right, below and above
    the axes, in units of the view box as width and height are."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "ratoon", "font.size": 12, "path.simplify": False}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
        FigureCanvasSVG(figure)
        left, right, bottom, top = room
        paint(
            figure.add_axes(
                (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height),
            )
        )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return _for_page(buffer.getvalue(), key)


def on_ground(axes: Any, pad: int = 7) -> None:
    """The look of all pictures: a ground line, faint levels, ticks without marks, `pad` from their numbers."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INKS["faint"])
    axes.grid(axis="y", color=INKS["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both", pad=pad, labelcolor=INKS["ink-soft"])


def _axes(axes: Any, frame: Frame) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    on_ground(axes)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(4, frame.width // 95), integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if frame.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=max(3, frame.height // 55), steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(number_label))


def _curve(axes: Any, curve: Curve) -> None:
    x, y = envelope(curve.x, curve.y)
    ink = INKS[curve.ink]
    common: dict[str, Any] = {"color": ink, "solid_joinstyle": "round", "solid_capstyle": "round", "clip_on": False}
    if curve.style == "points":
        axes.plot(x, y, linewidth=1.2, alpha=0.55, zorder=4, **common)
        axes.plot(
            x, y, "o", markersize=6.5, zorder=5, color=ink, markeredgecolor=INKS["paper"], markeredgewidth=1.5,
            clip_on=False,
        )  # fmt: skip
    elif curve.style == "thin":
        axes.plot(x, y, linewidth=1.0, alpha=0.4, zorder=2, **common)
    else:
        axes.plot(x, y, linewidth=2.0, zorder=3, **common)
        if len(x) == 1:
            axes.plot(x, y, "o", markersize=5, zorder=3, color=ink)


def _limits(axes: Any, curves: Sequence[Curve], frame: Frame) -> None:
    from matplotlib.ticker import LogLocator

    xs = np.concatenate([curve.x for curve in curves])
    ys = np.concatenate([curve.y for curve in curves])
    low, high = float(ys.min()), float(ys.max())
    if frame.level is not None:
        axes.axhline(frame.level, color=INKS["ink-soft"], linewidth=1.0, dashes=(4, 4), zorder=1)
        low, high = min(low, frame.level), max(high, frame.level)
    if frame.log:
        axes.set_ylim(low / 1.15, high * 1.15)
        close = 3 * math.log10(high / low) > frame.height / 30  # three numbers a decade would stand on each other
        axes.yaxis.set_major_locator(LogLocator(numticks=6, subs=(1.0,) if close else (1.0, 2.0, 5.0)))
    else:
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        axes.set_ylim(0 if frame.from_zero and low >= 0 else low - room, high + room)
    first, last = float(xs.min()), float(xs.max())
    axes.set_xlim(first, last if last > first else first + 1)


def _mark(axes: Any, frame: Frame) -> None:
    assert frame.mark is not None
    x, y = frame.mark
    axes.plot(
        [x], [y], "o", markersize=13, markerfacecolor="none", markeredgecolor=INKS["held-out"], markeredgewidth=1.8,
        zorder=6, clip_on=False,
    )  # fmt: skip
    left, right = axes.get_xlim()
    late = (x - left) / (right - left) > 0.6
    above = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1] < 0.8
    axes.annotate(
        frame.mark_text, (x, y), xytext=(0 if late else 6, 14 if above else -14), textcoords="offset points",
        ha="right" if late else "left", va="bottom" if above else "top", color=INKS["held-out"], fontsize=13,
        fontweight="bold", zorder=7, annotation_clip=False,
    )  # fmt: skip


def _for_page(svg: str, key: str) -> str:
    """matplotlib's file as an element: no prolog, metadata, namespaces, fixed sizes; ids of its own; inks named."""
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*|<style.*?</style>\s*", "", svg, flags=re.S)
    svg = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'((?:href="|url\()#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r"font: (?:(bold|700) )?[\d.]+px[^;\"]*", _font, svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for name, colour in INKS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'\s(d|x|y|transform)="[^"]*"', _shorter, svg)
    return svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def _shorter(found: re.Match[str]) -> str:
    """Coordinates to hundredths of a unit; matplotlib writes six digits."""
    return re.sub(r"-?\d+\.\d{3,}", lambda one: f"{float(one.group()):.2f}".rstrip("0").rstrip("."), found.group())


def _font(found: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", found.group())
    assert size is not None
    return f"font-size: {size.group()}" + ("; font-weight: 600" if found.group(1) else "")


def finite(values: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    """Pairs (x, y) as two arrays in ascending x, those without a finite value left out."""
    pairs = sorted((pair for pair in values if math.isfinite(pair[0]) and math.isfinite(pair[1])), key=lambda p: p[0])
    return np.array([p[0] for p in pairs], dtype=np.float64), np.array([p[1] for p in pairs], dtype=np.float64)
