"""What a task is: from a row of a file to tokens with what is learned, and from what a model gives back to an answer.

Decides the hooks that reading, training, decoding and measuring ask of every task. Which files there are is
`data/rows.py`'s; how examples share rows, `data/pack.py`'s; what is computed of an answer, `evaluate/metrics`'.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from ratoon.base.errors import DataError
from ratoon.base.settings import Settings
from ratoon.tasks.example import Example
from ratoon.text.tokenizer import Tokenizer

TooLong = Literal["refuse", "cut-left", "cut-right", "split"]


@dataclass(frozen=True)
class Record:
    """A row as a task understands it; each task has its own kind with more fields. `place` is file and line."""

    id: str
    place: str


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Head:
    """The head that a task needs on the model, as `model.config.HeadConfig` has it."""

    kind: Literal["token", "sequence", "span"]
    labels: tuple[str, ...]
    problem: Literal["one", "several", "number"] = "one"


@dataclass(frozen=True)
class Encoded:
    """A record as tokens: its examples (several where it was split, none where it was dropped), and what became of
    the tokens that the whole would have had.

    `rendered_tokens` + `repeated_tokens` = `held_tokens` + `cut_tokens`. Repeated are those that stand in more than one
    example, once for each time after the first: the overlap of windows, the question before each of them, a system text
    before each piece of a dialogue. What was dropped counts as cut.
    """

    examples: list[Example]
    rendered_tokens: int
    cut_tokens: int = 0
    reason: str | None = None
    """Why something was cut, split or dropped."""
    repeated_tokens: int = 0
    places: Sequence[Sequence[tuple[int, int]]] = ()
    """Spans: for each example the characters (first, last + 1) of each token that an answer may begin or end at."""

    @property
    def held_tokens(self) -> int:
        """Tokens in the examples: their ids and sources, and what stands beside them."""
        return sum(tokens_of(example) for example in self.examples)


def tokens_of(example: Example) -> int:
    """Ids and source tokens of an example and of what stands beside it."""
    own = len(example.ids) + len(example.source or ())
    return own if example.beside is None else own + tokens_of(example.beside)


@dataclass(frozen=True)
class Question:
    """What a model is asked in order to answer a record, for tasks that are decoded token by token: the ids before the
    answer. `source`: what an encoder reads instead. `cut_tokens`: tokens that were cut so that an answer fits."""

    ids: list[int]
    source: list[int] | None = None
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    cut_tokens: int = 0


class TaskSettings(Settings):
    """What every task can be told. Each task adds its own."""

    fields: dict[str, str] = Field(
        {}, description="which field of the rows holds what: {text: sentence, label: label_desc}; absent: recognised"
    )


class Task(ABC, Generic[R]):
    """One task. `kind` is its name in a recipe; `version` moves when records, templates or masks change.

    `objective` names what is trained (`train/objectives.py`): next_token, token_label, text_label, text_labels,
    numbers, span, preference. `measure` names what is measured (`evaluate/task.py`).
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    objective: str = "next_token"
    measure: str
    settings_type: ClassVar[type[TaskSettings]] = TaskSettings

    def __init__(self, settings: TaskSettings | None = None) -> None:
        self.settings = settings if settings is not None else self.settings_type.model_validate({})

    @abstractmethod
    def record(self, row: Mapping[str, Any], place: str) -> R | None:
        """The row's record; None for a row that says itself that it has no answer. Raises `DataError` with the place
        for a missing or empty field, or a value that cannot be."""

    def unanswered(self, row: Mapping[str, Any], place: str) -> R:
        """The record of a row whose answer is not told, as in test sets that others measure; an answer that the row has
        is not looked at. It can be put to a model; what `expected` says of it means nothing. Asked when the task is
        settled. Raises `DataError` as `record` does, and where the task needs the answer."""
        raise DataError(
            f"the task {self.kind} reads no row without its answer", where=place, expected="rows with answers"
        )

    def settle(self, training: Sequence[R]) -> list[str]:
        """Take what the training records alone decide (the labels there are); returns sentences for people."""
        return []

    def check(self, record: R) -> None:
        """Raise `DataError` for a record that does not fit what was settled (a label that training does not have)."""
        return None

    def calibrate(self, records: Sequence[R], scores: Sequence[Any]) -> str | None:
        """Learn how scores are to be read from those of held-out records, after training; what was learned, as a
        sentence. Most tasks have nothing to learn there."""
        return None

    def facts(self) -> dict[str, Any]:
        """What a saved model must know of the task to answer again; `restore` takes it back."""
        return {"kind": self.kind, "version": self.version, "settings": self.settings.model_dump(mode="json")}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take back what `facts` gave beside the settings (labels)."""
        return None

    @abstractmethod
    def text(self, record: R) -> str:
        """What is read, without the answer: for copies between splits, floors and perturbations."""

    def with_text(self, record: R, text: str) -> R:
        """The same record reading another text (a perturbed one). Raises `DataError` where that cannot be."""
        raise DataError(f"the task {self.kind} has no text that can be changed alone", where=record.place)

    @abstractmethod
    def expected(self, record: R) -> Any:
        """The right answer as it is measured: a label, labels, tags, reference texts, a number."""

    @abstractmethod
    def encode(self, record: R, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """The record as examples of at most `room_tokens` places each.

        Raises `DataError` with the place when it is longer and `too_long` is refuse, and when nothing of it could be
        learned.
        """

    def together(self, before: R, record: R) -> bool:
        """Whether `record` stands right behind `before` in one document and is read with it: then each is context of
        the other, in training and in answering."""
        return False

    # -- with a head -----------------------------------------------------------------------------------------------

    def head(self) -> Head | None:
        """The head that the task needs; None: the model's own scores of the next token."""
        return None

    def read_scores(self, record: R, scores: Any) -> Any:
        """What a head's scores (numpy: (labels,) of a text, (words, labels) of its words) answer."""
        raise NotImplementedError(f"{self.kind} is not answered by a head")

    # -- without a head ----------------------------------------------------------------------------------------------

    def question(
        self, record: R, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong = "cut-left"
    ) -> Question:
        """What the model is asked, token for token what stands before the answer in training.

        Prompt and answer have `room_tokens` together; `too_long` says which end of the source is lost where both do
        not fit (split: the right one), and the question says how many tokens were.
        """
        raise NotImplementedError(f"{self.kind} is answered by a head")

    def read_answer(self, record: R, text: str) -> Any:
        """What a generated text answers."""
        return text.strip()


def too_long(place: str, tokens: int, room_tokens: int) -> DataError:
    """The one error for a record that does not fit."""
    return DataError(
        f"the record has {tokens:,} tokens",
        where=place,
        expected=f"at most {room_tokens:,}, the row's length",
        fix="say data.too_long: cut-right, cut-left or split, or lengthen train.context_tokens",
    )


@dataclass(frozen=True)
class Named:
    """What a field is usually called, so that rows are read without being told."""

    what: str
    names: tuple[str, ...]
    also: dict[str, str] = field(default_factory=dict)


def pick(row: Mapping[str, Any], named: Named, given: Mapping[str, str], place: str, *, needed: bool = True) -> Any:
    """The value of a field: the one that `given` names, else the first usual name the row has.

    Raises `DataError` for one that is missing, or empty where it is needed.
    """
    import difflib

    told = given.get(named.what)
    key = told if told is not None else next((name for name in named.names if name in row), None)
    if key is None or key not in row:
        if not needed and told is None:
            return None
        near = difflib.get_close_matches(told or named.what, row.keys(), n=1)
        raise DataError(
            f"the row has no field '{told or named.what}'",
            where=place,
            expected=f"one of {', '.join(named.names)}" if told is None else f"'{told}', as task.fields says",
            fix=f"say task.fields: {{{named.what}: {near[0] if near else 'NAME'}}}; the row has {', '.join(row)}",
        )
    value = row[key]
    if needed and (value is None or (isinstance(value, str | list | dict) and not value)):
        raise DataError(f"the field '{key}' is empty", where=place, fix="mend the row, or say data.on_bad_row: skip")
    if needed and isinstance(value, str) and not value.strip():
        raise DataError(f"the field '{key}' is blank", where=place, fix="mend the row, or say data.on_bad_row: skip")
    return value
