"""Which settings of a sweep matter, and how much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_RUNS = 8  # fewer say nothing about importance
FOLDS = 10
TREES = 100


@dataclass(frozen=True)
class Importance:
    """How much each setting matters for a metric, over the runs of a sweep.

    Attributes:
        count: Number of runs.
        explained: R^2 of the forest on runs that it was not fitted to; at 0 or below it knows nothing, and then the
            shares mean nothing.
        shares: By setting, largest first: by how much the held-out squared error grows, as a share of the metric's
            variance, when the setting's value is exchanged for that of another run. About 0 for one without effect.
        correlations: Spearman's rank correlation with the metric, of the settings that are numbers in every run.
    """

    count: int
    explained: float
    shares: Mapping[str, float]
    correlations: Mapping[str, float]


def measure_importance(settings: Mapping[str, Sequence[Any]], values: Sequence[float]) -> Importance:
    """Returns the importance of settings for a metric.

    A random forest predicts each run from others (ten folds, or leave one out). How much worse it does when one setting
    is exchanged for that of every other run in turn is the setting's permutation importance (Breiman, Random Forests,
    2001), here as the exact mean over all exchanges instead of some random ones: model reliance (Fisher, Rudin and
    Dominici, All Models are Wrong, but Many are Useful, 2019). It is measured on runs that the forest has not seen,
    and is not the decrease of impurity, which rewards a setting of many values for fitting noise (Strobl et al., Bias
    in random forest variable importance measures, 2007). Settings that rise and fall together share theirs.

    Args:
        settings: Values by setting, one a run: numbers, text, truth values, tuples or None.
        values: The metric, finite, one a run.

    Raises:
        ValueError: There are too few runs, or nothing differs.
    """
    count = len(values)
    if count < MIN_RUNS:
        raise ValueError(f"needs at least {MIN_RUNS} runs that have it, but got {count}")
    names = [name for name, column in settings.items() if len(set(map(repr, column))) > 1]
    y = np.array(values, dtype=np.float64)
    if not names or np.ptp(y) == 0:
        raise ValueError("needs runs that differ in it and in their settings")

    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import KFold

    x = np.stack([as_numbers(settings[name]) for name in names], axis=1)  # (runs, settings)
    error, exchanged = 0.0, np.zeros(len(names))
    for fitted, held_out in KFold(min(count, FOLDS), shuffle=True, random_state=0).split(x):
        forest = RandomForestRegressor(TREES, random_state=0).fit(x[fitted], y[fitted])
        # Each held-out run as it is, and with one setting of each run in turn; (settings + 1, held out, runs, settings)
        changed = np.tile(x[held_out][None, :, None, :], (len(names) + 1, 1, count, 1))
        for column in range(len(names)):
            changed[column, :, :, column] = x[:, column]
        predicted = forest.predict(changed.reshape(-1, len(names))).reshape(changed.shape[:3])
        errors = np.sum(np.mean((predicted - y[held_out][None, :, None]) ** 2, axis=2), axis=1)
        exchanged += errors[:-1]
        error += float(errors[-1])
    total = float(np.sum((y - y.mean()) ** 2))
    shares = (exchanged - error) / total
    order = np.argsort(-shares, kind="stable").tolist()
    numbers = {i for i in order if all(map(is_number, settings[names[i]]))}
    return Importance(
        count=count,
        explained=1 - error / total,
        shares={names[i]: float(shares[i]) for i in order},
        correlations={names[i]: rank_correlation(x[:, i], y) for i in order if i in numbers},
    )


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Returns Spearman's rank correlation of values that are not all equal; equal values have their mean rank."""
    ranks = []
    for values in (a, b):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    a, b = (rank - rank.mean() for rank in ranks)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def is_number(value: Any) -> bool:
    """Tells whether a value is a number, which a truth value isn't."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_numbers(column: Sequence[Any]) -> NDArray[np.float64]:
    """Returns values as numbers that a tree can split: numbers as they are with none below them, others by name."""
    if all(value is None or is_number(value) for value in column):
        lowest = min(value for value in column if value is not None)
        return np.array([lowest - 1 if value is None else value for value in column], dtype=np.float64)
    names = sorted(set(map(str, column)))
    return np.array([names.index(str(value)) for value in column], dtype=np.float64)
