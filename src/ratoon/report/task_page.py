"""The page of a measured task: how good the model is, how sure that is, what it beats, and where it errs.

Decides what is shown and in which order. What is on record is `task_records.py`'s, the records of the browser of errors
`task_rows.py`'s, how a run learned `task_learned.py`'s, wording `task_phrases.py`'s, pictures `task_plots.py`'s, looks
and the script those in `templates/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ratoon.report import task_plots
from ratoon.report.frame import render_page, say_in
from ratoon.report.phrases import Language
from ratoon.report.records import Records
from ratoon.report.task_learned import learned
from ratoon.report.task_notes import note_words
from ratoon.report.task_phrases import (
    PHRASES,
    count,
    figure_name,
    phrase,
    shown,
    signed,
    task_name,
    verdict,
)
from ratoon.report.task_records import FATES, Evaluation, Figure, confused_pairs
from ratoon.report.task_rows import SORTED_BY, Browser, browser
from ratoon.store.atomic import write_bytes
from ratoon.store.runs import Run

PAGE = "report.html"
OWN = "evaluation"
"""The folder in a run's that holds the evaluation of its own test rows."""
CLASSES_SHOWN = 20
"""Classes whose bars stand open; of more the weakest so many."""
MATRIX_OPEN, MATRIX_MOST = 12, 150
"""Labels up to which the confusion matrix stands open, and above which only its cells that are not empty are listed."""
PAIRS_SHOWN = 12
BESIDE = {
    "classification": ("f1_macro", "f1_weighted", "calibration_error", "matthews"),
    "multi_label": ("f1_macro", "subset_accuracy", "hamming_loss", "calibration_error"),
    "tagging": ("entity_precision_micro", "entity_recall_micro", "token_f1_micro", "token_f1_macro"),
}
"""Figures that stand beside the main one; of other measures those that follow it."""


def write_task_page(folder: Path, *, language: Language = "en", run: Run | None = None) -> Path:
    """Write `report.html` into a folder with evaluation.json and predictions.jsonl, from what they hold, and return its
    path. `run`: the one that the model comes from; the page shows how it learned, where its folder tells that. The
    evaluation of the run's own rows, in its folder `evaluation`, gives the run its page, too: the two are one.

    The page is one file without outside references. Raises `ArtifactError` when there is no evaluation in the folder,
    or the run's manifest cannot be read; `StorageError` when the disk refuses.
    """
    there = run is not None and run.state_path.is_file() and run.metrics_path.is_file()
    records = Records.read(run) if run is not None and there else None
    page = render_task(Evaluation.read(Path(folder)), language, records).encode("utf-8", "replace")
    path = Path(folder) / PAGE  # half a surrogate pair in a record became "?"
    write_bytes(path, page)
    if run is not None and records is not None and path.parent.resolve() == (run.folder / OWN).resolve():
        write_bytes(run.report, page)
    return path


def render_task(evaluation: Evaluation, language: Language, run: Records | None = None) -> str:
    """The page as text; with what is on record of the run, how it learned stands there, too."""
    say, records = say_in(language, phrase), browser(evaluation)
    return render_page(
        "task.html",
        language,
        styles=("page.css", "task.css"),
        scripts=("task.js",),
        filters=task_filters(language),
        say=say,
        e=evaluation,
        beside=_beside(evaluation),
        verdict=verdict(evaluation, language),
        classes=_classes(evaluation),
        confusion=_confusion(evaluation),
        pictures=_pictures(evaluation, records),
        grouped=records is not None and any("group" in row for row in records.rows),
        learned=None if run is None else learned(run, say, language),
        between_all=task_plots.limits([point for curve in evaluation.curves for point in curve.points]),
        strength=task_plots.strength,
        browser=records,
        data=None if records is None else _data(records, language),
        fates=FATES,
        classes_shown=CLASSES_SHOWN,
        pairs_shown=PAIRS_SHOWN,
        known=PHRASES,
    )


def task_filters(language: Language) -> dict[str, Callable[..., Any]]:
    """How a task's pages write figures and names."""
    return {
        "count": count,
        "shown": shown,
        "signed": signed,
        "task_name": lambda kind: task_name(str(kind), language),
        "figure_name": lambda name: figure_name(str(name), language),
        "note": lambda text: note_words(str(text), language),
    }


def _beside(evaluation: Evaluation) -> list[Figure]:
    """Figures in the cards beside the main one, at most four."""
    names = BESIDE.get(evaluation.measure)
    if names is None:
        return evaluation.values[1:5]
    return [found for name in names if (found := evaluation.figure(name)) is not None]


def _classes(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The rows of the table by class that concern these records, the weakest first."""
    rows = [one for one in evaluation.tables.get("per_class") or [] if one["support"] or one["predicted"]]
    return sorted(rows, key=lambda one: (one["f1"], -one["support"]))


@dataclass(frozen=True)
class _Confusion:
    """The confusion matrix as the page shows it: pairs by frequency, and cells of (count, share of the row)."""

    pairs: list[tuple[str, str, int, float]]
    labels: list[str]
    cells: list[list[tuple[int, float]]]
    open: bool


def _confusion(evaluation: Evaluation) -> _Confusion | None:
    found = evaluation.tables.get("confusion")
    if not found:
        return None
    pairs = confused_pairs(found)
    labels, counts = found["labels"], found["counts"]
    # A label that nobody expected and nothing was answered by would be an empty row and column.
    used = [place for place in range(len(labels)) if any(counts[place]) or any(row[place] for row in counts)]
    if len(used) > MATRIX_MOST:
        return _Confusion(pairs, [], [], False)
    cells = [[(counts[row][column], counts[row][column] / (sum(counts[row]) or 1)) for column in used] for row in used]
    return _Confusion(pairs, [labels[place] for place in used], cells, len(used) <= MATRIX_OPEN)


def _pictures(evaluation: Evaluation, records: Browser | None) -> dict[str, str]:
    """The pictures that stand alone, by name."""
    found = {}
    bins = (evaluation.tables.get("calibration") or {}).get("bins") or []
    if any(one["n"] for one in bins):
        found["calibration"] = task_plots.calibration(bins)
    if evaluation.measure == "numbers" and records is not None:
        rows = [row for row in records.rows if "off" in row]
        if rows:
            pairs_N2 = np.array([(row["expected"], row["answer"]) for row in rows], dtype=np.float64)
            groups = np.array([row.get("group", "") for row in rows])
            # Each group on a scale of its own, from its lowest number to its highest.
            for group in set(groups[groups != ""]):
                inside = pairs_N2[groups == group]
                pairs_N2[groups == group] = (inside - inside.min()) / (np.ptp(inside) or 1.0)
            found["numbers"] = task_plots.numbers(*pairs_N2.T)
    return found


def _data(records: Browser, language: Language) -> Markup:
    """What the script needs, as JSON that can stand inside an element: no `<` in it."""
    words = {key: phrase(key, language) for key in PHRASES if key.startswith("r_")}
    names = {name for row in records.rows for name in row.get("scores", ())}
    held = {
        "kind": records.kind,
        "rows": records.rows,
        "types": records.types,
        "sorted_by": {order: SORTED_BY[order] for order in records.orders if order in SORTED_BY},
        "names": {name: figure_name(name, language) for name in sorted(names)},
        "words": words,
    }
    text = json.dumps(held, ensure_ascii=False, separators=(",", ":"))
    # None of these signs stands in JSON but within strings; "--" is left, no comment can begin without "<".
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
