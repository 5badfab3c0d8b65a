"""`eva sweep`: from flags to a sweep that is checked, begun or gone on with, told of, or published."""

import argparse
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eva import sweep as sweeps
from eva.config import EXIT_INTERRUPTED, FIELDS, UserError, collected, unknown_setting
from eva.search import Search, open_storage, reaching
from eva.sweep_file import Sweep, inspect_sweep
from eva.sweep_folder import STORAGE_VARIABLE, SweepFolder, check_empty, make_sweep_folder, open_sweep_folder

RETRIES = 3
SEEDS = 3


@dataclass(frozen=True)
class Numbers:
    """What flags count.

    Attributes:
        count: Trials; None leaves it to the sweep.
        workers: Trials that run at the same time.
        seed: Of the search.
        retries: Deaths of its process that a trial survives.
        repeat_best: Configurations that are repeated; 0 for none.
        seeds: Of each of them.
    """

    count: int | None
    workers: int
    seed: int
    retries: int
    repeat_best: int
    seeds: int


# Flags by what is asked for; the rest belongs to the beginning of a sweep.
FLAGS_OF = {
    "resume": ("count", "workers", "gpus", "retry_failed", "repeat_best", "seeds", "repeat_median"),
    "publish": ("project",),
}


def run(arguments: argparse.Namespace, settings: Mapping[str, str]) -> int:
    """Does what the flags ask for; returns the exit code.

    Args:
        arguments: Of `eva sweep`.
        settings: Those of `eva train` that were given too.

    Raises:
        UserError: All mistakes of the command line at once, or all of the file's.
    """
    numbers = checked_flags(arguments, settings)
    gpus = arguments.gpus.split(",") if arguments.gpus else []
    if arguments.publish is not None:
        return publish(Path(arguments.publish), arguments.project)
    if arguments.resume is not None:
        folder = open_sweep_folder(Path(arguments.resume))
        search = folder.open_search()
        with folder.hold("sweep") as lock:
            if lock is not None:  # without a count too: who made the sweep may have died over it
                search.extend(numbers.count or search.count)
                if arguments.retry_failed:
                    print(f"failed trials that are run once more: {search.retry()}")
    else:
        storage = given_storage(arguments)
        sweep = checked(arguments, settings, numbers)
        if arguments.check:
            return 0
        folder, search = begin(arguments, sweep, numbers, storage)
    return conduct(folder, search, numbers, gpus, arguments.repeat_median)


def checked_flags(arguments: argparse.Namespace, settings: Mapping[str, str]) -> Numbers:
    """Returns the numbers that flags give, once it is known that the flags fit together.

    Raises:
        UserError: They don't: all mistakes at once.
    """
    problems: list[str] = []
    purposes = {"FILE.yaml": arguments.file, "--resume": arguments.resume, "--publish": arguments.publish}
    given = [name for name, value in purposes.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        problems.append(f"eva sweep takes one of FILE.yaml, --resume=FOLDER and --publish=FOLDER, but got {got}")
    elif (purpose := given[0].strip("-")) in FLAGS_OF:
        known = ("command", purpose, *FLAGS_OF[purpose])
        flags = [name for name, value in vars(arguments).items() if value not in (None, False) and name not in known]
        if wrong := [f"--{name}" for name in flags] + list(settings):
            takes = ", ".join(f"--{name}" for name in FLAGS_OF[purpose])
            problems.append(f"--{purpose} takes {takes}, but got {', '.join(wrong)}: that is for a sweep that begins")
    else:
        problems += [
            f"command line: {unknown_setting(name)}" for name in settings if name.partition(".")[0] not in FIELDS
        ]
    words = [word for setting in settings.items() for word in setting]
    left_over = [word for word in words if word.endswith((".yaml", ".yml"))]
    if left_over and arguments.file is not None and not Path(arguments.file).exists():
        taken = f"{arguments.file!r} was taken for FILE.yaml, not {left_over[0]!r}"
        problems.append(f"settings are written --NAME=VALUE: {taken}")
    if arguments.retry_failed and arguments.resume is None:
        problems.append("--retry_failed goes with --resume=FOLDER")
    if arguments.check and arguments.skip_check:
        problems.append("--check and --skip_check exclude each other")
    if arguments.repeat_median and arguments.repeat_best is None:
        problems.append("--repeat_median goes with --repeat_best=K")
    if arguments.seeds is not None and arguments.repeat_best is None:
        problems.append("--seeds goes with --repeat_best=K; seeds of the trials are a parameter of the sweep")

    def number(name: str, default: int, least: int = 1) -> int:
        text = getattr(arguments, name)
        with collected(problems):
            return default if text is None else whole_number(name, text, least)
        return default

    numbers = Numbers(
        count=None if arguments.count is None else number("count", 1),
        workers=number("workers", len(arguments.gpus.split(",")) if arguments.gpus else 1),
        seed=number("seed", 0, least=0),
        retries=number("retries", RETRIES, least=0),
        repeat_best=number("repeat_best", 0),
        seeds=number("seeds", SEEDS),
    )
    if problems:
        raise UserError("\n".join(problems))
    return numbers


def given_storage(arguments: argparse.Namespace) -> str | None:
    """Returns the storage that the flags ask for, once it is known that it can be opened; None for the folder's own.

    Raises:
        UserError: It can't.
    """
    storage: str | None = arguments.storage
    if storage is None:
        return None
    if "://" in storage:
        os.environ[STORAGE_VARIABLE] = storage  # with its password, which is not written down
    else:
        storage = str(Path(storage).absolute())
    if not arguments.check or "://" in storage:  # a look leaves no file
        open_storage(storage)
    return storage


def checked(arguments: argparse.Namespace, settings: Mapping[str, str], numbers: Numbers) -> Sweep:
    """Returns the sweep that the flags ask for, once it is known that it can run. What it will take is printed.

    Raises:
        UserError: It can't run: all problems at once.
    """
    from eva.sweep_check import check, check_file

    measure = arguments.check or not arguments.skip_check
    sweep, problems = inspect_sweep(arguments.file)
    if sweep is not None and not problems:
        sweep = sweeps.with_settings(sweep, settings, arguments.project)
        path = sweep_path(arguments, sweep)
        if not arguments.check:
            check_empty(path)  # before the check spends minutes
        lines = check(sweep, numbers.count, numbers.workers, measure, path, arguments.isolate)
    else:
        sweep, lines = check_file(arguments.file, numbers.count, numbers.workers, measure, isolate=arguments.isolate)
    for line in lines:
        print(line, flush=True)
    return sweep


def sweep_path(arguments: argparse.Namespace, sweep: Sweep) -> Path:
    """Returns where the sweep's folder goes."""
    return Path(arguments.out or Path("sweeps-out") / (sweep.name or sweep.source.stem))


def begin(
    arguments: argparse.Namespace, sweep: Sweep, numbers: Numbers, storage: str | None
) -> tuple[SweepFolder, Search]:
    """Makes a sweep's folder, and the sweep in its storage, which may hold it already.

    Raises:
        UserError: The folder or the storage doesn't allow it.
    """
    from eva.sweep_check import num_trials

    path = sweep_path(arguments, sweep)
    folder = make_sweep_folder(path, sweep, storage, arguments.isolate, numbers.retries, arguments.name)
    count = num_trials(sweep, numbers.count)
    search = Search.create(folder.sweep, open_storage(folder.storage_url()), folder.name, numbers.seed, count)
    return folder, search


def conduct(folder: SweepFolder, search: Search, numbers: Numbers, gpus: list[str], median: bool) -> int:
    """Runs the trials that are left, then the repeats that are asked for, and tells what came out.

    Raises:
        UserError: The sweep can't go on for now. Nothing is lost.
    """
    conductor = sweeps.Conductor(folder, search, numbers.workers, gpus)
    try:
        with reaching(folder.storage):
            through = conductor.run()
            if through and numbers.repeat_best:
                with folder.hold("sweep") as lock:
                    if lock is not None:
                        sweeps.repeat_best(search, numbers.repeat_best, numbers.seeds, median)
                through = conductor.run()
    except UserError as error:
        with contextlib.suppress(UserError), reaching(folder.storage):  # what came out so far, if that can be told
            if any(trial.result is not None for trial in search.records()):
                sweeps.report(folder, search)
        go_on = f"eva sweep --resume={folder.path} --retry_failed"
        raise UserError(f"{error}; when that is mended, go on with {go_on}") from None
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
