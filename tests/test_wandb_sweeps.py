"""The real `wandb sweep` and `wandb agent` search with eva: trials run once, get what they were given, end in order.

All agents run at the same time, each sweep in a folder of its own that is its home too.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL_RUN
from loopback import LoopbackServer
from loopback_client import Search, begin_search, until
from loopback_records import ENTITY
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from eva.cli import build_parser, configure
from eva.config import RunConfig, UserError
from eva.records import read_columns

PROJECT = "sweeps of eva"
TRAIN = Path(__file__).parents[1] / "runners" / "train.py"

# One value of each type that a setting may have.
TYPED: dict[str, Any] = {
    **{"nesterov": False, "deterministic": True, "weight_decay": 1e-05, "grad_clip": None, "ema_decay": 0.5},
    **{"lr_steps": [1, 1.5], "tags": ["a b", "c"], "policy": "crop_flip_cutout", "policy_options": {"cutout": 8}},
}
# Runs the script that the sweep names, and writes down its exit code: nobody else hears of it.
RECORDER = """
import os, pathlib, runpy, sys
sys.argv = sys.argv[1:]
code = "none"
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = str(end.code)
    raise
finally:
    pathlib.Path("code-" + os.environ["WANDB_RUN_ID"]).write_text(code)
"""
ENDLESS = {**SMALL_RUN, "epochs": 100_000}


def parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as a sweep has them: nested groups, and constants."""
    return {
        name: {"parameters": parameters(value)} if isinstance(value, dict) else {"value": value}
        for name, value in values.items()
    }


@pytest.fixture(scope="module")
def make_search(
    loopback: LoopbackServer, clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Search]:
    """Makes a sweep, of a YAML in a folder of its own."""

    def make(name: str, plan: list[dict[str, Any]] | None = None, **config: Any) -> Search:
        folder = tmp_path_factory.mktemp(name)
        (folder / "record.py").write_text(RECORDER)
        return begin_search(
            loopback, folder, clean_environment, plan, name=name, project=PROJECT, program=str(TRAIN), **config
        )

    return make


@dataclass(frozen=True)
class Searches:
    """The sweeps of this file, after their agents ended.

    Attributes:
        grid: Two agents, a grid of four trials.
        ends: Two agents, a trial for each way to end.
        signalled: An agent that got SIGTERM in the middle of a trial.
        alive: The processes of `signalled` before the signal.
    """

    grid: Search
    ends: Search
    signalled: Search
    alive: set[int]


STOPPED, DIVERGED, IMPOSSIBLE, BROKEN = range(4)
ENDS: list[dict[str, Any]] = [
    ENDLESS,
    {**SMALL_RUN, "lr_max": 1e30},
    {**SMALL_RUN, "epochs": -1},
    # A range test that diverges at once: a mistake that shows only when W&B has begun.
    {**SMALL_RUN, "lr_max": "find", "find_lr_start": 1e20, "find_lr_end": 1e21, "find_lr_steps": 10},
]


@pytest.fixture(scope="module")
def searches(make_search: Callable[..., Search]) -> Iterator[Searches]:
    """All of them, run at the same time."""
    grid = make_search(
        "grid",
        method="grid",
        metric={"name": "val/accuracy_best", "goal": "maximize"},
        parameters={
            **parameters({**SMALL_RUN, **TYPED}),
            **{"seed": {"values": [0, 1]}, "nesterov": {"values": [True, False]}},
        },
    )
    ends = make_search(
        "ends",
        ENDS,
        method="random",
        parameters={"seed": {"values": [0]}},
        command=["${env}", "${interpreter}", "record.py", "${program}", "${args_no_hyphens}"],
    )
    ends.sweep.stops = lambda run: sum("val/accuracy_best" in row for row in run.history) >= 2
    signalled = make_search(
        "signalled",
        [ENDLESS, ENDLESS],
        method="random",
        parameters={"seed": {"values": [0]}},
        command=["${env}", "${interpreter}", "record.py", "${program}", "${args_no_equals}"],
    )
    try:
        for search in (grid, grid, ends, ends):
            search.start_agent()
        agent = signalled.start_agent("--forward-signals")
        trials = signalled.sweep.trials
        until(lambda: any("val/loss" in row for trial in trials for row in signalled.rows(trial.run_id)))
        alive = signalled.processes()
        agent.process.send_signal(signal.SIGTERM)
        for search in (signalled, grid, ends):
            search.wait()
        yield Searches(grid, ends, signalled, alive)
    finally:
        for search in (grid, ends, signalled):
            search.kill()


# Two agents on one grid


def test_every_trial_ran_once_with_its_own_parameters(searches: Searches) -> None:
    grid = searches.grid
    asked = [(trial.values["seed"], trial.values["nesterov"]) for trial in grid.sweep.trials]
    assert sorted(asked) == [(0, False), (0, True), (1, False), (1, True)]
    assert [agent.process.returncode for agent in grid.started] == [0, 0]
    assert len({trial.agent for trial in grid.sweep.trials}) == 2  # neither was idle all the time
    of_sweep = {run.id for run in grid.server.runs.values() if run.sweep == grid.sweep.id}
    assert of_sweep == {trial.run_id for trial in grid.sweep.trials}
    for trial in grid.sweep.trials:
        run = grid.began(trial.run_id)
        assert (run.state, run.exit_code, run.job_type) == ("finished", 0, "train")
        assert (run.config["seed"], run.config["nesterov"]) == (trial.values["seed"], trial.values["nesterov"])
        saved = yaml.safe_load((grid.folder / "runs" / run.id / "config.yaml").read_text())
        assert (saved["seed"], saved["nesterov"]) == (trial.values["seed"], trial.values["nesterov"])


def test_settings_arrive_with_their_types(searches: Searches) -> None:
    grid = searches.grid
    for trial in grid.sweep.trials:
        typed = {**TYPED, "nesterov": trial.values["nesterov"]}
        saved = yaml.safe_load((grid.folder / "runs" / trial.run_id / "config.yaml").read_text())
        assert repr({name: saved[name] for name in typed}) == repr({**typed, "lr_steps": [1.0, 1.5]})
        assert {name: saved[name] for name in SMALL_RUN} == {**SMALL_RUN, "policy": TYPED["policy"]}
        config = grid.began(trial.run_id).config
        assert {name: config[name] for name in typed} == typed


def test_every_batch_of_a_trial_has_its_row(searches: Searches) -> None:
    grid = searches.grid
    for trial in grid.sweep.trials:
        history = read_columns(grid.folder / "runs" / trial.run_id / "history.csv", [])
        rows = [row for row in grid.began(trial.run_id).history if "train/loss" in row]
        assert history["trainer/step"] == [row["trainer/step"] for row in rows] == list(range(6))
        assert history["train/loss"] == [row["train/loss"] for row in rows]
        best = [row["val/accuracy_best"] for row in grid.began(trial.run_id).history if "val/accuracy_best" in row]
        assert len(best) == SMALL_RUN["epochs"]


def uploaded_weights(search: Search, run_id: str) -> bytes:
    """Returns the bytes of the best weights that the server has of a run, which bear both aliases."""
    artifact = search.server.artifact(f"{ENTITY}/{PROJECT}/model-{run_id}:best")
    assert artifact.aliases == {"best", "latest"} and artifact.collection.type == "model"
    assert artifact.logged_by is search.run(run_id)
    return artifact.files["best.safetensors"]


def test_the_best_weights_of_a_trial_are_uploaded(searches: Searches) -> None:
    grid = searches.grid
    weights = {trial.run_id: uploaded_weights(grid, trial.run_id) for trial in grid.sweep.trials}
    for run_id, content in weights.items():
        assert content == (grid.folder / "runs" / run_id / "best.safetensors").read_bytes()
    assert len(set(weights.values())) == 4


# How a trial ends


def test_a_trial_that_the_server_stops_ends_in_order_and_keeps_its_checkpoint(searches: Searches) -> None:
    ends = searches.ends
    run_id = ends.sweep.trials[STOPPED].run_id
    run, summary = ends.began(run_id), ends.summary(run_id)
    assert ends.sweep.stopped == {run_id}
    assert (summary["status"], ends.code(run_id)) == ("stopped", "0")
    assert (run.state, run.exit_code, run.summary["status"]) == ("finished", 0, "stopped")
    assert 2 <= summary["epochs"] < ENDLESS["epochs"]
    assert uploaded_weights(ends, run_id) == (ends.folder / "runs" / run_id / "best.safetensors").read_bytes()
    best = [row["val/accuracy_best"] for row in run.history if "val/accuracy_best" in row]
    assert best[-1] == max(best) == summary["val_accuracy_best"]
    history = read_columns(ends.folder / "runs" / run_id / "history.csv", [])
    assert history["train/loss"] == [row["train/loss"] for row in run.history if "train/loss" in row]


def test_a_diverged_trial_is_a_result(searches: Searches) -> None:
    ends = searches.ends
    run_id = ends.sweep.trials[DIVERGED].run_id
    run = ends.began(run_id)
    assert (ends.summary(run_id)["status"], ends.code(run_id)) == ("diverged", "0")
    assert (run.state, run.exit_code, run.summary["status"]) == ("finished", 0, "diverged")


def test_an_impossible_trial_is_a_failure_that_w_and_b_never_hears_of(searches: Searches) -> None:
    run_id = searches.ends.sweep.trials[IMPOSSIBLE].run_id
    assert searches.ends.code(run_id) == "2"
    assert searches.ends.run(run_id) is None
    said = "".join(agent.said for agent in searches.ends.started)
    assert said.count("eva train: error: epochs must be at least 1, but got epochs=-1") == 1


def test_a_trial_that_breaks_off_is_a_failure(searches: Searches) -> None:
    ends = searches.ends
    run_id = ends.sweep.trials[BROKEN].run_id
    run = ends.began(run_id)
    assert (ends.summary(run_id)["status"], ends.code(run_id)) == ("failed", "2")
    assert (run.state, run.exit_code) == ("failed", 1)
    said = "".join(agent.said for agent in ends.started)
    assert said.count("the range test found no rate that lowers the loss") == 1


def test_sigterm_to_a_forwarding_agent_leaves_no_process_behind(searches: Searches) -> None:
    signalled = searches.signalled
    assert len(searches.alive) >= 4  # the agent, its trial, and wandb's own process of each
    assert signalled.processes() == set()
    [trial] = signalled.sweep.trials  # the second one was not asked for any more
    run = signalled.began(trial.run_id)
    assert (signalled.summary(trial.run_id)["status"], signalled.code(trial.run_id)) == ("stopped", "0")
    assert (run.state, run.exit_code) == ("finished", 0)
    assert uploaded_weights(signalled, trial.run_id)


def test_no_process_of_any_agent_is_left_and_nothing_unknown_was_asked(searches: Searches) -> None:
    assert searches.grid.processes() | searches.ends.processes() == set()
    assert searches.grid.server.unknown == []


# What arrives, under every macro of a sweep's `command`


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
