"""eva.disk tells what takes room as `du` does, and lets nothing go that somebody needs."""

import fcntl
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import OfflineRun

from eva import disk
from eva.config import UserError

HOSTILE = [
    "with blank",
    "quote'",
    'double"',
    "$(touch hacked)",
    "-rf",
    "new\nline",
    "\x1b[31mred",
    "\udcff",
    "日本",
    "\\",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and a home that hold nothing."""
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")


def fill(path: Path, size: int = 5000) -> Path:
    """Makes a file of so many bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(size).randbytes(size))
    return path


def make_run(folder: Path, status: str | None = "finished", wandb: dict[str, bool] | None = None) -> Path:
    """Makes a run folder; `wandb` has the names of W&B's folders of it, and whether each is marked as sent."""
    fill(folder / "config.yaml", 900)
    if status:
        (folder / "summary.json").write_text(json.dumps({"status": status, "wandb_id": "abc"}))
    fill(folder / "state" / "000007-0123.pt", 70_000)
    fill(folder / "state" / "000008-4567.pt", 70_000)
    fill(folder / "best.safetensors", 30_000)
    fill(folder / "predictions.npz", 20_000)
    fill(folder / "figures" / "learning.png", 9_000)
    fill(folder / "history.csv", 8_000)
    for name, sent in (wandb or {}).items():
        log = fill(folder / "wandb" / name / "run-abc.wandb", 12_000)
        fill(folder / "wandb" / name / "files" / "config.yaml", 10)
        if sent:
            log.with_name(f"{log.name}.synced").touch()
        fill(folder / "wandb" / "data" / "artifacts" / "staging" / f"tmp{name}", 40_000)
        fill(folder / "wandb" / "artifact" / f"model-{name}" / "best.safetensors", 50_000)
    if wandb:
        (folder / "wandb" / "latest-run").symlink_to(list(wandb)[-1])
        fill(folder / "wandb" / "cache" / "artifacts" / "obj" / "md5" / "ab" / "cdef", 60_000)
        fill(folder / "wandb" / "cache" / "logs" / "core.log", 600)
    return folder


def look(*paths: Path) -> disk.DiskReport:
    return disk.report(paths, Path("data"))


def du(*paths: Path) -> int:
    """Returns what `du` finds, in bytes; it counts hard links once too."""
    answer = subprocess.run(["du", "-s", "--block-size=1", *paths], capture_output=True, check=True)
    return sum(int(line.split()[0]) for line in answer.stdout.splitlines())


def total(found: disk.DiskReport) -> int:
    return sum(part.bytes for part in found.parts)


def going(found: disk.DiskReport, root: Path) -> set[str]:
    """Returns what can go, below a folder."""
    return {part.path.relative_to(root).as_posix() for part in found.parts if part.can_go}


def run_commands(found: disk.DiskReport) -> None:
    for kind in found.to_dict()["kinds"].values():
        if kind["remove"]:
            subprocess.run(["bash", "-c", kind["remove"]], check=True)


# --- numbers ---


def test_the_numbers_are_those_of_du(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = make_run(root / "a", wandb={"offline-run-1-abc": False})
    fill(root / "notes" / "deep" / "er" / "file", 123_456)
    os.link(root / "notes" / "deep" / "er" / "file", run / "twice")
    (run / "figures" / "elsewhere").symlink_to(fill(tmp_path / "large", 1_000_000))
    (root / "around").symlink_to(root)
    with open(root / "sparse", "wb") as file:
        file.truncate(10**9)
    fill(root / "empty", 0)
    found = look(root)
    assert total(found) == du(root) < 2_000_000
    assert found.kinds()[disk.RECORDS]["files"] == 4  # config.yaml, summary.json, history.csv, twice; none of W&B's
    names = subprocess.run(["find", root, "!", "-type", "d"], capture_output=True, text=True, check=True)
    assert sum(part.files for part in found.parts) == len(names.stdout.splitlines()) - 1  # of one file two names


def test_folders_in_one_another_count_once(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    make_run(root / "a", wandb={"offline-run-1-abc": True})
    make_run(root / "a" / "evaluation")
    found = disk.report([root, root / "a", root], root)
    assert total(found) == du(root)
    assert len({part.path for part in found.parts if part.can_go}) == sum(part.can_go for part in found.parts)


def test_data_beside_runs_are_data() -> None:
    make_run(Path("a"))
    fill(Path("data/cifar-10-batches-py/data_batch_1"), 90_000)
    fill(Path("data/cache/0.images"), 80_000)
    found = look(Path("."))
    kinds = found.kinds()
    assert total(found) == du(Path(".")) and kinds[disk.DECODED]["bytes_can_go"] >= 80_000
    assert kinds[disk.DATA]["files"] == 1 and disk.OTHER in kinds and not kinds[disk.OTHER]["files"]


def test_a_link_to_the_folder_of_runs_is_followed(tmp_path: Path) -> None:
    make_run(tmp_path / "elsewhere")
    Path("runs").symlink_to(tmp_path / "elsewhere")
    found = look()
    assert total(found) == du(tmp_path / "elsewhere") and found.can_go(disk.STATES) == [
        tmp_path / "elsewhere" / "state"
    ]


def test_all_folders_together_are_what_du_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(Path("runs/a"))
    make_run(Path("sweeps-out/b/trials/trial-0000"))
    fill(Path("data/cache/0.images"), 80_000)
    fill(Path("data/cifar-10-batches-py/data_batch_1"), 90_000)
    fill(Path("wandb/offline-run-2-xyz/run-xyz.wandb"))
    home = tmp_path / "home"
    fill(home / ".cache" / "wandb" / "artifacts" / "obj" / "md5" / "0", 100_000)
    fill(home / ".local" / "share" / "wandb" / "artifacts" / "staging" / "tmp", 110_000)
    found = look()
    usual = [Path(name) for name in ("runs", "sweeps-out", "data", "wandb")]
    assert total(found) == du(*usual, home / ".cache" / "wandb", home / ".local" / "share" / "wandb")
    kinds = found.kinds()
    assert list(kinds) == sorted(kinds, key=lambda kind: -kinds[kind]["bytes"])
    assert {disk.WANDB_CACHE, disk.WANDB_STAGING, disk.WANDB_RUNS, disk.DECODED, disk.DATA, disk.STATES} <= kinds.keys()


def test_free_space_is_that_of_each_file_system(small_disk: Callable[..., Path], tmp_path: Path) -> None:
    small = small_disk("3m")
    make_run(small / "runs" / "a")
    found = disk.report([small / "runs"], tmp_path / "not yet" / "there")
    by_path = {entry.path: entry for entry in found.disks}
    assert by_path[small / "runs"] == disk.Disk(small / "runs", 3 * 2**20, available(small))
    assert abs(by_path[tmp_path].free - available(tmp_path)) < 2**30  # others write there too
    assert len(found.disks) == len({os.stat(path).st_dev for path in by_path})


def available(path: Path) -> int:
    """Returns what `stat` says that a user may still write, in bytes."""
    answer = subprocess.run(["stat", "-f", "-c", "%a %S", path], capture_output=True, check=True)
    blocks, size = answer.stdout.split()
    return int(blocks) * int(size)


# --- what can go ---


@pytest.mark.parametrize(
    ("status", "can_go"),
    [
        *[(status, True) for status in ("finished", "diverged", "stopped")],
        *[(status, False) for status in ("running", "interrupted", "failed", "oom", "unheard of", None)],
    ],
)
def test_saved_states_can_go_when_nobody_goes_on_with_the_run(status: str | None, can_go: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", status)
    assert going(look(tmp_path / "runs"), run) == ({"state"} if can_go else set())


@pytest.mark.parametrize("summary", ["", "{", "[]", '"finished"', '{"status": ["finished"]}'])
def test_a_run_whose_summary_is_damaged_keeps_all(summary: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", wandb={"offline-run-1-abc": True})
    (run / "summary.json").write_text(summary)
    assert going(look(tmp_path / "runs"), run) == set()


CACHE = {"wandb/cache/artifacts/obj", "wandb/cache/logs"}


@pytest.mark.parametrize(
    ("status", "wandb", "can_go"),
    [
        ("finished", {"offline-run-1-abc": False}, {"state"} | CACHE),
        ("finished", {"offline-run-1-abc": True, "offline-run-2-abc": False}, {"state"} | CACHE),
        ("finished", {"run-1-abc": False}, {"state"} | CACHE),
        ("interrupted", {"offline-run-1-abc": True}, set[str]()),
        (
            "finished",
            {"offline-run-1-abc": True, "run-2-abc": True},
            {"state", "wandb/offline-run-1-abc", "wandb/run-2-abc", "wandb/data", "wandb/artifact"} | CACHE,
        ),
    ],
    ids=["offline, not sent", "one part not sent", "online, not known to be sent", "to be resumed", "sent"],
)
def test_what_w_and_b_keeps_of_a_run_can_go_once_all_of_it_is_sent(
    status: str, wandb: dict[str, bool], can_go: set[str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "runs" / "a", status, wandb)
    found = look(tmp_path / "runs")
    assert going(found, run) == can_go
    assert sum(part.bytes for part in found.parts if part.can_go) == (
        du(*(run / name for name in can_go)) if can_go else 0
    )
    assert set(found.unsynced) == {run / "wandb" / name for name, sent in wandb.items() if not sent}
    offline = [str(run / "wandb" / name) for name, sent in wandb.items() if not sent]
    command = f"eva sync {run}" if "run-1-abc" in wandb else " ".join(["wandb sync", *offline])
    assert found.to_dict()["sync"] == ([command] if found.unsynced else [])


def test_staging_whose_runs_are_not_beside_it_stays(tmp_path: Path) -> None:
    """They may have been moved to where there is a network."""
    run = make_run(tmp_path / "runs" / "a", wandb={"offline-run-1-abc": True})
    shutil.rmtree(run / "wandb" / "offline-run-1-abc")
    assert going(look(tmp_path / "runs"), run) == {"state"} | CACHE


def test_a_real_offline_run_stays_until_it_is_marked_as_sent(offline_run: OfflineRun, tmp_path: Path) -> None:
    run = shutil.copytree(offline_run.folder, tmp_path / "runs" / "run", symlinks=True)
    (folder,) = (run / "wandb").glob("offline-run-*")
    found = look(run)
    assert found.unsynced == (folder,)
    kept = {name for name in going(found, run) if not name.startswith(("state", "wandb/cache"))}
    assert total(found) == du(run) and not kept
    (log,) = folder.glob("*.wandb")
    log.with_name(f"{log.name}.synced").touch()
    assert {f"wandb/{folder.name}", "wandb/data"} <= going(look(run), run)
    assert {disk.WANDB_STAGING, disk.WANDB_RUNS, disk.STATES, disk.WEIGHTS, disk.PICTURES} <= look(run).kinds().keys()


def test_of_offline_runs_in_w_and_b_s_own_folder_those_can_go_that_wandb_clean_removes() -> None:
    from wandb.cli.clean import _select_runs_to_clean

    for name, sent in {"a": True, "b": False, "c": True}.items():
        log = fill(Path("wandb") / f"offline-run-20200101_000000-{name}" / f"run-{name}.wandb")
        if sent:
            log.with_name(f"{log.name}.synced").touch()
    selected = _select_runs_to_clean(Path("wandb"), include_unsynced=False, min_hours=24)
    assert len(selected.runs_to_clean) == 2
    assert set(look().can_go(disk.WANDB_RUNS)) == set(selected.runs_to_clean)


@pytest.mark.parametrize("variables", [(), ("XDG_CACHE_HOME", "XDG_DATA_HOME"), ("WANDB_CACHE_DIR", "WANDB_DATA_DIR")])
def test_w_and_b_s_folders_are_looked_for_where_its_client_has_them(
    variables: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb import env
    from wandb.sdk.artifacts.artifact_file_cache import artifacts_cache_dir
    from wandb.sdk.artifacts.staging import get_staging_dir

    for variable in variables:
        monkeypatch.setenv(variable, str(tmp_path / "root" / variable))
    monkeypatch.setenv("WANDB_ARTIFACT_DIR", str(tmp_path / "fetched"))
    fill(artifacts_cache_dir() / "obj" / "md5" / "ab", 10_000)
    fill(Path(get_staging_dir()) / "tmp1", 20_000)
    fill(Path(env.get_artifact_dir()) / "model" / "file", 30_000)
    kinds = look().kinds()
    assert kinds[disk.WANDB_CACHE]["bytes_can_go"] >= 10_000 and kinds[disk.WANDB_CACHE]["files"] == 1
    for kind, size in ((disk.WANDB_STAGING, 20_000), (disk.WANDB_ARTIFACTS, 30_000)):
        assert kinds[kind]["bytes"] >= size and kinds[kind]["files"] == 1 and not kinds[kind]["bytes_can_go"]


def test_staging_stays_where_the_cache_has_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "root"))
    fill(tmp_path / "root" / "artifacts" / "obj" / "file")
    staged = fill(tmp_path / "root" / "artifacts" / "staging" / "file")
    run_commands(look())
    assert staged.exists() and not (tmp_path / "root" / "artifacts" / "obj").exists()


def test_of_the_cache_of_images_all_can_go_but_what_is_being_built() -> None:
    cache = Path("data/cache")
    for name in ("0.images", "1.npz", "killed.part", "built.part", ".old.tmp", ".new.tmp"):
        fill(cache / name)
    long_ago = time.time() - 3 * 24 * 3600
    os.utime(cache / ".old.tmp", (long_ago, long_ago))
    os.utime(cache / "built.part", (long_ago, long_ago))
    index = Path("data/index")
    for name in ("0.index", ".0.index.17", ".1.index.18"):
        fill(index / name)
    os.utime(index / ".0.index.17", (long_ago, long_ago))
    with open(cache / "built.part", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = look()
    assert set(found.can_go(disk.DECODED)) == {cache / "0.images", cache / "1.npz", index / "0.index"}
    assert set(found.can_go(disk.LEFTOVERS)) == {cache / "killed.part", cache / ".old.tmp", index / ".0.index.17"}


def test_a_temporary_file_can_go_when_it_is_old(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", "failed")
    for name in (".summary.json.17", ".best.safetensors.17"):
        fill(run / name)
    os.utime(run / ".best.safetensors.17", (0, 0))
    assert going(look(tmp_path / "runs"), run) == {".best.safetensors.17"}


def test_the_commands_remove_what_can_go_and_nothing_else(tmp_path: Path) -> None:
    """And free as much as was said; whatever the names are."""
    root = tmp_path / "runs"
    for index, name in enumerate(HOSTILE):
        run = make_run(root / name, "finished" if index % 2 else "interrupted", {"offline-run-1-abc": index % 3 == 0})
        os.link(fill(run / "history.csv", 80_000), run / "state" / "twice")  # the other name keeps its bytes
    fill(root / "notes")
    before, found = du(root), look(root)
    names = {path for path in root.rglob("*")}
    gone = {name for name in names for part in found.parts if part.can_go and name.is_relative_to(part.path)}
    run_commands(found)
    assert set(root.rglob("*")) == names - gone and len(gone) > 20
    parents = du(root) - before + sum(part.bytes for part in found.parts if part.can_go)
    assert abs(parents) <= 4096 * len(HOSTILE)  # folders may shrink themselves
    assert all(found.to_dict()["kinds"][kind]["remove"].isprintable() for kind in (disk.STATES, disk.WANDB_CACHE))
    again = look(root)
    assert not any(part.can_go for part in again.parts) and total(again) == du(root)


# --- what is told ---


def test_the_table_has_sums_reasons_and_commands(tmp_path: Path) -> None:
    make_run(Path("runs/a"), wandb={"offline-run-1-abc": False})
    fill(Path("data/cache/0.images"), 3 * 2**20)
    found = look()
    lines = disk.table(found).splitlines()
    decoded = next(line for line in lines if line.startswith("decoded images"))
    assert decoded.split("  ")[0] == "decoded images" and decoded.count("3.0 MiB") == 2
    assert decoded.endswith("decoded again when needed")
    assert "  rm -rf -- runs/a/state" in lines and "  rm -rf -- data/cache/0.images" in lines
    assert "  wandb sync runs/a/wandb/offline-run-1-abc" in lines
    assert not [line for line in lines if "rm" in line.split() and "offline" in line]
    assert max(map(len, lines)) <= 120


def test_where_there_is_nothing_the_table_says_so() -> None:
    found = look()
    assert found.parts == () and disk.table(found).splitlines()[1].split() == ["all", "0", "B", "0", "0", "B"]


def test_a_command_with_many_paths_is_in_the_plain_data(tmp_path: Path) -> None:
    for index in range(disk.PATHS_SHOWN + 1):
        make_run(Path(f"runs/{index}"))
    found = look()
    assert "  rm -rf -- ...  (21 paths; --json has the whole command)" in disk.table(found).splitlines()
    data = json.loads(json.dumps(found.to_dict()))
    assert len(data["kinds"][disk.STATES]["remove"].split()) == 3 + 21


@pytest.mark.parametrize(
    ("size", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (1536, "1.5 KiB"), (102_348, "99.9 KiB"), (10**12, "931 GiB")],
)
def test_sizes_have_two_to_three_digits(size: int, told: str) -> None:
    assert disk.size_text(size) == told


def test_a_given_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no folder of runs at '.*/nowhere'$"):
        look(tmp_path / "nowhere")


def test_a_folder_that_may_not_be_read_is_told_and_the_rest_counted(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    make_run(Path("runs/a"))
    fill(Path("runs/closed/file"))
    Path("runs/closed").chmod(0)
    tmp_path.joinpath("cwd").chmod(0o777)

    def look_as_nobody() -> None:
        os.setuid(65534)
        found = look()
        Path("told").write_text(json.dumps([found.notes, list(found.kinds()), disk.table(found)]))

    process = multiprocessing.get_context("fork").Process(target=look_as_nobody)
    process.start()
    process.join(60)
    notes, kinds, table = json.loads(Path("told").read_text())
    assert "cannot look into 'runs/closed': Permission denied" in notes and disk.WEIGHTS in kinds
    assert "note: cannot look into 'runs/closed': Permission denied\n" in table


def test_looking_needs_no_large_package() -> None:
    command = "import sys, eva.disk; sys.exit(bool({'torch', 'numpy', 'wandb'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
