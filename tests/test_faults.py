"""W&B fails in every way that can be made to happen here, and the training of a real `eva train` does not."""

import contextlib
import csv
import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BIN, SMALL_RUN, flags
from loopback import API_KEY, LoopbackServer
from loopback_records import Run
from safetensors.torch import load_file

pytestmark = pytest.mark.alone

SETTINGS = {**SMALL_RUN, "epochs": 4, "deterministic": True, "project": "faults"}
CLOCK = {"seconds", "images_per_second", "train_epoch/seconds"}
# Seconds that W&B gets where it will not answer; what a busy machine takes besides; and the patience of a test.
SHORT = 4
SLACK = 20
TIMEOUT = 300


@dataclass
class Attempt:
    """A process of `eva train`, in a home of its own."""

    process: subprocess.Popen[bytes]
    folder: Path
    said: Path
    complained: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def stdout(self) -> str:
        return self.said.read_text()

    @property
    def stderr(self) -> str:
        return self.complained.read_text()

    @property
    def summary(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return values

    @property
    def clients(self) -> list[int]:
        """The processes that W&B started beside this one and that still run."""
        wanted, found = f"--pid\0{self.process.pid}\0".encode(), []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if wanted in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def trains(self) -> None:
        """Waits until the first epoch is through."""
        self.until(lambda: (self.folder / "epochs.csv").exists() and len(rows_of(self.folder / "epochs.csv")) > 0)

    def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            assert self.process.poll() is None and time.monotonic() < self.began + TIMEOUT, self.stderr
            time.sleep(0.01)

    def ends(self) -> float:
        """Waits for its end; returns the seconds that it took after its last batch."""
        self.process.wait(TIMEOUT)
        return time.time() - (self.folder / "history.csv").stat().st_mtime


class Machine:
    """Where attempts run: a home, and W&B's server."""

    def __init__(self, server: LoopbackServer, home: Path, environment: Mapping[str, str]) -> None:
        self.server, self.home = server, home
        self.environment = {**environment, **server.environment(), "HOME": str(home)}
        self.attempts: list[Attempt] = []

    def start(self, *arguments: str, stdin: int = subprocess.DEVNULL, **variables: str) -> Attempt:
        """Starts `eva train` with arguments; the run folder is `run` in the home."""
        said, complained = (self.home / f"{name}-{len(self.attempts)}" for name in ("stdout", "stderr"))
        with said.open("wb") as stdout, complained.open("wb") as stderr:
            process = subprocess.Popen(
                [str(BIN / "eva"), "train", *arguments],
                cwd=self.home,
                env={**self.environment, **variables},
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
        self.attempts.append(Attempt(process, self.home / "run", said, complained))
        return self.attempts[-1]

    def train(
        self, stdin: int = subprocess.DEVNULL, variables: Mapping[str, str] | None = None, **changed: Any
    ) -> Attempt:
        """Starts the training that all tests here make, W&B online."""
        settings = {**SETTINGS, "tracking": "online", "out": self.home / "run", **changed}
        return self.start(*flags(settings), stdin=stdin, **(variables or {}))

    def follow(self, command: str) -> str:
        """Does what a run told its user to do; returns what that printed."""
        name, *words = command.split()
        done = subprocess.run(
            [str(BIN / name), *words],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def recover(self) -> None:
        """Makes the server well again."""
        self.server.stop()
        self.server.latency = self.server.failing = 0.0
        self.server.silent = self.server.rejects_key = False
        self.server.start()

    def run(self) -> Run:
        """Returns the one run that the server knows."""
        [run] = self.server.runs.values()
        return run


@pytest.fixture
def machine(tmp_path: Path, clean_environment: dict[str, str]) -> Iterator[Machine]:
    with LoopbackServer() as server:
        machine = Machine(server, tmp_path, clean_environment)
        yield machine
        for attempt in machine.attempts:
            for process in (attempt.process.pid, *attempt.clients):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            attempt.process.wait()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]) -> Path:
    """The run folder of the same training without W&B."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    command = [str(BIN / "eva"), "train", *flags({**SETTINGS, "tracking": "disabled", "out": folder})]
    subprocess.run(command, env=clean_environment, check=True, capture_output=True, timeout=TIMEOUT)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: text for key, text in row.items() if key not in CLOCK} for row in csv.DictReader(file)]


def assert_trained(attempt: Attempt, alone: Path) -> None:
    """Asserts that a training came out as it does without W&B, and left no process and no key behind."""
    assert (attempt.process.returncode, attempt.summary["status"]) == (0, "finished"), attempt.stderr
    for name in ("history.csv", "epochs.csv"):
        assert rows_of(attempt.folder / name) == rows_of(alone / name)
    ours, theirs = (load_file(folder / "best.safetensors") for folder in (attempt.folder, alone))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert attempt.clients == []
    assert API_KEY not in attempt.stdout + attempt.stderr
    assert "Traceback" not in attempt.stderr


def assert_delivered(run: Run, alone: Path) -> None:
    """Asserts that the server has every row of batches and epochs once and in order, and all other rows."""
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    for name, key in (("history.csv", "train/loss"), ("epochs.csv", "val/loss")):
        told = [row[key] for row in run.history if key in row]
        assert told == [float(row[key]) for row in rows_of(alone / name)]
    media = [key for row in run.history for key in row if key.startswith(("figures/", "model/"))]
    assert sorted(media) == ["figures/accuracy", "figures/loss", "figures/lr", "model/summary"]


def told_command(attempt: Attempt, start: str) -> str:
    """Returns the one command that a run told to the user and that begins like this."""
    [line] = {line.partition(start)[2] for line in (attempt.stdout + attempt.stderr).splitlines() if start in line}
    return start + line


# At the beginning


FIRST_FAULTS: dict[str, tuple[Callable[[LoopbackServer], object], dict[str, str], str]] = {
    "is not there": (lambda server: server.stop(), {}, "connection refused"),
    "never answers": (lambda server: setattr(server, "silent", True), {}, "deadline exceeded"),
    "knows no such key": (lambda server: setattr(server, "rejects_key", True), {}, "error 401"),
    "would not take this for a key": (lambda server: None, {"WANDB_API_KEY": "short"}, "API key must have 40"),
}


@pytest.mark.parametrize("fault", FIRST_FAULTS)
def test_a_run_that_cannot_begin_online_is_an_offline_run(machine: Machine, alone: Path, fault: str) -> None:
    """At a terminal too, nobody is asked anything."""
    break_it, variables, reason = FIRST_FAULTS[fault]
    break_it(machine.server)
    terminal, stdin = pty.openpty()
    attempt = machine.train(stdin=stdin, variables=variables, tracking_timeout=SHORT)
    assert attempt.ends() < SLACK
    os.close(stdin)
    os.close(terminal)
    assert_trained(attempt, alone)
    [line] = attempt.stderr.splitlines()
    assert line.startswith("W&B did not begin the run (") and line.endswith("): it is tracked offline")
    assert reason in line
    assert attempt.summary["wandb_mode"] == "offline"
    assert [path.name.split("-")[0] for path in (attempt.folder / "wandb").glob("*run-2*")] == ["offline"]
    machine.recover()
    machine.follow(told_command(attempt, "wandb sync "))
    assert_delivered(machine.run(), alone)


def test_a_run_that_went_online_goes_on_without_wandb_where_it_is_gone(machine: Machine, alone: Path) -> None:
    """As an offline part would not know what was sent."""
    attempt = machine.train(tracking_timeout=SHORT)
    attempt.trains()
    attempt.process.kill()
    attempt.process.wait()
    machine.server.stop()
    attempt = machine.start("--resume", str(attempt.folder))
    assert attempt.ends() < SLACK
    assert_trained(attempt, alone)
    begin, end = f"send what is missing with: eva sync {attempt.folder}", "it goes on without W&B"
    [line] = attempt.stderr.splitlines()
    assert line.startswith("W&B did not begin the run (") and end in line and line.endswith(begin)
    assert attempt.summary["wandb_mode"] == "disabled"


# On the way


def test_rows_wait_for_a_server_that_dies_and_comes_back(machine: Machine, alone: Path) -> None:
    attempt = machine.train()
    attempt.trains()
    machine.server.stop()
    time.sleep(2)
    machine.server.start()
    attempt.ends()
    assert_trained(attempt, alone)
    assert_delivered(machine.run(), alone)
    assert attempt.stderr == ""


@pytest.mark.parametrize(("latency", "failing"), [(0.0, 0.1), (2.0, 0.0)], ids=["10 % of 500", "2 s latency"])
def test_rows_come_through_to_a_bad_server(machine: Machine, alone: Path, latency: float, failing: float) -> None:
    attempt = machine.train()
    attempt.trains()
    machine.server.latency, machine.server.failing = latency, failing
    attempt.ends()
    assert_trained(attempt, alone)
    assert_delivered(machine.run(), alone)
    assert attempt.stderr == ""


def to_client(attempt: Attempt, number: int) -> None:
    [client] = attempt.clients
    os.kill(client, number)


LATER_FAULTS: dict[str, Callable[[Attempt, LoopbackServer], object]] = {
    "the server dies": lambda attempt, server: server.stop(),
    "the server falls silent": lambda attempt, server: setattr(server, "silent", True),
    "the key is revoked": lambda attempt, server: setattr(server, "rejects_key", True),
    "the client is killed": lambda attempt, server: to_client(attempt, signal.SIGKILL),
    "the client is stopped": lambda attempt, server: to_client(attempt, signal.SIGSTOP),
}


@pytest.mark.parametrize("fault", LATER_FAULTS)
def test_a_run_ends_in_time_and_says_how_wandb_gets_what_it_lacks(machine: Machine, alone: Path, fault: str) -> None:
    attempt = machine.train(tracking_timeout=SHORT)
    attempt.trains()
    LATER_FAULTS[fault](attempt, machine.server)
    assert attempt.ends() < SHORT + SLACK
    assert_trained(attempt, alone)
    reason, command = attempt.stderr.splitlines()
    assert reason.startswith("W&B: not")
    assert command == f"W&B lacks a part of this run; send what is missing with: eva sync {attempt.folder}"
    if fault == "the server dies":
        machine.recover()
        machine.follow(told_command(attempt, "eva sync "))
        assert_delivered(machine.run(), alone)
        assert machine.run().state == "finished"


# A full disk


@pytest.mark.parametrize("tracking", ["offline", "online"])
def test_a_full_disk_of_wandbs_costs_no_more_than_what_wandb_has(
    machine: Machine, alone: Path, small_disk: Callable[..., Path], tracking: str
) -> None:
    """Made full after the first epoch; the run folder lies on another disk."""
    disk = small_disk("2m")
    attempt = machine.train(tracking=tracking, wandb_dir=disk)
    attempt.trains()
    with contextlib.suppress(OSError), open(disk / "else", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    attempt.ends()
    assert_trained(attempt, alone)
    assert f"eva sync {attempt.folder}" in attempt.stderr
    if tracking == "offline":
        (disk / "else").unlink()
        machine.follow(told_command(attempt, "eva sync "))
        assert_delivered(machine.run(), alone)


# Signals


def test_a_preempted_run_is_closed_within_ten_seconds_whatever_the_server_does(machine: Machine) -> None:
    attempt = machine.train(epochs=1000)
    attempt.trains()
    machine.server.silent = True
    asked = time.monotonic()
    attempt.process.send_signal(signal.SIGTERM)
    attempt.process.wait(TIMEOUT)
    assert time.monotonic() - asked < 10
    assert (attempt.process.returncode, attempt.summary["status"]) == (130, "interrupted")
    assert attempt.clients == []
    assert f"eva sync {attempt.folder}" in attempt.stderr


def test_the_server_learns_that_a_run_is_preempted(machine: Machine) -> None:
    attempt = machine.train(epochs=1000)
    attempt.trains()
    attempt.process.send_signal(signal.SIGTERM)
    attempt.process.wait(TIMEOUT)
    assert (attempt.process.returncode, attempt.stderr) == (130, "")
    run = machine.run()
    assert run.preempting and run.exit_code not in (None, 0)  # 0 would be the end of the run


def test_a_second_ctrl_c_waits_for_no_server(machine: Machine) -> None:
    attempt = machine.train(epochs=1000)
    attempt.trains()
    machine.server.silent = True
    attempt.process.send_signal(signal.SIGINT)
    attempt.until(lambda: "stopping after this batch" in attempt.stdout)
    time.sleep(0.5)
    asked = time.monotonic()
    attempt.process.send_signal(signal.SIGINT)
    attempt.process.wait(TIMEOUT)
    assert time.monotonic() - asked < 5
    assert attempt.process.returncode == 130
    assert attempt.clients == []


# W&B's folder


def test_all_of_wandbs_folders_lie_below_the_one_that_was_asked_for(machine: Machine, alone: Path) -> None:
    attempt = machine.train(tracking="offline", wandb_dir="elsewhere")
    attempt.ends()
    assert attempt.process.returncode == 0, attempt.stderr
    assert not (attempt.folder / "wandb").exists()
    below = {path.name.split("-")[0] for path in (machine.home / "elsewhere" / "wandb").iterdir()}
    assert {"offline", "data"} <= below
    machine.follow(told_command(attempt, "wandb sync "))
    assert len(machine.run().history) > 3


def test_a_folder_for_wandb_that_cannot_be_is_refused(machine: Machine) -> None:
    (machine.home / "file").write_text("")
    attempt = machine.train(tracking="offline", wandb_dir="file")
    assert attempt.process.wait(TIMEOUT) == 2
    assert f"wandb_dir {str(machine.home / 'file')!r} can't be made: File exists" in attempt.stderr


# Reading


def test_a_command_that_reads_from_a_dead_server_ends(machine: Machine) -> None:
    machine.server.stop()
    began = time.monotonic()
    done = subprocess.run(
        [str(BIN / "eva"), "compare", "entity/project"],
        env={**machine.environment, "WANDB_HTTP_TIMEOUT": "2"},
        cwd=machine.home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("eva compare: error: cannot read W&B project 'entity/project'")
    assert time.monotonic() - began < 20 + SLACK
