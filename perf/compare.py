"""Compare SyncBN with what there is, layer by layer: first whether it is right, then how long it
takes.

On a GPU: against torch.nn.SyncBatchNorm (its synchronized path, also where there is one rank) and
torch's batch norm, which does not synchronize. Without one: two processes on this machine over
gloo, the layers scaled down, against a layer that sends what torch.nn.SyncBatchNorm sends (which
refuses CPU tensors) and torch's batch norm.

Instead of layers: with --scale, what a rank receives, waits and computes in groups of 2 to 4096
ranks; with --model, a training step of whole networks.

Under torchrun every rank takes the GPU of its local rank, and a time is that of the slowest rank.
The exit status is 1 if a row is wrong, or slower than --baseline allows.
"""

import argparse
import os
import pathlib
import sys
import tempfile
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from cases import DTYPES, LAYOUTS, read_cases, suites
from environment import environment
from implementations import REGISTERED, implementations, synchronized_even_alone
from markdown import summary
from measure import Measurement
from memory import copy_bytes_per_second
from model_table import report as model_report
from models import CLASSES
from passes import PASSES
from plots import write_plots, write_scale_plot
from readme import README, write_block
from regression import check_comparable, describe, read_baseline, regressions
from report import CPU_FACTOR, print_report, tidy
from scale import scale_table, scale_text
from tqdm import tqdm
from train_models import run as run_model

CPU_RANKS = 2


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
        "--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"] if gpu else ["fp32"]
    )
    what.add_argument(
        "--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS if gpu else LAYOUTS[:1])
    )
    what.add_argument("--pass", nargs="+", choices=PASSES, default=list(PASSES), dest="passes")
    how = parser.add_argument_group("how it is timed")
    how.add_argument(
        "--samples",
        type=int,
        default=100 if gpu else 20,
        help="timed runs of a layer (default: %(default)s)",
    )
    how.add_argument("--warm-cache", action="store_true", help="do not flush the GPU's L2 cache")
    how.add_argument("--cuda-graph", action="store_true", help="time kernels alone, in CUDA graphs")
    output = parser.add_argument_group("what is written")
    output.add_argument("--csv", **file, help="all rows; a Markdown summary goes beside it")
    output.add_argument(
        "--plots", type=pathlib.Path, metavar="DIR", help="draw plots into a folder"
    )
    output.add_argument(
        "--readme", action="store_true", help="put the summary into README.md, from a GPU only"
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
    if not gpu:
        for name in ("warm_cache", "cuda_graph", "readme"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')}: expected a GPU, found none")
    try:
        implementations(torch.device("cuda" if gpu else "cpu"), options.impl)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 1 if any row is wrong or a regression."""
    options = parse(arguments)
    if options.scale:
        return compare_scale(options)
    if options.model:
        return compare_models(options)
    torchrun = "WORLD_SIZE" in os.environ
    alone = 1 if torch.cuda.is_available() else CPU_RANKS
    world_size = int(os.environ["WORLD_SIZE"]) if torchrun else alone
    if options.baseline:
        check_baseline(options.baseline, world_size)
    if torchrun:
        return compare(int(os.environ["RANK"]), world_size, "env://", options)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        if torch.cuda.is_available():
            return compare(0, world_size, store, options)
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=compare, args=(rank, world_size, store, options), daemon=True)
            for rank in range(1, world_size)
        ]
        for process in others:
            process.start()
        status = compare(0, world_size, store, options)
        for process in others:
            process.join()
        return status


def compare(rank: int, world_size: int, store: str, options: argparse.Namespace) -> int:
    """One rank of the comparison. Rank 0 prints and writes; every rank returns the exit status."""
    device = device_of_rank()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    setting = environment(device, world_size)
    dist.init_process_group(
        "nccl" if gpu else "gloo", init_method=store, rank=rank, world_size=world_size
    )
    try:
        roof = copy_bytes_per_second(device, options.samples)
        measurement = Measurement(options, rank, world_size, device, roof)
        cases = read_cases(options.suite, options.dtype, options.layout, 1 if gpu else CPU_FACTOR)
        rows = []
        with synchronized_even_alone():
            for case in tqdm(cases, unit="layer", disable=rank != 0, dynamic_ncols=True):
                rows += measurement.rows_of(case)
    finally:
        dist.destroy_process_group()
    if not rows:
        sys.exit(f"nothing could be run: {measurement.failures}")
    frame = tidy(rows, setting)
    status = int((frame.error_over_tolerance > 1.0).any())
    if rank == 0:
        print_report(frame, roof, measurement.failures)
        write_files(frame, roof, options)
    if options.baseline:
        slower = regressions(frame, read_baseline(options.baseline), options.fail_over)
        status |= int(not slower.empty)
        if rank == 0:
            print(describe(slower, options.fail_over))
    return status


def compare_scale(options: argparse.Namespace) -> int:
    """Print and write how costs grow with the ranks; the first rank of torchrun does it alone."""
    if int(os.environ.get("RANK", 0)) > 0:
        return 0
    frame = scale_table(device=device_of_rank(), samples=options.samples)
    print(scale_text(frame))
    if options.csv:
        write_rows(frame, options.csv)
    if options.plots:
        print(write_scale_plot(frame, options.plots))
    return 0


def compare_models(options: argparse.Namespace) -> int:
    """Print and write the training steps of networks; 1 if a layer in one of them is wrong."""
    frames = []
    for name in options.model:
        frames.append(run_model(name))
        if int(os.environ.get("RANK", 0)) == 0:
            print(model_report(frames[-1]), flush=True)
    frame = pd.concat(frames, ignore_index=True)
    if options.csv and int(os.environ.get("RANK", 0)) == 0:
        setting = environment(device_of_rank(), int(frame.world_size.iloc[0]))
        write_rows(frame.assign(**setting), options.csv)
    return int((frame.error_over_tolerance > 1.0).any())


def device_of_rank() -> torch.device:
    """The GPU of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def check_baseline(file: pathlib.Path, world_size: int) -> None:
    """Before anything is measured: end where the baseline cannot be compared with, warn where it
    differs.
    """
    try:
        warnings = check_comparable(read_baseline(file), environment(device_of_rank(), world_size))
    except (OSError, ValueError) as error:
        sys.exit(f"--baseline: {error}")
    for warning in warnings:
        print(f"--baseline: {warning}", file=sys.stderr)


def write_rows(frame: pd.DataFrame, file: pathlib.Path) -> None:
    """Write a CSV file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(file, index=False, float_format="%.10g")
    print(f"{len(frame)} rows written to {file}.")


def write_files(frame: pd.DataFrame, roof: float, options: argparse.Namespace) -> None:
    """The files that were asked for."""
    if options.csv:
        write_rows(frame, options.csv)
        options.csv.with_suffix(".md").write_text(summary(frame, roof), encoding="utf-8")
    if options.plots:
        print(write_plots(frame, options.plots))
    if options.readme:
        try:
            write_block(frame, README)
            print(f"{README.name} has the summary of this run.")
        except ValueError as error:
            print(f"--readme: {error}")


if __name__ == "__main__":
    sys.exit(main())
