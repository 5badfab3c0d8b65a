"""The page opens from the disk in a real browser, shows what Python computes, and lets no name act on it."""

import base64
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from made_runs import CLASSES, made_image, made_images, made_labels, made_predictions, made_record
from numpy.typing import NDArray
from PIL import Image
from selenium.common.exceptions import TimeoutException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.remote_connection import RemoteConnection
from selenium.webdriver.support.ui import WebDriverWait

from eva import charts, page
from eva.comparison import Comparison, compare, diff
from eva.gradcam import overlay
from eva.page import write_page
from eva.records import RunRecord
from eva.text import printable, shortened

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
in_browser = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="needs chromium and chromedriver (Debian: chromium-driver)"
)

LABELS = made_labels(240)
NASTY = (
    "<script>alert(1)</script>",
    '<a href="https://example.org/">link</a>',
    "twice $x^2$ %{y} &lt;b&gt; <b>bold</b>",
    "</script><!-- \u2028 -->",
    "quote\" ' onmouseover=alert(2)",
)


def four_runs() -> list[RunRecord]:
    """Two configurations of two seeds each; the maps of one run are of another size, and one run has none."""
    known: dict[int, NDArray[np.uint8]] = {}
    records = []
    for k, (norm, seed, side) in enumerate((("batch", 0, 4), ("batch", 1, 8), ("layer", 0, 4), ("layer", 1, None))):
        predictions = made_predictions(LABELS, k, 0.15 + 0.05 * (k // 2), map_side=side, mislabelled=(5, 60))
        images = made_images(predictions, known)
        config = {"norm": norm, "seed": seed}
        records.append(
            made_record(
                f"{norm} {seed}", f"id{k}", config, predictions=predictions, images=images, steps=300, lr_range=True
            )
        )
    return records


def nasty_runs() -> list[RunRecord]:
    """Names, classes, settings and notes that would act on a careless page; two runs have the same name."""
    classes = (*NASTY, *CLASSES[len(NASTY) :])
    records = []
    for k, name in enumerate((*NASTY, NASTY[0])):
        predictions = made_predictions(LABELS[:60], k, 0.3, classes=classes)
        predictions = dataclasses.replace(predictions, ids=np.array([f"<i>{k}</i>" for k in range(60)]))
        config = {"seed": k, "model": name, "norm": "batch" if k % 2 else "layer"}
        records.append(
            made_record(name, f"<u>{k}</u>", config, predictions=predictions, notes=(NASTY[3],), lr_range=True)
        )
    return records


# What is in the file


@pytest.fixture(scope="module")
def four() -> Comparison:
    return compare(four_runs())


def payload(text: str) -> dict[str, Any]:
    """The numbers that a page's script works on."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return dict(json.loads(found))


def without_scripts(text: str) -> str:
    return re.sub(r"<(script|style)[^>]*>.*?</\1>", "", text, flags=re.DOTALL)


def test_a_page_names_no_address_to_fetch_from(four: Comparison) -> None:
    text = page.render(four)
    assert not re.search(r"""(src|href|action|data|poster|srcset)\s*=\s*["']?(https?:)?//""", without_scripts(text))
    assert "@import" not in text.partition("</style>")[0] and "url(" not in text.partition("</style>")[0]
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data: blob:"
    assert "unsafe" not in rules["script-src"] and rules["script-src"].count("sha256-") == 2


def test_names_stand_in_the_file_as_text_only() -> None:
    text = page.render(compare(nasty_runs()))
    assert text.count("<script") - page._file("page.html").count("<script") == text.count("<script>alert") == 0
    for name in NASTY:
        assert name not in without_scripts(text)
    assert payload(text)["runs"].count(NASTY[1]) == 1


def test_lone_surrogates_and_control_characters_do_not_break_the_file(tmp_path: Path) -> None:
    record = made_record("a\ud800\x00\x1b", "i\ud800", {"model": "\ud800"}, notes=("\udfff",))
    write_page(compare([record]), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a\ufffd\ufffd\ufffd" in text and "\x00" not in without_scripts(text)


def test_curves_are_means_of_consecutive_values_and_keep_their_gaps() -> None:
    values = [1.0, 3.0, float("nan"), 5.0, float("nan"), float("inf"), 8.0]
    assert charts.mean_of_bins(values, 2) == [2.0, 5.0, None, 8.0]
    assert charts.mean_of_bins(values, 1) == [1.0, 3.0, None, 5.0, None, None, 8.0]
    assert charts.mean_of_bins([], 3) == []


@pytest.mark.parametrize("num_runs", [1, 20, 100, 1000])
@pytest.mark.parametrize("num_values", [1, 600, 601, 5000, 100_000])
def test_curves_have_neither_too_many_points_nor_bins_where_all_fit(num_runs: int, num_values: int) -> None:
    points = -(-num_values // charts.bin_size(num_values, num_runs))
    assert points <= 600
    assert points == num_values or points > min(60, num_values) / 2
    if num_values <= 600 and num_runs <= 20:
        assert points == num_values


def test_a_curves_points_are_all_of_its_values_by_step_epoch_and_seconds(four: Comparison) -> None:
    chart = next(chart for chart in charts.curves(four) if chart.id == "train-loss")
    history = four.rows[chart.runs[0]].record.history  # 1,200 rows, so bins of two
    pairs = np.reshape(history["train/loss"], (600, 2))
    assert np.allclose(chart.figure.data[0].y, pairs.mean(axis=1), rtol=1e-5)
    for axis, column in (("step", "trainer/step"), ("epoch", "epoch"), ("seconds", "seconds")):
        means = np.reshape(history[column], (600, 2)).mean(axis=1)
        assert np.allclose(np.asarray(chart.xs[axis][0], float), means, rtol=1e-5)


def test_every_run_has_a_line_of_its_own_up_to_thirty_five() -> None:
    records = [made_record(f"r{k}", f"r{k}", {"seed": k, "lr_max": 0.1 + k}) for k in range(7)]
    more = [made_record(f"s{k}", f"s{k}", {"seed": k, "lr_max": 9.5 + k}) for k in range(28)]
    assert len(set(charts.styles(compare(records + more)))) == 35
    seeds = [made_record(f"r{k}", f"r{k}", {"seed": k, "norm": ("batch", "layer")[k % 2]}) for k in range(6)]
    found = compare(seeds)
    colors = {row.settings["norm"]: color for row, (color, _) in zip(found.rows, charts.styles(found), strict=True)}
    assert len(set(charts.styles(found))) == 6 and len(set(colors.values())) == 2


def test_pictures_are_lossless_and_maps_keep_their_maximum(four: Comparison) -> None:
    (embedded,) = payload(page.render(four))["sets"]
    (images,) = four.image_sets
    assert set(embedded["pictured"]) == set(embedded["rows"])
    for row, uri in zip(embedded["pictured"], embedded["pictures"], strict=True):
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            assert np.array_equal(np.asarray(picture.convert("RGB")), made_image(row, int(LABELS[row])))
    for run, predictions in zip(embedded["runs"], images.predictions.values(), strict=True):
        if predictions.maps is None:
            assert run["maps"] is None
            continue
        maps = predictions.maps[embedded["pictured"]]
        top = np.frombuffer(base64.b64decode(run["maps"]["top"]), "<f4")
        levels = np.frombuffer(base64.b64decode(run["maps"]["levels"]), np.uint8).reshape(maps.shape)
        assert np.array_equal(top, maps.max(axis=(1, 2)))
        assert np.abs(levels / 255 * top[:, None, None] - maps).max() <= 0.5001 * top.max() / 255


def test_maps_that_are_large_zero_or_not_finite_are_told_as_well_as_they_can_be() -> None:
    maps = np.zeros((3, 32, 32), np.float32)
    maps[1, :16] = 2.0
    maps[2, 0, 0] = np.nan
    told = page._maps(maps)
    assert (told["height"], told["width"]) == (16, 16)
    assert np.frombuffer(base64.b64decode(told["top"]), "<f4").tolist() == [0, 2, 0]
    levels = np.frombuffer(base64.b64decode(told["levels"]), np.uint8).reshape(3, 16, 16)
    assert levels[1, :8].min() == 255 and levels[1, 8:].max() == 0 and not levels[[0, 2]].any()


def test_pictures_that_do_not_fit_are_those_of_fewest_pairs_and_it_is_said(
    four: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images,) = four.image_sets
    empty = len(page.render(dataclasses.replace(four, image_sets=())).encode())
    monkeypatch.setattr(page, "MAX_BYTES", empty + 100_000)
    text = page.render(four)
    (embedded,) = payload(text)["sets"]
    count, total = len(embedded["pictured"]), len(embedded["rows"])
    assert len(text.encode()) <= empty + 100_000
    assert 10 < count < total
    assert f"{count:,} of the {total:,} images" in text
    a, b = page.first_pair(four)
    found = diff(four, a, b)
    differing = {*found.fixed.tolist(), *found.broken.tolist()}
    wrong = np.sum([~one.correct for one in images.predictions.values()], axis=0)
    keys = [(row not in differing, -int(wrong[row])) for row in embedded["pictured"]]
    assert keys == sorted(keys)
    left = [(row not in differing, -int(wrong[row])) for row in set(embedded["rows"]) - set(embedded["pictured"])]
    assert keys[-1] <= min(left)


def test_of_too_many_pairs_those_with_the_best_run_are_shown_and_it_is_said(
    four: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = '<tr[^>]*data-a="(\\d+)"'
    assert sorted(re.findall(rows, page.render(four))) == list("000112")
    monkeypatch.setattr(page, "MAX_PAIRS", 5)
    text = page.render(four)
    assert re.findall(rows, text) == list("000")
    assert "corrected for 6 pairs, those of all 4 runs. Here are those with the best run" in text


def test_a_verdict_names_the_better_of_a_and_b() -> None:
    runs = [("good", 0.02), ("bad", 0.5), ("as good", 0.02)]
    records = [
        made_record(name, name, {"seed": k}, predictions=made_predictions(LABELS, k, error))
        for k, (name, error) in enumerate(runs)
    ]
    found = compare(records)
    text = page.render(found)
    rows = re.findall(r"<tr[^>]*data-a=.*?</tr>", text)
    assert len(rows) == 3
    for row, test in zip(rows, found.image_sets[0].tests, strict=True):
        words = test.verdict
        assert f">{words}</td>" in row and (words == "not distinguishable") == ("bad" not in (test.a, test.b))


def test_the_first_error_diff_is_of_two_configurations_where_there_are_two(four: Comparison) -> None:
    a, b = page.first_pair(four)
    assert b == four.rows[0].label
    assert {label.split()[0] for label in (a, b)} == {"batch", "layer"}
    assert page.first_pair(compare(four_runs()[:2])) == ["batch 1", "batch 0"][:: 1 if b == "batch 0" else -1]
    assert page.first_pair(compare(four_runs()[:1])) == []


@pytest.fixture(scope="module")
def twenty() -> Comparison:
    """Twenty runs of a sweep on 10,000 images, of as many steps and as large maps as ResNet-18's on CIFAR-10."""
    labels = made_labels(10_000)
    known: dict[int, NDArray[np.uint8]] = {}
    records = []
    for k in range(20):
        config = {"seed": k % 2, "lr_max": 0.01 * (1 + k // 2 % 3), "weight_decay": (0.0, 5e-4)[k // 6 % 2]}
        config["epochs"] = 5 * (1 + k // 12)
        predictions = made_predictions(labels, k, 0.08 + 0.002 * k)
        images = made_images(predictions, known)
        records.append(
            made_record(f"sweep {k}", f"id{k}", config, predictions=predictions, images=images, epochs=24, steps=98)
        )
    return compare(records)


@pytest.fixture(scope="module")
def twenty_page(twenty: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(twenty, tmp_path_factory.mktemp("twenty") / "page.html")


def test_twenty_runs_on_ten_thousand_images_fit_into_fifteen_mebibytes(twenty: Comparison, twenty_page: Path) -> None:
    assert twenty_page.stat().st_size < 15 * 2**20
    (embedded,) = payload(twenty_page.read_text(encoding="utf-8"))["sets"]
    assert len(embedded["runs"]) == 20 and len(embedded["pictured"]) > 1000
    assert len(twenty.image_sets[0].tests) == 190


# In the browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=ChromeService(CHROMEDRIVER))
    # A machine that does other work too may be slow.
    assert isinstance(driver.command_executor, RemoteConnection)
    driver.command_executor.client_config.timeout = 600
    driver.set_page_load_timeout(300)
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def open_page(browser: Chrome, path: Path, width: int = 1400, height: int = 900) -> None:
    """Opens a page from the disk at a width; what went before is forgotten."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    log(browser, "browser")
    log(browser, "performance")
    browser.get(path.as_uri())
    wait(browser, "document.documentElement.dataset.ready")


def log(browser: Chrome, kind: str) -> list[dict[str, Any]]:
    """What the browser logged since the last call: console messages (browser), or network events (performance)."""
    return list(browser.get_log(kind))  # type: ignore[no-untyped-call]


def choose(browser: Chrome, selector: str, value: str) -> None:
    """Chooses an entry of a drop-down, as a user does."""
    script = """const [select, value] = [document.querySelector(arguments[0]), arguments[1]];
        if (![...select.options].some((option) => option.value === value)) throw new Error("no option " + value);
        select.value = value;
        select.dispatchEvent(new Event("change", { bubbles: true }));"""
    browser.execute_script(script, selector, value)


def wait(browser: Chrome, script: str) -> Any:
    """Waits until a script's value is true, and returns it."""
    try:
        return WebDriverWait(browser, 120).until(lambda driver: driver.execute_script(f"return {script}"))
    except TimeoutException:
        pytest.fail(f"never came true: {script}; the console says {log(browser, 'browser')}")


def requests(browser: Chrome) -> set[str]:
    """The addresses that the page asked for, without those of the browser's own pages and what lies in the page."""
    messages = [json.loads(entry["message"])["message"] for entry in log(browser, "performance")]
    sent = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    return {url for url in sent if not url.startswith(("chrome:", "chrome-untrusted:", "about:", "data:", "blob:"))}


def number(browser: Chrome, id: str) -> int:
    return int(browser.find_element(By.ID, id).text)


def check(browser: Chrome, selector: str) -> None:
    """Clicks on a radio button or a checkbox, which may be drawn by its label alone."""
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


@pytest.fixture(scope="module")
def four_page(four: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(four, tmp_path_factory.mktemp("four") / "page.html")


@in_browser
@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_opens_from_the_disk_without_error_request_or_overflow(
    browser: Chrome, four_page: Path, width: int, tmp_path: Path
) -> None:
    open_page(browser, four_page, width)
    height = wait(browser, "document.documentElement.scrollHeight")
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    unpainted = "document.querySelectorAll('.view canvas:not([data-painted])').length"
    wait(browser, f"document.querySelectorAll('.view canvas').length > 20 && {unpainted} === 0")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    wide = """return [...document.querySelectorAll('section, header, nav, .box, .card, figure, select, fieldset')]
        .filter((one) => one.getClientRects().length && one.getBoundingClientRect().right > innerWidth + 0.5)
        .map((one) => one.outerHTML.slice(0, 90))"""
    assert browser.execute_script(wide) == []
    small = """return [...document.querySelectorAll('p, td, th, li, label, button, figcaption')]
        .filter((one) => one.textContent && parseFloat(getComputedStyle(one).fontSize) < 11.5)
        .map((one) => one.outerHTML.slice(0, 90))"""
    assert browser.execute_script(small) == []
    buttons = "return [...document.querySelectorAll('.modebar-btn')].map((one) => one.dataset.title)"
    titles = browser.execute_script(buttons)
    assert titles and not any(word in title for title in titles for word in ("Share", "Edit", "Produced"))
    assert log(browser, "browser") == []
    assert requests(browser) == {four_page.as_uri()}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    (tmp_path / "page.png").write_bytes(base64.b64decode(shot["data"]))
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width in (width, width - 15)  # with or without a scroll bar
        assert len(picture.convert("RGB").getcolors(2**24) or ()) > 1000


@in_browser
def test_twenty_runs_open_without_error(browser: Chrome, twenty_page: Path, twenty: Comparison) -> None:
    open_page(browser, twenty_page)
    found = diff(twenty, *page.first_pair(twenty))
    assert number(browser, "num-fixed") == len(found.fixed)
    shown = "[...document.querySelectorAll('#better tbody tr')].filter((row) => !row.hidden).length"
    assert browser.execute_script(f"return {shown}") == 19  # with the best run
    choose(browser, ".pairs-with", "")
    assert browser.execute_script(f"return {shown}") == 190
    assert log(browser, "browser") == []


@in_browser
def test_the_filters_of_the_error_diff_are_what_python_computes(
    browser: Chrome, four_page: Path, four: Comparison
) -> None:
    open_page(browser, four_page)
    labels = [row.label for row in four.rows]
    (images,) = four.image_sets
    for a in range(4):
        for b in range(4):
            if a == b:
                continue
            choose(browser, "#run-a", str(a))
            choose(browser, "#run-b", str(b))
            found = diff(four, labels[a], labels[b])
            counts = [number(browser, f"num-{kind}") for kind in ("fixed", "broken", "both", "same")]
            expected = (found.fixed, found.broken, found.both_wrong, found.same_answer)
            assert counts == [len(rows) for rows in expected], (a, b)
    # The last pair, by kind and by class: the very images.
    by_kind = {"fixed": found.fixed, "broken": found.broken, "both": found.both_wrong, "same": found.same_answer}
    for kind, rows in by_kind.items():
        for chosen in ("", "3", "7"):
            choose(browser, "#class", chosen)
            check(browser, f"#filter input[value={kind}]")
            wanted = {int(row) for row in rows if chosen == "" or images.labels[row] == int(chosen)}
            while browser.find_element(By.ID, "diff-more").is_displayed():
                browser.execute_script("document.getElementById('diff-more').click()")
            cards = browser.execute_script(
                "return [...document.querySelectorAll('#diff-cards .card')].map((c) => +c.dataset.row)"
            )
            assert len(cards) == len(set(cards)) and set(cards) == wanted, (kind, chosen)
    assert log(browser, "browser") == []


@in_browser
def test_a_card_tells_truth_predictions_and_confidences(browser: Chrome, four_page: Path, four: Comparison) -> None:
    open_page(browser, four_page)
    a, b = page.first_pair(four)
    (images,) = four.image_sets
    card = browser.find_element(By.CSS_SELECTOR, "#diff-cards .card")
    row = int(card.get_attribute("data-row") or -1)
    assert row in diff(four, a, b).fixed
    text = card.get_attribute("textContent") or ""
    assert text.startswith(images.classes[images.labels[row]]) and str(images.ids[row]) in text
    for letter, sign, label in (("A", "✗", a), ("B", "✓", b)):
        said = images.predictions[label]
        told = f"{letter} {sign} {images.classes[said.predicted[row]]} {100 * said.confidence[row]:.1f}\u00a0%"
        assert told in text
    sure = [
        images.predictions[a].confidence[int(other.get_attribute("data-row") or -1)]
        for other in browser.find_elements(By.CSS_SELECTOR, "#diff-cards .card")
    ]
    assert sure == sorted(sure, reverse=True)


PIXELS = """
const [selector, done] = arguments;
const canvas = document.querySelector(selector);
canvas.scrollIntoView();
const timer = setInterval(() => {
  if (!canvas.dataset.painted) return;
  clearInterval(timer);
  done(canvas.toDataURL("image/png"));
}, 50);
"""


def pixels(browser: Chrome, selector: str) -> NDArray[np.uint8]:
    """The painted pixels (H, W, 3) of a canvas."""
    uri = browser.execute_async_script(PIXELS, selector)
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("RGB"))


def far(painted: NDArray[np.uint8], expected: NDArray[np.uint8]) -> tuple[float, float]:
    """The largest and the mean difference of two pictures, in levels of 255."""
    distance = np.abs(painted.astype(int) - expected.astype(int))
    return float(distance.max()), float(distance.mean())


@in_browser
def test_overlays_are_painted_as_opencv_computes_them_on_one_scale(
    browser: Chrome, four_page: Path, four: Comparison
) -> None:
    open_page(browser, four_page)
    labels = [row.label for row in four.rows]
    (images,) = four.image_sets
    with_maps = [k for k, label in enumerate(labels) if images.predictions[label].maps is not None]
    a, b = with_maps[0], next(k for k in with_maps if images.predictions[labels[k]].maps.shape[1] == 8)  # type: ignore[union-attr]
    a = next(k for k in with_maps if k != b)
    choose(browser, "#run-a", str(a))
    choose(browser, "#run-b", str(b))
    row = int(browser.find_element(By.CSS_SELECTOR, "#diff-cards .card").get_attribute("data-row") or -1)
    image = made_image(row, int(LABELS[row]))
    maps = [images.predictions[labels[k]].maps[row] for k in (a, b)]  # type: ignore[index]
    scale = float(max(one.max() for one in maps))
    first = "#diff-cards .card .view:nth-child({}) canvas"
    plain = pixels(browser, first.format(1))
    assert far(plain, np.asarray(cv2.resize(image, (128, 128), interpolation=cv2.INTER_CUBIC)))[0] <= 1
    # Maps have 256 levels in the page, and neighbouring colours differ by up to nine levels, halved by the opacity.
    for place, one in enumerate(maps, start=2):
        largest, mean = far(pixels(browser, first.format(place)), overlay(image, one, 128, scale))
        assert largest <= 8 and mean < 1
    check(browser, "#own-scale")
    for place, one in enumerate(maps, start=2):
        largest, mean = far(pixels(browser, first.format(place)), overlay(image, one, 128, float(one.max())))
        assert largest <= 8 and mean < 1


@in_browser
def test_hard_images_are_shown_in_order_with_all_runs_on_one_scale(
    browser: Chrome, four_page: Path, four: Comparison
) -> None:
    open_page(browser, four_page)
    (images,) = four.image_sets
    while browser.find_element(By.ID, "hard-more").is_displayed():
        browser.execute_script("document.getElementById('hard-more').click()")
    rows = "[...document.querySelectorAll('#hard-cards .card')].map((card) => +card.dataset.row)"
    assert browser.execute_script(f"return {rows}") == [image.row for image in images.hard]
    first = images.hard[0]
    text = browser.find_element(By.CSS_SELECTOR, "#hard-cards .card").get_attribute("textContent") or ""
    assert first.consensus is not None and f"perhaps {images.classes[first.consensus]}" in text
    assert f"wrong in 4 of 4 runs, mean loss {first.mean_loss:.4g}" in text
    maps = {label: one.maps[first.row] for label, one in images.predictions.items() if one.maps is not None}
    scale = float(max(one.max() for one in maps.values()))
    for place, label in enumerate(images.predictions, start=2):
        painted = pixels(browser, f"#hard-cards .card .view:nth-child({place}) canvas")
        image = made_image(first.row, int(LABELS[first.row]))
        if label in maps:
            assert far(painted, overlay(image, maps[label], 128, scale))[0] <= 8
        else:
            assert far(painted, np.asarray(cv2.resize(image, (128, 128), interpolation=cv2.INTER_CUBIC)))[0] <= 1
    check(browser, "#suspects")
    suspects = [image.row for image in images.hard if image.suspect]
    assert 0 < len(suspects) < len(images.hard)
    assert browser.execute_script(f"return {rows}") == suspects[:12]


@in_browser
def test_the_axis_switch_and_the_legend_change_all_curves(browser: Chrome, four_page: Path, four: Comparison) -> None:
    open_page(browser, four_page)
    for axis in ("seconds", "epoch", "step"):
        check(browser, f"#axis input[value={axis}]")
        for chart in charts.curves(four):
            drawn = f"document.getElementById('{chart.id}')"
            wait(browser, f"{drawn}.layout.xaxis.title.text === '{axis}'")
            for trace, expected in enumerate(chart.xs[axis]):
                assert browser.execute_script(f"return [...{drawn}.data[{trace}].x]") == expected
    lines = "document.querySelectorAll('#watched-accuracy .scatterlayer .trace').length"
    assert browser.execute_script(f"return {lines}") == 4
    browser.execute_script("document.querySelector('#legend [data-run=\"1\"]').click()")
    wait(browser, f"{lines} === 3")
    browser.find_element(By.XPATH, "//div[@id='legend']/button[text()='none']").click()
    wait(browser, f"{lines} === 0")
    assert browser.find_element(By.ID, "num-visible").text == "(0 of 4)"
    browser.find_element(By.XPATH, "//div[@id='legend']/button[text()='all']").click()
    wait(browser, f"{lines} === 4")
    assert log(browser, "browser") == []


@in_browser
def test_confusion_matrices_are_those_of_the_chosen_runs(browser: Chrome, four_page: Path, four: Comparison) -> None:
    open_page(browser, four_page)
    panels = browser.find_elements(By.CSS_SELECTOR, "#matrices select")
    assert len(panels) == 4
    choose(browser, "#matrices select", "2")
    for panel, run in enumerate((2, 1, 2, 3)):
        heat = f"document.querySelectorAll('#matrices .chart')[{panel}].data[0]"
        report = four.rows[run].report
        assert report is not None
        assert browser.execute_script(f"return {heat}.text.map((row) => [...row])") == report.confusion.tolist()
        shares = report.confusion / report.confusion.sum(axis=1, keepdims=True)
        assert np.allclose(browser.execute_script(f"return {heat}.z.map((row) => [...row])"), shares)


@in_browser
def test_a_click_on_a_title_sorts_the_table_by_value(browser: Chrome, four_page: Path, four: Comparison) -> None:
    open_page(browser, four_page)
    names = "[...document.querySelectorAll('#runs tbody tr')].map((row) => row.cells[1].textContent.trim())"
    best_first = [row.label for row in four.rows]
    assert browser.execute_script(f"return {names}") == best_first
    metric = browser.find_element(By.XPATH, "//section[@id='runs']//th/button[text()='test_accuracy_best']")
    metric.click()
    assert browser.execute_script(f"return {names}") == best_first[::-1]
    metric.click()
    assert browser.execute_script(f"return {names}") == best_first
    browser.find_element(By.XPATH, "//section[@id='runs']//th/button[text()='Run']").click()
    assert browser.execute_script(f"return {names}") == sorted(best_first)


@in_browser
def test_names_are_shown_as_text_in_tables_legends_axes_and_under_the_mouse(browser: Chrome, tmp_path: Path) -> None:
    found = compare(nasty_runs())
    open_page(browser, write_page(found, tmp_path / "page.html"))
    labels = [row.label for row in found.rows]
    classes = [printable(name) for name in found.image_sets[0].classes]
    assert len(set(labels)) == 6
    legend = "[...document.querySelectorAll('#legend button[data-run] span')].map((one) => one.textContent)"
    assert browser.execute_script(f"return {legend}") == labels
    options = "[...document.querySelectorAll('#class option')].slice(1).map((one) => one.textContent)"
    assert browser.execute_script(f"return {options}") == classes
    ticks = "[...document.querySelectorAll('.matrix:first-child .ytick text')].map((one) => one.textContent)"
    assert wait(browser, f"{ticks}.length && {ticks}") == [shortened(name, charts.TICK_LENGTH) for name in classes]
    for chart in ("train-loss", "watched-accuracy", "lr-range", "reliability"):
        for trace, label in enumerate(labels):
            hover = f"Plotly.Fx.hover('{chart}', [{{curveNumber: {trace}, pointNumber: 1}}])"
            texts = f"[...document.querySelectorAll('#{chart} .hoverlayer text')].map((one) => one.textContent)"
            wait(browser, f"({hover}, {texts}.includes({json.dumps(label)}))")
    hover = "Plotly.Fx.hover('parallel', [{curveNumber: 0, pointNumber: 0}])"
    shown = "document.querySelector('#parallel .hoverlayer').textContent"
    wait(browser, f"({hover}, {shown}.includes({json.dumps(labels[0])}))")
    ids = {f"<i>{k}</i>" for k in range(60)}
    cards = browser.find_elements(By.CSS_SELECTOR, "#hard-cards .card h3 > small, #diff-cards .card h3 > small")
    assert cards and {card.get_attribute("textContent") for card in cards} <= ids
    # Nothing of it became an element, a link or a script.
    assert browser.execute_script("return document.scripts.length") == 3
    assert (
        browser.execute_script(
            "return document.querySelectorAll('main b:not([id]), main i, main u, svg a, img').length"
        )
        == 0
    )
    assert browser.execute_script(
        "return [...document.querySelectorAll('a')].every((a) => a.getAttribute('href')[0] === '#')"
    )
    assert log(browser, "browser") == []
    assert requests(browser) == {(tmp_path / "page.html").as_uri()}


# Each would set `intruded` where it is taken for more than text: by HTML, an attribute, JavaScript, CSS or a template.
HOSTILE = (
    *("</script><script>window.intruded=1</script>", "<img src=x onerror=window.intruded=1>", "<!--<script>", "]]>"),
    *('"><svg onload=window.intruded=1>', "' onmouseover='window.intruded=1' x='", '" autofocus onfocus="intruded=1'),
    *("javascript:window.intruded=1", '<a href="javascript:window.intruded=1">x</a>', "data:text/html,<script>"),
    *("<iframe srcdoc='<script>parent.intruded=1</script>'>", "</style><style>*{display:none}</style>", "</title><b>"),
    *("${window.intruded=1}", "`+(window.intruded=1)+`", "{{window.intruded=1}}", "<%= intruded=1 %>", "$title $$"),
    *("\u2028window.intruded=1//", "\u2029*/window.intruded=1", "\\u003cscript\\u003e", "&lt;script&gt;", "\u202eevil"),
    *("');window.intruded=1;//", '");window.intruded=1;//', "%{customdata}%{x|window}", "__proto__", "constructor"),
)


def hostile_runs() -> list[RunRecord]:
    """Two runs whose every text is hostile: names, ids, settings and their values, sources, notes, classes, layers."""
    records = []
    for k in range(2):
        texts = iter((*HOSTILE[k * 9 :], *HOSTILE[: k * 9], *HOSTILE, *HOSTILE))
        predictions = made_predictions(LABELS[:80], k, 0.3, classes=HOSTILE[:10])
        ids = np.array([f"{HOSTILE[row % len(HOSTILE)]}/{row}" for row in range(80)])
        predictions = dataclasses.replace(
            predictions, ids=ids, split=HOSTILE[0], fingerprint=HOSTILE[1], layer=next(texts)
        )
        words = ("model", "norm", "optimizer", "schedule", "policy", "data", "recipe")
        config: dict[str, Any] = {name: next(texts) for name in words}
        config |= {"seed": k, "policy_options": {text: k for text in HOSTILE}, "stage_strides": list(HOSTILE)}
        summary = {"status": next(texts), "recipe": next(texts), "data": next(texts), "hardware": {next(texts): 1}}
        record = made_record(
            next(texts), next(texts), config, summary, predictions=predictions, notes=HOSTILE, lr_range=True
        )
        records.append(dataclasses.replace(record, source=f"runs/{next(texts)}"))
    return records


@in_browser
@pytest.mark.parametrize("policy", ["with its policy", "without it"])
def test_no_text_of_a_run_acts_on_the_page(browser: Chrome, tmp_path: Path, policy: str) -> None:
    """Not even where the content security policy is taken out: no text gets as far as that it would have to stop it."""
    path = write_page(compare(hostile_runs()), tmp_path / "page.html")
    if policy == "without it":
        text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text(encoding="utf-8"))
        assert count == 1
        path.write_text(text, encoding="utf-8")
    open_page(browser, path)
    for chart in ("train-loss", "watched-accuracy", "lr-range", "reliability"):
        hover = f"Plotly.Fx.hover('{chart}', [{{curveNumber: 0, pointNumber: 1}}])"
        wait(browser, f"({hover}, document.querySelector('#{chart} .hoverlayer text'))")
    # Everything that can be chosen, pointed at or clicked, once.
    browser.execute_script("""
        for (const one of document.querySelectorAll("main select"))
          for (const option of one.options) {
            one.value = option.value;
            one.dispatchEvent(new Event("change", { bubbles: true }));
          }
        for (const kind of ["mouseover", "mouseenter", "focus", "load", "error"])
          for (const one of document.querySelectorAll("main *")) one.dispatchEvent(new Event(kind));
        for (const one of document.querySelectorAll("main button, main input, main summary")) one.click();
    """)
    assert browser.execute_script("return [typeof window.intruded, typeof intruded]") == ["undefined", "undefined"]
    assert browser.execute_script("return document.scripts.length") == 3
    assert browser.execute_script("return document.querySelectorAll('iframe, img, object, embed, base').length") == 0
    attributes = "[...document.querySelectorAll('*')].flatMap((one) => [...one.attributes])"
    handlers = f"{attributes}.filter((one) => /^on/i.test(one.name)).map((one) => one.name)"
    links = f"{attributes}.filter((one) => /href|src|action/i.test(one.name)).map((one) => one.value)"
    assert browser.execute_script(f"return {handlers}") == []
    # Plotly's own: what it draws with lies in the page.
    own = ("#", "data:,", "data:image/")
    assert [link for link in browser.execute_script(f"return {links}") if not link.startswith(own)] == []
    assert HOSTILE[0] in (browser.find_element(By.CSS_SELECTOR, ".remarks").get_attribute("textContent") or "")
    assert browser.find_element(By.TAG_NAME, "h1").is_displayed()
    assert log(browser, "browser") == []
    assert requests(browser) == {path.as_uri()}


@in_browser
def test_the_policy_stops_scripts_and_requests_that_are_not_the_pages_own(browser: Chrome, four_page: Path) -> None:
    open_page(browser, four_page)
    attempt = """
    const done = arguments[0];
    const script = document.createElement("script");
    script.textContent = "window.intruded = true";
    document.body.append(script);
    document.body.insertAdjacentHTML("beforeend", "<div onclick='window.intruded = true' id='trap'></div>");
    document.getElementById("trap").click();
    fetch("http://127.0.0.1:9/").then(() => done("fetched"), () => done(String(window.intruded)));
    """
    assert browser.execute_async_script(attempt) == "undefined"
    assert len([entry for entry in log(browser, "browser") if "Content Security Policy" in entry["message"]]) >= 3


@in_browser
@pytest.mark.parametrize("kind", ["one run", "no predictions", "diverged", "two data sets"])
def test_pages_of_little_say_what_they_lack(browser: Chrome, tmp_path: Path, kind: str) -> None:
    records = four_runs()[:2]
    if kind == "one run":
        records = records[:1]
    elif kind == "no predictions":
        records = [dataclasses.replace(record, predictions=None, images={}) for record in records]
    elif kind == "diverged":
        empty: dict[str, Any] = {"predictions": None, "history": {}, "epochs": {}, "lr_range": {}}
        records = [dataclasses.replace(record, summary={"status": "diverged"}, **empty) for record in records]
    else:
        other = records[1].predictions
        assert other is not None
        records[1] = dataclasses.replace(records[1], predictions=dataclasses.replace(other, fingerprint="e" * 64))
    open_page(browser, write_page(compare(records), tmp_path / "page.html"))
    assert (
        "An error diff needs two runs with predictions of the same images." in browser.find_element(By.ID, "diff").text
    )
    assert not browser.find_element(By.ID, "run-a").is_displayed()
    assert ("No run has predictions." in browser.find_element(By.ID, "confusion").text) == (
        kind in ("no predictions", "diverged")
    )
    if kind == "two data sets":
        remarks = browser.find_element(By.CSS_SELECTOR, ".remarks").text
        assert "not compared image by image with another run" in remarks and "different data (fingerprint" in remarks
    assert log(browser, "browser") == []
