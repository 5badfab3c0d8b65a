"""Records of runs into a comparison: ranking, seeds, paired tests, error diffs, importance. No torch, no wandb."""

import math
import re
import shutil
import textwrap
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eva.config import FIELDS, UserError, default_of, unknown_name
from eva.files import finite
from eva.importance import Importance, is_number, measure_importance
from eva.predictions import Predictions, Report, measure
from eva.records import RunRecord
from eva.statistics import GroupTest, MeanInterval, PairedTest, mean_interval, paired_tests, welch_tests
from eva.text import (
    aligned,
    cut,
    format_difference,
    format_interval,
    format_metric,
    format_p,
    format_setting,
    listed,
    printable,
    shortened,
)

FORMAT = 1  # of what `to_dict` returns

# Where a run's files and rows go, how fast it computes, and what is drawn of it: not what it computes.
IGNORED = (
    *("out", "name", "tags", "group", "project", "entity", "tracking", "data_dir", "workers", "save_steps"),
    *("evaluate", "split", "gallery_size", "gradcam_layers", "table_rows"),
)
# Names a set of settings without being one: a column, but no reason to tell two configurations apart.
LABELS = ("recipe",)
SEED = "seed"

# The first of these that most runs have is what they are sorted by, unless another metric is asked for.
METRICS = (
    *("test_accuracy_best", "accuracy", "val_accuracy_best"),
    *("test_accuracy_last", "val_accuracy_last"),
)
# What is measured on the predictions, beside top-k accuracies.
EVALUATION_METRICS = ("accuracy", "loss", "macro_f1", "ece", "mce")
# A metric whose name has one of these words is better when it is lower.
LOW_IS_GOOD = {"loss", "ece", "mce", "nll", "brier", "error", "errors", "seconds", "parameters"}

HARD_SHARE = 0.8  # an image that so many of the runs get wrong is one that nearly every run gets wrong
SURE = 0.9  # mean probability of another class from which on the label is suspected
LABEL_LENGTH = 48


@dataclass(frozen=True, eq=False)
class Row:
    """One run of a comparison.

    Attributes:
        label: Its name made printable, short and unique among the runs: what tables and legends call it.
        record: The run.
        settings: Its settings by name, those of `policy_options` as `policy_options.NAME`; defaults where a record of
            an older eva lacks one; lists as tuples.
        metrics: All numbers that it can be sorted by: those of its summary, and those of its predictions
            (accuracy, loss, ece, top-k).
        value: The chosen metric; None if the run doesn't have it.
        report: What its predictions amount to; None without predictions.
    """

    label: str
    record: RunRecord
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    value: float | None
    report: Report | None

    def setting(self, name: str) -> str:
        """Returns a setting as text; a dash for an option that the run doesn't have."""
        return format_setting(self.settings[name]) if name in self.settings else "-"


@dataclass(frozen=True, eq=False)
class SeedGroup:
    """Runs of one configuration, which differ by their seed alone.

    Attributes:
        label: The settings in which it differs from other groups.
        rows: Its runs, best first.
        interval: Mean, deviation and t interval of the runs that have the metric; None if none has it.
    """

    label: str
    rows: tuple[Row, ...]
    interval: MeanInterval | None


@dataclass(frozen=True)
class HardImage:
    """An image that nearly every run gets wrong: a hard one, or one with a wrong label.

    Attributes:
        row: Its place in the image set.
        id: Its id.
        num_wrong: How many runs get it wrong.
        mean_loss: Mean cross-entropy over the runs.
        consensus: The one wrong class that nearly every run names; None without one.
        confidence: Mean probability of that class over all runs; None without one.
    """

    row: int
    id: str
    num_wrong: int
    mean_loss: float
    consensus: int | None
    confidence: float | None

    @property
    def suspect(self) -> bool:
        """Whether the runs agree so surely that the label may be wrong."""
        return self.confidence is not None and self.confidence >= SURE


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Runs whose predictions are about the same images, so that they can be compared image by image.

    Attributes:
        split: test, val or train.
        fingerprint: That of the data.
        classes: The K class names.
        ids: (N,) names of the images.
        labels: (N,) int64 class indices.
        predictions: By the label of the run, best run first; their rows are in the order of `ids`.
        tests: Of every pair of the runs, corrected for their number.
        hard: Images that nearly every run gets wrong: by number of runs, then by mean loss, highest first.
    """

    split: str
    fingerprint: str
    classes: tuple[str, ...]
    ids: NDArray[np.str_]
    labels: NDArray[np.int64]
    predictions: Mapping[str, Predictions]
    tests: tuple[PairedTest, ...] = ()
    hard: tuple[HardImage, ...] = ()


@dataclass(frozen=True, eq=False)
class ErrorDiff:
    """How the errors of run `b` differ from those of run `a`: rows of their image set, int64, rising.

    Attributes:
        images: The image set.
        fixed: Where a is wrong and b is right.
        broken: Where a is right and b is wrong.
        both_wrong: Where both are wrong.
        same_answer: Those of `both_wrong` where both name the same wrong class.
    """

    images: ImageSet
    fixed: NDArray[np.int64]
    broken: NDArray[np.int64]
    both_wrong: NDArray[np.int64]
    same_answer: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What runs have in common, where they differ, and which differences are more than chance.

    Attributes:
        metric: What they are sorted by; None if no run has a number to sort by.
        goal: Whether high (max) or low (min) values of it are good.
        rows: The runs, best first; those without the metric last.
        settings: Names of the settings with more than one value, those of `RunConfig` in its order.
        groups: Of seeds, best mean first; those without the metric last.
        group_tests: Of every pair of the groups with several seeds.
        image_sets: Runs that can be compared image by image, the largest set first.
        importance: Of the settings; None where it can't be told,
        no_importance: for this reason.
        remarks: What a reader must know, a line each: what is not compared and why, what is missing.
    """

    metric: str | None
    goal: Literal["max", "min"]
    rows: tuple[Row, ...]
    settings: tuple[str, ...]
    groups: tuple[SeedGroup, ...]
    group_tests: tuple[GroupTest, ...]
    image_sets: tuple[ImageSet, ...]
    importance: Importance | None
    no_importance: str
    remarks: tuple[str, ...]

    @property
    def compared_settings(self) -> tuple[str, ...]:
        """Those of `settings` that make a configuration: neither the seed nor the name of a recipe."""
        return _compared(self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Returns what compare.json holds: plain values, numbers that are not finite as None."""
        return dict(finite(_to_dict(self)))


def compare(records: Sequence[RunRecord], metric: str | None = None) -> Comparison:
    """Returns the comparison of runs, whatever they have in common.

    Args:
        records: At least one. A run that is there twice, from its folder and from W&B, counts once.
        metric: A number of the summaries (e.g. `val_accuracy_best`) or of the predictions (accuracy, loss, ece, ...).
            By default the first of `METRICS` that most runs have.

    Raises:
        UserError: There is no record, or no run has the metric.
    """
    if not records:
        raise UserError("there is no run to compare")
    records, remarks = _without_repeats(records)
    reports = [_report(record) for record in records]
    metrics = [_metrics(record, report) for record, report in zip(records, reports, strict=True)]
    metric = _choose_metric(metrics, metric)
    goal = goal_of(metric or "")
    rows = [
        Row(label, record, _settings(record), values, values.get(metric or ""), report)
        for label, record, values, report in zip(_labels(records), records, metrics, reports, strict=True)
    ]
    rows.sort(key=lambda row: _rank(row.value, goal))
    settings = _differing(rows)
    groups = _seed_groups(rows, settings, goal)
    image_sets, reasons = _image_sets(rows)
    importance, no_importance = _importance(rows, metric, settings)
    return Comparison(
        metric=metric,
        goal=goal,
        rows=tuple(rows),
        settings=settings,
        groups=groups,
        group_tests=welch_tests(
            {group.label: [row.value for row in group.rows if row.value is not None] for group in groups}, goal == "max"
        ),
        image_sets=image_sets,
        importance=importance,
        no_importance=no_importance,
        remarks=(
            *remarks,
            *_metric_remarks(rows, metric, image_sets),
            *reasons,
            *_layer_remarks(image_sets),
            *_notes(rows),
        ),
    )


def diff(comparison: Comparison, a: str, b: str) -> ErrorDiff:
    """Returns how the errors of the run labelled `b` differ from those of the run labelled `a`.

    Raises:
        UserError: There is no such run, or the two have no predictions of the same images.
    """
    labels = [row.label for row in comparison.rows]
    for label in (a, b):
        if label not in labels:
            raise UserError(unknown_name("run", label, labels))
    for images in comparison.image_sets:
        if a in images.predictions and b in images.predictions:
            return _diff(images, images.predictions[a], images.predictions[b])
    why = "; ".join(remark for remark in comparison.remarks if "image by image" in remark)
    raise UserError(f"runs {a!r} and {b!r} have no predictions of the same images ({why})")


def _diff(images: ImageSet, a: Predictions, b: Predictions) -> ErrorDiff:
    both = ~a.correct & ~b.correct
    return ErrorDiff(
        images=images,
        fixed=np.flatnonzero(~a.correct & b.correct),
        broken=np.flatnonzero(a.correct & ~b.correct),
        both_wrong=np.flatnonzero(both),
        same_answer=np.flatnonzero(both & (a.predicted == b.predicted)),
    )


# The runs


def _without_repeats(records: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """Returns the records without those of a run that is there already, and a line about each one left out."""
    kept: dict[Hashable, RunRecord] = {}
    remarks = []
    for record in records:
        # Ids of two projects may be equal by chance; with equal ids, configurations, curves and logits they are one.
        said = record.predictions.logits.tobytes() if record.predictions else b""
        key = (record.id, repr(sorted(record.config.items())), repr(sorted(record.epochs.items())), said)
        if key in kept:
            first, second = printable(kept[key].source), printable(record.source)
            remarks.append(f"the run {printable(record.id)} is there twice: taken from {first}, not from {second}")
        else:
            kept[key] = record
    return list(kept.values()), remarks


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """Returns a printable, short label for each record, unique among them: the name, with the id where names repeat."""
    names = [shortened(printable(record.name).strip() or printable(record.id), LABEL_LENGTH) for record in records]
    count = Counter(names)
    labels: list[str] = []
    for name, record in zip(names, records, strict=True):
        label = name if count[name] == 1 else f"{name} ({shortened(printable(record.id), LABEL_LENGTH)})"
        number = 2
        while label in labels:  # the ids repeat too
            label, number = f"{name} ({printable(record.id)} #{number})", number + 1
        labels.append(label)
    return labels


def _settings(record: RunRecord) -> dict[str, Any]:
    """Returns the settings that decide what a run computes, flat and hashable."""
    settings: dict[str, Any] = {}
    for name, field in FIELDS.items():
        if name in IGNORED:
            continue
        value = record.config.get(name, default_of(field))
        if name == "tta":  # a later evaluation may have changed it
            value = record.summary.get("evaluation", {}).get(name, value)
        if isinstance(value, Mapping) and default_of(field) == {}:  # elsewhere it is of another version, or damaged
            settings.update({f"{name}.{key}": _hashable(inner) for key, inner in sorted(value.items())})
        else:
            settings[name] = _hashable(value)
    return settings


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(inner) for inner in value)
    return repr(sorted(value.items())) if isinstance(value, Mapping) else value


def _differing(rows: Sequence[Row]) -> tuple[str, ...]:
    """Returns the names of the settings with more than one value; one that only some runs have differs too."""
    names = dict.fromkeys(name for row in rows for name in row.settings)
    return tuple(name for name in names if len({_identity(row.settings.get(name)) for row in rows}) > 1)


def _compared(settings: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in settings if name != SEED and name not in LABELS)


def _identity(value: Any) -> Hashable:
    """Returns what tells a value from others: true is not 1 here, but 1 is 1.0."""
    return (isinstance(value, bool), value)


def _metrics(record: RunRecord, report: Report | None) -> dict[str, float]:
    """Returns the finite numbers that a run can be sorted by, those of the predictions before those of the summary."""
    evaluation = record.summary.get("evaluation") if report is None else report.to_dict()
    evaluation = evaluation if isinstance(evaluation, Mapping) else {}
    values = {**record.summary, **{name: evaluation.get(name) for name in EVALUATION_METRICS}}
    values |= {f"top{k}_accuracy": value for k, value in (evaluation.get("top_k") or {}).items() if str(k) != "1"}
    return {name: float(value) for name, value in values.items() if is_number(value) and math.isfinite(value)}


def _choose_metric(metrics: Sequence[Mapping[str, float]], metric: str | None) -> str | None:
    known = {name for values in metrics for name in values}
    if metric is not None:
        if metric not in known:
            raise UserError(unknown_name("metric", metric, known) if known else "no run has any metric")
        return metric
    count = Counter(name for values in metrics for name in METRICS if name in values)
    return max(METRICS, key=lambda name: count[name]) if count else None


def goal_of(metric: str) -> Literal["max", "min"]:
    """Returns whether high or low values of a metric are good, by the words of its name."""
    return "min" if LOW_IS_GOOD & set(re.split(r"[^a-z]+", metric.lower())) else "max"


def _rank(value: float | None, goal: str) -> float:
    """Returns what sorts good values first and missing ones last."""
    return math.inf if value is None else -value if goal == "max" else value


def _metric_remarks(rows: Sequence[Row], metric: str | None, image_sets: Sequence[ImageSet]) -> list[str]:
    """Returns what is to be known about the metric, a line each."""
    if metric is None:
        return ["no run has an accuracy to be sorted by"]
    remarks = []
    missing = [row.label for row in rows if row.value is None]
    if missing:
        remarks.append(f"without {metric}, and therefore last: {listed(missing)}")
    chosen = [row.label for row in rows if row.value is not None and row.record.summary.get("selected_on") == "test"]
    if metric == "test_accuracy_best" and chosen:
        remarks.append(
            f"test_accuracy_best is the best of all epochs on test itself, so a little too good, in: {listed(chosen)}"
        )
    fingerprints = {row.record.summary.get("data_fingerprint") for row in rows if row.value is not None}
    if len(fingerprints - {None}) > 1:
        remarks.append(f"the runs are of different data, so their {metric} are not of the same images")
    elif len(image_sets) > 1 and not any(metric in row.record.summary for row in rows):
        remarks.append(f"{metric} is measured on different images: {listed([_described(one) for one in image_sets])}")
    return remarks


def _layer_remarks(image_sets: Sequence[ImageSet]) -> list[str]:
    """Says where Grad-CAM maps stand side by side that are of different layers."""
    remarks = []
    for images in image_sets:
        layers = sorted({said.layer for said in images.predictions.values() if said.layer})
        if len(layers) > 1:
            named = ", ".join(map(printable, layers))
            remarks.append(f"Grad-CAM maps are of different layers ({named}): their values are not comparable")
    return remarks


def _notes(rows: Sequence[Row]) -> list[str]:
    """Returns what is wrong about single runs, a line each."""
    remarks = []
    for row in rows:
        status = row.record.summary.get("status")
        if status not in ("finished", None):
            remarks.append(f"{row.label}: {printable(str(status))}")
        remarks.extend(f"{row.label}: {printable(note)}" for note in row.record.notes)
    return remarks


# Seeds


def _seed_groups(rows: Sequence[Row], settings: Sequence[str], goal: str) -> tuple[SeedGroup, ...]:
    """Returns the runs by configuration, best mean first."""
    by_configuration: dict[Hashable, list[Row]] = defaultdict(list)
    # Data are what they hold, wherever they lie.
    names = [name for name in _compared(settings) if name != "data"]
    fingerprints = {_fingerprint(row) for row in rows}
    for row in rows:
        key = (_fingerprint(row), *(_identity(row.settings.get(name)) for name in names))
        by_configuration[key].append(row)
    groups = []
    for members in by_configuration.values():
        told = [f"{name}={members[0].setting(name)}" for name in names]
        if len(fingerprints) > 1:
            told.insert(0, f"data={_start(_fingerprint(members[0]))}")
        label = ", ".join(told)
        values = [row.value for row in members if row.value is not None]
        groups.append(SeedGroup(label or "all runs", tuple(members), mean_interval(values) if values else None))
    return tuple(sorted(groups, key=lambda group: _rank(group.interval.mean if group.interval else None, goal)))


def _fingerprint(row: Row) -> str:
    """Returns what tells the data of a run from others: their fingerprint, or else their name."""
    return str(row.record.summary.get("data_fingerprint") or row.settings["data"])


# Image by image


def _report(record: RunRecord) -> Report | None:
    """Returns what a run's predictions amount to; None unless there are some and all their logits are finite."""
    predictions = record.predictions
    if predictions is None or not len(predictions) or not np.isfinite(predictions.logits).all():
        return None
    return measure(predictions)


def _image_sets(rows: Sequence[Row]) -> tuple[tuple[ImageSet, ...], list[str]]:
    """Returns the runs by the images that their predictions are of, the largest set first, and why others are apart."""
    sets: list[dict[str, Predictions]] = []
    without = [row.label for row in rows if row.record.predictions is None]
    broken = [row.label for row in rows if row.record.predictions is not None and row.report is None]
    for row in rows:
        if row.record.predictions is not None and row.report is not None:
            _join(sets, row.label, row.record.predictions)
    sets.sort(key=len, reverse=True)  # stable: of equally large ones, that with the best run first
    image_sets = tuple(_image_set(predictions) for predictions in sets)
    reasons = []
    if without:
        reasons.append(f"not compared image by image, without predictions: {listed(without)}")
    if broken:
        reasons.append(f"not compared image by image, as some of their logits are not finite: {listed(broken)}")
    for other in image_sets[1:]:
        names, count = listed(list(other.predictions)), len(image_sets[0].predictions)
        others = "another run" if count == 1 else f"{count} other runs"
        reasons.append(f"not compared image by image with {others}: {names}, {_difference(image_sets[0], other)}")
    return image_sets, reasons


def _join(sets: list[dict[str, Predictions]], label: str, predictions: Predictions) -> None:
    """Adds predictions to the set of those of the same images, in its order, or makes a set of them."""
    for members in sets:
        aligned = _aligned(predictions, next(iter(members.values())))
        if aligned is not None:
            members[label] = aligned
            return
    sets.append({label: predictions})


def _aligned(predictions: Predictions, model: Predictions) -> Predictions | None:
    """Returns predictions with their rows in the order of `model`'s; None if they are not of the same images."""
    same = ("split", "fingerprint", "classes")
    if any(getattr(predictions, name) != getattr(model, name) for name in same) or len(predictions) != len(model):
        return None
    if not np.array_equal(predictions.ids, model.ids):
        order, model_order = np.argsort(predictions.ids, kind="stable"), np.argsort(model.ids, kind="stable")
        if not np.array_equal(predictions.ids[order], model.ids[model_order]):
            return None
        rows = np.empty_like(order)
        rows[model_order] = order
        predictions = replace(
            predictions,
            ids=predictions.ids[rows],
            labels=predictions.labels[rows],
            logits=predictions.logits[rows],
            maps=None if predictions.maps is None else predictions.maps[rows],
        )
    return predictions if np.array_equal(predictions.labels, model.labels) else None


def _image_set(predictions: Mapping[str, Predictions]) -> ImageSet:
    first = next(iter(predictions.values()))
    several = len(predictions) > 1
    return ImageSet(
        split=first.split,
        fingerprint=first.fingerprint,
        classes=first.classes,
        ids=first.ids,
        labels=first.labels,
        predictions=predictions,
        tests=tuple(paired_tests({label: one.correct for label, one in predictions.items()})) if several else (),
        hard=_hard_images(list(predictions.values())) if several else (),
    )


def _difference(a: ImageSet, b: ImageSet) -> str:
    """Returns in words why two image sets are not one."""
    if a.fingerprint != b.fingerprint:
        return f"different data (fingerprint {_start(b.fingerprint)} instead of {_start(a.fingerprint)})"
    if a.split != b.split:
        return f"different split ({printable(b.split)} instead of {printable(a.split)})"
    if a.classes != b.classes:
        return "different classes, though the data's fingerprint is the same: one of the files is damaged"
    common = len(np.intersect1d(a.ids, b.ids))
    if common < max(len(a.ids), len(b.ids)):
        return f"different images of {printable(a.split)} ({len(b.ids)} instead of {len(a.ids)}, {common} in common)"
    return "different labels of the same images: one of the files is damaged"


def _start(fingerprint: str) -> str:
    return shortened(printable(fingerprint), 13)


def _described(images: ImageSet) -> str:
    return f"{len(images.ids)} of {printable(images.split)} ({_start(images.fingerprint)})"


def _hard_images(predictions: Sequence[Predictions]) -> tuple[HardImage, ...]:
    """Returns the images that nearly every one of the runs gets wrong, the hardest first."""
    num_runs, first = len(predictions), predictions[0]
    needed = math.ceil(round(HARD_SHARE * num_runs, 9))
    num_wrong = np.sum([~one.correct for one in predictions], axis=0)  # (N,)
    mean_loss = np.mean([one.losses for one in predictions], axis=0)  # (N,)
    rows = np.flatnonzero(num_wrong >= needed)
    rows = rows[np.lexsort((-mean_loss[rows], -num_wrong[rows]))]
    answers = np.stack([one.predicted[rows] for one in predictions], axis=1)  # (hard, runs)
    hard = []
    for row, answer in zip(rows.tolist(), answers, strict=True):
        votes = np.bincount(answer)
        votes[first.labels[row] : first.labels[row] + 1] = 0  # the label itself is no other answer
        consensus = confidence = None
        if votes.max() >= needed:
            consensus = int(votes.argmax())
            confidence = float(np.mean([one.probabilities[row, consensus] for one in predictions]))
        id, loss = str(first.ids[row]), float(mean_loss[row])
        hard.append(HardImage(row, id, int(num_wrong[row]), loss, consensus, confidence))
    return tuple(hard)


def _importance(rows: Sequence[Row], metric: str | None, settings: Sequence[str]) -> tuple[Importance | None, str]:
    """Returns the importance of the settings for the metric, and the reason if it can't be told."""
    names = _compared(settings)
    if metric is None or not names:
        return None, "all runs have the same settings, or none has a metric"
    ranked = [(row, row.value) for row in rows if row.value is not None]
    columns = {name: [row.settings.get(name) for row, _ in ranked] for name in names}
    try:
        return measure_importance(columns, [value for _, value in ranked]), ""
    except ValueError as error:
        return None, f"the importance of settings for {metric} {error}"


# What is told


def _to_dict(comparison: Comparison) -> dict[str, Any]:
    groups = [
        {
            "configuration": group.label,
            "runs": [row.label for row in group.rows],
            **(asdict(group.interval) if group.interval else {}),
        }
        for group in comparison.groups
    ]
    return {
        "format": FORMAT,
        "metric": comparison.metric,
        "goal": comparison.goal,
        "settings": list(comparison.settings),
        "runs": [
            {
                "label": row.label,
                "name": row.record.name,
                "id": row.record.id,
                "source": row.record.source,
                "status": row.record.summary.get("status"),
                "value": row.value,
                "settings": {name: row.settings.get(name) for name in comparison.settings},
                "metrics": row.metrics,
                "notes": list(row.record.notes),
            }
            for row in comparison.rows
        ],
        "groups": groups,
        "group_tests": [asdict(test) for test in comparison.group_tests],
        "image_sets": [
            {
                "split": images.split,
                "fingerprint": images.fingerprint,
                "classes": list(images.classes),
                "count": len(images.ids),
                "runs": list(images.predictions),
                "confusion": {
                    row.label: row.report.confusion.tolist()
                    for row in comparison.rows
                    if row.report is not None and row.label in images.predictions
                },
                "tests": [asdict(test) for test in images.tests],
                "hard": [{**asdict(image), "suspect": image.suspect} for image in images.hard],
            }
            for images in comparison.image_sets
        ],
        "importance": None if comparison.importance is None else asdict(comparison.importance),
        "no_importance": comparison.no_importance,
        "remarks": list(comparison.remarks),
    }


def table(comparison: Comparison, width: int | None = None) -> str:
    """Returns the comparison for a terminal: runs, seeds, what is better than what, and remarks.

    Columns that don't fit beside each other follow below, as a further table of the same runs.

    Args:
        comparison: What to show.
        width: Columns of the terminal; by default this terminal's.
    """
    width = max(20, width or shutil.get_terminal_size().columns)
    metric = comparison.metric
    order = {"max": "highest first", "min": "lowest first"}[comparison.goal]
    count = f"{len(comparison.rows)} runs" if len(comparison.rows) > 1 else "one run"
    parts = [count + (f" by {metric}, {order}, best marked *" if metric else "")]
    head = ["  run", *([metric] if metric else []), *comparison.settings]
    best = comparison.rows[0].value
    rows = [
        [
            ("* " if best is not None and row.value == best else "  ") + row.label,
            *([format_metric(metric, row.value)] if metric else []),
            *(row.setting(name) for name in comparison.settings),
        ]
        for row in comparison.rows
    ]
    parts.append(aligned(head, rows, width))
    several = [group for group in comparison.groups if group.interval and group.interval.count > 1]
    if several:
        parts.append("seeds of one configuration, with the 95 % interval of their mean")
        parts.append(
            aligned(["configuration", "runs", "mean", "deviation", "interval"], _seeds(several, metric), width)
        )
    for images in comparison.image_sets:
        if images.tests:
            parts.extend(_pairs(images, width))
    parts.extend(f"- {remark}" for remark in comparison.remarks)
    # Tables have their line breaks already, and no line of them is too long.
    lines = [line for part in parts for line in (part.split("\n") if "\n" in part else textwrap.wrap(part, width))]
    return "\n".join(cut(line, width) for line in lines)


def _seeds(groups: Sequence[SeedGroup], metric: str | None) -> list[list[str]]:
    rows = []
    for group in groups:
        found = group.interval
        assert found is not None
        mean, deviation = format_metric(metric, found.mean), format_metric(metric, found.deviation)
        rows.append([group.label, str(found.count), mean, deviation, format_interval(metric, found.low, found.high)])
    return rows


def _pairs(images: ImageSet, width: int) -> list[str]:
    """Returns the title and the table of the pairs with the best run of an image set."""
    best = next(iter(images.predictions))
    tests = [test for test in images.tests if test.a == best]
    title = f"image by image on {len(images.ids)} images of {printable(images.split)}: {best} and"
    rows = [
        [
            test.b,
            format_difference("accuracy", test.difference),
            format_interval("accuracy", test.low, test.high, difference=True),
            format_p(test.p_adjusted),
            f"{test.better} is better" if test.better else test.verdict,
        ]
        for test in tests
    ]
    pairs = "1 pair" if len(images.tests) == 1 else f"{len(images.tests)} pairs"
    corrected = f"p (McNemar) and interval corrected for {pairs}"
    head = ["run", "difference", "95 % interval", "p", "verdict"]
    return [title, aligned(head, rows, width), corrected]
