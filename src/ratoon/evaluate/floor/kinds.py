"""What floors are given and what they give: one shape of records for each shape of task.

Decides the shapes only. Which floors a task has stands in `run.py`; what they are worth is measured by the same metrics
as the model beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ratoon.base.errors import DataError


@dataclass(frozen=True)
class Floor:
    """A floor's predictions for the test records, in their order. `what` is its method in words, `seconds` what
    training and predicting took, `n_train` the training records it used (fewer than there are where reading all would
    take minutes)."""

    name: str
    what: str
    predictions: list[Any]
    seconds: float
    n_train: int


@dataclass(frozen=True)
class Labelled:
    """Texts with a label each."""

    texts: Sequence[str]
    labels: Sequence[str]


@dataclass(frozen=True)
class LabelSets:
    """Texts with any number of labels each."""

    texts: Sequence[str]
    labels: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts with a label each."""

    firsts: Sequence[str]
    seconds: Sequence[str]
    labels: Sequence[str]


@dataclass(frozen=True)
class PairNumbers:
    """Pairs of texts with a number each."""

    firsts: Sequence[str]
    seconds: Sequence[str]
    numbers: Sequence[float]


@dataclass(frozen=True)
class Numbers:
    """Texts with a number each. `groups`: what is graded on a scale of its own (an essay's prompt); each group is
    learned alone."""

    texts: Sequence[str]
    numbers: Sequence[float]
    groups: Sequence[str] | None = None


@dataclass(frozen=True)
class Tagged:
    """Sentences of words with a tag each."""

    words: Sequence[Sequence[str]]
    tags: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Sources:
    """Texts and what is made of each: a translation, a summary, an answer."""

    sources: Sequence[str]
    targets: Sequence[str]


@dataclass(frozen=True)
class Questions:
    """Questions, the texts that hold their answers, and for each question the answers that count as right."""

    questions: Sequence[str]
    contexts: Sequence[str]
    answers: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Learned:
    """Tokens, and which of them are learned: for each record its pieces, each ids with the weight of predicting
    ids[i + 1] at i. `vocabulary`: how many tokens there are."""

    pieces: Sequence[Sequence[tuple[tuple[int, ...], tuple[float, ...]]]]
    vocabulary: int


Data: TypeAlias = Labelled | LabelSets | Pairs | PairNumbers | Numbers | Tagged | Sources | Questions | Learned


def n_records(data: Data) -> int:
    """How many records there are. Raises `DataError` where the fields are not equally long."""
    lengths = {name: len(value) for name, value in vars(data).items() if hasattr(value, "__len__")}
    if len(set(lengths.values())) != 1:
        raise DataError(
            "the records are not whole: " + ", ".join(f"{n} {name}" for name, n in lengths.items()),
            expected="one of each for every record",
        )
    return next(iter(lengths.values()))
