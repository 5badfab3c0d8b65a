"""One run from its configuration to its files: the stages in order."""

import contextlib
import csv
import errno
import functools
import io
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from eva import data, evaluation, hardware, loaders, lr_range, models, policies
from eva.batched import require_batched
from eva.checkpoints import BEST, load_weights
from eva.config import (
    EXIT_FAILURE,
    EXIT_USER_ERROR,
    Failure,
    Layer,
    RunConfig,
    Terminated,
    UserError,
    collected,
    resolve,
    to_dict,
)
from eva.data import Dataset, Split
from eva.distributed import ALONE, END_SECONDS, World, is_loss
from eva.files import write_atomically, write_json
from eva.gradcam import GradCAM
from eva.image_cache import IMAGE_SIZE
from eva.init import WHITENING_IMAGES, initialize
from eva.loop import Training, fit, logged_rows, prepare
from eva.lr_range import LrRange
from eva.records import read_columns
from eva.run_folder import (
    check_resumable,
    check_unchanged,
    check_unused,
    git_commit,
    held,
    make_run_folder,
    read_config,
    read_summary,
    saved_states,
    write_config,
)
from eva.schedules import Rates, build_schedule
from eva.sync_batchnorm import synchronize
from eva.tracker import Tracker, WandbTracker, choose_mode, parts_of, under_agent, wandb_root
from eva.trial import Trial, current_trial

# Functions that draw import `figures` and `inspection` themselves: Matplotlib and scikit-learn take more than a second,
# which nobody should wait for before the first step.

EVAL_BATCH_SIZE = 500
MOST_DRAWN_EPOCHS = 10_000
SAME_WISH_SECONDS = 2.0


@dataclass(frozen=True)
class Result:
    """What a run came to: its status, its folder, and all of summary.json."""

    status: str
    folder: Path
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """What a configuration names, built: data, loaders, model, hardware."""

    dataset: Dataset
    splits: Mapping[str, Split]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    watched: str
    train_loader: loaders.TrainLoader
    watched_loader: Any
    test_loader: Any
    policy: policies.Policy
    model: Any
    hardware: hardware.Hardware
    world: World


def check_names(config: RunConfig) -> None:
    """Builds what needs no data, so that a mistake is told before any data are fetched.

    Raises:
        UserError: Device, policy or model don't exist or don't do what is asked of them; all problems at once.
    """
    hardware.check_torch_pair()
    problems: list[str] = []
    with collected(problems):
        hardware.choose_hardware(config)
    with collected(problems):
        policy = policies.build_policy(config.policy, (0.5,) * 3, (0.25,) * 3, config.policy_options)
        if config.augmentation == "batched":
            require_batched(policy)
    with collected(problems):
        model = build_model(config, num_classes=10)
        if config.evaluate and config.gradcam_layers:  # told now, not after the training
            GradCAM(model, config.gradcam_layers)(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    if problems:
        raise UserError("\n".join(problems))


def build_model(config: RunConfig, num_classes: int) -> nn.Module:
    """Returns the model that `config` names, its weights drawn from torch's global generator.

    Raises:
        UserError: There is no such model, or it cannot do what is asked.
    """
    return models.build_model(
        config.model,
        num_classes=num_classes,
        norm=config.norm,
        ghost_splits=config.ghost_splits,
        norm_groups=config.norm_groups,
        dropout=config.dropout,
        stage_strides=config.stage_strides,
    )


def normalized_images(split: Split, plain: policies.Policy) -> torch.Tensor:
    """Returns images of a split, evenly chosen, as `initialize` takes them: (N, 3, H, W) float32, normalized."""
    count = min(len(split), WHITENING_IMAGES)
    chosen = split.images[np.arange(count) * len(split) // count]
    return torch.stack([plain(image) for image in chosen])


Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


def split_data(name: str, data_dir: Path, val_fraction: float) -> tuple[Dataset, Split, Split, Statistics]:
    """Returns a data set, its train and val, and the mean and deviation of train's channels.

    Raises:
        UserError: There is no such data set, or it can't be split like that.
    """
    dataset = data.load_dataset(name, data_dir, progress=True)
    train, val = data.hold_out(dataset.train, val_fraction, len(dataset.classes))
    return dataset, train, val, data.channel_statistics(train.images)


# Trials of a sweep share the data of their process, as they were when its first trial began.
split_once = functools.cache(split_data)


def build(config: RunConfig, world: World = ALONE) -> Parts:
    """Loads the data and builds loaders, policy and model. Seeds python, numpy and torch on the way.

    In a world of several processes the loaders of train and of the watched split have this one's share.

    Raises:
        UserError: The configuration names something that doesn't exist or doesn't fit.
    """
    chosen = hardware.choose_hardware(config)
    split = split_data if current_trial() is None else split_once
    dataset, train, val, (mean, std) = split(config.data, Path(config.data_dir), config.val_fraction)
    num_classes = len(dataset.classes)
    if config.train_limit is not None:
        train = data.limit(train, config.train_limit, num_classes)
    policy = policies.build_policy(config.policy, mean, std, config.policy_options)
    plain = policies.build_policy("test", mean, std)
    # --device=cpu on a machine with a GPU is a CPU all the same.
    workers = 0 if config.workers is None and chosen.device.type == "cpu" else config.workers
    # What is evaluated only once is not worth processes of its own.
    how = chosen.device, config.augmentation
    test_loader = loaders.eval_loader(dataset.test, plain, EVAL_BATCH_SIZE, 0 if len(val) else workers, *how)
    watched_loader = test_loader
    if len(val) or world.size > 1:
        watched = val if len(val) else dataset.test
        watched_loader = loaders.eval_loader(watched, plain, EVAL_BATCH_SIZE, workers, *how, world)
    hardware.seed_everything(config.seed, config.deterministic)
    # Slices of the batch go round the processes: as many as there are in all, if that comes out even.
    model = build_model(replace(config, ghost_splits=max(1, config.ghost_splits // world.size)), num_classes)
    if config.init != "default":  # or every trial would wait for images that nobody looks at
        initialize(model, config.init, normalized_images(train, plain))
    if config.sync_batchnorm and world.size > 1:
        synchronize(model)
    return Parts(
        dataset=dataset,
        splits={"train": train, "val": val, "test": dataset.test},
        mean=mean,
        std=std,
        watched="val" if len(val) else "test",
        train_loader=loaders.train_loader(train, policy, config.batch_size, config.seed, workers, *how, world),
        watched_loader=watched_loader,
        test_loader=test_loader,
        policy=policy,
        model=model,
        hardware=chosen,
        world=world,
    )


def train(config: RunConfig, resume: Path | None = None, world: World = ALONE) -> Result:
    """Trains as `config` says and leaves everything in the run folder and in W&B.

    Args:
        config: The configuration; with `resume`, that of the run folder.
        resume: A run folder to go on in, from its saved state.
        world: Other processes, in `help_train`, that this one, the first, trains with.

    Raises:
        UserError: The configuration, the data or the run folder don't allow it.
    """
    trial = current_trial()
    if trial is not None:
        config, resume = in_trial(config, trial)
    if config.wandb_dir is not None:  # it may be gone on with from elsewhere
        config = replace(config, wandb_dir=os.path.abspath(config.wandb_dir))
    with contextlib.ExitStack() as opened:
        run = opened.enter_context(open_run(config, "train", resume, world=world))
        world.tell_task({"config": to_dict(config), "resumes": resume is not None})
        opened.enter_context(world.joined(run.parts.hardware.device))
        config = world.from_first(with_rates(config, run))
        describe_model(run)
        training = prepare(config, run.parts.hardware, run.parts.model, len(run.parts.train_loader), world)
        training.facts = checkpoint_facts(config, run)
        if resume:
            training.load(run.folder)
        watched = run.parts.watched_loader, run.parts.watched
        ends_early = (lambda row: False) if trial is None else trial.report
        with stop_signals(world) as stop_asked:
            status = fit(training, run.parts.train_loader, *watched, run.folder, run.tracker, stop_asked, ends_early)
            stop_asked.agree()
        if status == "interrupted" and stop_asked.by_agent():
            status = "stopped"
        run.summary.update(outcome(training, run.parts, status))
        if status == "interrupted":  # W&B gets its pictures at the end, after the rows that are to come
            if stop_asked.number == signal.SIGTERM:
                run.tracker.preempted()  # the machine may be gone in seconds
            else:
                draw_curves(run)
            run.tracker.summarize(run.summary)
            return run.result()
        if status == "finished":
            run.summary.update(test_at_the_end(training, run.parts, run.folder))
        evaluates = config.evaluate and not stop_asked.by_agent()
        # Of a sweep's trials its own pictures tell more, and in less time.
        conclude(config, run, training.evaluated, draws=trial is None, evaluates=evaluates)
    return run.result()


def help_train(world: World) -> int:
    """Trains with the first process, which is in `train`; leaves nothing, and returns the exit code when that one ends.

    Where the first process tells of a mistake, it is the one that counts: here nothing is told but a bug's traceback.
    """
    try:
        task = world.task()
        if task is None:  # there is nothing to help with
            return world.end()
        config, _ = resolve([Layer("the first process", task["config"])])
        parts = build(config, world)
        with world.joined(parts.hardware.device):
            if "find" in (config.lr_min, config.lr_max):
                lr_range.record_curve(config, parts.hardware, parts.model, parts.train_loader, world)
            config = world.from_first(config)
            training = prepare(config, parts.hardware, parts.model, len(parts.train_loader), world)
            if task["resumes"]:
                training.load(None)
            with stop_signals(world) as stop_asked:
                fit(training, parts.train_loader, parts.watched_loader, parts.watched, None, Tracker(), stop_asked)
                stop_asked.agree()
        return world.end()
    except UserError as error:
        world.tell_error(error, "mistake")
        return EXIT_USER_ERROR
    except Exception as error:
        if is_loss(error):
            return world.end(END_SECONDS)
        if hardware.is_out_of_memory(error):
            world.tell_error(error, "memory")
            return EXIT_USER_ERROR
        world.tell_error(error, "bug")
        traceback.print_exc()
        return EXIT_FAILURE


def sync(folder: Path) -> Result:
    """Sends W&B what it lacks of a run, whatever came between: rows, pictures, weights, tables.

    All of it is told once more from the files of the run folder, and W&B's client sends what is missing. The best
    weights of a finished run are evaluated again for that.

    Raises:
        UserError: It is not the folder of a training, the data are not there or have changed, or W&B can't be reached.
    """
    config, _ = read_config(folder, Layer("sync", {"tracking": "online"}))
    if (job := read_summary(folder).get("job")) != "train":
        raise UserError(f"the run in {str(folder)!r} is no training that could be sent, but a {job}: do it once more")
    with open_run(config, "train", folder, only_sends=True) as run:
        if "find" not in (config.lr_min, config.lr_max):
            with_rates(config, run)
            describe_model(run)
            for row in logged_rows(run.folder, run.parts.watched):
                run.tracker.log(row)
        if run.summary["status"] in ("finished", "diverged", "stopped"):
            model = run.parts.model.to(run.parts.hardware.device, memory_format=run.parts.hardware.memory_format)
            drawn = (folder / "figures" / "lr.png").exists()
            conclude(config, run, model, draws=drawn, evaluates=config.evaluate and "evaluation" in run.summary)
    return run.result()


def in_trial(config: RunConfig, trial: Trial) -> tuple[RunConfig, Path | None]:
    """Returns the configuration of a trial's run, and the folder to go on in; None for a trial that begins."""
    if saved_states(trial.folder):
        return read_config(trial.folder)[0], trial.folder
    return replace(
        config,
        out=str(trial.folder),
        tracking="offline" if config.tracking == "auto" else config.tracking,
        group=config.group or trial.group,
        project=config.project or trial.project,
        entity=config.entity or trial.entity,
    ), None


def find_lr(config: RunConfig) -> Result:
    """Runs the range test that `config` describes, and leaves its curve and figure in a run folder and in W&B.

    Raises:
        UserError: The configuration or the data don't allow it, or the curve has no usable minimum.
    """
    with open_run(config, "find_lr") as run:
        range_test(config, run)
        run.summary["status"] = "finished"
        run.tracker.summarize(run.summary)
    return run.result()


def show_policy(config: RunConfig) -> Result:
    """Draws samples of the policy, for each class an original and eight augmented ones, as PNG and as W&B media.

    Raises:
        UserError: The configuration or the data don't allow it.
    """
    from eva import figures

    with open_run(config, "show_policy") as run:
        train_split = run.parts.dataset.train
        classes = run.parts.dataset.classes
        samples = policies.gallery(train_split.images, train_split.labels, classes, run.parts.policy, seed=config.seed)
        path = figures.save_picture(samples, run.folder / "figures" / "policy.png")
        run.tracker.log_image("policy/gallery", path)
        run.summary["status"] = "finished"
        run.tracker.summarize(run.summary)
    return run.result()


def show_schedule(config: RunConfig, steps_per_epoch: int = 100) -> Path:
    """Draws the schedule over its steps as schedule-NAME.png in the folder `out` or the current one.

    Plateau is drawn for losses that stop falling at once.

    Raises:
        UserError: A rate is still to be found, or the folder can't be written.
    """
    from eva import figures

    if "find" in (config.lr_min, config.lr_max):
        raise UserError("--show_schedule needs numbers for lr_min and lr_max, but got find")
    if config.epochs > MOST_DRAWN_EPOCHS:
        raise UserError(f"--show_schedule draws up to {MOST_DRAWN_EPOCHS} epochs, but got epochs={config.epochs}")
    schedule = build_schedule(config, steps_per_epoch)
    steps = range(config.epochs * steps_per_epoch)
    rates = [schedule(step, [1.0] * (step // steps_per_epoch)) for step in steps]
    title = f"{config.schedule}: {config.epochs} epochs of {steps_per_epoch} steps"
    path = Path(config.out or ".") / f"schedule-{config.schedule}.png"
    try:
        return figures.save(figures.lr_curve(list(steps), rates, title), path)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}") from None


# The stages


@dataclass
class Run:
    """A run under way: what it builds on, where it writes, and its growing summary."""

    folder: Path
    wandb_root: Path
    parts: Parts
    tracker: Tracker
    summary: dict[str, Any]

    def result(self) -> Result:
        """Returns what the run came to."""
        return Result(self.summary["status"], self.folder, self.summary)

    def write_summary(self) -> None:
        """Writes summary.json, with W&B's folders as they are now."""
        self.summary["wandb_folders"] = [str(path) for path in parts_of(self.wandb_root, self.summary["wandb_id"])]
        write_json(self.folder / "summary.json", self.summary)


@contextlib.contextmanager
def open_run(
    config: RunConfig, job: str, resume: Path | None = None, *, only_sends: bool = False, world: World = ALONE
) -> Iterator[Run]:
    """Makes the run folder, builds the parts and opens the tracker; closes it and writes summary.json at the end.

    What goes wrong meanwhile is noted in the summary. Out of memory, it is told and the run has ended as `oom`; of a
    bug the traceback goes into the run folder's log.txt.

    Args:
        config: The configuration.
        job: What the run does: W&B's job type.
        resume: The folder of a run to go on in; None for a new one.
        only_sends: Whether the run in `resume` is only opened to send W&B what it lacks; it stays what it was.
        world: The processes that share the batches.

    Raises:
        UserError: The run folder, the configuration or the data don't allow it, or the disk is full. A folder made for
            it is removed if nothing is in it yet.
        Failure: There is a bug.
    """
    trial = current_trial()
    mode, remark = choose_mode(config.tracking)
    if trial is None or config.gradcam_layers:  # a trial's data are loaded already: `build` tells as early
        check_names(config)
    if resume is None:
        run_id, folder = make_run_folder(config, trial.run_id if trial else None)
    else:
        folder = resume
        (read_summary if only_sends else check_resumable)(folder)  # told before anything is waited for
    with held(folder):
        if resume is None:
            check_unused(folder)
            before: dict[str, Any] = {}
        else:
            before = read_summary(folder) if only_sends else check_resumable(folder)
            run_id = before["wandb_id"]
        status = before.get("status", "running") if only_sends else "running"
        if not only_sends:
            for name in ("evaluation", "reason"):  # of weights that will change, of what went wrong before
                before.pop(name, None)
        parts = build(config, world)
        policy = parts.policy.describe()
        if resume:
            check_unchanged(resume, before, parts.dataset.fingerprint, policy)
        if remark:
            print(remark)
        summary: dict[str, Any] = {
            **before,
            "status": status,
            "job": job,
            "recipe": config.recipe,
            "data": config.data,
            "data_fingerprint": parts.dataset.fingerprint,
            "train_images": parts.train_loader.num_images,
            "parameters": models.count_parameters(parts.model),
            "selected_on": parts.watched,
            "hardware": {**hardware.describe(parts.hardware), **world.describe(config.batch_size)},
            "wandb_id": run_id,
            "wandb_mode": mode,
        }
        facts = {
            **(trial.arguments if trial else {}),
            **to_dict(config),
            **{
                name: summary[name]
                for name in ("data_fingerprint", "train_images", "parameters", "selected_on", "hardware")
            },
            "git_commit": git_commit(),
        }
        tracker = Tracker()
        if mode != "disabled":
            tracker = WandbTracker(config, facts, job, folder, run_id, mode, falls_back=not only_sends)
        run = Run(folder, wandb_root(config, folder), parts, tracker, summary)
        try:
            write_json(folder / "policy.json", policy)
            run.write_summary()
            write_config(folder, config)
            with tracker:
                if isinstance(tracker, WandbTracker):
                    summary["wandb_id"], summary["wandb_mode"] = tracker.run_id, tracker.mode
                run.write_summary()
                try:
                    yield run
                except BaseException as error:
                    outcome_of(error, config, run, only_sends)
                    if isinstance(error, Terminated):
                        tracker.preempted()
                    if isinstance(error, KeyboardInterrupt) and job == "train" and not only_sends:
                        print(f"go on with: eva train --resume {folder}", flush=True)
                    with contextlib.suppress(Exception):  # what went wrong matters more
                        tracker.summarize(summary)
                    if only_sends or summary["status"] != "oom":
                        raise
            summary["wandb_lost"] = tracker.lost
            run.write_summary()
        except BaseException as error:
            if summary["status"] == "running" and not only_sends:  # W&B did not begin the run
                summary["status"] = "failed"
            summary["wandb_lost"] = tracker.lost
            with contextlib.suppress(OSError):
                run.write_summary()
            if is_full(error):
                begun = job == "train" and not only_sends and (folder / "config.yaml").exists()
                again = f"go on with eva train --resume {folder}" if begun else "do it once more"
                saved = "what was saved before is there: " if begun else ""
                reason = os.strerror(errno.ENOSPC)
                raise UserError(f"cannot write in {str(folder)!r}: {reason}; {saved}make room, then {again}") from None
            if isinstance(error, Exception) and not isinstance(error, UserError):
                raise Failure(logged_bug(error, folder)) from error
            raise


def is_full(error: BaseException) -> bool:
    """Tells whether a disk, or the user's share of it, took no more."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def outcome_of(error: BaseException, config: RunConfig, run: Run, only_sends: bool) -> None:
    """Notes in the summary what an exception makes of a run, and tells what to do if memory ran out.

    One that is only sent to W&B stays what it was.
    """
    if only_sends:
        return
    if hardware.is_out_of_memory(error):
        device = run.parts.hardware.device
        run.summary["reason"] = f"out of memory on {device}: choose a batch_size below {config.batch_size}"
        print(run.summary["reason"], file=sys.stderr, flush=True)
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
        run.summary["status"] = "oom"
    else:
        goes_on = isinstance(error, KeyboardInterrupt) or is_full(error)
        run.summary["status"] = "interrupted" if goes_on else "failed"


def logged_bug(error: Exception, folder: Path) -> str:
    """Writes the traceback of a bug into log.txt of the run folder; returns one line about it."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    with contextlib.suppress(OSError), open(folder / "log.txt", "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{''.join(traceback.format_exception(error))}\n")
        return f"{line} (a bug: the traceback is in {folder / 'log.txt'})"
    return line


def describe_model(run: Run) -> None:
    """Prints the model's table and writes it to model.txt and to W&B."""
    table = models.summarize(run.parts.model)
    print(table)
    (run.folder / "model.txt").write_text(table + "\n", encoding="utf-8")
    run.tracker.log_text("model/summary", table)


def with_rates(config: RunConfig, run: Run) -> RunConfig:
    """Returns the configuration with learning rates that are numbers, found by a range test where they are asked for.

    One that was made before the run was interrupted is told to the tracker once more.

    Raises:
        UserError: The curve has no minimum, or what was found doesn't fit the rate that was given.
    """
    if "find" in (config.lr_min, config.lr_max):
        config = with_found_rates(config, range_test(config, run))
        run.tracker.configure({"lr_min": config.lr_min, "lr_max": config.lr_max})
        run.write_summary()  # before the configuration has the rates: then the test is through
        write_config(run.folder, config)
    elif (run.folder / "lr_range.csv").exists():
        log_curve(run)
    return config


def range_test(config: RunConfig, run: Run) -> LrRange:
    """Runs the range test, writes its curve to lr_range.csv and figures/lr_range.png, and logs both.

    Raises:
        UserError: The curve, which is kept all the same, has no minimum that a range can be read off.
    """
    from eva import figures

    print(f"range test: {config.find_lr_steps} steps from {config.find_lr_start:g} to {config.find_lr_end:g}")
    parts = run.parts
    curve = lr_range.record_curve(config, parts.hardware, parts.model, parts.train_loader, parts.world)
    rows = list(zip(curve.lrs, curve.losses, curve.smoothed, strict=True))
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("lr", "loss", "smoothed"), *rows])
    write_atomically(run.folder / "lr_range.csv", lambda path: path.write_text(text.getvalue(), "utf-8", newline=""))
    found = None
    try:
        found = lr_range.suggest(curve)
    finally:
        figures.save(figures.lr_range(curve, found), run.folder / "figures" / "lr_range.png")
        log_curve(run)
    asked = [name for name in ("lr_min", "lr_max") if getattr(config, name) == "find"]
    run.summary.update({"lr_min": found.lr_min, "lr_max": found.lr_max, "lr_rule": lr_range.RULE, "found": asked})
    print(f"range test: LR min {found.lr_min:.3g}, LR max {found.lr_max:.3g} ({lr_range.RULE})")
    return found


def log_curve(run: Run) -> None:
    """Logs the range test's curve and its picture from the run folder."""
    columns = read_columns(run.folder / "lr_range.csv", [])
    if columns.keys() < {"lr", "loss", "smoothed"}:
        raise UserError(f"{str(run.folder / 'lr_range.csv')!r} is damaged: it holds no curve; start the run anew")
    for row in zip(*(columns[name] for name in ("lr", "loss", "smoothed")), strict=True):
        run.tracker.log(dict(zip(("lr_range/lr", "lr_range/loss", "lr_range/smoothed"), row, strict=True)))
    run.tracker.log_image("lr_range/curve", run.folder / "figures" / "lr_range.png")


def checkpoint_facts(config: RunConfig, run: Run) -> dict[str, Any]:
    """Returns what a checkpoint needs beside its weights to be evaluated anywhere: settings, classes, statistics."""
    return {
        "config": to_dict(config),
        "run": run.summary["wandb_id"],
        "classes": list(run.parts.dataset.classes),
        "mean": list(run.parts.mean),
        "std": list(run.parts.std),
        "data_fingerprint": run.parts.dataset.fingerprint,
    }


def with_found_rates(config: RunConfig, found: LrRange) -> RunConfig:
    """Returns the configuration with the found rates in place of "find".

    Raises:
        UserError: The found one and the given one of the two rates don't fit together.
    """
    lr_min = found.lr_min if config.lr_min == "find" else config.lr_min
    lr_max = found.lr_max if config.lr_max == "find" else config.lr_max
    if lr_min > lr_max:
        raise UserError(f"the range test found a range in which lr_min={lr_min:.3g} is above lr_max={lr_max:.3g}")
    return replace(config, lr_min=lr_min, lr_max=lr_max)


def outcome(training: Training, parts: Parts, status: str) -> dict[str, Any]:
    """Returns what training came to, for the summary; the watched split's accuracies under its name."""
    now, config = training.progression, training.config
    # Only an epoch's last batch may be smaller.
    epochs, batches = divmod(now.step, len(parts.train_loader))
    images = parts.train_loader.num_images * epochs + config.batch_size * batches
    return {
        "status": status,
        "lr_min": config.lr_min,
        "lr_max": config.lr_max,
        f"{parts.watched}_accuracy_last": now.last_accuracy if now.epoch else None,
        f"{parts.watched}_accuracy_best": now.best_accuracy if now.best_epoch else None,
        "best_epoch": now.best_epoch,
        "epochs": now.epoch,
        "steps": now.step,
        "seconds": now.seconds,
        "images_per_second": images / now.seconds if now.seconds else None,
    }


def test_at_the_end(training: Training, parts: Parts, folder: Path) -> dict[str, Any]:
    """Returns test's accuracies of the last weights and of the best on val; none where test was watched all along."""
    if parts.watched == "test":
        return {}
    last = evaluation.evaluate(training.evaluated, parts.test_loader, parts.hardware)
    best = last
    if training.progression.best_epoch != training.progression.epoch:
        load_weights(folder / BEST, training.evaluated)
        best = evaluation.evaluate(training.evaluated, parts.test_loader, parts.hardware)
    return {
        "test_accuracy_last": last.accuracy,
        "test_accuracy_best": best.accuracy,
        "test_loss_best": best.loss,
    }


def inspect_best(config: RunConfig, model: nn.Module, run: Run) -> dict[str, Any]:
    """Evaluates the best weights as `eva evaluate` does, in `model`; returns what the summary says of it."""
    from eva import inspection

    load_weights(run.folder / BEST, model)
    parts, run_id = run.parts, run.summary["wandb_id"]
    split = parts.splits[config.split]
    plain = policies.build_policy("test", parts.mean, parts.std)
    batches = loaders.eval_loader(split, plain, EVAL_BATCH_SIZE, 0, parts.hardware.device, config.augmentation)
    dataset = parts.dataset
    found = inspection.inspect(model, split, batches, config, parts.hardware, dataset.classes, dataset.fingerprint)
    entries = inspection.write(found, run.folder)
    source = {"checkpoint": f"model-{run_id}:best", "checkpoint_of": run_id, "into": run_id}
    inspection.log(found, run.folder, run.tracker, run_id, source)
    return entries


def conclude(config: RunConfig, run: Run, model: nn.Module, *, draws: bool, evaluates: bool) -> None:
    """Draws the curves of a run that has ended, uploads its best weights, and evaluates them, loaded into `model`."""
    if draws:
        for name, path in draw_curves(run).items():
            run.tracker.log_image(f"figures/{name}", path)
    run.tracker.summarize(run.summary)
    best = run.folder / BEST
    if best.exists():
        metadata = {"summary": run.summary, "config": to_dict(config)}
        run.tracker.log_artifact(f"model-{run.summary['wandb_id']}", "model", [best], metadata, ("best", "latest"))
    if run.summary["status"] == "finished" and evaluates:
        run.summary.update(inspect_best(config, model, run))
        run.tracker.summarize(run.summary)


def draw_curves(run: Run) -> dict[str, Path]:
    """Draws loss and accuracy by epoch and the learning rate by step from the run's CSV files, into figures by name."""
    from eva import figures

    history = read_columns(run.folder / "history.csv", [])
    epochs = read_columns(run.folder / "epochs.csv", [])
    drawn = {}
    if epochs:
        drawn["loss"] = figures.curves(epochs, run.parts.watched, "loss")
        drawn["accuracy"] = figures.curves(epochs, run.parts.watched, "accuracy")
    if history:
        rates = [Rates(*pair) for pair in zip(history["lr"], history["momentum"], strict=True)]
        drawn["lr"] = figures.lr_curve(history["trainer/step"], rates, "learning rate by step")
    return {name: figures.save(figure, run.folder / "figures" / f"{name}.png") for name, figure in drawn.items()}


class StopSignal:
    """Whether SIGINT or SIGTERM came, and which."""

    def __init__(self, world: World = ALONE) -> None:
        self.number: int | None = None
        self._world = world

    def agree(self) -> None:
        """Makes this of all processes what came to one of them."""
        (number,) = self._world.agree(self.number or 0)
        self.number = number or None

    def __call__(self) -> bool:
        return self.number is not None

    def by_agent(self) -> bool:
        """Tells whether it was `wandb agent` that ended the run, whose result counts: early stopping, for one."""
        return self.number == signal.SIGTERM and under_agent()


@contextlib.contextmanager
def stop_signals(world: World = ALONE) -> Iterator[StopSignal]:
    """Turns the first SIGINT or SIGTERM into a wish to stop, which the yielded object tells of.

    A second one acts at once, as it would have without us. Outside the main thread signals can't be caught: then
    nothing is changed. Both an agent and W&B's server may tell of the same wish: under an agent, SIGTERM doesn't cut
    off what a run does after its training. Of several processes each is told by torchrun, and some perhaps by a batch
    system too: what comes within two seconds of the first is the same wish.
    """
    asked = StopSignal(world)
    told_at = -math.inf
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            ignored = number == signal.SIGTERM and under_agent()
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    process = os.getpid()

    def ask(number: int, frame: object) -> None:
        if os.getpid() != process:  # a data worker, which ends with this process
            return
        nonlocal told_at
        if asked.number is None:
            asked.number, told_at = number, time.monotonic()
            print("stopping after this batch; once more to stop at once", flush=True)
            if world.size == 1:
                restore()
        elif time.monotonic() - told_at > SAME_WISH_SECONDS:
            restore()
            os.kill(process, number)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()
