"""Precision, recall and F1 from counts: the three averages, and the rows of a table by class.

Decides how classes are averaged and what stands where a denominator is 0. What a hit is (a record, a tag, an entity)
is the caller's.

Letters: R resamples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ratoon.base.errors import DataError
from ratoon.evaluate.metrics.value import Floats, Head, ratio

AVERAGED = tuple(f"{what}_{how}" for how in ("micro", "macro", "weighted") for what in ("f1", "precision", "recall"))
"""The figures of `averages`, in its order."""


def averages(hits_RK: Floats, predicted_RK: Floats, expected_RK: Floats) -> Floats:
    """The nine figures of `AVERAGED`, (R, 9), from how often each class was hit, predicted and expected.

    Macro is the plain mean over the classes that are expected or predicted, weighted the mean by how often each is
    expected, micro that of all counts together: scikit-learn's and seqeval's defaults, a quotient with denominator 0
    being 0.
    """
    precision_RK, recall_RK, f1_RK = three(hits_RK, predicted_RK, expected_RK)
    sums = (counts_RK.sum(axis=1) for counts_RK in (hits_RK, predicted_RK, expected_RK))
    precision_R, recall_R, f1_R = three(*sums)
    present_RK = ((predicted_RK + expected_RK) > 0).astype(np.float64)
    columns = [f1_R, precision_R, recall_R]
    for weight_RK in (present_RK, expected_RK):
        total_R = weight_RK.sum(axis=1)
        columns += [ratio((one_RK * weight_RK).sum(axis=1), total_R) for one_RK in (f1_RK, precision_RK, recall_RK)]
    return np.stack(columns, axis=1)


def three(hits: Floats, predicted: Floats, expected: Floats) -> tuple[Floats, Floats, Floats]:
    """Precision, recall and F1 of counts of any shape; 0 where the denominator is 0."""
    return ratio(hits, predicted), ratio(hits, expected), ratio(2 * hits, predicted + expected)


def averaged_heads(prefix: str, signature: str, note: str | None = None) -> list[Head]:
    """The heads of `averages`, each name behind `prefix`, each signature naming its average."""
    heads = []
    for name in AVERAGED:
        what, _, how = name.partition("_")
        over = {"micro": "all counts", "macro": "labels present", "weighted": "labels by support"}[how]
        sign = f"{what}|average:{how} over {over}|zero division:0|{signature}"
        heads.append(Head(f"{prefix}{name}", sign, note=note))
    return heads


def table(labels: Sequence[str], hits_K: Floats, predicted_K: Floats, expected_K: Floats) -> list[dict[str, Any]]:
    """One row a class: label, precision, recall, f1, support (times expected) and predicted (times predicted)."""
    columns = zip(labels, *three(hits_K, predicted_K, expected_K), expected_K, predicted_K, strict=True)
    return [
        {
            "label": label,
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "support": int(support),
            "predicted": int(predicted),
        }
        for label, precision, recall, f1, support, predicted in columns
    ]


def expect_pairs(expected: Sequence[Any], predicted: Sequence[Any]) -> int:
    """The number of records. Raises `DataError` where there is none, or not one prediction each."""
    if len(expected) != len(predicted):
        raise DataError(
            f"{len(expected)} records have {len(predicted)} predictions",
            expected="one prediction for each record, an empty one where the model gave nothing",
        )
    if not len(expected):
        raise DataError("there is no record to measure", expected="at least one record with its prediction")
    return len(expected)
