"""The flags of `eva sweep`: which fit together, and what is told before anything is begun."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL_RUN

from eva.cli import main
from eva.config import UserError
from eva.sweep import with_settings
from eva.sweep_check import check
from eva.sweep_file import read_sweep

RUNNER = Path(__file__).parents[1] / "runners" / "train.py"


def written(folder: Path, **more: Any) -> Path:
    """Returns the YAML of a sound grid of three seeds."""
    values = {
        "program": str(RUNNER),
        "method": "grid",
        "metric": {"name": "val/accuracy_best", "goal": "maximize"},
        "parameters": {**{name: {"value": value} for name, value in SMALL_RUN.items()}, "seed": {"values": [0, 1, 2]}},
        **more,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Returns the lines of a mistake."""
    assert main(["sweep", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""  # nothing was begun
    return [line.removeprefix("eva sweep: error: ") for line in output.err.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ([], ["eva sweep takes one of FILE.yaml, --resume=FOLDER and --publish=FOLDER, but got none"]),
        (
            ["a.yaml", "--resume=b", "--workers=0"],
            [
                "eva sweep takes one of FILE.yaml, --resume=FOLDER and --publish=FOLDER, "
                "but got FILE.yaml and --resume",
                "--workers must be a whole number, at least 1, but got '0'",
            ],
        ),
        (
            ["--resume=b", "--check", "--out=c", "--seed=3", "--lr_max=0.1"],
            [
                "--resume takes --count, --workers, --gpus, --retry_failed, --repeat_best, --seeds, --repeat_median, "
                "but got --check, --out, --seed, lr_max: that is for a sweep that begins"
            ],
        ),
        (
            ["--publish=b", "--count=3"],
            ["--publish takes --project, but got --count: that is for a sweep that begins"],
        ),
        (
            ["--data", "digits", "a.yaml"],
            ["settings are written --NAME=VALUE: 'digits' was taken for FILE.yaml, not 'a.yaml'"],
        ),
        (["a.yaml", "--retry_failed"], ["--retry_failed goes with --resume=FOLDER"]),
        (["a.yaml", "--check", "--skip_check"], ["--check and --skip_check exclude each other"]),
        (["a.yaml", "--repeat_median"], ["--repeat_median goes with --repeat_best=K"]),
        (
            ["a.yaml", "--seeds=4"],
            ["--seeds goes with --repeat_best=K; seeds of the trials are a parameter of the sweep"],
        ),
    ],
)
def test_flags_that_do_not_fit_are_told_at_once(
    capsys: pytest.CaptureFixture[str], arguments: list[str], lines: list[str]
) -> None:
    """None is dropped without a word."""
    assert told(capsys, *arguments) == lines


def test_every_mistaken_flag_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown settings, with the nearest known one, and numbers that are none."""
    flags = ["--lr_maxx=1", "--count=many", "--workers=0", "--seed=-1", "--retries=1.5", "--repeat_best=", "--seeds=0"]
    lines = told(capsys, "a.yaml", *flags)
    assert [line.split()[0] for line in lines[1:]] == [flag.partition("=")[0] for flag in flags[1:]]
    assert "lr_maxx" in lines[0] and "'lr_max'" in lines[0]
    assert lines[1:3] == [
        "--count must be a whole number, at least 1, but got 'many'",
        "--workers must be a whole number, at least 1, but got '0'",
    ]


def test_a_folder_that_holds_something_is_told_before_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trial steps take a while."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").touch()
    [line] = told(capsys, str(written(tmp_path)), f"--out={folder}")
    assert line == f"sweep folder {str(folder)!r} is not empty; choose another --out, or --resume={folder}"
    [line] = told(capsys, str(written(tmp_path)), f"--out={folder / 'thesis.txt'}")
    assert line.startswith("cannot make sweep folder") and line.endswith("Not a directory; choose another --out")


def test_a_storage_that_cannot_be_had_is_told_before_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a folder is, for a journal."""
    [line] = told(capsys, str(written(tmp_path)), f"--out={tmp_path / 'out'}", f"--storage={tmp_path}")
    assert line == f"cannot open the storage {str(tmp_path)!r}: Is a directory"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("project", "names"),
    [("mine", {"entity": "theirs", "project": "mine"}), ("me/mine", {"entity": "me", "project": "mine"})],
)
def test_the_project_of_the_command_line_is_that_of_the_runs(
    tmp_path: Path, project: str, names: dict[str, str]
) -> None:
    """Instead of the file's; nothing else changes."""
    sweep = read_sweep(written(tmp_path, project="old", entity="theirs"))
    changed = with_settings(sweep, {}, project)
    assert {"entity": changed.entity, "project": changed.project} == names
    assert yaml.safe_load(changed.text) == {**yaml.safe_load(sweep.text), **names}
    assert with_settings(sweep, {}) is sweep


def test_settings_of_the_command_line_are_judged_with_those_of_the_file(tmp_path: Path) -> None:
    """Two epochs are too few for the default peak, but not for the file's."""
    parameters = {"peak_epoch": {"value": 1}, "epochs": {"value": 8}, "seed": {"values": [0, 1]}}
    changed = with_settings(read_sweep(written(tmp_path, parameters=parameters)), {"epochs": "2"})
    assert yaml.safe_load(changed.text)["parameters"] == {**parameters, "epochs": {"value": 2}}
    assert check(changed, None, 1, measure=False) == ["size: 2 trials, 4 epochs in all"]
    changed = with_settings(read_sweep(written(tmp_path, parameters=parameters)), {"peak_epoch": "9"})
    with pytest.raises(UserError, match=r"peak_epoch must be in \[0, epochs\).*epochs=8"):
        check(changed, None, 1, measure=False)
