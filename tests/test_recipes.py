"""The recipes, against what the reports give."""

from dataclasses import dataclass

import pytest

from eva.config import RunConfig, UserError, resolve
from eva.policies import build_policy
from eva.recipes import RECIPES, recipe_layer
from eva.schedules import build_schedule

NORMALIZED = ["Normalize", "ToTensorV2"]


@dataclass(frozen=True)
class Reported:
    """A row of the reports' table."""

    model: str
    batch: int
    epochs: int
    schedules: tuple[str, ...]
    augmentations: list[str]
    accuracy: float


REPORTED = {
    "resnet18-plateau": Reported("resnet18", 32, 50, ("plateau",), ["HorizontalFlip", "Affine"], 0.9063),
    "resnet18-color": Reported(
        *("resnet18", 128, 24, ("step",)), ["HorizontalFlip", "Affine", "HueSaturationValue", "CoarseDropout"], 0.8897
    ),
    "resnet18-onecycle-long": Reported(
        *("resnet18", 64, 50, ("onecycle",)), ["Pad", "RandomCrop", "HorizontalFlip", "CoarseDropout"], 0.9177
    ),
    "resnet18-onecycle": Reported(
        *("resnet18", 64, 20, ("cosine_onecycle",)), ["HorizontalFlip", "CoarseDropout"], 0.9211
    ),
    "resnet18-layernorm": Reported(
        *("resnet18", 128, 40, ("plateau",)), ["Pad", "RandomCrop", "Affine", "CoarseDropout"], 0.894
    ),
    "resnet9-onecycle": Reported(
        *("resnet9", 512, 24, ("onecycle",)), ["Pad", "RandomCrop", "HorizontalFlip", "CoarseDropout"], 0.90
    ),
}


def config_of(name: str) -> RunConfig:
    """Returns the configuration that a recipe alone gives."""
    return resolve([recipe_layer(name)])[0]


def test_the_recipes_are_those_of_the_reports_and_the_speed_records() -> None:
    assert RECIPES.keys() == {*REPORTED, "speedrun"}


def test_speedruns_rates_fall_to_nothing_from_the_first_step_on() -> None:
    """As 1 - step / steps, of 25 steps in each of 8 epochs; a mean has so many times the rate of a sum."""
    config = config_of("speedrun")
    schedule = build_schedule(config, 25)
    rates = [schedule(step, []).lr for step in range(200)]
    assert rates == pytest.approx([0.24 * (1 - step / 200) for step in range(200)])
    assert (config.bias_lr, config.linear_lr) == pytest.approx((0.053 * 2000, 0.67 * 2000))
    assert config.weight_decay == pytest.approx(2e-6 * 2000)


@pytest.mark.parametrize("name", REPORTED)
def test_a_recipe_is_what_its_report_says(name: str) -> None:
    config, reported = config_of(name), REPORTED[name]
    assert (config.recipe, config.model, config.data) == (name, reported.model, "cifar10")
    assert (config.batch_size, config.epochs) == (reported.batch, reported.epochs)
    assert config.schedule in reported.schedules
    assert RECIPES[name].report_accuracy == reported.accuracy
    # The reports train on all of train and watch test.
    assert config.val_fraction == 0


@pytest.mark.parametrize("name", REPORTED)
def test_a_recipe_augments_as_its_report_says(name: str) -> None:
    config = config_of(name)
    pipeline = build_policy(config.policy, (0.5,) * 3, (0.25,) * 3, config.policy_options).pipeline
    names = [type(transform).__name__ for transform in pipeline.transforms]
    assert names == REPORTED[name].augmentations + NORMALIZED


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18-onecycle-long", 8), ("resnet18-layernorm", 16), ("resnet9-onecycle", 8)],
)
def test_holes_and_paddings_have_the_reported_sizes(name: str, side: int) -> None:
    config = config_of(name)
    pad, crop, *_, hole = build_policy(config.policy, (0.5,) * 3, (0.25,) * 3).pipeline.transforms[:-2]
    assert (pad.padding, crop.height, crop.width) == (4, 32, 32)
    assert tuple(hole.hole_height_range) == tuple(hole.hole_width_range) == (side, side)
    assert tuple(hole.num_holes_range) == (1, 1)


def test_color_drops_its_rate_tenfold_in_epoch_18() -> None:
    schedule = build_schedule(config_of("resnet18-color"), 10)
    by_epoch = [schedule(10 * epoch, []).lr for epoch in range(24)]
    assert by_epoch[:17] == [by_epoch[0]] * 17
    assert by_epoch[17:] == pytest.approx([by_epoch[0] / 10] * 7)


def test_layernorm_has_one_group_and_8x8_last_maps() -> None:
    config = config_of("resnet18-layernorm")
    assert (config.norm, config.stage_strides, config.dropout, config.weight_decay) == (
        "layer",
        (1, 2, 2, 1),
        0.1,
        0.001,
    )


def test_resnet9_peaks_in_epoch_5_at_rates_that_the_range_test_finds() -> None:
    config = config_of("resnet9-onecycle")
    assert (config.peak_epoch, config.lr_min, config.lr_max) == (5, "find", "find")


def test_plateau_recipes_drop_their_rate_tenfold() -> None:
    for name in ("resnet18-plateau", "resnet18-layernorm"):
        assert config_of(name).lr_factor == 0.1


def test_an_unknown_recipe_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'resnet18-platau' \(did you mean 'resnet18-plateau'\?\)") as e:
        recipe_layer("resnet18-platau")
    assert all(name in str(e.value) for name in REPORTED)
