"""What W&B has of runs that were killed, resumed and sent late: every row once, whichever way it got there."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN, SMALL_RUN, flags
from loopback import LoopbackServer
from loopback_records import Run
from test_resume import CLOCK

from eva.tracker import parts_of
from eva.wandb_client import clients

pytestmark = pytest.mark.alone

RUN = {**SMALL_RUN, "train_limit": 200, "epochs": 4, "save_steps": 2, "deterministic": True, "tracking_timeout": 60}


def eva(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of eva to its end."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run([str(BIN / "eva"), *arguments], env=environment, timeout=300, **pipes)


def killed(
    environment: Mapping[str, str], folder: Path, arguments: Sequence[str], steps: int, *, with_client: bool = False
) -> None:
    """Runs `eva train` and kills it after so many steps more than its history has.

    W&B's client lives on for a while and sends what it was given, unless it is killed too, as when a machine is lost.
    """
    history = folder / "history.csv"

    def trained() -> int:
        return history.read_text().count("\n") if history.exists() else 0

    least = trained() + steps
    process = subprocess.Popen(
        [str(BIN / "eva"), "train", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while trained() < least:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    for client in clients(process.pid) if with_client else ():
        os.kill(client, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def killed_and_resumed(environment: Mapping[str, str], folder: Path, settings: Mapping[str, Any]) -> None:
    """Trains a run that is killed three times, once with W&B's client."""
    killed(environment, folder, flags({**settings, "out": folder}), 6)
    for steps, with_client in ((1, False), (7, True)):
        killed(environment, folder, ["--resume", str(folder)], steps, with_client=with_client)
    done = eva(environment, "train", "--resume", str(folder))
    assert done.returncode == 0, done.stderr


def found(server: LoopbackServer, folder: Path) -> Run:
    """Returns what the server has of the run of a folder."""
    run_id = json.loads((folder / "summary.json").read_text())["wandb_id"]
    (run,) = [run for key, run in server.runs.items() if key[2] == run_id]
    return run


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Returns a run's rows without wall-clock, and without the names of files that differ from run to run."""
    rows = [{key: value for key, value in row.items() if key not in CLOCK} for row in run.history]
    return [{key: value["_type"] if isinstance(value, dict) else value for key, value in row.items()} for row in rows]


@pytest.fixture(scope="module")
def alone(clean_environment: dict[str, str], loopback: LoopbackServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An online run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    environment = {**clean_environment, **loopback.environment()}
    done = eva(environment, "train", *flags({**RUN, "project": "alone", "tracking": "online", "out": folder}))
    assert done.returncode == 0, done.stderr
    run = found(loopback, folder)
    assert [row["trainer/step"] for row in run.history if "train/loss" in row] == list(range(40))
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    return run


def test_an_online_run_that_is_killed_and_goes_on_has_every_row_once(
    tmp_path: Path, clean_environment: dict[str, str], loopback: LoopbackServer, alone: Run
) -> None:
    environment = {**clean_environment, **loopback.environment()}
    killed_and_resumed(environment, tmp_path / "run", {**RUN, "project": "killed", "tracking": "online"})
    run = found(loopback, tmp_path / "run")
    assert rows_of(run) == rows_of(alone)
    assert run.state == "finished" and run.config["epochs"] == 4
    assert loopback.artifact(f"{run.entity}/killed/model-{run.id}:best").files.keys() == {"best.safetensors"}


def test_the_parts_of_an_offline_run_become_one_run(
    tmp_path: Path, clean_environment: dict[str, str], loopback: LoopbackServer, alone: Run
) -> None:
    """By wandb's own command, all at once and without a complaint; then there is nothing left to send."""
    folder = tmp_path / "run"
    killed_and_resumed(clean_environment, folder, {**RUN, "project": "parts", "tracking": "offline"})
    summary = json.loads((folder / "summary.json").read_text())
    parts = parts_of(folder, summary["wandb_id"])
    assert summary["wandb_folders"] == [str(part) for part in parts]
    environment = {**clean_environment, **loopback.environment()}
    for _ in range(2):
        command = [str(BIN / "wandb"), "sync", *map(str, parts)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and "ERROR" not in done.stderr, done.stderr
        assert rows_of(found(loopback, folder)) == rows_of(alone)
    assert found(loopback, folder).state == "finished"


def test_eva_sync_sends_what_is_missing_of_an_offline_run_and_then_nothing(
    tmp_path: Path, clean_environment: dict[str, str], loopback: LoopbackServer, alone: Run
) -> None:
    folder, environment = tmp_path / "run", {**clean_environment, **loopback.environment()}
    killed(environment, folder, flags({**RUN, "project": "late", "tracking": "offline", "out": folder}), 9)
    done = eva(environment, "train", "--resume", str(folder))
    assert done.returncode == 0, done.stderr
    before = json.loads((folder / "summary.json").read_text())
    for _ in range(2):
        done = eva(environment, "sync", str(folder))
        assert done.returncode == 0, done.stderr
        assert "sent: " in done.stdout and "(status finished)" in done.stdout
        run = found(loopback, folder)
        assert rows_of(run) == rows_of(alone)
        assert loopback.artifact(f"{run.entity}/late/model-{run.id}:best").files.keys() == {"best.safetensors"}
    summary = json.loads((folder / "summary.json").read_text())
    clock = {"wandb_folders", "wandb_mode"}
    assert {name: summary[name] for name in summary.keys() - clock} == {
        name: before[name] for name in before.keys() - clock
    }
    # wandb's own command has nothing more to send, which would be there twice.
    command = [str(BIN / "wandb"), "sync", *map(str, parts_of(folder, run.id, "offline-"))]
    subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=True)
    assert rows_of(run) == rows_of(alone)


def test_an_unfinished_run_can_be_sent_as_far_as_it_got_and_goes_on_online(
    tmp_path: Path, clean_environment: dict[str, str], loopback: LoopbackServer, alone: Run
) -> None:
    folder, environment = tmp_path / "run", {**clean_environment, **loopback.environment()}
    killed(environment, folder, flags({**RUN, "project": "half", "tracking": "offline", "out": folder}), 12)
    assert eva(environment, "sync", str(folder)).returncode == 0
    run = found(loopback, folder)
    assert rows_of(run) == rows_of(alone)[: len(run.history)] and len(run.history) > 9
    done = eva(environment, "train", "--resume", str(folder), "--tracking=online")
    assert done.returncode == 0, done.stderr
    assert rows_of(run) == rows_of(alone)


def test_what_is_no_run_folder_is_not_sent(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    done = eva(clean_environment, "sync", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"eva sync: error: {str(tmp_path)!r} is no run folder: it has no config.yaml\n"
