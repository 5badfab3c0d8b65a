"""The learning rate range test: the curve of loss over rising rates, and the range that it suggests."""

import contextlib
import copy
import io
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from eva.config import RunConfig, UserError
from eva.hardware import Hardware, preserved_random_state
from eva.optim import build_criterion, build_optimizer

RULE = "lr_max: half the rate at the smoothed loss's minimum; lr_min: a tenth of lr_max"
MAX_DIVISOR = 2.0
MIN_DIVISOR = 10.0
# Width of the smoothing, as a share of the curve.
SMOOTHING = 0.025


@dataclass(frozen=True)
class LrRange:
    """A curve of losses over learning rates, raw and smoothed, all (S,), and the range that `RULE` reads off it."""

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    lr_min: float
    lr_max: float


def find_lr(config: RunConfig, hardware: Hardware, model: nn.Module, loader: DataLoader[object]) -> LrRange:
    """Runs torch-lr-finder's exponential range test over the recipe's own batches, precision, loss and optimizer.

    The test (Smith 2017, arXiv 1506.01186) trains a copy of the model, so that the model, its batch norm statistics
    and its gradients stay as they are; the random generators are given back as they were.

    Raises:
        UserError: The curve has no usable minimum: it diverges at once, or still falls at `find_lr_end`.
    """
    # Imported here as it costs a second, which most commands don't need to spend.
    from torch_lr_finder import LRFinder

    with preserved_random_state():
        trial = copy.deepcopy(model).to(hardware.device, memory_format=hardware.memory_format)  # type: ignore[call-overload]
        # A scaler unscales the gradients before it calls the optimizer, but not for a fused one.
        optimizer = build_optimizer(config, trial, fused=False)
        if config.grad_clip is not None:
            optimizer.register_step_pre_hook(partial(_clip, trial, config.grad_clip))
        finder = LRFinder(
            trial,
            optimizer,
            build_criterion(config, trial),
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
        with contextlib.redirect_stdout(io.StringIO()), quiet_bar:
            finder.range_test(
                loader,
                start_lr=config.find_lr_start,
                end_lr=config.find_lr_end,
                num_iter=config.find_lr_steps,
                smooth_f=0,  # its running mean lags behind by a whole decade of rates; `smooth` doesn't
            )
    return suggest(np.asarray(finder.history["lr"]), np.asarray(finder.history["loss"]))


def _clip(model: nn.Module, limit: float, *_: object) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), limit)


def smooth(values: np.ndarray, width: float = SMOOTHING) -> np.ndarray:
    """Returns the mean around each value, weighted by a Gaussian `width * len(values)` wide: it doesn't lag."""
    positions = np.arange(len(values))
    distances = (positions[:, None] - positions) / max(width * len(values), 1e-9)  # (S, S)
    weights = np.exp(-(distances**2) / 2)
    return np.asarray(weights @ values / weights.sum(1))


def suggest(lrs: np.ndarray, losses: np.ndarray) -> LrRange:
    """Reads the range off a curve of raw losses over rising rates, both (S,) float64.

    Raises:
        UserError: The curve has no minimum that a range can be read off.
    """
    broken = np.flatnonzero(~np.isfinite(losses))
    ends = int(broken[0]) if len(broken) else len(losses)
    lrs, losses = lrs[:ends], losses[:ends]
    smoothed = smooth(losses)
    lowest = int(np.argmin(smoothed)) if ends else 0
    # A twentieth of the first loss is within the noise between batches.
    if ends < 5 or smoothed[0] - smoothed[lowest] < 0.05 * smoothed[0]:
        raise UserError(
            "the range test found no rate that lowers the loss: it diverges at once or learns nothing; "
            "choose a lower find_lr_start, or set lr_min and lr_max"
        )
    if lowest == ends - 1 and not len(broken):
        raise UserError(
            f"the range test's loss still falls at its last rate {lrs[-1]:.3g}: there is no minimum; "
            "choose a higher find_lr_end, or set lr_min and lr_max"
        )
    lr_max = float(lrs[lowest]) / MAX_DIVISOR
    return LrRange(
        lrs=tuple(map(float, lrs)),
        losses=tuple(map(float, losses)),
        smoothed=tuple(map(float, smoothed)),
        lr_min=lr_max / MIN_DIVISOR,
        lr_max=lr_max,
    )
