"""Image folders of many files: how long the first start takes, how long the next, and what stays in memory.

    python benchmarks/data_scale.py

Makes folders of 32x32 JPEG files, decodes them into the cache in one process, and in another one reads an epoch of
shuffled batches from there. The larger folder has many names for each file, by hard links: each name is listed, looked
at, read and decoded all the same. Exits with 1 if a target is missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

CLASSES, DISTINCT, TEST_SHARE, BATCH_SIZE = 10, 10_000, 10, 512

COLUMNS = ("seconds", "processor", "first_batch", "microseconds", "gibibytes")

# Seconds of the first and of a later load of `--files`, and to the first batch of `--many`; GiB in memory for these.
COLD, WARM, FIRST_BATCH, RESIDENT = 15.0, 1.0, 10.0, 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000, help="files of the folder that is timed")
    parser.add_argument("--many", type=int, default=1_000_000, help="files of the folder that memory is measured with")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where they are made")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load)))
        return 0
    missed = []
    print(
        "| files | load | seconds | processor, s | to the first batch, s | epoch, us an image | most in memory, GiB |"
    )
    print("|---:|---|---:|---:|---:|---:|---:|")
    for count, repeats in ((arguments.files, 3), (arguments.many, 1)):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            make_files(Path(folder), count)
            cold = measured(Path(folder))
            warm = min((measured(Path(folder)) for _ in range(repeats)), key=lambda found: found["seconds"])
        for name, found in (("cold", cold), ("warm", warm)):
            numbers = " | ".join(f"{found[key]:.2f}" for key in COLUMNS)
            print(f"| {count:,} | {name} | {numbers} |", flush=True)
        if count == arguments.files:
            limits = {"cold load": (cold["seconds"], COLD), "warm load": (warm["seconds"], WARM)}
        else:
            memory = max(cold["gibibytes"], warm["gibibytes"])
            limits = {"memory": (memory, RESIDENT), "first batch": (warm["first_batch"], FIRST_BATCH)}
        missed += [f"{name}: {got:.2f}, at most {most:g}" for name, (got, most) in limits.items() if got > most]
    print("\n".join(f"MISSED {line}" for line in missed) or "all targets met")
    return 1 if missed else 0


def make_files(folder: Path, count: int) -> None:
    """Makes `count` names of images in train and test, a tenth of them in test."""
    generator = np.random.default_rng(0)
    (folder / "distinct").mkdir()
    for index in range(min(count, DISTINCT)):
        image = cv2.resize(generator.integers(0, 256, (8, 8, 3), np.uint8), (32, 32))
        cv2.imwrite(str(folder / "distinct" / f"{index}.jpg"), image)
    for index in range(count):
        parent = folder / ("test" if index % TEST_SHARE == 0 else "train") / f"class{index // TEST_SHARE % CLASSES}"
        if index < TEST_SHARE * CLASSES:
            parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / "distinct" / f"{index % DISTINCT}.jpg", parent / f"{index:07}.jpg")
    time.sleep(3)  # what changed just now is read again


def measured(folder: Path) -> dict[str, float]:
    """Loads a folder in a process of its own."""
    command = [sys.executable, __file__, "--load", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output)
    return found


def load(folder: Path) -> dict[str, float]:
    """Does what a training does with its data, and returns how long that takes and how much memory at most."""
    from eva import data, loaders  # with torch, whose memory counts too

    began, processor = time.monotonic(), time.process_time()
    dataset = data.load_dataset(f"folder:{folder}", folder / "data")
    seconds, processor = time.monotonic() - began, time.process_time() - processor
    train, _ = data.hold_out(dataset.train, 0.1, len(dataset.classes))
    data.channel_statistics(train.images)
    batches = iter(loaders.ShuffledBatches(len(train), BATCH_SIZE, seed=0))
    np.asarray(train.images[[index for _, index in next(batches)]])
    first_batch = time.monotonic() - began
    began, images = time.monotonic(), 0
    for batch in batches:
        images += len(train.images[[index for _, index in batch]])
    microseconds = 1e6 * (time.monotonic() - began) / images
    status = Path("/proc/self/status").read_text()
    most = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    numbers = {"seconds": seconds, "processor": processor, "first_batch": first_batch, "microseconds": microseconds}
    return {**numbers, "gibibytes": most / 2**20}


if __name__ == "__main__":
    sys.exit(main())
