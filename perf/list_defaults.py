"""What the default configs are on a GPU, for the layers of shapes.csv: no device is asked."""

import argparse
import sys

import pandas as pd
import triton
from compiler.targets import GPUS
from layers.cases import DTYPES, LAYOUTS, read_cases, suites
from layers.steps import KERNELS
from triton_syncbn.kernels.indexing import geometry
from triton_syncbn.kernels.launch_config import (
    WRITERS,
    default_config,
    reduction_blocks,
    slots,
    writer_programs,
)


def main(arguments: list[str] | None = None) -> int:
    """Print a line a layer and kernel: tile, programs, of a multiprocessor, and waves of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    options = parser.parse_args(arguments)
    rows = []
    for case in read_cases(suites(), options.dtype, options.layout):
        shape = geometry(case.without_memory())
        for name in options.kernel:
            row = {
                "layer": case.layer,
                "dtype": case.dtype,
                "layout": case.layout,
                "kernel": name,
            }
            for gpu in options.gpu:
                config = default_config(name, shape, GPUS[gpu])
                programs = (
                    writer_programs(shape, config)[0]
                    if name in WRITERS
                    else reduction_blocks(shape, config) * config.splits
                )
                available = slots(name, shape, config, GPUS[gpu])
                row[gpu] = (
                    f"{config.block_rows}x{config.block_columns}w{config.num_warps} "
                    f"{programs} {programs / GPUS[gpu]:.1f} {triton.cdiv(programs, available)}"
                )
            rows.append(row)
    print("tile and warps, programs, programs a multiprocessor, waves\n")
    print(pd.DataFrame(rows).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
