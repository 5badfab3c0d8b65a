"""A W&B sweep's YAML as plain data: every problem told with its line, parameters, grid, and a trial's command line."""

import datetime
import difflib
import itertools
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from eva.config import (
    FIELDS,
    MOST_BYTES,
    MOST_VALUES,
    READ_ONLY_WITH,
    RunConfig,
    UserError,
    check_size,
    default_of,
    read_text,
    to_dict,
)
from eva.distributions import Distribution
from eva.distributions import config_problems as parameter_problems
from eva.hyperband import Hyperband
from eva.hyperband import config_problems as hyperband_problems
from eva.recipes import RECIPES

METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")

# What wandb's agent replaces; any other macro it drops without a word.
MACROS = (
    *("env", "interpreter", "program", "args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags"),
    *("args_json", "args_json_file", "args_append_hydra", "args_override_hydra"),
)
_ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
_ANY_MACRO = re.compile(r"\$\{[^}]*\}?")

# W&B joins the keys of nested parameters with this, and sorts the names so made.
_NESTING = ".wbnest[599c28ca25da]."
PARAMETER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")

KEYS = (
    *("program", "method", "metric", "parameters", "early_terminate", "command", "run_cap"),
    *("name", "description", "project", "entity", "controller", "apiVersion", "kind"),
)
UNSUPPORTED = {
    "scheduler": "eva has its own search engine, and W&B's needs none",
    "metrics": "eva steers by one metric; name it as metric: {name, goal}",
    "job": "that is for W&B Launch; name the script as program",
    "image_uri": "that is for W&B Launch; name the script as program",
}
# What W&B's bayes takes for the metric of trials that have none.
IMPUTED = {"impute": ("latest", "best", "worst"), "impute_while_running": ("latest", "best", "worst", "false")}
METRIC_KEYS = ("name", "goal", "target", *IMPUTED)

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong, in one line, and the line of the file it is about, from 1; 0 if it is about the whole file."""

    line: int
    text: str

    def told(self, source: Path) -> str:
        """Returns the problem as "FILE:LINE: what is wrong"."""
        return f"{source}:{self.line}: {self.text}" if self.line else f"{source}: {self.text}"


def refuse(source: Path, problems: Iterable[Problem]) -> None:
    """Raises a UserError of all the problems, in the order of their lines, if there are any."""
    if told := [problem.told(source) for problem in sorted(set(problems))]:
        raise UserError("\n".join(told))


@dataclass(frozen=True)
class Parameter:
    """One parameter: its keys from the outermost group to its own, what it is drawn from, and its line in the file."""

    path: tuple[str, ...]
    distribution: Distribution
    line: int

    @property
    def name(self) -> str:
        """The keys with dots between, which is also how eva's flags name what lies in a group."""
        return ".".join(self.path)

    @property
    def order(self) -> str:
        """What W&B sorts parameters by."""
        return _NESTING.join(self.path)


@dataclass(frozen=True)
class Sweep:
    """What a sweep's YAML asks for.

    Attributes:
        source: The file.
        text: What stands in it.
        program: The script that a trial runs; empty if `command` names none.
        command: The items of its command line, macros as they are; W&B's default if the file has none.
        method: grid, random or bayes.
        metric: Name of what the sweep steers by; None if the file has none.
        goal: minimize or maximize; maximize without a metric.
        parameters: In the order of W&B's grid: of two, the latter changes faster.
        hyperband: When a trial is stopped early; None if never.
        run_cap: The most trials, at least 1; None if there is no bound.
        name: The display name.
        description: A sentence about it.
        project: W&B project.
        entity: W&B entity.
        target: The sweep is over once a trial reaches this value of the metric; None if it is not.
        lines: Line of each key and list item, by its path: ("parameters", "lr_max", "min").
    """

    source: Path
    text: str
    program: str = ""
    command: tuple[str, ...] = DEFAULT_COMMAND
    method: str = ""
    metric: str | None = None
    goal: str = "maximize"
    parameters: tuple[Parameter, ...] = ()
    hyperband: Hyperband | None = None
    run_cap: int | None = None
    name: str | None = None
    description: str | None = None
    project: str | None = None
    entity: str | None = None
    target: float | None = None
    lines: Mapping[KeyPath, int] = field(default_factory=dict, repr=False)

    def line_of(self, *path: str | int) -> int:
        """Returns the line, from 1, of a key or list item, or that of the nearest thing around it that is there."""
        return _line_of(self.lines, path)

    @property
    def searched(self) -> tuple[Parameter, ...]:
        """The parameters that are no constants."""
        return tuple(parameter for parameter in self.parameters if not parameter.distribution.is_constant)


def read_sweep(path: str | Path) -> Sweep:
    """Returns the sweep that a YAML file holds.

    Raises:
        UserError: Every problem of the file at once, each with its line. Whether its parameters are settings, and
            its program exists, is not looked at.
    """
    sweep, problems = inspect_sweep(path)
    refuse(Path(path), problems)
    assert sweep is not None
    return sweep


def inspect_sweep(path: str | Path) -> tuple[Sweep | None, list[Problem]]:
    """Returns the sweep that a YAML file holds, and what is wrong with the file, by lines.

    What is wrong is left out of the sweep, which then has an empty `program` or `method`, or fewer parameters, so
    that a caller can go on looking for problems of its own. There is no sweep if the file is no mapping in YAML.
    """
    source = Path(path)
    try:
        text = read_text(source, "utf-8-sig")
    except UserError:
        return None, [Problem(0, f"a sweep must have at most {MOST_BYTES} bytes")]
    except UnicodeDecodeError as error:
        return None, [Problem(0, f"the file is not UTF-8: {error.reason} at byte {error.start}")]
    except (OSError, ValueError) as error:
        return None, [Problem(0, f"cannot read it: {getattr(error, 'strerror', None) or error}")]
    values, lines, problems = _load(text)
    if not isinstance(values, dict):
        if not problems:
            kind = "nothing" if values is None else type(values).__name__
            problems = [Problem(1, f"a sweep must be a mapping with program, method and parameters, but got {kind}")]
        return None, problems
    return _Reader(values, lines, problems).sweep(source, text), sorted(set(problems))


# --- YAML, with the line of everything ---


def _load(text: str) -> tuple[Any, dict[KeyPath, int], list[Problem]]:
    """Returns what a YAML text holds, the line of each key and list item by its path, and the problems."""
    loader, values = None, None
    problems: list[Problem] = []
    lines: dict[KeyPath, int] = {}

    def unreadable(reason: str, line: int = 0) -> None:
        problems.append(Problem(line, f"cannot read the YAML: {_one_line(reason)}"))

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is not None:
            _check_node(loader, root, problems)
            values = loader.construct_document(root)
            # By now, merge keys (<<) are resolved, and aliases are known to end.
            _note_lines(root, (), _line(root), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        unreadable(" ".join(filter(None, (error.context, error.problem))), mark.line + 1 if mark else 0)
    except RecursionError:
        unreadable("lists and mappings are nested too deeply")
    except Exception as error:  # PyYAML lets through whatever its own slips raise
        unreadable(str(error))
    finally:
        if loader is not None:
            loader.dispose()
    return values, lines, problems


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _check_node(loader: yaml.SafeLoader, root: yaml.Node, problems: list[Problem]) -> None:
    """Notes keys that are there twice, and values that a sweep cannot hold.

    Raises:
        yaml.MarkedYAMLError: It cannot be made into values: aliases go in circles or explode, a value has no meaning.
    """
    check_size(root)
    known: set[int] = set()  # ids of the nodes that were looked at

    def visit(node: yaml.Node) -> None:
        if id(node) in known:
            return
        known.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(loader, node, problems)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node, problems)
        if node.tag in ("tag:yaml.org,2002:set", "tag:yaml.org,2002:omap", "tag:yaml.org,2002:pairs"):
            _fail(f"a sweep cannot hold YAML's {node.tag.rpartition(':')[2]}", node)
        for child in _children(node):
            visit(child)

    visit(root)


def _fail(problem: str, node: yaml.Node) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        yield from itertools.chain.from_iterable(node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode, problems: list[Problem]) -> None:
    try:
        value = None if node.tag.endswith(":merge") else loader.construct_object(node)
    except yaml.MarkedYAMLError:
        raise
    except Exception as error:  # int() and date() refuse what only looks like theirs
        _fail(f"cannot read {node.value!r:.60}: {error}", node)
    if isinstance(value, datetime.date):
        problems.append(Problem(_line(node), f"YAML reads {node.value} as a date; write it in quotes to mean text"))
    if isinstance(value, bytes):
        problems.append(Problem(_line(node), "a sweep cannot hold binary values"))


def _check_keys(node: yaml.MappingNode, problems: list[Problem]) -> None:
    known: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in known:
                problems.append(Problem(_line(key), f"the key {key.value!r} is there twice"))
            known.add((key.tag, key.value))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _note_lines(node: yaml.Node, path: KeyPath, line: int, lines: dict[KeyPath, int]) -> None:
    lines[path] = line
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                _note_lines(value, (*path, key.value), _line(key), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*path, index), _line(value), lines)


def _line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return lines.get((), 1)


# --- from plain values to a sweep ---


class _Reader:
    """Takes a sweep out of plain values, and notes the problems that it meets on the way."""

    def __init__(self, values: Mapping[Any, Any], lines: Mapping[KeyPath, int], problems: list[Problem]) -> None:
        self.values = values
        self.lines = lines
        self.problems = problems

    def tell(self, text: str, *path: str | int) -> None:
        self.problems.append(Problem(_line_of(self.lines, path), text))

    def sweep(self, source: Path, text: str) -> Sweep:
        for key in self.values:
            if key in UNSUPPORTED:
                self.tell(f"eva does not support {key}: {UNSUPPORTED[key]}", key)
            elif key not in KEYS:
                self.tell(_unknown_key("a sweep", key, KEYS), str(key))
        method, command = self._method(), self._command()
        needed = ["method", "parameters", *(["program"] if "${program}" in command else [])]
        for key in needed:
            if key not in self.values:
                self.tell(f"{key} is missing")
        parameters = []
        if "parameters" in self.values:
            found = self._parameters(self.values["parameters"], ("parameters",), method != "grid")
            parameters = sorted(found, key=lambda parameter: parameter.order)
        self._check_names(parameters)
        if method == "grid":
            self._check_grid(parameters)
        metric, goal, target = self._metric()
        self._check_labels()
        return Sweep(
            source=source,
            text=text,
            program=self._text("program") or "",
            command=command,
            method=method,
            metric=metric,
            goal=goal,
            parameters=tuple(parameters),
            hyperband=self._hyperband(),
            run_cap=self._run_cap(),
            name=self._text("name"),
            description=self._text("description"),
            project=self._text("project"),
            entity=self._text("entity"),
            target=target,
            lines=self.lines,
        )

    def _text(self, key: str) -> str | None:
        value = self.values.get(key)
        if key not in self.values:
            return None
        if not isinstance(value, str) or not value.strip():
            self.tell(f"{key} must be text, but got {value!r:.60}", key)
            return None
        return value

    def _method(self) -> str:
        method = self.values.get("method")
        if "method" not in self.values:
            return ""
        if isinstance(method, str) and method in METHODS:
            return method
        if method == "custom":
            self.tell("eva does not support method: custom; it has grid, random and bayes", "method")
        else:
            self.tell(f"method must be grid, random or bayes, but got {method!r:.60}", "method")
        return ""

    def _mapping(self, key: str) -> Mapping[Any, Any] | None:
        value = self.values.get(key)
        if key not in self.values:
            return None
        if not isinstance(value, dict) or not value:
            self.tell(f"{key} must be a mapping with something in it, but got {value!r:.60}", key)
            return None
        return value

    # parameters

    def _parameters(
        self, group: Any, place: tuple[str, ...], repeats: bool, keys: tuple[str, ...] = ()
    ) -> Iterator[Parameter]:
        """Yields the sound parameters of a group, and of those inside it.

        Args:
            group: What stands under `parameters`.
            place: Where that is in the file.
            repeats: Whether a value may be there twice.
            keys: The names of the groups around.
        """
        if not isinstance(group, dict) or not group:
            self.tell(f"parameters must be a mapping of names, but got {group!r:.60}", *place)
            return
        for name, config in group.items():
            inside, path = (*place, str(name)), (*keys, str(name))
            shown = ".".join(path)
            if not isinstance(name, str) or not PARAMETER_NAME.fullmatch(name):
                rule = "must begin with a letter or _, and go on with letters, digits, _ . and -"
                self.tell(f"the name of a parameter {rule}, but got {name!r:.60}", *inside)
            elif not isinstance(config, dict):
                hint = f"; for a constant write {name}: {{value: ...}}"
                self.tell(f"parameter {shown} must be a mapping, but got {config!r:.60}{hint}", *inside)
            elif "parameters" in config:
                for key in config:
                    if key != "parameters":
                        self.tell(f"group {shown} must hold parameters alone, but got {key!r:.60}", *inside, str(key))
                yield from self._parameters(config["parameters"], (*inside, "parameters"), repeats, path)
            elif problems := parameter_problems(config, repeats):
                for within, text in problems:
                    self.tell(f"parameter {shown}: {text}", *inside, *within)
            else:
                yield Parameter(path, Distribution.from_config(config, repeats), _line_of(self.lines, inside))

    def _check_names(self, parameters: Iterable[Parameter]) -> None:
        known: dict[str, Parameter] = {}
        for parameter in parameters:
            other = known.setdefault(parameter.name, parameter)
            if other is not parameter:
                lines = sorted((parameter.line, other.line))
                text = f"parameter {parameter.name} is there twice, with a dot in its name and in a group"
                self.problems.append(Problem(lines[1], f"{text} (line {lines[0]})"))

    def _check_grid(self, parameters: Iterable[Parameter]) -> None:
        for parameter in parameters:
            size = parameter.distribution.grid_size
            if size is None:
                text = f"a grid takes value, values, int_uniform and q_uniform, but got {parameter.distribution.kind}"
            elif size > MOST_VALUES:
                text = f"a grid takes at most {MOST_VALUES} values, but got {size}"
            else:
                continue
            self.problems.append(Problem(parameter.line, f"parameter {parameter.name}: {text}"))

    # what the search steers by

    def _metric(self) -> tuple[str | None, str, float | None]:
        """Returns name, goal and target."""
        metric = self._mapping("metric")
        if "metric" not in self.values:
            example = "metric: {name: val/accuracy_best, goal: maximize}"
            if self.values.get("method") == "bayes":
                self.tell(f"method: bayes needs a metric, e.g. {example}", "method")
            if "early_terminate" in self.values:
                self.tell(f"early_terminate needs a metric, e.g. {example}", "early_terminate")
        if metric is None:
            return None, "maximize", None
        for key in metric:
            if key not in METRIC_KEYS:
                self.tell(_unknown_key("metric", key, METRIC_KEYS), "metric", str(key))
        name, goal, target = metric.get("name"), metric.get("goal"), metric.get("target")
        if not isinstance(name, str) or not name:
            got = f"metric.name must be text, but got {name!r:.60}" if "name" in metric else "metric needs a name"
            self.tell(got, "metric", "name")
            name = None
        if "goal" not in metric:
            self.tell("metric needs a goal: W&B minimizes without one, and accuracies are to be maximized", "metric")
        elif goal not in GOALS:
            self.tell(f"metric.goal must be minimize or maximize, but got {goal!r:.60}", "metric", "goal")
        number = isinstance(target, (int, float)) and not isinstance(target, bool) and abs(target) < math.inf
        if "target" in metric and not number:
            self.tell(f"metric.target must be a finite number, but got {target!r:.60}", "metric", "target")
            target = None
        for key, allowed in IMPUTED.items():
            if key in metric and metric[key] not in allowed:
                rule = f"metric.{key} must be text, one of: {', '.join(allowed)}"
                self.tell(f"{rule}, but got {metric[key]!r:.60}", "metric", key)
        return name, goal if goal in GOALS else "maximize", target

    def _hyperband(self) -> Hyperband | None:
        config = self._mapping("early_terminate")
        if config is None:
            return None
        if isinstance(steps := config.get("s"), float) and steps.is_integer():
            config = {**config, "s": int(steps)}  # W&B's schema takes any number
        problems = hyperband_problems(config)
        for key, text in problems:
            self.tell(text, "early_terminate", *(() if key is None else (str(key),)))
        return None if problems else Hyperband.from_config(config)

    def _run_cap(self) -> int | None:
        cap = self.values.get("run_cap")
        if "run_cap" not in self.values:
            return None
        if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1:
            self.tell(f"run_cap must be a whole number from 1 on, but got {cap!r:.60}", "run_cap")
            return None
        return cap

    def _check_labels(self) -> None:
        """Looks at what only W&B reads."""
        self._text("apiVersion")
        if self.values.get("kind", "sweep") != "sweep":
            self.tell(f"kind must be sweep, but got {self.values['kind']!r:.60}", "kind")
        controller = self._mapping("controller")
        if controller is not None and controller.get("type") not in ("local", "cloud"):
            self.tell(
                f"controller.type must be local or cloud, but got {controller.get('type')!r:.60}", "controller", "type"
            )

    # the command

    def _command(self) -> tuple[str, ...]:
        command = self.values.get("command")
        if "command" not in self.values:
            return DEFAULT_COMMAND
        if not isinstance(command, list) or not command:
            self.tell(f"command must be a list with something in it, but got {command!r:.60}", "command")
            return DEFAULT_COMMAND
        for index, item in enumerate(command):
            if isinstance(item, (list, dict)) or item is None:
                self.tell(f"an item of command must be text or a number, but got {item!r:.60}", "command", index)
            else:
                for problem in _macro_problems(str(item)):
                    self.tell(problem, "command", index)
        return tuple(str(item) for item in command)


def _unknown_key(owner: str, key: Any, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(str(key), known := tuple(known), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; it has {', '.join(known)}"
    return f"{owner} has no key {key!r:.60}{hint}"


def _macro_problems(item: str) -> Iterator[str]:
    """Yields what is wrong about the macros of an item of `command`: wandb's agent drops them, or leaves them."""
    for match in _ENVIRONMENT.finditer(item):
        if match[1] not in os.environ:
            yield f"the environment variable of {match[0]} is not set"
    rest = _ENVIRONMENT.sub("", item)
    for macro in _ANY_MACRO.findall(rest):
        name = macro[2:].removesuffix("}")
        if name.startswith("envvar"):
            yield f"a variable is named as ${{envvar:NAME}}, in capitals, digits and _, but got {macro}"
        elif not macro.endswith("}") or name not in MACROS:
            nearest = difflib.get_close_matches(name, MACROS, n=1)
            hint = f"; did you mean ${{{nearest[0]}}}?" if nearest else f"; there are {', '.join(MACROS)}, envvar:NAME"
            yield f"unknown macro {macro}{hint}"
        elif macro != item:
            yield f"{macro} must be an item of its own, but got {item!r:.60}"


# --- what becomes of a sweep ---


def grid(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yields every combination of a grid's values, by parameter name, constants left out, in W&B's order.

    Values that are lists or mappings belong to the sweep: change none.
    """
    names = [parameter.name for parameter in sweep.searched]
    for values in itertools.product(*(parameter.distribution.grid_values or () for parameter in sweep.searched)):
        yield dict(zip(names, values, strict=True))


def arguments(sweep: Sweep, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the agent hands to a trial: names sorted, groups as mappings and last, as W&B makes them.

    Args:
        sweep: Where the constants and the groups stand.
        values: The value of every parameter that is searched, by its name.
    """
    made: dict[str, Any] = {}
    for nested in (False, True):
        for parameter in sweep.parameters:
            if (len(parameter.path) > 1) is nested:
                group = made
                for key in parameter.path[:-1]:
                    group = group.setdefault(key, {})
                constant = parameter.distribution.is_constant
                group[parameter.path[-1]] = parameter.distribution.values[0] if constant else values[parameter.name]
    return made


def command_line(sweep: Sweep, arguments: Mapping[str, Any], interpreter: str, json_file: str | Path) -> list[str]:
    """Returns the words that start a trial: `command` with its macros expanded, as wandb's agent does it.

    Args:
        sweep: Whose command it is.
        arguments: As `arguments` returns them.
        interpreter: What stands for ${interpreter}.
        json_file: What stands for ${args_json_file}. The caller writes it: `json.dumps(arguments)`.
    """
    plain = {name: f"{name}={value}" for name, value in arguments.items()}
    flags = [f"--{argument}" for argument in plain.values()]
    expansions: dict[str, Callable[[], list[str]]] = {
        "env": lambda: [] if platform.system() == "Windows" else ["/usr/bin/env"],
        "interpreter": lambda: [interpreter],
        "program": lambda: [sweep.program],
        "args": lambda: flags,
        "args_no_equals": lambda: [word for name, value in arguments.items() for word in (f"--{name}", str(value))],
        "args_no_hyphens": lambda: list(plain.values()),
        "args_no_boolean_flags": lambda: [
            f"--{name}" if value is True else f"--{plain[name]}"
            for name, value in arguments.items()
            if value is not False
        ],
        "args_json": lambda: [json.dumps(arguments)],
        "args_json_file": lambda: [str(json_file)],
        "args_append_hydra": lambda: [f"+{argument}" for argument in plain.values()],
        "args_override_hydra": lambda: [f"++{argument}" for argument in plain.values()],
    }
    words: list[str] = []
    for item in sweep.command:
        word = expand_environment(item)
        macro = word[2:-1] if word.startswith("${") and word.endswith("}") else None
        words += [word] if macro is None else expansions[macro]() if macro in expansions else []
    return words


def expand_environment(item: str) -> str:
    """Returns an item of `command` with its variables of the environment in place, as wandb's agent has them."""
    return _ENVIRONMENT.sub(lambda match: os.environ.get(match[1], match[1]), item)


def _is_dropped(item: str) -> bool:
    """Tells whether an item is an unknown macro, which wandb's agent leaves out."""
    return item.startswith("${") and item.endswith("}") and item[2:-1] not in MACROS


# What starts Python with a program, and does no more.
_STARTERS = ("${env}", "${interpreter}", "/usr/bin/env", "python", "python3", sys.executable)


def warm_command(sweep: Sweep) -> tuple[str, ...]:
    """Returns the items of `command` from the program on: what a worker runs in its own process.

    Raises:
        UserError: The command does more than to run the program with Python.
    """
    items = tuple(map(expand_environment, sweep.command))
    begin = next((number for number, item in enumerate(items) if item in ("${program}", sweep.program or None)), None)
    if begin is None:
        what = "doesn't run ${program}, which is all that a worker can do in its own process"
        raise UserError(f"command {what}; --isolate gives each trial a process")
    for item in items[:begin]:
        if item not in _STARTERS and not _is_dropped(item):
            what = f"has {item!r:.60} before the program, which a worker would leave out, as it is Python already"
            raise UserError(f"command {what}; --isolate gives each trial a process")
    return items[begin:]


# --- a sweep around a range test ---

# How far from what the test found a sweep looks, either way: half the rate at the loss's minimum is a rule of thumb.
LR_FACTOR = 4
LR_TRIALS = 24

# Settings of one run, or of where it goes; a sweep's trials get their own.
_OF_ONE_RUN = ("out", "name", "group", "tags", "tracking", "project", "entity", "lr_min", "lr_max")

_LR_RANGE_COMMENT = """\
# Question: which {rates} best, around what the range test found?
#   Tested: {source}. Found: lr_max {lr_max:.3g}, lr_min {lr_min:.3g}.
#   Half the rate at the loss's minimum is a rule of thumb: lr_max is looked for up to {factor} times higher and lower.
#   {lowest}
# Size: {trials} trials of {epochs} epochs. {stopping}
# Time: at most that of {trials} runs; --check measures the beginning of one.
# Launch: wandb sweep FILE, then wandb agent ENTITY/PROJECT/ID on any number of machines
#         or without an account: .venv/bin/eva sweep FILE --out=FOLDER, with --check for a look at it beforehand
"""


def lr_range_sweep(config: RunConfig, lr_min: float, lr_max: float, source: str) -> str:
    """Returns the YAML of a sweep over lr_max, and lr_min if the schedule reads it, around what a range test found.

    Args:
        config: Whose settings the trials have, but for what belongs to one run. Without a val split they get the
            default one: a sweep that chooses by test would have nothing left to measure its winner with.
        lr_min: What the range test found, or was given: at least 0, at most `lr_max`.
        lr_max: What the range test found, above 0.
        source: What was tested, for the leading comment, e.g. "recipe resnet9-onecycle".
    """
    lowest = min(lr_min or lr_max, lr_max / 10) / LR_FACTOR
    low, middle, high = (float(f"{rate:.3g}") for rate in (lowest, lr_max / LR_FACTOR, lr_max * LR_FACTOR))
    searched = config.schedule in READ_ONLY_WITH["lr_min"][1]
    stops = config.epochs > 1
    # Late enough to rank them by what they end with: at the peak of its rates a cycle's accuracy says little.
    band = max(1, round(config.epochs * 3 / 8))
    rule = {"type": "hyperband", "min_iter": band, "eta": 4, "strict": True}
    sweep: dict[str, Any] = {
        "program": "runners/train.py",
        "command": list(DEFAULT_COMMAND),
        "method": "bayes",
        "metric": {"name": "val/accuracy_best", "goal": "maximize"},
        **({"early_terminate": rule} if stops else {}),
        "run_cap": LR_TRIALS,
        "parameters": {
            "lr_max": {"distribution": "log_uniform_values", "min": middle, "max": high},
            "lr_min": {"distribution": "log_uniform_values", "min": low, "max": middle} if searched else {"value": low},
            **{name: {"value": value} for name, value in _constants(config).items()},
        },
    }
    comment = _LR_RANGE_COMMENT.format(
        rates="lr_max and lr_min are" if searched else "lr_max is",
        source=_one_line(source),
        lr_max=lr_max,
        lr_min=lr_min,
        factor=LR_FACTOR,
        lowest="lr_min is looked for below that range, so that it is never above lr_max."
        if searched
        else f"The schedule {config.schedule} doesn't read lr_min.",
        trials=LR_TRIALS,
        epochs=config.epochs,
        stopping=f"Hyperband compares them once, after epoch {band}, and lets about the best quarter go on."
        if stops
        else "None is stopped early.",
    )
    return comment + yaml.safe_dump(sweep, sort_keys=False, default_flow_style=None, width=120)


def _constants(config: RunConfig) -> dict[str, Any]:
    """Returns the settings that a trial must be given to train as `config` says, plain values by name."""
    if not config.val_fraction:
        config = replace(config, val_fraction=default_of(FIELDS["val_fraction"]))
    recipe = RECIPES[config.recipe].settings if config.recipe else {}
    constants: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        own, default = getattr(config, name), default_of(FIELDS[name])
        # What the recipe sets must be unset again where the default holds.
        if name not in _OF_ONE_RUN and (own != default or own != recipe.get(name, default)):
            constants[name] = value
    return constants
