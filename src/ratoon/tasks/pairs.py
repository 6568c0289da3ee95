"""Sentence pairs: two texts have one label, or one number.

Decides how two texts stand in one example (the first, a line end, the second), which of them is shortened (the longer),
and how the rows of CLUE that hold a pair in disguise are read: CSL's abstract with keywords, WSC's text with two places
in it. Labels are `classification.py`'s, numbers `scoring.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from ratoon.base.errors import DataError
from ratoon.tasks.answering import locate
from ratoon.tasks.classification import LABEL, Classification, ClassificationSettings, LabelledText
from ratoon.tasks.contract import Encoded, Named, TooLong, pick, too_long
from ratoon.tasks.example import Example
from ratoon.tasks.parts import as_text, fit, joined, not_split, parts_of, side
from ratoon.tasks.scoring import Scored, Scoring, ScoringSettings
from ratoon.text.tokenizer import Tokenizer

FIRST = Named("first", ("first", "sentence1", "premise", "question1", "text1", "text_a", "abst", "query"))
SECOND = Named("second", ("second", "sentence2", "hypothesis", "question2", "text2", "text_b", "keyword", "title"))
TEMPLATE = "{first}\n{second}"


def pair_of(row: Mapping[str, Any], fields: Mapping[str, str], place: str) -> tuple[str, str]:
    """The two texts of a row. Raises `DataError` for one that is missing or empty."""
    target = row.get("target")
    if isinstance(target, Mapping) and "span1_text" in target and "first" not in fields:
        return _marked(row, target, place)
    first = as_text(pick(row, FIRST, fields, place)).replace("\n", " ")
    return first, as_text(pick(row, SECOND, fields, place)).replace("\n", " ")


def _marked(row: Mapping[str, Any], target: Mapping[str, Any], place: str) -> tuple[str, str]:
    """WSC: the text with its noun as [noun] and its pronoun as _pronoun_, and what is asked of them."""
    text, marks = str(row.get("text", "")), []
    for number, (before, behind) in ((1, "[]"), (2, "__")):
        words, told = str(target.get(f"span{number}_text", "")), target.get(f"span{number}_index")
        span = locate(text, words, told if isinstance(told, int) else None)
        if span is None:
            raise DataError(f"'{words}' is not in the text", where=place, expected="a piece of it, letter for letter")
        marks += [(span[0], before), (span[1], behind)]
    for at, mark in sorted(marks, reverse=True):
        text = text[:at] + mark + text[at:]
    return text.replace("\n", " "), f"{target['span2_text']} = {target['span1_text']}"


class PairSettings(ClassificationSettings):
    """How the label of two texts is found."""

    template: str = Field(TEMPLATE, description="what is read: {first} and {second} are recognised")
    without_label: tuple[str, ...] = Field(
        ("-",), description="labels that say that a row has none (OCNLI's '-'): it is left out, counted"
    )


@dataclass(frozen=True)
class LabelledPair(LabelledText):
    """Two texts and their label; `text` is the first."""

    second: str = ""


class Pairs(Classification):
    """Two texts have one label."""

    kind = "pairs"
    settings: PairSettings
    settings_type = PairSettings

    def record(self, row: Mapping[str, Any], place: str) -> LabelledPair | None:
        """The two texts and their label; None where the label says that there is none."""
        first, second = pair_of(row, self.settings.fields, place)
        found = self.label_of(pick(row, LABEL_OF_PAIR, self.settings.fields, place))
        if found in self.settings.without_label:
            return None
        return LabelledPair(str(row.get("id", row.get("idx", place))), place, first, (found,), second)

    def text(self, record: LabelledText) -> str:
        """Both texts, on a line each."""
        return f"{record.text}\n{_second(record)}"

    def with_text(self, record: LabelledText, text: str) -> LabelledPair:
        """The same label for two other texts. Raises `DataError` when they are no longer two."""
        first, second = _two(text, record.place)
        return replace(_pair(record), text=first, second=second)

    def encode(self, record: LabelledText, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """Both texts' tokens, the answer asked at the last one. Too long: the longer text is shortened."""
        values = {"first": record.text, "second": _second(record)}
        ids, whole, cut, reason = pair_ids(
            self.settings.template, values, tokenizer, room_tokens, too_long, record.place
        )
        if not ids:
            return Encoded([], whole, whole, reason)
        target, vector = self.target(record)
        weight = [0.0] * (len(ids) - 1) + [1.0]
        targets = [0] * (len(ids) - 1) + [target]
        return Encoded([Example(ids, weight, record.id, targets, vector)], whole, cut, reason)


LABEL_OF_PAIR = Named("label", tuple(name for name in LABEL.names if name != "target"))


class PairScoring(Scoring):
    """Two texts have one number: how alike they are, how well one answers the other."""

    class PairScoringSettings(ScoringSettings):
        """Which numbers there are, and what is read."""

        template: str = Field(TEMPLATE, description="what is read: {first} and {second} are recognised")

    kind = "pair-scoring"
    settings: PairScoringSettings
    settings_type = PairScoringSettings

    def read(self, row: Mapping[str, Any], place: str) -> str:
        """Both texts, on a line each."""
        return "\n".join(pair_of(row, self.settings.fields, place))

    def with_text(self, record: Scored, text: str) -> Scored:
        """The same number for two other texts. Raises `DataError` when they are no longer two."""
        return replace(record, text="\n".join(_two(text, record.place)))

    def encode(self, record: Scored, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """Both texts' tokens, the number asked at the last one. Too long: the longer text is shortened."""
        values = dict(zip(("first", "second"), record.text.split("\n"), strict=True))
        ids, whole, cut, reason = pair_ids(
            self.settings.template, values, tokenizer, room_tokens, too_long, record.place
        )
        if not ids:
            return Encoded([], whole, whole, reason)
        weight = [0.0] * (len(ids) - 1) + [1.0]
        return Encoded([Example(ids, weight, record.id, [0] * len(ids), self.target(record))], whole, cut, reason)


def pair_ids(
    template: str, values: Mapping[str, str], tokenizer: Tokenizer, room_tokens: int, policy: TooLong, place: str
) -> tuple[list[int], int, int, str | None]:
    """The ids of a pair that fit (none where no token of a text would be left), how many there are in all, how many
    were cut, and why."""
    parts = parts_of(template, values, tokenizer)
    whole = len(joined(parts))
    if whole > room_tokens:
        not_split(policy, "a pair of texts")
        if policy == "refuse":
            raise too_long(place, whole, room_tokens)
    found = fit(parts, room_tokens, policy, values)
    if found is None:
        return [], whole, whole, "too long: the template leaves no room for the texts"
    return joined(found[0]), whole, found[1], side(policy) if found[1] else None


def _two(text: str, place: str) -> tuple[str, str]:
    lines = text.split("\n")
    if len(lines) != 2:
        raise DataError(f"the changed text has {len(lines)} lines", where=place, expected="one for each of two texts")
    return lines[0], lines[1]


def _pair(record: LabelledText) -> LabelledPair:
    assert isinstance(record, LabelledPair), "a record of this task"
    return record


def _second(record: LabelledText) -> str:
    return _pair(record).second
