"""What a GPU's figures are to reach, and what those of a folder do."""

import math
import pathlib
from typing import Any, NamedTuple

import pandas as pd
from layers.cases import DTYPES, LAYOUTS, read_cases, suites

STOCK, OURS, BOUND = "torch_syncbn", "triton_syncbn", "torch_batchnorm"
LAYER = ["layer", "shape", "dtype", "layout", "block"]
FIGURES = ["us_p50", "host_us", "copy_fraction", "host_syncs"]
LARGE = (64e6, math.inf)  # bytes of a map: neither its first nor its second reading is in L2
IN_CACHE = (8e6, 48e6)  # its second reading may be


class Goal(NamedTuple):
    """A figure of forward + backward: what it is to be, and what was measured."""

    figure: str
    file: str  # without its suffix
    goal: float
    at_least: bool
    measured: float  # NaN where the file is missing
    worst: str = ""  # the row that decides

    @property
    def verdict(self) -> str:
        """In a word."""
        if math.isnan(self.measured):
            return "not measured"
        reached = self.measured >= self.goal if self.at_least else self.measured <= self.goal
        return "reached" if reached else "missed"


def goals(folder: pathlib.Path) -> list[Goal]:
    """Each goal, with what the files that on_gpu.py writes into a folder say. What hangs on kernels
    alone is read from CUDA graphs, as tuned, if they were measured again.
    """
    rows, relu, add_relu, graphs, tuned = (
        _both(folder / f"{name}.csv") for name in ("rows", "relu", "add_relu", "graphs", "tuned")
    )
    kernels = "graphs"
    if len(tuned) >= max(len(graphs), 1):  # else it was stopped
        kernels, graphs = "tuned", tuned
    bytes_of_map = pd.Series(list(map(_bytes, graphs.index)), graphs.index, float)
    times, host = rows.get("us_p50"), rows.get("host_us")
    copied = None if graphs.empty else graphs["copy_fraction"][OURS]
    speedup = _ratio(times, STOCK, OURS)
    found = [
        Goal("stock / ours, geometric mean", "rows", 3, True, _mean(speedup)),
        _extreme("stock / ours, worst row", "rows", 1.15, True, speedup),
    ]
    for name, (low, high), goal in (
        ("copy bandwidth, rows of 64 MB and more", LARGE, 0.92),
        ("copy bandwidth, rows of 8 to 48 MB", IN_CACHE, 1.0),
    ):
        chosen = None if copied is None else copied[(bytes_of_map >= low) & (bytes_of_map <= high)]
        found.append(_extreme(name, kernels, goal, True, chosen))
    for name, frame in (("relu", relu), ("add_relu", add_relu)):
        ratio = _ratio(frame.get("us_p50"), STOCK, OURS)
        found.append(Goal(f"block {name}: stock eager / ours", name, 4, True, _mean(ratio)))
    waits = None if times is None else rows["host_syncs"][OURS]
    ours_of_graphs = _ratio(graphs.get("us_p50"), STOCK, OURS)
    over_bound = _ratio(times, OURS, BOUND)
    return [
        *found,
        Goal("host time, ours / stock", "rows", 0.4, False, _mean(_ratio(host, OURS, STOCK))),
        _extreme("waits of the host, ours", "rows", 0, False, waits),
        Goal("CUDA graphs: stock / ours, geometric mean", kernels, 2, True, _mean(ours_of_graphs)),
        _extreme("ours / batch norm without synchronization", "rows", 1, False, over_bound),
    ]


def goals_text(found: list[Goal]) -> str:
    """A table in Markdown."""
    lines = ["| figure | goal | measured | | decided by | file |", "|---|---|---|---|---|---|"]
    for goal in found:
        sign = "≥" if goal.at_least else "≤"
        measured = "" if math.isnan(goal.measured) else f"{goal.measured:.3g}"
        lines.append(
            f"| {goal.figure} | {sign} {goal.goal:g} | {measured} | {goal.verdict} | {goal.worst} "
            f"| {goal.file}.csv |"
        )
    return "\n".join(lines) + "\n"


def layers_measured(folder: pathlib.Path) -> str:
    """How many layers each file has: fewer than there are where it was stopped."""
    layers = len(read_cases(suites(), ["bf16", "fp32"], list(LAYOUTS)))
    found = {file.name: len(_both(file)) for file in sorted(folder.glob("*.csv"))}
    counts = ", ".join(f"{count} in {name}" for name, count in found.items() if count)
    return f"\nOf {layers} layers {counts or 'none'}.\n"


def _both(file: pathlib.Path) -> pd.DataFrame:
    """Forward + backward: a row per layer, columns (figure, implementation)."""
    if not file.exists():
        return pd.DataFrame()
    frame = pd.read_csv(file)
    if "pass" not in frame:
        return pd.DataFrame()
    frame = frame[frame["pass"] == "both"]
    return frame.pivot(index=LAYER, columns="impl", values=FIGURES)


def _bytes(layer: tuple[str, ...]) -> int:
    _, shape, dtype, *_ = layer
    return math.prod(map(int, shape.split("x"))) * DTYPES[dtype].itemsize


def _ratio(figures: Any, above: str, below: str) -> Any:
    """Of two implementations, layer by layer; None where one was not measured."""
    if figures is None or not {above, below} <= set(figures.columns):
        return None
    return figures[above] / figures[below]


def _mean(ratios: Any) -> float:
    """The geometric mean."""
    return math.nan if ratios is None else math.exp(ratios.dropna().map(math.log).mean())


def _extreme(figure: str, file: str, goal: float, at_least: bool, values: Any) -> Goal:
    """The least of what must be large, the greatest of what must be small; and where."""
    if values is None or values.dropna().empty:
        return Goal(figure, file, goal, at_least, math.nan)
    where = values.idxmin() if at_least else values.idxmax()
    return Goal(figure, file, goal, at_least, float(values[where]), " ".join(where))
