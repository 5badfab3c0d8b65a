"""What holds on a GPU: exact resume where kernels are deterministic, its memory when it runs out, and after a run."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_RUN, flags
from safetensors.torch import load_file

from eva.run_folder import saved_states

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

EVA = [sys.executable, "-c", "import sys; from eva.cli import main; sys.exit(main())"]
# ResNet-9 over 1,000 digits: 60 steps, with all that has a state on a GPU.
RUN: dict[str, Any] = {
    **{"data": "digits", "policy": "digits", "model": "resnet9", "device": "cuda", "tracking": "disabled"},
    **{"train_limit": 1000, "batch_size": 50, "epochs": 3, "peak_epoch": 1, "lr_max": 0.05, "evaluate": False},
    **{"dropout": 0.1, "ema_decay": 0.9, "grad_clip": 1.0, "save_steps": 7, "workers": 2},
}
CLOCK = {"seconds", "images_per_second", "train_epoch/seconds"}


def start(arguments: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*EVA, "train", *arguments], env=environment, text=True, **pipes)


def finish(arguments: list[str], environment: Mapping[str, str]) -> None:
    process = start(arguments, environment)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{name: text for name, text in row.items() if name not in CLOCK} for row in csv.DictReader(file)]


def killed_and_resumed(folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Trains in a folder, killed after some saves twice, and goes on to the end."""
    for attempt in range(2):
        arguments = ["--resume", str(folder)] if attempt else flags({**settings, "out": folder})
        process = start(arguments, environment)
        before = len(rows(folder / "history.csv")) if attempt else 0
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            history = folder / "history.csv"
            if saved_states(folder) and history.exists() and len(rows(history)) >= before + 9:
                break
            time.sleep(0.005)
        process.kill()
        process.communicate()
    assert saved_states(folder)
    finish(["--resume", str(folder)], environment)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_killed_run_is_resumed_to_the_bit_with_deterministic_kernels(
    precision: str, tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    """fp16 has a scaler, whose scale is part of the state."""
    settings = {**RUN, "precision": precision, "deterministic": True}
    finish(flags({**settings, "out": tmp_path / "alone"}), clean_environment)
    killed_and_resumed(tmp_path / "killed", settings, clean_environment)
    for name in ("history.csv", "epochs.csv"):
        assert rows(tmp_path / "killed" / name) == rows(tmp_path / "alone" / name)
    ours, theirs = (load_file(tmp_path / which / "best.safetensors") for which in ("killed", "alone"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_killed_run_is_resumed_closely_with_the_fast_kernels(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    """Each of the steps has its row once; the first losses after the resume are those of the run left alone."""
    finish(flags({**RUN, "out": tmp_path / "alone"}), clean_environment)
    killed_and_resumed(tmp_path / "killed", RUN, clean_environment)
    ours, theirs = (rows(tmp_path / which / "history.csv") for which in ("killed", "alone"))
    assert [int(row["trainer/step"]) for row in ours] == list(range(60))
    losses = [[float(row["train/loss"]) for row in each] for each in (ours, theirs)]
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=0.1)
    assert losses[0] == pytest.approx(losses[1], rel=0.5, abs=0.2)


def test_out_of_gpu_memory_is_told_and_leaves_the_memory_to_the_next_run(tmp_path: Path) -> None:
    """In one process, as the trials of a sweep are."""
    from eva import experiment
    from eva.config import Layer, resolve

    def config(**settings: Any) -> Any:
        return resolve([Layer("test", {**SMALL_RUN, "device": "cuda", "tracking": "disabled", **settings})])[0]

    experiment.train(config(out=str(tmp_path / "before")))
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    filler = torch.empty(free - (600 << 20), dtype=torch.uint8, device="cuda")
    large = config(out=str(tmp_path / "large"), model="resnet18", train_limit=None, batch_size=1400, precision="fp32")
    result = experiment.train(large)
    assert result.status == "oom"
    assert json.loads((tmp_path / "large" / "summary.json").read_text())["reason"] == (
        "out of memory on cuda: choose a batch_size below 1400"
    )
    del filler
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] > free - (200 << 20)
    assert experiment.train(config(out=str(tmp_path / "after"))).status == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_gpu_memory_stays_after_a_run(number: int, tmp_path: Path, clean_environment: dict[str, str]) -> None:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    before = torch.cuda.mem_get_info()[0]
    process = start(flags({**RUN, "epochs": 200, "out": tmp_path / "run"}), clean_environment)
    history = tmp_path / "run" / "history.csv"
    deadline = time.monotonic() + 200
    while not history.exists() or len(rows(history)) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert torch.cuda.mem_get_info()[0] < before - (100 << 20)  # it is seen from here
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while torch.cuda.mem_get_info()[0] < before - (32 << 20):
        assert time.monotonic() < deadline
        time.sleep(0.1)
