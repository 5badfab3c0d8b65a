"""What all tests share: an environment without anybody's account or settings, and one small run through the CLI."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from loopback import LoopbackServer

# The smallest network that the run configuration can name; a tenth of a second a step at most.
SMALL_RUN = {
    **{"data": "digits", "policy": "test", "model": "torchvision/shufflenet_v2_x0_5", "precision": "fp32"},
    **{"train_limit": 60, "batch_size": 20, "epochs": 2, "peak_epoch": 1, "lr_max": 0.05, "workers": 0},
    "evaluate": False,
}
FAKE_KEY = "0123456789abcdef0123456789abcdef01234567"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment without W&B's variables, in a home that holds nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "XDG_", "NETRC"))}
    # matplotlib's list of fonts takes seconds to make, and is nobody's secret.
    fonts = {"MPLCONFIGDIR": matplotlib.get_cachedir()}
    return {**kept, **fonts, "HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def isolated(clean_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes accounts, caches and settings of whoever runs the tests out of their reach, and all but one thread."""
    for name in os.environ.keys() - clean_environment.keys():
        if name.startswith(("WANDB_", "XDG_", "NETRC")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", clean_environment["HOME"])
    monkeypatch.setenv("MPLCONFIGDIR", clean_environment["MPLCONFIGDIR"])
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def loopback() -> Iterator[LoopbackServer]:
    """A W&B server on this machine. Who uses it keeps to projects of their own, and to processes of their own."""
    with LoopbackServer() as server:
        yield server


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Makes disks in memory: `small_disk("256k")` is the folder of one that holds so much, gone after the test.

    Further arguments are mount options, such as "nr_inodes=10" for a disk that holds so many files and folders.
    """
    mounted: list[Path] = []

    def mount(size: str, *options: str) -> Path:
        folder = tmp_path_factory.mktemp("disk")
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "none", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Returns settings as a command line has them."""
    return [f"--{name}={value}" for name, value in settings.items()]


def inspect(path: Path) -> list[dict[str, Any]]:
    """Returns the records of an offline W&B run, read by wandb's own reader."""
    command = [str(BIN / "wandb"), "leet", "inspect", "--json", str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(line) for line in answer.stdout.splitlines()]


@dataclass(frozen=True)
class OfflineRun:
    """A finished run of the command line, W&B offline, with a fake key in the environment."""

    home: Path
    cwd: Path
    folder: Path
    stdout: str
    stderr: str
    summary: dict[str, Any]
    records: list[dict[str, Any]]

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """Returns W&B's records of one type."""
        return [record[kind] for record in self.records if record["type"] == kind]

    def rows(self, key: str) -> list[dict[str, Any]]:
        """Returns the logged rows that hold a key."""
        rows = [record["item"] for record in self.of_type("history")]
        return [row for row in rows if key in row]


@pytest.fixture(scope="session")
def offline_run(clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> OfflineRun:
    """`eva train` of two epochs of three steps, from a folder that is no repository, stdin closed."""
    root = tmp_path_factory.mktemp("offline")
    home, cwd, folder = root / "home", root / "cwd", root / "run"
    home.mkdir()
    cwd.mkdir()
    # wandb must be free to complain: its silence would hide a lost row.
    environment = {**clean_environment, "HOME": str(home), "WANDB_API_KEY": FAKE_KEY}
    tracked = {"evaluate": True, "tracking": "offline", "out": folder, "tags": "a,b"}
    command = [str(BIN / "eva"), "train", *flags({**SMALL_RUN, **tracked})]
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    records = inspect(Path(summary["wandb_folders"][-1]))
    return OfflineRun(home, cwd, folder, done.stdout, done.stderr, summary, records)
