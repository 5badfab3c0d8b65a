"""An offline sweep's runs reach W&B with all that they hold, once, and lie in one W&B sweep that agents can go on with.

eva and wandb run in a process of their own, which calls the first functions of this file.
"""

import contextlib
import io
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BIN, FAKE_KEY, SMALL_RUN, flags
from loopback import LoopbackServer, Refusal
from loopback_records import ENTITY, Json, Run, Sweep

from eva.cli import main
from eva.config import UserError
from eva.records import read_columns
from eva.sweep_file import read_sweep
from eva.sweep_publish import publish

PROJECT = "published sweeps"
TRAIN = Path(__file__).parents[1] / "runners" / "train.py"
SEEDS = range(5)
SWEEP: dict[str, Any] = {
    **{"program": "train.py", "method": "grid", "metric": {"name": "val/accuracy_best", "goal": "maximize"}},
    "parameters": {**{name: {"value": value} for name, value in SMALL_RUN.items()}, "seed": {"values": [*SEEDS]}},
}


class Interrupting(io.StringIO):
    """Text that interrupts this process, as Ctrl-C does, when the first epoch is told in it."""

    told = False

    def write(self, text: str) -> int:
        if "epoch 1/" in text and not self.told:
            self.told = True
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def train(folder: Path, seed: int, interrupted: bool = False) -> None:
    """Trains a trial offline; one that is interrupted is gone on with."""
    out = Interrupting() if interrupted else io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["train", *flags({**SMALL_RUN, "seed": seed, "tracking": "offline", "out": folder})])
        assert code == (130 if interrupted else 0)
        assert not interrupted or main(["train", "--resume", str(folder)]) == 0


def publish_folder(folder: Path, trials: Mapping[str, Path], project: str | None = None) -> list[str]:
    """Publishes trials, and returns the lines."""
    return publish(folder, read_sweep(folder / "sweep.yaml"), trials, project)


@dataclass(frozen=True)
class Published:
    """A sweep of five seeds that was published again and again.

    Attributes:
        trials: Run folders by name: whole, resumed after a kill (two W&B folders), cut off by a kill, late, none.
        refused: What was said at the first call, when W&B made no sweep.
        first: The lines of the next call, with all but `late`.
        plan: What agents were to be given then.
        again: The lines of a call with the same trials.
        asked: What this call asked W&B.
        kept_out: The lines of a call with `late`, when W&B did not take it into the sweep.
        last: The lines of a call when it did.
    """

    server: LoopbackServer
    folder: Path
    trials: Mapping[str, Path]
    refused: str
    first: list[str]
    plan: list[Json]
    again: list[str]
    asked: list[str]
    kept_out: list[str]
    last: list[str]

    @property
    def sweep(self) -> Sweep:
        """The only sweep of the project."""
        [sweep] = [sweep for key, sweep in self.server.sweeps.items() if key[:2] == (ENTITY, PROJECT)]
        return sweep

    def run(self, name: str) -> Run:
        """Returns what the server has of a trial."""
        return self.server.runs[ENTITY, PROJECT, self.summary(name)["wandb_id"]]

    def summary(self, name: str) -> dict[str, Any]:
        """Returns the summary in a trial's folder."""
        values: dict[str, Any] = json.loads((self.trials[name] / "summary.json").read_text())
        return values


@contextlib.contextmanager
def refusing(server: LoopbackServer) -> Iterator[None]:
    """Makes the server refuse to make or to change a sweep."""
    handler = server.operations["UpsertSweep"]

    def refuse(variables: Json) -> Json:
        raise Refusal("no more sweeps here")

    server.operations["UpsertSweep"] = refuse
    yield
    server.operations["UpsertSweep"] = handler


@pytest.fixture(scope="module")
def call(
    loopback: LoopbackServer, clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Any]]:
    """Calls a function in the process, whose environment says that W&B is offline, as that of the trials did."""
    folder = tmp_path_factory.mktemp("client")
    environment = {**clean_environment, **loopback.environment(), "HOME": str(folder)}
    environment |= {"WANDB_PROJECT": PROJECT, "WANDB_MODE": "offline"}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), os.chdir, (str(folder),)) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - environment.keys():
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(os.getcwd).result()  # it starts now
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=600)


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep's folder, its YAML in it."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    return folder


@pytest.fixture(scope="module")
def published(loopback: LoopbackServer, call: Callable[..., Any], sweep_folder: Path) -> Published:
    """The sweep, made and published."""
    trials = {name: sweep_folder / "trials" / name for name in ("whole", "resumed", "cut", "late", "none")}
    for seed, (name, folder) in enumerate(trials.items()):
        if name != "none":
            call(train, folder, seed, name == "resumed")
    # As a killed process leaves the file: of `resumed` it is that of the first part.
    for name, size in {"resumed": 20, "cut": 1000}.items():
        log = min((trials[name] / "wandb").glob("offline-run-*/*.wandb"))
        log.write_bytes(log.read_bytes()[:-size])
    early = {name: folder for name, folder in trials.items() if name != "late"}

    def sweeps() -> list[Sweep]:
        return [sweep for key, sweep in loopback.sweeps.items() if key[:2] == (ENTITY, PROJECT)]

    with refusing(loopback), pytest.raises(UserError, match="W&B made no sweep") as refused:
        call(publish_folder, sweep_folder, early)
    assert not sweeps()
    first = call(publish_folder, sweep_folder, early, PROJECT)
    plan = list(sweeps()[0].plan)
    asked = len(loopback.asked)
    again = call(publish_folder, sweep_folder, early, f"{ENTITY}/{PROJECT}")
    since = loopback.asked[asked:]
    with refusing(loopback):
        kept_out = call(publish_folder, sweep_folder, trials)
    last = call(publish_folder, sweep_folder, trials)
    return Published(loopback, sweep_folder, trials, str(refused.value), first, plan, again, since, kept_out, last)


@pytest.mark.parametrize("name", ["whole", "resumed", "late"])
def test_a_run_arrives_with_all_that_it_holds(published: Published, name: str) -> None:
    run, folder = published.run(name), published.trials[name]
    assert (run.state, run.exit_code, run.job_type) == ("finished", 0, "train")
    losses = [row["train/loss"] for row in run.history if "train/loss" in row]
    assert losses == read_columns(folder / "history.csv", [])["train/loss"] and len(losses) == 6
    artifact = published.server.artifact(f"{ENTITY}/{PROJECT}/model-{run.id}:best")
    assert artifact.files == {"best.safetensors": (folder / "best.safetensors").read_bytes()}
    assert artifact.aliases == {"best", "latest"}


def test_the_trial_of_a_killed_process_arrives_as_far_as_it_goes(published: Published) -> None:
    run = published.run("cut")
    losses = read_columns(published.trials["cut"] / "history.csv", [])["train/loss"]
    arrived = [row["train/loss"] for row in run.history if "train/loss" in row]
    assert arrived == losses[: len(arrived)] and arrived and run.sweep == published.sweep.id
    assert (run.state, run.exit_code) == ("failed", 1)
    told = "only in part: cut: its W&B file has no end, as a killed process leaves it"
    assert [line for line in published.last if line.startswith("only in part")] == [told]


def test_what_has_no_run_is_told(published: Published) -> None:
    [line] = [line for line in published.first if line.startswith("not sent: ")]
    assert line == f"not sent: none: {str(published.trials['none'])!r} is no run folder: it has no summary.json"


def test_the_sweep_has_the_runs_and_agents_are_given_the_rest(published: Published) -> None:
    names = ("whole", "resumed", "cut", "late")
    members = {run.id for run in published.server.runs.values() if run.sweep == published.sweep.id}
    assert members == {published.summary(name)["wandb_id"] for name in names}
    assert yaml.safe_load(published.sweep.config)["parameters"] == SWEEP["parameters"]
    assert [values["seed"] for values in published.plan] == [3, 4]
    assert [values["seed"] for values in published.sweep.plan] == [4]


def test_the_lines_say_where_the_sweep_is(published: Published) -> None:
    path = f"{ENTITY}/{PROJECT}/{published.sweep.id}"
    url = f"{published.server.url}/{ENTITY}/published+sweeps/sweeps/{published.sweep.id}"
    for lines, held, sent in (published.first, 3, 0), (published.again, 3, 0), (published.last, 4, 0):
        assert f"runs: {held} in W&B project {ENTITY}/{PROJECT}, {sent} of them sent now" in lines
        assert f"sweep: {held} runs in {url}" in lines
        assert lines[-1] == f"go on with: wandb agent '{path}'"
        assert not any(line.startswith("not in the sweep") for line in lines)
    assert json.loads((published.folder / "published.json").read_text())["sweep"] == path


def test_what_was_sent_is_not_sent_again(published: Published) -> None:
    assert not {"UpsertBucket", "file_stream", "UpsertSweep"} & {*published.asked}
    assert f"runs: 4 in W&B project {ENTITY}/{PROJECT}, 1 of them sent now" in published.kept_out  # late


def test_nothing_is_lost_when_w_and_b_makes_no_sweep(published: Published) -> None:
    assert published.refused == ("W&B made no sweep: no more sweeps here; the runs are there, publish again later")


def test_a_run_that_is_not_taken_into_the_sweep_is_told(published: Published) -> None:
    late = published.summary("late")["wandb_id"]
    [line] = [line for line in published.kept_out if line.startswith("not in the sweep")]
    assert line.startswith(f"not in the sweep: {late}: ") and line.endswith("(no more sweeps here)")
    assert published.kept_out[-1] == published.first[-1]


def test_nothing_unknown_was_asked(published: Published) -> None:
    assert published.server.unknown == []


@pytest.mark.parametrize("project", ["other", "other/published sweeps", "loopback/other"])
def test_another_project_is_refused(published: Published, call: Callable[..., Any], project: str) -> None:
    with pytest.raises(UserError, match=f"made for W&B project {ENTITY}/{PROJECT}, .* but got project='{project}'"):
        call(publish_folder, published.folder, published.trials, project)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"WANDB_API_KEY": "1" * 40}, "this key opens nothing here"),
        ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, "did not respond in time"),
    ],
)
def test_without_w_and_b_it_is_told_in_one_line(
    loopback: LoopbackServer,
    clean_environment: dict[str, str],
    published: Published,
    variables: dict[str, str],
    reason: str,
    tmp_path: Path,
) -> None:
    call = f"""
import test_sweep_publish as test
from pathlib import Path
trials = {{"a": Path({str(published.trials["whole"])!r})}}
try:
    test.publish_folder(Path({str(published.folder)!r}), trials)
except test.UserError as error:
    print(error)
"""
    environment = {**clean_environment, **loopback.environment(), "HOME": str(tmp_path), **variables}
    command = [sys.executable, "-c", call]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, stdout=subprocess.PIPE, text=True, timeout=300
    )
    [line] = done.stdout.splitlines()
    assert line.startswith("cannot reach W&B: ") and reason in line
    assert line.endswith("nothing is lost, publish again later")


# From the first trial to the last one, by the command line


def test_agents_go_on_with_a_published_sweep(
    loopback: LoopbackServer, clean_environment: dict[str, str], tmp_path: Path
) -> None:
    """Two of three seeds are tried with nothing but a disk; an agent is given the third one alone."""
    parameters = {**SWEEP["parameters"], "seed": {"values": [0, 1, 2]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, "program": str(TRAIN), "parameters": parameters}))
    project = f"{ENTITY}/begun offline"
    alone = {**clean_environment, "HOME": str(tmp_path)}

    def eva(*arguments: str, **variables: str) -> str:
        command, environment = [str(BIN / "eva"), *arguments], {**alone, **variables}
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    asked = len(loopback.asked)
    eva("sweep", "sweep.yaml", "--skip_check", "--count=2", f"--project={project}", "--out=folder")
    assert len(loopback.asked) == asked
    tried = {yaml.safe_load(path.read_text())["seed"] for path in tmp_path.glob("folder/*/*/config.yaml")}
    assert len(tried) == 2

    told = eva("sweep", "--publish=folder", f"--project={project}", **loopback.environment()).splitlines()
    assert f"runs: 2 in W&B project {project}, 2 of them sent now" in told
    *_, path = shlex.split(told[-1])
    sweep = loopback.sweeps[ENTITY, "begun offline", path.rpartition("/")[2]]
    assert [{values["seed"]} for values in sweep.plan] == [{0, 1, 2} - tried]

    said = eva("agent", path, "--gpus=0", "--count=2", **loopback.environment())
    [trial] = sweep.trials
    assert f"gpu 0: run folder: runs/{trial.run_id}" in said and not sweep.plan
    runs = [run for run in loopback.runs.values() if run.sweep == sweep.id]
    assert sorted(run.config["seed"] for run in runs) == [0, 1, 2]
    for run in runs:
        assert (run.project, run.state, run.exit_code, run.job_type) == ("begun offline", "finished", 0, "train")
        assert sum("val/accuracy_best" in row for row in run.history) == SMALL_RUN["epochs"]
        artifact = loopback.artifact(f"{project}/model-{run.id}:best")
        assert artifact.aliases == {"best", "latest"} and artifact.logged_by is run
    assert loopback.unknown == []


# Before W&B is asked


def test_without_an_account_the_way_to_one_is_told(published: Published) -> None:
    with pytest.raises(UserError, match="publishing needs a W&B account: run `wandb login`"):
        publish_folder(published.folder, published.trials)


def test_there_must_be_a_run(sweep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    sweep = read_sweep(sweep_folder / "sweep.yaml")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "summary.json").write_text('{"wandb_id": "x", "wandb_mode": "disabled", "wandb_folders": []}')
    (tmp_path / "c" / "wandb" / "offline-run-x").mkdir(parents=True)  # it was moved to here
    moved = {"wandb_id": "x", "wandb_mode": "offline", "wandb_folders": ["/gone/c/wandb/offline-run-x"]}
    (tmp_path / "c" / "summary.json").write_text(json.dumps(moved))
    with pytest.raises(UserError, match="there is no trial whose run could be sent to W&B") as told:
        publish(tmp_path, sweep, {name: tmp_path / name for name in "abc"})
    assert str(told.value).splitlines()[1:] == [
        f"not sent: a: {str(tmp_path / 'a')!r} is no run folder: it has no summary.json",
        f"not sent: b: {str(tmp_path / 'b')!r} has no W&B run",
        "not sent: c: its W&B files must lie where they were made, in '/gone/c/wandb'",
    ]


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"sweep": 3, "without_end": []}', '{"sweep": "a/b", "without_end": []}']
)
def test_a_damaged_memory_is_told(sweep_folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "published.json").write_text(content)
    with pytest.raises(UserError, match=r"published.json' is damaged: it must name the W&B sweep"):
        publish(tmp_path, read_sweep(sweep_folder / "sweep.yaml"), {"a": tmp_path})
