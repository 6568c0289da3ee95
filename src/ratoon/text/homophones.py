"""Chinese characters that are read alike: what a person who types by sound picks by mistake.

Decides which characters count as common, so that no replacement is one that nobody writes, and in which order they
come. Readings are pypinyin's (extra `[eval]`), without tones, as an input method asks for them. Frequency has two
sources, neither of them a table of our own: how often a character stands in the texts at hand, and in how many words
of pypinyin's dictionary of phrases it stands (47,000). Common is what the first level of GB 2312 holds (3,755
characters chosen for their frequency), for texts in traditional script that of Big5 (5,401), and what the texts at
hand use themselves at least five times.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ratoon.base.errors import ConfigError

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Chinese characters, as a range for regular expressions."""

RUN = re.compile(f"[{HAN}]+")
OFTEN = 5
"""How often the texts at hand must use a character for it to count as common in them."""
MOST = 5
"""At most so many replacements for a character, the most frequent ones."""


@dataclass(frozen=True)
class Homophones:
    """The characters that may stand for another of the same sound; `counts`: how often each stands in the texts at
    hand."""

    counts: Counter[str] = field(default_factory=Counter)
    _known: dict[tuple[str, bool], tuple[str, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Homophones:
        """The table for these texts: their own common characters beside the standard's, their own first."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update("".join(RUN.findall(text)))
        return cls(counts)

    def choices(self, text: str) -> list[tuple[int, tuple[str, ...]]]:
        """Offset and replacements of each Chinese character of `text` that has any, the most frequent first.

        A character of several readings is read as its run of characters has it (银行 yinhang, 行人 xingren). Raises
        `ConfigError` where pypinyin is missing.
        """
        found = []
        traditional = is_traditional(text)
        for run in RUN.finditer(text):
            for offset, reading in enumerate(_readings(run.group())):
                character = run.group()[offset]
                alike = tuple(other for other in self._alike(reading, traditional) if other != character)[:MOST]
                if alike:
                    found.append((run.start() + offset, alike))
        return found

    def _alike(self, reading: str, traditional: bool) -> tuple[str, ...]:
        """The common characters of this reading, the most frequent first."""
        key = (reading, traditional)
        if key not in self._known:
            common = _common(traditional)
            extra = [c for c, n in self.counts.items() if n >= OFTEN and c not in common and _reading(c) == reading]
            # A text in one script gets no character that only the other has.
            extra = [c for c in extra if _writable(c, "big5" if traditional else "gb2312")]
            in_phrases = _in_phrases()
            ranked = sorted(
                [*_by_reading(traditional).get(reading, ()), *extra],
                key=lambda c: (-self.counts[c], -in_phrases[c], c),
            )
            self._known[key] = tuple(ranked)
        return self._known[key]


def is_traditional(text: str) -> bool:
    """Whether a text has characters of the traditional script only (in Big5, not in GB 2312) and more of them than of
    the simplified only."""
    han = set("".join(RUN.findall(text)))
    only_big5 = sum(_writable(c, "big5") and not _writable(c, "gb2312") for c in han)
    only_gb = sum(_writable(c, "gb2312") and not _writable(c, "big5") for c in han)
    return only_big5 > only_gb


@functools.lru_cache(maxsize=1 << 16)
def _writable(character: str, charset: str) -> bool:
    try:
        return bool(character.encode(charset))
    except UnicodeEncodeError:
        return False


@functools.cache
def _common(traditional: bool) -> frozenset[str]:
    """The first level of GB 2312 (rows 16 to 55) or of Big5 (A440 to C67E), read off Python's own codecs."""
    if traditional:
        rows, cells = range(0xA4, 0xC7), (*range(0x40, 0x7F), *range(0xA1, 0xFF))
        codes = [bytes([row, cell]) for row in rows for cell in cells if (row, cell) <= (0xC6, 0x7E)]
        return frozenset(code.decode("big5") for code in codes)
    rows, cells = range(0xB0, 0xD8), tuple(range(0xA1, 0xFF))
    codes = [bytes([row, cell]) for row in rows for cell in cells if (row, cell) < (0xD7, 0xFA)]
    return frozenset(code.decode("gb2312") for code in codes)


def _lazy_pinyin(text: str) -> list[str]:
    try:
        from pypinyin import lazy_pinyin
    except ImportError:
        raise ConfigError(
            "homophones need the package pypinyin, which is not installed", fix="pip install 'ratoon[eval]'"
        ) from None
    return lazy_pinyin(text)


def _readings(run: str) -> list[str]:
    """A reading for each character of a run of Chinese characters; one that pypinyin does not know reads as itself."""
    found = _lazy_pinyin(run)
    # Unknown characters come back joined into one piece; then each is read alone.
    return found if len(found) == len(run) else [_reading(character) for character in run]


@functools.lru_cache(maxsize=1 << 16)
def _reading(character: str) -> str:
    return _lazy_pinyin(character)[0]


@functools.cache
def _by_reading(traditional: bool) -> dict[str, tuple[str, ...]]:
    table: dict[str, list[str]] = {}
    for character in sorted(_common(traditional)):
        table.setdefault(_reading(character), []).append(character)
    return {reading: tuple(characters) for reading, characters in table.items()}


@functools.cache
def _in_phrases() -> Counter[str]:
    """In how many phrases of pypinyin's dictionary each character stands."""
    from pypinyin.constants import PHRASES_DICT

    counts: Counter[str] = Counter()
    for phrase in PHRASES_DICT:
        counts.update(set(phrase))
    return counts
