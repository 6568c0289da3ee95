"""Question answering: the answer is found in a text (extractive), or said freely.

Decides where an answer stands in a text and in tokens, how a text that is too long is read in windows, and what a
window without the answer teaches: that its last token, the marker, is begin and end. Free answers become tokens in
`answered.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from pydantic import Field

from ratoon.base.errors import ConfigError, DataError
from ratoon.tasks.answered import Answered, SpokenSettings
from ratoon.tasks.contract import Encoded, Head, Named, Record, Task, TaskSettings, TooLong, pick, too_long
from ratoon.tasks.example import Example
from ratoon.tasks.parts import continued, end_of_text, side
from ratoon.text.tokenizer import Tokenizer

QUESTION = Named("question", ("question", "query", "instruction", "QUESTION", "问题"))
CONTEXT = Named("context", ("context", "passage", "contexts", "CONTEXTS", "document", "text"))
ANSWER = Named("answer", ("answers", "answer", "output", "response", "LONG_ANSWER", "completion", "答案"))
TEMPLATES = {
    ("en", True): "{context}\n\nQuestion: {question}\nAnswer:\n",
    ("en", False): "Question: {question}\nAnswer:\n",
    ("zh", True): "{context}\n\n问题：{question}\n回答：\n",
    ("zh", False): "问题：{question}\n回答：\n",
}


def answer_texts(found: Any) -> list[tuple[str, int | None]]:
    """Answers with the character each is said to begin at: of SQuAD's lists, of a table of lists, or plain texts."""
    if isinstance(found, Mapping):
        texts, starts = found.get("text", ()), found.get("answer_start", ())
        texts = [texts] if isinstance(texts, str) else list(texts)
        starts = [starts] if isinstance(starts, int) else list(starts)
        return list(zip(map(str, texts), [*starts, *[None] * (len(texts) - len(starts))], strict=True))
    answers: list[tuple[str, int | None]] = []
    for one in found if isinstance(found, list | tuple) else [found]:
        answers += answer_texts(one) if isinstance(one, Mapping) else [(str(one), None)]
    return answers


class FreeAnswers(Answered):
    """A question is answered in the model's own words, with a text to read (`task.with_context`) or without."""

    class FreeSettings(SpokenSettings):
        """Whether there is a text to read."""

        with_context: bool = Field(False, description="rows have a text in which the answer is looked up")

    kind = "question-answering"
    measure = "answers"
    settings: FreeSettings
    settings_type = FreeSettings

    @property
    def source(self) -> str:  # type: ignore[override]
        """The text is shortened where there is one, else the question."""
        return "context" if self.settings.with_context else "question"

    def template(self) -> str:
        """The text, if any, and the question."""
        language = "zh" if self.settings.language.startswith("zh") else "en"
        return self.settings.template or TEMPLATES[language, self.settings.with_context]

    def named(self, name: str) -> Named:
        """What questions and their texts are called."""
        return {"question": QUESTION, "context": CONTEXT}.get(name, super().named(name))

    def answers_of(self, row: Mapping[str, Any], place: str) -> tuple[str, ...]:
        """The answers; the first is learned."""
        found = answer_texts(pick(row, ANSWER, self.settings.fields, place))
        return tuple(dict.fromkeys(text for text, _ in found))


class ExtractiveSettings(TaskSettings):
    """How answers are found, and texts read."""

    overlap_tokens: int = Field(
        64, ge=0, description="tokens that a window shares with the one before it; half of the window at most"
    )
    unanswerable: bool = Field(False, description="questions may have no answer in the text")
    absent_answer: Literal["refuse", "no-answer"] = Field(
        "refuse",
        description="a row whose answer is not in its text: refused (or skipped), or a question without answer",
    )
    max_answer_characters: int | None = Field(
        None, ge=1, description="the longest answer that is given; absent: the longest of the training rows"
    )


@dataclass(frozen=True)
class Searched(Record):
    """A question, the text its answer is in, all right answers, and where the first of them stands (characters)."""

    question: str
    context: str
    answers: tuple[str, ...]
    span: tuple[int, int] | None


class Window(NamedTuple):
    """A piece of a text as an example, with first and last + 1 character of each token that an answer may begin or end
    at, in order; the marker, which is none, stands behind them."""

    example: Example
    places: list[tuple[int, int]]


class Extractive(Task[Searched]):
    """The answer is a piece of the text: a head scores where it begins and where it ends.

    An example is question, text and a marker (the token that ends texts). The answer may begin and end at the text's
    tokens and at the marker: `targets` are 1 there. `vector` holds begin and end as positions in the document. A window
    without the whole answer asks for the marker: to a causal model it is the one token that has read everything.
    """

    kind = "extractive"
    objective = "span"
    measure = "answers"
    settings: ExtractiveSettings
    settings_type = ExtractiveSettings
    longest_characters: int = 0

    def record(self, row: Mapping[str, Any], place: str) -> Searched:
        """Question, text and answers. An answer that does not stand where the row says is searched for in the text,
        nearest to there. Raises `DataError` where it is not in the text at all."""
        fields = self.settings.fields
        question = " ".join(str(pick(row, QUESTION, fields, place)).split())
        context = str(pick(row, CONTEXT, fields, place))
        without = self.settings.unanswerable and (row.get("is_impossible") or not row.get("answers", True))
        found = [] if without else answer_texts(pick(row, ANSWER, fields, place))
        if not found and not self.settings.unanswerable:
            raise DataError(
                "the question has no answer",
                where=place,
                fix="mend the row, say data.on_bad_row: skip, or say task.unanswerable: true",
            )
        spans = [span for text, start in found if (span := locate(context, text, start)) is not None]
        if found and not spans and self.settings.absent_answer == "refuse":
            raise DataError(
                f"the answer '{found[0][0][:60]}' is not in the text",
                where=place,
                expected="a piece of the text, letter for letter",
                fix="mend the row, say data.on_bad_row: skip, or task.absent_answer: no-answer",
            )
        answers = tuple(dict.fromkeys(text for text, _ in found))
        return Searched(str(row.get("id", place)), place, question, context, answers, spans[0] if spans else None)

    def unanswered(self, row: Mapping[str, Any], place: str) -> Searched:
        """Question and text of the row; answers that it has (test sets hold false ones) are not read."""
        fields = self.settings.fields
        question = " ".join(str(pick(row, QUESTION, fields, place)).split())
        return Searched(str(row.get("id", place)), place, question, str(pick(row, CONTEXT, fields, place)), (), None)

    def settle(self, training: Sequence[Searched]) -> list[str]:
        """Take the longest answer of the training rows as the longest that is given."""
        spans = [record.span for record in training if record.span is not None]
        found = max((stop - start for start, stop in spans), default=0)
        if not found:
            raise ConfigError("no training row has an answer in its text", where="data.train")
        self.longest_characters = self.settings.max_answer_characters or found
        sentence = f"answers have up to {found:,} characters; none longer than {self.longest_characters:,} is given"
        absent = len(training) - len(spans)
        return [sentence, f"{absent:,} training rows have no answer in their text"] if absent else [sentence]

    def facts(self) -> dict[str, Any]:
        """The settings, and the longest answer."""
        return {**super().facts(), "longest_characters": self.longest_characters}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take the longest answer back."""
        self.longest_characters = int(facts["longest_characters"])

    def text(self, record: Searched) -> str:
        """The question, and the text on the lines below it."""
        return f"{record.question}\n{record.context}"

    def with_text(self, record: Searched, text: str) -> Searched:
        """Another question and another text. Raises `DataError` where the answer is no longer in it."""
        question, _, context = text.partition("\n")
        span = record.span
        if span is not None:
            span = locate(context, record.context[span[0] : span[1]], span[0])
            if span is None:
                raise DataError("the changed text does not hold the answer", where=record.place)
        return replace(record, question=question, context=context, span=span)

    def expected(self, record: Searched) -> tuple[str, ...]:
        """The right answers; none where the question has no answer."""
        return record.answers

    def head(self) -> Head:
        """Where an answer begins, and where it ends."""
        return Head("span", ("begin", "end"))

    def encode(self, record: Searched, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """Question and text, in windows where `too_long` is split. Question, marker and overlap are repeated tokens."""
        windows, whole, cut, reason = self._windows(record, tokenizer, room_tokens, too_long)
        examples = [window.example for window in windows]
        held = sum(len(example.ids) for example in examples)
        return Encoded(examples, whole, cut, reason, held + cut - whole, [window.places for window in windows])

    def _windows(
        self, record: Searched, tokenizer: Tokenizer, room_tokens: int, policy: TooLong
    ) -> tuple[list[Window], int, int, str | None]:
        asked = [*tokenizer.encode_prompt(record.question), *continued("\n", tokenizer)]
        marker = end_of_text(tokenizer)
        ids, places = tokenizer.encode_plain_spans(record.context)
        whole = len(asked) + len(ids) + 1
        if whole <= room_tokens:
            return [self._window(record, asked, ids, places, marker)], whole, 0, None
        if policy == "refuse":
            raise too_long(record.place, whole, room_tokens)
        room = room_tokens - len(asked) - 1
        overlap = min(self.settings.overlap_tokens, room // 2)
        if room < 1:
            return [], whole, whole, "too long: the question leaves no room for the text"
        if policy != "split":
            first = len(ids) - room if policy == "cut-left" else 0
            part = slice(first, first + room)
            window = self._window(record, asked, ids[part], places[part], marker)
            lost = record.span is not None and _find(places[part], record.span) is None
            return [window], whole, whole - room_tokens, side(policy) + (", the answer with it" if lost else "")
        starts = range(0, max(1, len(ids) - overlap), room - overlap)
        parts = [slice(start, start + room) for start in starts]
        windows = [self._window(record, asked, ids[part], places[part], marker) for part in parts]
        return windows, whole, 0, "too long: split into windows"

    def _window(
        self, record: Searched, asked: list[int], ids: list[int], places: list[tuple[int, int]], marker: int
    ) -> Window:
        length = len(asked) + len(ids) + 1
        found = None if record.span is None else _find(places, record.span)
        begin, end = (length - 1, length - 1) if found is None else (len(asked) + found[0], len(asked) + found[1])
        targets = [0] * len(asked) + [1] * (len(ids) + 1)
        weight = [0.0] * (length - 1) + [1.0]
        example = Example([*asked, *ids, marker], weight, record.id, targets, vector=(float(begin), float(end)))
        return Window(example, places)

    def read_scores(self, record: Searched, scores: Any) -> str:
        """The best piece of the text over all windows.

        `scores`: for each example of `encode` its places and an array (places + 1, 2): begin and end at each of them
        and at the marker. Each window's scores are made probabilities first, so that one without the answer, which
        gives them to its marker, does not win by the size of its numbers. Where questions may have no answer, the
        answer is empty when each window's marker is more probable than every piece.
        """
        import numpy as np

        best, answer, nowhere = -np.inf, "", np.inf
        for places, found in scores:
            found = np.asarray(found, dtype=np.float64)
            assert found.shape == (len(places) + 1, 2), "scores at each place of the window and its marker"
            log = found - _log_sum(found)
            nowhere = min(nowhere, float(log[-1].sum()))
            if not places:
                continue
            begins = np.array([place[0] for place in places])
            ends = np.array([place[1] for place in places])
            sums = log[:-1, None, 0] + log[None, :-1, 1]
            length = ends[None, :] - begins[:, None]
            longest = self.longest_characters or len(record.context)
            order = np.arange(len(begins))
            sums[(length > longest) | (order[None, :] < order[:, None])] = -np.inf
            begin, end = np.unravel_index(int(sums.argmax()), sums.shape)
            if sums[begin, end] > best:
                best = float(sums[begin, end])
                answer = record.context[begins[begin] : ends[end]].strip()
        return "" if self.settings.unanswerable and nowhere > best else answer


def _log_sum(scores: Any) -> Any:
    import numpy as np

    top = scores.max(axis=0, keepdims=True)
    return top + np.log(np.exp(scores - top).sum(axis=0, keepdims=True))


def locate(context: str, text: str, start: int | None) -> tuple[int, int] | None:
    """First and last + 1 character of `text` in `context`: at `start`, else the occurrence nearest to it."""
    text = text.strip()
    if not text:
        return None
    if start is not None and context.startswith(text, max(0, start)):
        return max(0, start), max(0, start) + len(text)
    found, at = [], context.find(text)
    while at >= 0:
        found.append(at)
        at = context.find(text, at + 1)
    if not found:
        return None
    best = min(found, key=lambda at: abs(at - (start or 0)))
    return best, best + len(text)


def _find(places: Sequence[tuple[int, int]], span: tuple[int, int]) -> tuple[int, int] | None:
    """The first and the last token of a span of characters; None where the tokens do not hold all of it."""
    inside = [i for i, (first, last) in enumerate(places) if last > span[0] and first < span[1]]
    if not inside or places[inside[0]][0] > span[0] or places[inside[-1]][1] < span[1]:
        return None
    return inside[0], inside[-1]
