"""The configuration: layers, types, impossible values, YAML, and what a W&B agent writes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eva.config import (
    FIELDS,
    TYPES,
    Layer,
    RunConfig,
    UserError,
    collected,
    default_of,
    describe_type,
    read_yaml,
    resolve,
    stands_for_none,
    to_dict,
)

# --- valid configurations ---

PLAIN = st.characters(exclude_categories=("Cc", "Cs"))


def text(max_size: int = 20, *, without: str = "") -> st.SearchStrategy[str]:
    """Any text that a setting may hold, texts that look like numbers, booleans and YAML included."""
    looks_like = st.sampled_from(["123", "1e5", "1e-05", "true", "False", "~", "on", "[1]", "{a: 1}", "2020-01-01", ""])
    drawn = st.one_of(looks_like, st.text(PLAIN, max_size=max_size))
    return drawn.filter(lambda value: not stands_for_none(value) and not set(value) & set(without))


def number(low: float, high: float) -> st.SearchStrategy[float]:
    """A number of a range, with all its digits."""
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


def count(low: int = 1) -> st.SearchStrategy[int]:
    """A whole number."""
    return st.integers(low, 10**6)


@st.composite
def valid_settings(draw: st.DrawFn) -> dict[str, Any]:
    """A value for each setting, as RunConfig holds it, that breaks no rule."""
    lr_min, lr_max = sorted((draw(number(0, 5)), draw(number(1e-8, 5))))
    find_lr_start = draw(number(1e-8, 1))
    epochs = draw(st.integers(2, 10**4))
    momentum = draw(number(0, 0.999))
    split = draw(st.sampled_from(["test", "val", "train"]))
    # Python and YAML quote text without quotes and backslashes alike.
    tag = st.text(
        st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="'\"\\"), min_size=1, max_size=9
    )
    rise = st.lists(number(0.1, 99), min_size=1, max_size=3, unique=True).map(lambda epochs: tuple(sorted(epochs)))
    # A whole number with a point, written as text, arrives as a whole number.
    share = st.floats(0, 1, exclude_min=True, exclude_max=True)
    options = st.dictionaries(st.sampled_from(["cutout", "flip", "rotate"]), st.integers(0, 32) | share)
    chosen: dict[str, st.SearchStrategy[Any]] = {
        "recipe": st.none(),
        "data": text(),
        "data_dir": text(),
        "val_fraction": number(0.01 if split == "val" else 0, 0.99),
        "train_limit": st.none() | count(),
        "policy": text(),
        "policy_options": options,
        "augmentation": st.sampled_from(["auto", "batched", "albumentations"]),
        "workers": st.none() | count(0),
        "model": text(),
        "norm": st.sampled_from(["batch", "ghost", "group", "layer", "instance", "none"]),
        "ghost_splits": count(),
        "norm_groups": count(),
        "dropout": number(0, 0.99),
        "stage_strides": st.tuples(*[st.integers(1, 2)] * 4),
        "init": st.sampled_from(["default", "identity", "whitened"]),
        "optimizer": st.sampled_from(["sgd", "adamw", "muon"]),
        "linear_lr": st.none() | number(1e-6, 1e4),
        "bias_lr": st.none() | number(1e-6, 1e4),
        "sgd_momentum": number(0, 0.999),
        "first_bias_epochs": number(0.1, 100),
        "momentum": st.just(momentum),
        "momentum_min": st.none() | number(0, momentum),
        "nesterov": st.booleans(),
        "weight_decay": number(0, 1),
        "l1": number(0, 1),
        "decay_norm_and_bias": st.booleans(),
        "label_smoothing": number(0, 0.99),
        "grad_clip": st.none() | number(1e-6, 100),
        "ema_decay": st.none() | number(0.001, 0.9999),
        "schedule": st.sampled_from(
            ["onecycle", "cosine_onecycle", "cosine", "constant", "step", "plateau", "triangular"]
        ),
        "lr_min": st.just(lr_min) | st.just("find"),
        "lr_max": st.just(lr_max) | st.just("find"),
        "peak_epoch": st.floats(0, epochs, exclude_max=True),
        "lr_factor": number(0.01, 0.99),
        "lr_steps": rise,
        "patience": count(),
        "cycle_epochs": number(0.1, 100),
        "epochs": st.just(epochs),
        "batch_size": count(),
        "max_steps": st.none() | count(),
        "find_lr_start": st.just(find_lr_start),
        "find_lr_end": number(find_lr_start * 2, 100),
        "find_lr_steps": count(5),
        "sync_batchnorm": st.booleans(),
        "evaluate": st.booleans(),
        "split": st.just(split),
        "tta": st.sampled_from(["none", "flip", "flip_shift"]),
        "gallery_size": st.integers(0, 400),
        "gradcam_layers": st.lists(tag, max_size=3).map(tuple),
        "table_rows": st.integers(0, 10_000),
        "device": text(),
        "precision": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
        "channels_last": st.none() | st.booleans(),
        "compile": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
        "deterministic": st.booleans(),
        "out": st.none() | text(),
        "save_steps": st.none() | count(),
        "tracking": st.sampled_from(["auto", "online", "offline", "disabled"]),
        "tracking_timeout": number(0.1, 600),
        "wandb_dir": st.none() | text(),
        "project": text(without="/\\#?%:"),
        "entity": st.none() | text(),
        "group": st.none() | text(),
        "name": st.none() | text(),
        "tags": st.lists(tag, max_size=3).map(tuple),
    }
    return {name: draw(strategy) for name, strategy in chosen.items()}


def same(one: RunConfig, other: RunConfig) -> bool:
    """Whether two configurations hold the same values, of the same types (`==` takes 1 for True)."""
    return repr(one) == repr(other)


def problems_of(*layers: Mapping[str, Any]) -> list[str]:
    """Returns the lines of what `resolve` says is wrong with layers of settings."""
    with pytest.raises(UserError, match=r"\S") as caught:
        resolve([Layer(f"layer {number}", values) for number, values in enumerate(layers)])
    return str(caught.value).splitlines()


@settings(max_examples=50, deadline=None)
@given(valid_settings())
def test_a_configuration_survives_yaml(values: dict[str, Any]) -> None:
    assert values.keys() == FIELDS.keys()
    config, _ = resolve([Layer("test", values)])
    assert same(config, RunConfig(**values))
    again, _ = resolve([Layer("file", yaml.safe_load(yaml.safe_dump(to_dict(config), sort_keys=False)))])
    assert same(again, config)


# --- layers ---


def test_nothing_given_is_the_defaults_without_sources() -> None:
    config, sources = resolve([])
    assert same(config, RunConfig())
    assert sources == {}


def test_later_layers_win_setting_by_setting() -> None:
    low = Layer("recipe r", {"epochs": 10, "batch_size": 64, "norm": "layer"})
    middle = Layer("file f", {"epochs": 11, "batch_size": 65})
    config, sources = resolve([low, middle, Layer("command line", {"epochs": "12"})])
    assert (config.epochs, config.batch_size, config.norm) == (12, 65, "layer")
    assert sources == {"epochs": "command line", "batch_size": "file f", "norm": "recipe r"}


def test_policy_options_are_merged_key_by_key() -> None:
    low = Layer("file f", {"policy_options": {"cutout": 8, "flip": 0.5}})
    config, _ = resolve([low, Layer("command line", {"policy_options.cutout": "16", "policy_options.pad": "2"})])
    assert config.policy_options == {"cutout": 16, "flip": 0.5, "pad": 2}
    assert low.values["policy_options"] == {"cutout": 8, "flip": 0.5}, "a layer was changed"


def test_defaults_are_not_shared() -> None:
    resolve([Layer("one", {"policy_options.cutout": 3})])[0].policy_options["flip"] = 1
    assert RunConfig().policy_options == {}


# --- values ---


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("weight_decay", "1e-5", 1e-5),  # YAML 1.1 reads this as text
        ("l1", "1e-05", 1e-5),
        ("lr_max", "find", "find"),
        ("lr_max", 1, 1.0),
        ("nesterov", "false", False),
        ("nesterov", "False", False),
        ("nesterov", "true", True),
        ("nesterov", "True", True),
        ("channels_last", "None", None),
        ("grad_clip", "None", None),
        ("grad_clip", "null", None),
        ("norm", "none", "none"),
        ("batch_size", "128.0", 128),  # what quantized distributions of a sweep draw
        ("batch_size", 128.0, 128),
        ("stage_strides", "[1, 2, 2, 1]", (1, 2, 2, 1)),
        ("stage_strides", "1,2,2,1", (1, 2, 2, 1)),
        ("lr_steps", "10", (10.0,)),
        ("lr_steps", "[1e1, 15]", (10.0, 15.0)),
        ("lr_steps", "[]", ()),
        ("tags", "['a', 'b, c']", ("a", "b, c")),
        ("tags", "[1, 1e5, true]", ("1", "1e5", "true")),
        ("tags", "a, #b,@c", ("a", "#b", "@c")),
        ("tags", "", ()),
        ("policy_options", "{'cutout': 16}", {"cutout": 16}),
        ("policy_options", "{cutout: 1e-1}", {"cutout": 0.1}),
        ("policy_options", "{}", {}),
        ("group", "123", "123"),
        ("name", "1e5", "1e5"),
        ("name", "", ""),
    ],
)
def test_values_take_the_type_of_their_setting(name: str, raw: Any, value: Any) -> None:
    config, _ = resolve([Layer("test", {name: raw})])
    assert repr(getattr(config, name)) == repr(value)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"epochs": "abc"}, "epochs must be a whole number, but got 'abc'"),
        ({"epochs": 2.5}, "epochs must be a whole number, but got 2.5"),
        ({"epochs": None}, "epochs must be a whole number, but got None"),
        ({"workers": True}, "workers must be a whole number or none, but got True"),
        ({"lr_max": False}, "lr_max must be a number or find, but got False"),
        ({"lr_max": float("nan")}, "lr_max must be a number or find, but got nan"),
        ({"lr_max": "inf"}, "lr_max must be a number or find, but got 'inf'"),
        ({"nesterov": "maybe"}, "nesterov must be true or false, but got 'maybe'"),
        ({"optimizer": "adam"}, "optimizer must be one of: sgd, adamw, muon, but got 'adam'"),
        ({"split": "valid"}, "split must be one of: test, val, train, but got 'valid'"),
        ({"tta": True}, "tta must be one of: none, flip, flip_shift, but got True"),
        ({"group": 123}, "group must be text or none, but got 123"),
        ({"stage_strides": "[1, x]"}, "stage_strides must be a list, each a whole number, but got ['1', 'x']"),
        ({"stage_strides": "[1, 2"}, "stage_strides must be a list, each a whole number, but got '[1, 2'"),
        ({"name": b"hi"}, "name must be text or none, but got b'hi'"),  # pydantic would take it
        ({"tags": {"a"}}, "tags must be a list, each text, but got {'a'}"),
        ({"tags": [b"hi"]}, "tags must be a list, each text, but got [b'hi']"),
        ({"policy_options": "16"}, "policy_options must be a mapping, each value a whole number or a number"),
        ({"policy_options.flip": "true"}, "policy_options must be a mapping, each value a whole number or a number"),
    ],
)
def test_a_wrong_type_names_the_layer_the_setting_the_type_and_the_value(values: dict[str, Any], line: str) -> None:
    (problem,) = problems_of(values)
    assert problem.startswith(f"layer 0: {line}")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"lr_min": 0.5}, "lr_min must not be above lr_max, but got lr_min=0.5, lr_max=0.1"),
        ({"lr_min": -1}, "lr_min must not be negative, but got lr_min=-1.0"),
        ({"bias_lr": 0}, "bias_lr must be above 0 or none, but got bias_lr=0.0"),
        ({"first_bias_epochs": 0}, "first_bias_epochs must be above 0, but got first_bias_epochs=0.0"),
        ({"lr_max": 0, "lr_min": 0}, "lr_max must be above 0, but got lr_max=0.0"),
        ({"epochs": 5}, "peak_epoch must be in [0, epochs), but got peak_epoch=5.0, epochs=5"),
        ({"batch_size": 0}, "batch_size must be at least 1, but got batch_size=0"),
        ({"find_lr_steps": 4}, "find_lr_steps must be at least 5, but got find_lr_steps=4"),
        ({"max_steps": 0}, "max_steps must be at least 1 or none, but got max_steps=0"),
        ({"dropout": 1}, r"dropout must be in [0, 1), but got dropout=1.0"),
        ({"val_fraction": -0.1}, "val_fraction must be in [0, 1), but got val_fraction=-0.1"),
        (
            {"momentum_min": 0.95},
            "momentum_min must be in [0, momentum] or none, but got momentum_min=0.95, momentum=0.9",
        ),
        ({"schedule": "step"}, "schedule=step needs lr_steps, e.g. lr_steps=[10,15], but got lr_steps=()"),
        ({"lr_steps": [3, 2]}, "lr_steps must be above 0 and rise, but got lr_steps=(3.0, 2.0)"),
        ({"stage_strides": [1, 2, 3]}, "stage_strides must be four strides of 1 or 2, but got stage_strides=(1, 2, 3)"),
        ({"gallery_size": 401}, "gallery_size must be in [0, 400], but got gallery_size=401"),
        ({"gallery_size": -1}, "gallery_size must be in [0, 400], but got gallery_size=-1"),
        ({"table_rows": 10_001}, "table_rows must be in [0, 10000], but got table_rows=10001"),
        ({"table_rows": -1}, "table_rows must be in [0, 10000], but got table_rows=-1"),
        ({"split": "val", "val_fraction": 0}, "split=val needs a val_fraction above 0, but got val_fraction=0.0"),
        ({"find_lr_end": 1e-5}, "find_lr_start must be above 0 and below find_lr_end, but got find_lr_start=0.0001"),
        ({"weight_decay": -1}, "weight_decay must not be negative, but got weight_decay=-1.0"),
        ({"seed": -1}, "seed must be in [0, 2**63), but got seed=-1"),
        ({"epochs": 10**400}, "epochs must be below 2**31, but got epochs=1000"),
        ({"workers": 2**31}, "workers must be below 2**31, but got workers=2147483648"),
        ({"seed": 2**63}, "seed must be in [0, 2**63), but got seed=9223372036854775808"),
        ({"grad_clip": 0}, "grad_clip must be above 0 or none, but got grad_clip=0.0"),
        ({"ema_decay": 1}, "ema_decay must be in (0, 1) or none, but got ema_decay=1.0"),
        (
            {"project": "a/b"},
            "project must have at most 128 characters, and none of / \\ # ? % :, but got project='a/b'",
        ),
        ({"tags": [""]}, "tags must have 1 to 64 characters each, but got tags=('',)"),
        ({"out": "a\0b"}, "out must hold no control characters and be UTF-8, but got out='a\\x00b'"),
        ({"name": "a\nb"}, "name must hold no control characters and be UTF-8, but got name='a\\nb'"),
        ({"data": "folder:\udcff"}, "data must hold no control characters and be UTF-8, but got data='folder:\\udcff'"),
    ],
)
def test_an_impossible_value_is_told_with_the_rule(values: dict[str, Any], line: str) -> None:
    (problem,) = problems_of(values)
    assert problem.startswith(line)


def test_rates_that_are_still_to_be_found_are_not_compared() -> None:
    for rates in ({"lr_min": 0.5, "lr_max": "find"}, {"lr_min": "find", "lr_max": 1e-9}):
        config, _ = resolve([Layer("test", rates)])
        assert {"lr_min": config.lr_min, "lr_max": config.lr_max} == rates


def test_all_problems_are_told_at_once() -> None:
    problems = problems_of({"lr_maxx": 1, "epochs": "x"}, {"dropout": 2, "lr_min": 1, "policy_option.a": 1})
    assert problems == [
        "layer 0: unknown setting 'lr_maxx'; did you mean 'lr_max'?",
        "layer 1: unknown setting 'policy_option.a'; did you mean 'policy_options'?",
        "layer 0: epochs must be a whole number, but got 'x'",
        "dropout must be in [0, 1), but got dropout=2.0",
        "lr_min must not be above lr_max, but got lr_min=1.0, lr_max=0.1",
    ]


def test_no_rule_is_applied_to_a_value_that_was_not_given() -> None:
    # Epochs stay unknown: their default, 20, says nothing about the peak.
    assert problems_of({"epochs": "x", "peak_epoch": 30}) == ["layer 0: epochs must be a whole number, but got 'x'"]


def test_a_flag_of_another_command_is_told_as_such() -> None:
    (problem,) = problems_of({"resume": 1})
    assert problem == "layer 0: this command has no flag --resume"


@pytest.mark.parametrize("key", ["zzzzzz", "epochs.inner", "", 3, None])
def test_an_unknown_key_is_told(key: Any) -> None:
    (problem,) = problems_of({key: 1})
    assert problem.startswith(f"layer 0: unknown setting {str(key)!r}; ")


def test_collected_keeps_only_user_errors() -> None:
    problems: list[str] = []
    with collected(problems):
        raise UserError("told")
    assert problems == ["told"]
    with pytest.raises(ValueError, match="a bug"), collected(problems):
        raise ValueError("a bug")


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_help_a_type_in_words_and_a_default_that_breaks_no_rule(name: str) -> None:
    field = FIELDS[name]
    assert field.metadata["help"]
    assert "typing" not in describe_type(name) and "<" not in describe_type(name)
    assert same(resolve([Layer("test", {name: default_of(field)})])[0], RunConfig())
    assert name in TYPES


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="epochs"):
        RunConfig().epochs = 3  # type: ignore[misc]


LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.dates(), st.datetimes(), st.binary()),
    st.sampled_from(
        ["[" * 3000, "[1, 2", "{a: ", "&a [*a]", "0x_", "2020-13-45", "!!int ''", "None", "1e999", "\udcff"]
    ),
)
RAW = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner), max_leaves=5
)
KEYS = st.one_of(st.sampled_from(list(FIELDS)), st.sampled_from(list(FIELDS)).map(lambda name: name + ".x"), st.text())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(KEYS, RAW, max_size=6), max_size=3))
@example([{"stage_strides": "[" * 3000}, {"policy_options": "&a {a: *a}"}])
def test_nothing_but_a_user_error_comes_of_any_mapping(layers: list[dict[str, Any]]) -> None:
    try:
        config, _ = resolve([Layer("test", values) for values in layers])
    except UserError as error:
        assert str(error)
    else:
        yaml.safe_dump(to_dict(config))


# --- YAML files ---


def written(folder: Path, content: str | bytes) -> Path:
    """Returns a new file of that content."""
    path = folder / "settings.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_yaml_file_gives_its_mapping(tmp_path: Path) -> None:
    content = "# a comment\nlr_max: 1e-5\nnesterov: 'false'\npolicy_options: {cutout: 16}\n"
    values = read_yaml(written(tmp_path, content))
    assert values == {"lr_max": "1e-5", "nesterov": "false", "policy_options": {"cutout": 16}}
    config, _ = resolve([Layer("file", {**values, "lr_min": 0})])
    assert (config.lr_max, config.nesterov) == (1e-5, False)


def test_an_empty_yaml_file_gives_nothing(tmp_path: Path) -> None:
    assert read_yaml(written(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must hold a mapping of settings, but got list"),
        ("just text", "must hold a mapping of settings, but got str"),
        ("a: [1, 2\n", "is not YAML: .*line 2"),
        ("a: b: c\n", "is not YAML: mapping values are not allowed here"),
        ("when: 2020-13-45\n", "is not YAML: month must be in 1..12"),
        ("epochs: 3\nlr_max: 1\nepochs: 4\n", "is not YAML: the key 'epochs' is there twice"),
        ("policy_options: {flip: 1, flip: 0}\n", "is not YAML: the key 'flip' is there twice"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not YAML: could not determine a constructor"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "cannot read .*: 'utf-8' codec can't decode"),
        (b"epochs: \x00", "is not YAML: unacceptable character"),
        ("[" * 5000, "is not YAML: "),
    ],
)
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path)
    assert repr(str(path)) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read '.*/none\.yaml': No such file or directory"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"cannot read '.*': Is a directory"):
        read_yaml(tmp_path)
