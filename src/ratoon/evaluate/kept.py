"""Figures counted anew from the predictions that a run kept, so that runs can be compared long after they ended.

Decides what a line of predictions.jsonl must hold for that, when kept predictions stand for a model's answers, and how
several runs count as one (their mean, over one draw of the records). What is counted is `task.py`'s, how two runs are
compared `metrics/value.py`'s; the files are read by whoever asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ratoon.base.errors import DataError
from ratoon.evaluate.metrics.value import Floats, Head, Indices, Measured, measured
from ratoon.evaluate.task import Prediction, measure
from ratoon.tasks.contract import Task


def counted_again(task: Task[Any], lines: Sequence[Mapping[str, Any]], language: str) -> Measured:
    """The task's figures from lines of predictions.jsonl; what they came to, not their intervals (see `averaged`).

    Raises `DataError` for a line without what is counted, `ConfigError` for a library that is missing.
    """
    needed = {"perplexity": ("nats", "tokens"), "preference": ("nats",)}.get(task.measure, ("answer",))
    if getattr(task, "grouped", False):
        needed = (*needed, "group")
    for number, line in enumerate(lines, start=1):
        missing = [key for key in ("expected", *needed) if key not in line]
        if missing:
            raise DataError(
                f"the prediction has no '{missing[0]}'",
                where=f"predictions.jsonl:{number}",
                fix="measure the run again: ratoon evaluate RUN",
            )
    predictions = [
        Prediction(
            None, line.get("answer"), nats=line.get("nats"), tokens=line.get("tokens", 0), group=line.get("group", "")
        )
        for line in lines
    ]
    drawing = {} if task.measure == "perplexity" else {"resamples": 1}
    return measure(task, predictions, language, expected=[line["expected"] for line in lines], **drawing)


def kept_predictions(
    task: Task[Any], lines: Sequence[Mapping[str, Any]], records: Sequence[Any]
) -> list[Prediction] | None:
    """The predictions of lines of predictions.jsonl, as they were given to these records; None where they were given to
    other ones, or do not hold what is needed."""
    if len(lines) != len(records):
        return None
    found = []
    for line, record in zip(lines, records, strict=True):
        same = line.get("place") == record.place and line.get("input") == task.text(record)
        if not same or "answer" not in line or _tuples(line.get("expected")) != _tuples(task.expected(record)):
            return None
        probabilities = line.get("probabilities")
        found.append(
            Prediction(
                record,
                _tuples(line["answer"]),
                None if probabilities is None else tuple(probabilities),
                line.get("text"),
                line.get("nats"),
                int(line.get("tokens", 0)),
                int(line.get("cut_tokens", 0)),
            )
        )
    return found


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list | tuple) else value


def averaged(parts: Sequence[Measured], name: str) -> Measured:
    """The mean of the figure `name` over several runs on the same records, as one figure that can be compared.

    All runs are counted on the same draws of the records: the interval says how much of the mean is the records'
    chance, and nothing of the runs' own (that is the spread over them). Raises `DataError` where a figure is missing.
    """
    places = [[one.name for one in part.values].index(part.value(name).name) for part in parts]
    first = parts[0].value(name)

    def figures(drawn_RN: Indices) -> Floats:
        columns = []
        for part, place in zip(parts, places, strict=True):
            assert part.figures is not None, "counted in this process"
            columns.append(part.figures(drawn_RN)[:, place])
        mean_R: Floats = np.mean(columns, axis=0)
        return mean_R[:, None]

    head = Head(name, first.signature, first.higher_is_better)
    return measured(figures, parts[0].n_records, [head], seed=1, resamples=1000)
