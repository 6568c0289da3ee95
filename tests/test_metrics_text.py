"""Answers, translations and summaries: against the official rules as brute force, sacrebleu, NLTK and rouge-score."""

from __future__ import annotations

import gzip
import json
import os
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nltk
import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.meteor_score import meteor_score
from rouge_score import rouge_scorer

from ratoon.base.errors import ConfigError, DataError
from ratoon.base.seeds import stream
from ratoon.evaluate.metrics.answers import answers, cmrc_units, longest_common_run, squad_normal
from ratoon.evaluate.metrics.meteor import meteor, porter, wordnet_synonyms
from ratoon.evaluate.metrics.overlap import ROUGE, characters, summaries, translation
from ratoon.evaluate.metrics.value import Measured, bootstrap, compare

ENGLISH = [
    "The quick brown foxes were jumping over the lazy dogs.",
    "Prices rose by 3.5% in May, the ministry said (after a fall).",
    "It is a guide to action which ensures that the military always obeys the commands of the party.",
    "He didn't know what he was doing; nobody did!",
    "Cats.",
    "A small house on a hill",
]
CHINESE = [
    "今天天气很好，我们去公园散步。",
    "央行宣布下调存款准备金率0.5个百分点。",
    "他说：“我不知道GPT-2是什么。”",
    "猫。",
    "这部手机的电池可以用两天",
    "股市周三收盘上涨3.2%，创下新高",
]


def value(found: Measured, name: str) -> float:
    got = found.value(name).value
    assert got is not None
    return got


def spoilt(texts: list[str], seed: int) -> list[str]:
    """The texts as a poor model would give them: units dropped, swapped and doubled, one text empty."""
    random = stream(seed, "spoilt")
    out = []
    for text in texts:
        units, gap = (text.split(), " ") if " " in text else (list(text), "")
        kept = [unit for unit in units for _ in range(random.choice([0, 1, 1, 1, 1, 2]))]
        if len(kept) > 2:
            at = int(random.integers(0, len(kept) - 1))
            kept[at], kept[at + 1] = kept[at + 1], kept[at]
        out.append(gap.join(kept))
    out[0] = ""
    return out


def several(texts: list[str], seed: int) -> list[list[str]]:
    """One to three references a record."""
    others = [*spoilt(texts, seed)[1:], texts[-1]]
    return [[text, *[others[i]] * (i % 2), *[texts[i - 1]] * (i % 3 == 1)] for i, text in enumerate(texts)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


# Answers


def squad_words(text: str) -> list[str]:
    """SQuAD 1.1's normalisation, rule by rule."""
    lower = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", lower).split()


def squad_scores(references: list[str], answer: str) -> tuple[float, float]:
    """F1 and exact match as evaluate-v1.1 defines them: for each reference, the best of each."""
    given, f1, exact = squad_words(answer), [], []
    for reference in references:
        there = squad_words(reference)
        same = sum((Counter(given) & Counter(there)).values())
        precision, recall = same / max(len(given), 1), same / max(len(there), 1)
        f1.append(2 * precision * recall / (precision + recall) if same else 0.0)
        exact.append(float(" ".join(given) == " ".join(there)))
    return max(f1), max(exact)


SIGNS = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"


def cmrc_segments(text: str) -> list[str]:
    """CMRC 2018's mixed segmentation, character by character; NLTK's words for what is not Chinese."""
    out: list[str] = []
    held = ""
    for character in text.lower().strip():
        if character in SIGNS:
            continue
        if "\u4e00" <= character <= "\u9fa5":
            out += [*nltk.word_tokenize(held, preserve_line=True), character]
            held = ""
        else:
            held += character
    return out + nltk.word_tokenize(held, preserve_line=True)


def cmrc_scores(references: list[str], answer: str) -> tuple[float, float]:
    """F1 by the longest run of segments that both hold, found by trying all runs; exact match without signs."""
    given, f1, exact = cmrc_segments(answer), [], []
    bare = lambda text: "".join(c for c in text.lower().strip() if c not in SIGNS)  # noqa: E731
    for reference in references:
        there = cmrc_segments(reference)
        runs = {tuple(there[a:b]) for a in range(len(there)) for b in range(a + 1, len(there) + 1)}
        mine = (tuple(given[a:b]) for a in range(len(given)) for b in range(a + 1, len(given) + 1))
        longest = max((len(run) for run in mine if run in runs), default=0)
        precision, recall = longest / max(len(given), 1), longest / max(len(there), 1)
        f1.append(2 * precision * recall / (precision + recall) if longest else 0.0)
        exact.append(float(bare(reference) == bare(answer)))
    return max(f1), max(exact)


def check_answers(references: list[list[str]], predicted: list[str], language: str) -> Measured:
    rule = squad_scores if language == "en" else cmrc_scores
    theirs = np.array([rule(given, answer) for given, answer in zip(references, predicted, strict=True)])
    found = answers(references, predicted, language, resamples=20)
    assert found.per_record["f1"] == pytest.approx(theirs[:, 0], abs=1e-12)
    assert found.per_record["exact_match"] == pytest.approx(theirs[:, 1], abs=1e-12)
    assert [value(found, "f1"), value(found, "exact_match")] == pytest.approx(theirs.mean(axis=0), abs=1e-12)
    return found


@pytest.mark.parametrize(
    ("file", "language"),
    [("squad_v11/xquad.en.json.gz", "en"), ("clue/cmrc2018/cmrc2018_trial.json.gz", "zh")],
)
def test_real_answers_are_scored_by_the_official_rules(shared_data: Path, file: str, language: str) -> None:
    data = json.loads(gzip.decompress((shared_data / file).read_bytes()))["data"]
    questions = [qa for article in data for paragraph in article["paragraphs"] for qa in paragraph["qas"]][:250]
    references = [[answer["text"] for answer in qa["answers"]] for qa in questions]
    predicted = spoilt([given[0] for given in references], 3)
    predicted[5:40] = [given[-1].upper() + "。" for given in references[5:40]]
    found = check_answers(references, predicted, language)
    assert 0.3 < value(found, "f1") < 0.98 and value(found, "exact_match") > 0.1


@given(
    st.lists(st.text("aA thE.,n的国 '-9。", max_size=14), min_size=1, max_size=3),
    st.text("aA thE.,n的国'-", max_size=14),
)
def test_any_answer_is_scored_by_the_official_rules(references: list[str], answer: str) -> None:
    for language in ("en", "zh"):
        found = check_answers([references], [answer], language)
        assert 0 <= value(found, "exact_match") <= 1
        check_answers([references] * 2, [answer, references[0]], language)


def test_answers_by_hand() -> None:
    assert squad_normal("The  Theatre, an-a 'U.S.'") == "theatre ana us"
    found = answers([["the Eiffel Tower", "Eiffel"]], ["Eiffel tower!"])
    assert value(found, "f1") == 1.0 and value(found, "exact_match") == 1.0
    gap = answers([["北京大学"]], ["北京的大学"], "zh")
    assert value(gap, "f1") == pytest.approx(2 * 2 / (4 + 5)) and value(gap, "average") == value(gap, "f1") / 2
    assert cmrc_units("GPT-2 是，Model 3。") == ["gpt2", "是", "model", "3"]
    assert longest_common_run("abcde", "xbcdy") == 3 and longest_common_run("", "a") == 0


def test_records_without_an_answer_want_nothing() -> None:
    bare = answers([[], []], ["The.", "the no"])
    assert bare.per_record["f1"] == bare.per_record["exact_match"] == [1.0, 0.0], (
        "nothing to compare is left of the first"
    )
    found = answers([[], [], ["x"]], ["", "no", "x"])
    assert found.per_record["f1"] == [1.0, 0.0, 1.0] and found.values[0].note is not None
    assert found.values[0].note.startswith("2 of 3 records have no answer")
    with pytest.raises(ConfigError, match="'fr' cannot be compared"):
        answers([["a"]], ["a"], "fr")


# BLEU and chrF


def columns(references: list[list[str]]) -> list[list[str | None]]:
    most = max(map(len, references))
    return [[given[i] if i < len(given) else None for given in references] for i in range(most)]


def their_metrics(language: str) -> dict[str, Any]:
    tokens = "zh" if language == "zh" else "13a"
    bleu = sacrebleu.metrics.BLEU(tokenize=tokens, force=True)
    return {"bleu": bleu, "chrf": sacrebleu.metrics.CHRF(), "chrfpp": sacrebleu.metrics.CHRF(word_order=2)}


def check_translation(references: list[list[str]], predicted: list[str], language: str) -> Measured:
    found = translation(references, predicted, language, resamples=20)
    for name, metric in their_metrics(language).items():
        theirs = metric.corpus_score(predicted, columns(references))
        assert value(found, name) == pytest.approx(theirs.score, abs=1e-9)
        assert found.value(name).signature == str(metric.get_signature())
    sentence = sacrebleu.metrics.BLEU(tokenize="zh" if language == "zh" else "13a", effective_order=True)
    by_sentence = [sentence.sentence_score(a, b).score for a, b in zip(predicted, references, strict=True)]
    assert found.per_record["bleu"] == pytest.approx(by_sentence, abs=1e-9)
    chrf = sacrebleu.metrics.CHRF()
    by_sentence = [chrf.sentence_score(a, b).score for a, b in zip(predicted, references, strict=True)]
    assert found.per_record["chrf"] == pytest.approx(by_sentence, abs=1e-9)
    return found


@pytest.mark.parametrize(("texts", "language"), [(ENGLISH, "en"), (CHINESE, "zh")], ids=["en", "zh"])
def test_bleu_and_chrf_are_sacrebleus(texts: list[str], language: str) -> None:
    single = check_translation([[text] for text in texts], spoilt(texts, 1), language)
    assert "nrefs:1|" in single.values[0].signature and f"tok:{'zh' if language == 'zh' else '13a'}" in (
        single.values[0].signature
    )
    references = several(texts, 2)
    references[2].append(spoilt(texts, 1)[2])
    many = check_translation(references, spoilt(texts, 1), language)
    assert "nrefs:var|" in many.values[0].signature
    assert value(many, "meteor") > value(single, "meteor") > 0
    same = check_translation([[text] for text in texts], texts, language)
    assert value(same, "bleu") == pytest.approx(100) and value(same, "chrf") == pytest.approx(100)
    nothing = check_translation([[text] for text in texts], [""] * len(texts), language)
    assert [one.value for one in nothing.values] == [0.0] * 4


@given(st.lists(st.tuples(st.text("ab c.的国", max_size=9), st.text("ab c.的国", max_size=9)), min_size=1, max_size=4))
def test_any_texts_are_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    check_translation([[a] for a, _ in pairs], [b for _, b in pairs], "zh")


def test_real_translations_are_sacrebleus(shared_data: Path) -> None:
    lines = gzip.decompress((shared_data / "en_zh_tatoeba" / "cmn.txt.gz").read_bytes()).decode().splitlines()
    pairs = [line.split("\t")[:2] for line in lines[5000:25000:100]]
    for side, language in ((0, "en"), (1, "zh")):
        texts = [pair[side] for pair in pairs]
        found = check_translation([[text] for text in texts], spoilt(texts, 4), language)
        assert 20 < value(found, "bleu") < 95


@pytest.mark.parametrize("name", ["bleu", "chrf", "chrfpp", "meteor"])
def test_intervals_of_texts_are_those_of_scoring_anew(name: str) -> None:
    """The corpus score of the drawn sentences, tokenized anew each time, has the same interval as our sums."""
    texts = ENGLISH * 3
    predicted = spoilt(texts, 5)
    found = translation([[text] for text in texts], predicted, "en", seed=2, resamples=60)

    def anew(index: np.ndarray) -> float:
        if name == "meteor":
            return float(np.mean([found.per_record["meteor"][i] for i in index]))
        metric = their_metrics("en")[name]
        return float(metric.corpus_score([predicted[i] for i in index], [[texts[i] for i in index]]).score)

    assert found.value(name).interval == pytest.approx(bootstrap(anew, len(texts), seed=2, resamples=60), abs=1e-8)


def test_two_translators_are_compared() -> None:
    texts = ENGLISH * 4
    references = [[text] for text in texts]
    poor, good = translation(references, spoilt(texts, 6), "en"), translation(references, [*texts[:-1], "Cats"], "en")
    found = compare(good, poor, "bleu", resamples=200)
    assert found.difference == pytest.approx(value(good, "bleu") - value(poor, "bleu"))
    assert found.p_value is not None and found.p_value < 0.05 and compare(poor, poor, "chrf").p_value == 1.0


# METEOR


class FewSynonyms:
    """A WordNet of a few words, in the form that NLTK's METEOR asks."""

    GROUPS = [
        ("big", "large", "huge"),
        ("dog", "hound"),
        ("quick", "fast", "ran"),
        ("large", "ample"),
        ("hous", "home_of"),
    ]

    class _Named:
        def __init__(self, name: str) -> None:
            self._name = name

        def name(self) -> str:
            return self._name

    class _Synset:
        def __init__(self, group: tuple[str, ...]) -> None:
            self._group = group

        def lemmas(self) -> list[Any]:
            return [FewSynonyms._Named(name) for name in self._group]

    def synsets(self, word: str) -> list[Any]:
        return [self._Synset(group) for group in self.GROUPS if word in group]


def few(word: str) -> set[str]:
    return {name for group in FewSynonyms.GROUPS if word in group for name in group if "_" not in name}


CUT = str.split
WORDS = CUT("big large huge ample dog dogs hound quick fast house Houses running runs ran the The a 的 国 generously")


@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=10), min_size=1, max_size=3), st.lists(st.sampled_from(WORDS))
)
def test_meteor_is_nltks(references: list[list[str]], predicted: list[str]) -> None:
    ours = meteor(references, predicted, porter(), few)
    assert ours == pytest.approx(meteor_score(references, predicted, wordnet=FewSynonyms()), abs=1e-12)


class NoSynonyms:
    def synsets(self, word: str) -> list[Any]:
        return []


@given(st.lists(st.sampled_from(WORDS), max_size=12), st.lists(st.sampled_from(WORDS), max_size=12))
def test_meteor_without_wordnet_is_nltks(reference: list[str], predicted: list[str]) -> None:
    ours = meteor([reference], predicted, porter(), None)
    assert ours == pytest.approx(meteor_score([reference], predicted, wordnet=NoSynonyms()), abs=1e-12)


def test_meteor_by_hand() -> None:
    """One chunk of three; and the last-to-last alignment, which lets the two "the" cross: six chunks of six."""
    reference, predicted = ["the", "cat", "sat", "on", "the", "mat"], ["on", "the", "mat", "sat", "the", "cat"]
    assert meteor([["the", "cat", "sat"]], ["the", "cat", "sat"], porter(), None) == pytest.approx(1 - 0.5 / 27)
    assert meteor([reference], predicted, porter(), None) == 0.5
    assert meteor([["dogs"]], ["dog"], porter(), None) == 0.5 and meteor([["x"]], [], porter(), None) == 0.0
    assert meteor([["the", "dog"]], CUT("the The dog"), porter(), None) == pytest.approx(
        (1 - 0.5 / 8) * (2 / 3) / (0.9 * 2 / 3 + 0.1)
    ), "capitals are the same form: the last one goes with the reference's, so there is one chunk"
    assert meteor([CUT("fast x ran dog")], CUT("quick dog"), porter(), few) == pytest.approx(
        (1 - 0.5 / 8) * 0.5 / (0.9 + 0.1 * 0.5)
    ), "of two synonyms the last is taken, so there is one chunk"


def test_meteor_of_texts_says_how_it_cuts_and_what_it_knows() -> None:
    texts, predicted = CHINESE, spoilt(CHINESE, 7)
    found = translation([[text] for text in texts], predicted, "zh", resamples=10)
    cut = sacrebleu.metrics.BLEU(tokenize="zh").tokenizer
    pairs = [(cut(text).split(), cut(guess).split()) for text, guess in zip(texts, predicted, strict=True)]
    theirs = [meteor_score([one], other, wordnet=NoSynonyms()) for one, other in pairs]
    assert found.per_record["meteor"] == pytest.approx(theirs, abs=1e-9)
    assert "|tok:zh|" in found.value("meteor").signature and "wordnet=no" in found.value("meteor").signature
    words = translation([["今天 天气 很 好"]], ["天气 很 好"], "zh", words_given=True, resamples=10)
    assert value(words, "meteor") == pytest.approx(
        meteor_score([["今天", "天气", "很", "好"]], ["天气", "很", "好"], wordnet=NoSynonyms()), abs=1e-9
    )
    assert "|tok:given|" in words.value("meteor").signature
    told = translation([["a big dog"]], ["a huge hound"], "en", synonyms=few, resamples=10)
    assert "wordnet=given" in told.value("meteor").signature and value(told, "meteor") > 0.9
    has = "yes" if wordnet_synonyms() else "no"
    assert f"wordnet={has}|" in translation([["a"]], ["a"], "en", resamples=10).value("meteor").signature


def small_wordnet(folder: Path, groups: list[list[str]]) -> None:
    """A WordNet of a few noun synsets in the format of its database files (wndb(5WN)), where NLTK looks for it."""
    folder.mkdir(parents=True)
    for name in ("cntlist.rev", "index.sense", "index.adj", "index.adv", "index.verb", "data.adv", "data.verb"):
        (folder / name).write_text("")
    for part in ("adj", "adv", "noun", "verb"):
        (folder / f"{part}.exc").write_text("")
    header = "  1 WordNet 3.0 Copyright 2006 by nobody.\n"
    (folder / "data.adj").write_text(header)
    (folder / "lexnames").write_text("00\tnoun.Tops\t1\n")
    data, places = header, {}
    for group in groups:
        words = " ".join(f"{word} 0" for word in group)
        places |= {word: [*places.get(word, []), len(data)] for word in group}
        data += f"{len(data):08d} 00 n {len(group):02x} {words} 000 | a group of words\n"
    (folder / "data.noun").write_text(data)
    lines = [
        f"{word} n {len(at)} 0 {len(at)} 0 {' '.join(f'{place:08d}' for place in at)}" for word, at in places.items()
    ]
    (folder / "index.noun").write_text("\n".join(lines) + "\n")


WITH_WORDNET = """
from nltk.translate.meteor_score import meteor_score
from ratoon.evaluate.metrics.meteor import wordnet_synonyms
from ratoon.evaluate.metrics.overlap import translation
synonyms = wordnet_synonyms()
assert synonyms("dog") == {"dog", "hound", "cad"}, synonyms("dog")
reference, predicted = "the dog ran to a house", "the hound ran to a home"
found = translation([[reference]], [predicted], "en", resamples=5).value("meteor")
theirs = meteor_score([reference.split()], predicted.split())
without = translation([[reference]], [predicted], "zh", resamples=5).value("meteor")
assert abs(found.value - theirs) < 1e-12 and found.value > without.value > 0, (found, theirs, without)
assert "wordnet=yes" in found.signature and "wordnet=no" in without.signature
"""


def test_wordnets_synonyms_are_those_nltk_takes(tmp_path: Path) -> None:
    """NLTK's own reader on a small WordNet: METEOR finds it, says so, and is NLTK's."""
    groups = [["dog", "hound"], ["dog", "cad", "blind_dog"], ["hous", "home"]]
    small_wordnet(tmp_path / "corpora" / "wordnet", groups)
    environment = dict(os.environ, NLTK_DATA=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", WITH_WORDNET], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# ROUGE


def check_english(references: list[list[str]], predicted: list[str], stemmer: bool) -> Measured:
    scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=stemmer)
    theirs = [scorer.score_multi(given, text) for given, text in zip(references, predicted, strict=True)]
    found = summaries(references, predicted, "en", stemmer=stemmer, resamples=20)
    for name in ROUGE:
        assert found.per_record[name] == pytest.approx([one[name].fmeasure for one in theirs], abs=1e-12)
        assert value(found, name) == pytest.approx(np.mean([one[name].fmeasure for one in theirs]), abs=1e-12)
        assert f"stem:{'yes' if stemmer else 'no'}|" in found.value(name).signature
    return found


@pytest.mark.parametrize("stemmer", [True, False])
def test_rouge_is_rouge_scores(stemmer: bool) -> None:
    lined = [f"{a}\n{b}" for a, b in zip(ENGLISH, ENGLISH[1:] + ENGLISH[:1], strict=True)]
    check_english(several(ENGLISH, 8), spoilt(ENGLISH, 9), stemmer)
    found = check_english([[text] for text in lined], [*spoilt(lined, 9)[:-1], lined[0]], stemmer)
    assert value(found, "rougeLsum") != value(found, "rougeL")


SMALL = CUT("a b c d dogs dog")


@given(st.lists(st.sampled_from(SMALL)), st.lists(st.sampled_from([*SMALL, "\n"])))
def test_lsum_without_line_breaks_is_l(reference: list[str], predicted: list[str]) -> None:
    """The short cut that looks for one common subsequence instead of two."""
    check_english([[" ".join(reference)]], [" ".join(predicted)], True)


def test_real_summaries_are_rouge_scores(shared_data: Path) -> None:
    rows = rows_of(shared_data / "summ_en_scitldr" / "test.jsonl.gz")[:60]
    predicted = [row["document"][:200] for row in rows]
    references = [[row["title"], row["document"][100:300]] for row in rows]
    found = check_english(references, predicted, True)
    assert 0.1 < value(found, "rougeL") < value(found, "rouge1") < 1


def lcs(one: list[str], other: list[str]) -> int:
    """The longest common subsequence, by the definition's recursion."""
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def test_chinese_rouge_counts_characters() -> None:
    predicted = spoilt(CHINESE, 10)
    found = summaries([[text] for text in CHINESE], predicted, "zh", resamples=20)
    for i, (text, guess) in enumerate(zip(CHINESE, predicted, strict=True)):
        one, other = characters(text), characters(guess)
        for n, name in ((1, "rouge1"), (2, "rouge2")):
            grams = [Counter(zip(*[side[k:] for k in range(n)], strict=False)) for side in (one, other)]
            total = sum(sum(side.values()) for side in grams)
            f1 = 2 * sum((grams[0] & grams[1]).values()) / total if total else 0.0
            assert found.per_record[name][i] == pytest.approx(f1, abs=1e-12)
        both = len(one) + len(other)
        assert found.per_record["rougeL"][i] == pytest.approx(2 * lcs(one, other) / both if other else 0, abs=1e-12)
    assert "tok:characters|stem:no|" in found.values[0].signature and 0.3 < value(found, "rouge1") < 1


def test_chinese_tokens() -> None:
    assert characters("GPT-2是，Ａpple的𠮷 3.5%") == ["gpt", "2", "是", "ａpple", "的", "𠮷", "3", "5"]
    found = summaries([["今天 天气 很 好"]], ["天气 很 好"], "zh", words_given=True, resamples=10)
    assert value(found, "rouge1") == pytest.approx(6 / 7) and "tok:given" in found.values[0].signature


@pytest.mark.parametrize("call", [translation, summaries])
def test_records_without_references_are_refused(call: Any) -> None:
    with pytest.raises(DataError, match=r"no reference\n.*record 2"):
        call([["a"], []], ["a", "b"], "en")
    with pytest.raises(DataError, match=r"a text, not a list\n.*record 1"):
        call(["a", "b"], ["a", "b"], "en")
    with pytest.raises(DataError, match="1 records have 2 predictions"):
        call([["a"]], ["a", "b"], "en")
