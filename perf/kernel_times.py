"""Time the four kernels of each layer one by one, as the layer launches them: a map is written
after its reduction has read it. Says how much of what a copy moves in a second each of them moves.

A launch and its clock take some 4 us, which are counted: what is smaller says nothing here.
The exit status is 1 if a kernel is wrong.
"""

import argparse
import functools
import math
import pathlib
import sys

import pandas as pd
import torch
from layers.cases import DTYPES, LAYOUTS, Case, read_cases, suites
from layers.steps import KERNELS
from machine.environment import environment
from measuring.rows import copy_bytes_per_second
from measuring.times import percentiles, time_calls
from report.tables import markdown
from tqdm import tqdm
from triton_syncbn.kernels.indexing import geometry
from triton_syncbn.kernels.tuned_configs import lookup
from tuning.trial import KernelOfLayer

COLUMNS = [
    *("layer", "shape", "dtype", "layout", "kernel"),
    *("config", "us", "copy_fraction", "error_over_tolerance"),
]
MAPS_MOVED = {"moments": 1, "normalize": 2, "grad_moments": 2, "grad_input": 3}


def measure(cases: list[Case], device: torch.device, samples: int) -> pd.DataFrame:
    """A row for each kernel of each layer."""
    roof = copy_bytes_per_second(device, samples)
    rows = []
    for case in tqdm(cases, unit="layer", dynamic_ncols=True):
        shape, dtype = geometry(case.without_memory()), DTYPES[case.dtype]
        for name in KERNELS:
            kernel = KernelOfLayer(name, case, device)
            config = lookup(name, shape, dtype, device)
            launch = {name: functools.partial(kernel.launch, config)}
            error = kernel.error_of(config)
            times = time_calls(launch, device, samples, before=kernel.prepare, of_host=False)
            us = percentiles(times[name].device)[1]
            moved = MAPS_MOVED[name] * case.bytes / (us * 1e-6)
            layer = [case.layer, case.shape_name, case.dtype, case.layout]
            rows.append([*layer, name, "/".join(map(str, config)), us, moved / roof, error])
    return pd.DataFrame(rows, columns=COLUMNS).assign(
        copy_bytes_per_s=roof, **environment(device, world_size=1)
    )


def summary(frame: pd.DataFrame) -> str:
    """Medians of the shares of layers of 8 MB and more."""
    sizes = frame["shape"].map(lambda shape: math.prod(map(int, shape.split("x"))))
    large = frame[sizes * frame.dtype.map(lambda dtype: DTYPES[dtype].itemsize) >= 8e6]
    if large.empty:
        return "No layer has 8 MB."
    shares = large.pivot_table(
        index=["dtype", "layout"],
        columns="kernel",
        values="copy_fraction",
        aggfunc="median",
        sort=False,
    )
    table = shares.map("{:.2f}".format).reset_index()
    return f"Bytes a second, over those of a copy; medians, 8 MB and more:\n\n{markdown(table)}"


def main(arguments: list[str] | None = None) -> int:
    """Time them; 1 if any is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", nargs="+", choices=suites(), default=suites())
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--csv", type=pathlib.Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a GPU to measure on")
    device = torch.device("cuda", torch.cuda.current_device())
    frame = measure(
        read_cases(options.suite, options.dtype, options.layout), device, options.samples
    )
    print(summary(frame))
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(options.csv, index=False, float_format="%.6g")
    return int((frame.error_over_tolerance > 1).any())


if __name__ == "__main__":
    sys.exit(main())
