"""What is told of a sweep before it runs: each mistake with its line, all at once, and nothing about what is right."""

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from eva.config import FIELDS, READ_ONLY_WITH, TYPES, Layer, UserError, resolve
from eva.loop import BATCH_COLUMNS, epoch_columns
from eva.schedules import Rates, build_schedule
from eva.sweep_check import (
    BATCH_METRICS,
    MOST_TRIALS,
    POSITIONS,
    TRAIN_METRICS,
    WATCHED_METRICS,
    check,
    check_file,
    fits,
    meant,
    measured_bands,
    num_trials,
    problems,
    warnings,
)
from eva.sweep_file import Problem, Sweep, grid, inspect_sweep, read_sweep
from eva.sweep_probe import Measurement

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "sweeps").glob("*.yaml"))

SECTIONS = {
    "program": "train.py",
    "method": "random",
    "run_cap": "8",
    "metric": "{name: val/accuracy_best, goal: maximize}",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which has a program train.py and a folder of that kind."""
    (tmp_path / "train.py").write_text("print('a program')")
    (tmp_path / "programs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(parameters: str, **sections: str | None) -> Path:
    """Writes a sweep of some parameters, one or more lines of YAML; a section that is None is left out."""
    lines = [f"{key}: {value}" for key, value in {**SECTIONS, **sections}.items() if value is not None]
    block = [f"  {line}" for line in parameters.splitlines()]
    path = Path("sweep.yaml")
    path.write_text("\n".join([*lines, "parameters:", *block]) + "\n")
    return path


def marked(path: Path) -> list[int]:
    """Returns the lines that end in #!"""
    lines = path.read_text().splitlines()
    return [number for number, line in enumerate(lines, start=1) if line.endswith("#!")]


FINE = "dropout: {min: 0.0, max: 0.5}"

# The line that is wrong ends in #!, and what is told of it has these words.
PARAMETERS = {
    "misspelt": ("lrmax: {min: 0.01, max: 0.1} #!", ["unknown parameter 'lrmax'", "'lr_max'"]),
    "not like anything": ("zzz: {value: 1} #!", ["unknown parameter 'zzz'", "eva train --help"]),
    "part of a setting": ("model.name: {value: resnet9} #!", ["model has no parts", "text"]),
    "in a group": ("optim:\n  parameters:\n    l1: {values: [0.0, 0.1]} #!", ["no groups", "write l1"]),
    "group in policy_options": (
        "policy_options:\n  parameters:\n    a:\n      parameters:\n        b: {value: 1} #!",
        ["policy_options.a.b", "no groups within"],
    ),
    "run folder": ("out: {value: runs/a} #!", ["out", "all trials", "one folder"]),
    "run name": ("name: {value: a} #!", ["name", "one name"]),
    "flag of the command": ("resume: {value: runs/a} #!", ["resume", "flag of the command"]),
    "number as text": ("weight_decay:\n  values:\n    - 0.1\n    - 1e-5 #!", ["YAML reads 1e-5 as text", "1.0e-05"]),
    "exponent without a sign": ("find_lr_end: {value: 1.0e5} #!", ["YAML reads 1.0e5 as text", "write 100000.0"]),
    "number in quotes": ('epochs: {value: "20"} #!', ["epochs must be a whole number", "quotes", "write 20"]),
    "truth in quotes": ('nesterov: {value: "false"} #!', ["true or false", "in quotes it is text", "write false"]),
    "truth as a number": ("nesterov: {value: 0} #!", ["nesterov must be true or false", "got 0"]),
    "number as truth": ("l1: {value: true} #!", ["l1 must be a number", "True"]),
    "text as truth": ("norm: {values: [batch, off]} #!", ["norm must be one of", "False", "stands in quotes"]),
    "text as a number": ("data_dir: {value: 2024} #!", ["data_dir must be text", "write '2024'"]),
    "list as text": ('stage_strides: {value: "[1, 2, 2, 1]"} #!', ["stage_strides", "write [1, 2, 2, 1]"]),
    "text in a list": (
        "schedule: {value: step}\nlr_steps: {value: [5, 1e1]} #!",
        ["lr_steps must be a list", "write [5, 10.0]"],
    ),
    "option as text": (
        "policy_options:\n  parameters:\n    cutout: {value: '8'} #!",
        ["policy_options.cutout must be a number", "write 8"],
    ),
    "no such choice": ("norm: {values: [batch, bach]} #!", ["norm must be one of", "'bach'"]),
    "null": ("epochs: {value: null} #!", ["epochs must be a whole number", "None"]),
    "infinite": ("grad_clip: {values: [1.0, .inf]} #!", ["grad_clip must be a number or none", "inf"]),
    "fractions of images": (
        "batch_size: {min: 16.5, max: 64.5} #!",
        ["batch_size must be a whole number", "uniform draws", "int_uniform", "q_uniform"],
    ),
    "fractions in steps": (
        "batch_size: {distribution: q_uniform, min: 16, max: 64, q: 0.5} #!",
        ["batch_size must be a whole number", "q_uniform", "whole q"],
    ),
    "numbers for text": ("model: {min: 1, max: 5} #!", ["model must be text", "int_uniform draws numbers"]),
    "upper end": ("label_smoothing: {min: 0.0, max: 1.0} #!", ["label_smoothing must be in [0, 1)", "1.0"]),
    "one of many values": ("dropout: {values: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.5, 0.7]} #!", ["dropout", "1.5"]),
    "tail": ("weight_decay: {distribution: normal, mu: 0.001, sigma: 0.001} #!", ["must not be negative", "trial may"]),
    "constant": ("patience: {value: 0} #!", ["patience must be at least 1, but got patience=0"]),
    "ranges that cross": (
        "lr_min: {min: 0.001, max: 0.2} #!\nlr_max: {min: 0.1, max: 1.0}",
        ["lr_min must not be above lr_max", "lr_min=0.2", "lr_max=0.1", "(see line 7)"],
    ),
    "against a default": ("epochs: {values: [4, 8]} #!", ["peak_epoch must be in", "epochs=4", "peak_epoch not among"]),
    "only two out of order": (
        "epochs: {values: [4, 20]} #!\npeak_epoch: {values: [2, 8]}",
        ["peak_epoch must be in [0, epochs)", "peak_epoch=8.0, epochs=4", "(see line 7)"],
    ),
    "only three together": (
        "epochs: {values: [4, 20, 30]} #!\npeak_epoch: {values: [8, 2]}\n"
        "schedule: {values: [constant, cosine, onecycle]}",
        ["peak_epoch must be in [0, epochs)"],
    ),
    "no such recipe": ("recipe: {value: resnet9-onecycel} #!", ["unknown recipe", "onecycle'"]),
    "no such data": ("data: {value: cifar11} #!", ["unknown data 'cifar11'", "'cifar10'"]),
    "no such folder": ("data: {value: 'folder:nowhere'} #!", ["no folder 'nowhere'"]),
    "no such model": ("model: {values: [resnet9, resnet81]} #!", ["unknown model 'resnet81'", "'resnet18'"]),
    "no such policy": ("policy: {values: [flip, flop]} #!", ["unknown policy 'flop'", "'flip'"]),
    "no such option": ("policy_options.cutuot: {values: [0, 8]} #!", ["cutuot", "'cutout'"]),
    "no such device": ("device: {value: cuda:99} #!", ["CUDA devices", "cuda:99"]),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_wrong_parameters_are_told_with_their_line(name: str) -> None:
    """One problem, at the line that is marked, in the words that help."""
    parameters, words = PARAMETERS[name]
    path = written(parameters)
    found = problems(read_sweep(path))
    assert {problem.line for problem in found} == set(marked(path)), found
    assert len(found) == 1
    for word in words:
        assert any(word in problem.text for problem in found), found


OTHER: dict[str, tuple[dict[str, str | None], int, list[str]]] = {
    "no metric": ({"metric": None}, 1, ["metric is missing", "val/accuracy_best"]),
    "misspelt metric": ({"metric": "{name: val/acuracy, goal: maximize}"}, 4, ["'val/acuracy'", "'val/accuracy'"]),
    "metric of the summary": ({"metric": "{name: test_accuracy_best, goal: maximize}"}, 4, ["no trial logs"]),
    "metric of a batch": (
        {"metric": "{name: train/loss, goal: minimize}"},
        4,
        ["logged every batch", "train_epoch/loss is logged once"],
    ),
    "rate as the metric": ({"metric": "{name: lr, goal: maximize}"}, 4, ["every batch", "val/accuracy_best"]),
    "metric without worth": ({"metric": "{name: val/epoch_best, goal: maximize}"}, 4, ["how good"]),
    "position as the metric": ({"metric": "{name: epoch, goal: maximize}"}, 4, ["how good"]),
    "split that isn't watched": (
        {"metric": "{name: test/accuracy_best, goal: maximize}"},
        4,
        ["no trial logs test/accuracy_best", "val_fraction is above 0", "val/accuracy_best"],
    ),
    "accuracy minimized": (
        {"metric": "{name: val/accuracy_best, goal: minimize}"},
        4,
        ["the higher", "goal: maximize", "got minimize"],
    ),
    "loss maximized": ({"metric": "{name: val/loss, goal: maximize}"}, 4, ["the lower", "goal: minimize"]),
    "bands beyond the end": (
        {"early_terminate": "{type: hyperband, min_iter: 20, eta: 2, strict: true}"},
        5,
        ["no trial can be stopped", "epoch 20, 40", "20 epochs"],
    ),
    "no program": ({"program": "trian.py"}, 1, ["no program 'trian.py'", "where trials are started"]),
    "folder as program": ({"program": "programs"}, 1, ["is a folder"]),
    "no arguments": ({"command": "[python, '${program}']"}, 5, ["no ${args}", "not be given their parameters"]),
    "arguments of Hydra": ({"command": "['${program}', '${args_override_hydra}']"}, 5, ["Hydra", "${args}"]),
    "fewer epochs than bands": (
        {"early_terminate": "{type: hyperband, max_iter: 81, s: 2}"},
        5,
        ["no trial can be stopped", "after epoch 9, 27", "trials have 3 epochs, as max_steps ends them"],
    ),
    "percent as target": (
        {"metric": "{name: val/accuracy_best, goal: maximize, target: 95}"},
        4,
        ["val/accuracy_best is a fraction, from 0 to 1, but got target 95", "did you mean 0.95?"],
    ),
    "negative target": (
        {"metric": "{name: val/accuracy_best, goal: maximize, target: -0.5}"},
        4,
        ["from 0 to 1, but got target -0.5"],
    ),
    "loss below nothing": (
        {"metric": "{name: val/loss, goal: minimize, target: -1}"},
        4,
        ["val/loss is never below 0, but got target -1"],
    ),
    "too many trials": ({"run_cap": "100000000"}, 3, ["at most 10,000 trials, but got 100,000,000"]),
    "range test as program": ({"program": "runners/find_lr.py"}, 1, ["find_lr trains nothing", "no trial"]),
    "help": ({"command": "['${program}', --help, '${args}']"}, 5, ["with --help in command no trial trains"]),
    "short help": ({"command": "['${program}', -h, '${args}']"}, 5, ["with -h in command no trial trains"]),
    "list": ({"command": "['${program}', --list, '${args}']"}, 5, ["with --list in command no trial trains"]),
    "pictures": ({"command": "['${program}', --show_policy, '${args}']"}, 5, ["with --show_policy in command"]),
    "one run for all": ({"command": "['${program}', --resume=runs/a, '${args}']"}, 5, ["with --resume=runs/a in"]),
    "flag without value": ({"command": "['${program}', --config, '${args}']"}, 5, ["--config: expected one"]),
    "setting without value": (
        {"command": "['${program}', --epochs, '${args}']"},
        5,
        ["command: epochs must be a whole number, but got no value"],
    ),
    "JSON that is none": ({"command": "['${program}', '{\"a\"', '${args}']"}, 5, ["command: '{\"a\"' is not JSON"]),
    "no settings file": (
        {"command": "[python, '${program}', --config=nope.yaml, '${args}']"},
        5,
        ["command: cannot read 'nope.yaml'"],
    ),
    "settings file of another kind": (
        {"command": "[python, '${program}', --config, train.py, '${args}']"},
        5,
        ["'train.py'", "a mapping of settings"],
    ),
    "more than Python": (
        {"command": "[nice, python, '${program}', '${args}']"},
        5,
        ["command has 'nice' before the program", "--isolate gives each trial a process"],
    ),
    "option of Python": (
        {"command": "['${env}', '${interpreter}', -O, '${program}', '${args}']"},
        5,
        ["command has '-O' before the program"],
    ),
    "another program": ({"command": "[python, other.py, '${args}']"}, 5, ["command doesn't run ${program}"]),
    "no program needed": (
        {"program": None, "command": "[eva, train, '${args}']"},
        4,
        ["command doesn't run ${program}", "--isolate"],
    ),
    "unknown flag": ({"command": "['${program}', --epoch=3, '${args}']"}, 5, ["'epoch'", "'epochs'"]),
    "impossible flag": ({"command": "['${program}', --epochs=3, '${args}']"}, 5, ["peak_epoch", "epochs=3"]),
}


def size_problems(sweep: Sweep) -> list[Problem]:
    """Returns what num_trials refuses a sweep with."""
    try:
        num_trials(sweep, None)
    except UserError as error:
        lines = [line.split(":", 2) for line in str(error).splitlines()]
        return [Problem(int(line), text) for _, line, text in lines]
    return []


@pytest.mark.parametrize("name", OTHER)
def test_wrong_sections_are_told_with_their_line(name: str) -> None:
    """One problem, at the section's line, in the words that help."""
    sections, line, words = OTHER[name]
    Path("runners").mkdir()
    Path("runners/find_lr.py").touch()
    limit = "\nmax_steps: {value: 3}" if name == "fewer epochs than bands" else ""
    sweep = read_sweep(written(FINE + limit, **sections))
    found = [*problems(sweep), *size_problems(sweep)]
    assert [problem.line for problem in found] == [line], found
    for word in words:
        assert word in found[0].text


def test_a_metric_that_only_some_trials_log_is_told() -> None:
    """Those with val_fraction 0 watch test; a recipe as reported is one."""
    path = written("val_fraction: {values: [0.0, 0.1]}")
    assert [problem.text for problem in problems(read_sweep(path))] == [
        "only trials whose val_fraction is above 0 log val/accuracy_best"
    ]
    path = written("recipe: {value: resnet9-onecycle}")
    told = problems(read_sweep(path))[0].text
    assert "val_fraction is 0, so trials watch test" in told and "test/accuracy_best" in told
    path = written(
        "recipe: {value: resnet9-onecycle}\nseed: {values: [0, 1]}", metric="{name: test/accuracy_best, goal: maximize}"
    )
    assert problems(read_sweep(path)) == []


def test_a_broken_rule_is_not_blamed_on_others() -> None:
    """The bands would be right with the epochs that the file asks for."""
    path = written(
        "epochs: {value: 30}\npeak_epoch: {value: 40}",
        early_terminate="{type: hyperband, min_iter: 25, eta: 2, strict: true}",
    )
    assert ["peak_epoch must be in" in problem.text for problem in problems(read_sweep(path))] == [True]


RIGHT = """\
lr_max: {values: [find, 0.1]}
lr_min: {value: find}
norm: {values: [none, batch]}
grad_clip: {values: [none, 1.0]}
ema_decay: {values: [null, 0.99]}
compile: {value: false}
stage_strides: {values: [[1, 2, 2, 2], [1, 2, 2, 1]]}
lr_steps: {value: []}
batch_size: {distribution: q_uniform, min: 32, max: 96, q: 16}
label_smoothing: {distribution: beta, a: 2, b: 5}
epochs: {min: 6, max: 20}
train_limit: {values: [1.0e+2, 200]}
tags: {value: [a, b]}
policy_options:
  parameters:
    cutout: {values: [4, 8.0]}"""


def test_what_is_right_is_not_told() -> None:
    """Words and nulls that a setting takes, whole numbers with a point, lists, and what lies between the ends."""
    lines = check(read_sweep(written(RIGHT)), 5, 1, measure=False)
    assert lines == ["size: 5 trials, 30 to 100 epochs in all"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_have_no_problem(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder that their launch lines are for; and nothing about them is a likely mistake."""
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(path)
    assert problems(sweep) == []
    assert warnings(sweep) == []


def test_shipped_sweeps_are_found() -> None:
    """The test above has cases."""
    assert len(SHIPPED) >= 7


EVERYTHING = """\
program: trian.py #!
method: radom #!
metric:
  name: val/acc_best #!
  goal: maximise #!
command:
  - ${program}
  - ${agrs} #!
  - ${args}
early_terminate: {type: hyperband, min_iter: 50, strict: true} #!
parameters:
  lr_max: {distribution: log_uniform_values, min: 0, max: 0.1} #!
  lr_min: {value: 0.5}
  nesterov: {value: "false"} #!
  weight_decay:
    values:
      - 1e-4 #!
      - 0.1
  epohcs: {values: [5, 10]} #!
  dropout: {min: 0.0, max: 1.0} #!
  model: {values: [resnet81]}
"""


def test_every_problem_is_told_at_once() -> None:
    """Those of the file and those of the settings, sorted by line; what is left out of them is not blamed on others."""
    path = Path("sweep.yaml")
    path.write_text(EVERYTHING)
    with pytest.raises(UserError, match="trian") as error:
        check_file(path, None, 1)
    lines = str(error.value).splitlines()
    assert [int(line.split(":")[1]) for line in lines] == marked(path)
    assert all(line.startswith("sweep.yaml:") for line in lines)


UNSOUND = """\
lr: {min: 1e-5, max: 1e-1}
policy_options:
  parameters:
    a:
      parameters:
        cutout: {min: 2}
dropout: {min: 0.5}
"a b": {value: 1}
optim:
  parameters:
    l1: {values: []}"""


def test_names_of_parameters_are_looked_at_that_are_wrong_otherwise() -> None:
    """Each has two problems, in the order of the lines, but a name that none can have, and a setting, just one."""
    with pytest.raises(UserError, match="lr") as error:
        check_file(written(UNSOUND), None, 1)
    told = [line.removeprefix("sweep.yaml:").split(": ", 1) for line in str(error.value).splitlines()]
    expected = {
        "6": ["unknown parameter 'lr'", "max must be a number", "min must be a number"],
        "11": ["int_uniform needs max", "policy_options.a.cutout: policy_options has no groups within"],
        "12": ["uniform needs max"],
        "13": ["the name of a parameter must begin with a letter"],
        "16": ["values must be a list", "unknown parameter 'optim.l1': settings stand in no groups; write l1"],
    }
    found = {line: [text for at, text in told if at == line] for line, _ in told}
    assert found.keys() == expected.keys()
    for line, parts in expected.items():
        assert len(found[line]) == len(parts), found[line]
        for part in parts:
            assert any(part in text for text in found[line]), part


def test_what_follows_from_a_mistake_is_not_told() -> None:
    """A rule that is broken only by a value that is impossible by itself; what only a file could say that isn't there.

    What is wrong of itself beside them is told.
    """
    path = written("epochs: {values: [0, 8]}")
    assert [problem.text for problem in problems(read_sweep(path))] == [
        "epochs must be at least 1, but a trial may get epochs=0"
    ]
    told = [problem.text for problem in problems(read_sweep(written("epochs: {values: [0, 1]}")))]
    assert len(told) == 2
    assert "peak_epoch=5.0, epochs=1" in told[1]
    path = written(
        "dropout: {values: [0.1, 1.5]}\nepochs: {values: [6, 7]}",
        command="['${program}', --config=nope.yaml, '${args}']",
        early_terminate="{type: hyperband, min_iter: 8, strict: true}",
        metric="{name: test/accuracy_best, goal: maximize}",
    )
    lines = [(problem.line, problem.text.split(",")[0]) for problem in problems(read_sweep(path))]
    assert lines == [
        (5, "command: cannot read 'nope.yaml': No such file or directory"),
        (8, "dropout must be in [0"),
    ]


def test_a_settings_file_counts_and_what_is_wrong_in_it_is_told_at_the_command() -> None:
    """Its epochs are every trial's; a key that is no setting is told once, with nothing that follows from it."""
    command = "['${program}', --config=settings.yaml, '${args}']"
    Path("settings.yaml").write_text("epochs: 3\npeak_epoch: 1\n")
    sweep = read_sweep(written(FINE, command=command))
    assert check(sweep, 2, 1, measure=False) == ["size: 2 trials, 6 epochs in all"]
    Path("settings.yaml").write_text("epoch: 3\n")
    found = problems(read_sweep(written("epochs: {values: [10, 20]}", command=command)))
    assert [(problem.line, problem.text) for problem in found] == [
        (5, "command: file settings.yaml: unknown setting 'epoch'; did you mean 'epochs'?")
    ]


ISOLATED = {
    "eva itself": ("[./eva, train, '${{args}}']", None),
    "a shell": ("[bash, -c, 'exec \"$@\"', bash, '${{args}}']", None),
    "env with a variable": ("['${{env}}', A=1, {python}, '${{args}}']", None),
    "no such program": ("[nopython, '${{args}}']", "command starts 'nopython', but there is no such program"),
    "nothing that can be run": ("[./train.py, '${{args}}']", "command starts './train.py'"),
    "behind env": ("['${{env}}', A=1, nopython, '${{args}}']", "command starts 'nopython'"),
    "the range test": ("[./eva, find_lr, '${{args}}']", "find_lr trains nothing"),
}


@pytest.mark.parametrize("name", ISOLATED)
def test_with_a_process_for_each_trial_a_command_may_be_any_that_starts(name: str) -> None:
    """Without a program too, as W&B takes it; a first word that isn't there is told at the command's line."""
    Path("eva").touch(mode=0o755)
    command, words = ISOLATED[name]
    path = written(FINE, program=None, command=command.format(python=sys.executable))
    if words is None:
        assert check_file(path, 2, 1, measure=False, isolate=True)[1] == ["size: 2 trials, 40 epochs in all"]
        with pytest.raises(UserError, match=r"sweep.yaml:4: command doesn't run \$\{program\}"):
            check_file(path, 2, 1, measure=False)
    else:
        with pytest.raises(UserError, match=rf"^sweep.yaml:4: .*{words}[^\n]*$"):
            check(read_sweep(path), 2, 1, measure=False, isolate=True)


def test_settings_of_eva_train_count_without_a_program() -> None:
    """Its words stand behind `train`, and those of the environment have their values."""
    Path("eva").touch(mode=0o755)
    command = "[./eva, train, '--epochs=${envvar:EVA_EPOCHS}', --peak_epoch=1, '${args}']"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVA_EPOCHS", "3")
        sweep = read_sweep(written(FINE, program=None, command=command))
        assert check(sweep, 2, 1, measure=False, isolate=True) == ["size: 2 trials, 6 epochs in all"]


@pytest.mark.parametrize("values", ["[8, 16, 8]", "[8, 16, 8.0]"])
def test_a_value_that_is_there_twice_is_wrong_in_a_grid_alone(values: str) -> None:
    """W&B's grid has it once; elsewhere it is drawn more often, which is told as a warning."""
    sweep, found = inspect_sweep(written(f"batch_size: {{values: {values}}}", method="grid"))
    assert sweep is not None
    assert ["is there twice" in problem.text for problem in found] == [True]
    sweep = read_sweep(written(f"batch_size: {{values: {values}}}"))
    assert problems(sweep) == []
    assert [(one.line, "which are the same" in one.text) for one in warnings(sweep)] == [(6, True)]
    path = written("grad_clip: {values: [null, none]}", method="grid")
    assert ["'none' and None, which are the same" in one.text for one in problems(read_sweep(path))] == [True]


def test_a_file_that_is_no_sweep_is_told() -> None:
    """With what is wrong about it, and nothing else."""
    Path("sweep.yaml").write_text("- a\n- b\n")
    with pytest.raises(UserError, match=r"^sweep.yaml:1: a sweep must be a mapping"):
        check_file("sweep.yaml", None, 1)


def test_problems_are_told_without_torch() -> None:
    """They must not wait for its import."""
    path = written("lr_mxa: {value: 0.1}")
    code = (
        "import sys; from eva.sweep_check import problems; from eva.sweep_file import read_sweep\n"
        f"print(problems(read_sweep({str(path)!r}))); print('torch' in sys.modules, 'wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "lr_mxa" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


def test_booleans_that_an_agent_leaves_out_are_told() -> None:
    """A setting whose default is true cannot be made false by ${args_no_boolean_flags}; others can."""
    command = "['${program}', '${args_no_boolean_flags}']"
    found = problems(read_sweep(written("nesterov: {values: [true, false]}", command=command)))
    assert [(problem.line, "nesterov would stay true" in problem.text) for problem in found] == [(7, True)]
    assert problems(read_sweep(written("compile: {values: [true, false]}", command=command))) == []


def test_settings_of_the_command_count() -> None:
    """They are every trial's; one that is a parameter too would depend on their order."""
    command = "['${program}', --epochs=3, --peak_epoch=1, '${args}']"
    sweep = read_sweep(written("seed: {values: [0, 1]}", command=command))
    assert problems(sweep) == []
    assert check(sweep, 2, 1, measure=False) == ["size: 2 trials, 6 epochs in all"]
    found = problems(read_sweep(written("epochs: {values: [10, 20]}", command=command)))
    assert [(problem.line, "given by command too" in problem.text) for problem in found] == [(7, True)]


def test_metrics_are_those_that_a_run_logs() -> None:
    """What is known here of metrics is what the training loop writes."""
    for split in ("val", "test"):
        known = {f"{split}/{name}" for name in WATCHED_METRICS} | {f"train_epoch/{name}" for name in TRAIN_METRICS}
        assert known | set(POSITIONS) == set(epoch_columns(split))
    assert set(BATCH_METRICS) | set(POSITIONS) == set(BATCH_COLUMNS)
    assert {name for name in BATCH_METRICS.values() if name} <= set(epoch_columns("val"))


RAW = [
    *(None, True, False, 0, 1, 3, 2.0, 0.5, -1, float("inf"), float("nan")),
    *("none", "None", "batch", "find", "0.1", "1e-5", "false", "step", "", "a,b", "[1, 2]"),
    *([], [1, 2, 2, 2], ["a"], [0.5, 1.5], [True], ["1"], [1.0], {}, {"cutout": 8}, {"cutout": "8"}, {"a": {"b": 1}}),
]


@pytest.mark.parametrize("name", FIELDS)
def test_types_are_those_of_the_configuration(name: str) -> None:
    """What fits is what the configuration takes; what doesn't is refused by it too, but for text, which it converts."""

    def taken(value: Any) -> bool:
        try:
            resolve([Layer("raw", {name: value})])
        except UserError as error:
            return not any(line.startswith("raw: ") for line in str(error).splitlines())
        return True

    for value in RAW:
        if fits(value, TYPES[name]):
            assert taken(value), value
        elif not isinstance(value, (str, list, dict)) and bool not in (TYPES[name], *get_args(TYPES[name])):
            assert not taken(value), value
        else:
            guess = meant(value, TYPES[name])
            assert guess is None or (fits(guess, TYPES[name]) and taken(guess)), value


@pytest.mark.parametrize(
    "parameters", ["seed: {values: [0, 1, 2]}", "seed: {min: 0, max: 6}\nnorm: {values: [batch, layer]}"]
)
def test_a_grid_has_as_many_trials_as_it_yields(parameters: str) -> None:
    """Unless there is a bound."""
    sweep = read_sweep(written(parameters, method="grid", run_cap=None))
    size = len(list(grid(sweep)))
    assert [num_trials(sweep, count) for count in (None, 2, 100)] == [size, 2, size]
    assert num_trials(read_sweep(written(parameters, method="grid", run_cap="2")), 100) == 2


def test_a_search_without_end_is_told() -> None:
    """Of random and bayes; a bound anywhere makes it right, and the lesser one counts."""
    sweep = read_sweep(written(FINE, run_cap=None))
    with pytest.raises(UserError, match=r"sweep.yaml:2: random goes on without end: give run_cap.*--count"):
        check(sweep, None, 1, measure=False)
    with pytest.raises(UserError, match="without end"):
        num_trials(sweep, None)
    assert num_trials(sweep, 5) == 5
    assert num_trials(read_sweep(written(FINE)), 5) == 5
    assert num_trials(read_sweep(written(FINE)), 50) == 8


def test_a_grid_that_is_too_large_is_told() -> None:
    """With its size; a bound makes it right."""
    sweep = read_sweep(
        written("seed: {min: 1, max: 200}\nfind_lr_steps: {min: 5, max: 104}", method="grid", run_cap=None)
    )
    with pytest.raises(UserError, match=r"sweep.yaml:2: the grid has 20,000 trials"):
        num_trials(sweep, None)
    assert num_trials(sweep, 50) == 50


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_more_trials_than_can_be_noted_are_told(method: str) -> None:
    """Whoever asks for them: the file at its line, or --count; the lesser one counts."""
    sweep = read_sweep(written(FINE, method=method, run_cap=str(MOST_TRIALS + 1)))
    with pytest.raises(UserError, match=r"^sweep.yaml:3: a sweep has at most 10,000 trials, but got 10,001$"):
        num_trials(sweep, None)
    assert num_trials(sweep, MOST_TRIALS) == MOST_TRIALS
    with pytest.raises(UserError, match=r"^sweep.yaml:2: a sweep has at most 10,000 trials, but got 20,000$"):
        num_trials(read_sweep(written(FINE, method=method, run_cap=None)), 20_000)


def test_max_steps_ends_trials_before_their_epochs() -> None:
    """By hand: 3 steps are 3 epochs at most; with 60 images in batches of 20 an epoch has 3 steps, and 7 are 3 epochs.

    No trial reaches epoch 5, but some may reach epoch 2.
    """
    rule = "{type: hyperband, min_iter: 5, eta: 2, strict: true}"
    images = "train_limit: {value: 60}\nbatch_size: {value: 20}"
    for parameters in ("max_steps: {value: 3}", f"max_steps: {{value: 7}}\n{images}"):
        (problem,) = problems(read_sweep(written(f"{FINE}\n{parameters}", early_terminate=rule)))
        assert problem.text.endswith("trials have 3 epochs, as max_steps ends them")
        lines = check(read_sweep(written(f"{FINE}\n{parameters}")), 2, 1, measure=False)
        assert lines == ["size: 2 trials, 6 epochs in all"]
    for parameters in ("max_steps: {value: 7}", f"max_steps: {{value: 16}}\n{images}"):
        assert problems(read_sweep(written(f"{FINE}\n{parameters}", early_terminate=rule))) == []


def test_what_was_measured_tells_which_bands_are_reached() -> None:
    """By hand: of 20 epochs of 100 steps 350 steps are 4, and 950 steps are 10."""
    common: dict[str, Any] = {"values": {}, "range_test_steps": 0, "step": 0.1, "epoch": 1.0, "rest": 1.0}
    common |= {"steps_per_epoch": 100, "disk": 1, "row": 1.0, "memory": 1}
    short, long, whole = (Measurement(**common, max_steps=most) for most in (350, 950, None))
    sweep = read_sweep(written(FINE, early_terminate="{type: hyperband, min_iter: 5, eta: 2, strict: true}"))
    (found,) = measured_bands(sweep, [short], (20, 20))
    assert (found.line, found.text.startswith("no trial can be stopped early")) == (5, True)
    assert found.text.endswith("trials have 4 epochs, as max_steps ends them")
    (found,) = measured_bands(sweep, [short, long], (20, 20))
    assert found.text == "trials of 4 epochs can't be stopped early: that is after epoch 5 at the soonest"
    assert measured_bands(sweep, [long], (20, 20)) == measured_bands(sweep, [whole], (4, 4)) == []
    sweep = read_sweep(written(FINE, early_terminate="{type: hyperband, max_iter: 81, s: 2, strict: true}"))
    (found,) = measured_bands(sweep, [long], (20, 20))
    assert found.text.startswith("no trial can be stopped after epoch 27: trials have 10 epochs, as max_steps ends")
    assert measured_bands(read_sweep(written(FINE)), [short], (20, 20)) == []


WARNINGS: dict[str, tuple[str, dict[str, str | None], int, str]] = {
    "a metric that may fall": (FINE, {"metric": "{name: val/accuracy, goal: maximize}"}, 4, "may fall"),
    "chosen by test": (
        f"{FINE}\nval_fraction: {{value: 0.0}}",
        {"metric": "{name: test/accuracy_best, goal: maximize}"},
        4,
        "chosen by test",
    ),
    "by heart": (FINE, {"metric": "{name: train_epoch/loss, goal: minimize}"}, 4, "by heart"),
    "weak rule": (FINE, {"early_terminate": "{type: hyperband, min_iter: 2, strict: false}"}, 5, "strict: true"),
    "bands for some": (
        "epochs: {values: [6, 20]}",
        {"early_terminate": "{type: hyperband, min_iter: 8, strict: true}"},
        5,
        "trials of 6 epochs can't be stopped",
    ),
    "some bands for none": (
        "epochs: {values: [10, 12]}",
        {"early_terminate": "{type: hyperband, max_iter: 81, s: 4}"},
        5,
        "no trial can be stopped after epoch 27: trials have 12 epochs; max_iter: 12",
    ),
    "exponents": (
        "lr_max: {distribution: log_uniform, min: 0.0001, max: 0.1}\nlr_min: {value: 0.001}",
        {},
        6,
        "exponents of e, and draws 1.0001 to 1.10517; for values from min to max take log_uniform_values",
    ),
    "exponents in steps": (
        "batch_size: {distribution: q_log_uniform, min: 2, max: 5}",
        {},
        6,
        "draws 7 to 148; for values from min to max take q_log_uniform_values",
    ),
    "exponents below one": (
        "weight_decay: {distribution: inv_log_uniform, min: 0.0001, max: 0.1}",
        {},
        6,
        "for values from min to max take inv_log_uniform_values",
    ),
    "nothing to search": ("seed: {value: 3}", {}, 5, "random has nothing to search: all trials are the same"),
    "one value to search": ("seed: {values: [3]}", {}, 5, "all trials are the same"),
    "no schedule reads it": (
        "schedule: {values: [constant, cosine]}\npeak_epoch: {values: [1, 2]}",
        {},
        7,
        "peak_epoch is read only with schedule onecycle or cosine_onecycle, which no trial has: it changes nothing",
    ),
    "no norm reads it": (f"{FINE}\nghost_splits: {{values: [2, 4]}}", {}, 7, "ghost_splits is read only with norm"),
    "no optimizer reads it": (
        "optimizer: {value: adamw}\nnesterov: {values: [true, false]}",
        {},
        7,
        "nesterov is read only with optimizer sgd",
    ),
    "no seeds": ("norm: {values: [batch, layer]}", {"method": "grid"}, 5, "seed is not searched"),
    "lucky seeds": ("seed: {values: [0, 1]}\nl1: {min: 0.0, max: 0.1}", {"method": "bayes"}, 6, "lucky seed"),
    "network": (f"{FINE}\ntracking: {{value: online}}", {}, 7, "send the trials"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_likely_mistakes_are_warned_of(name: str) -> None:
    """They are no problems, and told with their line before the size."""
    parameters, sections, line, words = WARNINGS[name]
    sweep = read_sweep(written(parameters, **sections))
    found = warnings(sweep)
    assert [problem.line for problem in found] == [line], found
    assert words in found[0].text
    assert problems(sweep) == []
    assert check(sweep, 2, 1, measure=False)[0] == f"warning: {found[0].told(sweep.source)}"


SOUND = [
    "weight_decay: {distribution: log_uniform, min: -9, max: -2}",
    "weight_decay: {distribution: inv_log_uniform, min: 2, max: 9}",
    "norm: {values: [ghost, batch]}\nghost_splits: {values: [2, 4]}",
    "schedule: {values: [constant, cosine]}\nlr_min: {values: [0.001, 0.01]}",
    "recipe: {values: [null, resnet9-onecycle]}\nval_fraction: {value: 0.1}\npeak_epoch: {values: [1, 2]}",
]


@pytest.mark.parametrize("parameters", SOUND)
def test_what_is_likely_meant_is_not_warned_of(parameters: str) -> None:
    """Exponents that can be no values, and what some of the trials read."""
    assert warnings(read_sweep(written(parameters))) == []


SCHEDULES = get_args(TYPES["schedule"])
# Two values of a setting that differ, whatever else: any two of these make other rates where they are read.
DISTINCT: dict[str, st.SearchStrategy[Any]] = {
    "lr_min": st.sampled_from([0.0, 0.01, 0.02, 0.03, 0.05]),
    "peak_epoch": st.integers(1, 9),
    "lr_factor": st.sampled_from([0.1, 0.3, 0.5, 0.7]),
    "lr_steps": st.lists(st.integers(1, 9), unique=True, min_size=1).map(sorted),
    "patience": st.integers(1, 4),
    "cycle_epochs": st.integers(1, 9),
    "momentum_min": st.sampled_from([None, 0.5, 0.7, 0.85]),
}


def rates(schedule: str, settings: dict[str, Any]) -> list[Rates]:
    """Returns the rates of ten epochs of three steps, in which no epoch is better than the one before."""
    given = {"epochs": 10, "lr_min": 0.0, "lr_max": 0.1, "lr_steps": [4], "patience": 1, "schedule": schedule}
    built = build_schedule(resolve([Layer("test", {**given, **settings})])[0], 3)
    return [built(step, [1.0] * (step // 3)) for step in range(30)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", DISTINCT)
def test_a_schedule_reads_a_setting_if_the_table_says_so(schedule: str, name: str) -> None:
    """Its rates and momenta change with the setting, and else never."""

    @given(st.lists(DISTINCT[name], min_size=2, max_size=2, unique_by=repr))
    @hypothesis_settings(max_examples=25, deadline=None)
    def changes(values: list[Any]) -> None:
        first, second = (rates(schedule, {name: value}) for value in values)
        assert (first != second) is (schedule in READ_ONLY_WITH[name][1])

    changes()


def test_the_table_is_about_settings_and_their_values() -> None:
    """Each is a setting, and is read with some of the choices, but not with all."""
    for name, (decider, needed) in READ_ONLY_WITH.items():
        assert name in FIELDS
        assert set(needed) < set(get_args(TYPES[decider]))
    assert {name for name, (decider, _) in READ_ONLY_WITH.items() if decider == "schedule"} == set(DISTINCT)


def test_a_goal_that_is_missing_is_told_once() -> None:
    """By the file's reader, and not again as one of the wrong sign."""
    sweep, found = inspect_sweep(written(FINE, metric="{name: val/loss}"))
    assert sweep is not None and len(found) == 1
    assert problems(sweep) == []
