"""`eva sweep`: from flags to a sweep that is checked, begun or gone on with, told of, or published."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from eva import sweep as sweeps
from eva.config import FIELDS, UserError, unknown_setting
from eva.search import Search, open_storage
from eva.sweep_file import Sweep, inspect_sweep
from eva.sweep_folder import STORAGE_VARIABLE, SweepFolder, make_sweep_folder, open_sweep_folder
from eva.sweep_worker import EXIT_INTERRUPTED


def run(arguments: argparse.Namespace, settings: Mapping[str, str]) -> int:
    """Does what the flags ask for; returns the exit code.

    Args:
        arguments: Of `eva sweep`.
        settings: Those of `eva train` that were given too.

    Raises:
        UserError: All mistakes at once.
    """
    purposes = {"file": arguments.file, "--resume": arguments.resume, "--publish": arguments.publish}
    given = [name for name, value in purposes.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UserError(f"eva sweep takes one of FILE.yaml, --resume=FOLDER and --publish=FOLDER, but got {got}")
    wrong = [unknown_setting(name) for name in settings if name.partition(".")[0] not in FIELDS]
    if settings and arguments.file is None:
        wrong.append(f"settings belong to the beginning of a sweep, but got {', '.join(settings)}")
    if wrong:
        raise UserError("\n".join(f"command line: {line}" for line in wrong))
    if arguments.publish is not None:
        return publish(Path(arguments.publish), arguments.project)
    gpus = arguments.gpus.split(",") if arguments.gpus else []
    workers = max(whole_number("workers", arguments.workers), len(gpus))
    count = None if arguments.count is None else whole_number("count", arguments.count)
    repeats = 0 if arguments.repeat_best is None else whole_number("repeat_best", arguments.repeat_best)
    seeds = whole_number("seeds", arguments.seeds)
    if arguments.resume is not None:
        folder = open_sweep_folder(Path(arguments.resume))
        search = folder.open_search()
        with folder.hold("sweep") as lock:
            if lock is not None:  # without a count too: who made the sweep may have died over it
                search.extend(count or search.count)
    else:
        sweep = checked(arguments, settings, count, workers)
        if arguments.check:
            return 0
        folder, search = begin(arguments, sweep, count)
    return conduct(folder, search, workers, gpus, repeats, seeds, arguments.repeat_median)


def checked(arguments: argparse.Namespace, settings: Mapping[str, str], count: int | None, workers: int) -> Sweep:
    """Returns the sweep that the flags ask for, once it is known that it can run. What it will take is printed.

    Raises:
        UserError: It can't run: all problems at once.
    """
    from eva.sweep_check import check, check_file

    measure = arguments.check or not arguments.skip_check
    sweep, problems = inspect_sweep(arguments.file)
    if sweep is None or problems or not settings:
        sweep, lines = check_file(arguments.file, count, workers, measure)
    else:
        sweep = sweeps.with_settings(sweep, settings)
        lines = check(sweep, count, workers, measure)
    for line in lines:
        print(line, flush=True)
    return sweep


def begin(arguments: argparse.Namespace, sweep: Sweep, count: int | None) -> tuple[SweepFolder, Search]:
    """Makes a sweep's folder, and the sweep in its storage, which may hold it already.

    Raises:
        UserError: The folder or the storage doesn't allow it.
    """
    from eva.sweep_check import num_trials

    seed = whole_number("seed", arguments.seed, least=0)
    retries = whole_number("retries", arguments.retries, least=0)
    path = Path(arguments.out or Path("sweeps-out") / (sweep.name or sweep.source.stem))
    if arguments.storage and "://" in arguments.storage:
        os.environ[STORAGE_VARIABLE] = arguments.storage  # with its password, which is not written down
    elif arguments.storage:
        arguments.storage = str(Path(arguments.storage).absolute())
    if arguments.storage:
        open_storage(arguments.storage)  # told before a folder is made
    folder = make_sweep_folder(path, sweep, arguments.storage, arguments.isolate, retries, arguments.name)
    search = Search.create(
        folder.sweep, open_storage(folder.storage_url()), folder.name, seed, num_trials(sweep, count)
    )
    return folder, search


def conduct(
    folder: SweepFolder, search: Search, workers: int, gpus: list[str], repeats: int, seeds: int, median: bool
) -> int:
    """Runs the trials that are left, then the repeats that are asked for, and tells what came out."""
    conductor = sweeps.Conductor(folder, search, workers, gpus)
    through = conductor.run()
    if through and repeats:
        with folder.hold("sweep") as lock:
            if lock is not None:
                sweeps.repeat_best(search, repeats, seeds, median)
        through = conductor.run()
    trials = search.records()
    if not through and not conductor.target_reached:
        print(f"{sum(map(sweeps.ended, trials))} of {len(trials)} trials are through; nothing is lost")
        print(f"go on with: eva sweep --resume={folder.path}")
        return EXIT_INTERRUPTED
    sweeps.report(folder, search)
    print(f"sweep folder: {folder.path}")
    return 0 if any(trial.result is not None for trial in trials) else 1


def publish(path: Path, project: str | None) -> int:
    """Sends the runs of a sweep's folder to W&B, and makes a sweep of them there.

    Raises:
        UserError: There is no such folder or no account, or W&B can't be reached.
    """
    from eva.sweep_publish import publish as send

    folder = open_sweep_folder(path)
    trials = folder.open_search().records()
    runs = {trial.folder: folder.path / trial.folder for trial in trials if trial.folder and sweeps.ended(trial)}
    there = {name: run for name, run in runs.items() if run.is_dir()}
    for line in send(folder.path, folder.sweep, there, project):
        print(line, flush=True)
    return 0


def whole_number(name: str, text: str, least: int = 1) -> int:
    """Returns the number that a flag was given.

    Raises:
        UserError: It is none, or too small.
    """
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise UserError(f"--{name} must be a whole number, at least {least}, but got {text!r}")
    return number
