"""A corpus of bad inputs: for each what makes it in the current folder, the command that meets it, and what is said.

Each is sound but for one thing, so that a command gets as far as the code that reads the thing.
"""

import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import yaml
from conftest import SMALL_RUN, flags
from PIL import Image

from eva.config import Layer, resolve, to_dict
from eva.models import build_model
from eva.predictions import Predictions, save_images

ROOT = Path(__file__).parents[1]
Make = Callable[[], object]


@dataclass(frozen=True)
class BadInput:
    """One bad input.

    Attributes:
        kind: What it is one of.
        name: What is bad about it.
        make: Makes it in the current folder.
        command: The arguments of eva.
        said: Words of the one line: the thing by its name, and what is wrong or would be right.
    """

    kind: str
    name: str
    make: Make
    command: tuple[str, ...]
    said: tuple[str, ...]


def nothing() -> None:
    """Makes nothing."""


def written(path: str, content: str | bytes) -> Make:
    """Returns what writes a file."""

    def write() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def both(*makes: Make) -> Make:
    """Returns what makes one thing after the other."""

    def make() -> None:
        for one in makes:
            one()

    return make


def removed(path: str) -> Make:
    """Returns what removes a file or a folder."""
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def folder(path: str) -> Make:
    """Returns what makes a folder."""
    return lambda: Path(path).mkdir(parents=True)


def renamed_all(pattern: str, name: Callable[[Path], str]) -> Make:
    """Returns what gives each file of a pattern another name."""

    def rename() -> None:
        for path in list(Path().glob(pattern)):
            path.rename(path.with_name(name(path)))

    return rename


class Planted:
    """A pickle of it makes a file `executed` in the current folder when it is executed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


PICKLE = pickle.dumps(Planted())


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB", format: str = "PNG", **options: Any) -> bytes:
    """Returns an image file of one colour."""
    content = io.BytesIO()
    Image.new(mode, size).save(content, format, **options)
    return content.getvalue()


# A laughing one: eight lines that stand for a hundred million values.
LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 8)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 8))


# --- configurations and recipes ---

CONFIGS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "a photo": (png(format="JPEG"), ("cannot read 'c.yaml'", "utf-8")),
    "another encoding": ("epochs: 3".encode("utf-16"), ("cannot read 'c.yaml'", "utf-8")),
    "Latin-1": ("name: Überlauf".encode("latin-1"), ("cannot read 'c.yaml'", "utf-8")),
    "zeros": (bytes(4096), ("'c.yaml' is not YAML", "unacceptable character")),
    "a pickle": (PICKLE, ("cannot read 'c.yaml'", "utf-8")),
    "a list": ("- epochs: 3\n", ("'c.yaml' must hold a mapping of settings, but got list",)),
    "a word": ("digits", ("'c.yaml' must hold a mapping of settings, but got str",)),
    "a number": ("3", ("'c.yaml' must hold a mapping of settings, but got int",)),
    "two documents": ("epochs: 3\n---\nepochs: 4\n", ("'c.yaml' is not YAML", "single document")),
    "an open list": ("tags: [a, b\nepochs: 3\n", ("'c.yaml' is not YAML", "line 2")),
    "an open quote": ("name: 'a\n", ("'c.yaml' is not YAML", "quoted scalar")),
    "tabs": ("policy_options:\n\tcutout: 3\n", ("'c.yaml' is not YAML", "'\\t'")),
    "HTML": ("<!doctype html>\n<p class='a': b>", ("'c.yaml'",)),
    "JSON cut short": ('{"epochs": 3, ', ("'c.yaml' is not YAML",)),
    "a key twice": ("epochs: 3\nepochs: 4\n", ("'c.yaml'", "the key 'epochs' is there twice")),
    "an inner key twice": ("policy_options: {flip: 0, flip: 1}\n", ("'c.yaml'", "the key 'flip' is there twice")),
    "a deep nest": ("epochs: " + "[" * 5000, ("'c.yaml' is not YAML", "recursion")),
    "a billion laughs": (LAUGHS, ("'c.yaml'", "at most 100000 values, aliases followed")),
    "merges of merges": (MERGES, ("'c.yaml'", "at most 100000 values, aliases followed")),
    "an alias in itself": ("tags: &t [*t]\n", ("'c.yaml'", "an alias (*) stands inside of what it is an alias of")),
    "an alias of nothing": ("tags: *t\n", ("'c.yaml' is not YAML", "undefined alias 't'")),
    "a call": ("epochs: !!python/object/apply:os.mkdir [executed]\n", ("'c.yaml'", "could not determine a constr")),
    "an object": ("epochs: !!python/object:builtins.open {}\n", ("'c.yaml'", "could not determine a constructor")),
    "a name of Python": ("epochs: !!python/name:os.system ''\n", ("'c.yaml'", "could not determine a constructor")),
    "a tag of one's own": ("epochs: !mine 3\n", ("'c.yaml'", "could not determine a constructor")),
    "a month too many": ("name: 2020-13-45\n", ("'c.yaml' is not YAML", "month must be in 1..12")),
    "a date": ("name: 2020-12-24\n", ("file c.yaml: name must be text or none", "datetime.date(2020, 12, 24)")),
    "a binary": ("name: !!binary aGk=\n", ("file c.yaml: name must be text or none", "but got b'hi'")),
    "a set": ("tags: !!set {a, b}\n", ("file c.yaml: tags must be a list",)),
    "thousands of digits": ("seed: " + "9" * 5000, ("'c.yaml' is not YAML", "digits")),
    "hundreds of digits": ("seed: " + "9" * 400, ("seed must be in [0, 2**63), but got seed=999",)),
    "a hundred thousand values": (f"lr_steps: [{'1, ' * 100_000}]", ("'c.yaml'", "at most 100000 values")),
    "five megabytes": ("# " + "x" * 5 * 2**20, ("'c.yaml' must have at most 4,194,304 bytes",)),
    "a list as a key": ("? [a, b]\n: 3\n", ("'c.yaml' is not YAML", "unhashable key")),
    "a number as a key": ("3: 4\n", ("file c.yaml: unknown setting '3'",)),
    "nothing as a key": ("~: 4\n", ("file c.yaml: unknown setting 'None'",)),
    "a part of a setting": ("epochs.most: 4\n", ("file c.yaml: unknown setting 'epochs.most'; did you mean 'epochs'",)),
    "a misspelt setting": ("epoch: 4\n", ("file c.yaml: unknown setting 'epoch'; did you mean 'epochs'?",)),
    "a flag": ("resume: runs/a\n", ("file c.yaml: this command has no flag --resume",)),
    "a long setting": ("? " + "x" * 3000 + "\n: 1\n", ("file c.yaml: unknown setting 'xxx",)),
    "a word for a number": ("epochs: many\n", ("file c.yaml: epochs must be a whole number, but got 'many'",)),
    "half a number": ("epochs: 2.5\n", ("file c.yaml: epochs must be a whole number, but got 2.5",)),
    "nothing for a number": ("epochs:\n", ("file c.yaml: epochs must be a whole number, but got None",)),
    "a mapping for a number": ("epochs: {a: 1}\n", ("file c.yaml: epochs must be a whole number, but got {'a': 1}",)),
    "no number": ("lr_max: .nan\n", ("file c.yaml: lr_max must be a number or find, but got nan",)),
    "infinity": ("weight_decay: .inf\n", ("file c.yaml: weight_decay must be a number, but got inf",)),
    "truth for a number": ("seed: yes\n", ("file c.yaml: seed must be a whole number, but got True",)),
    "a number for truth": ("nesterov: 3\n", ("file c.yaml: nesterov must be true or false, but got 3",)),
    "an unknown word": (
        "optimizer: adam\n",
        ("optimizer must be one of: sgd, adamw, muon, but got 'adam'",),
    ),
    "words for numbers": ("lr_steps: [a, b]\n", ("file c.yaml: lr_steps must be a list, each a number",)),
    "a list for a mapping": ("policy_options: [flip]\n", ("file c.yaml: policy_options must be a mapping",)),
    "a line break in a name": ('name: "a\\nb"\n', ("name must hold no control characters and be UTF-8", "'a\\nb'")),
    "a colour for a terminal": ('group: "\\x1b[31m"\n', ("group must hold no control characters", "\\x1b[31m")),
    "half a character": ('name: "\\ud800"\n', ("name must hold no control characters and be UTF-8", "'\\ud800'")),
    "a seed below zero": ("seed: -1\n", ("seed must be in [0, 2**63), but got seed=-1",)),
    "rates that cross": ("lr_min: 0.2\nlr_max: 0.1\n", ("lr_min must not be above lr_max, but got lr_min=0.2",)),
    "an unknown recipe": ("recipe: resnet9-onecycel\n", ("unknown recipe", "did you mean 'resnet9-onecycle'?")),
    "a recipe of many": ("recipe: [resnet9-onecycle]\n", ("file c.yaml: recipe must be text or none", "['resnet9")),
    "a recipe by number": ("recipe: 9\n", ("file c.yaml: recipe must be text or none, but got 9",)),
    "a recipe of no name": ("recipe: ''\n", ("unknown recipe ''; known: resnet18-color, ",)),
    "a recipe in capitals": ("recipe: ResNet9-OneCycle\n", ("unknown recipe 'ResNet9-OneCycle'", "known: ")),
    "a recipe as a path": ("recipe: ../../etc/passwd\n", ("unknown recipe '../../etc/passwd'; known: ",)),
    "a recipe cut short": ("recipe: resnet9-onecycle\nepochs: 4\n", ("peak_epoch must be in [0, epochs)",)),
    "a recipe without its steps": ("recipe: resnet18-color\nlr_steps: []\n", ("schedule=step needs lr_steps",)),
    "an unknown model": ("model: resnet19\n", ("unknown model 'resnet19' (did you mean 'resnet9'?)",)),
    "a model of nobody": ("model: torchvision/os.system\n", ("os.system",)),
}

LINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a file that is not there": (("train", "--config=gone.yaml"), ("cannot read 'gone.yaml': No such file",)),
    "a folder": (("train", "--config=."), ("cannot read '.': Is a directory",)),
    "no name": (("train", "--config="), ("cannot read ''",)),
    "a name too long": (("find_lr", f"--config={'n' * 300}"), ("cannot read 'nnn", "File name too long")),
    "a device without an end": (("train", "--config=/dev/zero"), ("'/dev/zero' must have at most 4,194,304 bytes",)),
    "JSON cut short": (("train", '{"epochs": '), ("command line: '{\"epochs\": ' is not JSON",)),
    "a deep nest of JSON": (("train", '{"tags": ' + "[" * 9000), ("command line: ", "is not JSON")),
    "a JSON file that is not there": (("train", "gone.json"), ("cannot read 'gone.json': No such file",)),
    "no number in JSON": (
        ("train", '{"lr_max": NaN}'),
        ("command line: lr_max must be a number or find, but got nan",),
    ),
    "a list in JSON": (("train", '{"epochs": [1]}'), ("command line: epochs must be a whole number, but got [1]",)),
    "an unknown recipe": (("find_lr", "--recipe=resnet"), ("unknown recipe 'resnet'", "known: ")),
    "laughs in a flag": (
        ("train", "--stage_strides=[&a [1, 1, 1, 1], &b [*a, *a, *a, *a], &c [*b, *b, *b, *b], *c, *c, *c, *c, *c]"),
        ("command line: stage_strides must be a list, each a whole number",),
    ),
    "an alias in itself": (
        ("train", "--policy_options=&a {cutout: *a}"),
        ("command line: policy_options must be a mapping",),
    ),
}


def in_configurations() -> list[BadInput]:
    """Returns what is wrong with configurations and recipes, in files and on the command line."""
    files = [
        BadInput("configuration", name, written("c.yaml", content), ("train", "--config=c.yaml"), said)
        for name, (content, said) in CONFIGS.items()
    ]
    json_list = BadInput("configuration", "a JSON file of a list", written("c.json", "[1]"), ("train", "c.json"), ())
    return [
        *files,
        *(BadInput("command line", name, nothing, command, said) for name, (command, said) in LINES.items()),
        BadInput(**{**vars(json_list), "said": ("command line: 'c.json' must hold a JSON object of settings",)}),
        BadInput("configuration", "bytes as JSON", written("c.json", PICKLE), ("train", "c.json"), ("'c.json' is",)),
    ]


# --- sweeps ---

SWEEP = f"""\
program: {ROOT / "runners" / "train.py"}
method: random
metric: {{name: val/accuracy_best, goal: maximize}}
run_cap: 2
parameters:
  lr_max: {{min: 0.01, max: 0.1}}
  epochs: {{value: 8}}
"""
# What is put into the place of what, and what is said.
SWEEPS: dict[str, tuple[tuple[str, str], str]] = {
    "no program": ((f"program: {ROOT / 'runners' / 'train.py'}\n", ""), "s.yaml:1: program is missing"),
    "a program that is not there": ((str(ROOT / "runners" / "train.py"), "gone.py"), "gone.py"),
    "a list as a program": ((str(ROOT / "runners" / "train.py"), "[a]"), "s.yaml:1: program must be text"),
    "no method": (("method: random\n", ""), "s.yaml:1: method is missing"),
    "an unknown method": (("random", "genetic"), "s.yaml:2: method must be grid, random or bayes, but got 'genetic'"),
    "two methods": (("method: random", "method: random\nmethod: random"), "s.yaml:3: the key 'method' is there twice"),
    "a grid of intervals": (("random", "grid"), "s.yaml:6: parameter lr_max: a grid takes value, values"),
    "bayes without a metric": (
        ("method: random\nmetric: {name: val/accuracy_best, goal: maximize}", "method: bayes"),
        "s.yaml:2: method: bayes needs a metric",
    ),
    "an unknown metric": (("val/accuracy_best", "val/acuracy"), "s.yaml:3: "),
    "no goal": ((", goal: maximize", ""), "s.yaml:3: metric needs a goal"),
    "an unknown goal": (("maximize", "upwards"), "s.yaml:3: metric.goal must be minimize or maximize"),
    "an infinite target": (("maximize}", "maximize, target: .inf}"), "s.yaml:3: metric.target must be a finite number"),
    "no trial": (("run_cap: 2", "run_cap: 0"), "s.yaml:4: run_cap must be a whole number from 1 on, but got 0"),
    "a list of parameters": (
        ("parameters:\n  lr_max: {min: 0.01, max: 0.1}\n  epochs: {value: 8}", "parameters: [1]"),
        "s.yaml:5: parameters must be a mapping of names, but got [1]",
    ),
    "an unknown parameter": (("lr_max", "lr_maxx"), "s.yaml:6: unknown parameter 'lr_maxx'"),
    "an interval upside down": (
        ("min: 0.01, max: 0.1", "min: 0.1, max: 0.01"),
        "s.yaml:6: parameter lr_max: min must be",
    ),
    "an interval of text": (
        ("max: 0.1}", "max: 1e-1}"),
        "s.yaml:6: parameter lr_max: max must be a number, but got '1e-1'",
    ),
    "an interval to infinity": (("max: 0.1}", "max: .inf}"), "s.yaml:6: parameter lr_max: max must be finite"),
    "an interval beyond the floats": (("max: 0.1}", f"max: 1{'0' * 400}}}"), "s.yaml:6: parameter lr_max: values of"),
    "an unknown distribution": (
        ("{min", "{distribution: gamma, min"),
        "s.yaml:6: parameter lr_max: unknown distribution",
    ),
    "a logarithm of zero": (
        ("{min: 0.01", "{distribution: log_uniform_values, min: 0"),
        "s.yaml:6: parameter lr_max: min of log_uniform_values must be above 0",
    ),
    "half an interval": (("{min: 0.01, ", "{"), "s.yaml:6: parameter lr_max: uniform needs min"),
    "no values": (("{min: 0.01, max: 0.1}", "{values: []}"), "s.yaml:6: parameter lr_max: values must be a list"),
    "probabilities that do not add up": (
        ("{min: 0.01, max: 0.1}", "{values: [0.1, 0.2], probabilities: [0.5, 0.6]}"),
        "s.yaml:6: parameter lr_max: probabilities must have a sum of 1, but got 1.1",
    ),
    "a value of the wrong type": (("{value: 8}", "{value: many}"), "s.yaml:7: epochs must be a whole number"),
    "an impossible corner": (("{value: 8}", "{value: 4}"), "s.yaml:7: peak_epoch must be in [0, epochs)"),
    "an unknown macro": (
        ("run_cap: 2", "command: ['${program}', '${args}', '${arg}']\nrun_cap: 2"),
        "s.yaml:4: unknown macro ${arg}; did you mean ${args}?",
    ),
    "a scheduler of others": (
        ("run_cap: 2", "scheduler: {engine: x}\nrun_cap: 2"),
        "s.yaml:4: eva does not support sch",
    ),
    "early stopping by nothing": (
        ("run_cap: 2", "early_terminate: {type: envelope, min_iter: 1}\nrun_cap: 2"),
        "s.yaml:4: ",
    ),
    "a call": (("{value: 8}", "{value: !!python/object/apply:os.mkdir [executed]}"), "s.yaml:7: cannot read the YAML"),
    "a date of no month": (("{value: 8}", "{value: 2020-13-24}"), "month must be in 1..12"),
    "an alias in itself": (("{value: 8}", "&a {value: *a}"), "an alias (*) stands inside of what it is an alias of"),
    "thousands of digits": (("{value: 8}", f"{{value: {'9' * 5000}}}"), "s.yaml:7: cannot read the YAML: "),
    "an open bracket": (("{value: 8}", "{value: 8"), "cannot read the YAML: "),
}
SWEEP_FILES: dict[str, tuple[str | bytes, str]] = {
    "an empty sweep": ("", "s.yaml:1: a sweep must be a mapping with program, method and parameters, but got nothing"),
    "a list": ("- 1\n", "s.yaml:1: a sweep must be a mapping with program, method and parameters, but got list"),
    "a photo": (png(format="JPEG"), "s.yaml: the file is not UTF-8"),
    "zeros": (bytes(100), "s.yaml: cannot read the YAML"),
    "a pickle": (PICKLE, "s.yaml: the file is not UTF-8"),
    "five megabytes": ("#" * 5 * 2**20, "s.yaml: a sweep must have at most 4194304 bytes"),
    "a billion laughs": (LAUGHS, "at most 100000 values, aliases followed"),
    "a deep nest": (
        "parameters: " + "[" * 5000,
        "s.yaml: cannot read the YAML: lists and mappings are nested too deep",
    ),
    "two documents": (SWEEP + "---\n" + SWEEP, "but found another document"),
}


def in_sweeps() -> list[BadInput]:
    """Returns what is wrong with sweep YAMLs."""
    command = ("sweep", "s.yaml", "--check")
    cases = []
    for name, ((old, new), said) in SWEEPS.items():
        assert SWEEP.count(old) == 1 or name == "no goal", name
        cases.append(BadInput("sweep", name, written("s.yaml", SWEEP.replace(old, new)), command, (said, "s.yaml")))
    for name, (content, said) in SWEEP_FILES.items():
        cases.append(BadInput("sweep", name, written("s.yaml", content), command, (said,)))
    return [
        *cases,
        BadInput("sweep", "a file that is not there", nothing, command, ("s.yaml: cannot read it: No such file",)),
        BadInput("sweep", "a folder", nothing, ("sweep", ".", "--check"), (".: cannot read it: Is a directory",)),
        BadInput(
            "sweep", "a device without an end", nothing, ("sweep", "/dev/zero"), ("/dev/zero: a sweep must have",)
        ),
    ]


# --- policies ---


def policy(*transforms: Mapping[str, Any], **compose: Any) -> dict[str, Any]:
    """Returns a policy as A.save writes it."""
    named = [{"__class_fullname__": values["name"], "p": 1.0, **values} for values in transforms]
    plain = [{key: value for key, value in values.items() if key != "name"} for values in named]
    inner = {"__class_fullname__": "Compose", "p": 1.0, "transforms": plain, **compose}
    return {"__version__": "2.0.8", "transform": inner}


FLIP = {"name": "HorizontalFlip", "p": 0.5}
NORMALIZE = {"name": "Normalize", "mean": [0.5] * 3, "std": [0.25] * 3}
POLICIES: dict[str, tuple[Any, str]] = {
    "a list": ([FLIP], "'p.json' must hold a mapping, but got list"),
    "nothing inside": ({}, "must hold transform: {__class_fullname__: Compose"),
    "a transform of nothing": ({"transform": None}, "must hold transform: {__class_fullname__: Compose"),
    "a transform by number": (
        {"transform": {"__class_fullname__": 3}},
        "must hold transform: {__class_fullname__: Comp",
    ),
    "a lone transform": (
        {"transform": {"__class_fullname__": "HorizontalFlip", "p": 1}},
        "must hold a Compose, but got H",
    ),
    "an unknown transform": (
        policy({"name": "HorizontalFilp"}),
        "unknown transform 'HorizontalFilp'; did you mean 'Hor",
    ),
    "a function": (policy({"name": "os.system"}), "unknown transform 'os.system'"),
    "a class of Python": (
        policy({"name": "subprocess.Popen", "args": ["touch", "executed"]}),
        "unknown transform 'subpr",
    ),
    "a function as a transform": (policy({"name": "Lambda", "image": "os.system"}), "policy 'p.json'"),
    "a function inside of one of": (
        policy({"name": "OneOf", "transforms": [{"__class_fullname__": "os.mkdir"}]}),
        "unknown transform 'os.mkdir'",
    ),
    "a transform that is text": (
        policy() | {"transform": {"__class_fullname__": "Compose", "transforms": "abc"}},
        "policy",
    ),
    "transforms without number": ({"transform": {"__class_fullname__": "Compose", "transforms": 3}}, "policy 'p.json'"),
    "an argument of older versions": (policy({"name": "CoarseDropout", "max_holes": 1}), "Argument(s) 'max_holes'"),
    "an argument of the wrong type": (
        policy({"name": "RandomCrop", "height": "tall", "width": 8}),
        "height: Input should",
    ),
    "a probability above one": (policy({**FLIP, "p": 2}), "p: Input should be less than or equal to 1"),
    "a probability of nothing": (policy({**FLIP, "p": None}), "policy 'p.json'"),
    "boxes": (
        policy(FLIP, bbox_params={"format": "yolo", "label_fields": []}),
        "must not have bbox_params or keypoint_pa",
    ),
    "another size": (policy({"name": "Resize", "height": 24, "width": 24}), "must make a float32 tensor (3, 32, 32)"),
    "a crop larger than the image": (policy({"name": "RandomCrop", "height": 99, "width": 99}), "fails on an image"),
    "half a tail": (policy(NORMALIZE), "must make a float32 tensor (3, 32, 32) of an image, but got ndarray"),
    "a tail by chance": (
        policy({**NORMALIZE, "p": 0.5}, {"name": "ToTensorV2"}),
        "Normalize and ToTensorV2 must have p: 1",
    ),
    "an unknown argument of all": (policy(FLIP, colour=1), "unexpected keyword argument 'colour'"),
    "a deviation of zero": (policy({**NORMALIZE, "std": [0, 0, 0]}, {"name": "ToTensorV2"}), "policy 'p.json'"),
}
POLICY_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "JSON cut short": ("p.json", '{"transform": ', "'p.json' is not JSON"),
    "a deep nest of JSON": ("p.json", "[" * 200_000, "'p.json' is not JSON"),
    "a photo as JSON": ("p.json", png(), "'p.json' is not JSON"),
    "a pickle as JSON": ("p.json", PICKLE, "'p.json' is not JSON"),
    "an empty file": ("p.json", "", "'p.json' is not JSON"),
    "YAML cut short": ("p.yaml", "transform: [", "'p.yaml' is not YAML"),
    "a pickle as YAML": ("p.yml", PICKLE, "cannot read 'p.yml'"),
    "a call": ("p.yaml", "transform: !!python/object/apply:os.mkdir [executed]", "'p.yaml' is not YAML: could not"),
    "a billion laughs": ("p.yaml", LAUGHS + "transform: *a7\n", "at most 100000 values, aliases followed"),
    "a YAML list": ("p.yaml", "- a\n", "'p.yaml' must hold a mapping of settings, but got list"),
}


def in_policies() -> list[BadInput]:
    """Returns what is wrong with policies and their options."""
    small = flags({**SMALL_RUN, "tracking": "disabled", "policy": None})[:-1]

    def command(*more: str) -> tuple[str, ...]:
        return ("train", *(flag for flag in small if not flag.startswith("--policy=")), *more)

    cases = [
        BadInput("policy", name, written("p.json", json.dumps(values)), command("--policy=p.json"), (said,))
        for name, (values, said) in POLICIES.items()
    ]
    cases += [
        BadInput("policy", f"{name} ({file})", written(file, content), command(f"--policy={file}"), (said,))
        for name, (file, content, said) in POLICY_FILES.items()
    ]
    options = {
        "--policy=gone.json": "cannot read 'gone.json': No such file",
        "--policy=flop": "unknown policy 'flop' (did you mean 'flip'?)",
        "--policy=": "unknown policy ''",
        "--policy_options.flip=2": "option 'flip' of policy 'flip' must be a number from 0 to 1",
        "--policy_options.cut=2": "unknown option of policy 'flip': 'cut'",
        "--policy_options.flip=-1": "option 'flip' of policy 'flip' must be a number from 0 to 1",
    }
    for option, said in options.items():
        flip = () if option.startswith("--policy=") else ("--policy=flip",)
        cases.append(BadInput("policy", option, nothing, command(*flip, option), (said,)))
    return cases


# --- image folders ---


def sound_images() -> None:
    """Makes an image folder of two classes, three images each to train and two to test; and a folder for its cache."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            folder = Path("images", split, name)
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{index}.png")
    Path("data", "cache").mkdir(parents=True)


IMAGE = Path("images/train/cat/1.png")


def holding(content: bytes, path: Path = IMAGE) -> Make:
    """Returns what puts bytes into the place of an image."""
    return lambda: path.write_bytes(content)


def linked(target: str, path: str) -> Make:
    """Returns what puts a link into the place of a file or a folder."""

    def link() -> None:
        place = Path(path)
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink(missing_ok=True)
        place.symlink_to(target)

    return link


def renamed(path: str, name: str | bytes) -> Make:
    """Returns what renames a file or a folder."""
    return lambda: os.rename(os.fsencode(path), os.path.join(os.path.dirname(os.fsencode(path)), os.fsencode(name)))


def piped() -> None:
    """Puts a pipe that nobody writes into into the place of an image."""
    IMAGE.unlink()
    os.mkfifo(IMAGE)


def emptied(folder: str) -> None:
    """Takes all images out of a folder."""
    for path in list(Path("images", folder).rglob("*.png")):
        path.unlink()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """Returns a PNG that says it is so large, with these bytes for its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def half(content: bytes) -> bytes:
    """Returns the first half."""
    return content[: len(content) // 2]


# Three million characters in three thousand bytes, behind the header of an image.
TEXT_BOMB = png()[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000))) + png()[33:]
NOISE = random.Random(0).randbytes(3000)
WIDE = Image.frombytes("RGB", (25, 40), NOISE)


def noise(format: str) -> bytes:
    """Returns an image file of noise, so that half of it is not the whole."""
    content = io.BytesIO()
    WIDE.save(content, format)
    return content.getvalue()


UNREADABLE = ("1 unreadable image(s) in 'images': train/cat/1.png (",)
IMAGES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "an empty file": (holding(b""), (*UNREADABLE, "empty file")),
    "zeros": (holding(bytes(5000)), (*UNREADABLE, "not an image of a known format")),
    "text": (holding(b"no image"), (*UNREADABLE, "not an image of a known format")),
    "a page of HTML": (holding(b"<!doctype html><title>404</title>"), (*UNREADABLE, "not an image")),
    "SVG": (holding(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), (*UNREADABLE, "not an image of a known format")),
    "PDF": (holding(png(format="PDF")), (*UNREADABLE, "not an image of a known format")),
    "EPS": (holding(png(format="EPS")), (*UNREADABLE, "not an image of a known format")),
    "an icon": (holding(png(format="ICO")), (*UNREADABLE, "not an image of a known format")),
    "a pickle": (holding(PICKLE), (*UNREADABLE, "not an image of a known format")),
    "an array": (holding(b"\x93NUMPY" + bytes(100)), (*UNREADABLE, "not an image of a known format")),
    "a header alone": (holding(png()[:33]), UNREADABLE),
    **{
        f"half a {format}": (holding(half(noise(format))), UNREADABLE)
        for format in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
    },
    "a flipped bit": (holding(png().replace(b"IDATx", b"IDATy")), UNREADABLE),
    "no pixel": (holding(raw_png(0, 0)), UNREADABLE),
    "fewer pixels than told": (holding(raw_png(64, 64, b"abc")), (*UNREADABLE, "truncated")),
    "more pixels than memory": (holding(raw_png(2**30, 2**30)), (*UNREADABLE, "exceeds limit")),
    "a hundred million pixels": (holding(raw_png(10_000, 10_000)), (*UNREADABLE, "exceeds limit")),
    "a text that unpacks to megabytes": (holding(TEXT_BOMB), (*UNREADABLE, "too large")),
    "16 bits of grey": (holding(png(mode="I;16")), (*UNREADABLE, "more than 8 bits a channel")),
    "32 bits of grey": (holding(png(mode="I", format="TIFF")), (*UNREADABLE, "more than 8 bits a channel")),
    "floats": (holding(png(mode="F", format="TIFF")), (*UNREADABLE, "more than 8 bits a channel")),
    "a link to nothing": (linked("gone.png", str(IMAGE)), ("images/train/cat/1.png", "a link to none")),
    "a link to itself": (linked("1.png", str(IMAGE)), ("images/train/cat/1.png", "a link to none")),
    "a pipe": (piped, ("images/train/cat/1.png", "it is no file")),
    "a device": (linked("/dev/zero", str(IMAGE)), ("images/train/cat/1.png", "it is no file")),
    "a class that links to nothing": (
        linked("/gone/dog", "images/train/dog"),
        ("'images/train/dog' must be a folder, but is a link to '/gone/dog', which leads nowhere",),
    ),
    "a class that links to itself": (linked("dog", "images/train/dog"), ("'images/train/dog' must be a folder",)),
    "a class that is all classes": (
        linked(".", "images/train/dog"),
        ("'images/train/dog' must be a folder of one class, but is a link to a folder around it",),
    ),
    "a class that is both splits": (
        linked("..", "images/test/dog"),
        ("'images/test/dog' must be a folder of one class",),
    ),
    "no train": (
        lambda: shutil.rmtree("images/train"),
        ("'images' must hold train/CLASS/* images", "no folder 'train'"),
    ),
    "no test": (lambda: shutil.rmtree("images/test"), ("'images' must hold test/CLASS/* images", "no folder 'test'")),
    "a file for a split": (
        both(removed("images/test"), written("images/test", "")),
        ("'images' must hold test/CLASS/* images",),
    ),
    "no class": (
        both(removed("images/train/cat"), removed("images/train/dog")),
        ("'images/train' must hold a folder of images per class, but has none",),
    ),
    "images without a class": (
        both(removed("images/train"), written("images/train/1.png", "")),
        ("'images/train' must hold a folder of images per class, but has none",),
    ),
    "a class of train alone": (
        lambda: shutil.rmtree("images/test/dog"),
        ("train and test of 'images' must have the same classes, but missing from test: dog",),
    ),
    "a class of test alone": (lambda: Path("images/test/emu").mkdir(), ("the same classes, but only in test: emu",)),
    "classes in capitals": (renamed("images/test/dog", "Dog"), ("missing from test: dog; only in test: Dog",)),
    "an empty class": (lambda: emptied("train/dog"), ("class 'dog' of train is empty in 'images' (images: .bmp, ",)),
    "no image at all": (lambda: emptied("."), ("class 'cat' of train is empty; class 'dog' of train is empty; class",)),
    "other endings alone": (
        renamed_all("images/*/*/*", lambda path: f"{path.stem}.heic"),
        ("class 'dog' of test is empty in 'images' (left out: 10 .heic; images: .bmp, ",),
    ),
    "no ending": (
        renamed_all("images/train/dog/*", lambda path: path.stem),
        ("class 'dog' of train is empty in 'images' (left out: 3 without an ending; images: ",),
    ),
    "hidden images alone": (
        renamed_all("images/test/cat/*", lambda path: f".{path.name}"),
        ("class 'cat' of test is empty",),
    ),
    "a name that is no UTF-8": (renamed(str(IMAGE), b"\xff.png"), ("names in 'images' must be UTF-8", "'train/cat/\\")),
    "a name of two lines": (renamed(str(IMAGE), "a\nb.png"), ("without control characters", "'train/cat/a\\nb.png'")),
    "a name that acts on a terminal": (renamed(str(IMAGE), "\x1b[31m.png"), ("without control char", "\\x1b[31m.png'")),
    "a class of two lines": (
        both(renamed("images/train/dog", "d\nog"), renamed("images/test/dog", "d\nog")),
        ("without control characters", "'train/d\\nog/0.png'"),
    ),
}


def training(*more: str) -> tuple[str, ...]:
    """Returns a training of one step on the image folder."""
    small = {**SMALL_RUN, "data": "folder:images", "data_dir": "data", "train_limit": None, "batch_size": 2}
    small |= {"max_steps": 1, "val_fraction": 0, "tracking": "disabled", "out": "run"}
    return ("train", *flags(small), *more)


def in_images() -> list[BadInput]:
    """Returns what is wrong with image folders."""
    cases = [
        BadInput("images", name, both(sound_images, damage), training(), said)
        for name, (damage, said) in IMAGES.items()
    ]
    lines = {
        "--data=folder:": "data=folder:PATH needs an existing folder, but got PATH=''",
        "--data=folder:gone": "data=folder:PATH needs an existing folder, but got PATH='gone'",
        "--data=folder:images/train/cat/0.png": "data=folder:PATH needs an existing folder",
        "--data=folder:images/train": "'images/train' must hold train/CLASS/* images, but has no folder 'train'",
        "--data=images": "unknown data 'images'",
        "--data=cifar100": "unknown data 'cifar100' (did you mean 'cifar10'?)",
        "--data=s3://bucket/images": "unknown data 's3://bucket/images'",
        "--data_dir=images/train/cat/0.png": "data_dir must be writable, but 'images/train/cat/0.png/cache' is not",
    }
    return cases + [BadInput("images", line, sound_images, training(line), (said,)) for line, said in lines.items()]


# --- checkpoints ---


def settings() -> dict[str, Any]:
    """Returns all settings of a small run."""
    config, _ = resolve([Layer("test", {**SMALL_RUN, "tracking": "disabled"})])
    return to_dict(config)


@cache
def weights() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the weights of a small network that was never trained, and facts about its run."""
    facts = {
        **{"config": settings(), "run": "abc12345", "classes": [str(digit) for digit in range(10)]},
        **{"mean": [0.3] * 3, "std": [0.4] * 3, "data_fingerprint": "0" * 64, "epoch": 1},
    }
    model = build_model(str(SMALL_RUN["model"]), num_classes=10)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, facts


def sound_checkpoint(path: str = "c.safetensors") -> None:
    """Writes a checkpoint."""
    tensors, facts = weights()
    safetensors.torch.save_file(tensors, path, {"format": "pt", "eva": json.dumps(facts)})


def checkpoint(change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None, **facts: Any) -> Make:
    """Returns what writes a checkpoint with other weights, or other facts."""

    def write() -> None:
        tensors, known = weights()
        tensors = dict(tensors)
        change(tensors)
        metadata = {"format": "pt", "eva": json.dumps({**known, **facts})}
        safetensors.torch.save_file(tensors, "c.safetensors", metadata)

    return write


def setting(**values: Any) -> Make:
    """Returns what writes a checkpoint that says it was trained with other settings."""
    return lambda: checkpoint(config={**weights()[1]["config"], **values})()


def bytes_of(change: Callable[[bytes], bytes]) -> Make:
    """Returns what writes a checkpoint of other bytes."""

    def write() -> None:
        sound_checkpoint()
        Path("c.safetensors").write_bytes(change(Path("c.safetensors").read_bytes()))

    return write


def header(change: Callable[[dict[str, Any]], object]) -> Make:
    """Returns what writes a checkpoint with another header, which the tensors follow as they did."""

    def changed(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        values = json.loads(content[8 : 8 + size])
        change(values)
        text = json.dumps(values).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return bytes_of(changed)


def torch_pickle(*, zipped: bool) -> bytes:
    """Returns what torch.save makes of a pickle, as torch writes it now and as it did before."""
    content = io.BytesIO()
    torch.save({"model": Planted()}, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


def first(tensors: Mapping[str, Any]) -> str:
    """Returns the name of the first tensor of a header or of weights."""
    return next(name for name in tensors if name != "__metadata__")


def copies(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Puts copies in the places of the tensors of floats, and returns these."""
    tensors.update({name: tensor.clone() for name, tensor in tensors.items() if tensor.is_floating_point()})
    return [tensor for tensor in tensors.values() if tensor.is_floating_point()]


NO_CHECKPOINT = "'c.safetensors' is not a readable checkpoint: "
OTHER = "'c.safetensors' holds another architecture: "
OLDER = "checkpoint 'c.safetensors' is of another version of eva: it lacks "
CHECKPOINTS: dict[str, tuple[Make, str]] = {
    "an empty file": (written("c.safetensors", b""), NO_CHECKPOINT),
    "text": (written("c.safetensors", "weights"), NO_CHECKPOINT),
    "zeros": (written("c.safetensors", bytes(5000)), NO_CHECKPOINT),
    "a pickle": (written("c.safetensors", PICKLE), NO_CHECKPOINT),
    "a pickle of torch": (written("c.safetensors", torch_pickle(zipped=True)), NO_CHECKPOINT),
    "an older pickle of torch": (written("c.safetensors", torch_pickle(zipped=False)), NO_CHECKPOINT),
    "an image": (written("c.safetensors", png()), NO_CHECKPOINT),
    "a page of HTML": (written("c.safetensors", "<!doctype html><title>404</title>"), NO_CHECKPOINT),
    "a pointer of Git LFS": (
        written("c.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        NO_CHECKPOINT,
    ),
    "a header cut short": (bytes_of(lambda content: content[:500]), NO_CHECKPOINT),
    "weights cut short": (bytes_of(half), NO_CHECKPOINT),
    "a byte too few": (bytes_of(lambda content: content[:-1]), NO_CHECKPOINT),
    "a byte too many": (bytes_of(lambda content: content + b"\0"), NO_CHECKPOINT),
    "a header of exabytes": (bytes_of(lambda content: b"\xff" * 8 + content[8:]), NO_CHECKPOINT),
    "a header that is no JSON": (bytes_of(lambda content: content[:8] + b"[" + content[9:]), NO_CHECKPOINT),
    "a tensor outside of the file": (
        header(lambda values: values[first(values)].update(data_offsets=[0, 2**40])),
        NO_CHECKPOINT,
    ),
    "two tensors in one place": (
        header(lambda values: values.update({"more": dict(values[first(values)])})),
        NO_CHECKPOINT,
    ),
    "an unknown type of numbers": (header(lambda values: values[first(values)].update(dtype="F7")), NO_CHECKPOINT),
    "no facts": (
        header(lambda values: values["__metadata__"].pop("eva")),
        "is no checkpoint of eva: its metadata have",
    ),
    "no metadata": (header(lambda values: values.pop("__metadata__")), "is no checkpoint of eva: its metadata have"),
    "facts cut short": (header(lambda values: values["__metadata__"].update(eva='{"run": ')), NO_CHECKPOINT),
    "facts in a deep nest": (header(lambda values: values["__metadata__"].update(eva="[" * 9999)), NO_CHECKPOINT),
    "facts that are a list": (
        header(lambda values: values["__metadata__"].update(eva="[1]")),
        "is no checkpoint of eva",
    ),
    "no classes": (checkpoint(classes=[]), OLDER + "classes"),
    "numbers as classes": (checkpoint(classes=list(range(10))), OLDER + "classes"),
    "no settings": (checkpoint(config=None), OLDER + "config"),
    "no statistics": (checkpoint(mean=None, std=None), OLDER + "mean, std"),
    "statistics of grey images": (checkpoint(mean=[0.5], std=[0.5]), OLDER + "mean, std"),
    "a run without a name": (checkpoint(run=7), OLDER + "run"),
    "no deviation": (checkpoint(std=[0.0, 0.4, 0.4]), "c.safetensors"),
    "no number as a mean": (checkpoint(mean=[float("nan"), 0.4, 0.4]), "c.safetensors"),
    "one class too few": (
        checkpoint(classes=[str(digit) for digit in range(9)]),
        "but the network was trained on 0, 1",
    ),
    "another class": (
        checkpoint(classes=[*"012345678", "X"]),
        "but the network was trained on 0, 1, 2, 3, 4, 5, 6, 7, 8, X",
    ),
    "a setting of another version": (setting(warmup=3), "checkpoint c.safetensors: unknown setting 'warmup'"),
    "an impossible setting": (setting(dropout=3), "dropout must be in [0, 1), but got dropout=3"),
    "a setting of another type": (setting(model=["resnet9"]), "checkpoint c.safetensors: model must be text, but got"),
    "an unknown network": (setting(model="resnet19"), "unknown model 'resnet19'"),
    "another network": (setting(model="resnet9"), OTHER),
    "data that are gone": (setting(data="folder:/gone"), "needs an existing folder, but got PATH='/gone'"),
    "a tensor too few": (checkpoint(lambda tensors: tensors.pop(first(tensors))), OTHER + "Error"),
    "a tensor too many": (checkpoint(lambda tensors: tensors.update(more=torch.zeros(3))), OTHER + "Error"),
    "a tensor of another name": (
        checkpoint(lambda tensors: tensors.update(other=tensors.pop(first(tensors)))),
        OTHER + "Error",
    ),
    "another shape": (checkpoint(lambda tensors: tensors.update({first(tensors): torch.zeros(24, 3, 5, 5)})), OTHER),
    "no tensor": (checkpoint(lambda tensors: tensors.clear()), OTHER + "Error"),
    "weights of NaN": (
        checkpoint(lambda tensors: [tensor.fill_(math.nan) for tensor in copies(tensors)]),
        "the weights in 'c.safetensors' must be numbers, but NaN is in ",
    ),
    "a single NaN": (
        checkpoint(lambda tensors: copies(tensors)[0].view(-1)[:1].fill_(math.nan)),
        "the weights in 'c.safetensors' must be numbers, but NaN is in 1 of ",
    ),
    "a folder": (lambda: Path("c.safetensors").mkdir(), "'c.safetensors' is no run folder: it has no summary.json"),
    "a link to nothing": (
        linked("gone", "c.safetensors"),
        "'c.safetensors' is no run folder, no checkpoint and no W&B",
    ),
    "a link to itself": (linked("c.safetensors", "c.safetensors"), "'c.safetensors'"),
    "nothing": (nothing, "'c.safetensors' is no run folder, no checkpoint and no W&B artifact"),
}


def in_checkpoints() -> list[BadInput]:
    """Returns what is wrong with checkpoints."""
    command = ("evaluate", "c.safetensors", "--tracking=disabled", "--out=run", "--gallery_size=0")
    return [BadInput("checkpoint", name, make, command, (said,)) for name, (make, said) in CHECKPOINTS.items()]


# --- run folders and sweep folders ---

SUMMARY = {"status": "finished", "job": "train", "wandb_id": "abc12345", "data": "digits", "test_accuracy_best": 0.5}
TRAIN_SUMMARY = {**SUMMARY, "status": "interrupted"}


def sound_run(folder: str = "run") -> None:
    """Makes a run folder with all that a comparison reads, and weights."""
    path = Path(folder)
    path.mkdir(parents=True)
    (path / "summary.json").write_text(json.dumps(SUMMARY))
    (path / "config.yaml").write_text(yaml.safe_dump(settings()))
    (path / "history.csv").write_text("trainer/step,epoch,train/loss\n0,0.5,2.3\n1,1.0,2.2\n")
    (path / "epochs.csv").write_text("epoch,val/loss,val/accuracy\n1,2.5,0.5\n")
    sound_checkpoint(str(path / "best.safetensors"))
    ids, labels = np.array(["test/00000", "test/00001"]), np.array([0, 1], np.int64)
    logits = np.array([[2, 1], [2, 1]], np.float32)
    Predictions("test", ("a", "b"), "f" * 64, ids, labels, logits).save(path / "predictions.npz")
    save_images(path / "misclassified.npz", ids[1:], np.zeros((1, 32, 32, 3), np.uint8))


def in_run(name: str, content: str | bytes | None) -> Make:
    """Returns what makes a run folder in which one file is another, or is not there."""

    def make() -> None:
        sound_run()
        path = Path("run") / name
        path.unlink(missing_ok=True) if content is None else path.write_bytes(
            content.encode() if isinstance(content, str) else content
        )

    return make


def summary(**changes: Any) -> Make:
    """Returns what makes a run folder with another summary."""
    return in_run("summary.json", json.dumps({**SUMMARY, **changes}))


EVALUATE = ("evaluate", "run", "--tracking=disabled", "--gallery_size=0")
COMPARE = ("compare", "run")
RESUME = ("train", "--resume=run")
RUNS: dict[str, tuple[Make, tuple[str, ...], str]] = {
    "nothing at all": (lambda: Path("run").mkdir(), EVALUATE, "'run' is no run folder: it has no summary.json"),
    "nothing to compare": (lambda: Path("run").mkdir(), COMPARE, "'run' holds no run that eva trained or evaluated"),
    "nothing to resume": (lambda: Path("run").mkdir(), RESUME, "'run' is no run folder: it has no config.yaml"),
    "no folder to compare": (nothing, COMPARE, "no run folder, and no folder of runs, at 'run'"),
    "no folder to resume": (nothing, RESUME, "'run' is no run folder"),
    "a name too long to resume": (
        nothing,
        ("train", f"--resume={'n' * 300}"),
        "is no run folder: it has no config.yaml",
    ),
    "a name too long to send": (nothing, ("sync", "n" * 300), "is no run folder: it has no config.yaml"),
    "a file to compare": (written("run", "text"), COMPARE, "no run folder, and no folder of runs, at 'run'"),
    "a file to resume": (written("run", "text"), RESUME, "'run' is no run folder"),
    "no summary": (in_run("summary.json", None), EVALUATE, "'run' is no run folder: it has no summary.json"),
    "a summary cut short": (in_run("summary.json", '{"status": "fini'), EVALUATE, "'run/summary.json' is damaged"),
    "a summary cut short to compare": (in_run("summary.json", '{"status"'), COMPARE, "'run/summary.json' is damaged"),
    "a summary of zeros": (in_run("summary.json", bytes(500)), EVALUATE, "'run/summary.json' is damaged"),
    "a summary as a pickle": (in_run("summary.json", PICKLE), COMPARE, "'run/summary.json' is damaged"),
    "a summary in a deep nest": (in_run("summary.json", "[" * 99_999), COMPARE, "'run/summary.json' is damaged"),
    "a summary that is a list": (in_run("summary.json", "[1]"), EVALUATE, "'run/summary.json' is no summary of a run"),
    "a summary of others": (in_run("summary.json", '{"loss": 1}'), EVALUATE, "it has no wandb_id"),
    "a folder as a summary": (
        both(in_run("summary.json", None), folder("run/summary.json")),
        EVALUATE,
        "'run' is no run folder: it has no summary.json",
    ),
    "the range test's": (summary(job="find_lr"), COMPARE, "'run' holds no run that eva trained or evaluated"),
    "no weights": (in_run("best.safetensors", None), EVALUATE, "the run in 'run' has no best.safetensors"),
    "weights cut short": (
        in_run("best.safetensors", b"12345678"),
        EVALUATE,
        "'run/best.safetensors' is not a readable",
    ),
    "weights as a pickle": (in_run("best.safetensors", PICKLE), EVALUATE, "'run/best.safetensors' is not a readable"),
    "no configuration": (in_run("config.yaml", None), RESUME, "'run' is no run folder: it has no config.yaml"),
    "a configuration cut short": (in_run("config.yaml", "tags: ["), RESUME, "'run/config.yaml' is not YAML"),
    "a configuration that calls": (
        in_run("config.yaml", "seed: !!python/object/apply:os.mkdir [executed]"),
        RESUME,
        "'run/config.yaml' is not YAML: could not determine a constructor",
    ),
    "a configuration of another version": (
        in_run("config.yaml", "warmup: 3\n"),
        RESUME,
        "file run/config.yaml: unknown setting 'warmup'",
    ),
    "a configuration that can't be": (in_run("config.yaml", "dropout: 3\n"), RESUME, "dropout must be in [0, 1)"),
    "a run that is over": (sound_run, RESUME, "the run in 'run' has ended"),
    "a run that is begun differently": (sound_run, (*RESUME, "--epochs=9"), "--resume goes on as the run began"),
    "an unknown metric": (sound_run, (*COMPARE, "--metric=val_acc"), "unknown metric 'val_acc'"),
    "no metric": (sound_run, (*COMPARE, "--metric="), "unknown metric ''"),
    "a file for the page's folder": (sound_run, (*COMPARE, "--out=run/config.yaml"), "cannot write the comparison to"),
    "no target": (sound_run, ("compare", ""), "must be named, but got ''"),
    "an evaluation into a full folder": (sound_run, (*EVALUATE, "--out=run"), "run folder 'run' is not empty"),
    "an evaluation of another network": (
        sound_run,
        (*EVALUATE, "--model=resnet9"),
        "an evaluation can change data, da",
    ),
}
SWEEP_FOLDER = {
    **{"name": "s-123456", "storage": "journal.log", "place": "0123456789abcdef", "isolate": False, "retries": 2},
}


def sound_sweep() -> None:
    """Makes the folder of a sweep that was never begun."""
    Path("sweep", "trials").mkdir(parents=True)
    Path("sweep", "sweep.yaml").write_text(SWEEP)
    Path("sweep", "sweep.json").write_text(json.dumps(SWEEP_FOLDER))


def in_sweep(name: str, content: str | bytes) -> Make:
    """Returns what makes the folder of a sweep in which one file is another."""
    return both(sound_sweep, written(f"sweep/{name}", content))


SWEEP_FOLDERS: dict[str, tuple[Make, str]] = {
    "nothing at all": (lambda: Path("sweep").mkdir(), "'sweep' is no sweep folder: it has no sweep.json"),
    "no folder": (nothing, "'sweep' is no sweep folder: it has no sweep.json"),
    "no sweep": (both(sound_sweep, removed("sweep/sweep.yaml")), "sweep.yaml"),
    "a sweep cut short": (in_sweep("sweep.yaml", SWEEP[:90]), "sweep.yaml"),
    "a sweep that calls": (
        in_sweep("sweep.yaml", "a: !!python/object/apply:os.mkdir [executed]"),
        "cannot read the YAML",
    ),
    "a description cut short": (in_sweep("sweep.json", '{"name": '), "'sweep/sweep.json' is damaged: it is not JSON"),
    "a description as a pickle": (in_sweep("sweep.json", PICKLE), "'sweep/sweep.json' is damaged: it is not JSON"),
    "a description of another version": (
        in_sweep("sweep.json", '{"id": 1}'),
        "'sweep/sweep.json' is no description of a",
    ),
    "a description that is a list": (in_sweep("sweep.json", "[1]"), "'sweep/sweep.json' is no description of a sweep"),
    "a journal of text": (in_sweep("journal.log", "no journal\n"), "journal.log' is damaged"),
    "a journal as a pickle": (in_sweep("journal.log", PICKLE + b"\n"), "journal.log' is damaged"),
    "a journal of another version": (
        in_sweep("journal.log", '{"op_code":99,"worker_id":"a"}\n'),
        "journal.log' is dam",
    ),
}


def in_folders() -> list[BadInput]:
    """Returns what is wrong with run folders and with folders of sweeps."""
    runs = [BadInput("run folder", name, make, command, (said,)) for name, (make, command, said) in RUNS.items()]
    resume = ("sweep", "--resume=sweep")
    return runs + [
        BadInput("sweep folder", name, make, resume, (said,)) for name, (make, said) in SWEEP_FOLDERS.items()
    ]


def bad_inputs() -> list[BadInput]:
    """Returns the whole corpus."""
    return [*in_configurations(), *in_sweeps(), *in_policies(), *in_images(), *in_checkpoints(), *in_folders()]
