"""Run folders become records: whole ones with every number, damaged ones with a note about each loss."""

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from eva.config import RunConfig, UserError, to_dict
from eva.predictions import Predictions, save_images
from eva.records import asked_config, find_runs, known_summary, plain, read_columns, read_run

LABELS = np.array([0, 1, 2, 1], np.int64)
LOGITS = np.array([[2, 1, 0], [2, 1, 0], [0, 1, 2], [0, 1, 2]], np.float32)  # the second and the fourth are wrong
IDS = np.array([f"test/{index:05d}" for index in range(4)])
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
HISTORY = "trainer/step,epoch,train/loss\r\n0,0.5,2.302585\r\n1,1.0,nan\r\n"
SUMMARY = {"status": "finished", "job": "train", "wandb_id": "abc123", "data": "digits", "test_accuracy_best": 0.5}


def make_run(folder: Path, **changes: Any) -> Path:
    """Makes a run folder with a little of everything; `changes` are those of the summary."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **changes}))
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(RunConfig(data="digits", seed=3, lr_max=0.25))))
    (folder / "history.csv").write_bytes(HISTORY.encode())
    (folder / "epochs.csv").write_bytes(b"epoch,val/loss\r\n1,2.5\r\n")
    Predictions("test", ("a", "b", "c"), "f" * 64, IDS, LABELS, LOGITS).save(folder / "predictions.npz")
    save_images(folder / "misclassified.npz", IDS[[3, 1]], IMAGES)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run folder."""
    return make_run(tmp_path / "runs" / "first")


def test_a_whole_run_is_read_to_the_last_bit(run: Path) -> None:
    record = read_run(run)
    assert (record.name, record.id, record.source, record.notes) == ("first", "abc123", str(run), ())
    assert record.config["seed"] == 3 and record.config["lr_max"] == 0.25
    assert record.config.keys() == to_dict(RunConfig()).keys()
    assert record.summary == {name: value for name, value in SUMMARY.items() if name != "wandb_id"}
    assert list(record.history) == ["trainer/step", "epoch", "train/loss"]
    assert repr(record.history["train/loss"]) == "[2.302585, nan]"
    assert record.epochs == {"epoch": [1.0], "val/loss": [2.5]}
    assert record.lr_range == {}
    assert record.predictions is not None
    assert np.array_equal(record.predictions.logits, LOGITS)
    assert list(record.images) == ["test/00003", "test/00001"]
    assert np.array_equal(list(record.images.values()), IMAGES)


def test_a_run_is_called_by_its_name_or_else_by_its_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert read_run(Path()).name == "first"
    (run / "config.yaml").write_text(yaml.safe_dump({"name": "<b>ü"}))
    assert read_run(Path()).name == "<b>ü"


# Settings and results


def test_what_the_range_test_found_is_no_setting() -> None:
    config = {"lr_min": 0.01, "lr_max": 0.1, "git_commit": "1234", "policy_options": {"b": 1, "a": 2.0}}
    assert asked_config(config, {"found": ["lr_max"]}) == {
        **{"lr_min": 0.01, "lr_max": "find"},
        "policy_options": {"a": 2, "b": 1},
    }


def test_an_empty_mapping_is_there_whether_it_is_told_or_not() -> None:
    assert asked_config({"seed": 1}, {}) == asked_config({"seed": 1, "policy_options": {}}, {})
    assert asked_config({"seed": 1}, {})["policy_options"] == {}


def test_a_summary_holds_what_is_known_and_there() -> None:
    evaluation = {"accuracy": 0.5, "loss": math.nan, "top_k": {"3": 1.0, "1": 0.5}, "wandb_mode": "online"}
    summary = {"status": "finished", "steps": 3.0, "seconds": math.inf, "epochs": None, "wandb_mode": "online"}
    known = known_summary({**summary, "evaluation": evaluation})
    expected = {"status": "finished", "steps": 3, "evaluation": {"accuracy": 0.5, "top_k": {"1": 0.5, "3": 1}}}
    assert repr(known) == repr(expected)
    assert known_summary({"evaluation": "none"}) == known_summary({"evaluation": {"other": 1}}) == {}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((1.0, "1"), (0.5, "0.5"), (True, "True"), (2**60 + 1, str(2**60 + 1)), (math.nan, "None"), ("NaN", "'NaN'")),
        *(((1.0, "a"), "[1, 'a']"), ({"b": (), "a": None}, "{'a': None, 'b': []}"), (-0.0, "0")),
    ],
)
def test_values_are_written_in_one_way(value: object, expected: str) -> None:
    assert repr(plain(value)) == expected
    assert repr(plain(json.loads(json.dumps(plain(value))))) == expected


# Damage


@pytest.mark.parametrize(
    ("name", "kept", "note"),
    [
        ("config.yaml", None, r"cannot read '.*config\.yaml': No such file"),
        ("config.yaml", b"a: [", r"config\.yaml' is not YAML"),
        ("history.csv", None, "^no row of a batch$"),
        ("history.csv", b"\xff\r\n", r"^history\.csv cannot be read: .*utf-8"),
        ("epochs.csv", b"epoch,val/loss\r\n1,2,3\r\n2,x\r\n3,1\r\n", r"^epochs\.csv: 2 row\(s\) left out .* 2 n"),
        ("predictions.npz", None, "^not evaluated yet: eva evaluate does it$"),
        ("predictions.npz", 0.5, r"predictions\.npz' is not a readable file of predictions"),
        ("predictions.npz", b"", r"predictions\.npz' is not a readable file of predictions"),
        ("misclassified.npz", None, r"no images at '.*misclassified\.npz'"),
        ("misclassified.npz", 0.9, r"misclassified\.npz' is not a readable file of images"),
    ],
)
def test_each_loss_is_noted_and_the_rest_is_read(run: Path, name: str, kept: float | bytes | None, note: str) -> None:
    whole, content = read_run(run), (run / name).read_bytes()
    if kept is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(kept if isinstance(kept, bytes) else content[: int(kept * len(content))])
    record = read_run(run)
    assert re.search(note, record.notes[0]), record.notes
    assert "\n" not in "".join(record.notes)
    parts = {field.name: repr(getattr(record, field.name)) for field in fields(record)}
    lost = [field.name for field in fields(whole) if parts[field.name] != repr(getattr(whole, field.name))]
    of_file = {"config.yaml": "config", "history.csv": "history", "epochs.csv": "epochs"}
    of_file |= {"predictions.npz": "predictions", "misclassified.npz": "images"}
    no_evaluation = name == "predictions.npz" and kept is None  # images without predictions say nothing
    assert lost == [of_file[name], *["images"] * no_evaluation, "notes"]


def test_images_of_another_evaluation_are_noted(run: Path) -> None:
    save_images(run / "misclassified.npz", IDS[[3, 0]], IMAGES)
    assert read_run(run).notes == ("no image of 1 of 2 misclassified ones",)


@pytest.mark.parametrize("share", np.linspace(0.1, 1, 30).tolist())
def test_a_table_cut_anywhere_gives_only_numbers_that_were_written(tmp_path: Path, share: float) -> None:
    rows = [[step, 0.1 * step, 10.0**step] for step in range(6)]
    text = "trainer/step,lr,train/loss\r\n" + "".join(f"{step},{lr},{loss}\r\n" for step, lr, loss in rows)
    size = round(share * len(text))
    (tmp_path / "history.csv").write_bytes(text[:size].encode())
    notes: list[str] = []
    columns = read_columns(tmp_path / "history.csv", notes)
    whole = max(text[:size].count("\r") - 1, 0)
    assert [list(row) for row in zip(*columns.values(), strict=True)] == rows[:whole]
    assert bool(notes) == (text[:size].count("\n") > 0 and not text[:size].endswith(("\r", "\n")))


def test_a_table_without_rows_or_that_is_not_there_has_no_columns(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "history.csv").write_bytes(b"trainer/step,lr\r\n")
    assert [read_columns(tmp_path / name, notes) for name in ("empty.csv", "history.csv", "none.csv")] == [{}, {}, {}]
    assert notes == []


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["predictions.npz", "misclassified.npz"])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_in_a_file_is_executed(run: Path, tmp_path: Path, name: str, packed: bool) -> None:
    trap = Trap(tmp_path / "sprung")
    if packed:
        np.savez(run / name, ids=np.array([trap], object), labels=np.array([trap], object))
        with zipfile.ZipFile(run / name) as archive:
            content = archive.read("ids.npy")[128:]
    else:
        content = pickle.dumps(trap)
        (run / name).write_bytes(content)
    [note] = read_run(run).notes
    assert "is not a readable file of" in note
    assert not trap.path.exists()
    pickle.loads(content)
    assert trap.path.exists()  # the trap does work


# Folders


def test_runs_are_found_at_any_depth_sorted_and_other_jobs_are_left_out(tmp_path: Path) -> None:
    for name in ("b", "a/deep/er", "a", "c"):
        make_run(tmp_path / "runs" / name) if name != "a" else make_run(tmp_path / "runs" / "a" / "own")
    for job in ("find_lr", "show_policy"):
        make_run(tmp_path / "runs" / job, job=job)
    make_run(tmp_path / "runs" / "alone", job="evaluate")
    names = [path.relative_to(tmp_path / "runs").as_posix() for path in find_runs(tmp_path / "runs")]
    assert names == ["a/deep/er", "a/own", "alone", "b", "c"]


def test_a_run_folder_is_itself_found_with_what_was_evaluated_into_it(run: Path) -> None:
    assert find_runs(run) == [run]
    again = make_run(run / "again", job="evaluate")
    assert find_runs(run) == [run, again]


def test_summaries_of_others_are_left_out(run: Path) -> None:
    inside = run / "wandb" / "offline-run-1" / "files"
    inside.mkdir(parents=True)
    (inside / "summary.json").write_text(json.dumps(SUMMARY))
    (inside / "wandb-summary.json").write_text(json.dumps(SUMMARY))
    for name, content in {"list": "[]", "other": '{"job": "train"}', "number": "1"}.items():
        (run.parent / name).mkdir()
        (run.parent / name / "summary.json").write_text(content)
    (run.parent / "summary.json").write_text('{"loss": 1}')
    assert find_runs(run.parent) == [run]


def test_links_are_followed_and_each_run_is_found_once(run: Path) -> None:
    chosen = run.parent.parent / "chosen"
    chosen.mkdir()
    (chosen / "linked").symlink_to(run, target_is_directory=True)
    (chosen / "linked again").symlink_to(run, target_is_directory=True)
    (run / "loop").symlink_to(run.parent, target_is_directory=True)
    (chosen / "broken").symlink_to(chosen / "nowhere")
    (chosen / "itself").symlink_to(chosen / "itself")
    assert find_runs(chosen) == [chosen / "linked"]
    assert find_runs(run.parent) == [run]
    assert read_run(chosen / "linked").name == "first"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no run that eva trained or evaluated"),
        (json.dumps({**SUMMARY, "job": "find_lr"}), "holds no run that eva trained or evaluated"),
        ('{"loss": 1}', "holds no run that eva trained or evaluated"),
        ('{"status": "fini', r"summary\.json' is damaged: it is not JSON"),
    ],
)
def test_a_folder_without_a_run_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    (tmp_path / "deep").mkdir()
    if content is not None:
        (tmp_path / "deep" / "summary.json").write_text(content)
    with pytest.raises(UserError, match=message):
        find_runs(tmp_path)


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UserError, match="no run folder, and no folder of runs, at "):
            find_runs(path)
        with pytest.raises(UserError, match=r"is no run folder: it has no summary\.json"):
            read_run(path)
    (tmp_path / "summary.json").write_text('{"job": "train"}')
    with pytest.raises(UserError, match=r"summary\.json' is no summary of a run: it has no wandb_id$"):
        read_run(tmp_path)


def test_a_damaged_run_is_left_out_and_told_where_there_are_others(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = run.parent / "damaged"
    damaged.mkdir()
    (damaged / "summary.json").write_text("{bad")
    assert find_runs(run.parent) == [run]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("left out: ") and "damaged/summary.json' is damaged" in line
    (run / "summary.json").write_text(json.dumps({**SUMMARY, "found": 3}))
    assert read_run(run).id == SUMMARY["wandb_id"]


def test_a_name_that_is_too_long_for_a_folder_is_refused() -> None:
    with pytest.raises(UserError, match="no run folder, and no folder of runs, at 'aaa"):
        find_runs(Path("a" * 300))
