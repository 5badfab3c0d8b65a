"""`import eva`: quick, complete, and the same as the command line."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, OfflineRun, flags
from scipy.special import softmax
from torch import nn

import eva
from eva import api, records
from eva.cli import main
from eva.data import load_dataset
from eva.predictions import Predictions, load_images, save_images

CLOCKS = ("images_per_second", "seconds", "train_epoch/seconds")


# The names


def test_importing_eva_is_quick_and_each_name_is_there(clean_environment: dict[str, str]) -> None:
    program = """
import sys
import eva
heavy = {"torch", "torchvision", "wandb", "albumentations", "pydantic", "numpy", "matplotlib", "cv2", "yaml"}
print(heavy & sys.modules.keys())
print(sorted({*eva.__all__} - {*dir(eva)}), "torch" in sys.modules)
eva.RECIPES, eva.UserError
print("torch" in sys.modules)
for name in eva.__all__:
    assert getattr(eva, name) is getattr(eva, name) is not None, name
print("torch" in sys.modules, "wandb" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean_environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["set()", "[] False", "False", "True False"]


def test_names_lead_to_what_they_name() -> None:
    assert {name: vars(api)[name] for name in ("train", "find_lr", "evaluate", "compare", "gallery", "load_model")} == {
        name: getattr(eva, name) for name in ("train", "find_lr", "evaluate", "compare", "gallery", "load_model")
    }
    assert sorted(eva.__all__) == sorted({*eva.__all__, *eva._HOME})  # none is missing from either list
    with pytest.raises(AttributeError, match="module 'eva' has no attribute 'trian'"):
        eva.__getattr__("trian")


# Runs


def rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file without what a clock says."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in CLOCKS} for row in csv.DictReader(file)]


def test_train_trains_as_the_command_line_does(offline_run: OfflineRun, tmp_path: Path) -> None:
    result = eva.train(**SMALL_RUN, tracking="disabled", out=str(tmp_path / "run"))
    assert (result.status, result.folder) == ("finished", tmp_path / "run")
    assert result.summary["test_loss_best"] == offline_run.summary["test_loss_best"]
    for name in ("history.csv", "epochs.csv"):
        assert rows(result.folder / name) == rows(offline_run.folder / name)
    assert json.loads((result.folder / "summary.json").read_text()) == result.summary
    with pytest.raises(eva.UserError, match=r"unknown setting 'lr_maxx'.*\n.*epochs must be a whole number"):
        eva.train(lr_maxx=1, epochs="many")


def test_settings_may_be_tuples_lists_and_a_recipe_that_others_change(tmp_path: Path) -> None:
    with pytest.raises(eva.UserError, match=r"^arguments: unknown setting 'a'; eva train --help lists the settings$"):
        eva.train(recipe="resnet18-layernorm", stage_strides=(1, 2, 2, 2), tags=["x"], a=1)
    with pytest.raises(eva.UserError, match=r"^unknown recipe 'resnet19'"):
        eva.find_lr(recipe="resnet19")


def test_find_lr_finds_what_the_command_line_finds(tmp_path: Path) -> None:
    settings = {**SMALL_RUN, "tracking": "disabled", "find_lr_steps": 10, "find_lr_start": 0.01, "find_lr_end": 100}
    assert main(["find_lr", *flags(settings), f"--out={tmp_path / 'command'}"]) == 0
    result = eva.find_lr(**settings, out=str(tmp_path / "call"))
    told = json.loads((tmp_path / "command" / "summary.json").read_text())
    assert 0 < result.summary["lr_min"] < result.summary["lr_max"]
    assert [result.summary[name] for name in ("lr_min", "lr_max")] == [told[name] for name in ("lr_min", "lr_max")]
    assert rows(tmp_path / "call" / "lr_range.csv") == rows(tmp_path / "command" / "lr_range.csv")
    assert (result.folder / "figures" / "lr_range.png").exists()


@pytest.fixture
def run(offline_run: OfflineRun, tmp_path: Path) -> Path:
    """A copy of the run's folder, without W&B's part of it."""
    return Path(shutil.copytree(offline_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("wandb")))


def test_evaluate_evaluates_as_the_run_did_at_its_end(offline_run: OfflineRun, run: Path) -> None:
    (run / "predictions.npz").unlink()
    result = eva.evaluate(run, tracking="disabled", gallery_size=0)
    assert result.folder == run
    ours, theirs = (Predictions.load(folder / "predictions.npz") for folder in (run, offline_run.folder))
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-5)
    assert result.summary["evaluation"]["accuracy"] == offline_run.summary["evaluation"]["accuracy"]
    with pytest.raises(eva.UserError, match=r"an evaluation can change .*, but got epochs$"):
        eva.evaluate(str(run), epochs=3)
    with pytest.raises(eva.UserError, match="is no run folder, no checkpoint and no W&B artifact"):
        eva.evaluate(run / "nothing")


@pytest.mark.parametrize("name", ["", "best.safetensors"])
def test_load_model_gives_a_network_and_the_policy_of_its_images(offline_run: OfflineRun, name: str) -> None:
    torch.manual_seed(7)
    model, policy = eva.load_model(offline_run.folder / name)
    assert isinstance(model, nn.Module) and not any(module.training for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    images = load_dataset("digits").test.images[:20]
    with torch.no_grad():
        logits = model(torch.stack([policy(image, None) for image in images]))
    said = Predictions.load(offline_run.folder / "predictions.npz")
    np.testing.assert_allclose(logits.numpy(), said.logits[:20], atol=1e-4)
    with pytest.raises(eva.UserError, match=r"is no run folder: it has no summary\.json"):
        eva.load_model(offline_run.folder / "figures")


def test_compare_writes_what_the_command_line_writes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "other")
    summary = json.loads((run / "summary.json").read_text())
    (tmp_path / "other" / "summary.json").write_text(json.dumps({**summary, "wandb_id": "other"}))
    comparison = eva.compare(run, tmp_path / "other", out=tmp_path / "call")
    assert main(["compare", str(run), str(tmp_path / "other"), f"--out={tmp_path / 'command'}"]) == 0
    assert eva.table(comparison) in capsys.readouterr().out
    for name in ("compare.json", "compare.html"):
        assert (tmp_path / "call" / name).stat().st_size > 1000
    ours, theirs = (json.loads((tmp_path / each / "compare.json").read_text()) for each in ("call", "command"))
    assert ours == theirs
    with pytest.raises(eva.UserError, match="no run folder, and no folder of runs, at"):
        eva.compare(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(eva.UserError, match=r"cannot write the comparison to '.*file/x': Not a directory"):
        eva.compare(run, out=tmp_path / "file" / "x")
    assert [record.id for record in api.read_runs(run, tmp_path / "other")] == [summary["wandb_id"], "other"]


# Galleries


def pictures(figure: matplotlib.figure.Figure) -> list[Any]:
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def texts(figure: matplotlib.figure.Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_a_gallery_needs_nothing_but_the_run_folder(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("summary.json", "config.yaml", "predictions.npz", "misclassified.npz"):
        shutil.copyfile(run / name, kept / name)
    config = (kept / "config.yaml").read_text()
    (kept / "config.yaml").write_text(config.replace("data: digits", "data: folder:/gone"))
    assert "/gone" in (kept / "config.yaml").read_text()

    said, images = Predictions.load(run / "predictions.npz"), load_images(run / "misclassified.npz")
    rows = np.arange(len(said))
    losses = -np.log(softmax(said.logits.astype(np.float64), axis=1)[rows, said.labels])
    wrong = [index for index in np.argsort(-losses) if said.logits[index].argmax() != said.labels[index]]
    figure = eva.gallery(kept, 7)
    assert len(pictures(figure)) == 7
    for picture, index in zip(pictures(figure), wrong, strict=False):
        np.testing.assert_array_equal(picture, images[str(said.ids[index])])
    shown = texts(figure)
    assert f"kept: 7 of {len(wrong)} misclassified, highest loss first" in shown
    assert [word for word in shown.split() if word in said.ids] == [said.ids[index] for index in wrong[:7]]

    both = pictures(eva.gallery(str(kept), count=3, gradcam=True))
    assert len(both) == 6 and said.maps is not None
    for number, index in enumerate(wrong[:3]):
        np.testing.assert_array_equal(both[2 * number], images[str(said.ids[index])])
        np.testing.assert_array_equal(
            both[2 * number + 1], eva.overlay(images[str(said.ids[index])], said.maps[index], 128)
        )
    assert len(pictures(eva.gallery(kept))) == 25
    assert len(pictures(eva.gallery(kept, 30))) == min(len(wrong), 30)


def test_a_run_without_what_a_gallery_needs_is_named(run: Path, tmp_path: Path) -> None:
    images = load_images(run / "misclassified.npz")
    names = list(images)[1:]
    save_images(run / "misclassified.npz", np.array(names), np.stack([images[name] for name in names]))
    with pytest.raises(eva.UserError, match=r"run' lacks images of what it got wrong: .*1 of"):
        eva.gallery(run, count=1000)
    (run / "misclassified.npz").write_bytes(b"damaged")
    with pytest.raises(eva.UserError, match=r"run' lacks images of what it got wrong: .*not a readable file of images"):
        eva.gallery(run)
    said = Predictions.load(run / "predictions.npz")
    Predictions(said.split, said.classes, "", said.ids, said.labels, said.logits).save(run / "predictions.npz")
    save_images(run / "misclassified.npz", np.array(list(images)), np.stack(list(images.values())))
    assert len(pictures(eva.gallery(run, 2))) == 2
    with pytest.raises(eva.UserError, match="run' has no Grad-CAM maps"):
        eva.gallery(run, gradcam=True)
    (run / "predictions.npz").unlink()
    with pytest.raises(eva.UserError, match=r"run' has no predictions: .*not evaluated yet: eva evaluate does it"):
        eva.gallery(run)
    with pytest.raises(eva.UserError, match="is no run folder"):
        eva.gallery(tmp_path)
    assert records.read_run(run).predictions is None


# Schedules


def test_a_schedule_is_the_one_that_training_steps_through(offline_run: OfflineRun) -> None:
    settings = {name: SMALL_RUN[name] for name in ("epochs", "peak_epoch", "lr_max")}
    schedule = eva.build_schedule(3, **settings)
    history = records.read_columns(offline_run.folder / "history.csv", [])
    assert [schedule(step, []).lr for step in range(6)] == history["lr"]
    assert [schedule(step, []).momentum for step in range(6)] == history["momentum"]
    assert max(history["lr"]) == pytest.approx(0.05)
    constant = eva.build_schedule(10, schedule="constant", lr_max=0.3)
    assert {constant(step, []).lr for step in range(200)} == {0.3}
    with pytest.raises(eva.UserError, match=r"^a schedule needs numbers for lr_min and lr_max, but got find$"):
        eva.build_schedule(3, recipe="resnet9-onecycle")
    with pytest.raises(eva.UserError, match=r"peak_epoch must be in \[0, epochs\)"):
        eva.build_schedule(3, epochs=2)


def test_parts_are_built_by_name_with_plain_arguments() -> None:
    dataset = eva.load_dataset("digits")
    mean, std = eva.channel_statistics(dataset.train.images)
    policy = eva.build_policy("digits", mean, std)
    assert policy(dataset.train.images[0], (0, 0, 0)).shape == (3, 32, 32)
    model = eva.build_model("resnet9", num_classes=10)
    assert eva.count_parameters(model) == sum(parameter.numel() for parameter in model.parameters())
    image = torch.zeros(1, 3, 32, 32)
    cams = eva.GradCAM(model, eva.stages(model, image)[-1])(image)
    assert next(iter(cams.maps.values())).shape == (1, 32, 32)
