"""Whether this machine, these data and a configuration do what eva claims: `eva doctor`, a line for each check.

Nothing is taken from what was promised: steps are timed, pictures drawn, a run is killed. What a check makes lies in a
temporary folder, and the model of the configuration is copied before anything is done with it.
"""

import contextlib
import copy
import functools
import io
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from packaging.requirements import Requirement
from torch import Tensor, nn
from tqdm import tqdm

from eva import experiment, hardware, loaders, lr_range, wandb_client
from eva.batched import batched
from eva.checkpoints import STATES_KEPT, newest_state
from eva.config import RunConfig, UserError
from eva.data import Split
from eva.disk import size_text
from eva.experiment import Parts
from eva.gradcam import GradCAM, stages
from eva.image_cache import IMAGE_SIZE
from eva.loaders import TrainLoader
from eva.loop import Training, fit, logged_rows, prepare, train_step
from eva.run_folder import new_run_id, saved_states
from eva.text import printable
from eva.tracker import Tracker, WandbTracker, choose_mode

OK, FAILED, SKIPPED = "ok", "failed", "skipped"

DISTRIBUTION = "eva-sweeps"
# Each of these brings the same module cv2: of two, the files of one lie over those of the other.
OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")

# The whole loop must reach this share of what its bare steps reach before and after it. A bottleneck costs more than
# half; so may what else the machine does, but seldom twice.
LEAST_SPEED_SHARE = 0.5
# What the calls of a tracker may take of a step. It is below 0.01 where a step takes more than some 30 ms.
MOST_TRACKING_SHARE = 0.1
# How far maps of a batch may be from those of its images alone, as a share of the largest value: convolutions of
# another size take other kernels, on a GPU with the ten bits of TF32.
GRADCAM_TOLERANCE = 0.01
# Where kernels are not deterministic: how far a loss of a resumed run may be from that of the run left alone.
LOSS_TOLERANCE = 0.05

# The batch is made so small that a step takes no longer, and so many seconds of steps are timed.
STEP_SECONDS = 0.25
TIMED_SECONDS = 3.0
TIMED_IMAGES = 20_000  # as a fast GPU would take more memory than time
WARMUP = 1
FEW = 8  # images of a batch where only what comes out counts

DRAWS, DRAWN_BATCH = 128, 32
ATTEMPT_SECONDS = 60.0  # of a run of a few steps, the start of its process included
ATTEMPTS = 3  # to kill a run before it is through
WANDB_SECONDS = 5.0

# Bytes of a row in history.csv, and of one in W&B's log; of pictures and other small files of a run.
ROW, WANDB_ROW, SMALL_FILES = 160, 640, 16 * 2**20


@dataclass(frozen=True)
class Check:
    """What a check came to.

    Attributes:
        name: Which check.
        status: ok, failed or skipped.
        line: What was measured, or why it failed or was skipped.
        measured: The same as plain values, in SI units and bytes.
        seconds: How long it took.
    """

    name: str
    status: str
    line: str
    measured: Mapping[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the check as plain values."""
        return {name: getattr(self, name) for name in ("name", "status", "line", "measured", "seconds")}


@dataclass(frozen=True)
class Outcome:
    """What a check finds: its status, its line, and the values measured."""

    status: str
    line: str
    measured: Mapping[str, Any]


def judged(good: bool, line: str, **measured: Any) -> Outcome:
    """Returns the outcome of something measured."""
    return Outcome(OK if good else FAILED, line, measured)


def skipped(line: str) -> Outcome:
    """Returns the outcome of a check that there is nothing for."""
    return Outcome(SKIPPED, line, {})


def examine(config: RunConfig) -> Iterator[Check]:
    """Yields the checks, each when it is through. One that crashes has failed, and the others follow.

    Raises:
        UserError: `eva train` would refuse the configuration or its data too, and no check before explains it.
    """
    versions = checked("versions", check_versions)
    yield versions
    try:
        experiment.check_names(config)
        loaded, parts = load(config)
    except UserError as error:
        if versions.status != FAILED:
            raise
        loaded, parts = Check("data", SKIPPED, f"after the versions: {one_line(error)}", {}, 0.0), None
    yield loaded
    with tempfile.TemporaryDirectory(prefix="eva-doctor-") as folder:
        subject = None if parts is None else Subject(config, parts, Path(folder))
        for name, check in CHECKS.items():
            if subject is None:
                yield Check(name, SKIPPED, "there are no data", {}, 0.0)
            else:
                yield checked(name, functools.partial(check, subject))
    yield checked("wandb", functools.partial(check_wandb, config))


def checked(name: str, check: Callable[[], Outcome]) -> Check:
    """Returns what a check comes to. What it prints is lost."""
    started = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            outcome = check()
        except UserError as error:
            outcome = judged(False, str(error))
        except Exception as error:
            crash = f"crashed: {type(error).__name__}: {error}"
            outcome = judged(False, crash, traceback="".join(traceback.format_exception(error)))
    return Check(name, outcome.status, one_line(outcome.line), outcome.measured, time.monotonic() - started)


def one_line(text: object) -> str:
    """Returns text as one line of bounded length that no terminal acts on."""
    return printable(" ".join(str(text).split())[:400])


@dataclass(frozen=True)
class Subject:
    """What is checked, and a folder for what that takes."""

    config: RunConfig
    parts: Parts
    folder: Path

    @functools.cached_property
    def gentle(self) -> RunConfig:
        """The configuration with a rate that can't make a loss overflow, and uncompiled: compiling takes minutes."""
        rates: dict[str, Any] = {"schedule": "constant", "lr_min": 1e-4, "lr_max": 1e-4, "momentum_min": None}
        return replace(self.config, **rates, max_steps=None, compile=False)

    def model(self) -> nn.Module:
        """Returns a copy of the model in training mode, on the device."""
        model = copy.deepcopy(self.parts.model).train()
        chosen = self.parts.hardware
        return model.to(chosen.device, memory_format=chosen.memory_format)  # type: ignore[no-any-return]

    def training(self) -> Training:
        """Returns a training of a copy of the model."""
        return prepare(self.gentle, self.parts.hardware, self.model(), len(self.parts.train_loader))

    def loader(self, images: int, batch_size: int, workers: int | None) -> TrainLoader:
        """Returns a loader of so many train images, again and again the same if there are fewer."""
        train = self.parts.splits["train"]
        split = train.take(np.resize(np.arange(len(train)), images))
        return self.loader_of(split, batch_size, workers)

    def loader_of(self, split: Split, batch_size: int, workers: int | None) -> TrainLoader:
        """Returns a loader of these images by the policy of the configuration."""
        how = self.parts.hardware.device, self.config.augmentation
        return loaders.train_loader(split, self.parts.policy, batch_size, self.config.seed, workers, *how)

    def batch(self, images: int) -> tuple[Tensor, Tensor]:
        """Returns a batch of train images on the device."""
        return self.parts.hardware.to_device(*next(self.loader(images, images, 0).epoch(0)))

    def wait(self) -> None:
        """Waits for a GPU."""
        if self.parts.hardware.device.type == "cuda":
            torch.cuda.synchronize(self.parts.hardware.device)

    @functools.cached_property
    def image_seconds(self) -> float:
        """About how long a step takes for each of its images."""
        training, batch = self.training(), self.batch(FEW)
        train_step(training, *batch)
        self.wait()
        started = time.perf_counter()
        train_step(training, *batch)
        self.wait()
        return (time.perf_counter() - started) / FEW

    def batch_size(self, seconds: float) -> int:
        """Returns that of the configuration, or less if a step would take longer."""
        return min(self.config.batch_size, max(FEW, int(seconds / self.image_seconds)))


# Versions, data, device


def check_versions() -> Outcome:
    """Checks that what is installed belongs together: torch with torchvision, one OpenCV, what eva asks for."""
    found = {name: version for name in OPENCV if (version := installed(name))}
    problems = []
    try:
        hardware.check_torch_pair()
    except UserError as error:
        problems.append(str(error))
    if len(found) > 1:
        problems.append(
            f"{' and '.join(f'{name} {version}' for name, version in found.items())} overwrite each other's module "
            f"cv2: uninstall them, then install opencv-python-headless alone"
        )
    try:
        asked = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        problems.append(f"{DISTRIBUTION} is not installed, so nothing says which versions it asks for")
        asked = []
    needed = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in needed:
        version = installed(one.name)
        if version is None or not one.specifier.contains(version, prereleases=True):
            problems.append(f"{one.name} must be {one.specifier}, but is {version or 'not installed'}")
    shown = ("torch", "torchvision", "albumentations", "wandb")
    versions = {name: installed(name) for name in shown} | found
    line = ", ".join(f"{name} {versions[name]}" for name in shown)
    if problems:
        return judged(False, "; ".join(problems), versions=versions, problems=problems)
    return judged(True, f"{line}, one OpenCV; {len(needed)} requirements are met", versions=versions, problems=[])


def installed(name: str) -> str | None:
    """Returns the version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def load(config: RunConfig) -> tuple[Check, Parts | None]:
    """Loads the data and builds what the configuration names, as a training begins.

    Raises:
        UserError: The data can't be had, although their folder can be written.
    """
    started = time.monotonic()
    folder = Path(config.data_dir)
    if config.data != "digits" and (reason := unwritable(folder)):
        line = one_line(f"data_dir must be writable, but {str(folder)!r} is not: {reason}")
        return Check("data", FAILED, line, {"data_dir": str(folder)}, time.monotonic() - started), None
    parts = experiment.build(config)
    seconds = time.monotonic() - started
    sizes = {name: len(split) for name, split in parts.splits.items()}
    counts = ", ".join(f"{size:,} {name}" for name, size in sizes.items() if size)
    line = f"{config.data}: {counts} images of {len(parts.dataset.classes):,} classes"
    measured = {"images": sizes, "classes": len(parts.dataset.classes), "fingerprint": parts.dataset.fingerprint}
    return Check("data", OK, one_line(line), measured, seconds), parts


def nearest(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that there is."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))


def unwritable(folder: Path) -> str | None:
    """Returns why no file can be made in a folder, or where it would be made; None if one can be."""
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)) as file:
            file.write(b"eva")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def check_device(subject: Subject) -> Outcome:
    """Makes one step and looks where its tensors lie, and in what a convolution computes."""
    chosen = subject.parts.hardware
    gpus = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if subject.config.device == "auto" and chosen.device.type == "cpu" and gpus and not hidden:
        return judged(False, f"there is a GPU ({gpus[0]}), but torch can't use it: a run would train on the CPU")
    training = subject.training()
    dtypes: list[torch.dtype] = []
    layer = next((module for module in training.model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))), None)
    images, labels = subject.batch(FEW)
    if layer is not None:
        layer.register_forward_hook(lambda module, given, output: dtypes.append(output.dtype))
    train_step(training, images, labels)
    moments = [
        value
        for state in training.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    ]
    tensors = [images, labels, *training.model.parameters(), *training.model.buffers(), *moments]
    stray = [tensor for tensor in tensors if not same_device(tensor.device, chosen.device)]
    weights = [weight for weight in training.model.parameters() if weight.ndim == 4]
    misplaced = [weight for weight in weights if not weight.is_contiguous(memory_format=chosen.memory_format)]
    wanted = chosen.autocast_dtype or torch.float32
    computed = dtypes[0] if dtypes else wanted
    names = [str(dtype).removeprefix("torch.") for dtype in (computed, wanted)]
    facts = hardware.describe(chosen)
    layout = "channels-last" if chosen.channels_last else "contiguous"
    measured = {**facts, "computed_in": names[0], "tensors": len(tensors), "elsewhere": len(stray)}
    if computed != wanted:
        return judged(False, f"precision is {chosen.precision}, but a layer computes in {names[0]}", **measured)
    if stray:
        line = f"{len(stray)} of {len(tensors)} tensors are not on {chosen.device}, but on {stray[0].device}"
        return judged(False, line, **measured)
    if misplaced:
        return judged(False, f"{len(misplaced)} of {len(weights)} weights of convolutions are not {layout}", **measured)
    threads = f", threads: {torch.get_num_threads()}" if chosen.device.type == "cpu" else ""
    where = f"{len(tensors)} tensors on {chosen.device}, {layout}{threads}"
    return judged(True, f"{facts['device']}: convolutions compute in {names[0]}, {where}", **measured)


def same_device(one: torch.device, other: torch.device) -> bool:
    """Tells whether two devices are the same, of which "cuda" is the first GPU."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)


# Speed, and what tracking takes of it


class Clock:
    """Notes when each step of a loop ends; says that it is enough after so many seconds, or so many images."""

    def __init__(self, subject: Subject, batch_size: int, seconds: float) -> None:
        self.subject, self.seconds = subject, seconds
        self.most = WARMUP + max(2, TIMED_IMAGES // batch_size)
        self.ends: list[float] = []

    def __call__(self) -> bool:
        steps = len(self.ends) + 1
        timed = time.perf_counter() - self.ends[WARMUP - 1] if steps > WARMUP else 0.0
        enough = steps == self.most or (steps >= WARMUP + 2 and timed >= self.seconds)
        if enough or steps == WARMUP:
            self.subject.wait()
        self.ends.append(time.perf_counter())
        return enough

    @property
    def step_seconds(self) -> float:
        """Mean time of the steps after the warm-up."""
        return (self.ends[-1] - self.ends[WARMUP - 1]) / (len(self.ends) - WARMUP)


def looped(subject: Subject, batch_size: int, seconds: float, tracker: Tracker) -> float:
    """Returns the mean time of a step in the whole training loop: loading, augmentation, rows, tracker and all.

    Raises:
        RuntimeError: The loop ended by itself.
    """
    clock = Clock(subject, batch_size, seconds)
    loader = subject.loader((clock.most + 1) * batch_size, batch_size, loader_workers(subject))
    training = prepare(subject.gentle, subject.parts.hardware, subject.model(), len(loader))
    folder = Path(tempfile.mkdtemp(dir=subject.folder))
    status = fit(training, loader, [], subject.parts.watched, folder, tracker, clock)
    shutil.rmtree(folder)
    if status != "interrupted":
        raise RuntimeError(f"the loop ended ({status}) after {len(clock.ends)} steps")
    return clock.step_seconds


def loader_workers(subject: Subject) -> int:
    """Returns how many processes load the data of a training."""
    return subject.parts.train_loader.loader.num_workers


def bare(subject: Subject, batch_size: int, seconds: float) -> float:
    """Returns the mean time of a step of the network on a batch that lies on the device."""
    training, batch = subject.training(), subject.batch(batch_size)
    clock = Clock(subject, batch_size, seconds)
    while True:
        train_step(training, *batch)
        if clock():
            return clock.step_seconds


def check_speed(subject: Subject) -> Outcome:
    """Compares the whole loop with its bare steps on a fixed batch, timed before and after it."""
    size = subject.batch_size(STEP_SECONDS)
    for _ in range(2):  # what else the machine does may hold up one of them: it is too slow if it is so twice
        before = bare(subject, size, TIMED_SECONDS / 2)
        whole = looped(subject, size, TIMED_SECONDS, Tracker())
        after = bare(subject, size, TIMED_SECONDS / 2)
        alone = (before + after) / 2
        share = alone / whole
        if share >= LEAST_SPEED_SHARE:
            break
    workers = loader_workers(subject)
    line = (
        f"{size / whole:,.0f} images/s in the loop are {share:.2f} of the bare steps' {size / alone:,.0f} "
        f"(at least {LEAST_SPEED_SHARE}), batches of {size}"
    )
    if share < LEAST_SPEED_SHARE:
        line += f": loading and augmentation by {workers or 'no'} workers hold it up"
    load = os.getloadavg()[0]
    if load > (os.cpu_count() or 1):
        line += f"; a rough figure, as the machine is busy (load {load:.1f})"
    rates = {"images_per_second": size / whole, "images_per_second_bare": [size / before, size / after]}
    return judged(share >= LEAST_SPEED_SHARE, line, share=share, batch_size=size, workers=workers, load=load, **rates)


class TimedTracker(Tracker):
    """Passes rows on to a tracker, and keeps them and the time that each takes."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self.rows: list[Mapping[str, Any]] = []
        self.seconds: list[float] = []

    def log(self, row: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        self._tracker.log(row)
        self.seconds.append(time.perf_counter() - started)
        self.rows.append(row)

    @property
    def row_seconds(self) -> float:
        """Median time of a row. The first takes longer, but comes once; so may one that the machine holds up."""
        return statistics.median(self.seconds[1:])


def check_tracking(subject: Subject) -> Outcome:
    """Measures what W&B's calls take of the steps of a tracked loop: the difference of two loops drowns in noise."""
    mode, _ = choose_mode(subject.config.tracking)
    if mode == "disabled":
        return skipped("tracking is disabled")
    # Offline, whatever the mode: nothing of this is anybody's run, and online rows go the same way into a file first.
    folder = Path(tempfile.mkdtemp(dir=subject.folder))
    config = replace(subject.gentle, tracking="offline", wandb_dir=None, out=str(folder))
    tracker = WandbTracker(config, {}, "doctor", folder, new_run_id(), "offline")
    size = subject.batch_size(STEP_SECONDS)
    timed = TimedTracker(tracker)
    with tracker:
        if tracker.mode != "offline":
            return judged(False, "W&B's client does not begin an offline run")
        step = looped(subject, size, TIMED_SECONDS / 2, timed)
    if tracker.lost:
        return judged(False, "W&B's client did not take all rows of an offline run")
    silent = TimedTracker(Tracker())
    for row in timed.rows:
        silent.log(row)
    share = timed.row_seconds / step
    line = (
        f"W&B takes {1000 * timed.row_seconds:.2f} ms of a step of {1000 * step:.0f} ms, {100 * share:.2f} % "
        f"(at most {100 * MOST_TRACKING_SHARE:g} %); without it {1000 * silent.row_seconds:.4f} ms"
    )
    measured = {"row_seconds": timed.row_seconds, "row_seconds_off": silent.row_seconds, "step_seconds": step}
    return judged(share <= MOST_TRACKING_SHARE, line, share=share, rows=len(timed.rows), **measured)


# Augmentation


def check_augmentation(subject: Subject) -> Outcome:
    """Draws two epochs with two workers and without: the same images, and no draw that follows another's place.

    Where batches are made as a whole there are no workers: they are made in two sizes then.

    All images are the same noise, so that nothing but the draws can differ. A policy may draw the same twice by chance
    (a flip does half of the time); what is asked is that workers and epochs don't do so at the same places.
    """
    policy = subject.parts.policy
    noise = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    split = Split(np.repeat(noise[None], DRAWS, 0), np.arange(DRAWS), np.array([f"{i}" for i in range(DRAWS)]))
    as_a_whole = subject.config.augmentation != "albumentations" and batched(policy) is not None
    these, those = ("batches of 32", "those of 16") if as_a_whole else ("two workers", "none")
    by_two, by_none = drawn(subject, split, DRAWN_BATCH, 2), drawn(subject, split, DRAWN_BATCH // (1 + as_a_whole), 0)
    # Batches go to the workers in turns.
    first, second = ([draw for batch in by_two[0][start::2] for draw in batch] for start in (0, 1))
    epochs = [[draw for batch in epoch for draw in batch] for epoch in by_two]
    indexed: list[list[tuple[int, bytes]]] = [sorted(epoch) for epoch in epochs]
    pairs = {
        "batches in turn" if as_a_whole else "two workers": list(zip(first, second, strict=True)),
        "two epochs, by image": list(zip(*indexed, strict=True)),
        "two epochs, by place": list(zip(*epochs, strict=True)),
    }
    pictures = Counter(picture for epoch in epochs for _, picture in epoch)
    total = sum(pictures.values())
    chance = sum(count * (count - 1) for count in pictures.values()) / (total * (total - 1))
    repeated = {name: sum(one[1] == other[1] for one, other in both) for name, both in pairs.items()}
    most = {name: likely(len(both), chance) for name, both in pairs.items()}
    measured = {
        **{"policy": policy.name, "draws": total, "different": len(pictures), "chance": chance},
        **{"repeated": repeated, "most": most},
    }
    name = printable(policy.name)
    if policy.is_random and len(pictures) == 1:
        return judged(False, f"policy {name!r} makes the same of an image in all {total} draws", **measured)
    for which, count in repeated.items() if policy.is_random else ():
        if count > most[which]:
            line = f"{count} of {len(pairs[which])} draws of {which} are the same (chance: at most {most[which]:.0f})"
            return judged(False, line, **measured)
    if epochs != [[draw for batch in epoch for draw in batch] for epoch in by_none]:
        return judged(False, f"{these} give other images than {those}", **measured)
    same = f"{these} draw as {those}"
    if not policy.is_random:
        return judged(True, f"policy {name!r} draws nothing; {same}", **measured)
    line = f"{len(pictures)} pictures in {total} draws of one image, none repeated by worker or epoch"
    return judged(True, f"{line}; {same}", **measured)


def drawn(subject: Subject, split: Split, batch_size: int, workers: int) -> list[list[list[tuple[int, bytes]]]]:
    """Returns two epochs of batches of draws: the image's index, and its pixels."""
    loader = subject.loader_of(split, batch_size, workers)
    return [
        [
            [(int(label), image.cpu().numpy().tobytes()) for image, label in zip(images, labels, strict=True)]
            for images, labels in loader.epoch(epoch)
        ]
        for epoch in (0, 1)
    ]


def likely(pairs: int, chance: float) -> float:
    """Returns how many of so many pairs may be the same by chance: four deviations above the mean, and a few more."""
    return pairs * chance + 4 * math.sqrt(pairs * chance * (1 - chance)) + 3


# What looks at a model and must leave it alone


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns all of a model that must not change, and the state of the random generators."""
    modules = list(model.modules())
    return {
        "weights": {name: tensor.clone() for name, tensor in model.named_parameters()},
        "buffers": {name: tensor.clone() for name, tensor in model.named_buffers()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in modules],
        "hooks": [
            len(hooks)
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
        "random generators": hardware.random_state(),
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns the keys whose values, of plain values and tensors, are not the same to the bit."""
    return [key for key in before if not same(before[key], after[key])]


def same(one: Any, other: Any) -> bool:
    """Tells whether two values, of plain values and tensors, are the same to the bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype and bits(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def bits(one: Tensor, other: Tensor) -> bool:
    """Tells whether two tensors of one type hold the same bits, of which NaN are some too."""
    contents = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.shape == other.shape and torch.equal(*contents)


def touched_model(subject: Subject) -> nn.Module:
    """Returns a copy of the model with gradients and modes that would not come back by themselves."""
    model = subject.model()
    next(reversed(list(model.modules()))).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def check_gradcam(subject: Subject) -> Outcome:
    """Compares the maps of a batch with those of each image alone, and the model before with the one after."""
    model, config = touched_model(subject), subject.config
    images, _ = subject.batch(FEW)
    before = snapshot(model)
    layers = config.gradcam_layers or stages(model, images)
    if not layers:
        return skipped(f"{config.model} has no layer whose output is a map of more than one pixel")
    # Different classes: the map of one class may be zero everywhere.
    targets = torch.arange(FEW, device=images.device) % len(subject.parts.dataset.classes)
    gradcam = GradCAM(model, layers)
    batch = gradcam(images, targets)
    alone = [gradcam(images[i : i + 1], targets[i : i + 1]) for i in range(FEW)]
    changed = differences(before, snapshot(model))
    off = {
        name: float((torch.cat([one.raw[name] for one in alone]) - raw).abs().max() / raw.max().clamp_min(1e-30))
        for name, raw in batch.raw.items()
    }
    worst = max(off, key=lambda name: off[name])
    measured = {"layers": list(layers), "difference": off, "changed": changed}
    if changed:
        return judged(False, f"Grad-CAM leaves the model with other {' and '.join(changed)}", **measured)
    if not any(raw.any() for raw in batch.raw.values()):
        return judged(False, f"the maps of {FEW} images are zero everywhere at all {len(layers)} layers", **measured)
    line = (
        f"maps of a batch and of single images differ by {off[worst]:.0e} (at most {GRADCAM_TOLERANCE:g}) at "
        f"{len(layers)} layers; the model is as it was"
    )
    return judged(off[worst] <= GRADCAM_TOLERANCE, line, **measured)


def check_range_test(subject: Subject) -> Outcome:
    """Runs a few steps of the range test, and compares model and random generators before and after."""
    model = touched_model(subject)
    size = subject.batch_size(STEP_SECONDS)
    config = replace(subject.gentle, find_lr_steps=lr_range.MIN_STEPS)
    loader = subject.loader(size * lr_range.MIN_STEPS, size, 0)
    before = snapshot(model)
    curve = lr_range.record_curve(config, subject.parts.hardware, model, loader)
    changed = differences(before, snapshot(model))
    measured = {"steps": len(curve.losses), "changed": changed}
    if changed:
        return judged(False, f"the range test leaves other {' and '.join(changed)}", **measured)
    line = f"weights, buffers, gradients, random generators are as before, to the bit, after {len(curve.losses)} steps"
    return judged(bool(curve.losses), line, **measured)


# A kill, for real


def check_resume(subject: Subject) -> Outcome:
    """Trains a few steps in processes of their own, one killed and gone on with, one left alone; compares the two."""
    config = few_steps(subject)
    alone, killed = (replace(config, out=str(subject.folder / name)) for name in ("alone", "killed"))
    attempt(alone)
    for _ in range(ATTEMPTS):
        step = kill_one(killed)
        if step is not None:
            break
        shutil.rmtree(str(killed.out))
    else:
        return judged(False, f"{ATTEMPTS} runs were through before they could be killed")
    attempt(killed, resume=True)
    exact = subject.parts.hardware.device.type == "cpu" or config.deterministic
    different, steps = compared(Path(str(alone.out)), Path(str(killed.out)), exact)
    measured = {"steps": steps, "killed_after": step, "exact": exact, "different": different}
    told = f"a run killed (SIGKILL) after step {step} of {steps} and resumed is"
    if different:
        return judged(False, f"{told} another than the run left alone in: {', '.join(different)}", **measured)
    how = "to the bit" if exact else f"its losses within {LOSS_TOLERANCE:.0%}, as kernels are not deterministic"
    return judged(True, f"{told} the run left alone, {how}", **measured)


def few_steps(subject: Subject) -> RunConfig:
    """Returns the configuration with few images of the data, of few classes, and few steps: of two epochs if it may."""
    parts, folder = subject.parts, subject.folder / "few"
    train, test = parts.splits["train"], parts.dataset.test
    shared = sorted(set(train.labels.tolist()) & set(test.labels.tolist()))[: FEW // 2]
    for name, split, count in (("train", train, 3 * FEW), ("test", test, FEW)):
        for label in shared:
            (folder / name / f"{label:05d}").mkdir(parents=True)
            members = np.flatnonzero(split.labels == label)
            for number, index in enumerate(np.resize(members, count // len(shared)).tolist()):
                cv2.imwrite(str(folder / name / f"{label:05d}" / f"{number:03d}.png"), split.images[index])
    on_cpu = parts.hardware.device.type == "cpu"
    few: dict[str, Any] = {
        **{"data": f"folder:{folder}", "data_dir": str(subject.folder / "cache"), "val_fraction": 0.0},
        **{"train_limit": None, "batch_size": FEW, "max_steps": 5, "save_steps": 2, "workers": 0},
        **{"lr_min": 1e-4, "lr_max": 1e-3, "evaluate": False, "gradcam_layers": (), "compile": False},
        **{"deterministic": on_cpu or subject.config.deterministic, "tracking": "disabled"},
    }
    return replace(subject.config, **few)


def begin(config: RunConfig, resume: bool = False) -> Any:
    """Starts a process that trains; from a server that has imported what takes seconds, and no threads to lose."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eva.experiment", "torchvision", "torch._dynamo"])
    process = context.Process(target=train_quietly, args=(config, resume))
    process.start()
    return process


def train_quietly(config: RunConfig, resume: bool) -> None:
    """Trains by one thread; what that prints goes into a file beside the run folder. Runs in a process of its own."""
    folder = Path(str(config.out))
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)  # several for eight images wait for each other where the machine does other work too
    tqdm.set_lock(threading.RLock())  # its own is a semaphore too, which a killed process would leave to be reported
    result = experiment.train(config, resume=folder if resume else None)
    sys.exit(0 if result.status == "finished" else 1)


def attempt(config: RunConfig, resume: bool = False) -> None:
    """Trains to the end.

    Raises:
        RuntimeError: It failed, or took too long.
    """
    process = begin(config, resume)
    try:
        process.join(ATTEMPT_SECONDS)
        if process.exitcode != 0:
            log = Path(str(config.out)).with_suffix(".log").read_text(encoding="utf-8", errors="replace")
            last = (log.strip().splitlines() or ["nothing"])[-1]
            ended = "did not end in time" if process.exitcode is None else f"ended with {process.exitcode}"
            raise RuntimeError(f"a run of a few steps {ended}; its last words: {last}")
    finally:
        process.kill()
        process.join()


def _state_of(folder: Path) -> dict[str, Any]:
    newest = newest_state(folder)
    if newest is None:
        raise UserError(f"the run in {str(folder)!r} saved no state")
    return newest[0]


def kill_one(config: RunConfig) -> int | None:
    """Starts a run and kills it once a state is there; returns the step of that, or None if it was through by then."""
    folder = Path(str(config.out))
    process = begin(config)
    try:
        deadline = time.monotonic() + ATTEMPT_SECONDS
        while process.is_alive() and not saved_states(folder) and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        process.kill()
        process.join()
    if process.exitcode != -signal.SIGKILL or not saved_states(folder):
        return None
    progression = _state_of(folder)["progression"]
    return None if progression["ended"] else int(progression["step"])


def compared(alone: Path, killed: Path, exact: bool) -> tuple[list[str], int]:
    """Returns in what two runs differ, wall-clock aside, and how many steps they have."""
    states = [without_clock(_state_of(folder)) for folder in (alone, killed)]
    watched = "test"  # nothing is held out
    rows = [list(map(without_times, logged_rows(folder, watched))) for folder in (alone, killed)]
    steps = int(states[0]["progression"]["step"])
    if exact:
        return differences(states[0], states[1]) + ["rows"] * (not same(*rows)), steps
    # What no kernel decides must be the same all the same.
    positions = [[(row["trainer/step"], row["epoch"], row.get("lr")) for row in each] for each in rows]
    different = ["steps or rates"] * (positions[0] != positions[1])
    losses = [[row["train/loss"] for row in each if "train/loss" in row] for each in rows]
    near = len(losses[0]) == len(losses[1]) and np.allclose(losses[0], losses[1], rtol=LOSS_TOLERANCE)
    return different + ["losses"] * (not near), steps


def without_clock(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state without times, the run's name and its folder."""
    best = state["best"] and state["best"]["weights"]
    return {**state, "progression": without_times(state["progression"]), "best": best}


def without_times(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values without what a clock says."""
    return {key: value for key, value in values.items() if not key.endswith(("seconds", "images_per_second"))}


# W&B, disk


def check_wandb(config: RunConfig) -> Outcome:
    """Finds the mode that a run would use, and asks W&B's server, a few seconds long and without asking anybody."""
    mode, remark = choose_mode(config.tracking)
    if mode == "disabled":
        return skipped("tracking is disabled")
    try:
        server = wandb_client.server()
        problem = login_problem() if mode == "online" else connection_problem(server)
    finally:
        wandb_client.end()
    measured = {"mode": mode, "server": server, "reachable": problem is None, "problem": problem}
    line = f"{mode}{remark.removeprefix(f'W&B: {mode}')}; {server} "
    if mode == "online":
        line += f"does not take this account: {problem}" if problem else "knows this account"
    else:
        line += "is not reachable, and not needed" if problem else "is reachable"
    return judged(mode != "online" or problem is None, line, **measured)


def login_problem() -> str | None:
    """Returns why W&B's client can't log in; None if it can."""
    try:
        with wandb_client.at_most(WANDB_SECONDS):
            wandb_client.public_api(timeout=round(WANDB_SECONDS))
    except Exception as error:
        return one_line(error) or f"no answer in {WANDB_SECONDS:g} s"
    return None


def connection_problem(url: str) -> str | None:
    """Returns why a server gives no answer; None if it gives one, whatever it is."""
    problems: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=WANDB_SECONDS).close()
            problems.append(None)
        except urllib.error.HTTPError:
            problems.append(None)
        except Exception as error:
            problems.append(one_line(getattr(error, "reason", None) or error))

    thread = threading.Thread(target=ask, daemon=True)  # a name may be looked up for minutes
    thread.start()
    thread.join(WANDB_SECONDS)
    return problems[0] if problems else f"no answer in {WANDB_SECONDS:g} s"


def check_disk(subject: Subject) -> Outcome:
    """Compares what a run will write with what is free where it will write."""
    config = subject.config
    sizes = expected_bytes(subject)
    run_folder = Path(config.out or "runs")
    of_wandb = Path(config.wandb_dir) if config.wandb_dir else run_folder
    places = [(run_folder, sum(size for name, size in sizes.items() if name != "wandb")), (of_wandb, sizes["wandb"])]
    for folder, _ in places:
        if reason := unwritable(folder):
            return judged(False, f"a run can't be written in {str(folder)!r}: {reason}", bytes=sizes)
    needed: Counter[int] = Counter()
    for folder, size in places:
        needed[nearest(folder).stat().st_dev] += size
    free = {nearest(folder).stat().st_dev: shutil.disk_usage(nearest(folder)).free for folder, _ in places}
    measured = {"bytes": sizes, "free": [free[device] for device in needed]}
    for folder, _ in places:
        device = nearest(folder).stat().st_dev
        if free[device] < needed[device]:
            most = size_text(needed[device])
            line = f"a run may write {most} where {str(folder)!r} is, but {size_text(free[device])} are free"
            return judged(False, line, **measured)
    most, least = size_text(sum(sizes.values())), size_text(min(free.values()))
    return judged(True, f"a run may write {most}; {least} are free", **measured)


def expected_bytes(subject: Subject) -> dict[str, int]:
    """Returns what a run of the configuration has on the disk at most, at any time, by kind."""
    config, parts = subject.config, subject.parts
    training = subject.training()
    weights = size_of(training.evaluated.state_dict().values())
    steps = config.epochs * len(parts.train_loader)
    steps = steps if config.max_steps is None else min(steps, config.max_steps)
    classes = len(parts.dataset.classes)
    # Logits, maps of a quarter of the image's side, id and label; images of those that are wrong, at most all.
    of_image = 4 * classes + 4 * (IMAGE_SIZE // 4) ** 2 + 64 + 3 * IMAGE_SIZE**2
    evaluation = len(parts.splits[config.split]) * of_image if config.evaluate else 0
    tracked = choose_mode(config.tracking)[0] != "disabled"
    return {
        "states": (STATES_KEPT + 1) * size_of(training.tensors()),  # one is written before another goes
        "weights": 2 * weights,  # the best ones too
        "rows": steps * ROW,
        "evaluation": evaluation + SMALL_FILES,
        # Files of artifacts are staged, and kept in the cache once they are sent.
        "wandb": (steps * WANDB_ROW + 2 * (weights + evaluation) + SMALL_FILES) if tracked else 0,
    }


def size_of(tensors: Any) -> int:
    """Returns the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# What needs the data, in the order in which it is checked.
CHECKS: dict[str, Callable[[Subject], Outcome]] = {
    "device": check_device,
    "speed": check_speed,
    "tracking": check_tracking,
    "augmentation": check_augmentation,
    "gradcam": check_gradcam,
    "range_test": check_range_test,
    "resume": check_resume,
    "disk": check_disk,
}


def told(check: Check) -> str:
    """Returns a check as a line."""
    return f"{check.status:<9}{check.name:<14}{check.line} [{check.seconds:.1f} s]"


def concluded(checks: Sequence[Check]) -> str:
    """Returns the last line: what failed, and how long all took."""
    counts = Counter(check.status for check in checks)
    loading = sum(check.seconds for check in checks if check.name == "data")
    taken = f"{sum(check.seconds for check in checks) - loading:.0f} s, and {loading:.0f} s for the data"
    bad = [check.name for check in checks if check.status == FAILED]
    skips = f", {counts[SKIPPED]} skipped" if counts[SKIPPED] else ""
    failures = f"failed: {', '.join(bad)}" if bad else "none failed"
    return f"{counts[OK]} ok{skips}, {failures}; {taken}"
