"""What W&B holds after a run, by its own reader; and which mode a run gets, without asking anybody."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import wandb
from conftest import BIN, FAKE_KEY, SMALL_RUN, OfflineRun, flags, inspect
from PIL import Image

from eva.config import Layer, UserError, resolve
from eva.records import read_columns
from eva.tracker import EPOCH_METRICS, STEP_METRICS, WandbTracker, choose_mode

# An offline run, read back


def test_every_step_is_a_row_once_with_its_axes(offline_run: OfflineRun) -> None:
    rows = offline_run.rows("train/loss")
    assert [row["trainer/step"] for row in rows] == list(range(6))
    assert [row["epoch"] for row in rows] == pytest.approx([(step + 1) / 3 for step in range(6)])
    history = read_columns(offline_run.folder / "history.csv", [])
    for key, column in history.items():
        assert [row[key] for row in rows] == column, key


def test_every_epoch_is_a_row_once(offline_run: OfflineRun) -> None:
    rows = offline_run.rows("val/accuracy_best")
    assert [row["epoch"] for row in rows] == [1, 2]
    epochs = read_columns(offline_run.folder / "epochs.csv", [])
    for key, column in epochs.items():
        assert [row[key] for row in rows] == column, key


def test_no_row_was_refused_for_its_step(offline_run: OfflineRun) -> None:
    steps = [record["item"]["_step"] for record in offline_run.of_type("history")]
    assert steps == list(range(len(steps)))


def test_wandb_complains_about_nothing(offline_run: OfflineRun) -> None:
    assert offline_run.stderr == ""
    log = (Path(offline_run.summary["wandb_folders"][-1]) / "logs" / "debug.log").read_text()
    assert "WARNING" not in log and "ERROR" not in log


def test_batches_go_by_step_and_epochs_by_epoch(offline_run: OfflineRun) -> None:
    axes = {record.get("name") or record["glob_name"]: record for record in offline_run.of_type("metric")}
    assert all(axes[name]["step_metric"] == "trainer/step" for name in STEP_METRICS)
    assert all(axes[name]["step_metric"] == "epoch" for name in EPOCH_METRICS)
    assert {"train/loss", "lr"} <= set(STEP_METRICS) and {"val/*", "test/*"} <= set(EPOCH_METRICS)
    # Every number of a batch has an axis: no key is missing from the lists above.
    assert {*read_columns(offline_run.folder / "history.csv", [])} == {*STEP_METRICS, "trainer/step", "epoch"}


def config_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of the configuration, as W&B would show them after all updates."""
    config: dict[str, Any] = {}
    for record in records:
        update = record.get("run", {}).get("config", {}) if record["type"] == "run" else record.get("config", {})
        config.update(update.get("update", {}))
    return config


def test_the_configuration_is_resolved_and_says_what_ran(offline_run: OfflineRun) -> None:
    config = config_of(offline_run.records)
    assert (config["lr_max"], config["batch_size"], config["weight_decay"]) == (0.05, 20, 5e-4)
    assert config["tags"] == ["a", "b"]
    assert config["hardware"]["versions"]["wandb"] and config["hardware"]["versions"]["torch"]
    assert config["hardware"]["precision"] == "fp32"
    head = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    assert (config["git_commit"] or "").removesuffix("-dirty") == head.stdout.strip()
    assert config["data_fingerprint"] == offline_run.summary["data_fingerprint"]
    assert len(config["data_fingerprint"]) == 64
    assert config["parameters"] == offline_run.summary["parameters"] > 0


def test_the_best_weights_are_one_artifact_that_can_be_uploaded_later(offline_run: OfflineRun) -> None:
    (artifact,) = [artifact for artifact in offline_run.of_type("artifact") if artifact["type"] == "model"]
    assert (artifact["type"], sorted(artifact["aliases"])) == ("model", ["best", "latest"])
    assert artifact["name"] == f"model-{offline_run.summary['wandb_id']}"
    metadata = json.loads(artifact["metadata"])
    assert metadata["summary"]["val_accuracy_best"] == offline_run.summary["val_accuracy_best"]
    assert metadata["config"]["lr_max"] == 0.05
    (content,) = artifact["manifest"]["contents"]
    payload = Path(content["local_path"])
    assert payload.is_relative_to(offline_run.folder)
    assert payload.read_bytes() == (offline_run.folder / "best.safetensors").read_bytes()


@pytest.mark.parametrize("key", ["model/summary", "figures/loss", "figures/accuracy", "figures/lr"])
def test_table_and_figures_are_media(offline_run: OfflineRun, key: str) -> None:
    (row,) = offline_run.rows(f"{key}.path")
    assert (Path(offline_run.summary["wandb_folders"][-1]) / "files" / row[f"{key}.path"]).stat().st_size > 0


def test_the_run_ended_well_and_its_summary_says_so(offline_run: OfflineRun) -> None:
    assert [record["exit_code"] for record in offline_run.of_type("exit")] == [0]
    summary: dict[str, Any] = {}
    for record in offline_run.of_type("summary"):
        summary.update(record["update"])
    assert summary["status"] == "finished"
    assert summary["val/accuracy_best"] == summary["val_accuracy_best"] == offline_run.summary["val_accuracy_best"]


def test_all_of_wandbs_files_lie_below_the_run_folder(offline_run: OfflineRun) -> None:
    assert list(offline_run.cwd.iterdir()) == []
    assert [path for path in offline_run.home.rglob("*") if "wandb" in str(path.relative_to(offline_run.home))] == []
    assert Path(offline_run.summary["wandb_folders"][-1]).parent == offline_run.folder / "wandb"


def test_the_key_of_the_account_is_in_no_file_and_on_no_screen(offline_run: OfflineRun) -> None:
    files = [path for path in offline_run.folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    key = FAKE_KEY.encode()
    assert [path for path in files if key in path.read_bytes()] == []
    assert FAKE_KEY not in offline_run.stdout + offline_run.stderr


def test_runs_of_one_process_keep_to_their_own_folders_and_failures_show(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    config, _ = resolve([Layer("test", {"data": "digits", "name": "n", "group": "g"})])
    before = dict(os.environ)
    for name in ("first", "second"):
        tracker = WandbTracker(config, {"a": 1, "b": 1}, "train", tmp_path / name, name, "offline")
        (tmp_path / name).mkdir()
        with pytest.raises(RuntimeError, match="boom"), tracker:
            tracker.configure({"b": 2})
            tracker.log_text("text", "<script>&")
            tracker.log_artifact(f"model-{name}", "model", [picture], {}, ("best",))
            raise RuntimeError("boom")
        assert tracker.folder is not None
        records = inspect(tracker.folder)
        (artifact,) = [record["artifact"] for record in records if record["type"] == "artifact"]
        assert Path(artifact["manifest"]["contents"][0]["local_path"]).is_relative_to(tmp_path / name)
        assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [1]
        values = config_of(records)
        assert (values["a"], values["b"]) == (1, 2)
        (html,) = (tracker.folder / "files").rglob("*.html")
        assert "<script>" not in html.read_text() and "&lt;script&gt;&amp;" in html.read_text()
    assert {name: value for name, value in os.environ.items() if name.endswith("_DIR")} == {
        name: value for name, value in before.items() if name.endswith("_DIR")
    }


# Modes


def test_without_an_account_auto_is_offline_and_says_so_in_one_line() -> None:
    mode, remark = choose_mode("auto")
    assert mode == "offline"
    assert "no account" in remark and len(remark.splitlines()) == 1


def test_with_a_key_in_the_environment_auto_is_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    assert choose_mode("auto") == ("online", "")
    assert choose_mode("online") == ("online", "")


@pytest.mark.parametrize(
    ("host", "mode"), [("default", "online"), ("api.wandb.ai", "online"), ("example.org", "offline")]
)
def test_auto_is_online_if_netrc_knows_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, mode: str
) -> None:
    if host == "default":
        host = urlsplit(wandb.setup().settings.base_url).netloc
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {FAKE_KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert choose_mode("auto")[0] == mode


@pytest.mark.parametrize(
    ("wish", "mode"),
    [("offline", "offline"), ("online", "online"), ("Disabled", "disabled"), ("dryrun", "offline"), ("run", "online")],
)
def test_auto_follows_wandb_mode_and_a_setting_by_name_does_not(
    monkeypatch: pytest.MonkeyPatch, wish: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", wish)
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    found, remark = choose_mode("auto")
    assert found == mode and "WANDB_MODE" in remark
    for tracking in ("online", "offline", "disabled"):
        assert choose_mode(tracking) == (tracking, "")


def test_online_without_an_account_is_refused_instead_of_asking_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="W&B online needs an account: run `wandb login`"):
        choose_mode("online")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="W&B online needs an account: run `wandb login`"):
        choose_mode("auto")


def test_nobody_is_asked_for_an_account_and_disabled_does_not_import_wandb(clean_environment: dict[str, str]) -> None:
    program = """
import sys
from eva import experiment, tracker
assert tracker.choose_mode("disabled") == ("disabled", "")
assert "wandb" not in sys.modules
print(tracker.choose_mode("auto")[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean_environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "offline\n", "")


def test_a_run_has_a_client_of_its_own_whoever_started_it(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    """wandb hands its client to child processes by the environment; here that of a process that is gone by now."""
    begin = "import os, wandb; wandb.setup(); print(os.environ['WANDB_SERVICE'])"
    started = subprocess.run(
        [sys.executable, "-c", begin], env=clean_environment, capture_output=True, text=True, check=True, timeout=120
    )
    environment = {**clean_environment, "WANDB_SERVICE": started.stdout.strip()}
    command = [str(BIN / "eva"), "train", *flags({**SMALL_RUN, "tracking": "offline", "out": tmp_path / "run"})]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("W&B")) == (0, 0), done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["wandb_mode"], summary["wandb_lost"]) == ("offline", False)
    assert sum(record["type"] == "history" for record in inspect(Path(summary["wandb_folders"][0]))) >= 6
