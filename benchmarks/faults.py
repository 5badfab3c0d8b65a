"""What W&B's failures cost a training: seconds a step under each fault against W&B healthy, online and offline.

Every variant is a real `eva train` of the same few steps; they take turns, and what counts is the ratio within a round.
A fault begins after the first epoch, or before the run. The server is the loopback server of the tests. Beside the
training's own speed, which drowns in a shared machine's noise, it tells the seconds that a step spends in W&B's calls.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from loopback import LoopbackServer  # noqa: E402

from eva.wandb_client import clients  # noqa: E402

MOST_PERCENT = 2.0  # of a step, in calls of W&B, beyond those of a healthy run
SETTINGS = {
    **{"data": "digits", "policy": "test", "model": "torchvision/shufflenet_v2_x0_5", "precision": "fp32"},
    **{"train_limit": 640, "batch_size": 20, "peak_epoch": 1, "lr_max": 0.05, "evaluate": False, "workers": 0},
    **{"tracking": "online", "tracking_timeout": 4, "project": "faults"},
}
# The median of a step's seconds without the first epoch, and the mean of those in W&B's calls, go into a file.
PROGRAM = """
import json, os, statistics, sys, time
from eva import loop, tracker
from eva.cli import main

steps, spent = [], []
plain_step, plain_log = loop.train_step, tracker.WandbTracker.log

def train_step(training, images, labels):
    steps.append(time.perf_counter())
    return plain_step(training, images, labels)

def log(self, row):
    began = time.perf_counter()
    plain_log(self, row)
    spent.append(time.perf_counter() - began)

loop.train_step, tracker.WandbTracker.log = train_step, log
code = main(["train", *sys.argv[1:]])
gaps = [after - before for before, after in zip(steps[40:], steps[41:])]
with open(os.environ["BENCHMARK_TIMES"], "w") as file:
    json.dump({"median": statistics.median(gaps), "log": sum(spent) / len(steps), "slowest": max(spent)}, file)
sys.exit(code)
"""


def come_back(server: LoopbackServer, process: int) -> None:
    """Kills the server, and lets it serve again a little later."""
    server.stop()
    time.sleep(1.5)
    server.start()


def kill_client(server: LoopbackServer, process: int) -> None:
    """Kills the W&B client of a process."""
    for client in clients(process):
        os.kill(client, signal.SIGKILL)


Fault = Callable[[LoopbackServer, int], object]
BEFORE: dict[str, Fault] = {"not there at the start": lambda server, process: server.stop()}
AFTER: dict[str, Fault] = {
    "dies": lambda server, process: server.stop(),
    "dies, comes back": come_back,
    "10 % answer 500": lambda server, process: setattr(server, "failing", 0.1),
    "2 s latency": lambda server, process: setattr(server, "latency", 2.0),
    "never answers": lambda server, process: setattr(server, "silent", True),
    "client killed": kill_client,
}
HEALTHY = ("online", "offline")


def measure(variant: str, steps: int) -> dict[str, float]:
    """Trains once; returns the seconds of a step (median), of its logging (mean), and of the slowest logging."""
    with LoopbackServer() as server, tempfile.TemporaryDirectory() as home:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        times, folder = Path(home) / "times.json", Path(home) / "run"
        environment = {**kept, **server.environment(), "HOME": home, "BENCHMARK_TIMES": str(times)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        settings = {**SETTINGS, "max_steps": steps, "epochs": -(-steps // 28), "out": folder}
        if variant == "offline":
            settings["tracking"] = "offline"
        if variant in BEFORE:
            BEFORE[variant](server, 0)
        command = [sys.executable, "-c", PROGRAM, *(f"--{name}={value}" for name, value in settings.items())]
        with open(Path(home) / "output", "wb") as output:
            options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=home, env=environment, **options)  # type: ignore[call-overload]
        epochs = folder / "epochs.csv"
        while process.poll() is None and not (epochs.exists() and epochs.read_text().count("\n") > 1):
            time.sleep(0.02)
        if variant in AFTER:
            AFTER[variant](server, process.pid)
        if process.wait() != 0:
            raise RuntimeError((Path(home) / "output").read_text())
        result: dict[str, float] = json.loads(times.read_text())
        return result


def spread(values: list[float]) -> str:
    """Returns median, least and greatest."""
    return f"{statistics.median(values):9.3f} {min(values):9.3f} {max(values):9.3f}"


def main() -> int:
    """Measures and prints; returns 1 if a fault makes W&B's calls take more of a step than the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=168)
    arguments = parser.parse_args()
    variants = [*HEALTHY, *BEFORE, *AFTER]
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for number in range(arguments.rounds):
        for place in range(len(variants)):  # each round begins with another
            variant = variants[(place + number) % len(variants)]
            found[variant].append(measure(variant, arguments.steps))
    print(f"{arguments.rounds} rounds of {arguments.steps} steps, {platform.processor() or platform.machine()}")
    print(f"{'seconds a step / of a step':34}{'median':>9} {'min':>9} {'max':>9}")
    for variant in variants:
        for healthy in HEALTHY:
            pairs = zip(found[variant], found[healthy], strict=True)
            print(f"{f'{variant} / {healthy}':34}{spread([one['median'] / other['median'] for one, other in pairs])}")
    above = []
    print(f"{'% of a step in calls of W&B':34}{'median':>9} {'min':>9} {'max':>9}   slowest call, ms")
    step = statistics.median(one["median"] for measured in found.values() for one in measured)
    for variant in variants:
        shares = [100 * one["log"] / step for one in found[variant]]
        print(f"{variant:34}{spread(shares)}   {1000 * max(one['slowest'] for one in found[variant]):10.1f}")
        least = min(statistics.median(100 * one["log"] / step for one in found[healthy]) for healthy in HEALTHY)
        if statistics.median(shares) - least > MOST_PERCENT:
            above.append(variant)
    print(f"more than {MOST_PERCENT} % above a healthy run: {', '.join(above) or 'none'}")
    return bool(above)


if __name__ == "__main__":
    sys.exit(main())
