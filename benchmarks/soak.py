"""Sweeps for hours while trials, workers, conductors and the W&B server are killed at random; then all is counted.

    python benchmarks/soak.py --data=FOLDER --out=FOLDER [--minutes=120]

FOLDER of the data is an image folder; a small piece of it is used. One sweep follows the other until the time is over,
by turns with warm workers and with a process for each trial, by turns offline and tracked online by a W&B server on
this machine, which dies and comes back. After each sweep every run is sent (`eva sync`), and counted: trials with a
result, rows in history.csv and epochs.csv, rows on the server, and of some trials whether they are equal to the bit to
the same run left alone. README.md says what it has shown.
"""

import argparse
import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from loopback import LoopbackServer

from eva.run_folder import read_config, read_summary
from eva.sweep_folder import open_sweep_folder

TRIALS, EPOCHS, BATCHES = 8, 6, 10  # of each sweep, of each trial, of each epoch
CLOCK = {"seconds", "images_per_second", "train_epoch/seconds"}
EVA = [sys.executable, "-c", "import sys; from eva.cli import main; sys.exit(main())"]


@dataclasses.dataclass
class Figures:
    """What was done, and what was found."""

    sweeps: int = 0
    trials: int = 0
    results: int = 0
    kills: Counter[str] = dataclasses.field(default_factory=Counter)
    resumes: int = 0
    rows_expected: int = 0
    rows_found: int = 0
    rows_sent: int = 0
    repeated: int = 0
    equal: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)

    def told(self) -> str:
        """Returns the figures in words."""
        kills = ", ".join(f"{count} {what}" for what, count in sorted(self.kills.items()))
        return (
            f"{self.sweeps} sweeps, {self.trials} trials, {self.results} with a result\n"
            f"killed: {kills}; trials gone on with from a state: {self.resumes} times\n"
            f"rows: {self.rows_expected} expected, {self.rows_found} in run folders, {self.rows_sent} on the server\n"
            f"run once more and left alone: {self.repeated} trials, {self.equal} equal to the bit"
        )


def make_piece(data: Path, piece: Path) -> None:
    """Copies a few images of each class of an image folder."""
    for split, count in (("train", 30), ("test", 10)):
        for folder in sorted((data / split).iterdir()):
            (piece / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, piece / split / folder.name)


def write_sweep(path: Path, piece: Path, seed: int) -> None:
    """Writes the YAML of a sweep: learning rate, schedule and seed at random."""
    fixed: dict[str, Any] = {
        **{"data": f"folder:{piece}", "model": "torchvision/shufflenet_v2_x0_5", "precision": "fp32", "epochs": EPOCHS},
        **{"batch_size": 27, "peak_epoch": 1, "lr_min": 1e-3, "save_steps": 3, "evaluate": False, "workers": 1},
        "augmentation": "albumentations",
        **{"deterministic": True, "data_dir": str(piece.parent / "data"), "tracking_timeout": 20, "project": "soak"},
    }
    parameters: dict[str, Any] = {name: {"value": value} for name, value in fixed.items()}
    parameters["lr_max"] = {"distribution": "log_uniform_values", "min": 0.005, "max": 0.1}
    parameters["schedule"] = {"values": ["onecycle", "plateau", "cosine"]}
    parameters["ema_decay"] = {"values": [0.9, None]}
    parameters["seed"] = {"min": 1000 * seed, "max": 1000 * seed + 999}
    values = {
        "program": str(Path(__file__).resolve().parent.parent / "runners" / "train.py"),
        "method": "random",
        "metric": {"name": "val/accuracy_best", "goal": "maximize"},
        "run_cap": TRIALS,
        "parameters": parameters,
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def descendants(process: int) -> list[tuple[int, str]]:
    """Returns the processes below a process, with their command lines."""
    found = []
    path = Path(f"/proc/{process}/task/{process}/children")
    for child in path.read_text().split() if path.exists() else []:
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        found += [(int(child), words), *descendants(int(child))]
    return found


def victims(conductor: int, what: str) -> list[int]:
    """Returns the processes of a kind that live: workers, or trials, which may have a process of their own."""
    found = descendants(conductor)
    workers = [process for process, words in found if "eva.sweep_worker" in words]
    trials = [process for process, words in found if "runners/train.py" in words and process not in workers]
    return trials or workers if what == "trials" else workers


def run_sweep(
    folder: Path, command: list[str], server: LoopbackServer, generator: random.Random, figures: Figures, pause: float
) -> None:
    """Runs a sweep to its end, however often it has to be begun again, and kills what it meets.

    Args:
        folder: The sweep's.
        command: What begins it.
        server: W&B's, which dies now and then.
        generator: Draws the moments and whom they hit.
        figures: Gets what was killed.
        pause: The mean time between two kills in seconds.
    """
    deadline = time.monotonic() + 1500
    with open(folder.with_suffix(".log"), "ab") as log:
        while True:
            conductor = subprocess.Popen(command, stdout=log, stderr=log)
            while conductor.poll() is None:
                time.sleep(generator.expovariate(1 / pause))
                what = generator.choice(("workers", "workers", "trials", "trials", "servers", "conductors"))
                if conductor.poll() is not None or time.monotonic() > deadline - 600:
                    conductor.wait(600)  # towards the end nobody disturbs it
                elif what == "servers":
                    figures.kills[what] += 1
                    server.stop()
                    time.sleep(generator.uniform(0, 8))
                    server.start()
                elif what == "conductors" and (folder / "sweep.json").exists():
                    figures.kills[what] += 1
                    conductor.kill()
                elif alive := victims(conductor.pid, what):
                    figures.kills[what] += 1
                    os.kill(generator.choice(alive), signal.SIGKILL)
            if conductor.wait() == 0:
                return
            if conductor.returncode != -signal.SIGKILL:
                figures.wrong.append(f"{folder.name}: ended with exit code {conductor.returncode}")
                return
            command = [*EVA, "sweep", f"--resume={folder}", "--workers=2"]


def rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file without wall-clock."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: text for name, text in row.items() if name not in CLOCK} for row in csv.DictReader(file)]


def count(folder: Path, server: LoopbackServer, figures: Figures) -> None:
    """Sends the runs of a sweep, and counts what is there."""
    records = open_sweep_folder(folder).open_search().records()
    figures.sweeps += 1
    figures.trials += TRIALS
    figures.results += sum(record.state == "finished" for record in records)
    if len(records) != TRIALS:
        figures.wrong.append(f"{folder.name}: the storage has {len(records)} trials")
    figures.resumes += sum(path.read_text().count("going on from") for path in folder.glob("trials/*.log"))
    for record in records:
        run = folder / "trials" / f"trial-{record.number:04}"
        if record.state != "finished":
            figures.wrong.append(f"{folder.name}, {run.name}: {record.state} ({record.reason})")
            continue
        sent = subprocess.run([*EVA, "sync", str(run)], capture_output=True, text=True)
        if sent.returncode:
            figures.wrong.append(f"{folder.name}, {run.name}: not sent: {sent.stderr.strip()[-300:]}")
        history, epochs = rows(run / "history.csv"), rows(run / "epochs.csv")
        figures.rows_expected += EPOCHS * BATCHES + EPOCHS
        if [int(row["trainer/step"]) for row in history] == list(range(EPOCHS * BATCHES)):
            figures.rows_found += len(history)
        if [int(row["epoch"]) for row in epochs] == list(range(1, EPOCHS + 1)):
            figures.rows_found += len(epochs)
        run_id = read_summary(run)["wandb_id"]
        logged = [row for key, one in server.runs.items() if key[2] == run_id for row in one.history]
        if [row["_step"] for row in logged] != list(range(len(logged))):
            figures.wrong.append(f"{folder.name}, {run.name}: W&B's steps are {[row['_step'] for row in logged]}")
        steps = [row["trainer/step"] for row in logged if "train/loss" in row]
        ended = [row["epoch"] for row in logged if "val/loss" in row]
        if steps == list(range(EPOCHS * BATCHES)) and ended == list(range(1, EPOCHS + 1)):
            figures.rows_sent += len(steps) + len(ended)


def repeat(run: Path, folder: Path, figures: Figures) -> None:
    """Runs a trial once more, alone, and compares."""
    config, _ = read_config(run)
    settings = json.loads(json.dumps(dataclasses.asdict(config))) | {"out": str(folder), "tracking": "disabled"}
    folder.with_suffix(".yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    subprocess.run([*EVA, "train", f"--config={folder.with_suffix('.yaml')}"], capture_output=True, check=True)
    figures.repeated += 1
    names = ("history.csv", "epochs.csv")
    figures.equal += all(rows(run / name) == rows(folder / name) for name in names)


def main() -> int:
    """Runs sweeps until the time is over, prints the figures; returns 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="an image folder")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--pause", type=float, default=4, help="mean seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    make_piece(arguments.data, out / "piece")
    generator, figures, deadline = random.Random(arguments.seed), Figures(), time.monotonic() + 60 * arguments.minutes
    with LoopbackServer() as server:
        os.environ.update({**server.environment(), "OMP_NUM_THREADS": "1", "HOME": str(out)})
        while time.monotonic() < deadline:
            number = figures.sweeps
            folder = out / f"sweep-{number:03}"
            write_sweep(folder.with_suffix(".yaml"), out / "piece", number)
            command = [
                *EVA,
                "sweep",
                str(folder.with_suffix(".yaml")),
                "--skip_check",
                "--workers=2",
                f"--out={folder}",
            ]
            command += ["--retries=1000", f"--tracking={('offline', 'online')[number % 2]}"]
            command += ["--isolate"] if number % 4 > 1 else []
            run_sweep(folder, command, server, generator, figures, arguments.pause)
            count(folder, server, figures)
            one = folder / "trials" / f"trial-{generator.randrange(TRIALS):04}"
            if (one / "config.yaml").exists():
                repeat(one, out / f"again-{number:03}", figures)
            print(f"{(time.monotonic() - deadline) / 60 + arguments.minutes:.0f} minutes\n{figures.told()}", flush=True)
            for line in figures.wrong:
                print(f"wrong: {line}", flush=True)
    whole = figures.results == figures.trials and figures.equal == figures.repeated
    whole = whole and figures.rows_expected == figures.rows_found == figures.rows_sent and not figures.wrong
    print("nothing lost, nothing twice" if whole else "something is wrong")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
