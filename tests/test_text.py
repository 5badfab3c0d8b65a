"""Text for readers: nothing in it acts on a terminal, and tables fit."""

import pytest

from eva.text import (
    aligned,
    columns_of,
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


@pytest.mark.parametrize(
    "character",
    ["\x00", "\x1b", "\x7f", "\x9b", "\u2028", "\u2029", "\u202a", "\u202e", "\u2066", "\u2067", "\u2069", "\ud800"],
)
def test_what_acts_on_a_terminal_or_turns_text_round_is_replaced(character: str) -> None:
    assert printable(f"a{character}b") == "a\ufffdb"


def test_line_breaks_are_blanks_and_other_text_stays() -> None:
    assert printable("a\nb\tc\r") == "a b c "
    kept = "Größe 猫 <b> & עברית e\u0301 👩\u200d💻"
    assert printable(kept) == kept


@pytest.mark.parametrize(("text", "length"), [("abcdefghij", 5), ("abcdefghij", 4), ("abcdefghij", 1), ("abc", 3)])
def test_shortened_text_has_the_length_and_keeps_both_ends(text: str, length: int) -> None:
    short = shortened(text, length)
    assert len(short) == min(length, len(text))
    head, _, tail = short.partition("…")
    assert text.startswith(head) and text.endswith(tail)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (0.1, "0.1"),
        (1e-05, "1e-05"),
        (0.12345678, "0.123457"),
        (20, "20"),
        ((1, 2.5, None), "[1, 2.5, none]"),
        ("a\x1b", "a\ufffd"),
    ],
)
def test_settings_are_written_as_on_a_command_line(value: object, text: str) -> None:
    assert format_setting(value) == text


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("val_accuracy_best", 0.91234, "91.23 %"),
        ("top5_accuracy", 1.0, "100.00 %"),
        ("loss", 0.123456, "0.1235"),
        ("steps", 2352.0, "2352"),
        ("loss", None, "-"),
        ("loss", float("nan"), "-"),
    ],
)
def test_metrics_are_read_in_their_unit(metric: str, value: float | None, text: str) -> None:
    assert format_metric(metric, value) == text


def test_differences_have_a_sign_and_intervals_one_unit() -> None:
    assert format_difference("accuracy", 0.0123) == "+1.23 pp"
    assert format_difference("loss", -0.5) == "-0.5"
    assert format_interval("accuracy", 0.5, 0.75) == "50.00 to 75.00 %"
    assert format_interval("accuracy", -0.01, 0.02, difference=True) == "-1.00 to +2.00 pp"
    assert format_interval("loss", None, None) == "-"


def test_an_interval_of_a_share_ends_where_shares_do() -> None:
    """A t interval of two seeds knows nothing of 100 %; a loss has no such end."""
    assert format_interval("val/accuracy_best", -0.02, 1.034) == "0.00 to 100.00 %"
    assert format_interval("loss", -0.5, 1.5) == "-0.5 to 1.5"


@pytest.mark.parametrize(
    ("p", "text"), [(None, "-"), (1.0, "1.000"), (0.0005, "0.001"), (0.000499, "< 0.001"), (0.0, "< 0.001")]
)
def test_p_values_are_never_told_as_zero(p: float | None, text: str) -> None:
    assert format_p(p) == text


def test_long_lists_say_how_many_more_there_are() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcdefgh"), 3) == "a, b, c and 5 more"


@pytest.mark.parametrize(("text", "columns"), [("abc", 3), ("猫犬", 4), ("e\u0301", 1), ("", 0)])
def test_wide_and_combining_characters_are_counted_as_a_terminal_does(text: str, columns: int) -> None:
    assert columns_of(text) == columns


def test_a_cut_line_fits_and_says_that_it_is_cut() -> None:
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdef", 4) == "abc…"
    assert columns_of(cut("猫犬猫犬猫犬", 5)) <= 5


def test_columns_line_up_numbers_at_the_right() -> None:
    lines = aligned(["run", "value", "norm"], [["猫", "9.5", "batch"], ["longer", "10.25", "gn"]], 60).splitlines()
    assert lines[0] == "run     value  norm"
    assert lines[1] == "猫        9.5  batch"
    assert lines[2] == "longer  10.25  gn"


def test_columns_that_do_not_fit_follow_below_with_the_first_column_again() -> None:
    head = ["run", *(f"setting{i}" for i in range(6))]
    rows = [[f"r{k}", *(f"v{k}{i}" for i in range(6))] for k in range(2)]
    lines = aligned(head, rows, 30).splitlines()
    assert all(len(line) <= 30 for line in lines)
    assert sum(line.startswith("run") for line in lines) == sum(line.startswith("r0") for line in lines) == 3
    for cell in [*head, *rows[0], *rows[1]]:
        assert any(cell in line.split() for line in lines)
