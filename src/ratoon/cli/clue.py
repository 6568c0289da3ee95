"""`ratoon evaluate --suite clue`: the runs of CLUE's recipes measured in one table, and their predictions written.

Decides which runs and files belong to the suite: runs named as its recipes unless told, each on its own test rows, or,
with the suite's folder, on the official files: dev is measured, test (which has no answers) is answered and written
for the suite's site. What a part is stands in `evaluate/clue.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratoon.base.errors import ConfigError

if TYPE_CHECKING:
    from ratoon.evaluate.clue import Part

DEFAULT_OUT = Path("runs") / "clue"


def run_suite(
    named: str | None,
    data: Path | None,
    models: Sequence[str],
    out: Path | None,
    limit_rows: int | None,
    *,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure every part whose run is here, or of those only what `named` says, and say how the others are made.

    `models`: PART=RUN where a run has another name. Raises `ConfigError` where nothing can be measured.
    """
    from ratoon.cli.output import answer_json, talk
    from ratoon.evaluate.clue import PARTS
    from ratoon.store.atomic import write_json
    from ratoon.store.runs import Run

    if data is not None and not data.is_dir():
        raise ConfigError("there is no such folder", where=data, expected="CLUE's parts, each in a folder")
    told = _told(models)
    wanted = [part for part in PARTS if named is None or re.search(named, f"{part.name} {part.recipe}", re.IGNORECASE)]
    if not wanted:
        raise ConfigError(
            f"no part is called '{named}'", where="command line", expected=", ".join(p.name for p in PARTS)
        )
    folder, here = out or DEFAULT_OUT, {run.name for run in Run.all()}
    found: list[dict[str, Any]] = []
    for part in wanted:
        files, tests = (part.files(data), part.tests(data)) if data is not None else ({}, {})
        if data is not None and "dev" not in files and not tests:
            talk(f"{part.name}: {data} holds neither dev.json nor test.json in {' or '.join(part.folders)}")
        elif part.name in told or part.recipe in here:
            talk(f"{part.name}: {part.what}")
            run = told.get(part.name, part.recipe)
            found.append(_measured(part, run, files, tests, folder, limit_rows, dtype, device))
        else:
            talk(f"{part.name}: there is no run '{part.recipe}'; `{_command(part, files)}` makes it")
    if not found:
        raise ConfigError(
            "no run of the suite is here",
            where="runs",
            expected="one of: " + ", ".join(part.recipe for part in wanted),
            fix=f"{_command(wanted[0], {})} data.folder=…, or name runs of your own: --models {wanted[0].name}=RUN",
        )
    write_json(folder / "clue.json", {"suite": "clue", "parts": found})
    if as_json:
        answer_json({"suite": "clue", "folder": str(folder), "parts": found})
        return
    _show(found)
    talk(f"predictions and figures: {folder}")


def _told(models: Sequence[str]) -> dict[str, str]:
    """Runs by part, from PART=RUN. Raises `ConfigError` for what is no part."""
    from ratoon.evaluate.clue import PARTS

    names = {key.lower(): part.name for part in PARTS for key in (part.name, part.recipe)}
    found = {}
    for one in models:
        key, equals, run = one.partition("=")
        if not equals or not run or key.lower() not in names:
            raise ConfigError(
                f"'{one}' names no run for a part",
                where="--models",
                expected="PART=RUN, PART one of " + ", ".join(part.name for part in PARTS),
            )
        found[names[key.lower()]] = run
    return found


def _command(part: Part, files: dict[str, Path]) -> str:
    """What a person types to train the part's recipe, on these files where there are any."""
    typed = f"ratoon finetune {part.recipe}"
    if "train" not in files or "dev" not in files:
        return typed
    train, dev = files["train"], files["dev"]
    return f"{typed} data.folder={train.parent} data.train=[{train.name}] data.test=[{dev.name}]"


def _measured(
    part: Part,
    run: str,
    files: dict[str, Path],
    tests: dict[str, Path],
    folder: Path,
    limit_rows: int | None,
    dtype: str | None,
    device: str | None,
) -> dict[str, Any]:
    """One part: its run measured, its submission written."""
    from ratoon.cli.evaluate_task import Asked, answered_rows, measured_model
    from ratoon.cli.sampling import load_model
    from ratoon.evaluate.clue import submission
    from ratoon.store.atomic import write_text
    from ratoon.train.device import fast_dtype

    lm = load_model(run, dtype or fast_dtype(), device)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"part": part.name, "run": run}
    if "dev" in files or not tests:
        report = measured_model(lm, [str(files["dev"])] if files else [], Asked(limit_rows=limit_rows))
        values = [one.as_dict() for one in report.measured.values]
        file = f"dev_{part.file}" if tests else part.file
        write_text(folder / file, submission(part, report.predictions))
        found |= {"n": len(report.predictions), "file": file, "main": values[0], "values": values}
    for file, path in tests.items():
        predictions = answered_rows(lm, [str(path)], limit_rows)
        write_text(folder / file, submission(part, predictions))
        found.setdefault("tests", []).append({"n": len(predictions), "file": file})
    return found


def _show(found: list[dict[str, Any]]) -> None:
    from ratoon.cli.output import aligned, answer

    rows: list[tuple[str, ...]] = [("part", "measure", "value", "95 %", "n", "predictions")]
    for one in found:
        main, tests = one.get("main"), one.get("tests", [])
        files = ", ".join(each["file"] for each in tests or [one])
        if main is None:
            counts = " + ".join(f"{each['n']:,}" for each in tests)
            rows.append((one["part"], "answers not told", "", "", counts, files))
            continue
        value = "undefined" if main["value"] is None else f"{main['value']:.4f}"
        interval = "" if main["interval"] is None else f"{main['interval'][0]:.4f} to {main['interval'][1]:.4f}"
        rows.append((one["part"], main["name"], value, interval, f"{one['n']:,}", files))
    answer("\n".join(aligned(rows, left=2)))
