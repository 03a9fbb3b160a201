"""The report: a line a layer and pass, means over layers, counts, and what they mean."""

import os
import pathlib
from typing import Any

import numpy as np
import pandas as pd
from layers.cases import BLOCKS
from layers.implementations import BOUND, IMPLEMENTATIONS, OURS
from machine.environment import VERSIONS

CASE = ["suite", "layer", "shape", "dtype", "layout", "block"]
COLUMNS = (
    *("timestamp_utc", "commit", "dirty", "gpu", "driver", "torch", "triton", "cuda", "nccl"),
    *("config", "world_size", "timer", "samples", "copy_bytes_per_s", "impl", "pass", *CASE),
    *("us_p20", "us_p50", "us_p80", "host_us", "copy_fraction", "peak_mb"),
    *("launches", "host_syncs", "collectives", "error_over_tolerance"),
)
COUNTED = ["launches", "host_syncs", "collectives"]


def frame_of(rows: list[dict[str, Any]], setting: dict[str, Any]) -> pd.DataFrame:
    """A row for each case, implementation and pass, with COLUMNS; empty where not measured."""
    frame = pd.DataFrame(rows).assign(**setting).reindex(columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(["samples", *COUNTED], "Int64"))


def write_rows(file: pathlib.Path, setting: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the rows, all or those that there are so far, as a CSV file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")  # whoever is stopped leaves a file that is whole
    frame_of(rows, setting).to_csv(unfinished, index=False, float_format="%.10g")
    os.replace(unfinished, file)


def read_rows(file: pathlib.Path) -> pd.DataFrame:
    """The rows of a file; versions stay text, as 13.10 is not 13.1."""
    return pd.read_csv(file, dtype=dict.fromkeys([*VERSIONS, "commit"], str))


def baseline_of(frame: pd.DataFrame) -> str:
    """The implementation that the others are held against: the first that synchronizes."""
    names = list(frame.impl.unique())
    return next((name for name in names if name != BOUND), names[0])


def has_ours(frame: pd.DataFrame) -> bool:
    """Whether ours is among the rows, and something that it is held against."""
    return OURS in set(frame.impl) - {baseline_of(frame)}


def speedups(frame: pd.DataFrame) -> pd.DataFrame:
    """How often each implementation goes into the time of the baseline: a row a case and pass."""
    times = frame.set_index([*CASE, "pass", "impl"]).us_p50.unstack("impl", sort=False)
    return 1 / times.div(times[baseline_of(frame)], axis=0)


def means(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Geometric means of the speed-ups over groups of cases, in the order of the frame; without the
    baseline.
    """
    logarithms = speedups(frame).drop(columns=baseline_of(frame)).apply(np.log)
    return logarithms.groupby(level=by, sort=False).mean().apply(np.exp)


def text(numbers: pd.DataFrame, form: str) -> pd.DataFrame:
    """Numbers as text, or a dash where there is none."""
    return numbers.map(lambda number: "-" if pd.isna(number) else format(number, form))


def line_per_pass(frame: pd.DataFrame) -> pd.DataFrame:
    """Text: microseconds of each implementation, how many times faster than the baseline ours is
    and, on a GPU, its percentage of the copy roof and microseconds of the host. What is wrong has
    FAIL, and its error in units of what is tolerated.
    """
    wide = frame.set_index([*CASE, "pass", "impl"])

    def of_impls(column: str) -> pd.DataFrame:
        return wide[column].unstack("impl", sort=False)

    errors = of_impls("error_over_tolerance")
    lines = text(of_impls("us_p50"), ".0f").mask(errors > 1.0, "FAIL " + text(errors, ".0e"))
    if has_ours(frame):
        lines["x"] = text(speedups(frame)[[OURS]], ".2f")
    if OURS in lines and frame.gpu.notna().any():
        lines["copy %"] = text(100 * of_impls("copy_fraction")[[OURS]], ".0f")
        lines["host us"] = text(of_impls("host_us")[[OURS]], ".0f")
    lines = lines.reset_index()
    same = [name for name in ("dtype", "layout", "block") if lines[name].nunique() == 1]
    return lines.drop(columns=["suite", *same])


def counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Text: the most that a pass of each implementation asks of the device."""
    most = frame.groupby(["pass", "impl"], sort=False)[COUNTED].max().dropna(axis=1, how="all")
    by_name = text(most, "d").rename_axis(columns="counted").stack()
    return by_name.unstack("impl", sort=False).reset_index()


def markdown(table: pd.DataFrame) -> str:
    """A table of text in Markdown, its columns aligned."""
    lines = [list(map(str, table.columns)), *table.values.tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )


def where(frame: pd.DataFrame) -> str:
    """Machine, ranks, versions, commit and timer, in a line."""
    setting = frame.iloc[0]
    machine = "CPU" if pd.isna(setting.gpu) else setting.gpu
    versions = ", ".join(f"{name} {setting[name]}" for name in VERSIONS if pd.notna(setting[name]))
    return (
        f"{machine}, {setting.world_size} rank{'s' * int(setting.world_size > 1)}; {versions}; "
        f"commit {setting.commit}{' with changes' * int(setting.dirty)}, {setting.timestamp_utc}. "
        f"Timer: {setting.timer}; {frame.samples.max()} samples, in turns; the slowest rank."
    )


def headline(frame: pd.DataFrame) -> str:
    """Means and counts, for the end of a report and for the README."""
    of_kinds = means(frame, ["dtype", "layout", "pass"])
    parts = [
        f"How many times faster than {baseline_of(frame)}: geometric means over layers that are "
        "right against float64.",
        markdown(text(of_kinds, ".2f").reset_index()),
        "Counted in one run of a pass:",
        markdown(counts(frame)),
    ]
    return "\n\n".join(parts if frame.impl.nunique() > 1 else parts[2:])


def notes(frame: pd.DataFrame) -> list[str]:
    """What the figures are and are not."""
    lines = [f"{name}: {IMPLEMENTATIONS[name].note}." for name in frame.impl.unique()]
    setting = frame.iloc[0]
    if pd.notna(setting.copy_bytes_per_s):
        formula = ", ".join(
            f"{name} {maps}T{f' and {gates} bits an element' * (gates > 0)}"
            for name, (maps, gates) in BLOCKS[setting.block].items()
        )
        lines += [
            f"copy %: of what a copy on this machine reads and writes in a second, "
            f"{setting.copy_bytes_per_s * 1e-9:.1f} GB/s; bytes by formula, T the bytes of x: "
            f"{formula}. Above 100 is the cache's.",
            "host us: until a call returns to the host, the device idle before.",
        ]
    return lines


def report(frame: pd.DataFrame) -> str:
    """All of it, in Markdown."""
    return "\n\n".join(
        [
            "# SyncBN compared",
            f"Microseconds, medians; x: {baseline_of(frame)} / {OURS}, more is better.",
            markdown(line_per_pass(frame)),
            headline(frame),
            "\n".join(f"- {line}" for line in (where(frame), *notes(frame))),
        ]
    )
