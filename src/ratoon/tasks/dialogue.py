"""Dialogue: conversations of many turns, of which the assistant's answers are learned.

Decides which answers are learned, what becomes of tools, and how a conversation that is too long is shortened. Whose
turn is whose is `messages.py`'s, tokens and masks are the one renderer's (`text/chat.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from ratoon.base.errors import DataError
from ratoon.tasks.contract import Encoded, Question, Record, Task, TaskSettings, TooLong, too_long
from ratoon.tasks.example import Example
from ratoon.tasks.messages import NOT_LEARNED, Message, to_messages
from ratoon.tasks.parts import not_split, side
from ratoon.tasks.turns import answers, exchanges, most, rendered, shortened, told, weights
from ratoon.text.tokenizer import Tokenizer

UNANSWERED = "behind the last answer: nothing to learn there"


class DialogueSettings(TaskSettings):
    """What is learned of a conversation."""

    learn: Literal["all", "last"] = Field("all", description="every answer of the assistant, or the last alone")
    system: str = Field("", description="a system text for conversations that have none")
    tools: Literal["template", "text"] = Field(
        "template", description="tools and calls: as the model's template shows them, or written into the messages"
    )
    max_new_tokens: int = Field(256, ge=1, description="the longest answer")
    stop: tuple[str, ...] = Field((), description="texts that end an answer beside the end of the turn")


@dataclass(frozen=True)
class Talk(Record):
    """A conversation in OpenAI's form, with the tools that may be called."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] | None = None

    @property
    def asked(self) -> int:
        """How many messages stand before the last answer."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")


class Dialogue(Task[Talk]):
    """Conversations; the answers of the assistant are learned, each with the token that ends its turn."""

    kind = "dialogue"
    measure = "perplexity"
    settings: DialogueSettings
    settings_type = DialogueSettings

    def record(self, row: Mapping[str, Any], place: str) -> Talk:
        """The row's conversation, whatever its layout."""
        told_as = {name: row[key] for name, key in self.settings.fields.items() if key in row}
        talk = to_messages({**row, **told_as}, place)
        messages = talk.messages
        if self.settings.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.settings.system}, *messages]
        tools = talk.tools
        if self.settings.tools == "text":
            messages, tools = told(messages, tools), None
        return Talk(str(row.get("id", place)), place, tuple(messages), None if tools is None else tuple(tools))

    def text(self, record: Talk) -> str:
        """All that is said before the last answer, turns apart by an empty line."""
        return "\n\n".join(message["content"] for message in record.messages[: record.asked])

    def with_text(self, record: Talk, text: str) -> Talk:
        """The same roles saying another text. Raises `DataError` when the number of turns changed."""
        chunks = text.split("\n\n")
        before = record.messages[: record.asked]
        sizes = [message["content"].count("\n\n") + 1 for message in before]
        if sum(sizes) != len(chunks):
            raise DataError(
                f"the changed text has {len(chunks)} paragraphs", where=record.place, expected=str(sum(sizes))
            )
        changed, at = [], 0
        for message, size in zip(before, sizes, strict=True):
            changed.append({**message, "content": "\n\n".join(chunks[at : at + size])})
            at += size
        return replace(record, messages=(*changed, *record.messages[record.asked :]))

    def expected(self, record: Talk) -> tuple[str, ...]:
        """The last answer."""
        return (record.messages[record.asked]["content"],)

    def encode(self, record: Talk, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """The conversation through the model's template.

        Too long: cut-left leaves out the first exchanges, cut-right the last ones (the first, too, where only the last
        answer is learned; the side is then that of the user's words), split makes several conversations,
        each with the system text (its tokens are repeated); an exchange that is too long alone has its user's words
        cut, or is left out where the conversation is split. Answers stay whole.
        """
        if self.settings.learn == "last":
            not_split(too_long, "a conversation of which only the last answer is learned")
        whole = len(rendered(tokenizer, _plain(record.messages), record.place, tools=record.tools).ids)
        messages = list(record.messages[: record.asked + 1])

        def fits(some: list[Message]) -> bool:
            return len(self._ids(some, record, tokenizer)) - 1 <= room_tokens

        if fits(messages):
            example = self._example(messages, record, tokenizer)
            cut = whole - len(example.ids)
            return Encoded([example], whole, cut, UNANSWERED if cut else None)
        if too_long == "refuse":
            raise _too_long(record.place, whole - 1, room_tokens)
        if too_long == "split":
            return self._split(messages, record, tokenizer, whole, room_tokens)
        keep = "first" if too_long == "cut-right" and self.settings.learn == "all" else "last"
        kept = shortened(messages, fits, too_long, tokenizer, keep=keep)
        if kept is None:
            return Encoded([], whole, whole, "too long: an answer alone does not fit")
        example = self._example(kept, record, tokenizer)
        return Encoded([example], whole, whole - len(example.ids), side(too_long))

    def _split(
        self, messages: list[Message], record: Talk, tokenizer: Tokenizer, whole: int, room_tokens: int
    ) -> Encoded:
        system, pieces = exchanges(messages)

        def some(start: int, stop: int) -> list[Message]:
            return [*system, *(message for piece in pieces[start:stop] for message in piece)]

        def tokens(start: int, stop: int) -> int:
            return len(self._ids(some(start, stop), record, tokenizer)) if stop > start else 0

        def fitting(start: int) -> int:
            return most(len(pieces) - start, lambda count: tokens(start, start + count) - 1 <= room_tokens)

        examples: list[Example] = []
        cut, start = whole - tokens(0, len(pieces)), 0
        left_out = False
        while start < len(pieces):
            count = fitting(start)
            if count:
                examples.append(self._example(some(start, start + count), record, tokenizer))
            else:
                left_out = True
                cut += tokens(0, start + 1) - tokens(0, start)
            start += max(1, count)
        if not examples:
            return Encoded([], whole, whole, "too long: no exchange fits")
        reason = "too long: split between turns" + (", an exchange longer than a row left out" if left_out else "")
        held = sum(len(example.ids) for example in examples)
        return Encoded(examples, whole, cut, reason, repeated_tokens=held + cut - whole)

    def _ids(self, messages: list[Message], record: Talk, tokenizer: Tokenizer) -> list[int]:
        return rendered(tokenizer, _plain(messages), record.place, tools=record.tools).ids

    def _example(self, messages: list[Message], record: Talk, tokenizer: Tokenizer) -> Example:
        found = rendered(tokenizer, _plain(messages), record.place, tools=record.tools)
        said = [message for message in messages if message["role"] == "assistant"]
        runs = answers(found.mask)
        if len(runs) != len(said):
            raise DataError(
                f"{len(said)} answers are {len(runs)} stretches of tokens in the chat template",
                where=record.place,
                expected="one for each answer",
            )
        pairs = list(zip(runs, said, strict=True))[-1 if self.settings.learn == "last" else 0 :]
        learned = [run for run, message in pairs if message.get(NOT_LEARNED) != 0]
        return Example(found.ids, weights(len(found.ids), learned), record.id)

    def question(
        self, record: Talk, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong = "cut-left"
    ) -> Question:
        """The conversation up to where the last answer begins; too long: its first exchanges are left out, then the
        user's last words cut."""
        messages = _plain(record.messages[: record.asked])
        new = min(self.settings.max_new_tokens, max(1, room_tokens // 2))

        def ids(some: list[Message]) -> list[int]:
            return rendered(tokenizer, some, record.place, tools=record.tools, prompt=True).ids

        whole = ids(messages)
        if too_long == "refuse" and len(whole) < room_tokens:
            new = min(new, room_tokens - len(whole))
        if len(whole) + new <= room_tokens:
            return Question(whole, None, new, self.settings.stop)
        if too_long == "refuse":
            raise _too_long(record.place, len(whole), room_tokens)
        kept = shortened(messages, lambda some: len(ids(some)) + new <= room_tokens, too_long, tokenizer)
        if kept is None:
            raise _too_long(record.place, len(whole), room_tokens)
        asked = ids(kept)
        return Question(asked, None, new, self.settings.stop, len(whole) - len(asked))


_too_long = too_long


def _plain(messages: list[Message] | tuple[Message, ...]) -> list[Message]:
    """The messages as templates read them."""
    return [{key: value for key, value in message.items() if key != NOT_LEARNED} for message in messages]
