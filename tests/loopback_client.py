"""wandb's real commands at work on a sweep of the loopback server, in a folder that is their home too."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from conftest import BIN
from loopback import LoopbackServer
from loopback_records import Run, Sweep

TIMEOUT = 1200.0  # a busy machine takes minutes to start a handful of processes


@dataclass(frozen=True)
class Started:
    """A process, and the file of what it prints: a pipe that nobody reads would fill up and hold it."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self.output.read_text()


@dataclass(frozen=True)
class Search:
    """A sweep at the server, the folder that its agents work in, and what was started there."""

    server: LoopbackServer
    sweep: Sweep
    folder: Path
    environment: Mapping[str, str]
    started: list[Started] = field(default_factory=list)

    @property
    def path(self) -> str:
        """What `wandb agent` calls the sweep."""
        return f"{self.sweep.entity}/{self.sweep.project}/{self.sweep.id}"

    def run(self, run_id: str) -> Run | None:
        """Returns what the server has of a trial's run; None if that never began."""
        return self.server.runs.get((self.sweep.entity, self.sweep.project, run_id))

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """Returns the rows that the server has of a run so far."""
        run = self.run(run_id)
        return [] if run is None else list(run.history)

    def began(self, run_id: str) -> Run:
        """Returns what the server has of a run that began."""
        run = self.run(run_id)
        assert run is not None
        return run

    def summary(self, run_id: str) -> dict[str, Any]:
        """Returns the summary in a trial's run folder."""
        values: dict[str, Any] = json.loads((self.folder / "runs" / run_id / "summary.json").read_text())
        return values

    def note(self, what: str, run_id: str) -> int:
        """Returns a number that a trial's own file holds: what starts the trials wrote it down."""
        return int((self.folder / f"{what}-{run_id}").read_text())

    def start(self, *command: str, **variables: str) -> Started:
        """Starts a command there."""
        output = self.folder / f"output-{len(self.started)}.txt"
        environment = {**self.environment, **variables}
        with output.open("wb") as file:
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            # A group of its own, as a shell gives it: a Ctrl-C goes to all of the group.
            process = subprocess.Popen(command, cwd=self.folder, env=environment, process_group=0, **options)
        self.started.append(Started(process, output))
        return self.started[-1]

    def start_agent(self, *flags: str) -> Started:
        """Starts `wandb agent`."""
        return self.start(str(BIN / "wandb"), "agent", *flags, self.path)

    def wait(self) -> None:
        """Waits until all that was started has ended."""
        for started in self.started:
            started.process.wait(TIMEOUT)

    def kill(self) -> None:
        """Kills what is left of it."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes(self) -> set[int]:
        """Returns the ids of all processes that have this search's home: agents, trials, and what they started."""
        home, found = f"HOME={self.folder}".encode(), set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if home in path.read_bytes().split(b"\0"):
                    found.add(int(path.parent.name))
        return found


def until(holds: Callable[[], bool]) -> None:
    """Waits until something holds."""
    end = time.monotonic() + TIMEOUT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def begin_search(
    server: LoopbackServer, folder: Path, environment: Mapping[str, str], plan: list[Any] | None = None, **config: Any
) -> Search:
    """Makes a sweep of a configuration; what it is to try can be said where that is no grid."""
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
    search = begin_search_of(server, folder, environment, "sweep.yaml")
    if plan is not None:
        search.sweep.plan = plan
    return search


def begin_search_of(server: LoopbackServer, folder: Path, environment: Mapping[str, str], file: str) -> Search:
    """Makes a sweep by `wandb sweep FILE`, called in the folder."""
    path = f"{BIN}{os.pathsep}{environment['PATH']}"  # trials are started as `python`
    environment = {**environment, **server.environment(), "HOME": str(folder), "PATH": path}
    # An agent would kill a trial that takes half a minute to stop.
    environment |= {"WANDB_AGENT_KILL_DELAY": str(int(TIMEOUT))}
    known = set(server.sweeps)
    command = [str(BIN / "wandb"), "sweep", file]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=TIMEOUT)
    [key] = server.sweeps.keys() - known
    return Search(server, server.sweeps[key], folder, environment)
