"""Archives cannot leave their folder, and the key of an account is in nothing that is written."""

import base64
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SMALL_RUN, flags
from torchvision.datasets import CIFAR10

from eva.config import UserError
from eva.data import load_dataset
from eva.predictions import Predictions, load_images, save_images

ROOT = Path(__file__).parents[1]

# --- archives ---

ESCAPES = ("../escaped", "../../escaped.npy", "a/../../escaped", "..\\escaped")


def below(folder: Path) -> set[str]:
    """Returns everything below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_member_of_an_npz_cannot_leave_its_folder(tmp_path: Path) -> None:
    """Members are read by their names into memory, whatever else there is."""
    place = tmp_path / "deep" / "deeper"
    place.mkdir(parents=True)
    ids, labels = np.array(["a", "b"]), np.array([0, 1], np.int64)
    Predictions("test", ("x", "y"), "f" * 64, ids, labels, np.zeros((2, 2), np.float32)).save(place / "p.npz")
    save_images(place / "i.npz", ids, np.zeros((2, 8, 8, 3), np.uint8))
    for name in ("p.npz", "i.npz"):
        with zipfile.ZipFile(place / name, "a") as archive:
            for member in (*ESCAPES, str(tmp_path / "escaped")):
                archive.writestr(member, b"escaped")
    before = below(tmp_path)
    assert Predictions.load(place / "p.npz").ids.tolist() == list(load_images(place / "i.npz")) == ["a", "b"]
    assert below(tmp_path) == before


@pytest.mark.parametrize("shape", [(2**40,), (2**62, 2**62), (-1,)])
def test_an_array_that_says_it_is_larger_than_memory_is_told(tmp_path: Path, shape: tuple[int, ...]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "i.npz", "w") as archive:
        archive.writestr("ids.npy", header.getvalue() + bytes(64))
    with pytest.raises(UserError, match=r"i\.npz' is not a readable file of images: \S"):
        load_images(tmp_path / "i.npz")


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "hard link"])
def test_a_member_of_cifar10s_archive_cannot_leave_its_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even of an archive with the right checksum: the filter for data (PEP 706) is asked for."""
    outside, data = tmp_path / "outside", tmp_path / "data"
    data.mkdir()
    outside.write_text("kept")
    member = tarfile.TarInfo({"parent": "../outside", "absolute": str(outside)}.get(kind, "link"))
    if "link" in kind:
        member.type = tarfile.LNKTYPE if kind == "hard link" else tarfile.SYMTYPE
        member.linkname = "../outside" if kind == "hard link" else str(outside)
    with tarfile.open(data / "cifar-10-python.tar.gz", "w:gz") as archive:
        member.size = 0 if "link" in kind else 7
        archive.addfile(member, io.BytesIO(b"escaped"))
        if "link" in kind:
            through = tarfile.TarInfo("link")
            through.size = 7
            archive.addfile(through, io.BytesIO(b"escaped"))
    digest = hashlib.md5((data / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", digest)
    with pytest.raises(UserError, match=r"CIFAR-10 in data_dir='.*data' "):
        load_dataset("cifar10", data)
    assert outside.read_text() == "kept"
    assert all(path == "outside" or path.startswith("data") for path in below(tmp_path))


# --- the key ---

KEYS = {name: hashlib.sha1(name.encode()).hexdigest() for name in ("environment", "netrc")}
LOGIN = "an-account-of-somebody"


def commands(folder: Path) -> list[list[str]]:
    """Returns the commands of a day: train, sweep, find_lr, evaluate twice, compare."""
    small = flags({**SMALL_RUN, "tracking": "offline", "data_dir": "data", "table_rows": 3, "gallery_size": 1})
    values = {**SMALL_RUN, "epochs": 1, "schedule": "constant", "max_steps": 2}
    sweep = {
        **{"program": str(ROOT / "runners" / "train.py"), "method": "grid"},
        **{"metric": {"name": "val/accuracy_best", "goal": "maximize"}},
        "parameters": {**{name: {"value": value} for name, value in values.items()}, "seed": {"values": [0, 1]}},
    }
    (folder / "s.yaml").write_text(yaml.safe_dump(sweep))
    find = ["--find_lr_steps=12", "--find_lr_end=1.0", "--lr_max=find"]
    return [
        ["train", *small, "--evaluate=true", "--out=run"],
        ["sweep", "s.yaml", "--out=sweep", "--skip_check"],
        ["find_lr", *small, *find, "--out=found", "--write_sweep=around.yaml"],
        ["evaluate", "run", "--tta=flip", "--tracking=offline"],
        ["evaluate", "run/best.safetensors", "--tracking=offline", "--out=alone", "--gallery_size=1"],
        ["compare", "run", "alone"],
    ]


@pytest.fixture(scope="module", params=KEYS)
def day(
    request: pytest.FixtureRequest, clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str]:
    """The folder that all commands worked in, which is their home too; what they printed; and the key they knew."""
    folder, where = tmp_path_factory.mktemp(request.param), str(request.param)
    environment = {**clean_environment, "HOME": str(folder), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    if where == "environment":
        environment["WANDB_API_KEY"] = KEYS[where]
    else:
        netrc = folder.parent / f"{folder.name}.netrc"
        netrc.write_text(f"machine api.wandb.ai\n  login {LOGIN}\n  password {KEYS[where]}\n")
        netrc.chmod(0o600)
        environment["NETRC"] = str(netrc)
    todo = commands(folder)[: None if where == "environment" else 2]
    program = (
        "import json, sys\nfrom eva.cli import main\n"
        "if __name__ == '__main__':\n"
        "    for words in json.loads(sys.argv[1]):\n"
        "        assert main(words) == 0, words\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(todo)],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr, KEYS[where]


def forms(secret: str) -> list[bytes]:
    """Returns a secret as it may be written: plain, wide, reversed, within base64 at each of its three places."""
    shifted = [base64.b64encode(b"x" * shift + secret.encode())[4:-4] for shift in range(3)]
    return [secret.encode(), secret[::-1].encode(), *shifted, secret.encode("utf-16-le"), secret.encode("utf-32-le")]


def contents(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file, and those packed in it: members of archives, and every stream of zlib and gzip."""
    content = path.read_bytes()
    yield content
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    if content[:2] == b"\x1f\x8b":
        yield gzip.decompress(content)
    for begin in (b"\x78\x01", b"\x78\x9c", b"\x78\xda"):
        at = content.find(begin)
        while at >= 0:
            stream = zlib.decompressobj()
            try:
                unpacked = stream.decompress(content[at:], 2**24)
            except zlib.error:
                unpacked = b""
            yield unpacked
            at = content.find(begin, at + 1)


def holding(folder: Path, secret: str) -> list[Path]:
    """Returns the files below a folder, links included, that hold a secret in any form, or are called by it."""
    found = []
    for parent, folders, names in os.walk(folder):
        for name in folders + names:
            path = Path(parent, name)
            if (
                secret in name
                or (path.is_symlink() and secret in os.readlink(path))
                or (path.is_file() and any(form in content for content in contents(path) for form in forms(secret)))
            ):
                found.append(path)
    return found


def test_the_key_of_the_account_is_in_nothing_that_is_written_or_printed(day: tuple[Path, str, str]) -> None:
    folder, printed, key = day
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 100
    for part in ("offline-run-", "predictions.npz", "sweep/journal.log", "compare.html", ".wandb", "debug", "0001.log"):
        assert any(part in path for path in files), part
    assert holding(folder, key) == [] and holding(folder, LOGIN) == []
    assert not any(form.decode("latin-1") in printed for form in forms(key))


def test_a_key_would_be_found_wherever_it_is(tmp_path: Path) -> None:
    key = KEYS["netrc"]
    np.savez_compressed(tmp_path / "packed.npz", text=np.array([key]), more=np.zeros(999))
    (tmp_path / "basic.txt").write_text(base64.b64encode(f"api:{key}".encode()).decode())
    (tmp_path / "log.gz").write_bytes(gzip.compress(f"key={key}".encode()))
    (tmp_path / "stream").write_bytes(b"header" + zlib.compress(key.encode()) + b"rest")
    (tmp_path / key).touch()
    (tmp_path / "link").symlink_to(key)
    (tmp_path / "plain.json").write_text(json.dumps({"a": [key]}))
    (tmp_path / "clean").write_text(KEYS["environment"])
    assert {path.name for path in holding(tmp_path, key)} == below(tmp_path) - {"clean"}
