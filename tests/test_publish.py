"""What is published, read back by the package that made it, and held against what eva logs and W&B's client sends.

W&B's client, and a dry run that must not reach for it, run in processes of their own, which call the first functions
of this file.
"""

import fnmatch
import html
import itertools
import json
import os
import re
import string
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from loopback import LoopbackServer, Refusal
from loopback_records import Json, Run
from made_runs import made_labels, made_predictions, made_record

from eva.comparison import Comparison, Row, compare
from eva.config import UserError
from eva.publish import escape, publish
from eva.records import RunRecord

# wandb-workspaces still declares its validators the old way.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")

PROJECT = "loopback/digits"
NAMES = ("<script>alert(1)</script>", "a|b", "*bold* _it_ `code` [x](http://y)", "1. $x$ & #2", "plain")
LABELS = made_labels(120)


def made_records() -> list[RunRecord]:
    """Returns two seeds of each of two configurations, and one more run, which watched val."""
    settings: list[dict[str, Any]] = [
        *({"norm": norm, "seed": seed, "lr_max": lr, "policy_options": {"cutout": cutout}}
          for norm, lr, cutout in (("batch", 0.1, 8), ("layer", 0.01, 16)) for seed in (0, 1)),
        {"norm": "batch", "seed": 0, "lr_max": 0.1, "epochs": 3},
    ]  # fmt: skip
    errors = (0.05, 0.1, 0.5, 0.55, 0.3)
    return [
        made_record(
            name,
            f"run-{number}",
            config,
            predictions=made_predictions(LABELS, number, error),
            lr_range=number == 0,
            watched="val" if number == 4 else "test",
        )
        for number, (name, config, error) in enumerate(zip(NAMES, settings, errors, strict=True))
    ]


def dry_run(folder: str) -> None:
    """Publishes to nowhere, in a process that ends at once where it reaches for a network or another program."""

    def watch(event: str, arguments: object) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.fork"):
            os.write(2, f"{event} {arguments}".encode())
            os._exit(9)

    sys.addaudithook(watch)
    print("\n".join(publish(compare(made_records()), PROJECT, Path(folder), dry_run=True)))


def publish_online() -> None:
    """Publishes for good, and prints what publish returned, or its UserError."""
    try:
        print("\n".join(publish(compare(made_records()), PROJECT, Path("nowhere"), dry_run=False)))
    except UserError as error:
        print(f"UserError: {error}")


VIEWS = ("workspace", "report")


@dataclass(frozen=True)
class Offline:
    """What a dry run said and wrote."""

    lines: list[str]
    workspace: Json
    report: Json

    def view(self, name: str) -> Json:
        """Returns one of the two."""
        return {"workspace": self.workspace, "report": self.report}[name]


@pytest.fixture(scope="module")
def offline(clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Offline:
    """A dry run of all made runs."""
    home = tmp_path_factory.mktemp("offline")
    done = call("dry_run('made/here')", home, clean_environment)
    assert done.returncode == 0, done.stderr
    workspace, report = (json.loads((home / "made" / "here" / f"{name}.json").read_text()) for name in VIEWS)
    return Offline(done.stdout.splitlines(), workspace, report)


def call(function: str, home: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Returns what a function of this file did in a process of its own."""
    variables = {**environment, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", f"import test_publish; test_publish.{function}"]
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command, cwd=home, env=variables, check=False, **options)


def dry(comparison: Comparison, folder: Path) -> tuple[Json, Json]:
    """Returns the workspace and the report that a dry run writes."""
    publish(comparison, PROJECT, folder, dry_run=True)
    workspace, report = (json.loads((folder / f"{name}.json").read_text()) for name in VIEWS)
    return workspace, report


def workspace_panels(workspace: Json) -> dict[str, list[Json]]:
    """Returns the panels of each section."""
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def report_grids(report: Json) -> dict[str, Json]:
    """Returns the panel grids by the headings above them."""
    blocks = report["spec"]["blocks"]
    pairs = itertools.pairwise(blocks)
    return {above["children"][0]["text"]: block for above, block in pairs if block["type"] == "panel-grid"}


def all_panels(view: Json) -> list[Json]:
    """Returns the panels of a workspace or a report."""
    if "section" in view["spec"]:
        return [panel for panels in workspace_panels(view).values() for panel in panels]
    grids = [grid["metadata"]["panelBankSectionConfig"]["panels"] for grid in report_grids(view).values()]
    return [panel for panels in grids for panel in panels]


def panels_of(view: Json, kind: str) -> list[Json]:
    """Returns the configurations of the panels of one of W&B's types."""
    return [panel["config"] for panel in all_panels(view) if panel["viewType"] == kind]


def markdown(report: Json) -> str:
    """Returns all Markdown of a report."""
    return "\n\n".join(block["content"] for block in report["spec"]["blocks"] if block["type"] == "markdown-block")


def without(value: Any, *names: str) -> Any:
    """Returns plain nested values without the entries of these names."""
    if isinstance(value, Mapping):
        return {name: without(inner, *names) for name, inner in value.items() if name not in names}
    return [without(inner, *names) for inner in value] if isinstance(value, list) else value


# The specification


def test_a_dry_run_writes_both_specifications_without_a_socket_or_another_program(
    offline: Offline,
) -> None:
    workspace, report = offline.workspace, offline.report
    assert offline.lines == [f"{name} specification: made/here/{name}.json" for name in VIEWS]
    assert (workspace["entity"], workspace["project"]) == ("loopback", "digits")
    assert (report["project"]["entityName"], report["project"]["name"]) == ("loopback", "digits")
    assert workspace["displayName"] == report["displayName"] == "Comparison of 5 runs by test_accuracy_best"


def test_the_package_reads_both_specifications_back_as_they_are(offline: Offline) -> None:
    from wandb_workspaces.reports.v2 import internal as report_models
    from wandb_workspaces.workspaces import internal as workspace_models

    workspace, report = offline.workspace, offline.report
    view = workspace_models.View.model_validate(workspace)
    assert json.loads(view.model_dump_json(by_alias=True, exclude_none=True)) == workspace
    panels = [panel for section in view.spec.section.panel_bank_config.sections for panel in section.panels]
    read = report_models.ReportViewspec.model_validate(report)
    # Its reader gives each heading an empty list of comments.
    assert without(json.loads(read.model_dump_json(by_alias=True, exclude_none=True)), "inlineComments") == report
    for block in read.spec.blocks:
        assert not isinstance(block, report_models.UnknownBlock)
        if isinstance(block, report_models.PanelGrid):
            panels += block.metadata.panel_bank_section_config.panels
    # What its models don't take, the package keeps as an unknown panel and says nothing.
    assert {type(panel) for panel in panels} <= set(report_models.panel_type_mapping.values())
    assert len(panels) > 40


def test_the_package_makes_the_same_objects_of_the_specification(offline: Offline) -> None:
    from wandb_workspaces.reports.v2 import interface as wr
    from wandb_workspaces.workspaces import interface as ws
    from wandb_workspaces.workspaces import internal

    made = ws.Workspace._from_model(internal.View.model_validate(offline.workspace))
    curves, settings = made.sections[0].panels, made.sections[1].panels
    assert isinstance(curves[0], wr.LinePlot)
    assert (curves[0].x, curves[0].y) == (
        wr.Metric("epoch"),
        [wr.Metric("val/accuracy"), wr.Metric("test/accuracy")],
    )
    assert wr.Config("policy_options.cutout") in [column.metric for column in settings[0].columns]
    assert settings[0].columns[-1].metric == wr.SummaryMetric("test_accuracy_best")
    assert settings[1].with_respect_to == "test_accuracy_best"


# Curves


@pytest.mark.parametrize("name", VIEWS)
def test_every_curve_has_the_axis_that_it_was_logged_for(offline: Offline, name: str) -> None:
    from eva.loop import BATCH_COLUMNS, epoch_columns
    from eva.tracker import EPOCH_METRICS, STEP_METRICS

    axes = {**dict.fromkeys(STEP_METRICS, "trainer/step"), **dict.fromkeys(EPOCH_METRICS, "epoch")}
    axes["lr_range/*"] = "lr_range/lr"
    logged = {*BATCH_COLUMNS, *epoch_columns("val"), *epoch_columns("test"), "lr_range/loss", "lr_range/smoothed"}
    curves = panels_of(offline.view(name), "Run History Line Plot")
    shown = {key for config in curves for key in config["metrics"]}
    assert shown <= logged
    assert shown == {
        *("train/loss", "train/accuracy", "lr", "train_epoch/loss", "train_epoch/accuracy"),
        *(f"{split}/{name}" for split in ("val", "test") for name in ("loss", "accuracy", "accuracy_best")),
        *("lr_range/loss", "lr_range/smoothed"),
    }
    for config in curves:
        for key in config["metrics"]:
            assert [config["xAxis"]] == [axis for pattern, axis in axes.items() if fnmatch.fnmatchcase(key, pattern)]
        assert config.get("xLogScale", False) == (config["xAxis"] == "lr_range/lr")


def test_no_curve_hides_a_run(tmp_path: Path) -> None:
    records = [made_record(f"run {number}", f"id{number}", {"seed": number}) for number in range(14)]
    workspace, report = dry(compare(records), tmp_path)
    assert workspace["spec"]["section"]["settings"]["maxRuns"] == 14
    assert {config["limit"] for view in (workspace, report) for config in panels_of(view, "Run History Line Plot")} == {
        14
    }


# Settings


def as_wandb_keeps(row: Row) -> Json:
    """Returns config and summary of a run as W&B's database has them: each entry of a config below `value`."""
    config = {name: {"value": value} for name, value in row.record.config.items()}
    return {"config": config, "summary": dict(row.record.summary)}


def look_up(accessor: str, run: Json) -> Any:
    """Returns what an accessor SECTION:DOTTED.PATH means in a run; None if there is nothing."""
    section, path = accessor.split(":")
    value = run[section]
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def test_each_axis_of_the_parallel_coordinates_leads_to_the_setting_that_it_is_called_after(tmp_path: Path) -> None:
    records = made_records()[:4]
    comparison = compare(records, "accuracy")
    evaluated = [row.metrics["accuracy"] for row in comparison.rows]
    workspace, report = dry(comparison, tmp_path)
    for view in (workspace, report):
        (plot,) = panels_of(view, "Parallel Coordinates Plot")
        assert [axis["displayName"] for axis in plot["columns"]] == [*comparison.settings, "accuracy"]
        for row, accuracy in zip(comparison.rows, evaluated, strict=True):
            run = as_wandb_keeps(row)
            run["summary"]["evaluation"] = {"accuracy": accuracy}
            found = {axis["displayName"]: look_up(axis["accessor"], run) for axis in plot["columns"]}
            assert found == {**{name: row.settings[name] for name in comparison.settings}, "accuracy": accuracy}
        assert [axis["displayName"] for axis in plot["columns"] if axis.get("log")] == ["lr_max"]
        (importance,) = panels_of(view, "Parameter Importance")
        assert importance["targetKey"] == "evaluation.accuracy"


def test_config_keys_are_written_as_wandb_has_them(offline: Offline) -> None:
    for view in (offline.workspace, offline.report):
        (plot,) = panels_of(view, "Parallel Coordinates Plot")
        accessors = [axis["accessor"] for axis in plot["columns"]]
        assert accessors[-1] == "summary:test_accuracy_best"
        assert set(accessors[:-1]) == {
            *("config:policy_options.value.cutout", "config:norm.value", "config:epochs.value"),
            *("config:lr_max.value", "config:seed.value"),
        }
    (run_set,) = offline.workspace["spec"]["section"]["runSets"]
    assert set(run_set["runFeed"]["columnPinned"]) == {"run:displayName", *accessors}


def test_a_rate_that_was_found_is_read_from_the_summary_and_no_seeds_are_grouped_by_it(tmp_path: Path) -> None:
    found = [
        made_record(f"found {seed}", f"f{seed}", {"lr_max": "find", "seed": seed}, {"lr_max": 0.3 + seed})
        for seed in (0, 1)
    ]
    given = [
        made_record(f"given {seed}", f"g{seed}", {"lr_max": 0.1, "seed": seed}, {"lr_max": 0.1}) for seed in (0, 1)
    ]
    workspace, report = dry(compare([*found, *given]), tmp_path)
    (plot,) = panels_of(workspace, "Parallel Coordinates Plot")
    assert "summary:lr_max" in [axis["accessor"] for axis in plot["columns"]]
    assert not any(grid["metadata"]["runSets"][0]["grouping"] for grid in report_grids(report).values())


@pytest.mark.parametrize(
    ("metric", "key", "ascending"),
    [
        ("test_accuracy_best", "test_accuracy_best", False),
        ("loss", "evaluation.loss", True),
        ("top3_accuracy", "evaluation.top_k.3", False),
    ],
)
def test_runs_are_ordered_by_the_metric_and_good_values_are_on_top(
    tmp_path: Path, metric: str, key: str, ascending: bool
) -> None:
    workspace, report = dry(compare(made_records(), metric), tmp_path)
    run_sets = [run_set for grid in report_grids(report).values() for run_set in grid["metadata"]["runSets"]]
    for run_set in (*workspace["spec"]["section"]["runSets"], *run_sets):
        assert run_set["sort"]["keys"] == [{"key": {"section": "summary", "name": key}, "ascending": ascending}]
    (plot,) = panels_of(workspace, "Parallel Coordinates Plot")
    assert plot["columns"][-1]["accessor"] == f"summary:{key}"
    assert plot["columns"][-1].get("inverted", False) == ascending


def test_a_metric_that_wandb_does_not_have_is_asked_of_no_panel(tmp_path: Path) -> None:
    workspace, report = dry(compare(made_records(), "mce"), tmp_path)
    for view in (workspace, report):
        assert not panels_of(view, "Parallel Coordinates Plot")
        assert not panels_of(view, "Parameter Importance")
        assert panels_of(view, "Run Comparer") == [{"diffOnly": "split"}]
    assert "mce" in markdown(report)


# The runs


def test_only_the_compared_runs_are_shown_whatever_their_ids(tmp_path: Path) -> None:
    ids = ["a=b", "it's", 'say "x"', "x < y and z", "plain_1-2", "\N{SNOWMAN}", "back\\slash"]
    workspace, report = dry(compare([made_record(f"run {id}", id, {"epochs": 1 + len(id)}) for id in ids]), tmp_path)
    (run_set,) = workspace["spec"]["section"]["runSets"]
    own, evaluations = run_set["filters"]["filters"]
    assert (own["key"], own["op"]) == ({"section": "run", "name": "name"}, "IN")
    assert sorted(own["value"]) == sorted(ids)
    assert (evaluations["key"], evaluations["op"]) == ({"section": "config", "name": "into"}, "IN")
    assert (sorted(evaluations["value"]), evaluations["connector"]) == (sorted(ids), "OR")
    filters = [grid["metadata"]["runSets"][0]["filters"]["filters"] for grid in report_grids(report).values()]
    assert all(sorted(conditions[0]["value"]) == sorted(ids) for conditions in filters)


def test_separate_evaluations_are_shown_only_where_evaluations_are(offline: Offline) -> None:
    grids = report_grids(offline.report)
    both = {name for name, grid in grids.items() if len(grid["metadata"]["runSets"][0]["filters"]["filters"]) == 2}
    assert both == {"Misclassified images", "Galleries and Grad-CAM", "Charts"}


def test_seeds_of_a_configuration_are_one_line_in_the_report(offline: Offline) -> None:
    grid = report_grids(offline.report)["Mean and deviation over the seeds"]
    (run_set,) = grid["metadata"]["runSets"]
    assert {f"{key['section']}:{key['name']}" for key in run_set["grouping"]} == {
        *("config:policy_options.value.cutout", "config:norm.value", "config:epochs.value", "config:lr_max.value"),
    }
    for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]:
        assert (panel["config"]["groupAgg"], panel["config"]["groupArea"]) == ("mean", "stddev")
    assert offline.workspace["spec"]["section"]["runSets"][0]["grouping"] == []


def test_seeds_alone_are_one_group(tmp_path: Path) -> None:
    _, report = dry(compare(made_records()[:2]), tmp_path)
    (run_set,) = report_grids(report)["Mean and deviation over the seeds"]["metadata"]["runSets"]
    assert run_set["grouping"] == [{"section": "config", "name": "model.value"}]  # the same in both


def test_single_runs_of_every_configuration_are_not_grouped(tmp_path: Path) -> None:
    _, report = dry(compare([made_records()[0], made_records()[2]]), tmp_path)
    assert "Mean and deviation over the seeds" not in report_grids(report)


# Pictures, tables and charts


@dataclass
class Logged:
    """Stands where a W&B run would, and keeps what is logged."""

    rows: dict[str, Any]

    def log(self, row: Mapping[str, Any], step: int, commit: bool) -> None:
        self.rows.update(row)

    def log_artifact(self, artifact: object, aliases: list[str]) -> None:
        """Is not looked at."""


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an evaluation logs, by key: wandb's own objects."""
    import torch
    import wandb
    from torch import nn

    from eva import inspection
    from eva.config import RunConfig
    from eva.data import Split
    from eva.hardware import Hardware
    from eva.tracker import WandbTracker

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    images = torch.rand(12, 3, 32, 32)
    labels = np.arange(12) % 3
    pixels = (images.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    split = Split(pixels, labels, np.array([f"test/{number}" for number in range(12)]))
    batches = [(images, torch.from_numpy(labels))]
    config = replace(RunConfig(), gradcam_layers=("0",))
    fp32 = Hardware(torch.device("cpu"), None, torch.contiguous_format)
    found = inspection.inspect(model, split, batches, config, fp32, ("a", "b", "c"), "f" * 64)
    folder = tmp_path_factory.mktemp("logged")
    for name in ("predictions.npz", "misclassified.npz", "evaluation.json"):
        (folder / name).touch()
    tracker, run = WandbTracker(config, {}, "evaluate", folder, "id", "offline"), Logged({})
    vars(tracker).update(_wandb=wandb, _run=run)
    inspection.log(found, folder, tracker, "id", {})
    return run.rows


@pytest.mark.parametrize("name", VIEWS)
def test_every_key_that_an_evaluation_logs_is_shown_and_no_other(
    offline: Offline, logged: dict[str, Any], name: str
) -> None:
    view = offline.view(name)
    media = {key for config in panels_of(view, "Media Browser") for key in config["mediaKeys"]}
    of_evaluation = {key for key in media if key.startswith("galleries/")}
    (table,) = panels_of(view, "Weave")
    of_table = table["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]
    charts = {table_key(config).removesuffix("_table") for config in panels_of(view, "Vega2")}
    assert {*of_evaluation, of_table, *charts} == set(logged)
    assert media - of_evaluation == {"lr_range/curve", "figures/accuracy", "figures/loss", "figures/lr"}


def table_key(config: Json) -> str:
    """Returns which table a chart asks W&B for."""
    (query,) = config["userQuery"]["queryFields"]
    (field,) = [field for field in query["fields"] if field["name"] == "summaryTable"]
    return str(field["args"][0]["value"])


@pytest.mark.parametrize("name", VIEWS)
def test_each_chart_is_the_one_that_wandb_makes_of_what_was_logged(
    offline: Offline, logged: dict[str, Any], name: str
) -> None:
    configs = {table_key(config): config for config in panels_of(offline.view(name), "Vega2")}
    charts = {key: chart for key, chart in logged.items() if key.startswith("charts/")}
    assert len(configs) == len(charts) == 4
    for key, chart in charts.items():
        chart.set_key(key)
        theirs, ours = chart.spec.config_value["panel_config"], configs[chart.spec.table_key]
        for part in ("panelDefId", "fieldSettings", "transform"):
            assert ours[part] == theirs[part]
        assert set(theirs["fieldSettings"].values()) <= set(chart.table.columns)
        assert set(ours["stringSettings"]) == set(theirs["stringSettings"])
        query, expected = ours["userQuery"]["queryFields"][0], theirs["userQuery"]["queryFields"][0]
        assert query["name"] == expected["name"]
        assert query["args"][0] == expected["args"][0]
        assert query["fields"][-1] == expected["fields"][-1]
        assert sorted(field["name"] for field in query["fields"]) == sorted(
            field["name"] for field in expected["fields"]
        )


def test_pictures_have_a_column_a_run_and_lie_beside_their_maps(offline: Offline) -> None:
    for config in panels_of(offline.workspace, "Media Browser"):
        assert (config["mode"], config["gridSettings"]) == ("grid", {"xAxis": "run", "yAxis": "index"})
    grid = report_grids(offline.report)["Galleries and Grad-CAM"]
    places = {
        panel["config"]["mediaKeys"][0].removeprefix("galleries/"): panel["layout"]
        for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]
    }
    for name in ("misclassified", "correct"):
        left, right = places[name], places[f"gradcam_{name}"]
        assert (left["x"], left["w"], right["x"], right["w"]) == (0, 12, 12, 12)
        assert left["y"] == right["y"]


def test_panels_of_a_report_do_not_overlap_and_stay_within_its_width(offline: Offline) -> None:
    for grid in report_grids(offline.report).values():
        covered: set[tuple[int, int]] = set()
        for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]:
            at = panel["layout"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not covered & cells
            assert max(x for x, _ in cells) < 24
            covered |= cells


def test_what_no_run_has_gets_no_panel(tmp_path: Path) -> None:
    bare = replace(made_record("bare", "bare"), history={}, epochs={})
    workspace, report = dry(compare([bare]), tmp_path)
    assert all_panels(workspace) == all_panels(report) == []
    without_maps = made_record("flat", "flat", predictions=made_predictions(LABELS, 0, map_side=None))
    workspace, _ = dry(compare([without_maps]), tmp_path)
    keys = {key for config in panels_of(workspace, "Media Browser") for key in config["mediaKeys"]}
    assert {"galleries/correct", "galleries/misclassified"} == {key for key in keys if key.startswith("galleries/")}


# The words


def unescaped(text: str) -> str:
    """Returns what a reader of CommonMark sees of a text without markup: backslash escapes and references undone."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text))


@given(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")) | st.sampled_from(" |*_`<>&[]()!#~$\\1.-+")))
@example(string.punctuation)
def test_escaped_text_reads_as_it_was_and_holds_no_markup(text: str) -> None:
    escaped = escape(text)
    bare = re.sub(r"\\[!-/:-@\[-`{-~]|&#\d+;", "", escaped)
    assert not set(bare) & set("\\`*_{}[]()#+-.!~$^=:@/&<>|")
    assert unescaped(escaped.replace("&#92;", "")) == text


def test_a_name_cannot_break_the_line_that_it_stands_in() -> None:
    assert "\n" not in escape("first\n\n# second\r\x1b[31m")


def test_names_of_users_are_text_in_the_report(offline: Offline) -> None:
    said = markdown(offline.report)
    assert "<" not in said
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    table = rows[: 2 + len(NAMES)]
    assert {line.count("|") for line in table} == {8}  # run, metric and five settings, with one bar more
    assert {unescaped(line.split(" | ")[0].removeprefix("| ")) for line in table[2:]} == set(NAMES)
    assert "<script>" not in json.dumps(
        [block for block in offline.report["spec"]["blocks"] if block["type"] != "panel-grid"]
    )


def test_the_report_says_what_the_tests_say(offline: Offline) -> None:
    comparison = compare(made_records())
    said = unescaped(markdown(offline.report)).replace("**", "")
    (images,) = comparison.image_sets
    best = next(iter(images.predictions))
    tests = [test for test in images.tests if test.a == best]
    assert {test.better for test in tests} == {best, None}  # both kinds of verdict are there
    for test in tests:
        change, low, high = (100 * value for value in (test.difference, test.low, test.high))
        if test.better:
            line = (
                f"- {best} is better than {test.b}: {-change:+.2f} pp, 95 % interval {-high:+.2f} pp to {-low:+.2f} pp"
            )
        else:
            line = f"- {test.b} and {best} are not distinguishable: {change:+.2f} pp, 95 % interval {low:+.2f} pp to"
        assert line in said
    assert said.count("are not distinguishable") + said.count("is better than") == len(tests) + len(
        comparison.group_tests
    )
    for group in comparison.groups:
        if len(group.rows) > 1:
            assert group.interval is not None
            assert f"| {group.label} | 2 | {100 * group.interval.mean:.2f} % |" in said


def test_remarks_are_told_and_long_lists_are_cut(tmp_path: Path) -> None:
    records = [
        made_record(f"run {number}", f"id{number}", {"epochs": 1 + number}, notes=(f"note *{number}*",))
        for number in range(120)
    ]
    _, report = dry(compare(records), tmp_path)
    said = markdown(report)
    assert "run 3: note *3*" in unescaped(said)
    assert "note *3*" not in said
    assert sum(line.startswith("| run ") for line in said.splitlines()) == 1 + 100
    assert "and 20 more" in said


# Mistakes


@pytest.mark.parametrize("project", ["", "digits", "a/b/c", "a b/c", "/digits", "team/", "team/digits:v1"])
def test_a_project_must_be_named_with_its_entity(tmp_path: Path, project: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"project must be ENTITY/PROJECT, but got {project!r}")):
        publish(compare(made_records()), project, tmp_path, dry_run=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)  # an import of it fails, as if it were not there
    with pytest.raises(UserError, match=re.escape('pip install "eva-sweeps[publish]"')):
        publish(compare(made_records()), PROJECT, tmp_path, dry_run=dry_run)


def test_eva_itself_does_not_need_the_package() -> None:
    code = "import sys; sys.modules['wandb_workspaces'] = None; import eva, eva.cli, eva.publish"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write '.*file/workspace\.json'"):
        publish(compare(made_records()), PROJECT, tmp_path / "file", dry_run=True)


# Online


@dataclass
class Site:
    """A loopback server that keeps views, and a process that publishes there."""

    server: LoopbackServer
    views: list[Json]
    publish: Callable[..., list[str]]


@pytest.fixture
def site(clean_environment: dict[str, str], tmp_path: Path) -> Iterator[Site]:
    with LoopbackServer() as server:
        views: list[Json] = []

        def keep(variables: Json) -> Json:
            views.append(variables)
            about = {name: variables[name] for name in ("name", "displayName", "description", "type", "spec")}
            view = {**about, "id": f"Vmlldzo{len(views)}", "project": {"name": "digits", "entityName": "loopback"}}
            return {"upsertView": {"view": view, "inserted": True}}

        def project(variables: Json) -> Json:
            return server.operations["GetProject"]({**variables, "name": "digits", "entity": "loopback"})

        def projects(variables: Json) -> Json:
            node = {**project(variables)["project"], "user": None}
            page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            return {"models": {"edges": [{"node": node}], "pageInfo": page}}

        server.operations |= {"UpsertView2": keep, "upsertView": keep}
        server.operations |= {"ProjectInternalId": project, "GetProjects": projects}

        def published(**environment: str) -> list[str]:
            done = call("publish_online()", tmp_path, {**clean_environment, **server.environment(), **environment})
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        yield Site(server, views, published)


def add_runs(server: LoopbackServer, count: int) -> None:
    """Gives the project the first of the made runs, and one that is not compared."""
    for number, id in enumerate([*(f"run-{number}" for number in range(count)), "another"], start=1):
        server.runs["loopback", "digits", id] = Run("loopback", "digits", id, number, id)


def without_random_ids(specification: Json) -> Any:
    """Returns a specification without the ids that are drawn anew each time, and without numbers of projects."""
    return without(specification, "__id__", "id", "project")


def test_what_is_sent_is_what_the_dry_run_wrote(site: Site, offline: Offline) -> None:
    add_runs(site.server, 4)
    absent, *lines = site.publish()
    assert absent == "not in loopback/digits, so not shown: plain (wandb sync uploads an offline run)"
    report, workspace = site.views
    assert (report["type"], workspace["type"]) == ("runs", "project-view")
    for sent, expected in ((workspace, offline.workspace), (report, offline.report)):
        assert (sent["entityName"], sent["projectName"]) == ("loopback", "digits")
        assert sent["displayName"] == expected["displayName"]
        assert without_random_ids(json.loads(sent["spec"])) == without_random_ids(expected["spec"])
    # The addresses are those that W&B gave.
    name = workspace["name"].removeprefix("nw-").removesuffix("-v")
    assert lines == [
        f"report: {site.server.url}/loopback/digits/reports/Comparison-of-5-runs-by-test_accuracy_best--Vmlldzo1",
        f"workspace: {site.server.url}/loopback/digits?nw={name}",
    ]
    assert site.server.unknown == []


def test_a_project_without_any_of_the_runs_gets_nothing(site: Site) -> None:
    add_runs(site.server, 0)
    (line,) = site.publish()
    assert line == (
        "UserError: W&B project 'loopback/digits' has none of the compared runs; wandb sync uploads offline ones"
    )
    assert site.views == []


def test_a_refusal_is_one_line_that_tells_what_was_made_before(site: Site) -> None:
    def refuse(_: Json) -> Json:
        raise Refusal("permission denied\nfor this view")

    add_runs(site.server, 5)
    site.server.operations["UpsertView2"] = refuse
    (line,) = site.publish()
    assert line.startswith("UserError: cannot publish in W&B project 'loopback/digits': ")
    assert "permission denied" in line
    assert re.search(r"; made before: report: http://\S+--Vmlldzo1$", line)


def test_without_an_account_it_is_said_in_one_line(site: Site) -> None:
    (line,) = site.publish(WANDB_API_KEY="")
    assert line.startswith("UserError: cannot publish in W&B project 'loopback/digits': ")
    assert site.server.asked == []
