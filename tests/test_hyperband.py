"""W&B's early stopping, against W&B's own package and by hand."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps.config import schema_violations_from_proposed_config
from sweeps.hyperband_stopping import hyperband_stop_runs
from sweeps.run import RunState, SweepRun

from eva.config import UserError
from eva.hyperband import Hyperband, config_problems

# Few different values, so that ties are common; and the ones that don't count.
VALUES = st.sampled_from([0.1, 0.2, 0.2500001, 0.3, 0.5, -1.0, math.nan, math.inf, -math.inf]) | st.floats(-2, 2)
CURVES = st.lists(st.lists(VALUES, max_size=14), min_size=1, max_size=8)
CONFIGS = st.one_of(
    st.fixed_dictionaries(
        {"min_iter": st.integers(1, 6)},
        optional={"eta": st.sampled_from([1.1, 1.5, 2, 2.7, 3, 4]), "strict": st.booleans()},
    ),
    st.fixed_dictionaries(
        {"max_iter": st.integers(4, 27), "s": st.integers(1, 5)},
        optional={"eta": st.sampled_from([1.3, 1.5, 2, 2.7, 3, 4]), "strict": st.booleans()},
    ),
)


def sweep_config(early_terminate: Mapping[str, Any], goal: str = "maximize") -> dict[str, Any]:
    """Returns a sweep's configuration as W&B's package takes it."""
    metric, parameters = {"name": "m", "goal": goal}, {"x": {"values": [1, 2]}}
    return {"method": "random", "metric": metric, "early_terminate": dict(early_terminate), "parameters": parameters}


@settings(max_examples=400, deadline=None)
@given(CURVES, CONFIGS, st.sampled_from(["minimize", "maximize"]), st.data())
def test_the_same_trials_are_stopped_as_by_wandb(
    curves: list[list[float]], config: dict[str, Any], goal: str, data: st.DataObject
) -> None:
    """Random curves, some of ended trials: the decision about each running one is W&B's."""
    config = {"type": "hyperband", **config}
    running = [data.draw(st.booleans()) for _ in curves]
    runs = [
        SweepRun(
            name=str(number),
            state=RunState.running if runs_on else RunState.finished,
            history=[{"m": value} for value in curve],
        )
        for number, (curve, runs_on) in enumerate(zip(curves, running, strict=True))
    ]
    expected = {run.name for run in hyperband_stop_runs(runs, sweep_config(config, goal))}
    hyperband = Hyperband.from_config(config)
    stopped = {
        str(number)
        for number, curve in enumerate(curves)
        if running[number] and hyperband.stops(curve, curves[:number] + curves[number + 1 :], goal)
    }
    assert stopped == expected


@settings(deadline=None)
@given(CONFIGS)
def test_bands_are_those_of_wandb(config: dict[str, Any]) -> None:
    """W&B tells its bands in a run's information; ours are the same without repetitions, up to 2**31."""
    config = {"type": "hyperband", **config}
    run = SweepRun(name="a", state=RunState.running, history=[{"m": 1.0}])
    hyperband_stop_runs([run], sweep_config(config))
    assert run.early_terminate_info is not None
    expected = sorted({band for band in run.early_terminate_info["bands"] if band <= 2**31})
    assert list(Hyperband.from_config(config).bands) == expected


@pytest.mark.parametrize(
    "config, bands",
    [
        ({"min_iter": 3}, (3, 9, 27, 81)),
        ({"min_iter": 1, "eta": 2}, (1, 2, 4, 8)),
        ({"max_iter": 27, "s": 2}, (3, 9)),
        ({"max_iter": 27, "s": 9}, (1, 3, 9)),
        ({"max_iter": 8, "s": 3, "eta": 2}, (1, 2, 4)),
    ],
)
def test_bands_by_hand(config: dict[str, Any], bands: tuple[int, ...]) -> None:
    """The examples of W&B's documentation, and halves."""
    hyperband = Hyperband.from_config({"type": "hyperband", **config})
    assert hyperband.bands[: len(bands)] == bands
    assert len(hyperband.bands) == len(bands) or "min_iter" in config


def test_the_best_third_goes_on() -> None:
    """Of nine trials at a band, eta 3 stops those that are worse than the fourth: what stands at a third is kept."""
    hyperband = Hyperband((2,), 3, strict=True)
    curves = [[0.0, accuracy / 10] for accuracy in range(9)]
    kept = [
        number
        for number in range(9)
        if not hyperband.stops(curves[number], curves[:number] + curves[number + 1 :], "maximize")
    ]
    assert kept == [5, 6, 7, 8]


def test_the_first_trial_at_a_band_is_never_stopped() -> None:
    """Nobody else has reached it, so there is nothing to be worse than."""
    hyperband = Hyperband((2, 4), 2, strict=True)
    assert not hyperband.stops([0.1, 0.1, 0.1], [[0.9], []], "maximize")


def test_before_its_first_band_a_trial_is_left_alone() -> None:
    """However bad it is."""
    assert not Hyperband((3,), 3, strict=True).stops([0.1, 0.1], [[0.9] * 5] * 9, "maximize")


def test_strict_judges_the_band_and_not_strict_the_best() -> None:
    """A trial that was better before the band, or after it, is stopped by the strict rule alone."""
    others = [[0.5, 0.5, 0.5]] * 5
    for curve in ([0.9, 0.2, 0.2], [0.1, 0.2, 0.9]):
        assert Hyperband((2,), 3, strict=True).stops(curve, others, "maximize")
        assert not Hyperband((2,), 3, strict=False).stops(curve, others, "maximize")


def test_values_that_are_not_finite_are_no_iterations() -> None:
    """A trial of three values, one of them NaN, has not reached the third band."""
    hyperband, others = Hyperband((3,), 3, strict=True), [[0.9, 0.9, 0.9]] * 5
    assert not hyperband.stops([0.1, math.nan, 0.1], others, "maximize")
    assert hyperband.stops([0.1, math.nan, 0.1, 0.1], others, "maximize")


def test_the_goal_decides_what_is_worse() -> None:
    """The same curve is stopped as an accuracy and goes on as a loss."""
    hyperband, others = Hyperband((1,), 3, strict=True), [[0.9]] * 5
    assert hyperband.stops([0.1], others, "maximize")
    assert not hyperband.stops([0.1], others, "minimize")


def test_defaults_are_wandbs() -> None:
    """eta 3 and the strict rule."""
    hyperband = Hyperband.from_config({"type": "hyperband", "min_iter": 1})
    assert (hyperband.eta, hyperband.strict) == (3, True)


@pytest.mark.parametrize(
    "config, key, told",
    [
        ({"min_iter": 3}, None, "needs type: hyperband"),
        ({"type": "median", "min_iter": 3}, "type", "type must be hyperband, but got 'median'"),
        ({"type": "hyperband"}, None, "needs min_iter, or max_iter and s"),
        ({"type": "hyperband", "max_iter": 27}, None, "with max_iter needs s"),
        ({"type": "hyperband", "max_iter": 27, "s": 2, "min_iter": 3}, "min_iter", "W&B ignores min_iter"),
        ({"type": "hyperband", "min_iter": 3, "s": 2}, "s", "s with max_iter only"),
        ({"type": "hyperband", "min_iter": 0}, "min_iter", "a whole number from 1 to 2147483648, but got 0"),
        ({"type": "hyperband", "min_iter": 2.0}, "min_iter", "but got 2.0"),
        ({"type": "hyperband", "min_iter": True}, "min_iter", "but got True"),
        ({"type": "hyperband", "max_iter": 9, "s": 0}, "s", "but got 0"),
        ({"type": "hyperband", "min_iter": 3, "eta": 1}, "eta", "a number above 1, but got 1"),
        ({"type": "hyperband", "min_iter": 3, "eta": math.inf}, "eta", "but got inf"),
        ({"type": "hyperband", "min_iter": 3, "strict": "true"}, "strict", "true or false, but got 'true'"),
        (
            {"type": "hyperband", "max_iter": 2, "s": 3},
            "max_iter",
            "at least eta, or there is no band below it, but got 2",
        ),
        ({"type": "hyperband", "min_iters": 3, "min_iter": 1}, "min_iters", "did you mean 'min_iter'"),
    ],
)
def test_each_mistake_is_told_with_its_key(config: dict[str, Any], key: str | None, told: str) -> None:
    """One mistake, one problem, and the sentence that from_config raises."""
    assert [place for place, _ in config_problems(config)] == [key]
    with pytest.raises(UserError, match=told):
        Hyperband.from_config(config)


def test_all_mistakes_are_told_at_once() -> None:
    """Four wrong things are four problems."""
    config = {"type": "x", "min_iter": -1, "eta": "3", "strict": 1}
    assert [key for key, _ in config_problems(config)] == ["type", "min_iter", "eta", "strict"]


@settings(deadline=None)
@given(CONFIGS)
def test_what_is_accepted_here_is_accepted_by_wandb(config: dict[str, Any]) -> None:
    """W&B's schema finds nothing wrong with it."""
    config = {"type": "hyperband", **config}
    assert not config_problems(config)
    assert not schema_violations_from_proposed_config(sweep_config(config))


def test_a_band_that_no_number_holds_is_none() -> None:
    """A huge eta ends the bands, without an overflow."""
    assert Hyperband.from_config({"type": "hyperband", "min_iter": 1, "eta": 1e308}).bands == (1,)
