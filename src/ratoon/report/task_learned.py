"""How a fine-tuned run learned: the section of a task's page that its metrics.jsonl gives.

Decides which curves a task has beside those of every run, what is marked in them, and what is said of the validation
loss. How curves are drawn is `curves.py`'s, what is on record `records.py`'s, wording `task_phrases.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ratoon.report import curves
from ratoon.report.phrases import Language, whole
from ratoon.report.records import Records, integer, number
from ratoon.report.task_phrases import figure_name, shown

A_LITTLE = 0.05
"""A validation loss that rose by no more than this share above its lowest is not said to have risen: less is seen
between two measurements of a model that goes on getting better at its task."""
STILL = 0.02
"""A last measurement that is lower than the one before by more than this share was still falling."""
OF_THE_FALL = 0.01
"""What is said to rise or fall does so by at least this share of all that was gained: of a loss near 0 any change is a
large share."""
MOST_BORDERS = 12
"""Ends of epochs that are drawn; of more, every second, third, …"""


@dataclass(frozen=True)
class Point:
    """A measurement on the validation rows. `epochs`: how often the training rows had been seen; `value`: the task's
    main measure, where a head gives it at once."""

    step: int
    epochs: float | None
    loss: float
    value: float | None
    tokens: int | None
    seconds: float | None
    n_records: int | None


@dataclass(frozen=True)
class Learned:
    """The section: pictures, a finding (`good`, `warn` or `bad`, and its sentence), notes, the measurements."""

    curves: list[dict[str, Any]]
    finding: tuple[str, Markup] | None
    notes: list[Markup]
    points: list[Point]
    measure: str | None
    kept: int | None


def learned(records: Records, say: curves.Say, language: Language) -> Learned | None:
    """What the section says; None for a run without a curve on record."""
    of = _Course(records)
    measured = curves.Curve.of("measure", [], [(one.step, one.value) for one in of.points if one.value is not None])
    found = curves.recorded(records)
    if measured is not None:
        found.insert(1, measured)
    if not found:
        return None
    beside = _beside(of, say, language)
    drawn = [curves.shown(one, records, say, beside.get(one.name, beside[""])) for one in found]
    return Learned(drawn, _finding(of, say), _notes(of, say, language), of.points, of.measure, of.kept)


class _Course:
    """What a run's records say of its course."""

    def __init__(self, records: Records) -> None:
        state = records.state
        self.rows = number(_table(state, "data").get("rows"))
        self.rows_a_step = number(records.recipe_train.get("rows"))
        self.filled = number(_table(state, "data").get("filled"))
        self.last = records.steps or 0
        self.kept = integer(state.get("step")) if records.status == "done" else None
        self.best = integer(_table(state, "best").get("step"))
        evaluations = [one for one in records.metrics if one.get("kind") == "eval"]
        self.points = [point for one in evaluations if (point := self._point(one)) is not None]
        names = [str(name) for one in evaluations if (name := _table(one, "measure").get("name"))]
        self.measure = names[-1] if names else None
        self.rank = _rank_asked_for(records)

    def epochs(self, step: int) -> float | None:
        """How often the training rows had been seen after that step; None where their number is not on record."""
        return step * self.rows_a_step / self.rows if self.rows and self.rows_a_step else None

    @property
    def borders(self) -> tuple[float, tuple[float, ...], int]:
        """Steps of an epoch (0 where that is not known), the ends of epochs before the last step, and how many epochs
        lie between two of them."""
        if not self.rows or not self.rows_a_step:
            return 0.0, (), 1
        each = self.rows / self.rows_a_step
        ends = int((self.last - 0.5) / each) if self.last else 0
        every = -(-ends // MOST_BORDERS) or 1
        return each, tuple(number * each for number in range(every, ends + 1, every)), every

    @property
    def kept_point(self) -> Point | None:
        """The measurement of the weights that were kept."""
        return next((one for one in self.points if one.step == self.kept), None)

    def _point(self, record: dict[str, Any]) -> Point | None:
        step, loss = integer(record.get("step")), number(record.get("loss"))
        if step is None or loss is None:
            return None
        value = number(_table(record, "measure").get("value"))
        tokens, seconds, n = integer(record.get("tokens")), number(record.get("time_seconds")), record.get("n_records")
        return Point(step, self.epochs(step), loss, value, tokens, seconds, integer(n))


def _rank_asked_for(records: Records) -> float | None:
    """The mean rank that a budget of ranks ends with: as the method came to, else as the recipe says."""
    facts = _table(records.state, "method_facts")
    asked, ranks = number(facts.get("rank_asked_for")), _table(facts, "ranks")
    return asked / len(ranks) if asked and ranks else number(records.recipe_table("method").get("rank"))


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    found = table.get(key)
    return found if isinstance(found, dict) else {}


def _beside(of: _Course, say: curves.Say, language: Language) -> dict[str, curves.Beside]:
    """What stands beside each curve; under "" that of all others: the ends of epochs."""
    each, borders, every = of.borders
    ends: tuple[tuple[str, Markup], ...] = ()
    if borders:
        steps = f"{each * every:,.1f}".removesuffix(".0")
        key = "legend_epoch" if every == 1 else "legend_epochs"
        ends = (("border", say(key, n=steps, every=every)),)
    kept = of.kept_point

    def marked(value: float | None, **more: Any) -> curves.Beside:
        if kept is None or value is None:
            return curves.Beside(borders=borders, legend=ends, held=say("legend_validation"), **more)
        ring = say("legend_kept", step=whole(kept.step), value=shown(value))
        return curves.Beside(
            mark=(float(kept.step), value), mark_text=shown(value), borders=borders, legend=(("ring", ring), *ends),
            held=say("legend_validation"), **more,
        )  # fmt: skip

    asked = (("level", say("legend_rank", n=f"{of.rank:g}")),) if of.rank else ()
    return {
        "": curves.Beside(borders=borders),
        "rank": curves.Beside(borders=borders, level=of.rank, legend=(*asked, *ends)),
        "loss": marked(None if kept is None else kept.loss, unit=say("learned_mean")),
        "measure": marked(
            None if kept is None else kept.value,
            title=figure_name(of.measure or "", language),
            unit=say("learned_rows"),
        ),
    }


def _finding(of: _Course, say: curves.Say) -> tuple[str, Markup] | None:
    """What the validation loss says of the length of the run; None where it was measured too seldom to say it."""
    after = [one for one in of.points if one.step > 0]
    if not after:
        return None
    low, last = min(of.points, key=lambda one: one.loss), of.points[-1]
    gained = of.points[0].loss - low.loss
    if low.loss <= 0:
        return None
    told = {"low": shown(low.loss), "at": _at(low, say), "end": shown(last.loss, low.loss)}
    rise = last.loss - low.loss
    if rise > max(A_LITTLE * low.loss, OF_THE_FALL * gained):
        key = "learned_overfit" if low.step else "learned_worse"
        return "warn" if low.step else "bad", say(key, percent=f"{100 * rise / low.loss:.0f}\u00a0%", **told)
    if len(after) < 3:
        return None
    if not low.step:
        return "bad", say("learned_nothing", **told)
    before = after[-2]
    if low is last and before.loss - last.loss > max(STILL * before.loss, OF_THE_FALL * gained):
        return "warn", say("learned_falling", before=shown(before.loss), there=_at(before, say), **told)
    return "good", say("learned_level", **told)


def _notes(of: _Course, say: curves.Say, language: Language) -> list[Markup]:
    """Which weights were kept, and how much of the rows was padding."""
    notes = []
    kept = of.kept
    if kept is not None and not of.points:
        notes.append(say("learned_unwatched"))
    elif kept is not None:
        name = say("learned_loss") if of.measure is None else figure_name(of.measure, language)
        key = ("learned_kept_last" if kept == of.last else "learned_kept") if kept == of.best else "learned_kept_other"
        at = of.kept_point
        there = _at(at, say) if at is not None else say("at_step", step=whole(kept))
        notes.append(say(key, at=there, name=name, last=whole(of.last)))
    if of.filled is not None and of.filled < 0.9995:
        notes.append(say("learned_filled", share=f"{100 * of.filled:.1f}\u00a0%"))
    return notes


def _at(point: Point, say: curves.Say) -> Markup:
    """A step, with its epoch where that is known."""
    if point.epochs is None:
        return say("at_step", step=whole(point.step))
    return say("learned_at", step=whole(point.step), epochs=f"{point.epochs:.1f}")
