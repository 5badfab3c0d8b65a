"""Records of runs that were never trained, for the tests of comparisons: plausible curves, answers, images and maps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva.predictions import Predictions
from eva.records import RunRecord

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FINGERPRINT = "0123456789abcdef" * 4


def made_labels(count: int, num_classes: int = 10) -> NDArray[np.int64]:
    """Returns labels in a fixed mixed order."""
    return np.random.default_rng(1).permutation(np.arange(count) % num_classes).astype(np.int64)


def made_image(row: int, label: int, side: int = 32) -> NDArray[np.uint8]:
    """Returns a picture of its own for each row: a soft blob on a gradient, with a little noise as a photo has it."""
    rng = np.random.default_rng([row, label])
    y, x = np.mgrid[0:side, 0:side] / side
    middle, width = rng.uniform(0.25, 0.75, 2), rng.uniform(0.1, 0.25)
    blob = np.exp(-((x - middle[0]) ** 2 + (y - middle[1]) ** 2) / (2 * width**2))[..., None]
    ground = rng.uniform(40, 200, 3) + rng.uniform(-60, 60, 3) * x[..., None] + rng.uniform(-60, 60, 3) * y[..., None]
    picture = ground * (1 - blob) + rng.uniform(0, 255, 3) * blob + rng.normal(0, 6, (side, side, 3))
    return np.asarray(picture.clip(0, 255), np.uint8)


def made_predictions(
    labels: NDArray[np.int64],
    seed: int,
    error: float = 0.15,
    *,
    classes: tuple[str, ...] = CLASSES,
    split: str = "test",
    fingerprint: str = FINGERPRINT,
    map_side: int | None = 4,
    mislabelled: tuple[int, ...] = (),
) -> Predictions:
    """Returns answers that are wrong for about so many images: some images are hard for every seed.

    Rows in `mislabelled` get the class after their label, surely, from every seed.
    """
    rng, count, num_classes = np.random.default_rng([seed, 7]), len(labels), len(classes)
    hardness = np.random.default_rng(3).normal(0, 1, count)  # of the image, the same for all runs
    threshold = np.quantile(hardness + np.random.default_rng(4).normal(0, 0.7, count), 1 - error)
    wrong = hardness + rng.normal(0, 0.7, count) > threshold
    rival = (labels + 1 + np.random.default_rng(5).integers(0, num_classes - 1, count)) % num_classes
    rival = np.where(rival == labels, (labels + 1) % num_classes, rival)
    logits = rng.normal(0, 0.6, (count, num_classes))
    rows = np.arange(count)
    top = 2.5 + rng.gamma(2.0, 1.0, count)
    logits[rows, np.where(wrong, rival, labels)] += top
    for row in mislabelled:
        logits[row] = 0
        logits[row, (labels[row] + 1) % num_classes] = 9 + 0.1 * seed
    maps = None
    if map_side is not None:
        at = rng.integers(0, map_side, (count, 2))
        y, x = np.mgrid[0:map_side, 0:map_side]
        distance = (y - at[:, :1, None]) ** 2 + (x - at[:, 1:, None]) ** 2
        maps = (rng.uniform(0.5, 3, (count, 1, 1)) * np.exp(-distance / 3)).astype(np.float32)
    ids = np.array([f"{split}/{row:05d}" for row in range(count)])
    layer = "" if maps is None else "layer4"
    return Predictions(split, classes, fingerprint, ids, labels, logits.astype(np.float32), layer, maps)


def made_images(predictions: Predictions, known: dict[int, NDArray[np.uint8]] | None = None) -> dict[str, Any]:
    """Returns the pictures of the images that were answered wrongly, by id; `known` saves making them again."""
    known = {} if known is None else known
    images = {}
    for row in np.flatnonzero(~predictions.correct).tolist():
        if row not in known:
            known[row] = made_image(row, int(predictions.labels[row]))
        images[str(predictions.ids[row])] = known[row]
    return images


def made_curves(
    seed: int, epochs: int, steps: int, accuracy: float, watched: str = "test", diverged: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Returns the columns of history.csv, epochs.csv and lr_range.csv of a run that ends at this accuracy."""
    rng, total = np.random.default_rng([seed, 9]), epochs * steps
    step = np.arange(total)
    done = (step + 1) / total
    loss = 2.3 * np.exp(-3 * done) + 0.15 + rng.normal(0, 0.08, total)
    if diverged:
        loss[total // 2 :] = np.nan
    peak = 0.3
    history = {
        "trainer/step": step,
        "epoch": (step + 1) / steps,
        "train/loss": loss,
        "train/accuracy": (1 - np.exp(-2.5 * done)).clip(0, 1),
        "lr": 0.1 * np.where(done < peak, done / peak, (1 - done) / (1 - peak)) + 1e-3,
        "momentum": np.full(total, 0.9),
        "images_per_second": np.full(total, 1000.0 + 10 * seed),
        "seconds": (step + 1) * (0.05 + 0.004 * (seed % 5)),
    }
    epoch = np.arange(1, epochs + 1)
    reached = accuracy * (1 - 0.75 * np.exp(-4 * epoch / epochs)) / (1 - 0.75 * np.exp(-4))
    table = {
        "epoch": epoch,
        "trainer/step": epoch * steps - 1,
        "train_epoch/loss": 2.2 * np.exp(-3 * epoch / epochs) + 0.2,
        "train_epoch/accuracy": reached - 0.02,
        "train_epoch/seconds": np.full(epochs, steps * (0.05 + 0.004 * (seed % 5))),
        f"{watched}/loss": 1.9 * np.exp(-3 * epoch / epochs) + 0.35 + rng.normal(0, 0.01, epochs),
        f"{watched}/accuracy": reached,
        f"{watched}/accuracy_best": np.maximum.accumulate(reached),
        f"{watched}/epoch_best": epoch,
    }
    lr = np.geomspace(1e-4, 10, 100)
    smoothed = 2.3 - np.exp(-((np.log10(lr / 0.2)) ** 2)) + np.where(lr > 1, (lr - 1) ** 2 / 20, 0)
    lr_range = {"lr": lr, "loss": smoothed + rng.normal(0, 0.05, 100), "smoothed": smoothed}
    made = {"history": history, "epochs": table, "lr_range": lr_range}
    return {name: {key: value.tolist() for key, value in columns.items()} for name, columns in made.items()}


def made_record(
    name: str,
    id: str,
    config: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    *,
    predictions: Predictions | None = None,
    images: Mapping[str, Any] | None = None,
    epochs: int = 4,
    steps: int = 10,
    lr_range: bool = False,
    diverged: bool = False,
    watched: str = "test",
    notes: tuple[str, ...] = (),
) -> RunRecord:
    """Returns the record of a run; its accuracy is that of the predictions, unless `summary` gives another."""
    config = {"seed": 0, "lr_max": 0.1, **(config or {})}
    accuracy = 0.5 if predictions is None else float(predictions.correct.mean())
    summary = {
        **{"status": "diverged" if diverged else "finished", "selected_on": watched, "seconds": 12.5, "epochs": epochs},
        **{"test_accuracy_best": accuracy, "data_fingerprint": FINGERPRINT, "wandb_id": id},
        **(summary or {}),
    }
    curves = made_curves(int(config["seed"]), epochs, steps, accuracy, watched, diverged)
    return RunRecord(
        name=name,
        id=id,
        source=f"runs/{id}",
        config=config,
        summary=summary,
        history=curves["history"],
        epochs=curves["epochs"],
        lr_range=curves["lr_range"] if lr_range else {},
        predictions=predictions,
        images=made_images(predictions) if images is None and predictions is not None else images or {},
        notes=notes,
    )
