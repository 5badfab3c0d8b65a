"""Whole sweeps by real processes: what is killed is gone on with, nothing is lost or run twice, no socket is opened."""

import contextlib
import csv
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import BIN, FAKE_KEY, SMALL_RUN, flags, inspect
from made_sweeps import ARGUMENTS, begin, begun, facts, kill, of_sessions, start_conductor, wait_until, workers_of
from postgres import Postgres, postgres  # noqa: F401
from safetensors.torch import load_file

from eva import cli, sweep
from eva.config import UserError
from eva.ranking import TrialRecord
from eva.search import Search, open_storage
from eva.sweep import Conductor, check_failures, count_configurations
from eva.sweep_folder import STORAGE_VARIABLE, SweepFolder, open_sweep_folder

FORK = multiprocessing.get_context("fork")
RUNNER = Path(__file__).parent.parent / "runners" / "train.py"


def states(search: Search) -> list[str]:
    return [record.state for record in search.records()]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Trials that end in every way


@dataclass(frozen=True)
class Conducted:
    """A sweep that is over, and what was printed."""

    folder: SweepFolder
    search: Search
    output: str


@pytest.fixture(scope="module")
def deadly(tmp_path_factory: pytest.TempPathFactory) -> Conducted:
    """Two warm workers, on two GPUs by name, whose trials kill them in several ways; a trial survives one death."""
    root = tmp_path_factory.mktemp("deadly")
    done = ("finish", "kill", "finish1", "die", "once", "through", "crash", "finish2")
    folder, search = begin(root, *done, retries=1)
    with pytest.MonkeyPatch.context() as patch, open(root / "output", "w") as output:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setattr(sys, "stdout", output)
        assert Conductor(folder, search, workers=2, gpus=("5", "6")).run()
    return Conducted(folder, search, (root / "output").read_text())


def test_trials_that_kill_their_worker_take_nobody_with_them(deadly: Conducted) -> None:
    """Those that live have a result; those that don't have failed, and why is told."""
    records = deadly.search.records()
    values = [0.5, None, 0.5, None, 0.25, 0.125, None, 0.5]
    assert [record.objective for record in records] == values
    assert [record.state for record in records] == ["failed" if value is None else "finished" for value in values]
    # Of two that died at once both are told.
    how = r"its process died 2 times, the last time .*(SIGKILL|exit code 7|unseen)"
    assert re.match(how, records[1].reason) and re.match(how, records[3].reason)
    assert records[6].reason == "RuntimeError: no such luck"


def test_only_what_died_is_begun_again(deadly: Conducted) -> None:
    """Twice with one retry; a run that was through when its process died is not run again, a crash is final."""
    assert begun(deadly.folder) == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 7]


def test_each_end_and_each_death_is_told_once(deadly: Conducted) -> None:
    """One line a trial, with the best so far."""
    lines = deadly.output.splitlines()
    ends = [line for line in lines if re.match(r"trial \d of 8", line)]
    assert sorted(line.split()[1] for line in ends) == list("01234567")
    deaths = [line for line in lines if "its process died" in line and line not in ends]
    assert {line.split()[1] for line in deaths} <= {"1:", "3:", "4:"}
    assert len(deaths) <= 3 and all(line.endswith("; it is gone on with") for line in deaths)
    assert any(re.search(r"\((exit code 7 or )?killed by SIGKILL\)", line) for line in deaths)
    assert any("best" in line for line in ends)


def test_workers_share_the_processors_and_take_a_gpu_each(deadly: Conducted) -> None:
    """By the variables that torch and CUDA look at."""
    seen = [facts(deadly.folder, number) for number in (0, 2, 4, 7)]
    assert {fact["threads"] for fact in seen} == {str(max(1, (os.cpu_count() or 1) // 2))}
    assert {fact["gpus"] for fact in seen} <= {"5", "6"}
    both = {json.loads(path.read_text())["gpus"] for path in deadly.folder.path.glob("trials/*/facts.json")}
    assert both == {"5", "6"}


def test_no_worker_is_left(deadly: Conducted) -> None:
    """Although most of them were killed."""
    assert workers_of(deadly.folder.path) == []


def test_nothing_but_failures_ends_a_sweep(tmp_path: Path) -> None:
    """The rest would fail too; what runs is saved and waits."""
    folder, search = begin(tmp_path, *(f"usage{number}" for number in range(5)), "wait")
    with pytest.raises(UserError, match=r"^all of 5 trials failed, the last one: eva train: error: lr_max must be"):
        Conductor(folder, search, workers=1).run()
    assert states(search) == [*["failed"] * 5, "waiting"]
    assert workers_of(folder.path) == []


def test_a_sweep_that_has_a_result_survives_its_failures(tmp_path: Path) -> None:
    """As many as there are."""
    folder, search = begin(tmp_path, "finish", *(f"usage{number}" for number in range(6)), "finish1")
    assert Conductor(folder, search, workers=1).run()
    assert states(search) == ["finished", *["failed"] * 6, "finished"]


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_trial_is_begun_after_one_that_ends_while_the_sweep_is_stopped(
    tmp_path: Path, clean_environment: dict[str, str], isolate: bool, number: signal.Signals
) -> None:
    """It is through all the same, so that nothing of it tells that somebody wished to stop."""
    folder, search = begin(tmp_path, "polite", "finish", isolate=isolate)
    conductor = start_conductor(folder, 1, clean_environment)
    wait_until((folder.run_folder(0) / "waits").exists)
    conductor.send_signal(number)
    conductor.communicate(timeout=120)
    assert conductor.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_until(lambda: not workers_of(folder.path))
    assert states(search) == ["finished", "waiting"]
    assert begun(folder) == [0]


def failures(*values: dict[str, Any]) -> list[TrialRecord]:
    """Returns trials with these values that failed."""
    return [
        TrialRecord(number, "failed", each, None, (), 1.0, "no luck", None, None) for number, each in enumerate(values)
    ]


def test_seeds_of_one_or_two_configurations_may_all_fail() -> None:
    """One corner that is too large is no reason to end a sweep; three are, and so is the only one that there is."""
    seeds = [{"batch_size": 4096, "seed": seed} for seed in range(7)]
    waiting = replace(failures({})[0], number=99, state="waiting")
    two = failures(*seeds, {"batch_size": 2048, "seed": 0})
    check_failures([*failures(*seeds), waiting], math.inf)
    check_failures([*failures(*seeds), waiting], 2)
    check_failures([*two, waiting], math.inf)
    check_failures(failures(*seeds)[:4], 1)
    for given, configurations in (
        (failures(*seeds, {"batch_size": 2048}, {"batch_size": 1024}), math.inf),
        ([*two, waiting], 2),
        ([*failures(*seeds)[:5], waiting], 1),
    ):
        with pytest.raises(UserError, match=r"^all of \d trials failed, the last one: no luck$"):
            check_failures(given, configurations)


def test_configurations_are_counted_without_their_seeds(tmp_path: Path) -> None:
    """Of a grid they are the product; a range has no end of them; seeds alone are one."""
    folder, _ = begin(tmp_path, "finish", "wait", seed={"values": [0, 1, 2]}, other={"values": [1, 2, 3]})
    assert count_configurations(folder.sweep) == 6
    assert count_configurations(replace(folder.sweep, method="random")) == math.inf
    folder, _ = begin(tmp_path, "finish", seed={"values": [0, 1, 2]}, out="seeds")
    assert count_configurations(folder.sweep) == 1


def test_what_failed_is_run_once_more_when_the_cause_is_mended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Earlier failures don't end the sweep again; a trial that is tried again counts in place of the failed one."""
    heal = [f"heal{number}" for number in range(5)]
    folder, search = begin(tmp_path, *heal, "finish")
    resume = ["sweep", f"--resume={folder.path}"]
    assert cli.main(resume) == 2
    error = capfd.readouterr().err
    assert error == (
        "eva sweep: error: all of 5 trials failed, the last one: not yet; when that is mended, go on with "
        f"eva sweep --resume={folder.path} --retry_failed\n"
    )
    assert cli.main(resume) == 0
    assert states(search) == [*["failed"] * 5, "finished"]
    (folder.path / "trials" / "healthy").touch()
    capfd.readouterr()
    assert cli.main([*resume, "--retry_failed"]) == 0
    assert "failed trials that are run once more: 5" in capfd.readouterr().out
    assert states(search) == ["finished"] * 6
    assert {trial.values["do"] for trial in search.records()} == {*heal, "finish"}
    assert cli.main([*resume, "--retry_failed", "--count=6"]) == 0
    assert len(begun(folder)) == 11


def test_a_full_disk_ends_a_sweep_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing can be noted any more, or just that a trial failed; once there is room the sweep goes on."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", tmp_path]).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        folder, _ = begin(tmp_path, "finish", "wait", "finish1")

        def fill() -> None:
            wait_until((folder.run_folder(1) / "waits").exists)
            with contextlib.suppress(OSError), open(tmp_path / "filling", "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 512)
            (folder.path / "trials" / "go").touch()

        filler = threading.Thread(target=fill)
        filler.start()
        code = cli.main(["sweep", f"--resume={folder.path}"])
        filler.join()
        error = capfd.readouterr().err
        assert (code, error.count("\n")) == (2, 1)
        assert "No space left on device" in error and f"go on with eva sweep --resume={folder.path}" in error
        (tmp_path / "filling").unlink()
        assert cli.main(["sweep", f"--resume={folder.path}", "--retry_failed"]) == 0
        assert states(folder.open_search()) == ["finished"] * 3
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_command_that_needs_a_process_of_its_own_is_told(tmp_path: Path) -> None:
    """And is no failure of the trial."""
    folder, search = begin(tmp_path, "finish", command=("nice", *ARGUMENTS[1:]))
    with pytest.raises(UserError, match=r"^command has .nice. before the program, .*--isolate gives"):
        Conductor(folder, search, workers=1).run()
    assert states(search) == ["waiting"]
    search.claim(0, "here")
    assert search.give_back(0) == 0  # deaths


def test_workers_that_never_begin_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the last one said."""
    folder, search = begin(tmp_path, "finish")
    (tmp_path / "optuna.py").write_text("raise RuntimeError('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"end \(exit code 1\) before they run a trial: RuntimeError: broken"):
        Conductor(folder, search, workers=1).run()
    assert states(search) == ["waiting"]


def test_a_reached_target_ends_a_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What still runs is saved, and waits for whoever wants more."""
    folder, search = begin(tmp_path, "wait", "finish", "wait1", metric={"target": 0.5}, isolate=True)
    conductor = Conductor(folder, search, workers=2)
    assert not conductor.run()
    assert conductor.target_reached
    assert states(search) == ["waiting", "finished", "waiting"]
    assert "the target 0.5 is reached" in capfd.readouterr().out


# Signals and kills


def test_ctrl_c_saves_what_runs_and_a_killed_conductor_leaves_no_worker(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    """Three processes conduct one sweep in turn: one is interrupted, one is killed, and one ends it."""
    folder, search = begin(tmp_path, "wait", "wait1", "finish", "finish1", retries=0)

    def under_way() -> bool:
        return all((folder.run_folder(number) / "waits").exists() for number in (0, 1))

    for number in (signal.SIGINT, signal.SIGKILL):
        conductor = start_conductor(folder, 2, clean_environment)
        wait_until(under_way)
        sessions = set(workers_of(folder.path))
        assert len(sessions) == 2
        began = time.monotonic()
        conductor.send_signal(number)
        output, _ = conductor.communicate(timeout=60)
        wait_until(lambda sessions=sessions: not of_sessions(sessions), 20)  # type: ignore[misc]
        assert time.monotonic() - began < 20
        assert states(search) == ["waiting"] * 4
        if number == signal.SIGINT:
            assert conductor.returncode == 130
            assert "stopping: running trials are saved; once more to stop at once" in output
        for trial in (0, 1):
            (folder.run_folder(trial) / "waits").unlink()
    (folder.path / "trials" / "go").touch()
    assert Conductor(folder, search, workers=2).run()
    assert states(search) == ["finished"] * 4
    assert begun(folder) == [0, 0, 0, 1, 1, 1, 2, 3]


def test_a_second_ctrl_c_kills(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    """A program that doesn't listen, and its worker; the trial waits, and nobody blames it."""
    folder, search = begin(tmp_path, "deaf", isolate=True, retries=0)
    conductor = start_conductor(folder, 1, clean_environment)
    wait_until((folder.run_folder(0) / "waits").exists)
    sessions = set(workers_of(folder.path))
    conductor.send_signal(signal.SIGINT)
    time.sleep(1)
    assert conductor.poll() is None and of_sessions(sessions)
    conductor.send_signal(signal.SIGINT)
    conductor.communicate(timeout=30)
    assert conductor.returncode == 130
    wait_until(lambda: not of_sessions(sessions), 30)
    assert states(search) == ["waiting"]


def test_ctrl_c_interrupts_a_process_of_its_own_whatever_it_is_doing(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    """A trial that the signal finds at its imports has not failed; one that saves does so undisturbed."""
    folder, search = begin(tmp_path, "unready", "slow", isolate=True, retries=0)
    conductor = start_conductor(folder, 2, clean_environment)
    wait_until(lambda: all((folder.run_folder(number) / "waits").exists() for number in (0, 1)))
    conductor.send_signal(signal.SIGINT)
    conductor.communicate(timeout=60)
    assert (conductor.returncode, states(search)) == (130, ["waiting", "waiting"])
    assert (folder.run_folder(1) / "saved").exists()
    assert not (folder.run_folder(1) / "twice").exists()


def test_two_conductors_on_one_folder_share_the_trials(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    """Each once; when one of them is killed with its worker, the other one goes on with what that had."""
    folder, search = begin(tmp_path, *(f"finish{number}" for number in range(12)), "wait", "wait1", isolate=True)
    conductors = [start_conductor(folder, 1, clean_environment) for _ in range(2)]
    wait_until(lambda: all((folder.run_folder(number) / "waits").exists() for number in (12, 13)))
    assert begun(folder) == list(range(14))
    doomed, other = conductors
    workers = [
        pid for pid in workers_of(folder.path) if f"PPid:\t{doomed.pid}\n" in Path(f"/proc/{pid}/status").read_text()
    ]
    assert len(workers) == 1
    os.killpg(workers[0], signal.SIGKILL)
    kill(doomed.pid)
    (folder.path / "trials" / "go").touch()
    output, _ = other.communicate(timeout=60)
    doomed.communicate()
    assert other.returncode == 0, output
    assert states(search) == ["finished"] * 14
    assert len(begun(folder)) == 15


# Real trainings

# Trials that differ in what a process might keep from one to the next.
REAL = {
    **SMALL_RUN,
    **{"policy": "crop_flip_cutout", "save_steps": 1, "max_steps": 5, "deterministic": [True, False], "seed": [0, 1]},
}
LAST = {"deterministic": False, "seed": 1}


def real_sweep(path: Path, settings: dict[str, Any]) -> Path:
    """Writes the YAML of a grid: lists are searched, all others are constants."""
    parameters: dict[str, Any] = {
        name: {"values": value} if isinstance(value, list) else {"value": value} for name, value in settings.items()
    }
    parameters["policy_options"] = {"parameters": {"cutout": {"values": [6]}, "pad": {"value": 3}}}
    values = {
        "program": str(RUNNER),
        "method": "grid",
        "metric": {"name": "val/accuracy_best", "goal": "maximize"},
        "parameters": parameters,
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


# Runs a command, and writes what the kernel has counted in this network namespace, and who listened in the meantime.
COUNTER = """
import json, subprocess, sys, threading
listening, over = set(), threading.Event()
def look():
    while not over.wait(0.02):
        for name in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
            listening.update((name, line.split()[1]) for line in open(f"/proc/net/{name}").readlines()[1:])
thread = threading.Thread(target=look)
thread.start()
code = subprocess.run(sys.argv[2:]).returncode
over.set()
thread.join()
lines = [line.split() for line in open("/proc/net/snmp")]
counts = {a[0] + name: int(count) for a, b in zip(lines[::2], lines[1::2]) for name, count in zip(a[1:], b[1:])}
json.dump({"counts": counts, "listening": sorted(listening)}, open(sys.argv[1], "w"))
sys.exit(code)
"""
OPENED = ("Tcp:ActiveOpens", "Tcp:PassiveOpens", "Tcp:OutSegs", "Udp:OutDatagrams", "Icmp:OutMsgs")


def alone(report: Path, *command: str) -> list[str]:
    """Returns a command that runs another one in a network of its own, in which attempts to get out are counted."""
    inner = 'ip link set lo up && ip route add default dev lo && exec "$@"'
    return ["unshare", "-n", "bash", "-c", inner, "bash", sys.executable, "-c", COUNTER, str(report), *command]


def can_be_alone() -> bool:
    try:
        return subprocess.run(alone(Path(os.devnull), "true"), capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


@dataclass(frozen=True)
class RealSweep:
    """A sweep by the command line, and how it went."""

    path: Path
    output: str
    network: dict[str, Any] | None

    def run(self, number: int) -> Path:
        return self.path / "trials" / f"trial-{number:04}"


@pytest.fixture(scope="module")
def real(clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RealSweep:
    """`eva sweep` of four trainings by one warm worker, where there is an account's key, in a network of its own."""
    root = tmp_path_factory.mktemp("real")
    path = real_sweep(root / "real.yaml", REAL)
    command = [str(BIN / "eva"), "sweep", str(path), "--skip_check", f"--out={root / 'sweep'}"]
    network = root / "network.json" if can_be_alone() else None
    done = subprocess.run(
        alone(network, *command) if network else command,
        cwd=root,
        env={**clean_environment, "WANDB_API_KEY": FAKE_KEY},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return RealSweep(root / "sweep", done.stdout, json.loads(network.read_text()) if network else None)


def trained(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]], list[dict[str, str]]]:
    """Returns weights, and the rows of history.csv and epochs.csv without times."""
    clocks = ("images_per_second", "seconds", "train_epoch/seconds")
    tables = [
        [{key: value for key, value in row.items() if key not in clocks} for row in rows(folder / name)]
        for name in ("history.csv", "epochs.csv")
    ]
    return load_file(folder / "best.safetensors"), tables[0], tables[1]


def same(ours: Path, theirs: Path) -> bool:
    """Tells whether two run folders hold the same training, bit for bit."""
    (first, *tables), (second, *others) = trained(ours), trained(theirs)
    assert len(tables[0]) == 5 and len(tables[1]) == 2
    weights = all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    return first.keys() == second.keys() and weights and tables == others


def test_a_warm_trial_is_the_run_that_eva_train_makes_bit_for_bit(
    real: RealSweep, clean_environment: dict[str, str], tmp_path: Path
) -> None:
    """Although three others ran in its process before; other settings make another run."""
    given = {**REAL, **LAST, "tracking": "disabled", "out": tmp_path / "run"}
    options = ["--policy_options.cutout=6", "--policy_options.pad=3"]
    command = [str(BIN / "eva"), "train", *flags(given), *options]
    subprocess.run(command, cwd=tmp_path, env=clean_environment, capture_output=True, check=True, timeout=120)
    assert same(real.run(3), tmp_path / "run")
    assert not same(real.run(2), tmp_path / "run")


def test_a_warm_trial_is_the_isolated_one_bit_for_bit(
    real: RealSweep, clean_environment: dict[str, str], tmp_path: Path
) -> None:
    """By the YAML's own command, in a process of its own."""
    path = real_sweep(tmp_path / "one.yaml", {**REAL, **{name: [value] for name, value in LAST.items()}})
    folder = tmp_path / "sweep"
    command = [str(BIN / "eva"), "sweep", str(path), "--skip_check", "--isolate", f"--out={folder}"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    assert same(real.run(3), folder / "trials" / "trial-0000")


def test_a_trial_for_which_memory_does_not_suffice_says_what_to_reduce_and_the_next_one_runs(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    """In the same process, whose memory is free again."""
    settings = {**SMALL_RUN, "model": "resnet18", "train_limit": 1000, "batch_size": [1000, 20], "val_fraction": 0.03}
    settings |= {"policy": "crop_flip_cutout", "schedule": "constant", "epochs": 1, "peak_epoch": None, "max_steps": 2}
    path = real_sweep(tmp_path / "memory.yaml", {name: value for name, value in settings.items() if value is not None})
    done = subprocess.run(
        [str(BIN / "eva"), "sweep", str(path), "--skip_check", f"--out={tmp_path / 'sweep'}"],
        cwd=tmp_path,
        env=clean_environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("trial 0 of 2: ")]
    assert line.startswith("trial 0 of 2: failed (out of memory on cpu: choose a batch_size below 1000)")
    assert "trial 1 of 2: finished" in done.stdout
    summaries = [tmp_path / "sweep" / "trials" / f"trial-000{number}" / "summary.json" for number in (0, 1)]
    assert [json.loads(summary.read_text())["status"] for summary in summaries] == ["oom", "finished"]
    assert done.stdout.count("its process") == 0  # nor did anything have to die for it


def test_each_trial_is_a_normal_offline_run_of_wandb(real: RealSweep) -> None:
    """Group, job, name, id, and the parameters as an agent gives them beside eva's own settings."""
    settings = json.loads((real.path / "sweep.json").read_text())
    records = open_sweep_folder(real.path).open_search().records()
    ids = set()
    for number in (0, 3):
        summary = json.loads((real.run(number) / "summary.json").read_text())
        assert (summary["status"], summary["wandb_mode"]) == ("finished", "offline")
        ids.add(summary["wandb_id"])
        written = inspect(Path(summary["wandb_folders"][-1]))
        (run,) = [record["run"] for record in written if record["type"] == "run"]
        assert (run["run_id"], run["display_name"]) == (summary["wandb_id"], f"trial-{number:04}")
        assert (run["run_group"], run["job_type"], run["project"]) == (settings["name"], "train", "eva")
        config = run["config"]["update"]
        given = json.loads((real.path / "trials" / f"trial-{number:04}.json").read_text())
        assert {name: config[name] for name in given} == given
        assert given["policy_options"] == {"cutout": 6, "pad": 3}
        searched = {name: value for name, value in records[number].values.items() if "." not in name}
        assert {name: config[name] for name in searched} == searched
        logged = [record["history"]["item"] for record in written if record["type"] == "history"]
        assert len([row for row in logged if "train/loss" in row]) == 5
        assert len([row for row in logged if "val/accuracy_best" in row]) == 2
    assert len(ids) == 2


def test_a_sweep_says_what_it_does_and_where_everything_is(real: RealSweep) -> None:
    """A line a trial, the best so far, the time left; then ranking, results, picture and page."""
    for number in range(4):
        assert len(re.findall(rf"^trial {number} of 4\b", real.output, re.MULTILINE)) == 1
    for name in ("results.json", "search.png", "compare.html"):
        assert str(real.path / name) in real.output
        assert (real.path / name).stat().st_size > 0
    assert len(json.loads((real.path / "results.json").read_text())["trials"]) == 4


def test_a_sweep_opens_no_socket(real: RealSweep, tmp_path: Path) -> None:
    """By the kernel's own counters of its network, which count an attempt, a datagram and a listener of others."""
    if real.network is None:
        pytest.skip("network namespaces are not allowed here")
    assert {name: real.network["counts"][name] for name in OPENED} == dict.fromkeys(OPENED, 0)
    assert real.network["listening"] == []
    report = tmp_path / "network.json"
    control = (
        "import socket, time; s = socket.socket(); s.settimeout(0.2); s.connect_ex(('192.0.2.1', 80));"
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53));"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); time.sleep(0.3)"
    )
    subprocess.run(alone(report, sys.executable, "-c", control), check=True, timeout=60)
    counted = json.loads(report.read_text())
    assert counted["counts"]["Tcp:ActiveOpens"] == 1
    assert counted["counts"]["Udp:OutDatagrams"] >= 1
    assert {name for name, _ in counted["listening"]} >= {"tcp"}


def test_resuming_a_sweep_that_is_over_runs_nothing(real: RealSweep, clean_environment: dict[str, str]) -> None:
    """It tells what came out once more."""
    before = {path: path.stat().st_mtime_ns for path in (real.path / "trials").rglob("*") if path.is_file()}
    command = [str(BIN / "eva"), "sweep", f"--resume={real.path}"]
    done = subprocess.run(command, env=clean_environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in (real.path / "trials").rglob("*") if path.is_file()} == before
    assert "trial 0 of 4" not in done.stdout and "results.json" in done.stdout


def test_what_is_killed_in_the_middle_of_a_training_is_gone_on_with(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    """First a worker alone, then everything at once. Each step is logged once, from the state that was saved."""
    settings = {**SMALL_RUN, "train_limit": 400, "save_steps": 4, "seed": [0, 1, 2]}
    path, folder = real_sweep(tmp_path / "real.yaml", {**settings, "policy": "crop_flip_cutout"}), tmp_path / "sweep"
    eva = [str(BIN / "eva"), "sweep"]

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*eva, *arguments], cwd=tmp_path, env=clean_environment, stdout=subprocess.PIPE, text=True
        )

    def steps(number: int) -> int:
        history = folder / "trials" / f"trial-{number:04}" / "history.csv"
        return len(history.read_text().splitlines()) - 1 if history.exists() else 0

    conductor = start(str(path), "--skip_check", "--workers=2", f"--out={folder}")
    wait_until(lambda: conductor.poll() is not None or steps(0) >= 8, 120)
    before, doomed = steps(0), workers_of(folder)
    # Of the two workers the one whose trial is trial 0 writes into its log.
    log = str(folder / "trials" / "trial-0000.log")
    (worker,) = [pid for pid in doomed if os.path.realpath(f"/proc/{pid}/fd/1") == log]
    kill(worker)
    wait_until(lambda: steps(0) > before or steps(1) >= 36, 120)
    wait_until(lambda: len(workers_of(folder)) == 2, 60)
    sessions = set(workers_of(folder)) | {worker}
    for pid in sessions:
        os.killpg(pid, signal.SIGKILL) if of_sessions({pid}) else None
    kill(conductor.pid)
    output, _ = conductor.communicate(timeout=60)
    assert "trial 0: its process died (killed by SIGKILL); it is gone on with" in output
    wait_until(lambda: not of_sessions(sessions), 30)  # those that were killed take a moment to go
    done = start(f"--resume={folder}", "--workers=2")
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    search = open_sweep_folder(folder).open_search()
    assert states(search) == ["finished"] * 3
    summaries = [json.loads((folder / "trials" / f"trial-{n:04}" / "summary.json").read_text()) for n in range(3)]
    assert len({summary["wandb_id"] for summary in summaries}) == 3
    assert "going on from" in (folder / "trials" / "trial-0000.log").read_text()  # it was not begun anew
    for number in range(3):
        history = rows(folder / "trials" / f"trial-{number:04}" / "history.csv")
        assert [int(row["trainer/step"]) for row in history] == list(range(40))
        assert len(rows(folder / "trials" / f"trial-{number:04}" / "epochs.csv")) == 2


# Storages that several folders share


def test_processes_take_every_trial_once_from_postgresql(tmp_path: Path, postgres: Postgres) -> None:  # noqa: F811
    """Four of them, with the values that the seed decides; a trial that is given back is taken again."""
    sweep = begin(tmp_path, *(f"finish{number}" for number in range(24)))[0].sweep
    Search.create(sweep, open_storage(postgres.url()), "queue", 0, 24)
    barrier = FORK.Barrier(4)

    def take(part: int) -> None:
        search = Search(sweep, open_storage(postgres.url()), "queue")
        barrier.wait()
        taken, given_back = [], False
        while numbers := search.waiting():
            for number in numbers:
                if claimed := search.claim(number, str(part)):
                    if not given_back:
                        given_back = search.give_back(number) == 0
                        continue
                    taken.append((claimed.number, claimed.values["do"]))
                    search.finish(number, "finished", 0.5, 1.0)
        (tmp_path / f"{part}.json").write_text(json.dumps(taken))
        os._exit(0)

    processes = [FORK.Process(target=take, args=(part,)) for part in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    taken = [pair for part in range(4) for pair in json.loads((tmp_path / f"{part}.json").read_text())]
    assert sorted(taken) == [[number, f"finish{number}"] for number in range(24)]


def test_machines_share_a_sweep_through_postgresql_and_no_password_is_left(
    tmp_path: Path,
    postgres: Postgres,  # noqa: F811
    clean_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two folders, a conductor each: every trial once, each run in the folder of who ran it."""
    monkeypatch.setenv(STORAGE_VARIABLE, postgres.url())
    done = [f"finish{number}" for number in range(10)]
    shared = {"storage": postgres.url(), "name": "shared"}
    made = [begin(tmp_path, *done, out=out, isolate=out == "one", **shared) for out in ("one", "two")]
    environment = {**clean_environment, STORAGE_VARIABLE: postgres.url()}
    conductors = [start_conductor(folder, 1, environment) for folder, _ in made]
    outputs = [conductor.communicate(timeout=120)[0] for conductor in conductors]
    assert [conductor.returncode for conductor in conductors] == [0, 0], outputs
    search = made[0][1]
    assert states(search) == ["finished"] * 10
    assert sorted(begun(made[0][0]) + begun(made[1][0])) == list(range(10))
    assert not any(postgres.password in output for output in outputs)
    files = [path for folder, _ in made for path in folder.path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if postgres.password.encode() in path.read_bytes()]
    assert all(f"eva@127.0.0.1:{postgres.port}" in (folder.path / "sweep.json").read_text() for folder, _ in made)


def test_a_database_that_goes_away_ends_the_sweep_in_one_line_and_nothing_is_lost(
    tmp_path: Path,
    postgres: Postgres,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """While a trial runs; once it is back the sweep goes on, and what had ended is not run again."""
    monkeypatch.setenv(STORAGE_VARIABLE, postgres.url())
    monkeypatch.setattr("eva.search.PATIENCE_SECONDS", 0.0)
    folder, _ = begin(tmp_path, "finish", "wait", "finish1", storage=postgres.url(), name="gone")

    def break_off() -> None:
        wait_until((folder.run_folder(1) / "waits").exists)
        workers = workers_of(folder.path)
        postgres.stop()
        with contextlib.suppress(ProcessLookupError):
            kill(*workers)  # which would have patience

    breaker = threading.Thread(target=break_off)
    breaker.start()
    try:
        code = cli.main(["sweep", f"--resume={folder.path}"])
    finally:
        breaker.join()
        postgres.start()
    told = capfd.readouterr()
    assert code == 2 and told.err.count("\n") == 1
    assert told.err.startswith("eva sweep: error: cannot reach the storage 'postgresql://eva@127.0.0.1")
    assert told.err.endswith(f"; when that is mended, go on with eva sweep --resume={folder.path} --retry_failed\n")
    assert postgres.password not in told.err + told.out
    (folder.path / "trials" / "go").touch()
    assert cli.main(["sweep", f"--resume={folder.path}"]) == 0
    assert states(folder.open_search()) == ["finished"] * 3
    assert begun(folder) == [0, 1, 1, 2]
    assert "no comparison page" in capfd.readouterr().out


def test_a_database_that_is_started_anew_is_waited_for(
    tmp_path: Path,
    postgres: Postgres,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    clean_environment: dict[str, str],
) -> None:
    """A trial ends while it is away: that is noted when it is back, and no trial is run twice."""
    monkeypatch.setenv(STORAGE_VARIABLE, postgres.url())
    folder, search = begin(tmp_path, "finish", "wait", "finish1", storage=postgres.url(), name="anew")
    conductor = start_conductor(folder, 1, {**clean_environment, STORAGE_VARIABLE: postgres.url()})
    wait_until((folder.run_folder(1) / "waits").exists)
    postgres.stop()
    try:
        (folder.path / "trials" / "go").touch()
        wait_until((folder.run_folder(1) / "summary.json").exists)
        time.sleep(1)
    finally:
        postgres.start()
    output = conductor.communicate(timeout=120)[0]
    assert conductor.returncode == 0, output
    assert "died" not in output
    assert states(search) == ["finished"] * 3
    assert begun(folder) == [0, 1, 2]


@pytest.mark.parametrize("mistake", ["password", "server"])
def test_a_database_that_cannot_be_had_is_one_line_without_the_password(
    tmp_path: Path,
    postgres: Postgres,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    """And no folder is made."""
    monkeypatch.setenv(STORAGE_VARIABLE, "")
    url = postgres.url(password="wrongsecret") if mistake == "password" else postgres.url(port=1)
    path = real_sweep(tmp_path / "real.yaml", {**REAL, "deterministic": False})
    folder = tmp_path / "sweep"
    code = cli.main(["sweep", str(path), "--skip_check", f"--out={folder}", f"--storage={url}"])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert "cannot open the storage" in error
    assert ("password authentication failed" if mistake == "password" else "Connection refused") in error
    assert "wrongsecret" not in error and postgres.password not in error
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_a_machine_that_died_is_found_out_by_its_silence_once(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Two others watch it: its trial waits again, and stays with who takes it; one that beats is left alone."""
    storage = str(tmp_path / "shared.log")
    if kind == "postgresql":
        storage = request.getfixturevalue("postgres").url()
        monkeypatch.setenv(STORAGE_VARIABLE, storage)
    monkeypatch.setattr(sweep, "BEAT_SECONDS", 0.1)
    shared = {"storage": storage, "name": f"watched-{kind}"}
    done = ("finish", "finish1", "finish2")
    made = [begin(tmp_path, *done, out=out, **shared) for out in ("dead", "alive", "first", "second")]
    (dead, search), (alive, beating), *others = made
    search.claim(0, dead.place)
    beating.claim(1, alive.place)
    watchers = [Conductor(folder, search, workers=1) for folder, search in others]

    def watch(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            beating.beat(1)
            for watcher in watchers:
                watcher._watch_others()
            time.sleep(0.02)

    watch(0.3)
    assert search.waiting() == [2]
    watch(0.6)
    assert search.waiting() == [0, 2] and list(search.running()) == [1]
    # The second machine takes it, and is busy for less than what counts as silence.
    folder, search = others[1]
    with folder.hold(0):
        assert search.claim(0, folder.place) is not None
        watch(0.3)
        assert list(search.running()) == [0, 1]
        watch(1.0)  # its own conductor knows better than to call it silent; the other one does not
        assert list(search.running()) == [1]
    search.claim(0, dead.place)
    assert search.give_back(0) == 2  # deaths


def test_a_journal_outside_of_the_folders_is_shared_like_a_database(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    """Two machines with a disk in common, and a folder each: every trial once."""
    shared = {"storage": str(tmp_path / "shared.log"), "name": "shared", "isolate": True}
    done = [f"finish{number}" for number in range(8)]
    made = [begin(tmp_path, *done, out=out, **shared)[0] for out in ("one", "two")]
    conductors = [start_conductor(folder, 1, clean_environment) for folder in made]
    outputs = [conductor.communicate(timeout=120)[0] for conductor in conductors]
    assert [conductor.returncode for conductor in conductors] == [0, 0], outputs
    assert sorted(begun(made[0]) + begun(made[1])) == list(range(8))
    assert states(made[0].open_search()) == ["finished"] * 8
