"""What W&B holds of a run is what its folder holds; what W&B holds of others, or damaged, is told and never executed.

The client runs in a process of its own, which calls the first functions of this file.
"""

import base64
import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BIN, SMALL_RUN, flags, inspect
from loopback import API_KEY, LoopbackServer
from PIL import Image

from eva.cli import main
from eva.comparison import compare
from eva.config import UserError
from eva.data import load_dataset
from eva.gradcam import overlay
from eva.records import RunRecord, read_run
from eva.wandb_runs import download_checkpoint, names_artifact, names_project, read_project

ENTITY = "loopback"
PROJECT = f"{ENTITY}/runs of eva"
TABLE = ("id", "image", "gradcam", "truth", "prediction", "confidence", "loss", "margin", "top-3")
Rows = list[list[Any]]


@dataclass(frozen=True)
class Done:
    """What a command of eva came to."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """Its only line on standard error beside wandb's."""
        [line] = [line for line in self.stderr.splitlines() if not line.startswith("wandb: ")]
        return line


class Interrupting(io.StringIO):
    """Text that interrupts this process, as Ctrl-C does, at a word that is written into it."""

    def __init__(self, word: str | None) -> None:
        super().__init__()
        self.word = word

    def write(self, text: str) -> int:
        if self.word is not None and self.word in text:
            self.word = None
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def run_eva(arguments: list[str], interrupted_at: str | None = None) -> Done:
    """Returns what a command of eva came to in this process."""
    stdout, stderr = Interrupting(interrupted_at), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main(arguments)
    return Done(code, stdout.getvalue(), stderr.getvalue())


def read_table(path: str) -> tuple[list[str], Rows]:
    """Returns columns and rows of a table in an artifact, pictures as arrays."""
    import wandb

    table = wandb.Api().artifact(path).get("misclassified")
    return table.columns, [
        [np.asarray(cell.image) if isinstance(cell, wandb.Image) else cell for cell in row] for row in table.data
    ]


def log_artifacts(project: str, config: dict[str, Any], artifacts: list[tuple[str, str, dict[str, bytes]]]) -> None:
    """Logs a run `hostile` of type train, with artifacts of these names, types and files."""
    import wandb

    with wandb.init(project=project, id="hostile", job_type="train", config=config) as run:
        for name, kind, files in artifacts:
            artifact = wandb.Artifact(name, type=kind)
            for file_name, content in files.items():
                with artifact.new_file(file_name, mode="wb") as file:
                    file.write(content)
            run.log_artifact(artifact)


@dataclass
class Client:
    """A process with eva and wandb in it, which knows no server but one."""

    server: LoopbackServer
    folder: Path
    pool: ProcessPoolExecutor
    said: list[Done] = field(default_factory=list)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what a function returns there."""
        return self.pool.submit(function, *arguments).result(timeout=300)

    def eva(self, *arguments: str, interrupted_at: str | None = None) -> Done:
        """Returns what a command of eva came to."""
        done: Done = self.call(run_eva, list(arguments), interrupted_at)
        self.said.append(done)
        return done


@pytest.fixture(scope="module")
def client(
    loopback: LoopbackServer, clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """The process, in a folder of its own that is its home too."""
    folder = tmp_path_factory.mktemp("client")
    environment = {**clean_environment, **loopback.environment(), "HOME": str(folder), "WANDB_PROJECT": "runs of eva"}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), os.chdir, (str(folder),)) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - environment.keys():
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(os.getcwd).result()  # it starts now
        yield Client(loopback, folder, pool)


@dataclass(frozen=True)
class Made:
    """The runs of the project.

    Attributes:
        folders: Run folders by what they are called here.
        by_hand: Columns and rows of the offline run's table as they lay in its folder before it was brought up.
    """

    folders: dict[str, Path]
    by_hand: dict[str, tuple[list[str], Rows]]

    def id(self, name: str) -> str:
        """Returns the W&B id of a run."""
        return str(json.loads((self.folders[name] / "summary.json").read_text())["wandb_id"])


def read_offline_tables(folder: Path) -> dict[str, tuple[list[str], Rows]]:
    """Returns the tables called misclassified that wait in a run folder for the upload, by artifact name."""
    [run] = (folder / "wandb").glob("offline-run-*")
    tables = {}
    for record in inspect(run):
        paths = {
            entry["path"]: Path(entry["local_path"])
            for entry in (record.get("artifact") or {}).get("manifest", {}).get("contents", [])
        }
        if "misclassified.table.json" in paths:
            assert all(path.is_relative_to(folder) for path in paths.values())  # the folder can be moved as a whole
            table = json.loads(paths["misclassified.table.json"].read_text())
            rows = [
                [np.asarray(Image.open(paths[cell["path"]])) if isinstance(cell, dict) else cell for cell in row]
                for row in table["data"]
            ]
            tables[record["artifact"]["name"]] = (table["columns"], rows)
    return tables


@pytest.fixture(scope="module")
def made(client: Client) -> Made:
    """Runs of all kinds: named, unnamed, diverged, resumed, brought up later, evaluated again, evaluated alone."""
    small = flags({**SMALL_RUN, "table_rows": 12, "gallery_size": 2})
    folders = {name: client.folder / name for name in ("named", "offline", "resumed", "alone", "diverged")}
    out = {name: f"--out={folder}" for name, folder in folders.items()}
    online, evaluated = "--tracking=online", "--evaluate=true"

    def eva(*arguments: str, code: int = 0, interrupted_at: str | None = None) -> Path:
        done = client.eva(*arguments, interrupted_at=interrupted_at)
        assert done.code == code, done.stderr
        [line] = [line for line in done.stdout.splitlines() if line.startswith("run folder: ")]
        return client.folder / line.removeprefix("run folder: ")

    found = ["--lr_min=find", "--lr_max=find", "--find_lr_steps=12", "--find_lr_end=1.0"]
    policy = ["--policy=crop_flip_cutout", "--policy_options.cutout=4.0", "--lr_steps=[1, 1.5]"]
    eva("train", *small, online, evaluated, out["named"], "--name=<b> & ü", *found, *policy)
    folders["unnamed"] = eva("train", *small, online, "--max_steps=2", "--val_fraction=0")
    eva("train", *small, online, out["diverged"], "--lr_max=1e30")
    eva("find_lr", *small, online, *found)

    eva("train", *small, online, out["resumed"], "--epochs=3", code=130, interrupted_at="epoch 1/")
    eva("train", online, "--resume", str(folders["resumed"]))

    eva("train", *small, "--tracking=offline", evaluated, out["offline"], "--seed=1")
    by_hand = read_offline_tables(folders["offline"])
    [offline] = (folders["offline"] / "wandb").glob("offline-run-*")
    assert client.call(subprocess.run, [str(BIN / "wandb"), "sync", str(offline)]).returncode == 0

    made = Made(folders, by_hand)
    eva("evaluate", str(folders["named"]), "--tta=flip", online)
    eva("evaluate", f"{PROJECT}/model-{made.id('named')}:best", online, out["alone"], "--split=val")
    folders["lone file"] = eva("evaluate", str(folders["named"] / "best.safetensors"), online, "--split=val")
    return made


@pytest.fixture(scope="module")
def found(client: Client, made: Made) -> list[RunRecord]:
    """What W&B says of them."""
    return list(client.call(read_project, PROJECT))


ALL = ("named", "unnamed", "diverged", "resumed", "offline", "alone", "lone file")


def exactly(value: Any) -> Any:
    """Returns what tells a value from all others: types, order, NaN and the bits of arrays included."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, dict):
        return [(key, exactly(inner)) for key, inner in value.items()]
    return repr(value)


# Folder and project


@pytest.mark.parametrize("name", ALL)
def test_a_record_from_the_project_is_that_from_the_folder(name: str, made: Made, found: list[RunRecord]) -> None:
    expected = read_run(made.folders[name])
    [record] = [record for record in found if record.id == made.id(name)]
    assert record.source == f"{PROJECT}/{record.id}"
    assert expected.source == str(made.folders[name])
    for part in fields(RunRecord):
        if part.name not in ("source", "predictions"):
            assert exactly(getattr(record, part.name)) == exactly(getattr(expected, part.name)), part.name
    assert (record.predictions is None) == (expected.predictions is None)
    if record.predictions is not None and expected.predictions is not None:
        for part in fields(record.predictions):
            ours, theirs = getattr(record.predictions, part.name), getattr(expected.predictions, part.name)
            assert exactly(ours) == exactly(theirs), part.name


def test_the_records_are_not_empty(made: Made, found: list[RunRecord]) -> None:
    records = {name: next(record for record in found if record.id == made.id(name)) for name in ALL}
    named, diverged, resumed = records["named"], records["diverged"], records["resumed"]
    assert [records[name].name for name in ("named", "offline", "alone")] == ["<b> & ü", "offline", "alone"]
    assert [records[name].name for name in ("unnamed", "lone file")] == [made.id("unnamed"), made.id("lone file")]
    assert (named.config["lr_max"], named.summary["found"]) == ("find", ["lr_min", "lr_max"])
    assert named.config["policy_options"] == {"cutout": 4} and diverged.config["policy_options"] == {}
    assert named.config["lr_steps"] == [1, 1.5] and named.config["tags"] == [] and named.config["grad_clip"] is None
    assert list(named.lr_range) == ["lr", "loss", "smoothed"] and len(named.lr_range["lr"]) >= 5
    assert named.history["trainer/step"] == list(range(6)) and named.epochs["epoch"] == [1, 2]
    assert "val/loss" in named.epochs and "test/loss" in records["unnamed"].epochs
    assert diverged.summary["status"] == "diverged" and diverged.epochs == {}
    assert math.isnan(diverged.history["train/loss"][-1])
    assert resumed.history["trainer/step"] == list(range(9)) and resumed.epochs["epoch"] == [1, 2, 3]
    not_evaluated = ("not evaluated yet: eva evaluate does it",)
    assert [record.notes for record in found] == [(), *[not_evaluated] * 3, *[()] * 3]
    assert records["alone"].history == {} and records["alone"].predictions is not None
    assert records["alone"].predictions.split == "val"
    assert named.predictions is not None
    assert set(named.images) == set(named.predictions.ids[wrong_rows(named)].tolist())


def wrong_rows(record: RunRecord) -> Any:
    """Returns the indices of the misclassified images, highest loss first, worked out anew."""
    said = record.predictions
    assert said is not None
    odds = np.exp(said.logits.astype(np.float64))
    losses = -np.log(odds[np.arange(len(odds)), said.labels] / odds.sum(axis=1))
    rows = np.flatnonzero(odds.argmax(axis=1) != said.labels)
    return rows[np.argsort(-losses[rows], kind="stable")]


def test_runs_come_in_the_order_of_their_creation_without_those_of_other_jobs(
    made: Made, found: list[RunRecord], client: Client
) -> None:
    assert [record.id for record in found] == [made.id(name) for name in ALL]
    runs = [run for run in client.server.runs.values() if run.project == "runs of eva"]
    kinds = sorted(str(run.job_type) for run in runs if run.id not in [record.id for record in found])
    assert kinds == ["evaluate", "find_lr"]


def test_rows_that_wandb_has_twice_count_once(made: Made, client: Client, found: list[RunRecord]) -> None:
    """As after `wandb sync` of a run that was sent in part before."""
    run = client.server.runs[ENTITY, "runs of eva", made.id("resumed")]
    whole = run.history
    again = [{**row, "_step": len(whole) + number} for number, row in enumerate(whole[4:])]
    run.history = [*whole, *again]
    [record] = [record for record in client.call(read_project, PROJECT) if record.id == run.id]
    run.history = whole
    [expected] = [record for record in found if record.id == run.id]
    assert exactly(record.history) == exactly(expected.history) and exactly(record.epochs) == exactly(expected.epochs)


def test_rows_that_are_not_given_are_noted(made: Made, client: Client) -> None:
    run = client.server.runs[ENTITY, "runs of eva", made.id("resumed")]
    whole, run.history = run.history, [row for row in run.history if row.get("trainer/step") != 4]
    [record] = [record for record in client.call(read_project, PROJECT) if record.id == run.id]
    run.history = whole
    assert record.history["trainer/step"] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert record.notes[0] == "W&B did not give all rows of batches and epochs"


def test_a_run_that_failed_after_its_training_has_failed(made: Made, client: Client) -> None:
    run = client.server.runs[ENTITY, "runs of eva", made.id("unnamed")]
    run.state, summary = "failed", run.summary
    run.summary = {**summary, "test_loss_best": math.inf}  # which summary.json has as null
    [record] = [record for record in client.call(read_project, PROJECT) if record.id == run.id]
    run.state, run.summary = "finished", summary
    assert (run.summary["status"], record.summary["status"]) == ("finished", "failed")
    assert "test_loss_best" not in record.summary


def test_the_newest_evaluation_replaces_the_earlier_one(made: Made, found: list[RunRecord], client: Client) -> None:
    [record] = [record for record in found if record.id == made.id("named")]
    run = client.server.runs[ENTITY, "runs of eva", record.id]
    assert (run.summary["evaluation"]["tta"], record.summary["evaluation"]["tta"]) == ("none", "flip")
    first, second = client.server.artifacts[ENTITY, "runs of eva", f"predictions-{record.id}"].versions
    assert first.files["predictions.npz"] != second.files["predictions.npz"]
    assert second.files["predictions.npz"] == (made.folders["named"] / "predictions.npz").read_bytes()


def test_both_give_the_same_comparison(made: Made, found: list[RunRecord]) -> None:
    folders = {read_run(path).id: read_run(path) for path in made.folders.values()}
    ours = [replace(record, source="") for record in found]
    theirs = [replace(folders[record.id], source="") for record in found]
    assert json.dumps(compare(ours).to_dict()) == json.dumps(compare(theirs).to_dict())
    assert [row.record.id for row in compare([*found, *folders.values()]).rows] == [
        row.record.id for row in compare(found).rows
    ]


def test_the_command_compares_folders_and_projects(made: Made, client: Client) -> None:
    for target in (str(client.folder), PROJECT):
        done = client.eva("compare", target, "--out=comparison", "--metric=accuracy")
        assert done.code == 0, done.stderr
        rows = json.loads((client.folder / "comparison" / "compare.json").read_text())["runs"]
        assert {row["id"] for row in rows} == {made.id(name) for name in ALL}
    shutil.rmtree(client.folder / "comparison")


# Tables and pictures


@pytest.mark.parametrize("name", ["offline", "named"])
def test_tables_come_back_as_they_were_made(name: str, made: Made, client: Client) -> None:
    run_id, record = made.id(name), read_run(made.folders[name])
    tables = {path: client.call(read_table, f"{PROJECT}/{path}:latest") for path in [f"misclassified-{run_id}"]}
    if name == "offline":
        path = f"run-{run_id}-misclassified"
        tables[path] = client.call(read_table, f"{PROJECT}/{path}:latest")
        assert made.by_hand.keys() == tables.keys()
        for path, (columns, rows) in made.by_hand.items():
            assert columns == tables[path][0]
            assert [exactly_row(row) for row in rows] == [exactly_row(row) for row in tables[path][1]]
    said = record.predictions
    assert said is not None and said.maps is not None
    split = load_dataset("digits", client.folder).test
    chosen = wrong_rows(record)[:12]
    for columns, rows in tables.values():
        assert tuple(columns) == TABLE
        assert [row[0] for row in rows] == said.ids[chosen].tolist()
        for row, index in zip(rows, chosen, strict=True):
            assert np.array_equal(row[1], split.images[split.ids.tolist().index(row[0])])
            assert np.array_equal(row[1], record.images[row[0]])
            drawn = overlay(record.images[row[0]], said.maps[index], 96)
            assert np.abs(row[2].astype(int) - drawn).mean() < 4  # JPEG
            odds = np.exp(said.logits[index].astype(np.float64))
            odds /= odds.sum()
            assert row[3:5] == [said.classes[said.labels[index]], said.classes[odds.argmax()]]
            margin = odds[said.labels[index]] - np.delete(odds, said.labels[index]).max()
            numbers = [odds.max(), -math.log(odds[said.labels[index]]), margin]
            assert row[5:8] == pytest.approx(numbers, rel=1e-9)
            best = np.argsort(-odds, kind="stable")[:3]
            assert row[8] == ", ".join(f"{said.classes[label]} {odds[label]:.3f}" for label in best)


def exactly_row(row: list[Any]) -> list[Any]:
    """Returns what tells a row from others."""
    return [exactly(cell) for cell in row]


# Lineage


@pytest.mark.parametrize(("name", "into"), [("named", "named"), ("alone", "alone")])
def test_an_evaluation_uses_the_checkpoint_and_logs_what_it_found(
    name: str, into: str, made: Made, client: Client
) -> None:
    model = client.server.artifact(f"{PROJECT}/model-{made.id('named')}:best")
    runs = [run for run in model.used_by if run.config["into"] == made.id(into)]
    assert len(runs) == 1 and runs[0].job_type == "evaluate"
    assert runs[0].used_artifacts == [model]
    assert runs[0].config["checkpoint_of"] == made.id("named")
    logged = {artifact.collection.type: artifact.collection.name for artifact in runs[0].logged_artifacts}
    assert logged["predictions"] == f"predictions-{made.id(into)}"
    assert logged["misclassified"] == f"misclassified-{made.id(into)}"
    assert "model" not in logged
    assert model.logged_by is client.server.runs[ENTITY, "runs of eva", made.id("named")]
    assert model.files.keys() == {"best.safetensors"}


def test_the_downloaded_checkpoint_is_that_of_the_run(made: Made) -> None:
    weights = [(made.folders[name] / "best.safetensors").read_bytes() for name in ("named", "alone", "lone file")]
    assert weights[0] == weights[1] == weights[2]


# What is not there, not eva's, or not what it was


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("runs of eva/predictions-{named}:latest", "must be of type model, but is of type 'predictions'"),
        ("runs of eva/model-none:best", "cannot read W&B artifact 'loopback/runs of eva/model-none:best': "),
        ("runs of eva/model-{named}:v7", "cannot read W&B artifact "),
        ("nothing/model-{named}:best", "cannot read W&B artifact "),
    ],
)
def test_an_artifact_that_is_no_checkpoint_is_one_line(target: str, message: str, made: Made, client: Client) -> None:
    done = client.eva("evaluate", f"{ENTITY}/{target.format(named=made.id('named'))}", "--tracking=online")
    assert (done.code, done.stdout) == (2, "")
    assert done.error.startswith("eva evaluate: error: ") and message in done.error


def test_changed_bytes_are_noticed(made: Made, client: Client) -> None:
    name = made.id("named")
    artifacts = [client.server.artifact(f"{PROJECT}/{kind}-{name}:latest") for kind in ("model", "predictions")]
    kept = [artifact.files for artifact in artifacts]
    for artifact in artifacts:
        artifact.files = {path: content[:-1] + b"!" for path, content in artifact.files.items()}
    done = client.eva("evaluate", f"{PROJECT}/model-{name}:best", "--tracking=online")
    [record] = [record for record in client.call(read_project, PROJECT) if record.id == name]
    for artifact, files in zip(artifacts, kept, strict=True):
        artifact.files = files
    assert (done.code, done.stdout) == (2, "")
    assert "best.safetensors of artifact" in done.error and "is damaged: its digest is not" in done.error
    [note] = record.notes
    assert f"predictions.npz of artifact '{PROJECT}/predictions-{name}:latest' is damaged" in note
    assert record.predictions is None and len(record.images) > 0


@pytest.mark.parametrize("right", [True, False])
def test_the_digest_that_newer_servers_ask_for_is_verified_too(right: bool, made: Made, client: Client) -> None:
    xxhash = pytest.importorskip("xxhash")
    artifact = client.server.artifact(f"{PROJECT}/predictions-{made.id('alone')}:latest")
    content = artifact.files["predictions.npz"] + b"!" * (not right)
    kept, manifest = artifact.manifest, json.loads(artifact.manifest["wandb_manifest.json"])
    digest = base64.b64encode(xxhash.xxh128(content).digest()).decode()
    manifest["contents"]["predictions.npz"].update({"digest": digest, "extra": {"alg": "XXH128"}})
    artifact.manifest = {"wandb_manifest.json": json.dumps(manifest).encode()}
    [record] = [record for record in client.call(read_project, PROJECT) if record.id == made.id("alone")]
    artifact.manifest = kept
    assert (record.predictions is not None, record.notes == ()) == (right, right)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_what_others_planted_is_told_and_not_executed(client: Client, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    pickled, packed = pickle.dumps(trap), io.BytesIO()
    np.savez(packed, ids=np.array([trap], object), images=np.array([trap], object))
    planted = [
        ("model-hostile", "model", {"best.safetensors": pickled}),
        ("model-other", "model", {"weights.pt": pickled}),
        ("predictions-hostile", "predictions", {"predictions.npz": pickled}),
        ("misclassified-hostile", "misclassified", {"misclassified.npz": packed.getvalue()}),
    ]
    client.call(log_artifacts, "hostile", {"seed": 1, "data_fingerprint": "0"}, planted)
    [record] = client.call(read_project, f"{ENTITY}/hostile")
    assert (record.id, record.config["seed"], record.predictions, record.images) == ("hostile", 1, None, {})
    assert record.summary == {"status": "running", "job": "train", "data_fingerprint": "0"}
    assert [note.partition(":")[0] for note in record.notes] == [
        "'predictions.npz' is not a readable file of predictions",
        "'misclassified.npz' is not a readable file of images",
        "no row of a batch",
    ]
    for name, message in {"hostile": "is not a readable checkpoint", "other": "holds no best.safetensors"}.items():
        done = client.eva("evaluate", f"{ENTITY}/hostile/model-{name}:latest", "--tracking=online")
        assert done.code == 2 and message in done.error
    assert not trap.path.exists()
    pickle.loads(pickled)
    assert trap.path.exists()  # the trap does work


# W&B out of reach


def test_an_unknown_project_is_one_line(client: Client, made: Made) -> None:
    done = client.eva("compare", f"{ENTITY}/nothing")
    assert (done.code, done.stdout) == (2, "")
    assert done.error.startswith(f"eva compare: error: cannot read W&B project '{ENTITY}/nothing': ")


@pytest.mark.parametrize("job_type", ["train", "evaluate", "sweep", None])
def test_a_project_without_runs_of_eva_is_one_line(job_type: str | None, client: Client, made: Made) -> None:
    project = f"others {job_type}"
    run = replace(client.server.runs[ENTITY, "runs of eva", made.id("named")], project=project, id="other")
    client.server.runs[ENTITY, project, "other"] = replace(run, job_type=job_type, config={"lr": 1})
    with pytest.raises(
        UserError, match=rf"^W&B project 'loopback/{project}' has no run that eva trained or evaluated$"
    ):
        client.call(read_project, f"{ENTITY}/{project}")


@pytest.mark.parametrize("target", ["entity/project", "entity/project/model-a:best"])
def test_without_an_account_nobody_is_asked_for_one(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def ask(*prompt: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", ask)
    message = rf"^no path '{target}' here, and to read it from W&B needs an account: run `wandb login`$"
    with pytest.raises(UserError, match=message):
        read_project(target) if names_project(target) else download_checkpoint(target, tmp_path)


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    # W&B's client gives up after 19 seconds by itself.
    variables = {"WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_API_KEY": API_KEY, "WANDB_HTTP_TIMEOUT": "2"}
    environment = {**clean_environment, **variables, "HOME": str(tmp_path)}
    done = subprocess.run(
        [str(BIN / "eva"), "compare", "entity/project"],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
    line = Done(done.returncode, done.stdout, done.stderr).error
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("eva compare: error: cannot read W&B project 'entity/project': ")
    assert API_KEY not in done.stderr
    assert not (tmp_path / "comparison").exists()


def test_the_key_is_in_no_file_and_no_output(client: Client, made: Made) -> None:
    assert not any(API_KEY in done.stdout + done.stderr for done in client.said)
    holding = [path for path in client.folder.rglob("*") if path.is_file() and API_KEY.encode() in path.read_bytes()]
    assert holding == []


def test_the_key_is_in_nothing_that_was_sent_but_in_its_header(made: Made, client: Client) -> None:
    runs = list(client.server.runs.values())
    artifacts = [one for collection in client.server.artifacts.values() for one in collection.versions]
    assert len(runs) > 5 and len(artifacts) > 5
    sent = [repr(vars(one)) for one in (*runs, *artifacts)]
    assert not any(API_KEY in text for text in sent)
    files = [*(run.files for run in runs), *(artifact.files for artifact in artifacts)]
    packed = [content for each in files for content in each.values()]
    assert len(packed) > 20 and not any(API_KEY.encode() in content for content in packed)


def test_the_server_was_asked_nothing_that_it_does_not_know(client: Client, found: list[RunRecord]) -> None:
    assert client.server.unknown == []


# Names


@pytest.mark.parametrize(
    ("text", "project", "artifact"),
    [
        *(("entity/project", True, False), ("my-team/CIFAR 10", True, False), ("runs/abc", True, False)),
        *(("./runs", False, False), ("../runs", False, False), ("/runs", False, False), ("runs/", False, False)),
        *(("runs", False, False), ("a/b/c", False, False), ("a/b?c", False, False), ("a/b:", False, False)),
        *(("e/p/model-1:best", False, True), ("p/model-1:v0", False, True), ("e/my p/model-1:v0", False, True)),
        *(("model-1:best", False, False), ("e/p/model-1", False, False), ("e/p/x/model-1:v0", False, False)),
    ],
)
def test_projects_and_artifacts_are_told_by_their_form(text: str, project: bool, artifact: bool) -> None:
    assert (names_project(text), names_artifact(text)) == (project, artifact)
