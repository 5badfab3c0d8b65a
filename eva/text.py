"""Numbers, names and tables as text, on a terminal and on a page."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any


def printable(text: str) -> str:
    """Returns text that no terminal and no page acts on: blanks and replacement characters for control characters."""

    def shown(character: str) -> str:
        if character in "\t\n\r\v\f":
            return " "
        # Line and paragraph separators and lone surrogates; what changes the direction of all that follows.
        hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        turning = unicodedata.bidirectional(character) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF"),
            *("LRI", "RLI", "FSI", "PDI"),
        )
        return "\N{REPLACEMENT CHARACTER}" if hidden or turning else character

    return "".join(map(shown, text))


def shortened(text: str, length: int) -> str:
    """Returns text of at most so many characters, with an ellipsis in its middle if something is left out."""
    if len(text) <= length:
        return text
    head = length // 2
    return f"{text[:head]}…{text[len(text) - (length - head - 1) :]}"


def format_setting(value: Any) -> str:
    """Returns a setting as one would write it on a command line; none for nothing."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(format_setting, value)) + "]"
    return printable(str(value))


def format_metric(metric: str | None, value: float | None) -> str:
    """Returns a metric for a reader: accuracies in percent, others to four digits, a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    if is_share(metric):
        return f"{100 * value:.2f} %"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def is_share(metric: str | None) -> bool:
    """Tells whether a metric is a fraction that is read in percent."""
    return metric is not None and "accuracy" in metric


def format_difference(metric: str | None, value: float | None) -> str:
    """Returns the difference of two metrics for a reader, with its sign: percentage points between shares."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:+.2f} pp" if is_share(metric) else f"{value:+.4g}"


def format_interval(metric: str | None, low: float | None, high: float | None, *, difference: bool = False) -> str:
    """Returns an interval of a metric, or of a difference of two, for a reader; a dash for none.

    That of a share ends at 0 and 100 %, where the share does.
    """
    if low is None or high is None:
        return "-"
    if is_share(metric) and not difference:
        low, high = max(low, 0.0), min(high, 1.0)
    form = format_difference if difference else format_metric
    first, last = form(metric, low), form(metric, high)
    return f"{first.removesuffix(' %').removesuffix(' pp')} to {last}"


def format_p(p: float | None) -> str:
    """Returns a p value to three digits after the point; tiny ones as below 0.001, a dash for none."""
    return "-" if p is None else "< 0.001" if p < 0.0005 else f"{p:.3f}"


def listed(names: Sequence[str], shown: int = 6) -> str:
    """Returns the first of some names, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Returns an aligned table; columns that don't fit follow in further tables, which begin with the first one again.

    Columns whose cells begin with a digit, a sign or a dash are numbers, aligned at the right.
    """
    longest = width // 2 - 2
    cells = [[shortened(cell, longest) for cell in line] for line in [head, *rows]]
    widths = [max(columns_of(line[i]) for line in cells) for i in range(len(head))]
    numbers = [all(re.match(r"[-+\d.<]", line[i]) for line in cells[1:]) for i in range(len(head))]
    tables: list[list[int]] = [[0]]
    for i in range(1, len(head)):
        if len(tables[-1]) > 1 and sum(widths[j] + 2 for j in tables[-1]) + widths[i] > width:
            tables.append([0])
        tables[-1].append(i)
    lines = []
    for columns in tables:
        for line in cells:
            padded = []
            for i in columns:
                blank = " " * (widths[i] - columns_of(line[i]))
                padded.append(blank + line[i] if numbers[i] and i else line[i] + blank)
            lines.append("  ".join(padded).rstrip())
        lines.append("")
    return "\n".join(lines)


def columns_of(text: str) -> int:
    """Returns how many columns of a terminal a text takes: wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    none = sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in text)
    return len(text) + wide - none


def cut(line: str, width: int) -> str:
    """Returns a line that takes at most so many columns of a terminal."""
    while columns_of(line) > width:
        line = line[:-2] + "…"
    return line


def duration(seconds: float) -> str:
    """Returns a time for a reader, in hours, minutes or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
