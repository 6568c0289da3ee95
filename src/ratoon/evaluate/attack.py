"""A search for the few changed words that turn a model's answer, with a budget of queries.

Decides the search: greedy word substitution, words in the order in which the true label misses them most (as in Jin et
al. 2020, TextFooler, eq. 2, without its check of meaning; what may stand in a word's place is the candidates' care).
Every text that the model is shown is a query and counts. What is found bounds a model's robustness from above only: a
model that this search does not break may fall to another.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ratoon.base.errors import ConfigError, DataError, NumericError
from ratoon.evaluate.interval import ratio_interval, share_interval
from ratoon.text.edits import Span
from ratoon.text.homophones import HAN, Homophones
from ratoon.text.lookalikes import HOMOGLYPHS, KEYBOARD

Probabilities: TypeAlias = Callable[[list[str]], npt.ArrayLike]
"""From N texts to the probability of each of K labels, (N, K)."""
Candidates: TypeAlias = Callable[[str, int, int], Sequence[str]]
"""From a text and the start and end of a word in it to what may stand in its place, the likeliest first."""

BUDGET_QUERIES = 100
MOST_PER_WORD = 12
"""Candidates tried for a word."""
MOST_CHANGED = 0.4
"""The largest share of words that an attack may change (at least one may be)."""
AT_ONCE = 16
"""Attacks that go on side by side, so that the model gets large batches."""
EXAMPLES = 10

_WORD = re.compile(f"(?:(?![{HAN}])\\w)+|[{HAN}]")


@dataclass(frozen=True)
class Attack:
    """What an attack on one text came to. `adversarial`: the changed text that turned the answer, or None;
    `after` and `probability_after` (of the true label) are those of the text that came nearest."""

    text: str
    label: int
    adversarial: str | None
    before: int
    after: int
    probability_before: float
    probability_after: float
    substitutions: tuple[tuple[str, str], ...]
    n_words: int
    queries: int

    @property
    def was_correct(self) -> bool:
        """Whether the answer was right before; a wrong one is not attacked."""
        return self.before == self.label

    def as_dict(self) -> dict[str, Any]:
        """The attack as plain values."""
        return {
            "text": self.text,
            "label": self.label,
            "adversarial": self.adversarial,
            "before": self.before,
            "after": self.after,
            "probability_before": self.probability_before,
            "probability_after": self.probability_after,
            "substitutions": [list(pair) for pair in self.substitutions],
            "n_words": self.n_words,
            "queries": self.queries,
        }


@dataclass(frozen=True)
class AttackReport:
    """The attacks on n texts, one each, and what they come to."""

    attacks: list[Attack]
    budget: int

    def as_dict(self) -> dict[str, Any]:
        """Shares with Wilson's intervals, means over attacked texts with Student's. `success` is a share of the texts
        answered rightly before; `accuracy_under_attack` counts what was wrong before as wrong."""
        n = len(self.attacks)
        attacked = [one for one in self.attacks if one.was_correct]
        won = [one for one in attacked if one.adversarial is not None]
        held = len(attacked) - len(won)
        queries = np.array([one.queries for one in attacked], dtype=np.float64)
        changed = [len(one.substitutions) / one.n_words for one in won]
        mean_interval = ratio_interval(queries, np.ones(len(queries))) if len(attacked) > 1 else None
        return {
            "n": n,
            "budget_queries": self.budget,
            "n_attacked": len(attacked),
            "accuracy_before": len(attacked) / n,
            "accuracy_before_interval": list(share_interval(len(attacked), n)),
            "accuracy_under_attack": held / n,
            "accuracy_under_attack_interval": list(share_interval(held, n)),
            "success": len(won) / len(attacked) if attacked else None,
            "success_interval": list(share_interval(len(won), len(attacked))) if attacked else None,
            "mean_queries": float(queries.mean()) if attacked else None,
            "mean_queries_interval": None if mean_interval is None else list(mean_interval),
            "mean_changed_words": float(np.mean(changed)) if won else None,
            "survived": [one.was_correct and one.adversarial is None for one in self.attacks],
            "examples": [one.as_dict() for one in sorted(won, key=lambda one: len(one.substitutions))[:EXAMPLES]],
        }


def attack(
    predict_probabilities: Probabilities,
    text: str,
    label: int,
    *,
    budget: int = BUDGET_QUERIES,
    candidates: Sequence[Candidates] | None = None,
    most_per_word: int = MOST_PER_WORD,
    most_changed: float = MOST_CHANGED,
    protected: Sequence[Span] = (),
) -> Attack:
    """Search for a change of `text` after which the model no longer answers `label` (its number).

    First the words are ranked by how much the label's probability falls when each is left out; that takes at most half
    of the budget, long words first where there are more. Then word by word every candidate is asked for, and the one
    that lowers the probability most stays. `candidates`: if absent, mistakes that a reader sees through
    (`surface_candidates`). At most `budget` queries, the first for the text as it is. Raises `ConfigError` for a budget
    below 1, `DataError` for a label that the model does not have, `NumericError` for probabilities that are not finite.
    """
    search = _search(text, label, budget, candidates, most_per_word, most_changed, protected)
    return _run(predict_probabilities, [search], 1)[0]


def attack_all(
    predict_probabilities: Probabilities,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    budget: int = BUDGET_QUERIES,
    candidates: Sequence[Candidates] | None = None,
    most_per_word: int = MOST_PER_WORD,
    most_changed: float = MOST_CHANGED,
    protected: Sequence[Sequence[Span]] | None = None,
    at_once: int = AT_ONCE,
) -> AttackReport:
    """`attack` on each text, `at_once` of them side by side; the same as one after another."""
    if not texts or len(texts) != len(labels):
        raise DataError(f"{len(texts)} texts and {len(labels)} labels", expected="as many, at least one")
    spans = [()] * len(texts) if protected is None else protected
    searches = [
        _search(text, label, budget, candidates, most_per_word, most_changed, kept)
        for text, label, kept in zip(texts, labels, spans, strict=True)
    ]
    return AttackReport(_run(predict_probabilities, searches, at_once), budget)


def surface_candidates(text: str, start: int, end: int) -> list[str]:
    """What a reader takes for the word in spite of a mistake: a look-alike letter, two letters exchanged, one lost, a
    neighbouring key, one after another and from the middle of the word outwards; for a Chinese character its
    homophones (extra `[eval]`)."""
    word = text[start:end]
    if re.fullmatch(f"[{HAN}]", word):
        return list(_homophones(text).get(start, ()))
    middle = (len(word) - 1) / 2
    places = sorted(range(len(word)), key=lambda i: (abs(i - middle), i))
    kinds = [
        [word[:i] + other + word[i + 1 :] for i in places for other in HOMOGLYPHS.get(word[i], ())],
        [
            word[:i] + word[i + 1] + word[i] + word[i + 2 :]
            for i in places
            if word[i : i + 2].isalpha() and i + 1 < len(word)
        ],
        [word[:i] + word[i + 1 :] for i in places if word[i].isalpha() and i > 0],
        [word[:i] + other + word[i + 1 :] for i in places for other in KEYBOARD.get(word[i], ())[:1]],
    ]
    longest = max(map(len, kinds))
    mixed = [kind[rank] for rank in range(longest) for kind in kinds if rank < len(kind)]
    return [other for other in dict.fromkeys(mixed) if other != word]


def table_candidates(table: Mapping[str, Sequence[str]]) -> Candidates:
    """Candidates from a table of words (synonyms, neighbours of an embedding): the word as written, else written
    small, its first letter then as it was."""

    def find(text: str, start: int, end: int) -> list[str]:
        word = text[start:end]
        if word in table:
            found = list(table[word])
        else:
            found = list(table.get(word.lower(), ()))
            if word[:1].isupper():
                found = [other[:1].upper() + other[1:] for other in found]
        return [other for other in found if other != word]

    return find


@functools.lru_cache(maxsize=AT_ONCE)
def _homophones(text: str) -> dict[int, tuple[str, ...]]:
    return dict(Homophones().choices(text))


def _search(
    text: str,
    label: int,
    budget: int,
    candidates: Sequence[Candidates] | None,
    most_per_word: int,
    most_changed: float,
    protected: Sequence[Span],
) -> Generator[list[str], npt.NDArray[np.float64], Attack]:
    """The search as a conversation: it gives texts and is sent their probabilities (N, K)."""
    if budget < 1 or most_per_word < 1 or not 0 < most_changed <= 1:
        raise ConfigError(
            f"budget {budget}, most_per_word {most_per_word}, most_changed {most_changed}",
            expected="a budget and candidates of at least 1, a share above 0 and up to 1",
        )
    finders = (surface_candidates,) if candidates is None else tuple(candidates)
    return _searched(text, label, budget, finders, most_per_word, most_changed, protected)


def _searched(
    text: str,
    label: int,
    budget: int,
    finders: tuple[Candidates, ...],
    most_per_word: int,
    most_changed: float,
    protected: Sequence[Span],
) -> Generator[list[str], npt.NDArray[np.float64], Attack]:
    first = (yield [text])[0]
    if not 0 <= label < len(first):
        raise DataError(f"label {label} of a model with {len(first)} labels", expected=f"0 to {len(first) - 1}")
    queries, before = 1, int(first.argmax())
    words = [match.span() for match in _WORD.finditer(text)]
    free = [w for w, (a, b) in enumerate(words) if all(b <= start or end <= a for start, end in protected)]
    standing: dict[int, str] = {}
    reached, probability, won = before, float(first[label]), before != label
    if not won:
        ranked = sorted(free, key=lambda w: (words[w][0] - words[w][1], w))[: budget // 2]
        # A single word is not left out: nothing would be left to ask about.
        asked = [_without(text, *words[w]) for w in ranked] if len(words) > 1 else []
        lost = (yield asked)[:, label] if asked else np.zeros(len(ranked))
        queries += len(asked)
        order = [ranked[k] for k in np.argsort(lost, kind="stable")]
        for w in order:
            if won or queries >= budget or len(standing) >= max(1, math.floor(most_changed * len(words))):
                break
            options = _options(text, words[w], finders)[: min(most_per_word, budget - queries)]
            if not options:
                continue
            found = yield [_with(text, words, {**standing, w: option}) for option in options]
            queries += len(options)
            turned = found.argmax(axis=1) != label
            # Among those that turn the answer the surest; else the one that hurts the true label most.
            best = int(np.where(turned, found[:, label] - 1.0, found[:, label]).argmin())
            if turned[best] or found[best, label] < probability:
                standing[w] = options[best]
                reached, probability, won = int(found[best].argmax()), float(found[best, label]), bool(turned[best])
    adversarial = _with(text, words, standing) if won and before == label else None
    pairs = tuple((text[slice(*words[w])], new) for w, new in sorted(standing.items()))
    return Attack(
        text, label, adversarial, before, reached, float(first[label]), probability, pairs, len(words), queries
    )


def _options(text: str, span: Span, finders: tuple[Candidates, ...]) -> list[str]:
    """The candidates of all finders by turns, each once."""
    found = [list(finder(text, *span)) for finder in finders]
    longest = max(map(len, found), default=0)
    mixed = [one[rank] for rank in range(longest) for one in found if rank < len(one)]
    return [other for other in dict.fromkeys(mixed) if other != text[slice(*span)]]


def _without(text: str, start: int, end: int) -> str:
    """The text without a word, and without the space before it, or behind it where it begins the text."""
    if text[start - 1 : start] == " ":
        return text[: start - 1] + text[end:]
    return text[:start] + text[end + (text[end : end + 1] == " ") :]


def _with(text: str, words: list[Span], standing: Mapping[int, str]) -> str:
    pieces, done = [], 0
    for w, new in sorted(standing.items()):
        start, end = words[w]
        pieces += [text[done:start], new]
        done = end
    return "".join([*pieces, text[done:]])


def _run(
    predict: Probabilities, searches: Sequence[Generator[list[str], npt.NDArray[np.float64], Attack]], at_once: int
) -> list[Attack]:
    """Lead the conversations of all searches, `at_once` of them in one batch."""
    done: dict[int, Attack] = {}
    waiting = iter(enumerate(searches))
    asked: dict[int, list[str]] = {}
    while len(done) < len(searches):
        while len(asked) < at_once and (nxt := next(waiting, None)) is not None:
            asked[nxt[0]] = next(nxt[1])
        texts = [text for question in asked.values() for text in question]
        answers = _checked(predict(texts), len(texts))
        place, again = 0, {}
        for number, question in asked.items():
            part = answers[place : place + len(question)]
            place += len(question)
            try:
                again[number] = searches[number].send(part)
            except StopIteration as end:
                done[number] = end.value
        asked = again
    return [done[number] for number in range(len(searches))]


def _checked(probabilities: npt.ArrayLike, n: int) -> npt.NDArray[np.float64]:
    found = np.asarray(probabilities, dtype=np.float64)
    if found.ndim != 2 or len(found) != n:
        raise DataError(f"probabilities of shape {found.shape} for {n} texts", expected=f"({n}, labels)")
    if not np.isfinite(found).all():
        raise NumericError("a probability is not finite")
    return found
