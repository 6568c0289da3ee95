"""Floors for tags of words: what a word was tagged most in training, and names found again.

Decides two look-ups, without a model of sequences. Tags may follow any scheme (IOB1, IOB2, BIOES): a name's tags are
given as training had them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ratoon.evaluate.floor.kinds import Tagged
from ratoon.text.homophones import HAN

T = TypeVar("T", str, tuple[str, ...])

OUTSIDE = "O"
RARE = 2
"""Words seen at most so often in training tell what unseen words of their shape are."""

_RUNS = tuple((re.compile(f"[{of}]+"), sign) for of, sign in ((HAN, "c"), ("0-9", "0"), ("A-Z", "A"), ("a-z", "a")))
"""What a run of characters looks like in a shape; a longer run looks like one of two."""


def commonest_tag(train: Tagged, test: Tagged) -> list[list[str]]:
    """The commonest tag of training for every word; with names among other words that is O throughout."""
    tag = _commonest(Counter(tag for tags in train.tags for tag in tags))
    return [[tag] * len(words) for words in test.words]


def by_word(train: Tagged, test: Tagged) -> list[list[str]]:
    """For each word the tag it had most often in training; O for an unseen word."""
    known = _by_word(train)
    return [[known.get(word, OUTSIDE) for word in words] for words in test.words]


def by_word_or_shape(train: Tagged, test: Tagged) -> list[list[str]]:
    """As `by_word`; an unseen word gets what rare words of its shape and ending had, then of its shape, and O where
    that is unseen as well. A sentence's first word, if unseen, is asked for in small letters, and has shapes of its
    own, since its capital says little."""
    known = _by_word(train)
    times = Counter(word for words in train.words for word in words)
    by_shape: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for words, tags in zip(train.words, train.tags, strict=True):
        for place, (word, tag) in enumerate(zip(words, tags, strict=True)):
            if times[word] <= RARE:
                for key in _shapes(word, place):
                    by_shape[key][tag] += 1
    shapes = {key: _commonest(counts) for key, counts in by_shape.items()}
    found = []
    for words in test.words:
        tags = []
        for place, word in enumerate(words):
            seen = word if word in known or place else word.lower()
            guess = next((shapes[key] for key in _shapes(word, place) if key in shapes), OUTSIDE)
            tags.append(known.get(seen, guess))
        found.append(tags)
    return found


def by_name(train: Tagged, test: Tagged) -> list[list[str]]:
    """Names of training found again, the longest at each place, with the tags they had most often; O elsewhere. A run
    of words that was a name in less than half of its places in training is none."""
    names = _names(train)
    longest = max((len(name) for name in names), default=0)
    found = []
    for words in test.words:
        tags = [OUTSIDE] * len(words)
        place = 0
        while place < len(words):
            for length in range(min(longest, len(words) - place), 0, -1):
                name = names.get(tuple(words[place : place + length]))
                if name is not None:
                    tags[place : place + length] = name
                    place += length
                    break
            else:
                place += 1
        found.append(tags)
    return found


def _names(train: Tagged) -> dict[tuple[str, ...], tuple[str, ...]]:
    tagged: defaultdict[tuple[str, ...], Counter[tuple[str, ...]]] = defaultdict(Counter)
    for words, tags in zip(train.words, train.tags, strict=True):
        for start, end in _runs(tags):
            tagged[tuple(words[start:end])][tuple(tags[start:end])] += 1
    lengths = sorted({len(name) for name in tagged})
    seen: Counter[tuple[str, ...]] = Counter()
    for words in train.words:
        for length in lengths:
            for start in range(len(words) - length + 1):
                name = tuple(words[start : start + length])
                if name in tagged:
                    seen[name] += 1
    return {name: _commonest(counts) for name, counts in tagged.items() if 2 * counts.total() >= seen[name]}


def _runs(tags: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end of each name: a new one begins after O, at another type, and at a tag that says so (B, S, U)."""
    runs: list[tuple[int, int]] = []
    for place, tag in enumerate(tags):
        if tag == OUTSIDE:
            continue
        prefix, _, kind = tag.partition("-")
        goes_on = bool(runs) and runs[-1][1] == place and prefix not in ("B", "S", "U")
        if goes_on and tags[place - 1].partition("-")[2] == kind:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs


def _by_word(train: Tagged) -> Mapping[str, str]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for words, tags in zip(train.words, train.tags, strict=True):
        for word, tag in zip(words, tags, strict=True):
            counts[word][tag] += 1
    return {word: _commonest(one) for word, one in counts.items()}


def _shapes(word: str, place: int) -> list[tuple[str, ...]]:
    """From the nearest to the widest: shape and ending, shape."""
    shape = word
    for runs, sign in _RUNS:
        shape = runs.sub(lambda run: sign * min(2, len(run.group())), shape)  # noqa: B023 (called at once)
    first = "first" if place == 0 else "later"
    return [(first, shape, word[-3:].lower()), (first, shape)]


def _commonest(counts: Counter[T]) -> T:
    """The commonest, the first in sorted order among equals."""
    return min(counts, key=lambda one: (-counts[one], one))
