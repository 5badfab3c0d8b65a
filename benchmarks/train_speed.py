"""Training speed of eva beside a report-style loop and Lightning, in images a second; README.md says how to run it.

Every measurement is a fresh process. The variants take turns, round by round, so that what else the machine does
meets all of them, and they are compared within each round. Linux only: memory and CPU times are read from /proc.
"""

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wandb
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from eva import data, hardware, loaders, models, policies
from eva.config import Layer, RunConfig, UserError, resolve, to_dict
from eva.experiment import EVAL_BATCH_SIZE
from eva.image_cache import IMAGE_SIZE
from eva.loop import fit, prepare
from eva.tracker import Tracker, WandbTracker

POLICY = "crop_flip_cutout"
# A low rate, so that random labels cannot make a loss overflow: that would end eva's loop early.
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
SYNTHETIC_IMAGES = 50_000

LEAST_REPORT_RATIO = 2.5
LEAST_LIGHTNING_RATIO = 1.0
MOST_TRACKING_SHARE = 0.01
MOST_MEMORY_GIB = 3.0


# What is measured


class Clock:
    """Notes when each step ends; of `warmup` + `steps` steps, the last `steps` are timed.

    A GPU is waited for at both ends of the timed steps only. `meter` reads growing numbers; `metered` is by how much
    each grew over the timed steps. The warm-up should outlast eva's first flush (2 s), as W&B's first row takes longer.
    """

    def __init__(self, warmup: int, steps: int, meter: Callable[[], dict[str, float]] = dict) -> None:
        self.warmup, self.last = warmup, warmup + steps
        self.meter = meter
        self.ends: list[float] = []
        self.metered: dict[str, float] = {}
        self.children_bytes = 0

    def tick(self) -> None:
        """Notes that a step ended."""
        step = len(self.ends) + 1
        if step in (self.warmup, self.last) and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if step == self.warmup:
            self.metered = self.meter()
        elif step == self.last:
            self.metered = {name: value - self.metered[name] for name, value in self.meter().items()}
            self.children_bytes = children_bytes()

    def step_seconds(self) -> list[float]:
        """Returns the timed steps' durations, each from the end of the step before."""
        ends = self.ends[self.warmup - 1 : self.last]
        return [end - start for start, end in pairwise(ends)]


def descendants(pid: int | str = "self") -> Iterator[int]:
    """Yields the processes below one: loader workers, W&B's service."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            yield child
            yield from descendants(child)


def children_bytes() -> int:
    """Returns the memory of all descendants; what processes share is divided among them (Pss).

    Not the children's ru_maxrss: a process starts with the one of the process that launched it.
    """
    lines = [line for pid in descendants() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def service_seconds() -> float:
    """Returns the CPU time that W&B's service process has taken."""
    ticks = 0
    for pid in descendants():
        name, _, values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        if "wandb" in name or "gpu_stats" in name:
            ticks += sum(map(int, values.split()[11:13]))  # user and system time
    return ticks / os.sysconf("SC_CLK_TCK")


def background_seconds() -> float:
    """Returns the CPU time that this process's Python threads beside the main one have taken: W&B's."""
    threads = (thread.ident for thread in threading.enumerate() if thread is not threading.main_thread())
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in threads if ident is not None)


class TimedTracker(WandbTracker):
    """W&B's tracker, with the time that its `log` takes."""

    log_seconds = 0.0

    def log(self, row: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        super().log(row)
        self.log_seconds += time.perf_counter() - start

    def meter(self) -> dict[str, float]:
        """Returns the seconds that tracking took: of the loop, of threads beside it, of W&B's own process."""
        return {"log": self.log_seconds, "threads": background_seconds(), "service": service_seconds()}


# The variants


@dataclass(frozen=True)
class Work:
    """What all variants train on and with."""

    config: RunConfig
    train: data.Split
    test: data.Split
    policy: policies.Policy
    plain: policies.Policy
    model: nn.Module
    hardware: hardware.Hardware
    folder: Path


def build_work(arguments: argparse.Namespace, folder: Path) -> Work:
    """Loads or makes the data, and builds policies and model.

    Raises:
        UserError: The data can't be loaded, or hold fewer batches than there are steps.
    """
    steps = arguments.warmup + arguments.steps
    optimizer = {"lr_min": SGD["lr"], "lr_max": SGD["lr"], **{name: SGD[name] for name in SGD if name != "lr"}}
    settings = {"policy": POLICY, "model": "resnet18", "batch_size": arguments.batch_size, "max_steps": steps}
    config, _ = resolve([Layer("benchmark", {**settings, **optimizer})])
    if arguments.data == "synthetic":
        train, test = synthetic(SYNTHETIC_IMAGES), synthetic(EVAL_BATCH_SIZE)
    else:
        dataset = data.load_dataset(arguments.data, Path(arguments.data_dir))
        train, test = dataset.train, dataset.test
    if steps * config.batch_size > len(train):
        raise UserError(f"warmup + steps must fit into an epoch of {len(train)} images, but got {steps} steps")
    mean, std = data.channel_statistics(train.images)
    hardware.seed_everything(config.seed, deterministic=False)
    return Work(
        config=config,
        train=train,
        test=test,
        policy=policies.build_policy(POLICY, mean, std),
        plain=policies.build_policy("test", mean, std),
        model=models.build_model(config.model, num_classes=int(train.labels.max()) + 1),
        hardware=hardware.choose_hardware(config),
        folder=folder,
    )


def synthetic(count: int) -> data.Split:
    """Returns random images of ten classes."""
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % 10
    return data.Split(images, labels, np.array([f"{index:05d}" for index in range(count)]))


def run_eva(work: Work, clock: Clock, tracker: Tracker) -> None:
    """eva's own loop with its defaults, over one epoch cut short and an evaluation of one batch."""
    config = work.config
    device = work.hardware.device
    loader = loaders.train_loader(work.train, work.policy, config.batch_size, config.seed, config.workers, device)
    watched = islice(loaders.eval_loader(work.test, work.plain, EVAL_BATCH_SIZE, 0, device), 1)
    training = prepare(config, work.hardware, work.model, len(loader))

    # The loop asks after every step, before it flushes: flushes and tracking fall into the following step.
    def stop_asked() -> bool:
        clock.tick()
        return False

    with tracker:
        fit(training, loader, watched, "val", work.folder, tracker, stop_asked)


def eva_tracked(work: Work, warmup: int, steps: int) -> Clock:
    """eva with a row a batch in an offline W&B run."""
    tracker = TimedTracker(work.config, to_dict(work.config), "benchmark", work.folder, "benchmark", "offline")
    clock = Clock(warmup, steps, tracker.meter)
    run_eva(work, clock, tracker)
    return clock


def eva_untracked(work: Work, warmup: int, steps: int) -> Clock:
    """eva with tracking disabled."""
    clock = Clock(warmup, steps)
    run_eva(work, clock, Tracker())
    return clock


class PlainImages(Dataset[tuple[Tensor, int]]):
    """Images through the policy's Albumentations pipeline, as notebooks do it: nothing is reseeded."""

    def __init__(self, work: Work) -> None:
        self.split, self.pipeline = work.train, work.policy.pipeline

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pipeline(image=self.split.images[index])["image"], int(self.split.labels[index])


def plain_loader(work: Work, workers: int) -> DataLoader[tuple[Tensor, int]]:
    """Returns a plain DataLoader over shuffled, augmented images."""
    pin = torch.cuda.is_available()
    images = PlainImages(work)
    return DataLoader(images, work.config.batch_size, shuffle=True, num_workers=workers, pin_memory=pin)


def report_loop(work: Work, warmup: int, steps: int) -> Clock:
    """The loop of the reports: fp32, two workers, `.item()`, `wandb.log` and tqdm's description each step."""
    device = work.hardware.device
    model = work.model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)  # type: ignore[arg-type]
    clock = Clock(warmup, steps)
    correct = seen = 0
    with wandb.init(project="benchmark", dir=work.folder, mode="offline"):
        bar = tqdm(plain_loader(work, workers=2))
        for batch, (images, labels) in enumerate(bar):
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            correct += logits.argmax(dim=1).eq(labels).sum().item()
            seen += len(labels)
            wandb.log({"loss": loss.item(), "accuracy": correct / seen})
            bar.set_description(f"Loss={loss.item():.4f} Batch_id={batch} Accuracy={100 * correct / seen:.2f}")
            clock.tick()
            if len(clock.ends) == clock.last:
                break
    return clock


def lightning(work: Work, warmup: int, steps: int, workers: int) -> Clock:
    """Lightning with its W&B logger at every step, bf16-mixed, channels-last, fused SGD; no bar, no checkpoints."""
    # Untyped, so that mypy gives the same answer with and without it installed.
    pytorch: Any = importlib.import_module("lightning.pytorch")

    class Classifier(pytorch.LightningModule):  # type: ignore[misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model.to(memory_format=torch.channels_last)

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            images, labels = batch
            logits = self.model(images.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels)
            self.log("train/loss", loss)
            self.log("train/accuracy", (logits.argmax(1) == labels).float().mean())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), **SGD, fused=True)  # type: ignore[arg-type]

    clock = Clock(warmup, steps)
    trainer = pytorch.Trainer(
        max_steps=clock.last,
        precision="bf16-mixed",
        devices=1,
        logger=pytorch.loggers.WandbLogger(project="benchmark", save_dir=work.folder, offline=True),
        log_every_n_steps=1,
        callbacks=[pytorch.callbacks.LambdaCallback(on_train_batch_end=lambda *_: clock.tick())],
        default_root_dir=work.folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(work.model), plain_loader(work, workers))
    wandb.finish()
    return clock


VARIANTS: dict[str, Callable[[Work, int, int], Clock]] = {
    "eva": eva_tracked,
    "eva untracked": eva_untracked,
    "report-style loop": report_loop,
    "lightning, 2 workers": lambda work, warmup, steps: lightning(work, warmup, steps, workers=2),
    "lightning, 0 workers": lambda work, warmup, steps: lightning(work, warmup, steps, workers=0),
}


# One measurement, and all of them


def measure_here(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs one variant in this process and returns what was measured."""
    work = build_work(arguments, folder)
    clock = VARIANTS[arguments.variant](work, arguments.warmup, arguments.steps)
    seconds = clock.step_seconds()
    if len(seconds) != arguments.steps:
        raise RuntimeError(f"{arguments.variant} ended after {len(clock.ends)} steps")
    facts = hardware.describe(work.hardware)
    facts["versions"]["lightning"] = metadata.version("lightning")
    return {
        "variant": arguments.variant,
        "images_per_second": len(seconds) * work.config.batch_size / sum(seconds),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "children_gib": clock.children_bytes / 2**30,
        "tracking_seconds": clock.metered,
        "step_seconds": seconds,
        "facts": facts,
    }


def measure(arguments: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Runs one variant in a fresh process and returns what it measured.

    Raises:
        UserError: The process failed; the message holds the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        values = {name: getattr(arguments, name) for name in ("data", "data_dir", "batch_size", "warmup", "steps")}
        flags = [f"--{name}={value}" for name, value in {**values, "variant": variant, "out": result}.items()]
        with log.open("w") as output:
            command = [sys.executable, __file__, *flags]
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        if code:
            raise UserError(f"{variant} failed with exit code {code}:\n{log.read_text(errors='replace')[-3000:]}")
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def tracking_share(measured: Mapping[str, Any]) -> float:
    """Returns what tracking took as a share of the rest of the step time.

    An upper bound: CPU time beside the loop counts in full, as if it had held the loop up.
    """
    cost, total = sum(measured["tracking_seconds"].values()), sum(measured["step_seconds"])
    return float(cost / (total - cost))


def summarize(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns spreads of speed and memory by variant, of eva's ratios within each round, and of tracking's cost."""
    speeds = {name: [measured[name]["images_per_second"] for measured in rounds] for name in VARIANTS}
    eva = speeds["eva"]
    best_lightning = max((name for name in VARIANTS if "lightning" in name), key=lambda n: statistics.median(speeds[n]))
    return {
        "images_per_second": {name: spread(values) for name, values in speeds.items()},
        "memory_gib": {
            name: spread([measured[name]["peak_gib"] + measured[name]["children_gib"] for measured in rounds])
            for name in VARIANTS
        },
        "ratios": {
            f"eva / {name}": spread([a / b for a, b in zip(eva, speeds[name], strict=True)])
            for name in ("report-style loop", best_lightning, "eva untracked")
        },
        "best_lightning": best_lightning,
        "tracking_share": spread([tracking_share(measured["eva"]) for measured in rounds]),
    }


def check_targets(summary: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Returns each target in words, with what was measured, and whether it is met."""
    report = summary["ratios"]["eva / report-style loop"]["median"]
    beside_lightning = summary["ratios"][f"eva / {summary['best_lightning']}"]["median"]
    share = summary["tracking_share"]["median"]
    memory = summary["memory_gib"]["eva"]["max"]
    return [
        (f"eva / report-style loop >= {LEAST_REPORT_RATIO}: {report:.2f}", report >= LEAST_REPORT_RATIO),
        (
            f"eva / Lightning >= {LEAST_LIGHTNING_RATIO}: {beside_lightning:.3f}",
            beside_lightning >= LEAST_LIGHTNING_RATIO,
        ),
        (f"tracking, direct <= {MOST_TRACKING_SHARE:.0%} of step time: {share:.3%}", share <= MOST_TRACKING_SHARE),
        (f"eva's peak memory < {MOST_MEMORY_GIB} GiB: {memory:.2f} GiB", memory < MOST_MEMORY_GIB),
    ]


def markdown(summary: Mapping[str, Any], facts: Mapping[str, Any], settings: str) -> str:
    """Returns the tables."""

    def cells(values: Mapping[str, float], form: str) -> str:
        return " | ".join(format(values[name], form) for name in ("median", "min", "max"))

    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{facts['device']}, {facts['cpu_count']} cores; eva in {facts['precision']}; {settings}  ",
        versions,
        "",
        "| variant | images/s median | min | max | peak memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for name, speed in summary["images_per_second"].items():
        lines.append(f"| {name} | {cells(speed, '.1f')} | {summary['memory_gib'][name]['max']:.2f} |")
    lines += ["", "| within each round | median | min | max |", "|---|---|---|---|"]
    lines += [f"| {name} | {cells(values, '.3f')} |" for name, values in summary["ratios"].items()]
    lines.append(f"| tracking's direct cost / untracked step time | {cells(summary['tracking_share'], '.3%')} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", help="synthetic, cifar10 or folder:PATH (default: synthetic)")
    parser.add_argument("--data_dir", default="data", help="folder of downloads and of the decode cache")
    parser.add_argument("--batch_size", type=int, default=128, help="images a step")
    parser.add_argument("--warmup", type=int, default=5, help="steps left out at first")
    parser.add_argument("--steps", type=int, default=30, help="steps timed")
    parser.add_argument("--rounds", type=int, default=5, help="times that each variant is measured")
    parser.add_argument("--out", type=Path, default=Path("runs/train_speed.json"), help="JSON file of the results")
    parser.add_argument("--variant", choices=VARIANTS, help="measure only this one, once, in this process")
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "warmup", "steps", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, but got {getattr(arguments, name)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables and targets, and returns 0, or 1 if a target is missed."""
    arguments = parse(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.variant:
        with tempfile.TemporaryDirectory() as folder:
            arguments.out.write_text(json.dumps(measure_here(arguments, Path(folder))))
        return 0

    try:
        metadata.version("lightning")
    except metadata.PackageNotFoundError:
        raise UserError("lightning is not installed; pip install -e '.[benchmarks]'") from None
    rounds = []
    for number in range(1, arguments.rounds + 1):
        rounds.append({name: measure(arguments, name) for name in VARIANTS})
        speeds = ", ".join(f"{name} {measured['images_per_second']:.1f}" for name, measured in rounds[-1].items())
        print(f"round {number}/{arguments.rounds}, images/s: {speeds}", file=sys.stderr, flush=True)
    summary = summarize(rounds)
    targets = check_targets(summary)
    settings = {name: getattr(arguments, name) for name in ("data", "batch_size", "warmup", "steps", "rounds")}
    results = {
        "settings": settings,
        "platform": platform.platform(),
        "summary": summary,
        "targets": dict(targets),
        "rounds": rounds,
    }
    arguments.out.write_text(json.dumps(results, indent=1))
    described = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(markdown(summary, rounds[0]["eva"]["facts"], described))
    print()
    for text, met in targets:
        print(f"- {'met' if met else 'MISSED'}: {text}")
    return 0 if all(met for _, met in targets) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"train_speed: error: {error}", file=sys.stderr)
        sys.exit(2)
