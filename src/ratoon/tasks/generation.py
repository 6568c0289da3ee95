"""Generation: free text, of which every token is learned.

Decides where a text begins and ends in tokens, how one that is too long is split (every prediction is learned once),
and with which beginning of it a model is asked to go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from ratoon.tasks.contract import Encoded, Named, Question, Record, Task, TaskSettings, TooLong, pick, too_long
from ratoon.tasks.example import Example
from ratoon.tasks.parts import cut, end_of_text, side
from ratoon.text.tokenizer import Tokenizer

TEXT = Named("text", ("text", "content", "document", "body", "正文", "sentence"))


class GenerationSettings(TaskSettings):
    """How a text is learned, and asked for."""

    prompt_tokens: int = Field(32, ge=1, description="tokens of a text that a model is given to go on from")
    max_new_tokens: int = Field(128, ge=1, description="the longest continuation")
    stop: tuple[str, ...] = Field((), description="texts that end an answer beside the end token")


@dataclass(frozen=True)
class Text(Record):
    """A text."""

    text: str


class Generation(Task[Text]):
    """A text is learned whole, its end included. Where the tokenizer begins texts with a token of their own, the first
    token is learned too; without, it has nothing it could be predicted from."""

    kind = "generation"
    measure = "perplexity"
    settings: GenerationSettings
    settings_type = GenerationSettings

    def record(self, row: Mapping[str, Any], place: str) -> Text:
        """The row's text."""
        text = str(pick(row, TEXT, self.settings.fields, place))
        return Text(str(row.get("id", place)), place, text)

    def text(self, record: Text) -> str:
        """The text."""
        return record.text

    def with_text(self, record: Text, text: str) -> Text:
        """Another text."""
        return replace(record, text=text)

    def expected(self, record: Text) -> tuple[str, ...]:
        """The text."""
        return (record.text,)

    def encode(self, record: Text, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """The text's tokens and its end. Split: each piece begins with the token that the piece before it learned
        last, so that every token is learned once."""
        ids = [*tokenizer.encode_prompt(record.text), end_of_text(tokenizer)]
        if len(ids) - 1 <= room_tokens:
            return Encoded([_example(ids, record)], len(ids))
        if too_long == "refuse":
            raise _too_long(record.place, len(ids) - 1, room_tokens)
        if too_long == "split":
            pieces = [ids[start : start + room_tokens + 1] for start in range(0, len(ids) - 1, room_tokens)]
            examples = [_example(piece, record) for piece in pieces]
            return Encoded(examples, len(ids), 0, "too long: split", repeated_tokens=len(pieces) - 1)
        kept = cut(ids, room_tokens + 1, too_long)
        return Encoded([_example(kept, record)], len(ids), len(ids) - len(kept), side(too_long))

    def question(
        self, record: Text, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong = "cut-left"
    ) -> Question:
        """The text's first tokens."""
        new = min(self.settings.max_new_tokens, max(1, room_tokens // 2))
        ids = tokenizer.encode_prompt(record.text)
        return Question(ids[: min(self.settings.prompt_tokens, room_tokens - new)], None, new, self.settings.stop)


_too_long = too_long


def _example(ids: list[int], record: Text) -> Example:
    return Example(ids, [1.0] * (len(ids) - 1), record.id)
