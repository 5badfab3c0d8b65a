"""Whether one run is really better than another: tests and intervals as pure functions over plain numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist, fmean, stdev
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# The probability of a false claim that is put up with, in all that is shown together.
ALPHA = 0.05

# From so many discordant images on, the chi-square distribution serves for the binomial one.
EXACT_BELOW = 25

Method = Literal["exact", "chi2"]
Verdict = Literal["A is better", "B is better", "not distinguishable"]


# --- two models, the same images ---


@dataclass(frozen=True)
class McNemar:
    """McNemar's test: images that only A, or only B, gets right; two-sided p of both being equally likely."""

    only_a: int
    only_b: int
    p: float
    method: Method


def mcnemar(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> McNemar:
    """Returns McNemar's test (1947, Psychometrika 12:153) of two models that are correct on the same images equally.

    Exact, from the binomial distribution, for fewer than 25 discordant images; otherwise the chi-square distribution
    with Edwards's continuity correction (1948, Psychometrika 13:185). Both err towards a larger p (Fagerland, Lydersen
    and Laake 2013, doi 10.1186/1471-2288-13-91). The test is about these two trained models and new images of the same
    kind; it knows nothing of how another seed would have come out.

    Args:
        correct_a: Whether A is correct, (N,), image by image.
        correct_b: The same for B.

    Raises:
        ValueError: The arrays are not of one length, or empty.
    """
    only_a, only_b, _ = _discordant(correct_a, correct_b)
    return McNemar(only_a, only_b, *_mcnemar_p(only_a, only_b))


def _discordant(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Returns (only A is correct, only B is, all images)."""
    a, b = _stacked([correct_a, correct_b])
    return int((a & ~b).sum()), int((b & ~a).sum()), len(a)


def _stacked(correct: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    shapes = {np.shape(values) for values in correct}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or shape[0] == 0:
        raise ValueError("models must be compared on the same images, at least one: arrays of one length")
    return np.array(correct, bool)


def _mcnemar_p(only_a: int, only_b: int) -> tuple[float, Method]:
    discordant = only_a + only_b
    if discordant < EXACT_BELOW:
        tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1)) / 2**discordant
        return min(1.0, 2 * tail), "exact"
    distance = max(0, abs(only_a - only_b) - 1)  # the correction goes no further than to equality
    # The upper tail of chi-square with one degree of freedom, at distance^2 / discordant.
    return math.erfc(distance / math.sqrt(2 * discordant)), "chi2"


def difference_interval(
    correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_], level: float = 0.95
) -> tuple[float, float]:
    """Returns a confidence interval (low, high) of accuracy B less accuracy A, within [-1, 1].

    Bonett and Price's adjusted Wald interval for paired proportions (2012, J. Educ. Behav. Stat. 37:479): one more
    image that only A gets right and one more that only B does. Fagerland, Lydersen and Laake recommend it (2014, Stat.
    Med. 33:2850).

    Raises:
        ValueError: The arrays are not of one length, or empty.
    """
    return _difference_interval(*_discordant(correct_a, correct_b), level)


def _difference_interval(only_a: int, only_b: int, count: int, level: float) -> tuple[float, float]:
    share_a, share_b = (only_a + 1) / (count + 2), (only_b + 1) / (count + 2)
    centre = share_b - share_a
    error = math.sqrt((share_a + share_b - centre**2) / (count + 2))
    reach = -NormalDist().inv_cdf((1 - level) / 2) * error
    return max(-1.0, centre - reach), min(1.0, centre + reach)


# --- many pairs ---


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Returns the p values adjusted for their number by Holm's step-down method (1979, Scand. J. Stat. 6:65), in order.

    Calling significant what is below 0.05 makes any false claim among them with a probability of at most 0.05,
    however the tests depend on each other.

    Raises:
        ValueError: One is not between 0 and 1.
    """
    p = np.asarray(p_values, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p values must be between 0 and 1, but got {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return tuple(adjusted.tolist())


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same images, beside all other pairs that are shown with them.

    Attributes:
        a: Name of A.
        b: Name of B.
        accuracy_a: Fraction.
        accuracy_b: Fraction.
        difference: `accuracy_b` - `accuracy_a`.
        low: Lower end of the difference's 95 % interval, simultaneous with those of all pairs shown;
        high: upper end. It is stretched to 0 where `p_adjusted` is 0.05 or more.
        only_a: Number of images that only A gets right.
        only_b: Number of images that only B gets right.
        p: McNemar's, of this pair alone.
        p_adjusted: Holm's, for all pairs shown.
        method: How `p` came about: "exact" or "chi2".
        verdict: "A is better" or "B is better", if `p_adjusted` is below 0.05 and the interval excludes 0; else "not
            distinguishable". So the interval excludes 0 wherever one is called better, and nowhere else.
    """

    a: str
    b: str
    accuracy_a: float
    accuracy_b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p: float
    p_adjusted: float
    method: Method
    verdict: Verdict

    @property
    def better(self) -> str | None:
        """The name of the better one; None if they are not distinguishable."""
        return {"A is better": self.a, "B is better": self.b}.get(self.verdict)


def paired_tests(correct: Mapping[str, NDArray[np.bool_]]) -> list[PairedTest]:
    """Returns a test of each pair of models on the same images, in the order of `itertools.combinations`.

    However the models depend on each other, the probability that any two equal models get a verdict is at most 0.05
    (Holm), and so is the one that any of the m intervals misses its difference: each has the level 1 - 0.05 / m
    (Bonferroni), as near as Bonett and Price's approximation comes to it. A test is not the inverse of an interval, and
    Holm's method sees more than Bonferroni's, so the two may disagree. A verdict then needs both, and an interval is
    stretched to 0 where the test sees no difference: neither costs any of these guarantees.

    Args:
        correct: Whether a model is correct, (N,), image by image, by the model's name.

    Raises:
        ValueError: The arrays are not of one length, or empty.
    """
    if len(correct) < 2:
        return []
    names = list(correct)
    hits = _stacked(list(correct.values()))  # (R, N)
    count = hits.shape[1]
    accuracies = hits.mean(axis=1).tolist()
    only = (hits.astype(float) @ ~hits.T).astype(int).tolist()  # [a][b]: images that a gets right and b doesn't
    pairs = list(combinations(range(len(names)), 2))
    outcomes = [_mcnemar_p(only[a][b], only[b][a]) for a, b in pairs]
    adjusted = holm([p for p, _ in outcomes])
    tests = []
    for (a, b), (p, method), p_adjusted in zip(pairs, outcomes, adjusted, strict=True):
        only_a, only_b = only[a][b], only[b][a]
        low, high = _difference_interval(only_a, only_b, count, 1 - ALPHA / len(pairs))
        if p_adjusted >= ALPHA:
            low, high = min(low, 0.0), max(high, 0.0)
        tests.append(
            PairedTest(
                a=names[a],
                b=names[b],
                accuracy_a=accuracies[a],
                accuracy_b=accuracies[b],
                difference=(only_b - only_a) / count,
                low=low,
                high=high,
                only_a=only_a,
                only_b=only_b,
                p=p,
                p_adjusted=p_adjusted,
                method=method,
                verdict="B is better" if low > 0 else "A is better" if high < 0 else "not distinguishable",
            )
        )
    return tests


# --- several seeds ---


@dataclass(frozen=True)
class MeanInterval:
    """Mean of `count` values with its confidence interval, and the values' sample deviation; None for one value."""

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    count: int


def mean_interval(values: Sequence[float], level: float = 0.95) -> MeanInterval:
    """Returns mean, sample deviation (n - 1) and Student's t interval of the mean, as of one setting over its seeds.

    Raises:
        ValueError: There is no value, or one is not finite.
    """
    _check_values(values)
    mean, count = fmean(values), len(values)
    if count < 2:
        return MeanInterval(mean, None, None, None, count)
    deviation = stdev(values)
    reach = _t_quantile(count - 1, level) * deviation / math.sqrt(count)
    return MeanInterval(mean, deviation, mean - reach, mean + reach, count)


@dataclass(frozen=True)
class Welch:
    """Two groups of values: `difference` of the means, B less A, its interval, and the two-sided p of equal means.

    `low`, `high` and `p` are None where the values say nothing about their spread: fewer than two in a group, or the
    same value throughout both.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None


def welch(values_a: Sequence[float], values_b: Sequence[float], level: float = 0.95) -> Welch:
    """Returns Welch's t test (1947, Biometrika 34:28) of equal means, as of two settings over their seeds.

    Unlike Student's, it doesn't suppose that both groups have one deviation. Values are taken as independent, so a
    seed that both groups share brings nothing.

    Raises:
        ValueError: A group has no value, or one that is not finite.
    """
    from scipy.special import stdtr

    _check_values(values_a)
    _check_values(values_b)
    difference = fmean(values_b) - fmean(values_a)
    if min(len(values_a), len(values_b)) < 2:
        return Welch(difference, None, None, None)
    share_a, share_b = stdev(values_a) ** 2 / len(values_a), stdev(values_b) ** 2 / len(values_b)
    variance = share_a + share_b
    if variance == 0:
        return Welch(difference, None, None, None)
    error = math.sqrt(variance)
    # Welch-Satterthwaite, in shares of the variance, whose squares don't underflow.
    degrees = 1 / ((share_a / variance) ** 2 / (len(values_a) - 1) + (share_b / variance) ** 2 / (len(values_b) - 1))
    reach = _t_quantile(degrees, level) * error
    p = 2 * float(stdtr(degrees, -abs(difference) / error))
    return Welch(difference, difference - reach, difference + reach, p)


@dataclass(frozen=True)
class GroupTest:
    """Two configurations with several seeds each, beside all other such pairs.

    Attributes:
        a: Name of configuration A.
        b: Name of configuration B.
        difference: Mean of B less mean of A.
        low: Lower end of the difference's interval, simultaneous with those of all pairs (Bonferroni);
        high: upper end. None where the values say nothing about their spread, as `p` and `p_adjusted`.
        p: Welch's t test, of this pair alone.
        p_adjusted: Holm's, for all pairs.
        better: Name of the better one, if `p_adjusted` is below 0.05 and the interval excludes 0; else None: they are
            not distinguishable.
    """

    a: str
    b: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    better: str | None


def welch_tests(values: Mapping[str, Sequence[float]], higher_is_better: bool) -> tuple[GroupTest, ...]:
    """Returns Welch's test of each pair of configurations that have several values, corrected by Holm.

    A verdict needs both Holm's p and an interval that excludes 0, simultaneous with those of all pairs (Bonferroni).
    The probability of any false verdict is at most 0.05 for all pairs together, so that also the pair with the largest
    difference, chosen after the fact, may be told.

    Args:
        values: Of each seed, by the configuration's name.
        higher_is_better: Whether the better one is the one with the higher mean.

    Returns:
        Tests in the order of `itertools.combinations`.
    """
    pairs = list(combinations([name for name in values if len(values[name]) > 1], 2))
    level = 1 - ALPHA / max(len(pairs), 1)
    found = [welch(values[a], values[b], level) for a, b in pairs]
    # A test without a p was not made, and is not corrected for.
    adjusted = iter(holm([test.p for test in found if test.p is not None]))
    tests = []
    for (a, b), test in zip(pairs, found, strict=True):
        p_adjusted = None if test.p is None else next(adjusted)
        better = None
        if p_adjusted is not None and p_adjusted < ALPHA and test.low is not None and test.high is not None:
            rises = test.low > 0
            better = (b if rises == higher_is_better else a) if rises or test.high < 0 else None
        tests.append(GroupTest(a, b, test.difference, test.low, test.high, test.p, p_adjusted, better))
    return tuple(tests)


def _check_values(values: Sequence[float]) -> None:
    if len(values) == 0 or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite numbers, at least one, but got {list(values)}")


def _t_quantile(degrees: float, level: float) -> float:
    """Returns how many standard errors a two-sided interval of this level reaches to either side."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + level) / 2))
