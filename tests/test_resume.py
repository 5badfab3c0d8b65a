"""Runs that are killed, for real and at any moment, and go on, against the same runs left alone."""

import contextlib
import csv
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from conftest import inspect
from safetensors.torch import load_file
from test_loop import state_of

from eva.config import Layer, RunConfig, resolve
from eva.recipes import RECIPES, recipe_layer
from eva.run_folder import STATES, read_config, saved_states, state_number
from eva.tracker import parts_of

CLOCK = {"seconds", "images_per_second", "train_epoch/seconds", "_runtime", "_timestamp", "_wandb"}

RUN: dict[str, Any] = {
    **{"data": "digits", "policy": "crop_flip_cutout", "model": "torchvision/shufflenet_v2_x0_5", "precision": "fp32"},
    **{"train_limit": 70, "batch_size": 20, "epochs": 3, "peak_epoch": 1, "lr_max": 0.05, "save_steps": 1},
    **{"deterministic": True, "tracking": "offline", "evaluate": False},
}
# What the recipes are made of, each somewhere: norms, schedules, moving average, policies, workers, optimizers.
INGREDIENTS: dict[str, dict[str, Any]] = {
    "plateau, average, workers": {
        **{"schedule": "plateau", "patience": 1, "lr_min": 1e-4, "ema_decay": 0.7, "workers": 2, "dropout": 0.2},
        **{"grad_clip": 1.0, "label_smoothing": 0.1, "policy": "digits"},
        "augmentation": "albumentations",
    },
    "range test, one cycle, bf16": {
        **{"lr_max": "find", "lr_min": "find", "find_lr_steps": 12, "find_lr_start": 1e-3, "find_lr_end": 10.0},
        **{"model": "resnet9", "precision": "bf16", "schedule": "onecycle", "momentum_min": 0.8, "policy": "test"},
        **{"train_limit": 200, "max_steps": 6},
    },
    "ghost norm, triangular, L1": {
        **{
            "model": "resnet9",
            "norm": "ghost",
            "schedule": "triangular",
            "policy": "flip_shift_rotate",
            "cycle_epochs": 1,
            "l1": 1e-5,
            "max_steps": 6,
        },
    },
    "group norm, step": {
        **{"model": "resnet9", "norm": "group", "schedule": "step", "lr_steps": [1], "max_steps": 6, "policy": "color"},
    },
    "layer norm, AdamW, cosine": {
        **{"model": "resnet9", "norm": "layer", "optimizer": "adamw", "schedule": "cosine", "max_steps": 6},
        **{"lr_max": 1e-3, "lr_min": 1e-5, "policy": "crop_cutout_rotate"},
    },
    # The bias of the first layer is frozen after two steps.
    "Muon, whitened first layer": {
        **{"model": "speednet", "init": "whitened", "optimizer": "muon", "policy": "speedrun", "max_steps": 6},
        **{"peak_epoch": 0, "linear_lr": 1.0, "bias_lr": 1.0, "first_bias_epochs": 0.5},
    },
    "instance norm, constant": {
        **{"model": "resnet9", "norm": "instance", "schedule": "constant", "max_steps": 6, "policy": "flip_cutout"},
    },
    "no norm, torch's one cycle": {
        **{
            "model": "resnet9",
            "norm": "none",
            "schedule": "cosine_onecycle",
            "lr_max": 1e-3,
            "lr_min": 1e-5,
            "max_steps": 6,
        },
    },
}


def configure(folder: Path, settings: Mapping[str, Any]) -> RunConfig:
    return resolve([Layer("test", {**RUN, **settings, "out": str(folder)})])[0]


def train(folder: Path, settings: Mapping[str, Any]) -> None:
    """Trains, or goes on with, the run of a folder, as the command line does."""
    from eva import experiment

    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as the command line has it; not that of the tests' own processes
    begun = (folder / "config.yaml").exists()
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    config = read_config(folder)[0] if begun else configure(folder, settings)
    experiment.train(config, resume=folder if begun else None)


def begin(folder: Path, settings: Mapping[str, Any]) -> BaseProcess:
    """Starts an attempt, forked from a process in which eva is imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eva.experiment", "wandb", "test_resume"])
    process = context.Process(target=train, args=(folder, settings))
    process.start()
    return process


def finish(folder: Path, settings: Mapping[str, Any]) -> float:
    """Lets an attempt come to its end; returns the seconds that it took."""
    started = time.monotonic()
    process = begin(folder, settings)
    process.join(300)
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()
    return time.monotonic() - started


def kill(process: BaseProcess, moment: Callable[[], bool]) -> None:
    """Kills a process at a moment, or when it is through."""
    while process.is_alive() and not moment():
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


def some_moment(folder: Path, generator: random.Random, seconds: float) -> Callable[[], bool]:
    """Returns a random moment of an attempt: before its training, between two states, or in the writing of one."""
    kind, start = generator.choice(("before", "between", "writing")), time.monotonic()
    if kind == "before":
        delay = generator.uniform(0, 0.5 * seconds)
        return lambda: time.monotonic() - start > delay
    first = newest_number(folder)
    least, delay = first + generator.randrange(3), generator.uniform(0, 0.1)
    if kind == "between":
        reached: list[float] = []

        def passed() -> bool:
            if not reached and newest_number(folder) > first:
                reached.append(time.monotonic())
            return bool(reached) and time.monotonic() - reached[0] > delay

        return passed
    # A file that is being written, not one that an earlier attempt left: that one is there from the start.
    return lambda: newest_number(folder) >= max(least, first + 1) and (folder / STATES / ".new").exists()


def newest_number(folder: Path) -> int:
    return max(map(state_number, saved_states(folder)), default=0)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: text for key, text in row.items() if key not in CLOCK} for row in csv.DictReader(file)]


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """Returns what W&B's own reader finds in the parts of a run, in the order in which `wandb sync` sends them."""
    run_id = json.loads((folder / "summary.json").read_text())["wandb_id"]
    records = [record for part in parts_of(folder, run_id) for record in inspect(part)]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    shown = [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]
    return [{key: value for key, value in row.items() if not key.endswith(("path", "sha256", "size"))} for row in shown]


def assert_equal_runs(killed: Path, alone: Path) -> None:
    """Asserts that weights, CSV files and W&B's rows of two runs are equal to the bit, wall-clock aside."""
    for name in ("history.csv", "epochs.csv"):
        assert rows_of(killed / name) == rows_of(alone / name)
    ours, theirs = (load_file(folder / "best.safetensors") for folder in (killed, alone))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = [state_of(folder) for folder in (killed, alone)]
    for state in states:
        for name in ("seconds", "epoch_seconds"):
            del state["progression"][name]
        for name in ("config", "run"):  # its folder and its id
            del state["best"]["facts"][name]
    assert_equal_states(*states)
    assert wandb_rows(killed) == wandb_rows(alone)
    told, alike = (json.loads((folder / "summary.json").read_text()) for folder in (killed, alone))
    same = told.keys() - {"wandb_id", "wandb_folders", "seconds", "images_per_second"}
    assert told.keys() == alike.keys() and all(told[name] == alike[name] for name in same)


def assert_equal_states(ours: Any, theirs: Any) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_equal_states(ours[name], theirs[name])
    else:
        assert ours == theirs


def test_a_run_killed_at_twenty_moments_is_the_run_left_alone(tmp_path: Path) -> None:
    settings = {**INGREDIENTS["plateau, average, workers"], "epochs": 14, "batch_size": 10}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    seconds = finish(alone, settings)
    generator = random.Random(0)
    in_the_writing = 0
    for _ in range(20):
        process = begin(killed, settings)
        kill(process, some_moment(killed, generator, seconds))
        assert process.exitcode == -signal.SIGKILL, killed.with_suffix(".log").read_text()
        in_the_writing += (killed / STATES / ".new").exists()
    finish(killed, settings)
    assert in_the_writing > 3
    assert_equal_runs(killed, alone)


def test_every_norm_and_schedule_and_all_that_the_recipes_are_made_of_is_killed_somewhere() -> None:
    """Their networks aside, whose states differ by their tensors alone."""
    asked = [resolve([Layer("test", {**RUN, **settings})])[0] for settings in INGREDIENTS.values()]
    recipes = [resolve([recipe_layer(name)])[0] for name in RECIPES]
    for name in ("norm", "schedule", "optimizer"):
        assert {getattr(config, name) for config in asked} == set(get_args(get_type_hints(RunConfig)[name]))
    for name in ("policy", "ema_decay", "dropout", "label_smoothing", "grad_clip", "l1"):
        killed = {getattr(config, name) for config in asked}
        used = {getattr(config, name) for config in recipes}
        assert len(killed) > 1 and (name != "policy" or used <= killed)
    assert any(config.workers for config in asked) and any(config.lr_max == "find" for config in asked)


@pytest.mark.parametrize("name", list(INGREDIENTS)[1:])
def test_whatever_a_run_is_made_of_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    settings = INGREDIENTS[name]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    seconds = finish(alone, settings)
    generator = random.Random(name)
    for _ in range(2):
        kill(begin(killed, settings), some_moment(killed, generator, seconds))
    if json.loads((killed / "summary.json").read_text())["status"] == "running":
        finish(killed, settings)
    assert_equal_runs(killed, alone)


def test_a_run_of_before_batches_were_made_as_a_whole_goes_on_image_by_image(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("policy: flip\n")
    assert read_config(tmp_path)[0].augmentation == "albumentations"
    (tmp_path / "config.yaml").write_text("policy: flip\naugmentation: auto\n")
    assert read_config(tmp_path)[0].augmentation == "auto"
