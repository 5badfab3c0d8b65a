"""Trainings in two processes, started by torchrun, against the same in one; and what ends them."""

import functools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import BIN, SMALL_RUN, flags
from distributed_cases import APART, CASES, RESUMED, STOP_AT, WATCHED, make_loaders, make_network, trained
from loopback import LoopbackServer
from loopback_client import begin_search
from safetensors.torch import load_file
from test_loop import FP32
from test_resume import rows_of
from tiny_train import tiny

from eva import cli
from eva.distributed import ALONE, World
from eva.evaluation import evaluate
from eva.lr_range import record_curve
from eva.models import MODELS

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# The same sums in another order: rounding, amplified over some ten steps.
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)

RUN: dict[str, Any] = {
    **SMALL_RUN,
    **{"model": "tiny", "sync_batchnorm": True, "train_limit": 50, "batch_size": 13, "epochs": 10, "save_steps": 5},
    **{"schedule": "constant", "lr_max": 0.005, "lr_min": 0.0, "tracking": "disabled"},
}
STEPS = 40


def torchrun(*arguments: object, processes: int = 2) -> list[str]:
    return [str(BIN / "torchrun"), f"--nproc_per_node={processes}", *map(str, arguments)]


def numbers(folder: Path, name: str) -> torch.Tensor:
    """The rows of a CSV file, as far as they are no times."""
    return torch.tensor([[float(text) for text in row.values()] for row in rows_of(folder / name)])


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
    if CASES[name].norm == "ghost":  # its running statistics are those of the first process's slices
        close(numbers(by_two / name, "history.csv"), numbers(tmp_path / "one", "history.csv"))
    else:
        assert_same_run(by_two / name, tmp_path / "one")


def test_batch_norm_that_is_not_synchronized_is_that_of_each_share(by_two: Path, tmp_path: Path) -> None:
    """Or the synchronized ones would show nothing. Those of the first process are evaluated, and saved."""
    trained(tmp_path / "one", APART, ALONE)
    ours, theirs = (numbers(folder, "history.csv") for folder in (by_two / "apart", tmp_path / "one"))
    assert (ours - theirs).abs().max() > 0.01
    config, _, watched = make_loaders(APART, ALONE)
    model = make_network(config, APART.norm, ALONE)
    model.load_state_dict(load_file(by_two / "apart" / "best.safetensors"))
    losses = [float(row["val/loss"]) for row in rows_of(by_two / "apart" / "epochs.csv")]
    assert min(abs(evaluate(model, watched, FP32).loss - loss) for loss in losses) < 1e-5


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
def tiny_model() -> Iterator[None]:
    """Makes this process know the model of `tiny_train` too."""
    MODELS["tiny"] = tiny
    yield
    del MODELS["tiny"]


@pytest.fixture(scope="module")
def by_one(tiny_model: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert cli.main(["train", *flags({**RUN, "out": folder})]) == 0
    return folder


def begin(folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Starts a training in two processes, and waits until it trains."""
    command = torchrun(TESTS / "tiny_train.py", *flags({**RUN, "out": folder}))
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
    found: dict[int, int] = {}
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


# A cluster's srun on this machine: so many tasks at the same time, each as if on a node of its own.
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_PROCID=$task SLURM_NODEID=$task "$@" & done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"
"""


def slurm_job(folder: Path, environment: Mapping[str, str], tasks: int, **programs: str) -> dict[str, str]:
    """The environment of a job in which SLURM's commands, and other programs, are these scripts."""
    programs = {"srun": SRUN, "scontrol": "#!/bin/sh\necho localhost\n", **programs}
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return {
        **environment,
        "PATH": os.pathsep.join([str(folder / "bin"), str(BIN), environment["PATH"]]),
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "MASTER_PORT": str(port)},
        **{"SLURM_NTASKS": str(tasks), "SLURM_NNODES": str(tasks)},
    }


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
    assert json.loads((folder / "summary.json").read_text())["steps"] == steps < STEPS
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
    job = slurm_job(tmp_path, clean_environment, tasks=2)
    (tmp_path / "runners").mkdir()
    (tmp_path / "runners" / "train.py").symlink_to(TESTS / "tiny_train.py")
    command = [str(ROOT / "runners" / "slurm_train.sh"), f"--resume={folder}"]
    done = subprocess.run(command, env=job, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("status: finished") == 1
    assert_same_run(folder, by_one)


def test_a_mistake_is_told_once_with_its_exit_code(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    mistaken = flags({**SMALL_RUN, "policy": "crop_flop", "out": tmp_path / "run"})
    command = torchrun(ROOT / "runners" / "train.py", *mistaken)
    done = subprocess.run(command, env=clean_environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    [told] = [line for line in done.stderr.splitlines() if "crop_flop" in line]
    assert told.startswith("eva train: error: unknown policy 'crop_flop'") and "exitcode  : 2 " in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_agent_trains_in_two_processes_and_the_server_has_one_run_with_each_row_once(
    tmp_path: Path, clean_environment: dict[str, str], loopback: LoopbackServer, by_one: Path
) -> None:
    settings = {**RUN, "tracking": "auto"}
    search = begin_search(
        loopback,
        tmp_path,
        clean_environment,
        [settings],
        **{"project": "processes", "program": str(TESTS / "tiny_train.py"), "method": "random"},
        command=["${env}", "torchrun", "--nproc_per_node=2", "${program}", "${args}"],
        parameters={name: {"value": value} for name, value in settings.items()},
    )
    agent = search.start_agent("--count=1")
    assert agent.process.wait(300) == 0, agent.said
    [run_id] = os.listdir(tmp_path / "runs")
    folder = tmp_path / "runs" / run_id
    assert_same_run(folder, by_one)
    [run] = [run for key, run in loopback.runs.items() if key[1] == "processes"]
    assert (run.exit_code, run.summary["status"]) == (0, "finished")
    assert [row["trainer/step"] for row in run.history if "train/loss" in row] == list(range(STEPS))
    assert [row["epoch"] for row in run.history if "val/loss" in row] == list(range(1, 11))
    summary = search.summary(run_id)
    shared = {name: summary["hardware"][name] for name in ("processes", "batch_size_per_process")}
    assert shared == {"processes": 2, "batch_size_per_process": 7}
    alone = json.loads((by_one / "summary.json").read_text())
    assert summary["test_accuracy_best"] == pytest.approx(alone["test_accuracy_best"], abs=0.01)
    assert agent.said.count("status: finished") == 1


SWEEP = {
    **{
        "program": str(ROOT / "runners" / "train.py"),
        "method": "grid",
        "metric": {"name": "val/accuracy_best", "goal": "maximize"},
    },
    "parameters": {
        **{name: {"value": value} for name, value in {**SMALL_RUN, "epochs": 1, "schedule": "constant"}.items()},
        "seed": {"values": [0, 1]},
    },
}


def test_tasks_of_a_slurm_job_share_a_sweep(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    job = slurm_job(tmp_path, clean_environment, tasks=2)
    command = [str(ROOT / "runners" / "slurm_sweep.sh"), "sweep.yaml"]
    arguments = ["--storage=journal.log", "--name=shared", "--skip_check"]
    done = subprocess.run([*command, *arguments], env=job, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / "sweeps-out" / f"7-{task}" for task in range(2)]
    trials = [path.name for folder in folders for path in (folder / "trials").iterdir() if path.is_dir()]
    assert sorted(trials) == ["trial-0000", "trial-0001"]


def test_tasks_of_a_slurm_job_are_agents_of_a_sweep(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    wandb = '#!/bin/sh\necho "$@" > "agent-$SLURM_PROCID"\n'
    job = slurm_job(tmp_path, clean_environment, tasks=3, wandb=wandb)
    command = [str(ROOT / "runners" / "slurm_sweep.sh"), "entity/project/sweep", "--count=5"]
    subprocess.run(command, env=job, cwd=tmp_path, check=True, timeout=60)
    said = [(tmp_path / f"agent-{task}").read_text() for task in range(3)]
    assert said == ["agent --count=5 entity/project/sweep\n"] * 3
