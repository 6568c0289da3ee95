"""The page of runs side by side: one picture and one table, in one file.

Decides what is shown and in which order. What is on record is `compare_records.py`'s, wording `compare_phrases.py`'s,
the picture `compare_plot.py`'s, looks those of all pages in `templates/`.
"""

from __future__ import annotations

from pathlib import Path

from ratoon.report.compare_phrases import phrase, told
from ratoon.report.compare_plot import by_parameters
from ratoon.report.compare_records import Comparison
from ratoon.report.frame import render_page, say_in
from ratoon.report.phrases import Language
from ratoon.report.task_phrases import count, figure_name, shown, signed, task_name
from ratoon.store.atomic import write_bytes

PAGE = "report.html"


def write_compare_page(folder: Path, comparison: Comparison, *, language: Language = "en") -> Path:
    """Write `report.html` into a folder and return its path: one file without script or outside references. Raises
    `StorageError` when the disk refuses."""
    path = Path(folder) / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, render_comparison(comparison, language).encode("utf-8", "replace"))
    return path


def render_comparison(comparison: Comparison, language: Language) -> str:
    """The page as text."""
    return render_page(
        "compare.html",
        language,
        styles=("page.css", "task.css", "compare.css"),
        filters={
            "count": count,
            "shown": shown,
            "signed": signed,
            "task_name": lambda kind: task_name(str(kind), language),
            "figure_name": lambda name: figure_name(str(name), language),
        },
        say=say_in(language, phrase),
        c=comparison,
        runs=sum(len(lane.runs) for lane in comparison.lanes),
        notes=[told(note, language) for note in comparison.notes],
        pictures={
            "wide": by_parameters(comparison.lanes, wide=True),
            "narrow": by_parameters(comparison.lanes, wide=False),
        },
    )
