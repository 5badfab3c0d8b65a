"""The distributions of a sweep, against W&B's own package and scipy."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps.config import schema_violations_from_proposed_config
from sweeps.config.schema import sweep_config_jsonschema
from sweeps.grid_search import grid_search_next_runs
from sweeps.params import HyperParameter

from eva.config import UserError
from eva.distributions import HAIR, KINDS, Distribution, config_problems, kind_of

# One parameter of each kind and more, as a sweep's YAML has them.
CONFIGS: dict[str, dict[str, Any]] = {
    "constant": {"value": [1, 2]},
    "categorical": {"values": ["a", 2, None, True, [1, 2]]},
    "categorical_w_probabilities": {"values": ["a", "b", "c", "d"], "probabilities": [0.1, 0.0, 0.6, 0.3]},
    "int_uniform": {"min": -2, "max": 5},
    "uniform": {"min": -1.5, "max": 2.0},
    "uniform of whole ends": {"distribution": "uniform", "min": 1, "max": 4},
    "q_uniform": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.1},
    "q_uniform of whole steps": {"distribution": "q_uniform", "min": 3, "max": 40, "q": 5},
    "log_uniform": {"distribution": "log_uniform", "min": -6, "max": 0},
    "log_uniform_values": {"distribution": "log_uniform_values", "min": 1e-5, "max": 0.1},
    "q_log_uniform": {"distribution": "q_log_uniform", "min": 0, "max": 4, "q": 2},
    "q_log_uniform_values": {"distribution": "q_log_uniform_values", "min": 16, "max": 512, "q": 0.5},
    "inv_log_uniform": {"distribution": "inv_log_uniform", "min": 1, "max": 6},
    "inv_log_uniform_values": {"distribution": "inv_log_uniform_values", "min": 0.01, "max": 10},
    "normal": {"distribution": "normal", "mu": 3, "sigma": 0.5},
    "normal by default": {"distribution": "normal"},
    "q_normal": {"distribution": "q_normal", "mu": 1.0, "sigma": 2.0, "q": 0.25},
    "log_normal": {"distribution": "log_normal", "mu": -3.0, "sigma": 1.0},
    "q_log_normal": {"distribution": "q_log_normal", "mu": 2, "sigma": 1},
    "beta": {"distribution": "beta", "a": 2, "b": 5},
    "beta by default": {"distribution": "beta"},
    "q_beta": {"distribution": "q_beta", "a": 0.5, "b": 0.5, "q": 0.2},
}

# scipy's own distribution of what is not rounded.
SCIPY: dict[str, Any] = {
    "uniform": scipy.stats.uniform(-1.5, 3.5),
    "uniform of whole ends": scipy.stats.uniform(1, 3),
    "log_uniform": scipy.stats.loguniform(math.exp(-6), 1),
    "log_uniform_values": scipy.stats.loguniform(1e-5, 0.1),
    "inv_log_uniform": scipy.stats.loguniform(math.exp(-6), math.exp(-1)),
    "inv_log_uniform_values": scipy.stats.loguniform(0.01, 10),
    "normal": scipy.stats.norm(3, 0.5),
    "normal by default": scipy.stats.norm(),
    "log_normal": scipy.stats.lognorm(1.0, scale=math.exp(-3)),
    "beta": scipy.stats.beta(2, 5),
    "beta by default": scipy.stats.uniform(),
}


def draws(name: str, count: int = 4000) -> list[Any]:
    """Returns values of a parameter at uniform quantiles, the same in each call."""
    distribution = Distribution.from_config(CONFIGS[name])
    return [distribution.value_at(quantile) for quantile in np.random.default_rng(0).random(count).tolist()]


def test_every_kind_of_the_schema_is_there_and_none_else() -> None:
    """The names of W&B's schema are those that eva knows, and each is tested."""
    definitions = sweep_config_jsonschema["definitions"]
    shapes = [
        shape for key, entry in definitions.items() if key.startswith("param") for shape in entry.get("anyOf", [entry])
    ]
    named = [name for shape in shapes for name in shape.get("properties", {}).get("distribution", {}).get("enum", [])]
    assert set(named) == set(KINDS) == {kind_of(config) for config in CONFIGS.values()}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_those_of_wandb(name: str) -> None:
    """At 2,000 quantiles, W&B's function gives the same values; whole where ours are whole."""
    ours, theirs = Distribution.from_config(CONFIGS[name]), HyperParameter("x", CONFIGS[name])
    for quantile in np.random.default_rng(1).uniform(1e-6, 1 - 1e-6, 2000).tolist():
        got, expected = ours.value_at(quantile), theirs.ppf(quantile)
        if ours.kind in ("constant", "categorical", "categorical_w_probabilities"):
            assert got is expected or got == expected
            continue
        assert got == pytest.approx(float(expected), rel=1e-9, abs=1e-12)
        assert type(got) is (int if isinstance(np.asarray(expected).item(), int) else float)


@pytest.mark.parametrize("name", SCIPY)
def test_draws_have_the_shape_of_scipys_distribution(name: str) -> None:
    """4,000 draws pass the Kolmogorov-Smirnov test at 1 %, and lie within the distribution's ends."""
    values = draws(name)
    assert scipy.stats.kstest(values, SCIPY[name].cdf).pvalue > 0.01
    low, high = SCIPY[name].support()
    assert min(values) >= low - 1e-12 and max(values) <= high + 1e-12


@pytest.mark.parametrize(
    "name, base",
    [
        ("q_uniform", scipy.stats.uniform()),
        ("q_uniform of whole steps", scipy.stats.uniform(3, 37)),
        ("q_log_uniform", scipy.stats.loguniform(1, math.exp(4))),
        ("q_log_uniform_values", scipy.stats.loguniform(16, 512)),
        ("q_normal", scipy.stats.norm(1, 2)),
        ("q_log_normal", scipy.stats.lognorm(1, scale=math.exp(2))),
        ("q_beta", scipy.stats.beta(0.5, 0.5)),
    ],
)
def test_rounded_draws_have_the_chance_of_what_rounds_to_them(name: str, base: Any) -> None:
    """Each value's count is within 4 sigmas of what the distribution gives the interval around it."""
    values, step = draws(name), Distribution.from_config(CONFIGS[name]).q
    assert step is not None
    for value in set(values):
        chance = base.cdf(value + step / 2) - base.cdf(value - step / 2)
        sigma = math.sqrt(len(values) * chance * (1 - chance))
        assert abs(values.count(value) - len(values) * chance) <= 4 * sigma + 1


@pytest.mark.parametrize("name", ["categorical", "categorical_w_probabilities", "int_uniform"])
def test_listed_values_come_as_often_as_they_should(name: str) -> None:
    """Counts are within 4 sigmas of the chances; what has none never comes."""
    distribution, values = Distribution.from_config(CONFIGS[name]), draws(name)
    listed = list(distribution.values) or list(range(-2, 6))
    chances = distribution.probabilities or [1 / len(listed)] * len(listed)
    for value, chance in zip(listed, chances, strict=True):
        count = sum(type(drawn) is type(value) and drawn == value for drawn in values)
        assert abs(count - len(values) * chance) <= 4 * math.sqrt(len(values) * chance * (1 - chance))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ends_of_the_quantiles_have_plain_finite_values(name: str) -> None:
    """At 0 and just below 1, where scipy has infinities or steps out of a list."""
    distribution = Distribution.from_config(CONFIGS[name])
    for quantile in (0.0, 1e-300, math.nextafter(1, 0)):
        value = distribution.value_at(quantile)
        assert type(value) in (int, float, str, list, bool, type(None))
        if distribution.values:
            assert value in distribution.values
        else:
            assert math.isfinite(value)
            if distribution.min is not None and distribution.kind in ("int_uniform", "uniform", "log_uniform_values"):
                assert distribution.min <= value <= distribution._ends[1]


def test_what_has_no_chance_never_comes_even_where_the_sum_falls_short() -> None:
    """W&B puts up with a sum of a little below 1. The rest goes to the last value that can come."""
    distribution = Distribution.from_config({"values": ["a", "b", "c"], "probabilities": [0.0, 0.999995, 0.0]})
    assert {distribution.value_at(quantile) for quantile in (0.0, 0.5, 0.999996, 1 - HAIR)} == {"b"}


@pytest.mark.parametrize("quantile", [1.0, -0.1, math.nan])
def test_a_quantile_outside_is_refused(quantile: float) -> None:
    """1 is no quantile: a list has no value there."""
    with pytest.raises(ValueError, match=r"quantile must be in \[0, 1\)"):
        Distribution.from_config({"values": [1, 2]}).value_at(quantile)


@settings(deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.sampled_from([0.1, 0.3, 0.05, 0.7, 1e-3, 2.5e-5]))
def test_rounded_values_are_the_shortest_decimals(quantile: float, step: float) -> None:
    """A multiple of 0.1 is 0.3 and never 0.30000000000000004: no more decimals than the step has."""
    value = Distribution.from_config({"distribution": "q_uniform", "min": 0.0, "max": 9.0, "q": step}).value_at(
        quantile
    )
    decimals = {0.1: 1, 0.3: 1, 0.05: 2, 0.7: 1, 1e-3: 3, 2.5e-5: 6}[step]
    assert value == round(value, decimals)


@settings(deadline=None)
@given(st.sampled_from(sorted(set(CONFIGS) - {"constant", "categorical", "categorical_w_probabilities"})), st.data())
def test_a_higher_quantile_never_has_a_lower_value(name: str, data: st.DataObject) -> None:
    """An inverse distribution function rises."""
    low, high = sorted(data.draw(st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2)))
    distribution = Distribution.from_config(CONFIGS[name])
    value = distribution.value_at(high)
    assert distribution.value_at(low) <= value + 1e-12 * abs(value)


@pytest.mark.parametrize(
    "config",
    [
        {"values": ["a", 2, None, True]},
        {"min": -2, "max": 5},
        {"distribution": "q_uniform", "min": 0, "max": 10, "q": 3},
        {"distribution": "q_uniform", "min": 0, "max": 4},
        {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.1},
        {"distribution": "q_uniform", "min": 1, "max": 1.3, "q": 0.1},  # dust brings numpy to include the end here
        {"distribution": "q_uniform", "min": 0.5, "max": 3, "q": 1},
    ],
)
def test_grid_values_are_those_of_wandbs_grid_search(config: dict[str, Any]) -> None:
    """W&B's grid search, asked for more runs than there are, gives the same values in the same order, and stops."""
    runs = grid_search_next_runs([], {"method": "grid", "parameters": {"x": config}}, n=50)
    expected = [run.config["x"]["value"] for run in runs if run is not None]
    distribution = Distribution.from_config(config)
    values = distribution.grid_values
    assert values is not None
    assert len(values) == distribution.grid_size == len(expected)
    for got, theirs in zip(values, expected, strict=True):
        assert type(got) is type(theirs)
        assert got == (pytest.approx(theirs, rel=1e-12) if isinstance(theirs, float) else theirs)


def test_grid_values_have_no_dust() -> None:
    """Where W&B has 0.30000000000000004, a run shall have 0.3."""
    config = {"distribution": "q_uniform", "min": 0.0, "max": 0.5, "q": 0.1}
    assert Distribution.from_config(config).grid_values == (0.0, 0.1, 0.2, 0.3, 0.4)


def test_a_constant_is_a_grid_of_one_and_the_others_have_none() -> None:
    """Null too can be a constant. W&B refuses every other kind in a grid."""
    assert Distribution.from_config({"value": None}).grid_values == (None,)
    gridded = ("constant", "categorical", "int_uniform", "q_uniform")
    gridless = [name for name, config in CONFIGS.items() if kind_of(config) not in gridded]
    for name in gridless:
        assert Distribution.from_config(CONFIGS[name]).grid_values is None
        with pytest.raises(ValueError, match="disallowed type"):
            grid_search_next_runs([], {"method": "grid", "parameters": {"x": CONFIGS[name]}})


@pytest.mark.parametrize(
    "config, place, told",
    [
        ({}, (), "needs value, values, min and max, or a distribution"),
        ({"mu": 0, "sigma": 1}, (), "or a distribution"),
        (
            {"distribution": "log_uniform_value", "min": 1, "max": 2},
            ("distribution",),
            "did you mean 'log_uniform_values'",
        ),
        ({"distribution": 3, "min": 1}, ("distribution",), "must be a name, but got 3"),
        ({"distribution": "normal", "min": 1}, ("min",), "normal has no 'min'"),
        ({"values": [1], "min": 1}, ("min",), "categorical has no 'min'"),
        ({"value": 1, "values": [1]}, ("values",), "constant has no 'values'; did you mean 'value'"),
        ({"min": 0.0, "max": 1.0, "q": 0.1}, ("q",), "did you mean distribution: q_uniform"),
        ({"min": 1}, (), "int_uniform needs max"),
        ({"distribution": "uniform", "min": True, "max": 2}, ("min",), "min must be a number, but got True"),
        ({"min": 0.1, "max": "1e-5"}, ("max",), "got '1e-5': YAML reads it as text, write 1.0e-05"),
        ({"min": 0.1, "max": None}, ("max",), "max must be a number, but got None"),
        ({"min": 0.1, "max": math.inf}, ("max",), "max must be finite, but got inf"),
        ({"min": math.nan, "max": 1.0}, ("min",), "min must be finite, but got nan"),
        ({"distribution": "int_uniform", "min": 1.0, "max": 2}, ("min",), "must be a whole number, but got 1.0"),
        ({"min": 3, "max": 3}, ("min",), "min must be below max, but got min=3, max=3"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, ("min",), "must be above 0"),
        ({"distribution": "q_log_uniform_values", "min": 0, "max": 10}, ("min",), "must be above 0"),
        ({"distribution": "normal", "sigma": 0}, ("sigma",), "sigma must be above 0, but got 0"),
        ({"distribution": "beta", "a": 0}, ("a",), "a must be above 0"),
        ({"distribution": "q_beta", "q": -1}, ("q",), "q must be above 0"),
        ({"values": []}, ("values",), "a list with something in it"),
        ({"values": 3}, ("values",), "must be a list"),
        ({"values": [1, 2, 1.0]}, ("values", 2), "the value 1.0 is there twice"),
        ({"values": [{"a": 1, "b": 2}, {"b": 2, "a": 1}]}, ("values", 1), "is there twice"),
        ({"values": [1, 2], "probabilities": [0.5]}, ("probabilities",), "got 1 for 2"),
        ({"values": [1, 2], "probabilities": [0.5, 0.4]}, ("probabilities",), "sum of 1, but got 0.9"),
        ({"values": [1, 2], "probabilities": [1.5, 0]}, ("probabilities", 0), r"number in \[0, 1\], but got 1.5"),
        ({"values": [1, 2], "probabilities": [1, "0"]}, ("probabilities", 1), "but got '0'"),
        ({"distribution": "log_uniform", "min": 1, "max": 1000}, (), "too large for a float"),
        ({"distribution": "log_normal", "sigma": 100}, (), "too large for a float"),
        ({"distribution": "uniform", "min": 1, "max": 10**400}, (), "too large for a float"),
        (
            {"distribution": "q_uniform", "min": 0.1, "max": 0.4},
            ("q",),
            "q=1.0 rounds every value of this q_uniform to 0.0",
        ),
    ],
)
def test_each_mistake_is_told_with_its_place(config: dict[str, Any], place: tuple[str | int, ...], told: str) -> None:
    """One mistake, one problem, and the sentence that from_config raises."""
    assert [where for where, _ in config_problems(config)] == [place]
    with pytest.raises(UserError, match=told):
        Distribution.from_config(config)


def test_all_mistakes_of_a_parameter_are_told_at_once() -> None:
    """Three wrong things are three problems."""
    problems = config_problems({"distribution": "q_normal", "mu": "0", "sigma": -1, "quantum": 2})
    assert [place for place, _ in problems] == [("quantum",), ("mu",), ("sigma",)]


def test_one_and_true_are_two_values_as_in_wandbs_grid() -> None:
    """Python calls them equal, W&B's grid does not."""
    runs = grid_search_next_runs([], {"method": "grid", "parameters": {"x": {"values": [1, True, "1"]}}}, n=5)
    assert len([run for run in runs if run is not None]) == 3
    assert Distribution.from_config({"values": [1, True, "1"]}).grid_values == (1, True, "1")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_accepted_here_is_accepted_by_wandb(name: str) -> None:
    """W&B's schema finds nothing wrong with the same parameters, but for the names that it wants no more."""
    violations = schema_violations_from_proposed_config({"method": "random", "parameters": {"x": CONFIGS[name]}})
    assert all("min/max specify base-e exponents" in violation for violation in violations)


def test_the_clamped_quantile_is_as_near_as_it_gets() -> None:
    """HAIR below 1 is the float next to 1, so that no quantile needs to be clamped there."""
    assert math.nextafter(1, 0) == 1 - HAIR
