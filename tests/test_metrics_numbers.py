"""Correlations, errors, kappa and perplexity: against scipy, scikit-learn and plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from ratoon.base.errors import ConfigError, DataError
from ratoon.base.seeds import stream
from ratoon.evaluate.interval import ratio_interval
from ratoon.evaluate.metrics.likelihood import perplexity
from ratoon.evaluate.metrics.numbers import scores, scores_by_group
from ratoon.evaluate.metrics.preference import preference
from ratoon.evaluate.metrics.value import Measured, bootstrap, compare

pytestmark = pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning", "ignore::RuntimeWarning")


def value(found: Measured, name: str) -> float:
    got = found.value(name).value
    assert got is not None
    return got


def graded(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Essay scores 1 to 6 and predictions near them, a few outside the scale."""
    random = stream(seed, "grades")
    expected = random.choice(6, size=n, p=[0.05, 0.15, 0.3, 0.3, 0.15, 0.05]) + 1.0
    return expected, expected + random.normal(0.2, 0.9, n)


def kappa(expected: np.ndarray, predicted: np.ndarray) -> float:
    rounded = np.clip(np.floor(predicted + 0.5), 1, 6)
    return float(cohen_kappa_score(expected.astype(int), rounded.astype(int), weights="quadratic", labels=range(1, 7)))


@pytest.mark.parametrize(("seed", "n"), [(1, 200), (2, 30), (3, 5)])
def test_figures_are_scipys_and_scikit_learns(seed: int, n: int) -> None:
    expected, predicted = graded(seed, n)
    found = scores(expected.tolist(), predicted.tolist(), 1, 6, resamples=20)
    assert [one.name for one in found.values] == ["kappa_quadratic", "spearman", "pearson", "rmse", "mae"]
    assert value(found, "kappa_quadratic") == pytest.approx(kappa(expected, predicted), abs=1e-12)
    assert value(found, "spearman") == pytest.approx(stats.spearmanr(expected, predicted)[0], abs=1e-12)
    assert value(found, "pearson") == pytest.approx(stats.pearsonr(expected, predicted)[0], abs=1e-12)
    assert value(found, "rmse") == pytest.approx(np.sqrt(np.mean((expected - predicted) ** 2)), abs=1e-12)
    assert value(found, "mae") == pytest.approx(np.mean(np.abs(expected - predicted)), abs=1e-12)
    assert found.per_record["error"] == (predicted - expected).tolist()
    assert not found.value("rmse").higher_is_better and found.value("spearman").higher_is_better


def test_intervals_of_numbers_are_those_of_a_plain_loop() -> None:
    """Ranks of each resample anew by scipy, kappa by scikit-learn: the same intervals as from counts of kinds."""
    expected, predicted = graded(4, 60)
    predicted = np.round(predicted, 1)
    found = scores(expected.tolist(), predicted.tolist(), 1, 6, seed=3, resamples=150)
    by_loop = {
        "kappa_quadratic": lambda i: kappa(expected[i], predicted[i]),
        "spearman": lambda i: stats.spearmanr(expected[i], predicted[i])[0],
        "pearson": lambda i: stats.pearsonr(expected[i], predicted[i])[0],
        "rmse": lambda i: np.sqrt(np.mean((expected[i] - predicted[i]) ** 2)),
    }
    for name, statistic in by_loop.items():
        assert found.value(name).interval == pytest.approx(bootstrap(statistic, 60, seed=3, resamples=150), abs=1e-9)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=20))
def test_any_numbers_are_scipys(pairs: list[tuple[int, int]]) -> None:
    expected, predicted = [a * 0.1 for a, _ in pairs], [b * 0.1 for _, b in pairs]
    found = scores(expected, predicted, resamples=3)
    for name, theirs in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        number = theirs(expected, predicted)[0]
        if math.isnan(number) or len(set(expected)) == 1 or len(set(predicted)) == 1:
            assert found.value(name).value is None and found.value(name).note == (
                "undefined: all numbers of one side are the same"
            )
        else:
            assert value(found, name) == pytest.approx(number, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_any_grades_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    expected, predicted = [a for a, _ in pairs], [b for _, b in pairs]
    found = scores(expected, predicted, 0, 3, resamples=3).values[0]
    if len({*expected, *predicted}) == 1:
        assert found.value is None and found.note == "undefined: both sides hold one and the same grade"
    else:
        theirs = cohen_kappa_score(expected, predicted, weights="quadratic", labels=range(4))
        assert found.value == pytest.approx(theirs, abs=1e-12)


def test_steps_halves_and_ends_of_a_scale() -> None:
    """Half steps; 1.25 goes up to 1.5, 9 down to 2."""
    found = scores([1.0, 1.5, 2.0, 2.0], [1.1, 1.25, 1.5, 9.0], 1, 2, 0.5)
    theirs = cohen_kappa_score([0, 1, 2, 2], [0, 1, 1, 2], weights="quadratic", labels=range(3))
    assert value(found, "kappa_quadratic") == pytest.approx(theirs, abs=1e-12)
    assert "scale:1 to 2 by 0.5|" in found.values[0].signature
    assert scores([1.0, 2.0], [1.0, 2.0]).values[0].name == "spearman"


def test_one_number_has_errors_but_no_correlation() -> None:
    found = scores([3.0], [2.0])
    assert found.value("pearson").value is None and value(found, "rmse") == 1.0
    assert found.value("rmse").interval is None and found.value("rmse").note == "a single record: no interval"


def test_resamples_of_equal_numbers_have_no_correlation() -> None:
    """Draws without the last two: rounding must not make a correlation of them. Ranks are exact and say how many."""
    found = scores([0.1] * 40 + [0.7] * 2, [0.3] * 40 + [0.9, 0.8])
    notes = [found.value(name).note for name in ("spearman", "pearson")]
    assert notes[0] is not None and "of 1000 resamples; no interval" in notes[0] and notes[1] == notes[0]


def test_two_graders_are_compared() -> None:
    expected, predicted = graded(6, 150)
    noise = stream(7, "noise").normal(0, 2.0, 150)
    good, poor = scores(expected, predicted, 1, 6), scores(expected, predicted + noise, 1, 6)
    found = compare(good, poor, "kappa_quadratic", resamples=300)
    assert found.difference is not None and found.difference > 0.1 and found.p_value == pytest.approx(1 / 301)
    assert compare(good, good, "spearman", resamples=50).p_value == 1.0


# -- groups with scales of their own -----------------------------------------------------------------------------------


def in_groups(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grades of three groups, 1 to 6, and as many steps from 41 and from 101; in no order."""
    expected, predicted = graded(seed, 120)
    groups = stream(seed, "groups").integers(0, 3, 120)
    return expected + np.array([0, 40, 100])[groups], predicted + np.array([0, 40, 100])[groups], groups


SCALES = {"0": (1.0, 6.0, 1.0), "1": (41.0, 46.0, 1.0), "2": (101.0, 106.0, 1.0)}


def test_groups_are_counted_alone_and_averaged() -> None:
    """By plain loops over groups and resamples with scipy and scikit-learn."""
    expected, predicted, groups = in_groups(8)
    lows = np.array([0, 40, 100])[groups]
    one_scale = expected - lows, predicted - lows
    by_group = {
        "kappa_quadratic": lambda i: kappa(one_scale[0][i], one_scale[1][i]),
        "spearman": lambda i: stats.spearmanr(expected[i], predicted[i])[0],
        "pearson": lambda i: stats.pearsonr(expected[i], predicted[i])[0],
        "rmse": lambda i: np.sqrt(np.mean((expected[i] - predicted[i]) ** 2)),
        "mae": lambda i: np.mean(np.abs(expected[i] - predicted[i])),
    }

    def mean(of: Callable[[np.ndarray], float], drawn: np.ndarray) -> float:
        return float(np.mean([of(drawn[groups[drawn] == group]) for group in range(3)]))

    found = scores_by_group(expected.tolist(), predicted.tolist(), groups.astype(str).tolist(), SCALES, resamples=120)
    everyone = np.arange(120)
    for name, of in by_group.items():
        assert value(found, name) == pytest.approx(mean(of, everyone), abs=1e-12)
        looped = bootstrap(lambda drawn, of=of: mean(of, drawn), 120, resamples=120)
        assert found.value(name).interval == pytest.approx(looped, abs=1e-9)
    for group in range(3):
        one = found.value(f"kappa_quadratic[{group}]")
        inside = np.flatnonzero(groups == group)
        assert one.value == pytest.approx(by_group["kappa_quadratic"](inside), abs=1e-12) and one.n == len(inside)
        assert one.interval is not None and one.interval[0] < one.value < one.interval[1]
    assert "1: cohen's kappa|weights:quadratic|scale:41 to 46 by 1" in found.values[0].signature
    assert found.value("spearman").signature == "mean of 3 groups|spearman|ties:mid-ranks"
    assert value(scores(expected.tolist(), predicted.tolist()), "spearman") > 0.97, "thrown together"
    assert value(found, "spearman") < 0.9


def test_two_graders_of_groups_are_compared() -> None:
    expected, predicted, groups = in_groups(9)
    noise = stream(9, "noise").normal(0, 2.0, 120)
    good, poor = (scores_by_group(expected.tolist(), side.tolist(), groups.astype(str).tolist(), SCALES, resamples=20)
                  for side in (predicted, predicted + noise))  # fmt: skip
    found = compare(good, poor, "kappa_quadratic", resamples=100)
    assert found.difference is not None and found.difference > 0.1 and found.p_value == pytest.approx(1 / 101)


def test_a_group_of_one_grade_is_left_out_and_said() -> None:
    found = scores_by_group([1, 2, 3, 5, 5], [1, 3, 3, 5, 5], list("aaabb"), {"a": (1, 3, 1), "b": (1, 9, 1)})
    assert value(found, "kappa_quadratic") == value(found, "kappa_quadratic[a]")
    assert found.values[0].note is not None
    assert found.values[0].note.startswith("left out of the mean, undefined there: 1 groups (b)")
    assert found.value("kappa_quadratic[b]").value is None and value(found, "mae") == pytest.approx(1 / 6)


def test_without_a_scale_in_every_group_there_is_no_kappa() -> None:
    found = scores_by_group([1, 2, 3, 5], [1, 3, 3, 6], list("aabb"), {"a": (1, 3, 1), "b": None}, resamples=5)
    assert [one.name for one in found.values][:1] == ["spearman"] and "spearman[b]" in [v.name for v in found.values]


def test_of_many_groups_the_mean_alone_is_listed() -> None:
    groups = [str(number // 2) for number in range(42)]
    found = scores_by_group(list(range(42)), list(range(42)), groups, dict.fromkeys(groups), resamples=5)
    assert [one.name for one in found.values] == ["spearman", "pearson", "rmse", "mae"]
    assert found.value("spearman").signature.startswith("mean of 21 groups|")


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"group 'c' has no scale", ([1, 2], [1, 2], ["a", "c"], {"a": (1, 6, 1)})),
        (r"1 groups for 2 records", ([1, 2], [1, 2], ["a"], {"a": (1, 6, 1)})),
        (
            r"expected score 9 is not on the scale\n.*\n.*group b, 1 to 6",
            ([1, 9], [1, 2], ["a", "b"], dict.fromkeys("ab", (1, 6, 1))),
        ),
    ],
)
def test_groups_that_do_not_fit(message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(DataError, match=message):
        scores_by_group(*arguments)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (DataError, r"predicted score is nan\n.*record 2", ([1, 2], [1, float("nan")])),
        (DataError, r"expected score 7 is not on the scale\n.*record 1", ([7, 2], [1, 2], 1, 6)),
        (ConfigError, "scale 6 to 1", ([1, 2], [1, 2], 6, 1)),
        (ConfigError, "scale 1 to None", ([1, 2], [1, 2], 1)),
        (ConfigError, "whole number of grades", ([1, 2], [1, 2], 1, 6, 0.3)),
        (ConfigError, "at most 1000", ([1, 2], [1, 2], 0, 100, 0.01)),
    ],
)
def test_bad_numbers_and_scales_are_refused(error: type[Exception], message: str, arguments: tuple) -> None:
    with pytest.raises(error, match=message):
        scores(*arguments)


def test_perplexity_is_e_to_all_nats_over_all_tokens() -> None:
    random = stream(1, "nats")
    tokens = random.integers(1, 40, 50)
    nats = tokens * random.gamma(4, 0.5, 50)
    found = perplexity(nats.tolist(), tokens.tolist())
    loss = nats.sum() / tokens.sum()
    assert value(found, "loss") == pytest.approx(loss) and value(found, "perplexity") == pytest.approx(math.exp(loss))
    interval = ratio_interval(nats, tokens.astype(float))
    assert interval is not None and found.value("loss").interval == interval
    assert found.value("perplexity").interval == pytest.approx([math.exp(end) for end in interval])
    assert found.values[0].n == int(tokens.sum()) and found.values[0].unit == "token"
    assert found.per_record["loss"] == pytest.approx((nats / tokens).tolist())
    drawn = bootstrap(lambda i: nats[i].sum() / tokens[i].sum(), 50, resamples=2000)
    assert drawn is not None and drawn == pytest.approx(interval, abs=0.05)


def test_perplexity_of_one_record_and_of_none() -> None:
    one = perplexity([3.0], [2])
    assert value(one, "perplexity") == pytest.approx(math.exp(1.5)) and one.values[0].interval is None
    assert perplexity([3.0, 0.0], [2, 0]).per_record["loss"] == [1.5, 0.0]
    with pytest.raises(DataError, match="no token"):
        perplexity([0.0], [0])
    with pytest.raises(DataError, match=r"not a number\n.*record 2"):
        perplexity([1.0, float("inf")], [1, 1])


def test_two_models_are_compared_by_their_loss() -> None:
    random = stream(2, "nats")
    tokens = random.integers(5, 40, 60)
    nats = tokens * random.gamma(4, 0.5, 60)
    one, other = perplexity(nats.tolist(), tokens.tolist()), perplexity((nats * 1.05).tolist(), tokens.tolist())
    found = compare(one, other, "loss", resamples=500)
    assert found.n == 60 and found.difference == pytest.approx(-0.05 * value(one, "loss"))
    assert (
        one.n_records == 60
        and found.interval is not None
        and found.interval[1] < 0
        and found.p_value == pytest.approx(1 / 501)
    )


# pairs of answers


def test_pairs_by_hand() -> None:
    found = preference([0.5, -0.25, 0.0, 1.0], resamples=50)
    assert value(found, "accuracy") == (1 + 0 + 0.5 + 1) / 4 and value(found, "margin") == 1.25 / 4
    assert found.per_record == {"accuracy": [1.0, 0.0, 0.5, 1.0], "margin": [0.5, -0.25, 0.0, 1.0]}
    assert found.values[0].name == "accuracy" and "nats per token" in found.value("margin").signature
    moved = compare(found, preference([0.25, -0.5, -0.25, 0.75], resamples=50), "margin", resamples=50)
    assert moved.difference == pytest.approx(0.25) and moved.interval == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize(("margins", "told"), [([], "no record"), ([0.1, float("nan")], "not a number")])
def test_pairs_that_cannot_be_measured(margins: list[float], told: str) -> None:
    with pytest.raises(DataError, match=told):
        preference(margins)
