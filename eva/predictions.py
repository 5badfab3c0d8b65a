"""What a model said about each image of a split, and every number that follows from it. Plain NumPy, no torch."""

import dataclasses
import io
import json
import math
import zipfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva.config import UserError
from eva.files import finite, write_atomically

# The arrays of a file: scalar type and number of dimensions.
PREDICTIONS_FORM = {
    **{"split": (np.str_, 0), "classes": (np.str_, 1), "fingerprint": (np.str_, 0), "ids": (np.str_, 1)},
    **{"labels": (np.int64, 1), "logits": (np.float32, 2), "layer": (np.str_, 0), "maps": (np.float32, 3)},
}
IMAGES_FORM = {"ids": (np.str_, 1), "images": (np.uint8, 4)}


@dataclass(frozen=True)
class Predictions:
    """The logits of one model for every image of one split, in the split's order.

    Logits that are not finite are allowed, for that is what a diverged model answers: probabilities and losses that
    don't exist are then NaN.

    Attributes:
        split: test, val or train.
        classes: The K class names.
        fingerprint: That of the data set (`data.Dataset.fingerprint`).
        ids: Names of the images, (N,), as `data.Split.ids` has them.
        labels: int64 class indices, (N,).
        logits: float32, (N, K).
        layer: Name of the layer that `maps` come from; empty without maps.
        maps: Raw Grad-CAM maps of the predicted class at that layer, float32 (N, h, w), not scaled; None if the
            model has no layer that maps can be made of.
    """

    split: str
    classes: tuple[str, ...]
    fingerprint: str
    ids: NDArray[np.str_]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    layer: str = ""
    maps: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """Softmax of the logits, (N, K), in double precision."""
        shifted = self.logits.astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            shifted -= shifted.max(axis=1, keepdims=True)
        odds = np.exp(shifted)
        return np.asarray(odds / odds.sum(axis=1, keepdims=True))

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """The class with the largest logit, (N,); of equal ones the first. NaN counts as largest, as in torch."""
        return np.asarray(self.logits.argmax(axis=1))

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the predicted class is the label, (N,)."""
        return np.asarray(self.predicted == self.labels)

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """The predicted class's probability, (N,)."""
        return self.probabilities[np.arange(len(self)), self.predicted]

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """Cross-entropy of each image, (N,), natural logarithm."""
        logits = self.logits.astype(np.float64)
        top = logits.max(axis=1)
        with np.errstate(invalid="ignore"):
            total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            return np.asarray(total - logits[np.arange(len(self)), self.labels])

    @cached_property
    def margins(self) -> NDArray[np.float64]:
        """Probability of the label less the largest of the other classes, (N,); negative where the model is wrong."""
        rows = np.arange(len(self))
        others = self.probabilities.copy()
        others[rows, self.labels] = 0  # never above another class, and right if there is none
        return np.asarray(self.probabilities[rows, self.labels] - others.max(axis=1))

    def top(self, k: int) -> NDArray[np.int64]:
        """Returns the classes with the k largest logits, largest first, (N, min(k, K)); of equal ones the first first.

        The first column is `predicted`, also where logits are NaN.
        """
        return np.lexsort((-self.logits, ~np.isnan(self.logits)), axis=1)[:, :k]

    def save(self, path: Path) -> None:
        """Writes the predictions as a compressed npz of plain arrays, atomically; the same ones give the same bytes.

        Raises:
            UserError: The arrays don't fit together, so that `load` would refuse the file.
        """
        self._check("the predictions")
        arrays = {
            **{"split": np.array(self.split), "classes": np.array(self.classes, np.str_)},
            **{"fingerprint": np.array(self.fingerprint), "ids": np.asarray(self.ids, np.str_)},
            **{"labels": np.asarray(self.labels, np.int64), "logits": np.asarray(self.logits, np.float32)},
            "layer": np.array(self.layer),
        }
        if self.maps is not None:
            arrays["maps"] = np.asarray(self.maps, np.float32)
        _write_npz(path, arrays)

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Reads what `save` wrote; nothing in the file is ever executed.

        Raises:
            UserError: The file is missing or damaged, or its arrays don't fit together.
        """
        arrays = _read_npz(path, "predictions", PREDICTIONS_FORM, optional=("maps",))
        predictions = cls(
            split=str(arrays["split"]),
            classes=tuple(arrays["classes"].tolist()),
            fingerprint=str(arrays["fingerprint"]),
            ids=arrays["ids"],
            labels=arrays["labels"],
            logits=arrays["logits"],
            layer=str(arrays["layer"]),
            maps=arrays.get("maps"),
        )
        predictions._check(repr(str(path)))
        return predictions

    def _check(self, name: str) -> None:
        size, num_classes = len(self.ids), len(self.classes)
        if not (len(self.labels) == len(self.logits) == size):
            lengths = f"{size} ids, {len(self.labels)} labels and {len(self.logits)} rows of logits"
            raise UserError(f"{name} must have as many labels and logits as ids, but got {lengths}")
        if num_classes == 0 or self.logits.shape[1] != num_classes:
            raise UserError(
                f"{name} must have a logit a class, but got {self.logits.shape[1]} for {num_classes} classes"
            )
        if (outside := self.labels[(self.labels < 0) | (self.labels >= num_classes)]).size:
            raise UserError(f"{name} must have labels from 0 to {num_classes - 1}, but got {outside[0]}")
        _check_unique(self.ids, name)
        if (self.maps is None) != (self.layer == ""):
            raise UserError(f"{name} must have both maps and the name of their layer, or neither")
        if self.maps is not None and len(self.maps) != size:
            raise UserError(f"{name} must have a map an image, but got {len(self.maps)} for {size} images")


# --- files ---


def save_images(path: Path, ids: NDArray[np.str_], images: NDArray[np.uint8]) -> None:
    """Writes images (N, H, W, 3) with their ids (N,) as a compressed npz of plain arrays, atomically.

    Raises:
        UserError: There are not as many images as ids, two ids are equal, or the images are not RGB.
    """
    _check_images(ids, images, "the images")
    _write_npz(path, {"ids": np.asarray(ids, np.str_), "images": np.asarray(images, np.uint8)})


def load_images(path: Path) -> dict[str, NDArray[np.uint8]]:
    """Returns what `save_images` wrote, RGB (H, W, 3) by id, in the file's order; nothing in it is ever executed.

    Raises:
        UserError: The file is missing or damaged, or its arrays don't fit together.
    """
    arrays = _read_npz(path, "images", IMAGES_FORM)
    _check_images(arrays["ids"], arrays["images"], repr(str(path)))
    return dict(zip(arrays["ids"].tolist(), arrays["images"], strict=True))


def _check_images(ids: NDArray[np.str_], images: NDArray[np.uint8], name: str) -> None:
    if images.ndim != 4 or images.shape[3] != 3 or len(images) != len(ids):
        raise UserError(f"{name} must be (N, H, W, 3) with N = {len(ids)} ids, but got {images.shape}")
    _check_unique(ids, name)


def _check_unique(ids: NDArray[np.str_], name: str) -> None:
    known, counts = np.unique(ids, return_counts=True)
    if len(known) < len(ids):
        repeated = str(known[counts > 1][0])
        raise UserError(f"{name} must have an id of its own for each image, but got {repeated!r} twice")


def _write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # to a path, NumPy would append ".npz"
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def _read_npz(
    path: Path, what: str, form: Mapping[str, tuple[type, int]], optional: Container[str] = ()
) -> dict[str, NDArray[Any]]:
    """Returns the arrays that `form` names, all but `optional` ones, each of its type and number of dimensions.

    Members are read whole, so that zipfile verifies their checksums: `np.load` may stop before it gets there.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in form:
                if f"{name}.npy" in archive.namelist():
                    member = io.BytesIO(archive.read(f"{name}.npy"))
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"no {what} at {str(path)!r}") from None
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen types for a damaged file
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{str(path)!r} is not a readable file of {what}: {reason}") from None
    if missing := [name for name in form if name not in arrays and name not in optional]:
        raise UserError(f"{str(path)!r} is no file of {what}: it lacks {', '.join(missing)}")
    for name, array in arrays.items():
        kind, ndim = form[name]
        if not np.issubdtype(array.dtype, kind) or array.ndim != ndim:
            wanted, got = f"{np.dtype(kind)} of {ndim} dimension(s)", f"{array.dtype} of {array.ndim}"
            raise UserError(f"{name} of {str(path)!r} must be {wanted}, but got {got}")
    return arrays


# --- metrics ---


@dataclass(frozen=True)
class ClassScore:
    """How well one class is told from the others, fractions; `support` counts the images whose label it is."""

    name: str
    support: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: what a model's confidence is worth, in bins of equal width over (0, 1].

    Attributes:
        lower: Edges of the bins; a bin holds the confidences above its lower edge,
        upper: up to and with its upper one.
        confidence: Mean confidence of a bin's images; NaN in an empty bin.
        accuracy: Share of a bin's images that are correct; NaN in an empty bin.
        count: Images in a bin. Those without a confidence (NaN) are in none.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]


# A new metric is a field here and a line in `measure`; `to_dict`, and with it every file, follows.
@dataclass(frozen=True, eq=False)
class Report:
    """Every number that is told about the predictions for one split. Accuracies are fractions.

    Attributes:
        split: test, val or train.
        count: Number of images N.
        loss: Mean cross-entropy. NaN where it doesn't exist: without images, or with a NaN among them.
        accuracy: Share of images that are correct.
        top_k: By k, the share of images whose label is among the k largest logits.
        per_class: A score for each class. Precision (nothing was predicted to be the class), recall (no image has the
            label) and F1 (neither) are 0 where they are undefined, scikit-learn's zero_division=0.
        macro_f1: Mean F1 of all K classes, those without images included.
        confusion: Number of images, int64 (K, K), a row a label and a column a predicted class.
        ece: Expected calibration error, the mean of |accuracy - confidence| over `reliability`'s bins, weighted by
            their images (Guo et al. 2017, arXiv 1706.04599). NaN if any confidence is.
        mce: Maximum calibration error, the largest of these differences (same paper).
        reliability: The bins behind both.
    """

    split: str
    count: int
    loss: float
    accuracy: float
    top_k: Mapping[int, float]
    per_class: tuple[ClassScore, ...]
    macro_f1: float
    confusion: NDArray[np.int64]
    ece: float
    mce: float
    reliability: Reliability

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values for JSON: arrays as lists, keys as text, None for what is not finite."""
        text = json.dumps(dataclasses.asdict(self), default=lambda array: array.tolist())
        values: dict[str, Any] = finite(json.loads(text))
        return values


def measure(predictions: Predictions, top_k: Sequence[int] = (1, 3, 5), bins: int = 15) -> Report:
    """Returns all metrics of the predictions.

    Args:
        predictions: Of a split of any size; without images, means are NaN.
        top_k: The k of the top-k accuracies. Those of K and more are left out, for they are 1 whatever the model says
            (but k = 1 stays).
        bins: Bins of the reliability diagram; Guo et al. have 15.
    """
    num_classes = len(predictions.classes)
    pairs = predictions.labels * num_classes + predictions.predicted
    confusion = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    scores = _class_scores(predictions.classes, confusion)
    hits = predictions.top(max(top_k, default=0)) == predictions.labels[:, None]
    reliability = _reliability(predictions, bins)
    weights, gaps = np.array(reliability.count), np.subtract(reliability.accuracy, reliability.confidence)
    gaps = np.abs(gaps[weights > 0])
    calibrated = len(predictions) > 0 and weights.sum() == len(predictions)
    return Report(
        split=predictions.split,
        count=len(predictions),
        loss=_mean(predictions.losses),
        accuracy=_mean(predictions.correct),
        top_k={k: _mean(hits[:, :k].any(axis=1)) for k in top_k if k < max(num_classes, 2)},
        per_class=scores,
        macro_f1=_mean(np.array([score.f1 for score in scores])),
        confusion=confusion,
        ece=float(weights[weights > 0] @ gaps / len(predictions)) if calibrated else math.nan,
        mce=float(gaps.max()) if calibrated else math.nan,
        reliability=reliability,
    )


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _class_scores(classes: Sequence[str], confusion: NDArray[np.int64]) -> tuple[ClassScore, ...]:
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    # Numerators are 0 wherever a denominator is.
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    columns = (support.tolist(), precision.tolist(), recall.tolist(), f1.tolist())
    return tuple(ClassScore(*row) for row in zip(classes, *columns, strict=True))


def _reliability(predictions: Predictions, bins: int) -> Reliability:
    edges = np.arange(bins + 1) / bins
    known = ~np.isnan(predictions.confidence)
    confidence, correct = predictions.confidence[known], predictions.correct[known]
    members = np.searchsorted(edges, confidence) - 1  # edges[member] < confidence <= edges[member + 1]
    count = np.bincount(members, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in empty bins
        mean_confidence = np.bincount(members, confidence, bins) / count
        accuracy = np.bincount(members, correct, bins) / count
    return Reliability(
        tuple(edges[:-1].tolist()),
        tuple(edges[1:].tolist()),
        tuple(mean_confidence.tolist()),
        tuple(accuracy.tolist()),
        tuple(count.tolist()),
    )


# --- which images to show ---


def misclassified(predictions: Predictions) -> NDArray[np.int64]:
    """Returns the indices of all images that the model got wrong, highest loss first.

    Equal losses stay in the split's order; losses that are NaN come last.
    """
    wrong = np.flatnonzero(~predictions.correct)
    return wrong[np.argsort(-predictions.losses[wrong], kind="stable")]


def well_classified(predictions: Predictions, count: int) -> NDArray[np.int64]:
    """Returns the indices of `count` images that the model got right (or of all, if fewer), in the split's order.

    The split is cut into `count` equal parts and each gives its first correct image, so that the pictures of two runs
    differ only where one of them is wrong about such an image. A part without any takes the next correct image.
    """
    correct = np.flatnonzero(predictions.correct)
    slots = np.arange(min(count, len(correct)))
    chosen = np.searchsorted(correct, slots * len(predictions) // max(len(slots), 1))
    chosen = np.maximum.accumulate(chosen - slots) + slots  # each once: later ones move on
    return correct[np.minimum(chosen, len(correct) - len(slots) + slots)]  # and not beyond the last
