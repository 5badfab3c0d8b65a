"""`eva agent`: an agent for each GPU, which sees no other one; signals reach all of them, and nothing stays behind."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
from conftest import BIN, FAKE_KEY
from loopback import LoopbackServer
from loopback_client import Search, Started, begin_search, until

from eva.agents import run_agents
from eva.config import UserError

# A trial without eva and W&B: tells what it sees, and waits for as many trials as its arguments say.
TRIAL = """
import os, pathlib, signal, sys, time
folder, run_id = pathlib.Path("trials"), os.environ["WANDB_RUN_ID"]
folder.mkdir(exist_ok=True)
def note(what, text):
    (folder / "written").with_suffix("." + run_id).write_text(text)
    (folder / "written").with_suffix("." + run_id).rename(folder / f"{run_id}.{what}")
signals = []
def hear(*_):  # a signal may come while the one before it is being noted
    signals.append(0)
    for number in range(len(signals)):
        (folder / f"{run_id}.signal{number + 1}").touch()
signal.signal(signal.SIGTERM, hear)
note("gpu", os.environ["CUDA_VISIBLE_DEVICES"])
note("python", sys.prefix)
together, enough = (int(argument.partition("=")[2]) for argument in sys.argv[1:])
while len(list(folder.glob("*.gpu"))) < together or len(signals) < enough:
    time.sleep(0.05)
print("a trial ends")
"""


@dataclass(frozen=True)
class Done:
    """What `run_agents` came to in processes of its own.

    Attributes:
        search: Two GPUs, a trial each, which end once both have begun.
        ended: SIGTERM came once; the trials end at the first one.
        insisted: SIGTERM came twice; the trials end at the second one.
        doubled: What these trials had noted of a second signal when there was only one.
        unknown: There is no such sweep.
    """

    search: Search
    ended: Search
    insisted: Search
    doubled: dict[str, str]
    unknown: Started


def start(search: Search, gpus: list[str], sweep: str | None = None) -> Started:
    """Calls `run_agents` in a process of its own, whose `python` is not that of eva."""
    call = f"import sys; from eva.agents import run_agents; sys.exit(run_agents({sweep or search.path!r}, {gpus}))"
    path = search.environment["PATH"].removeprefix(f"{BIN}:")
    return search.start(sys.executable, "-c", call, PATH=path)


@pytest.fixture(scope="module")
def done(
    loopback: LoopbackServer, clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Done]:
    """All of them, run at the same time."""

    def begin(name: str, signals: int, trials: int) -> Search:
        folder = tmp_path_factory.mktemp(name)
        (folder / "trial.py").write_text(TRIAL)
        plan = [{"together": 2, "wait": signals}] * trials
        settings = {"project": "gpus", "program": "trial.py", "method": "random", "parameters": {"wait": {"value": 0}}}
        return begin_search(loopback, folder, clean_environment, plan, **settings)

    search, ended, insisted = begin("search", 0, 2), begin("ended", 1, 3), begin("insisted", 2, 3)
    try:
        for one in (search, ended, insisted):
            start(one, ["0", "GPU-8f6b"])
        unknown = start(search, ["0"], "loopback/gpus/none")
        for one in (ended, insisted):
            until(partial(both_noted, one, "gpu"))
            os.killpg(one.started[0].process.pid, signal.SIGTERM)
        until(partial(both_noted, insisted, "signal1"))
        time.sleep(1)  # a signal that came twice would be noted by now
        doubled = noted(insisted, "signal2")
        os.killpg(insisted.started[0].process.pid, signal.SIGTERM)
        for one in (search, ended, insisted):
            one.wait()
        yield Done(search, ended, insisted, doubled, unknown)
    finally:
        for one in (search, ended, insisted):
            one.kill()


def both_noted(search: Search, what: str) -> bool:
    """Tells whether both trials of a search wrote something down."""
    return len(noted(search, what)) == 2


def noted(search: Search, what: str) -> dict[str, str]:
    """Returns what the trials of a search wrote down, by run id."""
    return {path.stem: path.read_text() for path in (search.folder / "trials").glob(f"*.{what}")}


def test_each_agent_has_its_own_gpu(done: Done) -> None:
    agents = {trial.run_id: trial.agent for trial in done.search.sweep.trials}
    gpus = noted(done.search, "gpu")
    assert gpus.keys() == agents.keys() and sorted(gpus.values()) == ["0", "GPU-8f6b"]
    assert len(set(agents.values())) == 2
    assert done.search.started[0].process.returncode == 0


def test_trials_run_in_the_environment_of_eva(done: Done) -> None:
    assert set(noted(done.search, "python").values()) == {sys.prefix}


def test_every_line_says_whose_it_is(done: Done) -> None:
    lines = done.search.started[0].said.splitlines()
    assert all(line.startswith(("gpu 0: ", "gpu GPU-8f6b: ")) for line in lines)
    assert sorted(line for line in lines if line.endswith("a trial ends")) == [
        "gpu 0: a trial ends",
        "gpu GPU-8f6b: a trial ends",
    ]


def test_one_signal_reaches_every_trial_once(done: Done) -> None:
    assert len(noted(done.ended, "signal1")) == 2 and not noted(done.ended, "signal2")
    assert done.ended.started[0].said.count("a trial ends") == 2
    assert done.ended.started[0].process.returncode == 0
    assert len(done.ended.sweep.trials) == 2  # the third one was not asked for any more


def test_a_second_signal_reaches_trials_that_go_on(done: Done) -> None:
    assert not done.doubled
    assert len(noted(done.insisted, "signal2")) == 2
    assert done.insisted.started[0].said.count("a trial ends") == 2


def test_nothing_stays_behind(done: Done) -> None:
    assert done.search.processes() | done.ended.processes() | done.insisted.processes() == set()
    assert done.search.server.unknown == []


def test_an_agent_that_fails_is_told_by_the_exit_code(done: Done) -> None:
    assert done.unknown.process.returncode == 1
    assert re.search(r"^gpu 0: .*not found", done.unknown.said, re.MULTILINE)


def test_all_mistakes_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    with pytest.raises(UserError, match="sweep must be ENTITY/PROJECT/SWEEP") as told:
        run_agents("a/b/c/d", ["0", "x", "-1", "01", "0"], count=0)
    assert str(told.value).splitlines()[1:] == [
        *(
            f"a GPU must be a number from 0 on, or a UUID (GPU-..., MIG-...), but got {gpu!r}"
            for gpu in ("x", "-1", "01")
        ),
        "each GPU takes one agent, but '0' is there twice",
        "count must be at least 1, but got 0",
    ]


@pytest.mark.parametrize("sweep", ["", "--help", "a//c", "a/b:c/d", "e/p/s\n", "/p/s", "e/-p/s"])
def test_what_names_no_sweep_is_refused(sweep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    with pytest.raises(UserError, match="sweep must be ENTITY/PROJECT/SWEEP") as told:
        run_agents(sweep, [])
    assert str(told.value).endswith("\ngpus must name at least one GPU, e.g. --gpus=0,1")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": FAKE_KEY}, "WANDB_MODE=offline is set"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": FAKE_KEY}, "WANDB_MODE=disabled is set"),
        ({}, "no account is set up here"),
        ({"WANDB_MODE": "online"}, "no account is set up here"),
    ],
)
def test_offline_the_way_to_go_is_told(variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"need W&B online, but {reason}.*; `eva sweep FILE.yaml` runs a sweep offline"):
        run_agents("e/p/s", ["0"])
