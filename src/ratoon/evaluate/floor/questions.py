"""Floors for answers that stand in a text: the sentence that shares most with the question, and a few words of it.

Decides by counting alone. Sentences are scored by the inverse document frequency of what they share with the question;
spans by how near they stand to it, and by what answers of training looked like after questions that begin alike (a
number after "how many", a name after "who").
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from ratoon.evaluate.floor.kinds import Questions
from ratoon.evaluate.floor.sentences import sentences
from ratoon.text.edits import Span
from ratoon.text.homophones import HAN

MOST_TOKENS = 20
"""Tokens of the longest span that is considered."""
FREQUENT = 150
"""So many of the commonest tokens of training's texts are told apart, each a kind of its own."""
OFTEN = 5
"""Times a token must stand in training's texts to be told apart."""
ADDED = 5.0
"""Tokens as they are anywhere that are added to those of answers, so that few answers say little."""
NEAR = 2.0
"""What standing near to the question's words weighs against looking like an answer."""
REPEATED = 0.5
"""What each nat of the question's own words costs a span that repeats them."""
_EDGE = "edge"

_TOKEN = re.compile(f"[{HAN}]|[0-9]+(?:[.,][0-9]+)*|(?:(?![{HAN}])[^\\W\\d])+|[^\\w\\s]")
_HAN = re.compile(f"[{HAN}]")
_ASKS_EN = re.compile(r"\b(how \w+|what \w+|which \w+|who|whom|whose|when|where|why)\b", re.IGNORECASE)
_ASKS_ZH = re.compile("多少|为什么|什么时候|什么时间|哪[一-龥]|什么[一-龥]?|几[一-龥]|谁|何时|怎[么样]|是否|何")


_Odds: TypeAlias = dict[str, float]
"""For each kind of token how much likelier it is here than anywhere, as a logarithm; "" stands for an unseen kind."""


@dataclass(frozen=True)
class _Looks:
    """What answers of training looked like: the odds of their first and last token by how the question asks, of the
    tokens before and behind them, of both borders (what stands before the first, the last before what follows), and the
    log share of their lengths."""

    frequent: frozenset[str]
    first: dict[str, _Odds]
    last: dict[str, _Odds]
    before: _Odds
    after: _Odds
    opening: _Odds
    closing: _Odds
    length: list[float]


def best_sentence(train: Questions, test: Questions) -> list[str]:
    """For each question the sentence of its context that shares most with it, the first among equals."""
    weights = _weights([*train.contexts, *test.contexts])
    found = []
    for question, context in zip(test.questions, test.contexts, strict=True):
        span = _best_sentence(question, context, weights)
        found.append(context[slice(*span)])
    return found


def best_span(train: Questions, test: Questions) -> list[str]:
    """For each question a span of the sentence that shares most with it: free of the question's own words, near to
    them, and looking like the answers of training."""
    weights = _weights([*train.contexts, *test.contexts])
    looks = _looks(train)
    found = []
    for question, context in zip(test.questions, test.contexts, strict=True):
        sentence = _best_sentence(question, context, weights)
        found.append(context[slice(*_best_span(question, context, sentence, weights, looks))])
    return found


def _tokens(text: str) -> list[tuple[str, int, int]]:
    return [(match.group(), *match.span()) for match in _TOKEN.finditer(text)]


def _terms(text: str) -> list[str]:
    """What is compared: words in small letters; of Chinese, characters and pairs of them."""
    words = [token.lower() for token, _, _ in _tokens(text) if token[0].isalnum()]
    return words + [a + b for a, b in pairwise(words) if _HAN.match(a) and _HAN.match(b)]


def _weights(contexts: Iterable[str]) -> dict[str, float]:
    """Inverse document frequency over the sentences of all distinct contexts."""
    counts: Counter[str] = Counter()
    n = 0
    for context in dict.fromkeys(contexts):
        for start, end in sentences(context):
            counts.update(set(_terms(context[start:end])))
            n += 1
    return {term: math.log((n + 1) / (times + 1)) for term, times in counts.items()}


def _best_sentence(question: str, context: str, weights: dict[str, float]) -> Span:
    asked = set(_terms(question))

    def shared(span: Span) -> float:
        return sum(weights.get(term, 0.0) for term in asked & set(_terms(context[slice(*span)])))

    return max(sentences(context), key=lambda span: (shared(span), -span[0]), default=(0, len(context)))


def _best_span(question: str, context: str, sentence: Span, weights: dict[str, float], looks: _Looks) -> Span:
    """The span of one sentence of a context, in characters of the context."""
    tokens = _tokens(context)
    inside = [place for place, (_, start, end) in enumerate(tokens) if sentence[0] <= start and end <= sentence[1]]
    if not inside:
        return sentence
    asked = set(_terms(question))
    shared = [weights.get(token.lower(), 0.0) if token.lower() in asked else 0.0 for token, _, _ in tokens]
    said = [(place, shared[place]) for place in inside if shared[place]]
    near = {place: sum(weight / (1 + abs(place - other)) for other, weight in said) for place in inside}
    most = max(near.values()) or 1.0
    kinds = [_EDGE, *(_kind(token, looks.frequent) for token, _, _ in tokens), _EDGE]
    coarse = [_EDGE, *(_kind(token, frozenset()) for token, _, _ in tokens), _EDGE]
    way = _asks(question)
    first, last = looks.first.get(way, looks.first[""]), looks.last.get(way, looks.last[""])
    opens, closes = {}, {}
    for place in inside:
        i = place + 1
        before, after = _of(looks.before, kinds[i - 1]), _of(looks.after, kinds[i + 1])
        opens[place] = _of(first, kinds[i]) + before + _of(looks.opening, f"{coarse[i - 1]} {coarse[i]}")
        closes[place] = _of(last, kinds[i]) + after + _of(looks.closing, f"{coarse[i]} {coarse[i + 1]}")
    best, best_score = (inside[0], inside[-1]), -math.inf
    for start in inside:
        nearness = repeated = 0.0
        for end in range(start, min(inside[-1] + 1, start + MOST_TOKENS)):
            nearness, repeated = nearness + near[end], repeated + shared[end]
            score = NEAR * nearness / (end + 1 - start) / most - REPEATED * repeated
            score += opens[start] + closes[end] + looks.length[end - start]
            if score > best_score:
                best, best_score = (start, end), score
    return tokens[best[0]][1], tokens[best[1]][2]


def _kind(token: str, frequent: frozenset[str]) -> str:
    """A frequent token is a kind of its own; of the others, what they are made of."""
    if token.lower() in frequent:
        return f"'{token.lower()}"
    if token[0].isdigit():
        return "number"
    if not token[0].isalnum():
        return "sign"
    if _HAN.match(token):
        return "han"
    return "capital" if token[0].isupper() else "small"


def _asks(question: str) -> str:
    """How a question asks: who, how many, 多少 ..., "" for one that says nothing known."""
    match = _ASKS_ZH.search(question) or _ASKS_EN.search(question)
    return match.group().lower() if match else ""


def _looks(train: Questions) -> _Looks:
    texts = [[token for token, _, _ in _tokens(context)] for context in dict.fromkeys(train.contexts)]
    counts = Counter(token.lower() for text in texts for token in text)
    frequent = frozenset(token for token, times in counts.most_common(FREQUENT) if times >= OFTEN)
    anywhere: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for text in texts:
        anywhere.update([_EDGE, *(_kind(token, frequent) for token in text)])
        coarse = [_EDGE, *(_kind(token, frozenset()) for token in text), _EDGE]
        pairs.update(f"{a} {b}" for a, b in pairwise(coarse))
    first: defaultdict[str, Counter[str]] = defaultdict(Counter, {"": Counter()})
    last: defaultdict[str, Counter[str]] = defaultdict(Counter, {"": Counter()})
    before, after, opening, closing = (Counter[str]() for _ in range(4))
    length: Counter[int] = Counter()
    for question, context, answers in zip(train.questions, train.contexts, train.answers, strict=True):
        found = _around(context, next(iter(answers), ""))
        if found is None:
            continue
        size, around = found
        length[min(size, MOST_TOKENS) - 1] += 1
        fine = [_kind(token, frequent) if token else _EDGE for token in around]
        plain = [_kind(token, frozenset()) if token else _EDGE for token in around]
        before[fine[0]] += 1
        after[fine[3]] += 1
        opening[f"{plain[0]} {plain[1]}"] += 1
        closing[f"{plain[2]} {plain[3]}"] += 1
        for way in {_asks(question), ""}:
            first[way][fine[1]] += 1
            last[way][fine[2]] += 1
    total = sum(length.values()) + MOST_TOKENS
    return _Looks(
        frequent,
        {way: _odds(one, anywhere) for way, one in first.items()},
        {way: _odds(one, anywhere) for way, one in last.items()},
        _odds(before, anywhere),
        _odds(after, anywhere),
        _odds(opening, pairs),
        _odds(closing, pairs),
        [math.log((length[tokens] + 1) / total) for tokens in range(MOST_TOKENS)],
    )


def _around(context: str, answer: str) -> tuple[int, tuple[str, str, str, str]] | None:
    """How many tokens an answer has, and the token before it, its first, its last and the one behind it, where it
    stands first in its context; None where it does not."""
    place = context.find(answer)
    inside = _tokens(answer)
    if place < 0 or not inside:
        return None
    left, right = _tokens(context[:place]), _tokens(context[place + len(answer) :])
    edges = (left[-1][0] if left else "", inside[0][0], inside[-1][0], right[0][0] if right else "")
    return len(inside), edges


def _odds(here: Counter[str], anywhere: Counter[str]) -> _Odds:
    """The odds of every kind; as many of each are added to what was seen as `anywhere` has in ADDED tokens."""
    n, most = here.total() + ADDED, max(1, anywhere.total())
    table = {}
    for kind in {*here, *anywhere}:
        share = max(anywhere[kind], 1) / most
        table[kind] = math.log((here[kind] + ADDED * share) / n / share)
    return table | {"": 0.0}


def _of(odds: _Odds, kind: str) -> float:
    return odds.get(kind, odds[""])
