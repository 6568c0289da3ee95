"""Rows -> which layout they have, and chats out of those that are chats.

Decides what the usual layouts of task data are and how they are told apart, and turns alpaca, sharegpt, transcripts and
their kin into the one form that the renderer knows: OpenAI's messages. What is learned of a row is the task's business;
how messages become tokens is `text/chat.py`'s. Nothing of a row is dropped in silence: what a layout has no use for is
named when it is recognised, and what it cannot take is refused.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ratoon.base.errors import DataError
from ratoon.data.rows import Row
from ratoon.data.values import BROKEN, MISSING

EMPTY_FIELD = "empty field"
"""Reason for rows whose field is there and holds nothing."""

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user", "usr": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "call", "tool_call": "call",
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function": "tool",
}  # fmt: skip
"""Names of speakers, and whose they are; a `call` is an assistant's message that calls a tool."""
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "weight")
"""What is taken of a message in OpenAI's form."""
SHOWN_KEYS = 20
"""Keys of a row that an error names."""
END_OF_TURN = "__eou__"
"""What ends a turn in DailyDialog's lines."""

_SPOKEN = re.compile(r"\n\n(Human|Assistant):")
_CONTENT = ("content", "value", "text")
_SPEAKER = ("role", "from", "speaker")


class RowError(DataError):
    """A row that cannot be used. `reason` is what it is booked under when it is left out."""

    def __init__(self, reason: str, found: str, *, where: str, expected: str | None = None, fix: str | None = None):
        super().__init__(found, where=where, expected=expected, fix=fix)
        self.reason = reason


@dataclass(frozen=True)
class Layout:
    """What rows look like: `fields` says under which key each part of it stands, `unused` which keys it has no use for.

    `sentence` says it aloud. `chat`: `to_messages` takes it; `preference`: `to_pair` does.
    """

    name: str
    fields: Mapping[str, str]
    unused: tuple[str, ...]
    sentence: str
    chat: bool
    preference: bool


# -- fields ------------------------------------------------------------------------------------------------------------


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, NaN, blank text, an empty list or object. 0 and false are something."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def field(row: Row, wanted: str, names: Sequence[str] = (), given: str | None = None) -> Any:
    """What `row` holds as `wanted`: under `given`, or under the first of the usual `names` that it has.

    Raises `RowError` (a `DataError`) when there is no such field ("missing field") or it holds nothing ("empty field").
    """
    keys = list(row.fields)
    known = (given,) if given is not None else (names or (wanted,))
    name = next((name for name in known if name in row.fields), None)
    if name is None:
        near = next((close[0] for name in known if (close := _nearest(name, keys))), None)
        raise RowError(
            MISSING,
            f"missing field: the row has no {wanted}",
            where=row.place,
            expected=f"a field named {' or '.join(map(repr, known))}; the row has: {_listed(keys)}",
            fix=f"is it {near!r}? Name the field of the {wanted} in the recipe" if near is not None
            else f"name the field that holds the {wanted} in the recipe",
        )  # fmt: skip
    value = row.fields[name]
    if is_empty(value):
        raise RowError(
            EMPTY_FIELD,
            f"empty field: '{name}' holds no {wanted} but {json.dumps(value, default=str)}",
            where=row.place,
            expected=f"the {wanted} under '{name}'",
            fix="mend the row, or say on_bad_row: skip to leave such rows out, counted",
        )
    return value


def _listed(keys: Iterable[str]) -> str:
    """The first keys of a row, to be shown."""
    shown = [repr(key) for key in keys]
    return ", ".join(shown[:SHOWN_KEYS]) + (f" and {len(shown) - SHOWN_KEYS} more" if shown[SHOWN_KEYS:] else "")


def _nearest(name: str, keys: Sequence[str]) -> list[str]:
    """The key most like `name`, whatever its case and the blanks around it."""
    plain = {key.strip().casefold(): key for key in keys}
    return [plain[close] for close in difflib.get_close_matches(name.casefold(), plain, n=1, cutoff=0.5)]


# -- which layout ------------------------------------------------------------------------------------------------------


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
    chat: bool = False
    preference: bool = False


def _any(value: Any) -> bool:
    return True


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


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
    return isinstance(value, str) and _SPOKEN.match(value) is not None


def _spoken_line(value: Any) -> bool:
    return isinstance(value, str) and END_OF_TURN in value


_FROM, _ROLE = _turns("from", ("value", "content")), _turns("role", ("content", "tool_calls"))
_CHATS = ("messages", "conversations", "conversation")
_PROMPT = ("prompt", "question", "instruction", "query")
_LABELS = ("label", "labels", "category", "intent", "class", "target", "sentiment", "score", "rating", "正负面")
_TEXTS = ("text", "sentence", "content", "review", "document", "title", "query", "question", "标题")
_LABEL, _TEXT = _Part("label", _LABELS, _any), _Part("text", _TEXTS, _text)
_SYSTEM, _TOOLS = _Part("system", ("system",), _any), _Part("tools", ("tools",), _any)
_INPUT, _HISTORY = _Part("input", ("input",), _text), _Part("history", ("history",), _list)


def _chosen(fits: Callable[[Any], bool]) -> tuple[_Part, _Part]:
    return _Part("chosen", ("chosen",), fits), _Part("rejected", ("rejected",), fits)


RULES = (
    _Rule("preference_sharegpt", "preference pairs in ShareGPT's form {conversations, chosen, rejected}",
          (_Part("turns", _CHATS, _list_of(_FROM)), *_chosen(_FROM)), (_SYSTEM, _TOOLS), preference=True),
    _Rule("preference_messages", "preference pairs of messages {prompt | messages, chosen, rejected}",
          (*_chosen(_ROLE),), (_Part("turns", (*_CHATS, "prompt"), _list_of(_ROLE)), _SYSTEM, _TOOLS), preference=True),
    _Rule("preference_transcript", "preference pairs of whole transcripts (Human: … Assistant: …), as Anthropic's hh",
          _chosen(_transcript), preference=True),
    _Rule("preference_text", "preference pairs of texts {prompt, chosen, rejected}",
          (_Part("prompt", _PROMPT, _text), *_chosen(_text)), (_INPUT, _HISTORY, _SYSTEM), preference=True),
    _Rule("messages", "OpenAI's messages {messages: [{role, content}]}",
          (_Part("turns", _CHATS, _list_of(_ROLE)),), (_SYSTEM, _TOOLS), chat=True),
    _Rule("sharegpt", "ShareGPT's conversations {conversations: [{from, value}]}",
          (_Part("turns", _CHATS, _list_of(_FROM)),), (_SYSTEM, _TOOLS), chat=True),
    _Rule("alpaca", "Alpaca's instructions {instruction, input, output}",
          (_Part("prompt", ("instruction",), _text), _Part("answer", ("output", "response"), _text)),
          (_INPUT, _HISTORY, _SYSTEM), chat=True),
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
          (_Part("prompt", ("prompt", "query", "question"), lambda value: _text(value) or _list_of(_ROLE)(value)),
           _Part("answer", ("completion", "response", "answer", "answers"),
                 lambda value: _text(value) or _list_of(_ROLE)(value))),
          (_SYSTEM,), chat=True),
    _Rule("translation", "texts in two languages {en, zh}",
          (_Part("source", ("en", "source", "src"), _text), _Part("target", ("zh", "target", "tgt"), _text))),
    _Rule("summary", "texts with a summary {document, summary}",
          (_Part("document", ("document", "article", "dialogue", "text"), _text),
           _Part("summary", ("summary", "summaries", "highlights"), lambda value: _text(value) or _list(value)))),
    _Rule("dialogue_lines", f"dialogues, one a line, whose turns end with {END_OF_TURN}, as DailyDialog's",
          (_Part("text", ("text",), _spoken_line),), chat=True),
    _Rule("transcript", "transcripts (Human: … Assistant: …)", (_Part("text", ("text",), _transcript),), chat=True),
    _Rule("text_labels", "texts with several labels each {text, labels}",
          (_TEXT, _Part("labels", ("labels", "label", "topics", "tags"), _list))),
    _Rule("text_label", "texts with a label {text, label}", (_TEXT, _Part("label", _LABELS, _plain))),
    _Rule("text", "plain texts {text}", (_TEXT,)),
)  # fmt: skip
"""The layouts, the more telling before the less: the first that every row has is taken."""


def recognise(rows: Sequence[Row]) -> Layout:
    """The layout that most of `rows` have, the same parts under the same keys.

    A row that lacks a part of it is that row's fault (`field` and `to_messages` say so); a row of another layout is
    refused here. Raises `DataError` with the place of the first such row, or with the keys found where no layout fits.
    """
    if not rows:
        raise DataError("there are no rows to tell a layout from", where="rows", expected="at least one row")
    votes = Counter(found for found in map(_first_rule, rows) if found is not None)
    if not votes:
        raise DataError(
            f"no known layout has the fields {_listed(rows[0].fields)}",
            where=rows[0].place,
            expected="one of:\n" + "\n".join(f"    {rule.words}" for rule in RULES),
            fix="rename the fields, or name in the recipe which field is which",
        )
    most = max(votes.values())
    number, keys = min(found for found, count in votes.items() if count == most)
    rule = RULES[number]
    taken = {part.name: key for part, key in zip(rule.parts, keys, strict=True)}
    typical = next(row for row in rows if _first_rule(row) == (number, keys))
    for row in rows:
        shared = [key for key in keys if not is_empty(row.fields.get(key))]
        if not shared or any(type(row.fields[key]) is not type(typical.fields[key]) for key in shared):
            raise DataError(
                f"the row has another layout than {typical.place}",
                where=row.place,
                expected=f"{rule.words}; the row has: {_listed(row.fields) or 'no fields'}",
                fix="keep rows of different layouts in different files, or mend the row",
            )
    return _layout(rule, taken, rows)


def _first_rule(row: Row) -> tuple[int, tuple[str, ...]] | None:
    """The number of the first layout that `row` has, and the keys of its parts."""
    for number, rule in enumerate(RULES):
        taken = _taken(rule, row)
        if taken is not None:
            return number, tuple(taken.values())
    return None


def _taken(rule: _Rule, row: Row) -> dict[str, str] | None:
    """Under which key each part of a layout stands in `row`, or None where one is missing. No key is taken twice."""
    taken: dict[str, str] = {}
    for part in rule.parts:
        free = (key for key in part.keys if key in row.fields and key not in taken.values())
        key = next((key for key in free if part.fits(row.fields[key])), None)
        if key is None:
            return None
        taken[part.name] = key
    return taken


def _layout(rule: _Rule, taken: dict[str, str], rows: Sequence[Row]) -> Layout:
    fields = dict(taken)
    present = list(dict.fromkeys(key for row in rows for key in row.fields))
    for part in rule.may:
        key = next((key for key in part.keys if key in present and key not in fields.values()), None)
        if key is not None:
            fields[part.name] = key
    unused = [key for key in present if key not in fields.values()]
    if rule.chat or rule.preference:
        turns = [turn for row in rows for key in fields.values() for turn in _as_turns(row.fields.get(key))]
        known = {*MESSAGE_KEYS, *_SPEAKER, *_CONTENT}
        unused += [f"{fields.get('turns', 'turns')}.{key}" for key in dict.fromkeys(k for t in turns for k in t)
                   if key not in known]  # fmt: skip
    under = ", ".join(name if name == key else f"{name} = '{key}'" for name, key in fields.items())
    sentence = f"the rows are {rule.words} ({under})"
    if unused:
        sentence += f"; not used: {', '.join(repr(key) for key in unused)}"
    return Layout(rule.name, fields, tuple(unused), sentence, rule.chat, rule.preference)


def _as_turns(value: Any) -> list[dict[str, Any]]:
    turns = value if isinstance(value, list) else [value]
    return [turn for turn in turns if isinstance(turn, dict) and any(key in turn for key in _SPEAKER)]


# -- chats -------------------------------------------------------------------------------------------------------------

Message = dict[str, Any]


def to_messages(row: Row, layout: Layout) -> dict[str, Any]:
    """A chat in OpenAI's form: `{"messages": [{"role", "content", …}], "tools": [...] or None}`.

    Calls of tools become an assistant's `tool_calls` (arguments as they stand: an object or text), what a tool said the
    role `tool`, a tool without a type a `function`. Raises `RowError` for unknown roles, for turns that say nothing,
    and for what is not of the layout.
    """
    if not layout.chat:
        raise DataError(f"rows of the layout {layout.name} are no chats", where=row.place, expected="a chat")
    fields = layout.fields
    if layout.name in ("messages", "sharegpt"):
        messages = _messages(_value(row, fields, "turns"), row, fields["turns"])
    elif layout.name == "alpaca":
        messages = [*_history(row, fields), _said(row, "user", _instruction(row, fields), fields["prompt"])]
        messages.append(_said(row, "assistant", _value(row, fields, "answer"), fields["answer"]))
    elif layout.name == "prompt_completion":
        messages = [
            message
            for part, role in (("prompt", "user"), ("answer", "assistant"))
            for message in _one_or_more(_value(row, fields, part), role, row, fields[part])
        ]
    elif layout.name == "dialogue_lines":
        messages = _spoken_in_turn(row, _value(row, fields, "text"), fields["text"])
    else:
        messages = _spoken(row, _value(row, fields, "text"), fields["text"])
    return {"messages": _with_system(messages, row, fields), "tools": _tools(row, fields)}


def to_pair(row: Row, layout: Layout) -> dict[str, Any]:
    """A preference as `{"prompt": messages, "chosen": messages, "rejected": messages, "tools": …}`.

    Where the two sides are whole conversations the prompt is what they begin with alike; both go on with an assistant's
    turn. Raises `RowError` where they do not, where the two are the same, and as `to_messages` does.
    """
    if not layout.preference:
        raise DataError(f"rows of the layout {layout.name} are no preferences", where=row.place, expected="pairs")
    fields = layout.fields
    if layout.name == "preference_transcript":
        prompt: list[Message] = []
        sides = {name: _spoken(row, _value(row, fields, name), name) for name in ("chosen", "rejected")}
    elif layout.name == "preference_text":
        prompt = [*_history(row, fields), _said(row, "user", _instruction(row, fields), fields["prompt"])]
        sides = {n: [_said(row, "assistant", _value(row, fields, n), n)] for n in ("chosen", "rejected")}
    else:
        prompt = _messages(_value(row, fields, "turns"), row, fields["turns"]) if "turns" in fields else []
        sides = {name: _messages(_value(row, fields, name), row, name) for name in ("chosen", "rejected")}
    chosen, rejected = sides["chosen"], sides["rejected"]
    while chosen and rejected and chosen[0] == rejected[0]:
        prompt.append(chosen[0])
        chosen, rejected = chosen[1:], rejected[1:]
    if not chosen or not rejected:
        raise RowError(
            BROKEN,
            "chosen and rejected are the same, or one is the other's beginning",
            where=row.place,
            expected="two answers to one prompt",
        )
    if not prompt or {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
        raise RowError(
            BROKEN,
            "chosen and rejected do not answer the same prompt",
            where=row.place,
            expected="the same turns on both sides up to an assistant's",
        )
    prompt = _with_system(prompt, row, fields)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": _tools(row, fields)}


def _value(row: Row, fields: Mapping[str, str], part: str) -> Any:
    return field(row, part, given=fields[part])


def _said(row: Row, role: str, content: Any, where: str) -> Message:
    """A message that says something."""
    if not isinstance(content, str):
        raise RowError(BROKEN, f"'{where}' is no text but {type(content).__name__}", where=row.place, expected="text")
    if role in ("user", "assistant") and not content.strip():
        raise RowError(EMPTY_FIELD, f"empty field: a turn of the {role} in '{where}' says nothing", where=row.place)
    return {"role": role, "content": content}


def _one_or_more(value: Any, role: str, row: Row, where: str) -> list[Message]:
    """A text said by `role`, or messages as they stand."""
    return _messages(value, row, where) if isinstance(value, list) else [_said(row, role, value, where)]


def _messages(turns: Any, row: Row, where: str) -> list[Message]:
    """The turns of ShareGPT's or OpenAI's form as messages."""
    turns = turns if isinstance(turns, list) else [turns]
    # CrossWOZ calls the two sides usr and sys; elsewhere `sys` could be anything, and is refused.
    served = any(isinstance(turn, dict) and turn.get("role") == "usr" for turn in turns)
    messages = []
    for turn in turns:
        name = next((turn[key] for key in _SPEAKER if key in turn), None) if isinstance(turn, dict) else None
        role = "assistant" if served and name == "sys" else ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError(
                BROKEN,
                f"a turn in '{where}' is spoken by {json.dumps(name, default=str)}",
                where=row.place,
                expected=f"one of: {', '.join(ROLES)}",
                fix="rename the role, or leave the row out",
            )
        content = next((turn[key] for key in _CONTENT if key in turn), None)
        if role == "call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(content, row, where)})
            continue
        kept = {key: copy.deepcopy(turn[key]) for key in MESSAGE_KEYS[2:] if not is_empty(turn.get(key))}
        if content is None and "tool_calls" in kept:
            content = ""
        elif isinstance(content, list):
            content = _joined(content, row, where)
        said = _said(row, "tool" if "tool_calls" in kept else role, content, where)
        messages.append({**said, "role": role, **kept})
    return messages


def _joined(parts: list[Any], row: Row, where: str) -> str:
    """The text of a content that stands in parts; a part that is no text is refused."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                BROKEN,
                f"a turn in '{where}' has a part that is no text: {json.dumps(part, default=str)[:60]}",
                where=row.place,
                expected='{"type": "text", "text": …}',
            )
    return "".join(part["text"] for part in parts)


def _calls(content: Any, row: Row, where: str) -> list[Message]:
    """ShareGPT's call of a tool (JSON: one call or several) in OpenAI's form."""
    calls = _json(content, row, where, "a call {name, arguments}")
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise RowError(
                BROKEN,
                f"a turn in '{where}' calls no tool: {json.dumps(call, default=str, ensure_ascii=False)[:60]}",
                where=row.place,
                expected="{name, arguments}",
            )
    return [{"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls]


def _tools(row: Row, fields: Mapping[str, str]) -> list[Message] | None:
    """The tools of a row in OpenAI's form, or None."""
    name = fields.get("tools")
    value = None if name is None else row.fields.get(name)
    if name is None or is_empty(value):
        return None
    tools = _json(value, row, name, "a list of tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(BROKEN, f"'{name}' is no list of tools", where=row.place, expected="[{name, parameters, …}]")
    return [tool if "type" in tool and "function" in tool else {"type": "function", "function": tool}
            for tool in tools] or None  # fmt: skip


def _json(value: Any, row: Row, where: str, expected: str) -> Any:
    """A value that may stand as JSON in a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(
            BROKEN, f"'{where}' is not readable as JSON: {error}", where=row.place, expected=expected
        ) from None


def _history(row: Row, fields: Mapping[str, str]) -> list[Message]:
    """Alpaca's earlier turns: [[asked, answered], …]."""
    messages: list[Message] = []
    past = row.fields.get(fields.get("history", ""))
    for turn in () if is_empty(past) else past if isinstance(past, list) else [past]:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RowError(
                BROKEN, "a turn of the history is no pair", where=row.place, expected="[[asked, answered], …]"
            )
        messages += [_said(row, "user", turn[0], "history"), _said(row, "assistant", turn[1], "history")]
    return messages


def _instruction(row: Row, fields: Mapping[str, str]) -> str:
    """The instruction, with the input it is about below it."""
    asked = _value(row, fields, "prompt")
    given = row.fields.get(fields.get("input", ""))
    return str(asked) if is_empty(given) else f"{asked}\n\n{given}"


def _with_system(messages: list[Message], row: Row, fields: Mapping[str, str]) -> list[Message]:
    """`messages` after the system's text, where the row has one of its own."""
    name = fields.get("system")
    value = None if name is None else row.fields.get(name)
    if name is None or is_empty(value):
        return messages
    if messages and messages[0]["role"] == "system":
        raise RowError(
            BROKEN,
            f"the row has a system text under '{name}' and another in its turns",
            where=row.place,
            expected="one of the two",
        )
    return [_said(row, "system", value, name), *messages]


def _spoken_in_turn(row: Row, text: str, where: str) -> list[Message]:
    """A line of turns that each end with `END_OF_TURN`: the user speaks first, then the two take turns."""
    turns = text.strip().removesuffix(END_OF_TURN).split(END_OF_TURN)
    return [_said(row, ("user", "assistant")[n % 2], turn.strip(), where) for n, turn in enumerate(turns)]


def _spoken(row: Row, text: str, where: str) -> list[Message]:
    """A transcript: what stands after each "Human:" and "Assistant:" that begins a paragraph."""
    head, *rest = _SPOKEN.split(text)
    if head.strip() or not rest:
        raise RowError(
            BROKEN,
            f"the transcript in '{where}' does not begin with a speaker",
            where=row.place,
            expected="\\n\\nHuman: … \\n\\nAssistant: …",
        )
    return [
        _said(row, "user" if speaker == "Human" else "assistant", said.strip(), where)
        for speaker, said in zip(rest[::2], rest[1::2], strict=True)
    ]
