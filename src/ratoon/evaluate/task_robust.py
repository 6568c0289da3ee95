"""Robustness and attacks of a task model: how perturbed texts find their records, and what of a record is perturbed.

Decides which places of a record's text stay as they are (what separates its parts, the text that an extractive answer
must stand in) and which perturbations a task can bear. What is done to texts is `text/perturb.py`'s, what is measured
of it `robust.py`'s and `attack.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ratoon.base.errors import ConfigError
from ratoon.evaluate.attack import attack_all
from ratoon.evaluate.metrics.value import Measured
from ratoon.evaluate.robust import STRENGTHS, robustness
from ratoon.evaluate.task import Prediction, TaskReport, measure, predict
from ratoon.generate.lm import LanguageModel
from ratoon.tasks.contract import Task, TooLong
from ratoon.text.edits import Span
from ratoon.text.perturb import PERTURBATIONS, Material

WITHOUT = ("perplexity", "preference")
"""Measures of tasks that answer no text."""
SAME_WORDS = ("typos", "case", "width", "homoglyphs", "homophones")
"""Perturbations that put one character in the place of another: as many words as before, which tags need."""
_MARK = re.compile(r"\d+\n")


def perturbed(
    lm: LanguageModel,
    report: TaskReport,
    *,
    names: Sequence[str] = (),
    strengths: Sequence[float] = STRENGTHS,
    language: str = "en",
    seed: int = 1,
    too_long: TooLong = "cut-right",
) -> dict[str, Any]:
    """Score by strength of each perturbation on the report's records, as `RobustReport.as_dict`.

    Line ends stay, which separate the texts of a pair; of extractive questions the question alone is touched. Tagged
    sentences are read without their document. Raises `ConfigError` for tasks and perturbations that do not go together.
    """
    task = report.task
    if task.measure in WITHOUT:
        raise ConfigError(
            f"the task {task.kind} answers no text",
            where="--robust",
            fix="leave --robust out: it has no score to follow",
        )
    records = [_alone(one.record) for one in report.predictions]
    texts = [task.text(record) for record in records]
    # A text carries its record's number: groups, contexts and answers of the record belong to it.
    marks = [f"{number}\n" for number in range(len(records))]
    spans = [
        [(0, len(mark)), *((start + len(mark), stop + len(mark)) for start, stop in protected(task, text))]
        for mark, text in zip(marks, texts, strict=True)
    ]

    def answers(marked: list[str]) -> list[Any]:
        asked = []
        for text in marked:
            number, _, rest = text.partition("\n")
            asked.append(task.with_text(records[int(number)], rest))
        return [one.answer for one in predict(lm, task, asked, too_long=too_long)]

    def score(expected: Sequence[Any], found: Sequence[Any]) -> Measured:
        pairs = [Prediction(record, answer) for record, answer in zip(expected, found, strict=True)]
        return measure(task, pairs, language)

    material = Material.of(texts)
    found = robustness(
        answers,
        [mark + text for mark, text in zip(marks, texts, strict=True)],
        records,
        score,
        names=_names(task, names, material),
        strengths=strengths,
        seed=seed,
        material=material,
        protected=spans,
    ).as_dict()
    for curve in found["curves"]:
        for example in curve["examples"]:
            example["text"], example["perturbed"] = (
                _MARK.sub("", example[key], count=1) for key in ("text", "perturbed")
            )
    return found


def _alone(record: Any) -> Any:
    return replace(record, document="") if getattr(record, "document", "") else record


def _names(task: Task[Any], names: Sequence[str], material: Material) -> list[str]:
    """The perturbations that are measured: those named, else all that the task can bear and that have material."""
    if names:
        return bearable(task, names, where="--perturb")
    every = bearable(task, PERTURBATIONS, where="--perturb") if task.measure != "tagging" else list(SAME_WORDS)
    return [name for name in every if material.names.by_kind or not PERTURBATIONS[name].needs_names]


def bearable(task: Task[Any], names: Iterable[str], *, where: str) -> list[str]:
    """The names, if the task can bear what they do. Raises `ConfigError` for one that may change the number of words
    where each word has a tag; unknown names are `text/perturb.py`'s to refuse."""
    for name in names:
        if task.measure == "tagging" and name in PERTURBATIONS and name not in SAME_WORDS:
            raise ConfigError(
                f"'{name}' may change the number of words, and each has a tag",
                where=where,
                expected=", ".join(SAME_WORDS),
            )
    return list(names)


def protected(task: Task[Any], text: str) -> list[Span]:
    """What of a record's text stays as it is: separators of its parts, and the text that an extractive answer must
    stand in."""
    if task.kind == "extractive":
        return [(len(text.partition("\n")[0]), len(text))]
    between = str(getattr(task.settings, "join", "")) if task.measure == "tagging" else ""
    separators = "\n" + "".join(set(between))
    return [(at, at + 1) for at, one in enumerate(text) if one in separators]


def attacked(lm: LanguageModel, report: TaskReport, queries: int, *, too_long: TooLong = "cut-right") -> dict[str, Any]:
    """Greedy word substitution against a classifier, at most `queries` a text, as `AttackReport.as_dict`.

    Raises `ConfigError` for other tasks.
    """
    task: Any = report.task
    records = [one.record for one in report.predictions]
    if task.kind != "classification":
        raise ConfigError(f"the task {task.kind} has no label to attack", where="--attack", expected="classification")

    def probabilities(texts: list[str]) -> Any:
        asked = [task.with_text(records[0], text) for text in texts]  # the label of a record is not looked at
        return np.asarray([one.probabilities for one in predict(lm, task, asked, too_long=too_long)])

    return attack_all(
        probabilities,
        [task.text(record) for record in records],
        [task.labels.index(task.expected(record)) for record in records],
        budget=queries,
    ).as_dict()
