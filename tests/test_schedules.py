"""Schedules against closed forms and torch's schedulers, at every step and at the extremes of their settings."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from eva.config import Layer, RunConfig, resolve
from eva.schedules import Rates, build_schedule

SCHEDULES = ("onecycle", "cosine_onecycle", "cosine", "constant", "step", "plateau", "triangular")
LOW, HIGH = 0.02, 0.3

untimed = settings(deadline=None)  # torch's first optimizer takes seconds


def config_of(**settings: Any) -> RunConfig:
    return resolve([Layer("test", {"lr_min": LOW, "lr_max": HIGH, **settings})])[0]


def rates_of(config: RunConfig, steps_per_epoch: int, losses: Sequence[float] | None = None) -> list[Rates]:
    """The rates of every step, told the losses of the epochs that ended before it (all alike by default)."""
    losses = [1.0] * config.epochs if losses is None else losses
    schedule = build_schedule(config, steps_per_epoch)
    return [schedule(step, losses[: step // steps_per_epoch]) for step in range(config.epochs * steps_per_epoch)]


def lrs_of(config: RunConfig, steps_per_epoch: int, losses: Sequence[float] | None = None) -> list[float]:
    return [rates.lr for rates in rates_of(config, steps_per_epoch, losses)]


def torch_rates(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> tuple[list[float], list[float]]:
    """The rate and the momentum that one of torch's schedulers sets for each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=HIGH, momentum=0.9)
    scheduler = make(optimizer)
    lrs, momenta = [], []
    for _ in range(steps):
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        momenta.append(float(optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        scheduler.step()
    return lrs, momenta


# one cycle


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "peak_epoch"), [(24, 98, 5), (3, 1, 1), (2, 10, 0.3), (5, 7, 4.2)]
)
def test_one_cycle_is_linear_up_to_the_peak_and_down_to_the_last_step(
    epochs: int, steps_per_epoch: int, peak_epoch: float
) -> None:
    lrs = lrs_of(config_of(schedule="onecycle", epochs=epochs, peak_epoch=peak_epoch), steps_per_epoch)
    last, peak = epochs * steps_per_epoch - 1, round(peak_epoch * steps_per_epoch)
    for step, lr in enumerate(lrs):
        # The lower of the two straight lines through (0, LOW), (peak, HIGH) and (last, LOW).
        up = LOW + (HIGH - LOW) * step / peak
        down = LOW + (HIGH - LOW) * (last - step) / (last - peak)
        assert lr == pytest.approx(min(up, down), rel=1e-12)
    # No annihilation: it ends where it began.
    assert lrs[0] == lrs[-1] == LOW
    assert lrs.index(max(lrs)) == peak and max(lrs) == pytest.approx(HIGH)


@untimed
@given(st.integers(3, 8), st.integers(1, 9), st.floats(0, 1), st.floats(0.1, 0.9))
def test_cosine_one_cycle_is_torchs(epochs: int, steps_per_epoch: int, share: float, momentum_min: float) -> None:
    total = epochs * steps_per_epoch
    peak = 1 + round(share * (total - 3))  # 1 to total - 2: torch divides by zero outside
    config = config_of(
        schedule="cosine_onecycle",
        epochs=epochs,
        peak_epoch=peak / steps_per_epoch,
        momentum=0.95,
        momentum_min=momentum_min,
    )

    lrs, momenta = torch_rates(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=HIGH,
            total_steps=total,
            pct_start=(peak + 1) / total,  # its first phase ends at pct_start * total_steps - 1
            anneal_strategy="cos",
            cycle_momentum=True,
            base_momentum=momentum_min,
            max_momentum=0.95,
            div_factor=HIGH / LOW,
            final_div_factor=1e4,
        ),
        total,
    )
    rates = rates_of(config, steps_per_epoch)
    assert [rate.lr for rate in rates] == pytest.approx(lrs, rel=1e-9, abs=1e-12)
    assert [rate.momentum for rate in rates] == pytest.approx(momenta, rel=1e-9)


@pytest.mark.parametrize(("schedule", "peak"), [("onecycle", 4), ("cosine_onecycle", 4), ("triangular", 5)])
def test_momentum_mirrors_the_rate_between_its_bounds(schedule: str, peak: int) -> None:
    config = config_of(schedule=schedule, epochs=2, peak_epoch=0.8, cycle_epochs=1, momentum=0.95, momentum_min=0.8)
    rates = rates_of(config, 5)
    assert rates[0].momentum == 0.95
    assert rates[peak].momentum == pytest.approx(0.8)
    for rate in rates[: peak + 1]:  # cosine's way down is to another floor
        assert rate.momentum == pytest.approx(0.95 - 0.15 * (rate.lr - LOW) / (HIGH - LOW))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_momentum_is_constant_unless_it_is_asked_to_cycle(schedule: str) -> None:
    config = config_of(schedule=schedule, epochs=4, peak_epoch=2, lr_steps=[1], momentum=0.85)
    assert {rates.momentum for rates in rates_of(config, 3)} == {0.85}


# the other schedules


@untimed
@given(
    losses=st.lists(
        st.one_of(
            st.floats(-2, 5),
            st.sampled_from([1.0, 0.9999, 0.99991, 0.99989, math.nan, math.inf, -math.inf]),
        ),
        max_size=40,
    ),
    patience=st.integers(1, 4),
    low=st.sampled_from([0.0, 1e-3, HIGH]),
)
def test_plateau_drops_when_torchs_does(losses: list[float], patience: int, low: float) -> None:
    config = config_of(schedule="plateau", epochs=len(losses) + 1, patience=patience, lr_min=low, lr_factor=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=HIGH)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="min", factor=0.5, patience=patience, threshold=1e-4, min_lr=low, eps=0
    )
    expected = [HIGH]
    for loss in losses:
        scheduler.step(loss)
        expected.append(float(optimizer.param_groups[0]["lr"]))
    lrs = lrs_of(config, 2, losses)
    assert lrs[::2] == lrs[1::2]  # an epoch has one rate
    assert lrs[::2] == pytest.approx(expected, rel=1e-12)


@untimed
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_step_is_torchs_multi_step(milestones: list[int]) -> None:
    milestones = sorted(milestones)
    config = config_of(schedule="step", epochs=8, lr_steps=[at / 4 for at in milestones], lr_factor=0.3)
    expected, _ = torch_rates(lambda optimizer: lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.3), 32)
    assert lrs_of(config, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(10, 13), (1, 1), (2, 1)])
def test_cosine_is_torchs_cosine_annealing(epochs: int, steps_per_epoch: int) -> None:
    total = epochs * steps_per_epoch
    expected, _ = torch_rates(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=LOW), total)
    config = config_of(schedule="cosine", epochs=epochs)
    assert lrs_of(config, steps_per_epoch) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("cycle_epochs", [0.2, 0.5, 2, 100])
def test_triangular_is_torchs_cyclic(cycle_epochs: float) -> None:
    lrs, momenta = torch_rates(
        lambda optimizer: lr_scheduler.CyclicLR(
            optimizer,
            base_lr=LOW,
            max_lr=HIGH,
            step_size_up=round(10 * cycle_epochs),
            mode="triangular",
            cycle_momentum=True,
            base_momentum=0.8,
            max_momentum=0.95,
        ),
        90,
    )
    config = config_of(schedule="triangular", epochs=9, cycle_epochs=cycle_epochs, momentum=0.95, momentum_min=0.8)
    rates = rates_of(config, 10)
    assert [rate.lr for rate in rates] == pytest.approx(lrs, rel=1e-9)
    assert [rate.momentum for rate in rates] == pytest.approx(momenta, rel=1e-9)


def test_constant_is_the_highest_rate_all_along() -> None:
    assert set(lrs_of(config_of(schedule="constant", epochs=3), 4)) == {HIGH}


# all of them


@st.composite
def extreme_configs(draw: st.DrawFn) -> tuple[RunConfig, int]:
    epochs, steps_per_epoch = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    low, high = sorted(draw(st.tuples(st.floats(0, 2), st.floats(1e-6, 2))))
    config = config_of(
        schedule=draw(st.sampled_from(SCHEDULES)),
        epochs=epochs,
        peak_epoch=draw(st.floats(0, epochs, exclude_min=True, exclude_max=True)),
        cycle_epochs=draw(st.floats(1e-9, 100)),
        lr_steps=sorted(draw(st.lists(st.floats(1e-9, 5), min_size=1, max_size=3))),
        patience=1,
        lr_min=low,
        lr_max=max(high, 1e-6),
        momentum=0.9,
        momentum_min=0.5,
    )
    return config, steps_per_epoch


@untimed
@given(extreme_configs())
def test_every_step_of_every_schedule_has_rates_within_the_bounds(case: tuple[RunConfig, int]) -> None:
    config, steps_per_epoch = case
    low, high = float(config.lr_min), float(config.lr_max)
    # These two go below by definition: torch's one cycle ends at lr_min / 1e4, and step knows no lowest rate.
    low = {"cosine_onecycle": low / 1e4, "step": 0.0}.get(config.schedule, low)
    for rates in rates_of(config, steps_per_epoch):
        assert low * (1 - 1e-12) <= rates.lr <= high * (1 + 1e-12)
        assert 0.5 - 1e-12 <= rates.momentum <= 0.9


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_a_pure_function_of_step_and_losses(schedule: str) -> None:
    config = config_of(schedule=schedule, epochs=4, peak_epoch=1.5, lr_steps=[2], patience=1)
    in_order = rates_of(config, 5)
    one = build_schedule(config, 5)
    assert [one(step, [1.0] * (step // 5)) for step in reversed(range(20))] == in_order[::-1]
