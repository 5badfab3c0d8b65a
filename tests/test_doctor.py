"""`eva doctor`: that all is well where it is, and that each check fails when its subject is broken."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BIN, SMALL_RUN, OfflineRun, flags
from loopback import API_KEY, LoopbackServer
from PIL import Image
from test_signals import assert_nothing_is_left
from torch import Tensor, nn

from eva import doctor, experiment, lr_range
from eva.batched import BatchedPolicy
from eva.checkpoints import newest_state, save_state
from eva.cli import main
from eva.config import Layer, RunConfig, resolve
from eva.doctor import Check, Outcome, Subject
from eva.gradcam import CAMs, GradCAM
from eva.hardware import Hardware
from eva.loop import prepare
from eva.policies import Policy, build_policy
from eva.tracker import WandbTracker

pytestmark = pytest.mark.alone

NAMES = ["versions", "data", *doctor.CHECKS, "wandb"]
Draw = Sequence[int] | None


def configure(**settings: Any) -> RunConfig:
    return resolve([Layer("test", {**SMALL_RUN, "tracking": "offline", **settings})])[0]


@pytest.fixture(scope="module")
def built() -> experiment.Parts:
    """What the small run's configuration names."""
    return experiment.build(configure(policy="crop_flip_cutout", channels_last=True))


@pytest.fixture
def subject(built: experiment.Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A sound subject, of which little is timed."""
    monkeypatch.setattr(doctor, "TIMED_SECONDS", 0.4)
    return Subject(configure(policy="crop_flip_cutout", channels_last=True), built, tmp_path)


def look(name: str, subject: Subject) -> Check:
    return doctor.checked(name, partial(doctor.CHECKS[name], subject))


def with_policy(subject: Subject, make: Callable[[Policy], Any]) -> Subject:
    """Returns the subject with another policy, made of its own."""
    return replace(subject, parts=replace(subject.parts, policy=make(subject.parts.policy)))


# --- the whole command ---


def test_on_a_sound_machine_all_is_well_and_nothing_is_left(clean_environment: dict[str, str], tmp_path: Path) -> None:
    temporary, cwd = tmp_path / "temporary", tmp_path / "cwd"
    temporary.mkdir()
    cwd.mkdir()
    shared = set(os.listdir("/dev/shm"))
    settings = {**SMALL_RUN, "policy": "digits", "tracking": "offline"}
    process = subprocess.Popen(
        [str(BIN / "eva"), "doctor", *flags(settings), "--json"],
        env={**clean_environment, "TMPDIR": str(temporary)},
        cwd=cwd,
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    stdout, stderr = process.communicate(timeout=300)
    answer = json.loads(stdout)
    assert [(check["name"], check["status"]) for check in answer["checks"]] == [(name, "ok") for name in NAMES], stdout
    assert answer["healthy"] is True and process.returncode == 0 and stderr == ""
    assert all(check["line"] and check["measured"] and check["seconds"] >= 0 for check in answer["checks"])
    assert not list(cwd.iterdir())
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]  # torch's own
    assert_nothing_is_left(process, shared, seconds=5)


@pytest.fixture
def two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that need the data, only one that crashes, and one after it."""

    def crash(subject: Subject) -> Outcome:
        print("last words")
        return doctor.judged(True, f"{1 / len(subject.config.tags)}")

    sound = {"crash": crash, "last": lambda subject: doctor.judged(True, "all is well", value=float("nan"))}
    monkeypatch.setattr(doctor, "CHECKS", sound)
    monkeypatch.setattr(doctor, "check_wandb", lambda config: doctor.skipped("tracking is disabled"))


def test_a_crash_is_a_failure_and_the_others_follow(two_checks: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *flags(SMALL_RUN)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        *(["ok", "versions"], ["ok", "data"]),
        *(["failed", "crash"], ["ok", "last"], ["skipped", "wandb"]),
    ]
    assert "crashed: ZeroDivisionError: division by zero" in lines[2]
    assert lines[-1].startswith("3 ok, 1 skipped, failed: crash; ")


def test_json_is_one_object_and_nothing_else(two_checks: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *flags(SMALL_RUN), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    crash, last = answer["checks"][2:4]
    assert answer["healthy"] is False
    assert (crash["name"], crash["status"]) == ("crash", "failed")
    assert "in crash\n" in crash["measured"]["traceback"]
    assert last["measured"] == {"value": None}  # as strict readers want NaN


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--data=folder:nowhere"], "data=folder:PATH needs an existing folder, but got PATH='nowhere'"),
        (["--policy=nothing"], "unknown policy 'nothing'"),
        (["--epoch=3"], "did you mean 'epochs'"),
        (["--disk", "nowhere"], "no folder of runs at 'nowhere'"),
    ],
)
def test_what_a_training_would_refuse_is_a_mistake_of_the_users(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *flags(SMALL_RUN), "--json", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == "" and problem in told.err and told.err.count("\n") == 1


def test_disk_is_told_instead_as_a_table_or_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text("{}" * 3000)
    assert main(["doctor", "--disk", str(tmp_path), f"--data_dir={tmp_path / 'data'}"]) == 0
    assert "histories, settings" in capsys.readouterr().out
    assert main(["doctor", "--disk", str(tmp_path), f"--data_dir={tmp_path / 'data'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kinds"]["histories, settings"]["files"] == 1


def test_ctrl_c_ends_it_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(subject: Subject) -> Outcome:
        assert list(tmp_path.iterdir()) == [subject.folder]
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(doctor, "CHECKS", {"interrupt": interrupt})
    assert main(["doctor", *flags(SMALL_RUN)]) == 130
    assert not list(tmp_path.iterdir())


# --- versions, data ---


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes a distribution appear installed, before the one that is."""

    def install(name: str, version: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_versions_are_those_that_eva_asks_for(pretend: Callable[[str, str], None]) -> None:
    assert doctor.checked("versions", doctor.check_versions).status == "ok"
    pretend("wandb", "0.1")
    pretend("albumentations", "2.0.9")
    check = doctor.checked("versions", doctor.check_versions)
    assert check.status == "failed"
    assert "albumentations must be ==2.0.8, but is 2.0.9" in check.line
    assert "wandb must be <=0.31.0,>=0.28.1, but is 0.1" in check.line


def test_two_opencv_overwrite_each_other(pretend: Callable[[str, str], None]) -> None:
    pretend("opencv-python", "4.9.0")
    check = doctor.checked("versions", doctor.check_versions)
    assert check.status == "failed" and "opencv-python 4.9.0 and opencv-python-headless" in check.line


def test_a_torchvision_that_does_not_load_fails_and_the_rest_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    checks = {check.name: check for check in doctor.examine(configure(tracking="disabled"))}
    assert list(checks) == NAMES
    assert checks["versions"].status == "failed" and "don't work together" in checks["versions"].line
    assert {check.status for name, check in checks.items() if name != "versions"} == {"skipped"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An image folder of two classes."""
    draws = np.random.default_rng(0)
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "pictures" / place).mkdir(parents=True)
        for number in range(15):
            image = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "pictures" / place / f"{number}.png")
    return tmp_path / "pictures"


def test_a_data_dir_that_can_not_be_written_fails(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = configure(
        data=f"folder:{pictures}", data_dir=str(tmp_path / "file" / "data"), tracking="disabled", train_limit=None
    )
    checks = {check.name: check for check in doctor.examine(config)}
    assert list(checks) == NAMES
    assert checks["data"].status == "failed" and "data_dir must be writable" in checks["data"].line
    assert {checks[name].status for name in doctor.CHECKS} == {"skipped"}


def test_a_folder_of_images_is_loaded_and_told(pictures: Path, tmp_path: Path) -> None:
    config = configure(data=f"folder:{pictures}", data_dir=str(tmp_path / "data"), train_limit=None)
    check, parts = doctor.load(config)
    assert parts is not None and check.status == "ok"
    assert "26 train, 4 val, 30 test images of 2 classes" in check.line


# --- device and precision ---


def test_a_precision_that_is_not_computed_in_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = replace(subject.parts.hardware, autocast_dtype=torch.bfloat16)
    subject = replace(subject, parts=replace(subject.parts, hardware=chosen))
    assert "compute in bfloat16" in look("device", subject).line
    monkeypatch.setattr(Hardware, "autocast", lambda self: torch.autocast("cpu", enabled=False))
    check = look("device", subject)
    assert check.status == "failed" and check.line == "precision is bf16, but a layer computes in float32"


def spoilt(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[nn.Module], object]) -> None:
    """Has trainings prepared with something wrong about the model."""

    def prepared(*arguments: Any) -> Any:
        training = prepare(*arguments)
        spoil(training.model)
        return training

    monkeypatch.setattr(doctor, "prepare", prepared)


def test_tensors_that_lie_elsewhere_or_otherwise_fail(subject: Subject) -> None:
    assert look("device", subject).status == "ok"
    with pytest.MonkeyPatch.context() as patch:
        spoilt(patch, lambda model: model.register_buffer("lost", torch.empty(1, device="meta")))
        check = look("device", subject)
    assert check.status == "failed" and "tensors are not on cpu, but on meta" in check.line
    with pytest.MonkeyPatch.context() as patch:
        spoilt(patch, lambda model: model.to(memory_format=torch.contiguous_format))
        check = look("device", subject)
    assert check.status == "failed" and "weights of convolutions are not channels-last" in check.line


# --- speed and tracking ---


class SlowPolicy:
    """Takes its time."""

    name, is_random = "slow", True

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(self, image: Any, seed: Draw = None) -> Tensor:
        time.sleep(0.02)
        return self.policy(image, seed)


def test_loading_that_holds_the_network_up_fails(subject: Subject) -> None:
    assert look("speed", subject).status == "ok"
    check = look("speed", with_policy(subject, SlowPolicy))
    assert check.status == "failed" and "loading and augmentation by no workers hold it up" in check.line
    assert check.measured["images_per_second"] < 50


def test_a_loop_that_ends_by_itself_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "fit", lambda *arguments: "diverged")
    check = look("speed", subject)
    assert check.status == "failed" and "the loop ended (diverged)" in check.line


def test_a_tracker_that_takes_its_time_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    log = WandbTracker.log

    def slow(self: WandbTracker, row: Mapping[str, Any]) -> None:
        log(self, row)
        time.sleep(0.1)

    monkeypatch.setattr(WandbTracker, "log", slow)
    check = look("tracking", subject)
    assert check.status == "failed" and check.measured["row_seconds"] > 0.1 > check.measured["row_seconds_off"]


def test_without_tracking_there_is_nothing_to_measure(subject: Subject) -> None:
    check = look("tracking", replace(subject, config=replace(subject.config, tracking="disabled")))
    assert (check.status, check.line) == ("skipped", "tracking is disabled")


# --- augmentation ---


class Spoilt:
    """A policy that is given another seed."""

    is_random = True

    def __init__(self, seed: Callable[[Sequence[int]], Sequence[int]], policy: Policy) -> None:
        self.policy, self.seed, self.name = policy, seed, policy.name

    def __call__(self, image: Any, seed: Draw = None) -> Tensor:
        assert seed is not None
        return self.policy(image, self.seed(seed))


def counter() -> Callable[[Sequence[int]], Sequence[int]]:
    """Returns a seed with a state, which each worker gets a copy of: NumPy's global generator, for one."""
    drawn = iter(range(10**6))
    return lambda seed: (next(drawn),)


@pytest.mark.parametrize(
    ("seed", "problem"),
    [
        (lambda seed: (0,), "makes the same of an image in all 256 draws"),
        (lambda seed: (seed[0], 0, seed[2]), "128 of 128 draws of two epochs, by image are the same"),
        (counter(), "64 of 64 draws of two workers are the same"),
        (lambda seed: (os.getpid(), *seed), "two workers give other images than none"),
    ],
    ids=["ignores its draw", "ignores the epoch", "has a state", "depends on the process"],
)
def test_a_policy_that_repeats_itself_fails(subject: Subject, seed: Any, problem: str) -> None:
    check = look("augmentation", with_policy(subject, partial(Spoilt, seed)))
    assert check.status == "failed" and problem in check.line


@pytest.mark.parametrize("name", ["flip", "crop_flip", "color", "test"])
def test_what_repeats_by_chance_alone_is_well(subject: Subject, name: str) -> None:
    for seed in range(5):
        sound = with_policy(subject, lambda _: build_policy(name, (0.5,) * 3, (0.25,) * 3))
        check = look("augmentation", replace(sound, config=replace(sound.config, seed=seed)))
        assert check.status == "ok", check.line


def test_batches_made_as_a_whole_are_looked_at_too(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = with_policy(subject, lambda _: build_policy("crop_flip_cutout", (0.5,) * 3, (0.25,) * 3))
    assert "batches of 32 draw as those of 16" in look("augmentation", whole).line
    by_image = replace(whole, config=replace(whole.config, augmentation="albumentations"))
    assert "two workers draw as none" in look("augmentation", by_image).line
    draw = BatchedPolicy.draw
    monkeypatch.setattr(BatchedPolicy, "draw", lambda self, num_images, seed, epoch: draw(self, num_images, seed, 0))
    check = look("augmentation", whole)
    assert check.status == "failed" and "128 of 128 draws of two epochs, by image are the same" in check.line


# --- what looks at a model ---


class Mingled(nn.Module):
    """Makes each image depend on the others of its batch, also in eval mode."""

    def forward(self, images: Tensor) -> Tensor:
        return images - images.mean(0, keepdim=True) if len(images) > 1 else images


def test_maps_that_depend_on_the_batch_fail(subject: Subject) -> None:
    sound = look("gradcam", subject)
    assert sound.status == "ok" and max(sound.measured["difference"].values()) < 1e-4
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Mingled(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(8 * 28 * 28, 10))
    check = look("gradcam", replace(subject, parts=replace(subject.parts, model=model)))
    assert check.status == "failed" and "maps of a batch and of single images differ by" in check.line


def test_a_model_without_maps_has_nothing_to_compare(subject: Subject) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    check = look("gradcam", replace(subject, parts=replace(subject.parts, model=model)))
    assert check.status == "skipped" and "no layer whose output is a map" in check.line


def first(model: nn.Module) -> nn.Parameter:
    return next(model.parameters())


TOUCHES: dict[str, Callable[[nn.Module], object]] = {
    "weights": lambda model: first(model).data.mul_(1 + 1e-6),
    "buffers": lambda model: next(model.buffers()).add_(1e-6),
    "gradients": lambda model: setattr(first(model), "grad", None),
    "requires_grad": lambda model: first(model).requires_grad_(False),
    "modes": lambda model: model.eval(),
    "hooks": lambda model: model.register_forward_hook(lambda *_: None),
    "random generators": lambda model: np.random.random(),
}


@pytest.mark.parametrize("what", TOUCHES)
def test_a_model_that_is_not_as_it_was_fails(subject: Subject, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, record = GradCAM.__call__, lr_range.record_curve

    def touching(self: GradCAM, *arguments: Any) -> CAMs:
        TOUCHES[what](self.model)
        return call(self, *arguments)

    def recording(config: Any, hardware: Any, model: nn.Module, loader: Any) -> Any:
        TOUCHES[what](model)
        return record(config, hardware, model, loader)

    monkeypatch.setattr(GradCAM, "__call__", touching)
    monkeypatch.setattr(lr_range, "record_curve", recording)
    lines = {"gradcam": "Grad-CAM leaves the model with other", "range_test": "the range test leaves other"}
    for name, line in lines.items():
        check = look(name, subject)
        assert check.status == "failed" and line in check.line and what in check.measured["changed"]


def test_a_range_test_of_the_model_itself_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look("range_test", subject).status == "ok"
    monkeypatch.setattr(lr_range, "copy", SimpleNamespace(deepcopy=lambda model: model))
    check = look("range_test", subject)
    assert check.status == "failed" and {"weights", "buffers", "gradients"} <= set(check.measured["changed"])


# --- a kill ---


def spoil(folder: Path) -> None:
    """Makes a run go on with a weight, a generator and a row that are not its own."""
    newest = newest_state(folder)
    assert newest is not None
    state = newest[0]
    weight = next(value for value in state["model"].values() if value.is_floating_point())
    weight[(0,) * weight.ndim] += 1e-6
    torch.manual_seed(1)
    save_state(folder, {**state, "random": {**state["random"], "torch": torch.get_rng_state()}})
    lines = (folder / "history.csv").read_text().splitlines()
    step, epoch, loss, *others = lines[1].split(",")
    changed = ",".join([step, epoch, str(1.001 * float(loss)), *others])
    (folder / "history.csv").write_text("\n".join([lines[0], changed, *lines[2:], ""]))


def test_a_run_that_is_killed_and_resumed_is_the_run_left_alone(subject: Subject) -> None:
    check = look("resume", subject)
    assert check.status == "ok" and check.measured["exact"] is True
    assert 0 < check.measured["killed_after"] < check.measured["steps"]


def test_what_does_not_come_back_after_a_kill_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    kill = doctor.kill_one

    def killed(config: RunConfig) -> int | None:
        step = kill(config)
        if step is not None:
            spoil(Path(str(config.out)))
        return step

    monkeypatch.setattr(doctor, "kill_one", killed)
    check = look("resume", subject)
    assert check.status == "failed" and "is another than the run left alone in:" in check.line
    assert {"model", "random", "rows"} <= set(check.measured["different"])


def test_a_run_that_fails_or_can_not_be_killed_in_time_fails(subject: Subject, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "saved_states", lambda folder: [])  # as if it were through too soon
        patch.setattr(doctor, "ATTEMPTS", 1)
        check = look("resume", subject)
    assert check.status == "failed" and "through before they could be killed" in check.line
    broken = replace(subject, config=replace(subject.config, policy="nothing"), folder=tmp_path / "other")
    check = look("resume", broken)
    assert check.status == "failed" and "ended with 1; its last words:" in check.line
    assert "unknown policy 'nothing'" in check.line


# --- W&B ---


def ask(environment: Mapping[str, str], config: RunConfig, answers: Connection) -> None:
    """Sends what the check of W&B comes to. Runs in a process of its own."""
    os.environ.clear()
    os.environ.update(environment)
    doctor.WANDB_SECONDS = 1.0
    answers.send(doctor.checked("wandb", partial(doctor.check_wandb, config)))


@pytest.fixture
def wandb_check(clean_environment: dict[str, str]) -> Callable[..., Check]:
    """Returns the check of W&B in a process that has these variables too."""

    def check(tracking: str, **variables: str) -> Check:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["eva.doctor", "wandb", "test_doctor"])
        answers, theirs = context.Pipe(duplex=False)
        environment = {**clean_environment, **variables}
        process = context.Process(target=ask, args=(environment, configure(tracking=tracking), theirs))
        process.start()
        theirs.close()
        answer: Check = answers.recv()
        process.join(20)
        assert process.exitcode == 0
        assert API_KEY not in answer.line and API_KEY not in str(answer.measured)
        return answer

    return check


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with LoopbackServer() as server:
        yield server


def test_an_account_that_the_server_knows_is_well(wandb_check: Callable[..., Check], server: LoopbackServer) -> None:
    check = wandb_check("auto", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server.url)
    assert check.status == "ok" and check.line == f"online; {server.url} knows this account"
    assert not server.unknown


def test_a_server_that_is_needed_and_does_not_answer_fails_in_time(
    wandb_check: Callable[..., Check], server: LoopbackServer
) -> None:
    account = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server.url}
    server.rejects_key = True
    assert wandb_check("auto", **account).status == "failed"
    server.rejects_key, server.failing = False, 1.0  # the client would repeat its question
    check = wandb_check("auto", **account)
    assert check.status == "failed" and check.seconds < 5
    server.failing, server.silent = 0.0, True
    for tracking, key in (("online", account), ("auto", {"WANDB_BASE_URL": server.url})):
        check = wandb_check(tracking, **key)
        assert check.seconds < 5
        assert check.status == ("failed" if tracking == "online" else "ok")
        assert check.measured["reachable"] is False
    server.silent = False
    server.stop()
    try:
        assert wandb_check("online", **account).status == "failed"
    finally:
        server.start()


def test_a_name_that_is_looked_up_for_minutes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WANDB_SECONDS", 0.2)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: time.sleep(5))
    started = time.monotonic()
    assert doctor.connection_problem("https://nowhere.example") == "no answer in 0.2 s"
    assert time.monotonic() - started < 2


def test_no_account_is_no_failure_unless_one_is_asked_for(
    wandb_check: Callable[..., Check], server: LoopbackServer
) -> None:
    check = wandb_check("auto", WANDB_BASE_URL=server.url)
    assert check.status == "ok" and check.measured == {
        **{"mode": "offline", "server": server.url},
        **{"reachable": True, "problem": None},
    }
    assert "offline, as no account is set up here" in check.line and check.line.endswith(f"{server.url} is reachable")
    check = wandb_check("online", WANDB_BASE_URL=server.url)
    assert check.status == "failed" and "W&B online needs an account" in check.line
    assert wandb_check("disabled").status == "skipped"


# --- disk ---


def test_a_disk_that_is_too_small_fails(subject: Subject, small_disk: Callable[..., Path]) -> None:
    assert look("disk", subject).status == "ok"
    disk = small_disk("4m")
    check = look("disk", replace(subject, config=replace(subject.config, out=str(disk / "runs" / "a"))))
    assert check.status == "failed" and f"where {str(disk / 'runs' / 'a')!r} is, but 4.0 MiB are free" in check.line
    check = look("disk", replace(subject, config=replace(subject.config, wandb_dir=str(disk))))
    assert check.status == "failed" and f"where {str(disk)!r} is" in check.line


def test_a_run_folder_that_can_not_be_written_fails(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = look("disk", replace(subject, config=replace(subject.config, out=str(tmp_path / "file" / "run"))))
    assert check.status == "failed" and "can't be written" in check.line


def test_what_a_run_writes_is_no_more_than_was_expected(offline_run: OfflineRun, tmp_path: Path) -> None:
    config = configure(evaluate=True)
    subject = Subject(config, experiment.build(config), tmp_path)
    sizes = doctor.expected_bytes(subject)
    folder = offline_run.folder
    states = [path.stat().st_size for path in (folder / "state").iterdir()]
    assert 0.5 * sizes["states"] / 3 < max(states) < 1.1 * sizes["states"] / 3
    assert (folder / "best.safetensors").stat().st_size < 1.1 * sizes["weights"] / 2
    rows = (folder / "history.csv").read_text().splitlines(keepends=True)[1:]
    assert 0.4 * doctor.ROW < max(map(len, rows)) <= doctor.ROW
    of_wandb = sum(path.stat().st_size for path in (folder / "wandb").rglob("*") if path.is_file())
    assert of_wandb < sizes["wandb"]
    everything = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert everything < sum(sizes.values())
