"""The curves of training, as every page shows them: which points are drawn, how, and what stands beside the picture.

Decides sizes, smoothing and legends. What is on record is `records.py`'s, how SVG is drawn `plots.py`'s, what is marked
in a picture the page's; the element around it is `templates/curves.html`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ratoon.report import plots
from ratoon.report.phrases import figure, whole
from ratoon.report.records import CURVES, Pair, Records

SHAPES = {"loss": ((1040, 360), (345, 270)), "measure": ((1040, 275), (345, 220))}
SMALL_SHAPES = ((510, 230), (345, 190))
"""Width and height of a picture in a wide window and in a narrow one: about the pixels it will have, so that the
numbers at its axes are as large as they are drawn."""
SMOOTHED = {"loss", "throughput", "gradient_norm"}
FREE_BELOW = {"loss", "measure"}
"""Curves whose axis need not begin at 0."""
SCALES = {"memory": 1e-6}

Say = Callable[..., Markup]
"""The phrase of a key in the page's language, values put in."""


@dataclass(frozen=True)
class Curve:
    """A curve to show: the training records under one key (`x`, `y`), and points measured on held-out text."""

    name: str
    x: plots.Floats
    y: plots.Floats
    held_x: plots.Floats
    held_y: plots.Floats

    @classmethod
    def of(cls, name: str, train: list[Pair], held: list[Pair]) -> Curve | None:
        """The curve of those (step, value); nothing where none of them is a finite number."""
        x, y = plots.finite(train)
        held_x, held_y = plots.finite(held)
        return cls(name, x, y * SCALES.get(name, 1.0), held_x, held_y) if len(x) or len(held_x) else None


@dataclass(frozen=True)
class Beside:
    """What a picture has beside its curve: a ringed point (step, value) with its number, a dashed level, the steps of
    borders, and what the legend says of them; `held` (what measured points are called), `title` and `unit` where they
    are not the phrases of every page."""

    mark: Pair | None = None
    mark_text: str = ""
    level: float | None = None
    borders: tuple[float, ...] = ()
    legend: tuple[tuple[str, Markup], ...] = ()
    held: Markup | None = None
    title: str | None = None
    unit: str | None = None


def recorded(records: Records) -> list[Curve]:
    """The curves that a run has on record, in the order of a page; the loss with its held-out points."""
    found = (
        Curve.of(name, records.pairs("train", key), records.pairs("eval", "loss") if name == "loss" else [])
        for name, key in CURVES
    )
    return [one for one in found if one is not None]


def shown(curve: Curve, records: Records, say: Say, beside: Beside | None = None) -> dict[str, Any]:
    """What the template needs of a curve: the pictures (wide and narrow), the legend, a label for screen readers."""
    beside = beside or Beside()
    window = plots.smoothing_window(len(curve.y)) if curve.name in SMOOTHED else 1
    layers, legend = _layers(curve, window, beside.held or say("legend_held_out"), say)
    legend += beside.legend
    above_0 = not len(curve.held_y) or curve.held_y.min() > 0
    log = curve.name in ("loss", "gradient_norm") and plots.wants_log(curve.y) and above_0
    if log:
        legend.append(("none", say("log_axis")))

    def frame(width: int, height: int) -> plots.Frame:
        return plots.Frame(
            width,
            height,
            log=log,
            from_zero=curve.name not in FREE_BELOW,
            level=beside.level,
            mark=beside.mark,
            mark_text=beside.mark_text,
            borders=beside.borders,
        )

    shapes = zip(("wide", "narrow"), SHAPES.get(curve.name, SMALL_SHAPES), strict=True)
    x, y = (curve.x, curve.y) if len(curve.x) else (curve.held_x, curve.held_y)
    thinned = len(plots.envelope(x, y)[0]) < len(x)
    count = say("thinned" if thinned else "records", n=whole(len(x)))
    if curve.name == "learning_rate" and records.matrix_learning_rate:
        count = Markup("{} · {}").format(count, say("muon", peak=records.matrix_learning_rate))
    title = say(curve.name) if beside.title is None else Markup.escape(beside.title)
    return {
        "name": curve.name,
        "title": title,
        "unit": say("unit_" + curve.name) if beside.unit is None else Markup.escape(beside.unit),
        "pictures": {shape: plots.draw(layers, frame(*wh), key=f"{curve.name}-{shape}") for shape, wh in shapes},
        "legend": legend,
        "label": _label(title, x, y, say),
        "count": count,
    }


def beside_loss(records: Records, say: Say) -> Mapping[str, Beside]:
    """What stands in the picture of the loss of a model that writes text: the best held-out point, a uniform guess."""
    best, uniform = records.best, records.uniform
    legend = []
    if best is not None:
        legend.append(("ring", say("legend_best", loss=f"{best.loss:.4f}", step=whole(best.step))))
    if uniform is not None:
        legend.append(("level", say("legend_uniform", loss=f"{uniform.loss:.4f}")))
    return {
        "loss": Beside(
            mark=None if best is None else (float(best.step), best.loss),
            mark_text="" if best is None else f"{best.loss:.3f}",
            level=None if uniform is None else uniform.loss,
            legend=tuple(legend),
        )
    }


def _layers(curve: Curve, window: int, held: Markup, say: Say) -> tuple[list[plots.Curve], list[tuple[str, Markup]]]:
    """What is drawn, from behind to the front, and what the legend says of it."""
    layers, legend = [], []
    if len(curve.x):
        if curve.name == "loss":
            legend.append(("thin" if window > 1 else "line", say("legend_train")))
        if window > 1:
            layers.append(plots.Curve(curve.x, curve.y, "train", "thin"))
            legend.append(("line", say("legend_smooth", n=window)))
        layers.append(plots.Curve(curve.x, plots.smooth(curve.y, window)))
    if len(curve.held_x):
        layers.append(plots.Curve(curve.held_x, curve.held_y, "held-out", "points"))
        legend.append(("points", held))
    return layers, legend


def _label(title: Markup, x: plots.Floats, y: plots.Floats, say: Say) -> Markup:
    return say(
        "curve_label",
        title=title,
        first=figure(y[0]),
        start=whole(x[0]),
        last=figure(y[-1]),
        end=whole(x[-1]),
        low=figure(y.min()),
        high=figure(y.max()),
    )
