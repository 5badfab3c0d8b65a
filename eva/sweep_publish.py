"""An offline sweep brought up to W&B: its runs, and a W&B sweep with those runs in it, which agents can go on with.

All of it is the work of wandb's own commands (`wandb sync`, `wandb sweep -R`); what W&B then holds is read back.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from eva.config import UserError
from eva.files import read_json, write_json
from eva.run_folder import read_summary
from eva.sweep_file import Sweep
from eva.tracker import choose_mode
from eva.wandb_client import public_api

PARALLEL = 8  # runs sent at once
CONNECT_SECONDS = 10  # in which W&B has to answer a question
SWEEP_ID = re.compile(r"sweep with ID: (\S+)")
# Variables that are a run's, or keep wandb from the network.
OF_A_RUN = ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")


@dataclass(frozen=True)
class _Trial:
    """The W&B run of a trial: its id, and the folders of its parts."""

    name: str
    run_id: str
    folders: tuple[Path, ...]


@dataclass
class _Record:
    """What published.json remembers.

    Attributes:
        sweep: ENTITY/PROJECT/SWEEP; None until it is made.
        without_end: Names of W&B's folders that were sent as far as they go, and that `wandb sync` never marks as sent.
    """

    path: Path
    sweep: str | None
    without_end: list[str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Returns what a file holds, which need not be there.

        Raises:
            UserError: It is damaged.
        """
        told = read_json(path) if path.exists() else {"sweep": None, "without_end": []}
        try:
            sweep, without_end = told["sweep"], [str(name) for name in told["without_end"]]
            if sweep is None or sweep.count("/") == 2:
                return cls(path, sweep, without_end)
        except (TypeError, KeyError, AttributeError):
            pass
        raise UserError(f"{str(path)!r} is damaged: it must name the W&B sweep as ENTITY/PROJECT/SWEEP, or null")

    def waiting(self, trial: _Trial) -> list[Path]:
        """Returns the folders of a trial that are still to be sent."""
        offline = [path for path in trial.folders if path.name.startswith("offline-")]
        left = [path for path in offline if not any(path.glob("*.wandb.synced"))]
        return [path for path in left if path.name not in self.without_end]

    def write(self) -> None:
        """Writes the file."""
        write_json(self.path, {"sweep": self.sweep, "without_end": self.without_end})


def publish(sweep_folder: Path, sweep: Sweep, run_folders: Mapping[str, Path], project: str | None = None) -> list[str]:
    """Sends the runs of a sweep's trials to W&B, and makes a W&B sweep with them in it.

    published.json in the sweep's folder remembers the W&B sweep: published again, only what is new is sent and added.

    Args:
        sweep_folder: Where published.json is.
        sweep: What the W&B sweep is made of.
        run_folders: Run folders of trials that ended, by what the trials are called.
        project: [ENTITY/]PROJECT. It must be the one that the runs were made for, as W&B's client sends their artifacts
            nowhere else; None for just that one.

    Returns:
        Lines for the user: what W&B now holds, what it lacks and why, and how agents go on with the sweep.

    Raises:
        UserError: There is nothing to send, no account, or W&B refuses or can't be reached. What was sent stays sent,
            and the call can be repeated.
    """
    record = _Record.read(sweep_folder / "published.json")
    trials, lines = _read_trials(run_folders)
    api = _connect()
    entity, name = record.sweep.split("/")[:2] if record.sweep else _recorded_project(trials, api)
    _check_project(project, entity, name)

    waiting = [trial.name for trial in trials if record.waiting(trial)]
    complaints = _send(trials, entity, name, record)
    held = _held(api, trials, entity, name)
    if not held:
        raise UserError(f"W&B took none of the runs: {_why(complaints)}")
    lines.append(f"runs: {len(held)} in W&B project {entity}/{name}, {len(waiting)} of them sent now")
    lines += _missing(trials, held, complaints, record)

    refusal = ""
    if record.sweep is None:
        record.sweep = f"{entity}/{name}/{_make_sweep(sweep, entity, name, held)}"
        record.write()
    else:
        refusal = _add_runs(sweep, record.sweep, held - _members(api, record.sweep))
    members = _members(api, record.sweep)
    lines.append(f"sweep: {len(members)} runs in {_url(api, record.sweep)}")
    if outside := sorted(held - members):
        lines.append(f"not in the sweep: {', '.join(outside)}: W&B takes runs only before its agents begin{refusal}")
    lines.append(f"go on with: wandb agent {shlex.quote(record.sweep)}")
    return lines


def _read_trials(run_folders: Mapping[str, Path]) -> tuple[list[_Trial], list[str]]:
    """Returns the trials that have a W&B run, and a line for each that has none.

    Raises:
        UserError: None has one.
    """
    trials, lines = [], []
    for name, folder in run_folders.items():
        try:
            summary = read_summary(folder)
        except UserError as error:  # a trial may have failed before it had a summary
            lines.append(f"not sent: {name}: {error}")
            continue
        made_at = [Path(path) for path in summary.get("wandb_folders", [])]
        parts = tuple(path for path in made_at if path.is_dir())
        if len(parts) < len(made_at):
            # The client would send such a run without its artifacts, not say so, and mark it as sent.
            lines.append(
                f"not sent: {name}: its W&B files must lie where they were made, in {str(made_at[0].parent)!r}"
            )
        elif not parts:
            lines.append(f"not sent: {name}: {str(folder)!r} has no W&B run")
        else:
            trials.append(_Trial(name, summary["wandb_id"], parts))
    if not trials:
        raise UserError("\n".join(["there is no trial whose run could be sent to W&B", *lines]))
    return trials, lines


def _connect() -> Any:
    """Returns W&B's interface, which has the account's default entity: `wandb sync` would wait for W&B for hours.

    Raises:
        UserError: There is no account, or W&B can't be reached or doesn't know it.
    """
    try:
        choose_mode("online")
    except UserError:  # its advice is about a run
        raise UserError("publishing needs a W&B account: run `wandb login`") from None
    with _told("cannot reach W&B"):
        return public_api(timeout=CONNECT_SECONDS)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what goes wrong while W&B is asked into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of wandb's client, and of its service, whose class is not public
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what}: {reason}; nothing is lost, publish again later") from None


def _recorded_project(trials: Sequence[_Trial], api: Any) -> tuple[str, str]:
    """Returns entity and project that the runs were made for, as the first one's file says.

    Raises:
        UserError: No file can be read.
    """
    for trial in trials:
        told = _summary_of(trial.folders[0])
        if "project" in told:
            return told["entity"] or api.default_entity, told["project"]
    raise UserError("no W&B file of the runs can be read")


def _summary_of(folder: Path) -> dict[str, Any]:
    """Returns what wandb's own reader says of a run's W&B folder; nothing if it can't read it."""
    answer = _wandb("leet", "inspect", "--summary", "--json", str(folder))
    try:
        return dict(json.loads(answer.stdout))
    except ValueError:
        return {}


def _check_project(project: str | None, entity: str, name: str) -> None:
    """Raises a UserError if the runs cannot be sent to a project that was asked for."""
    asked = (project or name).rpartition("/")
    if asked[2] != name or asked[0] not in ("", entity):
        raise UserError(
            f"the runs were made for W&B project {entity}/{name}, and their artifacts can be sent nowhere else, "
            f"but got project={project!r}"
        )


def _send(trials: Sequence[_Trial], entity: str, name: str, record: _Record) -> list[str]:
    """Sends what waits, several runs at once; returns what the client complained of the last time.

    A killed process leaves a file without an end. The client sends it as far as it goes, but neither marks it as sent
    nor goes on with the later parts of its run; sent once more, its rows would be there twice.
    """
    while True:
        waiting = [folder for trial in trials for folder in record.waiting(trial)]
        if not waiting:
            return []
        command = ["sync", f"--entity={entity}", f"--project={name}", "-n", str(PARALLEL), *map(str, waiting)]
        complaints = _complaints(_wandb(*command))
        blamed = [folder for folder in waiting if any(folder.name in line for line in complaints)]
        without_end = [folder.name for folder in blamed if _summary_of(folder).get("exit_code") is None]
        if not without_end:
            return complaints
        record.without_end += without_end
        record.write()


def _why(complaints: Sequence[str], trial: _Trial | None = None) -> str:
    """Returns the complaint about a trial, or the last that is about none."""
    own = [line for line in complaints if trial and any(folder.name in line for folder in trial.folders)]
    general = [line for line in complaints if "offline-run-" not in line]
    said = [*general, *own] or ["W&B doesn't have it, and wandb says nothing of why"]
    return said[-1][:300]


def _missing(trials: Sequence[_Trial], held: set[str], complaints: Sequence[str], record: _Record) -> list[str]:
    """Returns a line for each trial that W&B has not, or has not all of."""
    lines = []
    for trial in trials:
        if trial.run_id not in held:
            lines.append(f"not sent: {trial.name}: {_why(complaints, trial)}")
        elif trial.folders[-1].name in record.without_end:  # of an earlier part, all that counts was told once more
            lines.append(f"only in part: {trial.name}: its W&B file has no end, as a killed process leaves it")
        elif record.waiting(trial):
            lines.append(f"only in part: {trial.name}: {_why(complaints, trial)}; publish again")
    return lines


def _held(api: Any, trials: Sequence[_Trial], entity: str, name: str) -> set[str]:
    """Returns the ids of the trials' runs that W&B has."""
    asked = {"name": {"$in": [trial.run_id for trial in trials]}}
    with _told(f"cannot read W&B project {entity}/{name}"):
        try:
            return {run.id for run in api.runs(f"{entity}/{name}", filters=asked, per_page=500)}
        except ValueError:  # there is no such project
            return set()


def _make_sweep(sweep: Sweep, entity: str, name: str, run_ids: set[str]) -> str:
    """Makes a W&B sweep with runs in it; returns its id.

    Raises:
        UserError: W&B doesn't make it.
    """
    answer = _wandb_sweep(sweep, run_ids, f"--entity={entity}", f"--project={name}")
    made = SWEEP_ID.search(answer.stderr)
    if made is None:
        raise UserError(f"W&B made no sweep: {_why(_complaints(answer))}; the runs are there, publish again later")
    return made[1]


def _add_runs(sweep: Sweep, path: str, run_ids: set[str]) -> str:
    """Adds runs to a W&B sweep; returns why W&B did not, or nothing."""
    if not run_ids:
        return ""
    answer = _wandb_sweep(sweep, run_ids, f"--update={path}")
    return "" if SWEEP_ID.search(answer.stderr) else f" ({_why(_complaints(answer))})"


def _wandb_sweep(sweep: Sweep, run_ids: set[str], *flags: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sweep.yaml")
        path.write_text(sweep.text, encoding="utf-8")
        prior = [f"--prior_run={run_id}" for run_id in sorted(run_ids)]
        return _wandb("sweep", *flags, *prior, str(path))


def _members(api: Any, path: str) -> set[str]:
    """Returns the ids of a W&B sweep's runs."""
    entity, name, sweep_id = path.split("/")
    with _told(f"cannot read W&B sweep {path}"):
        api.flush()  # it remembers answers
        return {run.id for run in api.runs(f"{entity}/{name}", filters={"sweep": sweep_id}, per_page=500)}


def _url(api: Any, path: str) -> str:
    with _told(f"cannot read W&B sweep {path}"):
        return str(api.sweep(path).url)


def _wandb(*command: str) -> subprocess.CompletedProcess[str]:
    """Returns what a command of wandb came to, in a process of its own: it changes variables and asks questions."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_RUN}
    return subprocess.run(
        [sys.executable, "-m", "wandb", *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def _complaints(answer: subprocess.CompletedProcess[str]) -> list[str]:
    """Returns what a command of wandb complained of, line by line."""
    said = re.findall(r"^(?:wandb: +ERROR|Error:) +(?!Find detailed error logs)(.*)", answer.stderr, re.MULTILINE)
    return [" ".join(line.split()) for line in said]
