"""One run from configuration to files: what it leaves, what it refuses, and how it goes on after Ctrl-C."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BIN, SMALL_RUN, OfflineRun, flags, inspect
from PIL import Image
from safetensors.torch import load_file
from test_loop import state_of

from eva import experiment, run_folder
from eva.checkpoints import load_weights
from eva.config import Failure, Layer, RunConfig, UserError, read_yaml, resolve
from eva.evaluation import evaluate, predict
from eva.experiment import build, find_lr, show_policy, show_schedule, stop_signals, train
from eva.predictions import Predictions

SUMMARY_KEYS = {
    *("status", "job", "recipe", "data", "data_fingerprint", "train_images", "parameters", "selected_on"),
    *("wandb_id", "wandb_mode", "wandb_folders", "wandb_lost"),
    *("lr_min", "lr_max", "val_accuracy_last", "val_accuracy_best"),
    *("best_epoch", "epochs", "steps", "seconds", "images_per_second", "hardware"),
}
TEST_KEYS = {"test_accuracy_last", "test_accuracy_best", "test_loss_best"}
EVALUATED = {"predictions.npz", "misclassified.npz", "evaluation.json"}


def make_config(out: Path, **settings: Any) -> RunConfig:
    config, _ = resolve([Layer("test", {**SMALL_RUN, "tracking": "disabled", "out": str(out), **settings})])
    return config


def without_clock(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    clock = ("images_per_second", "seconds", "train_epoch/seconds")
    return [{name: text for name, text in row.items() if name not in clock} for row in rows]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# What a run leaves


def test_a_run_leaves_its_files(offline_run: OfflineRun) -> None:
    names = (
        "config.yaml",
        "summary.json",
        "history.csv",
        "epochs.csv",
        "best.safetensors",
        "state",
        ".lock",
        "model.txt",
        "policy.json",
        "predictions.npz",
        "misclassified.npz",
        "evaluation.json",
    )
    assert all((offline_run.folder / name).stat().st_size > 0 for name in names)
    assert {path.name for path in offline_run.folder.iterdir()} == {*names, "figures", "wandb"}
    for name in ("loss", "accuracy", "lr"):
        with Image.open(offline_run.folder / "figures" / f"{name}.png") as picture:
            assert picture.width > 200
    assert len(rows(offline_run.folder / "history.csv")) == 6
    assert len(rows(offline_run.folder / "epochs.csv")) == 2


def test_the_summary_says_what_the_run_came_to(offline_run: OfflineRun) -> None:
    summary = offline_run.summary
    assert summary.keys() == SUMMARY_KEYS | TEST_KEYS | {"evaluation"}
    assert (summary["status"], summary["epochs"], summary["steps"]) == ("finished", 2, 6)
    assert (summary["selected_on"], summary["train_images"], summary["wandb_mode"]) == ("val", 60, "offline")
    epochs = rows(offline_run.folder / "epochs.csv")
    accuracies = [float(row["val/accuracy"]) for row in epochs]
    assert (summary["val_accuracy_last"], summary["val_accuracy_best"]) == (accuracies[-1], max(accuracies))
    assert summary["seconds"] == float(rows(offline_run.folder / "history.csv")[-1]["seconds"])
    assert summary["images_per_second"] == pytest.approx(120 / summary["seconds"])


def test_the_command_line_says_where_things_are(offline_run: OfflineRun) -> None:
    for part in (
        f"run folder: {offline_run.folder}",
        f"figure: {offline_run.folder}/figures/loss.png",
        f"wandb leet {offline_run.summary['wandb_folders'][-1]}",
        f"wandb sync {offline_run.summary['wandb_folders'][-1]}",
        "lr_max = 0.05  (command line)",
    ):
        assert part in offline_run.stdout


def test_the_written_configuration_gives_the_same_run(offline_run: OfflineRun, tmp_path: Path) -> None:
    changed = {"out": str(tmp_path / "run"), "tracking": "disabled", "evaluate": False}
    config, _ = resolve([Layer("file", read_yaml(offline_run.folder / "config.yaml")), Layer("test", changed)])
    result = train(config)
    assert result.status == "finished"
    for name in ("history.csv", "epochs.csv"):
        ours, theirs = rows(tmp_path / "run" / name), rows(offline_run.folder / name)
        assert without_clock(ours) == without_clock(theirs)
    assert result.summary["test_loss_best"] == offline_run.summary["test_loss_best"]
    assert not (tmp_path / "run" / "wandb").exists()
    # It was not evaluated. The weights are the same all the same: the last ones stay where they are.
    assert not {path.name for path in (tmp_path / "run").iterdir()} & EVALUATED
    assert {path.stem for path in (tmp_path / "run" / "figures").iterdir()} == {"loss", "accuracy", "lr"}
    assert "evaluation" not in result.summary
    ours, theirs = (state_of(folder)["model"] for folder in (tmp_path / "run", offline_run.folder))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    best = load_file(offline_run.folder / "best.safetensors")
    assert all(
        torch.equal(tensor, best[name]) for name, tensor in load_file(tmp_path / "run" / "best.safetensors").items()
    )


def test_test_is_measured_at_the_end_with_the_last_and_with_the_best_weights(offline_run: OfflineRun) -> None:
    assert not any("test" in column for column in rows(offline_run.folder / "epochs.csv")[0])
    assert offline_run.rows("test/accuracy") == []
    config, _ = resolve([Layer("file", read_yaml(offline_run.folder / "config.yaml"))])
    parts = build(config)
    load_weights(offline_run.folder / "best.safetensors", parts.model)
    best = evaluate(parts.model, parts.test_loader, parts.hardware)
    assert best.count == len(parts.dataset.test) > 100
    assert offline_run.summary["test_accuracy_best"] == best.accuracy
    assert offline_run.summary["test_loss_best"] == pytest.approx(best.loss, rel=1e-4)
    val = evaluate(parts.model, parts.watched_loader, parts.hardware)
    assert offline_run.summary["val_accuracy_best"] == val.accuracy


def test_without_val_test_is_watched_and_the_summary_says_so(tmp_path: Path) -> None:
    # With this seed the second epoch is no better than the first, so that the best weights are not the last.
    config = make_config(tmp_path / "run", val_fraction=0, max_steps=4, evaluate=True, gallery_size=0, seed=1)
    result = train(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == dict(result.summary)
    assert summary["selected_on"] == "test"
    epochs = rows(tmp_path / "run" / "epochs.csv")
    accuracies = [float(row["test/accuracy"]) for row in epochs]
    assert len(accuracies) == 2
    assert (summary["test_accuracy_last"], summary["test_accuracy_best"]) == (accuracies[-1], max(accuracies))
    assert not any(key.startswith("val_") for key in summary)
    # 3 batches of the first epoch and 1 of the second, 20 images each
    assert summary["steps"] == 4
    assert summary["images_per_second"] == pytest.approx(80 / summary["seconds"])
    # The best weights are evaluated on what was watched, and agree.
    said = Predictions.load(tmp_path / "run" / "predictions.npz")
    parts = build(config)
    load_weights(tmp_path / "run" / "best.safetensors", parts.model)
    logits, _ = predict(parts.model, parts.test_loader, parts.hardware)
    np.testing.assert_allclose(said.logits, logits, atol=1e-5)
    assert np.mean(said.predicted == said.labels) == summary["test_accuracy_best"] == summary["evaluation"]["accuracy"]


def test_the_split_that_is_evaluated_can_be_another_than_test(tmp_path: Path) -> None:
    result = train(make_config(tmp_path / "run", evaluate=True, gallery_size=0, split="val"))
    said = Predictions.load(tmp_path / "run" / "predictions.npz")
    assert said.split == result.summary["evaluation"]["split"] == "val"
    assert np.mean(said.predicted == said.labels) == result.summary["val_accuracy_best"]
    assert {str(name).split("/")[0] for name in said.ids} == {"train"}  # where val comes from
    with pytest.raises(UserError, match="split=val needs a val_fraction above 0"):
        make_config(tmp_path / "run", split="val", val_fraction=0)


def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    result = train(make_config(tmp_path / "run", lr_max=1e12, schedule="constant", epochs=9, evaluate=True))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result.status == summary["status"] == "diverged"
    assert len(rows(tmp_path / "run" / "history.csv")) == summary["steps"]
    assert not summary.keys() & {*TEST_KEYS, "evaluation"}
    assert not {path.name for path in (tmp_path / "run").iterdir()} & EVALUATED
    with pytest.raises(UserError, match="has ended \\(status 'diverged'\\): nothing to resume"):
        train(make_config(tmp_path / "run"), resume=tmp_path / "run")


# The range test and the pictures

FINDABLE = {"model": "resnet9", "train_limit": 300, "find_lr_steps": 12, "find_lr_start": 1e-3, "find_lr_end": 10}


def test_find_lr_leaves_curve_figure_and_rates(tmp_path: Path) -> None:
    result = find_lr(make_config(tmp_path / "run", **FINDABLE))
    curve = rows(tmp_path / "run" / "lr_range.csv")
    assert list(curve[0]) == ["lr", "loss", "smoothed"] and 5 <= len(curve) <= 12
    assert (tmp_path / "run" / "figures" / "lr_range.png").stat().st_size > 1000
    assert result.status == "finished"
    assert 0 < result.summary["lr_min"] < result.summary["lr_max"] < 10
    assert result.summary["lr_rule"]
    assert (tmp_path / "run" / "config.yaml").exists()


def test_train_uses_the_rates_that_it_finds(tmp_path: Path) -> None:
    settings = {**FINDABLE, "lr_min": "find", "lr_max": "find", "max_steps": 2, "momentum_min": 0.8}
    result = train(make_config(tmp_path / "run", **settings))
    found = result.summary["lr_min"], result.summary["lr_max"]
    assert all(isinstance(rate, float) for rate in found)
    written = read_yaml(tmp_path / "run" / "config.yaml")
    assert (written["lr_min"], written["lr_max"]) == found
    assert float(rows(tmp_path / "run" / "history.csv")[0]["lr"]) == found[0]  # one cycle begins at lr_min
    assert (tmp_path / "run" / "figures" / "lr_range.png").exists()


def test_show_policy_leaves_a_gallery(tmp_path: Path) -> None:
    result = show_policy(make_config(tmp_path / "run", policy="digits"))
    assert result.status == "finished"
    with Image.open(tmp_path / "run" / "figures" / "policy.png") as picture:
        assert picture.width > 9 * 32 and picture.height > 10 * 32  # nine columns, ten classes


def test_show_schedule_draws_a_picture_and_needs_numbers(tmp_path: Path) -> None:
    path = show_schedule(make_config(tmp_path, schedule="triangular", epochs=4))
    assert path == tmp_path / "schedule-triangular.png"
    with Image.open(path) as picture:
        assert picture.width > 200
    with pytest.raises(UserError, match="show_schedule needs numbers"):
        show_schedule(make_config(tmp_path, lr_max="find"))


# What is refused


def test_a_folder_made_for_a_run_that_cannot_be_built_is_removed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown model 'resnet10'.*did you mean"):
        train(make_config(tmp_path / "run", model="resnet10"))
    with pytest.raises(UserError, match="W&B online needs an account"):
        train(make_config(tmp_path / "run", tracking="online"))
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_into_a_folder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text("of another run")
    with pytest.raises(UserError, match="is not empty; choose another --out, or --resume"):
        train(make_config(folder))
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("summary.json", "of another run")]


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make run folder '.*file/run': Not a directory"):
        train(make_config(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run folder: it has no summary.json"),
        ("{", "is damaged: it is not JSON"),
        ("[]", "is no summary of a run"),
        ('{"status": "finished", "wandb_id": "a"}', r"has ended \(status 'finished'\): nothing to resume"),
        ('{"status": "stopped", "wandb_id": "a"}', r"has ended \(status 'stopped'\): nothing to resume"),
    ],
)
def test_what_is_no_interrupted_run_is_not_resumed(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=message):
        train(make_config(tmp_path), resume=tmp_path)


def test_the_state_of_an_older_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"status": "interrupted", "wandb_id": "a"}')
    (tmp_path / "state.pt").touch()
    with pytest.raises(UserError, match="is that of an older version of eva; start it anew"):
        train(make_config(tmp_path), resume=tmp_path)


def test_a_bug_is_one_line_and_its_traceback_is_in_the_run_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    told = r"ZeroDivisionError: .* \(a bug: the traceback is in .*log\.txt\)"
    with pytest.raises(Failure, match=told), experiment.open_run(make_config(folder), "train"):
        assert json.loads((folder / "summary.json").read_text())["status"] == "running"
        print(1 / 0)
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    log = (folder / "log.txt").read_text()
    assert "Traceback (most recent call last)" in log and "print(1 / 0)" in log


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "WAIT_SECONDS", 0.3)
    with experiment.open_run(make_config(tmp_path / "run"), "train"):
        with pytest.raises(UserError, match="is in the hands of another process"):
            train(make_config(tmp_path / "run"), resume=tmp_path / "run")
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "running"


def test_a_run_without_a_state_begins_again(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    with experiment.open_run(config, "train"):  # as a process leaves it that was killed before its first epoch ended
        pass
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert train(config, resume=tmp_path / "run").status == "finished"
    whole = train(make_config(tmp_path / "whole"))
    assert whole.summary["wandb_id"] != summary["wandb_id"]
    for name in ("history.csv", "epochs.csv"):
        ours, theirs = (without_clock(rows(folder / name)) for folder in (tmp_path / "run", tmp_path / "whole"))
        assert ours == theirs and len(ours) > 1


# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_handlers_are_given_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before  # a second one is real
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_ctrl_c_saves_says_how_to_go_on_and_the_resumed_run_has_every_step_once(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    folder = tmp_path / "run"
    settings = {**SMALL_RUN, "train_limit": 200, "epochs": 6, "workers": 1, "tracking": "offline", "out": folder}
    settings = {**settings, "augmentation": "albumentations", "evaluate": True, "gallery_size": 0}
    command = [str(BIN / "eva"), "train"]
    started = subprocess.Popen(
        [*command, *flags(settings)],
        env=clean_environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not (folder / "history.csv").exists() or len(rows(folder / "history.csv")) < 5:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to W&B's process and the workers too
    stdout, stderr = started.communicate(timeout=200)
    assert started.returncode == 130, stderr
    assert f"go on with: eva train --resume {folder}" in stdout
    assert "Traceback" not in stderr
    interrupted = json.loads((folder / "summary.json").read_text())
    steps = len(rows(folder / "history.csv"))
    assert (interrupted["status"], interrupted["steps"]) == ("interrupted", steps)
    assert 5 <= steps < 60
    assert not {path.name for path in folder.iterdir()} & EVALUATED and "evaluation" not in interrupted

    done = subprocess.run(
        [*command, "--resume", str(folder), "--workers=0"],
        env=clean_environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    finished = json.loads((folder / "summary.json").read_text())
    assert (finished["status"], finished["wandb_id"]) == ("finished", interrupted["wandb_id"])
    assert [int(row["trainer/step"]) for row in rows(folder / "history.csv")] == list(range(60))
    logged = []
    for part in (interrupted, finished):
        records = inspect(Path(part["wandb_folders"][-1]))
        assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [0]
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        logged += [item["trainer/step"] for item in items if "train/loss" in item]
    assert logged == list(range(60))
    # What was not evaluated then is now.
    assert {path.name for path in folder.iterdir()} >= EVALUATED
    assert finished["evaluation"]["accuracy"] == finished["test_accuracy_best"]


# What W&B and a changed world may not do to a run


def test_a_run_id_that_is_no_name_of_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "a/b:c d")
    with pytest.raises(UserError, match=r"WANDB_RUN_ID must have none of .* but got 'a/b:c d'"):
        find_lr(make_config(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_the_summary_has_the_run_id_that_wandb_settled_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")  # within a sweep wandb ignores an id that is not the agent's
    result = show_policy(make_config(tmp_path / "run", tracking="offline", policy="digits"))
    records = inspect(Path(result.summary["wandb_folders"][-1]))
    (of_wandb,) = {record["run"]["run_id"] for record in records if record["type"] == "run"}
    assert result.summary["wandb_id"] == of_wandb


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"train_limit": 60, "data": "other"}, "the data are not those"), ({"policy": "digits"}, "the policy is not")],
)
def test_a_run_does_not_go_on_with_other_data_or_another_policy(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(make_config(folder, epochs=2))
    summary = json.loads((folder / "summary.json").read_text())
    if settings.pop("data", None):
        summary["data_fingerprint"] = "0" * 64
    (folder / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    with pytest.raises(UserError, match=message):
        train(make_config(folder, **settings), resume=folder)
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(
    ("layer", "said"),
    [("layr3", "unknown layer 'layr3' \\(did you mean 'layer3'\\?\\)"), ("fc", "layer 'fc' must return")],
)
def test_a_layer_that_grad_cam_cannot_use_is_told_before_the_training(tmp_path: Path, layer: str, said: str) -> None:
    settings = {"model": "resnet9", "evaluate": True, "gradcam_layers": [layer]}
    with pytest.raises(UserError, match=said):
        train(make_config(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_is_told_to_wandb_as_failed(tmp_path: Path) -> None:
    config = make_config(tmp_path, tracking="offline")
    with pytest.raises(Failure, match="ZeroDivisionError"), experiment.open_run(config, "train"):
        raise ZeroDivisionError
    summary = json.loads((tmp_path / "summary.json").read_text())
    updates = [
        record["summary"]["update"] for record in inspect(Path(summary["wandb_folders"][0])) if "summary" in record
    ]
    assert summary["status"] == "failed"
    assert [update["status"] for update in updates if "status" in update] == ["failed"]
