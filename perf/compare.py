"""Compare SyncBN with what there is, layer by layer: first whether it is right, then how long it
takes.

On a GPU: against torch.nn.SyncBatchNorm (its synchronized path, also where there is one rank) and
torch's batch norm, which does not synchronize. Without one: two processes on this machine over
gloo, the layers scaled down, against a layer that sends what torch.nn.SyncBatchNorm sends (which
refuses CPU tensors) and torch's batch norm.

Instead of layers: with --scale, what a rank receives and computes in groups of 2 to 4096 ranks;
with --model, a training step of whole networks.

Under torchrun every rank takes the GPU of its local rank, and a time is that of the slowest rank.
The exit status is 1 if a row is wrong, or slower than --baseline allows.
"""

import argparse
import itertools
import pathlib
import sys
from typing import Any

import pandas as pd
import torch
from layers.cases import DTYPES, LAYOUTS, read_cases, suites
from layers.implementations import REGISTERED, implementations
from machine.environment import environment
from machine.ranks import Place, count_ranks, device_of_rank, is_first_rank, run_on_ranks
from measuring.passes import PASSES
from measuring.rows import Plan, measure_layers
from measuring.scale import scale_table, scale_text
from models.measurement import measure_model
from models.networks import CLASSES
from models.table import models_text
from models.training_step import LOSS_TOLERANCE
from report.markdown import summary
from report.plots import write_plots, write_scale_plot
from report.regression import check_comparable, describe, read_baseline, regressions
from report.tables import frame_of_layers, print_report

SAMPLES = {
    "GPU": {"layer": 100, "model": 30, "scale": 100},
    "CPU": {"layer": 10, "model": 3, "scale": 20},
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    file: dict[str, Any] = {"type": pathlib.Path, "metavar": "FILE"}
    what = parser.add_argument_group("what is compared")
    what.add_argument("--suite", nargs="+", choices=suites(), default=suites())
    what.add_argument("--scale", action="store_true", help="2 to 4096 ranks, instead of layers")
    what.add_argument("--model", nargs="+", choices=CLASSES, help="networks, instead of layers")
    what.add_argument("--impl", nargs="+", choices=REGISTERED, help="default: what runs here")
    what.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default on a GPU: bf16, layers also fp32"
    )
    what.add_argument(
        "--layout", nargs="+", choices=LAYOUTS, help="default: the first; of layers on a GPU, both"
    )
    what.add_argument("--pass", nargs="+", choices=PASSES, default=list(PASSES), dest="passes")
    how = parser.add_argument_group("how it is timed")
    how.add_argument("--samples", type=int, help=f"timed runs; default: {SAMPLES}")
    how.add_argument("--warm-cache", action="store_true", help="do not flush the GPU's L2 cache")
    how.add_argument("--cuda-graph", action="store_true", help="time kernels alone, in CUDA graphs")
    output = parser.add_argument_group("what is written")
    output.add_argument("--csv", **file, help="all rows; a Markdown summary goes beside it")
    output.add_argument(
        "--plots", type=pathlib.Path, metavar="DIR", help="draw plots into a folder"
    )
    output.add_argument("--baseline", **file, help="rows of an earlier run, to find what is slower")
    output.add_argument(
        "--fail-over",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="slower than the baseline by more is a regression (default: %(default)g)",
    )
    options = parser.parse_args(arguments)
    kind = "scale" if options.scale else "model" if options.model else "layer"
    several = gpu and kind == "layer"
    options.dtype = options.dtype or (["bf16", *["fp32"] * several] if gpu else ["fp32"])
    options.layout = options.layout or LAYOUTS[: 1 + several]
    options.samples = options.samples or SAMPLES["GPU" if gpu else "CPU"][kind]
    if options.model and not LOSS_TOLERANCE.keys() >= set(options.dtype):
        parser.error(f"--dtype: a network trains in {' or '.join(LOSS_TOLERANCE)}")
    if not gpu:
        for name in ("warm_cache", "cuda_graph"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')}: expected a GPU, found none")
    try:
        implementations(torch.device("cuda" if gpu else "cpu"), options.impl)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 1 if any row is wrong or a regression. The first rank prints and writes,
    every rank returns the exit status.
    """
    options = parse(arguments)
    if options.scale:
        return compare_scale(options)
    if options.model:
        return compare_models(options)
    return compare_layers(options)


def compare_layers(options: argparse.Namespace) -> int:
    """Print and write the rows of layers; 1 if one is wrong or a regression."""
    setting = environment(device_of_rank(), count_ranks())
    if options.baseline:
        check_baseline(options.baseline, setting)
    on_cpu = not torch.cuda.is_available()
    cases = read_cases(options.suite, options.dtype, options.layout, for_cpu=on_cpu)
    plan = Plan(
        options.samples, options.impl, options.passes, options.warm_cache, options.cuda_graph
    )
    measured = run_on_ranks(measure_layers, cases, plan)
    if not measured.rows:
        sys.exit(f"nothing could be run: {measured.failures}")
    frame = frame_of_layers(measured.rows, setting)
    slower = None
    if options.baseline:
        slower = regressions(frame, read_baseline(options.baseline), options.fail_over)
    if is_first_rank():
        print_report(frame, measured.copy_roof, measured.failures)
        if options.csv:
            write_rows(frame, options.csv)
            text = summary(frame, measured.copy_roof)
            options.csv.with_suffix(".md").write_text(text, encoding="utf-8")
        if options.plots:
            print(write_plots(frame, options.plots))
        if slower is not None:
            print(describe(slower, options.fail_over))
    wrong = (frame.error_over_tolerance > 1.0).any()
    return int(wrong or (slower is not None and not slower.empty))


def compare_scale(options: argparse.Namespace) -> int:
    """Print and write how costs grow with the ranks; the first rank of torchrun does it alone."""
    if not is_first_rank():
        return 0
    frame = scale_table(device_of_rank(), options.samples)
    print(scale_text(frame))
    if options.csv:
        write_rows(frame, options.csv)
    if options.plots:
        print(write_scale_plot(frame, options.plots))
    return 0


def compare_models(options: argparse.Namespace) -> int:
    """Print and write the training steps of networks; 1 if a layer in one of them is wrong."""
    frame = run_on_ranks(
        rows_of_models, options.model, options.dtype, options.layout, options.samples
    )
    if options.csv and is_first_rank():
        setting = environment(device_of_rank(), count_ranks())
        write_rows(frame.assign(**setting), options.csv)
    return int((frame.error_over_tolerance > 1.0).any())


def rows_of_models(
    place: Place, names: list[str], dtypes: list[str], layouts: list[str], samples: int
) -> pd.DataFrame:
    """Measure networks on this rank; the first rank prints each as it comes."""
    frames = []
    for name, dtype, layout in itertools.product(names, dtypes, layouts):
        frames.append(measure_model(place, name, dtype, layout, samples))
        if place.rank == 0:
            print(models_text(frames[-1]), flush=True)
    return pd.concat(frames, ignore_index=True)


def check_baseline(file: pathlib.Path, setting: dict[str, Any]) -> None:
    """Before anything is measured: end where the baseline cannot be compared with, warn where it
    differs.
    """
    try:
        warnings = check_comparable(read_baseline(file), setting)
    except (OSError, ValueError) as error:
        sys.exit(f"--baseline: {error}")
    for warning in warnings:
        print(f"--baseline: {warning}", file=sys.stderr)


def write_rows(frame: pd.DataFrame, file: pathlib.Path) -> None:
    """Write a CSV file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(file, index=False, float_format="%.10g")
    print(f"{len(frame)} rows written to {file}.")


if __name__ == "__main__":
    sys.exit(main())
