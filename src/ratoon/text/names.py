"""Names in texts, found without a model: what can be swapped for another of its kind.

Decides what a name is where nobody marked any: in English a run of capitalised words that does not begin a sentence.
Chinese has no capitals, so there names come from marks only (the entities of a tagged data set). The pool is made of
the data set itself: no name stands in a text that its own source does not know.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from ratoon.text.edits import Site
from ratoon.text.homophones import HAN

FOUND = "found"
"""The kind of the names that were found by their capitals, not marked."""

_LETTER = f"(?:(?![{HAN}])[^\\W\\d_])"
_WORD = re.compile(f"{_LETTER}+(?:['\u2019.-](?!s\\b){_LETTER}+)*")
_NO_NAMES = frozenset(("I", "I'm", "I'd", "I'll", "I've", "I\u2019m", "I\u2019d", "I\u2019ll", "I\u2019ve", "OK"))
_ENDS = ".!?:;\u2026\"\u201c\u201d'\u2018([{\n"
"""After one of these a capital says nothing."""
MOST_CAPITALS = 0.7
"""A text of more capitalised words than this share is a headline or shouting, and its capitals say nothing."""


@dataclass(frozen=True)
class Names:
    """Names by their kind, each with every other of its kind as its replacement."""

    by_kind: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, texts: Iterable[str], marked: Mapping[str, Iterable[str]] | None = None) -> Names:
        """The names of these texts: those `marked` (kind to names), or, where nobody marked any, those found by their
        capitals."""
        if marked is not None:
            pools = {kind: tuple(sorted({name for name in names if name.strip()})) for kind, names in marked.items()}
        else:
            pools = {FOUND: tuple(sorted(_found(texts)))}
        return cls({kind: names for kind, names in pools.items() if len(names) > 1})

    def sites(self, text: str) -> list[Site]:
        """Where names of the pool stand in `text`, the longest at each place, whole words only."""
        sites, offset = [], 0
        while offset < len(text):
            for length in self._lengths.get(text[offset], ()):
                name = text[offset : offset + length]
                kind = self._kinds.get(name)
                if kind is not None and _whole(text, offset, offset + length):
                    others = _Others(self.by_kind[kind], self._ranks[kind][name])
                    sites.append(Site(offset, offset + length, others))
                    offset += length
                    break
            else:
                offset += 1
        return sites

    @functools.cached_property
    def _kinds(self) -> dict[str, str]:
        """The kind of each name; of a name in several, the first."""
        return {name: kind for kind, names in reversed(list(self.by_kind.items())) for name in names}

    @functools.cached_property
    def _lengths(self) -> dict[str, tuple[int, ...]]:
        """By first character the lengths of the names that begin with it, the longest first."""
        table: dict[str, set[int]] = {}
        for name in self._kinds:
            table.setdefault(name[0], set()).add(len(name))
        return {first: tuple(sorted(lengths, reverse=True)) for first, lengths in table.items()}

    @functools.cached_property
    def _ranks(self) -> dict[str, dict[str, int]]:
        return {kind: {name: rank for rank, name in enumerate(names)} for kind, names in self.by_kind.items()}


class _Others(Sequence[str]):
    """A pool without one of its names; not copied, since pools are large."""

    def __init__(self, pool: tuple[str, ...], without: int) -> None:
        self.pool, self.without = pool, without

    def __len__(self) -> int:
        return len(self.pool) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.pool[index + (index >= self.without)]


def _found(texts: Iterable[str]) -> set[str]:
    """Names by their capitals; a single word that is written small more often is none (The, Company)."""
    capitals: Counter[str] = Counter()
    small: Counter[str] = Counter()
    for text in texts:
        capitals.update(text[start:end] for start, end in capitalised(text))
        small.update(word for word in _WORD.findall(text) if word.islower())
    return {name for name, times in capitals.items() if len(name) > 1 and small[name.lower()] < times}


def capitalised(text: str) -> list[tuple[int, int]]:
    """Start and end of every run of capitalised words of `text` that no sentence begins with."""
    words = list(_WORD.finditer(text))
    capitals = [word.group()[0].isupper() for word in words]
    if not words or sum(capitals) > MOST_CAPITALS * len(words):
        return []
    runs: list[tuple[int, int]] = []
    for number, (word, capital) in enumerate(zip(words, capitals, strict=True)):
        if not capital or word.group() in _NO_NAMES:
            continue
        before = text[: word.start()].rstrip(" \t")
        goes_on = bool(runs) and number > 0 and runs[-1][1] == words[number - 1].end()
        if goes_on and text[runs[-1][1] : word.start()] == " ":
            runs[-1] = (runs[-1][0], word.end())
        elif before and before[-1] not in _ENDS:
            runs.append((word.start(), word.end()))
    return runs


def _whole(text: str, start: int, end: int) -> bool:
    """Whether no Latin word goes on over the border of the name; Chinese has no borders to keep."""

    def joined(left: str, right: str) -> bool:
        return all(c.isalnum() and ord(c) < 0x2E80 for c in (left, right))

    return not (start and joined(text[start - 1], text[start])) and not (
        end < len(text) and joined(text[end - 1], text[end])
    )
