"""`eva evaluate`: run folders in place, checkpoints that lie anywhere, and everything that is neither."""

import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BIN, SMALL_RUN, OfflineRun, inspect
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoints import Planted
from test_cli import files_below, refused
from torch import Tensor

from eva.checkpoint_evaluation import wrong_facts
from eva.checkpoints import read_facts
from eva.cli import main
from eva.config import EVALUATION_SETTINGS, FIELDS, Layer, read_yaml, resolve
from eva.data import Dataset, hold_out, limit, load_dataset
from eva.experiment import train
from eva.models import build_model
from eva.predictions import Predictions, load_images

CLASSES = ("bird", "cat", "dog")
LEFT = ("predictions.npz", "misclassified.npz", "evaluation.json")


def make_images(folder: Path, seed: int, brightness: int, classes: tuple[str, ...] = CLASSES) -> Path:
    """Makes an image folder: twelve images of each class for train and five for test."""
    generator = np.random.default_rng(seed)
    for split, number in (("train", 12), ("test", 5)):
        for position, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 90, (32, 32, 3)) + brightness
                pixels[..., position] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index:02d}.png")
    return folder


@dataclass(frozen=True)
class Trained:
    """A finished run on an image folder, evaluated at its end, with its data."""

    folder: Path
    data: Dataset
    facts: dict[str, Any]

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns what the best weights say, loaded afresh, of images normalized by hand."""
        model = build_model(self.facts["config"]["model"], num_classes=3).eval()
        model.load_state_dict(load_file(self.folder / "best.safetensors"))
        train, _ = hold_out(self.data.train, 0.25, 3)
        seen = train.as_array().astype(np.float64) / 255
        scaled = (images / 255 - seen.mean((0, 1, 2))) / seen.std((0, 1, 2))
        with torch.no_grad():
            logits: Tensor = model(torch.from_numpy(scaled.astype(np.float32).transpose(0, 3, 1, 2)))
        return logits.numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    data = f"folder:{make_images(root / 'images', 0, 60)}"
    settings = {
        **{**SMALL_RUN, "data": data, "data_dir": str(root / "data"), "val_fraction": 0.25, "train_limit": 24},
        **{"evaluate": True, "gallery_size": 1, "batch_size": 8, "tracking": "disabled", "out": str(root / "run")},
    }
    config, _ = resolve([Layer("test", settings)])
    assert train(config).status == "finished"
    dataset = load_dataset(data, root / "data")
    return Trained(root / "run", dataset, read_facts(root / "run" / "best.safetensors"))


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


# In the run folder


def test_a_run_is_evaluated_where_it_lies_and_nothing_else_of_it_changes(
    trained: Trained, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in LEFT:
        (run / name).unlink()
    before, kept = read_json(run / "summary.json"), files_below(run)
    assert main(["evaluate", str(run), "--tracking=offline", "--gallery_size=2"]) == 0
    assert capsys.readouterr().err == ""
    theirs, ours = (Predictions.load(folder / "predictions.npz") for folder in (trained.folder, run))
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-5)
    np.testing.assert_allclose(ours.logits, trained.logits(trained.data.test.as_array()), atol=1e-4)
    assert ours.ids.tolist() == theirs.ids.tolist() == trained.data.test.ids.tolist()
    assert ours.maps is not None and theirs.maps is not None
    np.testing.assert_allclose(ours.maps, theirs.maps, atol=1e-5)
    assert load_images(run / "misclassified.npz").keys() == load_images(trained.folder / "misclassified.npz").keys()

    after = read_json(run / "summary.json")
    evaluation = after["evaluation"]
    assert {**after, "evaluation": None} == {**before, "evaluation": None}
    assert before["evaluation"] == {
        name: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
        for name, value in evaluation.items()
        if name in before["evaluation"]
    }
    assert (after["wandb_mode"], after["wandb_folders"]) == ("disabled", [])
    assert evaluation["wandb_mode"] == "offline" and len(evaluation["wandb_folders"]) == 1
    assert evaluation["accuracy"] == after["test_accuracy_best"]
    figures = {"correct", "misclassified", "confusion_matrix", "reliability", "class_accuracy"}
    changed = {path for path, content in files_below(run).items() if kept.get(path, b"new") != content}
    changed = {path for path in changed if f"{run}/wandb" not in path}
    assert {Path(path).name for path in changed if "/figures/" not in path} <= {*LEFT, "summary.json"}
    assert {path.stem for path in (run / "figures").iterdir()} >= figures

    # W&B has it as a run of its own, whose artifacts are those of the trained run.
    folder = Path(evaluation["wandb_folders"][0])
    records = inspect(folder)
    logged = OfflineRun(run, run, run, "", "", {"wandb_folders": [str(folder)]}, records)
    (of_wandb,) = logged.of_type("run")[:1]
    assert of_wandb["job_type"] == "evaluate" and of_wandb["display_name"] == f"evaluate-{before['wandb_id']}"
    assert of_wandb["run_id"] != before["wandb_id"]
    settings = of_wandb["config"]["update"]
    assert (settings["checkpoint_of"], settings["into"]) == (before["wandb_id"], before["wandb_id"])
    assert settings["checkpoint"] == str(run)
    names = {artifact["name"]: artifact["type"] for artifact in logged.of_type("artifact")}
    for kind in ("predictions", "misclassified"):
        assert names[f"{kind}-{before['wandb_id']}"] == kind
    (row,) = logged.rows("galleries/misclassified.captions")
    assert row["galleries/misclassified.count"] == 2


def test_a_run_of_which_half_is_evaluated_has_the_numbers_of_that_half(
    trained: Trained, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--split=val", "--tta=flip", "--gallery_size=0"]) == 0
    said = Predictions.load(run / "predictions.npz")
    _, val = hold_out(trained.data.train, 0.25, 3)
    assert said.split == "val" and said.ids.tolist() == val.ids.tolist() and len(val) == 9
    both = trained.logits(val.as_array()), trained.logits(val.as_array()[:, :, ::-1])
    np.testing.assert_allclose(said.logits, (both[0] + both[1]) / 2, atol=1e-4)
    assert np.abs(both[0] - both[1]).max() > 1e-3
    assert "evaluated on val: accuracy " in (out := capsys.readouterr().out) and ", with flips" in out
    assert read_json(run / "summary.json")["evaluation"]["tta"] == "flip"

    assert main(["evaluate", str(run), "--split=train", "--gallery_size=0"]) == 0
    said = Predictions.load(run / "predictions.npz")
    # The images that it was trained on: neither those of val, nor those that train_limit left out.
    rest, _ = hold_out(trained.data.train, 0.25, 3)
    assert said.ids.tolist() == limit(rest, 24, 3).ids.tolist() and len(said) == 24
    assert (
        read_json(run / "evaluation.json")["split"] == read_json(run / "summary.json")["evaluation"]["split"] == "train"
    )


# Checkpoints anywhere


def test_a_checkpoint_is_evaluated_anywhere_into_a_new_run_folder(
    trained: Trained, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workplace / "kept for later.bin"
    shutil.copyfile(trained.folder / "best.safetensors", path)
    assert main(["evaluate", path.name, "--tracking=disabled", "--gallery_size=0"]) == 0
    (folder,) = (workplace / "runs").iterdir()
    said = Predictions.load(folder / "predictions.npz")
    np.testing.assert_allclose(said.logits, trained.logits(trained.data.test.as_array()), atol=1e-4)
    summary = read_json(folder / "summary.json")
    assert (summary["job"], summary["status"], summary["wandb_id"]) == ("evaluate", "finished", folder.name)
    assert summary["evaluation"]["accuracy"] == np.mean(said.predicted == trained.data.test.labels)
    assert (folder / "best.safetensors").read_bytes() == path.read_bytes()
    settings = read_yaml(folder / "config.yaml")
    assert (settings["model"], settings["epochs"], settings["gallery_size"]) == (SMALL_RUN["model"], 2, 0)
    lines = capsys.readouterr().out.splitlines()
    assert f"run folder: runs/{folder.name}" in lines
    assert any(line.startswith("gallery_size = 0  (command line)") for line in lines)
    assert f"lr_max = 0.05  (checkpoint {path.name})" in lines

    # What came out is a run folder like others, and can be evaluated again; --out takes it elsewhere.
    assert main(["evaluate", str(folder), "--out=elsewhere", "--gallery_size=0", "--split=val"]) == 0
    assert Predictions.load(Path("elsewhere/predictions.npz")).split == "val"
    assert Predictions.load(folder / "predictions.npz").split == "test"
    assert read_json(Path("elsewhere/summary.json"))["job"] == "evaluate"
    before = files_below(workplace)
    (line,) = refused(["evaluate", str(folder), "--out=elsewhere"], capsys)
    assert line.startswith("run folder 'elsewhere' is not empty; choose another --out")
    assert files_below(workplace) == before


def test_other_data_are_normalized_as_the_train_data_were_and_it_is_said(
    trained: Trained, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"folder:{make_images(workplace / 'other', 1, 100)}"
    command = ["evaluate", str(trained.folder), "--out=out", f"--data={data}", "--gallery_size=0"]
    assert main([*command, f"--data_dir={workplace}"]) == 0
    note = "note: these are not the data that the network was trained on (their fingerprints differ)"
    assert note in capsys.readouterr().out.splitlines()
    other = load_dataset(data, workplace)
    said = Predictions.load(Path("out/predictions.npz"))
    np.testing.assert_allclose(said.logits, trained.logits(other.test.as_array()), atol=1e-4)
    assert said.fingerprint == other.fingerprint != trained.data.fingerprint
    assert read_json(Path("out/summary.json"))["evaluation"]["data_fingerprint"] == other.fingerprint
    # Two thirds of a deviation brighter: with statistics of its own, these would be other numbers.
    assert other.test.as_array().mean() > trained.data.test.as_array().mean() + 30


def test_other_classes_are_refused(trained: Trained, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_images(workplace / "other", 1, 60, ("bird", "cat", "frog"))
    before = files_below(workplace), files_below(trained.folder)
    (line,) = refused(
        ["evaluate", str(trained.folder), f"--data=folder:{data}", f"--data_dir={trained.folder.parent / 'd'}"], capsys
    )
    assert line.endswith("has the classes bird, cat, frog, but the network was trained on bird, cat, dog")
    assert (files_below(workplace), files_below(trained.folder)) == before


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], weight: float | None = None) -> None:
    """Changes the facts of a checkpoint, and sets all its weights."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["eva"])
    change(facts)
    tensors = load_file(path)
    if weight is not None:
        tensors = {
            name: torch.full_like(tensor, weight) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
    save_file(tensors, path, {"format": "pt", "eva": json.dumps(facts)})


def test_weights_of_infinity_are_a_result_without_a_loss(
    trained: Trained, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run / "best.safetensors", lambda facts: None, weight=float("inf"))
    assert main(["evaluate", str(run), "--gallery_size=1"]) == 0
    answer = capsys.readouterr()
    # All is said to be of the first class, a third of the test images.
    assert "evaluated on test: accuracy 33.33 % (10 of 15 wrong), loss none, ECE none" in answer.out
    assert answer.err == ""
    evaluation = read_json(run / "summary.json")["evaluation"]
    assert evaluation["loss"] is evaluation["ece"] is None
    assert len(load_images(run / "misclassified.npz")) == 10


# What is refused


def no_facts(path: Path) -> None:
    save_file(load_file(path), path)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Planted(path.parent / "planted")))


def emptied(path: Path) -> None:
    path.unlink()
    path.mkdir()


def torch_pickle(path: Path) -> None:
    torch.save({"model": Planted(path.parent / "planted")}, path)


def without(*names: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda facts: [facts.pop(name) for name in names])


def with_fact(**values: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda facts: facts.update(values))


def with_setting(**values: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda facts: facts["config"].update(values))


REFUSED = {
    "foreign": (no_facts, "is no checkpoint of eva: its metadata have no facts about a run"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not a readable checkpoint"),
    "half a header": (lambda path: path.write_bytes(path.read_bytes()[:100]), "is not a readable checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "is not a readable checkpoint"),
    "text": (lambda path: path.write_text("weights"), "is not a readable checkpoint"),
    "pickle": (pickled, "is not a readable checkpoint"),
    "torch's pickle": (torch_pickle, "is not a readable checkpoint"),
    "a folder": (emptied, "is not a readable checkpoint"),
    "no statistics": (without("mean", "std"), "is of another version of eva: it lacks mean, std"),
    "an odd mean": (with_fact(mean=[0.5, "0.5", 0.5]), "is of another version of eva: it lacks mean"),
    "four deviations": (with_fact(std=[0.5] * 4), "is of another version of eva: it lacks std"),
    "numbered classes": (with_fact(classes=[0, 1, 2]), "is of another version of eva: it lacks classes"),
    "odd settings": (with_fact(config=["epochs"], run=None), "is of another version of eva: it lacks config, run"),
    "another network": (with_setting(model="resnet9"), "holds another architecture: "),
    "an unknown network": (with_setting(model="resnet10"), "unknown model 'resnet10'"),
    "a setting of another version": (with_setting(warmup=3), "unknown setting 'warmup'"),
    "an impossible setting": (with_setting(gallery_size=-1), "gallery_size must be in [0, 400]"),
    "a setting of another type": (
        with_setting(tta=["flip"]),
        "tta must be one of: none, flip, flip_shift, but got ['flip']",
    ),
    "data that are gone": (with_setting(data="folder:/gone"), "needs an existing folder, but got PATH='/gone'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_checkpoint_of_eva_is_a_line_and_changes_nothing(
    run: Path, workplace: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, words = REFUSED[name]
    damage(run / "best.safetensors")
    before = files_below(run)
    (line,) = refused(["evaluate", str(run)], capsys)
    assert words in line
    if (run / "best.safetensors").is_file():
        (line,) = refused(["evaluate", str(run / "best.safetensors"), "--out=new"], capsys)
        assert words in line
    assert files_below(run) == before
    assert files_below(workplace) == {}
    assert not (run / "planted").exists()


def test_facts_of_a_run_lack_nothing(trained: Trained) -> None:
    assert wrong_facts(trained.facts) == []
    assert wrong_facts({}) == ["config", "run", "classes", "mean", "std", "data_fingerprint"]
    assert wrong_facts({**trained.facts, "classes": []}) == ["classes"]


def test_what_is_no_run_is_a_line(run: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "best.safetensors").unlink()
    (workplace / "empty").mkdir()
    (workplace / "broken").mkdir()
    (workplace / "broken" / "summary.json").write_text("{")
    for target, words in {
        str(run): "has no best.safetensors: no epoch of a training ended in it",
        "empty": "'empty' is no run folder: it has no summary.json",
        "broken": "is damaged: it is not JSON",
        "missing": "'missing' is no run folder, no checkpoint and no W&B artifact (E/PROJECT/NAME:ALIAS)",
        "missing/best.safetensors": "is no run folder, no checkpoint and no W&B artifact",
        "": "is no run folder: it has no summary.json",
        "n" * 5000: "File name too long",
        "team/project/model-abc:best": "to read it from W&B needs an account: run `wandb login`",
    }.items():
        (line,) = refused(["evaluate", target], capsys)
        assert words in line
    answer = subprocess.run([BIN / "eva", "evaluate"], capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (
        2,
        "eva evaluate: error: the following arguments are required: TARGET\n",
    )


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--epochs=9"], ["an evaluation can change data, data_dir, split"]),
        (["--model=resnet9", "--seed", "1"], [", but got model, seed"]),
        (["--policy_options.cutout=8"], [", but got policy_options.cutout"]),
        (["--recipe=resnet9-onecycle"], [", but got recipe"]),
        (["--evaluate=false"], [", but got evaluate"]),
        (["--galery_size=9"], ["command line: unknown setting 'galery_size'; did you mean 'gallery_size'?"]),
        (["--gallery_size=401"], ["gallery_size must be in [0, 400], but got gallery_size=401"]),
        (["--gallery_size"], ["command line: gallery_size must be a whole number, but got no value"]),
        (["--tta=rotate"], ["command line: tta must be one of: none, flip, flip_shift, but got 'rotate'"]),
        (["--split=valid"], ["command line: split must be one of: test, val, train, but got 'valid'"]),
        (["--device=gpu"], ["device must be auto, cpu, cuda or cuda:N, but got device='gpu'"]),
        (["--tracking=online"], ["W&B online needs an account: "]),
        (["--gradcam_layers=layer5"], ["unknown layer 'layer5'"]),
        (["--gradcam_layers=fc", "--out=new"], ["layer 'fc' must return a float map (N, C, h, w)"]),
        (["--gradcam_layers=stage2", "--tracking=offline", "--out=file/new"], ["cannot make run folder 'file/new'"]),
        (["--gradcam_layers=layer5", "--tracking=offline", "--out=new"], ["unknown layer 'layer5'"]),
        (
            ["--epochs=9", "--lr_maxx=1", "--split=valid", "--table_rows"],
            [
                "command line: table_rows must be a whole number, but got no value",
                "but got epochs",
                "unknown setting 'lr_maxx'",
                "split must be one of: test, val, train, but got 'valid'",
            ],
        ),
    ],
)
def test_settings_that_an_evaluation_does_not_take_are_lines_and_change_nothing(
    trained: Trained, workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], lines: list[str]
) -> None:
    (workplace / "file").write_text("")
    before = files_below(trained.folder), files_below(workplace)
    told = refused(["evaluate", str(trained.folder), *arguments], capsys)
    assert len(told) == len(lines)
    for line, words in zip(told, lines, strict=True):
        assert words in line
    assert (files_below(trained.folder), files_below(workplace)) == before


def test_only_settings_can_be_changed_and_none_that_training_depends_on() -> None:
    assert FIELDS.keys() >= set(EVALUATION_SETTINGS)
    assert not set(EVALUATION_SETTINGS) & {"model", "norm", "val_fraction", "train_limit", "seed", "policy", "epochs"}


def test_without_val_there_is_no_val_to_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(run / "best.safetensors", lambda facts: facts["config"].update(val_fraction=0))
    (line,) = refused(["evaluate", str(run), "--split=val"], capsys)
    assert line == "split=val needs a val_fraction above 0, but got val_fraction=0.0"
