"""Templates: a record's fields put together to the ids that are read, and shortened where those are too many.

Decides where the borders between a template's own words and the fields lie in tokens (nothing spans them, so that a
field that is shortened leaves all others as they were), and which field is shortened first: the longest. Conversations
are `turns.py`'s.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.tasks.contract import TooLong
from ratoon.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Part:
    """Ids of one field, or (`name` None) of what the template itself says."""

    name: str | None
    ids: list[int]


def names_in(template: str) -> list[str]:
    """The fields a template names, in order. Raises `ConfigError` for one that cannot be read."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name]
    except ValueError as error:
        raise ConfigError(
            f"the template cannot be read: {error}", where="task.template", expected="fields in braces: {source}"
        ) from None


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its fields."""
    pieces = string.Formatter().parse(template)
    return "".join(literal + (values[name] if name else "") for literal, name, _, _ in pieces)


def parts_of(template: str, values: Mapping[str, str], tokenizer: Tokenizer) -> list[Part]:
    """The template as ids, begun as a text of its own. A space before a field belongs to the field, as words are
    spelled with the space before them."""
    texts: list[tuple[str | None, str]] = []
    for literal, name, _, _ in string.Formatter().parse(template):
        space = " " if name and literal.endswith(" ") else ""
        texts.append((None, literal.removesuffix(space) if space else literal))
        if name:
            texts.append((name, space + values[name]))
    parts = [Part(None, tokenizer.encode_prompt(""))]
    begun = False
    for name, text in texts:
        if text:
            parts.append(Part(name, continued(text, tokenizer) if begun else tokenizer.encode(text)))
            begun = True
    return parts


def continued(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text that goes on from another: no space is put before it, no begin of a text."""
    return tokenizer.encode_plain_spans(text)[0]


def joined(parts: Sequence[Part]) -> list[int]:
    """The ids of all parts."""
    return [id for part in parts for id in part.ids]


def fit(
    parts: Sequence[Part], room_tokens: int, policy: TooLong, may: Collection[str]
) -> tuple[list[Part], int] | None:
    """The parts with at most `room_tokens` ids, and how many were cut: from the longest of the fields in `may`, on the
    side that `policy` names. None where not one token would be left of each of them."""
    over = sum(len(part.ids) for part in parts) - room_tokens
    if over <= 0:
        return list(parts), 0
    lengths = {i: len(part.ids) for i, part in enumerate(parts) if part.name in may}
    if sum(length - 1 for length in lengths.values()) < over:
        return None
    for _ in range(over):
        lengths[max(lengths, key=lambda i: (lengths[i], -i))] -= 1
    kept = [
        part if i not in lengths else replace(part, ids=cut(part.ids, lengths[i], policy))
        for i, part in enumerate(parts)
    ]
    return kept, over


def cut(ids: list[int], kept_tokens: int, policy: TooLong) -> list[int]:
    """The first ids, or the last with cut-left."""
    return ids[len(ids) - kept_tokens :] if policy == "cut-left" else ids[:kept_tokens]


def side(policy: TooLong) -> str:
    """The reason that is booked for what was cut."""
    return f"too long: cut on the {'left' if policy == 'cut-left' else 'right'}"


def not_split(policy: TooLong, what: str) -> None:
    """Raise `ConfigError` where `what` cannot be split and is to be."""
    if policy == "split":
        raise ConfigError(
            f"{what} cannot be split",
            where="data.too_long",
            expected="refuse, cut-left or cut-right",
            fix="choose which end of the text may be lost; the answer never is, and what is cut is counted",
        )


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that ends an answer. Raises `ArtifactError` for a tokenizer that has none: nobody could learn to stop."""
    if tokenizer.eos_id is None:
        raise ArtifactError(
            "the tokenizer has no token that ends a text, so a model could not learn to stop",
            where="tokenizer_config.json",
            expected="the key eos_token",
            fix="name the token that ended texts when the model was trained",
        )
    return tokenizer.eos_id


def as_text(value: Any) -> str:
    """A field's value as text: a list's entries one behind the other, numbers as they are written."""
    if isinstance(value, list | tuple):
        return " / ".join(as_text(one) for one in value)
    if isinstance(value, Mapping):
        return as_text(list(value.values()))
    return str(value).strip()
