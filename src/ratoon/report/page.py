"""The page of a run: one HTML file that tells what was trained, on what, how good it is, and what to type next.

Decides what is shown and in which order. What is on record is `records.py`'s, wording `phrases.py`'s, curves
`curves.py`'s, the frame of all pages `frame.py`'s, looks the style sheet's in `templates/`.
"""

from __future__ import annotations

from pathlib import Path

from ratoon.report import curves
from ratoon.report.frame import render_page, say_in
from ratoon.report.phrases import PHRASES, Language, phrase
from ratoon.report.records import Records
from ratoon.store.atomic import write_bytes
from ratoon.store.runs import Run


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
    say = say_in(language, phrase)
    beside = curves.beside_loss(records, say)
    return render_page(
        "page.html",
        language,
        styles=("page.css",),
        scripts=("page.js",),
        say=say,
        r=records,
        curves=[curves.shown(one, records, say, beside.get(one.name)) for one in curves.recorded(records)],
        known=PHRASES,
    )
