"""What translation, summaries and free answers share: something is read, and a text answers it.

Decides how the source is put before the answer (a template, or the chat template through the one renderer), that the
answer and the token that ends it are learned and nothing else, that an answer is never cut, and how the same record
looks to an encoder-decoder. What the fields are called is each task's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ratoon.base.errors import DataError
from ratoon.tasks.contract import Encoded, Named, Question, Record, Task, TaskSettings, TooLong, pick, too_long
from ratoon.tasks.example import Example
from ratoon.tasks.messages import Message
from ratoon.tasks.parts import (
    Part,
    as_text,
    continued,
    cut,
    end_of_text,
    filled,
    fit,
    joined,
    names_in,
    not_split,
    parts_of,
    side,
)
from ratoon.tasks.turns import answers, rendered, shortened, weights
from ratoon.text.tokenizer import Tokenizer

ANSWER_TOO_LONG = "too long: the answer alone does not fit"


class AnsweredSettings(TaskSettings):
    """How a source is asked about, and how long an answer may be."""

    template: str | None = Field(
        None, description="what is read before the answer, fields in braces; absent: the task's"
    )
    through: Literal["template", "chat"] = Field(
        "template", description="chat: what the template says is a user's message in the model's own chat template"
    )
    system: str = Field("", description="chat: a system text before it")
    as_source: bool = Field(False, description="for an encoder-decoder: the encoder reads the source, without template")
    max_new_tokens: int = Field(128, ge=1, description="the longest answer")
    num_beams: int = Field(1, ge=1, description="answers kept side by side while decoding (beam search); 1: greedy")
    length_penalty: float | None = Field(
        None, gt=0, description="beam search: how much longer answers are favoured (Wu et al. 2016, eq. 14); absent: 1"
    )
    stop: tuple[str, ...] = Field((), description="texts that end an answer beside the end token")

    @model_validator(mode="after")
    def _has_effect(self) -> AnsweredSettings:
        if self.as_source and (self.template is not None or self.through == "chat"):
            raise ValueError("template and through have no effect with as_source: the encoder reads the source alone")
        if self.system and self.through != "chat":
            raise ValueError("system has no effect unless through is chat")
        return self


class SpokenSettings(AnsweredSettings):
    """The same, for tasks whose own template is in the language of the rows."""

    language: str = Field("en", description="the language of the task's own template: en or zh")


@dataclass(frozen=True)
class Asked(Record):
    """What the template reads, by name, and the texts that answer it; the first is learned."""

    values: Mapping[str, str]
    answers: tuple[str, ...]


class Answered(Task[Asked]):
    """A task whose records are a source and an answer. `source` names the field that may be shortened."""

    settings: AnsweredSettings
    settings_type: ClassVar[type[TaskSettings]] = AnsweredSettings
    source: ClassVar[str] = "source"

    def __init__(self, settings: AnsweredSettings | None = None) -> None:
        super().__init__(settings)
        if self.settings.as_source:
            self.objective = "sequence_to_sequence"

    # -- what each task says -----------------------------------------------------------------------------------------

    def template(self) -> str:
        """What is read before the answer."""
        raise NotImplementedError

    def named(self, name: str) -> Named:
        """What the field `name` of the template is usually called in rows."""
        return Named(name, (name,))

    def answers_of(self, row: Mapping[str, Any], place: str) -> tuple[str, ...]:
        """The right answers of a row."""
        raise NotImplementedError

    def constants(self) -> dict[str, str]:
        """What the template may name that is no field."""
        return {}

    # -- the contract ------------------------------------------------------------------------------------------------

    def record(self, row: Mapping[str, Any], place: str) -> Asked:
        """The fields that the template names, and the answers."""
        asked = self.unanswered(row, place)
        found = tuple(answer.strip() for answer in self.answers_of(row, place))
        if not found or not all(found):
            raise DataError("the answer is empty", where=place, fix="mend the row, or say data.on_bad_row: skip")
        return replace(asked, answers=found)

    def unanswered(self, row: Mapping[str, Any], place: str) -> Asked:
        """The fields that the template names."""
        constants = self.constants()
        wanted = dict.fromkeys([*names_in(self.template()), self.source])
        values = {
            name: as_text(pick(row, self.named(name), self.settings.fields, place))
            for name in wanted
            if name not in constants
        }
        return Asked(str(row.get("id", place)), place, values, ())

    def text(self, record: Asked) -> str:
        """The source."""
        return record.values[self.source]

    def with_text(self, record: Asked, text: str) -> Asked:
        """The same answers to another source."""
        return replace(record, values={**record.values, self.source: text})

    def expected(self, record: Asked) -> tuple[str, ...]:
        """The right answers."""
        return record.answers

    def encode(self, record: Asked, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """Source and answer; the answer and its end are learned. Too long: the source is shortened, and a record whose
        answer leaves no room for one token of it is dropped."""
        not_split(too_long, "a source with one answer")
        if self.settings.as_source:
            return self._beside(record, tokenizer, room_tokens, too_long)
        if self.settings.through == "chat":
            return self._in_chat(record, tokenizer, room_tokens, too_long)
        prompt = self._parts(record, tokenizer)
        answer = [*continued(record.answers[0], tokenizer), end_of_text(tokenizer)]
        whole = len(joined(prompt)) + len(answer)
        if whole - 1 > room_tokens and too_long == "refuse":
            raise _too_long(record.place, whole - 1, room_tokens)
        found = fit(prompt, room_tokens + 1 - len(answer), too_long, {self.source})
        if found is None:
            return Encoded([], whole, whole, ANSWER_TOO_LONG)
        kept, lost = joined(found[0]), found[1]
        weight = [0.0] * (len(kept) - 1) + [1.0] * len(answer)
        return Encoded([Example(kept + answer, weight, record.id)], whole, lost, side(too_long) if lost else None)

    def question(
        self, record: Asked, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong = "cut-left"
    ) -> Question:
        """The source as it stands before the answer in training, shortened so that `max_new_tokens` fit behind it."""
        new = min(self.settings.max_new_tokens, max(1, room_tokens // 2))
        if self.settings.as_source:
            source = tokenizer.encode_prompt(self.text(record))
            if too_long == "refuse" and len(source) > room_tokens:
                raise _too_long(record.place, len(source), room_tokens)
            kept = cut(source, min(len(source), room_tokens), too_long)
            return Question([begin_of_answer(tokenizer)], kept, new, self.settings.stop, len(source) - len(kept))
        if self.settings.through == "chat":
            messages = self._messages(record)
            whole = len(self._chat_ids(messages, record, tokenizer))
        else:
            prompt = self._parts(record, tokenizer)
            whole = len(joined(prompt))
        if too_long == "refuse":
            new = min(new, room_tokens - whole)
            if new < 1:
                raise _too_long(record.place, whole + 1, room_tokens)
        if self.settings.through == "chat":
            ids = self._short_chat(messages, record, tokenizer, room_tokens - new, too_long)
        else:
            found = fit(prompt, room_tokens - new, too_long, {self.source})
            ids = None if found is None else joined(found[0])
        if ids is None:
            raise _too_long(record.place, whole + new, room_tokens)
        return Question(ids, None, new, self.settings.stop, whole - len(ids))

    # -- through a template ------------------------------------------------------------------------------------------

    def _parts(self, record: Asked, tokenizer: Tokenizer) -> list[Part]:
        return parts_of(self.template(), {**self.constants(), **record.values}, tokenizer)

    # -- through the chat template -----------------------------------------------------------------------------------

    def _messages(self, record: Asked) -> list[Message]:
        asked = filled(self.template(), {**self.constants(), **record.values}).strip()
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        return [*system, {"role": "user", "content": asked}]

    def _chat_ids(self, messages: list[Message], record: Asked, tokenizer: Tokenizer) -> list[int]:
        return rendered(tokenizer, messages, record.place, prompt=True).ids

    def _short_chat(
        self, messages: list[Message], record: Asked, tokenizer: Tokenizer, room_tokens: int, policy: TooLong
    ) -> list[int] | None:
        def fits(some: list[Message]) -> bool:
            return len(self._chat_ids(some, record, tokenizer)) <= room_tokens

        kept = self._short(record, tokenizer, fits, policy)
        return None if kept is None else self._chat_ids(kept, record, tokenizer)

    def _short(
        self, record: Asked, tokenizer: Tokenizer, fits: Callable[[list[Message]], bool], policy: TooLong
    ) -> list[Message] | None:
        """The messages with a source that fits; None where not one token of it does."""
        whole = self._messages(record)
        if fits(whole):
            return whole
        source = [{"role": "user", "content": self.text(record)}]

        def with_source(some: list[Message]) -> bool:
            return fits(self._messages(self.with_text(record, some[0]["content"])))

        kept = shortened(source, with_source, policy, tokenizer)
        return None if kept is None else self._messages(self.with_text(record, kept[0]["content"]))

    def _in_chat(self, record: Asked, tokenizer: Tokenizer, room_tokens: int, policy: TooLong) -> Encoded:
        answer = {"role": "assistant", "content": record.answers[0]}

        def ids(some: list[Message]) -> list[int]:
            return rendered(tokenizer, [*some, answer], record.place).ids

        whole = len(ids(self._messages(record)))
        if whole - 1 > room_tokens and policy == "refuse":
            raise _too_long(record.place, whole - 1, room_tokens)
        kept = self._short(record, tokenizer, lambda some: len(ids(some)) - 1 <= room_tokens, policy)
        if kept is None:
            return Encoded([], whole, whole, ANSWER_TOO_LONG)
        found = rendered(tokenizer, [*kept, answer], record.place)
        example = Example(found.ids, weights(len(found.ids), answers(found.mask)[-1:]), record.id)
        lost = whole - len(found.ids)
        return Encoded([example], whole, lost, side(policy) if lost else None)

    # -- for an encoder-decoder --------------------------------------------------------------------------------------

    def _beside(self, record: Asked, tokenizer: Tokenizer, room_tokens: int, policy: TooLong) -> Encoded:
        source = tokenizer.encode_prompt(self.text(record))
        ids = [begin_of_answer(tokenizer), *tokenizer.encode(record.answers[0]), end_of_text(tokenizer)]
        whole = len(source) + len(ids)
        if policy == "refuse" and max(len(source), len(ids) - 1) > room_tokens:
            raise _too_long(record.place, max(len(source), len(ids) - 1), room_tokens)
        if len(ids) - 1 > room_tokens:
            return Encoded([], whole, whole, ANSWER_TOO_LONG)
        kept = cut(source, min(len(source), room_tokens), policy)
        example = Example(ids, [1.0] * (len(ids) - 1), record.id, source=kept)
        lost = len(source) - len(kept)
        return Encoded([example], whole, lost, side(policy) if lost else None)


_too_long = too_long


def begin_of_answer(tokenizer: Tokenizer) -> int:
    """The id from which a decoder predicts an answer's first token: what begins a text, else what ends one."""
    return tokenizer.bos_id if tokenizer.bos_id is not None else end_of_text(tokenizer)
