"""Learning rate schedules: pure functions of the step (and of the losses so far), plain floats, no torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eva.config import RunConfig


@dataclass(frozen=True)
class Rates:
    """The learning rate and the momentum of one optimizer step."""

    lr: float
    momentum: float


# (step, watched losses of the epochs that ended before it) -> rates
Schedule = Callable[[int, Sequence[float]], Rates]


def build_schedule(config: RunConfig, steps_per_epoch: int) -> Schedule:
    """Returns the schedule that `config` names, over `config.epochs` epochs of `steps_per_epoch` steps.

    `lr_min` and `lr_max` must be numbers by now. All rates lie between them, but for two schedules: the second leg of
    cosine_onecycle ends at `lr_min` / 1e4, and step multiplies by `lr_factor` whatever `lr_min` says. Momentum falls
    to `momentum_min` where a cycle's rate is highest (Smith 2018, arXiv 1803.09820) if that is given, and is constant
    otherwise.
    """
    low, high = float(config.lr_min), float(config.lr_max)
    total = config.epochs * steps_per_epoch
    peak = round(config.peak_epoch * steps_per_epoch)
    half_cycle = max(1, round(config.cycle_epochs * steps_per_epoch))
    drops_at = [round(epoch * steps_per_epoch) for epoch in config.lr_steps]
    momentum_drop = config.momentum - (config.momentum if config.momentum_min is None else config.momentum_min)

    def cycle(height: float, floor: float = low) -> Rates:
        return Rates(floor + height * (high - floor), config.momentum - height * momentum_drop)

    def steady(lr: float) -> Rates:
        return Rates(lr, config.momentum)

    def cosine_one_cycle(step: int) -> Rates:
        # torch's OneCycleLR ends far below where it began: its final_div_factor is 1e4.
        return cycle(cosine_height(step, peak, total), low if step <= peak else low / 1e4)

    schedules: dict[str, Schedule] = {
        "onecycle": lambda step, losses: cycle(linear_height(step, peak, total)),
        "cosine_onecycle": lambda step, losses: cosine_one_cycle(step),
        "triangular": lambda step, losses: cycle(triangular_height(step, half_cycle)),
        "cosine": lambda step, losses: steady(cosine(step, total, low, high)),
        "constant": lambda step, losses: steady(high),
        "step": lambda step, losses: steady(high * config.lr_factor ** sum(step >= at for at in drops_at)),
        "plateau": lambda step, losses: steady(
            max(low, high * config.lr_factor ** plateau_drops(losses, config.patience))
        ),
    }
    return schedules[config.schedule]


def linear_height(step: int, peak: int, total: int) -> float:
    """Returns one cycle's height in [0, 1]: 0 at step 0, 1 at step `peak`, 0 again at the last step, linear between.

    There is no annihilation phase: the last of the `total` steps is at the bottom, not below it.
    """
    last = total - 1
    if step <= peak:
        return step / peak if peak else 1.0
    return max(0.0, (last - step) / (last - peak))


def cosine_height(step: int, peak: int, total: int) -> float:
    """Returns one cycle's height in [0, 1] with half cosines for legs, as `torch.optim.lr_scheduler.OneCycleLR` has."""
    return (1 - math.cos(math.pi * linear_height(step, peak, total))) / 2


def triangular_height(step: int, half_cycle: int) -> float:
    """Returns the height in [0, 1] of repeated triangles, `half_cycle` steps up and as many down.

    "triangular" of Smith 2017, arXiv 1506.01186.
    """
    return 1 - abs(step % (2 * half_cycle) / half_cycle - 1)


def cosine(step: int, total: int, lr_min: float, lr_max: float) -> float:
    """Returns the half cosine from `lr_max` at step 0 towards `lr_min` at step `total` (arXiv 1608.03983)."""
    return lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * step / total)) / 2


def plateau_drops(losses: Sequence[float], patience: int, threshold: float = 1e-4) -> int:
    """Returns how often the rate has been dropped after these epochs' losses.

    The rule of `torch.optim.lr_scheduler.ReduceLROnPlateau` in mode "min": a drop after more than `patience`
    epochs in a row without a loss below the best by the relative `threshold`.
    """
    best, bad_epochs, drops = math.inf, 0, 0
    for loss in losses:
        if loss < best * (1 - threshold):
            best, bad_epochs = loss, 0
        else:
            bad_epochs += 1
        if bad_epochs > patience:
            drops, bad_epochs = drops + 1, 0
    return drops
