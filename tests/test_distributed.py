"""Trainings in two processes, started by torchrun, against the same in one; and what ends them."""

import csv
import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BIN, SMALL_RUN, flags, inspect
from distributed_cases import CASES, RESUMED, STOP_AT, WATCHED, make_loaders, make_network, trained
from safetensors.torch import load_file
from test_loop import FP32
from test_resume import rows_of

from eva import cli
from eva.distributed import ALONE, World
from eva.lr_range import record_curve

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# The same sums in another order: rounding, amplified over some ten steps.
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)

# Some ten seconds in two processes.
RUN: dict[str, Any] = {
    **SMALL_RUN,
    **{"train_limit": 50, "batch_size": 13, "epochs": 8, "schedule": "constant", "lr_max": 0.01, "lr_min": 0.0},
    **{"sync_batchnorm": True, "tracking": "disabled", "save_steps": 5},
}


def torchrun(*arguments: object, processes: int = 2) -> list[str]:
    return [str(BIN / "torchrun"), f"--nproc_per_node={processes}", *map(str, arguments)]


def numbers(folder: Path, name: str, *columns: str) -> torch.Tensor:
    """The rows of a CSV file, as far as they are no times."""
    with open(folder / name, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    timed = ("seconds", "images_per_second", "train_epoch/seconds")
    return torch.tensor([[float(text) for key, text in row.items() if key not in timed] for row in rows])


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Asserts that two runs have the same losses, accuracies and rates, and the same best weights."""
    for name in ("history.csv", "epochs.csv"):
        close(numbers(ours, name), numbers(theirs, name))
    weights, others = (load_file(folder / "best.safetensors") for folder in (ours, theirs))
    assert weights.keys() == others.keys()
    for name in weights:
        close(weights[name], others[name], rtol=1e-3, atol=1e-4)


# The arithmetic: all cases by the same two processes


@pytest.fixture(scope="module")
def by_two(clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    trained(folder / "from one", RESUMED, ALONE, stop_at=STOP_AT)
    command = torchrun(TESTS / "distributed_cases.py", folder)
    done = subprocess.run(command, env=clean_environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def told_by(folder: Path) -> list[dict[str, Any]]:
    """What each of the processes told."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_with_the_same_batches(by_two: Path, tmp_path: Path, name: str) -> None:
    trained(tmp_path / "one", CASES[name], ALONE)
    assert_same_run(by_two / name, tmp_path / "one")


def test_a_plain_batch_norm_is_that_of_each_share(by_two: Path, tmp_path: Path) -> None:
    """Or the case above would show nothing."""
    case = CASES["synchronized"]
    trained(tmp_path / "one", case, ALONE)
    apart = numbers(by_two / "ghost norm", "history.csv")[:, 2] - numbers(tmp_path / "one", "history.csv")[:8, 2]
    assert apart.abs().max() > 0.01


def test_what_one_process_wishes_all_do_at_the_same_batch_and_go_on_to_the_bit(by_two: Path) -> None:
    """With dropout, which is another one in each process and in each step."""
    for told in told_by(by_two):
        assert told["stopped"] == ["interrupted", STOP_AT]
        assert told["resumed"] == ["finished", 12]
    alone, resumed = by_two / "dropout", by_two / "dropout, resumed"
    for name in ("history.csv", "epochs.csv"):
        assert rows_of(resumed / name) == rows_of(alone / name)
    ours, theirs = (load_file(folder / "best.safetensors") for folder in (resumed, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_goes_on_in_another_number_of_processes(by_two: Path, tmp_path: Path) -> None:
    trained(tmp_path / "alone", RESUMED, ALONE)
    assert_same_run(by_two / "from one", tmp_path / "alone")
    trained(by_two / "for one", RESUMED, ALONE, resume=True)
    assert_same_run(by_two / "for one", tmp_path / "alone")


@pytest.mark.parametrize("name", ["uneven shares", "synchronized"])
def test_the_range_test_of_two_processes_is_that_of_one(by_two: Path, name: str) -> None:
    config, loader, _ = make_loaders(CASES[name], ALONE)
    curve = record_curve(config, FP32, make_network(config, CASES[name].norm, ALONE), loader)
    first, second = (told[f"curve, {name}"] for told in told_by(by_two))
    assert first == second
    close(torch.tensor(first[:40]), torch.tensor(curve.losses[:40]), rtol=1e-3, atol=1e-4)


def test_an_evaluation_counts_each_image_once(by_two: Path) -> None:
    assert [told["count"] for told in told_by(by_two)] == [WATCHED, WATCHED]


# Shares


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 2, 7, 16, 100])
def test_shares_are_all_once_in_order_and_differ_by_one_at_most(size: int, count: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_share_below_two_is_filled_up_with_images_that_do_not_count() -> None:
    batch = [10, 11, 12]
    assert [World(rank, 4).take(batch) for rank in range(4)] == [[10, 11], [10, 11], [11, 12], [12, 10]]
    assert [list(World(rank, 4).share(3)) for rank in range(4)] == [[], [0], [1], [2]]
    assert World(1, 2).take([10]) == [10] and World().take(batch) == batch


def test_each_process_draws_its_own_numbers_in_each_step_and_the_same_again() -> None:
    def drawn(rank: int, step: int, seed: int = 0) -> float:
        World(rank, 2).begin_step(4, seed, step)
        return torch.rand(()).item()

    try:
        assert len({drawn(0, 0), drawn(1, 0), drawn(0, 1), drawn(1, 1), drawn(0, 0, seed=1)}) == 5
        assert drawn(1, 1) == drawn(1, 1)
        torch.manual_seed(5)
        World().begin_step(4, 0, 0)  # a process alone goes on with its generator
        first = torch.rand(())
        torch.manual_seed(5)
        assert torch.rand(()) == first
    finally:
        World().begin_step(4, 0, 0)


# Whole runs


@pytest.fixture(scope="module")
def by_one(clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert cli.main(["train", *flags({**RUN, "out": folder})]) == 0
    return folder


def begin(folder: Path, environment: Mapping[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Starts a training in two processes, and waits until it trains."""
    command = torchrun(ROOT / "runners" / "train.py", *(arguments or flags({**RUN, "out": folder})))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, cwd=folder.parent, text=True, **pipes)
    deadline = time.monotonic() + 200
    history = folder / "history.csv"
    while not history.exists() or history.read_text().count("\n") < 6:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


def ranks(torchrun: int) -> dict[int, int]:
    """The processes that torchrun started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0") if parent == torchrun else []
        except OSError:
            continue
        found |= {int(line[5:]): int(path.name) for line in variables if line.startswith(b"RANK=")}
    return found


def assert_gone(processes: Sequence[int]) -> None:
    deadline = time.monotonic() + 5
    while left := [number for number in processes if Path(f"/proc/{number}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_sigterm_of_torchrun_saves_once_and_one_process_goes_on(
    tmp_path: Path, clean_environment: dict[str, str], by_one: Path
) -> None:
    folder = tmp_path / "run"
    process = begin(folder, clean_environment)
    started = ranks(process.pid)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode and "eva/" not in stderr, stderr
    assert stdout.count("stopping after this batch") == 1
    assert stdout.count(f"go on with: eva train --resume {folder}") == 1
    assert len(started) == 2
    assert_gone(list(started.values()))
    steps = len(rows_of(folder / "history.csv"))
    assert json.loads((folder / "summary.json").read_text())["steps"] == steps < 32
    assert cli.main(["train", f"--resume={folder}"]) == 0
    assert_same_run(folder, by_one)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    tmp_path: Path, clean_environment: dict[str, str], by_one: Path
) -> None:
    folder = tmp_path / "run"
    process = begin(folder, clean_environment)
    started = ranks(process.pid)
    os.kill(started[1], signal.SIGKILL)
    began = time.monotonic()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode and time.monotonic() - began < 30
    assert stderr.count("another process of this run has died") == 1
    assert f"go on with: eva train --resume {folder}" in stdout
    assert_gone(list(started.values()))
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    command = torchrun(ROOT / "runners" / "train.py", f"--resume={folder}")
    done = subprocess.run(command, env=clean_environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, by_one)


def test_a_mistake_is_told_once_with_its_exit_code(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    command = torchrun(ROOT / "runners" / "train.py", *flags({**RUN, "policy": "crop_flop", "out": tmp_path / "run"}))
    done = subprocess.run(command, env=clean_environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert [line for line in done.stderr.splitlines() if "eva train: error" in line] == [
        line for line in done.stderr.splitlines() if "crop_flop" in line
    ]
    assert done.stderr.count("crop_flop") == 1 and "exitcode  : 2 " in done.stderr
    assert not (tmp_path / "run").exists()
