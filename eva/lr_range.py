"""The learning rate range test: the curve of loss over rising rates, and the range that it suggests."""

import contextlib
import copy
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from eva.config import RunConfig, UserError
from eva.distributed import ALONE, World, counted
from eva.hardware import Hardware, preserved_random_state
from eva.loaders import TrainLoader
from eva.optim import build_criterion, build_optimizer

RULE = "lr_max: half the rate at the smoothed loss's minimum; lr_min: a tenth of lr_max"
MAX_DIVISOR = 2.0
MIN_DIVISOR = 10.0
# Width of the smoothing, as a share of the curve.
SMOOTHING = 0.025
# Losses above so many times the first one are smoothed as if they were that: how far the last one explodes says nothing
# about where the minimum lies, and would move it by a factor of three.
CEILING = 2.0
# A loss of so many times the first one has diverged, and ends the test.
DIVERGED = 4.0
MIN_STEPS = 5


@dataclass(frozen=True)
class LrCurve:
    """The losses (S,) of a range test, each before the step at its rate, over the rates (S,)."""

    lrs: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses (S,), smoothed without lag; those after the first that is not finite are NaN."""
        ends = _finite_length(self.losses)
        losses = np.asarray(self.losses[:ends])
        return (*smooth(np.minimum(losses, CEILING * losses[:1])).tolist(), *[math.nan] * (len(self.losses) - ends))


@dataclass(frozen=True)
class LrRange:
    """The range that `RULE` reads off a curve."""

    lr_min: float
    lr_max: float


class _Diverged(Exception):
    pass


def record_curve(
    config: RunConfig, hardware: Hardware, model: nn.Module, loader: TrainLoader, world: World = ALONE
) -> LrCurve:
    """Runs torch-lr-finder's exponential range test over the recipe's own batches, precision, loss and optimizer.

    The test (Smith 2017, arXiv 1506.01186) trains a copy of the model, so that the model, its batch norm statistics
    and its gradients stay as they are; the random generators are given back as they were. The loader begins at its
    first epoch, so that another test gives the same curve. A loss that has diverged is the last one. Several processes
    test together, each on its share of the batches, and all get the same curve.

    Raises:
        UserError: There are too few steps for a curve.
    """
    if config.find_lr_steps < MIN_STEPS:
        raise UserError(f"find_lr_steps must be at least {MIN_STEPS}, but got find_lr_steps={config.find_lr_steps}")
    # Imported here as it costs a second, which most commands don't need to spend.
    from torch_lr_finder import LRFinder

    with preserved_random_state():
        trial = copy.deepcopy(model).to(hardware.device, memory_format=hardware.memory_format)  # type: ignore[call-overload]
        # A scaler unscales the gradients before it calls the optimizer, but not for a fused one.
        optimizer = build_optimizer(config, trial, fused=False)
        if config.grad_clip is not None:
            optimizer.register_step_pre_hook(partial(_clip, trial, config.grad_clip))
        training_loss = build_criterion(config, trial)
        lrs: list[float] = []
        losses: list[float] = []
        factor: float | None = None

        def begin_step(*_: object) -> None:
            nonlocal factor
            first = len(losses) % len(loader) * config.batch_size
            factor = world.begin_step(min(config.batch_size, loader.num_images - first), config.seed, len(losses))

        def criterion(logits: Tensor, labels: Tensor) -> Tensor:
            # Recorded here, as the finder's own stop compares with the best loss: one near zero would end the test.
            loss = training_loss(counted(logits), counted(labels), factor)
            lrs.append(optimizer.param_groups[0]["lr"])
            losses.append(world.summed(loss.detach().clone()).item() / world.size)
            if not losses[-1] <= DIVERGED * losses[0]:
                raise _Diverged
            return loss

        network = world.network(trial)
        network.register_forward_pre_hook(begin_step)
        finder = LRFinder(
            network,
            optimizer,
            criterion,
            device=hardware.device,
            amp_backend="torch",
            amp_config={
                "device_type": hardware.device.type,
                "dtype": hardware.autocast_dtype or torch.bfloat16,
                "enabled": hardware.autocast_dtype is not None,
            },
            grad_scaler=hardware.scaler(),
        )
        # Its closing words name a method that is not ours, and its bar is for a terminal only.
        quiet_bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        loader.start(0)
        with contextlib.redirect_stdout(io.StringIO()), quiet_bar, contextlib.suppress(_Diverged):
            finder.range_test(
                loader.loader,
                start_lr=config.find_lr_start,
                end_lr=config.find_lr_end,
                num_iter=config.find_lr_steps,
                diverge_th=math.inf,
            )
    return LrCurve(tuple(lrs), tuple(losses))


def _clip(model: nn.Module, limit: float, *_: object) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), limit)


def smooth(values: np.ndarray, width: float = SMOOTHING) -> np.ndarray:
    """Returns the mean around each value, weighted by a Gaussian `width * len(values)` wide: it doesn't lag."""
    positions = np.arange(len(values))
    distances = (positions[:, None] - positions) / max(width * len(values), 1e-9)  # (S, S)
    weights = np.exp(-(distances**2) / 2)
    return np.asarray(weights @ values / weights.sum(1))


def _finite_length(losses: Sequence[float]) -> int:
    broken = np.flatnonzero(~np.isfinite(losses))
    return int(broken[0]) if len(broken) else len(losses)


def suggest(curve: LrCurve) -> LrRange:
    """Reads the range off a curve.

    Raises:
        UserError: The curve has no minimum that a range can be read off.
    """
    ends = _finite_length(curve.losses)
    smoothed = np.asarray(curve.smoothed[:ends])
    lowest = int(np.argmin(smoothed)) if ends else 0
    # A twentieth of the first loss is within the noise between batches.
    if ends < MIN_STEPS or smoothed[0] - smoothed[lowest] < 0.05 * smoothed[0]:
        raise UserError(
            "the range test found no rate that lowers the loss: it diverges at once or learns nothing; "
            "choose a lower find_lr_start, or set lr_min and lr_max"
        )
    if lowest == len(curve.losses) - 1:
        raise UserError(
            f"the range test's loss still falls at its last rate {curve.lrs[-1]:.3g}: there is no minimum; "
            "choose a higher find_lr_end, or set lr_min and lr_max"
        )
    lr_max = curve.lrs[lowest] / MAX_DIVISOR
    return LrRange(lr_max / MIN_DIVISOR, lr_max)
