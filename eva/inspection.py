"""What an evaluated model leaves: predictions, pictures and tables, in the run folder and in W&B.

Names of files, keys, columns and artifacts are the same in every run, so that W&B's tables and panels, and
`eva compare`, line runs up without anyone setting anything.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from eva import figures, galleries
from eva.config import RunConfig
from eva.data import Split
from eva.evaluation import predict
from eva.files import write_json
from eva.galleries import Tile
from eva.gradcam import GradCAM, colour_map, overlay, stages
from eva.hardware import Hardware
from eva.predictions import Predictions, Report, measure, misclassified, save_images, well_classified
from eva.tracker import MAX_IMAGES, MAX_ROWS, Table, Tracker

TABLE_COLUMNS = ("id", "image", "gradcam", "truth", "prediction", "confidence", "loss", "margin", "top-3")

# Sides of pictures in pixels: in a gallery, and in a table of which there may be thousands of rows.
GALLERY_SIZE, TABLE_SIZE = 128, 96

# W&B's precision-recall chart has a line a class at these recalls, for so many classes at most. As quotients, which
# equal the recalls of a class of 10 or 50 images; multiples of 0.02 would miss them by a last digit.
RECALLS = np.arange(51) / 50
MAX_LINES = 20


@dataclass(frozen=True)
class Inspection:
    """A model's predictions on a split, with the images and the layers that its pictures are made of."""

    model: nn.Module
    hardware: Hardware
    config: RunConfig
    split: Split
    batches: Iterable[tuple[Tensor, Tensor]]
    predictions: Predictions
    report: Report
    layers: tuple[str, ...]

    def tile(self, index: int) -> Tile:
        """Returns what a gallery shows of the image of that index."""
        said = self.predictions
        truth, prediction = said.classes[said.labels[index]], said.classes[said.predicted[index]]
        return Tile(self.split.images[index], truth, prediction, float(said.confidence[index]), str(said.ids[index]))

    def overlay(self, index: int, size: int) -> NDArray[np.uint8]:
        """Returns the image under the Grad-CAM map of what was predicted, on the map's own scale."""
        assert self.predictions.maps is not None
        return overlay(self.split.images[index], self.predictions.maps[index], size)


def inspect(
    model: nn.Module,
    split: Split,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: RunConfig,
    hardware: Hardware,
    classes: Sequence[str],
    fingerprint: str,
) -> Inspection:
    """Returns what a model on the device says about the images of `config.split`, which `batches` gives in order.

    Raises:
        UserError: The model has no layer of a name in `config.gradcam_layers`.
    """
    images, _ = next(iter(batches))
    layers = config.gradcam_layers or stages(model, hardware.to_device(images[:2], images[:2])[0])
    layer = layers[-1] if layers else None
    logits, maps = predict(model, batches, hardware, layer=layer, tta=config.tta)
    predictions = Predictions(
        config.split, tuple(classes), fingerprint, split.ids, split.labels, logits, layer or "", maps
    )
    return Inspection(model, hardware, config, split, batches, predictions, measure(predictions), tuple(layers))


def write(inspection: Inspection, folder: Path) -> dict[str, Any]:
    """Writes predictions.npz, misclassified.npz, evaluation.json and the figures; returns what the summary says."""
    said, wrong = inspection.predictions, misclassified(inspection.predictions)
    for name, draw in FIGURES.items():
        if said.maps is not None or "gradcam" not in name:
            figures.save(draw(inspection), folder / "figures" / f"{name}.png")
    if said.maps is None:
        print(f"no Grad-CAM: {inspection.config.model} has no layer whose output is a map of more than one pixel")
    # What is read together comes last, and at once, so that a process that dies hardly leaves one without the other.
    report = {**inspection.report.to_dict(), "tta": inspection.config.tta, "data_fingerprint": said.fingerprint}
    save_images(folder / "misclassified.npz", said.ids[wrong], inspection.split.images[wrong])
    said.save(folder / "predictions.npz")
    write_json(folder / "evaluation.json", report)
    scalars = ("split", "count", "loss", "accuracy", "top_k", "macro_f1", "ece", "tta", "data_fingerprint")
    return {"evaluation": {name: report[name] for name in scalars}}


def log(inspection: Inspection, folder: Path, tracker: Tracker, run_id: str, source: dict[str, Any]) -> None:
    """Logs galleries, the table, charts and the two artifacts. `source` says which checkpoint was evaluated."""
    said, config = inspection.predictions, inspection.config
    right, wrong = shown(inspection)
    if tracker.mode in ("online", "offline"):
        for line in left_out(inspection):
            print(line)
    for name, indices in (("correct", right), ("misclassified", wrong)):
        tiles = [(inspection.tile(index), index) for index in indices]
        tracker.log_images(f"galleries/{name}", [(enlarged(tile.image), caption(tile)) for tile, _ in tiles])
        if said.maps is not None:
            maps = [(inspection.overlay(index, GALLERY_SIZE), caption(tile)) for tile, index in tiles]
            tracker.log_images(f"galleries/gradcam_{name}", maps)
    if said.maps is not None:
        tile, heat_maps, overlays, _ = through_layers(inspection)
        captions = [f"{layer}: {caption(tile)}" for layer in inspection.layers]
        tracker.log_images("galleries/gradcam_layers", list(zip(overlays, captions, strict=True)))
        tracker.log_images("galleries/gradcam_layers_heat", list(zip(heat_maps, captions, strict=True)))
    table = misclassified_table(inspection)
    tracker.log_table("misclassified", table)
    log_charts(inspection, tracker)
    facts = {**source, **inspection.report.to_dict(), "tta": config.tta, "data_fingerprint": said.fingerprint}
    paths = [folder / "predictions.npz", folder / "evaluation.json"]
    tracker.log_artifact(f"predictions-{run_id}", "predictions", paths, facts, ("latest",))
    paths = [folder / "misclassified.npz"]
    tracker.log_artifact(
        f"misclassified-{run_id}", "misclassified", paths, facts, ("latest",), {"misclassified": table}
    )


def left_out(inspection: Inspection) -> list[str]:
    """Returns a line for each limit of W&B's, or of `table_rows`, that leaves something out."""
    wrong = int((~inspection.predictions.correct).sum())
    rows, classes = inspection.config.table_rows, len(inspection.predictions.classes)
    lines = []
    if (largest := max(map(len, shown(inspection)))) > MAX_IMAGES:
        lines.append(f"W&B shows {MAX_IMAGES} images of a gallery; figures/ has all {largest}")
    if wrong > rows:
        told = f"{rows:,} of {wrong:,} misclassified images, the highest losses"
        lines.append(f"W&B's table has {told} (table_rows, 10,000 at most)")
    if len(chosen_lines(inspection)) < sum(score.support > 0 for score in inspection.report.per_class):
        lines.append(f"W&B's chart of precision over recall has the first {MAX_LINES} of {classes:,} classes")
    if classes**2 > MAX_ROWS:
        lines.append(f"W&B has no confusion matrix of {classes:,} classes (100 at most); figures/ has it")
    return lines


def shown(inspection: Inspection) -> tuple[list[int], list[int]]:
    """Returns the indices of the correct and of the misclassified images that the galleries show."""
    count = inspection.config.gallery_size
    said = inspection.predictions
    return well_classified(said, count).tolist(), misclassified(said)[:count].tolist()


def misclassified_table(inspection: Inspection) -> Table:
    """Returns the table of misclassified images, highest loss first. Without maps the Grad-CAM cell is empty."""
    said = inspection.predictions
    top = said.top(3)
    rows = []
    for index in misclassified(said)[: inspection.config.table_rows].tolist():
        tile = inspection.tile(index)
        best = [f"{said.classes[label]} {said.probabilities[index, label]:.3f}" for label in top[index].tolist()]
        numbers = [tile.confidence, float(said.losses[index]), float(said.margins[index])]
        gradcam = None if said.maps is None else inspection.overlay(index, TABLE_SIZE)
        rows.append([tile.id, tile.image, gradcam, tile.truth, tile.prediction, *numbers, ", ".join(best)])
    return Table(TABLE_COLUMNS, rows)


def log_charts(inspection: Inspection, tracker: Tracker) -> None:
    """Logs confusion matrix, reliability, accuracy by class and precision over recall as W&B's own charts."""
    said, report = inspection.predictions, inspection.report
    if len(said.classes) ** 2 <= MAX_ROWS:  # a row a cell, of which W&B would silently draw the first 10,000
        labels, predicted = said.labels.tolist(), said.predicted.tolist()
        tracker.log_confusion_matrix("charts/confusion_matrix", labels, predicted, said.classes)
    bins = report.reliability
    filled = np.asarray(bins.count) > 0
    confidence = np.asarray(bins.confidence)[filled].tolist()
    lines = {"accuracy": np.asarray(bins.accuracy)[filled].tolist(), "perfectly calibrated": confidence}
    tracker.log_lines("charts/reliability", confidence, lines, f"reliability, ECE {report.ece:.4f}", "confidence")
    recalls = {score.name: score.recall for score in report.per_class}
    tracker.log_bars("charts/class_accuracy", recalls, "accuracy by class", ("class", "accuracy"))
    curves = {said.classes[label]: precisions(said, label) for label in chosen_lines(inspection)}
    tracker.log_lines("charts/precision_recall", RECALLS.tolist(), curves, "precision over recall", "recall")


def chosen_lines(inspection: Inspection) -> list[int]:
    """Returns the classes that the chart of precision over recall shows: the first that the split has images of."""
    return [label for label, score in enumerate(inspection.report.per_class) if score.support][:MAX_LINES]


def precisions(predictions: Predictions, label: int) -> list[float]:
    """Returns one class against the rest: the best precision at each recall of RECALLS or above it."""
    from sklearn.metrics import precision_recall_curve

    scores = np.nan_to_num(predictions.probabilities[:, label])
    precision, recall, _ = precision_recall_curve(predictions.labels == label, scores)
    precision, recall = precision[:-1], recall[:-1]  # the last point, precision 1 at recall 0, is made up
    # Recall falls along scikit-learn's curve; interpolated precision never rises with it (Manning et al. 2008, 8.4).
    best = np.maximum.accumulate(precision)
    at = len(recall) - 1 - np.searchsorted(recall[::-1], RECALLS)
    return [float(value) for value in best[at]]


Pictures = list[NDArray[np.uint8]]


def through_layers(inspection: Inspection) -> tuple[Tile, Pictures, Pictures, list[tuple[int, int]]]:
    """Returns one image, the worst mistake or else the first, with heat map, overlay and map size of each layer."""
    index = [*misclassified(inspection.predictions)[:1].tolist(), 0][0]
    images, _ = inspection.hardware.to_device(*image_at(inspection.batches, index))
    with inspection.hardware.autocast():
        cams = GradCAM(inspection.model, inspection.layers)(images, int(inspection.predictions.predicted[index]))
    raw = [cams.raw[layer][0].cpu().numpy() for layer in inspection.layers]
    heat_maps = [colour_map(map, GALLERY_SIZE) for map in raw]
    overlays = [overlay(inspection.split.images[index], map, GALLERY_SIZE) for map in raw]
    return inspection.tile(index), heat_maps, overlays, [map.shape for map in raw]


def image_at(batches: Iterable[tuple[Tensor, Tensor]], index: int) -> tuple[Tensor, Tensor]:
    """Returns the image (1, 3, H, W) and label (1,) of an index, as the model sees them."""
    for images, labels in batches:
        if index < len(images):
            return images[index : index + 1], labels[index : index + 1]
        index -= len(images)
    raise IndexError("no image of this index")


def enlarged(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns a gallery's picture of an image: its pixels, larger."""
    size = (GALLERY_SIZE, GALLERY_SIZE)
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_NEAREST), np.uint8)


def caption(tile: Tile) -> str:
    """Returns truth, prediction and confidence in words."""
    return f"{tile.id}: {tile.truth}, predicted {tile.prediction} ({100 * tile.confidence:.0f} %)"


# The figures, by the names of their files


def correct(inspection: Inspection) -> Figure:
    """Returns correctly classified images, evenly spread over the split."""
    right, _ = shown(inspection)
    total = int(inspection.predictions.correct.sum())
    return galleries.grid([inspection.tile(index) for index in right], f"{len(right)} of {total:,} correct")


def wrong(inspection: Inspection) -> Figure:
    """Returns misclassified images, highest loss first."""
    _, wrong = shown(inspection)
    return galleries.grid([inspection.tile(index) for index in wrong], wrong_title(inspection, len(wrong)))


def wrong_title(inspection: Inspection, count: int) -> str:
    """Returns the title of pictures of misclassified images."""
    total = int((~inspection.predictions.correct).sum())
    return f"{count} of {total:,} misclassified, highest loss first"


def gradcam_correct(inspection: Inspection) -> Figure:
    """Returns the correct images of their gallery with what the network looked at."""
    right, _ = shown(inspection)
    tiles, overlays = [inspection.tile(index) for index in right], gallery_overlays(inspection, right)
    return galleries.gradcam_grid(tiles, overlays, f"correct, Grad-CAM at {inspection.predictions.layer}")


def gradcam_wrong(inspection: Inspection) -> Figure:
    """Returns the misclassified images of their gallery with what the network looked at."""
    _, wrong = shown(inspection)
    tiles, overlays = [inspection.tile(index) for index in wrong], gallery_overlays(inspection, wrong)
    title = f"{wrong_title(inspection, len(wrong))}, Grad-CAM at {inspection.predictions.layer}"
    return galleries.gradcam_grid(tiles, overlays, title)


def gallery_overlays(inspection: Inspection, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Returns the overlays of the images of a gallery."""
    return [inspection.overlay(index, GALLERY_SIZE) for index in indices]


def gradcam_layers(inspection: Inspection) -> Figure:
    """Returns one image through the layers."""
    tile, heat_maps, overlays, sizes = through_layers(inspection)
    return galleries.layers_row(tile, heat_maps, overlays, inspection.layers, sizes)


def confusion_matrix(inspection: Inspection) -> Figure:
    """Returns the confusion matrix."""
    report = inspection.report
    title = f"{report.split}: accuracy {100 * report.accuracy:.2f} % of {report.count:,} images"
    return figures.confusion_matrix(report.confusion, inspection.predictions.classes, title)


def class_accuracy(inspection: Inspection) -> Figure:
    """Returns the accuracy (recall) of each class; a class without images has none."""
    scores = inspection.report.per_class
    recalls = [score.recall if score.support else math.nan for score in scores]
    return figures.per_class([score.name for score in scores], recalls, "accuracy by class")


def reliability(inspection: Inspection) -> Figure:
    """Returns the reliability diagram."""
    bins = inspection.report.reliability
    return figures.reliability(
        bins.lower, bins.upper, bins.confidence, bins.accuracy, bins.count, inspection.report.ece, "reliability"
    )


FIGURES: dict[str, Callable[[Inspection], Figure]] = {
    "correct": correct,
    "misclassified": wrong,
    "gradcam_correct": gradcam_correct,
    "gradcam_misclassified": gradcam_wrong,
    "gradcam_layers": gradcam_layers,
    "confusion_matrix": confusion_matrix,
    "class_accuracy": class_accuracy,
    "reliability": reliability,
}
