"""Every sweep that ships: W&B takes it, eva takes it, and each trial it can draw is a run that eva can configure."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps.config import SweepConfig, schema_violations_from_proposed_config

from eva.config import FIELDS, Layer, RunConfig
from eva.data import hold_out, load_dataset
from eva.distributions import HAIR
from eva.models import build_model
from eva.policies import build_policy
from eva.recipes import configure
from eva.sweep_file import DEFAULT_COMMAND, Sweep, arguments, grid, read_sweep

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "sweeps").rglob("*.y*ml"))
NAMES = ("batch_size", "ghost_batchnorm", "lr_range", "norms", "policies", "regularization", "smoke")

# Sweeps over means of seeds, or of what learns at different speeds, stop nothing early.
STOPPING = ("lr_range", "regularization")

every_sweep = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def trials(sweep: Sweep) -> list[dict[str, Any]]:
    """Returns values of the searched parameters: the whole grid, or all corners and some quantiles between."""
    if sweep.method == "grid":
        return list(grid(sweep))
    shares = [*itertools.product((0.0, 1 - HAIR), repeat=len(sweep.searched))]
    shares += [(share,) * len(sweep.searched) for share in (0.1, 0.25, 0.5, 0.75, 0.9)]
    return [
        {
            parameter.name: parameter.distribution.value_at(share)
            for parameter, share in zip(sweep.searched, row, strict=True)
        }
        for row in shares
    ]


def configs(sweep: Sweep) -> list[RunConfig]:
    """Returns the configuration of each trial, as the agent passes its arguments: as text."""
    handed = [arguments(sweep, values) for values in trials(sweep)]
    layers = [Layer("command line", {name: str(value) for name, value in trial.items()}) for trial in handed]
    return [configure(layer)[0] for layer in layers]


def test_every_sweep_is_found() -> None:
    """The seven that the README names, and none in a folder that is not looked into."""
    assert {path.stem for path in FILES} >= set(NAMES)


@every_sweep
def test_wandb_takes_it(path: Path) -> None:
    """W&B's own schema has no complaint, and its package makes a sweep of it."""
    config = yaml.safe_load(path.read_text())
    assert schema_violations_from_proposed_config(config) == []
    assert SweepConfig(config)["method"] in ("grid", "bayes")


@every_sweep
def test_it_steers_by_the_best_val_accuracy_and_runs_the_runner(path: Path) -> None:
    """What is logged once an epoch and never falls; a script that is there; every argument handed over."""
    sweep = read_sweep(path)
    assert (sweep.metric, sweep.goal) == ("val/accuracy_best", "maximize")
    assert (ROOT / sweep.program).is_file()
    assert sweep.command == DEFAULT_COMMAND
    assert all(config.val_fraction > 0 for config in configs(sweep))


@every_sweep
def test_each_trial_is_a_run_that_eva_can_configure(path: Path) -> None:
    """Each parameter is a setting, and reaches the configuration with the value that was drawn."""
    sweep = read_sweep(path)
    assert {parameter.path[0] for parameter in sweep.parameters} <= set(FIELDS)
    drawn, made = trials(sweep), configs(sweep)
    assert len(drawn) == len(made) > 1
    for values, config in zip(drawn, made, strict=True):
        for parameter in sweep.searched:
            value = getattr(config, parameter.path[0])
            assert (value[parameter.path[1]] if len(parameter.path) > 1 else value) == values[parameter.name]


@every_sweep
def test_the_models_and_policies_of_its_trials_can_be_built(path: Path) -> None:
    """Names of models and policies, and a policy's options, are looked at only when something is built of them."""
    made = configs(read_sweep(path))
    assert made
    for name, options in {(config.policy, tuple(config.policy_options.items())) for config in made}:
        build_policy(name, (0.5,) * 3, (0.25,) * 3, dict(options))
    for model, norm, splits, groups in {(c.model, c.norm, c.ghost_splits, c.norm_groups) for c in made}:
        build_model(model, num_classes=10, norm=norm, ghost_splits=splits, norm_groups=groups)


@every_sweep
def test_its_bands_lie_before_the_last_epoch_and_are_strict(path: Path) -> None:
    """A band that no trial reaches stops nothing, and one at the end stops it too late."""
    sweep = read_sweep(path)
    assert (sweep.hyperband is not None) is (path.stem in STOPPING)
    if sweep.hyperband is None:
        return
    assert sweep.hyperband.strict is yaml.safe_load(path.read_text())["early_terminate"]["strict"] is True
    for config in configs(sweep):
        assert sweep.hyperband.bands[0] < config.epochs


@every_sweep
def test_its_comment_tells_question_size_time_and_launch(path: Path) -> None:
    """The numbers in it are those of the sweep; the launch lines name this file, for both worlds."""
    sweep = read_sweep(path)
    comment = "".join(itertools.takewhile(lambda line: line.startswith("#"), sweep.text.splitlines(keepends=True)))
    for part in ("# Question: ", "# Size: ", "# Time: ", "# Launch: "):
        assert comment.count(part) == 1
    name = path.relative_to(ROOT)
    assert f"wandb sweep {name}, then wandb agent ENTITY/PROJECT/ID" in comment
    assert f".venv/bin/eva sweep {name} --out=sweeps-out/{path.stem}\n" in comment
    assert f".venv/bin/eva sweep {name} --check\n" in comment
    count = len(list(grid(sweep))) if sweep.method == "grid" else sweep.run_cap
    (epochs,) = {config.epochs for config in configs(sweep)}
    size = re.search(r"(\d+) trials.*? of (\d+) epochs", comment)
    assert size is not None
    assert (int(size[1]), int(size[2])) == (count, epochs)
    spared = re.findall(r"some \S+(?: thirds)? of (\d+) epochs are run", comment.replace("\n#  ", ""))
    assert list(map(int, spared)) == ([int(size[1]) * int(size[2])] if sweep.hyperband else [])
    if limit := configs(sweep)[0].train_limit:
        assert f"on {limit:,} images" in comment


def test_lr_range_looks_around_what_the_range_test_found() -> None:
    """As far above as below the rate in its comment, by factors; lr_min ends where lr_max begins."""
    text = (ROOT / "sweeps" / "lr_range.yaml").read_text()
    found = re.search(r"finds lr_max ([\d.]+)", text)
    assert found is not None
    low, high = (yaml.safe_load(text)["parameters"][name] for name in ("lr_min", "lr_max"))
    assert math.sqrt(high["min"] * high["max"]) == pytest.approx(float(found[1]), rel=0.02)
    assert low["max"] == high["min"]
    assert low["distribution"] == high["distribution"] == "log_uniform_values"


def test_smoke_is_four_trials_on_embedded_data(tmp_path: Path) -> None:
    """What continuous integration can run: nothing to download. As many images as its comment says."""
    sweep = read_sweep(ROOT / "sweeps" / "smoke.yaml")
    made = configs(sweep)
    assert {(config.norm, config.seed) for config in made} == set(itertools.product(("batch", "layer"), (0, 1)))
    assert {config.data for config in made} == {"digits"}
    dataset = load_dataset("digits", tmp_path)
    train, _ = hold_out(dataset.train, made[0].val_fraction, len(dataset.classes))
    assert f"on {len(train):,} images of `digits`" in sweep.text
