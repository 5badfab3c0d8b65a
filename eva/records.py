"""A run as plain data, wherever it lies: what a comparison is made of. No torch, no wandb."""

import contextlib
import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva.config import FIELDS, UserError, collected, default_of, read_yaml
from eva.files import finite, read_json
from eva.predictions import Predictions, load_images
from eva.run_folder import read_summary

Columns = Mapping[str, Sequence[float]]
Images = Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class RunRecord:
    """One run. Two records of a run, read from its folder and from W&B, are equal but for `source`.

    Attributes:
        name: What the run is called in pictures and tables: its display name, or else its folder's, or else its id,
            but never a name that W&B drew. Any text at all.
        id: The W&B run id.
        source: Where it was read: a folder, or ENTITY/PROJECT/ID.
        config: Settings by name (`RunConfig` fields), values as `plain` has them. A rate that the range test was asked
            for is "find": what it found is a result, so that seeds of one configuration have equal ones.
        summary: What summary.json holds of SUMMARY_NAMES, values as `plain` has them, without what is not there.
        history: Columns of history.csv by name, a value a batch: trainer/step, epoch, train/loss, train/accuracy,
            lr, momentum, images_per_second, seconds.
        epochs: Columns of epochs.csv by name, a value an epoch: epoch, trainer/step, train_epoch/loss,
            train_epoch/accuracy, train_epoch/seconds, and val/loss, val/accuracy, val/accuracy_best, val/epoch_best,
            or the same with test/ for a run that watched test.
        lr_range: Columns of lr_range.csv (lr, loss, smoothed); empty without a range test.
        predictions: Those of the last evaluation; None if there was none.
        images: uint8 RGB (H, W, 3) by id, of every image that the run got wrong.
        notes: What is missing or damaged about the run, a line each; empty if nothing is.
    """

    name: str
    id: str
    source: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: Columns
    epochs: Columns
    lr_range: Columns
    predictions: Predictions | None = None
    images: Images = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# What a comparison may use of a summary: the same from a folder and from W&B, which keeps more beside it.
SUMMARY_NAMES = (
    *("status", "job", "recipe", "data", "data_fingerprint", "train_images", "parameters", "selected_on", "hardware"),
    *("lr_min", "lr_max", "found", "best_epoch", "epochs", "steps", "seconds", "images_per_second", "test_loss_best"),
    *(f"{split}_accuracy_{which}" for split in ("val", "test") for which in ("last", "best")),
    "evaluation",
)
EVALUATION_NAMES = ("split", "count", "loss", "accuracy", "top_k", "macro_f1", "ece", "tta", "data_fingerprint")
COMPARED_JOBS = ("train", "evaluate")
# What these hold; all others are a number or a word. What is something else is of another version, or damaged.
KINDS: dict[str, type] = {
    **dict.fromkeys(("status", "job", "recipe", "data", "data_fingerprint", "selected_on", "split", "tta"), str),
    **{"hardware": dict, "found": list, "top_k": dict, "evaluation": dict},
}


def find_runs(folder: Path) -> list[Path]:
    """Returns the folders below `folder`, itself included, that trained or evaluated runs lie in, sorted by path.

    Links are followed, each folder is looked into once, and W&B's own folders are not. A run whose summary is damaged
    is left out, which is printed, as long as there are others.

    Raises:
        UserError: There is no such folder, or no such run in it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"no run folder, and no folder of runs, at {str(folder)!r}")
    found: list[Path] = []
    problems: list[str] = []
    known: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders.sort()  # the walk is in order then, and of two ways to a run takes the same one each time
        if os.path.realpath(path) in known:
            folders.clear()
            continue
        known.add(os.path.realpath(path))
        folders[:] = [name for name in folders if name != "wandb"]
        if "summary.json" in files:
            summary = None
            with collected(problems):
                summary = read_json(Path(path, "summary.json"))  # of another tool, perhaps
            if isinstance(summary, dict) and "wandb_id" in summary and summary.get("job") in COMPARED_JOBS:
                found.append(Path(path))
    if not found:
        raise UserError("\n".join(problems) or f"{str(folder)!r} holds no run that eva trained or evaluated")
    for problem in problems:  # one damaged run is no reason to compare none of the others
        print(f"left out: {problem}")
    return found


def read_run(folder: Path) -> RunRecord:
    """Returns the run of a folder. What is missing or damaged of it is told in the record's notes.

    Raises:
        UserError: It is no run folder.
    """
    summary = read_summary(folder)
    notes: list[str] = []
    config: dict[str, Any] = {}
    predictions, images = None, None
    with collected(notes):
        config = read_yaml(folder / "config.yaml")
    evaluated = (folder / "predictions.npz").exists()
    if evaluated:
        with collected(notes):
            predictions = Predictions.load(folder / "predictions.npz")
        with collected(notes):
            images = load_images(folder / "misclassified.npz")
    history = read_columns(folder / "history.csv", notes)
    return RunRecord(
        name=str(config.get("name") or folder.resolve().name),
        id=str(summary["wandb_id"]),
        source=str(folder),
        config=asked_config(config, summary),
        summary=known_summary(summary),
        history=history,
        epochs=read_columns(folder / "epochs.csv", notes),
        lr_range=read_columns(folder / "lr_range.csv", notes),
        predictions=predictions,
        images=images or {},
        notes=(*notes, *missing_parts(summary.get("job"), history, evaluated, predictions, images)),
    )


def missing_parts(
    job: str | None, history: Columns, evaluated: bool, predictions: Predictions | None, images: Images | None
) -> list[str]:
    """Returns what a run does not have, a line each; predictions and images are None if they couldn't be read."""
    missing = []
    if job == "train" and not history:
        missing.append("no row of a batch")
    if not evaluated:
        missing.append("not evaluated yet: eva evaluate does it")
    if predictions is not None and images is not None:
        pictured = np.isin(predictions.ids[~predictions.correct], list(images))
        if not pictured.all():
            missing.append(f"no image of {np.sum(~pictured):,} of {len(pictured):,} misclassified ones")
    return missing


def asked_config(config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings as they were asked for, without what else W&B keeps beside them."""
    found = summary.get("found")
    found = found if isinstance(found, list) else []
    # W&B keeps no empty mapping.
    empty: dict[str, Any] = {name: {} for name, setting in FIELDS.items() if default_of(setting) == {}}
    config = {**empty, **config} if config else {}
    return {name: "find" if name in found else plain(config[name]) for name in FIELDS if name in config}


def known_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a comparison may use of a summary, without what is not there."""
    known = _present(summary, SUMMARY_NAMES)
    evaluation = known.pop("evaluation", None)
    if isinstance(evaluation, Mapping) and (metrics := _present(evaluation, EVALUATION_NAMES)):
        known["evaluation"] = metrics
    return known


def _present(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    present = {name: plain(values.get(name)) for name in names}
    return {name: value for name, value in present.items() if isinstance(value, KINDS.get(name, int | float | str))}


def plain(value: Any) -> Any:
    """Returns a value as it is alike from a folder and from W&B, which gives 1.0 back as 1, and keys in any order.

    Whole numbers are ints, numbers that are not finite, or too large for a float, are None, tuples are lists, and
    mappings have sorted keys.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return None
    return finite(value)


def read_columns(path: Path, notes: list[str]) -> dict[str, list[float]]:
    """Returns the columns of a run's CSV file as numbers; none if there is no file, or no row in it.

    Rows that are none, one that a crash cut short among them, are left out, and told in `notes`.
    """
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        names, *rows = [row for row in csv.reader(io.StringIO(text)) if row] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    whole = []
    for number, row in enumerate(rows, start=1):
        # The last digits of a row without its line's end may be missing.
        if len(row) == len(names) and (number < len(rows) or text.endswith("\n")):
            with contextlib.suppress(ValueError):
                whole.append([float(value) for value in row])
    if len(whole) < len(rows):
        notes.append(f"{path.name}: {len(rows) - len(whole)} row(s) left out that are no rows of {len(names)} numbers")
    return {name: list(values) for name, values in zip(names, zip(*whole, strict=True), strict=False)}
