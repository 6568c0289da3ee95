"""Tagging: every word has a tag, as named entities are marked (B-PER I-PER O).

Decides how tags are read (IOB1 files become IOB2, said), how a sentence becomes tokens, that the tag is learned at a
word's last token (a causal model has read the whole word there), and that an answer is the likeliest row of tags in
which no entity goes on that has not begun.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ratoon.base.errors import ConfigError, DataError
from ratoon.tasks.contract import Encoded, Head, Named, Record, Task, TaskSettings, TooLong, pick, too_long
from ratoon.tasks.example import Example
from ratoon.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WORDS = Named("words", ("words", "tokens"))
TAGS = Named("tags", ("tags", "ner_tags", "ner", "labels"))


_TAKEN_AS = {"B": "B", "I": "I", "E": "I", "L": "I", "M": "I", "S": "B", "U": "B", "W": "B"}
"""What the letters of IOBES, BILOU and BMES(W) are in IOB2, where an entity goes on."""
_ENDS, _BEGINS = "ELSUW", "BSUW"
"""Letters behind which an entity ends, and those that begin one."""


class TaggingSettings(TaskSettings):
    """How words and tags are read and learned."""

    labels: tuple[str, ...] = Field((), description="the tags, in their order; absent: those of the training rows")
    scheme: Literal["as-is", "iob2"] = Field("iob2", description="iob2: tags of an entity's first word become B-")
    join: str = Field(" ", description="what stands between words: a space, or nothing (Chinese characters)")
    context: Literal["sentence", "document"] = Field(
        "sentence", description="document: neighbouring sentences of a document are read together, as far as a row goes"
    )
    learn: Literal["last", "first"] = Field("last", description="which token of a word its tag is asked at")
    transitions: Literal["valid", "any"] = Field(
        "valid",
        description="valid: the likeliest row of tags where I-X follows B-X or I-X (scheme iob2); any: each word's own",
    )


@dataclass(frozen=True)
class Sentence(Record):
    """Words with a tag each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    document: str = ""
    number: int = 0
    """Which sentence of its file it is, where the file says so."""


class Tagging(Task[Sentence]):
    """Every word has a tag."""

    kind = "tagging"
    objective = "token_label"
    measure = "tagging"
    settings: TaggingSettings
    settings_type = TaggingSettings
    labels: tuple[str, ...] = ()

    def record(self, row: Mapping[str, Any], place: str) -> Sentence:
        """Words and tags of the row; CLUENER's spans become tags of characters."""
        if isinstance(row.get("label"), dict) and isinstance(row.get("text"), str):
            words, tags = from_spans(row["text"], row["label"], place)
        else:
            words = [str(word) for word in pick(row, WORDS, self.settings.fields, place)]
            tags = [str(tag) for tag in pick(row, TAGS, self.settings.fields, place)]
        if len(words) != len(tags):
            raise DataError(f"{len(words)} words have {len(tags)} tags", where=place, expected="one tag for each word")
        if self.settings.scheme == "iob2":
            tags = iob2(tags, place)
        document, number = str(row.get("document", "")), row.get("sentence")
        number = number if isinstance(number, int) else 0
        return Sentence(str(row.get("id", place)), place, tuple(words), tuple(tags), document, number)

    def unanswered(self, row: Mapping[str, Any], place: str) -> Sentence:
        """Words of the row (of CLUENER's: characters); O stands in for the tags that are not told."""
        if isinstance(row.get("text"), str) and not any(name in row for name in WORDS.names):
            return self.record({**row, "label": {}}, place)
        words = pick(row, WORDS, self.settings.fields, place)
        return self.record({**row, self.settings.fields.get("tags", TAGS.names[0]): ["O"] * len(words)}, place)

    def together(self, before: Sentence, record: Sentence) -> bool:
        """Sentences of one document of one file, where the settings ask for it."""
        if self.settings.context == "sentence" or not record.document:
            return False
        same_file = before.place.rpartition(":")[0] == record.place.rpartition(":")[0]
        return same_file and before.document == record.document and record.number == before.number + 1

    def settle(self, training: Sequence[Sentence]) -> list[str]:
        """Take the tags of the training records, O first."""
        found = Counter(tag for record in training for tag in record.tags)
        self.labels = self.settings.labels or tuple(sorted(found, key=lambda tag: (tag != "O", tag[2:], tag)))
        if len(self.labels) < 2:
            raise ConfigError("the training rows have fewer than two tags", where="task.labels")
        return [f"{len(self.labels)} tags: " + ", ".join(f"{tag} {found[tag]:,}" for tag in self.labels)]

    def check(self, record: Sentence) -> None:
        """Raise `DataError` for a tag that was not settled."""
        for tag in record.tags:
            if tag not in self.labels:
                raise DataError(
                    f"the tag '{tag}' is not known", where=record.place, expected=f"one of {', '.join(self.labels)}"
                )

    def facts(self) -> dict[str, Any]:
        """The settings, and the tags in the order of the scores."""
        return {**super().facts(), "labels": list(self.labels)}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take the tags back."""
        self.labels = tuple(facts["labels"])

    def text(self, record: Sentence) -> str:
        """The words, joined."""
        return self.settings.join.join(record.words)

    def with_text(self, record: Sentence, text: str) -> Sentence:
        """The same tags for other words. Raises `DataError` when their number changed."""
        words = tuple(text.split(self.settings.join)) if self.settings.join else tuple(text)
        if len(words) != len(record.words):
            raise DataError(
                f"the changed text has {len(words)} words", where=record.place, expected=f"{len(record.words)}"
            )
        return replace(record, words=words)

    def expected(self, record: Sentence) -> tuple[str, ...]:
        """The tags."""
        return record.tags

    def head(self) -> Head:
        """A score for each tag at each token."""
        return Head("token", self.labels)

    def encode(self, record: Sentence, tokenizer: Tokenizer, *, room_tokens: int, too_long: TooLong) -> Encoded:
        """The sentence's tokens, a tag asked at one token of each word. A sentence that is too long can be split
        between words."""
        pieces = tokenizer.encode_batch([self.settings.join * bool(i) + word for i, word in enumerate(record.words)])
        for word, piece in zip(record.words, pieces, strict=True):
            if not piece:
                raise DataError(
                    f"the word '{word}' has no token of its own, so no tag can be learned at it",
                    where=record.place,
                    fix="mend the word, or say data.on_bad_row: skip",
                )
        total = sum(map(len, pieces))
        if total <= room_tokens:
            return Encoded([self._example(record, pieces, 0)], total)
        return self._shortened(record, pieces, total, room_tokens, too_long)

    def _shortened(
        self, record: Sentence, pieces: list[list[int]], total: int, room_tokens: int, policy: TooLong
    ) -> Encoded:
        if policy == "refuse":
            raise too_long(record.place, total, room_tokens)
        if policy == "split":
            examples, start, length = [], 0, 0
            for number, piece in enumerate(pieces):
                if length + len(piece) > room_tokens:
                    examples.append(self._example(record, pieces[start:number], start))
                    start, length = number, 0
                length += len(piece)
            examples.append(self._example(record, pieces[start:], start))
            return Encoded(examples, total, 0, "too long: split between words")
        lengths = [len(piece) for piece in (pieces if policy == "cut-right" else pieces[::-1])]
        fits, used = 0, 0
        while fits < len(lengths) and used + lengths[fits] <= room_tokens:
            used += lengths[fits]
            fits += 1
        first = 0 if policy == "cut-right" else len(pieces) - fits
        kept = pieces[first : first + fits]
        side = "right" if policy == "cut-right" else "left"
        return Encoded([self._example(record, kept, first)], total, total - used, f"too long: cut on the {side}")

    def _example(self, record: Sentence, pieces: Sequence[Sequence[int]], first: int) -> Example:
        ids: list[int] = []
        targets: list[int] = []
        weight: list[float] = []
        for word, piece in enumerate(pieces, start=first):
            ids += piece
            at = 0 if self.settings.learn == "first" else len(piece) - 1
            own = [0.0] * len(piece)
            own[at] = 1.0
            weight += own
            label = self.labels.index(record.tags[word]) if record.tags[word] in self.labels else 0
            targets += [label] * len(piece)
        return Example(ids, weight, record.id, targets=targets)

    def read_scores(self, record: Sentence, scores: Any) -> tuple[str, ...]:
        """The tags of the highest sum of scores (words, labels) in which I-X stands behind B-X or I-X alone; or of each
        word's highest score, as `transitions` has it."""
        assert len(scores) == len(record.words), "a row of scores for each word"
        if self.settings.transitions == "any" or self.settings.scheme != "iob2":
            best = scores.argmax(-1)
        else:
            best = likeliest(scores, *transitions(self.labels))
        return tuple(self.labels[int(label)] for label in best)


@cache
def transitions(labels: tuple[str, ...]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which labels (L,) may begin a text, and which (from, to) (L, L) may follow each other in IOB2: I-X behind B-X
    or I-X alone. An I-X without a B-X among the labels may stand anywhere."""
    import numpy as np

    begins_L = np.array([not (label.startswith("I-") and f"B-{label[2:]}" in labels) for label in labels])
    follows_LL = np.tile(begins_L, (len(labels), 1))
    for to, label in enumerate(labels):
        if not begins_L[to]:
            for before in ("B", "I"):
                follows_LL[labels.index(f"{before}-{label[2:]}"), to] = True
    return begins_L, follows_LL


def likeliest(
    scores_WL: npt.NDArray[np.floating], begins_L: npt.NDArray[np.bool_], follows_LL: npt.NDArray[np.bool_]
) -> list[int]:
    """The labels of a row of words whose scores have the highest sum among those that may follow each other
    (Viterbi 1967, with transitions of weight 0 or -inf)."""
    import numpy as np

    barred_LL = np.where(follows_LL, 0.0, -np.inf)
    sums_L = scores_WL[0].astype(np.float64) + np.where(begins_L, 0.0, -np.inf)
    came_from: list[npt.NDArray[np.intp]] = []
    for scores_L in scores_WL[1:]:
        paths_LL = sums_L[:, None] + barred_LL
        came_from.append(paths_LL.argmax(0))
        sums_L = paths_LL.max(0) + scores_L
    best = [int(sums_L.argmax())]
    for back_L in reversed(came_from):
        best.append(int(back_L[best[-1]]))
    return best[::-1]


def iob2(tags: Sequence[str], place: str = "") -> list[str]:
    """The same entities in IOB2: B- at the first token of each, I- at the others. Reads IOB1, IOB2, IOBES, BILOU and
    BMES. Raises `DataError` for what is no tag of these."""
    out = []
    before, kind = "O", ""
    for number, tag in enumerate(tags, start=1):
        letter, dash, this = tag.partition("-")
        if tag == "O":
            out.append(tag)
        elif letter not in _TAKEN_AS or not (dash and this):
            raise DataError(
                f"'{tag}' is no tag of IOB1, IOB2, IOBES, BILOU or BMES",
                where=f"{place}, tag {number}" if place else f"tag {number}",
                expected="O, or a letter, a dash and a type, as in B-PER",
            )
        else:
            begins = letter in _BEGINS or before == "O" or before in _ENDS or this != kind
            out.append(f"{'B' if begins else 'I'}-{this}")
        before, kind = letter, this
    return out


def from_spans(text: str, label: Mapping[str, Any], place: str) -> tuple[list[str], list[str]]:
    """CLUENER's form: {type: {surface: [[begin, end], …]}}, ends included -> a tag for each character."""
    tags = ["O"] * len(text)
    for kind, surfaces in label.items():
        for surface, spans in surfaces.items():
            for begin, end in spans:
                if text[begin : end + 1] != surface:
                    raise DataError(
                        f"'{surface}' does not stand at {begin} to {end} of the text",
                        where=place,
                        expected=f"'{text[begin : end + 1]}'",
                    )
                tags[begin : end + 1] = [f"B-{kind}"] + [f"I-{kind}"] * (end - begin)
    return list(text), tags
