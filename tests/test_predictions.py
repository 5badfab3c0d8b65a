"""Predictions against torch, scikit-learn and loops over images; their files against damage and planted code."""

import io
import itertools
import json
import math
import pickle
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import (
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from torch.nn import functional as F

from eva.config import UserError
from eva.predictions import (
    Predictions,
    Report,
    load_images,
    measure,
    misclassified,
    save_images,
    well_classified,
)

untimed = settings(deadline=None, max_examples=60)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Makes every warning of NumPy's an error, from any line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make(labels: Any, logits: Any, **changes: Any) -> Predictions:
    logits = np.asarray(logits, np.float32)
    classes = tuple(f"class {k}" for k in range(logits.shape[1]))
    ids = np.array([f"test/{index:05d}" for index in range(len(logits))], np.str_)
    return replace(Predictions("test", classes, "f1", ids, np.asarray(labels, np.int64), logits), **changes)


def make_random(seed: int, count: int = 50, num_classes: int = 6, scale: float = 2.0) -> Predictions:
    rng = np.random.default_rng(seed)
    return make(rng.integers(num_classes, size=count), scale * rng.normal(size=(count, num_classes)))


def make_odds(labels: list[int], shares: list[float]) -> Predictions:
    """Of two classes, the first with these probabilities."""
    return make(labels, [[math.log(share), math.log(1 - share)] for share in shares])


def empty(num_classes: int = 3) -> Predictions:
    return make([], np.zeros((0, num_classes)))


def with_maps(predictions: Predictions) -> Predictions:
    maps = np.random.default_rng(0).normal(size=(len(predictions), 2, 3)).astype(np.float32)
    return replace(predictions, layer="layer4.1", maps=maps)


def arrays_of(predictions: Predictions) -> dict[str, Any]:
    """What a file has to hold, spelled out a second time."""
    arrays = {name: getattr(predictions, name) for name in ("split", "fingerprint", "ids", "labels", "logits", "layer")}
    maps = {} if predictions.maps is None else {"maps": predictions.maps}
    return {**arrays, "classes": list(predictions.classes), **maps}


def assert_same(loaded: Predictions, saved: Predictions) -> None:
    for field in fields(Predictions):
        first, second = getattr(loaded, field.name), getattr(saved, field.name)
        if isinstance(second, np.ndarray) and field.name != "ids":
            assert (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())
        else:
            assert np.array_equal(first, second), field.name
    assert isinstance(loaded.classes, tuple) and all(type(name) is str for name in loaded.classes)


# probabilities, predictions, losses


@untimed
@given(st.integers(0, 10_000), st.sampled_from([0.01, 1, 30, 1e4]), st.integers(1, 12))
def test_losses_and_probabilities_are_torchs(seed: int, scale: float, num_classes: int) -> None:
    predictions = make_random(seed, 20, num_classes, scale)
    logits, labels = torch.tensor(predictions.logits).double(), torch.tensor(predictions.labels)
    torch.testing.assert_close(
        torch.tensor(predictions.losses), F.cross_entropy(logits, labels, reduction="none"), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(torch.tensor(predictions.probabilities), logits.softmax(1), rtol=1e-9, atol=1e-300)
    assert predictions.predicted.tolist() == logits.argmax(1).tolist()
    assert predictions.confidence.tolist() == predictions.probabilities.max(axis=1).tolist()
    assert (predictions.losses >= 0).all()


NON_FINITE = [[*row] for row in itertools.product([math.nan, math.inf, -math.inf, 1.0], repeat=3)]


@pytest.mark.parametrize("label", [0, 1, 2])
def test_logits_that_are_not_finite_count_as_in_torch_and_warn_of_nothing(label: int) -> None:
    predictions = make([label] * len(NON_FINITE), NON_FINITE)
    logits, labels = torch.tensor(predictions.logits).double(), torch.tensor(predictions.labels)
    same: dict[str, Any] = {"rtol": 1e-12, "atol": 0, "equal_nan": True}
    losses = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(torch.tensor(predictions.losses), losses, **same)
    torch.testing.assert_close(torch.tensor(predictions.probabilities), logits.softmax(1), **same)
    assert predictions.predicted.tolist() == logits.argmax(1).tolist()
    assert predictions.top(1)[:, 0].tolist() == predictions.predicted.tolist()
    known = np.isfinite(predictions.probabilities).all(axis=1)
    assert np.array_equal(np.isnan(predictions.margins), ~known)
    assert np.array_equal(np.isnan(predictions.confidence), ~known)
    assert len(well_classified(predictions, 5)) and sorted(misclassified(predictions).tolist()) == [
        row for row in range(len(NON_FINITE)) if not predictions.correct[row]
    ]


def test_a_margin_is_the_labels_probability_less_the_best_other() -> None:
    logits = np.log([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    margins = make([0, 1, 2, 0], logits).margins
    assert margins == pytest.approx([0.2, -0.2, -0.3, 0], abs=1e-7)
    assert make_odds([0, 1], [0.9, 0.9]).margins == pytest.approx([0.8, -0.8], abs=1e-6)
    # Of a single class there is no other.
    assert make([0], [[3.0]]).margins.tolist() == [1.0]


@untimed
@given(st.integers(0, 10_000), st.integers(0, 8))
def test_top_is_a_sort_of_each_image_by_logit_where_the_first_of_equals_comes_first(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    predictions = make(rng.integers(5, size=20), rng.integers(-2, 3, size=(20, 5)))  # many equal logits
    ranked = [[label for _, label in sorted(zip(-row, range(5), strict=True))][:k] for row in predictions.logits]
    assert predictions.top(k).tolist() == ranked
    assert predictions.top(k).dtype == np.int64 and predictions.top(k).shape == (20, min(k, 5))
    assert predictions.top(1)[:, 0].tolist() == predictions.predicted.tolist()


# files


@st.composite
def any_predictions(draw: st.DrawFn) -> Predictions:
    text = st.text(st.characters(exclude_characters="\0"), max_size=12)
    size, num_classes = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    ids = draw(st.lists(text, min_size=size, max_size=size, unique=True))
    logits = st.floats(width=32)  # NaN and infinities too
    predictions = make(
        draw(st.lists(st.integers(0, num_classes - 1), min_size=size, max_size=size)),
        np.array([draw(logits) for _ in range(size * num_classes)], np.float32).reshape(size, num_classes),
        split=draw(text),
        fingerprint=draw(text),
        ids=np.array(ids, np.str_),
        classes=tuple(draw(st.lists(text, min_size=num_classes, max_size=num_classes))),
    )
    return with_maps(predictions) if draw(st.booleans()) else predictions


@untimed
@given(any_predictions())
def test_predictions_come_back_to_the_bit(predictions: Predictions) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.npz"
        predictions.save(path)
        loaded = Predictions.load(path)
    assert_same(loaded, predictions)


@pytest.mark.parametrize("name", ["predictions.npz", "predictions", "predictions.part"])
def test_the_file_has_just_the_name_it_was_given_and_numpy_reads_it(tmp_path: Path, name: str) -> None:
    predictions = with_maps(make_random(0))
    (tmp_path / name).write_text("an older file")
    predictions.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    with np.load(tmp_path / name, allow_pickle=False) as arrays:
        assert set(arrays.files) == arrays_of(predictions).keys()
        for key, value in arrays_of(predictions).items():
            assert np.array_equal(arrays[key], value), key


def test_the_same_predictions_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with_maps(make_random(0)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ["predictions", "images"])
def test_damage_is_told_or_does_no_harm(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    predictions, images = with_maps(make_random(0, 5, 3)), np.arange(60, dtype=np.uint8).reshape(5, 2, 2, 3)
    if name == "predictions":
        predictions.save(path)
    else:
        save_images(path, predictions.ids, images)
    whole, told = path.read_bytes(), 0

    def read() -> None:
        if name == "predictions":
            assert_same(Predictions.load(path), predictions)
        else:
            loaded = load_images(path)
            assert list(loaded) == predictions.ids.tolist() and np.array_equal(list(loaded.values()), images)

    places = range(0, len(whole), 5)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            read()
        except UserError as error:
            told += 1
            assert repr(str(path)) in str(error) and "\n" not in str(error)
    assert told > len(places) / 2
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is not a readable file of"):
            read()


def test_damage_is_told_also_where_numpy_stops_before_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    members = {"ids": np.array(["a"]), "images": np.zeros((1, 8, 8, 3), np.uint8)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in members.items():
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(f"{name}.npy", content.getvalue() + bytes(100_000))
        checksum = archive.getinfo("images.npy").CRC
    assert list(load_images(path)) == ["a"]
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", checksum), struct.pack("<I", checksum ^ 1)))
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["images"].shape == (1, 8, 8, 3)  # without a word
    with pytest.raises(UserError, match=r"is not a readable file of images: Bad CRC-32 for file 'images\.npy'"):
        load_images(path)


class Planted:
    """A pickle of it creates a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["the file", "classes", "ids", "logits", "maps", "images"])
def test_a_planted_pickle_is_refused_and_not_executed(tmp_path: Path, where: str) -> None:
    path, planted = tmp_path / "file.npz", tmp_path / "planted"
    arrays = arrays_of(with_maps(make_random(0, 2, 2)))
    if where == "the file":
        path.write_bytes(pickle.dumps(Planted(planted)))
    else:
        np.savez(path, **{**arrays, where: np.array([Planted(planted)], object)})
    with pytest.raises(UserError, match=r"file\.npz' is not a readable file of"):
        if where == "images":
            load_images(path)
        else:
            Predictions.load(path)
    assert not planted.exists()
    loaded: Any = np.load(path, allow_pickle=True)
    if where != "the file":
        loaded[where]
    assert planted.exists()  # the trap does work


def test_a_bare_array_is_no_file_of_predictions(tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", make_random(0).logits)
    with pytest.raises(UserError, match=r"logits\.npy' is not a readable file of predictions: File is not a zip file"):
        Predictions.load(tmp_path / "logits.npy")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no predictions at '.*gone\.npz'$"):
        Predictions.load(tmp_path / "gone.npz")
    with pytest.raises(UserError, match=r"^no images at '.*gone\.npz'$"):
        load_images(tmp_path / "gone.npz")
    with pytest.raises(UserError, match=r"is not a readable file of predictions: .*directory"):
        Predictions.load(tmp_path)


@pytest.mark.parametrize("lacking", ["split", "classes", "fingerprint", "ids", "labels", "logits", "layer"])
def test_a_lacking_array_is_named(tmp_path: Path, lacking: str) -> None:
    arrays = arrays_of(make_random(0))
    del arrays[lacking]
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(UserError, match=rf"p\.npz' is no file of predictions: it lacks {lacking}$"):
        Predictions.load(tmp_path / "p.npz")


IDS = ["a", "b", "c", "d"]
MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"labels": [0, 1, 2]}, "as many labels and logits as ids, but got 4 ids, 3 labels and 4 rows of logits"),
    ({"logits": np.zeros((5, 3), np.float32)}, "but got 4 ids, 4 labels and 5 rows of logits"),
    ({"labels": [0, 1, 2, 3]}, "labels from 0 to 2, but got 3"),
    ({"labels": [0, -1, 2, 0]}, "labels from 0 to 2, but got -1"),
    ({"logits": np.zeros((4, 2), np.float32)}, "a logit a class, but got 2 for 3 classes"),
    ({"classes": np.zeros(0, np.str_), "logits": np.zeros((4, 0), np.float32)}, "but got 0 for 0 classes"),
    ({"ids": ["a", "b", "c", "b"]}, "an id of its own for each image, but got 'b' twice"),
    ({"layer": "conv", "maps": np.zeros((3, 2, 2), np.float32)}, "a map an image, but got 3 for 4 images"),
    ({"layer": "conv"}, "both maps and the name of their layer, or neither"),
    ({"maps": np.zeros((4, 2, 2), np.float32)}, "both maps and the name of their layer, or neither"),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS)
def test_arrays_that_do_not_fit_together_are_refused_both_ways(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "p.npz"
    good = make([0, 1, 2, 0], np.zeros((4, 3)), ids=np.array(IDS))
    np.savez(path, **arrays_of(good))
    Predictions.load(path)  # nothing else is wrong with it
    np.savez(path, **{**arrays_of(good), **changes})
    with pytest.raises(UserError, match=rf"p\.npz' must have .*{message}"):
        Predictions.load(path)
    content = path.read_bytes()
    as_attributes: dict[str, Any] = {
        name: value if name == "layer" else () if name == "classes" else np.array(value)
        for name, value in changes.items()
    }
    with pytest.raises(UserError, match=f"the predictions must have .*{message}"):
        replace(good, **as_attributes).save(path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0.0, 1.0, 2.0, 0.0]}, r"labels of '.*' must be int64 of 1 dimension\(s\), but got float64 of 1"),
        ({"logits": np.zeros((4, 3))}, "logits of .* must be float32 of 2 .* but got float64 of 2"),
        ({"logits": np.zeros(4, np.float32)}, "logits of .* must be float32 of 2 .* but got float32 of 1"),
        ({"ids": np.array([b"a", b"b", b"c", b"d"])}, r"ids of .* must be .*U.* but got \|S1 of 1"),
        ({"split": ["test"]}, r"split of .* must be .* of 0 dimension\(s\), but got <U4 of 1"),
        ({"layer": "conv", "maps": np.zeros((4, 1, 2, 2), np.float32)}, "maps of .* must be float32 of 3 .* of 4"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    good = make([0, 1, 2, 0], np.zeros((4, 3)), ids=np.array(IDS))
    np.savez(tmp_path / "p.npz", **{**arrays_of(good), **changes})
    with pytest.raises(UserError, match=message):
        Predictions.load(tmp_path / "p.npz")


@pytest.mark.parametrize("count", [0, 1, 7])
def test_images_come_back_by_id(tmp_path: Path, count: int) -> None:
    images = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3)).astype(np.uint8)
    ids = np.array([f"test/çat {index}.jpg" for index in range(count)], np.str_)[::-1]
    save_images(tmp_path / "images.npz", ids, images)
    loaded = load_images(tmp_path / "images.npz")
    assert list(loaded) == ids.tolist()
    for name, image in zip(ids, images, strict=True):
        assert loaded[str(name)].dtype == np.uint8 and np.array_equal(loaded[str(name)], image)


@pytest.mark.parametrize(
    ("ids", "shape", "message"),
    [
        (["a", "b"], (3, 4, 4, 3), r"must be \(N, H, W, 3\) with N = 2 ids, but got \(3, 4, 4, 3\)"),
        (["a", "b"], (2, 4, 4, 1), r"must be \(N, H, W, 3\) with N = 2 ids, but got \(2, 4, 4, 1\)"),
        (["a", "a"], (2, 4, 4, 3), "an id of its own for each image, but got 'a' twice"),
    ],
)
def test_images_that_do_not_fit_their_ids_are_refused_both_ways(
    tmp_path: Path, ids: list[str], shape: tuple[int, ...], message: str
) -> None:
    path, images = tmp_path / "i.npz", np.zeros(shape, np.uint8)
    with pytest.raises(UserError, match=f"the images must .*{message}|the images {message}"):
        save_images(path, np.array(ids), images)
    assert not path.exists()
    np.savez(path, ids=ids, images=images)
    with pytest.raises(UserError, match=rf"i\.npz' .*{message}"):
        load_images(path)


def test_images_of_another_type_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "i.npz", ids=["a"], images=np.zeros((1, 4, 4, 3)))
    with pytest.raises(UserError, match=r"images of '.*' must be uint8 of 4 dimension\(s\), but got float64 of 4"):
        load_images(tmp_path / "i.npz")


def test_reading_predictions_and_comparing_them_loads_neither_torch_nor_wandb() -> None:
    code = "import sys, eva.predictions, eva.statistics; print(*{'torch', 'wandb', 'scipy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


# metrics


@untimed
@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 40))
def test_metrics_are_scikit_learns(seed: int, num_classes: int, count: int) -> None:
    predictions = make_random(seed, count, num_classes)  # with few images, some classes have none
    labels, everything = predictions.labels, list(range(num_classes))
    report = measure(predictions)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions.predicted, labels=everything, zero_division=0
    )
    scores = report.per_class
    assert [score.name for score in scores] == list(predictions.classes)
    assert [score.support for score in scores] == support.tolist()
    assert [score.precision for score in scores] == pytest.approx(precision)
    assert [score.recall for score in scores] == pytest.approx(recall)
    assert [score.f1 for score in scores] == pytest.approx(f1)
    assert report.macro_f1 == pytest.approx(f1.mean())
    assert report.loss == pytest.approx(log_loss(labels, predictions.probabilities, labels=everything))
    assert np.array_equal(report.confusion, confusion_matrix(labels, predictions.predicted, labels=everything))
    assert report.confusion.dtype == np.int64
    assert report.accuracy == report.top_k[1] == pytest.approx(np.trace(report.confusion) / count)
    assert (report.count, report.split) == (count, "test")
    if num_classes > 2:
        for k in report.top_k:
            expected = top_k_accuracy_score(labels, predictions.logits, k=k, labels=everything)
            assert report.top_k[k] == pytest.approx(expected)


def test_scores_by_hand() -> None:
    """Truths a a a b, of which one a is taken for b; nothing is c, and nobody says so."""
    report = measure(make([0, 0, 0, 1], [[3, 1, 0], [3, 1, 0], [1, 3, 0], [1, 3, 0]]))
    assert report.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert [(score.support, score.precision, score.recall) for score in report.per_class] == [
        (3, 1.0, 2 / 3),
        (1, 0.5, 1.0),
        (0, 0.0, 0.0),
    ]
    assert [score.f1 for score in report.per_class] == pytest.approx([0.8, 2 / 3, 0])
    assert report.macro_f1 == pytest.approx((0.8 + 2 / 3) / 3)


@pytest.mark.parametrize(
    ("num_classes", "kept"), [(1, [1]), (2, [1]), (3, [1]), (4, [1, 3]), (5, [1, 3]), (6, [1, 3, 5])]
)
def test_a_top_k_that_no_model_can_miss_is_left_out(num_classes: int, kept: list[int]) -> None:
    report = measure(make_random(0, num_classes=num_classes))
    assert list(report.top_k) == kept
    assert list(report.top_k.values()) == sorted(report.top_k.values())


def test_calibration_errors_by_hand() -> None:
    # In five bins: (0.6, 0.8] has confidence 0.7 and accuracy 1/2; (0.8, 1] has confidence 0.925 and accuracy 1.
    report = measure(make_odds([0, 1, 0, 0], [0.7, 0.7, 0.9, 0.95]), bins=5)
    assert report.ece == pytest.approx(0.5 * 0.2 + 0.5 * 0.075, abs=1e-7)
    assert report.mce == pytest.approx(0.2, abs=1e-7)
    bins = report.reliability
    assert (bins.lower, bins.upper) == ((0, 0.2, 0.4, 0.6, 0.8), (0.2, 0.4, 0.6, 0.8, 1))
    assert bins.count == (0, 0, 0, 2, 2)
    assert bins.accuracy == pytest.approx((math.nan, math.nan, math.nan, 0.5, 1), nan_ok=True)
    assert bins.confidence == pytest.approx((math.nan, math.nan, math.nan, 0.7, 0.925), nan_ok=True, abs=1e-7)


def by_loop(predictions: Predictions, bins: int) -> tuple[float, float]:
    """Calibration errors, an image and a bin at a time."""
    expected, largest = 0.0, 0.0
    for index in range(bins):
        inside = [
            (confidence, label == said)
            for confidence, label, said in zip(
                predictions.probabilities.max(1), predictions.labels, predictions.logits.argmax(1), strict=True
            )
            if index / bins < confidence <= (index + 1) / bins
        ]
        if inside:
            gap = abs(sum(one for one, _ in inside) - sum(one for _, one in inside)) / len(inside)
            expected += gap * len(inside) / len(predictions)
            largest = max(largest, gap)
    return expected, largest


@untimed
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 8), st.sampled_from([0.0, 0.5, 3.0, 1e3]))
def test_calibration_errors_are_those_of_a_loop(seed: int, bins: int, num_classes: int, scale: float) -> None:
    # Without scale every confidence is 1 / K, and with a large one it is 1: on edges of bins.
    predictions = make_random(seed, 30, num_classes, scale)
    report = measure(predictions, bins=bins)
    assert (report.ece, report.mce) == pytest.approx(by_loop(predictions, bins), abs=1e-12)
    assert sum(report.reliability.count) == 30
    assert 0 <= report.ece <= report.mce + 1e-12 <= 1 + 2e-12


def test_there_are_fifteen_bins_and_a_confidence_on_an_edge_is_in_the_lower_bin() -> None:
    assert len(measure(make_random(0)).reliability.count) == 15
    assert measure(make([0, 0], [[0, 0], [0, 0]]), bins=2).reliability.count == (2, 0)
    assert measure(make([0, 0], [[0, 0], [999, 0]]), bins=4).reliability.count == (0, 1, 0, 1)


def test_a_perfectly_calibrated_model_has_no_error_and_a_boaster_has_its_boast() -> None:
    assert measure(make_odds([0] * 3 + [1], [0.75] * 4)).ece == pytest.approx(0, abs=1e-7)
    assert measure(make([1] * 4, [[999, 0]] * 4)).ece == 1


def test_of_a_model_that_answers_nan_what_does_not_exist_is_none() -> None:
    finite = make_random(0, 10, 4)
    logits = finite.logits.copy()
    logits[3] = math.nan
    report = measure(replace(finite, logits=logits))
    values = report.to_dict()
    assert [values[name] for name in ("loss", "ece", "mce")] == [None, None, None]
    assert sum(report.reliability.count) == 9 and report.confusion.sum() == 10
    assert values["accuracy"] == report.top_k[1] == (logits.argmax(1) == finite.labels).mean()
    everything = measure(make([0, 1], np.full((2, 3), math.nan))).to_dict()
    assert everything["accuracy"] == 0.5 and everything["ece"] is None
    assert everything["reliability"]["count"] == [0] * 15


@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_a_split_without_images_has_no_means_and_no_warnings(num_classes: int, tmp_path: Path) -> None:
    predictions = empty(num_classes)
    report = measure(predictions)
    assert all(math.isnan(value) for value in (report.loss, report.accuracy, report.ece, report.mce, report.top_k[1]))
    assert report.count == report.confusion.sum() == 0 and report.confusion.shape == (num_classes, num_classes)
    assert predictions.margins.shape == predictions.losses.shape == predictions.confidence.shape == (0,)
    assert predictions.top(2).shape == (0, min(2, num_classes))
    assert len(misclassified(predictions)) == len(well_classified(predictions, 3)) == 0
    predictions.save(tmp_path / "p.npz")
    assert_same(Predictions.load(tmp_path / "p.npz"), predictions)


@pytest.mark.parametrize("predictions", [make_random(0), empty(), make([0], [[math.nan, math.inf]])])
def test_a_report_is_plain_json_in_full(predictions: Predictions) -> None:
    report = measure(predictions)
    values = report.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert list(values) == [field.name for field in fields(Report)]
    assert values["confusion"] == report.confusion.tolist()
    assert list(values["top_k"]) == [str(k) for k in report.top_k]
    assert [score["name"] for score in values["per_class"]] == list(predictions.classes)


# which images to show


@untimed
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.6, 0.9]), max_size=20))
def test_all_misclassified_images_come_highest_loss_first(shares: list[float]) -> None:
    predictions = make_odds([0] * len(shares), shares) if shares else empty(2)
    wrong = [index for index, share in enumerate(shares) if share < 0.5]
    assert misclassified(predictions).tolist() == sorted(wrong, key=lambda index: (shares[index], index))


def test_a_loss_that_is_nan_comes_last() -> None:
    logits = [[math.nan, 0], [1, 0], [2, 0], [0, 1]]
    assert misclassified(make([1, 1, 1, 1], logits)).tolist() == [2, 1, 0]


def judged(correct: Any) -> Predictions:
    """Predictions that are correct on just these images."""
    correct = np.asarray(correct, bool)
    return make(np.zeros(len(correct)), np.stack([correct, ~correct], axis=1).reshape(-1, 2))


@untimed
@given(st.lists(st.booleans(), max_size=60), st.integers(0, 70))
def test_well_classified_images_are_right_distinct_in_order_and_as_many_as_there_can_be(
    correct: list[bool], count: int
) -> None:
    chosen = well_classified(judged(correct), count).tolist()
    assert len(chosen) == min(count, sum(correct))
    assert all(correct[index] for index in chosen)
    assert chosen == sorted(set(chosen))


def parts(size: int, count: int) -> list[range]:
    starts = [index * size // count for index in range(count)]
    return [range(start, end) for start, end in itertools.pairwise([*starts, size])]


@untimed
@given(st.integers(1, 12), st.integers(0, 10_000))
def test_each_part_of_the_split_gives_its_first_correct_image(count: int, seed: int) -> None:
    correct = np.random.default_rng(seed).random(97) < 0.7
    every = [[index for index in part if correct[index]] for part in parts(97, count)]
    chosen = well_classified(judged(correct), count).tolist()
    if all(every):
        assert chosen == [part[0] for part in every]
        # Another run, which is wrong about one image: its pictures differ in one place at most.
        for mistake in chosen:
            other = correct.copy()
            other[mistake] = False
            again = well_classified(judged(other), count).tolist()
            crowded = all(len(part) > 1 for part in every)
            assert not crowded or sum(a != b for a, b in zip(chosen, again, strict=True)) == 1


def test_a_part_without_correct_images_is_made_up_for_by_its_neighbours() -> None:
    # Parts of four: the second has none, and the last only what is left.
    correct = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert well_classified(judged(correct), 4).tolist() == [0, 8, 9, 11]
    assert well_classified(judged([0, 0, 1, 1]), 2).tolist() == [2, 3]
    assert well_classified(judged([1, 1, 0, 0]), 2).tolist() == [0, 1]


def test_choices_of_images_are_whole_numbers_that_index_arrays() -> None:
    predictions = make_random(1)
    for chosen in (misclassified(predictions), well_classified(predictions, 5)):
        assert chosen.dtype == np.int64
        indexed: NDArray[np.str_] = predictions.ids[chosen]
        assert len(indexed) == len(chosen) > 0
