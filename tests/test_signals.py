"""What ends a run from outside: signals, memory, the disk. And that nothing of it stays behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BIN, SMALL_RUN, flags
from loopback import LoopbackServer
from safetensors.torch import load_file
from test_loop import state_of
from test_resume import rows_of

from eva import cli, experiment
from eva.wandb_client import clients

pytestmark = pytest.mark.alone

# A run of some twelve seconds, with workers.
LONG_RUN = {
    **{**SMALL_RUN, "train_limit": 200, "epochs": 12, "workers": 2, "augmentation": "albumentations"},
    **{"tracking": "offline", "deterministic": True},
}


def start(folder: Path, environment: Mapping[str, str], settings: Mapping[str, Any]) -> subprocess.Popen[str]:
    """Starts `eva train` in a session of its own, which a terminal's signals would go to, and waits until it trains."""
    command = [str(BIN / "eva"), "train", *flags({**settings, "out": folder})]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, cwd=folder.parent, text=True, start_new_session=True, **pipes)
    deadline = time.monotonic() + 200
    history = folder / "history.csv"
    while not history.exists() or history.read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


def of_session(session: int) -> Iterator[int]:
    """Yields the processes that a process left: those of its session, and W&B's clients, which make their own."""
    yield from clients(session)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            yield int(path.parent.name)


def assert_nothing_is_left(process: subprocess.Popen[str], shared: set[str], seconds: float) -> None:
    """Asserts that no process and no shared memory of a process stay for longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while left := [*of_session(process.pid), *(set(os.listdir("/dev/shm")) - shared)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def resumed(folder: Path, environment: Mapping[str, str]) -> None:
    """Goes on with a run to its end."""
    command = [str(BIN / "eva"), "train", "--resume", str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def alone(clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    process = start(folder, clean_environment, LONG_RUN)
    assert process.communicate(timeout=300) and process.returncode == 0
    return folder


def assert_equal_to(alone: Path, folder: Path) -> None:
    for name in ("history.csv", "epochs.csv"):
        assert rows_of(folder / name) == rows_of(alone / name)
    ours, theirs = (load_file(one / "best.safetensors") for one in (folder, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_tells_how_to_go_on_and_leaves_nothing(
    tmp_path: Path, clean_environment: dict[str, str], alone: Path, number: signal.Signals
) -> None:
    shared, folder = set(os.listdir("/dev/shm")), tmp_path / "run"
    process = start(folder, clean_environment, LONG_RUN)
    started = time.monotonic()
    os.killpg(process.pid, number)  # to its data workers too, as a terminal and a batch system do
    stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert f"go on with: eva train --resume {folder}" in stdout
    assert_nothing_is_left(process, shared, 2)
    steps = len(rows_of(folder / "history.csv"))
    assert state_of(folder)["progression"]["step"] == steps < 120
    resumed(folder, clean_environment)
    assert_equal_to(alone, folder)


def test_a_second_ctrl_c_ends_the_run_at_once_and_it_goes_on_all_the_same(
    tmp_path: Path, clean_environment: dict[str, str], alone: Path
) -> None:
    shared, folder = set(os.listdir("/dev/shm")), tmp_path / "run"
    process = start(folder, clean_environment, {**LONG_RUN, "save_steps": 3})
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    started = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - started < 20  # the interpreter's own exit takes seconds on a busy machine
    assert len(rows_of(folder / "history.csv")) < 120  # it did not just come to its end
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert_nothing_is_left(process, shared, 2)
    resumed(folder, clean_environment)
    assert_equal_to(alone, folder)


def test_what_a_killed_run_leaves_is_gone_in_seconds(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    shared, folder = set(os.listdir("/dev/shm")), tmp_path / "run"
    process = start(folder, clean_environment, LONG_RUN)
    assert len(list(of_session(process.pid))) >= 3  # itself, a worker at least, W&B's client
    process.kill()
    process.communicate(timeout=60)
    assert_nothing_is_left(process, shared, 10)  # torch's workers look for their parent every five seconds


def test_out_of_memory_is_a_status_of_its_own_with_advice(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    settings = {**SMALL_RUN, "model": "resnet18", "train_limit": None, "batch_size": 1000, "tracking": "disabled"}
    command = [str(BIN / "eva"), "train", *flags({**settings, "out": tmp_path / "run"})]

    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    for agent, code in ({}, 2), ({"WANDB_SWEEP_ID": "abc"}, 0):
        done = subprocess.run(
            [*command[:-1], f"--out={tmp_path / str(code)}"],
            env={**clean_environment, **agent},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            preexec_fn=little_memory,
        )
        assert done.returncode == code, done.stderr
        told = [line for line in done.stderr.splitlines() if line]
        assert told == ["out of memory on cpu: choose a batch_size below 1000"]
        summary = json.loads((tmp_path / str(code) / "summary.json").read_text())
        assert (summary["status"], summary["reason"]) == ("oom", told[0])


def test_a_bug_is_one_line_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def buggy(*_: Any) -> str:
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(experiment, "fit", buggy)
    folder = tmp_path / "run"
    assert cli.main(["train", *flags({**SMALL_RUN, "tracking": "disabled", "out": folder})]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError: 'nobody thought of this'" in line and str(folder / "log.txt") in line
    assert "Traceback" in (folder / "log.txt").read_text()
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


def test_a_full_disk_ends_the_run_with_a_line_and_it_goes_on_once_there_is_room(
    clean_environment: dict[str, str], alone: Path, small_disk: Callable[..., Path]
) -> None:
    disk = small_disk("14m")
    folder = disk / "run"
    command = [str(BIN / "eva"), "train", *flags({**LONG_RUN, "save_steps": 5, "out": folder})]
    done = subprocess.run(command, env=clean_environment, cwd=disk, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(told) == 1 and "No space left on device" in told[0] and f"eva train --resume {folder}" in told[0]
    assert "Traceback" not in done.stderr
    state = state_of(folder)
    rows = rows_of(folder / "history.csv")
    assert len(rows) >= state["progression"]["step"] > 0
    subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    resumed(folder, clean_environment)
    assert_equal_to(alone, folder)


@pytest.mark.parametrize(
    ("size", "remedy"),
    [("8k", "do it once more"), ("16k", "go on with eva train --resume {folder}")],
    ids=["before there is anything to resume", "before W&B has begun"],
)
def test_a_disk_that_is_full_from_the_beginning_is_told_with_what_helps(
    clean_environment: dict[str, str], small_disk: Callable[..., Path], size: str, remedy: str
) -> None:
    disk = small_disk(size)
    folder, settings = disk / "run", {**SMALL_RUN, "epochs": 1, "peak_epoch": 0.5, "tracking": "offline"}
    command = [str(BIN / "eva"), "train", *flags({**settings, "out": folder})]
    pipes: dict[str, Any] = {"env": clean_environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, cwd=disk, **pipes)
    *others, line = done.stderr.splitlines()
    assert done.returncode == 2 and all(other.startswith("W&B") for other in others), done.stderr
    assert line.startswith("eva train: error: ") and "No space left on device" in line
    assert line.endswith(f"make room, then {remedy.format(folder=folder)}")
    subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    if "--resume" in remedy:
        resumed(folder, clean_environment)
    else:
        again = subprocess.run(command, cwd=disk, **pipes)
        assert again.returncode == 0, again.stderr
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_a_full_disk_ends_every_command_with_a_line(
    tmp_path: Path, small_disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**SMALL_RUN, "tracking": "disabled"}
    assert cli.main(["train", *flags({**small, "max_steps": 1, "out": tmp_path / "run"})]) == 0
    find = {**small, "lr_max": "find", "find_lr_steps": 12, "find_lr_end": 1.0}
    commands = {
        "evaluate": ["evaluate", str(tmp_path / "run"), "--tracking=disabled", "--gallery_size=1"],
        "find_lr": ["find_lr", *flags(find)],
        "compare": ["compare", str(tmp_path / "run")],
    }
    for name, words in commands.items():
        for size in ("4k", "32k"):
            capsys.readouterr()
            assert cli.main([*words, f"--out={small_disk(size) / 'out'}"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"eva {name}: error: ") and "No space left on device" in line
            assert "--resume" not in line


def test_ctrl_c_before_the_training_says_how_to_go_on(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    """In the range test, for one."""
    folder = tmp_path / "run"
    settings = {**LONG_RUN, "model": "resnet9", "lr_max": "find", "lr_min": "find", "find_lr_steps": 500, "workers": 0}
    command = [str(BIN / "eva"), "train", *flags({**settings, "out": folder})]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=clean_environment, cwd=tmp_path, text=True, **pipes)
    assert process.stdout is not None
    said = ""
    while "range test: 500 steps" not in said:
        said = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert f"go on with: eva train --resume {folder}" in stdout


def test_two_runs_that_begin_in_one_folder_are_one_run_and_one_line(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    folder = tmp_path / "run"
    command = [str(BIN / "eva"), "train"]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [
        subprocess.Popen(
            [*command, *flags({**SMALL_RUN, "tracking": "disabled", "seed": seed, "out": folder})],
            env=clean_environment,
            cwd=tmp_path,
            text=True,
            **pipes,
        )
        for seed in (1, 2)
    ]
    told = [process.communicate(timeout=200)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    (winner,) = [seed for seed, process in zip((1, 2), both, strict=True) if process.returncode == 0]
    assert "is not empty" in told[2 - winner] or "is in the hands of another process" in told[2 - winner]
    assert f"seed: {winner}\n" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_sigterm_tells_wandb_that_the_machine_is_taken_away(
    tmp_path: Path, clean_environment: dict[str, str], loopback: LoopbackServer
) -> None:
    folder = tmp_path / "run"
    environment = {**clean_environment, **loopback.environment()}
    process = start(folder, environment, {**LONG_RUN, "tracking": "online", "project": "preempted"})
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) and process.returncode == 130
    (run,) = [run for key, run in loopback.runs.items() if key[1] == "preempted"]
    assert run.preempting and run.exit_code == 1
    steps = [row["trainer/step"] for row in run.history if "train/loss" in row]
    assert steps == list(range(len(rows_of(folder / "history.csv"))))
    resumed(folder, environment)
    steps = [row["trainer/step"] for row in run.history if "train/loss" in row]
    assert steps == list(range(120))
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_makes_another_exception_of_is_one_all_the_same(number: int) -> None:
    """As Python 3.11 does where a class is made of descriptors; an import that was met stays half made."""
    program = (
        "import os, sys, time\n"
        "from eva import cli\n"
        "def command(arguments, unknown):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        time.sleep(60)\n"
        "    except BaseException as error:\n"
        "        raise RuntimeError('half made') from error\n"
        "cli.COMMANDS['train'] = command\n"
        "sys.exit(cli.main(['train']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "eva train: interrupted\n")
