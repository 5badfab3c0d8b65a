"""The trial of an offline sweep that this process runs: where its run goes, and whom it tells of each epoch."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tells a process of its own which trial it runs: the sweep's folder, the trial's number, and the rest of a `Trial`.
VARIABLE = "EVA_TRIAL"


@dataclass(frozen=True)
class Trial:
    """What a run has to know of its trial.

    Attributes:
        folder: The run's.
        run_id: W&B's id of the run, the same in every attempt.
        group: W&B's group of the sweep's runs.
        arguments: What an agent would have passed: parameters by name, nested ones as mappings.
        report: Is told each epoch's row, and says whether the run is to end now.
        project: W&B's project of the sweep's runs; None if the sweep names none.
        entity: The same of W&B's entity.
    """

    folder: Path
    run_id: str
    group: str
    arguments: Mapping[str, Any]
    report: Callable[[Mapping[str, Any]], bool]
    project: str | None = None
    entity: str | None = None


_current: Trial | None = None


@contextlib.contextmanager
def running(trial: Trial) -> Iterator[None]:
    """Makes `trial` the one that this process runs."""
    global _current
    _current = trial
    try:
        yield
    finally:
        _current = None


def current_trial() -> Trial | None:
    """Returns the trial that this process runs; None outside an offline sweep."""
    global _current
    if _current is None and VARIABLE in os.environ:
        from eva.sweep_folder import open_sweep_folder

        told = json.loads(os.environ[VARIABLE])
        follow_parent(told["parent"])
        folder = open_sweep_folder(Path(told["sweep"]))
        search = folder.open_search()
        number: int = told["number"]
        _current = Trial(
            folder=folder.run_folder(number),
            run_id=told["run_id"],
            group=folder.name,
            arguments=told["arguments"],
            report=reporter(number, search.metric, search.report),
            project=search.sweep.project,
            entity=search.sweep.entity,
        )
    return _current


def reporter(
    number: int, metric: str, report: Callable[[int, int, float], bool]
) -> Callable[[Mapping[str, Any]], bool]:
    """Returns what a trial tells its epochs' rows to: it picks the sweep's metric, and passes on the verdict."""

    def tell(row: Mapping[str, Any]) -> bool:
        return metric in row and report(number, row["epoch"], row[metric])

    return tell


def follow_parent(parent: int | None = None) -> None:
    """Ends this process as SIGTERM does, once its parent has died: nobody would hear of what it does.

    Args:
        parent: Process id, from the parent itself, which may have died by now, and may have started this process by
            way of another one, a shell for one; None: whoever started it.
    """
    own = os.getppid()
    followed = own if parent is None else parent

    def watch() -> None:
        while os.getppid() == own if own == followed else _lives(followed):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
