"""`ratoon evaluate` for a model that was fine-tuned for a task: its measures, and what is asked for beside them.

Decides which records are read and which parts the evaluation gets; what is measured is decided in `evaluate/`, how
robustness and attacks reach a task's records in `evaluate/task_robust.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.cli.measure import too_long_of

if TYPE_CHECKING:
    from ratoon.data.records import Parts, RecordSettings
    from ratoon.evaluate.task import Prediction, TaskReport
    from ratoon.generate.lm import LanguageModel
    from ratoon.recipe.tuning import TuneRecipe
    from ratoon.tasks.contract import Task


@dataclass(frozen=True)
class Asked:
    """What the command line asks for beside the measures."""

    floor: bool = False
    base: bool = False
    robust: bool = False
    perturb: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    attack_queries: int | None = None
    against: str | None = None
    limit_rows: int | None = None
    unlabelled: bool = False
    out: Path | None = None

    @property
    def beside(self) -> bool:
        """Whether anything is asked for beside the measures."""
        return self.floor or self.base or self.robust or self.attack_queries is not None or self.against is not None


def evaluate_task_model(lm: LanguageModel, files: Sequence[str], asked: Asked, *, as_json: bool) -> None:
    """Measure a task model on its run's test rows, or on files of the same form, and say or print everything."""
    from ratoon.cli.measure import write_report
    from ratoon.cli.output import answer, answer_json, talk, terminal_columns
    from ratoon.store.runs import Run

    if asked.unlabelled:
        _answer_rows(lm, files, asked, as_json=as_json)
        return
    recipe = _recipe_of(lm)
    report = measured_model(lm, files, asked)
    folder = asked.out or _run_folder(lm) / evaluation_name(files, asked.limit_rows)
    write_report(folder, report, "zh" if recipe.language == "zh" else "en", Run(_run_folder(lm)))
    found = report.as_dict()
    if as_json:
        answer_json(found)
        return
    from ratoon.cli.task_table import show_task

    answer(show_task(found, language="zh" if recipe.language == "zh" else "en", width=terminal_columns()))
    talk(f"page: {folder / 'report.html'}")


def evaluation_name(files: Sequence[str], limit_rows: int | None) -> str:
    """The folder of an evaluation in its run: that of the run's own test rows is `evaluation`, others lie beside it,
    those of files of one name apart."""
    parts = ["evaluation"]
    if files:
        full = "\n".join(_full(files)).encode()
        parts += [Path(files[0]).name.split(".")[0], hashlib.sha256(full).hexdigest()[:6]]
    return "-".join([*parts, f"{limit_rows}-rows"] if limit_rows else parts)


def _answer_rows(lm: LanguageModel, files: Sequence[str], asked: Asked, *, as_json: bool) -> None:
    """Rows without answers: predictions alone, nothing to measure."""
    from ratoon.cli.measure import task_of_model, write_answers
    from ratoon.cli.output import answer, answer_json

    if not files:
        raise ConfigError(
            "--unlabelled says of FILE… that its rows have no answers", where="command line", fix="name a file"
        )
    predictions = answered_rows(lm, files, asked.limit_rows)
    folder = asked.out or _run_folder(lm) / "answers"
    path = write_answers(folder, task_of_model(lm), predictions)
    if as_json:
        answer_json({"model": lm.name, "n": len(predictions), "predictions": str(path)})
    else:
        answer(str(path))


def answered_rows(lm: LanguageModel, files: Sequence[str], limit_rows: int | None = None) -> list[Prediction]:
    """What the model answers to rows without answers, read as its run read its own. Raises `DataError` for none."""
    from ratoon.cli.measure import progress, task_of_model
    from ratoon.data.records import read_beside
    from ratoon.evaluate.task import predict

    task, recipe = task_of_model(lm), _recipe_of(lm)
    parts = read_beside(task, _full(files), (), _limited(recipe, limit_rows), seed=recipe.seed, unanswered=True)
    _say_notes(parts)
    if not parts.test:
        raise DataError("there is no row to answer", where=", ".join(files), fix="name files with rows of the task")
    return predict(lm, task, parts.test, too_long=too_long_of(lm), progress=progress("records"))


def measured_model(lm: LanguageModel, files: Sequence[str], asked: Asked) -> TaskReport:
    """The model measured on its run's test rows, or on files of the same form, with what is asked for beside."""
    from ratoon.cli.measure import identity, kept_of, progress, task_of_model
    from ratoon.cli.output import talk
    from ratoon.evaluate.task import evaluate_task

    task, recipe = task_of_model(lm), _recipe_of(lm)
    if asked.base:
        from ratoon.evaluate.base_of_task import expect_base

        expect_base(lm, task)  # before anything is measured
    parts = _parts(task, recipe, files, asked)
    _say_notes(parts)
    language = str(lm.facts.get("data", {}).get("language", recipe.language))
    kept = None
    if asked.beside:
        folder = _run_folder(lm) / evaluation_name(files, asked.limit_rows)
        kept = kept_of(folder, lm, task, parts.test)
        if kept is not None:
            talk(f"answers of this model to these {len(kept):,} records are kept in {folder}: it is not asked again")
    report = evaluate_task(
        lm, task, parts.test, language=language, too_long=too_long_of(lm), seen_places=parts.seen_test_places,
        progress=progress("records"), kept=kept,
    )  # fmt: skip
    report.facts |= {"model": lm.name, **identity(lm)}
    if report.cut:
        talk(report.cut)
    ledger = _run_folder(lm) / "ledger.json"
    if not files and ledger.is_file():
        report.facts["ledger"] = json.loads(ledger.read_text(encoding="utf-8"))
    if asked.floor:
        from ratoon.evaluate.floor_of_task import beside, sentence

        report.facts["floors"] = beside(
            report, parts.train, lm, language=language, too_long=too_long_of(lm), seed=recipe.seed
        )
        talk(sentence(report.measured, report.facts["floors"]))
    if asked.base:
        report.facts["base"] = _base(lm, report, str(recipe.model.base), language)
    if asked.robust:
        report.facts["robust"] = _robust(lm, report, asked, language, recipe.seed)
    if asked.attack_queries is not None:
        from ratoon.evaluate.task_robust import attacked

        found = attacked(lm, report, asked.attack_queries, too_long=too_long_of(lm))
        report.facts["attack"] = found
        talk(
            f"under attack with {asked.attack_queries:,} queries a text: accuracy "
            f"{found['accuracy_under_attack']:.4f}, before {found['accuracy_before']:.4f}"
        )
    if asked.against is not None:
        report.facts["against"] = [_against(lm, report, asked.against, language)]
    return report


def _say_notes(parts: Parts) -> None:
    from ratoon.cli.output import talk

    for ledger in parts.ledgers.values():
        for note in ledger.notes:
            talk(note)


def _recipe_of(lm: LanguageModel) -> TuneRecipe:
    """The recipe of the run that the model belongs to. Raises `ArtifactError` where there is none."""
    from ratoon.recipe.tuning import load_tuning

    path = _run_folder(lm) / "recipe.yaml"
    if not path.is_file():
        raise ArtifactError(
            f"'{lm.name}' lies in no run: how its rows are read is not known",
            where=path,
            fix="name the run that `ratoon finetune` made: ratoon evaluate RUN",
        )
    return load_tuning(path)


def _run_folder(lm: LanguageModel) -> Path:
    return Path(str(lm.facts.get("path"))).parent


def _full(files: Sequence[str]) -> tuple[str, ...]:
    """Files from where the user stands, not from `data.folder`."""
    return tuple(str(Path(file).resolve()) for file in files)


def _limited(recipe: TuneRecipe, limit_rows: int | None) -> RecordSettings:
    return recipe.data if limit_rows is None else recipe.data.model_copy(update={"limit_test_rows": limit_rows})


def _parts(task: Task[Any], recipe: TuneRecipe, files: Sequence[str], asked: Asked) -> Parts:
    """The run's rows; with files, these in place of its test rows, and the training rows as the run had them."""
    from ratoon.cli.output import talk
    from ratoon.data.records import read_beside, read_parts

    settings = _limited(recipe, asked.limit_rows)
    if not files:
        parts = read_parts(task, settings, seed=recipe.seed)
    else:
        if asked.limit_rows is None:  # the run's own limit is for its own rows
            settings = settings.model_copy(update={"limit_test_rows": None})
        training: Sequence[Any] = ()
        try:
            training = read_parts(task, recipe.data, seed=recipe.seed).train
        except DataError as error:
            if asked.floor:
                raise
            talk(f"the run's training rows are not here ({error.found}): copies of them are not looked for")
        parts = read_beside(task, _full(files), training, settings, seed=recipe.seed)
    if not parts.test:
        raise DataError(
            "the files have no row of the task" if files else "the run has no test rows",
            where=", ".join(files) or "data.test",
            fix="name files with rows of the task: ratoon evaluate RUN FILE",
        )
    return parts


def _robust(lm: LanguageModel, report: TaskReport, asked: Asked, language: str, seed: int) -> dict[str, Any]:
    """Score by strength of each perturbation; the last point of each is said."""
    from ratoon.cli.output import talk
    from ratoon.evaluate.robust import STRENGTHS
    from ratoon.evaluate.task_robust import perturbed

    found = perturbed(
        lm, report, names=asked.perturb, strengths=asked.strengths or STRENGTHS, language=language, seed=seed,
        too_long=too_long_of(lm),
    )  # fmt: skip
    for curve in found["curves"]:
        if not curve["points"]:
            talk(f"{curve['name']}: there is no text that it applies to")
            continue
        first, last = curve["points"][0]["score"], curve["points"][-1]
        name, values = first["name"], (first["value"], last["score"]["value"])
        shown = ["undefined" if value is None else f"{value:.4f}" for value in values]
        talk(f"{curve['name']}: {name} {shown[0]}, {shown[1]} at strength {last['strength']:g}")
    return found


def _base(lm: LanguageModel, report: TaskReport, name: str, language: str) -> dict[str, Any]:
    """The run's base without its training on the same records. Raises `ArtifactError` where it is another one now."""
    from ratoon.adapt.folder import base_hash
    from ratoon.cli.measure import progress
    from ratoon.cli.output import talk
    from ratoon.evaluate.base_of_task import base_beside, sentence
    from ratoon.generate.lm import load, locate
    from ratoon.store.artifact import read_manifest

    parent, here = read_manifest(Path(str(lm.facts["path"]))).parent("model"), base_hash(locate(name))
    if parent is not None and parent.hash != here:
        raise ArtifactError(
            f"the run was trained from another base than '{name}' is now ({parent.hash[:12]}, found {here[:12]})",
            where="--base",
            expected="the base that the run began with, unchanged",
        )
    weight = lm.model.head_weight()
    base = load(name, dtype=weight.dtype, device=weight.device)
    talk(f"measuring the base, {name}")
    found = base_beside(report, base, language=language, policy=too_long_of(lm), progress=progress("records"))
    talk(sentence(report.measured, found))
    if found["cut_tokens"]:
        talk(f"the base did not read {found['cut_tokens']:,} tokens of records that were too long")
    return found


def _against(lm: LanguageModel, report: TaskReport, other: str, language: str) -> dict[str, Any]:
    """Another model on the same records: both figures, and the paired bootstrap."""
    from ratoon.cli.measure import task_of_model
    from ratoon.evaluate.metrics.value import compare
    from ratoon.evaluate.task import measure, predict
    from ratoon.generate.lm import load

    weight = lm.model.head_weight()
    theirs = load(other, dtype=weight.dtype, device=weight.device)
    task, records = task_of_model(theirs), [one.record for one in report.predictions]
    if task.kind != report.task.kind:
        raise ConfigError(
            f"'{other}' was fine-tuned for {task.kind}", where="--against", expected=f"a model for {report.task.kind}"
        )
    for record in records:
        task.check(record)
    measured = measure(task, predict(theirs, task, records, too_long=too_long_of(theirs)), language)
    main = report.measured.values[0]
    return {
        "model": other,
        "name": main.name,
        "value": main.value,
        "other": measured.value(main.name).value,
        **compare(report.measured, measured, main.name).as_dict(),
    }
