"""A comparison as a view of a W&B project's workspace and as a report: sent there, or written down and sent nowhere.

Of the package that makes them (wandb-workspaces), only `specification` knows more than its documentation tells.
"""

import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eva.comparison import EVALUATION_METRICS, LABELS, SEED, Comparison, ImageSet
from eva.config import UserError
from eva.files import write_json
from eva.importance import is_number
from eva.records import EVALUATION_NAMES
from eva.text import format_difference, format_metric, format_p, listed, printable
from eva.wandb_client import public_api
from eva.wandb_runs import names_project

# What the curves show: of the split that was watched, of the epoch's training images, and of each batch.
WATCHED_CURVES = ("accuracy", "accuracy_best", "loss")
EPOCH_CURVES = ("train_epoch/accuracy", "train_epoch/loss")
STEP_CURVES = ("train/accuracy", "train/loss", "lr")
# Of single batches; the raw curve stays behind the smoothed one.
SMOOTHING = {"smoothing_type": "exponentialTimeWeighted", "smoothing_factor": 0.8, "smoothing_show_original": True}

# The charts that `inspection.log_charts` logs: W&B's name of the chart, its fields, its texts.
LINES = ("wandb/lineseries/v0", ("step", "lineKey", "lineVal"))
CHARTS: Mapping[str, tuple[tuple[str, tuple[str, ...]], Mapping[str, str]]] = {
    "charts/confusion_matrix": (
        ("wandb/confusion_matrix/v1", ("Actual", "Predicted", "nPredictions")),
        {"title": "confusion matrix"},
    ),
    "charts/class_accuracy": (("wandb/bar/v0", ("label", "value")), {"title": "accuracy by class"}),
    "charts/reliability": (LINES, {"title": "reliability", "xname": "confidence"}),
    "charts/precision_recall": (LINES, {"title": "precision over recall", "xname": "recall"}),
}
# The columns of a bar chart's table are called after what they hold.
BAR_COLUMNS = {"label": "class", "value": "accuracy"}

GALLERIES = ("galleries/misclassified", "galleries/correct")
GRADCAM_GALLERIES = ("galleries/gradcam_misclassified", "galleries/gradcam_correct")
LAYER_GALLERIES = ("galleries/gradcam_layers", "galleries/gradcam_layers_heat")
FIGURES = ("figures/accuracy", "figures/loss", "figures/lr")

GRID_WIDTH = 24  # of a report's panel grid, in its own columns
MAX_LINES = 100  # of a table or list in the report


@dataclass(frozen=True)
class Sheet:
    """Panels that belong together: a section of the workspace, and a panel grid of the report.

    Attributes:
        title: What stands above them.
        panels: Panels of wandb_workspaces.
        columns: How many lie beside each other.
        height: Of a panel in a report, in rows of its grid.
        evaluations: Whether they also show what an evaluation logged that is a W&B run of its own.
        open: Whether the section of the workspace is open at first.
        groupby: What the report's runs are grouped by; nothing for single runs.
    """

    title: str
    panels: Sequence[Any]
    columns: int
    height: int
    evaluations: bool = False
    open: bool = True
    groupby: Sequence[str] = ()


def publish(comparison: Comparison, project: str, folder: Path, *, dry_run: bool) -> list[str]:
    """Makes a workspace view and a report of a comparison, new ones at each call.

    They show those of the compared runs that `project` holds.

    Args:
        comparison: What to show.
        project: Where to, ENTITY/PROJECT.
        folder: Where a dry run writes workspace.json and report.json: what W&B would be sent, but for the number that
            it gives a project. It needs no account and no network.
        dry_run: Whether to write the specifications and to send nothing.

    Returns:
        Lines for the user: where the two are, and which runs are not in the project.

    Raises:
        UserError: The package is missing, W&B refuses or can't be reached, the project holds none of the runs, or the
            folder can't be written.
    """
    if not names_project(project):
        raise UserError(f"project must be ENTITY/PROJECT, but got {project!r}")
    entity, name = project.split("/")
    sheets = build_sheets(comparison)
    workspace = build_workspace(comparison, sheets, entity, name)
    if dry_run:
        # Run sets without a project are of the report's own; to name it, the package would ask W&B for its number.
        report = build_report(comparison, sheets, entity, name, run_set_of={})
        return _write({"workspace": specification(workspace), "report": specification(report)}, folder)
    report = build_report(comparison, sheets, entity, name, run_set_of={"entity": entity, "project": name})
    return _save(comparison, workspace, report, project)


def specification(view: Any) -> dict[str, Any]:
    """Returns what W&B is sent of a workspace or a report; the package itself has no way to see it without sending."""
    return dict(json.loads(view._to_model().model_dump_json(by_alias=True, exclude_none=True)))


def _write(specifications: Mapping[str, Mapping[str, Any]], folder: Path) -> list[str]:
    lines = []
    for name, values in specifications.items():
        path = folder / f"{name}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, values)
        except OSError as error:
            raise UserError(f"cannot write {str(path)!r}: {error.strerror}") from None
        lines.append(f"{name} specification: {path}")
    return lines


def _save(comparison: Comparison, workspace: Any, report: Any, project: str) -> list[str]:
    lines: list[str] = []
    try:
        lines.extend(_absent_runs(comparison, project))
        report.save()
        lines.append(f"report: {report.url}")
        workspace.save()
        lines.append(f"workspace: {workspace.url}")
    except UserError:
        raise
    except Exception as error:  # the package lets through what its transport raises, and raises plain Exceptions
        made = "".join(f"; made before: {line}" for line in lines if line.startswith("report: "))
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot publish in W&B project {project!r}: {reason}{made}") from None
    return lines


def _absent_runs(comparison: Comparison, project: str) -> list[str]:
    """Returns a line about the compared runs that a project doesn't hold, if there are any.

    Raises:
        UserError: It holds none of them, so that there is nothing to show.
    """
    ids = [row.record.id for row in comparison.rows]
    found = {run.id for run in public_api().runs(project, {"name": {"$in": ids}})}
    absent = [row.label for row in comparison.rows if row.record.id not in found]
    if len(absent) == len(ids):
        raise UserError(f"W&B project {project!r} has none of the compared runs; wandb sync uploads offline ones")
    line = f"not in {project}, so not shown: {listed(absent)} (wandb sync uploads an offline run)"
    return [line] if absent else []


def _package(name: str) -> Any:
    """Returns a module of wandb_workspaces, which only publishing needs.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(f"wandb_workspaces.{name}")
    except ModuleNotFoundError:
        raise UserError('publishing needs wandb-workspaces: pip install "eva-sweeps[publish]"') from None


# The two views


def build_workspace(comparison: Comparison, sheets: Sequence[Sheet], entity: str, project: str) -> Any:
    """Returns the workspace view: a section a sheet; its runs are those compared, best first, settings in columns."""
    ws = _package("workspaces")
    sections = [
        ws.Section(
            name=sheet.title,
            panels=list(sheet.panels),
            is_open=sheet.open,
            layout_settings=ws.SectionLayoutSettings(
                columns=sheet.columns, rows=min(math.ceil(len(sheet.panels) / sheet.columns), 3)
            ),
        )
        for sheet in sheets
        if not sheet.groupby  # a workspace has one run set, which shows single runs
    ]
    key = summary_key(comparison.metric)
    order = {} if key is None else {"order": [ws.Ordering(ws.Summary(key), ascending=comparison.goal == "min")]}
    return ws.Workspace(
        entity=entity,
        project=project,
        name=title(comparison),
        sections=sections,
        settings=ws.WorkspaceSettings(max_runs=max(10, len(comparison.rows))),
        runset_settings=ws.RunsetSettings(
            filters=run_filter(comparison, evaluations=True), pinned_columns=columns(comparison), **order
        ),
    )


def build_report(
    comparison: Comparison, sheets: Sequence[Sheet], entity: str, project: str, run_set_of: Mapping[str, str]
) -> Any:
    """Returns the report: the comparison in words and tables, then a panel grid a sheet.

    Args:
        comparison: What to show.
        sheets: Its panels.
        entity: Whose report it is.
        project: In which project it lies.
        run_set_of: Entity and project of the run sets; none for the report's own.
    """
    wr = _package("reports.v2")
    key = summary_key(comparison.metric)
    order = {}
    if key is not None:
        order = {"order": [wr.OrderBy(wr.SummaryMetric(key), ascending=comparison.goal == "min")]}
    blocks = [wr.TableOfContents()]
    for heading, text in texts(comparison):
        blocks.extend([wr.H2(heading), wr.MarkdownBlock(text)])
    for sheet in sheets:
        run_set = wr.Runset(
            name="compared runs",
            filters=run_filter(comparison, sheet.evaluations),
            groupby=list(sheet.groupby),
            pinned_columns=columns(comparison),
            **order,
            **run_set_of,
        )
        blocks.extend([wr.H2(sheet.title), wr.PanelGrid(runsets=[run_set], panels=_placed(sheet, wr))])
    return wr.Report(
        entity=entity,
        project=project,
        title=title(comparison),
        description="made by eva compare --publish",
        blocks=blocks,
        width="fluid",
    )


def _placed(sheet: Sheet, wr: Any) -> list[Any]:
    """Returns the panels of a sheet at their places in a report's grid, row by row."""
    width = GRID_WIDTH // sheet.columns
    for number, panel in enumerate(sheet.panels):
        row, column = divmod(number, sheet.columns)
        panel.layout = wr.Layout(x=column * width, y=row * sheet.height, w=width, h=sheet.height)
    return list(sheet.panels)


def title(comparison: Comparison) -> str:
    """Returns what both are called. No name of a run is in it: W&B makes an address of it."""
    count = f"Comparison of {len(comparison.rows)} runs"
    return count if comparison.metric is None else f"{count} by {comparison.metric}"


# What W&B calls things


def summary_key(metric: str | None) -> str | None:
    """Returns the key of a metric in the summary that W&B has of a run; None if it isn't there."""
    if metric is None:
        return None
    if top := re.fullmatch(r"top(\d+)_accuracy", metric):
        return f"evaluation.top_k.{top[1]}"
    if metric in EVALUATION_METRICS:
        return f"evaluation.{metric}" if metric in EVALUATION_NAMES else None
    return metric


def was_found(comparison: Comparison, setting: str) -> bool:
    """Tells whether a setting is a rate that a range test found: W&B's summary has its number, its config maybe not."""
    return any(row.record.config.get(setting) == "find" for row in comparison.rows)


def setting_column(comparison: Comparison, setting: str) -> str:
    """Returns W&B's name of a setting's column: it keeps each entry of a config as a mapping with the key `value`."""
    if was_found(comparison, setting):
        return f"summary:{setting}"
    name, dot, inner = setting.partition(".")
    return f"config:{name}.value{dot}{inner}"


def columns(comparison: Comparison) -> list[str]:
    """Returns the columns of W&B's table of runs: name, metric, and the settings that differ."""
    key = summary_key(comparison.metric)
    settings = [setting_column(comparison, name) for name in comparison.settings]
    return ["run:displayName", *([] if key is None else [f"summary:{key}"]), *settings]


def run_filter(comparison: Comparison, evaluations: bool) -> str:
    """Returns the filter, in the package's own language, that the compared runs pass by their ids.

    Args:
        comparison: The runs.
        evaluations: Whether evaluations of these runs pass too that are W&B runs of their own.
    """
    ids = ", ".join(_quoted(row.record.id) for row in comparison.rows)
    own = f"Metric('ID') in [{ids}]"
    return f"{own} or Config('into') in [{ids}]" if evaluations else own


def _quoted(text: str) -> str:
    """Returns a text as a Python string of letters, digits and escapes.

    The package changes operators wherever it finds them in a filter, inside of strings too.
    """
    return "'" + re.sub(r"[^A-Za-z0-9_-]", lambda found: f"\\U{ord(found[0]):08x}", text) + "'"


# The panels


def build_sheets(comparison: Comparison) -> list[Sheet]:
    """Returns all panels, sheet by sheet. There are none for what no run has.

    Raises:
        UserError: The package that makes them is not installed.
    """
    records = [row.record for row in comparison.rows]
    epochs, history, lr_range = (
        {name for record in records for name in getattr(record, table)} for table in ("epochs", "history", "lr_range")
    )
    sheets = [
        seed_sheet(comparison, epochs),
        curve_sheet(comparison, epochs, history),
        setting_sheet(comparison),
        *evaluation_sheets(comparison),
        lr_range_sheet(comparison, lr_range),
        Sheet("Figures", [media(key) for key in FIGURES] if history else [], columns=3, height=10, open=False),
    ]
    return [sheet for sheet in sheets if sheet.panels]


def curve(comparison: Comparison, x: str, y: Sequence[str], **more: Any) -> Any:
    """Returns a panel of lines, one a run and key of `y`, over the key `x`."""
    wr = _package("reports.v2")
    return wr.LinePlot(title=", ".join(y), x=x, y=list(y), max_runs_to_show=max(10, len(comparison.rows)), **more)


def watched_keys(epochs: set[str], curve: str) -> list[str]:
    """Returns the keys of a curve of the split that was watched; there are two where runs differ in that."""
    return [key for key in (f"val/{curve}", f"test/{curve}") if key in epochs]


def curve_sheet(comparison: Comparison, epochs: set[str], history: set[str]) -> Sheet:
    """Returns the learning curves, over the axes that they were logged for: by epoch, then by step."""
    by_epoch = [watched_keys(epochs, name) for name in WATCHED_CURVES] + [
        [key] for key in EPOCH_CURVES if key in epochs
    ]
    panels = [curve(comparison, "epoch", keys) for keys in by_epoch if keys]
    for key in STEP_CURVES:
        if key in history:
            panels.append(curve(comparison, "trainer/step", [key], **({} if key == "lr" else SMOOTHING)))
    return Sheet("Curves", panels, columns=3, height=8)


def seed_sheet(comparison: Comparison, epochs: set[str]) -> Sheet:
    """Returns curves of the mean over the seeds of each configuration, with the deviation around it.

    They are left out where W&B can't tell the configurations apart: a rate that was found differs from seed to seed.
    """
    names = [name for name in comparison.settings if name != SEED and name not in LABELS]
    repeated = any(len(group.rows) > 1 for group in comparison.groups)
    panels = []
    if repeated and not any(was_found(comparison, name) for name in names):
        how = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        keys = [watched_keys(epochs, name) for name in ("accuracy", "loss")]
        panels = [curve(comparison, "epoch", key, **how) for key in keys if key]
    # Runs of one configuration are one group by any of their settings.
    groupby = [f"config.{name}" for name in names or ["model"]]
    return Sheet("Mean and deviation over the seeds", panels, columns=2, height=8, groupby=groupby)


def setting_sheet(comparison: Comparison) -> Sheet:
    """Returns parallel coordinates of the settings that differ and the metric, the settings' importance, and a diff."""
    wr = _package("reports.v2")
    key, panels = summary_key(comparison.metric), []
    if comparison.settings and key is not None:
        axes = [
            wr.ParallelCoordinatesPlotColumn(
                metric=(wr.SummaryMetric if was_found(comparison, name) else wr.Config)(name),
                display_name=name,
                log=True if spans_decades([row.settings.get(name) for row in comparison.rows]) else None,
            )
            for name in comparison.settings
        ]
        # W&B colours the lines by the last axis; what is good lies at its top.
        best_on_top = True if comparison.goal == "min" else None
        metric = wr.SummaryMetric(key)
        axes.append(wr.ParallelCoordinatesPlotColumn(metric, display_name=comparison.metric, inverted=best_on_top))
        panels = [wr.ParallelCoordinatesPlot(columns=axes), wr.ParameterImportancePlot(with_respect_to=key)]
    if len(comparison.rows) > 1:
        panels.append(wr.RunComparer(diff_only="split"))
    return Sheet("Settings", panels, columns=1, height=12)


def spans_decades(values: Sequence[Any]) -> bool:
    """Tells whether values are positive numbers of which the largest is at least ten times the smallest."""
    numbers = [value for value in values if is_number(value)]
    return len(numbers) == len(values) and min(numbers) > 0 and max(numbers) >= 10 * min(numbers)


def evaluation_sheets(comparison: Comparison) -> list[Sheet]:
    """Returns what evaluations logged: the table of misclassified images, galleries, charts."""
    wr = _package("reports.v2")
    records = [row.record for row in comparison.rows]
    records = [record for record in records if record.predictions is not None or "evaluation" in record.summary]
    if not records:
        return []
    with_maps = any(record.predictions is None or record.predictions.maps is not None for record in records)
    # Each gallery beside its Grad-CAMs.
    pairs = [key for pair in zip(GALLERIES, GRADCAM_GALLERIES, strict=True) for key in pair]
    keys = [*pairs, *LAYER_GALLERIES] if with_maps else GALLERIES
    table = wr.WeavePanelSummaryTable(table_name="misclassified")
    return [
        Sheet("Misclassified images", [table], columns=1, height=16, evaluations=True),
        Sheet("Galleries and Grad-CAM", [media(key) for key in keys], columns=2, height=16, evaluations=True),
        Sheet("Charts", [chart(key) for key in CHARTS], columns=2, height=10, evaluations=True, open=False),
    ]


def lr_range_sheet(comparison: Comparison, lr_range: set[str]) -> Sheet:
    """Returns the curves of the range tests over a logarithmic axis of the rate, and their pictures."""
    panels = [
        curve(comparison, "lr_range/lr", [f"lr_range/{name}"], log_x=True)
        for name in ("smoothed", "loss")
        if name in lr_range
    ]
    if panels:
        panels.append(media("lr_range/curve"))
    return Sheet("Learning rate range test", panels, columns=3, height=10, open=False)


def media(key: str) -> Any:
    """Returns a panel of the pictures under a key: a column a run, a row a place in the gallery."""
    wr = _package("reports.v2")
    return wr.MediaBrowser(title=key, media_keys=[key], mode="grid", grid_x_axis="run", grid_y_axis="index")


def chart(key: str) -> Any:
    """Returns one of W&B's own charts, over the table that was logged with it, as a run's own page shows it."""
    wr = _package("reports.v2")
    (name, fields), strings = CHARTS[key]
    query = {"id": None, "name": None, "_defaultColorIndex": None, "summaryTable": {"tableKey": f"{key}_table"}}
    return wr.CustomChart(
        query=query,
        chart_name=name,
        chart_fields={field: BAR_COLUMNS.get(field, field) for field in fields},
        chart_strings=dict(strings),
    )


# The words


def texts(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns the report's introduction: headings, plain text, and what follows each, Markdown."""
    parts = [("Runs", _runs(comparison))]
    several = [group for group in comparison.groups if group.interval and group.interval.count > 1]
    if several:
        parts.append(("Seeds", _seeds(comparison)))
    for images in comparison.image_sets:
        if images.tests:
            parts.append((f"Image by image, on {printable(images.split)}", _image_by_image(images)))
    if comparison.remarks:
        parts.append(("Remarks", _bullets([escape(remark) for remark in comparison.remarks])))
    return parts


def _runs(comparison: Comparison) -> str:
    metric, count = comparison.metric, len(comparison.rows)
    order = {"max": "highest", "min": "lowest"}[comparison.goal]
    intro = f"{count} runs." if metric is None else f"{count} runs by {escape(metric)}, {order} first."
    head = ["run", *([] if metric is None else [metric]), *comparison.settings]
    rows = [
        [
            row.label,
            *([] if metric is None else [format_metric(metric, row.value)]),
            *(row.setting(name) for name in comparison.settings),
        ]
        for row in comparison.rows
    ]
    return f"{intro}\n\n{_table(head, rows)}"


def _seeds(comparison: Comparison) -> str:
    metric, rows = comparison.metric, []
    for group in comparison.groups:
        if group.interval and group.interval.count > 1:
            mean, deviation, low, high = (
                format_metric(metric, value)
                for value in (group.interval.mean, group.interval.deviation, group.interval.low, group.interval.high)
            )
            rows.append([group.label, str(group.interval.count), mean, deviation, f"{low} to {high}"])
    table = _table(["configuration", "runs", "mean", "deviation", "95 % interval of the mean"], rows)
    tests = comparison.group_tests
    sentences = [
        _sentence(metric, test.a, test.b, test.better, (test.difference, test.low, test.high), test.p_adjusted)
        for test in tests
    ]
    how = f"By Welch's t test. {_corrected(len(tests))}"
    return f"{table}\n\n{how}\n\n{_bullets(sentences)}" if tests else table


def _image_by_image(images: ImageSet) -> str:
    """Returns the pairs with the best run of an image set in sentences."""
    best = next(iter(images.predictions))
    sentences = [
        _sentence("accuracy", test.a, test.b, test.better, (test.difference, test.low, test.high), test.p_adjusted)
        for test in images.tests
        if test.a == best
    ]
    how = f"{escape(best)} and the others on {len(images.ids):,} images, by McNemar's test."
    return f"{how} {_corrected(len(images.tests))}\n\n{_bullets(sentences)}"


def _corrected(pairs: int) -> str:
    number = f"{pairs} pairs" if pairs > 1 else "one pair"
    return f"Differences are the first less the second; p and intervals are corrected for {number}."


def _sentence(
    metric: str | None,
    a: str,
    b: str,
    better: str | None,
    difference: tuple[float, float | None, float | None],
    p: float | None,
) -> str:
    """Returns in words what a test says about B against A; `difference` is B less A with its interval."""
    first, second, (value, low, high) = b, a, difference
    if better == a:
        first, second = a, b
        value, low, high = -value, None if high is None else -high, None if low is None else -low
    said = [format_difference(metric, value)]
    if low is not None and high is not None:
        said.append(f"95 % interval {format_difference(metric, low)} to {format_difference(metric, high)}")
    if p is not None:
        text = format_p(p)
        said.append(f"p {escape(text)}" if text.startswith("<") else f"p = {text}")
    verdict = "and {} are not distinguishable" if better is None else "is better than {}"
    return f"**{escape(first)}** {verdict.format(f'**{escape(second)}**')}: {', '.join(said)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns cells, which may hold anything, as a table in Markdown."""
    lines = ["| " + " | ".join(map(escape, line)) + " |" for line in [head, *rows[:MAX_LINES]]]
    lines.insert(1, "|" + " --- |" * len(head))
    rest = len(rows) - MAX_LINES
    return "\n".join(lines) + (f"\n\nand {rest} more" if rest > 0 else "")


def _bullets(lines: Sequence[str]) -> str:
    rest = len(lines) - MAX_LINES
    return "\n".join(f"- {line}" for line in lines[:MAX_LINES]) + (f"\n- and {rest} more" if rest > 0 else "")


def escape(text: str) -> str:
    """Returns a text as Markdown that shows just this text on one line, in cells of tables too.

    Punctuation that could be markup gets a backslash (CommonMark 0.31, 2.4). What HTML and tables are made of becomes
    character references, which no dialect of Markdown takes for anything else.
    """
    text = re.sub(r"[\\`*_{}\[\]()#+\-.!~$^=:@/]", lambda found: "\\" + found[0], printable(text))
    return re.sub(r"[&<>|]", lambda found: f"&#{ord(found[0])};", text)
