"""The report in Markdown: the summary beside the CSV, and its short form for the README."""

import pandas as pd

from report.tables import (
    baseline_of,
    counts,
    footnotes,
    geometric_means,
    line_per_layer,
    number,
    ours_of,
    where,
    widest_pass,
    wrong_lines,
)


def markdown_table(text: pd.DataFrame) -> str:
    """A table of text."""
    lines = [list(text.columns), ["---"] * len(text.columns), *text.values.tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def means_by_suite(frame: pd.DataFrame) -> pd.DataFrame:
    """Text: a line a suite and one for all, the geometric means of what is faster in each pass."""
    keys = ["dtype", "layout", "pass"]
    by_suite = geometric_means(frame, ["suite", *keys]).unstack("suite")
    names = list(frame.suite.unique())
    lines = []
    for impl in ours_of(frame):
        over_all = geometric_means(frame, keys)[impl]
        table = by_suite[impl].reindex(over_all.index)[names].assign(all=over_all)
        lines.append(table.map(number, form=".2f").reset_index().assign(impl=impl))
    together = pd.concat(lines)
    return together[["impl", *together.columns.drop("impl")]]


def summary(frame: pd.DataFrame, roof: float) -> str:
    """All of the report, as a file."""
    baseline = baseline_of(frame)
    parts = ["# SyncBN compared", where(frame), *wrong_lines(frame)]
    if ours_of(frame):
        parts += [f"## {baseline} / ours, geometric means", markdown_table(means_by_suite(frame))]
    parts += [
        f"## Layers: microseconds of {widest_pass(frame)}",
        markdown_table(line_per_layer(frame)),
        "## Counted in one run of a pass",
        markdown_table(counts(frame)),
        "## Notes",
        "\n".join(f"- {note}" for note in footnotes(frame, roof)),
    ]
    return "\n\n".join(parts) + "\n"


def short_summary(frame: pd.DataFrame) -> str:
    """Means and counts, for the README."""
    baseline, shown = baseline_of(frame), widest_pass(frame)
    means = means_by_suite(frame)
    return "\n\n".join(
        [
            f"How many times faster than {baseline}: geometric means over the layers of "
            "[perf/shapes.csv](perf/shapes.csv), correct against float64 before they were timed.",
            markdown_table(means[means["pass"] == shown]),
            markdown_table(counts(frame)),
            f"{where(frame)} Timer: {frame.timer.iloc[0]}.",
        ]
    )
