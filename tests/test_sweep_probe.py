"""What a sweep costs: which trials are begun, what they show, and what that comes to."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL_RUN
from hypothesis import given, settings
from hypothesis import strategies as st

from eva import experiment
from eva import trial as trials
from eva.config import UserError
from eva.distributions import Distribution
from eva.sweep_check import check
from eva.sweep_file import Sweep, read_sweep
from eva.sweep_probe import (
    MOST_CORNERS,
    Failure,
    Measurement,
    corners,
    describe,
    estimate,
    extremes,
    free_disk,
    machine_memory,
    measure,
    middle,
    price_problems,
    trial_config,
)

ROOT = Path(__file__).parent.parent
GIB = 2**30


def made(folder: Path, parameters: dict[str, Any], **sections: Any) -> Sweep:
    """Returns a sweep over the smallest network, with some of its settings searched."""
    constants = {name: {"value": value} for name, value in SMALL_RUN.items()}
    sweep = {
        **{"program": "train.py", "method": "grid", "metric": {"name": "val/accuracy_best", "goal": "maximize"}},
        **{"parameters": {**constants, **parameters}, **sections},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    (folder / "train.py").write_text("")
    return read_sweep(path)


# --- which trials ---


def test_corners_have_each_choice_with_the_largest_batch(tmp_path: Path) -> None:
    """And one trial the smallest; what costs nothing is in its middle."""
    parameters = {
        "batch_size": {"min": 8, "max": 64},
        "norm": {"values": ["batch", "layer", "ghost"]},
        "lr_max": {"distribution": "log_uniform_values", "min": 0.01, "max": 1.0},
        "seed": {"values": [3, 4, 5]},
    }
    sweep = made(tmp_path, parameters, method="random", run_cap=4)
    found = corners(sweep)
    assert [(each["batch_size"], each["norm"]) for each in found] == [
        *[(8, "layer")],
        *[(64, "batch"), (64, "layer"), (64, "ghost")],
    ]
    assert {(round(each["lr_max"], 9), each["seed"]) for each in found} == {(0.1, 4)}


def test_few_choices_are_tried_at_both_ends(tmp_path: Path) -> None:
    """So that their mean is that of all trials."""
    parameters = {"batch_size": {"values": [20, 10, 40]}, "norm": {"values": ["batch", "layer"]}}
    found = corners(made(tmp_path, parameters))
    assert sorted((each["batch_size"], each["norm"]) for each in found) == [
        *[(10, "batch"), (10, "layer"), (40, "batch"), (40, "layer")]
    ]


def test_the_number_of_epochs_needs_no_corner_of_its_own(tmp_path: Path) -> None:
    """No epoch is run to its end: what they come to is multiplied. The one corner has the most."""
    assert corners(made(tmp_path, {"epochs": {"values": [4, 2, 9]}})) == [{"epochs": 9}]


def test_a_limit_that_is_none_is_the_largest(tmp_path: Path) -> None:
    """Of images and steps; and the more is held out, the less is trained on."""
    parameters = {"train_limit": {"values": [20, None, 60]}, "val_fraction": {"values": [0.5, 0.1, 0.3]}}
    least, most = corners(made(tmp_path, parameters))
    assert least == {"train_limit": 20, "val_fraction": 0.5}
    assert most == {"train_limit": None, "val_fraction": 0.1}


def test_what_is_not_searched_is_one_corner(tmp_path: Path) -> None:
    """The trial itself."""
    assert corners(made(tmp_path, {})) == [{}]


@st.composite
def searched(draw: st.DrawFn) -> dict[str, Any]:
    """Parameters of a sweep: some amounts, some choices, some that cost nothing."""
    choices = st.lists(st.sampled_from(["batch", "layer", "group", "none", "ghost"]), min_size=1, unique=True)
    policies = ["test", "flip", "color", "crop_flip", "digits", "flip_cutout"]
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "batch_size": st.fixed_dictionaries({"min": st.integers(2, 9), "max": st.integers(10, 90)}),
        "train_limit": st.fixed_dictionaries({"values": st.lists(st.integers(1, 99), min_size=1, unique=True)}),
        "norm": st.fixed_dictionaries({"values": choices}),
        "policy": st.fixed_dictionaries({"values": st.lists(st.sampled_from(policies), min_size=1, unique=True)}),
        "nesterov": st.just({"values": [True, False]}),
        "l1": st.just({"distribution": "log_uniform_values", "min": 1e-6, "max": 1e-2}),
        "weight_decay": st.just({"distribution": "normal", "mu": 1.0, "sigma": 0.1}),
    }
    names = draw(st.sets(st.sampled_from(sorted(drawn)), min_size=1))
    return {name: draw(drawn[name]) for name in sorted(names)}


@given(searched())
@settings(max_examples=60, deadline=None)
def test_corners_are_trials_that_the_sweep_can_draw(parameters: dict[str, Any]) -> None:
    """At most eight, none twice, with the largest batch among them and each value a possible one."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = made(Path(folder), parameters, method="random", run_cap=4)
    found = corners(sweep)
    assert 1 <= len(found) <= MOST_CORNERS
    assert len({repr(each) for each in found}) == len(found)
    for each in found:
        assert each.keys() == parameters.keys()
        for name, value in each.items():
            config = parameters[name]
            if "values" in config:
                assert value in config["values"]
            elif "min" in config:
                assert config["min"] <= value <= config["max"]
    if "batch_size" in parameters:
        assert {each["batch_size"] for each in found} == {parameters["batch_size"][end] for end in ("min", "max")}
    if "norm" in parameters and len(parameters) == 1:
        assert [each["norm"] for each in found] == parameters["norm"]["values"]


KINDS: list[tuple[dict[str, Any], float, float]] = [
    ({"min": 0.1, "max": 0.7}, 0.1, 0.7),
    ({"min": 2, "max": 7}, 2, 7),
    ({"distribution": "log_uniform_values", "min": 1e-5, "max": 0.3}, 1e-5, 0.3),
    ({"distribution": "inv_log_uniform_values", "min": 1e-5, "max": 0.3}, 1e-5, 0.3),
    ({"distribution": "q_uniform", "min": 10, "max": 50, "q": 10}, 10, 50),
    ({"distribution": "log_uniform", "min": 0, "max": 1}, 1.0, 2.718281828459045),
    ({"distribution": "beta", "a": 1, "b": 1}, 0.0, 1.0),
    ({"distribution": "normal", "mu": 5, "sigma": 2}, 5 - 2 * 3.090232306, 5 + 2 * 3.090232306),
]


@pytest.mark.parametrize("config, low, high", KINDS)
def test_extremes_are_the_ends_of_a_distribution(config: dict[str, Any], low: float, high: float) -> None:
    """Of one without ends those of all but two in a thousand values."""
    distribution = Distribution.from_config(config)
    assert extremes(distribution) == pytest.approx((low, high), rel=1e-9)
    assert low <= middle(distribution) <= high


def test_values_without_a_chance_are_no_extremes() -> None:
    """They are never drawn."""
    config = {"values": [1, 2, 3], "probabilities": [0.5, 0.0, 0.5]}
    assert extremes(Distribution.from_config(config)) == (1, 3)


def test_a_trial_is_configured_as_its_command_line_says(tmp_path: Path) -> None:
    """Parameters, and the words of `command` beside them."""
    command = ["${interpreter}", "${program}", "--epochs=7", "--nesterov=false", "${args}"]
    sweep = made(tmp_path, {"seed": {"values": [1, 2]}, "epochs": {"value": 7}}, command=command)
    config = trial_config(sweep, {"seed": 2})
    assert (config.seed, config.epochs, config.nesterov, config.model) == (2, 7, False, SMALL_RUN["model"])


# --- what it comes to ---

MEASURED = Measurement(
    values={"batch_size": 64},
    steps_per_epoch=100,
    max_steps=None,
    range_test_steps=50,
    step=0.1,
    epoch=3.0,
    rest=7.0,
    disk=1000,
    row=10.0,
    memory=2 * GIB,
)


def test_a_trial_costs_its_steps_its_epochs_and_the_rest() -> None:
    """By hand: 4 epochs of 100 steps and 50 of the range test at 0.1 s, 4 ends of 3 s, and 7 s."""
    assert MEASURED.seconds(4) == pytest.approx(45 + 12 + 7)
    assert MEASURED.bytes(4) == 1000 + 398 * 10
    ended = replace(MEASURED, max_steps=150, range_test_steps=0)
    assert (ended.steps(4), ended.epochs(4)) == (150, 2)
    assert ended.seconds(4) == pytest.approx(15 + 6 + 7)
    assert ended.epochs(1) == 1


def test_a_sweep_costs_its_trials_shared_by_its_workers() -> None:
    """By hand: of 10 trials with 2 to 4 epochs each of 3 workers has 3 and a third, the slowest one 4."""
    slow = replace(MEASURED, step=0.2, memory=3 * GIB, disk=9000)
    size = estimate([MEASURED, slow], 10, (2, 4), 3, 2 * GIB, memory_machine=8 * GIB)
    quick_seconds, slow_seconds = (25 + 6 + 7, 45 + 12 + 7), (50 + 6 + 7, 90 + 12 + 7)
    assert (size.epochs_least, size.epochs_most) == (20, 40)
    assert size.seconds_least == pytest.approx(10 / 3 * quick_seconds[0])
    assert size.seconds_most == pytest.approx(4 * slow_seconds[1])
    assert size.seconds_expected == pytest.approx(10 / 3 * (sum(quick_seconds) + sum(slow_seconds)) / 4)
    assert size.disk == 10 * (9000 + 398 * 10)
    assert (size.memory_trial, size.memory_all, size.memory_machine) == (3 * GIB, 9 * GIB, 8 * GIB)


def test_more_workers_than_trials_cost_no_memory() -> None:
    """There are never more at work than trials."""
    size = estimate([MEASURED], 2, (4, 4), 16, 2 * GIB, memory_machine=8 * GIB)
    assert (size.workers, size.memory_all) == (2, 4 * GIB)
    assert size.seconds_least == size.seconds_most == size.seconds_expected == pytest.approx(64)


def test_workers_share_the_gpus() -> None:
    """Of three workers on two GPUs two are on one."""
    on_gpu = replace(MEASURED, gpu_memory=10 * GIB, gpu_total=16 * GIB, gpus=2)
    size = estimate([on_gpu], 10, (4, 4), 3, 2 * GIB, memory_machine=64 * GIB)
    assert (size.gpu_memory, size.gpu_total) == (20 * GIB, 16 * GIB)


def test_more_memory_than_there_is_is_a_problem(tmp_path: Path) -> None:
    """At the batch size's line, on the machine and on a GPU; what fits is none."""
    sweep = made(tmp_path, {"batch_size": {"values": [10, 20]}})
    line = sweep.text.splitlines().index("  batch_size:") + 1
    on_gpu = replace(MEASURED, gpu_memory=10 * GIB, gpu_total=16 * GIB, gpus=1)
    size = estimate([on_gpu], 10, (4, 4), 2, 2 * GIB, memory_machine=3 * GIB)
    found = price_problems(sweep, [on_gpu], size)
    assert [problem.line for problem in found] == [line, line]
    assert "2 workers together take 4.0 GiB of memory, but there is 3.0 GiB" in found[0].text
    assert "20.0 GiB of a GPU's memory, but there is 16.0 GiB" in found[1].text
    assert price_problems(sweep, [on_gpu], estimate([on_gpu], 10, (4, 4), 1, 2 * GIB, memory_machine=3 * GIB)) == []


def test_more_on_the_disk_than_is_free_is_a_problem(tmp_path: Path) -> None:
    """Ten runs of 1 GiB where 9 are free; what fits is none."""
    sweep = made(tmp_path, {})
    large = replace(MEASURED, disk=GIB)
    found = price_problems(sweep, [large], estimate([large], 10, (4, 4), 1, 9 * GIB, memory_machine=8 * GIB))
    assert [problem.line for problem in found] == [sweep.line_of("parameters")]
    assert "the trials leave 10.0 GiB on the disk, but 9.0 GiB are free" in found[0].text
    assert price_problems(sweep, [large], estimate([large], 10, (4, 4), 1, 11 * GIB, memory_machine=8 * GIB)) == []


def test_what_is_free_is_that_of_the_disk_of_a_folder_to_be(tmp_path: Path) -> None:
    """As the system tells it of the folder above."""
    system = os.statvfs(tmp_path)
    told = free_disk(tmp_path / "not" / "there" / "yet")
    assert told == pytest.approx(system.f_bavail * system.f_frsize, rel=0.05)


def test_a_corner_that_fails_is_told_in_the_terms_of_the_file(tmp_path: Path) -> None:
    """Its parameters that cost something, at the line of the batch size."""
    sweep = made(tmp_path, {"batch_size": {"values": [10, 20]}, "seed": {"values": [1, 2]}})
    line = sweep.text.splitlines().index("  batch_size:") + 1
    found = price_problems(sweep, [Failure({"batch_size": 20, "seed": 1}, "out of memory")], None)
    assert [(problem.line, problem.text) for problem in found] == [(line, "batch_size=20: out of memory")]


def test_equal_failures_are_told_once(tmp_path: Path) -> None:
    """At the line of what they are about, with the parameters that all of them share, if others could be begun."""
    parameters = {"norm": {"values": ["batch", "layer"]}, "data": {"values": ["digits", "cifar10"]}}
    sweep = made(tmp_path, {**parameters, "batch_size": {"values": [10, 64]}})
    lines = sweep.text.splitlines()
    data, norm, batch_size = (lines.index(f"  {name}:") + 1 for name in ("data", "norm", "batch_size"))
    fetch, least = "could not fetch X; without a network use --data=digits", "batch_size must be at most 5"

    def told(*failing: tuple[str, str, int, str], others: int) -> list[tuple[int, str]]:
        failed = [Failure({"norm": n, "data": d, "batch_size": b}, reason) for n, d, b, reason in failing]
        return [(one.line, one.text) for one in price_problems(sweep, [*failed, *[MEASURED] * others], None)]

    both = (("batch", "cifar10", 64, fetch), ("layer", "cifar10", 64, fetch))
    assert told(*both, others=0) == [(data, f"every trial: {fetch}")]
    assert told(*both, others=1) == [(data, f"data=cifar10, batch_size=64: {fetch}")]
    assert told(*both, ("batch", "digits", 10, least), others=0) == [
        (data, f"data=cifar10, batch_size=64: {fetch}"),
        (batch_size, f"norm=batch, data=digits, batch_size=10: {least}"),
    ]
    crash = "crashed: RuntimeError: no"
    assert told(("layer", "digits", 10, crash), ("layer", "cifar10", 64, crash), others=2) == [
        (norm, f"norm=layer: {crash}")
    ]
    assert told(*((*one[:3], crash) for one in both), others=0) == [
        (sweep.line_of("parameters"), f"every trial: {crash}")
    ]


def test_the_size_is_told_in_lines(tmp_path: Path) -> None:
    """Trials, epochs, time with its ends, disk, memory, and what was measured."""
    sweep = made(tmp_path, {"batch_size": {"values": [10, 64]}})
    measured = [MEASURED, replace(MEASURED, values={"batch_size": 10}, step=0.2)]
    size = estimate(measured, 10, (4, 4), 2, 2 * GIB, memory_machine=8 * GIB)
    assert describe(sweep, size, measured) == [
        "size: 10 trials, 40 epochs in all",
        "time: about 7 min 12 s with 2 workers (5 min 20 s to 9 min 05 s)",
        "disk: 0.0 MiB at most, of 2.0 GiB that are free",
        "memory: 2.0 GiB a trial, 4.0 GiB for 2 workers, of 8.0 GiB",
        "measured: batch_size=64: 100 ms a step, 100 steps an epoch, 3.0 s at its end, 7.0 s beside; 2.0 GiB of memory",
        "measured: batch_size=10: 200 ms a step, 100 steps an epoch, 3.0 s at its end, 7.0 s beside; 2.0 GiB of memory",
    ]
    stopping = {"type": "hyperband", "min_iter": 2, "strict": True}
    lines = describe(made(tmp_path, {}, early_terminate=stopping), size, measured)
    assert lines[0].endswith("40 epochs in all at most")
    assert lines[1].endswith("early stopping lowers both")


def test_the_memory_of_this_machine_is_at_most_what_the_system_says() -> None:
    """A container may have less."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < machine_memory() <= int(line.split()[1]) * 1024


# --- measured ---


def child_of(parent: int) -> int | None:
    """Returns a process of the probe that another one started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (folder / "cmdline").read_bytes(), (folder / "status").read_text()
        except OSError:
            continue
        if b"eva.sweep_probe" in command and f"PPid:\t{parent}\n" in status:
            return int(folder.name)
    return None


def kill_a_child() -> None:
    """Kills the first process of the probe, as the system does when memory runs out."""
    end = time.monotonic() + 60
    while (child := child_of(os.getpid())) is None and time.monotonic() < end:
        time.sleep(0.02)
    assert child is not None
    os.kill(child, signal.SIGKILL)


@dataclass(frozen=True)
class Probed:
    """Four trials begun for real: one killed, one on data that don't exist, and two batch sizes."""

    sweep: Sweep
    results: list[Measurement | Failure]
    left: list[str]  # what was left in the folder of temporary files


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    """What was measured of a small sweep."""
    scratch = tmp_path_factory.mktemp("scratch")
    parameters = {"batch_size": {"values": [10, 20]}, "data": {"values": ["digits", "folder:nowhere"]}}
    sweep = made(tmp_path_factory.mktemp("probed"), parameters)
    places = ["digits", "folder:nowhere", "digits", "digits"]
    tried = [{"batch_size": size, "data": data} for size, data in zip([10, 10, 10, 20], places, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        patch.setenv("TMPDIR", str(scratch))
        patch.setenv("OMP_NUM_THREADS", "1")
        killer = threading.Thread(target=kill_a_child)
        killer.start()
        results = measure(sweep, tried, 1)
        killer.join()
    return Probed(sweep, results, [path.name for path in scratch.iterdir()])


def test_a_trial_that_is_killed_is_a_failure_and_the_rest_goes_on(probed: Probed) -> None:
    """Another process measures the others."""
    killed, *others = probed.results
    assert isinstance(killed, Failure)
    assert "killed" in killed.reason and "memory" in killed.reason
    assert [type(other) for other in others] == [Failure, Measurement, Measurement]


def test_a_trial_that_cannot_begin_does_not_keep_others_from_it(probed: Probed) -> None:
    """Its mistake is told in the words that the trial would have told it in."""
    missing = probed.results[1]
    assert isinstance(missing, Failure)
    assert "existing folder" in missing.reason and "'nowhere'" in missing.reason


def test_what_was_measured_is_what_a_trial_does(probed: Probed, tmp_path: Path) -> None:
    """60 images in batches of 10 and of 20; the time and the disk of a real trial, run to its end."""
    small, large = probed.results[2:]
    assert isinstance(small, Measurement) and isinstance(large, Measurement)
    assert (small.steps_per_epoch, large.steps_per_epoch) == (6, 3)
    assert 2**27 < small.memory < machine_memory()
    assert min(large.step, large.epoch, large.rest) > 0
    seconds = []
    for number in range(2):  # the first one warms up
        folder = tmp_path / f"real-{number}"
        trial = trials.Trial(folder, f"real{number}", "real", {}, lambda row: False)
        began = time.perf_counter()
        with trials.running(trial):
            experiment.train(replace(trial_config(probed.sweep, large.values), tracking="offline"))
        seconds.append(time.perf_counter() - began)
    # A machine that does other work may be several times slower in one of the two.
    assert seconds[1] / 8 < large.seconds(2) < seconds[1] * 8
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert large.bytes(2) == pytest.approx(size, rel=0.05)


def test_nothing_is_left_of_what_was_measured(probed: Probed) -> None:
    """No run folder, no log, no temporary files, also of a process that was killed."""
    assert probed.left == []
    assert {path.name for path in probed.sweep.source.parent.iterdir()} == {"sweep.yaml", "train.py"}


def test_a_check_tells_the_size_and_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file to the lines; an image folder that is empty is only seen when it is read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sweep = made(tmp_path, {"seed": {"values": [1, 2, 3]}})
    lines = check(sweep, None, 2)
    assert [line.partition(":")[0] for line in lines] == ["size", "time", "disk", "memory", "measured"]
    assert lines[0] == "size: 3 trials, 6 epochs in all"
    (tmp_path / "images").mkdir()
    sweep = made(tmp_path, {"data": {"value": "folder:images"}, "seed": {"values": [1, 2]}})
    line = sweep.line_of("parameters", "data")
    with pytest.raises(UserError, match=rf"sweep.yaml:{line}: a trial: .*images"):
        check(sweep, None, 1)


SCARCE = """
import resource, sys
from pathlib import Path
import eva.experiment
from eva.sweep_file import read_sweep
from eva.sweep_probe import corners, measure
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPeak"))
most = int(peak.split()[1]) * 1024 + 2**30
resource.setrlimit(resource.RLIMIT_AS, (most, most))
sweep = read_sweep(sys.argv[1])
for result in measure(sweep, corners(sweep), 1):
    print("told", type(result).__name__, result.values, getattr(result, "reason", ""))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA reserves more addresses than this test leaves")
def test_a_trial_that_runs_out_of_memory_is_told_as_such(tmp_path: Path) -> None:
    """The activations of 1,200 images in a ResNet-18 need far more than 1 GiB."""
    constants = {"model": "resnet18", "train_limit": 1200, "batch_size": 1200, "tracking": "disabled"}
    sweep = made(tmp_path, {name: {"value": value} for name, value in constants.items()})
    command = [sys.executable, "-c", SCARCE, str(sweep.source)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert [line for line in done.stdout.splitlines() if line.startswith("told")] == [
        "told Failure {} out of memory"
    ], done.stderr
