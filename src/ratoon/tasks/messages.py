"""Rows as conversations: alpaca, sharegpt, OpenAI's messages, prompts with completions, transcripts.

Decides which layout a row has, whose turn is whose, and which orders of turns can be. What is learned of a conversation
is `dialogue.py`'s, pairs of answers `preference.py`'s; how messages become tokens, `text/chat.py`'s.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ratoon.base.errors import DataError

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user", "usr": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "function_call": "call", "tool_call": "call",
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip
"""Names of speakers, and whose they are; a `call` is an assistant's message that calls a tool."""
TURNS = ("messages", "conversations", "conversation", "dialog")
PROMPT = ("prompt", "instruction", "question", "query")
COMPLETION = ("completion", "response", "output", "answer")
END_OF_TURN = "__eou__"
"""What ends a turn in DailyDialog's lines."""
NOT_LEARNED = "weight"
"""The key of OpenAI's fine-tuning files that says, with 0, that an assistant's message is not learned."""

_SPOKEN = re.compile(r"\n\n(Human|Assistant):")
_CONTENT = ("content", "value", "text")
_SPEAKER = ("role", "from", "speaker")


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, `content` a text in each, and the tools that may be called."""

    messages: list[Message]
    tools: list[Message] | None = None


def layout_of(row: Mapping[str, Any]) -> str | None:
    """`preference`, `messages`, `sharegpt`, `alpaca`, `prompt_completion`, `dialogue_lines` or `transcript`: the layout
    that a row has as a conversation; None where it is none."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    turns = next((row[key] for key in TURNS if isinstance(row.get(key), list)), None)
    if turns is not None:
        first = turns[0] if turns else {}
        return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if "instruction" in row and ("output" in row or "response" in row):
        return "alpaca"
    if any(key in row for key in PROMPT) and any(key in row for key in COMPLETION):
        return "prompt_completion"
    text = row.get("text")
    if isinstance(text, str) and END_OF_TURN in text:
        return "dialogue_lines"
    if isinstance(text, str) and _SPOKEN.match(text):
        return "transcript"
    return None


def to_messages(row: Mapping[str, Any], place: str) -> Conversation:
    """The conversation of a row; the layout is recognised.

    Raises `DataError` with the place for a row that is none, an unknown role, an empty turn, turns in an order that
    cannot be, and a conversation in which no assistant speaks.
    """
    layout = layout_of(row)
    if layout in (None, "preference"):
        raise DataError(
            f"the row is no conversation: it has {', '.join(row) or 'no fields'}",
            where=place,
            expected="messages, conversations, instruction and output, prompt and completion, or a transcript as text",
            fix="rename the fields" if layout is None else "train on it with task.kind: preference",
        )
    if layout in ("messages", "sharegpt"):
        messages = turns_of(next(row[key] for key in TURNS if isinstance(row.get(key), list)), place)
    elif layout == "dialogue_lines":
        messages = _lines(row["text"], place)
    elif layout == "transcript":
        messages = spoken(row["text"], place)
    else:
        messages = prompt_of(row, place)
        answer = next(row[key] for key in COMPLETION if key in row)
        messages += turns_of(answer, place) if isinstance(answer, list) else [said("assistant", answer, place)]
    messages = with_system(messages, row, place)
    check_order(messages, place)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            "no assistant speaks in the conversation, so there is nothing to learn",
            where=place,
            expected="a message of the assistant",
            fix="mend the row, or say data.on_bad_row: skip",
        )
    return Conversation(messages, tools_of(row, place))


def prompt_of(row: Mapping[str, Any], place: str) -> list[Message]:
    """What comes before the answer of a row with a prompt: its history, and the prompt with its input below it."""
    messages: list[Message] = []
    for turn in row.get("history") or ():
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise DataError("a turn of the history is no pair", where=place, expected="[[asked, answered], …]")
        messages += [said("user", turn[0], place), said("assistant", turn[1], place)]
    prompt = next((row[key] for key in PROMPT if key in row), None)
    if isinstance(prompt, list):
        return messages + turns_of(prompt, place)
    more = row.get("input")
    if isinstance(prompt, str) and isinstance(more, str) and more.strip():
        prompt = f"{prompt}\n\n{more}"
    return [*messages, said("user", prompt, place)]


def with_system(messages: list[Message], row: Mapping[str, Any], place: str) -> list[Message]:
    """`messages` behind the row's own `system` text, where it has one."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        raise DataError(
            "the row has a system text of its own and another in its turns", where=place, expected="one of the two"
        )
    return [said("system", system, place), *messages]


def said(role: str, content: Any, place: str) -> Message:
    """A message that says something. Raises `DataError` where it does not."""
    if not isinstance(content, str):
        raise DataError(f"what the {role} says is no text but {type(content).__name__}", where=place, expected="text")
    if role in ("user", "assistant") and not content.strip():
        raise DataError(f"a turn of the {role} is empty", where=place, fix="mend the row, or say data.on_bad_row: skip")
    return {"role": role, "content": content}


def turns_of(turns: Any, place: str) -> list[Message]:
    """Turns in OpenAI's or ShareGPT's form as messages. Raises `DataError` for an unknown role."""
    turns = turns if isinstance(turns, list) else [turns]
    # CrossWOZ calls the two sides usr and sys; elsewhere `sys` could be anything, and is refused.
    served = any(isinstance(turn, Mapping) and turn.get("role") == "usr" for turn in turns)
    messages = []
    for number, turn in enumerate(turns, start=1):
        name = next((turn[key] for key in _SPEAKER if key in turn), None) if isinstance(turn, Mapping) else None
        role = "assistant" if served and name == "sys" else ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise DataError(
                f"turn {number} is spoken by {json.dumps(name, default=str, ensure_ascii=False)}",
                where=place,
                expected=f"one of {', '.join(ROLES)}",
                fix="rename the role, or say data.on_bad_row: skip",
            )
        messages.append(_turn(turn, role, place))
    return messages


def _turn(turn: Mapping[str, Any], role: str, place: str) -> Message:
    content = next((turn[key] for key in _CONTENT if key in turn), None)
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, place)}
    if isinstance(content, list):
        content = _joined(content, place)
    keys = set(turn) - set(_SPEAKER) - set(_CONTENT)
    kept = {key: copy.deepcopy(turn[key]) for key in turn if key in keys and turn[key] not in (None, [], "")}
    if legacy := kept.pop("function_call", None):
        kept["tool_calls"] = [legacy]
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls([call.get("function", call) for call in kept["tool_calls"]], place)
        content = content or ""
    message = said("tool" if "tool_calls" in kept else role, content, place)
    return {**message, "role": role, **kept}


def _joined(parts: Sequence[Any], place: str) -> str:
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"a turn has a part that is no text: {json.dumps(part, default=str, ensure_ascii=False)[:60]}",
                where=place,
                expected='{"type": "text", "text": …}',
            )
    return "".join(part["text"] for part in parts)


def _calls(content: Any, place: str) -> list[Message]:
    """Calls of tools in OpenAI's form, their arguments as a table: what chat templates read."""
    calls = _json(content, place, "a call {name, arguments}")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise DataError(
                f"a turn calls no tool: {json.dumps(call, default=str, ensure_ascii=False)[:60]}",
                where=place,
                expected="{name, arguments}",
            )
        arguments = _json(call["arguments"], place, "arguments as a JSON object")
        found.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return found


def tools_of(row: Mapping[str, Any], place: str) -> list[Message] | None:
    """The tools of a row in OpenAI's form; None where it has none."""
    if not row.get("tools"):
        return None
    tools = _json(row["tools"], place, "a list of tools")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError("'tools' is no list of tools", where=place, expected="[{name, parameters, …}]")
    whole = [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]
    return whole or None


def _json(value: Any, place: str, expected: str) -> Any:
    """A value that may stand as JSON in a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not readable as JSON: {error}", where=place, expected=expected) from None


def _lines(text: str, place: str) -> list[Message]:
    """Turns that each end with `END_OF_TURN`: the user speaks first, then the two take turns."""
    turns = text.strip().removesuffix(END_OF_TURN).split(END_OF_TURN)
    return [said(("user", "assistant")[number % 2], turn.strip(), place) for number, turn in enumerate(turns)]


def spoken(text: str, place: str) -> list[Message]:
    """A transcript: what stands after each "Human:" and "Assistant:" that begins a paragraph."""
    head, *rest = _SPOKEN.split(text)
    if head.strip() or not rest:
        raise DataError(
            "the transcript does not begin with a speaker", where=place, expected="\\n\\nHuman: … \\n\\nAssistant: …"
        )
    return [
        said("user" if speaker == "Human" else "assistant", words.strip(), place)
        for speaker, words in zip(rest[::2], rest[1::2], strict=True)
    ]


def check_order(messages: Sequence[Message], place: str) -> None:
    """Raise `DataError` for an order of turns that cannot be: a system text that is not first, one side twice in a row,
    a tool's answer that nobody asked for, a call that nothing answers before the user speaks."""
    before, called = None, False
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        wrong = None
        if role == "system" and number > 1:
            wrong = "is a system text behind the conversation's begin"
        elif role == "tool" and not called:
            wrong = "is a tool's, and no assistant called one"
        elif role == "user" and called and before == "assistant":
            wrong = "is the user's, and the call before it has no answer"
        elif role == before and role != "tool":
            wrong = f"is the {role}'s, as the one before it"
        if wrong is not None:
            raise DataError(
                f"message {number} {wrong}",
                where=place,
                expected="a system text first if any, then user and assistant by turns, tools behind a call",
                fix="mend the row (join what one side says), or say data.on_bad_row: skip",
            )
        called = bool(message.get("tool_calls")) or (called and role == "tool")
        before = role
