"""How well numbers are predicted: correlation, error, and the agreement of graders.

Decides how a prediction becomes a grade, and how figures of ranks are resampled. What the grades are is the task's.

Letters: N records, D distinct pairs of numbers, R resamples, G groups, M figures (or the records of one group).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ratoon.base.errors import ConfigError, DataError
from ratoon.evaluate.metrics.counts import expect_pairs
from ratoon.evaluate.metrics.value import (
    Figures,
    Floats,
    Head,
    Indices,
    Measured,
    measured,
    occurrences,
    ratio,
    side_by_side,
    summed,
)

MOST_GRADES = 1000
"""Grades of a scale: kappa's table is of their square."""
MOST_GROUPS = 20
"""Groups that are listed one by one beside their mean."""


def scores(
    expected: Sequence[float],
    predicted: Sequence[float],
    low: float | None = None,
    high: float | None = None,
    step: float = 1.0,
    *,
    seed: int = 1,
    resamples: int = 1000,
) -> Measured:
    """Spearman's and Pearson's correlation, RMSE and MAE; with a scale `low` to `high` in steps, the quadratic
    weighted kappa before them as the main figure.

    Kappa (Cohen 1968) takes both sides to the nearest grade of the scale, halves up, and what lies outside to its
    ends; the other figures take the numbers as they are. It equals scikit-learn's `cohen_kappa_score(weights=
    "quadratic", labels=all grades)`. Spearman's is Pearson's of mid-ranks. A correlation is undefined (None, with a
    note) where one side is constant, kappa where both sides hold one and the same grade.
    Raises `DataError` for numbers that are not finite and for expected grades outside the scale, `ConfigError` for an
    impossible scale.
    """
    n = expect_pairs(expected, predicted)
    expected_N, predicted_N = _finite(expected, "expected"), _finite(predicted, "predicted")
    part, heads = _figures(expected_N, predicted_N, None if low is None and high is None else (low, high, step))
    per_record = {"error": (predicted_N - expected_N).tolist()}
    return measured(part, n, heads, seed=seed, resamples=resamples, per_record=per_record)


def scores_by_group(
    expected: Sequence[float],
    predicted: Sequence[float],
    groups: Sequence[str],
    scales: Mapping[str, tuple[float, float, float] | None],
    *,
    seed: int = 1,
    resamples: int = 1000,
) -> Measured:
    """Each figure of `scores` as the mean over groups that are graded on scales of their own, as ASAP's essay sets are;
    after them, for at most `MOST_GROUPS` groups, the main figure of each under `name[group]` with its own n.

    Numbers of different scales are nowhere thrown together: how the scales differ would pass for agreement. A group
    whose figure is undefined (all its grades are the same) is left out of the mean, and the note says so. `scales`:
    lowest, highest and step of each group; kappa is counted where all groups that occur have one.
    Raises `DataError` and `ConfigError` as `scores` does, the former also for a group without a scale.
    """
    n = expect_pairs(expected, predicted)
    expected_N, predicted_N = _finite(expected, "expected"), _finite(predicted, "predicted")
    names = sorted(set(groups))
    unknown = [name for name in names if name not in scales]
    if len(groups) != n or unknown:
        raise DataError(
            f"group '{unknown[0]}' has no scale" if unknown else f"{len(groups):,} groups for {n:,} records",
            expected=f"one of {', '.join(scales)}" if unknown else "a group each",
        )
    on_scales = all(scales[name] is not None for name in names)
    members = [np.flatnonzero(np.asarray(groups) == name) for name in names]
    found = [
        _figures(expected_N[inside], predicted_N[inside], scales[name] if on_scales else None, f"group {name}, ")
        for name, inside in zip(names, members, strict=True)
    ]
    parts = [_among(part, inside, n, len(heads)) for (part, heads), inside in zip(found, members, strict=True)]

    def figures(drawn_RN: Indices) -> Floats:
        by_group_GRM = np.stack([part(drawn_RN) for part in parts])
        known_GRM = np.isfinite(by_group_GRM)
        total_RM = np.where(known_GRM, by_group_GRM, 0.0).sum(axis=0)
        mean_RM = ratio(total_RM, known_GRM.sum(axis=0).astype(np.float64), otherwise=np.nan)
        listed = by_group_GRM[:, :, 0].T if len(names) <= MOST_GROUPS else np.empty((len(drawn_RN), 0))
        return np.concatenate([mean_RM, listed], axis=1)

    whole_M = [part(np.arange(n, dtype=np.int64)[None])[0] for part in parts]
    means = []
    for place, head in enumerate(found[0][1]):
        signs = {name: heads[place].signature for name, (_, heads) in zip(names, found, strict=True)}
        one = len(set(signs.values())) == 1
        told = head.signature if one else ", ".join(f"{name}: {sign}" for name, sign in signs.items())
        undefined = [name for name, of_group in zip(names, whole_M, strict=True) if not np.isfinite(of_group[place])]
        means.append(replace(head, signature=f"mean of {len(names)} groups|{told}", note=_left_out(undefined)))
    own = [replace(heads[0], name=f"{heads[0].name}[{name}]") for name, (_, heads) in zip(names, found, strict=True)]
    own = own if len(names) <= MOST_GROUPS else []
    per_record = {"error": (predicted_N - expected_N).tolist()}
    whole = measured(figures, n, [*means, *own], seed=seed, resamples=resamples, per_record=per_record)
    counts = [n] * len(means) + [len(inside) for inside in members][: len(own)]
    return replace(whole, values=[replace(one, n=count) for one, count in zip(whole.values, counts, strict=True)])


def _figures(
    expected_N: Floats, predicted_N: Floats, scale: tuple[float | None, float | None, float] | None, whose: str = ""
) -> tuple[Figures, list[Head]]:
    """The figures of numbers on one scale, or on none, and their names."""
    parts: list[Figures] = []
    heads = []
    if scale is not None:
        step = scale[2]
        low, grades = _scale(*scale)
        on_scale = f"{low:g} to {low + step * (grades - 1):g} by {step:g}"
        _expect_on_scale(expected_N, low, step, grades, whose + on_scale)
        parts.append(_kappa(_graded(expected_N, low, step, grades), _graded(predicted_N, low, step, grades), grades))
        sign = f"cohen's kappa|weights:quadratic|scale:{on_scale}|rounding:nearest, halves up"
        heads.append(Head("kappa_quadratic", sign, undefined="undefined: both sides hold one and the same grade"))
    constant = "undefined: all numbers of one side are the same"
    parts += [_spearman(expected_N, predicted_N), _moments(expected_N, predicted_N)]
    heads += [
        Head("spearman", "spearman|ties:mid-ranks", undefined=constant),
        Head("pearson", "pearson", undefined=constant),
        Head("rmse", "root mean squared error", higher_is_better=False),
        Head("mae", "mean absolute error", higher_is_better=False),
    ]
    return side_by_side(*parts), heads


def _among(part: Figures, members_M: Indices, n: int, figures: int) -> Figures:
    """Figures of some of the n records, from draws of all of them; undefined where none of the some is drawn."""
    place_N = np.full(n, -1, dtype=np.int64)
    place_N[members_M] = np.arange(len(members_M))

    def of(row_N: Indices) -> Floats:
        inside = place_N[row_N]
        inside = inside[inside >= 0]
        return part(inside[None])[0] if len(inside) else np.full(figures, np.nan)

    return lambda drawn_RN: np.stack([of(row_N) for row_N in drawn_RN])


def _left_out(names: Sequence[str]) -> str | None:
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"left out of the mean, undefined there: {len(names)} groups ({shown})" if names else None


def _kappa(expected_N: npt.NDArray[np.int64], predicted_N: npt.NDArray[np.int64], grades: int) -> Figures:
    """1 less observed over expected disagreement (Cohen 1968, eq. 8), a disagreement weighing its distance squared.

    The disagreement of independent graders is that of their marginals: Σ (i - j)² a_i b_j = n (Σ i² a_i + Σ j² b_j)
    - 2 Σ i a_i Σ j b_j, so that first and second moments are enough.
    """
    cells_D, kind_N = np.unique(expected_N * grades + predicted_N, return_inverse=True)
    a, b = (cells_D // grades).astype(np.float64), (cells_D % grades).astype(np.float64)
    sums_DS = np.stack([np.ones(len(a)), a, b, a * a, b * b, (a - b) ** 2], axis=1)

    def formula(sums_RS: Floats) -> Floats:
        n, a, b, aa, bb, apart = sums_RS.T
        by_chance = n * (aa + bb) - 2 * a * b
        return (1 - ratio(n * apart, by_chance, otherwise=np.nan))[:, None]

    return summed(sums_DS, formula, kind_N)


def _moments(expected_N: Floats, predicted_N: Floats) -> Figures:
    """Pearson's correlation, RMSE and MAE. Numbers are centred first, so that the squares keep their digits."""
    x, y = (side - side.mean() if np.ptp(side) else np.zeros(len(side)) for side in (expected_N, predicted_N))
    off = predicted_N - expected_N
    sums_NS = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y, off * off, np.abs(off)], axis=1)

    def formula(sums_RS: Floats) -> Floats:
        n, x, y, xx, yy, xy, squares, distances = sums_RS.T
        correlation = _correlation(n * xy - x * y, _spread(n * xx, x * x), _spread(n * yy, y * y))
        return np.stack([correlation, np.sqrt(squares / n), distances / n], axis=1)

    return summed(sums_NS, formula)


def _spearman(expected_N: Floats, predicted_N: Floats) -> Figures:
    """Spearman's correlation of drawn records: mid-ranks follow from how often each distinct number was drawn."""
    pairs, kind_N = np.unique(np.stack([expected_N, predicted_N], axis=1), axis=0, return_inverse=True)
    places = [np.unique(side, return_inverse=True)[1] for side in pairs.T]
    kind_N = kind_N.reshape(-1)

    def figures(drawn_RN: Indices) -> Floats:
        drawn_RD = occurrences(drawn_RN, len(pairs), kind_N)
        n = float(drawn_RN.shape[1])
        ranks = [_mid_ranks(drawn_RD, place) - (n + 1) / 2 for place in places]
        xy, xx, yy = ((drawn_RD * ranks[one] * ranks[other]).sum(axis=1) for one, other in ((0, 1), (0, 0), (1, 1)))
        return _correlation(xy, xx, yy)[:, None]

    return figures


def _mid_ranks(drawn_RD: Floats, place_D: npt.NDArray[np.int64]) -> Floats:
    """The mean rank (from 1) that a number of each kind has among the drawn, (R, D)."""
    order = np.argsort(place_D, kind="stable")
    starts = np.searchsorted(place_D[order], np.arange(int(place_D.max()) + 1))
    times_RV = np.add.reduceat(drawn_RD[:, order], starts, axis=1)
    rank_RV = np.cumsum(times_RV, axis=1) - (times_RV - 1) / 2
    return rank_RV[:, place_D]


def _correlation(xy: Floats, xx: Floats, yy: Floats) -> Floats:
    """xy / √(xx yy), NaN where one spread is 0."""
    return np.clip(ratio(xy, np.sqrt(xx) * np.sqrt(yy), otherwise=np.nan), -1.0, 1.0)


def _spread(squares: Floats, square: Floats) -> Floats:
    """n Σx² - (Σx)², and 0 where the difference is no more than what rounding leaves of equal numbers."""
    spread = squares - square
    return np.where(spread > 1e-12 * squares, spread, 0.0)


def _expect_on_scale(numbers_N: Floats, low: float, step: float, grades: int, scale: str) -> None:
    outside = (numbers_N < low - step / 2) | (numbers_N > low + step * (grades - 0.5))
    if outside.any():
        number = int(np.argmax(outside))
        raise DataError(
            f"the expected score {numbers_N[number]:g} is not on the scale",
            where=f"record {number + 1}",
            expected=scale,
        )


def _scale(low: float | None, high: float | None, step: float) -> tuple[float, int]:
    """The lowest grade and how many there are."""
    if low is None or high is None or not step > 0 or not high > low:
        raise ConfigError(
            f"the scale {low} to {high} by {step} cannot be", expected="low below high, and a step above 0"
        )
    count = (high - low) / step + 1
    if abs(count - round(count)) > 1e-6 or count > MOST_GRADES:
        raise ConfigError(
            f"the scale {low:g} to {high:g} by {step:g} has {count:g} grades",
            expected=f"a whole number of grades, at most {MOST_GRADES}",
        )
    return low, round(count)


def _graded(numbers_N: Floats, low: float, step: float, grades: int) -> npt.NDArray[np.int64]:
    """The number of the nearest grade, halves up, kept on the scale."""
    return np.clip(np.floor((numbers_N - low) / step + 0.5), 0, grades - 1).astype(np.int64)


def _finite(numbers: Sequence[float], what: str) -> Floats:
    found = np.asarray(numbers, dtype=np.float64)
    wrong = ~np.isfinite(found)
    if wrong.any():
        raise DataError(
            f"the {what} score is {found[wrong][0]}", where=f"record {int(np.argmax(wrong)) + 1}", expected="a number"
        )
    return found
