"""Compare SyncBN with what there is, layer by layer: first whether it is right, then how long it
takes.

On a GPU: against torch.nn.SyncBatchNorm (its synchronized path, also where there is one rank) and
torch's batch norm, which does not synchronize. Without one: two processes on this machine over
gloo, the layers scaled down, against a layer that sends what torch.nn.SyncBatchNorm sends (which
refuses CPU tensors) and torch's batch norm.

Under torchrun every rank takes the GPU of its local rank, and a time is that of the slowest rank.
"""

import argparse
import datetime
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from cases import DTYPES, LAYOUTS, Case, read_cases, suites
from implementations import OURS, implementations, synchronized_even_alone
from measure import PASSES, TRANSFERS, error_over_tolerance, make_inputs, sample_seconds
from tqdm import tqdm

SCHEMA = 1
CPU_RANKS = 2
CPU_FACTOR = 4
ROOT = pathlib.Path(__file__).resolve().parent.parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="write all rows here")
    parser.add_argument("--suite", nargs="+", choices=suites(), default=suites())
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"] if gpu else ["fp32"]
    )
    parser.add_argument(
        "--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS if gpu else LAYOUTS[:1])
    )
    parser.add_argument("--pass", nargs="+", choices=PASSES, default=list(PASSES), dest="passes")
    parser.add_argument(
        "--samples",
        type=int,
        default=100 if gpu else 12,
        help="timed runs of a layer (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 1 if any row is wrong."""
    options = parse(arguments)
    if "WORLD_SIZE" in os.environ:  # under torchrun
        return compare(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", options)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        if torch.cuda.is_available():
            return compare(0, 1, store, options)
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=compare, args=(rank, CPU_RANKS, store, options), daemon=True)
            for rank in range(1, CPU_RANKS)
        ]
        for process in others:
            process.start()
        status = compare(0, CPU_RANKS, store, options)
        for process in others:
            process.join()
        return status


def compare(rank: int, world_size: int, store: str, options: argparse.Namespace) -> int:
    """One rank of the comparison. Rank 0 prints and writes; every rank returns the exit status."""
    gpu = torch.cuda.is_available()
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group(
        "nccl" if gpu else "gloo", init_method=store, rank=rank, world_size=world_size
    )
    try:
        cases = read_cases(options.suite, options.dtype, options.layout, 1 if gpu else CPU_FACTOR)
        rows = []
        with synchronized_even_alone():
            for case in tqdm(cases, unit="layer", disable=rank != 0, dynamic_ncols=True):
                rows += measure_case(case, options, rank, world_size, device)
    finally:
        dist.destroy_process_group()
    frame = pd.DataFrame(rows).assign(**environment(device, world_size))
    if rank == 0:
        report(frame, device, world_size)
        if options.csv:
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            frame.to_csv(options.csv, index=False, float_format="%.6g")
            print(f"{len(frame)} rows written to {options.csv}")
    return int((frame.error_over_tolerance > 1.0).any())


def measure_case(
    case: Case, options: argparse.Namespace, rank: int, world_size: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each implementation and pass."""
    rows = []
    for name, make in implementations(device).items():
        layer = make(case.shape[1]).to(device)
        synchronized = name != "torch_batchnorm"
        error = error_over_tolerance(layer, case, rank, world_size, synchronized, device)
        error = max(of_all_ranks(error, world_size))
        inputs = make_inputs(case, rank, world_size, device)[:2]
        for pass_name in options.passes:
            row = {
                "suite": case.suite,
                "layer": case.layer,
                "shape": case.shape_name,
                "dtype": case.dtype,
                "layout": case.layout,
                "impl": name,
                "pass": pass_name,
                "error_over_tolerance": error,
            }
            if error <= 1.0:  # what is wrong has no time
                seconds = sample_seconds(layer, inputs, pass_name, options.samples, warmup=3)
                slowest = np.max(of_all_ranks(seconds, world_size), axis=0)
                p20, p50, p80 = np.percentile(slowest, (20, 50, 80))
                row |= {
                    "samples": options.samples,
                    "us_p20": p20 * 1e6,
                    "us_p50": p50 * 1e6,
                    "us_p80": p80 * 1e6,
                    "gbytes_per_s": TRANSFERS[pass_name] * case.bytes / p50 * 1e-9,
                }
            rows.append(row)
    return rows


def of_all_ranks(value: Any, world_size: int) -> list[Any]:
    """The values of all ranks."""
    values = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What a row must say about where it was measured."""
    gpu = device.type == "cuda"
    try:
        from triton import __version__ as triton_version
    except ModuleNotFoundError:
        triton_version = None
    return {
        "schema": SCHEMA,
        "timestamp_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "world_size": world_size,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "timer": "device events, cold L2" if gpu else "host clock",
    }


def git(*arguments: str) -> str | None:
    """What git answers in this checkout, or None where it has no answer."""
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """A line a layer: microseconds of forward and backward of each implementation, and how much
    faster ours is.

    The first implementation is the one that ours is held against, in each pass.
    """
    baseline = frame.impl.iloc[0]
    keys = ["layer", "shape", "dtype", "layout"]
    times = frame.pivot(index=keys, columns=["pass", "impl"], values="us_p50")
    times = times.reindex(pd.MultiIndex.from_frame(frame[keys].drop_duplicates()))
    shown = "both" if "both" in times.columns.get_level_values("pass") else frame["pass"].iloc[0]
    columns = {f"{impl} us": times[shown, impl] for impl in frame.impl.unique()}
    for pass_name in frame["pass"].unique():
        columns[f"x {pass_name}"] = times[pass_name, baseline] / times[pass_name, OURS]
    return pd.DataFrame(columns)


def report(frame: pd.DataFrame, device: torch.device, world_size: int) -> None:
    """Print the table and what it means."""
    baseline = frame.impl.iloc[0]
    lines = table(frame)
    speedups = lines.filter(regex="^x ")
    text = lines.map("{:.2f}".format).where(speedups.notna(), "-")
    for column in lines.columns.difference(speedups.columns):
        text[column] = [f"{us:.0f}" if us > 0 else "FAIL" for us in lines[column]]
    text = text.reset_index()
    for column in ("dtype", "layout"):
        if text[column].nunique() == 1:
            text = text.drop(columns=column)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"\nMicroseconds of forward + backward (median); x: {baseline} / {OURS}, more is better.\n"
    )
    print(text.to_string(index=False))
    means = np.exp(np.log(speedups).mean())
    summary = ", ".join(f"{mean:.2f} {name.removeprefix('x ')}" for name, mean in means.items())
    print(f"\nGeometric mean of {baseline} / {OURS}: {summary}.")
    setting = frame.iloc[0]
    print(
        f"{where}, {world_size} rank{'s' * (world_size > 1)}, {', '.join(frame.dtype.unique())}, "
        f"{', '.join(frame.layout.unique())}; torch {setting.torch}, triton {setting.triton}, "
        f"commit {setting.commit}{' with changes' * bool(setting.dirty)}."
    )
    wrong = frame[frame.error_over_tolerance > 1.0]
    for impl, layer, error in (
        wrong[["impl", "layer", "error_over_tolerance"]].drop_duplicates().values
    ):
        print(f"FAIL: {impl} is wrong on {layer}: {error:.3g} times the tolerance.")
    if device.type == "cuda" and world_size == 1:
        print("torch_syncbn and triton_syncbn synchronize over a group of one rank, by NCCL.")
    elif device.type == "cpu":
        print(
            f"Scaled down: spatial sizes by {CPU_FACTOR}, samples by {2 * CPU_FACTOR}.\n"
            "torch.nn.SyncBatchNorm refuses CPU tensors: gather_syncbn sends what it would send.\n"
            "On a CPU both compute in plain torch and differ in communication alone; on a GPU\n"
            "triton_syncbn runs its kernels. torch_batchnorm does not synchronize: it is the bound."
        )


if __name__ == "__main__":
    sys.exit(main())
