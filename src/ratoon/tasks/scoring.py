"""Scoring: a text is given a number, as essays and short answers are.

Decides between which numbers (those told, or those of the training rows), how they are scaled for training (less their
mean, by their standard deviation) and back, and to which step an answer is rounded. A number for two texts is
`pairs.py`'s.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from ratoon.base.errors import ConfigError, DataError
from ratoon.tasks.classification import fill, shorten
from ratoon.tasks.contract import Encoded, Head, Named, Record, Task, TaskSettings, TooLong, pick
from ratoon.tasks.example import Example
from ratoon.text.tokenizer import Tokenizer

Scale = tuple[float, float, float] | None
SCORE = Named("score", ("score", "number", "rating", "label", "domain1_score", "grade", "similarity", "stars"))
FEWEST_HELD_OUT = 10


def _by_name(bound: Any) -> Any:
    """Groups are names; YAML takes {1: 2} for a number's."""
    return {str(group): number for group, number in bound.items()} if isinstance(bound, Mapping) else bound


Bound = Annotated[float | dict[str, float] | None, BeforeValidator(_by_name)]


class ScoringSettings(TaskSettings):
    """Which numbers there are."""

    template: str = Field(
        "{text}",
        description="what is read: {text} is recognised, other fields by their names; {words}: how many words it has",
    )
    low: Bound = Field(
        None, description="the lowest number, or that of each group ({1: 2, 2: 1}); absent: that of the training rows"
    )
    high: Bound = Field(
        None, description="the highest number, or that of each group; absent: that of the training rows"
    )
    step: float | None = Field(
        None,
        ge=0,
        description="numbers are low + multiples of it; 0: any; absent: 1 where training has whole numbers",
    )
    group: str | None = Field(
        None,
        description="the field that names a row's group (an essay's prompt): each has a scale of its own, and is "
        "measured alone",
    )

    stretch: bool | None = Field(
        None,
        description="answers vary as much as training's numbers do, by what the validation rows show: what is learned "
        "by squared error lies too near to the mean, which kappa punishes; absent: where numbers are steps",
    )

    @model_validator(mode="after")
    def _order(self) -> ScoringSettings:
        named = {group for bound in (self.low, self.high) if isinstance(bound, dict) for group in bound}
        if named and self.group is None:
            raise ValueError("low and high of each group need task.group, the field that names a row's group")
        for group in named or {""}:
            low, high = bound_of(self.low, group), bound_of(self.high, group)
            if low is not None and high is not None and not low < high:
                raise ValueError(f"low must be below high{f' (group {group})' if group else ''}")
        return self


def bound_of(bound: float | Mapping[str, float] | None, group: str) -> float | None:
    """The lowest or highest number that the settings give a group; None: they give none."""
    return bound.get(group) if isinstance(bound, Mapping) else bound


@dataclass(frozen=True)
class Scored(Record):
    """A text and its number."""

    text: str
    score: float
    group: str = ""


class Scoring(Task[Scored]):
    """A text has a number."""

    kind = "scoring"
    objective = "numbers"
    measure = "numbers"
    settings: ScoringSettings
    settings_type = ScoringSettings
    ranges: Mapping[str, tuple[float, float]] = {}
    spreads: Mapping[str, tuple[float, float]] = {}
    """Mean and standard deviation of the training rows' numbers, of each group: a head that begins near 0 begins there,
    and what it is wrong by has the same size whatever the numbers are."""
    step: float = 0.0
    held_out: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation of what the head said of held-out rows, whose own are 0 and 1; see `calibrate`."""

    def record(self, row: Mapping[str, Any], place: str) -> Scored:
        """Text and number of the row. Raises `DataError` for what is no number."""
        text = self.read(row, place)
        found = pick(row, SCORE, self.settings.fields, place)
        try:
            score = float(found)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score) or isinstance(found, bool):
            raise DataError(f"'{found}' is no number", where=place, expected="a finite number")
        group = ""
        if self.settings.group is not None:
            group = str(pick(row, Named("group", (self.settings.group,)), {}, place))
        return Scored(str(row.get("id", place)), place, text, score, group)

    def unanswered(self, row: Mapping[str, Any], place: str) -> Scored:
        """Text of the row; the lowest number stands in for the one that is not told."""
        record = self.record({**row, self.settings.fields.get("score", SCORE.names[0]): 0}, place)
        return replace(record, score=self._range(record)[0])

    def read(self, row: Mapping[str, Any], place: str) -> str:
        """What is read of a row."""
        return fill(self.settings.template, self.settings.fields, row, place)

    def settle(self, training: Sequence[Scored]) -> list[str]:
        """Take the lowest and highest number of each group, and whether all are whole."""
        if not training:
            raise ConfigError("there is no training row to take the numbers from", where="data.train")
        by_group: dict[str, list[float]] = {}
        for record in training:
            by_group.setdefault(record.group, []).append(record.score)
        for bound in ("low", "high"):
            given = getattr(self.settings, bound)
            unknown = sorted(set(given) - set(by_group)) if isinstance(given, Mapping) else []
            if unknown:
                raise ConfigError(
                    f"no training row has the group '{unknown[0]}'",
                    where=f"task.{bound}",
                    expected=f"some of {', '.join(sorted(by_group))}",
                )
        self.ranges = {}
        for group, found in sorted(by_group.items()):
            low, high = (bound_of(bound, group) for bound in (self.settings.low, self.settings.high))
            self.ranges[group] = min(found) if low is None else low, max(found) if high is None else high
        whole = all(float(record.score).is_integer() for record in training)
        self.step = self.settings.step if self.settings.step is not None else float(whole)
        for group, (lowest, highest) in self.ranges.items():
            if not lowest < highest:
                raise ConfigError(
                    f"the numbers of the training rows{f' of group {group}' if group else ''} are all {lowest:g}",
                    where="data.train",
                    expected="at least two different numbers",
                    fix="say task.low and task.high, or look at the field that holds the number (task.fields)",
                )
        self.spreads = {
            group: (statistics.fmean(found), statistics.pstdev(found) or 1.0) for group, found in by_group.items()
        }
        for record in training:
            self.check(record)
        of = [f"{name + ': ' if name else ''}{least:g} to {most:g}" for name, (least, most) in self.ranges.items()]
        steps = f"in steps of {self.step:g}" if self.step else "of any size"
        return [f"numbers {steps}, {', '.join(of)}"]

    def check(self, record: Scored) -> None:
        """Raise `DataError` for a number outside of low to high, or a group that training does not have."""
        low, high = self._range(record)
        if not low <= record.score <= high:
            raise DataError(
                f"the number {record.score:g} is outside of {low:g} to {high:g}",
                where=record.place,
                expected="a number between task.low and task.high (absent: those of the training rows)",
                fix=f"say task.low and task.high{self._for(record.group)}, or mend the row",
            )

    @staticmethod
    def _for(group: str) -> str:
        return f" of the group, as in task.low={{{group}: 0}}" if group else ""

    def _range(self, record: Scored) -> tuple[float, float]:
        if record.group not in self.ranges:
            raise DataError(
                f"no training row has the group '{record.group}'",
                where=record.place,
                expected=f"one of {', '.join(self.ranges)}",
            )
        return self.ranges[record.group]

    @property
    def grouped(self) -> bool:
        """Whether each record has a group, graded on a scale of its own."""
        return self.settings.group is not None

    def scales(self) -> dict[str, Scale]:
        """Lowest, highest and step of each group's grades ("": there are no groups); None for numbers of any size."""
        return {group: (low, high, self.step) if self.step else None for group, (low, high) in self.ranges.items()}

    def facts(self) -> dict[str, Any]:
        """The settings, the lowest and highest numbers, their means and deviations, and the step."""
        ranges = {group: list(found) for group, found in self.ranges.items()}
        spreads = {group: list(found) for group, found in sorted(self.spreads.items())}
        held_out = list(self.held_out)
        return {**super().facts(), "ranges": ranges, "spreads": spreads, "step": self.step, "held_out": held_out}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take numbers and step back."""
        self.ranges = {group: (float(low), float(high)) for group, (low, high) in facts["ranges"].items()}
        self.spreads = {group: (float(mean), float(spread)) for group, (mean, spread) in facts["spreads"].items()}
        self.step = float(facts["step"])
        mean, spread = facts.get("held_out", (0.0, 1.0))
        self.held_out = (float(mean), float(spread))

    def text(self, record: Scored) -> str:
        """The text."""
        return record.text

    def with_text(self, record: Scored, text: str) -> Scored:
        """The same number for another text."""
        return replace(record, text=text)

    def expected(self, record: Scored) -> float:
        """The number."""
        return record.score

    def head(self) -> Head:
        """A number."""
        return Head("sequence", ("score",), "number")

    def encode(self, record: Scored, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """The text's tokens; the number, less the mean and by the deviation, is asked at the last one."""
        ids = tokenizer.encode_prompt(record.text)
        kept, cut, reason = shorten(ids, room_tokens, too_long, record.place)
        weight = [0.0] * (len(kept) - 1) + [1.0]
        example = Example(kept, weight, record.id, [0] * len(kept), self.target(record))
        return Encoded([example], len(ids), cut, reason)

    def target(self, record: Scored) -> tuple[float]:
        """What the head is to say: the number less its group's mean, by its deviation."""
        self._range(record)
        mean, spread = self.spreads[record.group]
        return ((record.score - mean) / spread,)

    def calibrate(self, records: Sequence[Scored], scores: Sequence[Any]) -> str | None:
        """Take mean and spread of what the head says of held-out rows, so that answers vary as the numbers do.

        With equal means, kappa is 2 r s / (1 + s²) for a correlation r and a spread s of answers over that of the
        numbers: most at s = 1, while the least squared error has s = r (Cohen 1968's kappa in Lin's form, 1989). The
        groups, each on its own scale, are taken together.
        """
        self.held_out = (0.0, 1.0)
        if not (bool(self.step) if self.settings.stretch is None else self.settings.stretch):
            return None
        n = len(scores)
        wanted = [self.target(record)[0] for record in records]
        said = [float(one[0]) for one in scores]
        if n < FEWEST_HELD_OUT:
            return f"answers are not stretched: {n} validation rows are too few to tell by how much"
        spread = statistics.pstdev(said)
        if spread == 0 or statistics.pstdev(wanted) == 0 or statistics.correlation(said, wanted) <= 0:
            return f"answers are not stretched: on {n} validation rows they do not follow the numbers"
        if spread >= 1:
            return f"answers are not stretched: on {n} validation rows they vary as much as the numbers of training do"
        self.held_out = (statistics.fmean(said), spread)
        return (
            f"answers are stretched by {1 / spread:.2f}: on {n} validation rows they vary {spread:.2f} times as much "
            "as the numbers of training (task.stretch: false leaves them)"
        )

    def read_scores(self, record: Scored, scores: Any) -> float:
        """The number that a score stands for, within its range and rounded to the step."""
        low, high = self._range(record)
        mean, spread = self.spreads[record.group]
        middle, width = self.held_out
        found = min(high, max(low, mean + spread * (float(scores[0]) - middle) / width))
        if self.step:
            found = min(high, low + math.floor((found - low) / self.step + 0.5) * self.step)
        return found
