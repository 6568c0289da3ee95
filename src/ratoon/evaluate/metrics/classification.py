"""How well labels are given: one label a record, or several, and whether the probabilities can be believed.

Decides what counts as right. Which labels there are and how an answer becomes a label is the task's.

Letters: N records, K labels, R resamples, D kinds of records, J bins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ratoon.base.errors import DataError
from ratoon.evaluate.metrics.counts import averaged_heads, averages, expect_pairs, table, three
from ratoon.evaluate.metrics.value import Figures, Floats, Head, Measured, measured, ratio, side_by_side, summed

BINS = 15
"""Bins of the calibration error, as in Guo et al. (2017)."""
NO_LABEL = "(no label)"
"""The column of the confusion table for predictions that are none of the labels."""


def classification(
    expected: Sequence[str],
    predicted: Sequence[str],
    labels: Sequence[str],
    probabilities: npt.ArrayLike | None = None,
    *,
    positive: str | None = None,
    seed: int = 1,
    resamples: int = 1000,
) -> Measured:
    """Accuracy (the main figure), F1, precision and recall in three averages, and Matthews' correlation.

    A prediction that is none of `labels` is wrong; it counts against recall, not as a class of the averages. Matthews'
    correlation (Gorodkin 2004, eq. 8) counts all such predictions as one further class. `positive` adds precision,
    recall and F1 of that label. `probabilities` (N, K), in the order of `labels`, add the expected calibration error
    (Guo et al. 2017, eq. 3: 15 bins of equal width, of the probability of the predicted label) and Brier's score
    (1950: the squared error summed over labels, 0 to 2).
    Tables: `per_class`, `confusion`, and with probabilities `calibration`. Raises `DataError` for labels that are
    not in `labels` and for probabilities of another shape or sum.
    """
    n, place = expect_pairs(expected, predicted), _places(labels)
    expected_N = _coded(expected, place, "the label")
    predicted_N = np.array([place.get(label, len(labels)) for label in predicted])
    if positive is not None and positive not in place:
        raise DataError(f"the positive label '{positive}' is unknown", expected=f"one of {', '.join(labels)}")
    note = _notes(labels, expected_N, int((predicted_N == len(labels)).sum()))
    parts = [_cells(expected_N, predicted_N, len(labels), None if positive is None else place[positive])]
    accuracy, correlation = "accuracy|class:single", "matthews|class:single|gorodkin 2004|zero division:0"
    heads = [Head("accuracy", accuracy, note=note), *averaged_heads("", "class:single", note)]
    heads.append(Head("matthews", correlation, note=note))
    if positive is not None:
        heads += [Head(f"{what}_positive", f"{what}|label:{positive}|zero division:0") for what in _THREE]
    tables = _label_tables([*labels], expected_N, predicted_N)
    correct_N = (expected_N == predicted_N).astype(np.float64)
    per_record = {"correct": correct_N.tolist()}
    if probabilities is not None:
        believed_NK = _believed(probabilities, n, len(labels), sums_to_one=True)
        padded = np.concatenate([believed_NK, np.zeros((n, 1))], axis=1)
        confidence_N = padded[np.arange(n), predicted_N]
        brier_N = ((believed_NK - np.eye(len(labels))[expected_N]) ** 2).sum(axis=1)
        parts.append(_calibrated(confidence_N[:, None], correct_N[:, None], brier_N))
        heads += _calibration_heads("predicted label", "summed over labels, 0 to 2")
        tables["calibration"] = _calibration_table(confidence_N, correct_N)
        per_record |= {"confidence": confidence_N.tolist(), "brier": brier_N.tolist()}
    figures = side_by_side(*parts)
    return measured(figures, n, heads, seed=seed, resamples=resamples, tables=tables, per_record=per_record)


def multi_label(
    expected: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    labels: Sequence[str],
    probabilities: npt.ArrayLike | None = None,
    *,
    seed: int = 1,
    resamples: int = 1000,
) -> Measured:
    """Micro F1 (the main figure), the other averages, F1 by record, subset accuracy and Hamming loss.

    The averages by label go over labels that are expected or predicted somewhere (scikit-learn's, given these labels);
    F1 by record is 0 where a record has no label and got none, as scikit-learn's. A predicted label that is none of
    `labels` makes the record's subset wrong and is otherwise left out, with a note. `probabilities` (N, K) of each
    label being there, each on its own, add the calibration error over all decisions (Guo et al. 2017, eq. 3, of the
    probability of "there") and Brier's score (the mean squared error of a decision, 0 to 1).
    Tables: `per_class`, and with probabilities `calibration`. Raises `DataError` as `classification`.
    """
    n, place = expect_pairs(expected, predicted), _places(labels)
    for number, given in enumerate(expected, start=1):
        _coded(given, place, f"record {number}: the label")
    kinds: dict[tuple[frozenset[str], frozenset[str]], int] = {}
    pairs = [(frozenset(one), frozenset(other)) for one, other in zip(expected, predicted, strict=True)]
    kind_N = np.array([kinds.setdefault(pair, len(kinds)) for pair in pairs])
    expected_DK = _indicators((one for one, _ in kinds), place)
    predicted_DK = _indicators((other for _, other in kinds), place)
    hits_DK = expected_DK * predicted_DK
    exact_D = np.array([one == other for one, other in kinds], dtype=np.float64)
    f1_D = ratio(2 * hits_DK.sum(axis=1), (expected_DK + predicted_DK).sum(axis=1))
    wrong_D = np.abs(expected_DK - predicted_DK).mean(axis=1)
    sums_DS = np.concatenate(
        [hits_DK, predicted_DK, expected_DK, np.stack([f1_D, exact_D, wrong_D, np.ones(len(kinds))], axis=1)], axis=1
    )

    def formula(sums_RS: Floats) -> Floats:
        counts_RS, rest_RS = sums_RS[:, :-4], sums_RS[:, -4:]
        means = rest_RS[:, :3] / rest_RS[:, 3:]
        return np.concatenate([averages(*np.split(counts_RS, 3, axis=1)), means], axis=1)

    foreign = sum(label not in place for _, given in pairs for label in given)
    seen_K = (expected_DK[kind_N]).sum(axis=0) > 0
    note = _notes(labels, np.flatnonzero(seen_K), foreign)
    heads = [
        *averaged_heads("", "class:multi", note),
        Head("f1_samples", "f1|average:records|class:multi|zero division:0", note=note),
        Head("subset_accuracy", "accuracy|class:multi|all labels of a record right", note=note),
        Head("hamming_loss", "hamming loss|class:multi", higher_is_better=False, note=note),
    ]
    counts = [counts_DK[kind_N].sum(axis=0) for counts_DK in (hits_DK, predicted_DK, expected_DK)]
    tables: dict[str, Any] = {"per_class": table(labels, *counts)}
    per_record = {"correct": exact_D[kind_N].tolist(), "f1": f1_D[kind_N].tolist()}
    parts = [summed(sums_DS, formula, kind_N)]
    if probabilities is not None:
        believed_NK = _believed(probabilities, n, len(labels), sums_to_one=False)
        there_NK = expected_DK[kind_N]
        brier_N = ((believed_NK - there_NK) ** 2).mean(axis=1)
        parts.append(_calibrated(believed_NK, there_NK, brier_N))
        heads += _calibration_heads("each label being there", "mean of a decision, 0 to 1")
        tables["calibration"] = _calibration_table(believed_NK.ravel(), there_NK.ravel())
        per_record["brier"] = brier_N.tolist()
    figures = side_by_side(*parts)
    return measured(figures, n, heads, seed=seed, resamples=resamples, tables=tables, per_record=per_record)


_THREE = ("precision", "recall", "f1")


def _cells(
    expected_N: npt.NDArray[np.int64], predicted_N: npt.NDArray[np.int64], k: int, positive: int | None
) -> Figures:
    """Accuracy, the averages, Matthews' and, where asked for, the positive label's three: from the cells of the
    confusion table that are not empty. Labels that occur nowhere have no column."""
    cells_D, kind_N = np.unique(expected_N * (k + 1) + predicted_N, return_inverse=True)
    of_expected_D, of_predicted_D = cells_D // (k + 1), cells_D % (k + 1)
    present = np.union1d(of_expected_D, of_predicted_D)
    predicted_DK = (of_predicted_D[:, None] == present).astype(np.float64)
    expected_DK = (of_expected_D[:, None] == present).astype(np.float64)
    sums_DS = np.concatenate([predicted_DK * expected_DK, predicted_DK, expected_DK], axis=1)
    named = present < k

    def formula(sums_RS: Floats) -> Floats:
        hits_RK, predicted_RK, expected_RK = np.split(sums_RS, 3, axis=1)
        n_R, right_R = expected_RK.sum(axis=1), hits_RK.sum(axis=1)
        nine = averages(hits_RK[:, named], predicted_RK[:, named], expected_RK[:, named])
        above = right_R * n_R - (predicted_RK * expected_RK).sum(axis=1)
        spread = [n_R**2 - (counts**2).sum(axis=1) for counts in (predicted_RK, expected_RK)]
        matthews_R = ratio(above, np.sqrt(spread[0]) * np.sqrt(spread[1]))
        columns = [(right_R / n_R)[:, None], nine, matthews_R[:, None]]
        if positive is not None:
            column = present == positive
            of_it = [(counts * column).sum(axis=1) for counts in (hits_RK, predicted_RK, expected_RK)]
            columns.append(np.stack(three(of_it[0], of_it[1], of_it[2]), axis=1))
        return np.concatenate(columns, axis=1)

    return summed(sums_DS, formula, kind_N)


def _label_tables(
    labels: list[str], expected_N: npt.NDArray[np.int64], predicted_N: npt.NDArray[np.int64]
) -> dict[str, Any]:
    k = len(labels)
    counts = np.bincount(expected_N * (k + 1) + predicted_N, minlength=(k + 1) ** 2).reshape(k + 1, k + 1)
    square = counts[:k, :k]
    hits_K, predicted_K, expected_K = np.diag(square), square.sum(axis=0), counts[:k].sum(axis=1)
    of_class = table(labels, *(one.astype(np.float64) for one in (hits_K, predicted_K, expected_K)))
    foreign = bool(counts[:, k].any())
    shown = counts if foreign else square
    return {
        "per_class": of_class,
        "confusion": {"labels": [*labels, NO_LABEL] if foreign else labels, "counts": shown.tolist()},
    }


def _calibrated(confidence_NX: Floats, right_NX: Floats, brier_N: Floats) -> Figures:
    """Calibration error and Brier's score of N records with X decisions each."""
    n, decisions = confidence_NX.shape
    bin_NX = _bins(confidence_NX)
    cell_NX = np.arange(n)[:, None] * BINS + bin_NX
    size = n * BINS
    sums = [
        np.bincount(cell_NX.ravel(), weights=weight_NX.ravel(), minlength=size).reshape(n, BINS)
        for weight_NX in (confidence_NX, right_NX)
    ]
    sums_NS = np.concatenate([sums[1] - sums[0], brier_N[:, None], np.ones((n, 1))], axis=1)

    def formula(sums_RS: Floats) -> Floats:
        drawn_R = sums_RS[:, -1]
        error_R = np.abs(sums_RS[:, :BINS]).sum(axis=1) / (drawn_R * decisions)
        return np.stack([error_R, sums_RS[:, BINS] / drawn_R], axis=1)

    return summed(sums_NS, formula)


def _calibration_heads(what: str, scale: str) -> list[Head]:
    error = f"expected calibration error|bins:{BINS} of equal width, closed above|of:{what}|guo et al. 2017"
    brier = f"brier|{scale}"
    return [Head("calibration_error", error, higher_is_better=False), Head("brier", brier, higher_is_better=False)]


def _calibration_table(confidence: Floats, right: Floats) -> dict[str, Any]:
    bin_of = _bins(confidence)
    size = np.bincount(bin_of, minlength=BINS)
    sums = [np.bincount(bin_of, weights=one, minlength=BINS).astype(np.float64) for one in (confidence, right)]
    means = [ratio(one, size.astype(np.float64)) for one in sums]
    return {
        "bins": [
            {
                "low": j / BINS,
                "high": (j + 1) / BINS,
                "n": int(size[j]),
                "confidence": float(means[0][j]) if size[j] else None,
                "accuracy": float(means[1][j]) if size[j] else None,
            }
            for j in range(BINS)
        ]
    }


def _bins(confidence: Floats) -> npt.NDArray[np.int64]:
    """The bin of each probability: bin j is (j / J, (j + 1) / J], and 0 belongs to the first."""
    edges = np.arange(1, BINS) / BINS
    return np.searchsorted(edges, confidence, side="left")


def _believed(probabilities: npt.ArrayLike, n: int, k: int, *, sums_to_one: bool) -> Floats:
    believed = np.asarray(probabilities, dtype=np.float64)
    expected = f"{n} rows of {k} probabilities, one for each label"
    if believed.shape != (n, k):
        raise DataError(f"the probabilities have the shape {believed.shape}", expected=expected)
    wrong_N = ~((believed >= 0) & (believed <= 1 + 1e-6)).all(axis=1)
    if sums_to_one:
        wrong_N |= ~(np.abs(believed.sum(axis=1) - 1) < 1e-3)
        expected += ", which sum to 1"
    if wrong_N.any():
        number = int(np.argmax(wrong_N))
        raise DataError(
            f"the probabilities of a record are none: {believed[number][:5].tolist()}",
            where=f"record {number + 1}",
            expected=expected,
        )
    return believed


def _places(labels: Sequence[str]) -> dict[str, int]:
    twice = [label for label, times in Counter(labels).items() if times > 1]
    if twice or not labels:
        found = f"the label '{twice[0]}' stands twice in the list" if twice else "the list of labels is empty"
        raise DataError(found, expected="each label once")
    return {label: number for number, label in enumerate(labels)}


def _coded(given: Iterable[str], place: dict[str, int], what: str) -> npt.NDArray[np.int64]:
    codes = []
    for number, label in enumerate(given, start=1):
        if label not in place:
            raise DataError(
                f"{what} '{label}' is none of the {len(place)} labels",
                where=f"record {number}" if what == "the label" else None,
                expected=f"one of {', '.join(list(place)[:20])}",
            )
        codes.append(place[label])
    return np.array(codes, dtype=np.int64)


def _indicators(sets: Iterable[frozenset[str]], place: dict[str, int]) -> Floats:
    return np.array([[label in one for label in place] for one in sets], dtype=np.float64)


def _notes(labels: Sequence[str], seen: npt.NDArray[np.int64], foreign: int) -> str | None:
    """What must be said of the split: labels that it lacks, predictions that are no label."""
    there = set(seen.tolist())
    absent = [label for number, label in enumerate(labels) if number not in there]
    said = []
    if absent:
        more = ", …" if len(absent) > 5 else ""
        said.append(f"{len(absent)} of {len(labels)} labels stand on no record here ({', '.join(absent[:5])}{more})")
    if foreign:
        said.append(f"{foreign} predictions are none of the labels and count as wrong")
    return "; ".join(said) or None
