"""What is told of a sweep before it runs: each mistake with its line, all at once, and nothing about what is right."""

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from eva.config import FIELDS, TYPES, Layer, UserError, resolve
from eva.loop import BATCH_COLUMNS, epoch_columns
from eva.sweep_check import (
    BATCH_METRICS,
    POSITIONS,
    TRAIN_METRICS,
    WATCHED_METRICS,
    check,
    check_file,
    fits,
    meant,
    num_trials,
    problems,
    warnings,
)
from eva.sweep_file import grid, inspect_sweep, read_sweep

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
    "same once typed": ('l1: {values: ["0.1", 0.1]} #!', ["which are the same", "write 0.1"]),
    "two ways of none": ("grad_clip:\n  values:\n    - null\n    - none #!", ["'none' and None", "the same"]),
    "upper end": ("label_smoothing: {min: 0.0, max: 1.0} #!", ["label_smoothing must be in [0, 1)", "1.0"]),
    "one of many values": ("dropout: {values: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.5, 0.7]} #!", ["dropout", "1.5"]),
    "tail": ("weight_decay: {distribution: normal, mu: 0.001, sigma: 0.001} #!", ["must not be negative", "trial may"]),
    "constant": ("patience: {value: 0} #!", ["patience must be at least 1, but got patience=0"]),
    "ranges that cross": (
        "lr_min: {min: 0.001, max: 0.2} #!\nlr_max: {min: 0.1, max: 1.0}",
        ["lr_min must not be above lr_max", "lr_min=0.2", "lr_max=0.1", "(see line 7)"],
    ),
    "against a default": ("epochs: {values: [4, 8]} #!", ["peak_epoch must lie", "epochs=4", "peak_epoch not among"]),
    "only two out of order": (
        "epochs: {values: [4, 20]} #!\npeak_epoch: {values: [2, 8]}",
        ["peak_epoch must lie between 0 and epochs", "peak_epoch=8.0, epochs=4", "(see line 7)"],
    ),
    "only three together": (
        "epochs: {values: [4, 20, 30]} #!\npeak_epoch: {values: [8, 2]}\n"
        "schedule: {values: [constant, cosine, onecycle]}",
        ["peak_epoch must lie between 0 and epochs"],
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
    assert len(found) == (2 if name == "same once typed" else 1)
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
    "unknown flag": ({"command": "['${program}', --epoch=3, '${args}']"}, 5, ["'epoch'", "'epochs'"]),
    "impossible flag": ({"command": "['${program}', --epochs=3, '${args}']"}, 5, ["peak_epoch", "epochs=3"]),
}


@pytest.mark.parametrize("name", OTHER)
def test_wrong_sections_are_told_with_their_line(name: str) -> None:
    """One problem, at the section's line, in the words that help."""
    sections, line, words = OTHER[name]
    found = problems(read_sweep(written(FINE, **sections)))
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
    assert ["peak_epoch must lie" in problem.text for problem in problems(read_sweep(path))] == [True]


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


def test_a_goal_that_is_missing_is_told_once() -> None:
    """By the file's reader, and not again as one of the wrong sign."""
    sweep, found = inspect_sweep(written(FINE, metric="{name: val/loss}"))
    assert sweep is not None and len(found) == 1
    assert problems(sweep) == []
