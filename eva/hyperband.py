"""When a sweep stops a trial early: W&B's hyperband, as pure functions over curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eva.config import UserError, unknown_name

# What W&B fills in.
DEFAULT_ETA = 3
DEFAULT_STRICT = True

# W&B makes so many bands of min_iter, however far they are. No trial reaches one beyond the second number.
MOST_BANDS = 100
LAST_BAND = 2**31

KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")


@dataclass(frozen=True)
class Hyperband:
    """W&B's rule of early termination (`sweeps`, hyperband_stopping.py): successive halving without brackets.

    An iteration is a logged, finite value of the sweep's metric, whatever epoch it comes from.

    Attributes:
        bands: Iterations at which trials are compared, rising, each at least 1.
        eta: Of a band's values about one in eta is good enough. Above 1.
        strict: Whether a trial is judged by its value at the band, and not by its best so far.
    """

    bands: tuple[int, ...]
    eta: float
    strict: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Hyperband":
        """Returns the rule that `early_terminate` of a sweep's YAML asks for, W&B's defaults filled in.

        Raises:
            UserError: All that is wrong, a line each.
        """
        if problems := config_problems(config):
            raise UserError("\n".join(text for _, text in problems))
        eta = config.get("eta", DEFAULT_ETA)
        return cls(_bands(config), eta, config.get("strict", DEFAULT_STRICT))

    def stops(self, curve: Sequence[float], others: Sequence[Sequence[float]], goal: str) -> bool:
        """Tells whether a running trial is to be stopped.

        It is compared at the last band that it has reached, with every trial that has reached it too.

        Args:
            curve: The trial's logged values of the metric so far. Non-finite ones don't count.
            others: Those of every other trial of the sweep, running or ended.
            goal: minimize or maximize.
        """
        own = _losses(curve, goal)
        band = max((band for band in self.bands if band <= len(own)), default=None)
        if band is None:
            return False
        histories = [own, *(_losses(other, goal) for other in others)]
        values = sorted(history[band - 1] for history in histories if len(history) >= band)
        threshold = values[int(1 / self.eta * len(values))]
        judged = own[band - 1] if self.strict else min(own)
        return judged > threshold


def _losses(curve: Sequence[float], goal: str) -> list[float]:
    """Returns the finite values of a curve, such that less is better."""
    sign = -1 if goal == "maximize" else 1
    return [sign * value for value in curve if math.isfinite(value)]


def _bands(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the bands of a sound configuration, rising, none twice; there may be none."""
    eta = config.get("eta", DEFAULT_ETA)
    downwards = "max_iter" in config
    band = config["max_iter"] / eta if downwards else config["min_iter"]
    bands: set[int] = set()
    # Step by step, as W&B does, so that the rounding is W&B's too.
    for _ in range(config["s"] if downwards else MOST_BANDS):
        if not 1 <= band <= LAST_BAND:
            break
        bands.add(int(band))
        band = band / eta if downwards else band * eta
    return tuple(sorted(bands))


def config_problems(config: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    """Returns what is wrong about `early_terminate`, a line each, with its key or None; an empty list if nothing is."""
    problems: list[tuple[str | None, str]] = [
        (key, unknown_name("key of early_terminate", str(key), KEYS)) for key in config if key not in KEYS
    ]

    def need(key: str, holds: bool, rule: str) -> None:
        if key in config and not holds:
            problems.append((key, f"{key} must be {rule}, but got {config[key]!r:.60}"))

    kind, eta = config.get("type"), config.get("eta", DEFAULT_ETA)
    if "type" not in config:
        problems.append((None, "early_terminate needs type: hyperband"))
    need("type", kind == "hyperband", "hyperband")
    for key, most in (("min_iter", LAST_BAND), ("max_iter", LAST_BAND), ("s", MOST_BANDS)):
        value = config.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
        need(key, whole, f"a whole number from 1 to {most}")
    number = isinstance(eta, (int, float)) and not isinstance(eta, bool)
    need("eta", number and 1 < eta < math.inf, "a number above 1")
    need("strict", isinstance(config.get("strict"), bool), "true or false")
    if "min_iter" in config and "max_iter" in config:
        problems.append(
            ("min_iter", "early_terminate takes min_iter or max_iter: W&B ignores min_iter beside max_iter")
        )
    elif "max_iter" in config and "s" not in config:
        problems.append((None, "early_terminate with max_iter needs s, the number of bands below it"))
    elif "min_iter" in config and "s" in config:
        problems.append(("s", "early_terminate has s with max_iter only: min_iter has bands without end"))
    elif "min_iter" not in config and "max_iter" not in config:
        problems.append((None, "early_terminate needs min_iter, or max_iter and s"))
    if not problems and not _bands(config):
        problems.append(
            ("max_iter", f"max_iter must be at least eta, or there is no band below it, but got {config['max_iter']}")
        )
    return problems
