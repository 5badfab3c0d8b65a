"""The range test against a second one written by hand, its reading of curves, and that it leaves nothing behind."""

import copy
import random
from collections.abc import Callable
from itertools import chain, count, islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from eva.config import Layer, RunConfig, UserError, resolve
from eva.data import Split
from eva.hardware import choose_hardware, random_state
from eva.loaders import Policy, TrainLoader, train_loader
from eva.lr_range import LrCurve, LrRange, record_curve, smooth, suggest

RATES = np.geomspace(1e-4, 10, 200)


def config_of(**settings: Any) -> RunConfig:
    tiny = {"device": "cpu", "precision": "fp32", "channels_last": False, "weight_decay": 1e-3}
    test = {"find_lr_start": 1e-3, "find_lr_end": 300.0, "find_lr_steps": 40}
    return resolve([Layer("test", {**tiny, **test, **settings})])[0]


def tiny_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def noisy(image: np.ndarray, draw: tuple[int, int, int] | None) -> torch.Tensor:
    """A policy with a draw of its own: another epoch gives another image."""
    noise = np.random.default_rng(draw).normal(0, 0.2, image.shape)
    return torch.from_numpy((image / 255 - 0.5 + noise).astype(np.float32)).permute(2, 0, 1)


def broken(image: np.ndarray, draw: tuple[int, int, int] | None) -> torch.Tensor:
    """A policy that fails in the second epoch: after some steps were made."""
    if draw is not None and draw[1] == 1:
        raise RuntimeError("this image cannot be augmented")
    return noisy(image, draw)


def loader_of(policy: Policy = noisy) -> TrainLoader:
    """Six batches an epoch, the last of four, of images whose class is their brightest channel (mostly)."""
    rng = np.random.default_rng(0)
    labels = np.arange(44) % 3
    images = rng.integers(0, 120, (44, 32, 32, 3))
    images[np.arange(44), :, :, labels] += 60
    labels[::3] = rng.integers(0, 3, 15)  # a loss near zero would let any batch look like a divergence
    ids = np.array([f"train/{index:05d}" for index in range(44)])
    return train_loader(Split(images.astype(np.uint8), labels, ids), policy, batch_size=8, seed=0, workers=0)


def run(config: RunConfig, model: nn.Module | None = None, loader: TrainLoader | None = None) -> LrCurve:
    """The range test on the tiny model, from a fixed random state (dropout draws from it)."""
    model, loader = model or tiny_model(), loader or loader_of()
    torch.manual_seed(2)
    return record_curve(config, choose_hardware(config), model, loader)


# smoothing


def test_smoothing_keeps_constants() -> None:
    np.testing.assert_allclose(smooth(np.full(50, 2.3)), 2.3, rtol=1e-12)


def test_smoothing_is_symmetric() -> None:
    values = np.random.default_rng(0).normal(size=60)
    np.testing.assert_allclose(smooth(values[::-1]), smooth(values)[::-1], rtol=1e-9)


@pytest.mark.parametrize("lowest", [60, 100, 150])
def test_smoothing_leaves_the_minimum_of_a_parabola_where_it_is(lowest: int) -> None:
    assert int(np.argmin(smooth((np.arange(200.0) - lowest) ** 2))) == lowest


def test_smoothing_averages_noise() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(noise)[100:-100].std() < 0.2  # over about 2 * sqrt(pi) * 25 = 89 values: a deviation of 0.11


# reading the range off a curve


def range_of(lrs: np.ndarray, losses: np.ndarray) -> LrRange:
    return suggest(LrCurve(tuple(lrs.tolist()), tuple(losses.tolist())))


def valley(lowest: float) -> np.ndarray:
    """A loss that starts at 2.3, is lowest at a rate, and climbs twice as fast as it fell."""
    distance = np.log10(RATES / lowest)
    return 1.5 + np.where(distance < 0, 0.8 * (1 - np.exp(-(distance**2))), 2 * distance**2)


@pytest.mark.parametrize("lowest", [0.005, 0.1, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_range_hangs_on_the_minimum_by_the_stated_rule(lowest: float, noise: float) -> None:
    losses = valley(lowest) + np.random.default_rng(0).normal(0, noise, len(RATES))
    found = range_of(RATES, losses)
    # Smoothing leans to the flatter side by up to three steps of the grid (6 % each); noise moves a flat bottom.
    assert found.lr_max == pytest.approx(lowest / 2, rel=0.5 if noise else 0.2)
    assert found.lr_min == pytest.approx(found.lr_max / 10)
    smoothed = LrCurve(tuple(RATES), tuple(losses)).smoothed
    assert len(smoothed) == len(RATES)
    assert RATES[int(np.argmin(smoothed))] == pytest.approx(2 * found.lr_max)


@pytest.mark.parametrize("last", [8.0, 1e4, 1e30])
def test_how_far_the_last_loss_explodes_does_not_move_the_range(last: float) -> None:
    losses = valley(0.1)
    end = int(np.searchsorted(RATES, 0.3))
    exploding = np.append(losses[:end], last)
    assert range_of(RATES[: end + 1], exploding).lr_max == pytest.approx(0.05, rel=0.2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_losses_that_end_as_not_finite_are_cut_off(value: float) -> None:
    losses = valley(0.1)
    losses[170:] = value
    assert range_of(RATES, losses).lr_max == pytest.approx(0.05, rel=0.2)
    smoothed = LrCurve(tuple(RATES), tuple(losses)).smoothed
    assert np.isfinite(smoothed[:170]).all() and np.isnan(smoothed[170:]).all()


def test_a_loss_that_falls_until_it_is_not_finite_has_its_minimum_there() -> None:
    losses = np.linspace(2.3, 1.0, len(RATES))
    losses[150:] = np.nan
    assert range_of(RATES, losses).lr_max == pytest.approx(RATES[149] / 2)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (np.linspace(2.3, 12, 200), "found no rate that lowers the loss.*find_lr_start"),
        (np.geomspace(2.3, 1e9, 200), "found no rate that lowers the loss"),
        (np.full(200, 2.3), "found no rate that lowers the loss"),
        (2.3 + np.random.default_rng(0).normal(0, 0.02, 200), "found no rate that lowers the loss"),
        (np.full(200, np.nan), "found no rate that lowers the loss"),
        (np.array([2.3, 2.2, np.inf]), "found no rate that lowers the loss"),
        (np.linspace(2.3, 1.0, 200), r"still falls at its last rate 10: there is no minimum.*find_lr_end"),
    ],
    ids=["rises", "diverges", "flat", "noise", "nan", "three", "falls"],
)
def test_a_curve_without_a_minimum_is_told_as_such(losses: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        range_of(RATES[: len(losses)], losses)
    assert "\n" not in str(caught.value)


# the test itself


def written_by_hand(config: RunConfig, steps: int) -> tuple[list[float], list[float]]:
    """An exponential range test: the rate of each step and the loss before it."""
    model, loader = tiny_model(), loader_of()
    batches = chain.from_iterable(loader.epoch(epoch) for epoch in count())
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=config.momentum, nesterov=True, weight_decay=config.weight_decay
    )
    torch.manual_seed(2)
    lrs, losses = [], []
    for step, (images, labels) in enumerate(islice(batches, steps)):
        ratio = config.find_lr_end / config.find_lr_start
        lr = config.find_lr_start * ratio ** (step / (config.find_lr_steps - 1))
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss = loss + config.l1 * sum(parameter.abs().sum() for parameter in model.parameters())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if config.grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        lrs.append(lr)
        losses.append(loss.item())
    return lrs, losses


@pytest.mark.parametrize(
    "settings",
    [{}, {"grad_clip": 0.1, "l1": 1e-4}, {"precision": "bf16"}, {"momentum": 0.5, "weight_decay": 0.01}],
    ids=["fp32", "clip and l1", "bf16", "momentum"],
)
def test_the_curve_is_that_of_a_range_test_written_by_hand(settings: dict[str, Any]) -> None:
    config = config_of(**settings)
    found = run(config)
    lrs, losses = written_by_hand(config, len(found.lrs))
    assert len(lrs) > 10
    np.testing.assert_allclose(found.lrs, lrs, rtol=1e-9)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)


def test_clipping_changes_the_curve() -> None:
    free, clipped = run(config_of()), run(config_of(grad_clip=0.01))
    assert free.losses[0] == clipped.losses[0] and free.losses[3] != clipped.losses[3]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_recorded_rates_are_those_that_the_optimizer_stepped_with(optimizer: str) -> None:
    used: list[list[float]] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: used.append([group["lr"] for group in optimizer.param_groups])
    )
    try:
        found = run(config_of(optimizer=optimizer, decay_norm_and_bias=False, find_lr_end=1000.0))
    finally:
        handle.remove()
    # No step is made on a loss that has diverged, the last one here.
    assert [rates[0] for rates in used] == list(found.lrs[:-1])
    assert found.losses[-1] > 4 * found.losses[0] or np.isnan(found.losses[-1])
    assert all(len(rates) == 2 and rates[0] == rates[1] for rates in used)


def test_two_tests_give_the_same_curve_from_wherever_the_loader_stands() -> None:
    model, loader = tiny_model(), loader_of()
    first = run(config_of(), model, loader)
    assert run(config_of(), model, loader) == first
    next(loader.epoch(5, start_batch=3))
    assert run(config_of(), model, loader) == first


def test_a_test_does_not_change_the_batches_of_training() -> None:
    loader, fresh = loader_of(), loader_of()
    run(config_of(), loader=loader)
    for (images, labels), (other_images, other_labels) in zip(loader.epoch(0), fresh.epoch(0), strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_too_few_steps_for_a_curve_are_told_as_such() -> None:
    with pytest.raises(UserError, match="find_lr_steps must be at least 5, but got find_lr_steps=1"):
        run(config_of(find_lr_steps=1))


# nothing is left behind


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that the range test must leave alone, copied."""
    return copy.deepcopy(
        {
            "state": model.state_dict(),
            "gradients": [parameter.grad for parameter in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            "random": random_state(),
        }
    )


def assert_equal(first: Any, second: Any) -> None:
    """Bit by bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    else:
        assert first == second


def with_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def partly_frozen(model: nn.Module) -> None:
    model.get_submodule("1").eval()
    model.get_submodule("3").eval()
    model.get_parameter("0.weight").requires_grad_(False)


@pytest.mark.parametrize("prepare", [lambda model: None, with_gradients, partly_frozen, nn.Module.eval])
@pytest.mark.parametrize(
    ("settings", "policy", "error"),
    [
        ({}, noisy, None),
        ({"precision": "bf16", "channels_last": True, "optimizer": "adamw"}, noisy, None),
        ({"find_lr_start": 1e-9, "find_lr_end": 1e-8}, noisy, "found no rate"),
        ({}, broken, "cannot be augmented"),
    ],
    ids=["fp32", "bf16", "flat curve", "broken loader"],
)
def test_model_and_generators_stay_the_same_to_the_bit(
    settings: dict[str, Any], policy: Policy, error: str | None, prepare: Callable[[nn.Module], object]
) -> None:
    config, model, loader = config_of(**settings), tiny_model(), loader_of(policy)
    model(torch.randn(4, 3, 32, 32))  # statistics unlike a new model's
    prepare(model)
    random.seed(3)
    np.random.seed(4)
    np.random.standard_normal()  # leaves a second value waiting
    torch.manual_seed(5)
    before = snapshot(model)
    addresses = [tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())]
    if error is None:
        suggest(record_curve(config, choose_hardware(config), model, loader))
    else:
        with pytest.raises((UserError, RuntimeError), match=error):
            suggest(record_curve(config, choose_hardware(config), model, loader))
    assert_equal(snapshot(model), before)
    assert [tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())] == addresses


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    run(config_of())
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
