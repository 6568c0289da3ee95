"""The page of a run: one HTML file that tells what was trained, on what, how good it is, and what to type next.

Decides what is shown and in which order. What is on record is `records.py`'s, wording `phrases.py`'s, curves
`plots.py`'s, looks the style sheet's in `templates/`.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ratoon.report import plots
from ratoon.report.phrases import PHRASES, Language, duration, figure, phrase, plain, sentence, size, whole
from ratoon.report.records import CURVES, Records
from ratoon.store.atomic import write_bytes
from ratoon.store.runs import Run

TEMPLATES = Path(__file__).parent / "templates"
SHAPES = {"loss": ((1040, 360), (345, 270))}
SMALL_SHAPES = ((510, 230), (345, 190))
"""Width and height of a picture in a wide window and in a narrow one: about the pixels it will have, so that the
numbers at its axes are as large as they are drawn."""
PICTURES = {number: 0x2400 + number for number in range(32) if chr(number) not in "\t\n"} | {127: 0x2421}


def write_page(run: Run, *, language: Language = "en") -> Path:
    """Write `report.html` into the run's folder, from what lies there, and return its path.

    Works for a run in any state: finished, failed, interrupted, just begun. The page is one file without outside
    references. Raises `ArtifactError` when the folder holds no run; `StorageError` when the disk refuses.
    """
    page = render(Records.read(run), language)
    write_bytes(run.report, page.encode("utf-8", "replace"))  # half a surrogate pair in a sample becomes "?"
    return run.report


def render(records: Records, language: Language) -> str:
    """The page as text."""
    import jinja2

    script = (TEMPLATES / "page.js").read_text(encoding="utf-8").strip()
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8").strip()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def say(key: str, **values: Any) -> Markup:
        strong = {name: value if isinstance(value, Markup) else Markup.escape(value) for name, value in values.items()}
        return Markup(Markup.escape(phrase(key, language)).format(**strong))

    environment.filters |= {
        "whole": whole,
        "figure": figure,
        "size": size,
        "plain": plain,
        "duration": lambda seconds: duration(seconds, language),
        "sentence": lambda text: _code(sentence(str(text), language)),
        "visible": _visible,
        "b": lambda text: Markup("<b>{}</b>").format(text),
        "code": lambda text: Markup("<code>{}</code>").format(text),
    }
    return environment.get_template("page.html").render(
        say=say,
        r=records,
        curves=[_picture(curve, records, say) for curve in _curves(records)],
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        known=PHRASES,
    )


def _code(text: str) -> Markup:
    """What stands between a pair of backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return Markup.escape(text)
    return Markup("").join(
        Markup("<code>{}</code>" if odd % 2 else "{}").format(part) for odd, part in enumerate(parts)
    )


def _visible(text: str) -> str:
    """Control characters as their pictures (␀, ␛, …): an untrained model writes them, and a browser would drop them."""
    return text.translate(PICTURES)


# -- curves ------------------------------------------------------------------------------------------------------------

SMOOTHED = {"loss", "throughput", "gradient_norm"}
SCALES = {"memory": 1e-6}


@dataclass(frozen=True)
class _Curve:
    """A curve to show: the training records under one key, and for the loss the held-out points."""

    name: str
    x: plots.Floats
    y: plots.Floats
    held_x: plots.Floats
    held_y: plots.Floats


def _curves(records: Records) -> list[_Curve]:
    curves = []
    for name, key in CURVES:
        x, y = plots.finite(records.pairs("train", key))
        held = records.pairs("eval", "loss") if name == "loss" else []
        held_x, held_y = plots.finite(held)
        if len(x) or len(held_x):
            curves.append(_Curve(name, x, y * SCALES.get(name, 1.0), held_x, held_y))
    return curves


def _picture(curve: _Curve, records: Records, say: Any) -> dict[str, Any]:
    """What the template needs of a curve: the pictures (wide and narrow), the legend, a label for screen readers."""
    window = plots.smoothing_window(len(curve.y)) if curve.name in SMOOTHED else 1
    layers = []
    legend = []
    if len(curve.x):
        if curve.name == "loss":
            legend.append(("thin" if window > 1 else "line", say("legend_train")))
        if window > 1:
            layers.append(plots.Curve(curve.x, curve.y, "train", "thin"))
            legend.append(("line", say("legend_smooth", n=window)))
        layers.append(plots.Curve(curve.x, plots.smooth(curve.y, window)))
    best = records.best if curve.name == "loss" else None
    uniform = records.uniform if curve.name == "loss" else None
    if len(curve.held_x):
        layers.append(plots.Curve(curve.held_x, curve.held_y, "held-out", "points"))
        legend.append(("points", say("legend_held_out")))
        if best is not None:
            legend.append(("ring", say("legend_best", loss=f"{best.loss:.4f}", step=whole(best.step))))
    if uniform is not None:
        legend.append(("level", say("legend_uniform", loss=f"{uniform.loss:.4f}")))
    log = curve.name in ("loss", "gradient_norm") and plots.wants_log(curve.y)
    if log:
        legend.append(("none", say("log_axis")))

    def frame(width: int, height: int) -> plots.Frame:
        return plots.Frame(
            width,
            height,
            log=log,
            from_zero=curve.name != "loss",
            level=None if uniform is None else uniform.loss,
            mark=None if best is None else (float(best.step), best.loss),
            mark_text="" if best is None else f"{best.loss:.3f}",
        )

    shapes = zip(("wide", "narrow"), SHAPES.get(curve.name, SMALL_SHAPES), strict=True)
    pictures = {shape: plots.draw(layers, frame(*wh), key=f"{curve.name}-{shape}") for shape, wh in shapes}
    x, y = (curve.x, curve.y) if len(curve.x) else (curve.held_x, curve.held_y)
    label = say(
        "curve_label",
        title=say(curve.name),
        first=figure(y[0]),
        start=whole(x[0]),
        last=figure(y[-1]),
        end=whole(x[-1]),
        low=figure(y.min()),
        high=figure(y.max()),
    )
    thinned = len(plots.envelope(x, y)[0]) < len(x)
    return {
        "name": curve.name,
        "pictures": pictures,
        "legend": legend,
        "label": label,
        "count": say("thinned" if thinned else "records", n=whole(len(x))),
    }
