"""The trial that a process runs: whom it tells, where it goes on, and that it ends with its parent."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL_RUN
from made_sweeps import begin, wait_until

from eva import trial as trials
from eva.config import Failure, Layer, RunConfig, resolve, to_dict
from eva.experiment import StopSignal, build, in_trial, split_once, train
from eva.run_folder import write_config
from eva.trial import Trial, current_trial, reporter, running


def make_config(**settings: Any) -> RunConfig:
    return resolve([Layer("test", {**SMALL_RUN, "tracking": "disabled", **settings})])[0]


def make_trial(folder: Path, report: Any = lambda row: False) -> Trial:
    return Trial(folder=folder, run_id="abcd1234", group="the sweep", arguments={}, report=report)


def test_a_process_runs_a_trial_only_within_it(tmp_path: Path) -> None:
    """Also after an exception."""
    assert current_trial() is None
    trial = make_trial(tmp_path)
    with running(trial):
        assert current_trial() is trial
    assert current_trial() is None
    with pytest.raises(ZeroDivisionError, match="division"), running(trial):
        1 / 0  # noqa: B018
    assert current_trial() is None


def test_a_process_of_its_own_learns_its_trial_from_the_environment(tmp_path: Path) -> None:
    """What it reports reaches the sweep's storage."""
    folder, search = begin(tmp_path, "finish")
    search.claim(0, folder.place)
    told = {
        "sweep": str(folder.path),
        "number": 0,
        "run_id": "abcd1234",
        "arguments": {"a": [1]},
        "parent": os.getpid(),
    }
    program = (
        "import json; from eva.trial import current_trial as t; t().report({'epoch': 3, 'loss': 0.5});"
        "assert t() is t(); print(json.dumps([str(t().folder), t().run_id, t().group, t().arguments]))"
    )
    environment = {**os.environ, trials.VARIABLE: json.dumps(told)}
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout) == [str(folder.run_folder(0)), "abcd1234", folder.name, {"a": [1]}]
    assert search.records()[0].curve == (0.5,)


def test_the_sweeps_metric_is_reported_where_a_row_has_it() -> None:
    """With its epoch; the verdict is passed on, and is no for a row without the metric."""
    told: list[tuple[int, int, float]] = []

    def report(number: int, epoch: int, value: float) -> bool:
        told.append((number, epoch, value))
        return epoch == 2

    tell = reporter(7, "val/loss", report)
    rows: list[Mapping[str, Any]] = [
        {"epoch": 1, "val/loss": 0.5, "val/accuracy": 1.0},
        {"epoch": 2, "val/loss": 0.25},
        {"epoch": 3, "val/accuracy": 1.0},
    ]
    assert [tell(row) for row in rows] == [False, True, False]
    assert told == [(7, 1, 0.5), (7, 2, 0.25)]


FOLLOWER = """
import os, signal, sys, time
from eva.trial import follow_parent
def ended(number, frame):
    open(sys.argv[1], "w").write("SIGTERM")
    os._exit(0)
signal.signal(signal.SIGTERM, ended)
follow_parent(int(sys.argv[2]) if sys.argv[2:] else os.getppid())
open(sys.argv[1], "w").write("follows")
time.sleep(60)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def test_a_process_ends_as_by_sigterm_once_its_parent_is_killed(tmp_path: Path) -> None:
    """It is told nothing: nobody is left to tell it."""
    path = tmp_path / "said"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, FOLLOWER, str(path)])
    wait_until(lambda: path.exists() and path.read_text() == "follows")
    parent.kill()
    parent.wait()
    wait_until(lambda: path.read_text() == "SIGTERM", 10)


def test_a_process_ends_if_its_parent_was_dead_before_it_began(tmp_path: Path) -> None:
    """A worker takes seconds to begin. The parent here is a process that has ended."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = tmp_path / "said"
    subprocess.run([sys.executable, "-c", FOLLOWER, str(path), str(dead.pid)], check=True, timeout=30)
    assert path.read_text() == "SIGTERM"


# A run within a trial


def test_a_trial_that_begins_goes_to_its_own_folder_and_group_offline(tmp_path: Path) -> None:
    """A group and a tracking that were chosen stay; nothing else changes."""
    trial = make_trial(tmp_path / "run")
    config, resume = in_trial(make_config(tracking="auto", out="elsewhere"), trial)
    assert resume is None
    assert (config.out, config.group, config.tracking) == (str(tmp_path / "run"), "the sweep", "offline")
    chosen, _ = in_trial(make_config(group="mine", tracking="disabled"), trial)
    assert (chosen.group, chosen.tracking) == ("mine", "disabled")
    same = {"out": None, "group": None, "tracking": "auto"}
    assert {**to_dict(config), **same} == to_dict(make_config(**same))


def test_a_trial_with_a_state_goes_on_with_the_configuration_that_it_began_with(tmp_path: Path) -> None:
    """Rates that its range test found, for one."""
    begun_with = make_config(lr_max=0.125, out=str(tmp_path))
    write_config(tmp_path, begun_with)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "000001-0.pt").touch()
    assert in_trial(make_config(lr_max=0.5), make_trial(tmp_path)) == (begun_with, tmp_path)


def test_trials_of_a_process_share_their_data_and_change_nothing_in_them(tmp_path: Path) -> None:
    """The second one loads nothing; what they train on is what a run alone trains on."""
    alone = build(make_config())
    before = [split.as_array().copy() for split in alone.splits.values()]
    split_once.cache_clear()
    shared = []
    for number, seed in enumerate((0, 1)):
        with running(make_trial(tmp_path / str(number))):
            train(make_config(seed=seed, epochs=1, peak_epoch=0.5))
            shared.append(build(make_config()))
    assert split_once.cache_info().misses == 1
    assert shared[0].dataset is shared[1].dataset
    for parts in shared:
        assert (parts.mean, parts.std) == (alone.mean, alone.std)
        for split, images in zip(parts.splits.values(), before, strict=True):
            assert np.array_equal(split.images, images)
    split_once.cache_clear()


def test_a_verdict_ends_a_trial_early_and_not_at_its_last_epoch(tmp_path: Path) -> None:
    """A run that is through is finished whatever the sweep says of it."""
    for at, status, epochs in ((1, "stopped", 1), (2, "finished", 2)):
        folder = tmp_path / str(at)
        with running(make_trial(folder, lambda row, at=at: row["epoch"] == at)):
            result = train(make_config())
        assert (result.status, result.summary["epochs"]) == (status, epochs)
        assert ("test_loss_best" in result.summary) == (status == "finished")
        assert (folder / "best.safetensors").exists()


def test_a_sweep_hears_of_every_epoch_also_of_that_in_whose_report_a_process_died(tmp_path: Path) -> None:
    """An epoch counts as done only once the sweep knows its value: hyperband counts values."""
    heard: list[int] = []

    def dying(row: Mapping[str, Any]) -> bool:
        if row["epoch"] == 2:
            raise ConnectionError("the storage is away")
        heard.append(row["epoch"])
        return False

    with (
        pytest.raises(Failure, match="ConnectionError: the storage is away"),
        running(make_trial(tmp_path / "run", dying)),
    ):
        train(make_config(epochs=3))

    def report(row: Mapping[str, Any]) -> bool:
        heard.append(row["epoch"])
        return False

    with running(make_trial(tmp_path / "run", report)):
        result = train(make_config(epochs=3))
    assert (result.status, heard) == ("finished", [1, 2, 3])
    steps = [line.split(",")[0] for line in (tmp_path / "run" / "history.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(9)]


@pytest.mark.parametrize(
    ("number", "agent", "counts"),
    [(signal.SIGTERM, True, True), (signal.SIGINT, True, False), (signal.SIGTERM, False, False), (None, True, False)],
)
def test_only_an_agents_sigterm_makes_an_interrupted_run_a_result(
    monkeypatch: pytest.MonkeyPatch, number: int | None, agent: bool, counts: bool
) -> None:
    """It is how W&B stops a trial early."""
    if agent:
        monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    stop = StopSignal()
    stop.number = number
    assert stop.by_agent() is counts
    assert stop() is (number is not None)
