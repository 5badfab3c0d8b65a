"""What the command line does, for a notebook or a script: plain arguments in, plain values out."""

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from eva import comparison, experiment, galleries, page, records, wandb_runs
from eva.checkpoint_evaluation import configure_evaluation, open_checkpoint, trained_model
from eva.checkpoint_evaluation import evaluate as evaluate_checkpoint
from eva.comparison import Comparison
from eva.config import Layer, UserError
from eva.experiment import Result
from eva.files import write_json
from eva.galleries import Tile
from eva.gradcam import overlay
from eva.policies import Policy
from eva.predictions import misclassified
from eva.recipes import configure
from eva.records import RunRecord
from eva.schedules import Schedule
from eva.schedules import build_schedule as schedule_of


def train(**settings: Any) -> Result:
    """Trains a run and returns its status, its folder and its summary.

    Args:
        settings: Those of `eva train --help`, by name; `recipe` among them. Tuples and lists are the same.

    Raises:
        UserError: A setting is unknown or impossible; all problems at once.
    """
    config, _ = configure(Layer("arguments", settings))
    return experiment.train(config)


def find_lr(**settings: Any) -> Result:
    """Runs the learning rate range test; `lr_min` and `lr_max` are in the result's summary, the picture in its folder.

    Args:
        settings: Those of `eva find_lr --help`, by name.

    Raises:
        UserError: A setting is unknown or impossible, or the curve has no usable minimum.
    """
    config, _ = configure(Layer("arguments", settings))
    return experiment.find_lr(config)


def evaluate(target: str | Path, **settings: Any) -> Result:
    """Evaluates a run folder, a checkpoint file or a W&B artifact; the metrics are the summary's `evaluation`.

    Args:
        target: A run folder, a checkpoint, or ENTITY/PROJECT/NAME:ALIAS.
        settings: Those that an evaluation can change, by name: data, split, tta, gallery_size, out and the like.

    Raises:
        UserError: There are no such weights, or a setting cannot change.
    """
    with open_checkpoint(str(target)) as checkpoint:
        config, _ = configure_evaluation(checkpoint, Layer("arguments", settings))
        return evaluate_checkpoint(checkpoint, config)


def load_model(target: str | Path) -> tuple[nn.Module, Policy]:
    """Returns a trained network in eval mode on the CPU, and the policy that makes its input of uint8 (H, W, 3) images.

    Args:
        target: A run folder, a checkpoint, or ENTITY/PROJECT/NAME:ALIAS.

    Raises:
        UserError: There are no such weights.
    """
    with open_checkpoint(str(target)) as checkpoint:
        config, _ = configure_evaluation(checkpoint, Layer("arguments", {}))
        return trained_model(checkpoint, config)


def compare(*targets: str | Path, metric: str | None = None, out: str | Path = "comparison") -> Comparison:
    """Compares runs, and writes compare.json and compare.html, a page that opens from the disk.

    Args:
        targets: Run folders, folders of runs, and W&B projects as ENTITY/PROJECT, in any mixture.
        metric: What the runs are sorted by; None for the best accuracy that most of them have.
        out: The folder of both files, made when needed; files of these names are replaced.

    Raises:
        UserError: A target holds no runs, no run has the metric, or the folder can't be written.
    """
    found = comparison.compare(read_runs(*targets), metric)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "compare.json", found.to_dict())
        page.write_page(found, folder / "compare.html")
    except OSError as error:
        raise UserError(f"cannot write the comparison to {str(folder)!r}: {error.strerror}") from None
    return found


def read_runs(*targets: str | Path) -> list[RunRecord]:
    """Returns the runs of run folders, folders of runs and W&B projects (ENTITY/PROJECT).

    Raises:
        UserError: A target holds no runs.
    """
    runs: list[RunRecord] = []
    for target in targets:
        if not str(target):
            raise UserError("a run folder, a folder of runs or ENTITY/PROJECT must be named, but got ''")
        if not os.path.exists(target) and wandb_runs.names_project(str(target)):
            runs.extend(wandb_runs.read_project(str(target)))
        else:
            runs.extend(records.read_run(folder) for folder in records.find_runs(Path(target)))
    return runs


def gallery(run: str | Path, count: int = 25, gradcam: bool = False) -> Figure:
    """Returns the misclassified images of an evaluated run as a figure, highest loss first.

    Args:
        run: The run folder.
        count: Number of images.
        gradcam: Whether to show beside each image what the network looked at.

    Raises:
        UserError: It is no run folder, the run was not evaluated, or its files are damaged.
    """
    record = records.read_run(Path(run))
    said = record.predictions
    if said is None:
        raise UserError(f"{str(run)!r} has no predictions: {'; '.join(record.notes)}")
    chosen = misclassified(said)[:count].tolist()
    if any(str(said.ids[index]) not in record.images for index in chosen):
        raise UserError(f"{str(run)!r} lacks images of what it got wrong: {'; '.join(record.notes)}")
    tiles = [
        Tile(
            record.images[str(said.ids[index])],
            said.classes[said.labels[index]],
            said.classes[said.predicted[index]],
            float(said.confidence[index]),
            str(said.ids[index]),
        )
        for index in chosen
    ]
    total = int((~said.correct).sum())
    title = f"{record.name}: {len(chosen)} of {total:,} misclassified, highest loss first"
    if not gradcam:
        return galleries.grid(tiles, title)
    if said.maps is None:
        raise UserError(f"{str(run)!r} has no Grad-CAM maps: its model has no layer that they could be made of")
    overlays = [overlay(tile.image, said.maps[index]) for tile, index in zip(tiles, chosen, strict=True)]
    return galleries.gradcam_grid(tiles, overlays, title)


def build_schedule(steps_per_epoch: int, **settings: Any) -> Schedule:
    """Returns a schedule: a function of the step (from 0) and of the epochs' losses that gives `lr` and `momentum`.

    Args:
        steps_per_epoch: Optimizer steps in an epoch.
        settings: `schedule`, `epochs`, `lr_min`, `lr_max`, `peak_epoch` and the like, by name.

    Raises:
        UserError: A setting is unknown or impossible, or a rate is still to be found.
    """
    config, _ = configure(Layer("arguments", settings))
    if "find" in (config.lr_min, config.lr_max):
        raise UserError("a schedule needs numbers for lr_min and lr_max, but got find")
    return schedule_of(config, steps_per_epoch)
