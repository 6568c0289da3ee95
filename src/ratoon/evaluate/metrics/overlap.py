"""How much a text shares with its references: BLEU, chrF and METEOR of translations, ROUGE of summaries.

Decides which words and characters are compared, and that BLEU and chrF are resampled through what each sentence
counts, never by tokenizing anew. BLEU and chrF are sacrebleu's, 0 to 100, their signatures verbatim; METEOR is
`meteor.py`'s and ROUGE rouge-score's, both 0 to 1, means over records. `language` is that of the texts: "zh" compares
Chinese characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

from ratoon.base.errors import DataError
from ratoon.evaluate.metrics.counts import expect_pairs
from ratoon.evaluate.metrics.libraries import library
from ratoon.evaluate.metrics.meteor import ALPHA, BETA, GAMMA, Synonyms, meteor, porter, wordnet_synonyms
from ratoon.evaluate.metrics.value import Figures, Floats, Head, Measured, measured, side_by_side, summed

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
CHARACTER_ORDER, CHARACTER_BETA = 6, 2
"""chrF2: n-grams of up to six characters, recall twice as heavy as precision (Popović 2015)."""


def translation(
    references: Sequence[Sequence[str]],
    predicted: Sequence[str],
    language: str,
    *,
    words_given: bool = False,
    synonyms: Synonyms | None = None,
    seed: int = 1,
    resamples: int = 1000,
) -> Measured:
    """BLEU (the main figure; Papineni et al. 2002), chrF (Popović 2015), chrF++ (2017) and METEOR (Lavie & Agarwal
    2007), with one or several references a record.

    `language` "zh" takes sacrebleu's tokenizer zh, any other 13a; METEOR compares the same tokens, or with
    `words_given` the words that spaces part, stems them by Porter's rules (no Chinese character is changed by these)
    and takes WordNet's synonyms for English where NLTK finds them, or `synonyms`; its signature says which.
    per_record: `bleu` (of the sentence, effective order), `chrf`, `chrfpp`, `meteor`. Raises `DataError` for a record
    without reference, `ConfigError` where sacrebleu or NLTK is missing.
    """
    n = expect_pairs(references, predicted)
    _expect_references(references)
    metrics = library("sacrebleu.metrics")
    tokens = "zh" if language == "zh" else "13a"
    bleu = metrics.BLEU(tokenize=tokens, force=True)
    plain = metrics.CHRF(char_order=CHARACTER_ORDER, beta=CHARACTER_BETA)
    words = metrics.CHRF(char_order=CHARACTER_ORDER, beta=CHARACTER_BETA, word_order=2)
    parts: list[Figures] = []
    heads, per_record = [], {}
    for name, metric in (("bleu", bleu), ("chrf", plain), ("chrfpp", words)):
        sums_NS = _sentence_sums(metric, references, predicted)
        formula = partial(_bleu, metrics.BLEU, False) if metric is bleu else _chrf
        parts.append(summed(sums_NS, formula))
        heads.append(Head(name, str(metric.get_signature())))
        sentence = partial(_bleu, metrics.BLEU, True) if metric is bleu else _chrf
        per_record[name] = sentence(sums_NS)[:, 0].tolist()
    if synonyms is None and language == "en":
        synonyms, source = wordnet_synonyms(), "wordnet"
    else:
        source = "given"
    cut = str.split if words_given else _Tokens(bleu.tokenizer)
    stem = porter()
    meteor_N = np.array(
        [meteor([cut(one) for one in given], cut(text), stem, synonyms) for given, text in _rows(references, predicted)]
    )
    parts.append(_mean(meteor_N[:, None]))
    told = f"meteor|alpha:{ALPHA}|beta:{BETA:g}|gamma:{GAMMA}|tok:{'given' if words_given else tokens}|stem:porter"
    has = "no" if synonyms is None else "yes" if source == "wordnet" else "given"
    heads.append(Head("meteor", f"{told}|wordnet={has}|nltk:{library('nltk').__version__}"))
    per_record["meteor"] = meteor_N.tolist()
    return measured(side_by_side(*parts), n, heads, seed=seed, resamples=resamples, per_record=per_record)


def summaries(
    references: Sequence[Sequence[str]],
    predicted: Sequence[str],
    language: str,
    *,
    stemmer: bool = True,
    words_given: bool = False,
    seed: int = 1,
    resamples: int = 1000,
) -> Measured:
    """ROUGE-1 (the main figure), ROUGE-2, ROUGE-L and ROUGE-Lsum, the F1 of each (Lin 2004), with one or several
    references a record, the best of which counts for each figure.

    Equal to rouge-score's: lower case, letters a to z and digits, stemmed by Porter's rules (words longer than three
    letters) unless `stemmer` is off. `language` "zh": each Chinese character is a token, runs of letters and digits
    are one, nothing is stemmed; with `words_given` the words that spaces part are the tokens instead. ROUGE-Lsum takes
    lines for sentences, so that it is ROUGE-L where there are no line breaks.
    Raises `DataError` for a record without reference, `ConfigError` where rouge-score is missing.
    """
    n = expect_pairs(references, predicted)
    _expect_references(references)
    rouge = library("rouge_score.rouge_scorer")
    own = _Split() if words_given else _Characters() if language == "zh" else None
    many = rouge.RougeScorer(list(ROUGE), use_stemmer=stemmer, tokenizer=own)
    flat = rouge.RougeScorer(list(ROUGE[:3]), use_stemmer=stemmer, tokenizer=own)
    table_NM = np.zeros((n, len(ROUGE)))
    for number, (given, text) in enumerate(_rows(references, predicted)):
        # Without line breaks Lsum is L: the longest common subsequence need not be looked for twice.
        lines = "\n" in text or any("\n" in one for one in given)
        scores = (many if lines else flat).score_multi(given, text)
        table_NM[number] = [scores[name if lines or name in ROUGE[:3] else "rougeL"].fmeasure for name in ROUGE]
    cut = "given" if words_given else "characters" if language == "zh" else "rouge-score"
    stems = "yes" if stemmer and own is None else "no"
    version = metadata.version("rouge-score")
    heads = [
        Head(name, f"{name}|f1|tok:{cut}|stem:{stems}|sentences:lines|references:best|rouge-score:{version}")
        for name in ROUGE
    ]
    per_record = {name: table_NM[:, place].tolist() for place, name in enumerate(ROUGE)}
    return measured(_mean(table_NM), n, heads, seed=seed, resamples=resamples, per_record=per_record)


def characters(text: str) -> list[str]:
    """Chinese tokens: each Chinese character (CJK ideographs of every block) one, runs of other letters and digits one
    each in lower case; punctuation and spaces part them."""
    return _CHINESE_OR_WORD.findall(text.lower())


_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_CHINESE_OR_WORD = re.compile(rf"[{_CHINESE}]|[^\W_{_CHINESE}]+")


class _Characters:
    """`characters`, in the form that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return characters(text)


class _Split:
    """Words parted by spaces, in the form that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return text.lower().split()


class _Tokens:
    """The tokens of one of sacrebleu's tokenizers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[str]:
        return str(self._tokenizer(text.rstrip())).split()


def _sentence_sums(metric: Any, references: Sequence[Sequence[str]], predicted: Sequence[str]) -> Floats:
    """What each sentence adds to sacrebleu's corpus score (N, S). sacrebleu wants the references as columns, with None
    where a record has fewer."""
    most = max(len(given) for given in references)
    columns = [[given[number] if number < len(given) else None for given in references] for number in range(most)]
    return np.array(metric._extract_corpus_statistics(predicted, columns), dtype=np.float64)


def _bleu(kind: Any, effective_order: bool, sums_RS: Floats) -> Floats:
    """BLEU of sums (R, S): system length, reference length, hits of n = 1 to 4, n-grams of n = 1 to 4."""
    scores = [
        kind.compute_bleu(
            correct=row[2:6].tolist(),
            total=row[6:10].tolist(),
            sys_len=int(row[0]),
            ref_len=int(row[1]),
            smooth_method="exp",
            effective_order=effective_order,
        ).score
        for row in sums_RS
    ]
    return np.array(scores, dtype=np.float64)[:, None]


def _chrf(sums_RS: Floats) -> Floats:
    """chrF of sums (R, S): for each order n-grams of the prediction, of the reference, and common ones. The mean
    precision and recall over the orders that both sides have (Popović 2015; sacrebleu's eff:yes)."""
    ours, theirs, common = (sums_RS[:, start::3] for start in range(3))
    there = (ours > 0) & (theirs > 0)
    orders_R = np.maximum(there.sum(axis=1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision_R = np.where(there, common / ours, 0.0).sum(axis=1) / orders_R
        recall_R = np.where(there, common / theirs, 0.0).sum(axis=1) / orders_R
        weight = CHARACTER_BETA**2
        score_R = (1 + weight) * precision_R * recall_R / (weight * precision_R + recall_R)
    found_R: Floats = np.nan_to_num(100 * score_R)
    return found_R[:, None]


def _mean(table_NM: Floats) -> Figures:
    sums_NS = np.concatenate([table_NM, np.ones((len(table_NM), 1))], axis=1)
    return summed(sums_NS, lambda sums_RS: sums_RS[:, :-1] / sums_RS[:, -1:])


def _rows(references: Sequence[Sequence[str]], predicted: Sequence[str]) -> list[tuple[Sequence[str], str]]:
    return list(zip(references, predicted, strict=True))


def _expect_references(references: Sequence[Sequence[str]]) -> None:
    for number, given in enumerate(references, start=1):
        if not given or isinstance(given, str):
            raise DataError(
                "a record has no reference" if not given else "the references of a record are a text, not a list",
                where=f"record {number}",
                expected="a list of one or more reference texts for each record",
            )
