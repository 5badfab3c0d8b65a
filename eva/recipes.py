"""Named recipes: the systems that eva reproduces. Values only, no logic."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from eva.config import Layer, RunConfig, UserError, collected, read_yaml, resolve, stands_for_none, unknown_name


@dataclass(frozen=True)
class Recipe:
    """Settings of a system, and the best test accuracy (a fraction) that its report gives."""

    summary: str
    settings: Mapping[str, Any]
    report_accuracy: float | None = None


# The reports train on all 50,000 images and pick the best test accuracy over the epochs.
_AS_REPORTED = {"data": "cifar10", "val_fraction": 0.0}

_RECIPES = {
    "resnet18-plateau": Recipe(
        "ResNet-18, batch 32, rate dropped by 10 on a plateau",
        {
            **_AS_REPORTED,
            "model": "resnet18",
            "policy": "flip_shift_rotate",
            "batch_size": 32,
            "epochs": 50,
            "schedule": "plateau",
            "lr_max": 0.0023,  # by eva's range test (JPEG copy of CIFAR-10, bf16): the loss is lowest at 0.0046
            "lr_min": 1e-5,
            # Three epochs without a better test loss come before the report's first drop, after 21 epochs, and nowhere
            # before it. No patience explains the second one, after 42.
            "patience": 2,
            "weight_decay": 0.0,
        },
        0.9063,
    ),
    "resnet18-color": Recipe(
        "ResNet-18, batch 128, flip, rotate, colour, cutout; rate dropped at epoch 18",
        {
            **_AS_REPORTED,
            "model": "resnet18",
            "policy": "color",
            "batch_size": 128,
            "epochs": 24,
            "schedule": "step",
            "lr_max": 0.0037,  # by eva's range test (JPEG copy of CIFAR-10, bf16): the loss is lowest at 0.0074
            "lr_min": 0.00037,
            "lr_steps": (17,),
            "weight_decay": 0.0,
        },
        0.8897,
    ),
    "resnet18-onecycle-long": Recipe(
        "ResNet-18, batch 64, one cycle of 50 epochs, crop, flip, cutout 8x8",
        {
            **_AS_REPORTED,
            "model": "resnet18",
            "policy": "crop_flip_cutout",
            "batch_size": 64,
            "epochs": 50,
            "schedule": "onecycle",
            "peak_epoch": 10,  # the report gives none; a fifth of the epochs, as in resnet9-onecycle
            # The report takes them from a range test too; eva's gave 0.0026 for lr_max (JPEG copy of CIFAR-10, bf16).
            "lr_min": "find",
            "lr_max": "find",
        },
        0.9177,
    ),
    "resnet18-onecycle": Recipe(
        "ResNet-18, batch 64, torch's one cycle of 20 epochs, L2, flip, cutout",
        {
            **_AS_REPORTED,
            "model": "resnet18",
            "policy": "flip_cutout",
            "batch_size": 64,
            "epochs": 20,
            "schedule": "cosine_onecycle",
            "peak_epoch": 6,  # OneCycleLR's default: three tenths of the epochs
            "lr_min": 0.00029,
            "lr_max": 0.0029,  # by eva's range test (JPEG copy of CIFAR-10, bf16): the loss is lowest at 0.0059
            "weight_decay": 5e-4,
        },
        0.9211,
    ),
    "resnet18-layernorm": Recipe(
        "ResNet-18 with layer norm and 8x8 last maps, batch 128, rate dropped on a plateau",
        {
            **_AS_REPORTED,
            "model": "resnet18",
            "norm": "layer",
            "stage_strides": (1, 2, 2, 1),
            "dropout": 0.1,
            "policy": "crop_cutout_rotate",
            "batch_size": 128,
            "epochs": 40,
            "schedule": "plateau",
            # eva's range test (JPEG copy of CIFAR-10, bf16) gives no range here: over its 100 steps the loss falls by
            # 3 % only, up to 0.0016, and rises from 0.0026 on. This stays below.
            "lr_max": 0.001,
            "lr_min": 1e-5,
            # Four epochs without a better test loss come before the report's drop, after 29 epochs, and nowhere before.
            "patience": 3,
            "weight_decay": 1e-3,
        },
        0.894,
    ),
    "resnet9-onecycle": Recipe(
        "ResNet-9, batch 512, one cycle of 24 epochs with its top at epoch 5, no annihilation",
        {
            **_AS_REPORTED,
            "model": "resnet9",
            "policy": "crop_flip_cutout",
            "batch_size": 512,
            "epochs": 24,
            "schedule": "onecycle",
            "peak_epoch": 5,
            "lr_min": "find",
            "lr_max": "find",
        },
        0.90,
    ),
    # No report's: K. Jordan's airbench94_muon (github.com/KellerJordan/cifar10-airbench, after arXiv 2404.00498). Its
    # loss is the sum over a batch of 2,000 images, ours the mean: rates of all but filters are 2,000 times as high.
    "speedrun": Recipe(
        "small network, whitened first layer, Muon, batch 2000, 8 epochs: the CIFAR-10 speed records",
        {
            **_AS_REPORTED,
            "model": "speednet",
            "init": "whitened",
            "policy": "speedrun",
            "batch_size": 2000,
            "epochs": 8,
            "optimizer": "muon",
            "momentum": 0.6,
            "lr_max": 0.24,
            "linear_lr": 1340.0,
            "bias_lr": 106.0,
            "sgd_momentum": 0.85,
            "weight_decay": 0.004,
            "label_smoothing": 0.2,
            "schedule": "onecycle",
            "peak_epoch": 0.0,
            "lr_min": 0.0012,  # lr_max by the number of steps, 200: so much more than nothing at the last of them
            "tta": "flip_shift",
        },
        0.94,
    ),
}

RECIPES: Mapping[str, Recipe] = MappingProxyType(_RECIPES)


def recipe_layer(name: str) -> Layer:
    """Returns the settings of a recipe as a layer.

    Raises:
        UserError: There is no recipe of that name.
    """
    if name not in RECIPES:
        raise UserError(unknown_name("recipe", name, RECIPES))
    return Layer(f"recipe {name}", {"recipe": name, **RECIPES[name].settings})


def configure(given: Layer, file: str | None = None) -> tuple[RunConfig, dict[str, str]]:
    """Returns the configuration that recipe, file and given settings make, and the source of each setting they gave.

    Args:
        given: Settings that win over those of the file, which win over those of the recipe that either names.
        file: A YAML file of settings.

    Raises:
        UserError: All problems at once, a line each.
    """
    layers, problems = [given], list[str]()
    if file is not None:
        with collected(problems):
            layers.insert(0, Layer(f"file {file}", read_yaml(file)))
    recipe = next((layer.values["recipe"] for layer in reversed(layers) if "recipe" in layer.values), None)
    if isinstance(recipe, str) and not stands_for_none(recipe):
        with collected(problems):
            layers.insert(0, recipe_layer(recipe))
    with collected(problems):
        config, sources = resolve(layers)
    if problems:
        raise UserError("\n".join(problems))
    return config, sources
