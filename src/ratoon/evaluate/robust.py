"""What is left of a model's score when its texts come with mistakes, and how many of its answers a search can turn.

Decides what is measured on which texts; the perturbations themselves stand in `text/perturb.py`, the search for a text
that turns an answer in `attack.py`. Knows no model: predictions come from a callable that is handed in, the score from
one of `evaluate/metrics/`.

A perturbation is measured on the texts that it can touch, and on no other: a score over texts that nothing happened to
would say less the fewer it touches. So each curve begins with the score of its own texts as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ratoon.base.errors import ConfigError, DataError
from ratoon.base.seeds import stream
from ratoon.evaluate.interval import share_interval
from ratoon.evaluate.metrics.value import Measured, Paired, Value, compare
from ratoon.text.edits import Edited, Span
from ratoon.text.perturb import PERTURBATIONS, Material, Perturbation, perturbation

STRENGTHS = (0.05, 0.1, 0.2, 0.4)
EXAMPLES = 5
"""Turned answers that a curve shows."""

E = TypeVar("E")
P = TypeVar("P")


@dataclass(frozen=True)
class Turned(Generic[P]):
    """A text whose answer changed with its perturbation; `record` is its place among the texts measured."""

    record: int
    strength: float
    text: str
    perturbed: str
    before: P
    after: P

    def as_dict(self) -> dict[str, Any]:
        """The example as plain values; an answer that is none is shown as its words."""
        before, after = (one if isinstance(one, str | int | float) else repr(one) for one in (self.before, self.after))
        return {
            "record": self.record,
            "strength": self.strength,
            "text": self.text,
            "perturbed": self.perturbed,
            "before": before,
            "after": after,
        }


@dataclass(frozen=True)
class Point:
    """A curve at one strength. `score` is the main figure on the curve's texts; `drop` the score of the unperturbed
    texts less it, with the interval of the paired bootstrap (None where the figure cannot be counted anew);
    `n_changed`: texts in which anything changed; `touched`: edits made of places there were; `n_flipped`: answers that
    are no longer the same."""

    strength: float
    score: Value
    drop: Paired | None
    n: int
    n_changed: int
    touched: float
    n_flipped: int

    def as_dict(self) -> dict[str, Any]:
        """The point as plain values; `flipped` is a share of all n texts, its interval Wilson's."""
        return {
            "strength": self.strength,
            "score": self.score.as_dict(),
            "drop": None if self.drop is None else self.drop.as_dict(),
            "n": self.n,
            "n_changed": self.n_changed,
            "touched": self.touched,
            "n_flipped": self.n_flipped,
            "flipped": self.n_flipped / self.n,
            "flipped_interval": list(share_interval(self.n_flipped, self.n)),
        }


@dataclass(frozen=True)
class Curve(Generic[P]):
    """A score by strength of one perturbation. `points` begin with strength 0 and are empty where the perturbation
    applies to no text. Where the label need not survive (`keeps_label` is False) the score is against the old labels,
    and the flips say more than it."""

    name: str
    what: str
    unit: str
    keeps_label: bool
    n_eligible: int
    points: list[Point]
    examples: list[Turned[P]]

    def as_dict(self) -> dict[str, Any]:
        """The curve as plain values."""
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "keeps_label": self.keeps_label,
            "n_eligible": self.n_eligible,
            "points": [one.as_dict() for one in self.points],
            "examples": [one.as_dict() for one in self.examples],
        }


@dataclass(frozen=True)
class RobustReport(Generic[P]):
    """The curves of a model, and its score on all n texts as they are."""

    n: int
    clean: Value
    curves: list[Curve[P]]
    strengths: list[float]
    seed: int

    def curve(self, name: str) -> Curve[P]:
        """The curve of a perturbation. Raises `ConfigError` where it was not measured."""
        for one in self.curves:
            if one.name == name:
                return one
        raise ConfigError(f"'{name}' was not measured", expected=", ".join(one.name for one in self.curves))

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "n": self.n,
            "seed": self.seed,
            "strengths": self.strengths,
            "clean": self.clean.as_dict(),
            "curves": [one.as_dict() for one in self.curves],
        }


def robustness(
    predict: Callable[[list[str]], Sequence[P]],
    texts: Sequence[str],
    expected: Sequence[E],
    score: Callable[[Sequence[E], Sequence[P]], Measured],
    *,
    names: Sequence[str] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 1,
    material: Material | None = None,
    protected: Sequence[Sequence[Span]] | None = None,
    same: Callable[[P, P], bool] = lambda before, after: before == after,
) -> RobustReport[P]:
    """Score, drop and flipped answers of each perturbation by strength.

    `score(expected, predictions)` gives a task's `Measured`, whose first figure is followed. `names`: perturbations, if
    absent all that have something to put in; `material` is made of `texts` if absent; `protected`: spans of each text
    that stay as they are. `same` tells whether two answers are one. A text's mistakes depend on the seed, the
    perturbation and its place only, and at a greater strength come on top of those at a smaller one. Texts that come
    out as they went in are not predicted again. Raises `ConfigError` for unknown names and strengths outside 0 … 1,
    `DataError` for no texts or other numbers of answers.
    """
    if not texts or len(texts) != len(expected):
        raise DataError(f"{len(texts)} texts and {len(expected)} expected answers", expected="as many, at least one")
    for strength in strengths:
        if not 0.0 <= strength <= 1.0:
            raise ConfigError(f"a strength of {strength}", expected="0 to 1")
    material = Material.of(texts) if material is None else material
    if names is None:
        names = [name for name, one in PERTURBATIONS.items() if material.names.by_kind or not one.needs_names]
    kinds = [perturbation(name) for name in names]
    levels = sorted({float(strength) for strength in strengths} - {0.0})
    clean = _answers(predict, list(texts))
    curves = []
    for kind in kinds:
        spans = [() if protected is None else protected[record] for record in range(len(texts))]
        rows = [i for i, text in enumerate(texts) if kind.applies_to(text, spans[i], material)]
        edited = [
            [kind.apply(texts[i], level, stream(seed, "robustness", kind.name, i), spans[i], material) for i in rows]
            for level in levels
        ]
        curves.append(_curve(kind, predict, texts, expected, score, clean, rows, levels, edited, same))
    return RobustReport(len(texts), score(expected, clean).values[0], curves, [0.0, *levels], seed)


def _curve(
    kind: Perturbation,
    predict: Callable[[list[str]], Sequence[P]],
    texts: Sequence[str],
    expected: Sequence[E],
    score: Callable[[Sequence[E], Sequence[P]], Measured],
    clean: list[P],
    rows: list[int],
    levels: list[float],
    edited: list[list[Edited]],
    same: Callable[[P, P], bool],
) -> Curve[P]:
    """The curve of one perturbation on the texts `rows` that it applies to; `edited` are those at each level."""
    points: list[Point] = []
    examples: list[Turned[P]] = []
    if rows:
        before = [clean[i] for i in rows]
        wanted = [expected[i] for i in rows]
        known = {texts[i]: clean[i] for i in rows}
        new = list(dict.fromkeys(one.text for level in edited for one in level if one.text not in known))
        known |= dict(zip(new, _answers(predict, new), strict=True))
        untouched = score(wanted, before)
        points.append(Point(0.0, untouched.values[0], None, len(rows), 0, 0.0, 0))
        shown: set[int] = set()
        for level, level_edited in zip(levels, edited, strict=True):
            after = [known[one.text] for one in level_edited]
            flipped = [k for k in range(len(rows)) if not same(before[k], after[k])]
            for k in flipped:
                if len(examples) < EXAMPLES and rows[k] not in shown:
                    shown.add(rows[k])
                    text = texts[rows[k]]
                    examples.append(Turned(rows[k], level, text, level_edited[k].text, before[k], after[k]))
            perturbed = score(wanted, after)
            points.append(
                Point(
                    level,
                    perturbed.values[0],
                    _drop(untouched, perturbed),
                    len(rows),
                    sum(bool(one.changed) for one in level_edited),
                    sum(one.changed for one in level_edited) / sum(one.eligible for one in level_edited),
                    len(flipped),
                )
            )
    return Curve(kind.name, kind.what, kind.unit, kind.keeps_label, len(rows), points, examples)


def _drop(untouched: Measured, perturbed: Measured) -> Paired | None:
    if untouched.figures is None or perturbed.figures is None:
        return None
    return compare(untouched, perturbed, untouched.values[0].name)


def _answers(predict: Callable[[list[str]], Sequence[P]], texts: list[str]) -> list[P]:
    if not texts:
        return []
    found = list(predict(texts))
    if len(found) != len(texts):
        raise DataError(f"{len(found)} predictions for {len(texts)} texts", expected="one for each, in their order")
    return found
