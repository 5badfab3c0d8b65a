"""The ranking of a sweep is that of a plain computation, and is not surer than its numbers allow."""

import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eva.ranking import (
    TrialRecord,
    best_trial,
    conclusion,
    distinguishable,
    importance,
    line,
    rank,
    rank_repeats,
    report,
    results,
    savings,
    table,
    time_left,
    winner_against_median,
    winner_and_median,
)
from eva.text import columns_of, duration

METRIC = "val/accuracy_best"


def trial(
    number: int,
    objective: float | None = None,
    values: Mapping[str, Any] | None = None,
    state: str = "finished",
    epochs: int = 9,
    **fields: Any,
) -> TrialRecord:
    """A trial that has a configuration of its own, unless it is given one."""
    given = {"lr_max": number + 1.0} if values is None else values
    curve = () if objective is None else (objective,) * epochs
    defaults: dict[str, Any] = {"seconds": 10.0, "reason": "", "folder": None, "repeat_of": None}
    return TrialRecord(number, state, given, objective, curve, **(defaults | fields))


def repeated(
    number: int, results_of: Sequence[float], first: int, values: Mapping[str, Any] | None = None
) -> list[TrialRecord]:
    """Repeats of trial `number`, numbered from `first`, with seeds of their own."""
    return [
        trial(
            first + k,
            value,
            {**({"lr_max": number + 1.0} if values is None else values), "seed": 100 + k},
            repeat_of=number,
        )
        for k, value in enumerate(results_of)
    ]


def numbers(found: Sequence[Any]) -> list[int]:
    return [each.number for each in found]


# The order


@pytest.mark.parametrize(("goal", "expected"), [("maximize", [2, 0, 1]), ("minimize", [1, 0, 2])])
def test_the_best_configuration_is_first(goal: str, expected: list[int]) -> None:
    assert numbers(rank([trial(0, 0.5), trial(1, 0.4), trial(2, 0.6)], goal)) == expected


def test_seeds_of_a_configuration_are_ranked_by_their_mean_with_scipys_interval() -> None:
    accuracies = {"batch": (0.91, 0.99, 0.92), "layer": (0.93, 0.93, 0.95), "ghost": (0.97,)}
    trials = [
        trial(number, accuracy, {"norm": norm, "seed": seed})
        for number, (seed, norm, accuracy) in enumerate(
            (seed, norm, accuracy) for norm, each in accuracies.items() for seed, accuracy in enumerate(each)
        )
    ]
    found = rank(trials, "maximize")
    assert [each.values for each in found] == [{"norm": "ghost"}, {"norm": "batch"}, {"norm": "layer"}]
    batch = found[1].interval
    assert batch is not None and batch.count == 3
    assert batch.mean == pytest.approx(0.94)
    assert batch.deviation == pytest.approx(np.std(accuracies["batch"], ddof=1))
    expected = stats.t.interval(0.95, 2, np.mean(accuracies["batch"]), stats.sem(accuracies["batch"]))
    assert (batch.low, batch.high) == pytest.approx(expected)
    assert found[0].interval is not None and found[0].interval.low is None


def test_the_same_seed_again_is_no_further_seed() -> None:
    """A deterministic run gives the same number again; an interval over both would be of no width at all."""
    (found,) = rank([trial(0, 0.8, {"seed": 1}), trial(1, 0.8, {"seed": 1}), trial(2, 0.9, {"seed": 2})], "maximize")
    assert found.interval is not None and found.interval.count == 2 and found.mean == pytest.approx(0.85)
    (without,) = rank([trial(0, 0.8, {"norm": "batch"}), trial(1, 0.9, {"norm": "batch"})], "maximize")
    assert without.interval is not None and without.interval.count == 1 and without.mean == pytest.approx(0.85)


def test_values_are_told_apart_by_what_they_are() -> None:
    same: list[dict[str, Any]] = [{"a": 1, "b": [1, 2]}, {"b": [1.0, 2], "a": 1.0}]
    apart: list[dict[str, Any]] = [
        {"a": True, "b": [1, 2]},
        {"a": 1, "b": [2, 1]},
        {"a": "1", "b": [1, 2]},
        {"a": 1, "b": {"c": 1}},
        {"a": 1},
    ]
    found = rank([trial(number, 0.5, values) for number, values in enumerate(same + apart)], "maximize")
    assert sorted(len(each.trials) for each in found) == [1, 1, 1, 1, 1, 2]


def test_failed_and_unfinished_trials_do_not_count() -> None:
    trials = [
        *(trial(0, 0.9, state="failed", reason="out of memory"), trial(1, None, state="waiting")),
        *(trial(2, 0.95, state="running"), trial(3, 0.5)),
    ]
    assert numbers(rank(trials, "maximize")) == [3]
    assert numbers([best_trial(trials, "maximize")]) == [3]


def test_trials_that_diverged_without_a_value_are_results_and_last() -> None:
    trials = [trial(0, None, state="diverged"), trial(1, 0.1), trial(2, math.nan, state="diverged"), trial(3, 0.2)]
    for goal, expected in (("maximize", [3, 1, 0, 2]), ("minimize", [1, 3, 0, 2])):
        found = rank(trials, goal)
        assert numbers(found) == expected
        assert [each.mean for each in found[2:]] == [None, None]


def test_of_equal_means_the_one_that_ended_regularly_is_first_then_the_earlier_one() -> None:
    states = ["diverged", "stopped", "finished", "stopped", "finished"]
    trials = [trial(number, 0.5, state=state) for number, state in enumerate(states)]
    assert numbers(rank(trials, "maximize")) == numbers(rank(trials, "minimize")) == [2, 4, 1, 3, 0]
    best = best_trial(trials, "minimize")
    assert best is not None and best.number == 2


def test_a_stopped_trial_counts_for_what_it_reached_and_is_marked() -> None:
    found = rank([trial(0, 0.6), trial(1, 0.7, state="stopped", epochs=3), trial(2, 0.8)], "maximize")
    assert numbers(found) == [2, 1, 0]
    assert [each.remark for each in found] == ["", "stopped after 3 epochs", ""]


def test_a_mean_over_trials_of_which_some_ended_early_is_marked() -> None:
    def seeds(*states: tuple[str, float | None, int]) -> str:
        trials = [trial(k, value, {"seed": k}, state, epochs) for k, (state, value, epochs) in enumerate(states)]
        (found,) = rank(trials, "maximize")
        assert found.mean == pytest.approx(
            np.mean([value for state, value, _ in states if state != "failed" and value])
        )
        return found.remark

    assert seeds(("finished", 0.9, 9), ("stopped", 0.5, 1), ("finished", 0.8, 9)) == "1 of 3 stopped after 1 epoch"
    assert seeds(("stopped", 0.9, 5), ("stopped", 0.5, 2)) == "all 2 stopped after 2 to 5 epochs"
    assert seeds(("finished", 0.9, 9), ("diverged", None, 0)) == "1 of 2 diverged after 0 epochs"
    assert seeds(("finished", 0.9, 9), ("failed", None, 0)) == "1 of 2 failed"


STATES = ("finished", "stopped", "diverged", "failed", "running")


@st.composite
def sweeps(draw: st.DrawFn) -> list[TrialRecord]:
    """Trials of few configurations and seeds with few values, so that there are ties and repeats."""
    count = draw(st.integers(0, 12))
    value = st.none() | st.sampled_from([0.1, 0.2, 0.3, math.nan])
    return [
        trial(
            number,
            draw(value),
            {"norm": draw(st.sampled_from("abc")), "seed": draw(st.integers(0, 2))},
            draw(st.sampled_from(STATES)),
            repeat_of=draw(st.sampled_from([None, None, 0])),
        )
        for number in range(count)
    ]


@given(sweeps(), st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_order_in_which_trials_are_given_changes_nothing(trials: list[TrialRecord], random: Any) -> None:
    mixed = random.sample(trials, len(trials))
    assert repr(results(trials, METRIC, "maximize", 9)) == repr(results(mixed, METRIC, "maximize", 9))
    assert report(trials, METRIC, "maximize", 9, 80) == report(mixed, METRIC, "maximize", 9, 80)


@given(sweeps())
@settings(max_examples=200, deadline=None)
def test_minimizing_is_maximizing_the_negated_objective(trials: list[TrialRecord]) -> None:
    negated = [
        dataclasses.replace(each, objective=None if each.objective is None else -each.objective) for each in trials
    ]
    assert numbers(rank(trials, "minimize")) == numbers(rank(negated, "maximize"))
    assert numbers(rank_repeats(trials, "minimize")) == numbers(rank_repeats(negated, "maximize"))
    better = [
        [test.better for test in distinguishable(rank(each, goal), goal)]
        for each, goal in ((trials, "minimize"), (negated, "maximize"))
    ]
    assert better[0] == better[1]


@given(sweeps())
@settings(max_examples=200, deadline=None)
def test_every_result_of_the_search_is_in_one_configuration_of_a_falling_mean(trials: list[TrialRecord]) -> None:
    found = rank(trials, "maximize")
    members = [member.number for each in found for member in each.trials]
    expected = [each.number for each in trials if each.state in STATES[:3] and each.repeat_of is None]
    assert sorted(members) == expected
    means = [-math.inf if each.mean is None else each.mean for each in found]
    assert means == sorted(means, reverse=True)


# What is distinguishable


def a_repeated_sweep(shift: float = 0.02) -> list[TrialRecord]:
    """A search of five trials whose first three were repeated; the winner of the search is not the best by far."""
    rng = np.random.default_rng(3)
    search = [trial(number, 0.9 - 0.01 * number) for number in range(5)]
    means = (0.85, 0.85 + shift, 0.8495)
    return [
        *search,
        *itertools.chain.from_iterable(
            repeated(number, rng.normal(mean, 0.001, 3).tolist(), 5 + 3 * number) for number, mean in enumerate(means)
        ),
    ]


def test_repeats_are_ranked_by_their_new_seeds_alone_and_not_in_the_first_ranking() -> None:
    trials = a_repeated_sweep()
    assert [len(each.trials) for each in rank(trials, "maximize")] == [1] * 5
    found = rank_repeats(trials, "maximize")
    assert found[0].number == 1 and {each.number for each in found} == {0, 1, 2}
    for each in found:
        expected = [one.objective for one in trials if one.repeat_of == each.number]
        assert each.mean == pytest.approx(np.mean(np.array(expected, float)))
        assert each.interval is not None and each.interval.count == 3


def test_repeats_are_new_seeds_even_where_the_seed_is_no_parameter() -> None:
    trials = [trial(k, 0.5 + k / 100, {"lr_max": 1.0}, repeat_of=None if k == 0 else 0) for k in range(4)]
    (found,) = rank_repeats(trials, "maximize")
    assert found.by_seed == (0.51, 0.52, 0.53)


@pytest.mark.parametrize("goal", ["maximize", "minimize"])
def test_pairs_are_tested_as_scipy_and_holm_do(goal: str) -> None:
    trials = a_repeated_sweep()
    found = rank_repeats(trials, goal)
    values = {each.label: each.by_seed for each in found}
    tests = {(test.a, test.b): test for test in distinguishable(found, goal)}
    raw = {
        pair: stats.ttest_ind(values[pair[1]], values[pair[0]], equal_var=False)
        for pair in itertools.combinations(values, 2)
    }
    assert list(tests) == list(raw)
    in_order = sorted(raw, key=lambda pair: raw[pair].pvalue)
    for place, pair in enumerate(in_order):
        test = tests[pair]
        assert test.p == pytest.approx(raw[pair].pvalue)
        adjusted = max(min(1, (3 - k) * raw[in_order[k]].pvalue) for k in range(place + 1))
        assert test.p_adjusted == pytest.approx(adjusted)
        low, high = raw[pair].confidence_interval(1 - 0.05 / 3)
        assert (test.low, test.high) == pytest.approx((low, high))
        means = {label: statistics.fmean(values[label]) for label in pair}
        good = max(means, key=lambda label: means[label] * (1 if goal == "maximize" else -1))
        assert test.better == (good if adjusted < 0.05 and not low <= 0 <= high else None)
    assert {tests[pair].better is None for pair in tests} == {True, False}  # or else this shows little


def test_the_conclusion_says_who_is_better_and_who_is_not_distinguishable() -> None:
    found = rank_repeats(a_repeated_sweep(), "maximize")
    assert numbers(found)[0] == 1
    others = " and ".join(str(number) for number in numbers(found)[1:])
    told = conclusion(found, distinguishable(found, "maximize"))
    assert told == f"trial 1 is better than trials {others}; trials {others} are not distinguishable"


def test_configurations_that_are_all_alike_or_all_apart_are_told_so() -> None:
    alike = rank_repeats(a_repeated_sweep(0.0), "maximize")
    a, b, c = numbers(alike)
    assert conclusion(alike, distinguishable(alike, "maximize")) == f"trials {a}, {b} and {c} are not distinguishable"
    noise = np.random.default_rng(0).normal(0, 0.001, (3, 5))
    trials = [each for k in range(3) for each in repeated(k, (noise[k] - 0.1 * k).tolist(), 5 * k)]
    apart = rank_repeats(trials, "maximize")
    told = conclusion(apart, distinguishable(apart, "maximize"))
    assert told == "trial 0 is better than trials 1 and 2; trial 1 is better than trial 2"


def test_a_middle_one_may_be_like_both_ends_that_are_apart() -> None:
    spread = np.array([-1.0, 0.0, 1.0]) * 0.01
    trials = [
        each for k, mean in enumerate((0.94, 0.92, 0.90)) for each in repeated(k, (mean + spread).tolist(), 3 * k)
    ]
    wide = rank_repeats(trials, "maximize")
    tests = distinguishable(wide, "maximize")
    forced = tuple(
        dataclasses.replace(test, better="trial 0" if test.b == "trial 2" and test.a == "trial 0" else None)
        for test in tests
    )
    assert conclusion(wide, forced) == (
        "trial 0 is better than trial 2; trials 0 and 1 are not distinguishable; trials 1 and 2 are not distinguishable"
    )


def test_of_many_configurations_only_the_best_is_compared_in_words() -> None:
    noise = np.random.default_rng(1).normal(0, 0.001, (12, 4))
    trials = [each for k in range(12) for each in repeated(k, (noise[k] - (0.5 if k > 3 else 0)).tolist(), 4 * k)]
    found = rank_repeats(trials, "maximize")
    first, *alike = numbers(found)[:4]
    told = conclusion(found, distinguishable(found, "maximize"))
    names = ", ".join(f"trial {number}" for number in alike)
    assert told == f"trial {first} is better than 8 of the 11 others; not distinguishable from it: {names}"


def test_a_configuration_with_one_seed_is_not_tested() -> None:
    trials = [*repeated(0, [0.5, 0.51], 5), *repeated(1, [0.6], 7), *repeated(2, [0.9, 0.91], 8)]
    found = rank_repeats(trials, "maximize")
    tests = distinguishable(found, "maximize")
    assert [(test.a, test.b) for test in tests] == [("trial 2", "trial 0")]
    assert conclusion(found, tests).endswith("; without values of two seeds, trial 1 can't be compared")


def test_seeds_of_one_configuration_alone_have_nothing_to_be_compared_with() -> None:
    for trials in (repeated(0, [0.5, 0.51], 5), [*repeated(0, [0.5, 0.51], 5), *repeated(1, [0.6], 7)]):
        told = conclusion(rank_repeats(trials, "maximize"), ())
        assert told == "there is no other configuration of several seeds to compare with"


def test_a_trial_that_finished_without_a_value_is_remarked() -> None:
    """Alone, and as one of several seeds."""
    [alone] = rank([trial(0, None)], "maximize")
    assert alone.remark == "without a value"
    seeds = [trial(number, value, {"norm": "batch", "seed": number}) for number, value in enumerate([0.5, None, 0.6])]
    assert [each.remark for each in rank(seeds, "maximize")] == ["1 of 3 without a value"]


def test_values_without_any_spread_give_no_verdict() -> None:
    found = rank_repeats([*repeated(0, [0.5, 0.5], 5), *repeated(1, [0.6, 0.6], 7)], "maximize")
    (test,) = distinguishable(found, "maximize")
    assert (test.p, test.better) == (None, None)


def test_false_verdicts_among_equal_configurations_are_rare() -> None:
    """Five of them, ten pairs: any verdict is false. With 0.05 for all together, 30 of 300 are 4 deviations off."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        trials = [each for k in range(5) for each in repeated(k, rng.normal(0.9, 0.01, 3).tolist(), 3 * k)]
        tests = distinguishable(rank_repeats(trials, "maximize"), "maximize")
        wrong += any(test.better for test in tests)
    assert wrong < 30


# The winner and the median


@pytest.mark.parametrize(("count", "place"), [(2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (15, 7), (16, 7)])
def test_the_median_is_in_the_middle_and_of_two_the_better_one(count: int, place: int) -> None:
    trials = [trial(number, 0.9 - 0.01 * number) for number in range(count)]
    pair = winner_and_median([*trials, trial(90, None, state="diverged"), trial(91, 0.1, state="failed")], "maximize")
    assert pair is not None and numbers(pair) == [0, place]


def test_without_two_results_there_is_no_median() -> None:
    trials = [trial(0, 0.9), trial(1, None, state="diverged")]
    assert winner_and_median(trials, "maximize") is None
    assert "fewer than two configurations" in winner_against_median(trials, METRIC, "maximize")


def test_one_seed_each_cannot_tell_the_winner_from_the_median() -> None:
    trials = [trial(number, 0.9 - 0.1 * number) for number in range(5)]
    told = winner_against_median(trials, METRIC, "maximize")
    assert told.startswith("the best (trial 0) and the median (trial 2) differ by +20.00 pp")
    assert "can't be told" in told and "are distinguishable" not in told


@pytest.mark.parametrize("goal", ["maximize", "minimize"])
@pytest.mark.parametrize(("distance", "verdict"), [(0.05, "are distinguishable"), (0.0, "are not distinguishable")])
def test_repeats_of_both_tell_it_by_one_uncorrected_welch_test(goal: str, distance: float, verdict: str) -> None:
    sign = 1 if goal == "maximize" else -1
    search = [trial(number, sign * (0.9 - 0.01 * number)) for number in range(5)]
    best, median, third = (
        [sign * (mean + spread) for spread in (0, 0.004, 0.008)] for mean in (0.8, 0.8 - distance, 0.1)
    )
    trials = [*search, *repeated(0, best, 5), *repeated(2, median, 8), *repeated(4, third, 11)]
    told = winner_against_median(trials, "score", goal)
    expected = stats.ttest_ind(best, median, equal_var=False)
    assert told.startswith(f"the best (trial 0) and the median (trial 2) {verdict}: ")
    assert f"p {'< 0.001' if expected.pvalue < 0.0005 else f'{expected.pvalue:.3f}'} (Welch, new seeds)" in told
    low, high = expected.confidence_interval(0.95)
    assert f"{sign * distance + 0.0:+.4g}, 95 % interval {low:+.4g} to {high:+.4g}," in told


def test_a_winner_that_new_seeds_show_to_be_worse_is_called_so() -> None:
    search = [trial(number, 0.9 - 0.01 * number) for number in range(3)]
    trials = [*search, *repeated(0, [0.5, 0.51, 0.52], 3), *repeated(1, [0.8, 0.81, 0.82], 6)]
    assert "are distinguishable, but the median is better" in winner_against_median(trials, METRIC, "maximize")


def test_seeds_of_the_search_itself_tell_it_corrected_for_all_pairs() -> None:
    spread = (0.0, 0.01, 0.02)
    trials = [
        trial(3 * k + seed, 0.9 - 0.1 * k + spread[seed], {"norm": str(k), "seed": seed})
        for k in range(3)
        for seed in range(3)
    ]
    told = winner_against_median(trials, METRIC, "maximize")
    raw = [
        stats.ttest_ind(
            [0.9 - 0.1 * a + s for s in spread], [0.9 - 0.1 * b + s for s in spread], equal_var=False
        ).pvalue
        for a, b in itertools.combinations(range(3), 2)
    ]
    smallest, *others = sorted(raw)
    adjusted = max(3 * smallest, 2 * min(others))  # pairs 0-1 and 1-2 are equally far apart
    assert told.startswith(
        "the best (trial 0) and the median (trial 3) are distinguishable: +10.00 pp, 95 % interval +"
    )
    assert told.endswith(f"p {'< 0.001' if adjusted < 0.0005 else f'{adjusted:.3f}'} (Welch, Holm for 3 pairs)")


# The search as a whole


def test_importance_is_that_of_the_parameters_and_not_of_the_seed_or_of_repeats() -> None:
    rng = np.random.default_rng(0)
    trials = [
        trial(
            k,
            float(0.9 - 0.1 * np.log10(rate) ** 2),
            {"lr_max": float(rate), "dropout": float(rng.uniform()), "seed": k},
        )
        for k, rate in enumerate(10 ** rng.uniform(-2, 2, 40))
    ]
    found, reason = importance(trials, METRIC)
    assert found is not None and reason == ""
    assert list(found.shares) == ["lr_max", "dropout"] and found.shares["lr_max"] > 0.5
    assert found.count == 40
    more = [*trials, *repeated(0, [0.1] * 20, 40), trial(70, None, state="diverged"), trial(71, 0.9, state="failed")]
    assert importance(more, METRIC) == (found, reason)


def test_importance_of_few_trials_is_refused_with_the_reason() -> None:
    found, reason = importance([trial(number, 0.1 * number) for number in range(7)], METRIC)
    assert found is None
    assert reason == f"the importance of parameters for {METRIC} needs at least 8 trials that have it, but got 7"
    assert importance([], METRIC)[0] is None


def test_lists_are_choices_to_the_importance() -> None:
    choices = [[1, 2], [8, 9], [4]]
    trials = [trial(k, float(k % 3), {"steps": choices[k % 3]}) for k in range(15)]
    found, _ = importance(trials, METRIC)
    assert found is not None and found.explained > 0.9


def test_epochs_spared_are_those_of_the_stopped_trials() -> None:
    trials = [
        *(trial(0, 0.9, epochs=9), trial(1, 0.5, state="stopped", epochs=1), trial(2, 0.6, state="stopped", epochs=3)),
        *(trial(3, 0.2, state="diverged", epochs=2), trial(4, 0.1, state="failed", epochs=4)),
        *(trial(5, None, state="running"), trial(6, 0.9, repeat_of=0)),
    ]
    found = savings(trials, 9)
    assert (found.num_trials, found.num_stopped, found.epochs_run) == (4, 2, 9 + 1 + 3 + 2)
    assert found.epochs_full == 9 + 9 + 9 + 2
    assert found.share_stopped == 0.5
    assert found.share_saved == pytest.approx(14 / 29)
    assert savings([], 9).share_saved == savings([], 9).share_stopped == 0


def test_where_epochs_are_searched_a_trials_own_number_counts() -> None:
    trials = [trial(0, 0.5, {"epochs": 30}, "stopped", 3), trial(1, 0.5, {"epochs": 5}, "stopped", 3)]
    assert savings(trials, 9).epochs_full == 35


def test_the_time_left_is_the_mean_of_what_ended_shared_by_the_workers() -> None:
    ended = [
        *(trial(0, 0.5, seconds=10.0), trial(1, 0.5, state="stopped", seconds=4.0)),
        *(trial(2, None, state="failed", seconds=1.0), trial(3, None, state="diverged", seconds=5.0)),
    ]
    running = trial(4, None, state="running", seconds=None)
    assert time_left([*ended, running], 16, 2) == pytest.approx(5 * 12 / 2)
    assert time_left([*ended, running], 5, 4) == pytest.approx(5)  # one trial is one worker's
    assert time_left(ended, 4, 2) == 0 and time_left(ended, 3, 2) == 0
    assert time_left([running], 16, 2) is None
    assert time_left([trial(0, 0.5, seconds=None)], 16, 1) is None


def test_the_estimate_comes_true_on_average() -> None:
    """Workers that take trials of random length until none is left, from a quarter of the sweep on."""
    rng, ratios = np.random.default_rng(0), []
    for _ in range(200):
        seconds = rng.exponential(10, 64) + 2
        free, ends = [0.0] * 4, []
        for length in seconds:
            worker = int(np.argmin(free))
            free[worker] += float(length)
            ends.append(free[worker])
        order = np.argsort(ends)
        now = ends[order[15]]
        trials = [trial(int(k), 0.5, seconds=float(seconds[k])) for k in order[:16]]
        estimate = time_left(trials, 64, 4)
        assert estimate is not None
        ratios.append(estimate / (max(ends) - now))
    assert 0.8 < float(np.mean(ratios)) < 1.1


# What is told


def test_a_line_tells_the_trial_the_best_and_the_time_left() -> None:
    values = {"lr_max": 0.0123456, "norm": "batch", "steps": [1, 2], "nesterov": True, "path": "x" * 99}
    first, second = trial(3, 0.9123, values, "stopped", 3, seconds=12.34), trial(4, 0.5, {"lr_max": 1e-5}, seconds=75.0)
    text = line(first, 16, first, 302.0, METRIC)
    assert text == (
        "trial 3 of 16: stopped after 3 epochs, 91.23 %, the best so far; lr_max=0.01235, norm=batch, steps=[1, 2], "
        "nesterov=true, path=xxxxxxxxxxxx…xxxxxxxxxxx; 12.3 s; about 5 min 02 s left"
    )
    text = line(second, None, first, None, "val/loss")
    assert text == "trial 4: finished, 0.5; lr_max=1e-05; 1 min 15 s; best 0.9123 (trial 3)"


def test_a_line_about_a_failure_gives_the_reason_and_is_one_line() -> None:
    failed = trial(0, None, {"x": "a\nb"}, "failed", reason="out of\x1b[31m memory\n" + "y" * 300, seconds=None)
    text = line(failed, 2, None, None, METRIC)
    assert text.startswith("trial 0 of 2: failed (out of\ufffd[31m memory yyy") and text.endswith("; x=a b")
    assert "\n" not in text and len(text) < 150
    again = line(trial(9, 0.5, {}, repeat_of=4), 16, None, 0.0, METRIC)
    assert again == "trial 9 of 16 (repeats trial 4): finished, 50.00 %; 10.0 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.4, "59.4 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7260, "2 h 01 min")],
)
def test_durations_are_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_table_has_twenty_lines_and_says_how_many_more() -> None:
    trials = [trial(number, 1 - number / 100, {"lr_max": number + 0.5, "same": 1}) for number in range(64)]
    lines = table(rank(trials, "maximize"), METRIC, 100).split("\n")
    assert lines[0].split() == ["trial", METRIC, "lr_max"]  # what is the same everywhere is left out
    assert [row.split()[0] for row in lines[1:21]] == [str(number) for number in range(20)]
    assert lines[1].split() == ["0", "100.00", "%", "0.5"]
    assert lines[21:] == ["... and 44 more"]
    assert "more" not in table(rank(trials[:20], "maximize"), METRIC, 100)


def test_a_table_shows_seeds_and_remarks_only_where_there_are_some() -> None:
    plain = table(rank([trial(0, 0.5), trial(1, 0.6)], "maximize"), METRIC, 100)
    assert "seeds" not in plain and "remark" not in plain
    trials = [
        *(trial(0, 0.5, {"norm": "batch", "seed": 0}), trial(1, 0.7, {"norm": "batch", "seed": 1}, "stopped", 3)),
        trial(2, None, {"norm": "layer", "seed": 0}, "diverged", 2),
    ]
    head, batch, layer = table(rank(trials, "maximize"), METRIC, 120).split("\n")
    assert head.split() == ["trial", METRIC, "95", "%", "interval", "seeds", "norm", "remark"]
    assert batch.startswith("0, 1 ") and batch.endswith("1 of 2 stopped after 3 epochs") and " 60.00 % " in batch
    assert layer.split()[:3] == ["2", "-", "-"] and layer.endswith("diverged after 0 epochs")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_nothing_that_is_told_is_wider_than_the_terminal(width: int) -> None:
    rng = np.random.default_rng(0)
    trials = [
        trial(
            k,
            float(rng.uniform()),
            {"lr_max": float(rng.uniform()), "policy": f"{'名前' * 9}{k}", "a" * 60: k},
            "stopped",
            2,
        )
        for k in range(30)
    ]
    trials += [
        trial(30, None, state="failed", reason="no\nreason " * 30),
        *repeated(0, [0.1, 0.2], 31, trials[0].values),
    ]
    text = report(trials, METRIC, "maximize", 9, width)
    assert max(map(columns_of, text.split("\n"))) <= width


def test_a_report_tells_everything_there_is_to_tell() -> None:
    rng = np.random.default_rng(0)
    search = [
        trial(k, 0.9 - 0.02 * k, state="stopped" if k > 6 else "finished", epochs=3 if k > 6 else 9) for k in range(12)
    ]
    failed = trial(12, None, state="failed", reason="out of memory")
    pair = winner_and_median(search, "maximize")
    assert pair is not None
    again = [
        each
        for place, one in enumerate(pair)
        for each in repeated(one.number, rng.normal(one.mean or 0, 0.001, 3).tolist(), 13 + 3 * place)
    ]
    text = " ".join(report([*search, failed, *again], METRIC, "maximize", 9, 300).split())
    for part in (
        f"12 configurations by {METRIC}, highest first",
        "repeated with new seeds",
        "trial 0 is better than trial 5",
        "the best (trial 0) and the median (trial 5) are distinguishable",
        "stopped early: 5 of 12 trials; 78 of 108 epochs were run, 28 % were spared",
        "failed, and not ranked: trial 12 (out of memory)",
        "importance for",
    ):
        assert part in text
    assert "no trial has a result" in report([failed], METRIC, "maximize", None, 80)


def test_results_are_plain_finite_and_as_json_has_them() -> None:
    trials = [
        trial(0, math.nan, {"lr_max": math.inf}, "diverged"),
        *a_repeated_sweep()[1:],
        trial(20, None, state="failed", reason="out of memory"),
    ]
    found = results(trials, METRIC, "maximize", 9)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["trials"][0]["objective"] is None and found["trials"][0]["curve"] == [None] * 9
    assert found["best_trial"] == 1 and found["winner_and_median"] == [1, 2]
    assert [each["number"] for each in found["ranking"]["configurations"]] == [1, 2, 3, 4, 0]
    assert len(found["repeats"]["tests"]) == 3 and found["repeats"]["conclusion"].startswith("trial 1 is better")
    assert found["savings"]["share_saved"] == 0.0
    assert found["importance"] is None and "needs at least 8" in found["no_importance"]


def test_results_of_no_trial_are_empty() -> None:
    found = results([], METRIC, "minimize")
    assert (found["trials"], found["best_trial"], found["savings"]) == ([], None, None)


def test_the_ranking_needs_neither_torch_nor_wandb_nor_optuna() -> None:
    script = "import sys, eva.ranking; print({'torch', 'wandb', 'optuna', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
