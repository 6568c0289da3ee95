"""The page of a run: one HTML file that tells what was trained, on what, how good it is, and what to type next.

Decides what is shown and in which order. What is on record is `records.py`'s, wording `phrases.py`'s, curves
`curves.py`'s, looks the style sheet's in `templates/`.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ratoon.report import curves
from ratoon.report.phrases import PHRASES, Language, duration, figure, phrase, plain, sentence, size, whole
from ratoon.report.records import Records
from ratoon.store.atomic import write_bytes
from ratoon.store.runs import Run

TEMPLATES = Path(__file__).parent / "templates"
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
    beside = curves.beside_loss(records, say)
    return environment.get_template("page.html").render(
        say=say,
        r=records,
        curves=[curves.shown(one, records, say, beside.get(one.name)) for one in curves.recorded(records)],
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
