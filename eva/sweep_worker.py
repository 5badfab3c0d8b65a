"""A process that runs one trial of a sweep after the other: imports, data and policy stay loaded."""

import contextlib
import gc
import json
import math
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eva import trial as trials
from eva.config import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from eva.files import read_json
from eva.ranking import RESULTS
from eva.records import read_columns
from eva.run_folder import STATES, saved_states
from eva.search import Claimed, Search, reaching
from eva.sweep_file import Sweep, arguments, command_line, warm_command
from eva.sweep_folder import SweepFolder, open_sweep_folder

# The exit code of a worker whose trial crashed: who knows in which state the process is, so another one goes on.
EXIT_CRASHED = 3
WAIT_SECONDS = 0.5
# How often a worker shows those who cannot see its folder that it is alive.
BEAT_SECONDS = 20.0


def main(path: str, parent: int, wish: int) -> int:
    """Runs trials of the sweep in a folder until none is left, which `eva sweep` starts in processes of its own.

    Args:
        path: The folder.
        parent: Process id of `eva sweep`.
        wish: File number of a pipe whose other end `eva sweep` closes when no more trials are to be begun.

    Returns:
        0, or 130 if it was asked to stop, with its trial through or waiting again, or 3 if that crashed.

    Raises:
        UserError: The storage can't be opened or reached, or the sweep's command needs a process for each trial.
    """
    trials.follow_parent(parent)
    folder = open_sweep_folder(Path(path))
    search = folder.open_search()
    if not folder.isolate:
        import eva.experiment  # noqa: F401  # the seconds that this takes are spent once

        gc.freeze()  # what is loaded by now stays: looking for garbage after each trial need not look there
    with reaching(folder.storage):
        while not select.select([wish], [], [], 0)[0]:
            with claim(folder, search) as (claimed, lock):
                if claimed is not None:
                    code = run_trial(folder, search, claimed, lock)
                    if code:
                        return code
                    continue
            if not search.waiting() and not search.running():
                return 0
            time.sleep(WAIT_SECONDS)  # others may die, and their trials wait again
    return EXIT_INTERRUPTED


@contextlib.contextmanager
def claim(folder: SweepFolder, search: Search) -> Iterator[tuple[Claimed | None, int]]:
    """Yields the first waiting trial, now this process's, with its lock; no trial if none is to be had."""
    for number in search.waiting():
        with folder.hold(number) as lock:
            if lock is not None and (claimed := search.claim(number, folder.place)):
                yield claimed, lock
                return
    yield None, -1


def run_trial(folder: SweepFolder, search: Search, claimed: Claimed, lock: int) -> int:
    """Runs a trial, or goes on with it, and notes what it came to.

    Returns:
        0, or the exit code that this process is to end with.

    Raises:
        UserError: The sweep's command needs a process for each trial. The trial waits again.
    """
    number, started = claimed.number, time.monotonic()
    run_folder = folder.run_folder(number)
    status = ended_status(run_folder)
    code, told = 0, ""
    if status is None:
        if not saved_states(run_folder):
            shutil.rmtree(run_folder, ignore_errors=True)  # of an attempt that died before there was anything to keep
        try:
            with beating(search, number, folder.shares_storage):
                code, told = attempt(folder, search.sweep, search, claimed, lock)
        except BaseException:  # it is the worker that can't go on
            search.give_back(number)
            raise
        status = ended_status(run_folder)
    seconds = time.monotonic() - started
    if status in RESULTS:
        shutil.rmtree(run_folder / STATES, ignore_errors=True)  # a hundred trials would fill the disk with them
        search.finish(number, status, objective(run_folder, search.metric), seconds)
    elif code == EXIT_INTERRUPTED:
        search.spend(number, seconds)
        search.give_back(number)
        return EXIT_INTERRUPTED
    elif code < 0:
        revive(folder, search, number, True, told)
    else:
        reason = noted_reason(run_folder) or told or f"ended with exit code {code}, but left no result"
        search.finish(number, "failed", None, seconds, reason)
        return 0 if code == EXIT_USER_ERROR or folder.isolate else EXIT_CRASHED
    return 0


def revive(folder: SweepFolder, search: Search, number: int, blamed: bool, how: str) -> bool:
    """Lets a trial wait again whose process died, or notes that it has failed; returns whether it waits.

    Args:
        folder: The sweep's, whose `retries` is how many deaths a trial survives.
        search: The sweep's.
        number: The trial's.
        blamed: Whether the trial may have caused it, so that the death counts.
        how: How the process died, for the reader.
    """
    search.spend(number, lived(folder, search, number))
    deaths = search.give_back(number, died=blamed)
    if deaths <= folder.retries:
        return True
    search.finish(number, "failed", None, 0.0, f"its process died {deaths} times, the last time {how}")
    return False


def lived(folder: SweepFolder, search: Search, number: int) -> float:
    """Returns for how many seconds a trial's latest attempt gave signs of life, after its process died."""
    signs = [path.stat().st_mtime for path in (folder.log(number), folder.run_folder(number)) if path.exists()]
    return max(0.0, max(signs, default=0.0) - search.since(number))


def ended_status(run_folder: Path) -> str | None:
    """Returns the status of a run that is through; None if there is more to do."""
    status = noted(run_folder, "status")
    return status if status in RESULTS else None


def noted_reason(run_folder: Path) -> str | None:
    """Returns why a run ended without a result, and what to do: memory ran out; None if its summary has no word of it.

    It is not the last line of such a run's output, which W&B's part of it follows.
    """
    reason = noted(run_folder, "reason")
    return reason if isinstance(reason, str) else None


def noted(run_folder: Path, name: str) -> Any:
    """Returns a value of a run folder's summary; None if there is none, or no summary."""
    try:
        return read_json(run_folder / "summary.json").get(name)
    except (UserError, AttributeError):
        return None


def objective(run_folder: Path, metric: str) -> float | None:
    """Returns the last finite value of a metric in a run folder; None if there is none."""
    values = read_columns(run_folder / "epochs.csv", []).get(metric, [])
    return next((value for value in reversed(values) if math.isfinite(value)), None)


def attempt(folder: SweepFolder, sweep: Sweep, search: Search, claimed: Claimed, lock: int) -> tuple[int, str]:
    """Runs the sweep's program once, its output into the trial's log.

    Returns:
        Its exit code, and one line saying why it failed.
    """
    number = claimed.number
    given = arguments(sweep, claimed.values)
    if "seed" in claimed.values:  # also of a trial that repeats another one, whose seed is no parameter of the sweep
        given["seed"] = claimed.values["seed"]
    json_file = folder.path / "trials" / f"{folder.run_folder(number).name}.json"
    json_file.write_text(json.dumps(given), encoding="utf-8")
    if not folder.isolate:
        sweep = replace(sweep, command=warm_command(sweep))
    command = command_line(sweep, given, sys.executable, str(json_file))
    log = folder.log(number)
    before = log.stat().st_size if log.exists() else 0
    with open(log, "ab") as output:
        if folder.isolate:
            told = {"sweep": str(folder.path), "number": number, "run_id": claimed.run_id, "arguments": given}
            told["parent"] = os.getpid()
            code = run_apart(command, {**os.environ, trials.VARIABLE: json.dumps(told)}, output.fileno(), lock)
        else:
            trial = trials.Trial(
                folder=folder.run_folder(number),
                run_id=claimed.run_id,
                group=folder.name,
                arguments=given,
                report=trials.reporter(number, search.metric, search.report),
                project=sweep.project,
                entity=sweep.entity,
            )
            with trials.running(trial), redirected(output.fileno()):
                code = run_here(command)
    if code < 0:
        return code, f"killed by {signal.Signals(-code).name}"
    with open(log, "rb") as text:
        text.seek(before)
        lines = [line.strip() for line in text.read().decode(errors="replace").splitlines() if line.strip()]
    return code, lines[-1] if code and lines else ""


def run_here(command: Sequence[str]) -> int:
    """Runs a Python program in this process as if it were its own; returns its exit code."""
    before = sys.argv, sys.path[:], os.getcwd()
    sys.argv, sys.path[0] = list(command), str(Path(command[0]).resolve().parent)
    try:
        runpy.run_path(command[0], run_name="__main__")
        return 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = before[:2]
        os.chdir(before[2])
        gc.collect()


def run_apart(command: Sequence[str], environment: dict[str, str], output: int, lock: int) -> int:
    """Runs a command as a process of its own, which SIGTERM is passed on to; returns its exit code.

    It holds the trial's lock too: the trial is running as long as either lives. If it fails once SIGTERM was passed on,
    or the signal itself kills it, it was interrupted: who knows in what it was met.
    """
    asked = False
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        if child is not None:
            child.terminate()

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[lock]
        )
        if asked:
            child.terminate()
        code = child.wait()
    except OSError as error:
        os.write(output, f"cannot run {command[0]!r}: {error.strerror}\n".encode())
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return EXIT_INTERRUPTED if asked and (code > 0 or code == -signal.SIGTERM) else code


@contextlib.contextmanager
def redirected(output: int) -> Iterator[None]:
    """Sends what this process prints to another file, that of native code included."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    for number, _ in kept:
        os.dup2(output, number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def beating(search: Search, number: int, needed: bool) -> Iterator[None]:
    """Shows every 20 seconds that the trial is alive, if there may be processes that cannot see its lock."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the storage may be away for a while: the trial goes on
                search.beat(number)

    thread = threading.Thread(target=beat, daemon=True)
    if needed:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if needed:
            thread.join()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    except UserError as error:
        try:
            print(error, file=sys.stderr, flush=True)
        except OSError:  # the disk is full: there is nowhere to say it
            os._exit(EXIT_USER_ERROR)
        sys.exit(EXIT_USER_ERROR)
