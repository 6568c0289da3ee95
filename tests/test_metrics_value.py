"""The bootstrap and the paired bootstrap: against a plain loop, against known answers, and in a small simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.base.errors import ConfigError, DataError
from ratoon.base.seeds import stream
from ratoon.evaluate.metrics import libraries
from ratoon.evaluate.metrics.classification import classification
from ratoon.evaluate.metrics.value import Head, bootstrap, compare, measured, occurrences, paired, ratio, summed


def mean_of(values: np.ndarray):
    """The mean of drawn records, as plainly as can be."""
    return lambda index: float(values[index].mean())


def test_the_interval_is_that_of_a_plain_loop() -> None:
    values = stream(1, "test").normal(3, 2, 40)
    random = stream(7, "bootstrap", 40)
    by_hand = [values[random.integers(0, 40, size=40)].mean() for _ in range(500)]
    low, high = np.percentile(by_hand, [2.5, 97.5])
    assert bootstrap(mean_of(values), 40, seed=7, resamples=500) == pytest.approx((low, high), abs=1e-12)


def test_sums_give_the_interval_of_the_loop() -> None:
    """One matrix product over kinds of records, and the loop over drawn records: the same draws, the same interval."""
    kind = stream(2, "test").integers(0, 5, 60)
    adds = np.array([[0.0, 1], [2, 1], [3, 4], [1, 1], [5, 2]])
    figures = summed(adds, lambda sums: sums[:, :1] / sums[:, 1:], kind)
    found = measured(figures, 60, [Head("ratio", "test")], seed=3, resamples=400).values[0]
    of_record = adds[kind]
    loop = bootstrap(lambda i: of_record[i, 0].sum() / of_record[i, 1].sum(), 60, seed=3, resamples=400)
    assert found.value == pytest.approx(of_record[:, 0].sum() / of_record[:, 1].sum(), abs=1e-12)
    assert found.interval == pytest.approx(loop, abs=1e-12)


def test_the_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = stream(1, "test").normal(0, 1, 30)
    whole = bootstrap(mean_of(values), 30, resamples=100)
    monkeypatch.setattr("ratoon.evaluate.metrics.value.BLOCK_DRAWS", 90)
    assert bootstrap(mean_of(values), 30, resamples=100) == whole


def test_seeds_and_numbers_of_records_have_draws_of_their_own() -> None:
    values = stream(1, "test").normal(0, 1, 30)
    assert bootstrap(mean_of(values), 30, seed=1) == bootstrap(mean_of(values), 30, seed=1)
    assert bootstrap(mean_of(values), 30, seed=1) != bootstrap(mean_of(values), 30, seed=2)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(7, 9))
def test_occurrences_count_what_was_drawn(drawn: list[int], kinds: int) -> None:
    counts = occurrences(np.array([drawn]), kinds)
    assert counts.shape == (1, kinds) and counts.sum() == len(drawn)
    assert all(counts[0, kind] == drawn.count(kind) for kind in range(kinds))


def test_a_ratio_of_nothing_is_what_was_said() -> None:
    assert ratio(np.array([1.0, 2.0]), np.array([0.0, 4.0])).tolist() == [0.0, 0.5]
    assert ratio(np.array([1.0]), np.array([0.0]), otherwise=1.0).tolist() == [1.0]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """300 samples of 120 from a known distribution: a 95 % interval covers the mean in about 95 % (binomial error
    1.3 points, the percentile interval a little short)."""
    random, covered = stream(5, "coverage"), 0
    for _ in range(300):
        low, high = bootstrap(mean_of(random.exponential(2.0, 120)), 120, resamples=400) or (0, 0)
        covered += low <= 2.0 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_intervals_of_macro_f1_cover_the_truth() -> None:
    """Labels drawn from a known confusion: the F1 of very many records is the truth that 95 % intervals cover."""
    labels, random = ["a", "b", "c"], stream(6, "coverage")
    confusion = np.array([[0.4, 0.1, 0.0], [0.05, 0.2, 0.05], [0.02, 0.03, 0.15]])
    tp = np.diag(confusion)
    truth = float((2 * tp / (confusion.sum(axis=0) + confusion.sum(axis=1))).mean())
    covered = 0
    for _ in range(100):
        cells = random.choice(9, size=200, p=confusion.ravel())
        expected, predicted = [labels[c // 3] for c in cells], [labels[c % 3] for c in cells]
        low, high = classification(expected, predicted, labels, resamples=200).value("f1_macro").interval or (0, 0)
        covered += low <= truth <= high
    assert covered >= 88


def test_two_equal_models_do_not_differ() -> None:
    values = stream(1, "test").normal(0, 1, 50)
    found = paired(mean_of(values), mean_of(values), 50, seed=1, resamples=200)
    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_a_better_model_is_found_and_the_sign_is_a_less_b() -> None:
    random = stream(1, "test")
    worse = random.normal(0, 1, 200)
    better = worse + random.normal(0.3, 0.5, 200)
    found = paired(mean_of(better), mean_of(worse), 200, seed=1, resamples=1000)
    assert found.difference == pytest.approx(float((better - worse).mean()))
    assert found.interval is not None and 0 < found.interval[0] < found.difference < found.interval[1]
    assert found.p_value == pytest.approx(1 / 1001)
    other = paired(mean_of(worse), mean_of(better), 200, seed=1, resamples=1000)
    assert other.difference == -found.difference and other.p_value == found.p_value


def test_the_p_value_is_uniform_where_models_do_not_differ() -> None:
    """Under the null a p-value below 0.1 turns up in about a tenth of the comparisons."""
    random, low = stream(9, "null"), 0
    for _ in range(200):
        one, other = random.normal(0, 1, 80), random.normal(0, 1, 80)
        low += (paired(mean_of(one), mean_of(other), 80, seed=1, resamples=200).p_value or 1) < 0.1
    assert 0.05 <= low / 200 <= 0.17


def test_the_p_value_is_the_t_tests() -> None:
    """For a difference of means of many records the shifted bootstrap and Student's paired test agree."""
    from scipy import stats

    random = stream(3, "p")
    one = random.normal(0, 1, 400)
    other = one + random.normal(-0.05, 0.5, 400)
    found = paired(mean_of(one), mean_of(other), 400, seed=1, resamples=4000).p_value
    assert found == pytest.approx(stats.ttest_rel(one, other).pvalue, abs=0.03)


def test_measured_figures_are_compared_on_the_same_draws() -> None:
    random = stream(4, "compare")
    labels = ["a", "b"]
    expected = [labels[i] for i in random.integers(0, 2, 300)]
    swap = {"a": "b", "b": "a"}
    good = [x if random.random() < 0.9 else swap[x] for x in expected]
    poor = [x if random.random() < 0.6 else swap[x] for x in expected]
    one, other = classification(expected, good, labels), classification(expected, poor, labels)
    found = compare(one, other, "f1_macro", resamples=500)
    f1 = [side.value("f1_macro").value for side in (one, other)]
    assert found.difference == pytest.approx(f1[0] - f1[1]) and found.p_value == pytest.approx(1 / 501)
    assert compare(one, one, "accuracy").p_value == 1.0
    right = [np.array(side.per_record["correct"]) for side in (one, other)]
    assert compare(one, other, "accuracy", seed=2) == paired(mean_of(right[0]), mean_of(right[1]), 300, seed=2)


def test_what_cannot_be_compared_is_refused() -> None:
    one = classification(["a", "b"], ["a", "a"], ["a", "b"])
    more = classification(["a", "b", "b"], ["a", "a", "b"], ["a", "b"])
    with pytest.raises(DataError, match="its number of records is 2 and 3"):
        compare(one, more, "accuracy")
    with pytest.raises(DataError, match=r"there is no figure 'f2'.*\n.*accuracy, f1_micro"):
        compare(one, one, "f2")
    with pytest.raises(DataError, match="0 resamples"):
        bootstrap(mean_of(np.zeros(4)), 4, resamples=0)
    with pytest.raises(DataError, match="no record"):
        paired(mean_of(np.zeros(0)), mean_of(np.zeros(0)), 0)


def test_one_record_and_undefined_figures_are_said() -> None:
    assert bootstrap(mean_of(np.ones(1)), 1) is None
    one = measured(lambda drawn: np.full((len(drawn), 1), 2.0), 1, [Head("x", "s")], seed=1, resamples=10).values[0]
    assert one.value == 2.0 and one.interval is None and one.note == "a single record: no interval"
    heads = [Head("x", "s", note="three of them", undefined="no such thing")]
    none = measured(lambda drawn: np.full((len(drawn), 1), np.nan), 3, heads, seed=1, resamples=10).values[0]
    assert none.value is None and none.interval is None and none.note == "three of them; no such thing"
    with pytest.raises(DataError, match="no record"):
        measured(lambda drawn: np.zeros((len(drawn), 1)), 0, heads, seed=1, resamples=10)


def test_a_figure_undefined_in_many_resamples_has_no_interval() -> None:
    """The share of a rare record's own kind: without it in the draw there is nothing to divide by."""
    rare = np.array([[1.0]] + [[0.0]] * 9)
    figures = summed(rare, lambda sums: ratio(sums, sums, otherwise=np.nan))
    found = measured(figures, 10, [Head("x", "s")], seed=1, resamples=1000).values[0]
    assert found.value == 1.0 and found.interval is None
    assert found.note is not None and "of 1000 resamples; no interval" in found.note


def test_plain_values_are_plain() -> None:
    found = classification(["a", "b", "a"], ["a", "a", "a"], ["a", "b"])
    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert read["values"][0]["name"] == "accuracy" and read["values"][0]["value"] == pytest.approx(2 / 3)
    assert read["interval_of"] == "bootstrap|of:records|interval:percentile 95|resamples:1000|seed:1"
    assert set(read) == {"values", "interval_of", "n_records", "tables", "per_record"}
    assert json.loads(json.dumps(compare(found, found, "accuracy").as_dict()))["n"] == 3


def test_a_missing_library_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sacrebleu", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"sacrebleu.*not installed(.|\n)*pip install 'ratoon\[eval\]'"):
        libraries.library("sacrebleu.metrics")


def test_metrics_come_without_torch_and_without_their_libraries() -> None:
    folder = Path(libraries.__file__).parent
    names = [f"ratoon.evaluate.metrics.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"]
    load = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)"
    heavy = "{'torch', 'sacrebleu', 'nltk', 'rouge_score', 'sklearn', 'seqeval', 'scipy'}"
    done = subprocess.run([sys.executable, "-c", f"{load}\nassert not {heavy} & set(sys.modules)"])
    assert done.returncode == 0 and len(names) >= 9
