"""Reading a sweep's YAML: against W&B's own package, the agent of the installed wandb, and by hand."""

import copy
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from sweeps.config import schema_violations_from_proposed_config
from sweeps.grid_search import grid_search_next_runs
from sweeps.params import HyperParameterSet
from wandb import wandb_agent

from eva.config import Layer, RunConfig, UserError, to_dict
from eva.recipes import configure
from eva.sweep_file import (
    DEFAULT_COMMAND,
    MACROS,
    Problem,
    arguments,
    command_line,
    grid,
    inspect_sweep,
    lr_range_sweep,
    read_sweep,
    refuse,
    warm_command,
)

FULL = """\
# A comment.
program: runners/train.py
apiVersion: "1"
kind: sweep
name: a name
description: what for
project: eva-tests
entity: somebody
controller: {type: cloud}
command:
  - ${env}
  - ${interpreter}
  - ${program}
  - ${args}
method: bayes
metric: {name: val/accuracy_best, goal: maximize, target: 0.99, impute: worst, impute_while_running: "false"}
early_terminate: {type: hyperband, min_iter: 2, eta: 2, strict: true}
run_cap: 7
parameters:
  weight_decay:
    distribution: log_uniform_values
    min: 1.0e-5
    max: 1.0e-2
  policy_options:
    parameters:
      cutout: {values: [4, 8]}
      flip: {value: 0.5}
  model: {value: resnet9}
  policy_options.pad: {value: 4}
"""

SMALL = "program: p.py\nmethod: random\nparameters: {x: {values: [1, 2]}}\n"

GROUPS = """\
program: p.py
method: grid
parameters:
  zeta: {values: [1, 2]}
  outer:
    parameters:
      b: {values: [x, y]}
      a-b: {value: 1}
      a:
        parameters:
          deep: {values: [true, false]}
          c: {value: null}
  outer-most: {parameters: {z: {value: [1, 2]}}}
  Alpha: {value: {k: [1, 0.5], none: null}}
  a.b: {min: 1, max: 2}
"""


def write(folder: Path, text: str) -> Path:
    """Returns the path of a sweep file with this text."""
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path) -> list[str]:
    """Returns the lines that read_sweep refuses a file with, without the file's name."""
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        read_sweep(path)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{path}:") for line in lines)
    return [line.removeprefix(f"{path}:") for line in lines]


def test_everything_of_a_full_sweep_is_read(tmp_path: Path) -> None:
    """Each key of W&B's schema that eva takes ends up where it belongs."""
    sweep = read_sweep(write(tmp_path, FULL))
    assert (sweep.program, sweep.method, sweep.run_cap) == ("runners/train.py", "bayes", 7)
    assert (sweep.metric, sweep.goal, sweep.target) == ("val/accuracy_best", "maximize", 0.99)
    assert (sweep.name, sweep.description) == ("a name", "what for")
    assert (sweep.project, sweep.entity) == ("eva-tests", "somebody")
    assert sweep.command == DEFAULT_COMMAND
    assert sweep.hyperband is not None
    assert (sweep.hyperband.bands[:3], sweep.hyperband.eta, sweep.hyperband.strict) == ((2, 4, 8), 2, True)
    assert sweep.text == FULL
    assert not schema_violations_from_proposed_config(yaml.safe_load(FULL))


def test_parameters_know_their_groups_names_and_lines(tmp_path: Path) -> None:
    """A group's parameters have dots in their names, and so have those that are written so."""
    sweep = read_sweep(write(tmp_path, FULL))
    found = {(parameter.path, parameter.name, parameter.line) for parameter in sweep.parameters}
    assert found == {
        (("model",), "model", 28),
        (("policy_options", "cutout"), "policy_options.cutout", 26),
        (("policy_options", "flip"), "policy_options.flip", 27),
        (("policy_options.pad",), "policy_options.pad", 29),
        (("weight_decay",), "weight_decay", 20),
    }
    assert [parameter.name for parameter in sweep.searched] == ["policy_options.cutout", "weight_decay"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    """Some editors begin a file with one."""
    assert read_sweep(write(tmp_path, "\ufeff" + SMALL)).text == SMALL


def test_lines_are_told_by_the_path_of_keys(tmp_path: Path) -> None:
    """Of keys and list items; of what is not there, the line of what is around it."""
    sweep = read_sweep(write(tmp_path, FULL))
    assert sweep.line_of("metric", "name") == 16
    assert sweep.line_of("command", 2) == 13
    assert sweep.line_of("parameters", "weight_decay", "max") == 23
    assert sweep.line_of("parameters", "weight_decay", "q") == 20
    assert sweep.line_of("parameters", "policy_options", "parameters", "cutout", "values", 1) == 26
    assert sweep.line_of("nothing") == 2


def test_a_small_sweep_has_wandbs_defaults(tmp_path: Path) -> None:
    """Program, method and parameters are enough."""
    sweep = read_sweep(str(write(tmp_path, SMALL)))
    assert sweep.command == tuple(wandb_agent_defaults())
    assert (sweep.metric, sweep.goal, sweep.hyperband, sweep.run_cap) == (None, "maximize", None, None)
    assert (sweep.name, sweep.description, sweep.project, sweep.entity, sweep.target) == (None,) * 5


def wandb_agent_defaults() -> list[str]:
    """Returns the command that the installed agent has by default."""
    from wandb.sdk.launch.sweeps.utils import DEFAULT_SWEEP_COMMAND

    return DEFAULT_SWEEP_COMMAND


def test_anchors_aliases_and_merges_are_read_as_wandb_reads_them(tmp_path: Path) -> None:
    """A parameter that takes another one's range, and changes a part of it."""
    text = """\
program: p.py
method: random
parameters:
  a: &range
    distribution: log_uniform_values
    min: 0.001
    max: 0.1
  b:
    <<: *range
    max: 1.0
  c: *range
"""
    sweep = read_sweep(write(tmp_path, text))
    assert [(p.distribution.min, p.distribution.max, p.line) for p in sweep.parameters] == [
        (0.001, 0.1, 4),
        (0.001, 1.0, 8),
        (0.001, 0.1, 11),
    ]
    assert sweep.line_of("parameters", "b", "max") == 10
    assert sweep.line_of("parameters", "b", "min") == 6


WRONG = """\
metod: grid
method: grids
metric: {goal: up, target: high, impute: mean}
early_terminate: {type: hyperband, max_iter: 9}
command:
  - ${program}
  - ${arg}
  - [1]
run_cap: 0
scheduler: {engine: optuna}
name: 3
kind: sweeps
controller: {type: here}
parameters:
  lr_max: {distribution: log_uniform_values, min: 0, max: 0.1}
  lr_min:
    distribution: uniform
    min: 1
    max: 1e-3
  2: {value: 1}
  "a b": {value: 1}
  epochs: 3
  group:
    parameters:
      x: {values: []}
    value: 3
  empty: {parameters: {}}
"""


def test_all_problems_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    """One file with everything wrong: no problem hides another one."""
    told = problems_of(write(tmp_path, WRONG))
    expected = {
        1: ["no key 'metod'; did you mean 'method'", "program is missing"],
        2: ["method must be grid, random or bayes, but got 'grids'"],
        3: [
            "metric needs a name",
            "goal must be minimize or maximize, but got 'up'",
            "target must be a finite number",
            "impute",
        ],
        4: ["with max_iter needs s"],
        7: [r"unknown macro ${arg}; did you mean ${args}?"],
        8: ["an item of command must be text or a number, but got [1]"],
        9: ["run_cap must be a whole number from 1 on, but got 0"],
        10: ["eva does not support scheduler"],
        11: ["name must be text, but got 3"],
        12: ["kind must be sweep, but got 'sweeps'"],
        13: ["controller.type must be local or cloud, but got 'here'"],
        15: ["parameter lr_max: min of log_uniform_values must be above 0"],
        19: ["parameter lr_min: max must be a number, but got '1e-3': YAML reads it as text, write 0.001"],
        20: ["the name of a parameter must begin with a letter or _"],
        21: ["the name of a parameter must begin with a letter or _"],
        22: ["parameter epochs must be a mapping, but got 3; for a constant write epochs: {value: ...}"],
        25: ["parameter group.x: values must be a list with something in it, but got []"],
        26: ["group group must hold parameters alone, but got 'value'"],
        27: ["parameters must be a mapping of names, but got {}"],
    }
    by_line: dict[int, list[str]] = {}
    for line in told:
        place, text = line.split(": ", 1)
        by_line.setdefault(int(place), []).append(text)
    assert sum(map(len, by_line.values())) == sum(map(len, expected.values())) == len(told)
    for number, parts in expected.items():
        for part in parts:
            assert any(part in text for text in by_line[number]), part
    assert [int(line.split(":")[0]) for line in told] == sorted(int(line.split(":")[0]) for line in told)


@pytest.mark.parametrize(
    "change, line, told",
    [
        (("method: random", "method: custom"), 2, "eva does not support method: custom"),
        (("method: random", "method: bayes"), 2, "method: bayes needs a metric"),
        (("program: p.py", "program: ''"), 1, "program must be text, but got ''"),
        (("program: p.py", "program: 3"), 1, "program must be text, but got 3"),
        (("program: p.py\n", ""), 1, "program is missing"),
        (("method: random\n", ""), 1, "method is missing"),
        (("parameters: {x: {values: [1, 2]}}\n", ""), 1, "parameters is missing"),
        (("{x: {values: [1, 2]}}", "[x]"), 3, "parameters must be a mapping of names, but got ['x']"),
        (("{x: {values: [1, 2]}}", "null"), 3, "parameters must be a mapping of names, but got None"),
        (("method: random", "method: [grid]"), 2, "method must be grid, random or bayes, but got ['grid']"),
        (("method: random", "method: random\nmetric: val/accuracy"), 3, "metric must be a mapping"),
        (("method: random", "method: random\nmetric: {name: x}"), 3, "metric needs a goal: W&B minimizes without one"),
        (("method: random", "method: random\nmetric: {name: x, goal: minimize, gaol: 1}"), 3, "did you mean 'goal'?"),
        (
            ("method: random", "method: random\nmetric: {name: 3, goal: minimize}"),
            3,
            "metric.name must be text, but got 3",
        ),
        (
            ("method: random", "method: random\nmetric: {name: x, goal: [minimize]}"),
            3,
            "goal must be minimize or maximize",
        ),
        (
            ("method: random", "method: random\nmetric: {name: x, goal: minimize, impute_while_running: false}"),
            *(3, "metric.impute_while_running must be text, one of: latest, best, worst, false, but got False"),
        ),
        (
            ("method: random", "method: random\nearly_terminate: {type: hyperband, min_iter: 1}"),
            3,
            "early_terminate needs a",
        ),
        (
            ("method: random", "method: random\nmetric: {name: x, goal: minimize}\nearly_terminate: 3"),
            4,
            "early_terminate must be a mapping",
        ),
        (("method: random", "method: random\nmetric: {name: x, goal: minimize, target: .inf}"), 3, "but got inf"),
        (("method: random", "method: random\nmetrics: []"), 3, "eva does not support metrics"),
        (("method: random", "method: random\njob: x"), 3, "eva does not support job"),
        (("method: random", "method: random\nimage_uri: x"), 3, "eva does not support image_uri"),
        (("method: random", "method: random\ncommand: python p.py"), 3, "command must be a list"),
        (("method: random", "method: random\ncommand: [null]"), 3, "an item of command must be text or a number"),
        (("method: random", "method: random\ncommand: ['x ${args}']"), 3, "${args} must be an item of its own"),
        (("method: random", "method: random\ncommand: ['${args']"), 3, "unknown macro ${args"),
        (("method: random", "method: random\ncommand: ['${args_dict}']"), 3, "unknown macro ${args_dict}"),
        (("method: random", "method: random\ncommand: ['${envvar:NO_SUCH}/x']"), 3, "${envvar:NO_SUCH} is not set"),
        (("method: random", "method: random\ncommand: ['${envvar:home}']"), 3, "in capitals, digits and _"),
        (
            ("method: random", "method: random\nrun_cap: true"),
            3,
            "run_cap must be a whole number from 1 on, but got True",
        ),
        (
            ("values: [1, 2]", "values: [1, 2], probabilities: [1]"),
            3,
            "parameter x: there must be a probability a value",
        ),
        (("{x:", "{x.y: {value: 1}, x: {parameters: {y: {value: 2}}}, z:"), 3, "parameter x.y is there twice"),
        (("{x:", "{x: {value: 1}, x:"), 3, "the key 'x' is there twice"),
        (("[1, 2]", "[2020-01-01]"), 3, "YAML reads 2020-01-01 as a date; write it in quotes to mean text"),
        (("[1, 2]", "[!!binary aGk=]"), 3, "cannot hold binary values"),
        (("[1, 2]", "!!set {a, b}"), 3, "cannot hold YAML's set"),
        (("[1, 2]", "[2020-13-45]"), 3, "cannot read '2020-13-45': month must be in 1..12"),
        (("[1, 2]", "[" + "1" * 5000 + "]"), 3, "Exceeds the limit"),
        (("[1, 2]", "&a [1, *a]"), 3, "an alias (*) stands inside of what it is an alias of"),
        (("[1, 2]", "[1, *b]"), 3, "found undefined alias 'b'"),
        (("[1, 2]", "[!!python/object:os.system x]"), 3, "could not determine a constructor"),
        (("[1, 2]", "[1, 2"), 3, "expected ',' or ']'"),
        (("method: random", "method: random\n---"), 3, "but found another document"),
        (("{x:", "{? [a, b] : 1, x:"), 3, "found unhashable key"),
    ],
)
def test_each_mistake_is_told_with_its_line(change: tuple[str, str], line: int, told: str, tmp_path: Path) -> None:
    """A small sweep with one thing wrong has one problem."""
    assert change[0] in SMALL
    problems = problems_of(write(tmp_path, SMALL.replace(*change)))
    assert len(problems) == 1
    assert problems[0].startswith(f"{line}: ")
    assert told in problems[0]


def test_what_wandbs_schema_takes_beyond_the_usual_is_taken(tmp_path: Path) -> None:
    """Repeated values where they are drawn, steps of hyperband with a point, and a command that needs no program."""
    text = (
        "method: random\nmetric: {name: val/loss, goal: minimize}\ncommand: [eva, train, '${args}']\n"
        "early_terminate: {type: hyperband, max_iter: 27, s: 2.0}\nparameters: {x: {values: [1, 2, 1]}}\n"
    )
    assert not schema_violations_from_proposed_config(yaml.safe_load(text))
    sweep = read_sweep(write(tmp_path, text))
    assert (sweep.program, sweep.command[:2]) == ("", ("eva", "train"))
    assert sweep.hyperband is not None and sweep.hyperband.bands == (3, 9)
    assert sweep.searched[0].distribution.values == (1, 2, 1)
    assert command_line(sweep, {"x": 1}, "python", "") == ["eva", "train", "--x=1"]
    (told,) = problems_of(write(tmp_path, text.replace("random", "grid")))
    assert told == "5: parameter x: the value 1 is there twice"
    (told,) = problems_of(write(tmp_path, text.replace("s: 2.0", "s: 2.5")))
    assert "s must be a whole number" in told


def test_a_grid_of_wandb_has_repeated_values_once() -> None:
    """So a grid with one is a mistake."""
    runs = grid_search_next_runs([], {"method": "grid", "parameters": {"x": {"values": [1, 2, 1]}}}, n=5)
    assert len([run for run in runs if run is not None]) == 2


@pytest.mark.parametrize(
    "before", [[], ["python"], ["python3"], ["${env}", "${interpreter}"], [sys.executable], ["${envvar:EVA_PYTHON}"]]
)
def test_a_worker_runs_what_stands_from_the_program_on(
    before: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only starts Python is left out, and all after the program stays, another mention of it too."""
    monkeypatch.setenv("EVA_PYTHON", "python3")
    after = ["${args}", "--a=1", "${program}"]
    for program in ("${program}", "runners/train.py"):
        assert warm_command(read_sweep(with_command([*before, program, *after], tmp_path))) == (program, *after)


@pytest.mark.parametrize(
    "command, told",
    [
        (["nice", "python", "${program}"], "command has 'nice' before the program"),
        (["python", "-O", "${program}"], "command has '-O' before the program"),
        (["${envvar:EVA_NICE}", "python", "${program}"], "command has 'nice' before the program"),
        (["${args}", "${program}"], "command has '${args}' before the program"),
        (["python", "other.py", "${args}"], "command doesn't run ${program}"),
    ],
)
def test_a_worker_cannot_run_a_command_that_does_more(
    command: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused rather than run as something else."""
    monkeypatch.setenv("EVA_NICE", "nice")
    with pytest.raises(UserError, match=re.escape(told) + ".*; --isolate gives each trial a process"):
        warm_command(read_sweep(with_command(command, tmp_path)))


@pytest.mark.parametrize(
    "kind", ["{min: 0.1, max: 1.0}", "{distribution: normal}", "{values: [1, 2], probabilities: [0.5, 0.5]}"]
)
def test_a_grid_refuses_what_wandbs_grid_refuses(kind: str, tmp_path: Path) -> None:
    """Continuous parameters and probabilities."""
    text = f"program: p.py\nmethod: grid\nparameters:\n  y: {{values: [1]}}\n  x: {kind}\n"
    with pytest.raises(ValueError, match="disallowed type"):
        grid_search_next_runs([], yaml.safe_load(text))
    (problem,) = problems_of(write(tmp_path, text))
    assert problem.startswith("5: parameter x: a grid takes value, values, int_uniform and q_uniform, but got")


def test_a_grid_with_too_many_values_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """A billion whole numbers would fill the memory."""
    text = "program: p.py\nmethod: grid\nparameters: {x: {min: 0, max: 999999999}}\n"
    assert problems_of(write(tmp_path, text)) == [
        "3: parameter x: a grid takes at most 100000 values, but got 1000000000"
    ]


def test_what_is_wrong_with_the_file_itself_is_told(tmp_path: Path) -> None:
    """No file, a folder, bytes, nothing, a list, and what is too large or too deep."""
    path = write(tmp_path, "")
    assert problems_of(path) == ["1: a sweep must be a mapping with program, method and parameters, but got nothing"]
    assert "but got list" in problems_of(write(tmp_path, "- 1"))[0]
    assert "nested too deeply" in problems_of(write(tmp_path, "[" * 2000))[0]
    assert "at most 4194304 bytes" in problems_of(write(tmp_path, "#" * 5_000_000))[0]
    path.write_bytes(b"program: \xff")
    assert problems_of(path) == [" the file is not UTF-8: invalid start byte at byte 9"]
    path.write_bytes(b"program: \x00")
    assert "cannot read the YAML: unacceptable character" in problems_of(path)[0]
    assert problems_of(tmp_path) == [" cannot read it: Is a directory"]
    assert problems_of(tmp_path / "no") == [" cannot read it: No such file or directory"]
    with pytest.raises(UserError, match="embedded null byte"):
        read_sweep("a\0b")


def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path: Path) -> None:
    """Nine lines that stand for a billion values."""
    lines = ["program: p.py", "method: random", "parameters:", "  x0: &x0 {value: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]}"]
    lines += [f"  x{n}: &x{n} {{value: [{', '.join([f'*x{n - 1}'] * 10)}]}}" for n in range(1, 10)]
    assert "at most 100000 values, aliases followed" in problems_of(write(tmp_path, "\n".join(lines)))[0]


def test_nothing_that_a_file_may_hold_ends_in_a_traceback(tmp_path: Path) -> None:
    """Each word of a full sweep, replaced by things that do not belong there: a sweep, or problems in one line each."""
    strange = [
        "",
        "~",
        "[]",
        "{}",
        "[[1]]",
        "{a: {b: 1}}",
        ".nan",
        "-.inf",
        "1" * 400,
        "yes",
        "'",
        "? x",
        "&a",
        "*a",
        "<<",
    ]
    strange += [
        "!!float x",
        "!!int x",
        "2001-01-01",
        "0x",
        "1_0",
        '"\\ud800"',
        "\t",
        "- 1",
        "a: 1",
        "!!null x",
        "é\x85\u2028",
    ]
    words = list(re.finditer(r"[\w./${}-]+", FULL))
    random = Random(0)
    refused = 0
    for _ in range(100):
        word = random.choice(words)
        path = write(tmp_path, FULL[: word.start()] + random.choice(strange) + FULL[word.end() :])
        try:
            read_sweep(path)
        except UserError as error:
            refused += 1
            assert all(line.startswith(str(path)) for line in str(error).splitlines())
    assert refused > 60


def test_a_sweep_with_problems_is_given_as_far_as_it_goes(tmp_path: Path) -> None:
    """So that others can look for problems of their own, and tell all together in the order of lines."""
    path = write(tmp_path, FULL.replace("min: 1.0e-5", "min: 0").replace("runners/train.py", "''"))
    sweep, problems = inspect_sweep(path)
    assert sweep is not None
    assert [problem.line for problem in problems] == [2, 22]
    assert sweep.program == ""
    assert "weight_decay" not in {parameter.name for parameter in sweep.parameters}
    assert sweep.metric == "val/accuracy_best"
    own = Problem(sweep.line_of("parameters", "model", "value"), "no such model")
    with pytest.raises(UserError) as caught:
        refuse(path, [own, own, *problems])
    assert [line.split(":")[1] for line in str(caught.value).split("\n")] == ["2", "22", "28"]


def test_nothing_is_refused_without_problems() -> None:
    """No problems, no error."""
    refuse(Path("x"), [])


# --- the grid, and what a trial is handed, against W&B's package ---


def wandb_arguments(text: str) -> list[dict[str, Any]]:
    """Returns what W&B's grid search hands to each trial of a sweep, in its order, as an agent receives it."""
    runs = grid_search_next_runs([], yaml.safe_load(text), n=1000)
    return [{name: entry["value"] for name, entry in run.config.items()} for run in runs if run is not None]


@pytest.mark.parametrize(
    "text",
    [
        GROUPS,
        "program: p.py\nmethod: grid\nparameters: {b: {min: 1, max: 3}, a: {values: [x, null, 1.5]}, c: {value: 1}}\n",
        "program: p.py\nmethod: grid\nparameters: {q: {distribution: q_uniform, min: 0, max: 9, q: 2}, a: {value: 1}}",
        "program: p.py\nmethod: grid\nparameters: {c: {value: 1}, a: {value: {x: 1}}}\n",
    ],
)
def test_a_grid_is_wandbs_in_its_order_with_the_agents_arguments(text: str, tmp_path: Path) -> None:
    """Combinations, groups, constants and the order of names: W&B's grid search makes the same."""
    sweep = read_sweep(write(tmp_path, text))
    made = [arguments(sweep, values) for values in grid(sweep)]
    expected = wandb_arguments(text)
    assert made == expected
    assert json.dumps(made) == json.dumps(expected)  # the order of the keys too, on every level


def test_a_grid_leaves_constants_out_and_names_groups_with_dots(tmp_path: Path) -> None:
    """The first of the eight combinations has the first value of each."""
    combinations = list(grid(read_sweep(write(tmp_path, GROUPS))))
    assert len(combinations) == 2 * 2 * 2 * 2
    assert combinations[0] == {"a.b": 1, "outer.a.deep": True, "outer.b": "x", "zeta": 1}
    assert combinations[1] == {"a.b": 1, "outer.a.deep": True, "outer.b": "x", "zeta": 2}


def test_arguments_are_wandbs_for_drawn_values(tmp_path: Path) -> None:
    """A bayes sweep with a group, a flat name with a dot, and constants, values set by hand."""
    sweep = read_sweep(write(tmp_path, FULL))
    values = {"policy_options.cutout": 8, "weight_decay": 1e-3}
    parameters = HyperParameterSet.from_config(yaml.safe_load(FULL)["parameters"])
    for parameter in parameters.searchable_params:
        parameter.value = values[".".join(parameter.name.split(HyperParameterSet.NESTING_DELIMITER))]
    expected = {name: entry["value"] for name, entry in parameters.to_config().items()}
    assert json.dumps(arguments(sweep, values)) == json.dumps(expected)
    assert arguments(sweep, values)["policy_options.pad"] == 4


def test_arguments_change_neither_sweep_nor_values(tmp_path: Path) -> None:
    """Twice the same, and what was given is as it was."""
    sweep = read_sweep(write(tmp_path, FULL))
    values = {"policy_options.cutout": 8, "weight_decay": 1e-3}
    before = copy.deepcopy((sweep, values))
    first = arguments(sweep, values)
    first["policy_options"]["cutout"] = 0
    assert arguments(sweep, values)["policy_options"]["cutout"] == 8
    assert (sweep, values) == before


# --- the command line, against the installed agent ---

ARGUMENTS = {
    **{"whole": 3, "rate": 1e-05, "text": "two words", "yes": True, "no": False, "nothing": None, "unicode": "grün"},
    **{"strides": [1, 2.5, "x", None], "a.b": 0.1, "options": {"cutout": 8, "deep": {"on": True}}},
}


def agents_command(command: list[Any] | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the command line that wandb's agent makes of a sweep's command and ARGUMENTS, but starts no process."""
    agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
    agent._sweep_command = copy.deepcopy(command or [])
    agent._in_jupyter, agent._function, agent._forward_signals, agent._run_processes = False, None, False, {}
    started: list[list[str]] = []

    def start(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace()

    monkeypatch.setattr(wandb_agent, "AgentProcess", start)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_RUN_ID", "")  # the agent sets it, and the fixture takes it back
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    (folder / "wandb" / "sweep-s1").mkdir(parents=True, exist_ok=True)
    args = {name: {"value": value} for name, value in ARGUMENTS.items()}
    agent._command_run({"type": "run", "run_id": "r1", "program": "runners/train.py", "args": args})  # type: ignore[no-untyped-call]
    return started[0]


def with_command(command: list[Any] | None, folder: Path) -> Path:
    """Returns the path of a sweep with a command."""
    sweep = {"program": "runners/train.py", "method": "random", "parameters": {"x": {"value": 1}}}
    return write(folder, yaml.safe_dump({**sweep, **({} if command is None else {"command": command})}))


@pytest.mark.parametrize(
    "command",
    [
        None,
        *([f"${{{macro}}}"] for macro in MACROS),
        ["${env}", "${interpreter}", "-u", "${program}", "train", "${args_no_boolean_flags}", "${args_json}"],
        ["${envvar:EVA_WORD}", "--x=${envvar:EVA_WORD}/${envvar:EVA_OTHER}", 3, 1.5, True, "$x", "{y}", "$(z)"],
        ["${envvar:EVA_MACRO}"],
        ["${args_json_file}", "${args_json_file}"],
    ],
)
def test_the_command_line_is_the_agents(
    command: list[Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every macro, variables of the environment, and items that are none, with values of every type."""
    for name, value in {"EVA_WORD": "a b", "EVA_OTHER": "ü", "EVA_MACRO": "${args}"}.items():
        monkeypatch.setenv(name, value)
    expected = agents_command(command, tmp_path, monkeypatch)
    json_file = tmp_path / "wandb" / "sweep-s1" / "config-r1.json"
    sweep = read_sweep(with_command(command, tmp_path))
    before = copy.deepcopy((sweep, ARGUMENTS))
    assert command_line(sweep, ARGUMENTS, "python", json_file) == expected
    assert (sweep, ARGUMENTS) == before


def test_a_json_file_of_the_agent_holds_what_the_caller_is_told_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent writes the arguments with json.dumps."""
    agents_command(["${args_json_file}"], tmp_path, monkeypatch)
    assert (tmp_path / "wandb/sweep-s1/config-r1.json").read_text() == json.dumps(ARGUMENTS)


def test_every_macro_of_the_agent_is_known() -> None:
    """The installed wandb makes these; a dictionary is not for a command line."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    made = {*create_sweep_command_args({"args": {}}), "interpreter", "program", "args_json_file", "env"}
    assert made - {"args_dict"} == set(MACROS)


def test_a_command_line_really_starts_a_trial(tmp_path: Path) -> None:
    """A script that prints its arguments gets them one by one, whatever is in them."""
    script = tmp_path / "show.py"
    script.write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    text = f"program: {script}\nmethod: grid\nparameters: {{a: {{values: [\"x 'y' $z\"]}}, b: {{value: [1, null]}}}}\n"
    sweep = read_sweep(write(tmp_path, text))
    (values,) = grid(sweep)
    done = subprocess.run(
        command_line(sweep, arguments(sweep, values), "python3", ""), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ["--a=x 'y' $z", "--b=[1, None]"]


# --- a sweep around a range test ---


def configured(**settings: Any) -> RunConfig:
    """Returns the configuration of settings over their recipe, if they name one."""
    return configure(Layer("test", settings))[0]


LR_CONFIGS = {
    "defaults": configured(),
    "recipe": configured(recipe="resnet9-onecycle"),
    "recipe, changed back": configured(recipe="resnet18-layernorm", norm="batch", dropout=0.0, lr_max=0.1),
    "all types": configured(
        **{"weight_decay": 1e-5, "nesterov": False, "stage_strides": [1, 2, 2, 1], "policy_options": {"cutout": 4}},
        **{"grad_clip": 1, "data": "folder:a b", "lr_steps": [2.0, 3.5], "schedule": "step", "seed": 3},
        **{"out": "runs/x", "name": "n", "group": "g", "tags": ["t"], "tracking": "offline", "project": "p"},
    ),
    "one epoch": configured(epochs=1, peak_epoch=0.5),
}


@pytest.mark.parametrize("name", LR_CONFIGS)
@pytest.mark.parametrize("lr_min, lr_max", [(0.00854, 0.0854), (0.0, 3e-4), (0.05, 0.06), (1e-6, 1e-5)])
def test_the_sweep_of_a_range_test_trains_what_was_tested(
    name: str, lr_min: float, lr_max: float, tmp_path: Path
) -> None:
    """Each trial is the tested configuration but for its rates, and both W&B and eva read the file."""
    config = LR_CONFIGS[name]
    text = lr_range_sweep(config, lr_min, lr_max, "recipe x\n- y")
    assert not schema_violations_from_proposed_config(yaml.safe_load(text))
    sweep = read_sweep(write(tmp_path, text))
    assert (sweep.metric, sweep.goal) == ("val/accuracy_best", "maximize")
    ranges = {parameter.name: parameter.distribution for parameter in sweep.searched}
    assert set(ranges) == ({"lr_max"} if config.schedule == "step" else {"lr_min", "lr_max"})
    assert re.search("doesn't read lr_min|below that range", sweep.text)
    for shares in itertools.product((0.0, 0.3, 1 - 1e-12), repeat=len(ranges)):
        values = {key: ranges[key].value_at(share) for key, share in zip(ranges, shares, strict=True)}
        flags = {key: str(value) for key, value in arguments(sweep, values).items()}  # as the agent passes them
        trial = to_dict(configured(**flags))
        expected = to_dict(config)
        for key in ("lr_min", "lr_max", "out", "name", "group", "tags", "tracking", "project", "entity"):
            del trial[key], expected[key]
        expected["val_fraction"] = expected["val_fraction"] or 0.1
        assert trial == expected
        assert float(flags["lr_min"]) <= values["lr_max"]


def test_the_sweep_of_a_range_test_lies_around_what_was_found(tmp_path: Path) -> None:
    """A fourth to four times of lr_max; lr_min from a fourth up to where lr_max begins."""
    sweep = read_sweep(
        write(tmp_path, lr_range_sweep(LR_CONFIGS["recipe"], 0.00854, 0.0854, "recipe resnet9-onecycle"))
    )
    ranges = {parameter.name: parameter.distribution for parameter in sweep.searched}
    assert (ranges["lr_max"].min, ranges["lr_max"].max) == (0.0214, 0.342)
    assert (ranges["lr_min"].min, ranges["lr_min"].max) == (0.00214, 0.0214)
    assert "recipe resnet9-onecycle" in sweep.text
    assert sweep.text.startswith("# ")


@pytest.mark.parametrize("epochs", [2, 3, 4, 5, 8, 20, 24, 200])
def test_the_sweep_of_a_range_test_compares_its_trials_once(epochs: int, tmp_path: Path) -> None:
    """By hand: after three eighths of the epochs, and the next band lies at the end or beyond."""
    text = lr_range_sweep(configured(epochs=epochs, peak_epoch=0.5), 0.01, 0.1, "x")
    hyperband = read_sweep(write(tmp_path, text)).hyperband
    assert hyperband is not None
    first, second = hyperband.bands[:2]
    assert abs(first - 3 / 8 * epochs) <= 0.5
    assert first < epochs <= second
    assert (hyperband.eta, hyperband.strict) == (4, True)
    assert f"after epoch {first}, and lets about the best quarter go on" in text


@pytest.mark.parametrize("schedule", ["step", "constant"])
def test_the_sweep_of_a_range_test_searches_no_rate_that_no_trial_reads(schedule: str, tmp_path: Path) -> None:
    """Then lr_min is one number, below every lr_max."""
    config = configured(schedule=schedule, lr_steps=[2.0])
    for lr_min, lr_max in ((0.01, 0.1), (0.05, 0.06), (0.0, 3e-4)):
        sweep = read_sweep(write(tmp_path, lr_range_sweep(config, lr_min, lr_max, "x")))
        (searched,) = sweep.searched
        (low,) = (one.distribution.values[0] for one in sweep.parameters if one.name == "lr_min")
        assert searched.name == "lr_max"
        assert searched.distribution.min is not None
        assert 0 < low < searched.distribution.min
        assert f"The schedule {schedule} doesn't read lr_min" in sweep.text


def test_the_sweep_of_a_range_test_writes_numbers_that_yaml_reads_as_numbers() -> None:
    """1e-05, as Python writes it, would be text."""
    text = lr_range_sweep(configured(weight_decay=1e-5), 1e-6, 1e-5, "x")
    parameters = yaml.safe_load(text)["parameters"]
    assert parameters["weight_decay"] == {"value": 1e-5}
    numbers = [parameters[name][end] for name in ("lr_min", "lr_max") for end in ("min", "max")]
    assert all(isinstance(number, float) for number in numbers)
    assert numbers == sorted(numbers)


def test_one_epoch_has_no_band_and_so_no_early_end(tmp_path: Path) -> None:
    """Hyperband needs an epoch before the last."""
    assert read_sweep(write(tmp_path, lr_range_sweep(LR_CONFIGS["one epoch"], 0.01, 0.1, "x"))).hyperband is None
