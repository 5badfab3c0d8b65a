"""Whatever stands on the command line, in YAML files, distributions and run folders: it is taken, or told in lines."""

import contextlib
import io
import json
import math
import random
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_inputs import SUMMARY, SWEEP, sound_run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_config import RAW

from eva.api import compare
from eva.cli import main
from eva.config import FIELDS, Layer, UserError, read_yaml, to_dict
from eva.distributions import KINDS, Distribution, config_problems
from eva.recipes import configure
from eva.sweep_check import check_file
from eva.sweep_file import inspect_sweep

fuzzed = settings(
    deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# --- the command line ---

# What the system can hand over: no NUL, but bytes that are no UTF-8.
WORD = st.text(st.characters(exclude_characters="\0"), max_size=12)
STRANGE = (
    *("", " ", "-", "--", "=", "nan", "-nan", "inf", "-inf", "1e999", "-1", "0", "1e-400", "9" * 400, "9" * 5000),
    *("None", "null", "~", "true", "False", "[", "[]", "{}", "[1", "{'a':", "[nan]", "{a: nan}", "&a [*a]", "find"),
    *("!!python/object:os.system", "0x10", "1_000", "٣", "½", "\udcff", "é", "💥", "a" * 5000, "\n", "\r", "\x1b[31m"),
    *("\u2028", "\u202e", "%s", "%", "{0}", "${args}", "../..", "~root", "*", "a.json", "{", "{}", '{"epochs": 1e999}'),
)
VALUE = st.sampled_from(STRANGE) | WORD
SETTING = st.sampled_from([*FIELDS, "policy_options.flip", "policy_options.", "epochs.x", "no_such"])
GIVEN = st.one_of(
    VALUE,
    st.builds("--{}={}".format, SETTING, VALUE),
    st.builds("{}={}".format, SETTING, VALUE),
    st.builds("--{}".format, SETTING),
)
FLAGS = {
    "train": ("--list", "--show_policy", "--resume", "--config"),
    "find_lr": ("--write_sweep", "--config"),  # --show_schedule draws as many steps as it is told
    "evaluate": (),
    "compare": ("--metric", "--out", "--publish", "--project", "--dry_run"),
    "sweep": (
        *("--check", "--skip_check", "--out", "--resume", "--count", "--workers", "--gpus", "--seed", "--storage"),
        *("--name", "--isolate", "--retries", "--retry_failed", "--repeat_best", "--seeds", "--publish", "--project"),
    ),
    "agent": ("--gpus", "--count"),
    "sync": (),
    "doctor": ("--json", "--disk", "--config"),
}
# Comes last, so that nothing that is drawn begins a training.
STOP = {
    "train": ["--model=no such model", "model=no such model"],
    "find_lr": ["--model=no such model", "model=no such model"],
    "doctor": ["--model=no such model", "model=no such model"],
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command, then any words: its flags with and without values, settings, and what is neither."""
    command = draw(st.sampled_from(sorted(FLAGS)))
    flags = FLAGS[command]
    own = st.sampled_from(flags) | st.builds("{}={}".format, st.sampled_from(flags), VALUE) if flags else GIVEN
    words = draw(st.lists(own | GIVEN, max_size=6))
    # A walk through all of this machine's folders would take too long.
    words = [word for word in words if not word.startswith(("/", "..", "~")) and "/." not in word]
    return [command, *words, *STOP.get(command, [])]


@fuzzed
@given(command_lines())
@example(["train", '{"tags": ' + "[" * 9000, "--model=no such model"])
@example(["train", "--resume=\udcff"])
@example(["find_lr", "--config=--", "--model=no such model"])
@example(["sweep", "--out=--"])
@example(["find_lr", "--config=" + "a" * 5000])
@example(["evaluate", "\udcff"])
@example(["evaluate", "a/b:c", "--split"])
@example(["compare", "a/b", "--publish"])
@example(["compare", "\x1b[31m"])
@example(["sweep", "a.yaml", "--storage=://"])
@example(["sweep", "a.yaml", "--workers=" + "9" * 5000])
@example(["sweep", "--resume=\udcff", "--count=٣"])
@example(["agent", "a/b/c", "--gpus=,", "--count=nan"])
@example(["agent", "--gpus=0"])
@example(["sync", "\udcff"])
@example(["sync", "\ud800", "--"])
@example(["sync", "a" * 5000])
@example(["doctor", "--disk", "\udcff", "a" * 5000])
@example(["doctor", "--json", "--disk"])
@example(["\ud800"])
def test_every_command_line_is_taken_or_told_in_lines(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    errors = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.chdir(folder)
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = main(words)
            except SystemExit as leaving:  # argparse's way out; 0 after "-h"
                assert leaving.code in (0, 2)
                return
    assert code == 2 or (code == 0 and "--list" in words)
    told = errors.getvalue().removesuffix("\n").split("\n")
    assert all(line.startswith(f"eva {words[0]}: error: ") for line in told if code)
    assert all(len(line) < 3000 + max(map(len, words)) for line in told)


# --- YAML files ---

VALID = yaml.safe_dump(to_dict(configure(Layer("test", {"recipe": "resnet9-onecycle"}))[0]), sort_keys=False)
SYNTAX = (
    *("[", "]", "{", "}", ":", "- ", "? ", "&a ", "*a ", "<<: *a", "!!python/object/apply:os.mkdir [executed]"),
    *("!!binary ", "!!int ", "!!float ", "!!timestamp ", "!!set ", "---\n", "...\n", "%YAML 9", "\t", "\n"),
    *(".nan", ".inf", "2020-13-45", "0o9", "1__0", "99:99:99", "9" * 5000, "\x85", "\u2028", "\ufeff"),
    *('"', "\\", "=", "|", ">", "'", "~", "yes"),
)


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """A text in which a few places are cut out, doubled, or replaced by what means something to YAML."""
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.integers(0, 30)))
        put = draw(st.sampled_from(SYNTAX) | st.text(max_size=5) | st.just(text[begin:end] * 2))
        text = text[:begin] + put + text[end:]
    return text


def nested(depth: int, opening: str) -> bytes:
    """Brackets in brackets."""
    return b"epochs: " + depth * opening.encode()


YAML = st.one_of(
    st.binary(max_size=60),
    st.text(st.sampled_from([*string.printable, "\x85", "\ufeff"]), max_size=60).map(lambda text: text.encode()),
    st.builds(nested, st.sampled_from([10, 200, 400, 900, 3000]), st.sampled_from(["[", "{a: ", "- ", "? "])),
    mutated(VALID).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=5), RAW, max_size=4).map(
        lambda values: yaml.dump(values, encoding="utf-8")
    ),
)


@fuzzed
@given(YAML)
@example(b"")
@example(b"\xef\xbb\xbfepochs: 3\n")
def test_every_file_of_settings_is_taken_or_told_in_lines(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.chdir(folder)
        Path("c.yaml").write_bytes(content)
        try:
            config, _ = configure(Layer("command line", {}), "c.yaml")
        except UserError as error:
            assert all(line.strip() and len(line) < 3000 for line in str(error).split("\n"))
        else:
            Path("again.yaml").write_text(yaml.safe_dump(to_dict(config)))
            assert repr(configure(Layer("command line", {}), "again.yaml")[0]) == repr(config)
        assert not Path("executed").exists()


@pytest.mark.parametrize("branches", [2, 10, 100])
def test_aliases_of_aliases_take_neither_time_nor_memory(tmp_path: Path, branches: int) -> None:
    """A billion values and more, in files of settings and of sweeps, wherever they stand."""
    depth = math.ceil(9 / math.log10(branches))
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * branches)}]" for n in range(1, depth + 1)]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="at most 100000 values, aliases followed"):
        read_yaml(path)
    sweep, (problem,) = inspect_sweep(path)
    assert sweep is None and "at most 100000 values, aliases followed" in problem.text


@fuzzed
@given(YAML | mutated(SWEEP).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_every_sweep_is_taken_or_told_in_lines(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.chdir(folder)
        Path("s.yaml").write_bytes(content)
        sweep, problems = inspect_sweep("s.yaml")
        assert sweep is not None or problems
        assert all(problem.text.strip() and "\n" not in problem.text for problem in problems)
        try:
            check_file(Path("s.yaml"), None, 1, measure=False)
        except UserError as error:
            assert all(line.startswith("s.yaml:") for line in str(error).split("\n"))
        else:
            assert not problems
        assert not Path("executed").exists()


# --- distributions ---

NUMBER = st.one_of(
    st.sampled_from([0, 1, -1, 0.5, 1e-320, 1e308, -1e308, 10**400, -(10**400), 2**63, 2**53 + 1, 0.1, 709, 710, -746]),
    st.integers(-1000, 1000),
    st.floats(),
    st.booleans(),
)
PARAMETER = st.fixed_dictionaries(
    {},
    optional={
        "distribution": st.sampled_from([*KINDS, "gamma", "", 3, None]),
        **{key: NUMBER | RAW for key in ("min", "max", "mu", "sigma", "a", "b", "q", "value")},
        "values": st.lists(NUMBER | RAW, max_size=4) | RAW,
        "probabilities": st.lists(st.sampled_from([0, 0.25, 0.5, 1]) | NUMBER, max_size=4) | RAW,
    },
)


@st.composite
def likely(draw: st.DrawFn) -> dict[str, Any]:
    """A parameter with just the keys of its kind, which is mostly sound."""
    name = draw(st.sampled_from(sorted(KINDS)))
    kind = KINDS[name]
    return {"distribution": name, **{key: draw(NUMBER) for key in kind.keys if key != "distribution"}}


@settings(fuzzed, max_examples=600)
@given(PARAMETER | likely(), st.booleans())
def test_every_distribution_has_values_or_problems(config: dict[str, Any], repeats: bool) -> None:
    problems = config_problems(config, repeats)
    if problems:
        assert all(text and "\n" not in text and len(text) < 1000 for _, text in problems)
        with pytest.raises(UserError, match=r"\S"):
            Distribution.from_config(config, repeats)
        return
    distribution = Distribution.from_config(config, repeats)
    for quantile in (0.0, 0.25, 0.5, random.Random(0).random(), 1 - 2**-53):
        value = distribution.value_at(quantile)
        if not distribution.values:
            assert isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if distribution.grid_size is not None and distribution.grid_size <= 1000:
        assert distribution.grid_values is not None and len(distribution.grid_values) == distribution.grid_size


# --- run folders ---

ODD = st.sampled_from(
    [
        *(None, True, "", "NaN", "find", -1, 0, 1e308, math.nan, 10**400, "<b>", "\u2028"),
        *([], [1, "a"], {"a": {"b": [1]}}, {}),
    ]
)
TABLES = st.sampled_from(
    [
        *("", "\n\n", ",,\n1,2,3\n", "a,a\n1,2\n", "trainer/step\n1\n", "trainer/step,train/loss\nx,y\n"),
        *("epoch\n", "epoch,val/accuracy\nnan,5\n", "trainer/step,epoch,train/loss\n1,nan,inf\n2,1e400,-inf\n"),
    ]
)
EVALUATION = {"split": "test", "count": 2, "accuracy": 0.5, "top_k": {"1": 0.5, "3": 1.0}, "loss": 0.5, "tta": "none"}
WHOLE = {**SUMMARY, "evaluation": EVALUATION, "found": ["lr_max"], "seconds": 3.0, "hardware": {"device": "cpu"}}
CHANGES = st.fixed_dictionaries(
    {
        "summary": st.dictionaries(st.sampled_from(sorted(WHOLE.keys() - {"job", "wandb_id"})), ODD, max_size=3),
        "evaluation": st.dictionaries(st.sampled_from(sorted(EVALUATION)), ODD, max_size=2),
        "config": st.dictionaries(st.sampled_from(sorted(FIELDS)), ODD, max_size=3),
    },
    optional={"history.csv": TABLES, "epochs.csv": TABLES, "lr_range.csv": TABLES, "predictions.npz": st.just("")},
)


@settings(fuzzed, max_examples=60)
@given(st.lists(CHANGES, min_size=1, max_size=3), st.none() | st.sampled_from(["accuracy", "seconds", "top3_accuracy"]))
def test_every_run_folder_is_compared_or_told_in_lines(
    monkeypatch: pytest.MonkeyPatch, runs: list[dict[str, Any]], metric: str | None
) -> None:
    """Whatever a damaged one, or one of another version, has in the place of what is expected."""
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.chdir(folder)
        for number, changes in enumerate(runs):
            path = Path("runs", str(number))
            sound_run(str(path))
            evaluation = {**EVALUATION, **changes["evaluation"]}
            summary = {**WHOLE, "evaluation": evaluation, "wandb_id": f"id{number}", **changes["summary"]}
            (path / "summary.json").write_text(json.dumps(summary))
            config = {**yaml.safe_load((path / "config.yaml").read_text()), "seed": number, **changes["config"]}
            (path / "config.yaml").write_text(yaml.safe_dump(config))
            for name in changes.keys() - {"summary", "evaluation", "config"}:
                (path / name).write_text(changes[name])
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                compare("runs", metric=metric)
        except UserError as error:
            assert "unknown metric" in str(error) or "no run has any metric" in str(error)
        else:
            assert len(json.loads(Path("comparison", "compare.json").read_text())["runs"]) == len(runs)
