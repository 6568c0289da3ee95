"""Messages -> text, ids and what is learned of them. The one renderer: training, evaluation, generation and service
all come here, so that a model is asked as it was taught.

Two rules. What a user wrote is text: a special token's spelling inside a message never becomes that token. And what an
assistant is to learn is its answer with the token that ends its turn, nothing before and nothing after.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ratoon.base.errors import ArtifactError, DataError
from ratoon.text.template import BEGIN_ANSWER, END_ANSWER, run
from ratoon.text.tokenizer import ROLES, Tokenizer

_BREAKS = [chr(code) for code in range(0xFDD2, 0xFDF0)]
"""Noncharacters: no text has a use for them, so one that these messages lack can mark a place in them."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it. `mask[i]` says whether ids[i] is to be learned (as a target)."""

    text: str
    ids: list[int]
    mask: list[bool]


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Rendered:
    """`messages` (`[{"role": …, "content": …}, …]`) through the tokenizer's chat template.

    With `add_generation_prompt` the text ends where the assistant begins to speak, and nothing is learned; without,
    every assistant message is learned, with the token that ends its turn. The ids of the two agree: what stands before
    an answer in training is, token for token, what stands before it in use. Special tokens come from the template
    alone. Raises `DataError` for messages that the template refuses, `ArtifactError` for a template that is missing,
    unsafe, or does not let the answers be told apart.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ArtifactError(
            "the tokenizer has no chat template",
            where="tokenizer_config.json",
            expected="the key chat_template, or a file chat_template.jinja",
            fix="use a model that was made for chat, or add the template it was trained with",
        )
    if not messages:
        raise DataError("there are no messages", where="chat", expected="at least one message")
    job = _Job(tokenizer, template, messages, tools)
    marked = job.text(len(messages), add_generation_prompt)
    spans: list[Span] = []
    if BEGIN_ANSWER in marked:
        marked, spans = _marked_answers(job, marked)
    else:
        try:
            spans = [job.answer(marked, number) for number in job.answers]
        except ArtifactError:
            if not add_generation_prompt:
                raise
    ids, places = job.encode(marked, [start for start, _ in spans])
    if add_generation_prompt:
        spans = []
    mask = [any(start <= first and last <= end for start, end in spans) for first, last in places]
    return Rendered(marked.replace(job.broken, ""), ids, mask)


class _Job:
    """One conversation with its special spellings broken by a mark, so that only the template can say them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        said = json.dumps([list(map(dict, messages)), list(tools or [])], ensure_ascii=False, default=str)
        self.broken = next((mark for mark in _BREAKS if mark not in said), "")
        if not self.broken or BEGIN_ANSWER in said or END_ANSWER in said:
            raise DataError("a message holds Unicode noncharacters (U+FDD0 …)", where="chat", expected="text")
        self.messages = [self._defused(dict(message)) for message in messages]
        self.tools = None if tools is None else [self._defused(dict(tool)) for tool in tools]
        self.answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]

    def _defused(self, value: Any) -> Any:
        if isinstance(value, str):
            pattern = self.tokenizer.special_pattern
            while found := pattern.search(value):
                at = found.start() + 1
                value = value[:at] + self.broken + value[at:]
            return value
        if isinstance(value, Mapping):
            return {key: self._defused(inner) for key, inner in value.items()}
        return [self._defused(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    def text(self, count: int, prompt: bool) -> str:
        """The first `count` messages rendered, with the marks that break special spellings."""
        roles = {role: self.tokenizer.role_token(role) for role in ROLES}
        values = {role: spelling for role, spelling in roles.items() if spelling is not None}
        return run(
            self.template,
            {
                **values,
                "messages": self.messages[:count],
                "tools": self.tools,
                "documents": None,
                "add_generation_prompt": prompt,
            },
        )

    def answer(self, whole: str, number: int) -> Span:
        """Where the answer in message `number` stands in `whole`, the token that ends the turn included."""
        try:
            before = self.text(number, True)
            after = self.text(number + 1, False)
        except DataError as error:
            raise _untold(number, f"the messages before it cannot be rendered alone ({error.found})") from None
        if not whole.startswith(before):
            raise _untold(number, "the prompt asked in use is not how the conversation begins in training")
        if not whole.startswith(after.rstrip()):
            raise _untold(number, "what comes later changes how it is rendered")
        said = _content(self.messages[number]).strip()
        at = whole.find(said, len(before), len(after)) if said else len(before)
        if at < 0:
            raise _untold(number, "its content is not in the text as it stands in the message")
        ends = list(self.tokenizer.special_pattern.finditer(whole, at + len(said), len(after)))
        if not ends:
            raise _untold(number, "no special token ends the turn, so a model could not learn to stop")
        return len(before), (ends[-1] if not said else ends[0]).end()

    def encode(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[Span]]:
        """Ids of a marked text, with the place of each token in it. No token spans one of `cuts`."""
        if self.broken not in text:
            ids, places = self.tokenizer.encode_spans(text)
            if not any(first < cut < last for cut in cuts for first, last in places):
                return ids, places
        ids, places = [], []
        section = False  # a special token stands right before
        for start, end, special in self._pieces(text, cuts):
            if special:
                ids.append(self.tokenizer.special[text[start:end]])
                places.append((start, end))
                section = True
                continue
            kept = [i for i in range(start, end) if text[i] != self.broken]
            plain = "".join(text[i] for i in kept)
            inner, spans = self.tokenizer.encode_plain_spans(plain, section=section) if start else self._first(plain)
            ids += inner
            section = False
            places += [(kept[min(a, len(kept) - 1)], kept[max(a, b - 1)] + 1) for a, b in spans]
        return ids, places

    def _first(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self.tokenizer.core.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _pieces(self, text: str, cuts: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
        """The text as special tokens and what stands between them and between cuts."""
        at = 0
        for found in [*self.tokenizer.special_pattern.finditer(text), None]:
            stop = len(text) if found is None else found.start()
            for cut in [*(cut for cut in sorted(cuts) if at < cut < stop), stop]:
                if cut > at:
                    yield at, cut, False
                    at = cut
            if found is not None:
                yield found.start(), found.end(), True
                at = found.end()


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _marked_answers(job: _Job, text: str) -> tuple[str, list[Span]]:
    """A text without the marks of `{% generation %}`, and where they stood; a turn's end right behind counts too."""
    out, spans, at = "", list[Span](), 0
    while (begin := text.find(BEGIN_ANSWER, at)) >= 0:
        end = text.index(END_ANSWER, begin)
        out += text[at:begin]
        start = len(out)
        out += text[begin + 1 : end]
        at = end + 1
        closing = job.tokenizer.special_pattern.match(text, at)
        inside = [found.end() for found in job.tokenizer.special_pattern.finditer(out, start)]
        if inside and not out[inside[-1] :].strip():
            spans.append((start, len(out)))
        elif closing is not None:
            out, at = out + closing.group(), closing.end()
            spans.append((start, len(out)))
        else:
            raise _untold(len(spans), "the marked part does not end with a special token")
    return out + text[at:], spans


def _untold(number: int, reason: str) -> ArtifactError:
    return ArtifactError(
        f"the chat template does not let the answer in message {number + 1} be told apart: {reason}",
        where="chat template",
        expected="a template whose text grows message by message and ends each turn with a special token",
        fix="put {% generation %} … {% endgeneration %} around the answer and its end in the template",
    )
