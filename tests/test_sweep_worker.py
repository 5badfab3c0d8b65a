"""What a worker does with a trial: each way to end, its output, its command, and whose death counts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_sweeps import ARGUMENTS, begin, begun, facts, wait_until

from eva import sweep_worker
from eva.config import EXIT_INTERRUPTED
from eva.search import Search
from eva.sweep_folder import SweepFolder
from eva.sweep_worker import (
    EXIT_CRASHED,
    beating,
    claim,
    ended_status,
    objective,
    redirected,
    revive,
    run_apart,
    run_here,
    run_trial,
)


@contextlib.contextmanager
def plain_output() -> Iterator[None]:
    """Gives this process the output of a worker, which is not pytest's own but files 1 and 2."""
    kept = sys.stdout, sys.stderr
    with open(1, "w", closefd=False) as stdout, open(2, "w", closefd=False) as stderr:
        sys.stdout, sys.stderr = stdout, stderr
        try:
            yield
        finally:
            sys.stdout, sys.stderr = kept


def run_next(folder: SweepFolder, search: Search) -> int:
    """Runs the first waiting trial in this process, or in one of its own if the sweep isolates them."""
    with plain_output(), claim(folder, search) as (claimed, lock):
        assert claimed is not None
        return run_trial(folder, search, claimed, lock)


ENDS: dict[str, tuple[str, float | None, str, int]] = {
    # state, objective, reason, exit code of a warm worker
    "finish": ("finished", 0.5, "", 0),
    "diverge": ("diverged", 2.0, "", 0),
    "stop": ("stopped", 0.75, "", 0),
    "crash": ("failed", None, "RuntimeError: no such luck", EXIT_CRASHED),
    "exit": ("failed", None, "given up", EXIT_CRASHED),
    "text": ("failed", None, "said why", EXIT_CRASHED),
    "usage": ("failed", None, "eva train: error: lr_max must be a number", 0),
    "memory": ("failed", None, "MemoryError", EXIT_CRASHED),
    "nothing": ("failed", None, "ended with exit code 0, but left no result", EXIT_CRASHED),
}


@pytest.mark.parametrize("isolate", [False, True], ids=["warm", "isolated"])
def test_every_way_to_end_is_told_apart(tmp_path: Path, isolate: bool) -> None:
    """With the reason of a failure; a warm worker whose trial crashed ends, an isolated one goes on."""
    folder, search = begin(tmp_path, *ENDS, isolate=isolate)
    codes = [run_next(folder, search) for _ in ENDS]
    records = search.records()
    for record, (do, (state, value, reason, _)) in zip(records, ENDS.items(), strict=True):
        assert (record.state, record.objective, record.reason) == (state, value, reason), do
        assert record.seconds is not None and 0 < record.seconds < 60
    assert codes == [0 if isolate else code for _, _, _, code in ENDS.values()]
    assert begun(folder) == list(range(len(ENDS)))
    assert records[0].curve == (1.0, 0.5)
    assert search.waiting() == [] and search.running() == {}
    with claim(folder, search) as (claimed, lock):
        assert claimed is None and lock == -1


@pytest.mark.parametrize("isolate", [False, True], ids=["warm", "isolated"])
def test_a_trial_is_told_what_an_agent_would_tell_it(tmp_path: Path, isolate: bool) -> None:
    """Flags and JSON file with constants, names with dots and groups as mappings; its run's id, group and folder."""
    parameters: dict[str, Any] = {
        "lr": {"value": 1.0e-3},
        "on": {"value": True},
        "dotted.name": {"value": 1},
        "group": {"parameters": {"inner": {"values": [7]}, "deep": {"parameters": {"x": {"value": None}}}}},
    }
    folder, search = begin(tmp_path, "finish", isolate=isolate, **parameters)
    assert run_next(folder, search) == 0
    seen = facts(folder, 0)
    given = {"do": "finish", "lr": 0.001, "on": True, "dotted.name": 1, "group": {"deep": {"x": None}, "inner": 7}}
    assert seen["arguments"] == given
    assert list(seen["arguments"])[-1] == "group"
    assert sorted(seen["argv"][1:]) == sorted(f"--{name}={value}" for name, value in given.items())
    assert seen["argv"][0] == str(tmp_path / "program.py")
    assert json.loads((folder.path / "trials" / "trial-0000.json").read_text()) == given
    assert (seen["name"], seen["path"], seen["cwd"]) == ("__main__", str(tmp_path), os.getcwd())
    assert seen["group"] == folder.name
    assert seen["run_id"] == json.loads((folder.run_folder(0) / "summary.json").read_text())["wandb_id"]
    assert (seen["pid"] == os.getpid()) is not isolate
    assert (folder.path / "trials" / "trial-0000.log").read_text().startswith("trial begins\n")


def test_a_repeat_hands_over_its_seed(tmp_path: Path) -> None:
    """Although no parameter of the sweep is called so."""
    folder, search = begin(tmp_path, "finish")
    run_next(folder, search)
    search.repeat(0, seed=41)
    run_next(folder, search)
    assert facts(folder, 0)["arguments"] == {"do": "finish"}
    assert facts(folder, 1)["arguments"] == {"do": "finish", "seed": 41}
    assert "--seed=41" in facts(folder, 1)["argv"]


def test_what_a_trial_leaves_behind_in_its_process_is_put_right(tmp_path: Path) -> None:
    """Working directory, arguments, import path, output and the trial itself are the worker's own again."""
    folder, search = begin(tmp_path, "leak", "finish")
    before = os.getcwd(), list(sys.argv), list(sys.path), sys.stdout
    run_next(folder, search)
    assert (os.getcwd(), sys.argv, sys.path, sys.stdout) == before
    run_next(folder, search)
    assert facts(folder, 1)["cwd"] == before[0] and len(facts(folder, 1)["argv"]) == 2
    assert facts(folder, 1)["path"] == str(tmp_path)
    assert "no end of line" not in folder.log(1).read_text()


@pytest.mark.parametrize("do", ["kill", "abort"])
def test_a_process_of_its_own_that_a_signal_killed_is_gone_on_with_so_many_times(tmp_path: Path, do: str) -> None:
    """`retries` of them; then the trial has failed, and the reason says how it died."""
    folder, search = begin(tmp_path, do, isolate=True, retries=1)
    assert run_next(folder, search) == 0
    assert search.waiting() == [0]
    assert run_next(folder, search) == 0
    record = search.records()[0]
    name = {"kill": "SIGKILL", "abort": "SIGABRT"}[do]
    assert (record.state, record.reason) == ("failed", f"its process died 2 times, the last time killed by {name}")
    assert begun(folder) == [0, 0]


def test_a_process_of_its_own_that_ends_itself_without_a_word_has_failed(tmp_path: Path) -> None:
    """os._exit is the program's own doing."""
    folder, search = begin(tmp_path, "die", isolate=True)
    run_next(folder, search)
    assert search.records()[0].state == "failed"
    assert search.records()[0].reason == "trial begins"  # the last line that it printed


def test_a_run_that_was_through_is_not_run_again(tmp_path: Path) -> None:
    """Its process died between the run's end and the note of it."""
    folder, search = begin(tmp_path, "finish")
    run = folder.run_folder(0)
    run.mkdir()
    (run / "summary.json").write_text(json.dumps({"wandb_id": "x", "status": "finished"}))
    (run / "epochs.csv").write_text("epoch,loss\n1,0.5\n2,0.25\n3,nan\n")
    assert run_next(folder, search) == 0
    assert begun(folder) == []
    assert (search.records()[0].state, search.records()[0].objective) == ("finished", 0.25)


def test_what_an_attempt_left_that_cannot_be_gone_on_with_is_removed(tmp_path: Path) -> None:
    """A run folder without a state would be refused; one with a state is kept."""
    folder, search = begin(tmp_path, "finish", "finish1")
    for number in (0, 1):
        folder.run_folder(number).mkdir()
        (folder.run_folder(number) / "rest").touch()
    (folder.run_folder(1) / "state").mkdir()
    (folder.run_folder(1) / "state" / "000001-0.pt").touch()
    for number in (0, 1):
        run_next(folder, search)
        assert (folder.run_folder(number) / "rest").exists() is bool(number)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"status": "finished"}', "finished"),
        ('{"status": "stopped"}', "stopped"),
        ('{"status": "diverged"}', "diverged"),
        ('{"status": "running"}', None),
        ('{"status": "failed"}', None),
        ('{"status": "interrupted"}', None),
        ("[]", None),
        ("{", None),
        (None, None),
    ],
)
def test_a_run_is_through_if_its_summary_says_so(tmp_path: Path, text: str | None, status: str | None) -> None:
    """Any other, or none, is to be gone on with."""
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    assert ended_status(tmp_path) == status


def test_the_objective_is_the_last_finite_value(tmp_path: Path) -> None:
    """As W&B's search takes it."""
    assert objective(tmp_path, "loss") is None
    (tmp_path / "epochs.csv").write_text("epoch,loss,val/accuracy_best\n1,0.5,0.1\n2,0.25,0.2\n3,inf,0.3\n4,nan,0.4\n")
    assert objective(tmp_path, "loss") == 0.25
    assert objective(tmp_path, "val/accuracy_best") == 0.4
    assert objective(tmp_path, "other") is None


def test_an_attempt_that_died_counts_its_seconds(tmp_path: Path) -> None:
    """From its beginning to its last sign of life, not to when its death was found out; once for each attempt."""
    folder, search = begin(tmp_path, "finish")
    for attempt in (1, 2):
        assert search.claim(0, folder.place)
        folder.log(0).touch()
        os.utime(folder.log(0), (0, time.time() + 50))
        assert revive(folder, search, 0, True, "by itself") == (attempt == 1)
        [trial] = search.records()
        assert trial.seconds == pytest.approx(50 * attempt, abs=5)


# The command


def test_with_isolation_any_command_runs(tmp_path: Path) -> None:
    """Here one that sets a variable before, a shell, and one that isn't there."""
    command = ("${env}", "OMP_NUM_THREADS=7", *ARGUMENTS[1:])
    folder, search = begin(tmp_path, "finish", isolate=True, command=command)
    run_next(folder, search)
    assert search.records()[0].state == "finished"
    assert facts(folder, 0)["threads"] == "7"
    shell = ("bash", "-c", '"$@"; sleep 1', "bash", *ARGUMENTS[1:])  # which stays between the worker and the program
    folder, search = begin(tmp_path, "finish", isolate=True, command=shell, out="shell")
    run_next(folder, search)
    assert search.records()[0].state == "finished"
    folder, search = begin(tmp_path, "finish", isolate=True, command=("no-such-command", "${program}"), out="other")
    run_next(folder, search)
    record = search.records()[0]
    assert (record.state, record.reason) == ("failed", "cannot run 'no-such-command': No such file or directory")


# Output and signals


def test_everything_that_is_printed_meanwhile_goes_to_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By Python, by native code and by children; before and after it goes where it went."""
    with open(tmp_path / "log", "wb") as log, plain_output():
        print("before")
        with redirected(log.fileno()):
            print("python")
            print("error", file=sys.stderr)
            os.write(1, b"native\n")
            subprocess.run(["echo", "child"], check=True)
        print("after")
    assert sorted((tmp_path / "log").read_text().split()) == ["child", "error", "native", "python"]
    assert capfd.readouterr().out.split() == ["before", "after"]


def test_an_interrupted_program_is_no_crash(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """KeyboardInterrupt has the exit code that shells give it."""
    (tmp_path / "program.py").write_text("raise KeyboardInterrupt")
    assert run_here([str(tmp_path / "program.py")]) == EXIT_INTERRUPTED
    assert run_here([str(tmp_path / "absent.py")]) == 1
    assert "absent.py" in capfd.readouterr().err


ON_SIGTERM = {
    "signal.SIG_DFL": EXIT_INTERRUPTED,  # killed before it could catch it
    "lambda *_: sys.exit(130)": 130,
    "lambda *_: sys.exit(1)": EXIT_INTERRUPTED,  # the signal met it where it could not bear it
    "lambda *_: sys.exit(0)": 0,
    "lambda *_: os.kill(os.getpid(), 9)": -9,
}


@pytest.mark.parametrize("handler", ON_SIGTERM)
def test_a_wish_to_stop_is_passed_on_once(tmp_path: Path, handler: str) -> None:
    """What the child makes of it counts; one that failed over it, or died of it, was interrupted. Handlers return."""
    before = signal.getsignal(signal.SIGTERM)

    def ask() -> None:
        wait_until(lambda: (tmp_path / "log").read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    program = f"import os, signal, sys, time; signal.signal(15, {handler}); print('x', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program]
    with open(tmp_path / "log", "wb") as log, open(tmp_path / "lock", "wb") as lock:
        thread = threading.Thread(target=ask)
        thread.start()
        assert run_apart(command, dict(os.environ), log.fileno(), lock.fileno()) == ON_SIGTERM[handler]
        thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_trial_waits_again_and_its_seconds_count(tmp_path: Path) -> None:
    """Nobody's death; the attempts' times are added up."""
    folder, search = begin(tmp_path, "wait", isolate=True)

    def ask() -> None:
        wait_until((folder.run_folder(0) / "waits").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert run_next(folder, search) == EXIT_INTERRUPTED
    thread.join()
    assert search.waiting() == [0]
    spent = search.records()[0].seconds
    assert spent is not None and spent > 0
    (folder.path / "trials" / "go").touch()
    assert run_next(folder, search) == 0
    total = search.records()[0].seconds
    assert total is not None and total > spent
    assert search.give_back(0) == 0  # deaths


def test_a_death_that_the_trial_may_have_caused_counts(tmp_path: Path) -> None:
    """Any other leaves it waiting for ever."""
    folder, search = begin(tmp_path, "finish", retries=1)
    answers = []
    for blamed in (False, True, False, True):
        search.claim(0, "here")
        answers.append(revive(folder, search, 0, blamed, "of old age"))
    assert answers == [True, True, True, False]
    assert search.records()[0].reason == "its process died 2 times, the last time of old age"


@pytest.mark.parametrize("needed", [True, False])
def test_a_running_trial_beats_where_others_cannot_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: bool
) -> None:
    """As long as it runs."""
    monkeypatch.setattr(sweep_worker, "BEAT_SECONDS", 0.02)
    folder, search = begin(tmp_path, "finish")
    search.claim(0, "here")
    before = search.running()[0][1]
    other = folder.open_search()
    with beating(search, 0, needed):
        if needed:
            wait_until(lambda: other.running()[0][1] >= before + 3)
        else:
            time.sleep(0.2)
    after = other.running()[0][1]
    assert (after > before) is needed
    time.sleep(0.1)
    assert other.running()[0][1] == after
