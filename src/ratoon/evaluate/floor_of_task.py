"""The floors of a task: its records in the shapes that the cheap classics take, measured as the model is.

Decides which shape a task's records have. How a floor works is `floor/`'s, what an answer is worth `task.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ratoon.base.errors import ConfigError
from ratoon.evaluate.floor import kinds
from ratoon.evaluate.floor.run import floors
from ratoon.evaluate.metrics.value import Measured, Value, compare
from ratoon.evaluate.task import Prediction, TaskReport, encode, measure
from ratoon.generate.lm import LanguageModel
from ratoon.tasks.contract import Task, TooLong


def shaped(task: Task[Any], records: Sequence[Any], lm: LanguageModel, too_long: TooLong) -> kinds.Data:
    """The records as a floor takes them; where likelihood is measured, the tokens that `lm` is asked for. Raises
    `ConfigError` for a task without floors."""
    if task.measure == "perplexity":
        room = lm.context_tokens - lm.virtual_tokens
        found = [encode(lm, task, record, too_long, room).examples for record in records]
        pieces = [[(tuple(one.ids), tuple(one.weight)) for one in examples] for examples in found]
        return kinds.Learned(pieces, lm.model.cfg.vocab_size)
    texts = [task.text(record) for record in records]
    expected = [task.expected(record) for record in records]
    if task.kind == "classification":
        return kinds.Labelled(texts, expected)
    if task.kind == "multi-label":
        return kinds.LabelSets(texts, expected)
    if task.kind in ("pairs", "pair-scoring"):
        firsts, seconds = ([text.partition("\n")[side] for text in texts] for side in (0, 2))
        if task.kind == "pairs":
            return kinds.Pairs(firsts, seconds, expected)
        return kinds.PairNumbers(firsts, seconds, expected)
    if task.kind == "scoring":
        groups = [record.group for record in records]
        return kinds.Numbers(texts, expected, groups if any(groups) else None)
    if task.kind == "tagging":
        return kinds.Tagged([list(one.words) for one in records], [list(tags) for tags in expected])
    if task.kind == "extractive":
        return kinds.Questions(
            [one.question for one in records], [one.context for one in records], [list(one.answers) for one in records]
        )
    if task.kind == "question-answering" and "context" in records[0].values:
        return kinds.Questions(
            [one.values["question"] for one in records], [one.values["context"] for one in records],
            [list(one.answers) for one in records],
        )  # fmt: skip
    if task.kind in ("translation", "summarization", "question-answering"):
        return kinds.Sources(texts, [answers[0] for answers in expected])
    raise ConfigError(
        f"the task {task.kind} has no floor", where="--floor", fix="leave --floor out: its measure stands alone"
    )


def beside(
    report: TaskReport,
    training: Sequence[Any],
    lm: LanguageModel,
    *,
    language: str,
    too_long: TooLong,
    seed: int = 1,
) -> list[dict[str, Any]]:
    """The floors of the report's task, learned from `training` and measured on the report's records: name, what it is,
    values, seconds, and the paired bootstrap of ours less it in the main figure."""
    task, records = report.task, [one.record for one in report.predictions]
    main = report.measured.values[0].name
    found = []
    known, asked = (shaped(task, some, lm, too_long) for some in (training, records))
    for floor in floors(task.kind, known, asked, language=language, seed=seed):
        answers = [_prediction(task, record, answer) for record, answer in zip(records, floor.predictions, strict=True)]
        measured = measure(task, answers, language)
        found.append(
            {
                "name": floor.name,
                "what": floor.what,
                "values": [one.as_dict() for one in measured.values],
                "seconds": floor.seconds,
                "paired": compare(report.measured, measured, main).as_dict(),
            }
        )
    return found


def _prediction(task: Task[Any], record: Any, answer: Any) -> Prediction:
    if task.measure == "perplexity":
        nats, n = answer
        return Prediction(record, None, nats=nats, tokens=n)
    return Prediction(record, tuple(answer) if isinstance(answer, list) else answer)


def sentence(measured: Measured, found: Sequence[dict[str, Any]]) -> str:
    """Whether the model beats the best of its floors, said plainly."""
    ours = measured.values[0]
    sign = 1 if ours.higher_is_better else -1
    known = [one for one in found if one["values"][0]["value"] is not None]
    best = max(known or found, key=lambda one: sign * (one["values"][0]["value"] or 0.0))
    theirs, paired = best["values"][0]["value"], best["paired"]
    interval, word = paired["interval"], standing(ours, theirs, paired)
    if word is None:
        return f"{ours.name} is undefined: nothing can be said about the floor"
    return (
        f"the model {word} the best floor, {best['name']} ({best['what']}): {ours.name} {ours.value:.4f} against "
        f"{theirs:.4f}, difference {paired['difference']:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]"
    )


def standing(ours: Value, theirs: float | None, paired: dict[str, Any]) -> str | None:
    """Whether our figure beats another one, by the paired bootstrap of ours less it; None where one is undefined."""
    interval = paired["interval"]
    if ours.value is None or theirs is None or interval is None:
        return None
    low, high = interval if ours.higher_is_better else (-interval[1], -interval[0])
    return "beats" if low > 0 else "does NOT beat" if high < 0 else "cannot be told from"
