"""Tests and intervals against scipy, published examples worked by hand, and simulations with fixed seeds."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from eva.statistics import (
    MeanInterval,
    Welch,
    difference_interval,
    holm,
    mcnemar,
    mean_interval,
    paired_tests,
    welch,
)

Hits = NDArray[np.bool_]

untimed = settings(deadline=None, max_examples=60)


def pair(only_a: int, only_b: int, both: int = 0, neither: int = 0, seed: int = 0) -> tuple[Hits, Hits]:
    """Which images A and B get right, so many of each kind, shuffled."""
    a = np.repeat([True, False, True, False], [only_a, only_b, both, neither])
    b = np.repeat([False, True, True, False], [only_a, only_b, both, neither])
    order = np.random.default_rng(seed).permutation(len(a))
    return a[order], b[order]


def draw(rng: np.random.Generator, only_a: float, only_b: float, count: int) -> tuple[Hits, Hits]:
    """A and B on `count` images, of which these shares are discordant on average."""
    uniform = rng.random(count)
    a, b = uniform < only_a, (uniform >= only_a) & (uniform < only_a + only_b)
    return a | (uniform > 0.5), b | (uniform > 0.5)


def noise(share: float, count: int) -> float:
    """Three standard errors of a share in so many simulations."""
    return 3 * math.sqrt(share * (1 - share) / count)


# McNemar's test


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (1, 7, 2 * (1 + 8) / 2**8),  # Bentur et al. 2009, as Fagerland, Lydersen and Laake 2013 have it
        (6, 16, 2 * (1 + 22 + 231 + 1540 + 7315 + 26334 + 74613) / 2**22),  # Cavo et al. 2012, as there
        (0, 5, 2 / 32),
        (0, 1, 1),
        (3, 3, 1),
        (0, 0, 1),
    ],
)
def test_few_discordant_images_are_judged_exactly(only_a: int, only_b: int, p: float) -> None:
    outcome = mcnemar(*pair(only_a, only_b, 50, 9))
    assert (outcome.only_a, outcome.only_b, outcome.method) == (only_a, only_b, "exact")
    assert outcome.p == pytest.approx(p, rel=1e-14)


@pytest.mark.parametrize(
    ("only_a", "only_b", "chi2"),
    [
        (18, 7, 4.0),  # (11 - 1)^2 / 25: two deviations of a normal distribution
        (30, 10, 9.025),  # (20 - 1)^2 / 40
        (86, 150, 63**2 / 236),
        (13, 12, 0.0),
        (20, 20, 0.0),  # the correction does not turn equality into a difference
    ],
)
def test_many_discordant_images_are_judged_by_chi_square_with_edwards_correction(
    only_a: int, only_b: int, chi2: float
) -> None:
    outcome = mcnemar(*pair(only_a, only_b, 5, 5))
    assert (outcome.only_a, outcome.only_b, outcome.method) == (only_a, only_b, "chi2")
    assert outcome.p == pytest.approx(stats.chi2.sf(chi2, 1), rel=1e-12)
    if chi2 == 4:
        assert outcome.p == pytest.approx(0.0455, abs=1e-5)


@untimed
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 50))
def test_the_test_agrees_with_scipy_and_does_not_care_which_is_which(only_a: int, only_b: int, both: int) -> None:
    assume(only_a + only_b + both)
    outcome, turned = mcnemar(*pair(only_a, only_b, both)), mcnemar(*pair(only_b, only_a, both))
    assert (outcome.p, outcome.only_a, outcome.only_b) == (turned.p, turned.only_b, turned.only_a)
    assert 0 <= outcome.p <= 1
    binomial = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    if only_a + only_b < 25:
        assert outcome.method == "exact" and outcome.p == pytest.approx(binomial, rel=1e-9)
    else:
        statistic = max(0, abs(only_a - only_b) - 1) ** 2 / (only_a + only_b)
        assert outcome.method == "chi2" and outcome.p == pytest.approx(stats.chi2.sf(statistic, 1), rel=1e-9)
        assert outcome.p == pytest.approx(binomial, abs=0.005)  # what it stands for


def test_images_that_both_get_right_or_wrong_say_nothing() -> None:
    assert mcnemar(*pair(4, 11)) == mcnemar(*pair(4, 11, 1000, 500))


@pytest.mark.parametrize(("discordant", "least"), [(0.015, 0.0), (0.4, 0.7)], ids=["exact", "chi2"])
def test_between_equal_models_p_is_no_smaller_than_chance_allows(discordant: float, least: float) -> None:
    rng, repetitions = np.random.default_rng(0), 2000
    p = [mcnemar(*draw(rng, discordant / 2, discordant / 2, 600)).p for _ in range(repetitions)]
    for alpha in (0.01, 0.05, 0.1, 0.3, 0.5):
        share = np.mean(np.array(p) <= alpha)
        assert share <= alpha + noise(alpha, repetitions)
        # With many discordant images p is nearly uniform; with few, an exact test has to stay below.
        assert share >= least * alpha - noise(alpha, repetitions)


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(0)
    assert np.mean([mcnemar(*draw(rng, 0.03, 0.06, 2000)).p < 0.05 for _ in range(200)]) > 0.95


@pytest.mark.parametrize(("a", "b"), [([True], [True, False]), ([], []), ([[True]], [[True]])])
def test_models_on_different_images_are_refused(a: list[bool], b: list[bool]) -> None:
    correct_a, correct_b = np.array(a, bool), np.array(b, bool)
    for compare in (mcnemar, difference_interval):
        with pytest.raises(ValueError, match="on the same images, at least one"):
            compare(correct_a, correct_b)
    with pytest.raises(ValueError, match="on the same images, at least one"):
        paired_tests({"a": correct_a, "b": correct_b})


# the interval of the difference


@pytest.mark.parametrize(
    ("only_a", "only_b", "count", "low", "high"),
    [
        # Both examples of Fagerland, Lydersen and Laake 2014. By hand: (2 - 8) / 23 -+ 1.96 sqrt(194 / 23^3).
        (7, 1, 21, -0.50836, -0.01338),
        (16, 6, 161, -0.11950, -0.00320),  # (7 - 17) / 163 -+ 1.96 sqrt(3812 / 163^3)
        (0, 0, 98, -1.95996 * math.sqrt(0.02 / 100), 1.95996 * math.sqrt(0.02 / 100)),
        (0, 1, 1, -0.73354, 1.0),  # 1 / 3 -+ 1.96 sqrt(8 / 27), and nothing is above 1
    ],
)
def test_the_interval_is_bonett_and_prices(only_a: int, only_b: int, count: int, low: float, high: float) -> None:
    a, b = pair(only_a, only_b, 0, count - only_a - only_b)
    assert difference_interval(a, b) == pytest.approx((low, high), abs=1e-5)
    assert difference_interval(b, a) == pytest.approx((-high, -low), abs=1e-5)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
@pytest.mark.parametrize(("only_a", "only_b"), [(0.03, 0.03), (0.02, 0.06), (0.2, 0.1)])
def test_the_interval_covers_the_truth_as_often_as_its_level_says(only_a: float, only_b: float, level: float) -> None:
    rng, repetitions = np.random.default_rng(0), 1500
    covered = 0
    for _ in range(repetitions):
        low, high = difference_interval(*draw(rng, only_a, only_b, 400), level)
        covered += low <= only_b - only_a <= high
    # A simulation's noise, and half a percent for the approximation.
    assert covered / repetitions == pytest.approx(level, abs=noise(level, repetitions) + 0.005)


def test_the_interval_is_the_bootstraps() -> None:
    a, b = pair(60, 95, 1745, 100)
    rng = np.random.default_rng(0)
    samples = rng.integers(len(a), size=(4000, len(a)))
    differences = b[samples].mean(axis=1) - a[samples].mean(axis=1)
    assert difference_interval(a, b) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=0.0008)
    assert 0.017 < b.mean() - a.mean() < 0.018 and np.ptp(difference_interval(a, b)) > 0.02


# many p values


def test_holm_by_hand() -> None:
    # Rising: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04, which must not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.5, 0.4]) == pytest.approx((0.8, 0.8))
    assert holm([0.7, 0.9, 0.8]) == (1, 1, 1)
    assert (holm([]), holm([0.3])) == ((), (0.3,))


def rejected(p_values: list[float], alpha: float) -> set[int]:
    """Holm's procedure as he describes it: step down from the smallest p until one is too large."""
    left, found = set(range(len(p_values))), set()
    while left:
        smallest = min(left, key=lambda index: (p_values[index], index))
        if p_values[smallest] > alpha / len(left):
            break
        found.add(smallest)
        left.remove(smallest)
    return found


@untimed
@given(st.lists(st.sampled_from([0.0, 0.001, 0.002, 0.01, 0.012, 0.02, 0.04, 0.3, 1.0]), max_size=12))
def test_adjusted_p_values_reject_what_stepping_down_rejects(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for alpha in (0.0101, 0.051, 0.101, 0.99):  # between the multiples of those p values
        assert {index for index, p in enumerate(adjusted) if p <= alpha} == rejected(p_values, alpha)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_what_is_no_probability_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="p values must be between 0 and 1"):
        holm([0.5, wrong])


# all pairs


def test_one_pair_is_mcnemars_test_and_the_plain_interval() -> None:
    a, b = pair(40, 80, 800, 80)
    (test,) = paired_tests({"first": a, "second": b})
    assert (test.a, test.b, test.better, test.verdict) == ("first", "second", "second", "B is better")
    assert (test.accuracy_a, test.accuracy_b, test.difference) == (0.84, 0.88, 0.04)
    assert (test.only_a, test.only_b, test.p, test.method) == tuple(vars(mcnemar(a, b)).values())
    assert test.p_adjusted == test.p
    assert (test.low, test.high) == pytest.approx(difference_interval(a, b))
    (turned,) = paired_tests({"second": b, "first": a})
    assert (turned.verdict, turned.better, turned.p) == ("A is better", "second", test.p)
    assert (turned.low, turned.high) == pytest.approx((-test.high, -test.low))


@untimed
@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from([30, 300, 3000]), st.sampled_from([0.0, 0.02, 0.2]))
def test_verdict_interval_and_p_never_contradict_each_other(seed: int, size: int, count: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    correct = {f"run {index}": rng.random(count) < 0.75 + spread * rng.uniform(-1, 1) for index in range(size)}
    tests = paired_tests(correct)
    assert [(test.a, test.b) for test in tests] == list(itertools.combinations(correct, 2))
    single = [mcnemar(correct[test.a], correct[test.b]) for test in tests]
    assert [test.p for test in tests] == [one.p for one in single]
    assert [test.p_adjusted for test in tests] == list(holm([one.p for one in single]))
    for test, one in zip(tests, single, strict=True):
        assert (test.only_a, test.only_b, test.method) == (one.only_a, one.only_b, one.method)
        assert test.difference == pytest.approx(correct[test.b].mean() - correct[test.a].mean(), abs=1e-12)
        assert test.low <= test.difference <= test.high
        plain = difference_interval(correct[test.a], correct[test.b], 1 - 0.05 / len(tests))
        assert test.low <= plain[0] and test.high >= plain[1]
        assert (test.low, test.high) == plain or 0 in (test.low, test.high)
        if test.low > 0 or test.high < 0:
            assert test.p_adjusted < 0.05
            assert test.verdict == ("B is better" if test.difference > 0 else "A is better")
            assert test.better == (test.b if test.difference > 0 else test.a)
        else:
            assert (test.verdict, test.better) == ("not distinguishable", None)


def test_where_the_test_sees_nothing_the_interval_reaches_to_zero() -> None:
    a, b = pair(7, 1, 1, 12)
    assert difference_interval(a, b)[1] < 0 and mcnemar(a, b).p > 0.05
    (test,) = paired_tests({"a": a, "b": b})
    assert test.verdict == "not distinguishable"
    assert (test.low, test.high) == (difference_interval(a, b)[0], 0)


def test_where_only_the_test_sees_a_difference_there_is_no_verdict() -> None:
    a, b = pair(16, 33, 900, 51)
    tests = {(test.a, test.b): test for test in paired_tests({"a": a, "b": b, "bad": np.zeros(1000, bool)})}
    close = tests["a", "b"]
    assert close.p_adjusted < 0.05 and close.low < 0 < close.high
    assert close.verdict == "not distinguishable"
    assert [tests[name, "bad"].better for name in "ab"] == ["a", "b"]


def test_among_equal_models_a_verdict_is_as_rare_as_promised() -> None:
    rng, repetitions = np.random.default_rng(0), 600
    verdicts = misses = alone = 0
    for _ in range(repetitions):
        tests = paired_tests({str(index): rng.random(500) < 0.8 for index in range(5)})
        verdicts += any(test.better for test in tests)
        misses += any(not test.low <= 0 <= test.high for test in tests)
        alone += any(test.p < 0.05 for test in tests)
    assert verdicts / repetitions <= 0.05 + noise(0.05, repetitions)
    assert misses / repetitions <= 0.05 + noise(0.05, repetitions)
    assert alone / repetitions > 0.15  # what is seen without a correction


def test_fewer_than_two_models_make_no_pair() -> None:
    assert paired_tests({}) == paired_tests({"a": np.ones(3, bool)}) == []


def test_counts_of_twenty_runs_are_exact() -> None:
    rng = np.random.default_rng(0)
    correct = {str(index): rng.random(10_000) < 0.4 for index in range(20)}
    tests = paired_tests(correct)
    assert len(tests) == 190
    for test in tests:
        a, b = correct[test.a], correct[test.b]
        assert test.only_a == np.count_nonzero(a > b) and test.only_b == np.count_nonzero(b > a)


# several seeds

finite = st.floats(-100, 100).map(lambda value: round(value, 6))


def test_a_mean_interval_by_hand() -> None:
    interval = mean_interval([90.1, 90.3, 90.5])
    # Student's t with two degrees of freedom is 4.302653 at 97.5 %; times 0.2 / sqrt(3).
    assert (interval.mean, interval.deviation) == pytest.approx((90.3, 0.2)) and interval.count == 3
    assert (interval.low, interval.high) == pytest.approx((90.3 - 0.496828, 90.3 + 0.496828), abs=1e-6)


@untimed
@given(st.lists(finite, min_size=2, max_size=12), st.sampled_from([0.5, 0.95, 0.999]))
def test_a_mean_interval_is_scipys(values: list[float], level: float) -> None:
    assume(np.ptp(values) > 1e-3)
    interval = mean_interval(values, level)
    low, high = stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))
    expected = (np.mean(values), np.std(values, ddof=1), low, high)
    found = (interval.mean, interval.deviation, interval.low, interval.high)
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert interval.count == len(values)


def test_one_seed_has_a_mean_and_nothing_else() -> None:
    assert mean_interval([0.9]) == MeanInterval(0.9, None, None, None, 1)
    assert mean_interval([0.9, 0.9, 0.9]) == MeanInterval(0.9, 0, 0.9, 0.9, 3)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_values_that_are_no_numbers_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values must be finite numbers, at least one"):
        mean_interval(values)
    for groups in ((values, [1.0, 2.0]), ([1.0, 2.0], values)):
        with pytest.raises(ValueError, match="values must be finite numbers, at least one"):
            welch(*groups)


def test_welchs_test_by_hand() -> None:
    # Variances 1 and 4 of three values each: error sqrt(1/3 + 4/3), degrees (5/3)^2 / ((1/3)^2 / 2 + (4/3)^2 / 2).
    outcome = welch([1, 2, 3], [4, 6, 8])
    assert outcome.difference == 4
    assert outcome.p == pytest.approx(2 * stats.t.sf(4 / math.sqrt(5 / 3), 50 / 17), rel=1e-9)
    reach = stats.t.ppf(0.975, 50 / 17) * math.sqrt(5 / 3)
    assert (outcome.low, outcome.high) == pytest.approx((4 - reach, 4 + reach), rel=1e-9)


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")  # scipy's, about nearly equal values
@untimed
@given(st.lists(finite, min_size=2, max_size=8), st.lists(finite, min_size=2, max_size=8))
def test_welchs_test_is_scipys(values_a: list[float], values_b: list[float]) -> None:
    assume(np.ptp(values_a) + np.ptp(values_b) > 1e-3)
    outcome, turned = welch(values_a, values_b, 0.9), welch(values_b, values_a, 0.9)
    expected = stats.ttest_ind(values_b, values_a, equal_var=False)
    low, high = expected.confidence_interval(0.9)
    assert outcome.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12) and outcome.p == pytest.approx(turned.p)
    assert outcome.difference == pytest.approx(np.mean(values_b) - np.mean(values_a), abs=1e-9)
    assert (outcome.low, outcome.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
    assert turned.low is not None and turned.high is not None
    assert (outcome.low, outcome.high) == pytest.approx((-turned.high, -turned.low))


def test_groups_whose_spread_is_unknown_have_no_p() -> None:
    assert welch([1.0], [2.0, 3.0]) == Welch(1.5, None, None, None)
    assert welch([1.0, 2.0], [2.0]) == Welch(0.5, None, None, None)
    assert welch([1.0, 1.0], [2.0, 2.0]) == Welch(1.0, None, None, None)
    assert welch([1.0, 1.0], [2.0, 2.5]).p is not None
