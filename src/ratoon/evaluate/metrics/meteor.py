"""METEOR of one sentence: words aligned by form, stem and synonym, and a penalty for fragments.

Decides the alignment, equal to NLTK's `meteor_score`. Words are given; cutting texts into words is `overlap.py`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import cache
from itertools import pairwise

from ratoon.evaluate.metrics.libraries import library

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
"""Weight of precision against recall, and the form and weight of the penalty: Lavie & Agarwal (2007), § 2."""

Synonyms = Callable[[str], Collection[str]]
"""From a word to the words that mean the same."""


def meteor(
    references: Sequence[Sequence[str]],
    predicted: Sequence[str],
    stem: Callable[[str], str],
    synonyms: Synonyms | None,
) -> float:
    """The METEOR of words against the best of several references, 0 to 1 (Lavie & Agarwal 2007, eq. 1 to 3).

    Words are compared in lower case: the same form first, then the same `stem`, then a word of its `synonyms`; each
    step from the last word to the first, and each word to the last one left in the reference. That is NLTK's way, not
    the paper's alignment with the fewest crossings: words that stand twice can cost a fragment more.
    """
    return max((_one(reference, predicted, stem, synonyms) for reference in references), default=0.0)


def porter() -> Callable[[str], str]:
    """NLTK's Porter stemmer, remembering what it has seen. Raises `ConfigError` where NLTK is missing."""
    stemmer = library("nltk.stem.porter").PorterStemmer()

    @cache
    def stem(word: str) -> str:
        return str(stemmer.stem(word))

    return stem


def wordnet_synonyms() -> Synonyms | None:
    """Single words of the WordNet synsets of a word; None where NLTK finds no WordNet on this machine."""
    wordnet = library("nltk.corpus").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None

    @cache
    def synonyms(word: str) -> frozenset[str]:
        names = (lemma.name() for synset in wordnet.synsets(word) for lemma in synset.lemmas())
        return frozenset(name for name in names if "_" not in name)

    return synonyms


def _one(
    reference: Sequence[str], predicted: Sequence[str], stem: Callable[[str], str], synonyms: Synonyms | None
) -> float:
    ours, theirs = [word.lower() for word in predicted], [word.lower() for word in reference]
    links = _aligned(ours, theirs, stem, synonyms)
    if not links:
        return 0.0
    precision, recall = len(links) / len(ours), len(links) / len(theirs)
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    chunks = 1 + sum(after != (before[0] + 1, before[1] + 1) for before, after in pairwise(links))
    return float((1 - GAMMA * (chunks / len(links)) ** BETA) * mean)


def _aligned(
    ours: Sequence[str], theirs: Sequence[str], stem: Callable[[str], str], synonyms: Synonyms | None
) -> list[tuple[int, int]]:
    """Places of words that go together, in the order of ours."""
    left, right = dict(enumerate(ours)), dict(enumerate(theirs))
    links = _linked(left, right, lambda word: (word,))
    left, right = ({place: stem(word) for place, word in side.items()} for side in (left, right))
    links += _linked(left, right, lambda word: (word,))
    if synonyms is not None:
        # Of the stems that are left, not of the words: as NLTK does it.
        links += _linked(left, right, lambda word: {word, *synonyms(word)})
    return sorted(links)


def _linked(
    left: dict[int, str], right: dict[int, str], alike: Callable[[str], Collection[str]]
) -> list[tuple[int, int]]:
    """Links words from the last on the left, each to the last place on the right that holds a word alike; what is
    linked is taken out of both."""
    places: dict[str, list[int]] = defaultdict(list)
    for place in sorted(right):
        places[right[place]].append(place)
    links = []
    for mine in sorted(left, reverse=True):
        free = [places[word][-1] for word in alike(left[mine]) if places.get(word)]
        if free:
            other = max(free)
            places[right.pop(other)].pop()
            del left[mine]
            links.append((mine, other))
    return links
