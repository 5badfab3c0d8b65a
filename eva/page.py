"""A comparison as one HTML page that opens from the disk: no other file, no network, in any current browser."""

import base64
import datetime
import hashlib
import html
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from eva import __version__, charts
from eva.charts import Chart
from eva.comparison import HARD_SHARE, SURE, Comparison, ImageSet
from eva.files import write_atomically
from eva.importance import is_number
from eva.statistics import GroupTest, PairedTest
from eva.text import duration, format_difference, format_interval, format_metric, format_p, printable

MAX_BYTES = 14 * 2**20  # of the page; as many pictures are taken in as fit
OPACITY = 0.5  # of the colours over an image, as in eva.gradcam.overlay
MAX_SIDE = 64  # pixels of an embedded image
MAX_MAP_SIDE = 16  # values of an embedded Grad-CAM map
MANY_RUNS = 6  # of more runs, only the pairs with the best are shown at first,
MAX_PAIRS = 500  # and of more pairs, only these are in the page
LONG = 30  # characters of a cell that is broken into lines

SWATCH_DASHES = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "12 4"}


def write_page(comparison: Comparison, path: Path) -> Path:
    """Writes a comparison as one self-contained HTML page, atomically, and returns the path.

    Names, notes and settings come from users: they are escaped on their way into HTML, JSON and plotly, and the page's
    content security policy lets no script run but the page's own, and nothing be fetched from anywhere.
    """
    text = render(comparison)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def render(comparison: Comparison) -> str:
    """Returns the page's HTML, of at most `MAX_BYTES` wherever the numbers alone need no more."""
    from plotly.offline import get_plotlyjs

    plotly, script = get_plotlyjs(), _file("page.js")
    drawn = _charts(comparison)
    parts = {
        "policy": _policy(plotly, script),
        "style": _file("page.css"),
        "plotly": plotly,
        "script": script,
        **_sections(comparison, drawn),
    }
    template, data = string.Template(_file("page.html")), _data(comparison, drawn)
    # Pictures get the room that all else leaves; what is told about them takes but a sentence.
    room = MAX_BYTES - len(template.substitute(parts, data=_json(data), pictures="").encode()) - 1000
    sentences = []
    for embedded, images in zip(data["sets"], comparison.image_sets, strict=True):
        room -= _add_pictures(embedded, comparison, images, room)
        if len(images.predictions) > 1:
            sentences.append(_about_pictures(embedded))
    return template.substitute(parts, data=_json(data), pictures=_escaped(" ".join(sentences)))


def _file(name: str) -> str:
    return resources.files("eva").joinpath(name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """Returns a content security policy that allows these scripts, named by their digests, and no other."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(values: Any) -> str:
    """Returns JSON that can stand in a script element: ASCII, and nothing that HTML takes for a tag or a comment."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _escaped(text: str) -> str:
    return html.escape(printable(text))


# What the script works on


def _charts(comparison: Comparison) -> dict[str, Chart]:
    drawn = [
        *charts.curves(comparison),
        charts.range_tests(comparison),
        charts.seeds(comparison),
        charts.parallel_coordinates(comparison),
        charts.reliability(comparison),
    ]
    return {chart.id: chart for chart in drawn if chart is not None}


def _data(comparison: Comparison, drawn: Mapping[str, Chart]) -> dict[str, Any]:
    """Returns all numbers of the page, yet without pictures. A run is told by its place among the comparison's rows."""
    colors = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_TURBO)[:, 0, ::-1]  # RGB
    return {
        "runs": [row.label for row in comparison.rows],
        "charts": [
            {"id": chart.id, "runs": chart.runs, "xs": chart.xs, "figure": json.loads(chart.figure.to_json())}
            for chart in drawn.values()
        ],
        "sets": [_numbers(comparison, images) for images in comparison.image_sets],
        "first": [_place(comparison, label) for label in first_pair(comparison)],
        "colors": _base64(colors),
        "opacity": OPACITY,
    }


def _place(comparison: Comparison, label: str) -> int:
    return [row.label for row in comparison.rows].index(label)


def _numbers(comparison: Comparison, images: ImageSet) -> dict[str, Any]:
    """Returns what is told about every image of a set, as base64 of little-endian arrays."""
    kind = "<u1" if len(images.classes) <= 256 else "<u2"
    wrong = np.flatnonzero(_wrong(images).any(axis=0))
    return {
        "title": f"{len(images.ids):,} of {printable(images.split)}, data {printable(images.fingerprint)[:12]}",
        "classes": [printable(name) for name in images.classes],
        "wide": kind == "<u2",
        "labels": _base64(images.labels.astype(kind)),
        "runs": [
            {
                "run": _place(comparison, label),
                "predicted": _base64(one.predicted.astype(kind)),
                "confidence": _base64(np.rint(one.confidence * 65535).astype("<u2")),
                "layer": printable(one.layer),
                "maps": None,
            }
            for label, one in images.predictions.items()
        ],
        "rows": wrong.tolist(),
        "ids": [printable(str(id)) for id in images.ids[wrong]],
        "hard": [
            [image.row, image.num_wrong, float(f"{image.mean_loss:.4g}"), image.consensus, image.suspect]
            for image in images.hard
        ],
        "heatmap": json.loads(charts.confusion(images).to_json()),
        "pictured": [],
        "pictures": [],
    }


def _wrong(images: ImageSet) -> NDArray[np.bool_]:
    """Returns whether a run is wrong about an image, (runs, images)."""
    return np.array([~one.correct for one in images.predictions.values()])


def first_pair(comparison: Comparison) -> list[str]:
    """Returns the two runs whose error diff is shown first: the best of the next best configuration, the best of all.

    None unless two runs can be compared image by image; two seeds if there is but one configuration.
    """
    labels = list(comparison.image_sets[0].predictions) if comparison.image_sets else []
    if len(labels) < 2:
        return []
    groups = {row.label: number for number, group in enumerate(comparison.groups) for row in group.rows}
    other = next((label for label in labels if groups[label] != groups[labels[0]]), labels[1])
    return [other, labels[0]]


def _add_pictures(embedded: dict[str, Any], comparison: Comparison, images: ImageSet, room: int) -> int:
    """Adds images and Grad-CAM maps to the data of a set, as many as fit into so many bytes; returns the bytes.

    First those on which the two runs differ that the page opens with, then those that most runs get wrong: they are
    the ones that the error diffs of most pairs show.
    """
    predictions = list(images.predictions.values())
    known = {
        id: image
        for row in comparison.rows
        if row.label in images.predictions
        for id, image in row.record.images.items()
    }
    wrong, first = _wrong(images), first_pair(comparison)
    differs = np.zeros(len(images.ids), bool)
    if first and all(label in images.predictions for label in first):
        a, b = (images.predictions[label].correct for label in first)
        differs = a != b
    order = np.lexsort((-wrong.sum(axis=0), ~differs))
    # In base64 three bytes take four; a map has its maximum beside it.
    map_bytes = sum(4 / 3 * (math.prod(_map_shape(one.maps)) + 4) for one in predictions if one.maps is not None)
    taken = 0
    for row in order[wrong[:, order].any(axis=0)].tolist():
        image = known.get(str(images.ids[row]))
        if image is None:
            continue
        picture = _picture(image)
        size = math.ceil(len(picture) + map_bytes) + 12
        if taken + size > room:
            break
        taken += size
        embedded["pictured"].append(row)
        embedded["pictures"].append(picture)
    for run, one in zip(embedded["runs"], predictions, strict=True):
        if one.maps is not None and embedded["pictured"]:
            run["maps"] = _maps(one.maps[embedded["pictured"]])
    return taken


def _about_pictures(embedded: Mapping[str, Any]) -> str:
    """Returns in words which images of a set have their picture."""
    count, total = len(embedded["pictured"]), len(embedded["rows"])
    if count == total:
        return f"All {total:,} images that at least one run gets wrong have their picture here."
    return (
        f"{count:,} of the {total:,} images that at least one run gets wrong have their picture here: as many as the "
        f"runs left and as fit into {MAX_BYTES // 2**20} MiB, first those on which the two runs differ that the page "
        "opens with, then those that most runs get wrong. The numbers are of all images."
    )


def _picture(image: NDArray[np.uint8]) -> str:
    """Returns an image (H, W, 3) as a data URI: lossless WebP, a third smaller than PNG."""
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE:
        scale = MAX_SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    # A quality above 100 means lossless.
    written, data = cv2.imencode(".webp", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_WEBP_QUALITY, 101])
    assert written
    return "data:image/webp;base64," + _base64(data)


def _map_shape(maps: NDArray[np.float32]) -> tuple[int, int]:
    return min(maps.shape[1], MAX_MAP_SIDE), min(maps.shape[2], MAX_MAP_SIDE)


def _maps(maps: NDArray[np.float32]) -> dict[str, Any]:
    """Returns raw maps (P, h, w) as bytes, 255 being each map's own maximum, which is given as a float32."""
    height, width = _map_shape(maps)
    raw = np.where(np.isfinite(maps), np.maximum(maps, 0), 0)
    if raw.shape[1:] != (height, width):
        raw = np.stack([cv2.resize(one, (width, height), interpolation=cv2.INTER_AREA) for one in raw])
    top = raw.max(axis=(1, 2))  # (P,)
    levels = np.rint(255 * raw / np.where(top > 0, top, 1)[:, None, None]).astype(np.uint8)
    return {"height": height, "width": width, "levels": _base64(levels), "top": _base64(top.astype("<f4"))}


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


# What stands still


def _sections(comparison: Comparison, drawn: Mapping[str, Chart]) -> dict[str, str]:
    """Returns what the template takes in, by name: sentences, tables, and which of its parts are hidden."""
    rows, metric = comparison.rows, comparison.metric
    lead = "No run has an accuracy to be sorted by."
    if rows[0].value is not None:
        order = {"max": "highest", "min": "lowest"}[comparison.goal]
        lead = f"By {metric}, {order} first: {rows[0].label} is best with {format_metric(metric, rows[0].value)}."
    splits = {name.partition("/")[0] for row in rows if (name := charts.watched(row, "loss")) is not None}
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    importance = comparison.importance
    parallel = drawn.get("parallel")
    told = {
        "title": "Comparison of " + (f"{len(rows)} runs" if len(rows) > 1 else "one run"),
        "lead": lead,
        "metric": metric or "",
        "watched": splits.pop() if len(splits) == 1 else "val or test",
        "points": _about_points(comparison),
        "corrected_groups": _pairs_words(len(comparison.group_tests)),
        "no_importance": comparison.no_importance,
        "importance_runs": str(importance.count if importance else 0),
        "explained": f"{max(0.0, importance.explained if importance else 0.0):.0%}",
        "least": str(110 * len(parallel.figure.data[0].x) if parallel else 0),
        "hard_share": f"{HARD_SHARE:.0%}",
        "sure": f"{SURE:.0%}",
        "version": __version__,
        "now": now,
    }
    there = {
        "remarks": bool(comparison.remarks),
        "lr_range": "lr-range" in drawn,
        "seeds": "seeds-chart" in drawn,
        "group_tests": bool(comparison.group_tests),
        "parallel": parallel is not None,
        "importance": importance is not None,
        "knowledge": importance is None or importance.explained > 0,
        "pairs": any(images.tests for images in comparison.image_sets),
        "hard": any(images.hard for images in comparison.image_sets),
        "reports": any(row.report for row in rows),
    }
    styles = charts.styles(comparison)
    names = {row.label: _name(row.label, style) for row, style in zip(rows, styles, strict=True)}
    return {
        **{name: _escaped(text) for name, text in told.items()},
        **{f"if_{name}": "" if holds else "hidden" for name, holds in there.items()},
        **{f"unless_{name}": "hidden" if holds else "" for name, holds in there.items()},
        "remarks": "".join(f"<li>{_escaped(remark)}</li>" for remark in comparison.remarks),
        "runs": _runs(comparison, names),
        "seeds": _seeds(comparison),
        "group_tests": _group_tests(comparison),
        "importance": _importance(comparison),
        "pairs": "".join(_pairs(comparison, images, names) for images in comparison.image_sets if images.tests),
        "calibration": _calibration(comparison, names),
    }


def _about_points(comparison: Comparison) -> str:
    """Returns in words how the curves of batches are thinned out."""
    lengths = [len(row.record.history.get("train/loss", ())) for row in comparison.rows]
    sizes = sorted({charts.bin_size(length, len(lengths)) for length in lengths})
    if sizes[-1] == 1:
        return "Every value is drawn."
    span = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    return (
        f"A point of the curves over the batches is the mean of {span} consecutive batches: none is left out, but "
        "single peaks are flatter than they were. Values that are not finite are left out."
    )


def _pairs_words(count: int) -> str:
    return "one pair" if count == 1 else f"{count} pairs"


def _cell(text: str, sort: float | str | None = None, *, css: str = "", tag: str = "td") -> str:
    """Returns a cell of a table from plain text; `sort` is what its column is sorted by, if not the text."""
    return _cell_of(_escaped(text), sort, css=css, tag=tag)


def _cell_of(content: str, sort: float | str | None = None, *, css: str = "", tag: str = "td") -> str:
    """Returns a cell of a table from HTML."""
    key = "" if sort is None else f' data-sort="{_escaped(str(sort))}"'
    css += " long" if len(re.sub("<[^>]*>", "", content)) > LONG else ""
    scope = ' scope="row"' if tag == "th" else ""
    return f'<{tag} class="{css}"{scope}{key}>{content}</{tag}>'


def _number(value: float | None, text: str) -> str:
    """Returns a cell with a number, sorted by its value; a missing one is the lowest."""
    return _cell(text, -math.inf if value is None else value, css="number")


def _row(*cells: str, css: str = "", more: str = "") -> str:
    return f'<tr class="{css}"{more}>{"".join(cells)}</tr>'


def _table(name: str, head: Mapping[str, str], rows: Sequence[str], *, sortable: bool = True) -> str:
    """Returns a table in a box that scrolls; `head` has the class of each column by its title."""
    cells = ""
    for title, css in head.items():
        content = f'<button type="button">{_escaped(title)}</button>' if sortable and title else _escaped(title)
        cells += f'<th scope="col" class="{css}">{content}</th>'
    kind = "sortable" if sortable else ""
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{name}"><table class="{kind}"><thead><tr>{cells}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _name(label: str, style: tuple[str, str]) -> str:
    """Returns a run's name behind a piece of its line."""
    color, dash = style
    return (
        '<svg class="swatch" viewBox="0 0 30 8" aria-hidden="true"><line x1="0" y1="4" x2="30" y2="4" '
        f'stroke="{color}" stroke-width="2.5" stroke-dasharray="{SWATCH_DASHES[dash]}"/></svg> {_escaped(label)}'
    )


def _runs(comparison: Comparison, names: Mapping[str, str]) -> str:
    metric = comparison.metric
    head = {"#": "number", "Run": "", **({metric: "number"} if metric else {})}
    head |= {name.removeprefix("policy_options."): "" for name in comparison.settings}
    head |= {"status": "", "train time": "number", "id": "", "read from": ""}
    rows = []
    for number, row in enumerate(comparison.rows, start=1):
        settings = [(row.setting(name), row.settings.get(name)) for name in comparison.settings]
        seconds = row.metrics.get("seconds")
        cells = [
            _number(number, str(number)),
            _cell_of(names[row.label], row.label, tag="th"),
            *([_number(row.value, format_metric(metric, row.value))] if metric else []),
            *(_cell(text, value if is_number(value) else text) for text, value in settings),
            _cell(str(row.record.summary.get("status", "-"))),
            _number(seconds, "-" if seconds is None else duration(seconds)),
            _cell(row.record.id),
            _cell(row.record.source),
        ]
        best = row.value is not None and row.value == comparison.rows[0].value
        rows.append(_row(*cells, css="best" if best else ""))
    return _table("Runs", head, rows)


def _seeds(comparison: Comparison) -> str:
    metric, rows = comparison.metric, []
    for number, group in enumerate(comparison.groups, start=1):
        found = group.interval
        values = [None] * 4 if found is None else [found.mean, found.deviation, found.low, found.high]
        mean, deviation, low, high = values
        rows.append(
            _row(
                _number(number, str(number)),
                _cell(group.label, tag="th"),
                _number(len(group.rows), str(len(group.rows))),
                _number(mean, format_metric(metric, mean)),
                _number(deviation, format_metric(metric, deviation)),
                _number(low, format_interval(metric, low, high)),
                _cell(", ".join(format_metric(metric, row.value) for row in group.rows)),
            )
        )
    head = {"#": "number", "Configuration": "", "Runs": "number", "Mean": "number", "Deviation": "number"}
    return _table("Seeds", {**head, "95 % interval of the mean": "number", "Values, best first": ""}, rows)


def _group_tests(comparison: Comparison) -> str:
    rows = []
    for test in comparison.group_tests:
        metric = comparison.metric
        rows.append(
            _row(
                _cell(test.a),
                _cell(test.b),
                _verdict(test),
                _number(test.difference, format_difference(metric, test.difference)),
                _number(test.low, format_interval(metric, test.low, test.high, difference=True)),
                _number(test.p_adjusted, format_p(test.p_adjusted)),
                _number(test.p, format_p(test.p)),
            )
        )
    head = {"A": "", "B": "", "In words": "", "B less A": "number", "95 % interval": "number"}
    return _table("Configurations over their seeds", {**head, "p, adjusted": "number", "p": "number"}, rows)


def _verdict(test: PairedTest | GroupTest) -> str:
    """Returns a cell that says in words what a test of A and B came to."""
    if test.better is None:
        return _cell("not distinguishable", css="muted")
    return _cell("A is better" if test.better == test.a else "B is better", css="yes")


def _importance(comparison: Comparison) -> str:
    found = comparison.importance
    if found is None:
        return ""
    top = max(0.0, *found.shares.values()) or 1.0
    rows = []
    for name, share in found.shares.items():
        rank = found.correlations.get(name)
        rank = None if rank is None or math.isnan(rank) else rank
        bar = f'<span class="bar" style="width: {100 * max(0.0, share) / top:.1f}%"></span>'
        rows.append(
            _row(
                _cell(name, tag="th"),
                _number(share, f"{share:.2f}"),
                _cell_of(bar, css="bars"),
                _number(rank, "-" if rank is None else f"{rank:+.2f}"),
            )
        )
    head = {"Setting": "", "Importance": "number", "": "bars", "Rank correlation": "number"}
    return _table("Importance of settings", head, rows)


def _pairs(comparison: Comparison, images: ImageSet, names: Mapping[str, str]) -> str:
    """Returns the paired tests of an image set, with a choice of the run that they are about."""
    labels = list(images.predictions)
    tests = images.tests if len(images.tests) <= MAX_PAIRS else [test for test in images.tests if test.a == labels[0]]
    left_out = "" if len(tests) == len(images.tests) else " Here are those with the best run; compare.json has all."
    chosen = labels[0] if len(labels) > MANY_RUNS else ""
    options = '<option value="">any run</option>'
    for label in labels:
        selected = " selected" if label == chosen else ""
        options += f'<option value="{_place(comparison, label)}"{selected}>{_escaped(label)}</option>'
    reach = max(abs(end) for test in tests for end in (test.low, test.high)) or 1.0
    rows = []
    for test in tests:
        at = [60 + 56 * value / reach for value in (test.low, test.difference, test.high)]
        rows.append(
            _row(
                _cell_of(names[test.a], test.a, tag="th"),
                _cell_of(names[test.b], test.b),
                _verdict(test),
                _number(test.difference, format_difference("accuracy", test.difference)),
                _cell_of(_drawn_interval(*at), test.difference),
                _number(test.low, format_interval("accuracy", test.low, test.high, difference=True)),
                _number(test.only_a, f"{test.only_a:,}"),
                _number(test.only_b, f"{test.only_b:,}"),
                _number(test.p_adjusted, format_p(test.p_adjusted)),
                _number(test.p, format_p(test.p)),
                _cell({"exact": "exact", "chi2": "chi-square"}[test.method]),
                more=f' data-a="{_place(comparison, test.a)}" data-b="{_place(comparison, test.b)}"',
            )
        )
    head = {"A": "", "B": "", "In words": "", "B less A": "number", "": "", "95 % interval": "number"}
    head |= {"only A right": "number", "only B right": "number", "p, adjusted": "number", "p": "number", "test": ""}
    corrected = f"{_pairs_words(len(images.tests))}, those of all {len(labels)} runs."
    unchoosable = " hidden" if len(labels) == 2 or left_out else ""
    return (
        f"<h3>On {len(images.ids):,} images of {_escaped(images.split)}</h3><p>Adjusted p (Holm) and intervals (Bonett "
        f"and Price, 95 % together) are corrected for {corrected}{left_out}</p>"
        f'<p class="toolbar"{unchoosable}><label class="field">Pairs with <select class="pairs-with">{options}</select>'
        "</label></p>" + _table("Paired tests", head, rows)
    )


def _drawn_interval(low: float, middle: float, high: float) -> str:
    """Returns an interval as a line with a point, beside a line for no difference at 60."""
    return (
        '<svg class="interval" viewBox="0 0 120 14" aria-hidden="true">'
        '<line class="zero" x1="60" x2="60" y1="0" y2="14"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="7" y2="7"/><circle cx="{middle:.1f}" cy="7" r="3"/></svg>'
    )


def _calibration(comparison: Comparison, names: Mapping[str, str]) -> str:
    rows = []
    for row in comparison.rows:
        found = row.report
        if found is not None:
            rows.append(
                _row(
                    _cell_of(names[row.label], row.label, tag="th"),
                    _cell(f"{found.count:,} of {found.split}", found.count),
                    _number(found.accuracy, format_metric("accuracy", found.accuracy)),
                    _number(found.loss, f"{found.loss:.4f}"),
                    _number(found.macro_f1, f"{found.macro_f1:.4f}"),
                    _number(found.ece, f"{100 * found.ece:.2f} %"),
                    _number(found.mce, f"{100 * found.mce:.2f} %"),
                )
            )
    head = {"Run": "", "Images": "", "Accuracy": "number", "Loss": "number", "Macro F1": "number"}
    return _table("Calibration", {**head, "ECE": "number", "Largest gap": "number"}, rows)
