"""A comparison ranks, groups and pairs runs as a second, plain computation does, and says what it doesn't compare."""

import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from made_runs import FINGERPRINT, made_images, made_labels, made_predictions, made_record
from scipy import stats

from eva.comparison import Comparison, compare, diff, goal_of, table
from eva.config import UserError
from eva.records import RunRecord
from eva.statistics import paired_tests
from eva.text import columns_of

LABELS = made_labels(200)


def runs(accuracies: dict[str, float | None], **summary: Any) -> list[RunRecord]:
    """Records without predictions, by name and accuracy."""
    return [
        made_record(name, f"id-{name}", {"seed": number}, {"test_accuracy_best": accuracy, **summary})
        for number, (name, accuracy) in enumerate(accuracies.items())
    ]


def predicting(count: int = 3, **options: Any) -> list[RunRecord]:
    """Records with predictions of the same images, whose labels are their names."""
    return [
        made_record(
            f"run{k}", f"id{k}", {"seed": k}, predictions=made_predictions(LABELS, k, 0.1 + 0.02 * k, **options)
        )
        for k in range(count)
    ]


def changed(record: RunRecord, **fields: Any) -> RunRecord:
    """The record with other predictions: fields of `Predictions`."""
    assert record.predictions is not None
    return dataclasses.replace(record, predictions=dataclasses.replace(record.predictions, **fields))


def labels_of(comparison: Comparison) -> list[str]:
    return [row.label for row in comparison.rows]


# The metric


def test_runs_are_sorted_by_the_metric_and_those_without_it_are_last_and_said() -> None:
    found = compare(runs({"low": 0.8, "none": None, "high": 0.9, "nan": math.nan, "middle": 0.85}))
    assert labels_of(found) == ["high", "middle", "low", "none", "nan"]
    assert [row.value for row in found.rows] == [0.9, 0.85, 0.8, None, None]
    assert "without test_accuracy_best, and therefore last: none, nan" in found.remarks


@pytest.mark.parametrize(
    ("metric", "goal"),
    [
        ("test_accuracy_best", "max"),
        ("images_per_second", "max"),
        ("macro_f1", "max"),
        ("loss", "min"),
        ("test_loss_best", "min"),
        ("ece", "min"),
        ("seconds", "min"),
        ("recall", "max"),
        ("closset", "max"),
    ],
)
def test_the_name_of_a_metric_says_which_end_is_good(metric: str, goal: str) -> None:
    assert goal_of(metric) == goal


def test_a_metric_of_which_low_values_are_good_puts_the_lowest_first() -> None:
    records = [made_record(name, name, {}, {"seconds": value}) for name, value in (("slow", 90), ("fast", 30))]
    found = compare(records, "seconds")
    assert (found.goal, labels_of(found)) == ("min", ["fast", "slow"])


def test_the_metric_is_by_default_the_one_that_most_runs_have() -> None:
    records = runs({"a": None, "b": None, "c": 0.5}, val_accuracy_best=0.7)
    assert compare(records).metric == "val_accuracy_best"
    assert compare(runs({"a": 0.1, "b": 0.2}, val_accuracy_best=0.7)).metric == "test_accuracy_best"
    without = [dataclasses.replace(record, summary={}) for record in predicting(2)]
    assert compare(without).metric == "accuracy"


def test_metrics_of_the_predictions_are_those_of_the_predictions() -> None:
    records = predicting(3)
    for metric, expected in (
        ("accuracy", lambda p: p.correct.mean()),
        ("loss", lambda p: p.losses.mean()),
        ("top3_accuracy", lambda p: np.mean([y in row for y, row in zip(p.labels, p.top(3), strict=True)])),
    ):
        found = compare(records, metric)
        for row in found.rows:
            assert row.value == pytest.approx(expected(row.record.predictions), abs=1e-12)


def test_without_predictions_the_summary_tells_what_an_evaluation_found() -> None:
    evaluation = {"accuracy": 0.75, "ece": 0.05, "top_k": {"1": 0.75, "3": 0.9}}
    found = compare([made_record("a", "a", {}, {"evaluation": evaluation})], "top3_accuracy")
    assert found.rows[0].value == 0.9
    assert found.rows[0].metrics["ece"] == 0.05


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown metric 'acuracy' \(did you mean 'accuracy'\?\).*ece.*loss"):
        compare(predicting(2), "acuracy")


def test_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no run to compare"):
        compare([])


def test_runs_without_any_metric_are_compared_all_the_same() -> None:
    found = compare([dataclasses.replace(record, summary={}) for record in runs({"a": None, "b": None})])
    assert found.metric is None
    assert sorted(labels_of(found)) == ["a", "b"]
    assert "a" in table(found, 80)


def test_an_accuracy_chosen_on_test_itself_is_called_so() -> None:
    honest, chosen = runs({"honest": 0.8}, selected_on="val"), runs({"chosen": 0.9}, selected_on="test")
    (remark,) = [line for line in compare(honest + chosen).remarks if "too good" in line]
    assert remark.endswith("in: chosen")


def test_metrics_of_different_data_are_called_so() -> None:
    records = [*runs({"a": 0.8}), *runs({"b": 0.9}, data_fingerprint="another")]
    assert any("different data" in remark for remark in compare(records).remarks)


# Settings and labels


def test_only_settings_that_differ_are_shown_and_those_that_compute_nothing_never() -> None:
    silent = ("out", "name", "tags", "group", "project", "entity", "tracking", "data_dir", "workers", "save_steps")
    records = [
        made_record("a", "a", {"norm": "batch", "epochs": 5, "lr_steps": [1, 2], **dict.fromkeys(silent, "x")}),
        made_record("b", "b", {"norm": "layer", "epochs": 5.0, "lr_steps": [1, 3], **dict.fromkeys(silent, "y")}),
    ]
    found = compare(records)
    assert found.settings == ("norm", "lr_steps")
    assert found.rows[0].setting("lr_steps") == "[1, 2]"


def test_options_of_policies_are_settings_of_their_own() -> None:
    records = [
        made_record("a", "a", {"policy_options": {"cutout": 8, "pad": 4}}),
        made_record("b", "b", {"policy_options": {"cutout": 16, "pad": 4}}),
        made_record("c", "c", {"policy_options": {"pad": 4}}),
    ]
    found = compare(records)
    assert found.settings == ("policy_options.cutout",)
    assert [row.setting("policy_options.cutout") for row in found.rows] == ["8", "16", "-"]


def test_a_setting_that_an_older_run_lacks_has_its_default() -> None:
    assert compare([made_record("old", "a", {}), made_record("new", "b", {"dropout": 0.0})]).settings == ()
    assert compare([made_record("old", "a", {}), made_record("new", "b", {"dropout": 0.5})]).settings == ("dropout",)


def test_true_is_not_one() -> None:
    assert compare(
        [made_record("a", "a", {"channels_last": True}), made_record("b", "b", {"channels_last": 1})]
    ).settings


def test_seeds_that_looked_for_their_rate_are_one_configuration_whatever_they_found() -> None:
    found = compare([made_record(f"s{k}", f"s{k}", {"seed": k, "lr_max": "find"}, {"lr_max": 0.1 + k}) for k in (0, 1)])
    assert found.settings == ("seed",)
    assert [len(group.rows) for group in found.groups] == [2]


def test_an_evaluation_with_flips_is_no_seed_of_one_without() -> None:
    plain, flipped = predicting(2)
    flipped = dataclasses.replace(flipped, summary={**flipped.summary, "evaluation": {"tta": "flip"}})
    found = compare([plain, flipped])
    assert set(found.settings) == {"seed", "tta"}
    assert [len(group.rows) for group in found.groups] == [1, 1]


def test_maps_of_different_layers_are_told() -> None:
    one, other = predicting(2)
    remarks = compare([changed(one, layer="layer3"), changed(other, layer="layer4")]).remarks
    assert any("different layers (layer3, layer4): their values are not comparable" in remark for remark in remarks)
    assert not any("different layers" in remark for remark in compare([one, other]).remarks)


def test_another_evaluation_of_a_run_is_another_row() -> None:
    one, other = predicting(2)
    again = dataclasses.replace(one, source="elsewhere", predictions=other.predictions)
    assert len(compare([one, again]).rows) == 2
    assert len(compare([one, dataclasses.replace(one, source="elsewhere")]).rows) == 1


def test_labels_are_unique_printable_and_short() -> None:
    names = ["twice", "twice", "", "a\x1b[31mb\n\u202ec", "x" * 300, "twice (id1)"]
    records = [made_record(name, f"id{k}", {"seed": k}) for k, name in enumerate(names)]
    labels = labels_of(compare(records))
    assert len(set(labels)) == len(names)
    assert {"twice (id0)", "id2"} < set(labels)
    assert all(label.isprintable() or "\ufffd" in label for label in labels)
    assert not any(character in label for label in labels for character in "\x1b\n\u202e")
    assert max(map(len, labels)) < 60


def test_a_run_read_from_its_folder_and_from_wandb_counts_once() -> None:
    folder, other = predicting(2)
    online = dataclasses.replace(folder, source="team/project/id0")
    found = compare([folder, other, online])
    assert len(found.rows) == 2
    assert any("there twice: taken from runs/id0, not from team/project/id0" in remark for remark in found.remarks)


def test_runs_compare_the_same_wherever_they_were_read() -> None:
    folders = predicting(3)
    online = [dataclasses.replace(record, source=f"team/project/{record.id}") for record in folders]
    one, two = compare(folders).to_dict(), compare(online).to_dict()
    assert one != two
    for run in (*one["runs"], *two["runs"]):
        run["source"] = ""
    assert one == two


# Seeds


def seeded() -> list[RunRecord]:
    values = {"batch": (0.91, 0.99, 0.92), "layer": (0.88, 0.86, 0.90), "group": (0.70,)}
    return [
        made_record(f"{norm}{seed}", f"{norm}{seed}", {"norm": norm, "seed": seed}, {"test_accuracy_best": value})
        for norm, each in values.items()
        for seed, value in enumerate(each)
    ]


def test_runs_that_differ_by_their_seed_alone_are_one_group_sorted_by_its_mean() -> None:
    found = compare(list(reversed(seeded())))
    assert [group.label for group in found.groups] == ["norm=batch", "norm=layer", "norm=group"]
    interval = found.groups[0].interval
    assert interval is not None and interval.count == 3
    values = [0.91, 0.99, 0.92]
    assert interval.mean == pytest.approx(0.94)
    assert interval.deviation == pytest.approx(statistics.stdev(values))
    low, high = stats.t.interval(0.95, 2, statistics.fmean(values), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert found.groups[2].interval is not None and found.groups[2].interval.deviation is None


def test_a_seed_without_the_metric_is_left_out_of_its_mean() -> None:
    records = [*seeded(), made_record("batch9", "batch9", {"norm": "batch", "seed": 9}, {"test_accuracy_best": None})]
    group = compare(records).groups[0]
    assert len(group.rows) == 4 and group.interval is not None and group.interval.count == 3
    only = compare([made_record("a", "a", {}, {"test_accuracy_best": None})])
    assert only.groups[0].interval is None


def test_seeds_on_different_data_are_apart_and_on_the_same_data_elsewhere_together() -> None:
    records = runs({"a": 0.8, "b": 0.9})
    apart = [*records, *runs({"c": 0.7}, data_fingerprint="another data set")]
    assert [len(group.rows) for group in compare(apart).groups] == [2, 1]
    moved = [made_record("d", "d", {"seed": 5, "data": "folder:/elsewhere"}, {"test_accuracy_best": 0.85})]
    assert [len(group.rows) for group in compare([*records, *moved]).groups] == [3]


def test_a_recipes_name_is_a_column_and_no_configuration() -> None:
    records = [made_record("a", "a", {"seed": 1, "recipe": "x"}), made_record("b", "b", {"seed": 2, "recipe": None})]
    found = compare(records)
    assert "recipe" in found.settings and len(found.groups) == 1


@pytest.mark.parametrize(("metric", "better"), [("val_accuracy_best", "norm=high"), ("test_loss_best", "norm=low")])
def test_configurations_are_tested_over_their_seeds_as_scipy_and_holm_do(metric: str, better: str) -> None:
    rng = np.random.default_rng(0)
    means = (("low", 0.5, 3), ("middle", 0.502, 2), ("high", 0.9, 2))
    values = {norm: rng.normal(mean, 0.001, count) for norm, mean, count in means}
    records = [
        made_record(f"{norm}{seed}", f"{norm}{seed}", {"norm": norm, "seed": seed}, {metric: float(value)})
        for norm, each in values.items()
        for seed, value in enumerate(each)
    ]
    tests = {frozenset((test.a, test.b)): test for test in compare(records, metric).group_tests}
    raw = {
        frozenset((f"norm={a}", f"norm={b}")): stats.ttest_ind(values[a], values[b], equal_var=False).pvalue
        for a, b in itertools.combinations(values, 2)
    }
    assert tests.keys() == raw.keys()
    for rank, pair in enumerate(sorted(raw, key=lambda pair: raw[pair])):
        assert tests[pair].p == pytest.approx(raw[pair])
        expected = max(min(1, (3 - k) * sorted(raw.values())[k]) for k in range(rank + 1))
        assert tests[pair].p_adjusted == pytest.approx(expected)
    assert tests[frozenset(("norm=low", "norm=high"))].better == better
    assert tests[frozenset(("norm=low", "norm=middle"))].better is None


def test_configurations_with_one_seed_are_not_tested() -> None:
    assert [(test.a, test.b) for test in compare(seeded()).group_tests] == [("norm=batch", "norm=layer")]


# Image by image


def test_pairs_are_tested_on_the_images_they_share() -> None:
    records = predicting(4)
    (images,) = compare(records).image_sets
    correct = {row.label: row.record.predictions.correct for row in compare(records).rows if row.record.predictions}
    assert list(images.tests) == paired_tests(correct)
    assert len(images.tests) == 6


def test_rows_in_another_order_are_the_same_images() -> None:
    records = predicting(3)
    shuffled = []
    for seed, record in enumerate(records):
        order = np.random.default_rng(seed).permutation(len(LABELS))
        assert record.predictions is not None
        fields = {name: getattr(record.predictions, name)[order] for name in ("ids", "labels", "logits", "maps")}
        shuffled.append(changed(record, **fields))
    plain, mixed = compare(records), compare([records[0], *shuffled[1:]])
    (one,), (two,) = plain.image_sets, mixed.image_sets
    assert one.tests == two.tests
    assert {(image.id, image.num_wrong) for image in one.hard} == {(image.id, image.num_wrong) for image in two.hard}
    for label, predictions in one.predictions.items():
        rows = [one.ids.tolist().index(id) for id in two.ids]
        mixed_maps = two.predictions[label].maps
        assert np.array_equal(two.predictions[label].logits, predictions.logits[rows])
        assert predictions.maps is not None and mixed_maps is not None
        assert np.array_equal(mixed_maps, predictions.maps[rows])


def without_some(record: RunRecord) -> RunRecord:
    assert record.predictions is not None
    return changed(
        record, **{name: getattr(record.predictions, name)[50:] for name in ("ids", "labels", "logits", "maps")}
    )


def with_nan(record: RunRecord) -> RunRecord:
    assert record.predictions is not None
    logits = record.predictions.logits.copy()
    logits[3, 2] = np.nan
    return changed(record, logits=logits)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            lambda r: changed(r, fingerprint="f" * 64),
            "with 2 other runs: run2, different data (fingerprint ffffff…ffffff",
        ),
        (lambda r: changed(r, split="val"), "run2, different split (val instead of test)"),
        (without_some, "run2, different images of test (150 instead of 200, 150 in common)"),
        (lambda r: changed(r, labels=(r.predictions.labels + 1) % 10), "run2, different labels of the same images"),
        (lambda r: changed(r, classes=tuple("abcdefghij")), "run2, different classes"),
        (with_nan, "some of their logits are not finite: run2"),
        (lambda r: dataclasses.replace(r, predictions=None), "without predictions: run2"),
    ],
)
def test_what_is_not_of_the_same_images_is_not_compared_and_the_reason_is_told(other: Any, reason: str) -> None:
    records = predicting(3)
    found = compare([*records[:2], other(records[2])])
    assert list(found.image_sets[0].predictions) == ["run0", "run1"]
    assert len(found.image_sets[0].tests) == 1
    assert any("not compared image by image" in remark and reason in remark for remark in found.remarks)
    assert reason in " ".join(table(found, 200).split())
    with pytest.raises(UserError, match="'run0' and 'run2' have no predictions of the same images"):
        diff(found, "run0", "run2")


def test_every_pair_of_twenty_runs_is_tested() -> None:
    (images,) = compare(predicting(20)).image_sets
    assert len(images.tests) == 190
    assert {frozenset((test.a, test.b)) for test in images.tests} == {
        frozenset(pair) for pair in itertools.combinations([f"run{k}" for k in range(20)], 2)
    }


def test_the_error_diff_sorts_every_image_as_looking_at_each_does() -> None:
    records = predicting(2)
    found = diff(compare(records), "run0", "run1")
    expected: dict[str, list[int]] = {"fixed": [], "broken": [], "both_wrong": [], "same_answer": []}
    a, b = (record.predictions for record in records)
    assert a is not None and b is not None
    for row, label in enumerate(LABELS):
        said_a, said_b = int(np.argmax(a.logits[row])), int(np.argmax(b.logits[row]))
        if said_a != label and said_b == label:
            expected["fixed"].append(row)
        elif said_a == label and said_b != label:
            expected["broken"].append(row)
        elif said_a != label:
            expected["both_wrong"].append(row)
            if said_a == said_b:
                expected["same_answer"].append(row)
    assert all(expected.values())
    assert {name: getattr(found, name).tolist() for name in expected} == expected
    back = diff(compare(records), "run1", "run0")
    assert (back.fixed.tolist(), back.broken.tolist()) == (expected["broken"], expected["fixed"])


def test_an_error_diff_of_an_unknown_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown run 'run7'.*known: run0, run1"):
        diff(compare(predicting(2)), "run0", "run7")


@pytest.mark.parametrize(("count", "needed"), [(2, 2), (3, 3), (4, 4), (5, 4), (10, 8), (15, 12), (20, 16)])
def test_images_that_nearly_every_run_gets_wrong_are_ranked_by_runs_and_loss(count: int, needed: int) -> None:
    mislabelled = (5, 60)
    records = predicting(count, mislabelled=mislabelled)
    (images,) = compare(records).image_sets
    predictions = [record.predictions for record in records if record.predictions is not None]
    wrong = [sum(bool(one.predicted[row] != LABELS[row]) for one in predictions) for row in range(len(LABELS))]
    expected = {row for row in range(len(LABELS)) if wrong[row] >= needed}
    assert {image.row for image in images.hard} == expected > set(mislabelled)
    for image in images.hard:
        assert image.num_wrong == wrong[image.row]
        assert image.id == images.ids[image.row]
        assert image.mean_loss == pytest.approx(np.mean([one.losses[image.row] for one in predictions]))
        answers = [int(one.predicted[image.row]) for one in predictions]
        most = max((k for k in range(10) if k != LABELS[image.row]), key=answers.count)
        agreed = answers.count(most) >= needed
        assert image.consensus == (most if agreed else None)
        mean = float(np.mean([one.probabilities[image.row, most] for one in predictions]))
        assert image.confidence == (pytest.approx(mean) if agreed else None)
        assert image.suspect == (agreed and mean >= 0.9)
    ranks = [(-image.num_wrong, -image.mean_loss) for image in images.hard]
    assert ranks == sorted(ranks)
    suspects = {image.row: image.consensus for image in images.hard if image.suspect}
    assert all(suspects[row] == (LABELS[row] + 1) % 10 for row in mislabelled)
    assert len(suspects) < len(images.hard)


def test_one_run_has_no_images_that_every_run_gets_wrong() -> None:
    (images,) = compare(predicting(1)).image_sets
    assert images.hard == () and images.tests == ()


# Sweeps


def test_a_sweep_tells_which_setting_matters_and_fewer_runs_how_many_are_needed() -> None:
    rng = np.random.default_rng(0)
    rates = (10 ** rng.uniform(-3, 0, 16)).tolist()
    records = []
    for k, rate in enumerate(rates):
        config = {"seed": k, "lr_max": rate, "weight_decay": [0, 1e-4][k // 2 % 2], "recipe": f"recipe {k}"}
        accuracy = 0.9 - 0.1 * abs(math.log10(rate) + 1)
        records.append(made_record(f"r{k}", f"r{k}", config, {"test_accuracy_best": accuracy}))
    found = compare(records)
    assert found.importance is not None and found.no_importance == ""
    assert list(found.importance.shares) == ["lr_max", "weight_decay"]  # neither the seed nor the recipe's name
    few = compare(records[:7])
    assert few.importance is None
    assert few.no_importance.endswith("test_accuracy_best needs at least 8 runs that have it, but got 7")


# What is written


def everything() -> list[RunRecord]:
    records = predicting(3, mislabelled=(5,))
    return [
        *records,
        made_record("diverged \x1b[2J<b>", "d", {"seed": 8}, {"test_accuracy_best": math.nan}, diverged=True),
        made_record(
            "猫犬" * 30, "w", {"seed": 9, "model": "m" * 50}, notes=("epochs.csv has a row\x07 that is no row",)
        ),
        changed(predicting(4)[3], fingerprint="e" * 64),
    ]


def test_compare_json_is_strict_json_and_holds_the_comparison() -> None:
    found = compare(everything())
    text = json.dumps(found.to_dict(), allow_nan=False)
    values = json.loads(text)
    assert [run["label"] for run in values["runs"]] == labels_of(found)
    assert values["metric"] == "test_accuracy_best" and values["goal"] == "max"
    assert values["runs"][0]["settings"].keys() == set(found.settings)
    (test, *_) = values["image_sets"][0]["tests"]
    assert test == dataclasses.asdict(found.image_sets[0].tests[0])
    assert values["image_sets"][0]["hard"][0]["id"] == found.image_sets[0].hard[0].id
    confusion = np.array(values["image_sets"][0]["confusion"]["run0"])
    predictions = found.image_sets[0].predictions["run0"]
    expected = np.zeros((10, 10), int)
    for label, predicted in zip(predictions.labels, predictions.predicted, strict=True):
        expected[label, predicted] += 1
    assert np.array_equal(confusion, expected)
    assert values["remarks"] == list(found.remarks)


@pytest.mark.parametrize("width", [20, 33, 60, 80, 120, 250])
def test_the_table_fits_any_terminal_and_acts_on_none(width: int) -> None:
    text = table(compare(everything()), width)
    assert all(columns_of(line) <= width for line in text.splitlines())
    assert not any(character in text for character in "\x1b\x07\u202e")


def test_the_table_shows_the_best_run_the_settings_and_the_words() -> None:
    alike = [
        made_record(f"run{k}", f"id{k}", {"seed": k}, predictions=made_predictions(LABELS, k, 0.1)) for k in (0, 1)
    ]
    found = compare([*seeded()[:4], *alike], "test_accuracy_best")
    lines = table(found, 200).splitlines()
    assert sum(line.startswith("* ") for line in lines) == 1
    (best,) = [line for line in lines if line.startswith("* ")]
    assert best.split() == ["*", "batch1", "99.00", "%", "batch", "1"]
    assert lines[1].split() == ["run", "test_accuracy_best", "norm", "seed"]
    assert any(line.split()[:1] == ["layer0"] for line in lines)
    assert any(line.startswith(("run0", "run1")) and "not distinguishable" in line for line in lines)


def test_runs_that_tie_are_all_marked_best() -> None:
    lines = table(compare(runs({"a": 0.5, "b": 0.5, "c": 0.25})), 80).splitlines()
    assert [line[2] for line in lines if line.startswith("* ")] == ["a", "b"]


def test_a_clearly_better_run_is_called_better_and_by_its_name() -> None:
    good = made_record("good", "g", {"seed": 1}, predictions=made_predictions(LABELS, 1, 0.05))
    bad = made_record("bad", "b", {"seed": 2}, predictions=made_predictions(LABELS, 2, 0.5))
    found = compare([bad, good])
    assert found.image_sets[0].tests[0].better == "good"
    assert "good is better" in table(found, 100)


def test_a_comparison_needs_neither_torch_nor_wandb_nor_plotly() -> None:
    script = "import sys, eva.comparison; print([name for name in ('torch', 'wandb', 'plotly') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_made_images_belong_to_the_wrong_answers() -> None:
    predictions = made_predictions(LABELS, 0)
    assert len(made_images(predictions)) == int((~predictions.correct).sum())
    assert predictions.fingerprint == FINGERPRINT
