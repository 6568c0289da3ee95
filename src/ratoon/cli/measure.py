"""Measuring a task model: for a run at its end, and for `ratoon evaluate`.

Decides what is written beside a run: evaluation.json (every figure), predictions.jsonl (every record), and the page.
What is measured is decided in `evaluate/`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ratoon.base.errors import ArtifactError

if TYPE_CHECKING:
    from ratoon.data.records import Parts
    from ratoon.evaluate.task import Prediction, TaskReport
    from ratoon.generate.lm import LanguageModel
    from ratoon.store.runs import Run
    from ratoon.tasks.contract import Task

Talk = Callable[[str], None]


def of_task(name: str) -> bool:
    """Whether the model `name` was fine-tuned for a task, as its folder says; it is not loaded."""
    from ratoon.generate.lm import locate
    from ratoon.store.artifact import MANIFEST, read_manifest

    folder = locate(name)
    return (folder / MANIFEST).is_file() and isinstance(read_manifest(folder).facts.get("task"), dict)


def too_long_of(lm: LanguageModel) -> Any:
    """What the model's run did with records that are longer than a row."""
    return lm.facts.get("data", {}).get("too_long", "cut-right")


def measure_run(run: Run, task: Task[Any], parts: Parts, *, language: str, talk: Talk) -> dict[str, Any]:
    """Measure the run's model, as it was saved, on its test records; returns the figures."""
    from ratoon.evaluate.task import evaluate_task
    from ratoon.generate.lm import load
    from ratoon.train.device import fast_dtype

    dtype = fast_dtype()
    lm = load(str(run.folder), dtype=dtype)
    began = time.perf_counter()
    report = evaluate_task(
        lm, task, parts.test, language=language, too_long=too_long_of(lm),
        seen_places=parts.seen_test_places, progress=progress("records"),
    )  # fmt: skip
    report.facts |= {"model": run.name, "seconds": time.perf_counter() - began, **identity(lm)}
    ledger = run.folder / "ledger.json"
    if ledger.is_file():
        report.facts["ledger"] = json.loads(ledger.read_text(encoding="utf-8"))
    write_report(run.folder / "evaluation", report, "zh" if language == "zh" else "en", run)
    for sentence in lines(report):
        talk(sentence)
    return summary(report)


def identity(lm: LanguageModel) -> dict[str, Any]:
    """Which weights answered, on what, in which type they computed and by which code: equal ones answer the same."""
    from ratoon import __version__
    from ratoon.store.artifact import read_manifest

    manifest, weight = read_manifest(Path(str(lm.facts["path"]))), lm.model.head_weight()
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "model_hash": manifest.hash,
        "ratoon": __version__,
    }


def kept_of(folder: Path, lm: LanguageModel, task: Task[Any], records: Sequence[Any]) -> list[Prediction] | None:
    """What the model answered to these records when it was measured into `folder`; None where it was not, or was not
    this model, computing in this type."""
    from ratoon.evaluate.kept import kept_predictions

    facts, lines = folder / "evaluation.json", folder / "predictions.jsonl"
    if not facts.is_file() or not lines.is_file():
        return None
    found = json.loads(facts.read_text(encoding="utf-8"))
    wanted = identity(lm) | {"task": task.kind, "task_version": task.version}
    if any(found.get(key) != value for key, value in wanted.items()):
        return None
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return kept_predictions(task, rows, records)


def write_report(
    folder: Path, report: TaskReport, language: Literal["en", "zh"] = "en", run: Run | None = None
) -> None:
    """evaluation.json, predictions.jsonl and the page, each whole or not at all. `run`: the one that made the model."""
    from ratoon.store.atomic import write_json, write_text

    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(_line(report, place), ensure_ascii=False) for place in range(len(report.predictions))]
    write_text(folder / "predictions.jsonl", "\n".join(rows) + "\n")
    write_json(folder / "evaluation.json", report.as_dict())
    from ratoon.report.task_page import write_task_page

    write_task_page(folder, language=language, run=run)


def write_answers(folder: Path, task: Task[Any], predictions: Sequence[Prediction]) -> Path:
    """predictions.jsonl of rows whose answers are not told: what was read and what the model answers."""
    from ratoon.store.atomic import write_text

    folder.mkdir(parents=True, exist_ok=True)
    rows = [one.as_dict(task) for one in predictions]
    for row in rows:
        del row["expected"]
    path = folder / "predictions.jsonl"
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _line(report: TaskReport, place: int) -> dict[str, Any]:
    """A prediction with what its record came to, and with the words that its tags stand on."""
    prediction, each = report.predictions[place], report.measured.per_record
    line = prediction.as_dict(report.task)
    words = getattr(prediction.record, "words", None)
    if words is not None:
        line["words"] = list(words)
    if each:
        line["scores"] = {name: round(float(values[place]), 6) for name, values in each.items()}
    return line


def summary(report: TaskReport) -> dict[str, Any]:
    """The figures alone."""
    found = report.as_dict()
    return {key: found[key] for key in ("task", "n", "values", "interval_of", "seconds", "copies_of_training",
                                        "without_copies") if key in found}  # fmt: skip


def lines(report: TaskReport) -> list[str]:
    """The figures as sentences: the main ones first."""
    said = []
    for one in report.measured.values:
        if one.value is None:
            said.append(f"{one.name}: undefined ({one.note})")
            continue
        interval = "" if one.interval is None else f" [{one.interval[0]:.4f}, {one.interval[1]:.4f}]"
        said.append(f"{one.name} {one.value:.4f}{interval}, n = {one.n:,} {one.unit}s")
    if report.copies and report.without_copies is not None:
        main = report.without_copies.values[0]
        said.append(f"without {report.copies:,} records that also stand in training: {main.name} {main.value:.4f}")
    return said + ([report.cut] if report.cut else [])


def progress(what: str) -> Callable[[int, int], None]:
    """A line that moves, on a terminal only."""
    import sys

    moving = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if moving:
            sys.stderr.write(f"\r{done:,} of {total:,} {what}" + ("\n" if done == total else ""))
            sys.stderr.flush()

    return show


def task_of_model(lm: LanguageModel) -> Task[Any]:
    """The task that a model was fine-tuned for, as its manifest tells. Raises `ArtifactError` where it tells none."""
    from ratoon.tasks.registry import restored

    facts = lm.facts.get("task")
    if not isinstance(facts, dict):
        raise ArtifactError(
            f"'{lm.name}' was not fine-tuned for a task",
            where=lm.facts.get("path"),
            expected="a model that `ratoon finetune` made",
            fix="fine-tune it first: ratoon finetune RECIPE",
        )
    return restored(facts, where=str(lm.facts.get("path") or lm.name))
