"""The command line: what a W&B agent writes, precedence, help, and mistakes in one line with exit code 2."""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import BIN, SMALL_RUN, OfflineRun, flags
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_config import same, valid_settings
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from eva.cli import build_parser, configure, main, print_settings
from eva.config import EVALUATION_SETTINGS, FIELDS, RunConfig, UserError, default_of, describe_type, to_dict
from eva.recipes import RECIPES
from eva.sweep_file import read_sweep

ROOT = Path(__file__).parent.parent


def parsed(*arguments: str) -> tuple[RunConfig, dict[str, str]]:
    """Returns what `eva train` makes of its arguments."""
    return configure(*build_parser().parse_known_args(["train", *arguments]))


def agent_writes(values: Mapping[str, Any], macro: str = "args") -> list[str]:
    """Returns the arguments that the installed `wandb agent` makes of a sweep's parameters."""
    return list(create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})[macro])


# --- what a W&B agent writes ---


@settings(max_examples=40, deadline=None)
@given(valid_settings(), st.sampled_from(["args", "args_no_hyphens"]))
def test_every_setting_arrives_as_the_agent_was_given_it(values: dict[str, Any], macro: str) -> None:
    as_yaml = to_dict(RunConfig(**values))  # a sweep has lists, no tuples
    config, _ = parsed(*agent_writes(as_yaml, macro))
    assert same(config, RunConfig(**values))


@settings(max_examples=40, deadline=None)
@given(valid_settings())
def test_arguments_without_equals_signs_arrive_too(values: dict[str, Any]) -> None:
    as_yaml = {name: value for name, value in to_dict(RunConfig(**values)).items() if not str(value).startswith("-")}
    config, _ = parsed(*agent_writes(as_yaml, "args_no_equals"))
    assert same(config, RunConfig(**{name: values[name] for name in as_yaml}))


@settings(max_examples=40, deadline=None)
@given(valid_settings())
def test_settings_arrive_as_one_json_object_or_the_path_of_one(values: dict[str, Any]) -> None:
    (argument,) = agent_writes(to_dict(RunConfig(**values)), "args_json")
    assert same(parsed(argument)[0], RunConfig(**values))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config-x.json"
        path.write_text(argument, encoding="utf-8")
        assert same(parsed(str(path))[0], RunConfig(**values))


def test_a_flag_after_a_json_object_wins_over_it() -> None:
    config, _ = parsed('{"lr_max": 0.2, "policy_options": {"cutout": 8}}', "--lr_max=0.4", "--policy_options.cutout=4")
    assert (config.lr_max, config.policy_options) == (0.4, {"cutout": 4})


@settings(max_examples=40, deadline=None)
@given(valid_settings())
def test_omitted_false_booleans_leave_the_defaults(values: dict[str, Any]) -> None:
    config, _ = parsed(*agent_writes(to_dict(RunConfig(**values)), "args_no_boolean_flags"))
    told = {name: value for name, value in values.items() if value is not False}
    assert same(config, RunConfig(**told))


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--lr_max=0.4"], "lr_max", 0.4),
        (["--weight_decay=1e-05"], "weight_decay", 1e-5),
        (["--weight_decay=1e-5"], "weight_decay", 1e-5),
        (["--weight_decay", "1e-5"], "weight_decay", 1e-5),
        (["weight_decay=1e-5"], "weight_decay", 1e-5),
        (["--nesterov=True"], "nesterov", True),
        (["--nesterov=true"], "nesterov", True),
        (["--nesterov=False"], "nesterov", False),
        (["--nesterov=false"], "nesterov", False),
        (["--nesterov", "False"], "nesterov", False),
        (["--compile"], "compile", True),
        (["--compile", "--epochs=30"], "compile", True),
        (["--channels_last"], "channels_last", True),
        (["--grad_clip=None"], "grad_clip", None),
        (["--stage_strides=[1, 2, 2, 1]"], "stage_strides", (1, 2, 2, 1)),
        (["--stage_strides", "[1, 2, 2, 1]"], "stage_strides", (1, 2, 2, 1)),
        (["--policy_options={'cutout': 16}"], "policy_options", {"cutout": 16}),
        (["--policy_options.cutout=16"], "policy_options", {"cutout": 16}),
        (["--policy_options.cutout", "16"], "policy_options", {"cutout": 16}),
        (["policy_options.cutout=16"], "policy_options", {"cutout": 16}),
        (
            ["--policy_options={'flip': 0.5}", "--policy_options.cutout=16"],
            "policy_options",
            {"flip": 0.5, "cutout": 16},
        ),
        (["--group=123"], "group", "123"),
        (["--name=1e5"], "name", "1e5"),
        (["--name=-3"], "name", "-3"),
        (["--name=a=b"], "name", "a=b"),
        (["--name=two words"], "name", "two words"),
        (["--tags=['a', 'b']"], "tags", ("a", "b")),
        (["--epochs=7", "--epochs=9"], "epochs", 9),
    ],
)
def test_arguments_as_people_and_agents_write_them(arguments: list[str], name: str, value: Any) -> None:
    config, sources = parsed(*arguments)
    assert repr(getattr(config, name)) == repr(value)
    assert sources[name] == "command line"


def test_a_negative_number_is_a_value() -> None:
    for arguments in (["--seed=-1"], ["--seed", "-1"]):
        with pytest.raises(UserError, match=r"^seed must be in \[0, 2\*\*63\), but got seed=-1$"):
            parsed(*arguments)


# --- recipe, file, flags ---


def test_flags_win_over_the_file_which_wins_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("recipe: resnet18-color\nbatch_size: 64\nepochs: 30\npolicy_options: {cutout: 8, hue: 5}\n")
    config, sources = parsed(f"--config={path}", "--epochs=40", "--policy_options.cutout=4")
    assert (config.recipe, config.schedule, config.batch_size, config.epochs) == ("resnet18-color", "step", 64, 40)
    assert config.policy_options == {"cutout": 4, "hue": 5}
    where = {name: sources[name] for name in ("schedule", "batch_size", "epochs")}
    assert where == {"schedule": "recipe resnet18-color", "batch_size": f"file {path}", "epochs": "command line"}

    other, sources = parsed(f"--config={path}", "--recipe=resnet9-onecycle")
    assert (other.recipe, other.model, other.batch_size) == ("resnet9-onecycle", "resnet9", 64)
    assert sources["recipe"] == "command line"

    none, _ = parsed(f"--config={path}", "--recipe=None")
    assert (none.recipe, none.schedule, none.batch_size) == (None, RunConfig().schedule, 64)


def test_each_setting_that_is_not_at_its_default_is_printed_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    config, sources = parsed("--recipe=resnet18-layernorm", "--patience=9", "--seed=0")
    print_settings(config, sources)
    told = dict(line.split(" = ", 1) for line in capsys.readouterr().out.splitlines())
    assert told.keys() == {name for name, field in FIELDS.items() if getattr(config, name) != default_of(field)}
    assert told["patience"] == "9  (command line)"
    assert told["stage_strides"] == "[1, 2, 2, 1]  (recipe resnet18-layernorm)"
    assert "seed" not in told


@settings(max_examples=30, deadline=None)
@given(valid_settings(), st.none() | st.sampled_from(sorted(RECIPES)))
def test_a_resolved_configuration_fed_back_gives_the_same(values: dict[str, Any], recipe: str | None) -> None:
    first, _ = parsed(*flags(to_dict(RunConfig(**{**values, "recipe": recipe}))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(to_dict(first), sort_keys=False))
        again, _ = parsed("--config", str(path))
    assert same(first, again)


def test_the_configuration_that_a_run_leaves_gives_the_same_run_again(offline_run: OfflineRun) -> None:
    config, _ = parsed(f"--config={offline_run.folder / 'config.yaml'}")
    told, _ = parsed(
        *flags({**SMALL_RUN, "evaluate": True, "tracking": "offline", "out": offline_run.folder, "tags": "a,b"})
    )
    assert same(config, told)


# --- help ---


@pytest.mark.parametrize("command", ["train", "find_lr", "evaluate"])
def test_every_setting_is_a_flag_whose_help_has_type_default_and_unit(command: str) -> None:
    answer = subprocess.run([BIN / "eva", command, "--help"], capture_output=True, text=True, check=True)
    words = " ".join(answer.stdout.split())
    known = EVALUATION_SETTINGS if command == "evaluate" else FIELDS
    assert not any(f"--{name} [" in words for name in FIELDS if name not in known)
    for name, field in ((name, FIELDS[name]) for name in known):
        unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
        default = default_of(field)
        shown = "none" if default is None else str(list(default) if isinstance(default, tuple) else default)
        told = f"{field.metadata['help']}{unit}; {describe_type(name)} (default: {shown})"
        # The help breaks lines after hyphens, too.
        assert told.replace(" ", "") in words.replace(" ", ""), name
        assert f"--{name} " in words
    assert answer.stderr == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import contextlib, sys\nfrom eva.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print({'torch', 'torchvision', 'wandb', 'albumentations', 'pydantic', 'numpy'} & sys.modules.keys())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in answer.stdout for command in ("train", "find_lr", "evaluate", "compare"))
    assert answer.stdout.splitlines()[-1] == "set()"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_list_shows_parameters_batch_epochs_schedule_and_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["recipe", "parameters", "batch", "epochs", "schedule", "report"]
    rows = {name: columns for name, *columns in map(str.split, lines)}
    assert rows.keys() == RECIPES.keys()
    resnet18 = "11,173,962"
    assert rows == {
        "resnet18-plateau": [resnet18, "32", "50", "plateau", "90.63", "%"],
        "resnet18-color": [resnet18, "128", "24", "step", "88.97", "%"],
        "resnet18-onecycle-long": [resnet18, "64", "50", "onecycle", "91.77", "%"],
        "resnet18-onecycle": [resnet18, "64", "20", "cosine_onecycle", "92.11", "%"],
        "resnet18-layernorm": [resnet18, "128", "40", "plateau", "89.40", "%"],
        "resnet9-onecycle": ["6,573,120", "512", "24", "onecycle", "90.00", "%"],
        "speedrun": ["1,971,640", "2000", "8", "onecycle", "94.00", "%"],
    }


def test_show_schedule_draws_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find_lr", "--show_schedule", "--schedule=triangular", f"--out={tmp_path}"]) == 0
    path = tmp_path / "schedule-triangular.png"
    assert f"schedule: {path}" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.format == "PNG"


# --- mistakes ---


def files_below(folder: Path) -> dict[str, bytes | None]:
    """Returns everything below a folder, the content of files, None for folders."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Runs a command that must be refused in single lines, and returns those lines without their prefix."""
    try:
        code = main(arguments)
    except SystemExit as leaving:  # argparse's way out
        assert isinstance(leaving.code, int)
        code = leaving.code
    prefix = f"eva {arguments[0]}: error: "
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, lines
    assert lines and all(line.startswith(prefix) for line in lines)
    return [line.removeprefix(prefix) for line in lines]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def small(**changes: Any) -> list[str]:
    """Returns the arguments of a run that would take a second, if nothing were wrong with it."""
    return ["train", *flags({**SMALL_RUN, "tracking": "disabled", "data_dir": "data", **changes})]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--lr_maxx=0.1"], ["command line: unknown setting 'lr_maxx'; did you mean 'lr_max'?"]),
        (["--epoch", "3"], ["command line: unknown setting 'epoch'; did you mean 'epochs'?"]),
        (["epoch=3"], ["command line: unknown setting 'epoch'; did you mean 'epochs'?"]),
        (["--qqqqq"], ["command line: unknown setting 'qqqqq'; eva train --help lists the settings"]),
        (["--list", "--qqqqq"], ["command line: unknown setting 'qqqqq'; eva train --help lists the settings"]),
        (["--epochs=many"], ["command line: epochs must be a whole number, but got 'many'"]),
        (["--epochs"], ["command line: epochs must be a whole number, but got no value"]),
        (["--name", "--epochs=30"], ["command line: name must be text or none, but got no value"]),
        (
            ["--lr_max", "--bogus=1"],
            [
                "command line: lr_max must be a number or find, but got no value",
                "command line: unknown setting 'bogus'",
            ],
        ),
        (["--lr_min=0.3"], ["lr_min must not be above lr_max, but got lr_min=0.3, lr_max=0.1"]),
        (['{"epochs": 3'], ["command line: '{\"epochs\": 3' is not JSON: "]),
        (['{"epochs": "3 or so"}'], ["command line: epochs must be a whole number, but got '3 or so'"]),
        (["none.json"], ["cannot read 'none.json': No such file or directory"]),
        (["--config=none.yaml"], ["cannot read 'none.yaml': No such file or directory"]),
        (["--config="], ["cannot read '': "]),
        (
            ["--recipe=resnet9-onecycel"],
            ["unknown recipe 'resnet9-onecycel' (did you mean 'resnet9-onecycle'?); known: "],
        ),
        (["--recipe="], ["unknown recipe ''; known: "]),
        (["--model=resnet19"], ["unknown model 'resnet19' (did you mean 'resnet9'?); known: resnet18, resnet9, "]),
        (["--policy=flop"], ["unknown policy 'flop' (did you mean 'flip'?); known: "]),
        (["--policy=none.yaml"], ["cannot read 'none.yaml': No such file or directory"]),
        (
            ["--policy_options.cutouts=8"],
            ["unknown option of policy 'crop_flip_cutout': 'cutouts' (did you mean 'cutout'?)"],
        ),
        (["--device=cuda:99"], ["this machine has "]),
        (["--device=gpu"], ["device must be auto, cpu, cuda or cuda:N, but got device='gpu'"]),
        (
            ["--device=cpu", "--precision=fp16"],
            ["precision must be fp32, bf16 or auto on a CPU, but got precision='fp16'"],
        ),
        (["--tracking=online"], ["W&B online needs an account: "]),
        (
            ["--project=a/b"],
            ["project must have at most 128 characters, and none of / \\ # ? % :, but got project='a/b'"],
        ),
        (
            ["--model=resnet19", "--policy=flop", "--device=gpu"],
            ["device must be auto", "unknown policy 'flop'", "unknown model 'resnet19'"],
        ),
        (
            [
                "--recipe=resnet10",
                "--lr_maxx=1",
                "--epochs=many",
                "--peak_epoch=30",
                "--dropout=2",
                "--config=none.yaml",
            ],
            [
                "cannot read 'none.yaml': ",
                "unknown recipe 'resnet10' ",
                "command line: unknown setting 'lr_maxx'",
                "command line: epochs must be a whole number, but got 'many'",
                "dropout must be in [0, 1), but got dropout=2.0",
            ],
        ),
    ],
)
def test_mistakes_are_lines_and_nothing_is_written(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], lines: list[str]
) -> None:
    told = refused(["train", *arguments], capsys)
    assert len(told) == len(lines)
    for line, expected in zip(told, lines, strict=True):
        assert line.startswith(expected)
    assert files_below(workplace) == {}


def test_all_problems_of_a_file_are_told_with_its_name(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "a.yaml").write_text(
        "recipe: resnet99\nlrmax: 1\nepochs: [1]\nnesterov: perhaps\nl1: -1\nseed: true\n"
    )
    assert refused(["find_lr", "--config=a.yaml", "--l1s=0"], capsys) == [
        f"unknown recipe 'resnet99' (did you mean 'resnet9-onecycle'?); known: {', '.join(sorted(RECIPES))}",
        "file a.yaml: unknown setting 'lrmax'; did you mean 'lr_max'?",
        "command line: unknown setting 'l1s'; did you mean 'l1'?",
        "file a.yaml: epochs must be a whole number, but got [1]",
        "file a.yaml: nesterov must be true or false, but got 'perhaps'",
        "file a.yaml: seed must be a whole number, but got True",
        "l1 must not be negative, but got l1=-1.0",
    ]


@pytest.mark.parametrize("content", ["- a\n", "epochs: 3\nepochs: 4\n", "{", "\0"])
def test_a_file_without_settings_is_a_line(workplace: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (workplace / "a.yaml").write_text(content)
    (line,) = refused(["train", "--config=a.yaml"], capsys)
    assert "'a.yaml'" in line


def test_a_recipe_that_is_no_text_is_a_wrong_type(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "a.yaml").write_text("recipe: [resnet18-color]\n")
    (line,) = refused(["train", "--config=a.yaml"], capsys)
    assert line == "file a.yaml: recipe must be text or none, but got ['resnet18-color']"


@pytest.mark.parametrize("out", ["a_file", "a_file/run", "/proc/run", "full"])
def test_an_output_folder_that_cannot_be_written_is_a_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    (workplace / "a_file").write_text("kept")
    (workplace / "full").mkdir()
    (workplace / "full" / "kept").write_text("kept")
    before = files_below(workplace)
    (line,) = refused(small(out=out), capsys)
    assert f"run folder {out!r}" in line and "choose another --out" in line
    assert files_below(workplace) == before


def test_show_schedule_tells_a_folder_that_cannot_be_written(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "a_file").write_text("kept")
    (line,) = refused(["find_lr", "--show_schedule", "--out=a_file/x"], capsys)
    assert line == "cannot write 'a_file/x/schedule-onecycle.png': Not a directory"
    (line,) = refused(["find_lr", "--show_schedule", "--lr_max=find"], capsys)
    assert line == "--show_schedule needs numbers for lr_min and lr_max, but got find"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image folder of two classes, three images each for train and two for test."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return tmp_path / "images"


def truncate(path: Path) -> None:
    """Cuts a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("missing folder", ["needs an existing folder", "nothing_here"]),
        ("empty folder", ["has no folder 'train'"]),
        ("empty class", ["class 'dog' of train is empty"]),
        ("truncated image", ["1 unreadable image(s)", "train/cat/1.jpg"]),
        ("large batch", ["batch_size must be between 1 and the number of train images", "batch_size=20 with 6 train"]),
        ("unknown data", ["unknown data 'cifar11' (did you mean 'cifar10'?)"]),
        ("large train_limit", ["train_limit must be between 2 (one per class) and 6 (all images), but got 60"]),
    ],
)
def test_data_that_do_not_do_are_a_line_and_leave_no_run(
    workplace: Path, images: Path, capsys: pytest.CaptureFixture[str], mistake: str, words: list[str]
) -> None:
    changes: dict[str, Any] = {"data": f"folder:{images}", "val_fraction": 0, "train_limit": "None", "policy": "flip"}
    match mistake:
        case "missing folder":
            changes["data"] = f"folder:{images}/nothing_here"
        case "empty folder":
            (images / "empty").mkdir()
            changes["data"] = f"folder:{images}/empty"
        case "empty class":
            for path in (images / "train" / "dog").iterdir():
                path.unlink()
        case "truncated image":
            truncate(images / "train" / "cat" / "1.jpg")
        case "unknown data":
            changes["data"] = "cifar11"
        case "large train_limit":
            changes["train_limit"] = 60
    before = files_below(images)
    (line,) = refused(small(**changes, out="run"), capsys)
    assert all(word in line for word in words), line
    assert files_below(images) == before
    assert not (workplace / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "has ended (status 'finished'): nothing to resume"),
        (
            ["--epochs=9"],
            "--resume goes on as the run began: only data, data_dir, workers, tracking, tracking_timeout, save_steps",
        ),
        (["--epochz=9", "--seed=1"], "save_steps may differ, but got seed, epochz"),
        (["--config=a.yaml"], "save_steps may differ, but got config"),
        (["--workers=x"], "command line: workers must be a whole number or none, but got 'x'"),
    ],
)
def test_a_finished_run_is_not_resumed(
    offline_run: OfflineRun, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    before = files_below(offline_run.folder)
    (line,) = refused(["train", "--resume", str(offline_run.folder), *arguments], capsys)
    assert words in line
    assert files_below(offline_run.folder) == before


def test_what_is_no_run_folder_is_not_resumed(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "empty").mkdir()
    for name in ("empty", "missing"):
        (line,) = refused(["train", f"--resume={name}"], capsys)
        assert line == f"{name!r} is no run folder: it has no config.yaml"
    (workplace / "empty" / "config.yaml").write_text("data: digits\nepochz: 3\n")
    (line,) = refused(["train", "--resume=empty"], capsys)
    assert line == "file empty/config.yaml: unknown setting 'epochz'; did you mean 'epochs'?"


def test_an_unknown_command_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eva: error: argument COMMAND: invalid choice: 'trian'")


ARGUMENT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["--", "-", "--list", "--show_policy", "--resume", "--config", "--config=.", "--resume=.", "="]),
    st.builds(
        "--{}={}".format, st.sampled_from([*FIELDS, "policy_options.flip", "config", "resume"]), st.text(max_size=9)
    ),
    st.builds("--{}".format, st.sampled_from(sorted(FIELDS))),
    st.builds("{}={}".format, st.text(max_size=5), st.text(max_size=5)),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["train", "find_lr"]), st.lists(ARGUMENT, max_size=6))
@example("train", ["{"])
@example("train", ["nowhere.json"])
def test_no_arguments_make_a_traceback(command: str, arguments: list[str]) -> None:
    # The unknown setting keeps whatever is drawn from starting a run.
    arguments = [command, "--no_such_setting=1", *arguments]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as leaving:
            assert leaving.code in (0, 2)  # 0: "-h" was drawn
            return
    assert code == 2
    assert errors.getvalue().startswith(f"eva {command}: error: ")
    assert "no_such_setting" in errors.getvalue()


@pytest.mark.parametrize("command", ["train", "find_lr"])
def test_the_runners_are_the_commands(workplace: Path, command: str, clean_environment: dict[str, str]) -> None:
    mistakes = ["--lr_maxx=1", "--epochs=many"]
    answers = [
        subprocess.run([*program, *mistakes], capture_output=True, text=True, env=clean_environment)
        for program in ([str(BIN / "eva"), command], [sys.executable, str(ROOT / "runners" / f"{command}.py")])
    ]
    for answer in answers:
        assert answer.returncode == 2
        assert answer.stdout == ""
        assert answer.stderr == (
            f"eva {command}: error: command line: unknown setting 'lr_maxx'; did you mean 'lr_max'?\n"
            f"eva {command}: error: command line: epochs must be a whole number, but got 'many'\n"
        )


def test_who_has_seen_enough_of_the_output_gets_no_traceback(clean_environment: dict[str, str]) -> None:
    """`eva train --list | head -1`: the rest of the list meets a closed pipe."""
    command = f"{sys.executable} -u -m eva.cli train --list | head -1; exit ${{PIPESTATUS[0]}}"
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=clean_environment, cwd=ROOT)
    assert (answer.returncode, answer.stderr) == (141, "")
    assert answer.stdout.startswith("recipe")


def test_find_lr_writes_a_sweep_around_what_it_found(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"model": "resnet9", "train_limit": 300, "find_lr_steps": 12, "find_lr_start": 1e-3, "find_lr_end": 10}
    arguments = ["find_lr", *flags({**SMALL_RUN, **found, "tracking": "disabled", "lr_max": "find"})]
    assert main([*arguments, "--out=run", "--write_sweep=lr.yaml"]) == 0
    assert "sweep: lr.yaml" in capsys.readouterr().out
    lr_max = json.loads((workplace / "run" / "summary.json").read_text())["lr_max"]
    searched = {one.name: one.distribution for one in read_sweep("lr.yaml").searched}
    assert searched.keys() == {"lr_min", "lr_max"}
    least, most = (searched["lr_max"].value_at(quantile) for quantile in (0.0, 1.0 - 1e-9))
    assert least < lr_max < most
    written = Path("lr.yaml").read_text()
    (line,) = refused([*arguments, "--out=other", "--write_sweep=lr.yaml"], capsys)
    assert line == "'lr.yaml' is there already; choose another --write_sweep"
    assert Path("lr.yaml").read_text() == written
    (line,) = refused([*arguments, "--out=other", "--write_sweep=nowhere/lr.yaml"], capsys)
    assert line.startswith("cannot write 'nowhere/lr.yaml': there is no folder")
    assert not Path("other").exists()
