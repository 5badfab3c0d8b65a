"""An offline sweep from its YAML to its ranking: workers are started, watched and replaced; what came out is told."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from eva import ranking
from eva.comparison import SEED
from eva.config import EXIT_INTERRUPTED, EXIT_USER_ERROR, Layer, RunConfig, UserError, to_dict, typed
from eva.files import write_json
from eva.ranking import RESULTS
from eva.recipes import configure
from eva.records import SUMMARY_NAMES
from eva.search import Search
from eva.sweep_file import Sweep, arguments, read_sweep
from eva.sweep_folder import STORAGE_VARIABLE, SweepFolder
from eva.sweep_worker import (
    BEAT_SECONDS,
    EXIT_CRASHED,
    ended_status,
    lived,
    objective,
    revive,
)

POLL_SECONDS = 0.2
# What an agent tells its one trial, which those of this sweep are not.
AGENT_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID")
# A trial of a folder that this process cannot see counts as dead when so many of its beats are missing.
MISSED_BEATS = 6
# If so many trials fail, of so many configurations, and none comes to a result, the rest would fail too.
MOST_FAILURES = 5
FAILING_CONFIGURATIONS = 3
# Workers that end so many times without having run a trial, and without one that ended meanwhile, never will.
FALSE_STARTS = 3
# Of those that were killed from outside it takes so many more: that may pass.
FALSE_STARTS_KILLED = 30
# How a process died whose exit code went to another one.
UNSEEN = "unseen"


@dataclass
class Worker:
    """A process that runs trials, where it was started, and the file of what it prints beside its trials' output."""

    slot: int
    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class Conductor:
    """Keeps workers at work on a sweep until all trials ended, or until it is asked to stop."""

    folder: SweepFolder
    search: Search
    workers: int
    gpus: Sequence[str] = ()
    stopping: bool = False
    target_reached: bool = False
    _wish: tuple[int, int] = (-1, -1)  # a pipe: that its writing end is closed, or gone with this process, means stop
    shown: set[int] = field(default_factory=set)
    earlier: set[int] = field(default_factory=set)
    _alive: list[Worker] = field(default_factory=list)
    _false_starts: int = 0
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)

    def run(self) -> bool:
        """Runs what waits; returns whether all trials ended. One line a trial is printed.

        Raises:
            UserError: The workers can't work, or every trial fails.
        """
        recover(self.folder, self.search, count_deaths=False)
        self.earlier = {trial.number for trial in self.search.records() if ended(trial)}
        self.shown = set(self.earlier)
        self._wish = os.pipe()
        try:
            with self._signals():
                while self._step():
                    time.sleep(POLL_SECONDS)
        finally:
            self._end_workers()
            os.close(self._wish[0])
        return all(ended(trial) for trial in self.search.records())

    def _step(self) -> bool:
        """Looks after everything once; returns whether there is more to do."""
        trials = self.search.records()
        self._show(trials)
        left = [trial for trial in trials if not ended(trial)]
        self._reap()
        if not self.stopping and left and self._reached(trials):
            print(f"the target {self.search.sweep.target:g} is reached", flush=True)
            self.stopping = self.target_reached = True
            self._end_workers()
        if self.stopping or not left:
            return bool(self._alive)
        now = [trial for trial in trials if trial.number not in self.earlier]
        check_failures(now, count_configurations(self.search.sweep))
        self._watch_others()
        slots = {worker.slot for worker in self._alive}
        for slot in range(min(self.workers, len(left))):
            if slot not in slots:
                self._alive.append(self._start(slot))
                if self.stopping:  # the signal came while there was nobody yet to pass it on to
                    self._alive[-1].process.terminate()
        return True

    def _reached(self, trials: Sequence[ranking.TrialRecord]) -> bool:
        """Tells whether a trial that ended came to the target that the sweep's metric names."""
        sweep = self.search.sweep
        best = ranking.best_trial([trial for trial in trials if ended(trial)], sweep.goal)
        if sweep.target is None or best is None or best.objective is None:
            return False
        return best.objective >= sweep.target if sweep.goal == "maximize" else best.objective <= sweep.target

    def _start(self, slot: int) -> Worker:
        environment = {**os.environ, STORAGE_VARIABLE: self.folder.storage_url()}
        for name in AGENT_VARIABLES:
            environment.pop(name, None)
        if self.workers > 1:  # the processors are shared: more threads than those would wait for each other
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        log = self.folder.path / f"worker-{slot}.log"
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "eva.sweep_worker", str(self.folder.path), str(os.getpid()), str(self._wish[0])],
                env=environment,
                pass_fds=[self._wish[0]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for this process, which passes it on
            )
        return Worker(slot, process, log)

    def _reap(self) -> None:
        """Takes note of workers that ended, and lets the trials of those that died wait again."""
        ended = [(worker, code) for worker in self._alive if (code := worker.process.poll()) is not None]
        if not ended:
            return
        for worker, _ in ended:
            self._alive.remove(worker)
        mistaken = [worker for worker, code in ended if code == EXIT_USER_ERROR and not self.stopping]
        # Which of several that died at once had which trial is not known.
        deaths = [code for _, code in ended if code not in (0, EXIT_CRASHED, EXIT_INTERRUPTED, EXIT_USER_ERROR)]
        how = " or ".join(sorted({how_it_ended(code) for code in deaths})) or UNSEEN
        revived = recover(self.folder, self.search, not self.stopping and not mistaken, how)
        if mistaken:
            raise UserError(last_line(mistaken[0].log))
        if self.stopping:
            return
        for number in revived:
            print(f"trial {number}: its process died ({how}); it is gone on with", flush=True)
        if revived or not deaths:
            self._false_starts = 0
            return
        self._false_starts += len(deaths)
        killed = all(code == -signal.SIGKILL for code in deaths)
        if self._false_starts >= (FALSE_STARTS_KILLED if killed else FALSE_STARTS):
            log = ended[-1][0].log
            raise UserError(f"workers end ({how}) before they run a trial: {last_line(log)} ({log})")

    def _watch_others(self) -> None:
        """Lets trials wait again whose process another conductor started, here or on another machine, and which died.

        A process on another machine counts as dead if it has not been heard of for long.
        """
        recover(self.folder, self.search, count_deaths=True)
        if not self.folder.shares_storage:
            return
        running = self.search.running()
        self._beats = {number: known for number, known in self._beats.items() if number in running}
        for number, (place, beat) in running.items():
            known, since = self._beats.get(number, (-1, 0.0))
            silent = time.monotonic() - since
            if place == self.folder.place or beat != known:
                self._beats[number] = beat, time.monotonic()
            elif silent > MISSED_BEATS * BEAT_SECONDS:
                revive(self.folder, self.search, number, True, "without a word")
                print(f"trial {number}: not heard of for {silent:.0f} s; it is begun anew", flush=True)

    def _show(self, trials: Sequence[ranking.TrialRecord]) -> None:
        """Prints a line for each trial that ended since the last time."""
        goal, metric = self.search.sweep.goal, self.search.metric
        total = 1 + max(trial.number for trial in trials)  # of those that were tried again the first time counts too
        for trial in trials:
            if not ended(trial) or trial.number in self.shown:
                continue
            self.shown.add(trial.number)
            self._false_starts = 0
            seen = [one for one in trials if one.number in self.shown]
            left = ranking.time_left(seen, len(trials), self.workers)
            print(ranking.line(trial, total, ranking.best_trial(seen, goal), left, metric), flush=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Makes SIGINT and SIGTERM a wish to stop; a second one kills the workers."""

        def stop(number: int, frame: object) -> None:
            again, self.stopping = self.stopping, True
            self._tell_stop()
            for worker in self._alive:
                # To the worker alone, which passes it on: processes that load data must live until the trial is saved.
                if not again:
                    worker.process.terminate()
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.process.pid, signal.SIGKILL)
            if not again:
                print("stopping: running trials are saved; once more to stop at once", flush=True)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _tell_stop(self) -> None:
        """Lets no worker begin another trial, also one whose trial was through before it heard of SIGTERM."""
        reading, writing = self._wish
        if writing != -1:
            self._wish = reading, -1
            os.close(writing)

    def _end_workers(self) -> None:
        """Leaves no worker behind, whatever happened."""
        self._tell_stop()
        for worker in self._alive:
            worker.process.terminate()
        for worker in self._alive:
            worker.process.wait()
        self._alive.clear()
        recover(self.folder, self.search, count_deaths=False)


def ended(trial: ranking.TrialRecord) -> bool:
    """Tells whether a trial is through, with or without a result."""
    return trial.state not in ("waiting", "running")


def recover(folder: SweepFolder, search: Search, count_deaths: bool, how: str = UNSEEN) -> list[int]:
    """Lets trials wait again whose process died; returns their numbers.

    A run that was through when its process died is noted as what it came to. A trial whose processes died more often
    than the sweep's `retries` has failed.

    Args:
        folder: The sweep's.
        search: The sweep's.
        count_deaths: Whether the trial may be to blame for it.
        how: How its process died.
    """
    revived = []
    mine = (folder.place,) if folder.shares_storage else (folder.place, "")  # one that died before it told its place
    for number, (place, _) in search.running().items():
        if place not in mine:
            continue
        with folder.hold(number) as lock:
            if lock is None or number not in search.running():
                continue
            run_folder = folder.run_folder(number)
            status = ended_status(run_folder)
            if status in RESULTS:
                search.finish(number, status, objective(run_folder, search.metric), lived(folder, search, number))
                continue
            if revive(folder, search, number, count_deaths, how):
                revived.append(number)
    return revived


def count_configurations(sweep: Sweep) -> float:
    """Returns how many configurations a sweep can have, seeds aside; infinity if it has no grid of them."""
    others = [parameter.distribution for parameter in sweep.searched if parameter.name != SEED]
    if others and sweep.method != "grid":
        return math.inf
    return math.prod(len(distribution.grid_values or ()) for distribution in others)


def check_failures(trials: Sequence[ranking.TrialRecord], configurations: float) -> None:
    """Checks that not every trial fails. Those that differ by their seed alone may.

    Args:
        trials: All that ended, run or wait since the sweep was begun or gone on with.
        configurations: How many the sweep can have, seeds aside.

    Raises:
        UserError: They do.
    """
    through = [trial for trial in trials if ended(trial)]
    if len(through) < MOST_FAILURES or any(trial.state != "failed" for trial in through):
        return
    if len({ranking.configuration_key(trial) for trial in through}) >= min(FAILING_CONFIGURATIONS, configurations):
        raise UserError(f"all of {len(through)} trials failed, the last one: {through[-1].reason}")


def how_it_ended(code: int) -> str:
    """Returns how a process ended, for the reader, from what Popen says of it."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def last_line(path: Path) -> str:
    """Returns the last line of a worker's log that says something; if none does, why it can't, or the log's name.

    Raises:
        OSError: It can't be read.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    if lines:
        return lines[-1]
    try:
        path.write_text("the worker said nothing\n", encoding="utf-8")
    except OSError as error:
        return f"{error.strerror}: {str(path)!r}"
    return str(path)


# --- before and after ---


def with_settings(sweep: Sweep, settings: Mapping[str, str], project: str | None = None) -> Sweep:
    """Returns the sweep with settings that all its trials share, instead of what the file has for them.

    Args:
        sweep: As its file has it.
        settings: Names and values as a command line has them.
        project: [ENTITY/]PROJECT of W&B that the runs belong to; None for the file's.

    Raises:
        UserError: A setting is unknown or has the wrong type.
    """
    if not settings and project is None:
        return sweep
    config = typed(Layer("command line", settings))  # what fits together is for the check, which knows the file's
    values = yaml.safe_load(sweep.text)
    parameters = dict(values.get("parameters", {}))
    plain = to_dict(config)
    for name in settings:
        field, _, inner = name.partition(".")
        value = plain[field][inner] if inner else plain[field]
        parameters[name] = {"value": value}
        if inner and isinstance(parameters.get(field), dict) and "parameters" in parameters[field]:
            del parameters[name]
            parameters[field] = {"parameters": {**parameters[field]["parameters"], inner: {"value": value}}}
    values["parameters"] = parameters
    if project is not None:
        entity, _, values["project"] = project.rpartition("/")
        values |= {"entity": entity} if entity else {}
    given = [*settings, *(["project"] if project else [])]
    text = f"# {sweep.source.name}, with {', '.join(given)} from the command line\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / sweep.source.name
        path.write_text(text + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        changed = read_sweep(path)
    return replace(changed, source=sweep.source, lines=sweep.lines)


def repeat_best(search: Search, best: int, seeds: int, median: bool) -> None:
    """Adds trials that repeat the best configurations with new seeds, as far as they are not there yet.

    Args:
        search: Whose trials ended.
        best: How many configurations.
        seeds: How many seeds each; the same ones for all.
        median: Whether to repeat the configuration in the middle of the ranking too, to tell the best from.
    """
    trials, goal = search.records(), search.sweep.goal
    ranked = [each for each in ranking.rank(trials, goal) if each.mean is not None][:best]
    pair = ranking.winner_and_median(trials, goal)
    if median and pair is not None and pair[1] not in ranked:
        ranked.append(pair[1])
    fixed = middle_config(search.sweep).seed
    used = {trial.values.get("seed", fixed) for trial in trials if trial.repeat_of is None}
    fresh = [seed for seed in range(1, seeds + len(used) + 1) if seed not in used][:seeds]
    for configuration in ranked:
        there = {trial.values["seed"] for trial in trials if trial.repeat_of == configuration.number}
        for seed in fresh:
            if seed not in there:
                search.repeat(configuration.number, seed)


def middle_config(sweep: Sweep) -> RunConfig:
    """Returns the configuration of a trial whose searched parameters are in the middle: what is fixed is right in it.

    Raises:
        UserError: There is none such.
    """
    middle = {parameter.name: parameter.distribution.value_at(0.5) for parameter in sweep.searched}
    return configure(Layer(f"file {sweep.source}", arguments(sweep, middle)))[0]


def report(folder: SweepFolder, search: Search) -> None:
    """Prints what the sweep came to, and writes results.json, search.png and the comparison page.

    Raises:
        UserError: They can't be written.
    """
    from eva import api, figures, sweep_figures

    trials, sweep = search.records(), search.sweep
    metric = search.metric
    epochs = middle_config(sweep).epochs if sweep.hyperband is not None else None
    print(ranking.report(trials, metric, sweep.goal, epochs))
    logarithmic = [one.name for one in sweep.searched if "log" in one.distribution.kind]
    try:
        write_json(folder.path / "results.json", ranking.results(trials, metric, sweep.goal, epochs))
        picture = sweep_figures.search(trials, sweep.goal, metric, logarithmic)
        figures.save(picture, folder.path / "search.png")
    except OSError as error:
        raise UserError(f"cannot write below {str(folder.path)!r}: {error.strerror}") from None
    runs = [folder.path / trial.folder for trial in trials if trial.folder and trial.state in RESULTS]
    runs = [run for run in runs if ended_status(run) is not None]  # one that was damaged since is no reason for no page
    print(f"results: {folder.path / 'results.json'}")
    print(f"picture: {folder.path / 'search.png'}")
    if runs:
        name = metric.replace("/", "_")  # as summaries have it
        known = name in SUMMARY_NAMES and any(trial.result is not None for trial in trials)
        try:
            api.compare(*runs, metric=name if known else None, out=folder.path)
        except UserError as error:  # a program of the user's own may leave runs of another kind
            print(f"no comparison page: {error}")
        else:
            print(f"page: {folder.path / 'compare.html'}")
