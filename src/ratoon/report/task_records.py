"""What is on record of a measured task: evaluation.json and predictions.jsonl in one form, for page and table.

Decides which parts an evaluation may have, and which of a floor, a label or a curve comes first. Figures are those that
`evaluate/` wrote, none is counted anew; what is shown of each record is `task_rows.py`'s.

evaluation.json holds what `TaskReport.as_dict` gives (task, measure, n, values, tables, …) and may hold, each shown
where it is there:

| key | form |
|---|---|
| `without_copies`, `copies_of_training` | the values without rows that stand in training, too; how many these are |
| `floors` | [{name, what, values, seconds, paired}]; `paired`: `Paired.as_dict` of the main figure, ours less it |
| `base` | {name, what, values, seconds, cut_tokens, paired}: the base without its training, as floors are; for pairs |
| | of answers also `moved`: by how much training moved the margin between them, `Paired.as_dict` |
| `robust` | `RobustReport.as_dict`, or {curves: {perturbation: [{strength, value, interval, n, flipped}]}} |
| `attack` | `AttackReport.as_dict` |
| `against` | [{model, name, value, other, difference, interval, p_value, n, signature}]: other models, same records |
| `ledger` | {parts: {train: `TaskLedger.as_dict`, …}}: what ledger.json of a run holds; or the ledger of one part |

and of the measurement itself `model`, `seconds`, `dtype`. Lines of predictions.jsonl are those of `Prediction.as_dict`;
they may hold `scores` (name -> what the record came to) and `words` (of a tagged sentence).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ratoon.base.errors import ArtifactError

EVALUATION, PREDICTIONS = "evaluation.json", "predictions.jsonl"
ATTACK = (
    "budget_queries",
    "n_attacked",
    "accuracy_before",
    "accuracy_before_interval",
    "accuracy_under_attack",
    "accuracy_under_attack_interval",
    "success",
    "success_interval",
    "mean_queries",
    "examples",
)
"""What is shown of an attack."""
FATES = ("trained", "cut", "split", "dropped", "duplicate", "masked")


@dataclass(frozen=True)
class Figure:
    """One measured figure, as `evaluate.metrics.value.Value` has it."""

    name: str
    value: float | None
    interval: tuple[float, float] | None = None
    n: int | None = None
    unit: str = "record"
    signature: str = ""
    higher_is_better: bool = True
    note: str | None = None

    @classmethod
    def of(cls, found: dict[str, Any], name: str | None = None) -> Figure:
        """The figure from plain values; numbers that are not finite become none."""
        n = found.get("n")
        return cls(
            name if name is not None else str(found["name"]),
            number(found.get("value")),
            interval(found.get("interval")),
            n if isinstance(n, int) else None,
            str(found.get("unit") or "record"),
            str(found.get("signature") or ""),
            bool(found.get("higher_is_better", True)),
            found.get("note"),
        )

    @property
    def rank(self) -> float:
        """Ascending from the best; what has no value comes last."""
        return math.inf if self.value is None else -self.value if self.higher_is_better else self.value


@dataclass(frozen=True)
class Difference:
    """How far the model is before another one, from a paired bootstrap."""

    difference: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    n: int | None = None
    model: str = ""
    name: str = ""
    value: float | None = None
    other: float | None = None
    signature: str = ""

    @classmethod
    def of(cls, found: dict[str, Any]) -> Difference:
        """The comparison from plain values."""
        return cls(
            number(found.get("difference")),
            interval(found.get("interval")),
            number(found.get("p_value")),
            found.get("n"),
            str(found.get("model") or ""),
            str(found.get("name") or ""),
            number(found.get("value")),
            number(found.get("other")),
            str(found.get("signature") or ""),
        )

    @property
    def certain(self) -> bool | None:
        """Whether the interval leaves out 0; None where there is none."""
        return None if self.interval is None else self.interval[0] > 0 or self.interval[1] < 0


@dataclass(frozen=True)
class Floor:
    """A cheap classic, or the model's own base, beside the model: its main figure, and what it took."""

    name: str
    what: str
    main: Figure
    values: list[Figure]
    seconds: float | None
    paired: Difference | None


@dataclass(frozen=True)
class CurvePoint:
    """A score at one strength of a perturbation; `flipped`: share of answers that are no longer the same."""

    strength: float
    value: float | None
    interval: tuple[float, float] | None
    n: int | None
    flipped: float | None


@dataclass(frozen=True)
class RobustCurve:
    """A score by strength of one perturbation."""

    name: str
    what: str
    unit: str
    keeps_label: bool
    points: list[CurvePoint]
    examples: list[dict[str, Any]]

    @property
    def drop(self) -> float | None:
        """The first score less the last; None where one is missing."""
        scores = [one.value for one in self.points]
        return None if len(scores) < 2 or scores[0] is None or scores[-1] is None else scores[0] - scores[-1]


@dataclass(frozen=True)
class Account:
    """The ledger of one part: rows and tokens by fate, and the reasons for what was not trained whole."""

    part: str
    rows: dict[str, int]
    tokens: dict[str, int]
    reasons: dict[str, dict[str, Any]]
    notes: list[str]

    @property
    def adds_up(self) -> bool:
        """Whether the fates are all that was read, in rows and in tokens."""
        return all(sum(table.get(fate, 0) for fate in FATES) == table.get("read") for table in (self.rows, self.tokens))


@dataclass(frozen=True)
class Evaluation:
    """A measured task, everything in one form. `predictions`: the lines of predictions.jsonl; `torn`: lines of it that
    could not be read."""

    task: str
    measure: str
    n: int
    values: list[Figure]
    tables: dict[str, Any]
    facts: dict[str, Any]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    torn: int = 0

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """From a folder with evaluation.json and, beside it, predictions.jsonl. Raises `ArtifactError` where the first
        is missing or no evaluation; without the second there are no predictions."""
        path = Path(folder) / EVALUATION
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            raise ArtifactError(
                "there is no evaluation here" if missing else f"the evaluation cannot be read: {error}",
                where=path,
                expected="a folder that `ratoon evaluate` or `ratoon finetune` wrote",
                fix="measure the model again: ratoon evaluate RUN",
            ) from None
        lines: list[dict[str, Any]] = []
        torn = 0
        beside = Path(folder) / PREDICTIONS
        text = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else ""
        for line in filter(str.strip, text.split("\n")):
            try:
                one = json.loads(line)
            except ValueError:
                one = None
            if isinstance(one, dict):
                lines.append(one)
            else:
                torn += 1
        return cls.of(found, lines, torn, where=path)

    @classmethod
    def of(
        cls, found: Any, predictions: list[dict[str, Any]] | None = None, torn: int = 0, where: Path | None = None
    ) -> Evaluation:
        """From what evaluation.json holds. Raises `ArtifactError` where that is no evaluation."""
        if not isinstance(found, dict) or not isinstance(found.get("values"), list) or "measure" not in found:
            raise ArtifactError(
                "this is no evaluation of a task",
                where=where,
                expected="an object with task, measure, n and values",
                fix="measure the model again: ratoon evaluate RUN",
            )
        return cls(
            str(found.get("task", "")),
            str(found["measure"]),
            int(found.get("n", 0)),
            [Figure.of(one) for one in found["values"]],
            dict(found.get("tables") or {}),
            found,
            predictions or [],
            torn,
        )

    @property
    def main(self) -> Figure | None:
        """The main figure: the first; None for records without answers, of which nothing was measured."""
        return self.values[0] if self.values else None

    def figure(self, name: str) -> Figure | None:
        """The figure of that name."""
        return next((one for one in self.values if one.name == name), None)

    @property
    def model(self) -> str:
        """The model's name; empty where it has none."""
        return str(self.facts.get("model") or "")

    @property
    def seconds(self) -> float | None:
        """How long the measurement took."""
        return number(self.facts.get("seconds"))

    @property
    def interval_of(self) -> str:
        """How the intervals were found."""
        return str(self.facts.get("interval_of") or "")

    @property
    def copies(self) -> int:
        """Records that also stand in training."""
        return int(self.facts.get("copies_of_training") or 0)

    @property
    def attack(self) -> dict[str, Any] | None:
        """What an attack came to, keys that are missing as None."""
        found = self.facts.get("attack")
        return {**dict.fromkeys(ATTACK), **found} if found else None

    @property
    def without_copies(self) -> dict[str, Figure]:
        """By name, the figures without rows that also stand in training; empty where there are no such."""
        return {one.name: one for one in map(Figure.of, self.facts.get("without_copies") or [])}

    @property
    def floors(self) -> list[Floor]:
        """The floors that were measured by the main figure, the best first."""
        found = [self._beside(one) for one in self.facts.get("floors") or []]
        return sorted((one for one in found if one is not None), key=lambda one: one.main.rank)

    @property
    def base(self) -> Floor | None:
        """The model's base without its training, if it was measured by the main figure."""
        found = self.facts.get("base")
        return self._beside(found) if isinstance(found, dict) else None

    @property
    def moved(self) -> Difference | None:
        """By how much training moved the margin between two answers, where pairs were measured with their base."""
        found = (self.facts.get("base") or {}).get("moved")
        return None if found is None else Difference.of(found)

    def _beside(self, found: dict[str, Any]) -> Floor | None:
        """What was measured beside the model, from plain values; None without the main figure."""
        main = self.main
        values = [Figure.of(value) for value in found.get("values") or []]
        same = next((value for value in values if main is not None and value.name == main.name), None)
        if same is None:
            return None
        paired = found.get("paired")
        difference = None if paired is None else Difference.of(paired)
        what, seconds = str(found.get("what") or ""), number(found.get("seconds"))
        return Floor(str(found["name"]), what, same, values, seconds, difference)

    @property
    def curves(self) -> list[RobustCurve]:
        """The curves of robustness that have a point, those that fall most first."""
        robust = self.facts.get("robust") or {}
        found = robust.get("curves") or {}
        listed = (
            [{"name": name, "points": points} for name, points in found.items()] if isinstance(found, dict) else found
        )
        curves = [_curve(one) for one in listed]
        sign = 1 if self.main is None or self.main.higher_is_better else -1
        falls = [(math.inf if one.drop is None else -sign * one.drop, one) for one in curves if one.points]
        return [one for _, one in sorted(falls, key=lambda pair: pair[0])]

    @property
    def against(self) -> list[Difference]:
        """The comparisons with other models."""
        return [Difference.of(one) for one in self.facts.get("against") or []]

    @property
    def accounts(self) -> list[Account]:
        """The ledgers, by part, of parts that hold a row."""
        return accounts_of(self.facts.get("ledger") or {})


def accounts_of(ledger: dict[str, Any]) -> list[Account]:
    """The accounts of what a run's ledger.json holds, or of the ledger of one part: those of parts that hold a row."""
    parts = {"train": ledger} if "rows" in ledger else ledger.get("parts") or {}
    return [
        Account(name, one["rows"], one["tokens"], one.get("reasons") or {}, one.get("notes") or [])
        for name, one in parts.items()
        if one["rows"].get("read")
    ]


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def interval(value: Any) -> tuple[float, float] | None:
    """A pair of finite numbers, or None."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def confused_pairs(confusion: dict[str, Any]) -> list[tuple[str, str, int, float]]:
    """Expected label, answered label, how often, and which share of the expected label's records: the commonest
    first."""
    labels, counts = confusion["labels"], confusion["counts"]
    pairs = [
        (labels[row], labels[column], count, count / sum(line))
        for row, line in enumerate(counts)
        for column, count in enumerate(line)
        if count and row != column
    ]
    return sorted(pairs, key=lambda one: (-one[2], -one[3], one[0], one[1]))


def _curve(found: dict[str, Any]) -> RobustCurve:
    points = []
    for one in found.get("points") or []:
        score = one.get("score") or one
        n = one.get("n")
        points.append(
            CurvePoint(
                float(one["strength"]),
                number(score.get("value")),
                interval(score.get("interval")),
                n if isinstance(n, int) else None,
                number(one.get("flipped")),
            )
        )
    return RobustCurve(
        str(found["name"]),
        str(found.get("what") or ""),
        str(found.get("unit") or ""),
        bool(found.get("keeps_label", True)),
        sorted(points, key=lambda one: one.strength),
        found.get("examples") or [],
    )
