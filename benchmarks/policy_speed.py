"""Images per second of policies: whole batches by eva's tensor operations, against Albumentations image by image.

    python benchmarks/policy_speed.py [--policies crop_flip_cutout ...] [--batch 512] [--rounds 9] [--device cuda]

One thread, uint8 images in memory in, normalized float32 out. The two take turns, so that what else the machine does
meets both, and each round gives a ratio of times; on a CPU those are of the processor. On a GPU the batches are made as
the loader makes them, of 4,096 images at once, and the ratio is that of one GPU to one core. It exits with 1 if the
median ratio of `crop_flip_cutout` is below 10.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from eva import data, policies
from eva.batched import Draws, require_batched
from eva.loaders import IMAGES_AT_ONCE

JUDGED, LEAST_RATIO = "crop_flip_cutout", 10.0
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
ROUND_SECONDS = 0.25  # of each of the two in a round


def main() -> None:
    """Measures, prints a table, and exits with 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policies", nargs="+", default=list(policies.policy_names()))
    parser.add_argument("--batch", type=int, help="images at once; default: 128, on a GPU as the loader")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="synthetic", help="synthetic, or as for eva train")
    parser.add_argument("--data_dir", default="data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    device = torch.device(arguments.device)
    count = arguments.batch or (IMAGES_AT_ONCE if device.type == "cuda" else 128)
    images = chosen_images(arguments.data, arguments.data_dir, count)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "one core"
    print(f"batches of {count} on {name}, torch {torch.__version__}, OpenCV {cv2.__version__}")
    print("| policy | images/s, batches: median | min | max | by image: median | ratio: median | min | max |")
    print("|---|---|---|---|---|---|---|---|")
    met = True
    for policy in arguments.policies:
        batches, singles = measured(policy, images, device, arguments.rounds)
        ratios = [many / one for many, one in zip(batches, singles, strict=True)]
        shown = [f"{value:,.0f}" for value in (*spread(batches), statistics.median(singles))]
        print(f"| `{policy}` | {' | '.join(shown)} | {' | '.join(f'{value:.1f}' for value in spread(ratios))} |")
        if policy == JUDGED:
            met = statistics.median(ratios) >= LEAST_RATIO
    if not met:
        raise SystemExit(f"{JUDGED}: the median ratio must be at least {LEAST_RATIO:g}")


def chosen_images(name: str, data_dir: str, count: int) -> NDArray[np.uint8]:
    """Returns `count` images of noise, or train images of a data set."""
    if name == "synthetic":
        return np.random.default_rng(0).integers(0, 256, (count, policies.SIZE, policies.SIZE, 3), dtype=np.uint8)
    return data.load_dataset(name, Path(data_dir)).train.images[:count]


def measured(
    name: str, images: NDArray[np.uint8], device: torch.device, rounds: int
) -> tuple[list[float], list[float]]:
    """Returns images per second of each round: of batches, and of the policy called image by image."""
    policy = policies.build_policy(name, MEAN, STD)
    equivalent = require_batched(policy).to(device)
    on_device = torch.from_numpy(np.array(images)).to(device)
    draws: Draws = tuple(drawn.to(device) for drawn in equivalent.draw(len(images), 0, 0))
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    some = images[:128]

    def batch() -> None:
        equivalent(on_device, draws)

    def singly() -> None:
        for index, image in enumerate(some):
            policy(image, (0, 0, index))

    def rate(call: Callable[[], None], num_images: int, clock: Callable[[], float]) -> float:
        calls, started = 0, clock()
        while (seconds := clock() - started) < ROUND_SECONDS:
            call()
            calls += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return calls * num_images / seconds

    batch()
    singly()
    pairs = [(rate(batch, len(images), clock), rate(singly, len(some), time.thread_time)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Returns median, least and largest."""
    return statistics.median(values), min(values), max(values)


if __name__ == "__main__":
    main()
