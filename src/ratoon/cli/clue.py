"""`ratoon evaluate --suite clue`: the runs of CLUE's recipes measured in one table, and their predictions written.

Decides which runs belong to the suite: those named as its recipes. What a part is stands in `evaluate/clue.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DEFAULT_OUT = Path("runs") / "clue"


def run_suite(named: str | None, out: Path | None, limit_rows: int | None, *, as_json: bool) -> None:
    """Measure every part whose run is here, or of those only what `named` says, and say how the others are made.

    Raises `ConfigError` where no run of the suite is here.
    """
    from ratoon.base.errors import ConfigError
    from ratoon.cli.evaluate_task import Asked, measured_model
    from ratoon.cli.measure import working_dtype
    from ratoon.cli.output import aligned, answer, answer_json, talk
    from ratoon.evaluate.clue import PARTS, submission
    from ratoon.generate.lm import load
    from ratoon.store.atomic import write_json, write_text
    from ratoon.store.runs import Run

    wanted = [part for part in PARTS if named is None or re.search(named, part.recipe)]
    here = {run.name for run in Run.all()}
    found: list[dict[str, Any]] = []
    folder = out or DEFAULT_OUT
    missing = [part for part in wanted if part.recipe not in here]
    for part in wanted:
        if part in missing:
            continue
        talk(f"{part.name}: {part.what}")
        report = measured_model(load(part.recipe, dtype=working_dtype()), [], Asked(limit_rows=limit_rows))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / part.file, submission(part, report.predictions))
        main = report.measured.values[0]
        found.append({"part": part.name, "run": part.recipe, "n": len(report.predictions), "file": part.file,
                      "main": main.as_dict(), "values": [one.as_dict() for one in report.measured.values]})  # fmt: skip
    for part in missing:
        talk(f"{part.name}: there is no run '{part.recipe}'; `ratoon finetune {part.recipe}` makes it")
    if not found:
        raise ConfigError(
            "no run of the suite is here",
            where="runs",
            expected="one of: " + ", ".join(part.recipe for part in wanted),
            fix=f"ratoon finetune {wanted[0].recipe if wanted else PARTS[0].recipe} data.folder=…",
        )
    write_json(folder / "clue.json", {"suite": "clue", "parts": found})
    if as_json:
        answer_json({"suite": "clue", "folder": str(folder), "parts": found})
        return
    rows: list[tuple[str, ...]] = [("part", "measure", "value", "95 %", "n", "predictions")]
    for one in found:
        main, low_high = one["main"], one["main"]["interval"]
        value = "undefined" if main["value"] is None else f"{main['value']:.4f}"
        interval = "" if low_high is None else f"{low_high[0]:.4f} to {low_high[1]:.4f}"
        rows.append((one["part"], main["name"], value, interval, f"{one['n']:,}", one["file"]))
    answer("\n".join(aligned(rows, left=2)))
    talk(f"predictions and figures: {folder}")
