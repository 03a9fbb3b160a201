"""How far y and dx are off where the mean of a channel is large against its deviation, from 1 to
1,000,000 times it: ours, torch's batch norm, a layer that gathers mean and 1/std as
torch.nn.SyncBatchNorm does, and one that has the variance from E[x^2] - E[x]^2. All in float32.

Writes cancellation.csv and pictures. Our kernels run in Triton's interpreter, on any machine.
"""

import argparse
import os
import pathlib
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from typing import Any

import pandas as pd
import torch
from machine.environment import environment
from numerics.errors import error, exact_result, scales
from numerics.examples import Example, make_example
from numerics.interpreter import prepare
from numerics.oracle import Result
from numerics.other_statistics import gathered, of_raw_sums, train_with
from numerics.training import train_steps, train_torch
from report.themes import WIDTH, Theme, write_pictures

RATIOS = [10 ** (power / 2) for power in range(13)]
SIZES = (4, 4)  # of two ranks
SPATIAL = (16, 16)
METHODS = {
    "triton_syncbn": lambda example: train_steps("kernels", example),
    "torch.nn.BatchNorm2d": train_torch,
    "gather of mean and 1/std": lambda example: train_with(gathered(example), example),
    "E[x²] - E[x]²": lambda example: train_with(of_raw_sums(example), example),
}
ERRORS = {"y": "output", "dx": "grad_input"}


def measure(seeds: int) -> pd.DataFrame:
    """A row for each ratio and method: the largest error of so many batches."""
    rows = []
    for ratio in RATIOS:
        errors: dict[tuple[str, str], float] = {}
        for seed in range(seeds):
            example = make_example(SIZES, spatial=SPATIAL, mean=ratio, seed=seed)
            for key, value in errors_of(example).items():
                errors[key] = max(value, errors.get(key, 0.0))
        rows += [
            {"mean_over_std": ratio, "method": method}
            | {short: errors[method, short] for short in ERRORS}
            for method in METHODS
        ]
    return pd.DataFrame(rows)


def errors_of(example: Example) -> dict[tuple[str, str], float]:
    """Norms of errors over the norm of y, and over that of the largest term of dx."""
    exact = exact_result(example)
    scale = scales(example, exact)
    results: dict[str, Result] = {name: train(example) for name, train in METHODS.items()}
    return {
        (method, short): error(name, result, exact, scale)
        for method, result in results.items()
        for short, name in ERRORS.items()
    }


def draw(frame: pd.DataFrame, theme: Theme) -> Any:
    """A panel for y and one for dx."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    styles: dict[str, dict[str, Any]] = {
        "triton_syncbn": {"color": theme.ours, "marker": "o", "linewidth": 2.2, "zorder": 3},
        "torch.nn.BatchNorm2d": {"color": theme.other, "marker": "s"},
        "gather of mean and 1/std": {"color": theme.torch, "marker": "^", "linestyle": "--"},
        "E[x²] - E[x]²": {"color": theme.wrong, "marker": "x"},
    }
    panels = figure.subplots(1, len(ERRORS), sharey=True)
    for axes, short in zip(panels, ERRORS, strict=True):
        for method, style in styles.items():
            rows = frame[frame.method == method]
            axes.plot(rows.mean_over_std, rows[short], label=method, markersize=4, **style)
        axes.set(xscale="log", yscale="log", xlabel="mean / std", title=f"error of {short}")
    panels[0].set_ylabel("norm of error / norm of result")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="batches of each ratio (%(default)s)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("build/cancellation"), metavar="FOLDER"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    prepare()
    frame = measure(options.seeds)
    where = environment(torch.device("cpu"), len(SIZES))  # before it has changes: the pictures
    files = write_pictures(lambda theme: draw(frame, theme), options.out, "cancellation")
    frame.assign(**where).to_csv(options.out / "cancellation.csv", index=False, float_format="%.3g")
    print(frame.to_string(index=False, float_format="{:.2g}".format))
    print(f"Pictures: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
