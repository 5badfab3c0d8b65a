"""What an evaluation leaves, read back from the run folder and from W&B, and made of models whose answers are known."""

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OfflineRun, inspect
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from scipy.special import log_softmax, softmax
from sklearn.metrics import confusion_matrix, f1_score, recall_score
from torch import Tensor, nn

from eva import inspection
from eva.config import RunConfig, UserError, read_yaml
from eva.data import Dataset, Split, hold_out, load_dataset
from eva.gradcam import overlay
from eva.hardware import Hardware
from eva.inspection import FIGURES, TABLE_COLUMNS, Inspection
from eva.models import build_model
from eva.predictions import Predictions, load_images, measure
from eva.tracker import Picture, Table, Tracker, WandbTracker

FP32 = Hardware(torch.device("cpu"), None, torch.contiguous_format)

EIGHT = {
    *("correct", "misclassified", "gradcam_correct", "gradcam_misclassified", "gradcam_layers"),
    *("confusion_matrix", "class_accuracy", "reliability"),
}
KEYS = {
    *("galleries/correct", "galleries/gradcam_correct", "galleries/misclassified", "galleries/gradcam_misclassified"),
    *("galleries/gradcam_layers", "galleries/gradcam_layers_heat", "misclassified"),
    *(f"charts/{name}_table" for name in ("confusion_matrix", "reliability", "class_accuracy", "precision_recall")),
}


# What W&B holds of a run, in its folder


def logged_keys(run: OfflineRun) -> set[str]:
    """Returns the keys that media, tables and charts were logged under."""
    rows = [record["item"] for record in run.of_type("history")]
    return {key.removesuffix("._type") for row in rows for key in row if key.endswith("._type")}


def gallery_of(run: OfflineRun, key: str, number: int = 0) -> list[tuple[Picture, str]]:
    """Returns the pictures under a key with their captions, of the row of that number that holds the key."""
    row = run.rows(f"galleries/{key}._type")[number]
    files = Path(run.summary["wandb_folders"][-1]) / "files"
    names, captions = row[f"galleries/{key}.filenames"], row[f"galleries/{key}.captions"]
    assert row[f"galleries/{key}.count"] == len(names)
    return [(pixels(files / name), caption) for name, caption in zip(names, captions, strict=True)]


def pixels(path: Path) -> Picture:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def chart_of(run: OfflineRun, key: str, number: int = 0) -> tuple[dict[str, Any], list[list[Any]]]:
    """Returns what W&B is told to draw under a key, and the rows that it draws."""
    settings = [record["update"].get(f"_wandb.visualize.charts/{key}") for record in run.of_type("config")]
    drawn: dict[str, Any] = [each for each in settings if each][number]["panel_config"]
    assert drawn["userQuery"]["queryFields"][0]["args"] == [{"name": "runSets", "value": "${runSets}"}]
    row = run.rows(f"charts/{key}_table.path")[number]
    path = Path(run.summary["wandb_folders"][-1]) / "files" / row[f"charts/{key}_table.path"]
    table = json.loads(path.read_text())
    assert set(drawn["fieldSettings"].values()) == set(table["columns"])
    order = [table["columns"].index(column) for column in sorted(table["columns"])]
    return drawn, [[line[column] for column in order] for line in table["data"]]


def lines_of(run: OfflineRun, key: str, number: int = 0) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    """Returns what a chart of lines is told, and the points of each line by its name."""
    drawn, rows = chart_of(run, key, number)
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, y, x in rows:  # lineKey, lineVal, step
        lines.setdefault(name, []).append((x, y))
    return drawn, lines


@dataclass(frozen=True)
class Artifact:
    kind: str
    aliases: list[str]
    metadata: dict[str, Any]
    files: dict[str, Path]

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        """Returns columns and rows of a table, its pictures as arrays."""
        table = json.loads(self.files[f"{key}.table.json"].read_text())

        def cell(value: Any) -> Any:
            return pixels(self.files[value["path"]]) if isinstance(value, dict) else value

        return table["columns"], [[cell(value) for value in row] for row in table["data"]]


def artifact_of(run: OfflineRun, name: str) -> Artifact:
    (found,) = [artifact for artifact in run.of_type("artifact") if artifact["name"] == name]
    files = {each["path"]: Path(each["local_path"]) for each in found["manifest"]["contents"]}
    return Artifact(found["type"], found["aliases"], json.loads(found.get("metadata", "{}")), files)


# A real run


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def said(offline_run: OfflineRun) -> Predictions:
    return Predictions.load(offline_run.folder / "predictions.npz")


@pytest.fixture(scope="module")
def answers(offline_run: OfflineRun, digits: Dataset) -> NDArray[np.float32]:
    """The logits of the best checkpoint, loaded afresh, for images that are normalized by hand."""
    model = build_model(read_yaml(offline_run.folder / "config.yaml")["model"], num_classes=10).eval()
    model.load_state_dict(load_file(offline_run.folder / "best.safetensors"))
    train, _ = hold_out(digits.train, 0.1, 10)
    seen = train.as_array().astype(np.float64) / 255
    images = (digits.test.as_array() / 255 - seen.mean((0, 1, 2))) / seen.std((0, 1, 2))
    with torch.no_grad():
        logits: Tensor = model(torch.from_numpy(images.astype(np.float32).transpose(0, 3, 1, 2)))
    return logits.numpy()


def test_predictions_are_those_of_the_best_checkpoint_for_the_test_images(
    offline_run: OfflineRun, digits: Dataset, said: Predictions, answers: NDArray[np.float32]
) -> None:
    np.testing.assert_allclose(said.logits, answers, atol=1e-4)
    assert np.ptp(answers, axis=0).max() > 0.001  # the images do make a difference
    assert said.ids.tolist() == digits.test.ids.tolist()
    assert said.labels.tolist() == digits.test.labels.tolist()
    assert (said.split, said.classes) == ("test", digits.classes)
    assert said.fingerprint == digits.fingerprint == offline_run.summary["data_fingerprint"]
    assert np.mean(answers.argmax(1) == said.labels) == offline_run.summary["test_accuracy_best"]
    assert said.maps is not None and said.maps.shape[0] == len(digits.test) and said.layer


def test_the_images_that_were_misclassified_are_kept_to_the_pixel(
    offline_run: OfflineRun, digits: Dataset, answers: NDArray[np.float32]
) -> None:
    wrong = np.flatnonzero(answers.argmax(1) != digits.test.labels)
    images = load_images(offline_run.folder / "misclassified.npz")
    assert sorted(images) == sorted(digits.test.ids[wrong].tolist())
    for index in wrong:
        np.testing.assert_array_equal(images[str(digits.test.ids[index])], digits.test.images[index])


def test_files_summary_and_the_terminal_have_the_same_metrics(
    offline_run: OfflineRun, digits: Dataset, said: Predictions, answers: NDArray[np.float32]
) -> None:
    report = json.loads((offline_run.folder / "evaluation.json").read_text())
    assert report == {**measure(said).to_dict(), "tta": "none", "data_fingerprint": digits.fingerprint}
    loss = -log_softmax(answers.astype(np.float64), axis=1)[np.arange(len(answers)), digits.test.labels].mean()
    assert report["loss"] == pytest.approx(loss, abs=1e-5)
    assert report["loss"] == pytest.approx(offline_run.summary["test_loss_best"], abs=1e-5)
    assert report["macro_f1"] == pytest.approx(f1_score(digits.test.labels, answers.argmax(1), average="macro"))
    summary = offline_run.summary["evaluation"]
    assert summary.keys() >= {"split", "count", "loss", "accuracy", "top_k", "macro_f1", "ece", "tta"}
    assert summary == {name: report[name] for name in summary}
    wrong = (answers.argmax(1) != digits.test.labels).sum()
    accuracy = f"accuracy {100 * (1 - wrong / 359):.2f} % ({wrong} of 359 wrong)"
    assert f"evaluated on test: {accuracy}" in offline_run.stdout
    # W&B's summary has them too, as numbers of their own.
    update: dict[str, Any] = {}
    for record in offline_run.of_type("summary"):
        update.update(record["update"])
    assert update["evaluation"] == summary


def test_eight_figures_are_drawn_and_named(offline_run: OfflineRun) -> None:
    assert FIGURES.keys() == EIGHT
    for name in EIGHT:
        assert pixels(offline_run.folder / "figures" / f"{name}.png").std() > 5  # not one colour
        assert f"figure: {offline_run.folder}/figures/{name}.png" in offline_run.stdout


def test_the_table_in_wandb_has_a_row_for_each_misclassified_image_highest_loss_first(
    offline_run: OfflineRun, digits: Dataset, said: Predictions, answers: NDArray[np.float32]
) -> None:
    (row,) = offline_run.rows("misclassified.path")
    wrong = np.flatnonzero(answers.argmax(1) != digits.test.labels)
    assert (row["misclassified._type"], row["misclassified.nrows"]) == ("table-file", len(wrong))
    logged = next(
        artifact["name"]
        for artifact in offline_run.of_type("artifact")
        if artifact["type"] == "run_table" and artifact["name"].endswith("-misclassified")
    )
    columns, rows = artifact_of(offline_run, logged).table("misclassified")
    assert columns == ["id", "image", "gradcam", "truth", "prediction", "confidence", "loss", "margin", "top-3"]
    check_rows(rows, digits.test, answers, said, wrong.tolist())
    # The artifact beside the checkpoint has the same table.
    name = f"misclassified-{offline_run.summary['wandb_id']}"
    again, same = artifact_of(offline_run, name).table("misclassified")
    assert again == columns and len(same) == len(rows)
    for one, other in zip(rows, same, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def as_jpeg(picture: Picture) -> Picture:
    """Returns what is left of a picture after JPEG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG")
    with Image.open(file) as compressed:
        return np.asarray(compressed)


def check_rows(
    rows: Sequence[Sequence[Any]], split: Split, logits: NDArray[np.float32], said: Predictions, wrong: list[int]
) -> None:
    """Asserts that the rows of a table are what follows from the logits, for the images that are wrong."""
    shares = softmax(logits.astype(np.float64), axis=1)
    losses = -log_softmax(logits.astype(np.float64), axis=1)
    index_of = {str(name): index for index, name in enumerate(split.ids)}
    assert sorted(index_of[row[0]] for row in rows) == wrong
    for id, image, gradcam, truth, prediction, confidence, loss, margin, top in rows:
        index = index_of[id]
        label, answer = int(split.labels[index]), int(logits[index].argmax())
        np.testing.assert_array_equal(image, split.images[index])
        assert said.maps is not None
        expected = as_jpeg(overlay(split.images[index], said.maps[index], 96))
        np.testing.assert_allclose(gradcam.astype(int), expected, atol=2)
        assert (truth, prediction) == (said.classes[label], said.classes[answer])
        others = np.delete(shares[index], label)
        assert confidence == pytest.approx(shares[index].max(), abs=1e-5)
        assert loss == pytest.approx(losses[index, label], abs=1e-4)
        assert margin == pytest.approx(shares[index, label] - others.max(), abs=1e-5)
        best = np.sort(shares[index])[::-1][:3]
        told = [part.rsplit(" ", 1) for part in top.split(", ")]
        assert told[0][0] == prediction
        assert [float(share) for _, share in told] == pytest.approx(best.tolist(), abs=6e-4)
        assert [shares[index, said.classes.index(name)] for name, _ in told] == pytest.approx(best.tolist(), abs=1e-6)
    column = [row[6] for row in rows]
    assert column == sorted(column, reverse=True)


def test_galleries_table_and_both_kinds_of_pictures_show_the_same_images(
    offline_run: OfflineRun, digits: Dataset, said: Predictions
) -> None:
    _, rows = artifact_of(offline_run, f"misclassified-{offline_run.summary['wandb_id']}").table("misclassified")
    index_of = {str(name): index for index, name in enumerate(digits.test.ids)}
    for name in ("correct", "misclassified"):
        plain, maps = gallery_of(offline_run, name), gallery_of(offline_run, f"gradcam_{name}")
        assert [caption for _, caption in plain] == [caption for _, caption in maps]
        assert len(plain) == 25
        for (picture, caption), (heat, _) in zip(plain, maps, strict=True):
            index = index_of[caption.partition(":")[0]]
            truth, answer = said.classes[said.labels[index]], said.classes[said.logits[index].argmax()]
            assert (truth == answer) == (name == "correct")
            share = softmax(said.logits[index].astype(np.float64)).max()
            assert caption == f"{digits.test.ids[index]}: {truth}, predicted {answer} ({100 * share:.0f} %)"
            # Each pixel four by four times.
            np.testing.assert_array_equal(picture, digits.test.images[index].repeat(4, axis=0).repeat(4, axis=1))
            assert said.maps is not None
            np.testing.assert_array_equal(heat, overlay(digits.test.images[index], said.maps[index], 128))
    wrong = [caption.partition(":")[0] for _, caption in gallery_of(offline_run, "misclassified")]
    assert wrong == [row[0] for row in rows[:25]]
    layers = gallery_of(offline_run, "gradcam_layers")
    assert [caption.partition(": ")[2] for _, caption in layers] == [gallery_of(offline_run, "misclassified")[0][1]] * 4
    # Alone an image has the same map but for rounding.
    worst = gallery_of(offline_run, "gradcam_misclassified")[0][0]
    assert np.abs(layers[-1][0].astype(int) - worst).max() <= 4


def test_predictions_and_images_are_artifacts_that_name_the_checkpoint(offline_run: OfflineRun) -> None:
    run_id = offline_run.summary["wandb_id"]
    report = json.loads((offline_run.folder / "evaluation.json").read_text())
    contents = {"predictions": {"predictions.npz", "evaluation.json"}, "misclassified": {"misclassified.npz"}}
    for kind, names in contents.items():
        artifact = artifact_of(offline_run, f"{kind}-{run_id}")
        assert (artifact.kind, artifact.aliases) == (kind, ["latest"])
        for name in names:
            assert artifact.files[name].read_bytes() == (offline_run.folder / name).read_bytes()
            assert artifact.files[name].is_relative_to(offline_run.folder)  # it can be uploaded later
        others = {name for name in artifact.files if not name.startswith("media/")} - names
        assert others == ({"misclassified.table.json"} if kind == "misclassified" else set())
        source = {"checkpoint": f"model-{run_id}:best", "checkpoint_of": run_id, "into": run_id}
        assert artifact.metadata == {**source, **report}


# Models whose answers are known


class Scripted(nn.Module):
    """Answers an image, which it knows by its first pixel, with a row of a table, and looks at it a little."""

    def __init__(self, answers: NDArray[np.float32]) -> None:
        super().__init__()
        self.answers = nn.Buffer(torch.from_numpy(answers))
        self.features = nn.Sequential(nn.Conv2d(3, answers.shape[1], 4, stride=4), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.answers[images[:, 0, 0, 0].long()]
        seen: Tensor = self.features(images).mean((2, 3))
        return answers + 1e-4 * seen


class Blind(nn.Module):
    """The same without looking."""

    def __init__(self, answers: NDArray[np.float32]) -> None:
        super().__init__()
        self.answers = nn.Buffer(torch.from_numpy(answers))

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.answers[images[:, 0, 0, 0].long()]
        return answers


def made(
    answers: NDArray[np.floating],
    labels: Sequence[int] | NDArray[np.int64],
    classes: Sequence[str] = (),
    kind: type[Scripted | Blind] = Scripted,
    **settings: Any,
) -> Inspection:
    """Returns the inspection of a model that answers as many random images as there are labels."""
    torch.manual_seed(0)
    count, num_classes = answers.shape
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    split = Split(images, np.asarray(labels, np.int64), np.array([f"test/{index:03d}" for index in range(count)]))
    batches = [
        (torch.from_numpy(part.transpose(0, 3, 1, 2).astype(np.float32)), torch.zeros(len(part), dtype=torch.int64))
        for part in np.split(images, range(17, count, 17))
    ]
    names = classes or [f"class {index}" for index in range(num_classes)]
    config = RunConfig(**{"gallery_size": 3, **settings})
    return inspection.inspect(kind(answers.astype(np.float32)), split, batches, config, FP32, names, "f" * 64)


def one_hot(labels: Sequence[int] | NDArray[np.int64], num_classes: int, height: float = 4) -> NDArray[np.float32]:
    """Returns logits that are zero but for the given classes."""
    chosen: NDArray[np.float32] = np.eye(num_classes, dtype=np.float32)[np.asarray(labels)]
    return height * chosen


def mixed() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns logits of 60 images and three classes, and labels that they are right about in most cases."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 3, 60)
    return (one_hot(labels, 3, 1) + generator.normal(size=(60, 3))).astype(np.float32), labels


@pytest.fixture(scope="module")
def made_run(clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> OfflineRun:
    """Four models in one offline run of W&B: one that is partly right, a perfect one, one of NaN, and a blind one."""
    folder = tmp_path_factory.mktemp("made")
    answers, labels = mixed()
    models = {
        "mixed": made(answers, labels),
        "perfect": made(one_hot(labels, 3), labels),
        "nan": made(np.full((60, 3), np.nan), labels, gallery_size=1),
        "blind": made(answers, labels, kind=Blind, gallery_size=1),
    }
    config = RunConfig(data="digits")
    with warnings.catch_warnings(), WandbTracker(config, {}, "evaluate", folder, "made", "offline") as tracker:
        warnings.simplefilter("error")
        for name, each in models.items():
            (folder / name).mkdir()
            inspection.write(each, folder / name)
            inspection.log(each, folder / name, tracker, name, {"checkpoint": "none"})
        tracker.log_images("many", [(np.full((2, 2, 3), index, np.uint8), str(index)) for index in range(110)])
    summary = {"wandb_folders": [str(tracker.folder)], "wandb_id": "made"}
    assert tracker.folder is not None
    return OfflineRun(folder, folder, folder, "", "", summary, inspect(tracker.folder))


def test_wandbs_charts_have_the_numbers_of_other_libraries(made_run: OfflineRun) -> None:
    answers, labels = mixed()
    predicted = answers.argmax(1)
    drawn, rows = chart_of(made_run, "confusion_matrix")
    assert drawn["panelDefId"] == "wandb/confusion_matrix/v1"
    counts = {(actual, answer): count for actual, answer, count in rows}
    matrix = confusion_matrix(labels, predicted)
    assert counts == {(f"class {i}", f"class {j}"): matrix[i, j] for i in range(3) for j in range(3)}
    assert 10 < np.trace(matrix) < 50

    drawn, rows = chart_of(made_run, "class_accuracy")
    assert drawn["panelDefId"] == "wandb/bar/v0" and drawn["stringSettings"]["title"] == "accuracy by class"
    recalls = recall_score(labels, predicted, average=None)
    assert {name: accuracy for accuracy, name in rows} == {f"class {i}": pytest.approx(recalls[i]) for i in range(3)}

    drawn, lines = lines_of(made_run, "reliability")
    assert drawn["panelDefId"] == "wandb/lineseries/v0" and drawn["stringSettings"]["xname"] == "confidence"
    # The model looks at the images too, which moves its answers a little.
    scores = softmax(Predictions.load(made_run.folder / "mixed" / "predictions.npz").logits.astype(np.float64), axis=1)
    confidence, right = scores.max(1), predicted == labels
    bins = [np.flatnonzero((confidence > low / 15) & (confidence <= (low + 1) / 15)) for low in range(15)]
    expected = [(confidence[bin].mean(), right[bin].mean()) for bin in bins if len(bin)]
    np.testing.assert_allclose(lines["accuracy"], expected)
    np.testing.assert_allclose(lines["perfectly calibrated"], [(x, x) for x, _ in expected])
    ece = sum(len(bin) * abs(confidence[bin].mean() - right[bin].mean()) for bin in bins if len(bin)) / 60
    assert drawn["stringSettings"]["title"] == f"reliability, ECE {ece:.4f}"

    drawn, lines = lines_of(made_run, "precision_recall")
    assert drawn["panelDefId"] == "wandb/lineseries/v0" and drawn["stringSettings"]["xname"] == "recall"
    assert lines.keys() == {f"class {index}" for index in range(3)}
    for index in range(3):
        expected = [(step / 50, best_precision(scores[:, index], labels == index, step, 50)) for step in range(51)]
        np.testing.assert_allclose(lines[f"class {index}"], expected)


def best_precision(scores: NDArray[np.float64], positive: NDArray[np.bool_], step: int, steps: int) -> float:
    """Returns the best precision over all thresholds at which the recall is at least step / steps, by trying each."""
    found = []
    for threshold in scores:
        hits, taken = int((positive & (scores >= threshold)).sum()), int((scores >= threshold).sum())
        if hits * steps >= step * int(positive.sum()):
            found.append(hits / taken)
    return max(found)


@pytest.mark.parametrize("seed", range(4))
def test_precision_over_recall_is_the_best_of_all_thresholds_also_with_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.repeat([0, 1], [10, 40])  # of ten images, recalls of 0.7 and the like are steps of the chart
    logits = np.stack([generator.integers(-2, 3, 50) + 2.0 * (labels == 0) * (seed > 1), np.zeros(50)], axis=1)
    said = Predictions("test", ("a", "b"), "", np.arange(50).astype(str), labels, logits.astype(np.float32))
    for label in (0, 1):
        expected = [best_precision(said.probabilities[:, label], labels == label, step, 50) for step in range(51)]
        assert inspection.precisions(said, label) == pytest.approx(expected, abs=1e-12)


def test_the_precision_at_a_recall_is_that_of_the_threshold_that_just_reaches_it() -> None:
    ranked = [0] * 7 + [1] * 5 + [0] * 3  # seven of ten are found before anything else is taken for them
    logits = np.stack([np.linspace(3, -3, 15), np.zeros(15)], axis=1).astype(np.float32)
    said = Predictions("test", ("a", "b"), "", np.arange(15).astype(str), np.array(ranked), logits)
    precisions = inspection.precisions(said, 0)
    assert precisions[35] == 1 and precisions[36] == 10 / 15  # at recalls of 0.7 and 0.72


def test_the_table_of_a_model_that_is_often_right_and_the_keys_are_as_in_any_run(
    made_run: OfflineRun, offline_run: OfflineRun
) -> None:
    assert logged_keys(made_run) == KEYS | {"many"}
    assert logged_keys(offline_run) >= KEYS
    answers, labels = mixed()
    columns, rows = artifact_of(made_run, "misclassified-mixed").table("misclassified")
    assert columns == list(TABLE_COLUMNS)
    said = Predictions.load(made_run.folder / "mixed" / "predictions.npz")
    np.testing.assert_allclose(said.logits, answers, atol=0.02)  # the model looks at the images a little
    wrong = np.flatnonzero(answers.argmax(1) != labels)
    split = made(answers, labels).split
    check_rows(rows, split, said.logits, said, wrong.tolist())
    images = load_images(made_run.folder / "mixed" / "misclassified.npz")
    assert images.keys() == {str(split.ids[index]) for index in wrong}
    for index in wrong:
        np.testing.assert_array_equal(images[str(split.ids[index])], split.images[index])


def test_wandb_gets_no_more_pictures_than_it_shows(made_run: OfflineRun) -> None:
    (row,) = made_run.rows("many.captions")
    assert row["many.captions"] == [str(index) for index in range(108)] and row["many.count"] == 108


@pytest.mark.parametrize("name", ["perfect", "nan", "blind"])
def test_odd_models_have_the_same_columns_and_files(made_run: OfflineRun, name: str) -> None:
    number = ["mixed", "perfect", "nan", "blind"].index(name)
    columns, rows = artifact_of(made_run, f"misclassified-{name}").table("misclassified")
    assert columns == list(TABLE_COLUMNS)
    _, labels = mixed()
    report = json.loads((made_run.folder / name / "evaluation.json").read_text())
    figures = {path.stem for path in (made_run.folder / name / "figures").iterdir()}
    images = load_images(made_run.folder / name / "misclassified.npz")
    assert sorted(images) == sorted(row[0] for row in rows)
    assert artifact_of(made_run, f"predictions-{name}").metadata == {"checkpoint": "none", **report}
    if name == "perfect":
        assert (rows, report["accuracy"]) == ([], 1)
        galleries = [row for row in made_run.of_type("history") if "galleries/misclassified" in " ".join(row["item"])]
        assert len(galleries) == 3  # not even an empty one
        assert len(gallery_of(made_run, "correct", number)) == 3
        # Without a mistake the layers are shown of the first image.
        captions = [caption for _, caption in gallery_of(made_run, "gradcam_layers", number)]
        assert captions == [f"features: test/000: class {labels[0]}, predicted class {labels[0]} (96 %)"]
    if name == "nan":
        # NaN counts as largest, so that all is said to be of the first class.
        assert [row[3] for row in rows] == [f"class {label}" for label in labels if label]
        assert {row[4] for row in rows} == {"class 0"}
        assert {str(row[column]).lower() for row in rows for column in (5, 6, 7)} <= {"nan", "none"}
        assert report["loss"] is None and report["ece"] is None
        assert report["accuracy"] == pytest.approx(np.mean(labels == 0))
        assert lines_of(made_run, "reliability", number)[1] == {}
    if name == "blind":
        assert figures == {name for name in EIGHT if "gradcam" not in name}
        assert rows and all(row[2] is None for row in rows)
        assert len(made_run.rows("galleries/correct._type")) == 4
        assert len(made_run.rows("galleries/gradcam_correct._type")) == 3
        assert Predictions.load(made_run.folder / name / "predictions.npz").maps is None
    else:
        assert figures == EIGHT


# What is logged, without W&B


class Kept(Tracker):
    """Keeps what it is told, as a run of W&B would take it."""

    mode = "offline"

    def __init__(self) -> None:
        self.galleries: dict[str, list[tuple[Picture, str]]] = {}
        self.tables: dict[str, Table] = {}
        self.charts: dict[str, Any] = {}

    def log_images(self, key: str, images: Sequence[tuple[Picture, str]]) -> None:
        self.galleries[key.removeprefix("galleries/")] = list(images)

    def log_table(self, key: str, table: Table) -> None:
        self.tables[key] = table

    def log_confusion_matrix(
        self, key: str, labels: Sequence[int], predicted: Sequence[int], classes: Sequence[str]
    ) -> None:
        self.charts[key] = (list(labels), list(predicted), list(classes))

    def log_lines(
        self, key: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], title: str, of: str
    ) -> None:
        self.charts[key] = lines

    def log_bars(self, key: str, bars: Mapping[str, float], title: str, of: Sequence[str]) -> None:
        self.charts[key] = bars


def told(found: Inspection, tmp_path: Path) -> Kept:
    """Returns what the evaluation tells W&B."""
    tracker = Kept()
    inspection.log(found, tmp_path, tracker, "id", {})
    return tracker


def test_of_a_model_that_is_always_wrong_nothing_correct_is_shown(tmp_path: Path) -> None:
    labels = np.arange(12) % 3
    found = made(one_hot((labels + 1) % 3, 3) * (1 + np.arange(12))[:, None], labels)
    tracker = told(found, tmp_path)
    assert tracker.galleries["correct"] == tracker.galleries["gradcam_correct"] == []
    # The surer the answer, the higher the loss.
    assert [row[0] for row in tracker.tables["misclassified"].rows] == [f"test/{i:03d}" for i in range(11, -1, -1)]
    assert [caption for _, caption in tracker.galleries["misclassified"]] == [
        f"test/{i:03d}: class {i % 3}, predicted class {(i + 1) % 3} (100 %)" for i in (11, 10, 9)
    ]
    assert tracker.charts["charts/class_accuracy"] == {"class 0": 0, "class 1": 0, "class 2": 0}
    (text,) = [each.get_text() for axes in FIGURES["correct"](found).axes for each in axes.texts]
    assert text == "none"


def test_two_classes_have_two_best_ones(tmp_path: Path) -> None:
    tracker = told(made(one_hot([0, 0, 1, 1], 2, 2), [0, 1, 1, 0]), tmp_path)
    share = 1 / (1 + np.exp(-2))
    tops = {row[3]: row[-1] for row in tracker.tables["misclassified"].rows}
    assert tops.keys() == {"class 0", "class 1"}
    for truth, other in (("class 0", "class 1"), ("class 1", "class 0")):
        # Higher by 0.0001 times what the model sees.
        answer, rest = (part.rsplit(" ", 1) for part in tops[truth].split(", "))
        assert (answer[0], rest[0]) == (other, truth)
        assert [float(answer[1]), float(rest[1])] == pytest.approx([share, 1 - share], abs=2e-3)


def test_a_class_without_images_has_no_line_but_a_place(tmp_path: Path) -> None:
    labels = np.array([0, 2, 0, 2, 2])
    tracker = told(made(one_hot([0, 2, 1, 2, 0], 3), labels), tmp_path)
    assert tracker.charts["charts/precision_recall"].keys() == {"class 0", "class 2"}
    assert tracker.charts["charts/class_accuracy"] == {"class 0": 0.5, "class 1": 0, "class 2": pytest.approx(2 / 3)}
    assert tracker.charts["charts/confusion_matrix"][2] == ["class 0", "class 1", "class 2"]


def test_what_wandb_cannot_show_of_two_hundred_classes_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.arange(240) % 200
    tracker = told(made(one_hot((labels + 1) % 200, 200), labels), tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "W&B's chart of precision over recall has the first 20 of 200 classes",
        "W&B has no confusion matrix of 200 classes (100 at most); figures/ has it",
    ]
    assert tracker.charts.keys() == {"charts/reliability", "charts/class_accuracy", "charts/precision_recall"}
    assert list(tracker.charts["charts/precision_recall"]) == [f"class {index}" for index in range(20)]
    assert len(tracker.charts["charts/class_accuracy"]) == 200


NAMES = ("$x^2", "<script>alert(1)</script>", "a_b%", "猫 🐈 שלום", "n" * 300, "class")


def test_names_of_any_kind_are_shown_as_they_are(tmp_path: Path) -> None:
    labels = np.arange(12) % 6
    found = made(one_hot((labels + 1) % 6, 6), labels, NAMES, gallery_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inspection.write(found, tmp_path)
        tracker = told(found, tmp_path)
    assert {row[3] for row in tracker.tables["misclassified"].rows} == set(NAMES)
    assert set(tracker.charts["charts/class_accuracy"]) == set(NAMES)
    assert Predictions.load(tmp_path / "predictions.npz").classes == NAMES
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert [score["name"] for score in report["per_class"]] == list(NAMES)


def test_layers_can_be_chosen_and_the_last_one_is_that_of_the_galleries(tmp_path: Path) -> None:
    answers, labels = mixed()
    found = made(answers, labels, gradcam_layers=("features", "features.0"))
    assert found.predictions.layer == "features.0"
    tracker = told(found, tmp_path)
    captions = [caption for _, caption in tracker.galleries["gradcam_layers"]]
    assert [caption.partition(":")[0] for caption in captions] == ["features", "features.0"]
    last, first = tracker.galleries["gradcam_layers"][-1][0], tracker.galleries["gradcam_misclassified"][0][0]
    assert np.abs(last.astype(int) - first).max() <= 4
    # Before the ReLU there is more to see: the layer does matter.
    other = made(answers, labels).predictions.maps
    assert other is not None and found.predictions.maps is not None
    assert not np.allclose(other, found.predictions.maps)
    with pytest.raises(UserError, match=r"unknown layer 'layer5'"):
        made(answers, labels, gradcam_layers=("layer5",))
    with pytest.raises(UserError, match=r"unknown layer 'features'"):
        made(answers, labels, kind=Blind, gradcam_layers=("features",))


def test_a_model_without_maps_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers, labels = mixed()
    inspection.write(made(answers[:9], labels[:9], kind=Blind, gallery_size=0), tmp_path)
    assert capsys.readouterr().out.startswith("no Grad-CAM: resnet18 has no layer whose output is a map")


def halves(right: int, wrong: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns logits that are right about so many images and wrong about so many others, and labels."""
    labels = np.arange(right + wrong) % 2
    return one_hot(np.where(np.arange(right + wrong) < right, labels, 1 - labels), 2), labels


def test_a_table_of_fewer_rows_has_the_highest_losses_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, labels = mixed()
    every = told(made(answers, labels), tmp_path).tables["misclassified"].rows
    assert capsys.readouterr().out == ""
    few = told(made(answers, labels, table_rows=4), tmp_path).tables["misclassified"].rows
    assert len(every) > 4 and [row[0] for row in few] == [row[0] for row in every[:4]]
    assert capsys.readouterr().out == (
        f"W&B's table has 4 of {len(every)} misclassified images, the highest losses (table_rows, 10,000 at most)\n"
    )
    none = told(made(answers, labels, table_rows=0), tmp_path).tables["misclassified"]
    assert (none.columns, list(none.rows)) == (TABLE_COLUMNS, [])
    assert "0 of" in capsys.readouterr().out


@pytest.mark.parametrize(("right", "wrong"), [(3, 120), (120, 3)])
def test_of_a_gallery_larger_than_wandb_shows_the_figure_has_all_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], right: int, wrong: int
) -> None:
    found = made(*halves(right, wrong), gallery_size=115)
    told(found, tmp_path)
    assert capsys.readouterr().out == "W&B shows 108 images of a gallery; figures/ has all 115\n"
    larger = "misclassified" if wrong > right else "correct"
    figure = FIGURES[larger](found)
    assert sum(len(axes.images) for axes in figure.axes) == 115
    inspection.log(found, tmp_path, Tracker(), "id", {})
    assert capsys.readouterr().out == ""  # nothing is left out where nothing is tracked


def test_galleries_may_be_empty_or_hold_all_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logits, labels = halves(7, 5)
    none = told(made(logits, labels, gallery_size=0), tmp_path)
    assert {len(none.galleries[name]) for name in ("correct", "gradcam_correct", "misclassified")} == {0}
    assert len(none.tables["misclassified"].rows) == 5
    everything = told(made(logits, labels, gallery_size=400), tmp_path)
    assert [len(everything.galleries[name]) for name in ("correct", "misclassified")] == [7, 5]
    assert capsys.readouterr().out == ""


def test_with_flips_the_galleries_tell_the_mean(tmp_path: Path) -> None:
    # The model knows an image by its upper left pixel: mirrored, it is the one of its upper right pixel.
    logits, labels = one_hot([0, 1, 1, 0], 2), np.array([0, 1, 0, 1])
    plain, flipped = made(logits, labels, gallery_size=0), None
    corners = plain.split.as_array()[:, 0, 31, 0]
    table = np.zeros((256, 2), np.float32)
    table[:4], table[corners] = logits, [10, 0]
    torch.manual_seed(0)
    flipped = inspection.inspect(
        Scripted(table), plain.split, plain.batches, RunConfig(tta="flip"), FP32, ["a", "b"], "f" * 64
    )
    np.testing.assert_allclose(flipped.predictions.logits, (logits + np.array([10, 0])) / 2, atol=0.02)
    inspection.write(flipped, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["tta"] == "flip"
