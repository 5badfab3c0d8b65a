"""The charts of a comparison, as plotly figures: curves over each other, seeds, parallel coordinates, reliability."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from eva.comparison import Comparison, ImageSet, Row
from eva.importance import is_number
from eva.text import format_metric, is_share, printable, shortened

# Okabe and Ito's colours, which differ for colour-blind readers too, without yellow and black, which fade into one of
# the backgrounds; with a dash pattern each, for more runs than there are colours.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c8c8c")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

NUM_POINTS = 600  # of a curve, where there are not many runs
ALL_POINTS = 24_000  # of one chart's curves together
AXES = ("step", "epoch", "seconds")
TICK_LENGTH = 24  # characters of a tick's label
GRID = "rgba(128, 128, 128, 0.22)"  # seen on light and on dark
# Low to high; readable on both backgrounds.
SCALE = ["rgb(59, 118, 196)", "rgb(168, 151, 122)", "rgb(224, 123, 0)"]


@dataclass(frozen=True)
class Chart:
    """A figure and what the page switches in it.

    Attributes:
        id: Of the element that it is drawn in.
        figure: The figure.
        runs: The run of each trace, as an index of the comparison's rows; empty if its traces are no runs.
        xs: For each of `AXES` the x values of each trace; empty if there is but one axis.
    """

    id: str
    figure: go.Figure
    runs: tuple[int, ...] = ()
    xs: Mapping[str, list[list[float | None]]] = field(default_factory=dict)


def literal(text: str) -> str:
    """Returns text that plotly shows as it is, without taking parts of it for markup."""
    return html.escape(printable(text), quote=False)


def styles(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns (colour, dash) of each run: a colour a configuration and a dash a seed where there are enough of both."""
    groups = [[comparison.rows.index(row) for row in group.rows] for group in comparison.groups]
    if len(groups) <= len(COLORS) and max(map(len, groups)) <= len(DASHES):
        chosen = {run: (COLORS[i], DASHES[j]) for i, group in enumerate(groups) for j, run in enumerate(group)}
        return [chosen[run] for run in range(len(comparison.rows))]
    count = len(COLORS)
    return [(COLORS[i % count], DASHES[i // count % len(DASHES)]) for i in range(len(comparison.rows))]


def _layout(x: str, y: str, **more: Any) -> go.Layout:
    """Returns the layout that all charts share. The page gives them its font and its colour of text."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True}
    layout = go.Layout(
        template=go.layout.Template(),
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        margin={"l": 52, "r": 12, "t": 30, "b": 44},
        showlegend=False,
        modebar={"bgcolor": "rgba(0, 0, 0, 0)", "color": "#8c8c8c", "activecolor": COLORS[0]},
        hovermode="closest",
        hoverlabel={"namelength": -1},
        xaxis={**axis, "title": {"text": x}},
        yaxis={**axis, "title": {"text": y}},
    )
    layout.update(more)
    return layout


def mean_of_bins(values: Sequence[float], size: int) -> list[float | None]:
    """Returns the means of so many consecutive values each, to six digits; of their finite ones, None without any."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    starts = np.arange(0, len(array), size)
    if not len(starts):
        return []
    sums, counts = np.add.reduceat(np.where(finite, array, 0), starts), np.add.reduceat(finite, starts)
    return [float(f"{total / count:.6g}") if count else None for total, count in zip(sums, counts, strict=True)]


def bin_size(num_values: int, num_runs: int) -> int:
    """Returns how many values become one point, so that neither a curve nor a chart has too many points."""
    return max(1, math.ceil(num_values / min(NUM_POINTS, max(60, ALL_POINTS // max(num_runs, 1)))))


def watched(row: Row, metric: str) -> str | None:
    """Returns the name of the column of a metric (loss or accuracy) on the split that was watched; None without one."""
    return next((name for name in (f"val/{metric}", f"test/{metric}") if name in row.record.epochs), None)


def curves(comparison: Comparison) -> list[Chart]:
    """Returns the learning curves and the learning rates of all runs over each other."""
    rows = comparison.rows
    charts: list[tuple[str, str, list[tuple[str, str | None]], str]] = [
        ("train-loss", "train loss", [("history", "train/loss") for _ in rows], ".4f"),
        ("watched-loss", "loss", [("epochs", watched(row, "loss")) for row in rows], ".4f"),
        ("watched-accuracy", "accuracy", [("epochs", watched(row, "accuracy")) for row in rows], ".2%"),
        ("lr", "learning rate", [("history", "lr") for _ in rows], ".3g"),
    ]
    return [_curves(comparison, *chart) for chart in charts]


def _curves(comparison: Comparison, id: str, title: str, columns: Sequence[tuple[str, str | None]], form: str) -> Chart:
    traces, runs, xs = [], [], dict[str, list[list[float | None]]]((axis, []) for axis in AXES)
    for run, (row, (color, dash), (table, name)) in enumerate(
        zip(comparison.rows, styles(comparison), columns, strict=True)
    ):
        values = row.record.history if table == "history" else row.record.epochs
        if name is None or not values.get(name):
            continue
        size = bin_size(len(values[name]), len(comparison.rows))
        for axis, x in _positions(row, table).items():
            xs[axis].append(mean_of_bins(x, size))
        y = mean_of_bins(values[name], size)
        hover = f"{literal(name)} %{{y:{form}}}<br>%{{x:.6~g}}<extra>%{{fullData.name}}</extra>"
        traces.append(
            go.Scatter(
                x=xs["step"][-1],
                y=y,
                name=literal(row.label),
                mode="lines+markers" if len(y) <= 40 else "lines",
                line={"color": color, "dash": dash, "width": 1.6},
                marker={"size": 4},
                hovertemplate=hover,
            )
        )
        runs.append(run)
    layout = _layout("step", title)
    if form.endswith("%"):
        layout.yaxis.tickformat = ".1~%"
    return Chart(id, go.Figure(traces, layout), tuple(runs), xs)


def _positions(row: Row, table: str) -> dict[str, Sequence[float]]:
    """Returns where each value of a table lies, by axis. Seconds are those of training, without evaluation."""
    values = row.record.history if table == "history" else row.record.epochs
    unknown = [math.nan] * max(map(len, values.values()))
    seconds = values.get("seconds", unknown)
    if table == "epochs":
        seconds = np.cumsum(values.get("train_epoch/seconds", unknown)).tolist()
    return {"step": values.get("trainer/step", unknown), "epoch": values.get("epoch", unknown), "seconds": seconds}


def range_tests(comparison: Comparison) -> Chart | None:
    """Returns the smoothed curves of the range tests; None if no run has one."""
    traces, runs = [], []
    for run, (row, (color, dash)) in enumerate(zip(comparison.rows, styles(comparison), strict=True)):
        curve = row.record.lr_range
        if not curve.get("lr"):
            continue
        size = bin_size(len(curve["lr"]), len(comparison.rows))
        traces.append(
            go.Scatter(
                x=mean_of_bins(curve["lr"], size),
                y=mean_of_bins(curve["smoothed"], size),
                name=literal(row.label),
                mode="lines",
                line={"color": color, "dash": dash, "width": 1.6},
                hovertemplate="smoothed loss %{y:.4f}<br>learning rate %{x:.3g}<extra>%{fullData.name}</extra>",
            )
        )
        runs.append(run)
    if not traces:
        return None
    layout = _layout("learning rate", "smoothed loss")
    layout.xaxis.type = "log"
    lows = [[value for value in trace.y if value is not None] for trace in traces]
    # The end of a diverging curve would flatten the part that matters.
    first, low = max((y[0] for y in lows if y), default=1.0), min((min(y) for y in lows if y), default=0.0)
    if low < first:
        layout.yaxis.range = [low - 0.1 * (first - low), first + 0.5 * (first - low)]
    return Chart("lr-range", go.Figure(traces, layout), tuple(runs))


def seeds(comparison: Comparison) -> Chart | None:
    """Returns each configuration's runs, mean and interval; None if no configuration has several runs."""
    groups = [(number, group) for number, group in enumerate(comparison.groups, start=1) if group.interval]
    if not any(group.interval and group.interval.count > 1 for _, group in groups):
        return None
    scale = 100 if is_share(comparison.metric) else 1
    means, lows, highs, heights, x, y, text = [], [], [], [], [], [], []
    for number, group in groups:
        assert group.interval is not None
        for row in group.rows:
            if row.value is not None:
                x.append(scale * row.value)
                y.append(number)
                text.append(f"{literal(row.label)}<br>{format_metric(comparison.metric, row.value)}")
        means.append(scale * group.interval.mean)
        heights.append(number)
        # Without an interval the arms have no length.
        low, high = group.interval.low, group.interval.high
        lows.append(0.0 if low is None else scale * (group.interval.mean - low))
        highs.append(0.0 if high is None else scale * (high - group.interval.mean))
    intervals = go.Scatter(
        x=means,
        y=heights,
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 16, "color": COLORS[0], "line": {"width": 2}},
        error_x={"type": "data", "array": highs, "arrayminus": lows, "color": COLORS[0], "thickness": 1.6, "width": 6},
        hovertemplate="mean %{x:.4~g}<extra></extra>",
    )
    points = go.Scatter(
        x=x, y=y, mode="markers", marker={"size": 8, "color": COLORS[1]}, hovertext=text, hoverinfo="text"
    )
    unit = ", %" if is_share(comparison.metric) else ""
    layout = _layout(f"{literal(str(comparison.metric))}{unit}", "", height=130 + 28 * len(groups))
    numbers = [str(number) for number in heights]
    layout.yaxis.update(tickvals=heights, ticktext=numbers, range=[max(heights) + 0.6, 0.4], zeroline=False)
    # One wide interval, of two seeds mostly, must not press all values into one spot.
    spread = max(x) - min(x) or abs(max(x)) / 100 or 1.0
    layout.xaxis.range = [min(x) - 1.5 * spread, max(x) + 1.5 * spread]
    return Chart("seeds-chart", go.Figure([intervals, points], layout))


@dataclass(frozen=True)
class Axis:
    """One vertical axis of the parallel coordinates: heights in [0, 1] of the runs and of the labelled ticks."""

    name: str
    heights: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]


def parallel_coordinates(comparison: Comparison) -> Chart | None:
    """Returns the settings that differ and the metric beside each other, a line a run, coloured by the metric.

    None for fewer than three runs with the metric, or without such a setting. Lines are drawn as such and not by
    plotly's own parallel coordinates, which need WebGL, tell nothing of the run under the mouse, and are slow without a
    graphics card.
    """
    chosen = [(run, row, row.value) for run, row in enumerate(comparison.rows) if row.value is not None]
    names = [name for name in comparison.compared_settings if len({row.setting(name) for _, row, _ in chosen}) > 1]
    if len(chosen) < 3 or not names:
        return None
    metric, values = comparison.metric or "", [value for _, _, value in chosen]
    columns = [
        ([row.settings.get(name) for _, row, _ in chosen], [row.setting(name) for _, row, _ in chosen])
        for name in names
    ]
    axes = [_axis(name.removeprefix("policy_options."), *column) for name, column in zip(names, columns, strict=True)]
    axes.append(_axis(metric, values))
    x = list(range(len(axes)))
    low, high = min(values), max(values)
    traces = []
    for number, (_, row, value) in enumerate(chosen):
        told = [f"{literal(name)}: {literal(row.setting(name))}" for name in names]
        told = [literal(row.label), f"{literal(metric)}: {format_metric(metric, value)}", *told]
        color = sample_colorscale(SCALE, [(value - low) / (high - low) if high > low else 1.0])[0]
        traces.append(
            go.Scatter(
                x=x,
                y=[round(axis.heights[number], 4) for axis in axes],
                mode="lines+markers",
                line={"color": color, "width": 1.6},
                marker={"size": 5},
                hovertext="<br>".join(told),
                hoverinfo="text",
            )
        )
    layout = _layout("", "", margin={"l": 24, "r": 64, "t": 40, "b": 12})
    titles = [literal(shortened(axis.name, TICK_LENGTH)) for axis in axes]
    layout.xaxis.update(
        tickvals=x, ticktext=titles, side="top", range=[-0.1, len(axes) - 0.9], fixedrange=True, gridwidth=2
    )
    layout.yaxis.update(visible=False, range=[-0.06, 1.06], fixedrange=True)
    label = {"showarrow": False, "xanchor": "left", "xshift": 5, "font": {"size": 10.5}}
    layout.annotations = [
        {**label, "x": i, "y": height, "text": literal(shortened(text, TICK_LENGTH))}
        for i, axis in enumerate(axes)
        for height, text in axis.ticks
    ]
    return Chart("parallel", go.Figure(traces, layout), tuple(run for run, _, _ in chosen))


def _axis(name: str, values: Sequence[Any], texts: Sequence[str] = ()) -> Axis:
    """Returns an axis: many numbers by size, by decade if they span two; few, or names, evenly by their texts."""
    numbers = [float(value) for value in values if is_number(value)]
    if texts and (len(numbers) < len(values) or len(set(numbers)) <= 6):
        ranked = sorted(zip(values, texts, strict=True), key=lambda pair: (not is_number(pair[0]), *_order(pair)))
        known = list(dict.fromkeys(text for _, text in ranked))
        place = {text: i / max(len(known) - 1, 1) for i, text in enumerate(known)}
        return Axis(name, tuple(place[text] for text in texts), tuple((height, text) for text, height in place.items()))
    decades = min(numbers) > 0 and max(numbers) >= 100 * min(numbers)
    scaled = np.log10(numbers) if decades else np.array(numbers)
    low, high = scaled.min(), scaled.max()
    if low == high:
        low, high = low - 0.5, high + 0.5
    at = [low, *range(math.floor(low) + 1, math.ceil(high)), high] if decades else np.linspace(low, high, 5).tolist()
    unscaled = [10.0**tick if decades else tick for tick in at]
    labels = [format_metric(name, tick) if is_share(name) else f"{tick:.3g}" for tick in unscaled]
    heights = tuple(((scaled - low) / (high - low)).tolist())
    return Axis(
        name, heights, tuple(((tick - low) / (high - low), text) for tick, text in zip(at, labels, strict=True))
    )


def _order(pair: tuple[Any, str]) -> tuple[float, str]:
    return (float(pair[0]), "") if is_number(pair[0]) else (0.0, pair[1])


def reliability(comparison: Comparison) -> Chart | None:
    """Returns accuracy over confidence of every run with predictions; None without any."""
    traces, runs = [], []
    for run, (row, (color, dash)) in enumerate(zip(comparison.rows, styles(comparison), strict=True)):
        if row.report is None:
            continue
        bins = row.report.reliability
        kept = [i for i, count in enumerate(bins.count) if count]
        traces.append(
            go.Scatter(
                x=[round(bins.confidence[i], 5) for i in kept],
                y=[round(bins.accuracy[i], 5) for i in kept],
                customdata=[bins.count[i] for i in kept],
                name=literal(row.label),
                mode="lines+markers",
                line={"color": color, "dash": dash, "width": 1.6},
                marker={"size": 5},
                hovertemplate=(
                    "%{customdata} images: confidence %{x:.1%}, accuracy %{y:.1%}<extra>%{fullData.name}</extra>"
                ),
            )
        )
        runs.append(run)
    if not traces:
        return None
    layout = _layout("confidence", "accuracy")
    for axis in (layout.xaxis, layout.yaxis):
        axis.update(range=[0, 1.02], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1], tickformat=".0%")
    line = {"color": "#8c8c8c", "width": 1, "dash": "dot"}
    layout.shapes = [{"type": "line", "x0": 0, "y0": 0, "x1": 1, "y1": 1, "line": line}]
    return Chart("reliability", go.Figure(traces, layout), tuple(runs))


def confusion(images: ImageSet) -> go.Figure:
    """Returns a heat map of an image set's classes without values: the page fills in those of the chosen runs."""
    count = len(images.classes)
    names = [literal(shortened(name, TICK_LENGTH)) for name in images.classes]
    # Small shares are what matters: most of every row is on the diagonal.
    scale = ((0.0, "#f7f7f5"), (0.01, "#dce6f2"), (0.05, "#a9c6e8"), (0.2, "#4d8fcc"), (1.0, "#08306b"))
    heat = go.Heatmap(
        z=[],
        zmin=0,
        zmax=1,
        colorscale=scale,
        showscale=False,
        xgap=1,
        ygap=1,
        texttemplate="%{text}" if count <= 12 else None,
        hovertemplate="%{y} taken for %{x}: %{text} (%{z:.1%} of the class)<extra></extra>",
    )
    layout = _layout("", "", margin={"l": 20, "r": 4, "t": 26, "b": 20})
    ticks = {"tickvals": list(range(count)), "ticktext": names} if count <= 40 else {}
    layout.xaxis.update(ticks, showgrid=False, constrain="domain", tickangle=-60 if count > 3 else 0)
    layout.yaxis.update(ticks, showgrid=False, autorange="reversed", constrain="domain", scaleanchor="x")
    return go.Figure(heat, layout)
