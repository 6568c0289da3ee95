"""How well questions are answered: exact match and F1 against the best reference, as the official scripts count.

Decides when two answers are the same. English follows SQuAD's evaluate-v1.1, Chinese CMRC 2018's evaluate v5. Figures
are fractions, 0 to 1 (the scripts print percent).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ratoon.base.errors import ConfigError
from ratoon.evaluate.metrics.counts import expect_pairs
from ratoon.evaluate.metrics.libraries import library
from ratoon.evaluate.metrics.value import Head, Measured, measured, summed

CMRC_SIGNS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
"""The signs that CMRC 2018 passes over: its list also names the double ellipsis, which no single character equals."""


def answers(
    references: Sequence[Sequence[str]],
    predicted: Sequence[str],
    language: str = "en",
    *,
    seed: int = 1,
    resamples: int = 1000,
) -> Measured:
    """F1 (the main figure) and exact match, each the best over a record's references; `language` is "en" or "zh".

    English: lower case, without punctuation and articles; F1 over words as a bag (Rajpurkar et al. 2016, § 6.1).
    Chinese (Cui et al. 2019, § 4.1): Chinese characters and runs of others are the units, punctuation is passed over,
    and F1 counts the longest common *substring* (the script names it a subsequence), so one gap halves it; `average`
    of the two is the official ranking. A record without a reference has no answer: right is a prediction of which
    nothing is left to compare (SQuAD 2.0), and only that.
    Raises `ConfigError` for another language, and for Chinese where NLTK is missing.
    """
    n = expect_pairs(references, predicted)
    exact, overlap, sign = _rules(language)
    records = list(zip(references, predicted, strict=True))
    matched_N = np.array([_best(exact, exact, given, answer) for given, answer in records])
    f1_N = np.array([_best(exact, overlap, given, answer) for given, answer in records])
    none = sum(not given for given in references)
    note = f"{none} of {n} records have no answer: an empty prediction is right" if none else None
    columns = [f1_N, matched_N]
    heads = [Head("f1", f"f1|{sign}", note=note), Head("exact_match", f"exact match|{sign}", note=note)]
    if language == "zh":
        columns.append((f1_N + matched_N) / 2)
        heads.append(Head("average", f"mean of f1 and exact match|{sign}", note=note))
    figures = summed(np.stack([*columns, np.ones(n)], axis=1), lambda sums_RS: sums_RS[:, :-1] / sums_RS[:, -1:])
    per_record = {"f1": f1_N.tolist(), "exact_match": matched_N.tolist()}
    return measured(figures, n, heads, seed=seed, resamples=resamples, per_record=per_record)


def squad_normal(text: str) -> str:
    """A text as SQuAD compares it: lower case, no ASCII punctuation, no English articles, single spaces."""
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def cmrc_units(text: str) -> list[str]:
    """A text as CMRC 2018 cuts it: each Chinese character (U+4E00 to U+9FA5) a unit, what stands between them cut into
    words by NLTK's word tokenizer, the signs of `CMRC_SIGNS` passed over.

    NLTK's sentence splitter, a model to be fetched, is left out: it changes the units only where a full stop ends a
    sentence inside a run of foreign words.
    """
    words = library("nltk.tokenize").word_tokenize
    bare = "".join(character for character in text.lower().strip() if character not in CMRC_SIGNS)
    units: list[str] = []
    for run in _HAN.split(bare):
        if _HAN.fullmatch(run):
            units.append(run)
        elif run:
            units += words(run, preserve_line=True)
    return units


def longest_common_run(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest run of units that stands in both."""
    longest, before = 0, [0] * (len(other) + 1)
    for unit in one:
        row = [0] * (len(other) + 1)
        for place, opposite in enumerate(other, start=1):
            if unit == opposite:
                row[place] = before[place - 1] + 1
        longest, before = max(longest, *row), row
    return longest


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_HAN = re.compile(r"([\u4e00-\u9fa5])")
_Rule = Callable[[str, str], float]


def _rules(language: str) -> tuple[_Rule, _Rule, str]:
    if language == "en":
        return _squad_match, _squad_f1, "squad 1.1|references:best|language:en"
    if language == "zh":
        version = library("nltk").__version__
        sign = f"cmrc2018 v5|longest common substring|words:nltk {version} without sentence splitter"
        return _cmrc_match, _cmrc_f1, f"{sign}|references:best|language:zh"
    raise ConfigError(f"answers in '{language}' cannot be compared", expected="the language en or zh")


def _best(exact: _Rule, rule: _Rule, references: Sequence[str], answer: str) -> float:
    if not references:
        return exact("", answer)
    return max(rule(reference, answer) for reference in references)


def _squad_match(reference: str, answer: str) -> float:
    return float(squad_normal(reference) == squad_normal(answer))


def _squad_f1(reference: str, answer: str) -> float:
    there, given = squad_normal(reference).split(), squad_normal(answer).split()
    return _f1((Counter(there) & Counter(given)).total(), len(there), len(given))


def _cmrc_match(reference: str, answer: str) -> float:
    one, other = ([sign for sign in text.lower().strip() if sign not in CMRC_SIGNS] for text in (reference, answer))
    return float(one == other)


def _cmrc_f1(reference: str, answer: str) -> float:
    there, given = cmrc_units(reference), cmrc_units(answer)
    return _f1(longest_common_run(there, given), len(there), len(given))


def _f1(common: int, there: int, given: int) -> float:
    """2 P R / (P + R) with P = common / given, R = common / there; 0 where nothing is common."""
    return 2 * common / (there + given) if common else 0.0
