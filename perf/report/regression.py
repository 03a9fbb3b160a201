"""What is slower than it was: rows held against those of an earlier run on the same GPU."""

import pathlib
from typing import Any

import pandas as pd
from machine.environment import VERSIONS

from report.tables import read_rows

KEYS = ["impl", "pass", "suite", "layer", "shape", "dtype", "layout", "timer"]
NEEDED = {*KEYS, *VERSIONS, "gpu", "world_size", "us_p50", "us_p80"}


def read_baseline(file: pathlib.Path) -> pd.DataFrame:
    """The rows of an earlier run. Raises ValueError if columns are missing."""
    frame = read_rows(file)
    if missing := sorted(NEEDED - set(frame.columns)):
        raise ValueError(f"{file}: expected the columns {', '.join(missing)}, got none of them")
    return frame


def check_comparable(baseline: pd.DataFrame, setting: dict[str, Any]) -> list[str]:
    """Warnings of versions that differ.

    Raises ValueError if the baseline is of another GPU or of another number of ranks.
    """
    for column, what in (("gpu", "GPU"), ("world_size", "number of ranks")):
        found = _values(baseline[column])
        if found != [_text(setting[column])]:
            raise ValueError(
                f"another {what}: expected {_text(setting[column])}, got {', '.join(found)}"
            )
    return [
        f"measured with another {name}: {', '.join(found)}; here it is {here}"
        for name in VERSIONS
        if (found := _values(baseline[name])) != [here := _text(setting[name])]
    ]


def regressions(frame: pd.DataFrame, baseline: pd.DataFrame, percent: float) -> pd.DataFrame:
    """Rows whose median is slower by more than `percent`, and of which even the 20th percentile is
    above the 80th of the baseline.

    Raises ValueError if no row is in both.
    """
    both = frame.merge(baseline, on=KEYS, suffixes=("", "_before"))
    if both.empty:
        raise ValueError("baseline: expected rows of the same layers and timer, got none")
    slower = both.us_p50 > both.us_p50_before * (1 + percent / 100)
    return both[slower & (both.us_p20 > both.us_p80_before)]


def describe(slower: pd.DataFrame, percent: float) -> str:
    """A line a regression."""
    if slower.empty:
        return f"No row is slower than the baseline by more than {percent:g}%."
    lines = [
        f"SLOWER: {row.impl}, {row.layer}, {row.dtype}, {row.layout}, {row['pass']}: "
        f"{row.us_p50:.1f} us, was {row.us_p50_before:.1f} "
        f"(+{100 * (row.us_p50 / row.us_p50_before - 1):.0f}%)"
        for _, row in slower.iterrows()
    ]
    return "\n".join([f"{len(lines)} rows are slower by more than {percent:g}%:", *lines])


def _text(value: Any) -> str:
    return "none" if pd.isna(value) else str(value)


def _values(column: pd.Series) -> list[str]:
    """The different values of a column, as text."""
    return list(dict.fromkeys(map(_text, column)))
