"""The training loop against loops written here, and against itself: interrupted, repeated, with workers."""

import csv
import functools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eva import checkpoints, loop
from eva.checkpoints import newest_state
from eva.config import Layer, RunConfig, UserError, resolve
from eva.data import Split, channel_statistics, limit, load_dataset
from eva.evaluation import Evaluation
from eva.hardware import Hardware
from eva.loaders import TrainLoader, train_loader
from eva.loop import BATCH_COLUMNS, Journal, Training, epoch_columns, fit, prepare
from eva.policies import build_policy
from eva.progress import Progress
from eva.run_folder import saved_states, state_number
from eva.schedules import build_schedule
from eva.tracker import RecordingTracker

FP32 = Hardware(torch.device("cpu"), None, torch.contiguous_format)
CLOCK = ("images_per_second", "seconds", "train_epoch/seconds")
# One network and one optimizer in fp32, with other kernels: rounding, amplified over a few steps.
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@functools.cache
def digits(count: int) -> tuple[Split, Split]:
    """`count` training images, and 40 of the test images to watch."""
    dataset = load_dataset("digits", Path("unused"))
    return limit(dataset.train, count, 10), dataset.test.take(slice(0, 40))


def make_config(**settings: Any) -> RunConfig:
    plain = {"data": "digits", "policy": "test", "batch_size": 20, "epochs": 2, "workers": 0, "schedule": "constant"}
    plain["augmentation"] = "albumentations"  # the only one that knows workers
    config, _ = resolve([Layer("test", {**plain, "lr_max": 0.05, **settings})])
    return config


def make_loader(config: RunConfig, images: int) -> TrainLoader:
    train, _ = digits(images)
    policy = build_policy(config.policy, *channel_statistics(train.images))
    workers, how = config.workers, config.augmentation
    return train_loader(train, policy, config.batch_size, config.seed, workers, augmentation=how)


def watched_batches(images: int) -> list[tuple[Tensor, Tensor]]:
    train, test = digits(images)
    policy = build_policy("test", *channel_statistics(train.images))
    return [(torch.stack([policy(image, None) for image in test.images]), torch.from_numpy(test.labels))]


def make_model(config: RunConfig) -> nn.Module:
    torch.manual_seed(config.seed)
    # Smooth, so that a rounding error stays one: at a kink it would choose another gradient.
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 5, stride=2), nn.BatchNorm2d(8), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(config.dropout), nn.Linear(8 * 49, 10)),
    )


@dataclass
class Trained:
    """What came of `fit`."""

    status: str
    training: Training
    tracker: RecordingTracker
    folder: Path

    @property
    def batch_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.tracker.rows if "train/loss" in row]

    @property
    def epoch_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.tracker.rows if "train/loss" not in row]

    def csv(self, name: str) -> list[dict[str, str]]:
        with open(self.folder / name, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def run(
    folder: Path,
    config: RunConfig,
    images: int = 100,
    *,
    stop_at: float = math.inf,
    stop: Callable[[], bool] = lambda: False,
    resume: bool = False,
    watched: str = "val",
    spy: Callable[[Training, RecordingTracker], None] = lambda training, tracker: None,
    ends_early: Callable[[Mapping[str, Any]], bool] = lambda row: False,
    hardware: Hardware = FP32,
) -> Trained:
    """Trains the small network; `spy` is called after every step."""
    folder.mkdir(exist_ok=True)
    loader = make_loader(config, images)
    training = prepare(config, hardware, make_model(config), len(loader))
    if resume:
        training.load(folder)
    tracker = RecordingTracker()

    def stop_asked() -> bool:
        spy(training, tracker)
        return training.progression.step >= stop_at or stop()

    status = fit(training, loader, watched_batches(images), watched, folder, tracker, stop_asked, ends_early)
    return Trained(status, training, tracker, folder)


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def assert_equal_weights(left: nn.Module, right: nn.Module) -> None:
    assert left.state_dict().keys() == right.state_dict().keys()
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, right.state_dict()[name]), name


# Rows


@pytest.mark.parametrize(("schedule", "momentum_min"), [("onecycle", 0.5), ("cosine", None), ("step", None)])
def test_there_is_one_row_a_batch_and_one_row_an_epoch(
    tmp_path: Path, schedule: str, momentum_min: float | None
) -> None:
    config = make_config(schedule=schedule, momentum_min=momentum_min, peak_epoch=1, lr_steps=[1], epochs=3)
    done = run(tmp_path / "run", config, images=90)  # batches of 20, 20, 20, 20, 10
    assert done.status == "finished"
    assert all(tuple(sorted(row)) == tuple(sorted(BATCH_COLUMNS)) for row in done.batch_rows)
    assert [row["trainer/step"] for row in done.batch_rows] == list(range(15))
    assert [row["epoch"] for row in done.batch_rows] == [(step + 1) / 5 for step in range(15)]
    rates = build_schedule(config, 5)
    expected = [rates(step, []) for step in range(15)]
    assert [(row["lr"], row["momentum"]) for row in done.batch_rows] == [(r.lr, r.momentum) for r in expected]
    seconds = [row["seconds"] for row in done.batch_rows]
    assert seconds == sorted(seconds) and seconds[0] > 0

    assert all(tuple(row) == epoch_columns("val") for row in done.epoch_rows)
    assert [(row["epoch"], row["trainer/step"]) for row in done.epoch_rows] == [(1, 4), (2, 9), (3, 14)]
    assert sum("val/accuracy_best" in row for row in done.tracker.rows) == 3
    best = [row["val/accuracy_best"] for row in done.epoch_rows]
    accuracies = [row["val/accuracy"] for row in done.epoch_rows]
    assert best == [max(accuracies[: count + 1]) for count in range(3)]
    for number, row in enumerate(done.epoch_rows):
        batches = done.batch_rows[5 * number : 5 * number + 5]
        for name in ("loss", "accuracy"):  # means over images: the last batch has 10
            mean = sum(b[f"train/{name}"] * size for b, size in zip(batches, [20] * 4 + [10], strict=True)) / 90
            assert row[f"train_epoch/{name}"] == pytest.approx(mean, rel=1e-12)


def test_an_epochs_row_comes_after_its_batches_and_before_the_next_ones(tmp_path: Path) -> None:
    done = run(tmp_path / "run", make_config(), images=60)
    assert ["val/loss" in row for row in done.tracker.rows] == [False, False, False, True] * 2


def test_csv_files_hold_what_the_tracker_got(tmp_path: Path) -> None:
    done = run(tmp_path / "run", make_config(), watched="test")
    assert done.csv("history.csv") == [{key: str(row[key]) for key in BATCH_COLUMNS} for row in done.batch_rows]
    assert done.csv("epochs.csv") == [{key: str(value) for key, value in row.items()} for row in done.epoch_rows]
    assert "test/accuracy_best" in done.epoch_rows[0]


def test_max_steps_ends_within_an_epoch_and_that_one_is_evaluated(tmp_path: Path) -> None:
    done = run(tmp_path / "run", make_config(max_steps=7))
    assert done.status == "finished"
    assert [row["trainer/step"] for row in done.batch_rows] == list(range(7))
    assert [row["trainer/step"] for row in done.epoch_rows] == [4, 6]


def test_rows_are_fetched_together_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "FLUSH_STEPS", 3)
    monkeypatch.setattr(loop, "FLUSH_SECONDS", math.inf)
    arrived = []
    done = run(
        tmp_path / "run",
        make_config(batch_size=10),
        images=80,
        spy=lambda _, tracker: arrived.append(sum("train/loss" in row for row in tracker.rows)),
    )
    # Asked after each of 8 steps, before they are fetched, before the evaluation's only batch, and after it: groups of
    # 3, 3 and 2.
    assert arrived == [0, 0, 0, 3, 3, 3, 6, 6, 8, 8, 8, 8, 8, 11, 11, 11, 14, 14, 16, 16]
    assert [row["trainer/step"] for row in done.batch_rows] == list(range(16))


class CountScalars(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the tensors whose value python asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("extras", [{}, {"grad_clip": 1.0, "ema_decay": 0.9, "l1": 1e-4}])
def test_no_batch_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extras: dict[str, float]
) -> None:
    monkeypatch.setattr(loop, "FLUSH_SECONDS", math.inf)
    calls: Counter[str] = Counter()

    def counted(name: str) -> None:
        original = getattr(Tensor, name)

        def call(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(tensor, *arguments, **options)

        monkeypatch.setattr(Tensor, name, call)

    config = make_config(batch_size=4, **extras)
    run(tmp_path / "first", make_config(epochs=1), images=160)  # so that data and policy are there
    for name in ("tolist", "__bool__", "__float__", "__int__"):
        counted(name)
    after_a_step: dict[int, int] = {}
    with CountScalars() as scalars:  # type: ignore[no-untyped-call]

        def note(training: Training, _: RecordingTracker) -> None:
            after_a_step.setdefault(training.progression.step, scalars.count)

        done = run(tmp_path / "run", config, images=160, spy=note)
    assert len(done.batch_rows) == 80
    # 40 steps an epoch are fetched as 32 and 8; the sums of each evaluation are all else that is asked for.
    assert calls["tolist"] == 4 + 2
    assert sum(calls[name] for name in ("__bool__", "__float__", "__int__")) == 0
    for steps in (range(1, 41), range(41, 81)):
        assert len({after_a_step[step] for step in steps}) == 1


# Against a loop by hand


def by_hand(config: RunConfig, images: int = 100) -> Iterator[tuple[float, nn.Module]]:
    """Yields each step's loss and the model after it: SGD with Nesterov momentum written out (Sutskever 2013)."""
    loader, model = make_loader(config, images), make_model(config)
    model.train()
    parameters = list(model.parameters())
    speeds = [torch.zeros_like(parameter) for parameter in parameters]
    for epoch in range(config.epochs):
        for inputs, labels in loader.epoch(epoch):
            log_probabilities = model(inputs).log_softmax(1)
            s = config.label_smoothing
            targets = (1 - s) * torch.eye(10)[labels] + s / 10
            loss = -(targets * log_probabilities).sum(1).mean()
            loss = loss + config.l1 * sum(p.abs().sum() for p in parameters if config.decay_norm_and_bias or p.ndim > 1)
            gradients = list(torch.autograd.grad(loss, parameters))
            if config.grad_clip is not None:
                norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))
                assert norm > config.grad_clip  # or the test would show nothing
                gradients = [gradient * (config.grad_clip / norm) for gradient in gradients]
            with torch.no_grad():
                for parameter, speed, gradient in zip(parameters, speeds, gradients, strict=True):
                    decays = config.decay_norm_and_bias or parameter.ndim > 1
                    gradient = gradient + (config.weight_decay if decays else 0) * parameter
                    speed.mul_(config.momentum).add_(gradient)
                    parameter.sub_(float(config.lr_max) * (gradient + config.momentum * speed))
            yield loss.item(), model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grad_clip": 0.2},
        {"l1": 1e-2},
        {"l1": 1e-2, "decay_norm_and_bias": False, "weight_decay": 0.1},
        {"label_smoothing": 0.2},
    ],
)
def test_losses_and_weights_are_those_of_a_loop_by_hand(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = make_config(**settings)
    done = run(tmp_path / "run", config)
    losses, models = zip(*by_hand(config), strict=True)
    close(torch.tensor([row["train/loss"] for row in done.batch_rows]), torch.tensor(losses))
    for name, tensor in done.training.model.state_dict().items():
        close(tensor, models[-1].state_dict()[name])


def test_train_accuracy_is_that_of_the_predictions_before_the_step(tmp_path: Path) -> None:
    config = make_config(epochs=1)
    done = run(tmp_path / "run", config)
    model = make_model(config).train()
    images, labels = next(iter(make_loader(config, 100).epoch(0)))
    right = [int(logits.argmax()) == int(label) for logits, label in zip(model(images), labels, strict=True)]
    assert done.batch_rows[0]["train/accuracy"] == sum(right) / 20


def test_the_average_is_the_closed_form_over_all_weights_so_far(tmp_path: Path) -> None:
    decay = 0.8
    weights: list[dict[str, Tensor]] = []

    def keep(training: Training, _: RecordingTracker) -> None:
        if len(weights) < training.progression.step:
            weights.append({name: tensor.clone() for name, tensor in training.model.state_dict().items()})

    done = run(tmp_path / "run", make_config(ema_decay=decay), spy=keep)
    plain = run(tmp_path / "plain", make_config())
    assert_equal_weights(done.training.model, plain.training.model)  # averaging changes nothing of the training
    steps = len(weights)
    assert steps == 10
    shares = [decay ** (steps - 1)] + [(1 - decay) * decay ** (steps - 1 - step) for step in range(1, steps)]
    assert sum(shares) == pytest.approx(1)
    for name, average in done.training.evaluated.state_dict().items():
        if average.is_floating_point():
            expected = sum(share * step[name].double() for share, step in zip(shares, weights, strict=True))
            torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(average, weights[-1][name])
    assert done.epoch_rows[-1]["val/loss"] != plain.epoch_rows[-1]["val/loss"]  # it is the average that is evaluated


def test_a_few_dozen_images_are_learned(tmp_path: Path) -> None:
    done = run(tmp_path / "run", make_config(epochs=25), images=60)
    assert done.epoch_rows[-1]["train_epoch/accuracy"] >= 0.98
    assert done.epoch_rows[-1]["val/accuracy"] > 0.5  # of ten classes, never seen


# Determinism


def test_the_same_seed_gives_the_same_run_for_any_number_of_workers(tmp_path: Path) -> None:
    settings = {"policy": "digits", "dropout": 0.2}
    first = run(tmp_path / "first", make_config(**settings))
    again = run(tmp_path / "again", make_config(**settings))
    workers = run(tmp_path / "workers", make_config(**settings, workers=2))
    other = run(tmp_path / "other", make_config(**settings, seed=1))
    for same in (again, workers):
        assert_equal_weights(same.training.model, first.training.model)
        assert without_clock(same.tracker.rows) == without_clock(first.tracker.rows)
    assert without_clock(other.tracker.rows) != without_clock(first.tracker.rows)


# Divergence


def test_a_loss_that_is_not_finite_ends_the_run_with_its_own_row_as_the_last(tmp_path: Path) -> None:
    done = run(tmp_path / "run", make_config(lr_max=1e12, epochs=9), images=100)
    losses = [row["train/loss"] for row in done.batch_rows]
    assert done.status == "diverged"
    assert not math.isfinite(losses[-1]) and all(map(math.isfinite, losses[:-1]))
    assert len(losses) == len(done.csv("history.csv")) == done.training.progression.step
    assert done.tracker.rows[-1] == done.batch_rows[-1]


def test_divergence_leaves_the_best_weights_and_the_state_of_before(tmp_path: Path) -> None:
    def spoil(training: Training, _: RecordingTracker) -> None:
        if training.progression.epoch == 1:
            with torch.no_grad():
                next(training.model.parameters()).fill_(math.nan)

    done = run(tmp_path / "run", make_config(lr_max=0.05, epochs=9), spy=spoil)
    whole = run(tmp_path / "whole", make_config(lr_max=0.05, epochs=9), ends_early=lambda row: True)
    assert (done.status, whole.status) == ("diverged", "stopped")
    assert [row["trainer/step"] for row in done.batch_rows] == list(range(7))  # 5 of the first epoch, one before NaN
    assert len(done.epoch_rows) == 1
    left, right = (load_file(folder / "best.safetensors") for folder in (done.folder, whole.folder))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    before, good = (state_of(folder) for folder in (done.folder, whole.folder))
    assert before["progression"]["step"] == 5 and good["model"].keys() == before["model"].keys()
    assert all(torch.equal(tensor, good["model"][name]) for name, tensor in before["model"].items())


# Resume


def state_of(folder: Path) -> dict[str, Any]:
    found = newest_state(folder)
    assert found is not None
    return found[0]


EVERYTHING: dict[str, Any] = {
    **{"policy": "digits", "dropout": 0.3, "ema_decay": 0.7, "epochs": 4, "lr_max": 0.4},
    **{"schedule": "plateau", "patience": 1, "lr_min": 1e-4, "momentum": 0.95},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return run(tmp_path_factory.mktemp("whole") / "run", make_config(**EVERYTHING))


@pytest.mark.parametrize(
    ("stop_at", "workers"), [(3, 0), (5, 0), (12, 0), (13, 2), (19, 0)], ids=lambda value: str(value)
)
def test_an_interrupted_run_that_goes_on_is_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: Trained, stop_at: int, workers: int
) -> None:
    config = make_config(**EVERYTHING, workers=workers)
    first = run(tmp_path / "run", config, stop_at=stop_at)
    assert first.status == "interrupted"
    assert len(first.csv("history.csv")) == stop_at
    torch.rand(3)  # the generators are elsewhere by now
    second = run(tmp_path / "run", config, resume=True)
    assert second.status == "finished"
    assert without_clock(second.tracker.rows) == without_clock(uninterrupted.tracker.rows)  # W&B takes what it lacks
    for name in ("history.csv", "epochs.csv"):
        assert without_clock(second.csv(name)) == without_clock(uninterrupted.csv(name))
    for model in ("model", "averaged"):
        assert_equal_weights(getattr(second.training, model), getattr(uninterrupted.training, model))
    expected, best = (load_file(folder / "best.safetensors") for folder in (uninterrupted.folder, second.folder))
    assert expected.keys() == best.keys() and all(torch.equal(best[name], expected[name]) for name in best)


@pytest.mark.parametrize("stop_at", [3, 5, 8])
def test_a_run_whose_batches_are_made_as_a_whole_goes_on_too(tmp_path: Path, stop_at: int) -> None:
    config = make_config(**{**EVERYTHING, "epochs": 2}, augmentation="batched")
    whole = run(tmp_path / "whole", config)
    assert run(tmp_path / "run", config, stop_at=stop_at).status == "interrupted"
    second = run(tmp_path / "run", config, resume=True)
    assert without_clock(second.tracker.rows) == without_clock(whole.tracker.rows)
    assert_equal_weights(second.training.model, whole.training.model)
    by_image = run(tmp_path / "by_image", make_config(**{**EVERYTHING, "epochs": 2}))
    assert without_clock(by_image.tracker.rows) != without_clock(whole.tracker.rows)


def test_the_scale_of_half_precision_goes_on_too(tmp_path: Path) -> None:
    half = Hardware(torch.device("cpu"), torch.float16, torch.contiguous_format)

    def narrow(training: Training, _: RecordingTracker) -> None:
        training.scaler.set_growth_interval(3)  # so that it changes within the run

    config = make_config(epochs=3, save_steps=1)
    whole = run(tmp_path / "whole", config, spy=narrow, hardware=half)
    run(tmp_path / "run", config, stop_at=7, spy=narrow, hardware=half)
    second = run(tmp_path / "run", config, resume=True, spy=narrow, hardware=half)
    assert second.training.scaler.state_dict() == whole.training.scaler.state_dict()
    assert whole.training.scaler.get_scale() != 2.0**16  # where it began
    assert without_clock(second.tracker.rows) == without_clock(whole.tracker.rows)
    assert_equal_weights(second.training.model, whole.training.model)


def test_the_plateau_of_the_interrupted_run_did_drop_the_rate(uninterrupted: Trained) -> None:
    assert len({row["lr"] for row in uninterrupted.batch_rows}) > 1


@pytest.mark.parametrize(("settings", "steps"), [({}, 10), ({"max_steps": 7}, 7), ({}, 5)])
def test_a_wish_to_stop_is_granted_before_the_end_of_an_epochs_evaluation(
    tmp_path: Path, settings: dict[str, int], steps: int
) -> None:
    asked = 0

    def count(training: Training, _: RecordingTracker) -> None:
        nonlocal asked
        asked += training.progression.step == steps

    def stop_in_the_evaluation() -> bool:
        return asked >= 2  # after the last step, then before the first batch of the evaluation

    stopped = run(tmp_path / "run", make_config(**settings), spy=count, stop=stop_in_the_evaluation)
    assert stopped.status == "interrupted" and len(stopped.epoch_rows) == (steps > 5)
    done = run(tmp_path / "run", make_config(**settings), resume=True)
    whole = run(tmp_path / "whole", make_config(**settings))
    assert done.status == "finished" and without_clock(done.tracker.rows) == without_clock(whole.tracker.rows)
    assert_equal_weights(done.training.model, whole.training.model)


def test_a_sweep_that_has_seen_enough_ends_the_run_after_that_epoch(tmp_path: Path) -> None:
    """It is told every epoch's row; what is there by then is that of a run that was never to be longer."""
    told: list[Mapping[str, Any]] = []

    def after_two(row: Mapping[str, Any]) -> bool:
        told.append(row)
        return bool(row["epoch"] >= 2)

    stopped = run(tmp_path / "stopped", make_config(epochs=4), ends_early=after_two)
    whole = run(tmp_path / "whole", make_config(epochs=2))
    assert (stopped.status, whole.status) == ("stopped", "finished")
    assert told == stopped.epoch_rows
    assert without_clock(stopped.tracker.rows) == without_clock(whole.tracker.rows)
    assert_equal_weights(stopped.training.model, whole.training.model)
    assert {path.name for path in stopped.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}


def test_a_sweep_that_has_seen_enough_after_the_last_epoch_ends_nothing_early(tmp_path: Path) -> None:
    assert run(tmp_path, make_config(epochs=1), ends_early=lambda row: True).status == "finished"
    assert run(tmp_path / "steps", make_config(max_steps=3), ends_early=lambda row: True).status == "finished"


@pytest.mark.parametrize(("share", "states"), [(1e9, 10), (0.0, 2)])
def test_a_long_epoch_is_saved_within_as_far_as_saving_costs_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, states: int
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)  # every epoch is long
    monkeypatch.setattr(checkpoints, "SAVING_SHARE", share)
    done = run(tmp_path / "run", make_config(), spy=lambda *_: time.sleep(0.05))
    assert done.status == "finished"
    number = state_number(saved_states(tmp_path / "run")[0])
    assert number >= states if share else number <= states


def test_a_run_goes_on_from_the_state_before_if_the_newest_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", make_config(save_steps=2), stop_at=7)
    newest, before = saved_states(tmp_path / "run")  # the last two are kept
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = run(tmp_path / "run", make_config(save_steps=2), resume=True)
    whole = run(tmp_path / "whole", make_config())
    warned = capsys.readouterr().err
    assert f"warning: the state {str(newest)!r} is damaged" in warned and str(before) in warned
    assert without_clock(done.tracker.rows) == without_clock(whole.tracker.rows)
    assert_equal_weights(done.training.model, whole.training.model)


def test_a_killed_run_goes_on_from_its_last_saved_step_and_drops_later_rows(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(training: Training, _: RecordingTracker) -> None:
        if training.progression.step == 8:
            raise Killed

    config = make_config(save_steps=3)
    with pytest.raises(Killed):
        run(tmp_path / "run", config, spy=kill)
    with open(tmp_path / "run" / "history.csv", "a", encoding="utf-8") as file:
        file.write("7,1.6,2.3,0.1,0.05,0.9,1.0,1.0\r\n1")  # a later row, and one that was cut short
    done = run(tmp_path / "run", config, resume=True)
    whole = run(tmp_path / "whole", make_config())
    assert without_clock(done.csv("history.csv")) == without_clock(whole.csv("history.csv"))
    assert_equal_weights(done.training.model, whole.training.model)


def test_a_state_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", make_config(epochs=1))
    with pytest.raises(UserError, match=r"state/000001-[0-9a-f]{32}\.pt' is the state of another"):
        run(tmp_path / "run", make_config(epochs=1, ema_decay=0.9), resume=True)


def test_a_journal_keeps_the_wanted_rows_and_leaves_out_other_keys(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "file.csv", ("a", "b"))
    journal.append([{"a": number, "b": math.nan, "c": 5} for number in range(4)])
    Journal(tmp_path / "file.csv", ("a", "b")).keep("a", range(2))
    assert (tmp_path / "file.csv").read_text().split() == ["a,b", "0,nan", "1,nan"]


@pytest.mark.parametrize("content", [None, "", "a,b\n0,1\n", "a,b\n0,1\n2,1\n", "a,b\n0,1\nx1,1\n", "a,b\n1,1\n0,1\n"])
def test_a_journal_that_lacks_rows_is_damaged(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "file.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"file\.csv' is damaged: the rows of a 0 to 1 must be there, each once"):
        Journal(path, ("a", "b")).keep("a", range(2))


# The terminal


def test_without_a_terminal_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(epochs=3, batches=4)
    progress.start_epoch(1, 0)
    progress.update(3, 2.0, 2, 0.25)
    progress.update(1, 1.5, 3, 0.5)
    progress.end_epoch("val", Evaluation(loss=0.25, accuracy=0.75, count=8))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("EPOCH= 1 Loss= 1.5000 Batch_id= 3 Accuracy= 50.00 4/4 ")
    assert lines[1:] == ["val: loss 0.2500, accuracy 6/8 (75.00 %), epoch 1/3"]


def test_on_a_terminal_progress_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(epochs=3, batches=4)
    progress.start_epoch(2, 1)
    progress.update(3, 1.5, 3, 0.5)
    progress.end_epoch("val", Evaluation(loss=0.25, accuracy=0.75, count=8))
    shown = capsys.readouterr()
    assert "EPOCH= 2 Loss= 1.5000 Batch_id= 3 Accuracy= 50.00: 100%" in shown.err
    assert "4/4" in shown.err and "it/s" in shown.err
    assert shown.out == "val: loss 0.2500, accuracy 6/8 (75.00 %), epoch 2/3\n"


def test_half_precision_trains_without_the_fused_optimizer() -> None:
    # torch's fused SGD takes uninitialized memory for its momentum if the first scaled gradients overflow.
    half = Hardware(torch.device("cpu"), torch.float16, torch.contiguous_format)
    single = Hardware(torch.device("cpu"), None, torch.contiguous_format)
    for hardware, fused in ((half, False), (single, True)):
        training = prepare(make_config(), hardware, nn.Linear(2, 2), steps_per_epoch=1)
        assert all(group["fused"] is fused for group in training.optimizer.param_groups)
