"""Tune the kernels for the GPU of this machine: for each bucket of launches, is there a config that
is faster than the default?

Every candidate is checked against float64 before it is timed; what cannot be launched is skipped.
Candidates are timed in turns, and one is kept only if it beats the default by 3 % in three rounds
out of three. The configs go to kernels/configs/<GPU>.json after each bucket, so that a run that was
stopped goes on with --resume.
"""

import argparse
import math
import pathlib
import sys
import time
from typing import Any

import pandas as pd
import torch
import triton
from layers.cases import DTYPES, LAYOUTS, read_cases, suites
from layers.steps import KERNELS
from tqdm import tqdm
from triton_syncbn.kernels import tuned_configs
from triton_syncbn.kernels.launch_config import multiprocessors
from tuning.candidates import Job, candidates, jobs_of
from tuning.config_file import ConfigFile
from tuning.trial import Outcome, try_candidates

MULTIPROCESSORS_OF_DRY_RUN = 132  # of an H100 or H200, where there is no GPU to ask


def tune(
    jobs: list[Job],
    device: torch.device,
    file: ConfigFile,
    budget: float = math.inf,
    csv: pathlib.Path | None = None,
) -> int:
    """Tune the buckets that the file does not know yet, until `budget` minutes are over, and write
    it after each; and to `csv`, if there is one, the times of all candidates. Returns how many
    candidates were wrong.
    """
    end = time.monotonic() + budget * 60
    wrong = 0
    progress = tqdm([job for job in jobs if not file.knows(job)], unit="bucket", dynamic_ncols=True)
    for job in progress:
        if time.monotonic() >= end:
            progress.write(f"{budget:g} minutes are over; go on with --resume")
            break
        progress.set_description(f"{job.bucket.kernel} {job.case.shape_name} {job.case.dtype}")
        outcome = try_candidates(job, device)
        wrong += outcome.wrong
        progress.write(describe(job, outcome))
        if outcome.default_microseconds > 0:  # not NaN: the default is right
            file.add(job, outcome)
            file.write()
            if csv is not None:
                frame_of(job, outcome).to_csv(csv, mode="a", header=not csv.exists(), index=False)
    return wrong


def frame_of(job: Job, outcome: Outcome) -> pd.DataFrame:
    """The first round of a bucket, a row a candidate, the default first."""
    of_layer = {"bucket": str(job.bucket), "shape": job.case.shape_name, "dtype": job.case.dtype}
    rows = [{**of_layer, **config._asdict(), "us": us} for config, us in outcome.first.items()]
    return pd.DataFrame(rows)


def describe(job: Job, outcome: Outcome) -> str:
    """A line a bucket."""
    result = "the default stays"
    if outcome.config is not None:
        gain = outcome.default_microseconds / outcome.microseconds
        result = f"{outcome.microseconds:.1f} us, {gain:.2f}x: {tuple(outcome.config)}"
    default = f"default {outcome.default_microseconds:.1f} us"
    return f"{job.bucket} ({job.case.layer}): {default}, {result}, {outcome.skipped} skipped"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resume", action="store_true", help="go on with the file that is there")
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes, for buckets begun")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--suite", nargs="+", choices=suites(), default=suites())
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    file: dict[str, Any] = {"type": pathlib.Path, "metavar": "FILE"}
    parser.add_argument("--csv", **file, help="the times of all candidates")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="not kernels/configs")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tried")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("expected a GPU to measure on; --dry-run lists what would be tried")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Tune; 1 if any candidate was wrong."""
    options = parse(arguments)
    jobs = jobs_of(read_cases(options.suite, options.dtype, options.layout), options.kernel)
    if options.dry_run:
        return list_candidates(jobs)
    device = torch.device("cuda", torch.cuda.current_device())
    target = triton.runtime.driver.active.get_current_target()
    arch = f"{target.backend}:{target.arch}"
    file = ConfigFile(tuned_configs.device_name(device), arch, options.out)
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
    if options.resume:
        try:
            file.resume()
        except ValueError as error:
            sys.exit(str(error))
    elif options.csv:
        options.csv.unlink(missing_ok=True)
    wrong = tune(jobs, device, file, options.budget, options.csv)
    return int(wrong > 0)


def list_candidates(jobs: list[Job]) -> int:
    """Print the buckets, the layers they are tuned on and how many configs would be tried."""
    gpu = torch.cuda.is_available()
    size = multiprocessors(torch.device("cuda")) if gpu else MULTIPROCESSORS_OF_DRY_RUN
    total = 0
    for job in jobs:
        configs = candidates(job, size)
        total += len(configs)
        print(f"{job.bucket} ({job.case.layer} {job.case.shape_name}): {len(configs)} configs")
    print(f"{len(jobs)} buckets, {total} configs, for a GPU of {size} multiprocessors.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
