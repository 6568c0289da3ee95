"""`ratoon evaluate` for a model that was fine-tuned for a task: its measures, and what is asked for beside them.

Decides which records are read and which parts the evaluation gets; what is measured is decided in `evaluate/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratoon.base.errors import ArtifactError, ConfigError, DataError

if TYPE_CHECKING:
    from ratoon.data.records import Parts
    from ratoon.evaluate.task import TaskReport
    from ratoon.generate.lm import LanguageModel
    from ratoon.recipe.tuning import TuneRecipe
    from ratoon.tasks.contract import Task


@dataclass(frozen=True)
class Asked:
    """What the command line asks for beside the measures."""

    floor: bool = False
    robust: bool = False
    perturb: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    attack_queries: int | None = None
    against: str | None = None
    limit_rows: int | None = None
    out: Path | None = None


def evaluate_task_model(lm: LanguageModel, files: Sequence[str], asked: Asked, *, as_json: bool) -> None:
    """Measure a task model on its run's test rows, or on files of the same form, and say or print everything."""
    from ratoon.cli.measure import write_report
    from ratoon.cli.output import answer, answer_json, talk

    recipe = _recipe_of(lm)
    report = measured_model(lm, files, asked)
    folder = asked.out or _folder_of(lm)
    write_report(folder, report, "zh" if recipe.language == "zh" else "en")
    found = report.as_dict()
    if as_json:
        answer_json(found)
        return
    from ratoon.cli.task_table import show_task

    answer(show_task(found, language="zh" if recipe.language == "zh" else "en"))
    talk(f"page: {folder / 'report.html'}")


def measured_model(lm: LanguageModel, files: Sequence[str], asked: Asked) -> TaskReport:
    """The model measured on its run's test rows, or on files of the same form, with what is asked for beside."""
    from ratoon.cli.measure import progress, task_of_model
    from ratoon.cli.output import talk
    from ratoon.evaluate.task import evaluate_task

    task = task_of_model(lm)
    recipe = _recipe_of(lm)
    parts = _parts(task, recipe, files, asked)
    for ledger in parts.ledgers.values():
        for note in ledger.notes:
            talk(note)
    language = str(lm.facts.get("data", {}).get("language", recipe.language))
    report = evaluate_task(
        lm, task, parts.test, language=language, too_long=lm.facts.get("data", {}).get("too_long", "cut-right"),
        seen_places=parts.seen_test_places, progress=progress("records"),
    )  # fmt: skip
    report.facts["model"] = lm.name
    if asked.floor:
        from ratoon.evaluate.floor_of_task import beside, sentence

        report.facts["floors"] = beside(report, parts.train, language=language, seed=recipe.seed)
        talk(sentence(report.measured, report.facts["floors"]))
    if asked.robust:
        report.facts["robust"] = _robust(lm, report, asked, language)
    if asked.attack_queries is not None:
        report.facts["attack"] = _attack(lm, report, asked.attack_queries)
    if asked.against is not None:
        report.facts["against"] = [_against(report, asked.against, language)]
    return report


def _recipe_of(lm: LanguageModel) -> TuneRecipe:
    """The recipe of the run that the model belongs to. Raises `ArtifactError` where there is none."""
    from ratoon.recipe.tuning import load_tuning

    path = Path(str(lm.facts.get("path"))).parent / "recipe.yaml"
    if not path.is_file():
        raise ArtifactError(
            f"'{lm.name}' lies in no run: how its rows are read is not known",
            where=path,
            fix="name the run that `ratoon finetune` made: ratoon evaluate RUN",
        )
    return load_tuning(path)


def _folder_of(lm: LanguageModel) -> Path:
    return Path(str(lm.facts.get("path"))).parent / "evaluation"


def _parts(task: Task[Any], recipe: TuneRecipe, files: Sequence[str], asked: Asked) -> Parts:
    """The run's rows; with files, these in place of its test rows."""
    from ratoon.data.records import read_parts

    settings = recipe.data
    if files:
        given = tuple(str(Path(file).resolve()) for file in files)
        settings = settings.model_copy(update={"test": given, "test_fraction": 0.0})
    if asked.limit_rows is not None:
        settings = settings.model_copy(update={"limit_test_rows": asked.limit_rows})
    parts = read_parts(task, settings, seed=recipe.seed)
    if not parts.test:
        raise DataError(
            "the run has no test rows",
            where="data.test",
            fix="name files with rows of the task: ratoon evaluate RUN FILE",
        )
    return parts


def _answers(lm: LanguageModel, task: Task[Any], records: list[Any]) -> list[Any]:
    from ratoon.evaluate.task import predict

    return [one.answer for one in predict(lm, task, records)]


def _robust(lm: LanguageModel, report: TaskReport, asked: Asked, language: str) -> dict[str, Any]:
    """Score by strength of each perturbation."""
    from ratoon.cli.output import talk
    from ratoon.evaluate.robust import STRENGTHS, robustness
    from ratoon.evaluate.task import Prediction, measure

    task, records = report.task, [one.record for one in report.predictions]
    texts = [task.text(record) for record in records]

    def predict(changed: list[str]) -> list[Any]:
        # A perturbed text keeps its record's other fields; which record is of no matter to the answer of a text alone.
        return _answers(lm, task, [task.with_text(replace(records[0]), text) for text in changed])

    def score(expected: Sequence[Any], answers: Sequence[Any]) -> Any:
        chosen = [Prediction(record, answer) for record, answer in zip(expected, answers, strict=True)]
        return measure(task, chosen, language)

    if task.measure not in ("classification", "multi_label", "numbers") or task.head() is None:
        raise ConfigError(
            f"the task {task.kind} reads more than one text",
            where="--robust",
            expected="classification, multi-label or scoring",
        )
    found = robustness(
        predict, texts, records, score, names=asked.perturb or None, strengths=asked.strengths or STRENGTHS
    )
    for curve in found.as_dict()["curves"]:
        if isinstance(curve, dict) and curve.get("points"):
            last = curve["points"][-1]
            value = last["score"]["value"]
            shown = "undefined" if value is None else f"{value:.4f}"
            talk(f"{curve['name']}: {shown} at strength {last['strength']:g}")
    return found.as_dict()


def _attack(lm: LanguageModel, report: TaskReport, queries: int) -> dict[str, Any]:
    """Greedy word substitution against a classifier, so many queries a text."""
    import numpy as np

    from ratoon.evaluate.attack import attack_all
    from ratoon.evaluate.task import predict

    task, records = report.task, [one.record for one in report.predictions]
    if task.kind != "classification":
        raise ConfigError(f"the task {task.kind} has no label to attack", where="--attack", expected="classification")
    labels = list(getattr(task, "labels", ()))

    def probabilities(texts: list[str]) -> Any:
        asked = [task.with_text(records[0], text) for text in texts]
        return np.asarray([one.probabilities for one in predict(lm, task, asked)])

    found = attack_all(
        probabilities,
        [task.text(record) for record in records],
        [labels.index(task.expected(record)) for record in records],
        budget=queries,
    )
    return found.as_dict()


def _against(report: TaskReport, other: str, language: str) -> dict[str, Any]:
    """Another model on the same records: both figures, and the paired bootstrap."""
    from ratoon.cli.measure import task_of_model, working_dtype
    from ratoon.evaluate.metrics.value import compare
    from ratoon.evaluate.task import measure, predict
    from ratoon.generate.lm import load

    lm = load(other, dtype=working_dtype())
    task, records = task_of_model(lm), [one.record for one in report.predictions]
    if task.measure != report.task.measure:
        raise ConfigError(
            f"'{other}' was fine-tuned for {task.kind}", where="--against", expected=f"a model for {report.task.kind}"
        )
    for record in records:
        task.check(record)
    measured = measure(task, predict(lm, task, records), language)
    main = report.measured.values[0]
    return {
        "model": other,
        "name": main.name,
        "value": main.value,
        "other": measured.value(main.name).value,
        **compare(report.measured, measured, main.name).as_dict(),
    }
