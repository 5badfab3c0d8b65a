"""Data sets, fixed splits and channel statistics of eva.data."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from eva.config import UserError
from eva.data import Dataset, Split, channel_statistics, hold_out, limit, load_dataset
from eva.image_cache import IMAGE_SIZE

SHIPPED = Path(__file__).parents[2] / "shared" / "cifar10"


def make_split(sizes: list[int], shuffle_seed: int = 0) -> Split:
    """Image i is filled with i; class k has sizes[k] images, in mixed order."""
    labels = np.random.default_rng(shuffle_seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    images = np.empty((len(labels), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    images[:] = np.arange(len(labels)).reshape(-1, 1, 1, 1)
    return Split(images, labels, np.array([f"train/{i:05d}" for i in range(len(labels))]))


def make_folder(root: Path, size: tuple[int, int] = (32, 32), per_class: int = 3, suffix: str = ".png") -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(per_class):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}{suffix}")
    return root


def load_folder(root: Path, data_dir: Path) -> Dataset:
    return load_dataset(f"folder:{root}", data_dir)


def opencv_image(path: Path) -> np.ndarray:
    """A second decoder: RGB of shape (H, W, 3)."""
    return np.asarray(cv2.imread(str(path)))[..., ::-1]


# --- what load_dataset takes ---


@pytest.mark.parametrize("data", ["cifar", "digit", "folder", ""])
def test_unknown_data_is_refused_with_the_known_names(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown data .*cifar10, digits, folder:PATH"):
        load_dataset(data, tmp_path)


def test_unknown_data_tells_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load_dataset("digit", tmp_path)


# --- digits ---


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", Path("unused"))


def test_digits_are_all_of_scikit_learn_scaled_to_bytes_and_upscaled(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    assert digits.classes == tuple("0123456789")
    assert len(digits.train) + len(digits.test) == len(source.images) == 1797
    for split in (digits.train, digits.test):
        assert split.images.shape == (len(split), 32, 32, 3) and split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert (split.as_array() == split.as_array()[..., :1]).all(), "the three channels must be equal"
    # Independent reference: torch's bilinear interpolation. Each image is within rounding of its source.
    reference = torch.nn.functional.interpolate(
        torch.from_numpy(source.images)[:, None], (32, 32), mode="bilinear", align_corners=False
    )
    expected = reference.flatten(1) * 255 / 16
    found = torch.from_numpy(np.concatenate([digits.train.images, digits.test.images])[..., 0]).double().flatten(1)
    origin = torch.cdist(found, expected).argmin(dim=1)
    assert sorted(origin.tolist()) == list(range(1797))
    torch.testing.assert_close(found, expected[origin], rtol=0, atol=0.5 + 1e-4)
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    assert (labels == source.target[origin]).all()


def test_digits_hold_a_fifth_of_each_class_for_test(digits: Dataset) -> None:
    train, test = np.bincount(digits.train.labels), np.bincount(digits.test.labels)
    assert test.tolist() == [round(0.2 * size) for size in (train + test).tolist()]


def test_digits_ids_name_split_and_index(digits: Dataset) -> None:
    assert digits.train.ids[17] == "train/00017"
    assert digits.test.ids[-1] == f"test/{len(digits.test) - 1:05d}"


def test_digits_train_and_test_share_no_image(digits: Dataset) -> None:
    def digest(split: Split) -> list[bytes]:
        return [hashlib.sha256(image).digest() for image in split.as_array()]

    assert not set(digest(digits.train)) & set(digest(digits.test))


# --- CIFAR-10 ---


class TouchesFile:
    """Makes a file when it is unpickled: evidence that something was unpickled that should not have been."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, (str(self.path), "w"))


@pytest.fixture
def closed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every download goes to a loopback port that nobody listens on."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_cifar10_without_network_names_the_offline_choices(closed_network: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not fetch https://.*--data=digits.*--data=folder:PATH.*tar\.gz"):
        load_dataset("cifar10", tmp_path)


def test_cifar10_with_wrong_extracted_files_is_refused_without_unpickling(closed_network: None, tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(TouchesFile(marker)))
    with pytest.raises(UserError, match="could not fetch"):
        load_dataset("cifar10", tmp_path)
    assert not marker.exists()
    pickle.loads((folder / "test_batch").read_bytes()).close()
    assert marker.exists(), "the test would have seen an unpickled file"


def test_cifar10_with_a_wrong_archive_is_refused_without_extracting(closed_network: None, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        data = pickle.dumps(TouchesFile(tmp_path / "unpickled"))
        member = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz has a wrong checksum"):
        load_dataset("cifar10", tmp_path)
    assert not (tmp_path / "cifar-10-batches-py").exists() and not (tmp_path / "unpickled").exists()


def test_cifar10_reads_an_archive_of_verified_batches(
    closed_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A small archive in the official format, read with its own checksums in place of the official ones."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    classes = [f"class{k}" for k in range(10)]

    def batch() -> dict[str, Any]:
        return {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [9, 0, 3, 3]}

    batches = {name: batch() for name in ("data_batch_1", "data_batch_2", "test_batch")}
    contents = {name: pickle.dumps(value) for name, value in batches.items()}
    contents["batches.meta"] = pickle.dumps({"label_names": classes})
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    sums = {name: hashlib.md5(data).hexdigest() for name, data in contents.items()}
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})

    dataset = load_dataset("cifar10", tmp_path)
    assert dataset.classes == tuple(classes)
    assert dataset.train.labels.tolist() == [9, 0, 3, 3] * 2
    assert dataset.train.ids[[0, 7]].tolist() == ["train/00000", "train/00007"]
    # The published layout of a row: 1024 red values, then green, then blue, each row by row.
    row = batches["data_batch_2"]["data"][1]
    for channel, y, x in [(0, 0, 0), (1, 0, 5), (2, 31, 31), (0, 7, 30)]:
        assert dataset.train.images[5][y, x, channel] == row[1024 * channel + 32 * y + x]

    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(b"broken")
    with pytest.raises(UserError, match="has a wrong checksum; delete"):
        load_dataset("cifar10", tmp_path)


def test_cifar10_in_a_folder_that_cannot_be_made_is_refused(closed_network: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep CIFAR-10 in data_dir='.*file/data'"):
        load_dataset("cifar10", tmp_path / "file" / "data")


# --- image folders: what is read ---


def test_folder_of_32x32_images_comes_back_unchanged(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    dataset = load_folder(root, tmp_path / "data")
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.ids.tolist() == [f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]
    assert dataset.test.ids[0] == "test/cat/0.png"
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and dataset.train.labels.dtype == np.int64
    for image, name in zip(dataset.train.images, dataset.train.ids, strict=True):
        reference = opencv_image(root / name)
        assert (image == reference).all()


def test_folder_reads_nested_files_and_every_extension_and_ignores_the_rest(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=1)
    image = Image.new("RGB", (32, 32), (250, 10, 20))
    (root / "train" / "cat" / "deep" / "er").mkdir(parents=True)
    for name in [
        "deep/er/a.PNG",
        "b.JPG",
        "c.jpeg",
        "d.bmp",
        "e.webp",
        "f.tif",
        "g.TIFF",
        "h.gif",
        "i.ppm",
        "ü日.png",
    ]:
        image.save(root / "train" / "cat" / name)
    (root / "train" / "cat" / ".hidden.png").write_bytes(b"not an image")
    (root / "train" / "cat" / ".cache").mkdir()
    (root / "train" / "cat" / ".cache" / "x.png").write_bytes(b"not an image")
    (root / "train" / "cat" / "notes.txt").write_text("notes")
    (root / "train" / ".git").mkdir()
    (root / "train" / "readme.md").write_text("notes")
    train = load_folder(root, tmp_path / "data").train
    assert (train.labels == 0).sum() == 11 and (train.labels == 1).sum() == 1
    red = [
        train.images[i][16, 16] for i, name in enumerate(train.ids) if "/cat/0.png" not in name and train.labels[i] == 0
    ]
    np.testing.assert_allclose(red, np.tile([250, 10, 20], (10, 1)), atol=6)  # JPEG and WebP are lossy


def test_grey_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=1)
    cat = root / "train" / "cat"
    Image.new("L", (32, 32), 77).save(cat / "grey.png")
    Image.new("RGBA", (32, 32), (10, 20, 30, 0)).save(cat / "transparent.png")
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 40, 50, 60])
    palette.save(cat / "palette.png", transparency=b"\x00\x10")
    train = load_folder(root, tmp_path / "data").train
    pixel = {Path(name).stem: train.images[i][0, 0].tolist() for i, name in enumerate(train.ids)}
    assert (pixel["grey"], pixel["transparent"], pixel["palette"]) == ([77] * 3, [10, 20, 30], [40, 50, 60])


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=1)
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(root / "train" / "cat" / "turned.png", exif=exif)
    train = load_folder(root, tmp_path / "data").train
    image = train.images[train.ids.tolist().index("train/cat/turned.png")]
    assert (image == np.rot90(pixels, k=-1)).all()


def test_larger_images_are_averaged_over_areas(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", size=(64, 96))
    dataset = load_folder(root, tmp_path / "data")
    for image, name in zip(dataset.train.images, dataset.train.ids, strict=True):
        pixels = np.asarray(Image.open(root / name), float)  # (96, 64, 3)
        means = pixels.reshape(32, 3, 32, 2, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(image, means, atol=0.51)


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (300, 5), (5, 300), (32, 7)])
def test_images_of_any_size_become_32x32_with_the_same_colour(size: tuple[int, int], tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=1)
    Image.new("RGB", size, (9, 99, 199)).save(root / "test" / "dog" / "0.png")
    assert (load_folder(root, tmp_path / "data").test.images[1] == (9, 99, 199)).all()


def test_a_wide_flat_image_is_averaged_along_its_width(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=1)
    stripes = np.zeros((8, 320, 3), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(root / "train" / "cat" / "0.png")
    assert (load_folder(root, tmp_path / "data").train.images[0] == 100).all()


def test_shipped_cifar10_images_decode_as_opencv_decodes_them(tmp_path: Path) -> None:
    if not SHIPPED.is_dir():
        pytest.skip(f"no folder {SHIPPED.name} of shared images beside the repository")
    command = [sys.executable, str(SHIPPED / "unpack.py"), str(tmp_path / "images"), "--per-class", "10"]
    subprocess.run(command, check=True, capture_output=True)
    dataset = load_folder(tmp_path / "images", tmp_path / "data")
    assert len(dataset.train) == len(dataset.test) == 100 and len(dataset.classes) == 10
    for image, name in zip(dataset.test.images, dataset.test.ids, strict=True):
        reference = opencv_image(tmp_path / "images" / name)
        np.testing.assert_allclose(image.astype(int), reference.astype(int), atol=4)  # two JPEG decoders


# --- image folders: the cache ---


def cache_files(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "cache").iterdir())


def assert_same_dataset(first: Dataset, second: Dataset) -> None:
    assert first.fingerprint == second.fingerprint
    for split, other in ((first.train, second.train), (first.test, second.test)):
        assert np.array_equal(split.images, other.images)
        assert (split.labels == other.labels).all() and (split.ids == other.ids).all()


def test_the_second_load_reads_the_cache_and_writes_nothing(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    first = load_folder(root, tmp_path / "data")
    (cached,) = cache_files(tmp_path / "data")
    written = cached.stat()
    assert_same_dataset(first, load_folder(root, tmp_path / "data"))
    (again,) = cache_files(tmp_path / "data")
    assert (again.stat().st_ino, again.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_a_changed_file_of_the_same_size_and_date_is_decoded_again(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=1, suffix=".bmp")
    before = load_folder(root, tmp_path / "data")
    path = root / "train" / "cat" / "0.bmp"
    status = path.stat()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    after = load_folder(root, tmp_path / "data")
    assert (after.train.images[0] == (1, 2, 3)).all()
    assert after.fingerprint != before.fingerprint


def test_a_moved_or_renamed_folder_has_the_same_cache_and_fingerprint(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    before = load_folder(root, tmp_path / "data")
    after = load_folder(root.rename(tmp_path / "moved"), tmp_path / "data")
    assert len(cache_files(tmp_path / "data")) == 1
    assert_same_dataset(before, after)


def in_memory(dataset: Dataset) -> Dataset:
    """Returns the data set without the file of the cache, for a test that damages that file in its place."""
    train, test = (replace(split, images=np.asarray(split.images)) for split in (dataset.train, dataset.test))
    return replace(dataset, train=train, test=test)


def test_damaged_caches_are_built_again(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    expected = in_memory(load_folder(root, tmp_path / "data"))
    (cached,) = cache_files(tmp_path / "data")
    intact = cached.read_bytes()
    flips = []
    for position in np.linspace(0, len(intact) - 1, 60).astype(int):
        damaged = bytearray(intact)
        damaged[position] ^= 0xFF
        flips.append(bytes(damaged))
    wrong_shape = io.BytesIO()
    np.savez(wrong_shape, images=np.zeros((2, 32, 32, 3), np.uint8))
    pickled = io.BytesIO()
    np.savez(pickled, images=np.array([TouchesFile(tmp_path / "unpickled")], object))
    for content in [
        b"",
        b"noise",
        intact[: len(intact) // 2],
        wrong_shape.getvalue(),
        pickled.getvalue(),
        *flips,
    ]:
        cached.write_bytes(content)
        assert_same_dataset(expected, load_folder(root, tmp_path / "data"))
    assert not (tmp_path / "unpickled").exists()


def test_a_failed_build_leaves_no_file_behind(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / "train" / "cat" / "0.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"1 unreadable image.*train/cat/0\.png"):
        load_folder(root, tmp_path / "data")
    assert cache_files(tmp_path / "data") == []


def test_a_data_dir_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data_dir must be writable, but '.*file/data/cache' is not"):
        load_folder(root, tmp_path / "file" / "data")


def test_any_number_of_threads_gives_the_same_images(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", size=(40, 40), per_class=10)
    one = load_dataset(f"folder:{root}", tmp_path / "one", workers=1)
    four = load_dataset(f"folder:{root}", tmp_path / "four", workers=4)
    assert_same_dataset(one, four)


# --- image folders: mistakes ---


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs an existing folder, but got PATH='.*/nowhere'"):
        load_folder(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UserError, match=r"needs an existing folder, but got PATH=''"):
        load_dataset("folder:", tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_split_is_named(split: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    remove(root / split)
    with pytest.raises(UserError, match=f"has no folder '{split}'"):
        load_folder(root, tmp_path / "data")


def test_a_split_without_classes_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
    with pytest.raises(UserError, match=r"train' must hold a folder of images per class"):
        load_folder(tmp_path / "images", tmp_path / "data")


def test_classes_that_differ_are_named_on_both_sides(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / "test" / "cat").rename(root / "test" / "cats")
    with pytest.raises(UserError, match="missing from test: cat; only in test: cats"):
        load_folder(root, tmp_path / "data")


def test_empty_class_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    remove(root / "train" / "dog")
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="class 'dog' of train is empty"):
        load_folder(root, tmp_path / "data")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", ".gif", ".ppm"])
@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_truncated_image_is_named(suffix: str, kept: float, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", size=(48, 48), suffix=suffix)
    path = root / "test" / "dog" / f"1{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UserError, match=rf"1 unreadable image.*: test/dog/1\{suffix} \(.+\)"):
        load_folder(root, tmp_path / "data")


def test_jpeg_without_its_end_marker_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", suffix=".jpg")
    path = root / "train" / "cat" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train/cat/2\.jpg \(image file is truncated"):
        load_folder(root, tmp_path / "data")


def test_a_format_that_is_not_listed_is_refused_whatever_its_name(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    Image.new("RGB", (32, 32)).save(root / "train" / "cat" / "a.png", format="EPS")
    Image.new("RGB", (32, 32)).save(root / "train" / "cat" / "b.png", format="PCX")
    with pytest.raises(
        UserError, match=r"2 unreadable .*a\.png \(not an image of a known format\), .*b\.png \(not an image"
    ):
        load_folder(root, tmp_path / "data")


def test_sixteen_bit_image_is_refused_instead_of_clipped(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(root / "train" / "cat" / "deep.png")
    with pytest.raises(UserError, match=r"train/cat/deep\.png \(more than 8 bits a channel"):
        load_folder(root, tmp_path / "data")


def test_many_unreadable_images_are_counted_and_the_first_three_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=5)
    for index in range(5):
        (root / "train" / "cat" / f"{index}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"5 unreadable image.*cat/0\.png.*cat/1\.png.*cat/2\.png.* and 2 more") as told:
        load_folder(root, tmp_path / "data")
    assert "\n" not in str(told.value)


# --- fixed splits ---


def test_hold_out_takes_the_rounded_share_of_each_class_and_keeps_the_order() -> None:
    split = make_split([20, 33, 46])
    train, val = hold_out(split, 0.1, 3)
    assert np.bincount(val.labels).tolist() == [2, 3, 5]
    assert np.bincount(train.labels).tolist() == [18, 30, 41]
    assert sorted([*train.ids, *val.ids]) == split.ids.tolist()
    for part in (train, val):
        assert part.ids.tolist() == sorted(part.ids)
        indices = [int(name.removeprefix("train/")) for name in part.ids]
        assert (part.as_array() == split.images[indices]).all() and (part.labels == split.labels[indices]).all()


def test_hold_out_does_not_depend_on_global_random_state() -> None:
    split = make_split([20, 20])
    np.random.seed(1)
    first = hold_out(split, 0.25, 2)[1].ids
    np.random.seed(2)
    assert (first == hold_out(split, 0.25, 2)[1].ids).all()


def test_hold_out_is_the_same_split_as_ever() -> None:
    """Recorded once: results of different versions can be compared only on the same split."""
    split = Split(np.zeros((20, 1, 1, 3), np.uint8), np.repeat([0, 1], 10), np.arange(20).astype(str))
    assert hold_out(split, 0.3, 2)[1].ids.tolist() == ["2", "8", "9", "10", "12", "16"]


def test_hold_out_of_nothing_leaves_val_empty() -> None:
    split = make_split([3, 4])
    train, val = hold_out(split, 0.0, 2)
    assert (train.ids == split.ids).all()
    assert len(val) == 0 and val.images.shape == (0, 32, 32, 3)


@pytest.mark.parametrize(("sizes", "fraction"), [([20, 4], 0.1), ([20, 1], 0.6), ([20, 0], 0.5), ([5, 5], 0.95)])
def test_hold_out_that_empties_a_class_is_refused(sizes: list[int], fraction: float) -> None:
    with pytest.raises(UserError, match=f"val_fraction must leave every class .*but got {fraction} with"):
        hold_out(make_split(sizes), fraction, 2)


@pytest.mark.parametrize("count", [2, 3, 7, 10, 61, 99, 100])
@pytest.mark.parametrize("sizes", [[50, 50], [90, 10], [1, 99], [99, 1]])
def test_limit_returns_exactly_count_images_in_proportion(count: int, sizes: list[int]) -> None:
    split = make_split(sizes)
    part = limit(split, count, 2)
    assert len(part) == count and len(set(part.ids)) == count
    assert part.ids.tolist() == sorted(part.ids)
    shares = np.bincount(part.labels, minlength=2)
    assert (shares >= 1).all() and (shares <= sizes).all()
    # One image of each class first, the rest in proportion: at most one from the exact quota each.
    exact = 1 + (count - 2) * (np.array(sizes) - 1) / (sum(sizes) - 2)
    assert (np.abs(shares - exact) < 1).all()


def test_limit_of_balanced_classes_differs_by_at_most_one_image() -> None:
    shares = np.bincount(limit(make_split([30] * 7), 100, 7).labels)
    assert shares.sum() == 100 and shares.max() - shares.min() == 1


def test_limit_is_fixed() -> None:
    split = make_split([40, 40])
    assert (limit(split, 11, 2).ids == limit(split, 11, 2).ids).all()


@pytest.mark.parametrize("count", [0, 1, 13])
def test_limit_outside_the_possible_is_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"between 2 \(one per class\) and 12 \(all images\), but got {count}"):
        limit(make_split([6, 6]), count, 2)


def test_limit_of_a_class_without_images_is_refused() -> None:
    with pytest.raises(UserError, match="class number 1 has none"):
        limit(make_split([6, 0]), 3, 2)


# --- statistics ---


def test_channel_statistics_agree_with_numpy_in_double_precision() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2500, 8, 8, 3), dtype=np.uint8)
    images[..., 1] //= 3
    mean, deviation = channel_statistics(images)
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(deviation, scaled.std(axis=(0, 1, 2)), rtol=1e-9)


def test_channel_statistics_of_one_colour_have_no_deviation() -> None:
    images = np.full((3, 4, 4, 3), (0, 51, 255), np.uint8)
    assert channel_statistics(images) == ((0.0, 0.2, 1.0), (0.0, 0.0, 0.0))


def test_channel_statistics_of_black_and_white_are_exact() -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1] = 255
    assert channel_statistics(images) == ((0.5,) * 3, (0.5,) * 3)
