"""Classification: a text has one label, or any number of them.

Decides how a label is read, which there are (those of training, in sorted order, unless told), and that the label is
learned at the text's last token. Pairs of sentences are `pairs.py`'s, numbers `scoring.py`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import Field

from ratoon.base.errors import ConfigError, DataError
from ratoon.tasks.contract import Encoded, Head, Named, Record, Task, TaskSettings, TooLong, pick, too_long
from ratoon.tasks.example import Example
from ratoon.tasks.parts import as_text, filled, names_in
from ratoon.text.tokenizer import Tokenizer

TEXT = Named("text", ("text", "sentence", "review", "content", "title", "question", "query", "标题"))
LABEL = Named("label", ("label", "category", "label_desc", "class", "intent", "target", "sentiment", "labels"))


class ClassificationSettings(TaskSettings):
    """How a text's label is found."""

    labels: tuple[str, ...] = Field((), description="the labels, in their order; absent: those of the training rows")
    template: str = Field(
        "{text}", description="what is read; fields of the row in braces; {words}, {characters}: their number"
    )
    label_names: dict[str, str] = Field({}, description="other names for the labels as they stand in the file")
    separator: str = Field("|", description="multi-label: what stands between labels in one field of text")


@dataclass(frozen=True)
class LabelledText(Record):
    """A text and its labels (one, in plain classification)."""

    text: str
    labels: tuple[str, ...]


L = TypeVar("L", bound=LabelledText)


class _Labelled(Task[LabelledText], Generic[L]):
    """What tasks have in common that give labels to a text as a whole."""

    settings: ClassificationSettings
    settings_type: ClassVar[type[TaskSettings]] = ClassificationSettings
    labels: tuple[str, ...] = ()

    def settle(self, training: Sequence[LabelledText]) -> list[str]:
        """Take the labels of the training records, or check those that were told against them."""
        found = Counter(label for record in training for label in record.labels)
        self.labels = self.settings.labels or tuple(sorted(found))
        if len(self.labels) < 2 and self.objective == "text_label":
            raise ConfigError(
                f"the training rows have {len(self.labels)} label: there is nothing to tell apart",
                where="task.labels",
                expected="at least two",
                fix="look at the field that holds the label (task.fields)",
            )
        for record in training:
            self.check(record)
        absent = [label for label in self.labels if label not in found]
        shown = ", ".join(f"{label} {found[label]:,}" for label in self.labels[:12])
        more = f" and {len(self.labels) - 12} more" if len(self.labels) > 12 else ""
        sentences = [f"{len(self.labels)} labels: {shown}{more}"]
        if absent:
            sentences.append(f"no training row has the label {', '.join(absent)}: it cannot be learned")
        return sentences

    def check(self, record: LabelledText) -> None:
        """Raise `DataError` for a label that was not settled."""
        for label in record.labels:
            if label not in self.labels:
                known = ", ".join(self.labels[:12]) + (" …" if len(self.labels) > 12 else "")
                raise DataError(
                    f"the label '{label}' is not known",
                    where=record.place,
                    expected=f"one of {known}",
                    fix="name it in task.labels, rename it with task.label_names, or mend the row",
                )

    def facts(self) -> dict[str, Any]:
        """The settings, and the labels in the order of the scores."""
        return {**super().facts(), "labels": list(self.labels)}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take the labels back."""
        self.labels = tuple(facts["labels"])

    def text(self, record: LabelledText) -> str:
        """The text."""
        return record.text

    def with_text(self, record: LabelledText, text: str) -> LabelledText:
        """The same labels for another text."""
        return replace(record, text=text)

    def encode(self, record: LabelledText, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """The text's tokens, the answer asked at the last one."""
        ids = tokenizer.encode_prompt(record.text)
        kept, cut, reason = shorten(ids, room_tokens, too_long, record.place)
        weight = [0.0] * (len(kept) - 1) + [1.0]
        target, vector = self.target(record)
        example = Example(kept, weight, record.id, targets=[0] * (len(kept) - 1) + [target], vector=vector)
        return Encoded([example], len(ids), cut, reason)

    def target(self, record: LabelledText) -> tuple[int, tuple[float, ...] | None]:
        """What is asked at the last token: a label's number, or a vector."""
        raise NotImplementedError


class Classification(_Labelled[LabelledText]):
    """A text has one label."""

    kind = "classification"
    objective = "text_label"
    measure = "classification"

    def record(self, row: Mapping[str, Any], place: str) -> LabelledText | None:
        """Text and label of the row."""
        text = fill(self.settings.template, self.settings.fields, row, place)
        label = self.label_of(pick(row, LABEL, self.settings.fields, place))
        return LabelledText(str(row.get("id", place)), place, text, (label,))

    def unanswered(self, row: Mapping[str, Any], place: str) -> LabelledText:
        """Text of the row; some label stands in for the one that is not told."""
        filled_in = {**row, self.settings.fields.get("label", LABEL.names[0]): self.labels[0]}
        record = self.record(filled_in, place)
        assert record is not None, "a label that there is"
        return replace(record, labels=self.labels[:1])

    def label_of(self, found: Any) -> str:
        """The label's name for how it stands in a row: 1 and true are 1."""
        label = str(int(found)) if isinstance(found, bool) else str(found).strip()
        return self.settings.label_names.get(label, label)

    def expected(self, record: LabelledText) -> str:
        """The label."""
        return record.labels[0]

    def head(self) -> Head:
        """A score for each label of the whole text."""
        return Head("sequence", self.labels)

    def target(self, record: LabelledText) -> tuple[int, None]:
        """The label's number."""
        return self.labels.index(record.labels[0]), None

    def read_scores(self, record: LabelledText, scores: Any) -> str:
        """The label of the highest score."""
        return self.labels[int(scores.argmax())]


class MultiLabel(_Labelled[LabelledText]):
    """A text has any number of labels, none included."""

    kind = "multi-label"
    objective = "text_labels"
    measure = "multi_label"

    def record(self, row: Mapping[str, Any], place: str) -> LabelledText:
        """Text and labels of the row: a list, or one field with separators."""
        text = fill(self.settings.template, self.settings.fields, row, place)
        found = pick(row, LABEL, self.settings.fields, place, needed=False)
        parts = found if isinstance(found, list | tuple) else str(found or "").split(self.settings.separator)
        names = dict.fromkeys(str(part).strip() for part in parts if str(part).strip())
        labels = tuple(self.settings.label_names.get(name, name) for name in names)
        return LabelledText(str(row.get("id", place)), place, text, labels)

    def unanswered(self, row: Mapping[str, Any], place: str) -> LabelledText:
        """Text of the row, no label."""
        text = fill(self.settings.template, self.settings.fields, row, place)
        return LabelledText(str(row.get("id", place)), place, text, ())

    def expected(self, record: LabelledText) -> tuple[str, ...]:
        """The labels."""
        return record.labels

    def head(self) -> Head:
        """A score for each label, above 0 where it holds."""
        return Head("sequence", self.labels, "several")

    def target(self, record: LabelledText) -> tuple[int, tuple[float, ...]]:
        """1 for each label that holds."""
        return 0, tuple(float(label in record.labels) for label in self.labels)

    def read_scores(self, record: LabelledText, scores: Any) -> tuple[str, ...]:
        """The labels whose probability is above a half."""
        return tuple(label for label, score in zip(self.labels, scores, strict=True) if score > 0)


COUNTED: Mapping[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "characters": lambda text: sum(not character.isspace() for character in text),
}


def fill(template: str, fields: Mapping[str, str], row: Mapping[str, Any], place: str) -> str:
    """The template with the row's fields: `{text}` is recognised, others by their names; lists are joined. Where a row
    has no field `words` or `characters`, they are how many the text has (a model does not see how long what it reads
    is)."""
    values = {}
    for name in names_in(template):
        if name in COUNTED and name not in fields and name not in row:
            values[name] = str(COUNTED[name](as_text(pick(row, TEXT, fields, place))))
            continue
        values[name] = as_text(pick(row, TEXT if name == "text" else Named(name, (name, f"{name}s")), fields, place))
    return filled(template, values)


def shorten(ids: list[int], room_tokens: int, policy: TooLong, place: str) -> tuple[list[int], int, str | None]:
    """The ids that fit, how many were cut, and why. A text with one answer is never split."""
    if len(ids) <= room_tokens:
        return ids, 0, None
    if policy == "cut-right":
        return ids[:room_tokens], len(ids) - room_tokens, "too long: cut on the right"
    if policy == "cut-left":
        return ids[-room_tokens:], len(ids) - room_tokens, "too long: cut on the left"
    if policy == "split":
        raise ConfigError(
            "a text with one answer cannot be split",
            where="data.too_long",
            expected="refuse, cut-left or cut-right",
            fix="choose which end may be lost; it is counted",
        )
    raise too_long(place, len(ids), room_tokens)
