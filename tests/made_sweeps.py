"""Sweeps of a program that is through in milliseconds, and a look at the processes that run them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from eva.search import Search, open_storage
from eva.sweep_file import read_sweep
from eva.sweep_folder import SweepFolder, make_sweep_folder

# What a trial does is its parameter `do`, up to a digit. It leaves a line in runs.log each time it begins, and what a
# run leaves: a summary and epochs.
PROGRAM = """
import json, os, resource, signal, sys, time
from eva.trial import current_trial

trial = current_trial()
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
do = given["do"].rstrip("0123456789")
with open(trial.folder.parent / "runs.log", "a") as log:
    log.write(f"{trial.folder.name}\\n")
trial.folder.mkdir(exist_ok=True)
first = not (trial.folder / "state").exists()
(trial.folder / "state").mkdir(exist_ok=True)
(trial.folder / "state" / "000001-0.pt").touch()
facts = {"arguments": trial.arguments, "argv": sys.argv, "run_id": trial.run_id, "group": trial.group,
         "pid": os.getpid(), "cwd": os.getcwd(), "path": sys.path[0], "name": __name__,
         "threads": os.environ.get("OMP_NUM_THREADS"), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
(trial.folder / "facts.json").write_text(json.dumps(facts))

def leave(status, *losses):
    (trial.folder / "epochs.csv").write_text("epoch,loss\\n" + "".join(f"{n},{x}\\n" for n, x in enumerate(losses, 1)))
    (trial.folder / "summary.json").write_text(json.dumps({"wandb_id": trial.run_id, "status": status}))

print("trial begins", flush=True)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if do == "finish":
    for epoch in (1, 2):
        trial.report({"epoch": epoch, "loss": 1 / epoch})
    leave("finished", 1.0, 0.5)
elif do == "diverge":
    leave("diverged", 2.0, "nan")
elif do == "stop":
    leave("stopped", 0.75)
elif do == "crash":
    raise RuntimeError("no such luck")
elif do == "exit":
    print("given up")
    sys.exit(3)
elif do == "text":
    sys.exit("said why")
elif do == "usage":
    print("eva train: error: lr_max must be a number", file=sys.stderr)
    sys.exit(2)
elif do == "heal":
    if not (trial.folder.parent / "healthy").exists():
        sys.exit("not yet")
    leave("finished", 0.25)
elif do == "memory":
    resource.setrlimit(resource.RLIMIT_AS, (2 ** 36, resource.RLIM_INFINITY))
    bytearray(2 ** 37)
elif do == "die":
    os._exit(7)
elif do == "abort":
    os.abort()
elif do == "kill" or do == "once" and first:
    os.kill(os.getpid(), signal.SIGKILL)
elif do == "once":
    leave("finished", 0.25)
elif do == "through":
    leave("finished", 0.125)
    os.kill(os.getpid(), signal.SIGKILL)
elif do == "leak":
    os.chdir("/"), sys.path.insert(0, "/nowhere"), sys.argv.append("--more=1"), sys.stdout.write("no end of line")
    leave("finished", 0.5)
elif do == "wait":
    def stop(number, frame):
        sys.exit(130)
    previous = signal.signal(signal.SIGTERM, stop)
    (trial.folder / "waits").touch()
    while not (trial.folder.parent / "go").exists():
        time.sleep(0.02)
    signal.signal(signal.SIGTERM, previous)
    leave("finished", 0.5)
elif do == "polite":
    def finish(number, frame):
        leave("finished", 0.5)
        sys.exit(130)
    signal.signal(signal.SIGTERM, finish)
    (trial.folder / "waits").touch()
    time.sleep(60)
elif do == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (trial.folder / "waits").touch()
    time.sleep(60)
elif do == "unready":
    (trial.folder / "waits").touch()
    time.sleep(60)
elif do == "slow":
    def again(number, frame):
        (trial.folder / "twice").touch()
    def save(number, frame):
        signal.signal(signal.SIGTERM, again)
        time.sleep(1)
        (trial.folder / "saved").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, save)
    (trial.folder / "waits").touch()
    time.sleep(60)
"""

ARGUMENTS = ("${env}", "${interpreter}", "${program}", "${args}")


def begin(root: Path, *do: str, out: str = "sweep", **more: Any) -> tuple[SweepFolder, Search]:
    """Returns a new sweep of trials that do these things, in this order.

    Args:
        root: Where the program, the YAML and the folder go.
        do: Each once.
        out: The folder's name.
        more: command, storage, isolate, retries and name; other parameters.
    """
    options: dict[str, Any] = {"storage": None, "isolate": False, "retries": 1, "name": None}
    options |= {name: more.pop(name) for name in options.keys() & more.keys()}
    (root / "program.py").write_text(PROGRAM)
    values = {
        "program": str(root / "program.py"),
        "command": list(more.pop("command", ARGUMENTS)),
        "method": "grid",
        "metric": {"name": "loss", "goal": "minimize", **more.pop("metric", {})},
        "parameters": {**more, "do": {"values": list(do)}},
    }
    path = root / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    folder = make_sweep_folder(root / out, read_sweep(path), **options)
    return folder, Search.create(folder.sweep, open_storage(folder.storage_url()), folder.name, 0, len(do))


def begun(folder: SweepFolder) -> list[int]:
    """Returns the numbers of the trials whose program began, once for each time, sorted."""
    path = folder.path / "trials" / "runs.log"
    return sorted(int(line.removeprefix("trial-")) for line in path.read_text().split()) if path.exists() else []


def facts(folder: SweepFolder, number: int) -> dict[str, Any]:
    """Returns what a trial saw of itself the last time that it began."""
    values: dict[str, Any] = json.loads((folder.run_folder(number) / "facts.json").read_text())
    return values


def start_conductor(folder: SweepFolder, workers: int, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Starts a process that conducts a sweep as `eva sweep` does, without the report at its end."""
    program = (
        "import sys; from pathlib import Path; from eva.sweep import Conductor;"
        "from eva.sweep_folder import open_sweep_folder; folder = open_sweep_folder(Path(sys.argv[1]));"
        "sys.exit(0 if Conductor(folder, folder.open_search(), int(sys.argv[2])).run() else 130)"
    )
    command = [sys.executable, "-c", program, str(folder.path), str(workers)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers_of(path: Path) -> list[int]:
    """Returns the process ids of a sweep's workers, each of which leads a session of its own, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"eva.sweep_worker" in words and os.fsencode(path.resolve()) in words:
                found.append(int(entry.name))
    return sorted(found)


def of_sessions(sessions: set[int]) -> list[str]:
    """Returns the command lines of the processes that live in sessions, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) in sessions and state != "Z":
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def wait_until(holds: Callable[[], Any], seconds: float = 60) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def kill(*pids: int) -> None:
    """Kills processes in a way that leaves them no time for anything."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
