"""A sweep's trials in Optuna's storage: who proposes them, who stops them. Only this module imports Optuna."""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from eva.config import UserError
from eva.distributions import HAIR
from eva.ranking import TrialRecord
from eva.run_folder import new_run_id
from eva.sweep_file import Parameter, Sweep, grid

optuna.logging.set_verbosity(optuna.logging.WARNING)

# What a sweep without a metric is ranked by.
METRIC = "val/accuracy_best"
# A sweep that another process begins is made within so many seconds, or that process died.
MAKING_SECONDS = 10.0
# A database that is started anew, or whose place another one takes, is waited for so long.
PATIENCE_SECONDS = 30.0

P = ParamSpec("P")
R = TypeVar("R")

# What Optuna calls the ends of a trial. A diverged or stopped trial is a result, a failed one is none.
STATES = {
    "finished": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


# --- what a parameter is to Optuna ---

# Distributions of W&B that Optuna has too.
AS_THEMSELVES: dict[str, Callable[[float, float], BaseDistribution]] = {
    "int_uniform": lambda low, high: IntDistribution(int(low), int(high)),
    "uniform": FloatDistribution,
    "log_uniform_values": lambda low, high: FloatDistribution(low, high, log=True),
}


def optuna_distribution(parameter: Parameter, method: str) -> BaseDistribution | None:
    """Returns Optuna's distribution of a parameter; None for a constant, which is not searched.

    What Optuna has no distribution for is searched by its quantile in [0, 1), which W&B's inverse distribution function
    turns into a value. Choices are JSON texts, as Optuna takes no lists and holds 1 and true for the same.
    """
    of = parameter.distribution
    if of.kind == "constant":
        return None
    if method == "grid":
        return CategoricalDistribution([json.dumps(value, default=str) for value in of.grid_values or ()])
    if of.kind == "categorical":
        return CategoricalDistribution([json.dumps(value, default=str) for value in of.values])
    if of.kind in AS_THEMSELVES and of.min is not None and of.max is not None:
        return AS_THEMSELVES[of.kind](of.min, of.max)
    return FloatDistribution(0.0, 1 - HAIR)


def parameter_value(parameter: Parameter, method: str, found: Any) -> Any:
    """Returns the value that Optuna's one stands for."""
    distribution = optuna_distribution(parameter, method)
    if isinstance(distribution, CategoricalDistribution):
        return json.loads(found)
    if parameter.distribution.kind in AS_THEMSELVES:
        return found
    return parameter.distribution.value_at(found)


class SeededSampler(BaseSampler):
    """Draws each trial's values from generators of its own, seeded by the sweep's seed, its number and the parameter.

    So what is proposed depends on the trials before, not on how often a sweep was interrupted or by which process.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed

    def _sampler(self, trial: FrozenTrial, name: str = "") -> BaseSampler:
        entropy = [self._seed, trial.number, zlib.crc32(name.encode())]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return self._make(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler(trial, param_name).sample_independent(study, trial, param_name, param_distribution)


def _sampler(method: str, seed: int, count: int) -> BaseSampler:
    if method != "bayes":
        return SeededSampler(RandomSampler, seed)
    # So many trials are drawn at random before the estimates begin: a third of a short sweep.
    startup = max(4, min(10, count // 3))
    return SeededSampler(
        lambda own: TPESampler(seed=own, n_startup_trials=startup, multivariate=True, constant_liar=True), seed
    )


# --- where trials are kept ---


class JournalLock:
    """Holds a journal for one process at a time. The system releases it when its process dies, however that happens.

    Who gets it drops a line that a dying process wrote in part: nobody has read it.
    """

    def __init__(self, journal: Path) -> None:
        self._journal, self._lock = journal, journal.with_suffix(".lock")

    def acquire(self) -> bool:
        self._file = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        with open(self._journal, "rb+") as journal:
            end = journal.seek(0, os.SEEK_END)
            if end:
                journal.seek(end - 1)
                if journal.read(1) != b"\n":
                    journal.seek(0)
                    journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        os.close(self._file)


def open_storage(url: str) -> BaseStorage:
    """Returns Optuna's storage: a journal file for a path, a database for a URL (postgresql://USER@HOST/NAME).

    Raises:
        UserError: It can't be opened, or its driver is not installed.
    """
    if "://" not in url:
        path = Path(url)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            storage = JournalStorage(JournalFileBackend(str(path), JournalLock(path)))  # type: ignore[arg-type]
            _check_last_line(path)
            return storage
        except OSError as error:
            raise UserError(f"cannot open the storage {url!r}: {error.strerror}") from None
        except (ValueError, KeyError, AssertionError, TypeError):
            raise UserError(f"the storage {url!r} is damaged: it is no journal of Optuna's") from None
    scheme, rest = url.split("://", 1)
    if rest.count("@") > 1:
        raise UserError(f"an @ within a password is written %40, but got the storage {without_password(url)!r}")
    if scheme in ("postgres", "postgresql"):
        url = f"postgresql+psycopg://{rest}"
    try:
        return optuna.storages.get_storage(RDBStorage(url, engine_kwargs={"pool_pre_ping": True}))
    except ImportError as error:
        raise UserError(
            f"the storage {without_password(url)!r} needs a package that is not installed: {error}; "
            'for PostgreSQL: pip install "eva-sweeps[postgres]"'
        ) from None
    except Exception as error:  # SQLAlchemy's and the driver's own, with the URL's password in some of them
        reason = _reason(error).replace(url, without_password(url))
        raise UserError(f"cannot open the storage {without_password(url)!r}: {reason}") from None


def _reason(error: BaseException | None) -> str:
    """Returns what a database's error says, on one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__


@contextlib.contextmanager
def reaching(storage: str) -> Iterator[None]:
    """Makes it one line that a database went away while a sweep used it, or that a disk is full.

    Args:
        storage: Its URL as it may be shown.

    Raises:
        UserError: It did.
    """
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        raise UserError(f"cannot reach the storage {storage!r}: {_reason(error.__cause__ or error)}") from None
    except OSError as error:
        where = f" ({str(error.filename)!r})" if error.filename else ""
        raise UserError(f"cannot go on: {error.strerror or error}{where}") from None


def patient(method: Callable[Concatenate["Search", P], R]) -> Callable[Concatenate["Search", P], R]:
    """Returns a method of `Search` that tries again while the database is away, but not for long."""

    @functools.wraps(method)
    def tried(search: "Search", /, *arguments: P.args, **named: P.kwargs) -> R:
        while True:
            try:
                result = method(search, *arguments, **named)
                search.away_since = None
                return result
            except optuna.exceptions.StorageInternalError:
                search.away_since = search.away_since or time.monotonic()
                if time.monotonic() - search.away_since >= PATIENCE_SECONDS:
                    raise
                time.sleep(0.5)

    return tried


def _check_last_line(journal: Path) -> None:
    """Checks the one line that Optuna leaves unread if it is no JSON; part of a line, without its end, is well.

    Raises:
        ValueError: It is none.
    """
    with open(journal, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    if lines and lines[-1].endswith(b"\n"):
        json.loads(lines[-1])


def without_password(url: str) -> str:
    """Returns a storage URL as it may be shown and written down."""
    url = re.sub(r"[?&]\w*password=[^&]*", "", url, flags=re.IGNORECASE)
    scheme, separator, rest = url.partition("://")
    account, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{account.partition(':')[0]}{at}{place}"


@dataclass(frozen=True)
class Claimed:
    """A trial that this process is to run: its number, its run's id, and the searched parameters' values by name."""

    number: int
    run_id: str
    values: dict[str, Any]


class Search:
    """The trials of one sweep: a queue that any number of processes take from.

    Optuna's states are the queue. A trial waits, runs, waits again if its process died or was interrupted, and ends
    once: of two processes that ask the storage to change a trial's state in the same way, one is told that it did.
    """

    def __init__(self, sweep: Sweep, storage: BaseStorage, name: str) -> None:
        """Opens a sweep that `create` made.

        Raises:
            UserError: There is none of this name, or it is another one's.
        """
        self.sweep, self.name, self._storage = sweep, name, storage
        self.metric = sweep.metric or METRIC
        self.away_since: float | None = None  # by time.monotonic(), if the storage can't be reached
        try:
            self._study_id = storage.get_study_id_from_name(name)
        except KeyError:
            raise UserError(f"the storage holds no sweep {name!r}") from None
        attributes = storage.get_study_user_attrs(self._study_id)
        if attributes.get("sweep") != _fingerprint(sweep):
            raise UserError(
                f"the storage holds another sweep {name!r}, not that of {str(sweep.source)!r}; choose another name"
            )
        self.seed, self.count = attributes["seed"], attributes["count"]
        self._searched = {
            parameter.name: (parameter, distribution)
            for parameter in sweep.parameters
            if (distribution := optuna_distribution(parameter, sweep.method)) is not None
        }

    @classmethod
    def create(cls, sweep: Sweep, storage: BaseStorage, name: str, seed: int, count: int) -> "Search":
        """Returns a new sweep of `count` waiting trials, or the one of this name if there is one of the same YAML.

        Raises:
            UserError: There is another sweep of this name.
        """
        goal = {"maximize": StudyDirection.MAXIMIZE, "minimize": StudyDirection.MINIMIZE}[sweep.goal]
        try:
            study_id = storage.create_new_study([goal], name)
        except optuna.exceptions.DuplicatedStudyError:
            _wait_until_made(storage, storage.get_study_id_from_name(name))
            return cls(sweep, storage, name)
        for key, value in (("seed", seed), ("count", count), ("sweep", _fingerprint(sweep))):
            storage.set_study_user_attr(study_id, key, value)
        search = cls(sweep, storage, name)
        search.extend(count)
        return search

    def extend(self, count: int) -> None:
        """Adds trials until the search has `count` of them; those that repeat others don't count.

        One process at a time may do it. What a process that died here left undone is done by the next one.
        """
        searched = [trial for trial in self._trials() if not {"repeat_of", "retry_of"} & trial.user_attrs.keys()]
        if self.sweep.method == "grid":
            wanted = [
                {name: json.dumps(values[name], default=str) for name in self._searched} for values in grid(self.sweep)
            ]
        else:
            wanted = [{}] * count
        for params in wanted[len(searched) : count]:
            self._study().enqueue_trial(params, user_attrs={"run_id": new_run_id()})
        self.count = max(count, len(searched))
        self._storage.set_study_user_attr(self._study_id, "count", self.count)

    def repeat(self, number: int, seed: int) -> None:
        """Adds a trial that repeats the values of another one with another seed."""
        params = self._trials()[number].params
        facts = {"run_id": new_run_id(), "repeat_of": number, "seed": seed}
        self._study().enqueue_trial(params, user_attrs=facts)

    def retry(self) -> int:
        """Adds a trial for each one that failed, with its values, which counts in its place; returns their number.

        One process at a time may do it.
        """
        failed = [trial for trial in self._current() if trial.state == TrialState.FAIL]
        for trial in failed:
            facts = {key: value for key, value in trial.user_attrs.items() if key in ("repeat_of", "seed")}
            facts |= {"run_id": new_run_id(), "retry_of": trial.number}
            self._study().enqueue_trial(trial.params, user_attrs=facts)
        return len(failed)

    # The queue

    @patient
    def waiting(self) -> list[int]:
        """Returns the numbers of the trials that wait, in order."""
        return [trial.number for trial in self._current() if trial.state == TrialState.WAITING]

    @patient
    def claim(self, number: int, place: str) -> Claimed | None:
        """Takes a waiting trial for this process; None if another one was faster.

        Args:
            number: The trial's.
            place: Names the folder that the trial's run goes to.
        """
        trial_id = self._id(number)
        try:
            if not self._storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                return None
        except optuna.exceptions.UpdateFinishedTrialError:
            return None
        self._storage.set_trial_user_attr(trial_id, "place", place)
        self._storage.set_trial_user_attr(trial_id, "since", time.time())
        self.beat(number)  # who watched the process before this one knows it for another
        trial = optuna.Trial(self._study(), trial_id)
        values = {
            name: parameter_value(parameter, self.sweep.method, _suggested(trial, name, distribution))
            for name, (parameter, distribution) in self._searched.items()
        }
        facts = trial.user_attrs
        if "seed" in facts:
            values["seed"] = facts["seed"]
        return Claimed(number, facts["run_id"], values)

    @patient
    def give_back(self, number: int, died: bool = False) -> int:
        """Lets a running trial wait again, to be gone on with; returns how often its process died by now."""
        trial = self._trial(number)
        deaths = trial.user_attrs.get("deaths", 0) + died
        if died:
            self._storage.set_trial_user_attr(self._id(number), "deaths", deaths)
        if trial.state == TrialState.RUNNING:
            self._storage.set_trial_state_values(self._id(number), TrialState.WAITING)
        return int(deaths)

    @patient
    def running(self) -> dict[int, tuple[str, int]]:
        """Returns place and latest beat of the running trials, by number."""
        return {
            trial.number: (trial.user_attrs.get("place", ""), trial.user_attrs.get("beat", 0))
            for trial in self._trials((TrialState.RUNNING,))
        }

    def beat(self, number: int) -> None:
        """Shows processes that cannot see this one that it is alive."""
        beats = self._trial(number).user_attrs.get("beat", 0)
        self._storage.set_trial_user_attr(self._id(number), "beat", beats + 1)

    # What trials tell

    @patient
    def report(self, number: int, epoch: int, value: float) -> bool:
        """Notes the metric after an epoch of a trial, and returns whether the trial is to end now, by hyperband's rule.

        Values that are not finite are not noted, as W&B doesn't count them. A trial that repeats another one runs to
        its end: its mean over seeds is to be that of whole runs.
        """
        trial = self._trial(number)
        if math.isfinite(value) and epoch not in trial.intermediate_values:
            self._storage.set_trial_intermediate_value(self._id(number), epoch, value)
        if self.sweep.hyperband is None or "repeat_of" in trial.user_attrs:
            return False
        curves = {one.number: one.intermediate_values for one in self._current() if "repeat_of" not in one.user_attrs}
        own = [value for step, value in sorted(curves.pop(number).items()) if step <= epoch]
        others = [[value for _, value in sorted(curve.items())] for curve in curves.values()]
        return self.sweep.hyperband.stops(own, others, self.sweep.goal)

    @patient
    def finish(self, number: int, state: str, objective: float | None, seconds: float, reason: str = "") -> bool:
        """Notes what a trial came to; returns whether it had not ended before, in which case nothing is changed.

        Args:
            number: The trial's.
            state: finished, stopped, diverged or failed.
            objective: The metric's last finite value; None if there is none.
            seconds: What its attempt took.
            reason: Why it failed.
        """
        trial_id, told = self._id(number), STATES[state]
        if told == TrialState.COMPLETE and objective is None:
            told = TrialState.PRUNED  # a result, though without a value: Optuna takes it for the worst
        try:
            before = self._trial(number).user_attrs.get("seconds", 0.0)
            for key, value in (("state", state), ("reason", reason), ("seconds", before + seconds)):
                self._storage.set_trial_user_attr(trial_id, key, value)
            values = None if told == TrialState.FAIL or objective is None else [objective]
            return self._storage.set_trial_state_values(trial_id, told, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    @patient
    def since(self, number: int) -> float:
        """Returns when the latest attempt of a trial began, in seconds since the epoch."""
        return float(self._trial(number).user_attrs.get("since", time.time()))

    @patient
    def spend(self, number: int, seconds: float) -> None:
        """Adds the seconds of an attempt that did not end the trial."""
        before = self._trial(number).user_attrs.get("seconds", 0.0)
        self._storage.set_trial_user_attr(self._id(number), "seconds", before + seconds)

    @patient
    def records(self) -> list[TrialRecord]:
        """Returns all trials, by number, without those that failed and were tried again."""
        return [self._record(trial) for trial in self._current()]

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        facts = trial.user_attrs
        values = {
            name: parameter_value(parameter, self.sweep.method, trial.params[name])
            for name, (parameter, _) in self._searched.items()
            if name in trial.params
        }
        if "seed" in facts:
            values["seed"] = facts["seed"]
        waits = {TrialState.WAITING: "waiting", TrialState.RUNNING: "running"}
        state = waits.get(trial.state) or facts.get("state", "failed")
        return TrialRecord(
            number=trial.number,
            state=state,
            values=values,
            objective=trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
            curve=tuple(value for _, value in sorted(trial.intermediate_values.items())),
            seconds=facts.get("seconds"),
            reason=facts.get("reason", ""),
            folder=f"trials/{trial_name(trial.number)}",
            repeat_of=facts.get("repeat_of"),
        )

    def _study(self) -> optuna.Study:
        """Returns Optuna's study anew: one that proposed something before keeps the trials as they were then."""
        return optuna.load_study(
            study_name=self.name,
            storage=self._storage,
            sampler=_sampler(self.sweep.method, self.seed, self.count),
            pruner=optuna.pruners.NopPruner(),
        )

    def _trials(self, states: tuple[TrialState, ...] | None = None) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study_id, deepcopy=False, states=states)

    def _current(self) -> list[FrozenTrial]:
        """Returns the trials that count, by number: none that failed and is tried again, and none that is there twice.

        Two machines may add the same retry or the same repeat at once, as no lock is theirs in common.
        """
        trials = self._trials()
        replaced = {trial.user_attrs.get("retry_of") for trial in trials}
        first: dict[tuple[Any, ...], int] = {}
        for trial in trials:
            first.setdefault(_purpose(trial), trial.number)
        return [trial for trial in trials if first[_purpose(trial)] == trial.number and trial.number not in replaced]

    def _trial(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._id(number))

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def _purpose(trial: FrozenTrial) -> tuple[Any, ...]:
    """Returns what a trial is there for; of two with the same purpose one is enough."""
    facts = trial.user_attrs
    if "retry_of" in facts:
        return "retry", facts["retry_of"]
    if "repeat_of" in facts:
        return "repeat", facts["repeat_of"], facts["seed"]
    return "search", trial.number


def _suggested(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(name, distribution.low, distribution.high)
        case FloatDistribution():
            return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
    raise TypeError(distribution)


def trial_name(number: int) -> str:
    """Returns what a trial is called: trial-0007."""
    return f"trial-{number:04}"


def _wait_until_made(storage: BaseStorage, study_id: int) -> None:
    """Waits while another process makes a sweep; not for long, as it may have died over it."""
    deadline = time.monotonic() + MAKING_SECONDS
    while time.monotonic() < deadline:
        made = len(storage.get_all_trials(study_id, deepcopy=False))
        if made >= storage.get_study_user_attrs(study_id).get("count", math.inf):
            return
        time.sleep(0.1)


def _fingerprint(sweep: Sweep) -> str:
    return hashlib.sha256(sweep.text.encode()).hexdigest()
