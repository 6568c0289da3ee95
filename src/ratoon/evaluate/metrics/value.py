"""What a figure is and how sure it is: a value with n, interval and signature, and the bootstrap behind the intervals.

Decides how records are drawn anew, which interval and which p-value come of it, and what happens to figures that are
undefined. What is counted on the records is the business of the files beside this one. They hand in `Figures`: a
function from drawn records to figures, so that one draw serves all figures of a task, and the same function serves the
value, its interval and the comparison of two models.

Letters: N records, R resamples, D kinds of records (records that count the same are one kind), S sums, M figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ratoon.base.errors import DataError
from ratoon.base.seeds import stream

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Interval = tuple[float, float]
Statistic = Callable[[Indices], float]
"""From the numbers of drawn records (N) to a figure."""
Figures = Callable[[Indices], Floats]
"""From the numbers of drawn records (R, N) to figures (R, M); NaN where one is undefined."""

BLOCK_DRAWS = 1 << 22
"""Records drawn at once: 32 MiB of numbers, however many records and resamples there are."""
MOST_UNDEFINED = 0.05
"""A figure that is undefined in a larger share of the resamples has no interval."""


@dataclass(frozen=True)
class Value:
    """One figure. `value` is None where it is undefined (the `note` says why), `interval` the 95 % interval or None,
    `n` the units that were counted or drawn (`unit` names them), `signature` what another program needs to count the
    same."""

    name: str
    value: float | None
    n: int
    interval: Interval | None
    signature: str
    higher_is_better: bool = True
    unit: str = "record"
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The figure as plain values."""
        return {
            "name": self.name,
            "value": self.value,
            "n": self.n,
            "interval": None if self.interval is None else list(self.interval),
            "signature": self.signature,
            "higher_is_better": self.higher_is_better,
            "unit": self.unit,
            "note": self.note,
        }


@dataclass(frozen=True)
class Measured:
    """The figures of a task (the first is its main one), tables for a page, and what each record came to.

    `interval_of` says how the intervals were found, `n_records` over how many records. `figures` counts the values anew
    on drawn records, in the order of `values`; `compare` needs it. It is not part of `as_dict`.
    """

    values: list[Value]
    tables: dict[str, Any]
    per_record: dict[str, list[float]]
    interval_of: str = ""
    n_records: int = 0
    figures: Figures | None = field(default=None, repr=False, compare=False)

    def value(self, name: str) -> Value:
        """The figure called `name`. Raises `DataError` where there is none."""
        return self.values[self._place(name)]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "values": [one.as_dict() for one in self.values],
            "interval_of": self.interval_of,
            "n_records": self.n_records,
            "tables": self.tables,
            "per_record": self.per_record,
        }

    def _place(self, name: str) -> int:
        names = [one.name for one in self.values]
        if name not in names:
            raise DataError(f"there is no figure '{name}'", expected=f"one of {', '.join(names)}")
        return names.index(name)


@dataclass(frozen=True)
class Head:
    """What is known of a figure before it is counted."""

    name: str
    signature: str
    higher_is_better: bool = True
    note: str | None = None
    undefined: str | None = None
    """The note where the figure has no value."""


@dataclass(frozen=True)
class Paired:
    """How far one model is before another on the same records; see `paired`."""

    difference: float | None
    interval: Interval | None
    p_value: float | None
    n: int
    signature: str

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain values."""
        interval = None if self.interval is None else list(self.interval)
        return {
            "difference": self.difference,
            "interval": interval,
            "p_value": self.p_value,
            "n": self.n,
            "signature": self.signature,
        }


def bootstrap(statistic: Statistic, n: int, *, seed: int = 1, resamples: int = 1000) -> Interval | None:
    """The 95 % percentile interval of `statistic` over records drawn anew (Efron & Tibshirani 1993, § 13.3).

    `statistic` gets the numbers of n drawn records (0 to n - 1, repeats among them). None for fewer than two records,
    and where more than one resample in twenty gives no number.
    """
    return None if n < 2 else _percentiles(_resampled(one_by_one(statistic), n, seed, resamples)[:, 0])


def paired(statistic_a: Statistic, statistic_b: Statistic, n: int, *, seed: int = 1, resamples: int = 1000) -> Paired:
    """The paired bootstrap of two models on the same n records (Koehn 2004): both are counted on the same draws.

    `difference` is A less B, `interval` the percentile interval of the differences. `p_value` is two-sided, for "A and
    B do not differ": the distribution of the differences is shifted to mean no difference, and the share of resamples
    that are at least as far from 0 as what was seen is taken, 1 added above and below (Efron & Tibshirani 1993,
    § 16.4; Riezler & Maxwell 2005). Koehn's own figure, the share of resamples in which A wins, is not it.
    """
    return _paired(one_by_one(statistic_a), one_by_one(statistic_b), n, seed, resamples)


def compare(a: Measured, b: Measured, name: str, *, seed: int = 1, resamples: int = 1000) -> Paired:
    """`paired` for the figure `name` of two models that were measured on the same records in the same order.

    Raises `DataError` where the figure is missing, was counted in two ways, or on another number of records.
    """
    first, second = a.value(name), b.value(name)
    checks = (
        ("number of records", a.n_records, b.n_records),
        (f"number of {first.unit}s", first.n, second.n),
        ("signature", first.signature, second.signature),
    )
    for what, one, other in checks:
        if one != other:
            raise DataError(
                f"'{name}' of the two models cannot be compared: its {what} is {one} and {other}",
                expected="both models measured on the same records in the same way",
            )
    places = a._place(name), b._place(name)
    sides = [_one_figure(side, place) for side, place in zip((a, b), places, strict=True)]
    return _paired(sides[0], sides[1], a.n_records, seed, resamples)


def measured(
    figures: Figures,
    n: int,
    heads: Sequence[Head],
    *,
    seed: int,
    resamples: int,
    tables: dict[str, Any] | None = None,
    per_record: dict[str, list[float]] | None = None,
) -> Measured:
    """The figures on all n records with their bootstrap intervals, under the names of `heads`, as a `Measured`.

    Raises `DataError` where there is no record.
    """
    if n < 1:
        raise DataError("there is no record to measure", expected="at least one record with its prediction")
    whole_M = figures(np.arange(n, dtype=np.int64)[None])[0]
    assert len(whole_M) == len(heads), "a figure each"
    drawn_RM = _resampled(figures, n, seed, resamples) if n > 1 else None
    values = []
    for place, head in enumerate(heads):
        value = float(whole_M[place])
        column_R = None if drawn_RM is None or math.isnan(value) else drawn_RM[:, place]
        interval = None if column_R is None else _percentiles(column_R)
        notes = [head.note, *_doubts(value, column_R, interval, head)]
        note = "; ".join(one for one in notes if one) or None
        shown = None if math.isnan(value) else value
        values.append(Value(head.name, shown, n, interval, head.signature, head.higher_is_better, note=note))
    return Measured(values, tables or {}, per_record or {}, _told(seed, resamples), n, figures)


def summed(
    sums_DS: npt.ArrayLike, formula: Callable[[Floats], Floats], kind_N: npt.NDArray[np.integer[Any]] | None = None
) -> Figures:
    """Figures that depend on the records through sums alone: `formula` maps sums (R, S) to figures (R, M).

    Row d of `sums_DS` is what one record of kind d adds; `kind_N` tells each record's kind, and without it each record
    is its own kind. All resamples are one matrix product: times each kind was drawn (R, D) by what it adds (D, S).
    """
    table_DS = np.asarray(sums_DS, dtype=np.float64)

    def figures(drawn_RN: Indices) -> Floats:
        return formula(occurrences(drawn_RN, len(table_DS), kind_N) @ table_DS)

    return figures


def side_by_side(*parts: Figures) -> Figures:
    """Several figures of the same records, one after another."""
    return lambda drawn_RN: np.concatenate([part(drawn_RN) for part in parts], axis=1)


def one_by_one(statistic: Statistic) -> Figures:
    """The one figure of a statistic that is counted resample by resample."""
    return lambda drawn_RN: np.array([[float(statistic(row_N))] for row_N in drawn_RN], dtype=np.float64)


def occurrences(drawn_RN: Indices, kinds: int, kind_N: npt.NDArray[np.integer[Any]] | None = None) -> Floats:
    """How often each of `kinds` kinds was drawn, (R, D)."""
    rows = drawn_RN if kind_N is None else kind_N[drawn_RN]
    return np.stack([np.bincount(row, minlength=kinds) for row in rows]).astype(np.float64)


def ratio(above: Floats, below: Floats, otherwise: float = 0.0) -> Floats:
    """`above` / `below`, and `otherwise` where `below` is 0."""
    out = np.full(np.broadcast(above, below).shape, otherwise)
    quotient: Floats = np.divide(above, below, out=out, where=np.asarray(below) != 0)
    return quotient


def _draws(n: int, seed: int, resamples: int) -> Iterator[Indices]:
    """Numbers of records drawn with replacement, (some of R, N): the stream knows n and seed only, so that two models
    on the same records meet the same draws."""
    if resamples < 1:
        raise DataError(f"{resamples} resamples give no interval", expected="at least 1, better 1000")
    random, rows = stream(seed, "bootstrap", n), max(1, BLOCK_DRAWS // n)
    for start in range(0, resamples, rows):
        yield random.integers(0, n, size=(min(rows, resamples - start), n))


def _resampled(figures: Figures, n: int, seed: int, resamples: int) -> Floats:
    return np.concatenate([figures(block_RN) for block_RN in _draws(n, seed, resamples)])


def _percentiles(values_R: Floats) -> Interval | None:
    """The middle 95 % of the values that are numbers, or None where too many are none."""
    kept = values_R[np.isfinite(values_R)]
    if len(kept) < (1 - MOST_UNDEFINED) * len(values_R):
        return None
    low, high = np.percentile(kept, [2.5, 97.5])
    return float(low), float(high)


def _paired(figures_a: Figures, figures_b: Figures, n: int, seed: int, resamples: int) -> Paired:
    if n < 1:
        raise DataError("there is no record to compare two models on", expected="at least one record")
    everyone = np.arange(n, dtype=np.int64)[None]
    seen = float((figures_a(everyone) - figures_b(everyone))[0, 0])
    told = f"paired bootstrap|p:two-sided, shifted|{_told(seed, resamples).removeprefix('bootstrap|')}"
    if n < 2 or math.isnan(seen):
        return Paired(None if math.isnan(seen) else seen, None, None, n, told)
    drawn = [figures_a(block_RN) - figures_b(block_RN) for block_RN in _draws(n, seed, resamples)]
    difference_R = np.concatenate(drawn)[:, 0]
    interval = _percentiles(difference_R)
    kept = difference_R[np.isfinite(difference_R)]
    as_far = np.abs(kept - seen) >= abs(seen) - 1e-12 * max(1.0, abs(seen))
    p_value = None if interval is None else (1 + int(as_far.sum())) / (1 + len(kept))
    return Paired(seen, interval, p_value, n, told)


def _one_figure(side: Measured, place: int) -> Figures:
    figures = side.figures
    if figures is None:
        raise DataError(
            "these figures cannot be counted anew on drawn records",
            expected="two measurements of this process; figures read from a file hold no records",
        )
    return lambda drawn_RN: figures(drawn_RN)[:, place : place + 1]


def _doubts(value: float, column_R: Floats | None, interval: Interval | None, head: Head) -> list[str]:
    """What must be said of a figure: undefined, no interval, or one that is a point."""
    if math.isnan(value):
        return [head.undefined or "undefined on these records"]
    if column_R is None:
        return ["a single record: no interval"]
    undefined = int((~np.isfinite(column_R)).sum())
    said = [f"undefined in {undefined} of {len(column_R)} resamples"] if undefined else []
    if interval is None:
        return [*said, "no interval"]
    if interval[0] == interval[1]:
        return [*said, "every resample gives the same: the interval is a point and says nothing of unseen records"]
    return said


def _told(seed: int, resamples: int) -> str:
    return f"bootstrap|of:records|interval:percentile 95|resamples:{resamples}|seed:{seed}"
