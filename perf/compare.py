"""Compare SyncBN with what there is, layer by layer: first whether it is right, then how long it
takes.

On a GPU: against torch.nn.SyncBatchNorm (its synchronized path, also where there is one rank) and
torch's batch norm, which does not synchronize. Without one: two processes on this machine over
gloo, smaller batches, against what is written by hand there, as torch.nn.SyncBatchNorm refuses CPU
tensors, a layer that sends what it would send, and torch's batch norm. In float32 and channels
first; on a GPU also in bfloat16 and in both layouts.

Instead of layers: with --model, a training step of whole networks; with --scale, what a rank
receives in groups of 2 to 4096 ranks, by formula.

Under torchrun every rank takes the GPU of its local rank, and a time is that of the slowest rank.
The exit status is 1 if a row is wrong, or slower than --baseline allows.
"""

import argparse
import functools
import pathlib
import sys
from typing import Any

import pandas as pd
import torch
from layers.cases import BLOCKS, DTYPES, LAYOUTS, PASSES, read_cases, suites
from layers.implementations import implementations
from machine.environment import environment
from machine.ranks import count_ranks, device_of_rank, is_first_rank, run_on_ranks
from measuring.rows import Plan, measure
from measuring.scale import CHANNELS, scale_table
from models.networks import NETWORKS
from models.training import LOSS_TOLERANCE, network_cases
from report.plots import figure_of_scale, figures_of, save
from report.regression import check_comparable, describe, regressions
from report.tables import frame_of, markdown, read_rows, report, text, write_rows

SAMPLES = {"cuda": 100, "cpu": 25}
TOLERATED_PERCENT = 5.0  # that a row may be slower than the baseline


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = device_of_rank()
    gpu = device.type == "cuda"
    here = list(implementations(device))
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME", "help": "of: %(choices)s"}
    dtypes, layouts = (["bf16", "fp32"], LAYOUTS) if gpu else (["fp32"], LAYOUTS[:1])
    file: dict[str, Any] = {"type": pathlib.Path, "metavar": "FILE"}
    what = parser.add_argument_group("what is compared")
    what.add_argument("--suite", choices=suites(), default=suites(), **several)
    what.add_argument("--scale", action="store_true", help="2 to 4096 ranks, instead of layers")
    what.add_argument("--model", nargs="+", choices=NETWORKS, help="networks, instead of layers")
    what.add_argument("--impl", choices=here, default=here, **several)
    what.add_argument("--dtype", choices=DTYPES, default=dtypes, **several)
    what.add_argument("--layout", choices=LAYOUTS, default=layouts, **several)
    what.add_argument("--block", choices=BLOCKS, default="none", help="what follows the layer")
    what.add_argument("--pass", dest="passes", choices=PASSES, default=list(PASSES), **several)
    how = parser.add_argument_group("how it is timed")
    how.add_argument("--samples", type=int, default=SAMPLES[device.type], help="%(default)s runs")
    how.add_argument("--cuda-graph", action="store_true", help="time kernels alone, in CUDA graphs")
    output = parser.add_argument_group("what is written")
    output.add_argument("--csv", **file, help="all rows, as they come; the report goes beside it")
    output.add_argument("--plots", type=pathlib.Path, metavar="DIR", help="pictures")
    output.add_argument("--baseline", **file, help="rows of an earlier run, to find what is slower")
    options = parser.parse_args(arguments)
    if options.model and not LOSS_TOLERANCE.keys() >= set(options.dtype):
        parser.error(f"--dtype: a network trains in {' or '.join(LOSS_TOLERANCE)}")
    if options.cuda_graph and not gpu:
        parser.error("--cuda-graph: expected a GPU, found none")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 1 if any row is wrong or a regression. The first rank prints and writes,
    every rank returns the exit status.
    """
    options = parse(arguments)
    return compare_scale(options) if options.scale else compare(options)


def compare(options: argparse.Namespace) -> int:
    """Print and write the rows of layers or networks."""
    setting = environment(device_of_rank(), count_ranks())
    baseline = read_baseline(options.baseline, setting) if options.baseline else None
    kinds = options.dtype, options.layout, not torch.cuda.is_available()
    cases = (
        network_cases(options.model, *kinds)
        if options.model
        else read_cases(options.suite, *kinds, options.block)
    )
    passes = ["step"] if options.model else options.passes
    keep = functools.partial(write_rows, options.csv, setting) if options.csv else None
    plan = Plan(options.impl, options.samples, options.cuda_graph, passes, keep)
    rows = run_on_ranks(measure, cases, plan)
    if not rows:
        sys.exit("nothing could be run")
    frame = frame_of(rows, setting)
    slower = None if baseline is None else regressions(frame, baseline, TOLERATED_PERCENT)
    if is_first_rank():
        told = report(frame)
        print(f"\n{told}")
        if options.csv:
            print(f"{len(frame)} rows written to {options.csv}.")
            options.csv.with_suffix(".md").write_text(f"{told}\n", encoding="utf-8")
        if options.plots:
            print(save(figures_of(frame), options.plots))
        if slower is not None:
            print(describe(slower, TOLERATED_PERCENT))
    wrong = (frame.error_over_tolerance > 1.0).any()
    return int(wrong or (slower is not None and not slower.empty))


def compare_scale(options: argparse.Namespace) -> int:
    """Print and write what a rank receives, by formula."""
    table = scale_table()
    print(f"Bytes that a rank receives in forward, by formula, {CHANNELS} channels:\n")
    print(markdown(text(table, ",.0f")))
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.csv, index=False)
        print(f"{len(table)} rows written to {options.csv}.")
    if options.plots:
        print(save(figure_of_scale(table), options.plots))
    return 0


def read_baseline(file: pathlib.Path, setting: dict[str, Any]) -> pd.DataFrame:
    """Before anything is measured: end where the baseline cannot be compared with."""
    try:
        baseline = read_rows(file)
        check_comparable(baseline, setting)
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"--baseline: {error}")
    return baseline


if __name__ == "__main__":
    sys.exit(main())
