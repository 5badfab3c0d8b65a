"""What is wrong with a sweep, and what it will cost, before its hours are spent: in the terms of its YAML."""

import difflib
import itertools
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from eva.config import (
    COMMAND_FLAGS,
    FIELDS,
    READ_ONLY_WITH,
    TYPES,
    RunConfig,
    UserError,
    default_of,
    describe_type,
    read_yaml,
    stands_for_none,
    unknown_setting,
)
from eva.ranking import identity, short
from eva.sweep_file import (
    PARAMETER_NAME,
    Parameter,
    Problem,
    Sweep,
    command_line,
    inspect_sweep,
    refuse,
    warm_command,
)
from eva.sweep_probe import (
    Measurement,
    describe,
    extremes,
    fixed_settings,
    middles,
    price,
    price_problems,
    setting_of,
    trial_config,
)

# More trials than this are a mistake: to note a thousand that wait takes seconds.
MOST_TRIALS = 10_000
# So many combinations of extreme values are looked at, and so many of their models and policies are built.
MOST_COMBINATIONS = 4_000
MOST_BUILT = 32
# A parameter with more values than this takes part in combinations by its ends or its first ones alone.
MOST_ENDS = 6
# Where distributions are looked at for values that a setting doesn't take.
QUANTILES = (0.0, 0.1, 0.37, 0.5, 0.61, 0.83, 0.99)

# What makes a trial's model, policy and device.
BUILT = (
    *("model", "norm", "ghost_splits", "norm_groups", "dropout", "stage_strides", "gradcam_layers", "evaluate"),
    *("policy", "policy_options", "augmentation", "device", "precision"),
)

# What every epoch logs, by its last name, with its better direction; None for what says nothing of a trial's worth.
WATCHED_METRICS = {"loss": "minimize", "accuracy": "maximize", "accuracy_best": "maximize", "epoch_best": None}
TRAIN_METRICS = {"loss": "minimize", "accuracy": "maximize", "seconds": "minimize"}
POSITIONS = ("epoch", "trainer/step")
# Between what the values of an epoch's metric lie, by its last name.
BOUNDS = {
    **dict.fromkeys(("accuracy", "accuracy_best"), (0.0, 1.0)),
    **dict.fromkeys(("loss", "seconds"), (0.0, math.inf)),
}
# What every batch logs, and the epochs' metric that is meant; None if there is none.
BATCH_METRICS = {
    "train/loss": "train_epoch/loss",
    "train/accuracy": "train_epoch/accuracy",
    "seconds": "train_epoch/seconds",
    **dict.fromkeys(("lr", "momentum", "images_per_second")),
}

# Macros of `command` that pass the parameters on as eva's flags.
ARGUMENT_MACROS = ("${args}", "${args_no_equals}", "${args_no_hyphens}", "${args_no_boolean_flags}")


def check(
    sweep: Sweep,
    count: int | None,
    workers: int,
    measure: bool = True,
    out: Path = Path(),
    isolate: bool = False,
) -> list[str]:
    """Returns what is likely to be a mistake, and what the sweep will cost, as lines for a reader.

    Args:
        sweep: As it was read.
        count: The most trials to run; None leaves it to the YAML.
        workers: Trials that will run at a time.
        measure: Whether to begin the extreme trials, which takes as long as two steps and the evaluations of each.
        out: Where the trials' runs will go, or a folder above; need not be there.
        isolate: Whether each trial gets a process of its own, so that `command` may be any.

    Raises:
        UserError: Something is wrong: every problem at once, each with its line. Whether the extreme trials begin and
            fit into memory and on the disk is looked at if all else is right.
    """
    return _checked(sweep, [], count, workers, measure, out, isolate)


def check_file(
    path: str | Path,
    count: int | None,
    workers: int,
    measure: bool = True,
    out: Path = Path(),
    isolate: bool = False,
) -> tuple[Sweep, list[str]]:
    """Returns the sweep of a YAML file, and what `check` says of it.

    Raises:
        UserError: As `check` does, with what is wrong about the file itself among the rest.
    """
    sweep, found = inspect_sweep(path)
    if sweep is None:
        refuse(Path(path), found)
    assert sweep is not None
    return sweep, _checked(sweep, found, count, workers, measure, out, isolate)


def _checked(
    sweep: Sweep,
    found: Sequence[Problem],
    count: int | None,
    workers: int,
    measure: bool,
    out: Path,
    isolate: bool,
) -> list[str]:
    examination = _Examination(sweep, isolate)
    refuse(sweep.source, [*found, *examination.problems, *_size_problems(sweep, count)])
    warned = examination.warnings
    trials, epochs = num_trials(sweep, count), examination.epochs
    if measure:
        cost = price(sweep, trials, epochs, workers, out)
        refuse(sweep.source, price_problems(sweep, cost.results, cost.size))
        assert cost.size is not None
        size = describe(sweep, cost.size, cost.measured)
        warned = [*warned, *measured_bands(sweep, cost.measured, epochs)]
    else:
        bound = " at most" if sweep.hyperband else ""
        low, high = (trials * end for end in examination.reached)
        size = [f"size: {trials:,} trials, {low if low == high else f'{low} to {high}'} epochs in all{bound}"]
    return [*(f"warning: {warning.told(sweep.source)}" for warning in sorted(set(warned))), *size]


def problems(sweep: Sweep, isolate: bool = False) -> list[Problem]:
    """Returns what is wrong about what a sweep asks of its trials, by lines; an empty list if nothing is.

    Torch is imported only if all that can be told without it is right. What `inspect_sweep` has told is not told again.

    Args:
        sweep: As it was read.
        isolate: Whether each trial gets a process of its own.
    """
    return sorted(set(_Examination(sweep, isolate).problems))


def warnings(sweep: Sweep) -> list[Problem]:
    """Returns what is allowed, but likely to be a mistake, by lines."""
    return sorted(set(_Examination(sweep, built=False).warnings))


def num_trials(sweep: Sweep, count: int | None) -> int:
    """Returns the number of trials: that of the grid, or `count` or the YAML's run_cap if they are less.

    Raises:
        UserError: Nothing says how many, or a grid has so many that it must be a mistake.
    """
    refuse(sweep.source, _size_problems(sweep, count))
    bounds = [bound for bound in (_grid_size(sweep), count, sweep.run_cap) if bound is not None]
    return min(bounds)


def _grid_size(sweep: Sweep) -> int | None:
    sizes = [parameter.distribution.grid_size for parameter in sweep.searched]
    return None if sweep.method != "grid" or None in sizes else math.prod(size or 0 for size in sizes)


def _size_problems(sweep: Sweep, count: int | None) -> list[Problem]:
    bounds = [bound for bound in (count, sweep.run_cap) if bound is not None]
    size = _grid_size(sweep)
    line = sweep.line_of("method")
    if size is None and bounds and min(bounds) > MOST_TRIALS:
        line = sweep.line_of("run_cap" if sweep.run_cap == min(bounds) else "method")
        return [Problem(line, f"a sweep has at most {MOST_TRIALS:,} trials, but got {min(bounds):,}")]
    if sweep.method in ("random", "bayes") and not bounds and ("run_cap",) not in sweep.lines:
        return [Problem(line, f"{sweep.method} goes on without end: give run_cap: N here, or --count=N")]
    if size is not None and min([size, *bounds]) > MOST_TRIALS:
        text = f"the grid has {size:,} trials; above {MOST_TRIALS:,} choose method: random, or give run_cap or --count"
        return [Problem(line, text)]
    return []


# --- types ---


def fits(value: Any, hint: Any) -> bool:
    """Tells whether a YAML value is one of a setting's type as it stands: text is no number, and 1 is not true."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        # The agent writes None for null, and eva reads it so.
        return (type(None) in inner and stands_for_none(value)) or any(fits(value, choice) for choice in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(item, inner[1]) for item in value.values())
    if hint in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return number and (hint is float or value == int(value))
    return isinstance(value, hint)


def meant(value: Any, hint: Any) -> Any:
    """Returns what somebody who wrote a value of the wrong type is likely to have meant; None if nobody knows."""
    if isinstance(value, list) and get_origin(hint) is tuple:
        items = [item if fits(item, get_args(hint)[0]) else meant(item, get_args(hint)[0]) for item in value]
        return items if fits(items, hint) else None
    if not isinstance(value, str):
        return str(value) if not isinstance(value, (bool, list, dict)) and fits(str(value), hint) else None
    guesses: list[Any] = [value.split(",") if "," in value else None]
    try:
        guesses.insert(0, yaml.safe_load(value))
        guesses.insert(1, float(value))
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError):
        pass
    for guess in guesses:
        if isinstance(guess, list) and not fits(guess, hint):
            guess = meant(guess, hint)
        if guess is not None and fits(guess, hint):
            return guess
    return None


def _hint(parameter: Parameter) -> Any:
    """Returns the type of a parameter's values: for policy_options.cutout that of one option."""
    hint = TYPES[setting_of(parameter)]
    return get_args(hint)[1] if "." in parameter.name else hint


def _rule(parameter: Parameter) -> str:
    return f"{parameter.name} must be {'a number' if '.' in parameter.name else describe_type(parameter.name)}"


def _type_problem(parameter: Parameter, value: Any) -> str | None:
    hint = _hint(parameter)
    if fits(value, hint):
        return None
    problem = f"{_rule(parameter)}, but got {value!r:.60}"
    guess = meant(value, hint)
    if guess is None:
        reads_as_bool = isinstance(value, bool) and (str in (hint, *get_args(hint)) or get_origin(hint) is Literal)
        return problem + ("; text that YAML takes for true or false stands in quotes" if reads_as_bool else "")
    written = yaml.safe_dump(guess, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
    if not isinstance(value, str):
        return f"{problem}; write {written}"
    # What YAML would read otherwise without quotes stood in quotes.
    quoted = not isinstance(yaml.safe_load(value), str)
    return f"{problem}; " + (
        f"in quotes it is text: write {written}" if quoted else f"YAML reads {value} as text: write {written}"
    )


def _drawn_problem(parameter: Parameter) -> str | None:
    """Returns what is wrong about the values that a distribution without a list of them draws."""
    kind, hint = parameter.distribution.kind, _hint(parameter)
    wrong = [value for value in map(parameter.distribution.value_at, QUANTILES) if not fits(value, hint)]
    if not wrong:
        return None
    if not fits(1, hint):
        return f"{_rule(parameter)}, but {kind} draws numbers; list what to choose from as values"
    way = "take a whole q" if kind.startswith("q_") else f"take int_uniform, or q_{kind.removeprefix('inv_')} with q: 1"
    return f"{_rule(parameter)}, but {kind} draws {short(wrong[0])}; {way}"


def _same_once_typed(value: Any) -> Any:
    """Returns what two values have in common that are one setting: 0.1 and the text of it."""
    if stands_for_none(value):
        return None
    if isinstance(value, str):
        try:
            return identity(float(value))
        except ValueError:
            return identity(value)
    if isinstance(value, list):
        return tuple(map(_same_once_typed, value))
    return identity(value)


# --- the whole ---


class _Examination:
    """Looks at what a sweep asks of its trials, and notes problems and warnings on the way.

    Attributes:
        problems: In no order.
        warnings: In no order.
        epochs: The fewest and the most that a trial may have.
        reached: The same where max_steps ends trials before, as far as it is known without the data.
    """

    def __init__(self, sweep: Sweep, isolate: bool = False, built: bool = True) -> None:
        self.sweep = sweep
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        # Settings whose values are not what was meant: nothing that depends on them is told.
        self.unsound = list(self._unsound_parameters())
        self.wrong = {path[0].partition(".")[0] for path in self.unsound}
        self.wrong -= {setting_of(parameter) for parameter in sweep.parameters}
        # The same, of those too that break a rule, if every trial breaks one.
        self.unknown = set(self.wrong)
        self.parameters = {parameter.name: parameter for parameter in sweep.parameters}
        self.fixed = fixed_settings(sweep)
        self._check_fixed()
        self._check_names()
        self._check_types()
        self._check_command(isolate)
        configs = self._possible_configs()
        self.epochs = _ends_of(config.epochs for config in configs)
        self.reached = _ends_of(map(_most_epochs, configs))
        watched = {"val" if config.val_fraction else "test" for config in configs}
        self._check_metric({"val", "test"} if self._is_unknown("recipe", "val_fraction") else watched)
        if not self._is_unknown("recipe", "epochs"):
            self._check_bands()
        self._check_data({config.data for config in configs})
        self._warn(configs)
        if built and not self.problems:
            self._check_built(configs)

    def _is_unknown(self, *names: str) -> bool:
        """Tells whether what a setting will be is not known, because of a mistake."""
        return bool(self.unknown & set(names))

    def _unsound_parameters(self) -> Iterator[tuple[str, ...]]:
        """Yields the names, by groups, of the parameters that the file has but the sweep has not, as they are wrong."""
        sound = {parameter.path for parameter in self.sweep.parameters}
        for path in self.sweep.lines:
            names = tuple(str(key) for key in path[1::2])
            is_parameter = len(path) % 2 == 0 and set(path[::2]) == {"parameters"}
            if is_parameter and (*path, "parameters") not in self.sweep.lines and names not in sound:
                yield names

    def tell(self, text: str, *path: str | int) -> None:
        self.problems.append(Problem(self.sweep.line_of(*path), text))

    def warn(self, text: str, *path: str | int) -> None:
        self.warnings.append(Problem(self.sweep.line_of(*path), text))

    def place(self, name: str) -> tuple[str | int, ...]:
        """Returns the path in the file of a parameter or of the setting that it belongs to; () if there is none."""
        for parameter in self.sweep.parameters:
            if name in (parameter.name, setting_of(parameter)):
                return _place(parameter.path)
        for number, item in enumerate(self.sweep.command):
            if item.lstrip("-").partition("=")[0] == name:
                return ("command", number)
        return ()

    def _check_fixed(self) -> None:
        """Looks at what `command` gives every trial. If some of it can't be read, nobody knows what it gives."""
        problems = list(self.fixed.problems)
        if self.fixed.file is not None:
            try:
                read_yaml(self.fixed.file)
            except UserError as error:
                problems.append(("--config", f"command: {error}"))
                self.fixed = replace(self.fixed, file=None)
        for word, text in problems:
            self.tell(text, *self._in_command(word))
        if problems:
            known = {*map(setting_of, self.sweep.parameters), *self.fixed.settings}
            self.wrong |= {name for name in FIELDS if name not in known}

    def _in_command(self, word: str) -> tuple[str | int, ...]:
        """Returns the path in the file of a word of `command`, or of the flag that it gives."""
        flags = [item.partition("=")[0] for item in self.sweep.command]
        flag = word.partition("=")[0]
        return ("command", flags.index(flag)) if flag in flags else ("command",)

    # parameters alone

    def _check_names(self) -> None:
        for path in self.unsound:
            if PARAMETER_NAME.fullmatch(".".join(path)) and (problem := _name_problem(path)):
                self.tell(problem, *_place(path))
        for parameter in self.sweep.parameters:
            if problem := _name_problem(parameter.path):
                self.tell(problem, *_place(parameter.path))
                self.wrong.add(setting_of(parameter))
            elif parameter.name in self.fixed.settings:
                self.tell(f"{parameter.name} is given by command too, in every trial", *_place(parameter.path))
        for key in self.fixed.settings:
            if key.partition(".")[0] not in FIELDS:
                self.tell(unknown_setting(key), *self.place(key))
                self.wrong.add(key)

    def _check_types(self) -> None:
        for parameter in self.sweep.parameters:
            if setting_of(parameter) in self.wrong:
                continue
            before = len(self.problems)
            place, distribution = _place(parameter.path), parameter.distribution
            if not distribution.values and (problem := _drawn_problem(parameter)):
                self.tell(problem, *place)
            known: dict[Any, Any] = {}
            for number, value in enumerate(distribution.values):
                inner: tuple[str | int, ...] = ("value",) if distribution.is_constant else ("values", number)
                at = (*place, *inner)
                if problem := _type_problem(parameter, value):
                    self.tell(problem, *at)
                same = _same_once_typed(value)
                if same in known:
                    text = f"{parameter.name} has {value!r:.60} and {known[same]!r:.60}, which are the same"
                    if self.sweep.method == "grid":
                        self.tell(text, *at)
                    else:
                        self.warn(f"{text}: that makes it more likely; probabilities would say how much", *at)
                known.setdefault(same, value)
            if len(self.problems) > before:
                self.wrong.add(setting_of(parameter))

    # the command

    def _check_command(self, isolate: bool) -> None:
        sweep = self.sweep
        program = Path(sweep.program)
        if isolate:
            self._check_first_word()
        elif sweep.program or "${program}" not in sweep.command:  # one that is missing has been told of
            try:
                warm_command(sweep)
            except UserError as error:
                self.tell(str(error), "command")
        deeds = dict(itertools.pairwise(Path(item).name for item in sweep.command))
        if program.name == "find_lr.py" or deeds.get("eva") == "find_lr":
            text = "find_lr trains nothing, so that no trial would have a value of the metric; train does"
            self.tell(text, "program" if program.name == "find_lr.py" else "command")
        if sweep.program and ("${program}" in sweep.command or sweep.program in sweep.command):
            if os.path.isdir(program):  # pathlib's raise for a name that no file can have
                self.tell(f"program {sweep.program!r} is a folder", "program")
            elif not os.path.exists(program):
                text = f"there is no program {sweep.program!r} in {str(Path.cwd())!r}, where trials are started"
                self.tell(text, "program")
        if not any(item.startswith("${args") for item in sweep.command):
            if sweep.parameters:
                self.tell("command has no ${args}, so that trials would not be given their parameters", "command")
        elif hydra := [item for item in sweep.command if item.endswith("_hydra}")]:
            self.tell(f"{hydra[0]} writes Hydra's overrides, which eva doesn't read; use ${{args}}", "command")
        if "${args_no_boolean_flags}" in sweep.command:
            self._check_left_out_booleans()

    def _check_first_word(self) -> None:
        words = command_line(self.sweep, {}, sys.executable, "")
        # What env starts stands behind the variables that it sets.
        rest = itertools.dropwhile(lambda word: Path(word).name == "env" or "=" in word, words)
        first = next(rest, "")
        if not first.startswith("-") and shutil.which(first) is None:
            self.tell(f"command starts {first!r}, but there is no such program that can be run", "command")

    def _check_left_out_booleans(self) -> None:
        for name, parameter in self.parameters.items():
            if TYPES.get(name) is bool and name not in self.wrong and False in parameter.distribution.values:
                default = self.fixed.settings.get(name, default_of(FIELDS[name]))
                if default is True or default == "true":
                    text = f"${{args_no_boolean_flags}} leaves out what is false, so {name} would stay true"
                    self.tell(f"{text}; use ${{args}}", *_place(parameter.path))

    # values together

    def _possible_configs(self) -> list[RunConfig]:
        """Returns the configurations of extreme trials that are possible, and tells what is impossible about others.

        If none is possible, settings that break a rule are left at their defaults. If that doesn't help, there is no
        configuration, and nothing is known.
        """
        told: set[str] = set()
        # Pairs come first: what is told of them has both at their ends.
        together = list(itertools.islice(self._pairs_and_triples(), MOST_COMBINATIONS))
        looked_at = [(values, self._config(values, told)) for values in (*together, *self._singles())]
        possible = [config for _, (config, left) in reversed(looked_at) if not left and config]
        self.unknown = set(self.wrong)
        if not possible:
            possible = [config for _, (config, _) in looked_at if config]
            self.unknown.update(*(left for _, (_, left) in looked_at))
        if not possible:
            self.unknown = set(FIELDS)
        return possible

    def _config(self, values: Mapping[str, Any], told: set[str]) -> tuple[RunConfig | None, set[str]]:
        """Returns a trial's configuration, and the settings that had to be left out of it, as they break rules."""
        left: set[str] = set()
        for _ in FIELDS:
            try:
                config = trial_config(self.sweep, values, frozenset(self.wrong | left), self.fixed)
                return config, left - self.wrong
            except UserError as error:
                names = set[str]()
                for line in _causes(str(error).splitlines()):
                    names.update(self._tell_impossible(line, told))
                if names <= left | self.wrong:
                    break
                left |= names
        return None, left

    def _singles(self) -> Iterator[dict[str, Any]]:
        """Yields the values of trials: one parameter at each of its extremes, the others in the middle; then all."""
        base = middles(self.sweep)
        for parameter in self._sound():
            for value in extremes(parameter.distribution):
                yield {**base, parameter.name: value}
        yield base

    def _pairs_and_triples(self) -> Iterator[dict[str, Any]]:
        """Yields the values of trials with two and three parameters at their extremes.

        No rule about a configuration is about more than three settings.
        """
        base = middles(self.sweep)
        ends = {parameter.name: _ends(extremes(parameter.distribution)) for parameter in self._sound()}
        for size in (2, 3):
            for names in itertools.combinations(ends, size):
                for values in itertools.product(*(ends[name] for name in names)):
                    yield {**base, **dict(zip(names, values, strict=True))}

    def _sound(self) -> list[Parameter]:
        return [parameter for parameter in self.sweep.searched if setting_of(parameter) not in self.wrong]

    def _tell_impossible(self, line: str, told: set[str]) -> list[str]:
        """Tells a rule that a trial breaks, once, at the parameters that it is about.

        Returns:
            The settings that it is about.
        """
        rule, but, got = line.partition(", but got ")
        if self.fixed.file is not None and line.startswith(f"file {self.fixed.file}: "):
            self.tell(f"command: {line}", *self._in_command("--config"))
            return []
        names = _settings_in(line)
        words = re.findall(r"\w+", line)
        if rule in told or self.wrong & set(names):
            return names
        told.add(rule)
        options = [name for name in self.parameters if "." in name and name.rpartition(".")[2] in words]
        given = [name for name in (*options, *names) if self.place(name)]
        searched = {setting_of(parameter) for parameter in self.sweep.searched}
        may = "but a trial may get" if searched & set(given) else "but got"
        text = f"{rule}, {may} {got}" if but else line
        if missing := [name for name in re.findall(r"(\w+)=", got) if name in FIELDS and name not in given]:
            text += f" ({', '.join(missing)} not among the parameters)"
        lines = sorted({self.sweep.line_of(*self.place(name)) for name in given})
        if len(lines) > 1:
            text += f" (see line {', '.join(map(str, lines[1:]))})"
        self.problems.append(Problem(lines[0] if lines else self.sweep.line_of("parameters"), text))
        return names

    def _check_data(self, names: set[str]) -> None:
        for name in sorted(names):
            folder = name.removeprefix("folder:")
            if folder != name and not Path(folder).is_dir():
                self.tell(f"data: there is no folder {folder!r}", *self.place("data"))
            elif folder == name and name not in ("cifar10", "digits"):
                nearest = difflib.get_close_matches(name, ("cifar10", "digits", "folder:PATH"), n=1)
                hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
                self.tell(f"unknown data {name!r}{hint}; known: cifar10, digits, folder:PATH", *self.place("data"))

    def _check_built(self, configs: Sequence[RunConfig]) -> None:
        """Builds the models and policies of trials, each once."""
        from eva.experiment import check_names  # imports torch

        different = dict[Any, RunConfig]()
        for config in configs:
            different.setdefault(identity([getattr(config, name) for name in BUILT]), config)
        told: set[str] = set()
        for config in itertools.islice(different.values(), MOST_BUILT):
            try:
                check_names(config)
            except UserError as error:
                for line in str(error).splitlines():
                    self._tell_impossible(line, told)

    # the metric

    def _check_metric(self, watched: set[str]) -> None:
        sweep, name = self.sweep, self.sweep.metric
        if name is None:
            if ("metric",) not in sweep.lines and sweep.method != "bayes" and ("early_terminate",) not in sweep.lines:
                self.tell("metric is missing: trials are ranked by it, e.g. {name: val/accuracy_best, goal: maximize}")
            return
        split, _, last = name.rpartition("/")
        directions = _epoch_metrics(watched)
        at = ("metric", "name")
        if name in BATCH_METRICS:
            meant = BATCH_METRICS[name] or f"{_best_metric(watched)}"
            self.tell(f"{name} is logged every batch, and a sweep counts epochs; {meant} is logged once an epoch", *at)
        elif split in ("val", "test") and last in WATCHED_METRICS and watched and split not in watched:
            other = next(iter(watched))
            why = "val_fraction is 0, so trials watch test" if other == "test" else "val_fraction is above 0"
            self.tell(f"no trial logs {name}: {why}; did you mean {other}/{last}?", *at)
        elif name not in directions and name not in POSITIONS:
            known = [known for known, direction in directions.items() if direction]
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            self.tell(f"no trial logs {name!r}{hint}; once an epoch there are {', '.join(known)}", *at)
        elif len(watched) > 1 and split in ("val", "test") and not self._is_unknown("recipe", "val_fraction"):
            which = "above 0" if split == "val" else "0"
            self.tell(f"only trials whose val_fraction is {which} log {name}", *at)
        elif (direction := directions.get(name)) is None:
            self.tell(f"{name} doesn't say how good a trial is; did you mean {_best_metric(watched)!r}?", *at)
        elif direction != sweep.goal and self._goal_is_given():
            text = f"{name} is better the {'higher' if direction == 'maximize' else 'lower'} it is: goal: {direction}"
            self.tell(f"{text}, but got {sweep.goal}", "metric", "goal")
        self._check_target(last)

    def _check_target(self, last: str) -> None:
        low, high = BOUNDS.get(last, (-math.inf, math.inf))
        target = self.sweep.target
        if target is not None and not low <= target <= high:
            rule = "is a fraction, from 0 to 1" if high == 1 else "is never below 0"
            hint = f"; did you mean {target / 100:g}?" if high == 1 < target <= 100 else ""
            self.tell(f"{self.sweep.metric} {rule}, but got target {target:g}{hint}", "metric", "target")

    def _goal_is_given(self) -> bool:
        """Tells whether the goal is what the file says: one that is missing or misspelt has been told of."""
        return bool(yaml.safe_load(self.sweep.text)["metric"].get("goal") == self.sweep.goal)

    def _check_bands(self) -> None:
        fewest, most = self.reached
        why = ", as max_steps ends them" if most < self.epochs[1] else ""
        if self.sweep.hyperband is not None and self.sweep.hyperband.bands[0] >= most:
            self.tell(_no_band(self.sweep, most) + why, "early_terminate")
        else:
            self.warnings += _late_bands(self.sweep, fewest, most, why)

    # what is likely a mistake

    def _warn(self, configs: Sequence[RunConfig]) -> None:
        sweep, metric = self.sweep, self.sweep.metric or ""
        split, _, last = metric.rpartition("/")
        if split in ("val", "test") and last == "accuracy":
            text = f"trials are ranked by the last value, and {metric} may fall after its best"
            self.warn(f"{text}; {metric}_best never falls", "metric", "name")
        if split == "test":
            text = "trials are chosen by test, which then can't tell how good the best one is"
            self.warn(f"{text}; val/{last} needs a val_fraction above 0", "metric", "name")
        if split == "train_epoch":
            self.warn(f"{metric} says how well images are learned by heart, not what is learned", "metric", "name")
        if sweep.hyperband is not None and not sweep.hyperband.strict:
            text = "without strict: true W&B judges a trial by its best value so far, and seldom stops one"
            self.warn(text, "early_terminate")
        self._warn_of_searches(configs)
        seeds = self.parameters.get("seed")
        if seeds is None or seeds.distribution.is_constant:
            if sweep.method == "grid":
                text = "seed is not searched: with one trial a configuration no difference can be told from chance"
                self.warn(f"{text}; seed: {{values: [0, 1, 2]}}, or --repeat_best afterwards", "parameters")
        elif sweep.method == "bayes":
            text = "bayes would look for a lucky seed; leave seed out, and repeat the best with --repeat_best"
            self.warn(text, *_place(seeds.path))
        if any(config.tracking == "online" for config in configs):
            self.warn("tracking: online would send the trials of an offline sweep to W&B", *self.place("tracking"))

    def _warn_of_searches(self, configs: Sequence[RunConfig]) -> None:
        """Warns of what is searched in vain, and of what is searched elsewhere than it seems."""
        if self.sweep.method != "grid" and all(len(extremes(one.distribution)) == 1 for one in self.sweep.searched):
            self.warn(f"{self.sweep.method} has nothing to search: all trials are the same", "parameters")
        for parameter in self.sweep.searched:
            name, kind = parameter.name, parameter.distribution.kind
            low, high = parameter.distribution.min or 0, parameter.distribution.max or 0
            inverted = kind == "inv_log_uniform"
            if low > 0 and (kind in ("log_uniform", "q_log_uniform") or (inverted and high <= 1)):
                drawn = " to ".join(f"{end:.6g}" for end in extremes(parameter.distribution))
                text = f"{kind} takes exponents of e, and draws {drawn}; for values from min to max take {kind}_values"
                self.warn(f"{name}: {text}", *_place(parameter.path))
            if name in READ_ONLY_WITH and not self._is_read(name, configs):
                decider, needed = READ_ONLY_WITH[name]
                text = f"{name} is read only with {decider} {' or '.join(needed)}, which no trial has"
                self.warn(f"{text}: it changes nothing", *_place(parameter.path))

    def _is_read(self, name: str, configs: Sequence[RunConfig]) -> bool:
        """Tells whether some trial may read a setting that not all do."""
        decider, needed = READ_ONLY_WITH[name]
        return self._is_unknown("recipe", decider) or any(getattr(config, decider) in needed for config in configs)


def _no_band(sweep: Sweep, most: int) -> str:
    """Returns what to say of a sweep whose trials have so many epochs at most, too few to be compared."""
    assert sweep.hyperband is not None
    bands = sweep.hyperband.bands
    shown = ", ".join(map(str, bands[:4])) + (", ..." if len(bands) > 4 else "")
    return f"no trial can be stopped early: it would be after epoch {shown}, and trials have {most} epochs"


def _late_bands(sweep: Sweep, fewest: int, most: int, why: str = "") -> list[Problem]:
    """Returns what to say of bands that some trials don't reach, or none does. With min_iter there is always one."""
    if sweep.hyperband is None:
        return []
    bands, line = sweep.hyperband.bands, sweep.line_of("early_terminate")
    found = []
    if bands[0] >= fewest:
        text = f"trials of {fewest} epochs can't be stopped early: that is after epoch {bands[0]} at the soonest"
        found.append(Problem(line, text))
    late = [band for band in bands if band >= most]
    if late and ("early_terminate", "max_iter") in sweep.lines:
        text = f"no trial can be stopped after epoch {', '.join(map(str, late))}: trials have {most} epochs{why}"
        found.append(Problem(line, f"{text}; max_iter: {most} makes bands below that"))
    return found


def measured_bands(sweep: Sweep, measured: Sequence[Measurement], epochs: tuple[int, int]) -> list[Problem]:
    """Returns what to say of bands that trials don't reach because max_steps ends them, by what was measured."""
    if sweep.hyperband is None or not any(one.max_steps for one in measured):
        return []
    fewest, most = min(one.epochs(epochs[0]) for one in measured), max(one.epochs(epochs[1]) for one in measured)
    why = ", as max_steps ends them"
    if sweep.hyperband.bands[0] >= most:
        return [Problem(sweep.line_of("early_terminate"), _no_band(sweep, most) + why)]
    return _late_bands(sweep, fewest, most, why)


def _most_epochs(config: RunConfig) -> int:
    """Returns how many epochs a trial begins at most, as far as it is known without its data."""
    if config.max_steps is None:
        return config.epochs
    steps_per_epoch = math.ceil((config.train_limit or 1) / config.batch_size)
    return min(config.epochs, math.ceil(config.max_steps / steps_per_epoch))


def _ends_of(epochs: Iterable[int]) -> tuple[int, int]:
    known = set(epochs) or {RunConfig().epochs}
    return min(known), max(known)


def _settings_in(line: str) -> list[str]:
    """Returns the settings that a rule is about, those first that it tells the values of."""
    rule, _, got = line.partition(", but got ")
    words = [*re.findall(r"\w+", got), *re.findall(r"\w+", rule)]
    return list(dict.fromkeys(word for word in words if word in FIELDS))


def _causes(lines: Sequence[str]) -> list[str]:
    """Returns the rules that are broken by no fault of another: epochs=0 also breaks one about peak_epoch."""
    names = [_settings_in(line) for line in lines]
    alone = {found[0] for found in names if len(found) == 1}
    return [line for line, found in zip(lines, names, strict=True) if len(found) == 1 or not alone & set(found)]


def _place(path: Sequence[str]) -> tuple[str, ...]:
    """Returns the place in the file of a parameter whose name, by groups, this is."""
    return tuple(key for inner in path for key in ("parameters", inner))


def _name_problem(path: Sequence[str]) -> str | None:
    name = ".".join(path)
    setting = name.partition(".")[0]
    if name in ("out", "name"):
        what = "write to one folder" if name == "out" else "have one name"
        return f"{name} belongs to one run: all trials would {what}; trials get their own"
    if name in COMMAND_FLAGS:
        return f"{name} is a flag of the command, and no setting of a trial"
    if setting in FIELDS and name == setting:
        return None
    if setting in FIELDS and get_origin(TYPES[setting]) is dict:
        deep = name.count(".") > 1
        return f"{name}: {setting} has no groups within" if deep else None
    last = path[-1]
    if setting in FIELDS:
        return f"{name}: {setting} has no parts; it is {describe_type(setting)}"
    if last in FIELDS:
        return f"unknown parameter {name!r}: settings stand in no groups; write {last} beside the other parameters"
    known = [field for field in FIELDS if field not in ("out", "name")]
    nearest = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
    return f"unknown parameter {name!r}" + (
        f"; did you mean {nearest[0]!r}?" if nearest else "; eva train --help lists the settings"
    )


def _ends(values: Sequence[Any]) -> Sequence[Any]:
    """Returns the values of a parameter that take part in combinations."""
    if len(values) <= MOST_ENDS:
        return values
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    others = [value for value in values if value not in numbers]
    return [*([min(numbers), max(numbers)] if numbers else []), *others[:MOST_ENDS]]


def _epoch_metrics(watched: set[str]) -> dict[str, str | None]:
    """Returns what every epoch logs, each with its better direction, the best one to steer by first."""
    of_watched = {f"{split}/{last}": way for split in sorted(watched) for last, way in WATCHED_METRICS.items()}
    of_train: Mapping[str, str | None] = {f"train_epoch/{last}": way for last, way in TRAIN_METRICS.items()}
    return {**of_watched, **of_train}


def _best_metric(watched: set[str]) -> str:
    return f"{'val' if 'val' in watched else 'test'}/accuracy_best"
