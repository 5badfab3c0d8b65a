"""The importance of settings is about what they do to the metric, and is not fooled by what does nothing."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from eva.importance import as_numbers, measure_importance, rank_correlation


def sweep(count: int, seed: int = 0) -> dict[str, list[Any]]:
    """Random settings: a rate, a name, a truth value, and a number that takes a value of its own in every run."""
    rng = np.random.default_rng(seed)
    return {
        "lr_max": (10 ** rng.uniform(-3, 0, count)).tolist(),
        "norm": rng.choice(["batch", "group", "layer"], count).tolist(),
        "nesterov": [bool(value) for value in rng.integers(0, 2, count)],
        "weight_decay": rng.uniform(0, 1, count).tolist(),
    }


def test_a_setting_that_decides_the_metric_is_first_and_one_that_does_nothing_is_near_zero() -> None:
    settings = sweep(60)
    values = [
        0.9 - 0.1 * np.log10(lr) ** 2 + 0.05 * (norm == "batch")
        for lr, norm in zip(settings["lr_max"], settings["norm"], strict=True)
    ]
    found = measure_importance(settings, values)
    assert list(found.shares)[:2] == ["lr_max", "norm"]
    assert found.shares["lr_max"] > 0.5
    assert abs(found.shares["nesterov"]) < 0.05 and abs(found.shares["weight_decay"]) < 0.1
    assert found.explained > 0.7 and found.count == 60


def test_a_metric_that_no_setting_decides_is_not_explained() -> None:
    noise = np.random.default_rng(1).normal(0, 1, 40).tolist()
    found = measure_importance(sweep(40), noise)
    assert found.explained < 0.1
    assert max(found.shares.values()) < 0.3


def test_shares_are_those_of_exchanging_every_value_for_every_other() -> None:
    # One setting decides: exchanging it uniformly costs the mean squared difference of two runs, twice the variance.
    settings: dict[str, list[Any]] = {"norm": ["batch", "layer"] * 20, "seedless": list(range(40))}
    values = [1.0 if norm == "batch" else 0.0 for norm in settings["norm"]]
    found = measure_importance(settings, values)
    assert found.explained == pytest.approx(1, abs=1e-9)
    assert found.shares == pytest.approx({"norm": 2, "seedless": 0}, abs=1e-9)


def test_rank_correlations_are_scipys_and_only_of_numbers() -> None:
    settings, values = sweep(30), np.random.default_rng(2).normal(0, 1, 30).round(1).tolist()
    settings["epochs"] = [5, 10, 20] * 10
    found = measure_importance(settings, values)
    assert found.correlations.keys() == {"lr_max", "weight_decay", "epochs"}
    for name, correlation in found.correlations.items():
        assert correlation == pytest.approx(spearmanr(settings[name], values).statistic, abs=1e-12)


def test_equal_values_share_their_rank() -> None:
    a, b = np.array([1.0, 1.0, 2.0, 3.0, 3.0, 3.0]), np.array([5.0, 4.0, 4.0, 9.0, 1.0, 2.0])
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_the_same_runs_give_the_same_importance() -> None:
    settings, values = sweep(12), np.linspace(0, 1, 12).tolist()
    assert measure_importance(settings, values) == measure_importance(settings, values)


@pytest.mark.parametrize(
    ("settings", "values", "reason"),
    [
        ({"norm": ["batch"] * 7}, [0.1] * 7, "needs at least 8 runs that have it, but got 7"),
        ({"norm": ["batch"] * 8}, list(range(8)), "needs runs that differ"),
        ({"norm": ["batch", "layer"] * 4}, [0.5] * 8, "needs runs that differ"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_reason(
    settings: dict[str, list[Any]], values: list[float], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        measure_importance(settings, values)


def test_a_setting_that_is_the_same_in_all_runs_has_no_importance() -> None:
    found = measure_importance({"norm": ["batch", "layer"] * 5, "epochs": [3] * 10}, [0.0, 1.0] * 5)
    assert found.shares.keys() == {"norm"}


def test_none_is_below_all_numbers_and_names_are_apart() -> None:
    assert as_numbers([0.5, None, 2]).tolist() == [0.5, -0.5, 2]
    assert len(set(as_numbers(["b", (1, 2), None, True]).tolist())) == 4
