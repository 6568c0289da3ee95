"""Labels and tags: against scikit-learn, seqeval, cases counted by hand, and plain loops."""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from ratoon.base.errors import DataError
from ratoon.base.seeds import stream
from ratoon.evaluate.metrics.classification import NO_LABEL, classification, multi_label
from ratoon.evaluate.metrics.tagging import spans, strict_spans, tagging
from ratoon.evaluate.metrics.value import Measured, bootstrap
from ratoon.tasks.tagging import iob2

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from seqeval import metrics as seq
    from seqeval.scheme import IOB2

pytestmark = pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.UndefinedMetricWarning", "ignore:A single label was found:UserWarning"
)
LABELS = ["体育", "财经", "科技", "房产", "games"]


def value(found: Measured, name: str) -> float:
    got = found.value(name).value
    assert got is not None
    return got


def drawn_labels(seed: int, n: int, right: float = 0.6) -> tuple[list[str], list[str]]:
    """Labels of uneven frequency and predictions of which about `right` are."""
    random = stream(seed, "labels")
    expected = random.choice(LABELS, size=n, p=[0.5, 0.2, 0.2, 0.07, 0.03])
    predicted = np.where(random.random(n) < right, expected, random.choice(LABELS, size=n))
    return expected.tolist(), predicted.tolist()


def check_averages(found: Measured, report: dict[str, dict[str, float]], prefix: str = "") -> None:
    """The nine averages against a classification report; micro is taken from accuracy where the report has that."""
    for how in ("micro", "macro", "weighted"):
        theirs = report.get(f"{how} avg")
        for what, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            ours = value(found, f"{prefix}{what}_{how}")
            assert ours == pytest.approx(theirs[key] if theirs else report["accuracy"], abs=1e-12), f"{what}_{how}"


@pytest.mark.parametrize(("seed", "n"), [(1, 300), (2, 40), (3, 12), (4, 3)])
def test_classification_is_scikit_learns(seed: int, n: int) -> None:
    expected, predicted = drawn_labels(seed, n)
    found = classification(expected, predicted, LABELS, positive="财经", resamples=20)
    assert found.values[0].name == "accuracy" and found.values[0].n == n
    assert value(found, "accuracy") == pytest.approx(sk.accuracy_score(expected, predicted), abs=1e-12)
    check_averages(found, sk.classification_report(expected, predicted, output_dict=True))
    assert value(found, "matthews") == pytest.approx(sk.matthews_corrcoef(expected, predicted), abs=1e-12)
    theirs = sk.precision_recall_fscore_support(expected, predicted, labels=LABELS)
    for row, *columns in zip(found.tables["per_class"], LABELS, *theirs, strict=True):
        ours = [row[key] for key in ("label", "precision", "recall", "f1", "support")]
        assert ours[0] == columns[0] and ours[1:] == pytest.approx(columns[1:], abs=1e-12)
    assert value(found, "f1_positive") == pytest.approx(theirs[2][1], abs=1e-12)
    confusion = sk.confusion_matrix(expected, predicted, labels=LABELS)
    assert found.tables["confusion"] == {"labels": LABELS, "counts": confusion.tolist()}
    assert found.per_record["correct"] == [float(a == b) for a, b in zip(expected, predicted, strict=True)]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=25))
def test_any_labels_are_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    expected, predicted = [a for a, _ in pairs], [b for _, b in pairs]
    found = classification(expected, predicted, ["a", "b", "c"], resamples=5)
    check_averages(found, sk.classification_report(expected, predicted, output_dict=True, zero_division=0))
    assert value(found, "matthews") == pytest.approx(sk.matthews_corrcoef(expected, predicted), abs=1e-9)
    assert 0 <= value(found, "f1_macro") <= 1


def test_intervals_of_labels_are_those_of_a_plain_loop() -> None:
    """scikit-learn called on every resample, and our matrix product: the same intervals, for every figure."""
    expected, predicted = drawn_labels(5, 50)
    one, other = np.array(expected), np.array(predicted)
    found = classification(expected, predicted, LABELS, seed=3, resamples=120)
    by_loop = {
        "accuracy": lambda i: sk.accuracy_score(one[i], other[i]),
        "f1_macro": lambda i: sk.f1_score(one[i], other[i], average="macro"),
        "precision_weighted": lambda i: sk.precision_score(one[i], other[i], average="weighted"),
        "matthews": lambda i: sk.matthews_corrcoef(one[i], other[i]),
    }
    for name, statistic in by_loop.items():
        assert found.value(name).interval == pytest.approx(bootstrap(statistic, 50, seed=3, resamples=120), abs=1e-9)


def test_a_case_counted_by_hand() -> None:
    """a: 2 hits of 3 predicted, 2 expected; b: 1 of 1, 2 expected; c is nowhere."""
    found = classification(["a", "a", "b", "b"], ["a", "a", "a", "b"], ["a", "b", "c"])
    assert value(found, "accuracy") == 0.75
    assert value(found, "f1_macro") == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert value(found, "precision_weighted") == pytest.approx((2 / 3 + 1) / 2)
    assert found.value("accuracy").note == "1 of 3 labels stand on no record here (c)"
    assert found.tables["per_class"][2] == {
        "label": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0, "predicted": 0,
    }  # fmt: skip


def test_predictions_that_are_no_label_are_wrong_and_said() -> None:
    expected, predicted = ["a", "a", "b", "b"], ["a", "", "b", "the label is b"]
    found = classification(expected, predicted, ["a", "b"])
    theirs = sk.precision_recall_fscore_support(expected, predicted, labels=["a", "b"], average="macro")
    ours = [value(found, f"{what}_macro") for what in ("precision", "recall", "f1")]
    assert ours == pytest.approx(theirs[:3], abs=1e-12) and value(found, "accuracy") == 0.5
    assert value(found, "f1_micro") == pytest.approx(2 * 2 / (2 + 4))
    assert found.value("accuracy").note == "2 predictions are none of the labels and count as wrong"
    assert found.tables["confusion"] == {"labels": ["a", "b", NO_LABEL], "counts": [[1, 0, 1], [0, 1, 1], [0, 0, 0]]}
    assert value(found, "matthews") == pytest.approx(sk.matthews_corrcoef(expected, ["a", "x", "b", "x"]), abs=1e-12)
    assert [row["support"] for row in found.tables["per_class"]] == [2, 2]
    nothing = classification(expected, [""] * 4, ["a", "b"])
    assert value(nothing, "accuracy") == 0.0 and value(nothing, "f1_macro") == 0.0


def test_one_record_has_no_interval_and_all_right_a_point() -> None:
    one = classification(["a"], ["a"], ["a", "b"]).values[0]
    assert one.interval is None and one.note is not None and "a single record: no interval" in one.note
    right = classification(["a", "b"] * 9, ["a", "b"] * 9, ["a", "b"]).values[0]
    assert right.interval == (1.0, 1.0) and right.note is not None and "the interval is a point" in right.note


def by_hand_calibration(confidence: np.ndarray, right: np.ndarray) -> float:
    """Guo et al. (2017), eq. 3, bin by bin."""
    error = 0.0
    for j in range(15):
        inside = (confidence > j / 15) & (confidence <= (j + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def test_calibration_is_the_definition_and_brier_scikit_learns() -> None:
    random = stream(8, "calibration")
    chances = random.dirichlet(np.full(5, 0.6), size=200)
    expected = [LABELS[random.choice(5, p=row)] for row in chances]
    predicted = [LABELS[i] for i in chances.argmax(axis=1)]
    found = classification(expected, predicted, LABELS, chances, seed=2, resamples=150)
    right = np.array([a == b for a, b in zip(expected, predicted, strict=True)], dtype=float)
    top = chances.max(axis=1)
    assert value(found, "calibration_error") == pytest.approx(by_hand_calibration(top, right), abs=1e-12)
    onehot = np.array([[label == name for name in LABELS] for label in expected])
    assert value(found, "brier") == pytest.approx(((chances - onehot) ** 2).sum(axis=1).mean(), abs=1e-12)
    at = [LABELS.index(label) for label in expected]
    theirs = sk.brier_score_loss(at, chances, labels=range(5), scale_by_half=False)
    assert value(found, "brier") == pytest.approx(theirs, abs=1e-9)
    loop = bootstrap(lambda i: by_hand_calibration(top[i], right[i]), 200, seed=2, resamples=150)
    assert found.value("calibration_error").interval == pytest.approx(loop, abs=1e-9)
    bins = found.tables["calibration"]["bins"]
    assert len(bins) == 15 and sum(row["n"] for row in bins) == 200
    rebuilt = sum(row["n"] / 200 * abs(row["accuracy"] - row["confidence"]) for row in bins if row["n"])
    assert rebuilt == pytest.approx(value(found, "calibration_error"), abs=1e-12)
    assert not found.value("brier").higher_is_better


def test_borders_of_bins_belong_below() -> None:
    """1/15 lies in the first bin, 1 in the last, 0 in the first."""
    chances = np.array([[1.0, 0.0], [1 - 1 / 15, 1 / 15], [0.0, 1.0]])
    found = classification(["a", "b", "a"], ["a", "b", "a"], ["a", "b"], chances)
    sizes = [row["n"] for row in found.tables["calibration"]["bins"]]
    assert sizes == [2] + [0] * 13 + [1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification(["a"], ["a", "b"], ["a", "b"]), "1 records have 2 predictions"),
        (lambda: classification([], [], ["a"]), "no record"),
        (lambda: classification(["a", "z"], ["a", "a"], ["a", "b"]), "'z' is none of the 2 labels\n.*record 2"),
        (lambda: classification(["a"], ["a"], ["a", "a"]), "stands twice"),
        (lambda: classification(["a"], ["a"], ["a"], positive="q"), "positive label 'q'"),
        (lambda: classification(["a"], ["a"], ["a", "b"], [[1.0]]), r"shape \(1, 1\)"),
        (lambda: classification(["a"] * 2, ["a"] * 2, ["a", "b"], [[0.5, 0.5], [0.9, 0.9]]), "record 2"),
        (lambda: classification(["a"], ["a"], ["a", "b"], [[float("nan"), 1.0]]), "record 1"),
        (lambda: multi_label([["a"], ["z"]], [[], []], ["a"]), "record 2: the label 'z'"),
        (lambda: multi_label([["a"]], [["a"]], ["a"], [[1.5]]), "record 1"),
    ],
)
def test_bad_labels_are_refused(call, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_several_labels_are_scikit_learns() -> None:
    random = stream(11, "multi")
    truth = random.random((120, 5)) < [0.5, 0.3, 0.2, 0.1, 0.0]
    chances = np.clip(truth * 0.4 + random.random((120, 5)) * 0.6, 0, 1)
    guess = (chances > 0.5) & ([True] * 4 + [False])
    expected = [[LABELS[k] for k in np.flatnonzero(row)] for row in truth]
    predicted = [[LABELS[k] for k in np.flatnonzero(row)] for row in guess]
    found = multi_label(expected, predicted, LABELS, chances, seed=4, resamples=100)
    assert found.values[0].name == "f1_micro"
    for how in ("micro", "macro", "weighted"):
        theirs = sk.precision_recall_fscore_support(truth[:, :4], guess[:, :4], average=how)
        ours = [value(found, f"{what}_{how}") for what in ("precision", "recall", "f1")]
        assert ours == pytest.approx(theirs[:3], abs=1e-12)
    assert value(found, "f1_samples") == pytest.approx(sk.f1_score(truth, guess, average="samples"), abs=1e-12)
    assert value(found, "subset_accuracy") == pytest.approx(sk.accuracy_score(truth, guess), abs=1e-12)
    assert value(found, "hamming_loss") == pytest.approx(sk.hamming_loss(truth, guess), abs=1e-12)
    assert value(found, "brier") == pytest.approx(((chances - truth) ** 2).mean(), abs=1e-12)
    flat = by_hand_calibration(chances.ravel(), truth.ravel().astype(float))
    assert value(found, "calibration_error") == pytest.approx(flat, abs=1e-12)
    assert found.value("f1_macro").note == "1 of 5 labels stand on no record here (games)"
    samples = lambda i: sk.f1_score(truth[i], guess[i], average="samples")  # noqa: E731
    assert found.value("f1_samples").interval == pytest.approx(bootstrap(samples, 120, seed=4, resamples=100), abs=1e-9)
    macro = lambda i: sk.f1_score(truth[i][:, :4], guess[i][:, :4], average="macro")  # noqa: E731
    assert found.value("f1_macro").interval == pytest.approx(bootstrap(macro, 120, seed=4, resamples=100), abs=1e-9)


def test_records_without_labels_and_foreign_predictions() -> None:
    found = multi_label([[], ["a"], ["a", "b"]], [[], ["a", "q"], ["b", "a"]], ["a", "b"])
    assert value(found, "subset_accuracy") == pytest.approx(2 / 3)
    assert value(found, "f1_samples") == pytest.approx(2 / 3)
    assert found.value("f1_micro").value == 1.0
    assert found.values[0].note is not None and "1 predictions are none of the labels" in found.values[0].note


# Tags

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-人名", "I-人名"]


def drawn_tags(seed: int, sentences: int, right: float = 0.8) -> tuple[list[list[str]], list[list[str]]]:
    random = stream(seed, "tags")
    expected, predicted = [], []
    for _ in range(sentences):
        one = random.choice(TAGS, size=int(random.integers(1, 12)))
        other = np.where(random.random(len(one)) < right, one, random.choice(TAGS, size=len(one)))
        expected.append(one.tolist())
        predicted.append(other.tolist())
    return expected, predicted


def check_tagging(expected: list[list[str]], predicted: list[list[str]], found: Measured) -> None:
    """Everything against seqeval and scikit-learn."""
    modes = {"entity_": {}, "strict_": {"mode": "strict", "scheme": IOB2}}
    for prefix, mode in modes.items():
        report = seq.classification_report(expected, predicted, output_dict=True, zero_division=0, **mode)
        check_averages(found, report, prefix)
        rows = found.tables["per_entity" if prefix == "entity_" else "per_entity_strict"]
        assert [row["label"] for row in rows] == sorted(set(report) - {"micro avg", "macro avg", "weighted avg"})
        for row in rows:
            theirs = [report[row["label"]][key] for key in ("precision", "recall", "f1-score", "support")]
            assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(theirs, abs=1e-12)
    one, other = ([tag for tags in side for tag in tags] for side in (expected, predicted))
    report = sk.classification_report(one, other, output_dict=True, zero_division=0)
    check_averages(found, report, "token_")
    assert value(found, "token_accuracy") == pytest.approx(sk.accuracy_score(one, other), abs=1e-12)
    for row in found.tables["per_tag"]:
        theirs = [report[row["label"]][key] for key in ("precision", "recall", "f1-score", "support")]
        assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(theirs, abs=1e-12)
    labels = found.tables["confusion"]["labels"]
    assert found.tables["confusion"]["counts"] == sk.confusion_matrix(one, other, labels=labels).tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("seed", "n", "right"), [(1, 60, 0.8), (2, 60, 0.2), (3, 4, 0.9), (4, 200, 0.95)])
def test_tags_are_seqevals_and_scikit_learns(seed: int, n: int, right: float) -> None:
    """Random tags, so that I- stands behind anything: both readings meet every kind of border."""
    expected, predicted = drawn_tags(seed, n, right)
    found = tagging(expected, predicted, resamples=10)
    check_tagging(expected, predicted, found)
    assert found.values[0].name == "entity_f1_micro"
    relaxed, strict = (value(found, f"{prefix}_f1_micro") for prefix in ("entity", "strict"))
    assert relaxed != strict


@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_entities_of_any_tags_are_seqevals(tags: list[str]) -> None:
    from seqeval.metrics.sequence_labeling import get_entities
    from seqeval.scheme import Entities

    assert spans(tags) == [(kind, began, last + 1) for kind, began, last in get_entities(tags)]
    theirs = Entities([tags], IOB2).entities[0] if tags else []
    assert strict_spans(tags) == [(one.tag, one.start, one.end) for one in theirs]


@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_iob2_keeps_the_entities(tags: list[str]) -> None:
    turned = iob2(tags)
    assert spans(turned) == spans(tags) == strict_spans(turned) and iob2(turned) == turned


@pytest.mark.parametrize(
    ("tags", "turned"),
    [
        ("I-PER I-PER O I-LOC B-LOC I-LOC", "B-PER I-PER O B-LOC B-LOC I-LOC"),  # IOB1
        ("I-PER I-LOC", "B-PER B-LOC"),
        ("B-PER I-PER E-PER S-PER O S-LOC", "B-PER I-PER I-PER B-PER O B-LOC"),  # IOBES
        ("B-PER L-PER U-PER U-PER", "B-PER I-PER B-PER B-PER"),  # BILOU
        ("B-人名 M-人名 E-人名 S-地名 O", "B-人名 I-人名 I-人名 B-地名 O"),  # BMES
        ("E-PER I-PER", "B-PER B-PER"),
    ],
)
def test_other_schemes_become_iob2(tags: str, turned: str) -> None:
    assert iob2(tags.split()) == turned.split()


def test_a_sentence_counted_by_hand() -> None:
    """PER right; LOC found too short (one false, one missed): P = R = F1 = 1/2; an I- alone counts only relaxed."""
    expected = [["B-PER", "I-PER", "O", "B-LOC", "I-LOC"], ["O", "I-LOC"], []]
    predicted = [["B-PER", "I-PER", "O", "B-LOC", "O"], ["O", "I-LOC"], []]
    found = tagging(expected, predicted)
    assert value(found, "entity_f1_micro") == pytest.approx(2 / 3) and value(found, "strict_f1_micro") == 0.5
    assert value(found, "token_accuracy") == pytest.approx(6 / 7)
    assert found.per_record["entity_f1"] == [0.5, 1.0, 1.0] and found.per_record["token_accuracy"] == [0.8, 1.0, 1.0]
    assert found.values[0].note == "3 entities in 3 sentences" and found.value("token_f1_macro").n == 3


@pytest.mark.filterwarnings("ignore")
def test_intervals_of_entities_draw_sentences() -> None:
    expected, predicted = drawn_tags(6, 30)
    found = tagging(expected, predicted, seed=5, resamples=60)

    def of(index: np.ndarray) -> float:
        return float(seq.f1_score([expected[i] for i in index], [predicted[i] for i in index], average="macro"))

    assert found.value("entity_f1_macro").interval == pytest.approx(bootstrap(of, 30, seed=5, resamples=60), abs=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_no_entity_found_and_none_there() -> None:
    found = tagging([["B-PER", "O"]] * 2, [["O", "O"]] * 2, resamples=10)
    check_tagging([["B-PER", "O"]] * 2, [["O", "O"]] * 2, found)
    assert value(found, "entity_f1_micro") == 0.0
    none = tagging([["O", "O"]] * 2, [["O", "O"]] * 2, resamples=10)
    assert value(none, "entity_f1_micro") == 0.0 and value(none, "token_accuracy") == 1.0
    assert none.tables["per_entity"] == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tagging([["O"], ["O", "O"]], [["O"], ["O"]]), "2 tags has 1 predicted\n.*record 2"),
        (lambda: tagging([["O"]], [["E-PER"]]), "'E-PER' is no tag(.|\n)*iob2"),
        (lambda: tagging([["O"]], [["B-"]]), "'B-' is no tag"),
        (lambda: tagging([[]], [[]]), "no sentence holds a token"),
        (lambda: iob2(["O", "PER"]), "'PER' is no tag(.|\n)*tag 2"),
        (lambda: iob2(["X-PER"]), "'X-PER' is no tag"),
    ],
)
def test_bad_tags_are_refused(call, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.filterwarnings("ignore")
def test_conll_2003s_test_set_has_its_known_supports(shared_data: Path) -> None:
    """Real sentences in IOB1: the entities and tokens of the literature, and a poor tagger of it as seqeval has it."""
    file = next((shared_data / "conll2003_en").glob("*testb*"))
    sentences, now = [], []
    for line in gzip.decompress(file.read_bytes()).decode().splitlines():
        if line.strip() and not line.startswith("-DOCSTART-"):
            now.append(line.split()[-1])
        elif now:
            sentences.append(now)
            now = []
    expected = [iob2(tags) for tags in [*sentences, *([now] if now else [])]]
    random = stream(1, "poor tagger")
    names = sorted({tag for tags in expected for tag in tags})
    predicted = [[tag if random.random() < 0.97 else str(random.choice(names)) for tag in tags] for tags in expected]
    found = tagging(expected, predicted, resamples=50)
    support = {row["label"]: row["support"] for row in found.tables["per_entity"]}
    assert support == {"LOC": 1668, "MISC": 702, "ORG": 1661, "PER": 1617}
    assert sum(row["support"] for row in found.tables["per_tag"]) == 46435
    check_tagging(expected, predicted, found)
