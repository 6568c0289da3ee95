"""Preference: of two answers to one conversation, one was chosen and one rejected.

Decides how pairs are read from the usual layouts, and that both answers stand behind the same rendered prompt, of which
nothing is learned. What the loss makes of a pair is the trainer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from ratoon.base.errors import ArtifactError, DataError
from ratoon.tasks.contract import Encoded, Record, Task, TaskSettings, TooLong, too_long
from ratoon.tasks.example import Example
from ratoon.tasks.messages import (
    PROMPT,
    TURNS,
    Message,
    check_order,
    prompt_of,
    said,
    spoken,
    tools_of,
    turns_of,
    with_system,
)
from ratoon.tasks.parts import not_split, side
from ratoon.tasks.turns import answers, rendered, shortened, told, weights
from ratoon.text.chat import Rendered
from ratoon.text.tokenizer import Tokenizer


class PreferenceSettings(TaskSettings):
    """How pairs are rendered, and what is learned of them."""

    beta: float = Field(0.1, gt=0, description="how strongly the model is held to the one it began as")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs that may be the wrong way round; with loss: sigmoid"
    )
    loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="sigmoid: DPO; ipo: its squared form")
    tools: Literal["template", "text"] = Field(
        "template", description="tools and calls: as the model's template shows them, or written into the messages"
    )


@dataclass(frozen=True)
class Choice(Record):
    """A conversation up to the answer, and the two answers (each the messages from where they part)."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Message, ...] | None = None


class Preference(Task[Choice]):
    """Pairs of answers; an example is the chosen one with the rejected one beside it."""

    kind = "preference"
    objective = "preference"
    measure = "preference"
    settings: PreferenceSettings
    settings_type = PreferenceSettings

    def record(self, row: Mapping[str, Any], place: str) -> Choice:
        """The pair of a row: sharegpt's turns or OpenAI's messages beside chosen and rejected, texts beside a prompt,
        or two transcripts of the whole conversation. Raises `DataError` where the two do not answer the same."""
        row = {**row, **{name: row[key] for name, key in self.settings.fields.items() if key in row}}
        for name in ("chosen", "rejected"):
            if not row.get(name):
                raise DataError(f"the row has no answer that was {name}", where=place, expected=f"the field '{name}'")
        prompt, chosen, rejected = self._sides(row, place)
        while chosen and rejected and chosen[0] == rejected[0]:
            prompt, chosen, rejected = [*prompt, chosen[0]], chosen[1:], rejected[1:]
        if not chosen or not rejected:
            raise DataError(
                "chosen and rejected are the same, or one is the other's begin",
                where=place,
                expected="two answers to one prompt",
                fix="mend the row, or say data.on_bad_row: skip",
            )
        if not prompt or {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
            raise DataError(
                "chosen and rejected do not answer the same prompt",
                where=place,
                expected="the same turns on both sides up to an assistant's",
                fix="mend the row, or say data.on_bad_row: skip",
            )
        prompt = with_system(prompt, row, place)
        for answer in (chosen, rejected):
            check_order([*prompt, *answer], place)
        tools = tools_of(row, place)
        if self.settings.tools == "text":
            count = len(told(prompt, tools))
            chosen, rejected = (told([*prompt, *answer], tools)[count:] for answer in (chosen, rejected))
            prompt, tools = told(prompt, tools), None
        listed = None if tools is None else tuple(tools)
        return Choice(str(row.get("id", place)), place, tuple(prompt), tuple(chosen), tuple(rejected), listed)

    def _sides(self, row: Mapping[str, Any], place: str) -> tuple[list[Message], list[Message], list[Message]]:
        sides = []
        prompted = any(key in row for key in (*TURNS, *PROMPT))
        for name in ("chosen", "rejected"):
            found = row[name]
            if isinstance(found, str):
                sides.append([said("assistant", found, place)] if prompted else spoken(found, place))
            else:
                sides.append(turns_of(found, place))
        turns = next((row[key] for key in TURNS if isinstance(row.get(key), list)), None)
        if turns is not None:
            return turns_of(turns, place), sides[0], sides[1]
        whole = all(len(side) > 1 for side in sides)  # the prompt stands in both sides, too
        prompt = [] if not prompted or whole else prompt_of(row, place)
        return prompt, sides[0], sides[1]

    def text(self, record: Choice) -> str:
        """All that is said before the answers, turns apart by an empty line."""
        return "\n\n".join(message["content"] for message in record.prompt)

    def expected(self, record: Choice) -> str:
        """What was chosen."""
        return "\n\n".join(message["content"] for message in record.chosen)

    def encode(self, record: Choice, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """Both answers, each behind the prompt; they share a row. Too long: the prompt is shortened for both alike, its
        first exchanges first; an answer is never cut."""
        not_split(too_long, "a pair of answers")

        def tokens(prompt: list[Message]) -> tuple[int, int]:
            sizes = [len(side.ids) for side in self._rendered(prompt, record, tokenizer)]
            return sum(sizes), sum(sizes) - 2

        prompt = list(record.prompt)
        whole, places = tokens(prompt)
        if places > room_tokens:
            if too_long == "refuse":
                raise _too_long(record.place, places, room_tokens)
            kept = shortened(prompt, lambda some: tokens(some)[1] <= room_tokens, too_long, tokenizer)
            if kept is None:
                return Encoded([], whole, whole, "too long: the two answers alone do not fit")
            prompt = kept
        example = self._example(prompt, record, tokenizer)
        lost = whole - tokens(prompt)[0]
        return Encoded([example], whole, lost, side(too_long) if lost else None)

    def _rendered(self, prompt: list[Message], record: Choice, tokenizer: Tokenizer) -> tuple[Rendered, Rendered]:
        chosen, rejected = (
            rendered(tokenizer, [*prompt, *answer], record.place, tools=record.tools)
            for answer in (record.chosen, record.rejected)
        )
        return chosen, rejected

    def _example(self, prompt: list[Message], record: Choice, tokenizer: Tokenizer) -> Example:
        before = sum(message["role"] == "assistant" for message in prompt)
        sides = self._rendered(prompt, record, tokenizer)
        runs = [answers(found.mask)[before:] for found in sides]
        begins = [learned[0][0] for learned in runs]
        if begins[0] != begins[1] or sides[0].ids[: begins[0]] != sides[1].ids[: begins[0]]:
            raise ArtifactError(
                "the chat template does not render the prompt alike before both answers",
                where="chat template",
                expected="a template whose text grows message by message",
            )
        chosen, rejected = (
            Example(found.ids, weights(len(found.ids), learned), record.id)
            for found, learned in zip(sides, runs, strict=True)
        )
        return replace(chosen, beside=rejected)


_too_long = too_long
