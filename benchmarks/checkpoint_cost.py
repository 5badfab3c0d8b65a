"""What saving costs: how long training stands still for it, and its share of the time, at the default interval.

    python benchmarks/checkpoint_cost.py [--model=resnet18] [--images=2000] [--epochs=6]

Trains on random images, tracking disabled, and measures inside the run: the seconds in which the loop waited for a
save, and the processor seconds of the thread that writes, both as a share of the training time. Two runs, one with
saving and one without, would differ by the machine's noise rather than by this.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eva import checkpoints, data, loaders, loop, policies
from eva.config import Layer, resolve
from eva.experiment import build_model
from eva.hardware import choose_hardware
from eva.tracker import Tracker


class TimedSaver(checkpoints.Saver):
    """Notes how long each call kept the loop, and what the writing thread computed."""

    blocked: list[float]
    written: list[float]

    def keep_best(self, weights: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        super().keep_best(weights, facts)
        self.blocked.append(time.perf_counter() - started)

    def save(self, state: Mapping[str, Any] | None) -> None:
        started = time.perf_counter()
        super().save(state)
        self.blocked.append(time.perf_counter() - started)

    def _bring_to_the_disk(self, *arguments: Any) -> None:
        started = time.thread_time()
        super()._bring_to_the_disk(*arguments)
        self.written.append(time.thread_time() - started)


MOST_SHARE, MOST_SECONDS = 0.02, 0.1


def main() -> int:
    """Trains, and prints what the saves cost; returns 1 if that is more than 2 % of the time, or 100 ms at once."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--ema_decay", type=float)
    arguments = parser.parse_args()
    TimedSaver.blocked, TimedSaver.written = [], []
    loop.Saver = TimedSaver  # type: ignore[attr-defined]
    settings = {"model": arguments.model, "epochs": arguments.epochs, "peak_epoch": 1, "lr_max": 0.1, "batch_size": 128}
    config, _ = resolve([Layer("benchmark", {**settings, "ema_decay": arguments.ema_decay})])
    hardware = choose_hardware(config)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (arguments.images, 32, 32, 3), np.uint8)
    labels = generator.integers(0, 10, arguments.images)
    split = data.Split(images, labels, np.array([str(number) for number in range(len(images))]))
    loader = loaders.train_loader(split, policies.build_policy("test", (0.5,) * 3, (0.25,) * 3), 128, 0, None)
    watched = [(torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64))]
    training = loop.prepare(config, hardware, build_model(config, 10), len(loader))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        loop.fit(training, loader, watched, "val", Path(folder), Tracker(), lambda: False)
        seconds = time.perf_counter() - started
        sizes = [path.stat().st_size / 1e6 for path in Path(folder, "state").iterdir()]
    blocked, written = sorted(TimedSaver.blocked), TimedSaver.written
    print(f"{arguments.model}, {hardware.precision}: {config.epochs} epochs of {len(images)} images, {seconds:.1f} s")
    print(f"{len(written)} writes of {max(sizes):.0f} MB; processor seconds of the writing thread: {sum(written):.2f}")
    print(
        f"the loop stood still {len(blocked)} times, in all {sum(blocked):.3f} s, {100 * sum(blocked) / seconds:.2f} %;"
    )
    print(f"milliseconds each: median {1e3 * blocked[len(blocked) // 2]:.1f}, max {1e3 * blocked[-1]:.1f}")
    threads = torch.get_num_threads()
    share = (sum(blocked) + sum(written) / threads) / seconds
    print(f"with the writing thread's share of {threads} cores: {100 * share:.2f} % of the training time")
    if share <= MOST_SHARE and blocked[-1] <= MOST_SECONDS:
        return 0
    print(f"above the limits: {100 * MOST_SHARE:g} % and {1e3 * MOST_SECONDS:g} ms")
    return 1


if __name__ == "__main__":
    sys.exit(main())
