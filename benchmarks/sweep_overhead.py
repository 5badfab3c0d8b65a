"""Seconds that a trial costs beyond its training: `eva sweep`, `wandb agent`, and Optuna with a process for each trial.

All run the same few short trials, one after the other, and take turns round by round; README.md says how to run it.
What counts is the time from the end of one trial to the end of the next one, less what the latter spent in the training
loop and in the final test. The agent's server is the loopback server of the tests, so that no network is waited for.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {
    **{"data": "digits", "policy": "test", "model": "torchvision/shufflenet_v2_x0_5", "precision": "fp32"},
    **{"train_limit": 60, "batch_size": 20, "epochs": 2, "peak_epoch": 1, "lr_max": 0.05, "evaluate": False},
}
MOST_SECONDS = 0.3  # of `eva sweep`, beyond training

# What each trial runs: `eva train`, its training timed; the time of the trial's end is that of the line's writing.
PROGRAM = """
import json, os, sys, time
from eva import experiment
from eva.cli import main

def timed(work):
    def run(*values):
        began = time.perf_counter()
        try:
            return work(*values)
        finally:
            spent.append(time.perf_counter() - began)
    return run

spent = []
if not hasattr(experiment, "plain"):  # a warm worker runs this text for each trial
    experiment.plain = experiment.fit, experiment.test_at_the_end
experiment.fit, experiment.test_at_the_end = map(timed, experiment.plain)
code = main(["train", *sys.argv[1:]])
with open(os.environ["BENCHMARK_TIMES"], "a") as file:
    file.write(json.dumps({"ended": time.time(), "training": sum(spent)}) + "\\n")
sys.exit(code)
"""


def sweep_of(trials: int, program: Path) -> dict[str, Any]:
    """Returns the YAML's values: a grid of so many seeds."""
    constants = {name: {"value": value} for name, value in SETTINGS.items()}
    return {
        "program": str(program),
        "method": "grid",
        "metric": {"name": "val/accuracy_best", "goal": "maximize"},
        "parameters": {**constants, "seed": {"values": list(range(trials))}},
    }


# The variants: run all trials in a folder that is theirs, where sweep.yaml lies


def eva_warm(folder: Path, environment: dict[str, str], trials: int) -> None:
    """`eva sweep` with one warm worker."""
    eva(folder, environment, "sweep.yaml", "--skip_check", "--out=out")


def eva_isolated(folder: Path, environment: dict[str, str], trials: int) -> None:
    """`eva sweep --isolate`: a process for each trial."""
    eva(folder, environment, "sweep.yaml", "--skip_check", "--out=out", "--isolate")


def eva(folder: Path, environment: dict[str, str], *flags: str) -> None:
    """Runs `eva sweep`."""
    run([sys.executable, "-m", "eva.cli", "sweep", *flags], folder, environment)


def wandb_agent(folder: Path, environment: dict[str, str], trials: int) -> None:
    """`wandb sweep` and `wandb agent`, against the loopback server."""
    sys.path.insert(0, str(ROOT / "tests"))
    from loopback import LoopbackServer

    with LoopbackServer() as server:
        path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # trials are started as `python`
        online = {**environment, **server.environment(), "PATH": path}
        run([sys.executable, "-m", "wandb", "sweep", "--project=benchmark", "sweep.yaml"], folder, online)
        [(entity, project, sweep)] = server.sweeps
        run([sys.executable, "-m", "wandb", "agent", f"{entity}/{project}/{sweep}"], folder, online)


def optuna_subprocess(folder: Path, environment: dict[str, str], trials: int) -> None:
    """Optuna's `optimize`, whose objective starts the program with the W&B mode offline, and reads its summary."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log")))

    def objective(trial: optuna.Trial) -> float:
        seed = trial.suggest_categorical("seed", list(range(trials)))
        out = folder / f"trial-{trial.number}"
        flags = [f"--{name}={value}" for name, value in {**SETTINGS, "seed": seed, "out": out}.items()]
        run([sys.executable, "program.py", *flags, "--tracking=offline"], folder, environment)
        return float(json.loads((out / "summary.json").read_text())["val_accuracy_best"])

    grid = optuna.samplers.GridSampler({"seed": list(range(trials))}, seed=0)
    study = optuna.create_study(storage=storage, sampler=grid, direction="maximize")
    study.optimize(objective, n_trials=trials)


VARIANTS: dict[str, Callable[[Path, dict[str, str], int], None]] = {
    "eva sweep": eva_warm,
    "eva sweep --isolate": eva_isolated,
    "wandb agent": wandb_agent,
    "Optuna, a subprocess a trial": optuna_subprocess,
}


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Runs a command to its end, and shows what it said if it failed."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


@contextlib.contextmanager
def prepared(trials: int) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yields a folder with the sweep and the program, and an environment that knows no account."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program.py").write_text(PROGRAM)
        (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep_of(trials, folder / "program.py")))
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        yield folder, {**kept, "HOME": name, "PYTHONPATH": paths, "BENCHMARK_TIMES": str(folder / "times.jsonl")}


def measure(variant: Callable[[Path, dict[str, str], int], None], trials: int) -> tuple[float, list[float]]:
    """Returns the seconds beyond training: those up to the first trial's end, and those of each further trial."""
    with prepared(trials) as (folder, environment):
        began = time.time()
        variant(folder, environment, trials)
        rows = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    if len(rows) != trials:
        sys.exit(f"{variant.__name__}: {len(rows)} trials ended, not {trials}")
    ends = [began, *(row["ended"] for row in rows)]
    beyond = [end - before - row["training"] for before, end, row in zip(ends, ends[1:], rows, strict=False)]
    return beyond[0], beyond[1:]


def figures(values: list[float]) -> dict[str, float]:
    """Returns median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=6, help="of each variant in a round")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    first: dict[str, list[float]] = {name: [] for name in VARIANTS}
    further: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(arguments.rounds):
        names = list(VARIANTS)[number % len(VARIANTS) :] + list(VARIANTS)[: number % len(VARIANTS)]
        for name in names:
            start, rest = measure(VARIANTS[name], arguments.trials)
            first[name].append(start)
            further[name] += rest
            print(
                f"round {number + 1}, {name}: first {start:.2f} s, further {statistics.median(rest):.3f} s", flush=True
            )
    report: dict[str, Mapping[str, Any]] = {
        name: {"first": figures(first[name]), "further": figures(further[name])} for name in VARIANTS
    }
    print(f"\n{'seconds beyond training':30}{'first trial':>12}{'each further':>14}{'min':>8}{'max':>8}")
    for name, found in report.items():
        median, least, most = found["further"].values()
        print(f"{name:30}{found['first']['median']:12.2f}{median:14.3f}{least:8.3f}{most:8.3f}")
    versions = {name: metadata.version(name) for name in ("torch", "wandb", "optuna")}
    print(f"{arguments.rounds} rounds of {arguments.trials} trials; Python {platform.python_version()}; {versions}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"variants": report, "versions": versions}, indent=2) + "\n")
    met = report["eva sweep"]["further"]["median"] <= MOST_SECONDS
    print(f"eva sweep beyond training at most {MOST_SECONDS} s: {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
