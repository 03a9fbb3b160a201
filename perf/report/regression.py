"""What is slower than it was: rows held against those of an earlier run on the same GPU."""

import warnings
from typing import Any

import pandas as pd
from machine.environment import VERSIONS

from report.tables import markdown

KEYS = ["impl", "pass", "suite", "layer", "shape", "dtype", "layout", "block", "timer"]


def check_comparable(baseline: pd.DataFrame, setting: dict[str, Any]) -> None:
    """Warn of versions that differ.

    Raises ValueError if the baseline is of another GPU or of another number of ranks.
    """
    for name in ("gpu", "world_size", *VERSIONS):
        here = "none" if setting[name] is None else str(setting[name])
        found = list(baseline[name].astype(object).fillna("none").astype(str).unique())
        message = f"another {name}: expected {here}, got {', '.join(found)}"
        if found != [here] and name not in VERSIONS:
            raise ValueError(message)
        if found != [here]:
            warnings.warn(f"the baseline has {message}", stacklevel=2)


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
    """How many rows are slower, and a line for each."""
    told = f"{len(slower)} rows are slower than the baseline by more than {percent:g}%."
    if slower.empty:
        return told
    columns = ["impl", "layer", "dtype", "layout", "pass", "us_p50_before", "us_p50"]
    return f"{told}\n\n{markdown(slower[columns].round(1).astype(str))}"
