"""The picture of a search shows the trials' numbers where they belong, and nothing hides anything."""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.testing import assert_allclose
from PIL import Image

from eva import figures
from eva.ranking import TrialRecord, importance
from eva.sweep_figures import STATES, search

METRIC = "val/accuracy_best"
LOG = {"lr_min", "lr_max", "weight_decay"}
LONG = "policy_options.a_very_long_name_of_an_option_with_a_$_and_more_words_than_a_panel_is_wide"

# Parameters in the order in which a search of so many has them.
DRAWS: dict[str, Any] = {
    "lr_max": lambda rng: float(10 ** rng.uniform(-4, 0)),
    "norm": lambda rng: str(rng.choice(["batch", "layer", "ghost"])),
    "lr_min": lambda rng: float(10 ** rng.uniform(-6, -3)),
    LONG: lambda rng: float(rng.uniform(0, 0.5)),
    "policy": lambda rng: f"a policy with a long name, of which there is a variant {rng.integers(30)} as well",
    "nesterov": lambda rng: bool(rng.integers(2)),
    "batch_size": lambda rng: int(rng.choice([32, 64, 128, 1024])),
    "lr_steps": lambda rng: rng.integers(1, 4, 2).tolist(),
    "weight_decay": lambda rng: float(10 ** rng.uniform(-6, -2)),
    "dropout": lambda rng: float(rng.uniform(0, 1e-6)),
}


@pytest.fixture(autouse=True)
def no_figure_is_in_pyplots_care() -> Iterator[None]:
    """Such a figure would stay in memory, and pop up in a window."""
    yield
    assert not plt.get_fignums()


def trial(number: int, objective: float | None, values: dict[str, Any], state: str = "finished") -> TrialRecord:
    return TrialRecord(number, state, values, objective, (), 1.0, "", None, None)


def a_search(count: int, num_parameters: int = 3, seed: int = 0) -> list[TrialRecord]:
    """Trials in all states, some of which have no value; the first one finished."""
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(count):
        values = {name: DRAWS[name](rng) for name in list(DRAWS)[:num_parameters]}
        state = "finished" if number == 0 else str(rng.choice(list(STATES), p=[0.5, 0.3, 0.1, 0.1]))
        value = 0.9 - 0.1 * math.log10(values["lr_max"] / 0.1) ** 2 + float(rng.normal(0, 0.01))
        has_value = state in ("finished", "stopped") or (state == "diverged" and number % 2)
        trials.append(trial(number, value if has_value else None, values, state))
    return trials


def titled(figure: Figure, title: str) -> Axes:
    (found,) = [axes for axes in figure.axes if axes.get_title().split("\n")[0] == title]
    return found


def scatters(axes: Axes) -> list[PathCollection]:
    return [each for each in axes.collections if isinstance(each, PathCollection)]


def points(axes: Axes, state: str | None = None) -> list[tuple[float, float]]:
    """The (x, y) of the scatters, of one state or of all."""
    chosen = [each for each in scatters(axes) if state is None or each.get_label() == state]
    return sorted((float(x), float(y)) for each in chosen for x, y in np.asarray(each.get_offsets()))


def with_value(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [each for each in trials if each.objective is not None]


def assert_nothing_hides_anything(figure: Figure) -> None:
    """No text or panel lies over another or outside the figure, and every panel has room."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that fails is told by a warning
        figure.draw_without_rendering()
    inside = figure.bbox
    boxes: list[tuple[str, Bbox]] = [("legend", legend.get_window_extent()) for legend in figure.legends]
    texts: list[Text] = list(figure.texts)
    for axes in figure.axes:
        assert axes.get_window_extent().width > 90 or axes.get_label() == "<colorbar>"
        assert axes.get_window_extent().height > 80
        boxes.append(("panel", axes.get_window_extent()))
        ticks = [
            tick.label1
            for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
            for tick in axis.get_major_ticks()
            if min(limits) <= tick.get_loc() <= max(limits) and tick.label1.get_visible()
        ]
        texts += [axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()]
        texts += [*ticks, axes.title, axes.xaxis.label, axes.yaxis.label]
    suptitle = figure._suptitle  # type: ignore[attr-defined]
    texts += [suptitle]
    boxes += [
        (text.get_text(), text.get_window_extent())
        for text in dict.fromkeys(texts)
        if text.get_text() and text.get_visible()
    ]
    for (one, box), (other, second) in itertools.combinations(boxes, 2):
        # Boxes of text have blank edges: half a pixel is none.
        assert not box.padded(-0.5).overlaps(second.padded(-0.5)), (one, other)
    for name, box in boxes:
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, name


# The overview


@pytest.mark.parametrize("goal", ["maximize", "minimize"])
def test_the_objective_is_drawn_over_the_trials_with_the_best_so_far(goal: str) -> None:
    trials = a_search(40)
    axes = titled(search(trials, goal, METRIC, LOG), "objective by trial")
    expected = [(float(each.number), 100 * each.objective) for each in trials if each.objective is not None]
    assert_allclose(points(axes), expected)
    for state in ("finished", "stopped", "diverged"):
        of_state = [(each.number, 100 * each.objective) for each in trials if each.objective and each.state == state]
        assert_allclose(points(axes, state), of_state)
    (best,) = [line for line in axes.lines if line.get_label() == "best so far"]
    accumulate = np.maximum.accumulate if goal == "maximize" else np.minimum.accumulate
    x, y = np.array(expected).T
    assert np.asarray(best.get_xdata()) == pytest.approx(x)
    assert np.asarray(best.get_ydata()) == pytest.approx(accumulate(y))
    assert best.get_drawstyle() == "steps-post"


def test_trials_without_a_value_are_marked_in_a_row_below_all_values() -> None:
    trials = a_search(40)
    trials[3:5] = [trial(3, math.nan, {"lr_max": 0.1}, "diverged"), trial(4, None, {"lr_max": 0.1}, "diverged")]
    figure = search(trials, "maximize", METRIC, LOG)
    axes = titled(figure, "objective by trial")
    figure.draw_without_rendering()
    lowest = min(axes.transData.transform(points(axes))[:, 1])
    for state in ("diverged", "failed"):
        (row,) = [line for line in axes.lines if line.get_label() == f"{state}, no value"]
        expected = [each.number for each in trials if each.state == state and each.objective in (None, math.nan)]
        assert np.asarray(row.get_xdata()).tolist() == expected and expected
        height = row.get_transform().transform([(0.0, float(np.asarray(row.get_ydata())[0]))])[0, 1]
        assert axes.get_window_extent().y0 < height < lowest - 5


def test_states_differ_by_colour_and_by_marker() -> None:
    axes = titled(search(a_search(40), "maximize", METRIC, LOG), "objective by trial")
    colors = {to_hex(np.asarray(each.get_facecolor())[0]) for each in scatters(axes)}
    shapes = {each.get_paths()[0].vertices.tobytes() for each in scatters(axes)}  # type: ignore[union-attr]
    assert len(colors) == len(shapes) == 3
    assert len({color for color, _ in STATES.values()}) == len({marker for _, marker in STATES.values()}) == 4
    assert all(MarkerStyle(marker) for _, marker in STATES.values())


def test_repeats_waiting_and_running_trials_are_no_part_of_the_picture() -> None:
    trials = a_search(10)
    others = [
        trial(10, 0.99, {"lr_max": 0.1}, "running"),
        trial(11, None, {"lr_max": 0.1}, "waiting"),
        TrialRecord(12, "finished", {"lr_max": 0.1}, 0.99, (), 1.0, "", None, 3),
    ]
    one, two = search(trials, "maximize", METRIC, LOG), search([*trials, *others], "maximize", METRIC, LOG)
    assert [points(axes) for axes in one.axes] == [points(axes) for axes in two.axes]
    assert one.get_suptitle() == two.get_suptitle()


def test_losses_keep_their_scale_and_a_few_enormous_ones_do_not_flatten_the_rest() -> None:
    losses = [0.5, 0.6, 0.55, 0.9, 1e6, 0.7, math.nan]
    trials = [trial(k, loss, {"lr_max": 10.0**-k}) for k, loss in enumerate(losses)]
    figure = search(trials, "minimize", "val/loss", LOG)
    axes = titled(figure, "objective by trial")
    assert points(axes) == [(float(k), loss) for k, loss in enumerate(losses) if not math.isnan(loss)]
    low, high = axes.get_ylim()
    assert low < 0.5 and 0.9 < high < 3
    assert "1 trial lies outside the objective's axis" in [text.get_text() for text in figure.texts]
    assert axes.get_ylabel() == "val/loss"
    assert "lowest val/loss: 0.5 (trial 0)" in figure.get_suptitle()


def test_accuracies_are_in_percent_and_all_inside() -> None:
    trials = [trial(k, value, {"lr_max": 10.0**-k}) for k, value in enumerate([0.99, 0.989, 0.988, 0.1])]
    figure = search(trials, "maximize", METRIC, LOG)
    axes = titled(figure, "objective by trial")
    low, high = axes.get_ylim()
    assert low < 10 and high > 99
    assert axes.get_ylabel() == f"{METRIC}, %"
    assert not [text for text in figure.texts if "outside" in text.get_text()]


# Slices


def test_a_slice_shows_the_objective_over_the_values_on_the_axis_that_they_were_drawn_on() -> None:
    trials = a_search(40, 10)
    figure = search(trials, "maximize", METRIC, LOG)
    for name, scale in (("lr_max", "log"), ("lr_min", "log")):
        axes = titled(figure, name)
        expected = [(each.values[name], 100 * each.objective) for each in with_value(trials) if each.objective]
        assert_allclose(points(axes), sorted(expected))
        assert axes.get_xscale() == scale
    unlogged = titled(search(trials, "maximize", METRIC, ()), "lr_max")
    assert unlogged.get_xscale() == "linear"
    assert_allclose(points(unlogged), points(titled(figure, "lr_max")))


def test_a_value_that_has_no_logarithm_is_drawn_on_a_plain_axis() -> None:
    trials = [trial(k, 0.5 + 0.01 * k, {"weight_decay": value}) for k, value in enumerate([0.0, 1e-4, 1e-3, 1e-2])]
    assert titled(search(trials, "maximize", METRIC, LOG), "weight_decay").get_xscale() == "linear"


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("norm", ["batch", "ghost", "layer"]),
        ("nesterov", ["false", "true"]),
        ("batch_size", ["32", "64", "128", "1024"]),
    ],
)
def test_choices_are_columns_with_their_mean(name: str, labels: list[str]) -> None:
    trials = [
        trial(each.number, each.objective, {name: DRAWS[name](np.random.default_rng(each.number))}, each.state)
        for each in a_search(64)
    ]
    axes = titled(search(trials, "maximize", METRIC, LOG), name)
    assert [text.get_text() for text in axes.get_xticklabels()] == labels
    found = points(axes)
    assert len(found) == len(with_value(trials))
    for column, label in enumerate(labels):
        expected = sorted(
            100 * each.objective
            for each in with_value(trials)
            if each.objective is not None and str(each.values[name]).lower() == label
        )
        assert sorted(y for x, y in found if abs(x - column) < 0.3) == pytest.approx(expected)
        (mean,) = [line for line in axes.lines if abs(float(np.mean(np.asarray(line.get_xdata()))) - column) < 0.01]
        assert np.asarray(mean.get_ydata()) == pytest.approx([np.mean(expected)] * 2)
    assert len({x for x, _ in found}) == len(found)  # side by side, so that equal values are seen


def test_of_very_many_choices_the_rare_ones_share_a_column() -> None:
    names = ["often"] * 10 + [f"rare{k:02}" for k in range(30)]
    trials = [trial(k, 0.5 + 0.001 * k, {"policy": name}) for k, name in enumerate(names)]
    axes = titled(search(trials, "maximize", METRIC, LOG), "policy")
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert len(labels) == 12 and labels[0] == "often" and labels[-1] == "20 others"
    assert len([x for x, _ in points(axes) if abs(x - 11) < 0.3]) == 20


def test_long_choices_that_begin_alike_are_told_apart() -> None:
    policies = [f"{'the same words ' * 4}variant {10 + k % 4} of the policy" for k in range(20)]
    trials = [trial(k, 0.5, {"policy": policy}) for k, policy in enumerate(policies)]
    axes = titled(search(trials, "maximize", METRIC, LOG), "policy")
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == [f"…{number} of the policy" for number in (10, 11, 12, 13)]


def test_slices_come_by_importance_and_what_has_no_room_is_said() -> None:
    trials = a_search(64, 10)
    figure = search(trials, "maximize", METRIC, LOG)
    found, _ = importance(trials, METRIC)
    assert found is not None and found.explained > 0
    # Panels in reading order; names as far as they fit.
    titles = [axes.get_title().split("\n") for axes in figure.axes if "importance" in axes.get_title()]
    expected = list(found.shares.items())
    assert len(titles) == 8
    for (name, told), (wanted, share) in zip(titles, expected[:8], strict=True):
        assert name == wanted or (wanted == LONG and name.startswith("policy_opt") and "…" in name)
        assert told == f"importance {max(share, 0.0):.2f}"
    (caption,) = [text.get_text() for text in figure.texts if "not drawn" in text.get_text()]
    for name, _ in expected[8:]:
        assert (name if name != LONG else "policy_options") in caption


def test_the_seed_is_no_parameter() -> None:
    trials = [trial(k, 0.5 + 0.01 * k, {"norm": "batch", "seed": k}) for k in range(3)]
    assert [axes.get_title() for axes in search(trials, "maximize", METRIC, LOG).axes] == ["objective by trial", "norm"]


# Both learning rates


@pytest.mark.parametrize(("goal", "best"), [("maximize", max), ("minimize", min)])
def test_the_plane_of_both_rates_shows_the_objective_by_colour_and_the_best_as_a_star(goal: str, best: Any) -> None:
    trials = a_search(40)
    figure = search(trials, goal, METRIC, LOG)
    axes = titled(figure, "learning rates (star: best)")
    assert axes.get_xscale() == axes.get_yscale() == "log"
    shown = {}
    for each in scatters(axes):
        for (x, y), value in zip(np.asarray(each.get_offsets()), np.asarray(each.get_array()), strict=True):
            shown[float(x), float(y)] = float(value)
    expected = {
        (each.values["lr_min"], each.values["lr_max"]): 100 * each.objective for each in trials if each.objective
    }
    assert shown == pytest.approx(expected)
    (star,) = [each for each in scatters(axes) if each.get_label() == "best"]
    chosen = best(with_value(trials), key=lambda each: each.objective)
    assert_allclose(np.asarray(star.get_offsets()), [[chosen.values["lr_min"], chosen.values["lr_max"]]])
    assert [each for each in figure.axes if each.get_label() == "<colorbar>"]


def test_without_both_rates_there_is_no_plane() -> None:
    assert len(search(a_search(8, 2), "maximize", METRIC, LOG).axes) == 3


# Sizes


@pytest.mark.parametrize("num_parameters", [1, 2, 3, 5, 8, 10])
@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_nothing_is_hidden_whatever_the_number_of_trials_and_parameters(count: int, num_parameters: int) -> None:
    assert_nothing_hides_anything(search(a_search(count, num_parameters), "maximize", METRIC, LOG))


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e9])
@pytest.mark.parametrize("span", [1e-5, 0.3, 3.0, 12.0])
def test_ticks_of_any_range_have_room(scale: float, span: float) -> None:
    rng = np.random.default_rng(0)
    rates = scale * 10 ** (span * rng.uniform(0, 1, (12, 3)))
    trials = [
        trial(
            k,
            scale * float(rng.uniform()),
            {"lr_min": float(a), "lr_max": float(b), "width": float(c), "more": float(a)},
        )
        for k, (a, b, c) in enumerate(rates)
    ]
    figure = search(trials, "minimize", "val/loss", LOG)
    assert_nothing_hides_anything(figure)
    for name in ("lr_min", "width"):
        axes = titled(figure, name)
        low, high = axes.get_xlim()
        labels = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        assert len(set(labels)) == len(labels) >= 2


def test_long_names_are_cut_and_nothing_is_hidden() -> None:
    metric = "validation/" + "a_very_long_metric_name_" * 6
    names = [f"{'long_name_' * 9}{k}" for k in range(20)]
    trials = [
        trial(k, 0.5, {name: f"{'long value ' * 9}{(k + j) % 5}" for j, name in enumerate(names)}) for k in range(9)
    ]
    assert_nothing_hides_anything(search(trials, "minimize", metric, LOG))


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(0, None, {"lr_max": 0.1, "lr_min": 0.01}, "failed")],
        [trial(0, math.nan, {"lr_max": 0.1, "lr_min": 0.01}, "diverged"), trial(1, None, {}, "failed")],
        [trial(0, 0.0, {}), trial(1, 0.0, {})],
        [trial(0, 0.5, {"lr_max": 0.1}), trial(1, 0.6, {"lr_min": 0.1}), trial(2, 0.6, {"lr_max": None})],
        [trial(k, 0.5, {"lr_max": math.nan if k else math.inf, "lr_min": 0}) for k in range(3)],
    ],
    ids=["none", "failed", "nan", "no parameter", "conditional parameters", "odd values"],
)
def test_searches_without_much_to_show_are_drawn(trials: list[TrialRecord], tmp_path: Path) -> None:
    figure = search(trials, "maximize", METRIC, LOG)
    assert_nothing_hides_anything(figure)
    if not any(each.objective is not None and math.isfinite(each.objective) for each in trials):
        assert "no trial has a result" in [text.get_text() for text in figure.axes[0].texts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = figures.save(figure, tmp_path / "search.png")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 600
