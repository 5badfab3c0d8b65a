"""The distributions that a W&B sweep draws parameters from, each by its inverse distribution function."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from statistics import NormalDist
from typing import Any

import yaml
from scipy.special import betaincinv

from eva.config import UserError, unknown_name

# How near to 0 and 1 a quantile may come where the inverse has no value there (normal) or fails to find it (beta).
HAIR = 2.0**-53  # 1 - HAIR is the float below 1

# A place in a parameter, as keys and positions in lists, and what is wrong there, in one line.
ConfigProblem = tuple[tuple[str | int, ...], str]


@dataclass(frozen=True)
class Distribution:
    """What a parameter's values are drawn from, as W&B defines it. Only the fields that its kind has are set.

    Attributes:
        kind: W&B's name of it, a key of `KINDS`.
        min: The lower end; of log_uniform and inv_log_uniform that of the exponent of e.
        max: The upper end, included in int_uniform.
        mu: Mean of the normal distribution, or of the logarithm.
        sigma: Its standard deviation, above 0.
        a: First shape of beta, above 0.
        b: Second shape of beta, above 0.
        q: Values are rounded to multiples of it, and are whole if it is.
        values: Those of categorical, or the one of constant.
        probabilities: One a value, their sum is 1.
    """

    kind: str
    min: float | None = None
    max: float | None = None
    mu: float | None = None
    sigma: float | None = None
    a: float | None = None
    b: float | None = None
    q: float | None = None
    values: tuple[Any, ...] = ()
    probabilities: tuple[float, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], repeats: bool = False) -> "Distribution":
        """Returns the distribution that a parameter of a sweep's YAML asks for, W&B's defaults filled in.

        Args:
            config: What stands in the YAML.
            repeats: As `config_problems` takes it.

        Raises:
            UserError: All that is wrong, a line each.
        """
        if problems := config_problems(config, repeats):
            raise UserError("\n".join(text for _, text in problems))
        return _filled(config)

    @property
    def is_constant(self) -> bool:
        """Whether there is nothing to search."""
        return self.kind == "constant"

    @property
    def grid_size(self) -> int | None:
        """How many values `grid_values` has, without making them; None if W&B makes no grid of the kind."""
        if self.kind in ("constant", "categorical"):
            return len(self.values)
        if self.kind not in ("int_uniform", "q_uniform"):
            return None
        low, high = self._ends
        # The quotient in floats, as numpy.arange has it: dust may add a value, there and here.
        return int(high - low) + 1 if self.q is None else math.ceil((high - low) / self.q)

    @property
    def grid_values(self) -> tuple[Any, ...] | None:
        """What W&B's grid search makes of it, in its order; None if it makes no grid of the kind.

        The grid of q_uniform begins at its lower end, and leaves out the upper.
        """
        if self.grid_size is None:
            return None
        if self.values:
            return self.values
        low, step = self._ends[0], 1 if self.q is None else self.q
        whole = isinstance(low, int) and isinstance(step, int) and isinstance(self.max, int)
        exact = (Decimal(repr(low)) + Decimal(repr(step)) * index for index in range(self.grid_size))
        return tuple(int(value) if whole else float(value) for value in exact)

    def value_at(self, quantile: float) -> Any:
        """Returns the value at a quantile: uniform quantiles give values of this distribution.

        Args:
            quantile: In [0, 1). Kinds of normal and beta take one below `HAIR` for `HAIR`.

        Returns:
            A plain Python value. Whole numbers are int where W&B has them so, and others float.
        """
        if not 0 <= quantile < 1:
            raise ValueError(f"a quantile must be in [0, 1), but got {quantile!r}")
        value = KINDS[self.kind].inverse(self, quantile)
        return value if self.q is None else _rounded(value, self.q)

    @property
    def _ends(self) -> tuple[float, float]:
        assert self.min is not None and self.max is not None
        return self.min, self.max


def _rounded(value: float, step: float) -> float:
    """Returns the nearest multiple of `step`, without the dust of a product of floats: 0.3, not 3 * 0.1."""
    count = round(value / step)
    return count * step if isinstance(step, int) else float(count * Decimal(repr(step)))


# --- the inverse distribution functions: a distribution and a quantile in [0, 1) in, a value out ---


def _between(low: float, high: float, share: float) -> float:
    return min(max(low * (1 - share) + high * share, low), high)


def _uniform(d: Distribution, quantile: float) -> float:
    return _between(*d._ends, quantile)


def _int_uniform(d: Distribution, quantile: float) -> int:
    low, high = map(int, d._ends)
    return min(low + int(quantile * (high - low + 1)), high)


def _log_uniform(d: Distribution, quantile: float) -> float:
    return math.exp(_between(*d._ends, quantile))


def _log_uniform_values(d: Distribution, quantile: float) -> float:
    low, high = d._ends
    return min(max(math.exp(_between(math.log(low), math.log(high), quantile)), low), high)


def _inv_log_uniform(d: Distribution, quantile: float) -> float:
    return math.exp(-_between(*d._ends, 1 - quantile))


def _normal(d: Distribution, quantile: float) -> float:
    assert d.mu is not None and d.sigma is not None
    return d.mu + d.sigma * NormalDist().inv_cdf(max(quantile, HAIR))


def _log_normal(d: Distribution, quantile: float) -> float:
    return math.exp(_normal(d, quantile))


def _beta(d: Distribution, quantile: float) -> float:
    return float(betaincinv(d.a, d.b, max(quantile, HAIR)))


def _constant(d: Distribution, quantile: float) -> Any:
    return d.values[0]


def _categorical(d: Distribution, quantile: float) -> Any:
    return d.values[min(int(quantile * len(d.values)), len(d.values) - 1)]


def _categorical_w_probabilities(d: Distribution, quantile: float) -> Any:
    total, chosen = 0.0, None
    for value, probability in zip(d.values, d.probabilities, strict=True):
        total += probability
        if probability > 0:
            chosen = value
            if quantile < total:
                break
    return chosen  # the last possible one where the sum falls short of 1 by dust


# --- the kinds, and what a parameter of each has ---


@dataclass(frozen=True)
class Kind:
    """A kind of distribution: its inverse, the keys that a parameter must have, and defaults of those that it may."""

    inverse: Callable[[Distribution, float], Any]
    needed: tuple[str, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that a parameter of this kind may have."""
        return ("distribution", *self.needed, *self.defaults)


_ENDS = ("min", "max")
_GAUSS = {"mu": 0.0, "sigma": 1.0}
_SHAPES = {"a": 1, "b": 1}

# By W&B's names. log_uniform_values and its inverse are the same: W&B mirrors the exponents and the quantile.
KINDS: dict[str, Kind] = {
    "constant": Kind(_constant, ("value",)),
    "categorical": Kind(_categorical, ("values",)),
    "categorical_w_probabilities": Kind(_categorical_w_probabilities, ("values", "probabilities")),
    "int_uniform": Kind(_int_uniform, _ENDS),
    "uniform": Kind(_uniform, _ENDS),
    "q_uniform": Kind(_uniform, _ENDS, {"q": 1.0}),
    "log_uniform": Kind(_log_uniform, _ENDS),
    "log_uniform_values": Kind(_log_uniform_values, _ENDS),
    "q_log_uniform": Kind(_log_uniform, _ENDS, {"q": 1.0}),
    "q_log_uniform_values": Kind(_log_uniform_values, _ENDS, {"q": 1.0}),
    "inv_log_uniform": Kind(_inv_log_uniform, _ENDS),
    "inv_log_uniform_values": Kind(_log_uniform_values, _ENDS),
    "normal": Kind(_normal, (), _GAUSS),
    "q_normal": Kind(_normal, (), {**_GAUSS, "q": 1.0}),
    "log_normal": Kind(_log_normal, (), _GAUSS),
    "q_log_normal": Kind(_log_normal, (), {**_GAUSS, "q": 1.0}),
    "beta": Kind(_beta, (), _SHAPES),
    "q_beta": Kind(_beta, (), {**_SHAPES, "q": 1.0}),
}


def kind_of(config: Mapping[str, Any]) -> str | None:
    """Returns the kind that a parameter names, or else the one that W&B takes its keys for; None if there is none."""
    if "distribution" in config:
        named = config["distribution"]
        return named if isinstance(named, str) and named in KINDS else None
    if "value" in config:
        return "constant"
    if "values" in config:
        return "categorical_w_probabilities" if "probabilities" in config else "categorical"
    ends = [config[key] for key in _ENDS if key in config]
    if not ends:
        return None
    return "int_uniform" if all(isinstance(end, int) for end in ends) else "uniform"


def _filled(config: Mapping[str, Any]) -> Distribution:
    name = kind_of(config)
    assert name is not None
    fields: dict[str, Any] = {**KINDS[name].defaults, **config}
    fields.pop("distribution", None)
    if name == "constant":
        return Distribution(name, values=(fields["value"],))
    values, probabilities = (tuple(fields.pop(key, ())) for key in ("values", "probabilities"))
    return Distribution(name, values=values, probabilities=probabilities, **fields)


# --- what may be wrong ---


def config_problems(config: Mapping[str, Any], repeats: bool = False) -> list[ConfigProblem]:
    """Returns what is wrong about a parameter of a sweep's YAML, with its place; an empty list if nothing is.

    Args:
        config: What stands in the YAML.
        repeats: Whether a value may be there twice, which makes it twice as likely to be drawn. A grid has it once.
    """
    name = kind_of(config)
    if name is None:
        return [_no_kind(config)]
    kind = KINDS[name]
    problems: list[ConfigProblem] = [((key,), _foreign(name, key)) for key in config if key not in kind.keys]
    problems += [((), f"{name} needs {key}") for key in kind.needed if key not in config]
    for key in ("values", "probabilities"):
        if key in kind.needed and key in config:
            problems += _list_problems(key, config[key], repeats)
    numbers = [key for key in ("min", "max", "mu", "sigma", "a", "b", "q") if key in kind.keys and key in config]
    problems += [((key,), rule) for key in numbers if (rule := _number_problem(name, key, config[key]))]
    return problems or _joint_problems(name, config)


def _no_kind(config: Mapping[str, Any]) -> ConfigProblem:
    named = config.get("distribution")
    if "distribution" not in config:
        return (), "a parameter needs value, values, min and max, or a distribution"
    if not isinstance(named, str):
        return ("distribution",), f"distribution must be a name, but got {named!r:.60}"
    return ("distribution",), unknown_name("distribution", named, KINDS)


def _foreign(name: str, key: Any) -> str:
    keys = KINDS[name].keys
    if f"q_{name}" in KINDS and key == "q":
        return f"{name} has no q; did you mean distribution: q_{name}?"
    nearest = difflib.get_close_matches(str(key), keys, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest and nearest[0] != key else f"; it has {', '.join(keys)}"
    return f"{name} has no {key!r}{hint}"


def _number_problem(name: str, key: str, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = ""
        if isinstance(value, str) and (number := _as_number(value)) is not None:
            hint = f": YAML reads it as text, write {yaml.safe_dump(number).split()[0]}"
        return f"{key} must be a number, but got {value!r:.60}{hint}"
    if not abs(value) < float("inf"):
        return f"{key} must be finite, but got {value!r}"
    if name == "int_uniform" and not isinstance(value, int):
        return f"{key} of int_uniform must be a whole number, but got {value!r}"
    if key in ("sigma", "a", "b", "q") and value <= 0:
        return f"{key} must be above 0, but got {value!r}"
    if name.endswith("log_uniform_values") and value <= 0:
        return f"{key} of {name} must be above 0, as there is no logarithm of {value!r}"
    return None


def _list_problems(key: str, values: Any, repeats: bool) -> list[ConfigProblem]:
    if not isinstance(values, list) or not values:
        return [((key,), f"{key} must be a list with something in it, but got {values!r:.60}")]
    if key == "values":
        return [] if repeats else _duplicates(values)
    problems: list[ConfigProblem] = []
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            problems.append(((key, index), f"a probability must be a number in [0, 1], but got {value!r:.60}"))
    return problems


def _duplicates(values: Sequence[Any]) -> list[ConfigProblem]:
    known: set[str] = set()
    problems: list[ConfigProblem] = []
    for index, value in enumerate(values):
        # As W&B's grid tells values apart: 1 and 1.0 are one, 1 and true are two.
        plain = int(value) if isinstance(value, float) and value.is_integer() else value
        identity = yaml.safe_dump(plain) if isinstance(plain, (list, dict)) else repr(plain)
        if identity in known:
            problems.append((("values", index), f"the value {value!r:.60} is there twice"))
        known.add(identity)
    return problems


def _joint_problems(name: str, config: Mapping[str, Any]) -> list[ConfigProblem]:
    """Returns what is wrong about keys together, each of which is right by itself."""
    distribution = _filled(config)
    if distribution.min is not None and not distribution.min < distribution._ends[1]:
        return [(("min",), f"min must be below max, but got min={distribution.min!r}, max={distribution.max!r}")]
    if distribution.probabilities:
        return _probability_problems(distribution)
    if distribution.values:
        return []
    try:
        ends = distribution.value_at(0.0), distribution.value_at(1 - HAIR)
        finite = all(abs(end) < float("inf") for end in ends)
    except (OverflowError, ValueError):  # an exponent or a quotient beyond the floats
        finite = False
    if not finite:
        return [((), f"values of this {name} may be too large for a float")]
    if distribution.q is not None and ends[0] == ends[1]:
        return [(("q",), f"q={distribution.q!r} rounds every value of this {name} to {ends[0]!r}")]
    return []


def _probability_problems(distribution: Distribution) -> list[ConfigProblem]:
    values, probabilities = distribution.values, distribution.probabilities
    place = ("probabilities",)
    if len(values) != len(probabilities):
        return [(place, f"there must be a probability a value, but got {len(probabilities)} for {len(values)}")]
    # The tolerance is W&B's.
    if not math.isclose(sum(probabilities), 1, rel_tol=0, abs_tol=1e-5):
        return [(place, f"probabilities must have a sum of 1, but got {sum(probabilities):.6g}")]
    return []


def _as_number(text: str) -> float | None:
    """Returns the finite number that a text spells, whether or not YAML reads it as one; None if there is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
