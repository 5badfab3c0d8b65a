"""eva: train small image classifiers, tracked batch by batch, and see what they get wrong and how they differ."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from eva.api import build_schedule, compare, evaluate, find_lr, gallery, load_model, train
    from eva.comparison import table
    from eva.config import RunConfig, UserError
    from eva.data import channel_statistics, load_dataset
    from eva.gradcam import GradCAM, overlay, stages
    from eva.models import build_model, count_parameters
    from eva.policies import build_policy
    from eva.predictions import Predictions, measure
    from eva.recipes import RECIPES

# What `import eva` offers, and the module that has it: imported when first asked for, so that `eva --help` is quick.
_HOME = {
    **dict.fromkeys(("train", "find_lr", "evaluate", "compare", "gallery", "load_model", "build_schedule"), "eva.api"),
    **dict.fromkeys(("RunConfig", "UserError"), "eva.config"),
    **dict.fromkeys(("GradCAM", "overlay", "stages"), "eva.gradcam"),
    **dict.fromkeys(("Predictions", "measure"), "eva.predictions"),
    **dict.fromkeys(("channel_statistics", "load_dataset"), "eva.data"),
    **dict.fromkeys(("build_model", "count_parameters"), "eva.models"),
    "build_policy": "eva.policies",
    "table": "eva.comparison",
    "RECIPES": "eva.recipes",
}

__all__ = [
    "RECIPES",
    "GradCAM",
    "Predictions",
    "RunConfig",
    "UserError",
    "build_model",
    "build_policy",
    "build_schedule",
    "channel_statistics",
    "compare",
    "count_parameters",
    "evaluate",
    "find_lr",
    "gallery",
    "load_dataset",
    "load_model",
    "measure",
    "overlay",
    "stages",
    "table",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'eva' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
