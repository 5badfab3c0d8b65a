"""Several of W&B's agents on one machine, each with a GPU of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from eva.config import UserError, collected
from eva.tracker import choose_mode

GPU = re.compile(r"0|[1-9][0-9]*|(?:GPU|MIG)-[\w/-]+", re.ASCII)
# [[ENTITY/]PROJECT/]SWEEP. W&B refuses / \ # ? % : in the name of a project.
SWEEP = re.compile(r"(?:(?:[\w-]+/)?[^-/\\#?%:\s][^/\\#?%:]*/)?\w[\w-]*")

# Agents that asked W&B in the same second were given the same trial.
STAGGER_SECONDS = 1.0
# What an agent that is told to end on our own failure may take before it is killed.
PATIENCE_SECONDS = 30.0


def run_agents(sweep: str, gpus: Sequence[str], count: int | None = None, arguments: Sequence[str] = ()) -> int:
    """Runs a `wandb agent` for each GPU until all have ended, and prints what they say, each line after its GPU.

    An agent and its trials see their GPU alone (CUDA_VISIBLE_DEVICES). SIGINT and SIGTERM go to all agents, which pass
    them on: the first lets the running trials end in order, a second one acts on them at once, a third one kills them.

    Args:
        sweep: [ENTITY/]PROJECT/SWEEP, or the id alone.
        gpus: Numbers, or UUIDs as `nvidia-smi -L` shows them.
        count: How many trials each agent runs; no bound if None.
        arguments: More flags of `wandb agent`.

    Returns:
        The worst exit code of an agent; 128 and the signal's number for one that a signal ended.

    Raises:
        UserError: W&B isn't online, or an argument is no such thing; all problems at once.
    """
    problems: list[str] = []
    with collected(problems):
        _check_online()
    problems += _problems(sweep, gpus, count)
    if problems:
        raise UserError("\n".join(problems))
    bound = [] if count is None else [f"--count={count}"]
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", *bound, *arguments, sweep]
    agents: list[_Agent] = []
    try:
        with _passed_on(agents) as stopping:
            for gpu in gpus:
                if agents:
                    stopping.wait(STAGGER_SECONDS)
                if stopping.is_set():
                    break
                agents.append(_Agent(gpu, command))
            codes = [agent.wait() for agent in agents]
    finally:
        for agent in agents:
            agent.end()
    return max((128 - code if code < 0 else code for code in codes), default=0)


def _check_online() -> None:
    """Raises a UserError that names the offline way if W&B would not be online."""
    wish = os.environ.get("WANDB_MODE", "")
    try:
        online = choose_mode("auto")[0] == "online"
    except UserError:  # its advice is about a run
        online, wish = False, ""
    if not online:
        reason = f"WANDB_MODE={wish} is set" if wish else "no account is set up here (`wandb login` sets one up)"
        raise UserError(f"agents need W&B online, but {reason}; `eva sweep FILE.yaml` runs a sweep offline")


def _problems(sweep: str, gpus: Sequence[str], count: int | None) -> list[str]:
    """Returns what is wrong with the arguments of `run_agents`, a line each."""
    problems = []
    if not SWEEP.fullmatch(sweep):
        problems.append(f"sweep must be ENTITY/PROJECT/SWEEP, as `wandb sweep` told it, but got {sweep!r}")
    if not gpus:
        problems.append("gpus must name at least one GPU, e.g. --gpus=0,1")
    for number, gpu in enumerate(gpus):
        if not GPU.fullmatch(gpu):
            problems.append(f"a GPU must be a number from 0 on, or a UUID (GPU-..., MIG-...), but got {gpu!r}")
        elif gpu in gpus[:number]:
            problems.append(f"each GPU takes one agent, but {gpu!r} is there twice")
    if count is not None and count < 1:
        problems.append(f"count must be at least 1, but got {count}")
    return problems


class _Agent:
    """The process of an agent, and the thread that prints what it says."""

    def __init__(self, gpu: str, command: Sequence[str]) -> None:
        # Trials are started as `python`, which must be the one that eva is installed for.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "PATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # a Ctrl-C of the terminal reaches it through us alone, and so only once
        )
        assert self._process.stdout is not None
        self._printer = threading.Thread(target=_print_lines, args=(f"gpu {gpu}: ", self._process.stdout), daemon=True)
        self._printer.start()

    def signal(self, number: int) -> None:
        """Passes a signal on, if the process is there."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Waits for the end; returns the exit code, that of a signal negative."""
        code = self._process.wait()
        self._printer.join(timeout=5)  # whoever else has the pipe open would keep us
        return code

    def end(self) -> None:
        """Ends a process that nobody waited for."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


@contextlib.contextmanager
def _passed_on(agents: Sequence[_Agent]) -> Iterator[threading.Event]:
    """Passes SIGINT and SIGTERM on to agents; yields what is set by the first one.

    Outside the main thread signals can't be caught: then nothing is changed.
    """
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def pass_on(number: int, frame: object) -> None:
        stopping.set()
        for agent in agents:
            agent.signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _print_lines(prefix: str, lines: IO[str]) -> None:
    """Prints lines after a prefix, whole ones, so that those of several agents don't mix."""
    for line in lines:
        sys.stdout.write(f"{prefix}{line.rstrip()}\n")
        sys.stdout.flush()
