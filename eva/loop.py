"""The training loop: read `fit` from top to bottom."""

import copy
import csv
import heapq
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from eva.checkpoints import Best, Saver, SilentSaver, newest_state
from eva.config import RunConfig, UserError
from eva.distributed import ALONE, World, counted
from eva.evaluation import Evaluation, evaluate
from eva.files import write_atomically
from eva.hardware import Hardware, random_state, set_random_state
from eva.loaders import Batch, TrainLoader
from eva.optim import Criterion, build_criterion, build_optimizer, set_rates
from eva.progress import Progress
from eva.schedules import Schedule, build_schedule
from eva.tracker import Tracker

# Rows of batches wait on the device and are fetched together, after so many steps or so many seconds.
FLUSH_STEPS = 32
FLUSH_SECONDS = 2.0
# The state is saved after an epoch, and within one that takes longer than this, so that no crash costs more.
SAVE_SECONDS = 600.0

Row = dict[str, float]

BATCH_COLUMNS = (
    *("trainer/step", "epoch", "train/loss", "train/accuracy"),
    *("lr", "momentum", "images_per_second", "seconds"),
)


@dataclass
class Progression:
    """How far a run has come. The step counts optimizer steps from 0; `epoch` and `batch` are the next ones."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    # of the epoch under way
    epoch_loss: float = 0.0
    epoch_correct: float = 0.0
    epoch_images: int = 0
    epoch_seconds: float = 0.0
    # of the epochs that ended: the watched split's loss, by which plateau drops the rate
    losses: list[float] = field(default_factory=list)
    best_accuracy: float = 0.0
    best_loss: float = math.inf
    best_epoch: int = 0
    last_accuracy: float = 0.0
    # how training ended, if it did: finished, diverged or stopped
    ended: str = ""


@dataclass
class Training:
    """Everything that training changes, and what it needs to go on."""

    config: RunConfig
    hardware: Hardware
    model: nn.Module
    network: nn.Module  # what is trained: the model, or what brings its gradients together with other processes'
    averaged: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    criterion: Criterion
    schedule: Schedule
    progression: Progression
    facts: Mapping[str, Any] = field(default_factory=dict)  # what a checkpoint says about itself beside its metrics
    best: Best | None = None  # of a run that goes on: its best weights so far
    world: World = ALONE

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average of the weights if there is one."""
        return self.model if self.averaged is None else self.averaged

    def tensors(self) -> list[Tensor]:
        """Returns the tensors of a state that are known from the first step on, with those of its optimizer."""
        modules = [self.model] if self.averaged is None else [self.model, self.averaged]
        kept = [tensor for module in modules for tensor in module.state_dict().values()]
        moments = 2 if isinstance(self.optimizer, torch.optim.AdamW) else 1
        return kept + moments * list(self.model.parameters()) + list(self.evaluated.state_dict().values())

    def state(self) -> dict[str, Any]:
        """Returns all that changes: model, optimizer, average, scaler, generators, position; the schedule is pure."""
        return {
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
            "progression": asdict(self.progression),
        }

    def load(self, run_folder: Path | None) -> None:
        """Restores the newest state in a run folder that is whole, and says which; without one nothing is changed.

        Processes beside the first one, which have no folder, get it from that one.

        Raises:
            UserError: It is that of another version or of another configuration.
        """
        newest = self.world.from_first(None if run_folder is None else newest_state(run_folder))
        if newest is None:
            print("no state was saved: beginning at the first step")
            return
        state, path = newest
        try:
            self.model.load_state_dict(state["model"])
            if self.averaged is not None:
                self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.progression = Progression(**state["progression"])
            self.best = None if state["best"] is None else Best(**state["best"])
            set_random_state(state["random"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{str(path)!r} is the state of another configuration: {reason}") from None
        print(f"going on from {path}: {self.progression.step} steps, {self.progression.epoch} epochs are done")


def prepare(
    config: RunConfig, hardware: Hardware, model: nn.Module, steps_per_epoch: int, world: World = ALONE
) -> Training:
    """Returns a training of `model`, moved to the device, at its first step. `lr_min` and `lr_max` are numbers."""
    model = model.to(hardware.device, memory_format=hardware.memory_format)  # type: ignore[call-overload]
    averaged = None if config.ema_decay is None else copy.deepcopy(model).requires_grad_(False)
    if config.compile:
        model.compile()
    return Training(
        config=config,
        hardware=hardware,
        model=model,
        network=world.network(model),
        averaged=averaged,
        optimizer=build_optimizer(
            config, model, fused=hardware.autocast_dtype is not torch.float16, steps_per_epoch=steps_per_epoch
        ),
        scaler=hardware.scaler(),
        criterion=build_criterion(config, model),
        schedule=build_schedule(config, steps_per_epoch),
        progression=Progression(),
        world=world,
    )


def train_step(
    training: Training, images: Tensor, labels: Tensor, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Makes one optimizer step on images (B, 3, H, W) float32 and labels (B,) int64, on the device.

    Args:
        training: Changed by the step.
        images: The batch, or what this process takes of it.
        labels: Those of the images.
        batch_size: Images of the whole batch, if several processes share it.

    Returns:
        The loss and the number of correct predictions before the step: float32 scalars still on the device. In a world
        of several processes the batch's loss is the mean of theirs, and its correct predictions are the sum.
    """
    factor = training.world.begin_step(batch_size or len(labels), training.config.seed, training.progression.step)
    with training.hardware.autocast():
        logits = counted(training.network(images))
    labels = counted(labels)
    loss = training.criterion(logits, labels, factor)
    training.optimizer.zero_grad(set_to_none=True)
    training.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if training.config.grad_clip is not None:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), training.config.grad_clip)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.averaged is not None and training.config.ema_decay is not None:
        first = training.progression.step == 0
        update_average(training.averaged, training.model, 0.0 if first else training.config.ema_decay)
    correct = (logits.detach().argmax(1) == labels).sum()
    return loss.detach(), correct


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Makes parameters and buffers of `average` decay * themselves + (1 - decay) * the model's; counters are copied.

    torch's AveragedModel does the same, but waits for the device at every call to read how many there were.
    """
    ours, theirs = ([*module.parameters(), *module.buffers()] for module in (average, model))
    floats = [number for number, tensor in enumerate(ours) if tensor.is_floating_point()]
    move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    move([ours[number] for number in floats], [theirs[number] for number in floats], None)
    for counter, current in zip(ours, theirs, strict=True):
        if not counter.is_floating_point():
            counter.copy_(current)


class BatchRows:
    """Rows of batches whose loss and accuracy are still on the device, each with its own step."""

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self._rows: list[dict[str, float]] = []
        self._values: list[Tensor] = []
        self._since = time.perf_counter()

    def add(self, row: dict[str, float], images: int, loss: Tensor, correct: Tensor) -> None:
        """Keeps a row; loss and correct are scalars on the device, which is not waited for."""
        self._rows.append({**row, "images": images})
        self._values.append(torch.stack([loss.float(), correct.float()]))

    def due(self) -> bool:
        """Tells whether it is time to flush."""
        return len(self._rows) >= FLUSH_STEPS or time.perf_counter() - self._since >= FLUSH_SECONDS

    def flush(self, seconds_before: float) -> list[dict[str, float]]:
        """Waits for the device, and other processes, and returns the rows in order, complete; then there are none.

        `images_per_second` is that of all the flushed batches: no single batch is waited for, so none has its own.
        `seconds` counts from the run's start: `seconds_before` and the time since the last flush, evenly spread.
        """
        if not self._rows:
            return []
        values = self._world.summed(torch.stack(self._values)).tolist()
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        total_images = sum(row["images"] for row in self._rows)
        rows = []
        for number, (row, (loss, correct)) in enumerate(zip(self._rows, values, strict=True), start=1):
            images = row["images"]
            rows.append(
                {
                    **row,
                    "train/loss": loss / self._world.size,
                    "train/accuracy": correct / images,
                    "images_per_second": total_images / elapsed,
                    "seconds": seconds_before + elapsed * number / len(self._rows),
                }
            )
        self._rows, self._values = [], []
        return rows

    def restart_clock(self) -> None:
        """Leaves out the time since the last flush: it was not spent on training."""
        self._since = time.perf_counter()


class Journal:
    """A CSV file of the run folder that rows are appended to."""

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self.path, self.columns = path, tuple(columns)
        if not path.exists():
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(self.columns)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows; keys that are no columns are left out."""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerows(rows)

    def rows(self) -> Iterator[Row]:
        """Yields the rows as they were appended, numbers of each kind included.

        Raises:
            UserError: One holds something else than numbers.
        """
        for row in self._whole_rows():
            try:
                yield {name: int(text) if text.isdecimal() else float(text) for name, text in row.items()}
            except ValueError as error:
                raise UserError(f"{str(self.path)!r} is damaged: {error}; start the run anew") from None

    def _whole_rows(self) -> list[dict[str, str]]:
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]

    def keep(self, key: str, numbers: range) -> None:
        """Drops the rows that a resumed run will write again, and one that a crash cut short.

        Args:
            key: The column that numbers the rows.
            numbers: The rows that are to be there, each once and in order.

        Raises:
            UserError: They are not.
        """
        rows = [row for row in self._whole_rows() if row[key].isdecimal() and int(row[key]) < numbers.stop]
        if [int(row[key]) for row in rows] != list(numbers):
            raise UserError(
                f"{str(self.path)!r} is damaged: the rows of {key} {numbers.start} to {numbers.stop - 1} must be "
                "there, each once and in order; start the run anew"
            )

        def write(temporary: Path) -> None:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.path, write)


class SilentJournal(Journal):
    """That of a process beside the one that writes: nothing comes of it."""

    def __init__(self) -> None:
        self.path, self.columns = Path(os.devnull), ()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def rows(self) -> Iterator[Row]:
        return iter(())

    def keep(self, key: str, numbers: range) -> None:
        pass


def fit(
    training: Training,
    train_loader: TrainLoader,
    watched_batches: Iterable[tuple[Tensor, Tensor]],
    watched: str,
    folder: Path | None,
    tracker: Tracker,
    stop_asked: Callable[[], bool],
    ends_early: Callable[[Mapping[str, Any]], bool] = lambda row: False,
) -> str:
    """Trains until the configured end, and after every epoch evaluates, keeps the best weights and saves the state.

    Args:
        training: Changed as it goes on, from its own position.
        train_loader: Batches of an epoch as a pure function of (seed, epoch, batch).
        watched_batches: The split that is evaluated after each epoch, every image once.
        watched: That split's name, val or test: the first part of its metrics' names.
        folder: Where history.csv, epochs.csv, best.safetensors and the states go; None in processes beside the first.
        tracker: Gets one row a batch and one row an epoch.
        stop_asked: Asked after every batch, also of an evaluation; if so, the state is saved and training ends.
        ends_early: Told each epoch's row; if it says yes, a sweep has seen enough, and training ends.

    Returns:
        finished, diverged (a loss was not finite: the last logged one), interrupted or stopped (early, by a sweep).
    """
    config, now, world = training.config, training.progression, training.world
    history, epochs = journals(folder, watched)
    history.keep("trainer/step", range(now.step))
    epochs.keep("epoch", range(1, now.epoch + 1))
    # Of these the tracker sends what a run that was killed had no time to send.
    for row in logged_rows(folder, watched):
        tracker.log(row)
    last_step = min(config.epochs * len(train_loader), config.max_steps or math.inf)
    progress = Progress(config.epochs, len(train_loader), bar=folder is not None)
    saver: Saver = SilentSaver()
    if folder is not None:
        saver = Saver(folder, (history.path, epochs.path), training.tensors(), training.best)

    with saver:
        while not now.ended:
            progress.start_epoch(now.epoch + 1, now.batch)
            training.model.train()
            rows = BatchRows(world)
            for images, labels in train_loader.epoch(now.epoch, now.batch) if now.step < last_step else ():
                rates = training.schedule(now.step, now.losses)
                set_rates(training.optimizer, rates.lr, rates.momentum, now.step, freezes=world.size == 1)
                batch_size = min(config.batch_size, train_loader.num_images - now.batch * config.batch_size)
                loss, correct = train_step(training, *training.hardware.to_device(images, labels), batch_size)
                row = {
                    "trainer/step": now.step,
                    "epoch": now.epoch + (now.batch + 1) / len(train_loader),
                    "lr": rates.lr,
                    "momentum": rates.momentum,
                }
                rows.add(row, batch_size, loss, correct)
                now.step += 1
                now.batch += 1
                ends = now.step == last_step or now.batch == len(train_loader)
                # What one process wishes all do, at the same batch.
                stops, saves, flushes = world.agree(stop_asked(), save_is_due(config, now, saver), rows.due())
                saves = stops or saves
                if ends or saves or flushes:
                    flushed = rows.flush(now.seconds)
                    if log_batches(flushed, now, history, tracker, progress):
                        now.ended = "diverged"
                        break
                if saves:
                    saver.save(training.state())
                    rows.restart_clock()
                if stops:
                    return "interrupted"
                if ends:
                    break

            if now.ended:  # the state of before is the last good one, and stays
                break
            world.share_buffers(training.evaluated)
            evaluation = evaluate(training.evaluated, until(stop_asked, watched_batches), training.hardware, world)
            if any(world.agree(stop_asked())):  # it may be of a part of the images: a resumed run evaluates again
                saver.save(training.state())
                return "interrupted"
            end_epoch(now, evaluation)
            row = epoch_row(now, evaluation, watched)
            epochs.append([row])
            tracker.log(row)
            progress.end_epoch(watched, evaluation)
            if now.best_epoch == now.epoch:
                metrics = {f"{watched}/accuracy": evaluation.accuracy, "epoch": now.epoch, "step": now.step}
                saver.keep_best(training.evaluated.state_dict(), {**training.facts, **metrics})
            now.batch, now.epoch_loss, now.epoch_correct, now.epoch_images, now.epoch_seconds = 0, 0.0, 0.0, 0, 0.0
            (early,) = world.agree(
                ends_early(row)
            )  # told before the epoch counts as done: if this process dies, it is told again
            if not math.isfinite(evaluation.loss):
                now.ended = "diverged"
            elif now.epoch == config.epochs or now.step >= last_step:
                now.ended = "finished"
            elif early:
                now.ended = "stopped"
            elif saver.affordable():
                saver.save(training.state())
        saver.save(training.state() if now.ended != "diverged" else None)
    return now.ended


def save_is_due(config: RunConfig, now: Progression, saver: Saver) -> bool:
    """Tells whether the state is to be saved within an epoch: at the steps asked for, or after ten minutes."""
    if config.save_steps is not None and now.step % config.save_steps == 0:
        return True
    return saver.idle_seconds() >= SAVE_SECONDS and saver.affordable()


def until(stop_asked: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yields batches until it is asked to stop."""
    return itertools.takewhile(lambda batch: not stop_asked(), batches)


def journals(folder: Path | None, watched: str) -> tuple[Journal, Journal]:
    """Returns the journals of a run folder, of its batches and of its epochs; silent ones of none."""
    if folder is None:
        return SilentJournal(), SilentJournal()
    return Journal(folder / "history.csv", BATCH_COLUMNS), Journal(folder / "epochs.csv", epoch_columns(watched))


def logged_rows(folder: Path | None, watched: str) -> Iterator[Row]:
    """Yields the rows of a run folder's batches and epochs as they were logged: an epoch's after its last batch."""
    history, epochs = journals(folder, watched)
    return heapq.merge(history.rows(), epochs.rows(), key=lambda row: row["trainer/step"])


def log_batches(
    rows: list[dict[str, float]], now: Progression, history: Journal, tracker: Tracker, progress: Progress
) -> bool:
    """Logs flushed rows and adds them to the epoch's sums, up to and including the first loss that is not finite.

    Returns:
        Whether there was one. The steps after it don't count: the position is set back to it.
    """
    for number, row in enumerate(rows):
        if not math.isfinite(row["train/loss"]):
            surplus = len(rows) - number - 1
            now.step, now.batch = now.step - surplus, now.batch - surplus
            rows = rows[: number + 1]
            break
    history.append(rows)
    for row in rows:
        images = row.pop("images")
        now.epoch_loss += row["train/loss"] * images
        now.epoch_correct += row["train/accuracy"] * images
        now.epoch_images += int(images)
        tracker.log(row)
    if rows:
        now.epoch_seconds += rows[-1]["seconds"] - now.seconds
        now.seconds = rows[-1]["seconds"]
        progress.update(len(rows), rows[-1]["train/loss"], now.batch - 1, now.epoch_correct / now.epoch_images)
    return bool(rows) and not math.isfinite(rows[-1]["train/loss"])


def end_epoch(now: Progression, evaluation: Evaluation) -> None:
    """Takes an epoch's evaluation into the progression: `epoch` counts the ended ones now."""
    now.epoch += 1
    now.losses.append(evaluation.loss)
    now.last_accuracy = evaluation.accuracy
    # Of equally accurate epochs the one with the lower loss is better.
    if math.isfinite(evaluation.loss) and (evaluation.accuracy, -evaluation.loss) > (now.best_accuracy, -now.best_loss):
        now.best_accuracy, now.best_loss, now.best_epoch = evaluation.accuracy, evaluation.loss, now.epoch


def epoch_columns(watched: str) -> tuple[str, ...]:
    """Returns the columns of epochs.csv, which are the keys of an epoch's row."""
    of_watched = (f"{watched}/{name}" for name in ("loss", "accuracy", "accuracy_best", "epoch_best"))
    of_train = (f"train_epoch/{name}" for name in ("loss", "accuracy", "seconds"))
    return ("epoch", "trainer/step", *of_train, *of_watched)


def epoch_row(now: Progression, evaluation: Evaluation, watched: str) -> dict[str, float]:
    """Returns the row of the epoch that just ended; `*_best` is the best so far, and never falls."""
    values = (
        *(now.epoch, now.step - 1),
        *(now.epoch_loss / now.epoch_images, now.epoch_correct / now.epoch_images, now.epoch_seconds),
        *(evaluation.loss, evaluation.accuracy, now.best_accuracy, now.best_epoch),
    )
    return dict(zip(epoch_columns(watched), values, strict=True))
