"""Runs and artifacts that W&B holds, read through its API."""

import base64
import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from eva.config import UserError, collected
from eva.loop import BATCH_COLUMNS, epoch_columns
from eva.predictions import Predictions, load_images
from eva.records import EVALUATION_NAMES, Images, RunRecord, asked_config, known_summary, missing_parts
from eva.tracker import choose_mode
from eva.wandb_client import public_api

# ENTITY/PROJECT/NAME:ALIAS, the entity may be left out. W&B refuses / \ # ? % : in the name of a project.
PROJECT_NAME = r"[^/\\#?%:\s][^/\\#?%:]*"
ARTIFACT = re.compile(rf"(?:[\w-]+/)?{PROJECT_NAME}/[\w.-]+:[\w.-]+")
PROJECT = re.compile(rf"[\w-]+/{PROJECT_NAME}")

# What eva's runs have in their configuration, by job type: others have such job types too.
MARKS = {"train": "data_fingerprint", "evaluate": "into"}

# Facts about a run that W&B's config holds from its beginning, the summary only from its end.
FACTS = ("recipe", "data", "data_fingerprint", "train_images", "parameters", "selected_on", "hardware")

READERS = 8  # runs read at once: most of the time is spent waiting for answers


def names_artifact(text: str) -> bool:
    """Tells whether a text has the form of an artifact's name with its alias, [ENTITY/]PROJECT/NAME:ALIAS."""
    return ARTIFACT.fullmatch(text) is not None


def names_project(text: str) -> bool:
    """Tells whether a text has the form ENTITY/PROJECT."""
    return PROJECT.fullmatch(text) is not None


def download_checkpoint(name: str, folder: Path) -> Path:
    """Downloads the checkpoint in an artifact of type model into a folder; its digest is verified.

    Raises:
        UserError: W&B can't be reached, knows no such artifact, or it holds no checkpoint of eva.
    """
    with _told(f"artifact {name!r}"):
        artifact = _api(name).artifact(name)
        if artifact.type != "model":
            raise UserError(f"artifact {name!r} must be of type model, but is of type {artifact.type!r}")
        return _download(artifact, name, "best.safetensors", folder)


def read_project(project: str) -> list[RunRecord]:
    """Returns the trained and evaluated runs of ENTITY/PROJECT in the order of their creation, as `read_run` does.

    An evaluation of another run of the project is no run of its own: it replaces that run's earlier evaluation.

    Raises:
        UserError: W&B can't be reached, knows no such project, or it has no run of eva.
    """
    with _told(f"project {project!r}"):
        api = _api(project)
        # Not lazy: config and summary of all runs come in a few requests.
        everything = list(api.runs(project, order="+created_at", lazy=False))
    runs = [run for run in everything if MARKS.get(run.job_type) in run.config]
    runs = [run for run in runs if run.config.get("into", run.id) == run.id]
    if not runs:
        raise UserError(f"W&B project {project!r} has no run that eva trained or evaluated")
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(partial(_record, api, project), runs))


def _api(name: str) -> Any:
    try:
        choose_mode("online")
    except UserError:  # wandb would ask for a key
        raise UserError(f"no path {name!r} here, and to read it from W&B needs an account: run `wandb login`") from None
    return public_api()


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what goes wrong while W&B is asked into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of wandb's client, of requests, and of wandb's service, whose class is not public
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot read W&B {what}: {reason}") from None


def _download(artifact: Any, name: str, file_name: str, folder: Path) -> Path:
    """Downloads one file of an artifact, called `name`, into a folder: past wandb's cache, which would keep a copy.

    Raises:
        UserError: It has no such file, or other bytes came than those that were logged.
    """
    entry = artifact.manifest.entries.get(file_name)
    if entry is None or entry.ref is not None:
        raise UserError(f"artifact {name!r} holds no {file_name}: eva did not log it")
    for file in artifact.files(names=[file_name]):
        file.download(root=str(folder)).close()
    path = folder / file_name
    if _digest(path, entry.extra.get("alg")) != entry.digest:
        raise UserError(f"{file_name} of artifact {name!r} is damaged: its digest is not the one that was logged")
    return path


def _digest(path: Path, algorithm: str | None) -> str:
    """Returns the digest of a file as a manifest has it, in base64: MD5, or the other one that servers may ask for."""
    if algorithm == "XXH128":
        from wandb.sdk.lib.hashutil import xxh128_file_b64

        return str(xxh128_file_b64(path))
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()


def _record(api: Any, project: str, run: Any) -> RunRecord:
    """Returns what W&B holds of a run."""
    summary = _numbers(run.summary_metrics)
    if "status" not in summary:  # it is running, or ended without a word: what is there are numbers of the last row
        summary = {"status": "running", **{name: run.config.get(name) for name in FACTS}}
    if run.state == "failed":  # perhaps after its training had finished
        summary["status"] = "failed"
    with _told(f"run {project}/{run.id}"):
        rows = list(run.scan_history(page_size=10_000))
        metrics, predictions, images, notes = _evaluation(api, project, run.id)
    if metrics is not None:
        summary["evaluation"] = metrics
    history = _columns(rows, BATCH_COLUMNS)
    if history and len(history["trainer/step"]) <= history["trainer/step"][-1]:
        # As a run has that was resumed offline: each part counts W&B's own step from 0, by which rows are asked for.
        notes.append("W&B did not give all rows of batches and epochs")
    missing = missing_parts(run.job_type, history, metrics is not None, predictions, images)
    return RunRecord(
        name=_name(run),
        id=run.id,
        source=f"{project}/{run.id}",
        config=asked_config(run.config, summary),
        summary=known_summary({**summary, "job": run.job_type}),
        history=history,
        epochs=_columns(rows, epoch_columns("val")) or _columns(rows, epoch_columns("test")),
        lr_range=_columns(rows, ("lr", "loss", "smoothed"), prefix="lr_range/"),
        predictions=predictions,
        images=images or {},
        notes=(*notes, *missing),
    )


def _name(run: Any) -> str:
    """Returns what a run is called: in W&B, unless the name there was drawn by chance and its folder has another."""
    given = run.config.get("name") or Path(run.config.get("out") or "").name
    drawn = not given or run.name == f"evaluate-{run.config.get('checkpoint_of')}"
    return str(given or run.id if drawn else run.name)


def _numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a summary with None for the words that W&B has for numbers that are not finite."""
    return {name: None if value in ("NaN", "Infinity", "-Infinity") else value for name, value in summary.items()}


def _columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str], prefix: str = "") -> dict[str, list[float]]:
    """Returns the rows that hold all of some names as columns; W&B has a prefix before the names.

    A run that was resumed tells some rows again. The first name is what rises from row to row: a row replaces those
    before it from its own place on.
    """
    kept: list[list[float]] = []
    for row in rows:
        values = [row.get(prefix + name) for name in names]
        if all(isinstance(value, (int, float, str)) for value in values):
            numbers = [float(value) for value in values if value is not None]  # also of "NaN"
            while kept and kept[-1][0] >= numbers[0]:
                kept.pop()
            kept.append(numbers)
    return {name: list(column) for name, column in zip(names, zip(*kept, strict=True), strict=False)}


def _evaluation(
    api: Any, project: str, run_id: str
) -> tuple[Mapping[str, Any] | None, Predictions | None, Images | None, list[str]]:
    """Returns the newest evaluation of a run: its metrics, its predictions, the images it got wrong, what is amiss.

    Each is None if it is not there.
    """
    metrics: Mapping[str, Any] | None = None
    predictions: Predictions | None = None
    images: Images | None = None
    notes: list[str] = []
    said, wrong = (f"{project}/{kind}-{run_id}:latest" for kind in ("predictions", "misclassified"))
    with tempfile.TemporaryDirectory() as downloads:
        if api.artifact_exists(said, "predictions"):
            artifact = api.artifact(said, "predictions")
            metrics = {name: artifact.metadata.get(name) for name in EVALUATION_NAMES}
            with collected(notes):
                predictions = Predictions.load(_download(artifact, said, "predictions.npz", Path(downloads)))
            with collected(notes):
                if not api.artifact_exists(wrong, "misclassified"):
                    raise UserError(f"no artifact {wrong!r}")
                artifact = api.artifact(wrong, "misclassified")
                images = load_images(_download(artifact, wrong, "misclassified.npz", Path(downloads)))
    return metrics, predictions, images, [note.replace(f"{downloads}/", "") for note in notes]
