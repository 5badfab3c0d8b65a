"""Images in the file of the cache: indexed as an array is, in a bounded memory, with the numbers they came with."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eva.stored_images
from eva.data import Split, channel_statistics, hold_out
from eva.stored_images import IMAGE_SIZE, StoredImages, moments


def drawn(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


def stored(folder: Path, images: np.ndarray) -> StoredImages:
    path = folder / "images"
    path.write_bytes(images.tobytes() + moments(images).tobytes())
    return StoredImages.open(path, len(images))


@pytest.mark.parametrize(
    "key",
    [3, -1, np.int64(5), slice(2, 9, 3), slice(0), [4, 4, 0], np.array([7, 1]), np.arange(12) % 3 == 0],
    ids=str,
)
@pytest.mark.parametrize("most", [1, 5, 2**19])
def test_each_index_gives_what_an_array_gives(
    key: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eva.stored_images, "MOST_READ", most)
    images = drawn(12)
    found = stored(tmp_path, images)
    assert found.shape == images.shape and found.dtype == images.dtype and len(found) == 12
    assert np.array_equal(found[key], images[key]) and found[key].shape == images[key].shape
    assert np.array_equal(np.asarray(found), images) and np.array_equal(list(found), images)


def test_an_index_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        stored(tmp_path, drawn(3))[3]


def test_a_file_that_became_shorter_is_an_error_and_no_image(tmp_path: Path) -> None:
    found = stored(tmp_path, drawn(3))
    with (tmp_path / "images").open("r+b") as file:
        file.truncate(3072 + 1)
    assert np.array_equal(found[0], drawn(3)[0])
    with pytest.raises(OSError, match="became shorter while it was used"):
        found[[0, 1]]


def test_what_is_taken_twice_is_what_an_array_gives(tmp_path: Path) -> None:
    images = drawn(30)
    odd, chosen = slice(1, None, 2), np.array([9, 0, 4])
    assert np.array_equal(stored(tmp_path, images).take(odd).take(chosen), images[odd][chosen])


def test_an_image_may_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    found = stored(tmp_path, drawn(3))
    found[1][:] = 0
    found[:][:] = 0
    assert np.array_equal(found, drawn(3))


def test_a_copy_for_another_process_has_the_same_images(tmp_path: Path) -> None:
    found = stored(tmp_path, drawn(9)).take([8, 2])
    sent = pickle.dumps(found)
    assert len(sent) < 3072 and np.array_equal(pickle.loads(sent), drawn(9)[[8, 2]])


def test_parts_of_a_split_are_those_of_one_in_memory(tmp_path: Path) -> None:
    images, labels, ids = drawn(40), np.arange(40) % 2, np.array([f"train/{i}" for i in range(40)], object)
    in_memory, in_file = (Split(each, labels, ids) for each in (images, stored(tmp_path, images)))
    for one, other in zip(hold_out(in_memory, 0.2, 2), hold_out(in_file, 0.2, 2), strict=True):
        assert isinstance(other.images, StoredImages)
        assert np.array_equal(one.as_array(), other.as_array()) and one.ids.tolist() == other.ids.tolist()
        assert channel_statistics(one.images) == channel_statistics(other.images)


def test_moments_are_exact_for_the_brightest_images() -> None:
    assert moments(np.full((1, 256, 256, 3), 255, np.uint8)).tolist() == [[[2**16 * 255] * 3, [2**16 * 255**2] * 3]]


# Loads a folder from the cache, and reads an epoch of shuffled batches; tells how much memory that took at most.
MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
from eva import data

def most():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

root, data_dir = map(Path, sys.argv[1:])
Path("/proc/self/clear_refs").write_text("5")  # the largest so far is forgotten
before = most()
dataset = data.load_dataset(f"folder:{root}", data_dir)
train, val = data.hold_out(dataset.train, 0.1, 1)
data.channel_statistics(train.images)
order = np.random.default_rng(0).permutation(len(train))
for start in range(0, len(train), 32):
    train.images[order[start : start + 32]]
print(json.dumps([len(dataset.train) + len(dataset.test), most() - before]))
"""


def test_memory_grows_by_a_fraction_of_an_image_for_each(tmp_path: Path) -> None:
    """Of three folders, decoded and read in processes of their own; names are hard links to a few files."""
    counts, grown = [], {"cold": list[int](), "warm": list[int]()}
    for count in (2_000, 6_000, 18_000):
        root = tmp_path / str(count)
        for split in ("train", "test"):
            (root / split / "cat").mkdir(parents=True)
        pixels = drawn(10)
        for index in range(10):
            (root / f"{index}.ppm").write_bytes(b"P6 32 32 255\n" + pixels[index].tobytes())
        for index in range(count):
            split = "test" if index % 10 == 0 else "train"
            (root / split / "cat" / f"{index:06}.ppm").hardlink_to(root / f"{index % 10}.ppm")
        for load in ("cold", "warm"):
            command = [sys.executable, "-c", MEASURE, str(root), str(tmp_path / "data")]
            number, size = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            assert number == count
            grown[load].append(size)
        counts.append(count)
    for load, sizes in grown.items():
        slope = np.polyfit(counts, sizes, 1)[0]
        assert slope < 1000, f"{load}: {slope:.0f} bytes for each of 3,072"
        assert slope * 1_000_000 < 2**30, f"{load}: a million images would take too much"
