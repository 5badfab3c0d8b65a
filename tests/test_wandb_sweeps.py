"""The real `wandb sweep` and `wandb agent` search with eva: trials run once, get what they were given, end in order.

All agents run at the same time, each sweep in a folder of its own that is its home too.
"""

import math
import os
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL_RUN
from loopback import LoopbackServer
from loopback_client import Search, begin_search, begin_search_of, until
from loopback_records import ENTITY, Artifact, Run
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from eva.cli import build_parser, configure
from eva.config import RunConfig, UserError
from eva.records import read_columns

PROJECT = "sweeps of eva"
ROOT = Path(__file__).parents[1]

# One value of each type that a setting may have.
TYPED: dict[str, Any] = {
    **{"nesterov": False, "deterministic": True, "weight_decay": 1e-05, "grad_clip": None, "ema_decay": 0.5},
    **{"lr_steps": [1, 1.5], "tags": ["a b", "c"], "policy": "crop_flip_cutout", "policy_options": {"cutout": 8}},
}
# Runs the script that the sweep names, and writes down its process and its exit code: nobody else hears of them.
RECORDER = """
import os, pathlib, signal, subprocess, sys
def note(what, number):
    pathlib.Path(what + "-" + os.environ["WANDB_RUN_ID"]).write_text(str(number))
trial = subprocess.Popen([sys.executable, "-u", *sys.argv[1:]])
signal.signal(signal.SIGTERM, lambda number, frame: trial.send_signal(number))
note("process", trial.pid)
code = trial.wait()
note("code", code)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
# The files of a run folder that are uploaded, by the kind of the artifact.
UPLOADED = {
    "model": {"best.safetensors"},
    "predictions": {"predictions.npz", "evaluation.json"},
    "misclassified": {"misclassified.npz"},
}
ENDLESS = {**SMALL_RUN, "epochs": 100_000}
RANGE_TEST = {**SMALL_RUN, "lr_max": "find"}

# What is tried under each macro, one after the other by one agent. Three failures within a minute would end it.
PLANS: dict[str, list[dict[str, Any]]] = {
    "args": [
        {"name": "full disk", **ENDLESS, **TYPED},
        {"name": "endless range test", **RANGE_TEST, "find_lr_steps": 1_000_000},
    ],
    "args_no_equals": [{"name": "diverging", **SMALL_RUN, **TYPED, "lr_max": 1e30}, {"name": "none", "epochs": -1}],
    "args_no_hyphens": [{"name": "stopped", **ENDLESS, **TYPED}],
    "args_json": [
        {"name": "killed", **ENDLESS, **TYPED},
        # It diverges at once: a mistake that shows only when W&B has begun.
        {"name": "no range", **RANGE_TEST, "find_lr_start": 1e20, "find_lr_end": 1e21, "find_lr_steps": 10},
    ],
    "args_json_file": [{"name": "signalled", **ENDLESS, **TYPED}, {"name": "not asked for", **ENDLESS}],
}


@dataclass(frozen=True)
class Searches:
    """The sweeps of this file, after their agents ended.

    Attributes:
        smoke: Two agents on the sweep that ships.
        small: By macro, an agent that was given its plan.
        alive: By the name of a trial, the processes of its search before the agent got SIGTERM.
    """

    smoke: Search
    small: Mapping[str, Search]
    alive: dict[str, set[int]] = field(default_factory=dict)

    def given(self, name: str) -> list[tuple[Search, str]]:
        """Returns a trial of the plans as its search and its run's id; nothing while no agent was given it."""
        return [
            (search, trial.run_id)
            for search in self.small.values()
            for trial in search.sweep.trials
            if trial.values["name"] == name
        ]

    def trial(self, name: str) -> tuple[Search, str]:
        """Returns a trial of the plans that an agent was given once."""
        [trial] = self.given(name)
        return trial

    def trains(self, name: str) -> bool:
        """Tells whether the server has an epoch of a trial."""
        return any("val/loss" in row for search, run_id in self.given(name) for row in search.rows(run_id))

    def signal_agent(self, name: str) -> None:
        """Sends SIGTERM to the agent of a trial."""
        search, _ = self.trial(name)
        self.alive[name] = search.processes()
        search.started[0].process.send_signal(signal.SIGTERM)


def parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as a sweep has them: nested groups, and constants."""
    return {
        name: {"parameters": parameters(value)} if isinstance(value, dict) else {"value": value}
        for name, value in values.items()
    }


@pytest.fixture(scope="module")
def begun(
    loopback: LoopbackServer, clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Searches:
    """The sweeps, before there are agents."""
    folder = tmp_path_factory.mktemp("smoke")
    for name in ("sweeps", "runners"):
        (folder / name).symlink_to(ROOT / name)
    smoke = begin_search_of(loopback, folder, clean_environment, "sweeps/smoke.yaml")
    small = {}
    for macro, plan in PLANS.items():
        folder = tmp_path_factory.mktemp(macro)
        (folder / "record.py").write_text(RECORDER)
        small[macro] = begin_search(
            loopback,
            folder,
            clean_environment,
            list(plan),
            **{"project": PROJECT, "program": str(ROOT / "runners" / "train.py"), "method": "random"},
            parameters=parameters(plan[0]),
            command=["${env}", "${interpreter}", "record.py", "${program}", f"${{{macro}}}"],
        )
    small["args_no_hyphens"].sweep.stops = lambda run: sum("val/accuracy_best" in row for row in run.history) >= 2
    return Searches(smoke, small)


def fill_disk(search: Search, run_id: str) -> None:
    """Lets no file of a trial's process grow beyond a megabyte, which its weights do."""
    resource.prlimit(search.note("process", run_id), resource.RLIMIT_FSIZE, (10**6, 10**6))


@pytest.fixture(scope="module")
def searches(begun: Searches) -> Iterator[Searches]:
    """All of them, run at the same time, and what befell some trials."""
    range_test = begun.small["args"]
    # What happens to a trial, once something holds.
    events: list[tuple[Callable[[], bool], Callable[[], None]]] = [
        (lambda: begun.trains("full disk"), lambda: fill_disk(*begun.trial("full disk"))),
        (
            lambda: begun.trains("killed"),
            lambda: os.kill(begun.trial("killed")[0].note("process", begun.trial("killed")[1]), signal.SIGKILL),
        ),
        (lambda: begun.trains("signalled"), lambda: begun.signal_agent("signalled")),
        (
            lambda: "range test: 1000000 steps" in range_test.started[0].said,
            lambda: begun.signal_agent("endless range test"),
        ),
    ]

    def all_happened() -> bool:
        for event in [*events]:
            holds, happen = event
            if holds():
                happen()
                events.remove(event)
        return not events

    try:
        for search in (begun.smoke, begun.smoke, *begun.small.values()):
            search.start_agent("--forward-signals")
        until(all_happened)
        for search in (begun.smoke, *begun.small.values()):
            search.wait()
        yield begun
    finally:
        for search in (begun.smoke, *begun.small.values()):
            search.kill()


def logged(run: Run, key: str) -> list[Any]:
    """Returns what a run logged under a key, row by row."""
    return [row[key] for row in run.history if key in row]


def saved(search: Search, run_id: str) -> dict[str, Any]:
    """Returns the settings that a trial trained with, as it wrote them down."""
    settings: dict[str, Any] = yaml.safe_load((search.folder / "runs" / run_id / "config.yaml").read_text())
    return settings


def uploaded(search: Search, run_id: str, kind: str, alias: str) -> Artifact:
    """Returns an artifact that a run logged, whose files are to the byte those of the run folder."""
    artifact = search.server.artifact(f"{search.sweep.entity}/{search.sweep.project}/{kind}-{run_id}:{alias}")
    assert artifact.collection.type == kind and artifact.logged_by is search.run(run_id)
    for name in UPLOADED[kind]:
        assert artifact.files[name] == (search.folder / "runs" / run_id / name).read_bytes()
    return artifact


# Two agents on the sweep that ships


def test_every_trial_ran_once_with_its_own_parameters(searches: Searches) -> None:
    smoke = searches.smoke
    assert yaml.safe_load(smoke.sweep.config) == yaml.safe_load((ROOT / "sweeps" / "smoke.yaml").read_text())
    asked = [(trial.values["norm"], trial.values["seed"]) for trial in smoke.sweep.trials]
    assert sorted(asked) == [("batch", 0), ("batch", 1), ("layer", 0), ("layer", 1)]
    assert [agent.process.returncode for agent in smoke.started] == [0, 0]
    assert len({trial.agent for trial in smoke.sweep.trials}) == 2  # neither was idle all the time
    of_sweep = {run.id for run in smoke.server.runs.values() if run.sweep == smoke.sweep.id}
    assert of_sweep == {trial.run_id for trial in smoke.sweep.trials}
    for trial, values in zip(smoke.sweep.trials, asked, strict=True):
        run, settings = smoke.began(trial.run_id), saved(smoke, trial.run_id)
        assert (run.state, run.exit_code, run.job_type) == ("finished", 0, "train")
        assert (run.config["norm"], run.config["seed"]) == (settings["norm"], settings["seed"]) == values


def test_every_batch_of_a_trial_has_its_row_and_every_epoch_one_objective(searches: Searches) -> None:
    smoke = searches.smoke
    for trial in smoke.sweep.trials:
        history, run = read_columns(smoke.folder / "runs" / trial.run_id / "history.csv", []), smoke.began(trial.run_id)
        rows = [row for row in run.history if "train/loss" in row]
        batches = 4 * math.ceil(1295 / 64)  # epochs of the images that are no val
        assert history["trainer/step"] == [row["trainer/step"] for row in rows] == list(range(batches))
        assert history["train/loss"] == [row["train/loss"] for row in rows]
        best = logged(run, "val/accuracy_best")
        assert len(best) == 4 and best == sorted(best)
        assert best[-1] == run.summary["val/accuracy_best"] == smoke.summary(trial.run_id)["val_accuracy_best"]


def test_the_rates_that_a_trial_found_are_those_of_its_curve_its_training_and_its_summary(searches: Searches) -> None:
    smoke = searches.smoke
    for trial in smoke.sweep.trials:
        run, settings = smoke.began(trial.run_id), saved(smoke, trial.run_id)
        assert run.config["lr_min"] == run.config["lr_max"] == "find"  # nothing changes what a sweep says
        lr_min, lr_max = run.summary["lr_min"], run.summary["lr_max"]
        assert lr_max == pytest.approx(10 * lr_min)
        assert any(rate == pytest.approx(2 * lr_max) for rate in logged(run, "lr_range/lr"))
        assert max(logged(run, "lr")) == pytest.approx(lr_max)
        for told in (settings, smoke.summary(trial.run_id)):
            assert (told["lr_min"], told["lr_max"]) == (lr_min, lr_max)


def test_a_trial_uploads_its_artifacts_with_their_aliases(searches: Searches) -> None:
    smoke, weights = searches.smoke, set()
    for trial in smoke.sweep.trials:
        artifacts = {kind: uploaded(smoke, trial.run_id, kind, "latest") for kind in UPLOADED}
        aliases = {kind: artifact.aliases for kind, artifact in artifacts.items()}
        assert aliases == {"model": {"best", "latest"}, "predictions": {"latest"}, "misclassified": {"latest"}}
        assert "misclassified.table.json" in artifacts["misclassified"].files
        weights.add(artifacts["model"].files["best.safetensors"])
    assert len(weights) == 4


# What arrives


@pytest.mark.parametrize("name", ["full disk", "diverging", "stopped", "killed", "signalled"])
def test_settings_arrive_with_their_types(searches: Searches, name: str) -> None:
    search, run_id = searches.trial(name)
    [values] = [trial.values for trial in search.sweep.trials if trial.run_id == run_id]
    settings, config = saved(search, run_id), search.began(run_id).config
    assert repr({key: settings[key] for key in TYPED}) == repr({**TYPED, "lr_steps": [1.0, 1.5]})
    assert {key: settings[key] for key in values} == {key: config[key] for key in values} == values


# How a trial ends


def test_a_trial_that_the_server_stops_ends_in_order_and_keeps_its_checkpoint(searches: Searches) -> None:
    search, run_id = searches.trial("stopped")
    run, summary = search.began(run_id), search.summary(run_id)
    assert search.sweep.stopped == {run_id}
    assert (summary["status"], search.note("code", run_id)) == ("stopped", 0)
    assert (run.state, run.exit_code, run.summary["status"]) == ("finished", 0, "stopped")
    assert 2 <= summary["epochs"] < ENDLESS["epochs"]
    weights = uploaded(search, run_id, "model", "best")
    assert weights.aliases == {"best", "latest"} and {*weights.files} == {"best.safetensors"}
    best = logged(run, "val/accuracy_best")
    assert best[-1] == max(best) == summary["val_accuracy_best"]
    history = read_columns(search.folder / "runs" / run_id / "history.csv", [])
    assert history["train/loss"] == logged(run, "train/loss")


def test_a_diverged_trial_is_a_result(searches: Searches) -> None:
    search, run_id = searches.trial("diverging")
    run = search.began(run_id)
    assert (search.summary(run_id)["status"], search.note("code", run_id)) == ("diverged", 0)
    assert (run.state, run.exit_code, run.summary["status"]) == ("finished", 0, "diverged")


def test_an_impossible_trial_is_a_failure_that_w_and_b_never_hears_of(searches: Searches) -> None:
    search, run_id = searches.trial("none")
    assert search.note("code", run_id) == 2 and search.run(run_id) is None
    assert search.started[0].said.count("eva train: error: epochs must be at least 1, but got epochs=-1") == 1


def test_a_trial_that_breaks_off_is_a_failure(searches: Searches) -> None:
    search, run_id = searches.trial("no range")
    run = search.began(run_id)
    assert (search.summary(run_id)["status"], search.note("code", run_id)) == ("failed", 2)
    assert (run.state, run.exit_code) == ("failed", 1)
    assert search.started[0].said.count("the range test found no rate that lowers the loss") == 1


def test_a_trial_that_crashes_in_its_training_is_a_failure_and_its_agent_goes_on(searches: Searches) -> None:
    search, run_id = searches.trial("full disk")
    run = search.began(run_id)
    assert (search.summary(run_id)["status"], search.note("code", run_id)) == ("failed", 1)
    assert (run.state, run.exit_code, run.summary["status"]) == ("failed", 1, "failed")
    assert "(a bug: the traceback is in " in search.started[0].said
    assert "Traceback (most recent call last)" in (search.folder / "runs" / run_id / "log.txt").read_text()
    assert (ENTITY, PROJECT, f"model-{run_id}") not in search.server.artifacts
    assert [trial.values["name"] for trial in search.sweep.trials] == ["full disk", "endless range test"]


def test_a_killed_trial_never_ends_for_w_and_b_and_its_agent_goes_on(searches: Searches) -> None:
    search, run_id = searches.trial("killed")
    run = search.began(run_id)
    assert search.note("code", run_id) == -signal.SIGKILL
    assert (run.state, run.exit_code) == ("running", None)  # W&B's own service calls it crashed after a while
    history = read_columns(search.folder / "runs" / run_id / "history.csv", [])["train/loss"]
    arrived = logged(run, "train/loss")
    assert arrived == history[: len(arrived)]
    assert (ENTITY, PROJECT, f"model-{run_id}") not in search.server.artifacts
    assert [trial.values["name"] for trial in search.sweep.trials] == ["killed", "no range"]


@pytest.mark.parametrize("name", ["signalled", "endless range test"])
def test_sigterm_to_a_forwarding_agent_leaves_no_process_behind(searches: Searches, name: str) -> None:
    search, run_id = searches.trial(name)
    assert len(searches.alive[name]) >= 5  # the agent, what starts the trial, the trial, and wandb's own two
    assert search.processes() == set()
    assert search.sweep.trials[-1].run_id == run_id  # no other one was asked for any more
    assert search.started[0].process.returncode == 0


def test_a_trial_whose_agent_got_sigterm_has_what_it_reached_as_its_result(searches: Searches) -> None:
    search, run_id = searches.trial("signalled")
    run = search.began(run_id)
    assert (search.summary(run_id)["status"], search.note("code", run_id)) == ("stopped", 0)
    assert (run.state, run.exit_code) == ("finished", 0)
    assert uploaded(search, run_id, "model", "best").aliases == {"best", "latest"}


def test_sigterm_before_the_training_interrupts_a_trial_and_ends_its_run(searches: Searches) -> None:
    search, run_id = searches.trial("endless range test")
    run = search.began(run_id)
    assert (search.summary(run_id)["status"], search.note("code", run_id)) == ("interrupted", 130)
    assert (run.state, run.exit_code, run.summary["status"]) == ("failed", 1, "interrupted")
    assert not logged(run, "lr_range/lr")


def test_no_process_of_any_agent_is_left_and_nothing_unknown_was_asked(searches: Searches) -> None:
    for search in (searches.smoke, *searches.small.values()):
        assert search.processes() == set()
    assert searches.smoke.server.unknown == []


# What the parser makes of every macro of a sweep's `command`


def command_line(macro: str, values: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns the arguments that `wandb agent` makes of a macro; it fills in the list items as is done here."""
    made = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    path = folder / "config.json"
    path.write_text(made["args_json"][0])
    made["args_json_file"] = [str(path)]
    [item] = create_sweep_command([macro])
    items: list[str] = made[item[2:-1]]
    return items


def parsed(arguments: list[str]) -> RunConfig:
    """Returns the configuration that `eva train` makes of its arguments."""
    return configure(*build_parser().parse_known_args(["train", *arguments]))[0]


MACROS = ("args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags", "args_json", "args_json_file")


@pytest.mark.parametrize("macro", MACROS)
@pytest.mark.parametrize("nested", [True, False])
def test_every_type_arrives_under_every_macro(macro: str, nested: bool, tmp_path: Path) -> None:
    values = {"lr_max": "find", "name": "1e-5", "val_fraction": 0.25, "epochs": 30, **TYPED}
    if not nested:
        del values["policy_options"]
        values["policy_options.cutout"] = 8
    # A false boolean is left out by this macro: it cannot arrive.
    absent = {"nesterov"} if macro == "args_no_boolean_flags" else set()
    wanted: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name not in absent
    }
    wanted.pop("policy_options.cutout", None)
    assert parsed(command_line(f"${{{macro}}}", values, tmp_path)) == RunConfig(
        **{**wanted, "policy_options": {"cutout": 8}}
    )


@pytest.mark.parametrize("macro", MACROS)
def test_a_misspelt_setting_is_told_under_every_macro(macro: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown setting 'lr_maxx'; did you mean 'lr_max'"):
        parsed(command_line(f"${{{macro}}}", {"lr_maxx": 0.1, "seed": 1}, tmp_path))
