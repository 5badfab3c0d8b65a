"""Trains the recipes and sets what came out beside the reports' figures; README.md says how to run it.

It can be started again: a run that has ended is not repeated, one that was cut off goes on from its last epoch.
"""

import argparse
import json
import shutil
import statistics
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eva.config import Layer, RunConfig, UserError, read_yaml, resolve
from eva.experiment import train
from eva.recipes import RECIPES, recipe_layer
from eva.run_folder import read_summary, saved_states


def configure(name: str, seed: int, folder: Path, arguments: argparse.Namespace) -> RunConfig:
    """Returns the configuration of a recipe's run.

    Raises:
        UserError: A setting is wrong.
    """
    settings = {name: getattr(arguments, name) for name in ("data", "data_dir", "tracking", "max_steps")}
    layers = [recipe_layer(name), Layer("command line", {**settings, "seed": seed, "out": str(folder)})]
    return resolve(layers)[0]


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one recipe with one seed, unless that was done before, and returns its summary.

    Raises:
        UserError: The recipe, the data or the folder don't allow it.
    """
    folder = arguments.out / f"{name}-seed{seed}"
    summary: Mapping[str, Any] = read_summary(folder) if (folder / "summary.json").exists() else {}
    config = configure(name, seed, folder, arguments)
    before = stored_config(folder, config) if summary else None
    if before is not None and before != config:
        raise UserError(f"{str(folder)!r} holds a run with other settings; choose another --out, or remove it")
    if summary.get("status") in ("finished", "diverged"):
        print(f"{name}, seed {seed}: {summary['status']} before", flush=True)
    else:
        resume = folder if saved_states(folder) else None
        if resume and before is not None:
            config, _ = resolve([Layer(f"run {folder}", read_yaml(folder / "config.yaml"))])
        elif folder.exists():  # cut off before there was anything to go on from
            shutil.rmtree(folder)
        print(f"{name}, seed {seed}: {'going on' if resume else 'training'} in {folder}", flush=True)
        summary = train(config, resume).summary
    return {**summary, "seed": seed}


def stored_config(folder: Path, config: RunConfig) -> RunConfig | None:
    """Returns the settings that a run folder was made with, None if it was cut off before it held any.

    A rate that `config` leaves to the range test counts as left to it there too.
    """
    if not (folder / "config.yaml").exists():
        return None
    stored, _ = resolve([Layer(f"run {folder}", read_yaml(folder / "config.yaml"))])
    found = {name: "find" for name in ("lr_min", "lr_max") if getattr(config, name) == "find"}
    return replace(stored, **found)  # type: ignore[arg-type]


def row(name: str, outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Returns a recipe's line of the table, over its finished runs."""
    finished = [outcome for outcome in outcomes if outcome["status"] == "finished"]
    report = RECIPES[name].report_accuracy
    reported = "-" if report is None else f"{100 * report:.2f} %"
    if not finished:
        return (
            f"| {name} | {reported} | {', '.join(outcome['status'] for outcome in outcomes) or 'not run'} |" + " |" * 6
        )

    def mean(key: str, scale: float, form: str) -> str:
        values = [scale * outcome[key] for outcome in finished]
        deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{deviation}"

    first = finished[0]
    hardware = first["hardware"]
    return (
        f"| {name} | {reported} | {mean('test_accuracy_last', 100, '.2f')} % "
        f"| {mean('test_accuracy_best', 100, '.2f')} %, selected on {first['selected_on']} | {len(finished)} "
        f"| {mean('seconds', 1, '.0f')} | {mean('images_per_second', 1, ',.0f')} "
        f"| {hardware['device']}, {hardware['precision']} | {first['data']}, {first['data_fingerprint'][:12]} |"
    )


def table(names: Sequence[str], outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table in Markdown; figures of several seeds are mean ± standard deviation."""
    head = "| recipe | report | test accuracy, last | best | runs | training, s | images/s | device | data |"
    rows = [row(name, [outcome for outcome in outcomes if outcome["recipe"] == name]) for name in names]
    return "\n".join([head, "|---" * 9 + "|", *rows])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"default: all of {', '.join(RECIPES)}")
    parser.add_argument("--data", default="cifar10", help="cifar10 or folder:PATH")
    parser.add_argument("--data_dir", default="data", help="folder of downloads and of the decode cache")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder of the runs and the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each recipe for each seed")
    parser.add_argument("--tracking", default="disabled", help="W&B mode")
    parser.add_argument("--max_steps", type=int, help="stop each run after so many steps: to try the script")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all, writes recipes.md and recipes.json after each run, and returns 0, or 1 if a run did not finish."""
    arguments = parse(argv)
    names = arguments.recipes or list(RECIPES)
    for name in names:
        recipe_layer(name)  # an unknown one is told before anything runs
    arguments.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[dict[str, Any]] = []
    for name, seed in [(name, seed) for seed in arguments.seeds for name in names]:
        try:
            outcomes.append(run(name, seed, arguments))
        except Exception as error:  # one recipe that fails must not cost the others
            if isinstance(error, UserError):
                print(f"{name}, seed {seed}: {error}", file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
            outcomes.append({"recipe": name, "seed": seed, "status": "failed", "error": str(error)})
        (arguments.out / "recipes.md").write_text(table(names, outcomes) + "\n", encoding="utf-8")
        (arguments.out / "recipes.json").write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
        if outcomes[-1]["status"] == "interrupted":
            break
    print(table(names, outcomes))
    return 0 if all(outcome["status"] == "finished" for outcome in outcomes) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"recipes: error: {error}", file=sys.stderr)
        sys.exit(2)
