"""A sweep of 64 trials by two workers of which one is killed now and then: what comes out is counted.

python benchmarks/sweep_kills.py --out FOLDER; README.md says what it has shown.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from eva.config import UserError
from eva.ranking import TrialRecord
from eva.sweep_folder import SweepFolder, open_sweep_folder

# The smallest network that a run can have: less than three seconds of training.
SETTINGS = {
    **{"data": "digits", "policy": "test", "model": "torchvision/shufflenet_v2_x0_5", "precision": "fp32"},
    **{"train_limit": 200, "batch_size": 20, "epochs": 3, "peak_epoch": 1, "lr_min": 0.001, "workers": 0},
    **{"save_steps": 4, "evaluate": False},
}
EPOCHS, STEPS = 3, 30


def write_sweep(path: Path, trials: int) -> None:
    """Writes the YAML: a random search of learning rate and seed."""
    parameters: dict[str, Any] = {name: {"value": value} for name, value in SETTINGS.items()}
    parameters["lr_max"] = {"distribution": "log_uniform_values", "min": 0.005, "max": 0.1}
    parameters["seed"] = {"min": 0, "max": 1000}
    values = {
        "program": str(Path(__file__).resolve().parent.parent / "runners" / "train.py"),
        "method": "random",
        "metric": {"name": "val/accuracy_best", "goal": "maximize"},
        "run_cap": trials,
        "parameters": parameters,
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def workers_of(conductor: int) -> list[int]:
    """Returns the process ids of the workers that a process has started, and which live."""
    path = Path(f"/proc/{conductor}/task/{conductor}/children")
    children = [int(word) for word in path.read_text().split()] if path.exists() else []
    return [pid for pid in children if b"eva.sweep_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def run(path: Path, folder: Path, trials: int, kills: int, seed: int) -> tuple[int, float]:
    """Runs the sweep and kills a worker at random moments; returns the kills and the seconds that it took.

    Raises:
        UserError: The sweep ended with a failure.
    """
    generator, done, began = random.Random(seed), 0, time.monotonic()
    program = "import sys; from eva.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "sweep", str(path), "--skip_check", "--workers=2", f"--out={folder}"]
    with open(folder.with_suffix(".log"), "wb") as log:
        conductor = subprocess.Popen(command, stdout=log, stderr=log)
        while conductor.poll() is None and not (folder / "sweep.json").exists():
            time.sleep(0.1)
        # Spread over the sweep: each one waits until its share of the trials is through, and a moment more.
        moments = sorted(generator.uniform(0, 0.9 * trials) for _ in range(kills))
        for moment in moments:
            while conductor.poll() is None and ended(folder) < int(moment):
                time.sleep(0.1)
            time.sleep(generator.uniform(0, 3))
            while conductor.poll() is None and not (alive := workers_of(conductor.pid)):
                time.sleep(0.1)
            if conductor.poll() is None:
                os.kill(generator.choice(alive), signal.SIGKILL)
                done += 1
                print(f"killed a worker after {ended(folder)} trials, {time.monotonic() - began:.0f} s", flush=True)
        code = conductor.wait()
    if code:
        raise UserError(f"the sweep ended with exit code {code}: see {folder.with_suffix('.log')}")
    return done, time.monotonic() - began


def ended(folder: Path) -> int:
    """Returns how many runs of a sweep's folder are through."""
    texts = [path.read_text() for path in folder.glob("trials/trial-*/summary.json")]
    return sum('"status": "finished"' in text for text in texts)


def rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check(folder: SweepFolder, records: list[TrialRecord], trials: int) -> list[str]:
    """Returns what is wrong with the outcome; an empty list if nothing is."""
    runs = sorted((folder.path / "trials").glob("trial-*/"))
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    states = Counter(record.state for record in records)
    wrong = []
    if states != {"finished": trials}:
        wrong.append(f"the storage must hold {trials} finished trials, but holds {dict(states)}")
    if [record.number for record in records] != list(range(trials)):
        wrong.append("the storage's trials are not numbered through")
    if [run.name for run in runs] != [f"trial-{number:04}" for number in range(trials)]:
        wrong.append(f"there must be {trials} run folders, but there are {len(runs)}")
    ids = {summary["wandb_id"] for summary in summaries}
    if len(ids) != trials:
        wrong.append(f"there must be {trials} W&B ids, but there are {len(ids)}")
    for run, summary, record in zip(runs, summaries, records, strict=False):
        written = {Path(path).name.rpartition("-")[2] for path in summary["wandb_folders"]}
        if written != {summary["wandb_id"]}:
            wrong.append(f"{run.name}: W&B's folders are of {', '.join(sorted(written))}")
        if [int(row["trainer/step"]) for row in rows(run / "history.csv")] != list(range(STEPS)):
            wrong.append(f"{run.name}: history.csv must have each of {STEPS} steps once, in order")
        accuracies = [float(row["val/accuracy_best"]) for row in rows(run / "epochs.csv")]
        if len(accuracies) != EPOCHS or list(record.curve) != accuracies or record.objective != accuracies[-1]:
            wrong.append(f"{run.name}: the storage's curve {record.curve} must be that of epochs.csv, {accuracies}")
    return wrong


def main() -> int:
    """Runs the sweep, prints the figures; returns 1 if something was lost or is there twice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of whom they hit")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "kills.yaml"
    write_sweep(path, arguments.trials)
    os.environ.update({"OMP_NUM_THREADS": "1"})
    try:
        kills, seconds = run(path, arguments.out / "sweep", arguments.trials, arguments.kills, arguments.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    folder = open_sweep_folder(arguments.out / "sweep")
    search = folder.open_search()
    records = search.records()
    wrong = check(folder, records, arguments.trials)
    gone_on = sum("going on from" in path.read_text() for path in folder.path.glob("trials/*.log"))
    told = (arguments.out / "sweep.log").read_text().count("its process died")
    print(f"{kills} workers killed, {told} of them while they ran a trial; {gone_on} trials gone on with from a state")
    print(f"{sum(record.result is not None for record in records)} results of {arguments.trials} trials")
    print(f"{seconds:.0f} s, {seconds / arguments.trials:.2f} s a trial by two workers")
    for line in wrong:
        print(f"wrong: {line}")
    if kills != arguments.kills:
        print(f"wrong: there were to be {arguments.kills} kills")
    print("nothing lost, nothing twice" if not wrong else f"{len(wrong)} things are wrong")
    return 1 if wrong or kills != arguments.kills else 0


if __name__ == "__main__":
    sys.exit(main())
