"""Rows -> which of the usual layouts they have, said aloud.

Decides how layouts are told apart and what is said of them: a person reads at the start of a run what was taken for
what, and which fields have no part in it. What is learned of a row is the task's business; conversations are read by
`tasks/messages.py`. Nothing is refused here: a row that does not fit its task is refused by the task.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ratoon.base.errors import DataError
from ratoon.data.rows import Row
from ratoon.data.values import Notes
from ratoon.tasks.messages import COMPLETION, END_OF_TURN, PROMPT, TURNS, layout_of

LOOKED_AT_ROWS = 200
"""Rows at the begin of each file from which its layout is told."""
SHOWN_KEYS = 20
"""Keys of a row that an error names."""


@dataclass(frozen=True)
class Layout:
    """What rows look like: `fields` says under which key each part stands, `others` which keys have no part in it.
    `sentence` says it aloud."""

    name: str
    fields: Mapping[str, str]
    others: tuple[str, ...]
    sentence: str


class _Part(NamedTuple):
    """A part of a layout: what it is called, the keys it may stand under, what its value must be."""

    name: str
    keys: tuple[str, ...]
    fits: Callable[[Any], bool]


class _Rule(NamedTuple):
    name: str
    words: str
    parts: tuple[_Part, ...]
    may: tuple[_Part, ...] = ()


def _any(value: Any) -> bool:
    return True


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _text_or_list(value: Any) -> bool:
    return isinstance(value, str | list)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _turns(speaker: str, content: tuple[str, ...]) -> Callable[[Any], bool]:
    """Whether a value is a list of turns, each with the speaker under that key."""

    def fits(value: Any) -> bool:
        turns = value if isinstance(value, list) else [value]
        return bool(turns) and all(
            isinstance(turn, dict) and speaker in turn and any(key in turn for key in content) for turn in turns
        )

    return fits


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and fits(value)


def _transcript(value: Any) -> bool:
    return isinstance(value, str) and layout_of({"text": value}) == "transcript"


def _spoken_line(value: Any) -> bool:
    return isinstance(value, str) and END_OF_TURN in value


_FROM, _ROLE = _turns("from", ("value", "content")), _turns("role", ("content", "tool_calls"))
_LABELS = ("label", "labels", "category", "intent", "class", "target", "sentiment", "score", "rating", "正负面")
_TEXTS = ("text", "sentence", "content", "review", "document", "title", "query", "question", "标题")
_LABEL, _TEXT = _Part("label", _LABELS, _any), _Part("text", _TEXTS, _text)
_SYSTEM, _TOOLS = _Part("system", ("system",), _any), _Part("tools", ("tools",), _any)
_INPUT, _HISTORY = _Part("input", ("input",), _text), _Part("history", ("history",), _list)


def _said(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and _ROLE(value))


def _chosen(fits: Callable[[Any], bool]) -> tuple[_Part, _Part]:
    return _Part("chosen", ("chosen",), fits), _Part("rejected", ("rejected",), fits)


RULES = (
    _Rule("preference_sharegpt", "preference pairs in ShareGPT's form {conversations, chosen, rejected}",
          (_Part("turns", TURNS, _list_of(_FROM)), *_chosen(_FROM)), (_SYSTEM, _TOOLS)),
    _Rule("preference_messages", "preference pairs of messages {prompt | messages, chosen, rejected}",
          (*_chosen(_ROLE),), (_Part("turns", (*TURNS, "prompt"), _list_of(_ROLE)), _SYSTEM, _TOOLS)),
    _Rule("preference_transcript", "preference pairs of whole transcripts (Human: … Assistant: …), as Anthropic's hh",
          _chosen(_transcript)),
    _Rule("preference_text", "preference pairs of texts {prompt, chosen, rejected}",
          (_Part("prompt", PROMPT, _text), *_chosen(_text)), (_INPUT, _HISTORY, _SYSTEM)),
    _Rule("messages", "OpenAI's messages {messages: [{role, content}]}",
          (_Part("turns", TURNS, _list_of(_ROLE)),), (_SYSTEM, _TOOLS)),
    _Rule("sharegpt", "ShareGPT's conversations {conversations: [{from, value}]}",
          (_Part("turns", TURNS, _list_of(_FROM)),), (_SYSTEM, _TOOLS)),
    _Rule("alpaca", "Alpaca's instructions {instruction, input, output}",
          (_Part("prompt", ("instruction",), _text), _Part("answer", ("output", "response"), _text)),
          (_INPUT, _HISTORY, _SYSTEM)),
    _Rule("squad", "questions on a context {context, question, answers}, as SQuAD's",
          (_Part("context", ("context",), _text), _Part("question", ("question",), _text),
           _Part("answers", ("answers",), _any)), (_Part("id", ("id",), _any),)),
    _Rule("conll", "words with a tag each {words, tags}, as CoNLL's",
          (_Part("words", ("words", "tokens"), _list), _Part("tags", ("tags", "ner_tags", "labels"), _list))),
    _Rule("cluener", "text with spans {text, label: {type: {surface: [[start, end]]}}}, as CLUENER's",
          (_Part("text", ("text",), _text), _Part("label", ("label",), _table)), (_Part("id", ("id",), _any),)),
    _Rule("clue_wsc", "a pronoun and what it may mean {text, target: {span1_text, span2_text, …}}, as CLUEWSC's",
          (_Part("text", ("text",), _text), _Part("target", ("target",), _table)), (_Part("label", ("label",), _any),)),
    _Rule("clue_csl", "keywords that fit an abstract or not {abst, keyword}, as CLUE's CSL",
          (_Part("abstract", ("abst",), _text), _Part("keywords", ("keyword",), _list)),
          (_Part("label", ("label",), _any),)),
    *(_Rule("pairs", f"pairs of texts {{{first}, {second}}}",
            (_Part("first", (first,), _text), _Part("second", (second,), _text)), (_LABEL,))
      for first, second in (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
                            ("text1", "text2"), ("text_a", "text_b"))),
    _Rule("graded_answer", "answers to be graded against references {question, references, answer, label}",
          (_Part("question", ("question",), _text), _Part("references", ("references", "reference"), _any),
           _Part("answer", ("answer",), _text), _LABEL)),
    _Rule("prompt_completion", "prompts with their completion {prompt, completion}",
          (_Part("prompt", PROMPT, _said),
           _Part("answer", (*COMPLETION, "answers"), _said)),
          (_SYSTEM,)),
    _Rule("translation", "texts in two languages {en, zh}",
          (_Part("source", ("en", "source", "src"), _text), _Part("target", ("zh", "target", "tgt"), _text))),
    _Rule("summary", "texts with a summary {document, summary}",
          (_Part("document", ("document", "article", "dialogue", "text"), _text),
           _Part("summary", ("summary", "summaries", "summary1", "highlights"), _text_or_list))),
    _Rule("dialogue_lines", f"dialogues, one a line, whose turns end with {END_OF_TURN}, as DailyDialog's",
          (_Part("text", ("text",), _spoken_line),)),
    _Rule("transcript", "transcripts (Human: … Assistant: …)", (_Part("text", ("text",), _transcript),)),
    _Rule("text_labels", "texts with several labels each {text, labels}",
          (_TEXT, _Part("labels", ("labels", "label", "topics", "tags"), _list))),
    _Rule("text_label", "texts with a label {text, label}", (_TEXT, _Part("label", _LABELS, _plain))),
    _Rule("text", "plain texts {text}", (_TEXT,)),
)  # fmt: skip
"""The layouts, the more telling before the less: a row has the first that fits it."""


def recognise(rows: Sequence[Row]) -> Layout:
    """The layout that most of `rows` have, the same parts under the same keys; `sentence` tells of rows that differ.

    Raises `DataError` where no row has a known layout.
    """
    votes: Counter[tuple[int, tuple[str, ...]]] = Counter()
    first_of: dict[tuple[int, tuple[str, ...]] | None, Row] = {}
    for row in rows:
        found = _first_rule(row)
        first_of.setdefault(found, row)
        if found is not None:
            votes[found] += 1
    if not votes:
        raise DataError(
            f"no known layout has the fields {_listed(rows[0].fields)}" if rows else "there are no rows",
            where=rows[0].place if rows else "rows",
            expected="one of:\n" + "\n".join(f"    {rule.words}" for rule in RULES),
            fix="rename the fields, or name in the recipe which field is which",
        )
    most = max(votes.values())
    best = min(found for found, count in votes.items() if count == most)
    rule, fields = RULES[best[0]], dict(zip((part.name for part in RULES[best[0]].parts), best[1], strict=True))
    present = list(dict.fromkeys(key for row in rows for key in row.fields))
    for part in rule.may:
        key = next((key for key in part.keys if key in present and key not in fields.values()), None)
        if key is not None:
            fields[part.name] = key
    others = tuple(key for key in present if key not in fields.values())
    under = ", ".join(name if name == key else f"{name} = '{key}'" for name, key in fields.items())
    said = [f"{rule.words} ({under})"]
    if others:
        said.append(f"other fields: {_listed(others)}")
    if most < len(rows):
        other = next(row for found, row in first_of.items() if found != best)
        said.append(f"{len(rows) - most:,} of {len(rows):,} rows look different, the first at {other.place}")
    return Layout(rule.name, fields, others, "; ".join(said))


def announced(rows: Iterable[Row], ledger: Notes) -> Iterator[Row]:
    """`rows` as they come; the layout of each file is told to the ledger's notes, or that it has none of the usual."""
    for source, group in itertools.groupby(rows, key=lambda row: row.source):
        of_file = iter(group)
        head = list(itertools.islice(of_file, LOOKED_AT_ROWS))
        try:
            ledger.note(f"{source}: {recognise(head).sentence}")
        except DataError:
            ledger.note(f"{source}: rows of no usual layout, with the fields {_listed(head[0].fields)}")
        yield from head
        yield from of_file


def _first_rule(row: Row) -> tuple[int, tuple[str, ...]] | None:
    """The number of the first layout that `row` has, and the keys of its parts."""
    for number, rule in enumerate(RULES):
        taken: list[str] = []
        for part in rule.parts:
            free = (key for key in part.keys if key in row.fields and key not in taken)
            key = next((key for key in free if part.fits(row.fields[key])), None)
            if key is None:
                break
            taken.append(key)
        else:
            return number, tuple(taken)
    return None


def _listed(keys: Iterable[str]) -> str:
    """The first of some keys, to be shown."""
    shown = [repr(key) for key in keys]
    return ", ".join(shown[:SHOWN_KEYS]) + (f" and {len(shown) - SHOWN_KEYS} more" if shown[SHOWN_KEYS:] else "")
