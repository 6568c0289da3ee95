"""The page of a fine-tuned run of which nothing was measured: what there is of it, why there is no score, what to type.

Decides when that is so, and which reason and commands are told. The page of a measured run is `task_page.py`'s, how it
learned `task_learned.py`'s, wording `task_phrases.py`'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratoon.report.frame import render_page, say_in
from ratoon.report.phrases import PHRASES as SHARED
from ratoon.report.phrases import Language
from ratoon.report.records import Records, integer
from ratoon.report.task_learned import learned
from ratoon.report.task_page import OWN, PAGE, task_filters
from ratoon.report.task_phrases import PHRASES, phrase
from ratoon.report.task_records import FATES, Account, accounts_of
from ratoon.store.atomic import write_bytes
from ratoon.store.runs import Run


@dataclass(frozen=True)
class Unmeasured:
    """Why a run has no score, as keys of phrases, and what to type; `step`: that of the model which it left, if any."""

    reasons: tuple[str, ...]
    commands: tuple[str, ...]
    step: int | None

    @classmethod
    def of(cls, records: Records) -> Unmeasured:
        """What the run's manifest says."""
        state = records.state
        step = integer(state.get("step")) if state.get("model_hash") else None
        data = state.get("data")
        no_test = isinstance(data, dict) and data.get("test_records") == 0
        measure = f"ratoon evaluate {records.run.name}" + (" FILE" if no_test else "")
        reasons, commands = [], list(records.commands)
        if step is None:
            reasons.append("why_no_model" if records.status in ("interrupted", "failed") else "why_not_yet")
        elif state.get("evaluation"):
            reasons.append("why_earlier")
        elif not no_test:
            reasons.append("why_model_left")
        if step is not None and not state.get("evaluation"):
            commands = [*commands, measure] if records.status != "done" else [measure, *commands]
        if no_test:
            reasons.append("why_no_test")
        return cls(tuple(reasons), tuple(dict.fromkeys(commands)), step)


def write_unmeasured_page(run: Run, *, language: Language = "en") -> Path:
    """Write `report.html` into the folder of a fine-tuned run without measures, in whatever state it is, and return its
    path. Raises `ArtifactError` when the folder holds no run; `StorageError` when the disk refuses."""
    page = render_unmeasured(Records.read(run), language)
    write_bytes(run.report, page.encode("utf-8", "replace"))  # half a surrogate pair in a row's place becomes "?"
    return run.report


def render_unmeasured(records: Records, language: Language) -> str:
    """The page as text."""
    say, told = say_in(language, phrase), Unmeasured.of(records)
    return render_page(
        "task.unmeasured.html",
        language,
        styles=("page.css", "task.css"),
        scripts=("page.js",),
        filters=task_filters(language),
        say=say,
        r=records,
        told=told,
        learned=learned(records, say, language),
        accounts=_accounts(records.run.folder / "ledger.json"),
        fates=FATES,
        earlier=f"{OWN}/{PAGE}",
        known={**SHARED, **PHRASES},
    )


def _accounts(path: Path) -> list[Account]:
    """The ledgers of the run's parts; none where it ended before they were written."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return accounts_of(found) if isinstance(found, dict) else []
