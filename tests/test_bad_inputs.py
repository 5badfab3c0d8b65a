"""Every bad input of the corpus is one line and exit code 2, and nothing is written, overwritten or executed.

What is odd but legal is taken, and what comes of it is told by others: OpenCV, or the formula.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bad_inputs
import cv2
import numpy as np
import pytest
import yaml
from bad_inputs import BadInput, sound_images, training
from conftest import flags
from numpy.typing import NDArray
from PIL import Image
from test_wandb_runs import Client, client, log_artifacts

from eva.cli import main
from eva.data import Dataset, load_dataset
from eva.records import read_run
from eva.sweep_file import read_sweep

__all__ = ["client"]  # the fixture

CORPUS = bad_inputs.bad_inputs()


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def listing(folder: Path) -> dict[str, str]:
    """Returns everything below a folder: digests of files, targets of links, what else there is by its kind."""
    found = {}
    for parent, folders, files in os.walk(os.fsencode(folder)):
        for name in folders + files:
            path = os.path.join(parent, name)
            mode = os.lstat(path).st_mode
            told = stat.filemode(mode)
            if stat.S_ISREG(mode):
                told += hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
            elif stat.S_ISLNK(mode):
                told += os.fsdecode(os.readlink(path))
            found[os.fsdecode(path)] = told
    return found


def refusal(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must be refused in one line, and returns that line without its prefix."""
    capsys.readouterr()
    with warnings.catch_warnings():
        # Else they would be more lines.
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        code = main(command)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2, line
    prefix = f"eva {command[0]}: error: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


UNPICKLED: list[object] = []  # what pickles asked for while they were looked for; no hook can be taken away again
looking = False


def look(event: str, arguments: tuple[object, ...]) -> None:
    """Notes each class and each function that any pickle in this process asks for."""
    if looking and event == "pickle.find_class":
        UNPICKLED.append(arguments)


sys.addaudithook(look)


@contextlib.contextmanager
def no_pickle() -> Iterator[None]:
    """Checks that none is read here that asks for anything."""
    global looking
    UNPICKLED.clear()
    looking = True
    try:
        yield
    finally:
        looking = False
    assert UNPICKLED == []


@pytest.mark.parametrize("bad", CORPUS, ids=lambda bad: f"{bad.kind}: {bad.name}")
def test_a_bad_input_is_one_line_and_changes_nothing(
    bad: BadInput, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad.make()
    before = listing(workplace)
    with no_pickle():
        line = refusal(bad.command, capsys)
    assert all(words in line for words in bad.said), line
    assert len(line) < 1000
    assert listing(workplace) == before
    assert not (workplace / "executed").exists()


def test_the_corpus_is_large_and_no_input_is_there_twice() -> None:
    assert len(CORPUS) >= 150
    assert len({(bad.kind, bad.name) for bad in CORPUS}) == len(CORPUS)
    assert all(words for bad in CORPUS for words in bad.said) and all(bad.said for bad in CORPUS)


def test_what_the_bad_inputs_are_made_of_is_sound() -> None:
    """Or they would be refused for another reason."""
    sound_images()
    assert main(training()) == 0
    bad_inputs.sound_checkpoint()
    evaluate = ("evaluate", "--tracking=disabled", "--gallery_size=0")
    assert main([*evaluate, "c.safetensors", "--out=evaluated"]) == 0
    bad_inputs.sound_run("whole")
    assert read_run(Path("whole")).notes == ()
    assert main(["compare", "whole"]) == 0 and main([*evaluate, "whole"]) == 0
    Path("s.yaml").write_text(bad_inputs.SWEEP)
    assert len(read_sweep("s.yaml").parameters) == 2
    Path("p.json").write_text(json.dumps(bad_inputs.policy(bad_inputs.FLIP)))
    sound = ["--policy=p.json", "--out=with-policy"]
    assert main([*training(), *sound]) == 0


def test_the_traps_do_work(workplace: Path) -> None:
    with pytest.raises(AssertionError, match="touch"), no_pickle():
        pickle.loads(bad_inputs.PICKLE)
    assert (workplace / "executed").is_file()
    (workplace / "executed").unlink()
    yaml.unsafe_load("!!python/object/apply:os.mkdir [executed]")
    assert (workplace / "executed").is_dir()


# --- what one may not read ---


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Is nobody for a while, if this is root, who may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


FORBIDDEN: dict[str, tuple[Callable[[], Any], tuple[str, ...], str]] = {
    "images/train/cat/1.png": (sound_images, training(), "cannot read image 'images/train/cat/1.png': Permission den"),
    "images/train/cat": (sound_images, training(), "cannot list 'images/train/cat': Permission denied"),
    "images/train": (sound_images, training(), "images/train"),
    "c.yaml": (
        bad_inputs.written("c.yaml", "epochs: 3"),
        ("train", "--config=c.yaml"),
        "cannot read 'c.yaml': Permissio",
    ),
    "s.yaml": (
        bad_inputs.written("s.yaml", bad_inputs.SWEEP),
        ("sweep", "s.yaml"),
        "s.yaml: cannot read it: Permission",
    ),
    "p.json": (
        bad_inputs.written("p.json", json.dumps(bad_inputs.policy())),
        (*training("--data=digits"), "--policy=p.json"),
        "cannot read 'p.json': Permission denied",
    ),
    "c.safetensors": (
        bad_inputs.sound_checkpoint,
        ("evaluate", "c.safetensors"),
        "'c.safetensors' is not a readable che",
    ),
    "run/summary.json": (
        bad_inputs.sound_run,
        bad_inputs.EVALUATE,
        "cannot read 'run/summary.json': Permission denied",
    ),
    "run": (bad_inputs.sound_run, bad_inputs.EVALUATE, "'run'"),
}


@pytest.mark.parametrize("path", FORBIDDEN)
def test_what_one_may_not_read_is_one_line_and_changes_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, command, said = FORBIDDEN[path]
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders may be entered by root alone
        os.chown(place, 65534 if os.geteuid() == 0 else -1, -1)
        monkeypatch.chdir(place)
        make()
        before = listing(Path(place))
        mode = Path(path).stat().st_mode
        Path(path).chmod(0)
        try:
            with nobody():
                line = refusal(command, capsys)
        finally:
            Path(path).chmod(mode)
            after = listing(Path(place))
            monkeypatch.undo()
    assert said in line
    assert after == before


# --- odd images ---


def loaded() -> Dataset:
    """Returns the image folder, read afresh."""
    return load_dataset("folder:images", Path("data"), progress=True)


def pixels_of(content: bytes, suffix: str) -> NDArray[np.uint8]:
    """Returns what eva makes of an image file (32, 32, 3)."""
    sound_images()
    path = Path("images/train/cat/1.png")
    path.unlink()
    path.with_suffix(suffix).write_bytes(content)
    train = loaded().train
    return np.asarray(train.images[train.ids.tolist().index(f"train/cat/1{suffix}")])


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """Returns an image file."""
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


COLOURS = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)


def test_cmyk_is_light_times_what_the_black_lets_through() -> None:
    found = pixels_of(encoded(Image.fromarray(COLOURS, "CMYK"), "TIFF"), ".tif")
    inks = COLOURS.astype(float) / 255
    expected = 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])
    np.testing.assert_allclose(found, expected, atol=1)


def test_cmyk_in_a_jpeg_is_what_opencv_reads() -> None:
    smooth = cv2.resize(COLOURS[:4, :4], (32, 32), interpolation=cv2.INTER_LINEAR)
    content = encoded(Image.fromarray(smooth, "CMYK"), "JPEG", quality=95)
    expected = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert expected is not None
    np.testing.assert_allclose(pixels_of(content, ".jpg").astype(int), expected[..., ::-1].astype(int), atol=6)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_an_animation_the_first_picture_is_taken(format: str) -> None:
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    content = encoded(pictures[0], format, save_all=True, append_images=pictures[1:])
    with Image.open(io.BytesIO(content)) as reread:
        assert getattr(reread, "n_frames", 1) == 3
    suffix = {"MPO": ".jpg"}.get(format, f".{format.lower()}")
    np.testing.assert_allclose(pixels_of(content, suffix), np.broadcast_to([200, 0, 0], (32, 32, 3)), atol=6)


def test_of_sixteen_bits_of_colour_the_upper_eight_are_taken() -> None:
    deep = np.random.default_rng(1).integers(0, 2**16, (32, 32, 3), np.uint16)
    written, content = cv2.imencode(".png", deep)
    assert written
    assert np.array_equal(pixels_of(content.tobytes(), ".png"), deep[..., ::-1] >> 8)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
def test_an_image_of_any_shape_is_averaged_over_its_areas(size: tuple[int, int]) -> None:
    line = np.repeat(np.linspace(0, 255, 32).round(), 625)[:, None].repeat(3, axis=1)  # (20000, 3), 32 levels
    pixels = {(1, 1): line[9999:10000, None], (20_000, 1): line[None], (1, 20_000): line[:, None]}[size]
    found = pixels_of(encoded(Image.fromarray(pixels.astype(np.uint8)), "PNG"), ".png").astype(int)
    levels = np.linspace(0, 255, 32).round()
    expected = {(1, 1): np.full((32, 32), levels[15]), (20_000, 1): np.tile(levels, (32, 1))}.get(size)
    np.testing.assert_allclose(found[..., 0], levels[:, None].repeat(32, 1) if expected is None else expected, atol=1)


def test_an_image_is_what_it_holds_whatever_it_is_called() -> None:
    picture = Image.fromarray(COLOURS[..., :3])
    assert np.array_equal(pixels_of(encoded(picture, "PNG"), ".jpg"), COLOURS[..., :3])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "YCbCr", "LAB"])
def test_every_mode_of_eight_bits_becomes_rgb(mode: str) -> None:
    grey = Image.new("L", (32, 32), 255).convert("RGB")
    white = grey if mode != "LAB" else None
    image = white.convert(mode) if white is not None else Image.new("LAB", (32, 32), (255, 128, 128))
    found = pixels_of(encoded(image, "TIFF"), ".tiff")
    np.testing.assert_allclose(found, 255, atol=2)


NAMES = (
    *("Kätzchen", "кошка", "猫", "고양이", "قطة", "חתול", "बिल्ली", "แมว"),
    *("γάτα", "\N{CAT}\u200d\N{BLACK LARGE SQUARE}", "a b'c\"d$(e);f", "<i>&amp;%s{}", "-rf", "NUL"),
)


def test_names_in_every_script_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the folders to the comparison's page, through every file between."""
    for split, count in (("train", 2), ("test", 1)):
        for name in NAMES:
            folder = Path("images", split, name)
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([*name.encode(), index]).integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}{index}.png")
    shown = {"evaluate": True, "gallery_size": 4, "table_rows": 9, "tracking": "offline", "batch_size": 7}
    assert main([*training(), *flags(shown)]) == 0
    record = read_run(Path("run"))
    assert record.predictions is not None and record.notes == ()
    assert record.predictions.classes == tuple(sorted(NAMES))
    assert record.predictions.ids.tolist() == [f"test/{name}/{name}0.png" for name in sorted(NAMES)]
    assert main(["compare", "run"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    (data,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', Path("comparison", "compare.html").read_text()
    )
    assert json.loads(data)["sets"][0]["classes"] == sorted(NAMES)


# --- what is left out of an image folder ---


def test_what_is_left_out_of_a_folder_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    sound_images()
    names = ("train/cat/a.heic", "train/cat/b.HEIC", "test/dog/c.heic", "train/dog/deep/d.jpg.txt", "train/cat/README")
    for path in (*names, "test/dog/x.svg", "test/dog/y.svg"):
        Path("images", path).parent.mkdir(exist_ok=True)
        Path("images", path).write_bytes(b"")
    Path("images/train/cat/.DS_Store").touch()
    Path("images/train/9.png").touch()
    Path("images/train/cat/linked").symlink_to("../dog")
    found = loaded()
    assert (len(found.train), len(found.test)) == (6, 4)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert line.startswith(
        "left out in 'images': 3 .heic, 2 .svg, 1 .txt, 1 images beside the folders of classes, 1 links to folders, "
        "and others (images: .bmp, "
    )


def test_of_a_folder_of_images_alone_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    sound_images()
    Path("images/train/cat/.hidden.txt").touch()
    loaded()
    assert "left out" not in capsys.readouterr().out


# --- artifacts that are not what was logged ---

PROJECT = "loopback/damaged"
MANIFEST = "wandb_manifest.json"


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], None]:
    """Returns what changes the files that the server's manifest of an artifact tells of."""

    def damage(artifact: Any) -> None:
        values = json.loads(artifact.manifest[MANIFEST])
        change(values["contents"])
        artifact.manifest = {MANIFEST: json.dumps(values).encode()}

    return damage


def bytes_at(change: Callable[[bytes], bytes]) -> Callable[[Any], None]:
    """Returns what changes the bytes that the server has, and nothing else."""

    def damage(artifact: Any) -> None:
        artifact.files = {name: change(content) for name, content in artifact.files.items()}

    return damage


ENTRY = "best.safetensors"
DAMAGED = f"{ENTRY} of artifact 'loopback/damaged/model-hostile:latest' is damaged: its digest is not the one that"
ARTIFACTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a byte changed": (bytes_at(lambda content: content[:-1] + bytes([content[-1] ^ 1])), DAMAGED),
    "a byte lost": (bytes_at(lambda content: content[:-1]), DAMAGED),
    "a byte more": (bytes_at(lambda content: content + b"!"), DAMAGED),
    "half of it": (bytes_at(lambda content: content[: len(content) // 2]), DAMAGED),
    "nothing of it": (bytes_at(lambda content: b""), DAMAGED),
    "a pickle in its place": (bytes_at(lambda content: bad_inputs.PICKLE), DAMAGED),
    "the digest of another": (manifest(lambda files: files[ENTRY].update(digest="1B2M2Y8AsgTpgAmY7PhCfg==")), DAMAGED),
    "a digest that is none": (manifest(lambda files: files[ENTRY].update(digest="?")), DAMAGED),
    "no such file told of": (manifest(lambda files: files.clear()), f"holds no {ENTRY}: eva did not log it"),
    "a file elsewhere": (manifest(lambda files: files[ENTRY].update(ref="file:///etc/passwd")), f"holds no {ENTRY}"),
    "no such file": (lambda artifact: artifact.files.clear(), "model-hostile:latest'"),
}


def without_logs(folder: Path) -> dict[str, str]:
    """Returns everything below a folder but what wandb's service goes on writing about what was logged before."""
    return {path: told for path, told in listing(folder).items() if "/wandb/" not in path}


@pytest.fixture(scope="module")
def artifact(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint of a run, as the server has it."""
    path = tmp_path_factory.mktemp("artifact") / ENTRY
    bad_inputs.sound_checkpoint(str(path))
    logged = [("model-hostile", "model", {ENTRY: path.read_bytes()})]
    client.call(log_artifacts, "damaged", {"seed": 1, "data_fingerprint": "0"}, logged)
    return client.server.artifact(f"{PROJECT}/model-hostile:latest")


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_that_is_not_what_was_logged_is_one_line_and_leaves_nothing(
    name: str,
    artifact: Any,
    client: Client,
) -> None:
    damage, said = ARTIFACTS[name]
    kept, before = (dict(artifact.files), artifact.manifest), without_logs(client.folder)
    damage(artifact)
    done = client.eva("evaluate", f"{PROJECT}/model-hostile:latest", "--tracking=online", "--gallery_size=0")
    artifact.files, artifact.manifest = kept
    assert (done.code, done.stdout) == (2, "")
    assert done.error.startswith("eva evaluate: error: ") and said in done.error
    assert without_logs(client.folder) == before


def test_a_member_of_an_artifact_cannot_leave_its_folder(artifact: Any, client: Client) -> None:
    """Only the file that is asked for is fetched, by its name, whatever else the manifest tells of."""
    kept = dict(artifact.files), artifact.manifest
    outside = client.folder.parent / "escaped"
    names = (f"../../../../{outside}", "../escaped", str(outside), "..\\escaped")
    artifact.files.update({name: b"escaped" for name in names})

    def more(files: dict[str, Any]) -> None:
        files.update({name: dict(files[ENTRY]) for name in names})

    manifest(more)(artifact)
    done = client.eva("evaluate", f"{PROJECT}/model-hostile:latest", "--tracking=disabled", "--gallery_size=0")
    artifact.files, artifact.manifest = kept
    assert done.code == 0, done.stderr
    found = {path for path in listing(client.folder.parent) if "escaped" in path}
    assert found == set() and not outside.exists()
