"""The command line: flags into settings, settings into a run, mistakes into one line and exit code 2."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eva import __version__
from eva.config import FIELDS, Layer, RunConfig, UserError, default_of, describe_type, read_yaml, resolve
from eva.recipes import RECIPES, recipe_layer

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells report a program that SIGINT ended

# What may differ when a run goes on: nothing that changes what it computes.
RESUME_SETTINGS = ("workers", "tracking")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of eva.

    Args:
        argv: The arguments after the program's name; those of the process if not given.

    Returns:
        The exit code: 0 also for a run that diverged, 2 for a mistake of the user's, 130 for an interrupted run.
    """
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return int(COMMANDS[arguments.command](arguments, unknown))
    except UserError as error:
        for line in str(error).splitlines():
            print(f"eva {arguments.command}: error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser and those of the commands. Values stay text: `config.resolve` gives them their types."""
    parser = argparse.ArgumentParser(prog="eva", description="Train small image classifiers, tracked batch by batch.")
    parser.add_argument("--version", action="version", version=f"eva {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser("train", help="train a recipe", allow_abbrev=False)
    train.add_argument("--list", action="store_true", help="show the recipes")
    train.add_argument("--show_policy", action="store_true", help="draw samples of the policy instead")
    train.add_argument("--resume", metavar="RUN_FOLDER", help="go on with an interrupted run")
    find_lr = commands.add_parser("find_lr", help="find the range of learning rates", allow_abbrev=False)
    find_lr.add_argument("--show_schedule", action="store_true", help="draw the schedule instead")
    for command in (train, find_lr):
        command.add_argument("--config", metavar="FILE.yaml", help="settings in a YAML file")
        settings = command.add_argument_group("settings", "in rising precedence: --recipe, --config, flags")
        for name, field in FIELDS.items():
            settings.add_argument(
                f"--{name}",
                nargs="?",
                const="true",
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=_help(name, field),
            )
    return parser


def _help(name: str, field: Any) -> str:
    default = default_of(field)
    unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
    shown = "none" if default is None else list(default) if isinstance(default, tuple) else default
    return f"{field.metadata['help']}{unit}; {describe_type(name)} (default: {shown})".replace("%", "%%")


def configure(arguments: argparse.Namespace, unknown: Sequence[str]) -> tuple[RunConfig, dict[str, str]]:
    """Returns the configuration that recipe, file and flags make, and the source of each setting that they gave.

    Raises:
        UserError: All problems at once, a line each.
    """
    flags = {name: getattr(arguments, name) for name in FIELDS if hasattr(arguments, name)}
    flags.update(loose_settings(unknown))
    layers = [Layer("command line", flags)]
    recipe = flags.get("recipe")
    if arguments.config:
        from_file = read_yaml(arguments.config)
        layers.insert(0, Layer(f"file {arguments.config}", from_file))
        recipe = recipe or from_file.get("recipe")
    if recipe:
        layers.insert(0, recipe_layer(str(recipe)))
    return resolve(layers)


def loose_settings(arguments: Sequence[str]) -> dict[str, str]:
    """Returns as settings what the parser doesn't know: dotted keys (`--policy_options.cutout=8`), and mistakes.

    `resolve` tells the known from the unknown ones.
    """
    settings: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        settings[key.lstrip("-")] = value
    return settings


def print_settings(config: RunConfig, sources: dict[str, str]) -> None:
    """Prints each setting that differs from its default, with where it came from."""
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if value != default_of(field):
            print(f"{name} = {list(value) if isinstance(value, tuple) else value}  ({sources[name]})")


def run_train(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`eva train`."""
    if arguments.list:
        print_recipes()
        return 0
    if arguments.resume:
        folder = Path(arguments.resume)
        given = {name: getattr(arguments, name) for name in FIELDS if hasattr(arguments, name)}
        given.update(loose_settings(unknown))
        for name in given:
            if name not in RESUME_SETTINGS:
                known = ", ".join(RESUME_SETTINGS)
                raise UserError(f"--resume goes on as the run began; only {known} may differ, but got {name!r}")
        layer = Layer(f"run {folder}", {**read_yaml(folder / "config.yaml"), "out": str(folder)})
        config, sources = resolve([layer, Layer("command line", given)])
    else:
        folder = None
        config, sources = configure(arguments, unknown)
    print_settings(config, sources)
    from eva import experiment

    result = experiment.show_policy(config) if arguments.show_policy else experiment.train(config, resume=folder)
    print_result(result)
    return EXIT_INTERRUPTED if result.status == "interrupted" else 0


def run_find_lr(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`eva find_lr`."""
    config, sources = configure(arguments, unknown)
    print_settings(config, sources)
    from eva import experiment

    if arguments.show_schedule:
        print(f"schedule: {experiment.show_schedule(config)}")
        return 0
    print_result(experiment.find_lr(config))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
    "train": run_train,
    "find_lr": run_find_lr,
}


def print_result(result: Any) -> None:
    """Prints what a run came to, where its files are and how to look at them."""
    summary = result.summary
    print(f"status: {result.status}")
    for split in ("val", "test"):
        if summary.get(f"{split}_accuracy_last") is not None:
            last, best = (100 * summary[f"{split}_accuracy_{which}"] for which in ("last", "best"))
            chosen = f"best: {best:.2f} %, selected on {summary['selected_on']}, epoch {summary['best_epoch']}"
            print(f"{split} accuracy: last {last:.2f} %, {chosen}")
    print(f"run folder: {result.folder}")
    for path in sorted((result.folder / "figures").glob("*.png")):
        print(f"figure: {path}")
    if result.status == "interrupted":
        print(f"go on with: eva train --resume {result.folder}")
    if summary.get("wandb_folder"):
        print(f"W&B run ({summary['wandb_mode']}): {summary['wandb_folder']}")
        print(f"  look at it: wandb leet {summary['wandb_folder']}")
        if summary["wandb_mode"] == "offline":
            print(f"  upload it:  wandb sync {summary['wandb_folder']}")


def print_recipes() -> None:
    """Prints a line a recipe: parameters (of ten classes), batch, epochs, schedule and the report's accuracy."""
    from eva.models import build_model, count_parameters

    print(f"{'recipe':24}{'parameters':>12}{'batch':>7}{'epochs':>8}  {'schedule':17}{'report':>8}")
    for name, recipe in RECIPES.items():
        config, _ = resolve([recipe_layer(name)])
        model = build_model(
            config.model,
            num_classes=10,
            norm=config.norm,
            ghost_splits=config.ghost_splits,
            norm_groups=config.norm_groups,
            stage_strides=config.stage_strides,
        )
        report = "-" if recipe.report_accuracy is None else f"{100 * recipe.report_accuracy:.2f} %"
        print(
            f"{name:24}{count_parameters(model):>12,}{config.batch_size:>7}{config.epochs:>8}  "
            f"{config.schedule:17}{report:>8}"
        )


if __name__ == "__main__":
    sys.exit(main())
