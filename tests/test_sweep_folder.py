"""A sweep's folder: made, opened, refused, and what tells whose trials are alive."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from made_sweeps import begin

from eva.config import UserError
from eva.search import trial_name
from eva.sweep_folder import STORAGE_VARIABLE, make_sweep_folder, open_sweep_folder

FORK = multiprocessing.get_context("fork")


def test_an_opened_folder_is_the_one_that_was_made(tmp_path: Path) -> None:
    """Its facts, its YAML to the letter, its search; also from another working directory, and moved."""
    folder, search = begin(tmp_path, "finish", "crash", retries=5, isolate=True, name="mine")
    assert open_sweep_folder(folder.path) == folder
    assert (folder.name, folder.storage, folder.isolate, folder.retries) == ("mine", "journal.log", True, 5)
    assert folder.sweep.text == (tmp_path / "sweep.yaml").read_text()
    assert folder.open_search().records() == search.records()
    os.rename(folder.path, tmp_path / "moved")
    moved = open_sweep_folder(tmp_path / "moved")
    assert moved == replace(folder, path=tmp_path / "moved")
    assert moved.open_search().waiting() == [0, 1]
    assert moved.run_folder(1) == tmp_path / "moved" / "trials" / "trial-0001"


def test_folders_without_names_get_names_and_places_of_their_own(tmp_path: Path) -> None:
    """Two sweeps of one YAML are two W&B groups, and two machines never take each other's trials for theirs."""
    made = [begin(tmp_path, "finish", out=out)[0] for out in ("one", "two")]
    assert len({folder.name for folder in made}) == len({folder.place for folder in made}) == 2
    assert all(folder.name.startswith("sweep-") for folder in made)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    """And nothing is changed in it."""
    folder, _ = begin(tmp_path, "finish")
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    with pytest.raises(UserError, match=r"sweep folder .* is not empty; choose another --out, or --resume="):
        make_sweep_folder(folder.path, folder.sweep, None, False, 3, None)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before
    with pytest.raises(UserError, match=r"cannot make sweep folder .*sweep.json/inner': Not a directory"):
        make_sweep_folder(folder.path / "sweep.json" / "inner", folder.sweep, None, False, 3, None)


@pytest.mark.parametrize("content", ["[]", "{}", '{"name": 1, "more": 2}', "no JSON", ""])
def test_what_is_no_sweep_folder_is_told(tmp_path: Path, content: str) -> None:
    """One line, and no traceback."""
    with pytest.raises(UserError, match=r"is no sweep folder: it has no sweep\.json"):
        open_sweep_folder(tmp_path)
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json' is (damaged|no description of a sweep)"):
        open_sweep_folder(tmp_path)


def test_the_password_of_a_storage_comes_from_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds the address without it; the password of another database is not used for this one."""
    sweep = begin(tmp_path, "finish")[0].sweep
    url = "postgresql://me:secret@host/db"
    folder = make_sweep_folder(tmp_path / "other", sweep, url, False, 3, None)
    assert json.loads((folder.path / "sweep.json").read_text())["storage"] == "postgresql://me@host/db"
    assert not any("secret" in path.read_text() for path in folder.path.rglob("*") if path.is_file())
    assert folder.storage_url() == "postgresql://me@host/db"
    monkeypatch.setenv(STORAGE_VARIABLE, url)
    assert open_sweep_folder(folder.path).storage_url() == url
    monkeypatch.setenv(STORAGE_VARIABLE, "postgresql://me:other@elsewhere/db")
    assert folder.storage_url() == "postgresql://me@host/db"


def test_a_storage_outside_of_the_folder_may_have_trials_of_others(tmp_path: Path) -> None:
    """A database, but a journal on a shared disk too."""
    sweep = begin(tmp_path, "finish")[0].sweep
    shared = str(tmp_path / "shared.log")
    storages = {None: False, shared: True, "postgresql://host/db": True}
    for number, (storage, shares) in enumerate(storages.items()):
        folder = make_sweep_folder(tmp_path / str(number), sweep, storage, False, 3, None)
        assert folder.shares_storage is shares
        if storage == shared:
            assert folder.storage_url() == shared


def test_a_trial_is_held_by_one_process_until_it_dies(tmp_path: Path) -> None:
    """Others are told at once; another trial is free; SIGKILL lets go."""
    folder, _ = begin(tmp_path, "finish")
    ready = FORK.Event()

    def hold() -> None:
        with folder.hold(0):
            ready.set()
            time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    assert ready.wait(30)
    with folder.hold(0) as first, folder.hold(1) as second:
        assert first is None and second is not None
        with folder.hold(1) as again:
            assert again is None
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for _ in range(2):
        with folder.hold(0) as lock:
            assert lock is not None


def test_a_trial_is_held_as_long_as_a_child_that_was_handed_the_lock_lives(tmp_path: Path) -> None:
    """So that the trial of a dead worker, whose own process still saves, is not begun by another worker."""
    folder, _ = begin(tmp_path, "finish")
    read, write = os.pipe()
    with folder.hold(0) as lock:
        assert lock is not None
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    with folder.hold(0) as again:
        assert again is None
    os.write(write, b".")
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    with folder.hold(0) as free:
        assert free is not None


def test_names_of_trials_are_sorted_as_their_numbers() -> None:
    """Up to ten thousand."""
    names = [trial_name(number) for number in (0, 7, 10, 123, 9999)]
    assert names == sorted(names) and names[1] == "trial-0007"
