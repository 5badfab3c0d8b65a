"""The folder of a run: made, read, and refused where it isn't what it should be."""

import contextlib
import fcntl
import functools
import json
import os
import secrets
import string
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from eva.config import Layer, RunConfig, UserError, read_yaml, resolve, to_dict
from eva.files import finite, read_json, write_atomically
from eva.wandb_client import clients

# Where a run's states are, as NUMBER-DIGEST.pt.
STATES = "state"
LOCK = ".lock"
# What a run writes before config.yaml: a folder with no more than this can be begun in once more.
FIRST_FILES = frozenset({LOCK, "policy.json", "summary.json"})
# How long to wait for what a process that died leaves running.
WAIT_SECONDS = 15.0


def new_run_id() -> str:
    """Returns a run id as W&B makes them: eight random characters."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def make_run_folder(config: RunConfig, run_id: str | None = None) -> tuple[str, Path]:
    """Returns the run id, W&B's if an agent chose it and none is given, and the new run folder, which is empty.

    Raises:
        UserError: The folder can't be made, or holds something.
    """
    run_id = run_id or os.environ.get("WANDB_RUN_ID") or new_run_id()
    if set(run_id) & set("/\\#?%: "):
        raise UserError(f"WANDB_RUN_ID must have none of / \\ # ? % : and blanks, but got {run_id!r}")
    folder = Path(config.out or Path("runs") / run_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_unused(folder)
    except OSError as error:
        raise UserError(f"cannot make run folder {str(folder)!r}: {error.strerror}; choose another --out") from None
    check_writable(folder)
    return run_id, folder


def check_unused(folder: Path) -> None:
    """Checks that no run has begun in a folder, or none that came so far as to write its configuration.

    Raises:
        UserError: One has, or the folder holds something else.
    """
    names = {path.name for path in folder.iterdir()}
    left = {name for name in names - FIRST_FILES if not name.startswith(tuple(f".{first}." for first in FIRST_FILES))}
    if left or (names and LOCK not in names):
        raise UserError(f"run folder {str(folder)!r} is not empty; choose another --out, or --resume {folder}")


def check_writable(folder: Path) -> None:
    """Checks that files can be made in a run folder.

    Raises:
        UserError: They can't.
    """
    if not os.access(folder, os.W_OK):
        raise UserError(f"run folder {str(folder)!r} is read-only; choose another --out")


def saved_states(folder: Path) -> list[Path]:
    """Returns the files of a run's states, damaged or not, the newest first."""
    return sorted((folder / STATES).glob("[0-9]*-*.pt"), key=state_number, reverse=True)


def state_number(path: Path) -> int:
    """Returns the number of a state, from its file's name."""
    number = path.name.partition("-")[0]
    return int(number) if number.isdecimal() else 0


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run folder; the kernel ends this when the process dies, however it does.

    What a killed process leaves running is waited for: its data workers, and W&B's client, which stores and sends what
    it has for some two seconds. On a disk that knows no locks nothing is held. A folder in which nothing came to be is
    removed.

    Raises:
        UserError: Another process has the folder, or it can't be written in.
    """
    check_writable(folder)
    deadline = time.monotonic() + WAIT_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(folder / LOCK, "a+", encoding="utf-8"))
            if _locked(file.fileno()) and _is_at(file.fileno(), folder / LOCK):
                break
            file.close()
            if time.monotonic() > deadline:
                raise UserError(f"the run in {str(folder)!r} is in the hands of another process")
            time.sleep(0.1)
        file.seek(0)
        before = file.read()
        while (
            before.isdecimal() and int(before) != os.getpid() and clients(int(before)) and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        except BaseException:
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
            raise


def _is_at(number: int, path: Path) -> bool:
    """Tells whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except OSError:
        return False


def _locked(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return True


def check_resumable(folder: Path) -> dict[str, Any]:
    """Returns the summary of a run folder that can be gone on in.

    Raises:
        UserError: It is no run folder, its run ended, or its state is that of an older version of eva.
    """
    summary = read_summary(folder)
    if summary.get("status") in ("finished", "diverged", "stopped"):
        raise UserError(f"the run in {str(folder)!r} has ended (status {summary['status']!r}): nothing to resume")
    if (job := summary.get("job", "train")) != "train":
        raise UserError(f"the run in {str(folder)!r} is no training: {job} is done once more, not resumed")
    if (folder / "state.pt").exists() and not saved_states(folder):
        raise UserError(f"the state of the run in {str(folder)!r} is that of an older version of eva; start it anew")
    return summary


def check_unchanged(folder: Path, before: Mapping[str, Any], fingerprint: str, policy: Mapping[str, Any]) -> None:
    """Checks that a run goes on with the data and the policy that it began with.

    Raises:
        UserError: It would not.
    """
    if before.get("data_fingerprint") != fingerprint:
        raise UserError(f"the data are not those that the run in {str(folder)!r} began with; start it anew")
    path = folder / "policy.json"
    if not path.exists() or read_json(path) != json.loads(json.dumps(finite(policy))):
        raise UserError(f"the policy is not the one that the run in {str(folder)!r} began with; start it anew")


def read_summary(folder: Path) -> dict[str, Any]:
    """Returns a run folder's summary.

    Raises:
        UserError: The folder holds no readable summary.json of a run.
    """
    path = folder / "summary.json"
    if not os.path.isfile(path):  # pathlib's raises where a folder may not be looked into
        raise UserError(f"{str(folder)!r} is no run folder: it has no summary.json")
    summary = read_json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("wandb_id"), str):
        raise UserError(f"{str(path)!r} is no summary of a run: it has no wandb_id")
    return summary


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes config.yaml, which `--config` and `--resume` read."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    write_atomically(folder / "config.yaml", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_config(folder: Path, *given: Layer) -> tuple[RunConfig, dict[str, str]]:
    """Returns the configuration of a run folder, with its own path and what else is given laid over it, and sources.

    Raises:
        UserError: It is no run folder, or its configuration is damaged.
    """
    path = folder / "config.yaml"
    if not os.path.isfile(path):  # pathlib's raises where a name is too long
        raise UserError(f"{str(folder)!r} is no run folder: it has no config.yaml")
    # A run of before there was a choice drew image by image, and goes on so.
    values = {"augmentation": "albumentations", **read_yaml(path), "out": str(folder)}
    return resolve([Layer(f"file {path}", values), *given])


@functools.cache
def git_commit() -> str | None:
    """Returns the commit of the repository that eva runs from, with "-dirty" if files differ; None without one."""
    try:
        command = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--abbrev=40",
            "--dirty",
            "--exclude=*",
        ]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
