"""Conversations as tokens, for the tasks that have them: rendered, with what each answer takes, and shortened by turns.

Decides how a conversation is taken apart where it is too long: between exchanges (what the user says and all that
answers it), and inside the user's words only where one exchange alone is too long. The ids are `text/chat.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ratoon.base.errors import ArtifactError, DataError
from ratoon.tasks.contract import TooLong
from ratoon.tasks.messages import Message
from ratoon.text.chat import Rendered, render
from ratoon.text.tokenizer import Tokenizer


def rendered(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    place: str,
    *,
    tools: Sequence[Message] | None = None,
    prompt: bool = False,
) -> Rendered:
    """The messages through the one renderer; its refusals of a row's messages name the row.

    Raises `ArtifactError` where the template would not show the tools, or the calls of them.
    """
    try:
        found = render(tokenizer, messages, add_generation_prompt=prompt, tools=tools)
        if tools and found.text == render(tokenizer, messages, add_generation_prompt=prompt).text:
            raise _unseen("tools")
        if any(message.get("tool_calls") for message in messages):
            silent = [{key: value for key, value in one.items() if key != "tool_calls"} for one in messages]
            both = [
                render(tokenizer, some, add_generation_prompt=True, tools=tools).text for some in (messages, silent)
            ]
            if both[0] == both[1]:
                raise _unseen("calls of tools")
    except DataError as error:
        raise DataError(error.found, where=place, expected=error.expected, fix=error.fix) from None
    return found


def _unseen(what: str) -> ArtifactError:
    return ArtifactError(
        f"the chat template does not show {what}",
        where="chat template",
        expected="a template that was made for tools",
        fix="say task.tools: text, and they are written into the messages",
    )


def answers(mask: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last + 1 position of each answer of a rendered conversation."""
    found, start = [], None
    for at, learned in enumerate([*mask, False]):
        if learned and start is None:
            start = at
        if not learned and start is not None:
            found.append((start, at))
            start = None
    return found


def weights(length: int, learned: Sequence[tuple[int, int]]) -> list[float]:
    """Weights of next-token predictions: 1 where the token predicted belongs to one of the answers."""
    weight = [0.0] * max(1, length - 1)
    for start, stop in learned:
        weight[start - 1 : stop - 1] = [1.0] * (stop - start)
    return weight


def exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system text (or nothing), and the conversation in pieces that begin where the user speaks."""
    system = list(messages[:1]) if messages and messages[0]["role"] == "system" else []
    pieces: list[list[Message]] = []
    for message in messages[len(system) :]:
        if message["role"] == "user" or not pieces:
            pieces.append([])
        pieces[-1].append(message)
    return system, pieces


def most(count: int, fits: Callable[[int], bool]) -> int:
    """The greatest number up to `count` that fits, or 0; what holds for a number holds for the smaller ones."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def shortened(
    messages: Sequence[Message],
    fits: Callable[[list[Message]], bool],
    policy: TooLong,
    tokenizer: Tokenizer,
    *,
    keep: str = "last",
) -> list[Message] | None:
    """A conversation that fits: exchanges are left out (the first ones where the `last` is kept, else the last ones),
    and where one alone is too long, its user's words are cut on the side of `policy`. None where that does not help."""
    system, pieces = exchanges(messages)

    def some(count: int) -> list[Message]:
        chosen = pieces[len(pieces) - count :] if keep == "last" else pieces[:count]
        return [*system, *(message for piece in chosen for message in piece)]

    count = most(len(pieces), lambda count: fits(some(count)))
    if count:
        return some(count)
    alone = some(1)
    at = len(system)
    if at >= len(alone) or alone[at]["role"] != "user":
        return None
    text = alone[at]["content"]
    ids, spans = tokenizer.encode_plain_spans(text)

    def cut(kept: int) -> list[Message]:
        words = text[spans[len(ids) - kept][0] :] if policy == "cut-left" else text[: spans[kept - 1][1]]
        return [*alone[:at], {**alone[at], "content": words}, *alone[at + 1 :]]

    kept = most(len(ids) - 1, lambda kept: fits(cut(kept)))
    return cut(kept) if kept else None


def told(messages: Sequence[Message], tools: Sequence[Message] | None) -> list[Message]:
    """The same conversation with tools and calls as plain text, for templates that know neither: the tools in the
    system text, a call as `<tool_call>{…}</tool_call>` in what the assistant says."""
    found: list[Message] = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        calls = [_line(call["function"]) for call in message.get("tool_calls") or ()]
        said = [message["content"]] if message["content"] else []
        plain["content"] = "\n".join([*said, *(f"<tool_call>{call}</tool_call>" for call in calls)])
        found.append(plain)
    if tools:
        listed = "\n".join(_line(tool.get("function", tool)) for tool in tools)
        words = f"These tools can be called with <tool_call>{{name, arguments}}</tool_call>:\n{listed}"
        if found and found[0]["role"] == "system":
            found[0] = {**found[0], "content": f"{found[0]['content']}\n\n{words}"}
        else:
            found.insert(0, {"role": "system", "content": words})
    return found


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
