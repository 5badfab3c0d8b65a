"""Trainings of a small network, each by all processes that run this, for comparison with the same by one process."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from test_loop import FP32, digits, make_config, make_model
from torch import nn

from eva.config import RunConfig
from eva.data import channel_statistics
from eva.distributed import World, find_world
from eva.evaluation import evaluate
from eva.loaders import Batch, TrainLoader, eval_loader, train_loader
from eva.loop import fit, prepare
from eva.lr_range import record_curve
from eva.models import GhostBatchNorm2d
from eva.policies import build_policy
from eva.sync_batchnorm import synchronize
from eva.tracker import Tracker


@dataclass(frozen=True)
class Case:
    """A training: its settings, its images, and the norm of its network (layer, batch, or ghost)."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    images: int = 70
    norm: str = "layer"


# By name; the tests' temporary folder has one of each.
CASES = {
    "equal shares": Case({"batch_size": 20, "policy": "crop_flip_cutout"}),
    "uneven shares": Case({"batch_size": 21}),
    "a last batch of two images": Case({"batch_size": 17}),
    "batches of one image": Case({"batch_size": 1, "epochs": 1, "lr_max": 0.01}, images=10),
    "synchronized": Case({"batch_size": 21, "sync_batchnorm": True}, norm="batch"),
    "synchronized, batches of one image": Case(
        {"batch_size": 1, "epochs": 1, "lr_max": 0.01, "sync_batchnorm": True}, images=10, norm="batch"
    ),
    "ghost norm": Case({"batch_size": 20, "ghost_splits": 4}, images=80, norm="ghost"),
    "penalties": Case({"batch_size": 21, "l1": 1e-3, "label_smoothing": 0.1, "grad_clip": 0.5, "ema_decay": 0.7}),
    "adamw": Case({"batch_size": 21, "optimizer": "adamw", "lr_max": 1e-3, "grad_clip": 0.01}),
    "plateau": Case({"batch_size": 20, "schedule": "plateau", "patience": 1, "epochs": 4, "lr_min": 1e-4}),
}
DROPOUT = Case({"batch_size": 21, "dropout": 0.3, "epochs": 3})
APART = Case({"batch_size": 21}, norm="batch")
RESUMED = CASES["uneven shares"]
STOP_AT = 3
WATCHED = 39


def make_network(config: RunConfig, norm: str, world: World) -> nn.Module:
    model = make_model(config)
    assert isinstance(model, nn.Sequential)
    if norm == "ghost":
        model[1] = GhostBatchNorm2d(8, splits=config.ghost_splits // world.size)
    elif norm == "layer":
        model[1] = nn.GroupNorm(1, 8)
    elif config.sync_batchnorm and world.size > 1:
        synchronize(model)
    return model


def make_loaders(case: Case, world: World) -> tuple[RunConfig, TrainLoader, Iterable[Batch]]:
    config = make_config(**{"lr_max": 0.02, "lr_min": 1e-4, **case.settings})
    train, test = digits(case.images)
    statistics = channel_statistics(train.images)
    policy, plain = build_policy(config.policy, *statistics), build_policy("test", *statistics)
    loader = train_loader(train, policy, config.batch_size, config.seed, 0, world=world)
    return config, loader, eval_loader(test.take(slice(0, WATCHED)), plain, 8, 0, world=world)


def trained(
    folder: Path, case: Case, world: World, *, resume: bool = False, stop_at: int = 0, stopper: int = 0
) -> tuple[str, int]:
    """Trains, until process `stopper` wants to stop after so many steps; returns the status and the steps done."""
    config, loader, watched = make_loaders(case, world)
    torch.manual_seed(0)
    training = prepare(config, FP32, make_network(config, case.norm, world), len(loader), world)
    own = folder if world.rank == 0 else None
    if own is not None:
        own.mkdir(exist_ok=True)
    if resume:
        training.load(own)

    def stop_asked() -> bool:
        return 0 < stop_at <= training.progression.step and world.rank == stopper

    status = fit(training, loader, watched, "val", own, Tracker(), stop_asked)
    return status, training.progression.step


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = find_world()
    told: dict[str, Any] = {}
    with world.joined(torch.device("cpu")):
        for name, case in CASES.items():
            trained(folder / name, case, world)
        trained(folder / "apart", APART, world)
        trained(folder / "dropout", DROPOUT, world)
        told["stopped"] = trained(folder / "dropout, resumed", DROPOUT, world, stop_at=STOP_AT, stopper=world.size - 1)
        told["resumed"] = trained(folder / "dropout, resumed", DROPOUT, world, resume=True)
        trained(folder / "for one", RESUMED, world, stop_at=STOP_AT)
        trained(folder / "from one", RESUMED, world, resume=True)
        for name in ("uneven shares", "synchronized"):
            config, loader, watched = make_loaders(CASES[name], world)
            model = make_network(config, CASES[name].norm, world)
            told[f"curve, {name}"] = record_curve(config, FP32, model, loader, world).losses
        told["count"] = evaluate(model, watched, FP32, world).count
    (folder / f"{world.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
