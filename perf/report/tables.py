"""The tables: all rows with their environment, a line a layer, means, and what they mean."""

import math
import pathlib
import textwrap
from typing import Any

import pandas as pd
from layers.cases import CPU_FACTOR, MOST_VALUES
from layers.implementations import OURS
from machine.environment import VERSIONS
from measuring.passes import TRANSFERS

SCHEMA = 2
COLUMNS = (
    *("schema", "timestamp_utc", "commit", "dirty", "gpu", "gpu_count", "driver", "torch"),
    *("triton", "cuda", "nccl", "impl", "pass", "dtype", "layout", "suite", "layer", "shape"),
    *("world_size", "timer", "samples", "us_p20", "us_p50", "us_p80", "host_us", "gbytes_per_s"),
    *("copy_fraction", "peak_mb", "launches", "host_syncs", "collectives"),
    *("error_over_tolerance", "config"),
)
LAYER = ["suite", "layer", "shape", "dtype", "layout"]


def frame_of_layers(rows: list[dict[str, Any]], setting: dict[str, Any]) -> pd.DataFrame:
    """A row for each layer, implementation and pass, with COLUMNS; empty where not measured."""
    frame = pd.DataFrame(rows).assign(schema=SCHEMA, **setting).reindex(columns=list(COLUMNS))
    counted = ["samples", "launches", "host_syncs", "collectives"]
    return frame.astype(dict.fromkeys(counted, "Int64"))


def read_rows(file: pathlib.Path) -> pd.DataFrame:
    """The rows of a file; versions stay text, as 13.10 is not 13.1."""
    return pd.read_csv(file, dtype=dict.fromkeys([*VERSIONS, "commit"], str))


def baseline_of(frame: pd.DataFrame) -> str:
    """The implementation that ours is held against: the first."""
    return str(frame.impl.iloc[0])


def ours_of(frame: pd.DataFrame) -> list[str]:
    """Our implementations, without the one that they are held against."""
    names = [name for name in frame.impl.unique() if name.startswith(OURS)]
    return [name for name in names if name != baseline_of(frame)]


def speedups(frame: pd.DataFrame) -> pd.DataFrame:
    """How often each implementation goes into the time of the first: a row a layer and pass."""
    times = frame.pivot(index=[*LAYER, "pass"], columns="impl", values="us_p50")
    order = pd.MultiIndex.from_frame(frame[[*LAYER, "pass"]].drop_duplicates())
    times = times.reindex(order)[list(frame.impl.unique())]
    return 1 / times.div(times[baseline_of(frame)], axis=0)


def geometric_means(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Geometric means of the speed-ups of ours over groups of layers, in the order of the frame."""
    logarithms = speedups(frame)[ours_of(frame)].map(math.log, na_action="ignore")
    return logarithms.groupby(level=by, sort=False).mean().map(math.exp, na_action="ignore")


def widest_pass(frame: pd.DataFrame) -> str:
    """The pass whose times are shown: both, if it was measured."""
    passes = list(frame["pass"].unique())
    return "both" if "both" in passes else passes[0]


def line_per_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """Text: microseconds of each implementation, how much faster ours is in each pass, and for ours
    the percentage of the copy roof and microseconds of the host.
    """
    shown = widest_pass(frame)
    of_pass = frame[frame["pass"] == shown].set_index([*LAYER, "impl"])
    layers = pd.MultiIndex.from_frame(frame[LAYER].drop_duplicates())
    columns: dict[str, list[str]] = {}

    def of_impl(column: str, impl: str) -> pd.Series:
        return of_pass[column].xs(impl, level="impl").reindex(layers)

    for impl in frame.impl.unique():
        wrong = of_impl("error_over_tolerance", impl) > 1.0
        times = of_impl("us_p50", impl)
        columns[f"{impl} us"] = [
            "FAIL" if is_wrong else number(time, ".0f")
            for is_wrong, time in zip(wrong, times, strict=True)
        ]
    for impl in ours_of(frame):
        ratios = speedups(frame)[impl].unstack("pass").reindex(layers)
        label = impl.removeprefix(OURS).strip("_")
        for pass_name in frame["pass"].unique() if impl == OURS else [shown]:
            title = f"x {pass_name} {label}".rstrip()
            columns[title] = [number(ratio, ".2f") for ratio in ratios[pass_name]]
    if OURS in set(frame.impl):
        columns["copy %"] = [number(100 * f, ".0f") for f in of_impl("copy_fraction", OURS)]
        if frame.gpu.notna().any():  # else it is the time itself
            columns["host us"] = [number(us, ".0f") for us in of_impl("host_us", OURS)]
    text = layers.to_frame(index=False).drop(columns="suite")
    for column in ("dtype", "layout"):
        if text[column].nunique() == 1:
            text = text.drop(columns=column)
    return text.assign(**columns)


def number(value: float, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if pd.isna(value) else format(value, form)


def counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Text: launches, host syncs, collectives of a pass of each implementation, over layers."""
    columns = ["launches", "host_syncs", "collectives"]
    groups = frame.groupby(["impl", "pass"], sort=False)[columns]
    least, most = groups.min(), groups.max()
    text = pd.DataFrame(index=least.index)
    for column in columns:
        text[column.replace("_", " ")] = [
            "-" if pd.isna(low) else str(low) if low == high else f"{low} to {high}"
            for low, high in zip(least[column], most[column], strict=True)
        ]
    return text.reset_index()


def where(frame: pd.DataFrame) -> str:
    """Machine, ranks, versions and commit, in a line."""
    setting = frame.iloc[0]
    machine = "CPU" if pd.isna(setting.gpu) else setting.gpu
    versions = ", ".join(f"{name} {setting[name]}" for name in VERSIONS if pd.notna(setting[name]))
    return (
        f"{machine}, {setting.world_size} rank{'s' * int(setting.world_size > 1)}; {versions}; "
        f"commit {setting.commit}{' with changes' * int(setting.dirty)}, {setting.timestamp_utc}."
    )


def footnotes(frame: pd.DataFrame, roof: float) -> list[str]:
    """What the figures are and are not."""
    formula = ", ".join(f"{name} {count}T" for name, count in TRANSFERS.items())
    setting = frame.iloc[0]
    lines = [
        f"Timer: {setting.timer}; {frame.samples.max()} samples, in turns; the slowest rank.",
        f"Bytes by formula, T the bytes of x: {formula}. Copy roof: {roof * 1e-9:.1f} GB/s, read "
        "and written by a copy on this machine in this run; copy % above 100 is the cache's.",
        "torch_batchnorm, which does not synchronize, is the bound.",
    ]
    if pd.notna(setting.gpu):
        lines.append("host us: until a call returns to the host, the device idle before.")
        if setting.world_size == 1:
            lines.append(
                "torch_syncbn's synchronized path is called directly: torch leaves it out at one "
                "rank. It and triton_syncbn communicate in a group of one rank, by NCCL."
            )
        return lines
    return [
        *lines,
        f"Scaled down: spatial sizes by {CPU_FACTOR}, samples by {2 * CPU_FACTOR}, or by more to "
        f"leave no more than {MOST_VALUES} values.",
        "torch.nn.SyncBatchNorm refuses CPU tensors: gather_syncbn sends what it would send. On a "
        "CPU it and triton_syncbn compute in plain torch and differ in communication alone; on a "
        "GPU triton_syncbn runs its kernels.",
        "On a CPU nothing is launched: launches counts operators that compute, one for each step "
        "of triton_syncbn, as on a GPU, where it is one kernel.",
    ]


def wrong_lines(frame: pd.DataFrame) -> list[str]:
    """A line for each implementation and layer that is wrong."""
    wrong = frame[frame.error_over_tolerance > 1.0]
    seen = wrong[["impl", "layer", "dtype", "layout", "error_over_tolerance"]].drop_duplicates()
    return [
        f"FAIL: {impl} is wrong on {layer}, {dtype}, {layout}: {error:.3g} times the tolerance."
        for impl, layer, dtype, layout, error in seen.values
    ]


def print_report(frame: pd.DataFrame, roof: float, failures: dict[str, str]) -> None:
    """Print the tables and what they mean."""
    baseline = baseline_of(frame)
    print(
        f"\nMicroseconds of {widest_pass(frame)} (median); x: {baseline} / ours, more is better.\n"
    )
    print(line_per_layer(frame).to_string(index=False))
    print()
    for impl in ours_of(frame):
        means = geometric_means(frame, ["pass"])[impl]
        listed = ", ".join(f"{number(mean, '.2f')} {name}" for name, mean in means.items())
        print(f"Geometric mean of {baseline} / {impl}: {listed}.")
    print(f"\nCounted in one run of a pass:\n\n{counts(frame).to_string(index=False)}\n")
    print(textwrap.fill(where(frame), 100))
    for note in footnotes(frame, roof):
        print(textwrap.fill(note, 100))
    print("\n".join(wrong_lines(frame)))
    for impl, reason in failures.items():
        print(f"Left out: {impl}: {reason}")
