"""What the trials of a sweep add up to: the ranking of their configurations and how sure of it one may be.

Everything here is a function of the trials' records alone: it trains nothing, reads no file and draws nothing.
"""

import math
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, groupby
from statistics import fmean
from typing import Any

from eva.comparison import SEED
from eva.files import finite
from eva.importance import Importance, measure_importance
from eva.statistics import ALPHA, GroupTest, MeanInterval, mean_interval, welch, welch_tests
from eva.text import (
    aligned,
    cut,
    duration,
    format_difference,
    format_interval,
    format_metric,
    format_p,
    format_setting,
    listed,
    printable,
    shortened,
)

FORMAT = 1  # of what `results` returns

# States of a trial with a result, the most reliable one first.
RESULTS = ("finished", "stopped", "diverged")
ENDED = (*RESULTS, "failed")

NUM_LINES = 20  # of the ranking, on a terminal
NUM_SAID = 6  # configurations whose every pair is told in words
VALUE_LENGTH = 24  # characters of a parameter's value


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a sweep, as its records tell it.

    Attributes:
        number: Its position in the sweep, from 0.
        state: waiting, running, finished, stopped (early), diverged or failed.
        values: Parameter name to value; constants are left out.
        objective: The metric's last finite value, a fraction or a loss; None if there is none.
        curve: The metric after each epoch.
        seconds: From its start to its end, all attempts together; None without an end.
        reason: Why it failed, one line; "" otherwise.
        folder: Its run folder, relative to the sweep's folder; None if it has none.
        repeat_of: Number of the trial whose configuration it repeats with another seed; None for one of the search.
    """

    number: int
    state: str
    values: Mapping[str, Any]
    objective: float | None
    curve: tuple[float, ...]
    seconds: float | None
    reason: str
    folder: str | None
    repeat_of: int | None

    @property
    def result(self) -> float | None:
        """The objective, if it is finite and the trial did not fail; else None."""
        ended = self.state in RESULTS and self.objective is not None and math.isfinite(self.objective)
        return self.objective if ended else None


@dataclass(frozen=True)
class Configuration:
    """The trials that differ by their seed alone.

    Attributes:
        number: Of the first of them, or of the trial that they repeat. It names the configuration.
        values: Parameter name to value, without the seed.
        trials: Those with a result, by number; one that diverged at once is a result without a value.
        num_failed: Trials of it that failed, and therefore say nothing.
        interval: Mean, deviation and t interval over the seeds that have a value; None if none has. Trials of the same
            seed count as one, their mean: they tell nothing of another seed.
    """

    number: int
    values: Mapping[str, Any]
    trials: tuple[TrialRecord, ...]
    num_failed: int
    interval: MeanInterval | None

    @property
    def label(self) -> str:
        """What sentences call it."""
        return f"trial {self.number}"

    @property
    def numbers(self) -> str:
        """What a table calls it: the numbers of its trials, or of the trial that they repeat."""
        repeats = any(trial.repeat_of is not None for trial in self.trials)
        return str(self.number) if repeats else listed([str(trial.number) for trial in self.trials], 4)

    @property
    def mean(self) -> float | None:
        """The mean over its seeds."""
        return self.interval.mean if self.interval else None

    @property
    def by_seed(self) -> tuple[float, ...]:
        """A value for each seed that has one."""
        return _by_seed(self.trials)

    @property
    def remark(self) -> str:
        """What its mean does not show: trials that were stopped, diverged, failed or have no value; "" if none."""
        count, told = len(self.trials) + self.num_failed, []
        for state in RESULTS[1:]:
            lengths = sorted(len(trial.curve) for trial in self.trials if trial.state == state)
            if not lengths:
                continue
            share = "" if count == 1 else f"all {count} " if len(lengths) == count else f"{len(lengths)} of {count} "
            told.append(f"{share}{state} after {_epochs(lengths[0], lengths[-1])}")
        if without := sum(trial.state == "finished" and trial.result is None for trial in self.trials):
            told.append("without a value" if count == 1 else f"{without} of {count} without a value")
        if self.num_failed:
            told.append(f"{self.num_failed} of {count} failed")
        return ", ".join(told)


def _epochs(fewest: int, most: int) -> str:
    span = str(most) if fewest == most else f"{fewest} to {most}"
    return f"{span} epoch" if span == "1" else f"{span} epochs"


def _by_seed(trials: Sequence[TrialRecord]) -> tuple[float, ...]:
    values: dict[Hashable, list[float]] = defaultdict(list)
    for trial in trials:
        if trial.result is not None:
            # A repeat has a new seed by definition, whether or not the seed is a parameter of the sweep.
            default = None if trial.repeat_of is None else ("repeat", trial.number)
            values[identity(trial.values.get(SEED, default))].append(trial.result)
    return tuple(fmean(each) for each in values.values())


def identity(value: Any) -> Hashable:
    """Returns what tells a value from others: true is not 1 here, but 1 is 1.0."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), identity(inner)) for key, inner in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(identity(inner) for inner in value)
    return (isinstance(value, bool), value)


def _order(value: float | None, goal: str) -> float:
    """Returns what sorts good values first and missing ones last."""
    return math.inf if value is None else {"minimize": value, "maximize": -value}[goal]


def best_trial(trials: Sequence[TrialRecord], goal: str) -> TrialRecord | None:
    """Returns the trial of the search with the best value; None if none has one. Of equal ones see `rank`."""
    with_value = [trial for trial in trials if trial.repeat_of is None and trial.result is not None]
    return min(
        with_value,
        key=lambda trial: (_order(trial.result, goal), RESULTS.index(trial.state), trial.number),
        default=None,
    )


def rank(trials: Sequence[TrialRecord], goal: str) -> list[Configuration]:
    """Returns the configurations of a search, best mean over their seeds first, in whatever order the trials are given.

    What a trial has reached is what it counts for. One that was stopped early has reached it in fewer epochs than the
    others; for a metric that keeps the best so far, its full length would have brought at least as much, so its place
    is the worst that it can have. Leaving it out of the mean over its seeds would be worse: only lucky seeds would be
    left. So all count, `Configuration.remark` says which of them ended early, and of equal means the one whose trials
    all finished is first, then the one with stopped trials, then the one with diverged trials, then the earlier one.

    A trial that diverged counts with its last value; one without any value counts for nothing in a mean (which then is
    too good, and has its remark), and a configuration of such trials alone is last. Failed trials don't count.
    Repeats are left out: `rank_repeats` ranks them.

    Args:
        trials: All trials of a sweep; those that have not ended are ignored.
        goal: minimize or maximize.
    """
    return _ranked([trial for trial in trials if trial.repeat_of is None], goal)


def rank_repeats(trials: Sequence[TrialRecord], goal: str) -> list[Configuration]:
    """Returns the configurations that were repeated with new seeds, best mean of the new seeds first.

    The result of the search itself is not in the mean. It is why the configuration was chosen among all others, and so
    is too good on average, by the more the more configurations there were; new seeds know nothing of the choice.
    """
    return _ranked([trial for trial in trials if trial.repeat_of is not None], goal)


def _ranked(trials: Sequence[TrialRecord], goal: str) -> list[Configuration]:
    groups: dict[Hashable, list[TrialRecord]] = defaultdict(list)
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.state in ENDED:
            groups[configuration_key(trial)].append(trial)
    found = [_configuration(group) for group in groups.values()]

    def order(configuration: Configuration) -> tuple[float, int, int]:
        least = max(RESULTS.index(trial.state) for trial in configuration.trials)
        return _order(configuration.mean, goal), least, configuration.number

    return sorted((configuration for configuration in found if configuration.trials), key=order)


def configuration_key(trial: TrialRecord) -> Hashable:
    """Returns what trials have in common that differ by their seed alone."""
    return identity({name: value for name, value in trial.values.items() if name != SEED})


def _configuration(trials: Sequence[TrialRecord]) -> Configuration:
    first, results = trials[0], tuple(trial for trial in trials if trial.state in RESULTS)
    by_seed = _by_seed(results)
    return Configuration(
        number=first.number if first.repeat_of is None else first.repeat_of,
        values={name: value for name, value in first.values.items() if name != SEED},
        trials=results,
        num_failed=len(trials) - len(results),
        interval=mean_interval(by_seed) if by_seed else None,
    )


# --- how sure ---


def distinguishable(configurations: Sequence[Configuration], goal: str) -> tuple[GroupTest, ...]:
    """Returns Welch's test of each pair of the configurations that have values of several seeds, corrected by Holm.

    Args:
        configurations: Best first, as from `rank_repeats` (or `rank`, where the seed was searched).
        goal: minimize or maximize.

    Returns:
        `statistics.welch_tests` of their labels.
    """
    return welch_tests({each.label: each.by_seed for each in configurations}, goal == "maximize")


def conclusion(configurations: Sequence[Configuration], tests: Sequence[GroupTest]) -> str:
    """Returns in words which configurations are better than which; of many, only what concerns the best.

    Args:
        configurations: Best first.
        tests: Of their pairs, from `distinguishable`.
    """
    tested = [each.number for each in configurations if any(each.label in (test.a, test.b) for test in tests)]
    untested = [each.number for each in configurations if len(each.by_seed) < 2]
    better = {(test.a, test.b) if test.better == test.a else (test.b, test.a) for test in tests if test.better}
    beats = {a: [b for b in tested if (f"trial {a}", f"trial {b}") in better] for a in tested}
    clauses = []
    if len(tested) > NUM_SAID:
        first, *others = tested
        alike = [other for other in others if other not in beats[first] and first not in beats[other]]
        clauses.append(f"{_trials([first])} is better than {len(beats[first])} of the {len(others)} others")
        if alike:
            clauses.append(f"not distinguishable from it: {listed([_trials([other]) for other in alike])}")
    else:
        for beaten, alike_winners in groupby(tested, key=lambda number: beats[number]):
            winners = list(alike_winners)
            if beaten:
                verb = "is" if len(winners) == 1 else "are"
                clauses.append(f"{_trials(winners)} {verb} better than {_trials(beaten)}")
        for group in _cliques(tested, beats):
            clauses.append(f"{_trials(group)} are not distinguishable")
    if not tested and len(configurations) > len(untested):
        clauses.append("there is no other configuration of several seeds to compare with")
    elif untested:
        clauses.append(f"without values of two seeds, {_trials(untested)} can't be compared")
    return "; ".join(clauses)


def _trials(numbers: Sequence[int]) -> str:
    """Returns trials by number, as one lists them in a sentence."""
    *most, last = map(str, numbers)
    return f"trials {', '.join(most)} and {last}" if most else f"trial {last}"


def _cliques(numbers: Sequence[int], beats: Mapping[int, Sequence[int]]) -> list[tuple[int, ...]]:
    """Returns the largest groups of which no one is better than another."""
    found: list[tuple[int, ...]] = []
    for size in range(len(numbers), 1, -1):
        for group in combinations(numbers, size):
            alike = all(b not in beats[a] and a not in beats[b] for a, b in combinations(group, 2))
            if alike and not any(set(group) <= set(larger) for larger in found):
                found.append(group)
    return found


def winner_and_median(trials: Sequence[TrialRecord], goal: str) -> tuple[Configuration, Configuration] | None:
    """Returns the best configuration of a search and the one in the middle of the ranking; None with fewer than two.

    Of an even number it is the better one of the two in the middle, from which it is harder to be told. Only those with
    a value count. Both must be repeated to the end with new seeds to be compared (`winner_against_median`).
    """
    with_value = [each for each in rank(trials, goal) if each.interval]
    if len(with_value) < 2:
        return None
    return with_value[0], with_value[max(1, (len(with_value) - 1) // 2)]


def winner_against_median(trials: Sequence[TrialRecord], metric: str, goal: str) -> str:
    """Returns in words whether the best configuration of a search is more than chance better than the median one.

    Where both were repeated, their new seeds answer it by Welch's test: one test, of a pair that was chosen before they
    ran, needs no correction. Otherwise, where the search itself had several seeds of both, the pair's test among those
    of all pairs does (`distinguishable`), as the best was chosen by the same values. One seed each can't answer it.
    """
    pair = winner_and_median(trials, goal)
    if pair is None:
        return "there is no median to compare the best with: fewer than two configurations have a result"
    best, median = pair
    names = f"the best ({best.label}) and the median ({median.label})"
    repeats = {identity(each.values): each for each in rank_repeats(trials, goal)}
    again = [repeats.get(identity(each.values)) for each in pair]
    if all(each is not None and len(each.by_seed) > 1 for each in again):
        a, b = (each.by_seed for each in again if each is not None)
        test = welch(b, a)
        difference, low, high, p = test.difference, test.low, test.high, test.p
        how = "Welch, new seeds"
    else:
        tests = distinguishable(rank(trials, goal), goal)
        one = next((test for test in tests if (test.a, test.b) == (best.label, median.label)), None)
        if one is None:
            assert best.mean is not None and median.mean is not None
            apart = format_difference(metric, best.mean - median.mean)
            unknown = "whether that is more than chance can't be told from one seed each: repeat both with new seeds"
            return f"{names} differ by {apart}; {unknown}"
        difference, p = -one.difference, one.p_adjusted
        low, high = (None if end is None else -end for end in (one.high, one.low))
        how = f"Welch, Holm for {'1 pair' if len(tests) == 1 else f'{len(tests)} pairs'}"
    excluded = low is not None and high is not None and not low <= 0 <= high
    if p is None or p >= ALPHA or not excluded:
        verdict = "are not distinguishable"
    elif (difference > 0) == (goal == "maximize"):
        verdict = "are distinguishable"
    else:
        verdict = "are distinguishable, but the median is better"
    interval = format_interval(metric, low, high, difference=True)
    apart = format_difference(metric, difference)
    return f"{names} {verdict}: {apart}, 95 % interval {interval}, p {format_p(p)} ({how})"


# --- the search as a whole ---


def importance(trials: Sequence[TrialRecord], metric: str) -> tuple[Importance | None, str]:
    """Returns how much each parameter matters for the objective, and "", or None and the reason if it can't be told.

    Repeats are left out, as they are of good configurations only, and trials without a value, which have nothing to be
    predicted. Stopped trials are in with what they have reached. The seed is no parameter here. See
    `eva.importance.measure_importance`, which speaks from 8 trials on.
    """
    ranked = [trial for trial in _of_search(trials) if trial.result is not None]
    columns = {name: [_plain(trial.values.get(name)) for trial in ranked] for name in parameters(ranked)}
    values = [trial.result for trial in ranked if trial.result is not None]
    try:
        return measure_importance(columns, values), ""
    except ValueError as error:
        return None, f"the importance of parameters for {printable(metric)} {error}".replace(" runs ", " trials ")


def _of_search(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Returns the trials of the search itself, without repeats, by number."""
    return sorted((trial for trial in trials if trial.repeat_of is None), key=lambda trial: trial.number)


def parameters(trials: Sequence[TrialRecord]) -> list[str]:
    """Returns the names of the parameters but the seed, in the order in which the trials have them."""
    return [name for name in dict.fromkeys(name for trial in trials for name in trial.values) if name != SEED]


def _plain(value: Any) -> Any:
    """Returns a value that a forest can split: a list or a mapping is a name."""
    return format_setting(value) if isinstance(value, (list, tuple, Mapping)) else value


@dataclass(frozen=True)
class Savings:
    """What early stopping spared a search.

    Attributes:
        num_trials: Trials with a result.
        num_stopped: Those that were stopped early.
        epochs_run: Epochs that all of them ran.
        epochs_full: Epochs that they would have run without early stopping.
    """

    num_trials: int
    num_stopped: int
    epochs_run: int
    epochs_full: int

    @property
    def share_stopped(self) -> float:
        """Stopped trials as a share of all; 0 without any trial."""
        return self.num_stopped / max(self.num_trials, 1)

    @property
    def share_saved(self) -> float:
        """Epochs that were not run as a share of those of a full search; 0 without any."""
        return 1 - self.epochs_run / self.epochs_full if self.epochs_full else 0.0


def savings(trials: Sequence[TrialRecord], epochs: int) -> Savings:
    """Returns how many epochs a search ran, against those that it would have run without early stopping.

    Only what was stopped early is spared: a trial that diverged would have done so anyway, and counts with the epochs
    that it ran. Failed trials and repeats don't count.

    Args:
        trials: All trials of the sweep.
        epochs: Of a full trial; where `epochs` is a parameter of the sweep, a trial's own value goes before.
    """
    ended = [trial for trial in trials if trial.repeat_of is None and trial.state in RESULTS]
    stopped = [trial for trial in ended if trial.state == "stopped"]
    spared = sum(max(0, int(trial.values.get("epochs", epochs)) - len(trial.curve)) for trial in stopped)
    run = sum(len(trial.curve) for trial in ended)
    return Savings(len(ended), len(stopped), run, run + spared)


def time_left(trials: Sequence[TrialRecord], count: int, workers: int) -> float | None:
    """Returns an estimate of the seconds until the last trial ends; None before the first one has ended.

    It is the mean of all ended trials, also of stopped and failed ones, as the next ones will be of all kinds, times
    the number of those that are left, shared by the workers; no worker shares a trial, so it is at least one mean. With
    several workers the shortest trials end first, and the first estimates are too low.

    Args:
        trials: Those that there are so far.
        count: How many there will be.
        workers: How many run at the same time.
    """
    ended = [trial for trial in trials if trial.state in ENDED]
    seconds = [trial.seconds for trial in ended if trial.seconds is not None]
    left = count - len(ended)
    if left <= 0:
        return 0.0
    return fmean(seconds) * left / min(max(workers, 1), left) if seconds else None


# --- what is told ---


def line(
    trial: TrialRecord,
    total: int | None,
    best: TrialRecord | None,
    seconds_left: float | None,
    metric: str,
) -> str:
    """Returns the line about a trial that has ended.

    Args:
        trial: It.
        total: How many there will be; None if that is open.
        best: The best trial so far, from `best_trial`; None without one.
        seconds_left: From `time_left`; None if it can't be told.
        metric: Name of the objective.
    """
    place = f"trial {trial.number}" + ("" if total is None else f" of {total}")
    if trial.repeat_of is not None:
        place += f" (repeats trial {trial.repeat_of})"
    state = {
        "stopped": f"stopped after {_epochs(len(trial.curve), len(trial.curve))}",
        "failed": f"failed ({shortened(printable(trial.reason), 100)})" if trial.reason else "failed",
    }.get(trial.state, trial.state)
    parts = [f"{place}: {state}"]
    if trial.result is not None:
        parts[0] += f", {format_metric(metric, trial.result)}"
    if best is not None and best.number == trial.number:
        parts[0] += ", the best so far"
    parts.append(_assignments(trial.values))
    if trial.seconds is not None:
        parts.append(duration(trial.seconds))
    if best is not None and best.number != trial.number:
        parts.append(f"best {format_metric(metric, best.result)} (trial {best.number})")
    if seconds_left:
        parts.append(f"about {duration(seconds_left)} left")
    return "; ".join(part for part in parts if part)


def short(value: Any) -> str:
    """Returns a parameter's value for a reader: floats to four digits, long texts with an ellipsis."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return shortened("[" + ", ".join(map(short, value)) + "]", VALUE_LENGTH)
    return shortened(format_setting(value), VALUE_LENGTH)


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{printable(name)}={short(value)}" for name, value in values.items())


def table(configurations: Sequence[Configuration], metric: str, width: int | None = None) -> str:
    """Returns a ranking for a terminal, a line a configuration, at most 20 of them.

    Columns that don't fit beside each other follow below, as a further table of the same configurations.

    Args:
        configurations: Best first.
        metric: Name of the objective.
        width: Columns of the terminal; by default this terminal's.
    """
    width = _width(width)
    shown = configurations[:NUM_LINES]
    seeds = any(len(each.by_seed) > 1 for each in configurations)
    names = _differing(configurations)
    head = ["trial", printable(metric), *(["95 % interval", "seeds"] if seeds else []), *map(printable, names)]
    rows = []
    for each in shown:
        interval = format_interval(metric, each.interval.low, each.interval.high) if each.interval else "-"
        rows.append(
            [
                each.numbers,
                format_metric(metric, each.mean),
                *([interval, str(len(each.by_seed))] if seeds else []),
                *(short(each.values[name]) if name in each.values else "-" for name in names),
            ]
        )
    if any(each.remark for each in shown):
        head.append("remark")
        rows = [[*row, each.remark] for row, each in zip(rows, shown, strict=True)]
    lines = aligned(head, rows, width).rstrip("\n").split("\n")
    rest = len(configurations) - len(shown)
    if rest:
        lines.append(f"... and {rest} more")
    return "\n".join(cut(each, width) for each in lines)


def _width(width: int | None) -> int:
    return max(20, width or shutil.get_terminal_size().columns)


def _differing(configurations: Sequence[Configuration]) -> list[str]:
    """Returns the names of the parameters with several values, or all where there is but one configuration."""
    names = dict.fromkeys(name for each in configurations for name in each.values)
    if len(configurations) < 2:
        return list(names)
    return [name for name in names if len({identity(each.values.get(name)) for each in configurations}) > 1]


def report(
    trials: Sequence[TrialRecord], metric: str, goal: str, epochs: int | None = None, width: int | None = None
) -> str:
    """Returns what is told at the end of a sweep: the ranking, what is distinguishable, what matters, what was saved.

    Args:
        trials: All trials of the sweep, repeats included.
        metric: Name of the objective.
        goal: minimize or maximize.
        epochs: Of a full trial, where trials are stopped early; None: nothing is said of savings.
        width: Columns of the terminal; by default this terminal's.
    """
    width = _width(width)
    ranking, repeats = rank(trials, goal), rank_repeats(trials, goal)
    order = {"maximize": "highest first", "minimize": "lowest first"}[goal]
    parts: list[str | list[str]] = []
    if ranking:
        count = "1 configuration" if len(ranking) == 1 else f"{len(ranking)} configurations"
        parts += [f"{count} by {printable(metric)}, {order}", table(ranking, metric, width).split("\n")]
        if any(len(each.by_seed) > 1 for each in ranking):
            parts.append(conclusion(ranking, distinguishable(ranking, goal)))
    else:
        parts.append("no trial has a result")
    if repeats:
        parts.append(f"repeated with new seeds, which know nothing of the choice, {order}")
        parts.append(table(repeats, metric, width).split("\n"))
        parts.append(conclusion(repeats, distinguishable(repeats, goal)))
    if len(ranking) > 1:
        parts.append(winner_against_median(trials, metric, goal))
    parts += [_importance_line(trials, metric), _savings_line(trials, epochs), _failures_line(trials)]
    # Tables have their line breaks already, and no line of them is too long.
    return "\n".join(
        each for part in parts for each in (part if isinstance(part, list) else textwrap.wrap(part, width))
    )


def _importance_line(trials: Sequence[TrialRecord], metric: str) -> str:
    found, reason = importance(trials, metric)
    if found is None:
        return reason
    if found.explained <= 0:
        return f"importance for {printable(metric)}: none can be told, as the parameters explain nothing of it"
    shares = ", ".join(f"{printable(name)} {max(share, 0.0):.2f}" for name, share in found.shares.items())
    return (
        f"importance for {printable(metric)} ({found.count} trials, of which the parameters explain "
        f"{100 * found.explained:.0f} %): {shares}"
    )


def _savings_line(trials: Sequence[TrialRecord], epochs: int | None) -> str:
    if epochs is None:
        return ""
    found = savings(trials, epochs)
    return (
        f"stopped early: {found.num_stopped} of {found.num_trials} trials; {found.epochs_run} of "
        f"{_epochs(found.epochs_full, found.epochs_full)} were run, {100 * found.share_saved:.0f} % were spared"
    )


def _failures_line(trials: Sequence[TrialRecord]) -> str:
    failed = sorted((trial for trial in trials if trial.state == "failed"), key=lambda trial: trial.number)
    if not failed:
        return ""
    told = [f"trial {each.number} ({shortened(printable(each.reason) or 'no reason given', 60)})" for each in failed]
    return f"failed, and not ranked: {listed(told, 4)}"


def results(trials: Sequence[TrialRecord], metric: str, goal: str, epochs: int | None = None) -> dict[str, Any]:
    """Returns everything about a sweep as plain values: what results.json holds. What is not finite is None.

    Args:
        trials: All trials of the sweep, repeats included.
        metric: Name of the objective.
        goal: minimize or maximize.
        epochs: Of a full trial, where trials are stopped early.
    """
    best, pair = best_trial(trials, goal), winner_and_median(trials, goal)
    found, reason = importance(trials, metric)
    saved = None if epochs is None else savings(trials, epochs)
    told = {
        "format": FORMAT,
        "metric": metric,
        "goal": goal,
        "best_trial": None if best is None else best.number,
        "trials": [dict(vars(trial)) for trial in sorted(trials, key=lambda trial: trial.number)],
        "ranking": _ranking(rank(trials, goal), goal),
        "repeats": _ranking(rank_repeats(trials, goal), goal),
        "winner_and_median": None if pair is None else [each.number for each in pair],
        "winner_against_median": winner_against_median(trials, metric, goal),
        "importance": None if found is None else asdict(found),
        "no_importance": reason,
        "savings": None
        if saved is None
        else {**asdict(saved), "share_stopped": saved.share_stopped, "share_saved": saved.share_saved},
    }
    return dict(finite(told))


def _ranking(configurations: Sequence[Configuration], goal: str) -> dict[str, Any]:
    tests = distinguishable(configurations, goal)
    return {
        "configurations": [
            {
                "number": each.number,
                "values": each.values,
                "trials": [trial.number for trial in each.trials],
                "num_failed": each.num_failed,
                "remark": each.remark,
                **({} if each.interval is None else asdict(each.interval)),
            }
            for each in configurations
        ],
        "tests": [asdict(test) for test in tests],
        "conclusion": conclusion(configurations, tests) if tests else "",
    }
