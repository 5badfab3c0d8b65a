"""The search: a queue that hands out each trial once, proposals that only the seed decides, a journal that survives."""

import fcntl
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import scipy.stats
import yaml
from made_sweeps import begin
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import InMemoryStorage
from sweeps.hyperband_stopping import hyperband_stop_runs
from sweeps.run import RunState, SweepRun
from wandb.sdk.sweeps.scheduler.optuna import sweep_parameter_to_distribution

from eva import search as searches
from eva.config import UserError
from eva.distributions import KINDS
from eva.search import (
    Claimed,
    JournalLock,
    Search,
    open_storage,
    optuna_distribution,
    parameter_value,
    without_password,
)
from eva.sweep_file import Sweep, grid, read_sweep

UNIFORM = {"x": {"min": 0.0, "max": 1.0}, "y": {"min": 0.0, "max": 1.0}}
LOSS = {"name": "loss", "goal": "minimize"}
FORK = multiprocessing.get_context("fork")

# Everything that YAML can hold and that Python or JSON might take for something else.
CHOICES = [True, 1, "1", False, 0, None, "null", 1.5, "true", [1, 2], [1, True], {"a": 1}, {"a": [None]}, ""]


def make(folder: Path, parameters: Mapping[str, Any], method: str = "random", **more: Any) -> Sweep:
    """Returns a sweep of these parameters, from a file."""
    values = {"program": "train.py", "method": method, "metric": LOSS, "parameters": dict(parameters), **more}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return read_sweep(path)


def claims(search: Search) -> Iterator[Claimed]:
    """Yields every trial that is to be had, as a worker takes them."""
    while numbers := search.waiting():
        for number in numbers:
            if claimed := search.claim(number, "here"):
                yield claimed


def proposals(sweep: Sweep, seed: int = 0, count: int = 20) -> list[dict[str, Any]]:
    """Returns the values of a new search's trials, by number, as one process claims them in turn."""
    return [claimed.values for claimed in claims(Search.create(sweep, InMemoryStorage(), "name", seed, count))]


def in_processes(*targets: Callable[[], None]) -> None:
    """Runs functions at the same time, each in a process of its own."""
    barrier = FORK.Barrier(len(targets))

    def run(target: Callable[[], None]) -> None:
        barrier.wait()
        target()
        os._exit(0)

    processes = [FORK.Process(target=run, args=(target,)) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


# The queue


@pytest.mark.parametrize("method", ["random", "grid"])
def test_processes_take_every_trial_once_with_what_one_process_would_have_been_given(
    tmp_path: Path, method: str
) -> None:
    """Four processes empty one journal; who took what is left to chance, what is proposed is not."""
    values = {"values": list(range(6))}
    parameters = {"a": values, "b": values, "seed": {"value": 1}} if method == "grid" else UNIFORM
    sweep, journal = make(tmp_path, parameters, method), str(tmp_path / "journal.log")
    Search.create(sweep, open_storage(journal), "name", seed=5, count=36)

    def take(part: int) -> None:
        taken = [(one.number, one.run_id, one.values) for one in claims(Search(sweep, open_storage(journal), "name"))]
        (tmp_path / f"{part}.json").write_text(json.dumps(taken))

    in_processes(*[lambda part=part: take(part) for part in range(4)])
    parts = [json.loads((tmp_path / f"{part}.json").read_text()) for part in range(4)]
    taken = sorted(itertools.chain.from_iterable(parts))
    assert [number for number, _, _ in taken] == list(range(36))
    assert len({run_id for _, run_id, _ in taken}) == 36
    assert sum(bool(part) for part in parts) > 1
    assert [values for _, _, values in taken] == proposals(sweep, seed=5, count=36)


def test_a_grid_gives_its_combinations_in_order(tmp_path: Path) -> None:
    """Constants are left out, and a smaller count takes the first ones."""
    parameters = {
        "b": {"values": [True, 1, None]},
        "a": {"distribution": "int_uniform", "min": 2, "max": 4},
        "c": {"parameters": {"d": {"values": [[1], {"e": 2}]}}},
        "f": {"value": 7},
    }
    sweep = make(tmp_path, parameters, "grid")
    wanted = list(grid(sweep))
    assert len(wanted) == 18
    assert repr(proposals(sweep, count=18)) == repr(wanted)
    assert repr(proposals(sweep, count=5)) == repr(wanted[:5])


def test_one_trial_is_claimed_once_until_it_is_given_back(tmp_path: Path) -> None:
    """Claimed, a trial runs; given back, it waits with its values and its run; ended, it is nobody's."""
    search = Search.create(make(tmp_path, UNIFORM), open_storage(str(tmp_path / "journal.log")), "name", 0, 2)
    first = search.claim(0, "here")
    assert first is not None and search.claim(0, "there") is None
    assert (search.waiting(), list(search.running())) == ([1], [0])
    assert search.running()[0][0] == "here"
    assert search.give_back(0) == 0
    assert search.waiting() == [0, 1] and search.running() == {}
    assert search.claim(0, "there") == first
    assert search.running()[0][0] == "there"
    assert search.finish(0, "finished", 0.5, 1.0)
    assert search.claim(0, "here") is None
    assert search.waiting() == [1]


def test_who_claims_a_trial_is_heard_of_at_once_and_whenever_it_beats(tmp_path: Path) -> None:
    """Or who watches would take the silence of the process before for that of this one."""
    search = Search.create(make(tmp_path, UNIFORM), InMemoryStorage(), "name", 0, 1)
    beats = []
    for _ in range(2):
        search.claim(0, "here")
        beats.append(search.running()[0][1])
        search.beat(0)
        beats.append(search.running()[0][1])
        search.give_back(0, died=True)
    assert len(set(beats)) == 4


def test_deaths_are_counted_and_interruptions_are_not(tmp_path: Path) -> None:
    """A process that was asked to stop says nothing about its trial."""
    search = Search.create(make(tmp_path, UNIFORM), InMemoryStorage(), "name", 0, 1)
    counts = []
    for died in (True, False, True):
        search.claim(0, "here")
        counts.append(search.give_back(0, died=died))
    assert counts == [1, 1, 2]


# What a trial came to


def test_the_first_end_of_a_trial_stays(tmp_path: Path) -> None:
    """The second one is told that it came late, and changes nothing at all."""
    journal = str(tmp_path / "journal.log")
    sweep = make(tmp_path, UNIFORM)
    search = Search.create(sweep, open_storage(journal), "name", 0, 1)
    other = Search(sweep, open_storage(journal), "name")
    search.claim(0, "here")
    search.report(0, 1, 0.25)
    assert search.finish(0, "finished", 0.25, 2.0)
    before = search.records()
    for late in (search, other):
        assert not late.finish(0, "failed", None, 9.0, "late")
    assert other.records() == search.records() == before
    assert Search(sweep, open_storage(journal), "name").records() == before


@pytest.mark.parametrize(
    ("state", "objective"),
    [("finished", 0.5), ("stopped", 0.25), ("diverged", 0.75), ("diverged", None), ("finished", None)],
)
def test_a_result_is_kept_as_it_is(tmp_path: Path, state: str, objective: float | None) -> None:
    """State, objective, curve, and the seconds of all attempts; also through the journal."""
    sweep, journal = make(tmp_path, UNIFORM), str(tmp_path / "journal.log")
    search = Search.create(sweep, open_storage(journal), "name", 0, 2)
    claimed = search.claim(1, "here")
    assert claimed is not None
    for epoch, value in enumerate((2.0, math.nan, 1.0), start=1):
        search.report(1, epoch, value)
    search.spend(1, 1.5)
    search.finish(1, state, objective, 2.0)
    waiting, record = Search(sweep, open_storage(journal), "name").records()
    assert (waiting.state, waiting.values, waiting.objective, waiting.seconds) == ("waiting", {}, None, None)
    assert (record.number, record.state, record.objective, record.seconds) == (1, state, objective, 3.5)
    assert record.values == claimed.values
    assert record.curve == (2.0, 1.0)
    assert (record.folder, record.repeat_of, record.reason) == ("trials/trial-0001", None, "")


def test_a_failure_has_its_reason_and_no_objective(tmp_path: Path) -> None:
    """One line for the reader."""
    search = Search.create(make(tmp_path, UNIFORM), InMemoryStorage(), "name", 0, 1)
    search.claim(0, "here")
    search.finish(0, "failed", None, 2.0, "out of memory")
    record = search.records()[0]
    assert (record.state, record.objective, record.reason) == ("failed", None, "out of memory")


def test_an_epoch_that_is_reported_twice_counts_once(tmp_path: Path) -> None:
    """A trial that is gone on with may repeat the epoch that its process died in. What others were told of it stays."""
    search = Search.create(make(tmp_path, UNIFORM), InMemoryStorage(), "name", 0, 1)
    search.claim(0, "here")
    for epoch, value in ((1, 3.0), (2, 2.0), (2, 2.5), (3, 1.0)):
        assert not search.report(0, epoch, value)
    assert search.records()[0].curve == (3.0, 2.0, 1.0)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("goal", ["minimize", "maximize"])
@pytest.mark.parametrize("bands", [{"min_iter": 2, "eta": 2}, {"max_iter": 9, "s": 2, "eta": 3}])
def test_trials_are_stopped_when_wandb_would_stop_them(
    tmp_path: Path, bands: dict[str, Any], goal: str, strict: bool
) -> None:
    """Every verdict on curves of different lengths, NaN among them, is that of the `sweeps` package."""
    generator = random.Random(4)
    early: dict[str, Any] = {"type": "hyperband", "strict": strict, **bands}
    config: dict[str, Any] = {"metric": {"name": "loss", "goal": goal}, "early_terminate": early}
    search = Search.create(make(tmp_path, UNIFORM, **config), InMemoryStorage(), "name", 0, 8)
    curves: dict[int, list[float]] = {claimed.number: [] for claimed in claims(search)}
    verdicts = []
    for _ in range(70):
        number = generator.choice([one for one, curve in curves.items() if len(curve) < 9])
        value = math.nan if generator.random() < 0.1 else number / 8 + generator.random() / 2
        curves[number].append(value)
        told = search.report(number, len(curves[number]), value)
        runs = [
            SweepRun(
                name=str(one),
                state=RunState.running if one == number else RunState.finished,
                history=[{"loss": value} for value in curve],
            )
            for one, curve in curves.items()
        ]
        wanted = {"method": "random", **config, "parameters": UNIFORM}
        stopped = hyperband_stop_runs(runs, wanted)
        assert told == (str(number) in [run.name for run in stopped])
        verdicts.append(told)
    assert 5 < sum(verdicts) < 65


def test_a_repeated_trial_is_never_stopped_and_stops_none(tmp_path: Path) -> None:
    """Its mean over seeds is to be that of whole runs, and its curve is no new configuration's."""
    early = {"type": "hyperband", "min_iter": 1, "eta": 2, "strict": True}
    search = Search.create(make(tmp_path, UNIFORM, early_terminate=early), InMemoryStorage(), "name", 0, 3)
    list(claims(search))
    verdicts = [search.report(number, 1, value) for number, value in enumerate((0.1, 0.2, 0.3))]
    assert verdicts == [False, False, True]  # thresholds: 0.1, 0.2 and 0.2 of the values so far
    for number in range(3):
        search.finish(number, "finished", 0.1, 1.0)
    search.repeat(0, seed=7)
    search.repeat(0, seed=8)
    list(claims(search))
    assert not search.report(3, 1, 0.9)
    assert not search.report(4, 1, 0.05)
    assert search.records()[3].curve == (0.9,)


def test_a_repeat_has_the_values_of_the_other_and_a_seed_of_its_own(tmp_path: Path) -> None:
    """Every type of value comes back; the search's size is the same as before."""
    parameters = {"a": {"values": CHOICES}, "b": {"distribution": "normal"}, "c": {"min": 1, "max": 9}}
    sweep, journal = make(tmp_path, parameters), str(tmp_path / "journal.log")
    search = Search.create(sweep, open_storage(journal), "name", 0, 6)
    first = list(claims(search))
    for number in range(6):
        search.finish(number, "finished", 0.1, 1.0)
        search.repeat(number, seed=100 + number)
    again = Search(sweep, open_storage(journal), "name")
    again.extend(6)
    repeated = list(claims(again))
    assert len(repeated) == 6
    assert [repr(one.values) for one in repeated] == [repr({**one.values, "seed": 100 + one.number}) for one in first]
    assert len({one.run_id for one in (*first, *repeated)}) == 12
    assert [record.repeat_of for record in again.records()] == [None] * 6 + list(range(6))
    again.extend(7)
    assert [record.repeat_of for record in again.records()][12:] == [None]


def test_a_seed_that_is_searched_is_replaced_in_a_repeat(tmp_path: Path) -> None:
    """The repeat's own seed wins."""
    search = Search.create(make(tmp_path, {"seed": {"values": [0, 1]}}, "grid"), InMemoryStorage(), "name", 0, 2)
    list(claims(search))
    search.repeat(1, seed=9)
    claimed = search.claim(2, "here")
    assert claimed is not None and claimed.values == {"seed": 9}
    assert search.records()[2].values == {"seed": 9}


# Proposals


def test_the_seed_alone_decides_what_a_random_search_proposes(tmp_path: Path) -> None:
    """Order, interruptions, results and processes don't matter; another seed is another search."""
    sweep, journal = make(tmp_path, UNIFORM), str(tmp_path / "journal.log")
    wanted = proposals(sweep, seed=3, count=12)
    Search.create(sweep, open_storage(journal), "name", seed=3, count=12)
    found: dict[int, dict[str, Any]] = {}
    order = random.Random(0).sample(range(12), 12)
    for number in order:
        for _ in range(2):  # a process of its own each time, of which the first gives up
            search = Search(sweep, open_storage(journal), "name")
            claimed = search.claim(number, "here")
            assert claimed is not None and found.setdefault(number, claimed.values) == claimed.values
            search.give_back(number, died=True)
        search.claim(number, "here")
        search.finish(number, "finished", float(number), 1.0)
    assert [found[number] for number in range(12)] == wanted
    other = proposals(sweep, seed=4, count=12)
    assert not {tuple(values.values()) for values in other} & {tuple(values.values()) for values in wanted}


def test_a_larger_search_begins_as_a_smaller_one(tmp_path: Path) -> None:
    """So that trials can be added."""
    sweep = make(tmp_path, UNIFORM)
    assert proposals(sweep, count=20)[:7] == proposals(sweep, count=7)


def bowl(values: Mapping[str, float]) -> float:
    """A loss with its least value, 0, at x = 0.3, y = 0.8."""
    return (values["x"] - 0.3) ** 2 + (values["y"] - 0.8) ** 2


def test_a_bayesian_search_of_one_worker_is_the_same_after_every_restart(tmp_path: Path) -> None:
    """What is proposed follows from the results before it; another seed draws others."""
    sweep, journal = make(tmp_path, UNIFORM, "bayes"), str(tmp_path / "journal.log")

    def run(search: Search, again: Callable[[], Search]) -> list[dict[str, Any]]:
        found = []
        while waiting := search.waiting():
            claimed = search.claim(waiting[0], "here")
            assert claimed is not None
            found.append(claimed.values)
            search.finish(claimed.number, "finished", bowl(claimed.values), 1.0)
            search = again()
        return found

    kept = Search.create(sweep, InMemoryStorage(), "name", 0, 30)
    wanted = run(kept, lambda: kept)
    first = Search.create(sweep, open_storage(journal), "name", 0, 30)
    assert run(first, lambda: Search(sweep, open_storage(journal), "name")) == wanted
    other = Search.create(sweep, InMemoryStorage(), "name", 1, 30)
    assert not {str(values) for values in run(other, lambda: other)} & {str(values) for values in wanted}
    # It is steered by what came out: it begins as a random search, and comes nearer to the best than that does.
    drawn = proposals(make(tmp_path, UNIFORM), seed=0, count=30)
    assert wanted[:10] == drawn[:10]
    losses, blind = [bowl(values) for values in wanted[10:]], [bowl(values) for values in drawn[10:]]
    assert np.median(losses) < np.median(blind) / 2


def test_proposals_of_parameters_trials_and_seeds_are_not_correlated(tmp_path: Path) -> None:
    """Each coefficient of n pairs of independent values has a deviation of 1 / sqrt(n); four of them are allowed."""
    count = 400
    parameters = {name: {"min": 0.0, "max": 1.0} for name in ("a", "b", "lr_min", "lr_max")}
    sweep = make(tmp_path, parameters)
    drawn = np.array([list(values.values()) for values in proposals(sweep, seed=0, count=count)])
    other = np.array([list(values.values()) for values in proposals(sweep, seed=1, count=count)])
    columns = np.concatenate([drawn[1:], drawn[:-1], other[1:]], axis=1).T
    found = np.corrcoef(columns) - np.eye(12)
    assert np.abs(found).max() < 4 / math.sqrt(count)
    assert len(np.unique(drawn)) == drawn.size


CONTINUOUS = {
    "uniform": ({"min": -1.0, "max": 3.0}, scipy.stats.uniform(-1, 4)),
    "log_uniform": ({"distribution": "log_uniform", "min": -5.0, "max": 1.0}, scipy.stats.loguniform(np.exp(-5), np.e)),
    "log_uniform_values": (
        {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0},
        scipy.stats.loguniform(1e-4, 1),
    ),
    "inv_log_uniform_values": (
        {"distribution": "inv_log_uniform_values", "min": 0.01, "max": 10.0},
        scipy.stats.loguniform(0.01, 10),
    ),
    "normal": ({"distribution": "normal", "mu": 2.0, "sigma": 3.0}, scipy.stats.norm(2, 3)),
    "log_normal": ({"distribution": "log_normal", "mu": 1.0, "sigma": 0.5}, scipy.stats.lognorm(0.5, scale=np.e)),
    "beta": ({"distribution": "beta", "a": 2, "b": 5}, scipy.stats.beta(2, 5)),
}


def test_values_follow_their_distributions(tmp_path: Path) -> None:
    """Kolmogorov and Smirnov's test against scipy's distribution function, of 400 values each."""
    sweep = make(tmp_path, {name: config for name, (config, _) in CONTINUOUS.items()})
    drawn = proposals(sweep, seed=0, count=400)
    for name, (_, law) in CONTINUOUS.items():
        assert scipy.stats.kstest([values[name] for values in drawn], law.cdf).pvalue > 0.001, name


STEPPED = {
    "q_uniform": ({"min": 0.0, "max": 10.0, "q": 0.5}, scipy.stats.uniform(0, 10)),
    "q_log_uniform": ({"min": 0.0, "max": 4.0, "q": 2}, scipy.stats.loguniform(1, np.exp(4))),
    "q_log_uniform_values": ({"min": 1.0, "max": 100.0, "q": 5}, scipy.stats.loguniform(1, 100)),
    "q_normal": ({"mu": 0.0, "sigma": 4.0, "q": 1}, scipy.stats.norm(0, 4)),
    "q_log_normal": ({"mu": 2.0, "sigma": 0.5, "q": 1}, scipy.stats.lognorm(0.5, scale=np.exp(2))),
    "q_beta": ({"a": 2, "b": 2, "q": 0.1}, scipy.stats.beta(2, 2)),
}


def test_stepped_values_are_the_nearest_multiples(tmp_path: Path) -> None:
    """The share up to a multiple of q is that of the law up to half a step above it, within 1.95 / sqrt(n)."""
    sweep = make(tmp_path, {name: {"distribution": name, **config} for name, (config, _) in STEPPED.items()})
    drawn = proposals(sweep, seed=0, count=400)
    for name, (config, law) in STEPPED.items():
        steps = np.array([values[name] for values in drawn]) / config["q"]
        assert np.allclose(steps, np.round(steps))
        assert len(set(np.round(steps))) > 5, name
        for step in set(np.round(steps)):
            share, wanted = np.mean(steps < step + 0.25), law.cdf((step + 0.5) * config["q"])
            assert abs(share - wanted) < 1.95 / math.sqrt(400), name


def test_whole_numbers_and_choices_are_drawn_evenly_or_by_their_probabilities(tmp_path: Path) -> None:
    """Pearson's test of the counts."""
    parameters = {
        "a": {"min": -2, "max": 5},
        "b": {"values": ["x", "y", "z"]},
        "c": {"values": ["x", "y", "z"], "probabilities": [0.6, 0.3, 0.1]},
    }
    drawn = proposals(make(tmp_path, parameters), seed=0, count=400)
    laws: dict[str, dict[Any, float]] = {
        "a": dict.fromkeys(range(-2, 6), 1 / 8),
        "b": dict.fromkeys("xyz", 1 / 3),
        "c": {"x": 0.6, "y": 0.3, "z": 0.1},
    }
    for name, shares in laws.items():
        counts = Counter(values[name] for values in drawn)
        assert counts.keys() == shares.keys()
        observed, expected = zip(*[(counts[value], 400 * share) for value, share in shares.items()], strict=True)
        assert scipy.stats.chisquare(observed, expected).pvalue > 0.001, name


@pytest.mark.parametrize("method", ["random", "bayes", "grid"])
def test_choices_come_back_as_they_are(tmp_path: Path, method: str) -> None:
    """True is not 1, "1" is text, and lists and mappings are choices too; in what is claimed and in the records."""
    sweep, journal = make(tmp_path, {"a": {"values": CHOICES}}, method), str(tmp_path / "journal.log")
    count = 14 if method == "grid" else 60
    search = Search.create(sweep, open_storage(journal), "name", 0, count)
    found = [claimed.values["a"] for claimed in claims(search)]
    if method == "grid":
        assert repr(found) == repr(CHOICES)
    else:
        assert {repr(value) for value in found} <= {repr(value) for value in CHOICES}
        assert len({repr(value) for value in found}) > 10
    records = Search(sweep, open_storage(journal), "name").records()
    assert repr([record.values["a"] for record in records]) == repr(found)


EVERY_KIND: dict[str, dict[str, Any]] = {
    "constant": {"value": 3},
    "categorical": {"values": [1, "a"]},
    "categorical_w_probabilities": {"values": [1, "a"], "probabilities": [0.25, 0.75]},
    "int_uniform": {"min": 1, "max": 9},
    "uniform": {"min": 0.0, "max": 2.0},
    "q_uniform": {"min": 0.0, "max": 2.0, "q": 0.25},
    "log_uniform": {"min": -3.0, "max": 0.0},
    "log_uniform_values": {"min": 1e-3, "max": 1.0},
    "q_log_uniform": {"min": 0.0, "max": 3.0, "q": 1},
    "q_log_uniform_values": {"min": 1.0, "max": 50.0, "q": 1},
    "inv_log_uniform": {"min": 0.0, "max": 3.0},
    "inv_log_uniform_values": {"min": 1e-3, "max": 1.0},
    "normal": {"mu": 0.0, "sigma": 1.0},
    "q_normal": {"mu": 0.0, "sigma": 9.0, "q": 1},
    "log_normal": {"mu": 0.0, "sigma": 1.0},
    "q_log_normal": {"mu": 2.0, "sigma": 1.0, "q": 1},
    "beta": {"a": 2.0, "b": 2.0},
    "q_beta": {"a": 2.0, "b": 2.0, "q": 0.1},
}


def every_kind() -> dict[str, dict[str, Any]]:
    """Returns a parameter of each kind, called as its kind."""
    return {kind: {"distribution": kind, **config} for kind, config in EVERY_KIND.items()}


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_every_distribution_of_wandb_can_be_searched(tmp_path: Path, method: str) -> None:
    """Also beyond the random beginning of a Bayesian search; a number's loss pulls to the upper end."""
    assert EVERY_KIND.keys() == KINDS.keys()
    sweep = make(tmp_path, every_kind(), method)
    search = Search.create(sweep, InMemoryStorage(), "name", 0, 14)
    found = []
    for number in range(14):
        claimed = search.claim(number, "here")
        assert claimed is not None
        found.append(claimed.values)
        loss = -sum(value for value in claimed.values.values() if isinstance(value, (int, float)))
        search.finish(number, "finished", loss, 1.0)
    assert [record.values for record in search.records()] == found
    for kind in EVERY_KIND.keys() - {"constant"}:
        drawn = [values[kind] for values in found]
        assert len({repr(value) for value in drawn}) > 1 or method == "bayes", kind
        assert all(type(value) in (int, float, str) for value in drawn)
    assert all("constant" not in values for values in found)


@pytest.mark.parametrize("kind", sorted(EVERY_KIND.keys() - {"constant"}))
def test_both_ends_of_what_optuna_may_propose_are_values(tmp_path: Path, kind: str) -> None:
    """Optuna's intervals are closed: what lies at their ends is rare, but is proposed one day."""
    parameter = make(tmp_path, {kind: every_kind()[kind]}).parameters[0]
    distribution = optuna_distribution(parameter, "random")
    assert distribution is not None
    if isinstance(distribution, CategoricalDistribution):
        ends: Sequence[Any] = distribution.choices
    else:
        ends = distribution.low, distribution.high  # type: ignore[attr-defined]
    for end in ends:
        value = parameter_value(parameter, "random", end)
        assert not isinstance(value, float) or math.isfinite(value)


WANDBS_TOO: dict[str, Any] = {
    "uniform": {"min": 0.5, "max": 2.0},
    "uniform by name": {"distribution": "uniform", "min": 0, "max": 2},
    "int_uniform": {"min": 1, "max": 9},
    "int_uniform by name": {"distribution": "int_uniform", "min": -3, "max": 9},
    "log_uniform_values": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1.0},
    "categorical": {"values": [1, "a", 2.5]},
    "categorical by name": {"distribution": "categorical", "values": ["b", "a"]},
}


@pytest.mark.parametrize("name", WANDBS_TOO)
def test_what_optuna_has_is_mapped_as_wandb_maps_it_for_its_own_scheduler(tmp_path: Path, name: str) -> None:
    """wandb's mapping is internal: this fails when it moves or changes. Our choices are JSON texts."""
    ours = optuna_distribution(make(tmp_path, {"a": WANDBS_TOO[name]}).parameters[0], "random")
    theirs: BaseDistribution = sweep_parameter_to_distribution(WANDBS_TOO[name])
    if isinstance(theirs, CategoricalDistribution):
        theirs = CategoricalDistribution([json.dumps(value) for value in theirs.choices])
    assert ours == theirs


@pytest.mark.parametrize("kind", ["normal", "beta", "log_uniform", "inv_log_uniform", "q_normal"])
def test_what_wandbs_mapping_refuses_is_searched_by_its_quantile(tmp_path: Path, kind: str) -> None:
    """The reason that the mapping is not wandb's."""
    with pytest.raises(ValueError, match="no optuna equivalent"):
        sweep_parameter_to_distribution(every_kind()[kind])
    parameter = make(tmp_path, {"a": every_kind()[kind]}).parameters[0]
    assert parameter_value(parameter, "bayes", 0.25) == parameter.distribution.value_at(0.25)


# What is created once


def test_a_creation_that_was_cut_short_is_completed_by_the_next_one(tmp_path: Path) -> None:
    """To the count that it was to have, no more, and with the proposals that it would have had."""
    for method, parameters in (("random", UNIFORM), ("grid", {"a": {"values": list(range(12))}})):
        sweep, journal = make(tmp_path, parameters, method), str(tmp_path / f"{method}.log")

        def begin(sweep: Sweep = sweep, journal: str = journal) -> None:
            storage = open_storage(journal)
            add, added = storage.create_new_trial, itertools.count()

            def dying(*arguments: Any, **more: Any) -> int:
                if next(added) == 4:
                    os._exit(0)
                return add(*arguments, **more)

            storage.create_new_trial = dying  # type: ignore[method-assign]
            Search.create(sweep, storage, "name", 0, 9)

        in_processes(begin)
        search = Search(sweep, open_storage(journal), "name")
        assert (search.count, len(search.waiting())) == (9, 4)
        for count in (search.count, 9, 5):
            search.extend(count)
        assert search.waiting() == list(range(9))
        assert len({claimed.run_id for claimed in claims(search)}) == 9
        assert [record.values for record in search.records()] == proposals(sweep, count=9)


def test_processes_that_create_a_sweep_at_once_get_one_of_the_right_size(tmp_path: Path) -> None:
    """One makes it, and the others wait until it has."""
    sweep, journal = make(tmp_path, UNIFORM), str(tmp_path / "journal.log")

    def create() -> None:
        assert Search.create(sweep, open_storage(journal), "name", 0, 40).waiting() == list(range(40))

    in_processes(create, create, create)
    search = Search(sweep, open_storage(journal), "name")
    assert (search.seed, search.count, len(search.records())) == (0, 40, 40)


def test_who_joins_a_sweep_does_not_wait_for_ever_for_a_maker_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with what there is."""
    monkeypatch.setattr(searches, "MAKING_SECONDS", 0.3)
    sweep, storage = make(tmp_path, UNIFORM), InMemoryStorage()
    Search.create(sweep, storage, "name", 0, 3)
    storage.set_study_user_attr(storage.get_study_id_from_name("name"), "count", 5)
    assert Search.create(sweep, storage, "name", 0, 5).waiting() == [0, 1, 2]


def test_another_sweep_of_the_same_name_is_refused(tmp_path: Path) -> None:
    """Its trials would be mixed up with this one's; a sweep that isn't there is told too."""
    storage = InMemoryStorage()
    Search.create(make(tmp_path, UNIFORM), storage, "name", 0, 2)
    other = make(tmp_path, {"x": {"min": 0.0, "max": 2.0}})
    with pytest.raises(UserError, match=r"another sweep 'name', not that of .*sweep\.yaml.*; choose another name"):
        Search.create(other, storage, "name", 0, 2)
    with pytest.raises(UserError, match="another sweep 'name'"):
        Search(other, storage, "name")
    with pytest.raises(UserError, match="holds no sweep 'nome'"):
        Search(other, storage, "nome")


# Where trials are kept


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me@host:5432/db"),
        ("postgresql://me:s:e/c@ret@host/db", "postgresql://me@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        (
            "postgresql://host/db?user=me&password=secret&sslmode=require",
            "postgresql://host/db?user=me&sslmode=require",
        ),
        ("postgresql://host/db?password=secret&sslpassword=secret", "postgresql://host/db"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    """The rest of the address is."""
    assert without_password(url).replace("db&", "db?") == shown
    assert "secret" not in without_password(url)


@pytest.mark.parametrize(
    "url", ["nonsense://u:secret@host/db", "mysql://u:secret@host/db", "postgresql://u:secret@h:x/d"]
)
def test_a_storage_that_cannot_be_opened_is_one_line_without_the_password(url: str) -> None:
    """Whatever it is that can't be opened."""
    with pytest.raises(UserError, match="storage") as caught:
        open_storage(url)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_password_is_not_cut_where_it_must_not_be() -> None:
    """SQLAlchemy would take what comes after the first @ for the host, and tell it."""
    with pytest.raises(UserError, match="%40") as caught:
        open_storage("postgresql://u:sec@ret@127.0.0.1/db")
    assert "ret@" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"no journal\n",
        b"{}\n",
        b"[1]\n",
        b"7\n",
        b"null\n",
        b"\xff\xfe\x00\n",
        b'{"op_code":99,"worker_id":"a"}\n',
        b'{"op_code":0}\n',
        b'{"op_code":0,"worker_id":"a","study_name":"n","directions":["up"]}\n',
        b'{"op_code":0,"worker_id":"a","study_na\n{"op_code":99,"worker_id":"a"}\n',
    ],
)
def test_a_damaged_journal_is_told(tmp_path: Path, content: bytes) -> None:
    """Not as a traceback; the file stays as it is."""
    path = tmp_path / "journal.log"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"journal.log' is damaged"):
        open_storage(str(path))
    assert path.read_bytes() == content


def test_a_journal_where_none_can_be_is_told(tmp_path: Path) -> None:
    """A file in the place of its folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot open the storage .*file/journal.log': .*(exists|directory)"):
        open_storage(str(tmp_path / "file" / "journal.log"))


def test_a_torn_line_costs_that_line_alone(tmp_path: Path) -> None:
    """The journal is cut at every byte of its last record, as a kill may leave it; the next writer mends it."""
    sweep, journal = make(tmp_path, {"a": {"values": ["é", "b"]}}), tmp_path / "journal.log"
    search = Search.create(sweep, open_storage(str(journal)), "name", 0, 3)
    search.claim(0, "here")
    search.report(0, 1, 0.5)
    before = search.records()
    whole = journal.read_bytes()
    search.report(0, 2, 0.25)
    after, full = search.records(), journal.read_bytes()
    assert full.startswith(whole) and full.count(b"\n") == whole.count(b"\n") + 1
    assert before != after
    for end in range(len(whole), len(full) + 1):
        journal.write_bytes(full[:end])
        torn = end < len(full)
        search = Search(sweep, open_storage(str(journal)), "name")
        assert search.records() == (before if torn else after)
        search.beat(0)
        kept = whole if torn else full
        text = journal.read_bytes()
        assert text.startswith(kept) and text.count(b"\n") == kept.count(b"\n") + 1 and text.endswith(b"\n")
        assert Search(sweep, open_storage(str(journal)), "name").running()[0] == search.running()[0]


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    """SIGKILL leaves no time to clean up: the system does it."""
    journal = tmp_path / "journal.log"
    search = Search.create(make(tmp_path, UNIFORM), open_storage(str(journal)), "name", 0, 1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        JournalLock(journal).acquire()
        os.write(write, b".")
        time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    with open(tmp_path / "journal.lock") as lock:
        with pytest.raises(BlockingIOError, match=r"Errno 11"):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    began = time.monotonic()
    assert search.claim(0, "here") is not None
    assert time.monotonic() - began < 5


def test_optuna_is_imported_by_the_search_alone() -> None:
    """The one small module that is to change when Optuna does."""
    package = Path(searches.__file__).parent
    imports = [path.name for path in package.glob("*.py") if "import optuna" in path.read_text()]
    imports += [path.name for path in package.glob("*.py") if "from optuna" in path.read_text()]
    assert set(imports) == {"search.py"}
    assert optuna.__version__.startswith("5.")


def test_what_two_machines_add_at_once_is_there_once(tmp_path: Path) -> None:
    """A retry of the same trial, and a repeat with the same seed: the first one counts, and the other is never run."""
    folder, search = begin(tmp_path, "finish", "wait")
    other = folder.open_search()
    for number in (0, 1):
        search.claim(number, "here")
        search.finish(number, "failed", None, 1.0)
    for one in (search, other):  # as if neither had seen what the other adds
        for number in (0, 1):
            params = one._trials()[number].params
            one._study().enqueue_trial(params, user_attrs={"run_id": "again", "retry_of": number})
    assert search.waiting() == [2, 3] == [trial.number for trial in other.records()]
    assert search.retry() == 0
    for one in (search, other):
        one.repeat(2, 7)
    assert search.waiting() == [2, 3, 6]
