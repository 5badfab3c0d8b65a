"""What a sweep will cost: its most extreme trials are begun, two steps each, and the rest is multiplication."""

import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eva import trial as trials
from eva.config import FIELDS, Layer, RunConfig, UserError, resolve, to_dict
from eva.distributions import HAIR, Distribution
from eva.files import read_json, write_json
from eva.flags import Parser, add_settings, given_settings
from eva.ranking import identity, short
from eva.recipes import configure
from eva.records import read_columns
from eva.run_folder import saved_states
from eva.sweep_file import Parameter, Problem, Sweep, arguments, expand_environment
from eva.text import duration

MOST_CORNERS = 8
# With no more corners than this, both ends of what is a number are tried with each choice.
FEW_CORNERS = 4
STEPS = 2

# Settings whose number decides what a step, an epoch or a trial costs. With larger batches each step costs more.
AMOUNTS = (
    *("batch_size", "train_limit", "epochs", "max_steps", "val_fraction", "ghost_splits", "norm_groups"),
    *("gallery_size", "table_rows", "find_lr_steps", "workers", "policy_options"),
    *("dropout", "l1", "ema_decay", "grad_clip"),  # nothing at all costs least
)
# Settings that decide the cost by what is chosen.
CHOICES = (
    *("recipe", "data", "data_dir", "model", "norm", "stage_strides", "policy", "augmentation", "optimizer"),
    *("device", "precision", "channels_last", "compile", "deterministic"),
    *("evaluate", "split", "tta", "gradcam_layers", "tracking"),
)

# What the ends of a distribution without ends are: one value in a thousand lies beyond each.
RARE = 0.001

# W&B's file and the log of an offline run grow by so much a step, beside history.csv.
TRACKED_BYTES = 700
# Why a trial fails that takes more than there is.
MEMORY = "out of memory"
# As the kernel reckons, this process is the first one that has to go when memory runs out.
FIRST_TO_GO = 1000


@dataclass(frozen=True)
class Measurement:
    """What the beginning of a trial has shown. Seconds are of the wall clock.

    Attributes:
        values: The trial's parameters by name, constants left out.
        steps_per_epoch: Optimizer steps in an epoch.
        max_steps: The trial's; None if only epochs end it.
        range_test_steps: Steps of the range test that comes before its training; 0 if none does.
        step: Seconds of a step that is not the first.
        epoch: Seconds at an epoch's end: validation, and saving weights and state.
        rest: Seconds of all else: loading, the model, tracking, and what comes after the last epoch.
        disk: Bytes of the run folder after `STEPS` steps, with as many whole states as a longer run keeps.
        row: Bytes that it grows by with each further step.
        memory: The largest resident memory of the process, in bytes.
        gpu_memory: The most that was reserved of a GPU's memory, in bytes; 0 without one.
        gpu_total: What one GPU has, in bytes; 0 without one.
        gpus: Number of GPUs.
    """

    values: Mapping[str, Any]
    steps_per_epoch: int
    max_steps: int | None
    range_test_steps: int
    step: float
    epoch: float
    rest: float
    disk: int
    row: float
    memory: int
    gpu_memory: int = 0
    gpu_total: int = 0
    gpus: int = 0

    def steps(self, epochs: int) -> int:
        """Returns the optimizer steps of a trial of so many epochs, which `max_steps` may end before."""
        return int(min(epochs * self.steps_per_epoch, self.max_steps or math.inf))

    def epochs(self, epochs: int) -> int:
        """Returns the epochs that a trial of so many really begins."""
        return math.ceil(self.steps(epochs) / self.steps_per_epoch)

    def seconds(self, epochs: int) -> float:
        """Returns the time of a trial of so many epochs that nothing stops early."""
        steps = self.steps(epochs) + self.range_test_steps
        return steps * self.step + self.epochs(epochs) * self.epoch + self.rest

    def bytes(self, epochs: int) -> float:
        """Returns what such a trial leaves on the disk; one of a single epoch leaves a state less."""
        return self.disk + max(0, self.steps(epochs) - STEPS) * self.row


@dataclass(frozen=True)
class Failure:
    """A corner that could not be begun, and why, in one line."""

    values: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Size:
    """What a whole sweep comes to if no trial is stopped early. Seconds are of the wall clock, with all workers.

    Attributes:
        trials: Their number.
        epochs_least: Epochs of all trials together, if each has the fewest.
        epochs_most: The same, if each has the most.
        seconds_least: If each trial takes as long as the quickest corner, with the fewest epochs.
        seconds_most: If each takes as long as the slowest, with the most.
        seconds_expected: If each takes as long as the corners do on average, halfway between the two.
        disk: Bytes of all run folders, at most.
        disk_free: Bytes that are free where they go.
        workers: Trials that run at a time.
        memory_trial: Bytes of memory that one trial takes, at most.
        memory_all: Bytes that all workers take together.
        memory_machine: Bytes that this machine has.
        gpu_memory: Bytes of a GPU's memory that the trials on it take together; 0 without one.
        gpu_total: Bytes that one has.
    """

    trials: int
    epochs_least: int
    epochs_most: int
    seconds_least: float
    seconds_most: float
    seconds_expected: float
    disk: float
    disk_free: int
    workers: int
    memory_trial: int
    memory_all: int
    memory_machine: int
    gpu_memory: int = 0
    gpu_total: int = 0


# --- what trials are given ---


def setting_of(parameter: Parameter) -> str:
    """Returns the name of the setting that a parameter belongs to: policy_options of policy_options.cutout."""
    return parameter.name.partition(".")[0]


def extremes(distribution: Distribution) -> tuple[Any, ...]:
    """Returns the values between which all others lie: both ends of a range, or every value that may be chosen.

    Of a distribution without ends they are values beyond which one in a thousand lies.
    """
    if distribution.values:
        chances = distribution.probabilities or (1.0,) * len(distribution.values)
        return tuple(value for value, chance in zip(distribution.values, chances, strict=True) if chance > 0)
    if distribution.kind in ("uniform", "log_uniform_values", "inv_log_uniform_values"):
        return distribution.min, distribution.max
    bounded = distribution.min is not None or distribution.kind.endswith("beta")
    return tuple(distribution.value_at(quantile) for quantile in ((0.0, 1 - HAIR) if bounded else (RARE, 1 - RARE)))


def middle(distribution: Distribution) -> Any:
    """Returns the value in the middle: the median of a range, or one of the values that may be chosen."""
    if distribution.values:
        possible = extremes(distribution)
        return possible[len(possible) // 2]
    return distribution.value_at(0.5)


def middles(sweep: Sweep) -> dict[str, Any]:
    """Returns the middle value of every parameter that is searched, by its name."""
    return {parameter.name: middle(parameter.distribution) for parameter in sweep.searched}


@dataclass(frozen=True)
class Fixed:
    """What `command` gives every trial, whatever its parameters.

    Attributes:
        settings: By name, as text, or with types where they came as JSON.
        file: The settings file that it names; None if there is none.
        problems: Words that are wrong, or "" where it is not one alone, each with what is wrong about it. There are no
            settings then.
    """

    settings: Mapping[str, Any]
    file: str | None = None
    problems: tuple[tuple[str, str], ...] = ()


def fixed_words(sweep: Sweep) -> list[str]:
    """Returns the words that every trial's program, or `eva train`, gets after its name, whatever its parameters."""
    words = list(map(expand_environment, sweep.command))
    for number, word in enumerate(words):
        is_eva = number > 0 and Path(words[number - 1]).name == "eva"
        if word == "${program}" or (word and word == sweep.program) or (word == "train" and is_eva):
            return [later for later in words[number + 1 :] if not later.startswith("${")]
    return []


# Flags with which `eva train` does something else than to train by its settings.
_OTHER_DEEDS = ("-h", "--help", "--list", "--show_policy", "--resume")


def _parser() -> Parser:
    """Returns one that takes what `eva train` takes."""
    parser = Parser(prog="eva train", allow_abbrev=False)
    parser.add_argument("--config")
    add_settings(parser, FIELDS, "")
    return parser


@functools.lru_cache(maxsize=8)
def _fixed(words: tuple[str, ...]) -> Fixed:
    if deeds := [word for word in words if word.partition("=")[0] in _OTHER_DEEDS]:
        told = [(word, f"with {word} in command no trial trains by its parameters") for word in deeds]
        return Fixed({}, problems=tuple(told))
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            parsed, unknown = _parser().parse_known_args(words)
        wrong: list[str] = []
        settings = given_settings(parsed, unknown, wrong)
        return Fixed({}, problems=_told(wrong)) if wrong else Fixed(settings, parsed.config)
    except SystemExit:
        return Fixed({}, problems=_told(output.getvalue().splitlines()))


def _told(lines: Sequence[str]) -> tuple[tuple[str, str], ...]:
    starts = ("command line: ", "eva train: error: ")
    return tuple(("", f"command: {functools.reduce(str.removeprefix, starts, line)}") for line in lines)


def fixed_settings(sweep: Sweep) -> Fixed:
    """Returns what `command` gives every trial."""
    return _fixed(tuple(fixed_words(sweep)))


def trial_config(
    sweep: Sweep, values: Mapping[str, Any], without: frozenset[str] = frozenset(), fixed: Fixed | None = None
) -> RunConfig:
    """Returns the configuration of a trial, as its command line makes it.

    Args:
        sweep: Whose trial it is.
        values: The value of every parameter that is searched, by its name.
        without: Settings that are left at their defaults, whatever the sweep says.
        fixed: What takes the place of what `command` gives every trial.

    Raises:
        UserError: It is impossible; all problems at once, a line each.
    """
    fixed = fixed_settings(sweep) if fixed is None else fixed
    given = {**fixed.settings, **arguments(sweep, values)}
    left = {name: value for name, value in given.items() if name.partition(".")[0] not in without}
    return configure(Layer("trial", left), fixed.file)[0]


# --- the corners ---


def corners(sweep: Sweep) -> list[dict[str, Any]]:
    """Returns the extreme trials that decide how long the sweep takes and how much memory, at most `MOST_CORNERS`.

    Each choice that changes the cost is there with the largest batch, the most images, and so on; one trial, or each
    choice if they are few, has the smallest. What cannot change the cost has its middle value. The largest come last.

    Returns:
        The value of every parameter that is searched, by its name, none twice.
    """
    amounts = [parameter for parameter in sweep.searched if setting_of(parameter) in AMOUNTS]
    base = middles(sweep)
    most = {parameter.name: _end(parameter, largest=True) for parameter in amounts}
    # How many epochs there are changes nothing about one of them.
    least = {**most, **{p.name: _end(p, largest=False) for p in amounts if p.name != "epochs"}}
    differ = identity(most) != identity(least)
    choices = _choices(sweep, base, MOST_CORNERS - differ)
    small = choices if 2 * len(choices) <= FEW_CORNERS else [{}]
    made = [{**base, **choice, **least} for choice in small if differ]
    made += [{**base, **choice, **most} for choice in choices]
    return list({identity(values): values for values in made}.values())


def _end(parameter: Parameter, largest: bool) -> Any:
    """Returns the value of an amount that costs most or least; none means without a limit, or the default."""
    values = sorted(extremes(parameter.distribution), key=lambda value: _amount(parameter, value))
    return values[-1] if largest else values[0]


def _amount(parameter: Parameter, value: Any) -> float:
    if isinstance(value, (int, float)):
        # The more is held out, the less is trained on.
        return float(-value) if setting_of(parameter) == "val_fraction" else float(value)
    return math.inf if setting_of(parameter) in ("train_limit", "max_steps") else -math.inf


def _choices(sweep: Sweep, base: Mapping[str, Any], room: int) -> list[dict[str, Any]]:
    """Returns what differs from the middle: all combinations of choices if there is room, else one after the other."""
    searched = [parameter for parameter in sweep.searched if setting_of(parameter) in CHOICES]
    possible = {parameter.name: extremes(parameter.distribution) for parameter in searched}
    if math.prod(map(len, possible.values())) <= room:
        return [dict(zip(possible, values, strict=True)) for values in itertools.product(*possible.values())]
    others = (
        {name: value}
        for name, values in possible.items()
        for value in values
        if identity(value) != identity(base[name])
    )
    return [{}, *itertools.islice(others, room - 1)]


# --- measured in a process of its own ---


def measure(sweep: Sweep, tried: Sequence[Mapping[str, Any]], workers: int) -> list[Measurement | Failure]:
    """Begins trials, one after the other in one process, and returns what each has shown.

    Nothing of them is left on the disk. A trial that crashes costs the process, and the next one gets another.

    Args:
        sweep: Whose trials they are.
        tried: The values of their parameters, as `corners` returns them.
        workers: Trials that will run at a time: they share the processors.
    """
    results: list[Measurement | Failure] = []
    with tempfile.TemporaryDirectory(prefix="eva-check-") as folder:
        jobs = [
            {"config": to_dict(trial_config(sweep, values)), "arguments": arguments(sweep, values)} for values in tried
        ]
        while len(results) < len(jobs):
            begun = len(results)
            write_json(Path(folder) / "jobs.json", {"jobs": jobs, "begin": begun})
            (Path(folder) / "results").unlink(missing_ok=True)
            reason = _run_child(Path(folder), workers)
            for told in _results(Path(folder)):
                values = tried[len(results)]
                failed = told.get("failure")
                results.append(Failure(values, failed) if failed else Measurement(values, **told["measured"]))
            if len(results) == len(jobs):
                break
            if len(results) == begun or not isinstance(results[-1], Failure):
                results.append(Failure(tried[len(results)], reason))
    return results


def _run_child(folder: Path, workers: int) -> str:
    """Runs `main` in a process; returns what to say of a trial that ended with it without a word."""
    environment = {name: value for name, value in os.environ.items() if name != trials.VARIABLE}
    environment["TMPDIR"] = str(folder)  # what it leaves there when it is killed goes with the folder
    if workers > 1:  # as the sweep's workers will have it
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    log = folder / "log"
    with open(log, "wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "eva.sweep_probe", str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if code == -signal.SIGKILL:
        return "its process was killed, as the system does when memory runs out"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"its process ended {how}" + (f": {lines[-1]:.200}" if lines else "")


def _results(folder: Path) -> list[dict[str, Any]]:
    """Returns what the process told before it ended; a line that its end cut short is none."""
    path = folder / "results"
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


def main(path: str) -> int:
    """Measures the trials that `measure` wrote to a folder, and writes what they have shown, a line each.

    Returns:
        0, or 3 after a trial that crashed: who knows in which state the process is.
    """
    trials.follow_parent()
    _offer_to_go_first()
    folder = Path(path)
    told = read_json(folder / "jobs.json")
    for number, job in list(enumerate(told["jobs"]))[told["begin"] :]:
        answer, crashed = _answer(job, folder / f"trial-{number}", first=number == told["begin"])
        with open(folder / "results", "a", encoding="utf-8") as file:
            file.write(json.dumps(answer) + "\n")
        shutil.rmtree(folder / f"trial-{number}", ignore_errors=True)
        if crashed:
            return 3
    return 0


def _answer(job: Mapping[str, Any], folder: Path, first: bool) -> tuple[dict[str, Any], bool]:
    """Returns what is told of a trial, and whether it crashed."""
    try:
        return {"measured": _begin(job, folder, first)}, False
    except UserError as error:
        return {"failure": "; ".join(str(error).splitlines())}, False
    except BaseException as error:
        text = " ".join(str(error).split())
        memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
        if memory or "can't allocate memory" in text or "out of memory" in text:
            return {"failure": MEMORY}, True
        return {"failure": f"crashed: {type(error).__name__}: {text}"[:300]}, True


def _begin(job: Mapping[str, Any], folder: Path, first: bool) -> dict[str, Any]:
    """Trains two steps of a trial, and all that comes after them; returns the fields of a `Measurement`."""
    import torch

    from eva import experiment
    from eva.tracker import WandbTracker

    asked, _ = resolve([Layer("trial", job["config"])])
    config = _probe(asked)
    # A worker loads its data once, and begins its first W&B run slowly.
    experiment.split_once(config.data, Path(config.data_dir), config.val_fraction)
    if first and config.tracking == "offline":
        with WandbTracker(config, {}, "train", folder.with_suffix(".wandb"), "warmup00", "offline"):
            pass
        shutil.rmtree(folder.with_suffix(".wandb"), ignore_errors=True)
    ended: list[float] = []

    def report(row: Mapping[str, Any]) -> bool:
        ended.append(time.time())
        return False

    trial = trials.Trial(folder, "probe000", "probe", job["arguments"], report)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    _forget_peak()
    began = time.perf_counter()
    with trials.running(trial):
        result = experiment.train(config)
    total = time.perf_counter() - began
    if result.status == "oom":
        raise MemoryError
    if result.status != "finished":
        raise UserError(f"its first {STEPS} steps ended as {result.status}: the loss is not finite")
    history = folder / "history.csv"
    seconds = read_columns(history, [])["seconds"]
    step = seconds[-1] - (seconds[-2] if len(seconds) > 1 else 0.0)
    # The last row was written when the last step was through, and then the epoch's end began.
    epoch = max(0.0, ended[-1] - history.stat().st_mtime)
    steps_per_epoch = math.ceil(result.summary["train_images"] / config.batch_size)
    return {
        "steps_per_epoch": steps_per_epoch,
        "max_steps": asked.max_steps,
        "range_test_steps": asked.find_lr_steps if "find" in (asked.lr_min, asked.lr_max) else 0,
        "step": step,
        "epoch": epoch,
        "rest": max(0.0, total - seconds[-1] - len(ended) * epoch),
        "disk": _disk(folder),
        "row": history.stat().st_size / (1 + len(seconds)) + (TRACKED_BYTES if config.tracking == "offline" else 0),
        "memory": _peak(),
        "gpu_memory": torch.cuda.max_memory_reserved() if cuda else 0,
        "gpu_total": torch.cuda.mem_get_info()[1] if cuda else 0,
        "gpus": torch.cuda.device_count() if cuda else 0,
    }


def _disk(folder: Path) -> int:
    """Returns the bytes of a run folder, all its states as large as the last one: those before it lack best weights."""
    from eva.checkpoints import STATES_KEPT

    states = [path.stat().st_size for path in saved_states(folder)]
    everything = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return everything - sum(states) + STATES_KEPT * max(states)


def _probe(config: RunConfig) -> RunConfig:
    """Returns the configuration of a trial's beginning: rates too low to diverge with, and nothing sent anywhere."""
    tracking = config.tracking if config.tracking == "disabled" else "offline"
    return replace(config, lr_min=1e-7, lr_max=1e-6, max_steps=STEPS, save_steps=1, tracking=tracking)


def _offer_to_go_first() -> None:
    """Lets the kernel end this process before any other when memory runs out, where there is such a choice."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(FIRST_TO_GO), encoding="ascii")
    except OSError:
        return


def _forget_peak() -> None:
    """Makes `_peak` count from now on, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak() -> int:
    """Returns the largest resident memory of this process, in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


# --- multiplied ---


def estimate(
    measured: Sequence[Measurement],
    num_trials: int,
    epochs: tuple[int, int],
    workers: int,
    disk_free: int,
    memory_machine: int | None = None,
) -> Size:
    """Returns what a sweep comes to.

    Args:
        measured: Of its corners, at least one.
        num_trials: Trials of the sweep.
        epochs: The fewest and the most that a trial may have.
        workers: Trials that run at a time.
        disk_free: Bytes.
        memory_machine: Bytes; None for what this machine has.
    """
    fewest, most = epochs
    at_once = max(1, min(workers, num_trials))
    rounds = num_trials / at_once
    between = [(one.seconds(fewest) + one.seconds(most)) / 2 for one in measured]
    memory = max(one.memory for one in measured)
    gpus = max(1, *(one.gpus for one in measured)) if len(measured) > 1 else max(1, measured[0].gpus)
    return Size(
        trials=num_trials,
        epochs_least=num_trials * min(one.epochs(fewest) for one in measured),
        epochs_most=num_trials * max(one.epochs(most) for one in measured),
        seconds_least=rounds * min(one.seconds(fewest) for one in measured),
        seconds_most=math.ceil(rounds) * max(one.seconds(most) for one in measured),
        seconds_expected=rounds * sum(between) / len(between),
        disk=num_trials * max(one.bytes(most) for one in measured),
        disk_free=disk_free,
        workers=at_once,
        memory_trial=memory,
        memory_all=at_once * memory,
        memory_machine=machine_memory() if memory_machine is None else memory_machine,
        gpu_memory=math.ceil(at_once / gpus) * max(one.gpu_memory for one in measured),
        gpu_total=max(one.gpu_total for one in measured),
    )


def machine_memory() -> int:
    """Returns the memory that this machine, or the container that this process is in, has in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return total


def free_disk(path: Path) -> int:
    """Returns how many bytes are free where a folder is or will be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def assignments(values: Mapping[str, Any]) -> str:
    """Returns parameters for a reader: "batch_size=512, norm=ghost"."""
    return ", ".join(f"{name}={short(value)}" for name, value in values.items())


def costly(sweep: Sweep, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a trial's parameters that change what it costs."""
    deciding = {p.name for p in sweep.searched if setting_of(p) in (*AMOUNTS, *CHOICES)}
    return {name: value for name, value in values.items() if name in deciding}


def price_problems(sweep: Sweep, results: Sequence[Measurement | Failure], size: Size | None) -> list[Problem]:
    """Returns what is wrong with the price: corners that cannot be begun, more memory or disk than there is."""
    problems = _failures(sweep, results)
    if size is None:
        return problems
    line = sweep.line_of("parameters", "batch_size")
    for kind, needed, there in (
        ("memory", size.memory_all, size.memory_machine),
        ("a GPU's memory", size.gpu_memory, size.gpu_total),
    ):
        if needed > there > 0:
            of = "the trial takes" if size.workers == 1 else f"{size.workers} workers together take"
            text = f"{of} {_gib(needed)} of {kind}, but there is {_gib(there)}: fewer workers, or smaller batches"
            problems.append(Problem(line, text))
    if size.disk > size.disk_free:
        text = f"the trials leave {_gib(size.disk)} on the disk, but {_gib(size.disk_free)} are free: another --out"
        problems.append(Problem(sweep.line_of("parameters"), text))
    return problems


def _failures(sweep: Sweep, results: Sequence[Measurement | Failure]) -> list[Problem]:
    """Returns why corners cannot be begun, each reason once, with the parameters that all of its corners share."""
    alike: dict[str, list[Failure]] = {}
    for result in results:
        if isinstance(result, Failure):
            alike.setdefault(result.reason, []).append(result)
    problems = []
    for reason, failures in alike.items():
        # Where it is all corners, it is nothing by which they differ.
        everywhere = len(failures) == len(results) > 1
        named = {} if everywhere else costly(sweep, _shared([failure.values for failure in failures]))
        what = "every trial" if everywhere else assignments(named) or "a trial"
        problems.append(Problem(_line(sweep, named, reason), f"{what}: {reason}"))
    return problems


def _shared(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = values[0]
    return {name: first[name] for name in first if len({identity(each[name]) for each in values}) == 1}


def _line(sweep: Sweep, named: Mapping[str, Any], reason: str) -> int:
    lines = {parameter.name: parameter.line for parameter in sweep.parameters}
    # "SETTING must be ...", "... but got SETTING=": by now all is sound that can be told without the data.
    told = [name for name in [*reason.split()[:1], *re.findall(r"(\w+)=", reason)] if name in lines]
    blamed = [name for name in (*told, "batch_size", *named) if name in named] if named else told
    if not named and not reason.startswith(("crashed", "its ")):
        blamed.append("batch_size" if reason == MEMORY else "data")
    return next((lines[name] for name in blamed if name in lines), sweep.line_of("parameters"))


def describe(sweep: Sweep, size: Size, measured: Sequence[Measurement]) -> list[str]:
    """Returns what a sweep comes to, as lines for a reader."""
    epochs = _range(size.epochs_least, size.epochs_most, str)
    seconds = _range(size.seconds_least, size.seconds_most, duration)
    workers = "1 worker" if size.workers == 1 else f"{size.workers} workers"
    stopping = "; early stopping lowers both" if sweep.hyperband else ""
    memory = f"memory: {_gib(size.memory_trial)} a trial"
    if size.workers > 1:
        memory += f", {_gib(size.memory_all)} for {workers}"
    memory += f", of {_gib(size.memory_machine)}"
    if size.gpu_total:
        memory += f"; on a GPU {_gib(size.gpu_memory)} of {_gib(size.gpu_total)}"
    return [
        f"size: {size.trials:,} trials, {epochs} epochs in all{' at most' if sweep.hyperband else ''}",
        f"time: about {duration(size.seconds_expected)} with {workers} ({seconds}){stopping}",
        f"disk: {_gib(size.disk)} at most, of {_gib(size.disk_free)} that are free",
        memory,
        *(f"measured: {line}" for line in map(functools.partial(_measured_line, sweep), measured)),
    ]


def _measured_line(sweep: Sweep, one: Measurement) -> str:
    named = costly(sweep, one.values)
    return (
        f"{assignments(named) if named else 'a trial'}: {1000 * one.step:.0f} ms a step, {one.steps_per_epoch:,} steps "
        f"an epoch, {duration(one.epoch)} at its end, {duration(one.rest)} beside; {_gib(one.memory)} of memory"
    )


def _range(low: Any, high: Any, told: Callable[[Any], str]) -> str:
    return told(low) if told(low) == told(high) else f"{told(low)} to {told(high)}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Price:
    """What was measured of a sweep, and what it comes to; None if no corner could be begun."""

    results: tuple[Measurement | Failure, ...]
    size: Size | None

    @property
    def measured(self) -> list[Measurement]:
        """The corners that could be begun."""
        return [result for result in self.results if isinstance(result, Measurement)]


def price(sweep: Sweep, num_trials: int, epochs: tuple[int, int], workers: int, out: Path) -> Price:
    """Measures the corners of a sound sweep; takes as long as their beginnings and evaluations do.

    Args:
        sweep: Without problems.
        num_trials: Its trials.
        epochs: The fewest and the most that a trial may have.
        workers: Trials that will run at a time.
        out: Where the trials' runs will go, or a folder above.
    """
    tried = corners(sweep)
    print(f"trying the first {STEPS} steps of {'a trial' if len(tried) == 1 else f'{len(tried)} trials'}", flush=True)
    processors, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > processors:
        print(f"this machine is busy (load {load:.1f} on {processors} processors): times are too long", flush=True)
    results = measure(sweep, tried, workers)
    found = [result for result in results if isinstance(result, Measurement)]
    return Price(tuple(results), estimate(found, num_trials, epochs, workers, free_disk(out)) if found else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
