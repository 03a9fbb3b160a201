"""What the compiler makes of the kernels, with no GPU: registers, spills, shared memory, the width
of every access, and instructions of the main loop.

Kernels are compiled at the default configs of a GPU of that many multiprocessors, for the large
layers of shapes.csv, and disassembled by the tools that come with Triton. With --execute what is
compiled is also executed, on a CPU, for the layers scaled down: instructions of a thread for each
element; sectors of global memory over those that the bytes of the maps fill, and over those that
their rows touch, each for itself; passes over the banks of shared memory over the least.
"""

import argparse
import collections
import pathlib
import sys
from typing import Any

import pandas as pd
from compiler.binaries import instructions_of, resources_of
from compiler.compiling import Flags, compile_kernel, operands_without_memory
from compiler.costs import cost_of
from compiler.sass import bits_of, loads_in_flight, main_loop
from layers.cases import DTYPES, LAYOUTS, Case, read_cases, suites
from layers.steps import KERNELS
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton_syncbn.kernels.indexing import geometry
from triton_syncbn.kernels.launch_config import default_config


def account(
    name: str, case: Case, multiprocessors: int, target: GPUTarget, execute: bool
) -> dict[str, Any]:
    """One line of the table."""
    input = case.without_memory()
    config = default_config(name, geometry(input), multiprocessors)
    kernel = compile_kernel(name, operands_without_memory(input, Flags()), config, target)
    resources, instructions = resources_of(kernel), instructions_of(kernel)
    loop = main_loop(instructions)
    counted = [i for i in instructions if loop is None or i.number in loop]
    widths = collections.Counter(
        f"{i.name.split('.')[0]}{bits_of(i.name)}" for i in counted if i.name[:3] in ("LDG", "STG")
    )
    doubles = sum(i.name.startswith(("DADD", "DMUL", "DFMA", "DSETP")) for i in instructions)
    elements = config.block_rows * config.block_columns / (32 * config.num_warps)
    return {
        "kernel": name,
        "layer": case.layer,
        "dtype": case.dtype,
        "layout": case.layout,
        "tile": f"{config.block_rows}x{config.block_columns}",
        "splits": config.splits,
        **resources._asdict(),
        "in_flight": loads_in_flight(counted, loop is not None),
        "accesses": " ".join(f"{k}x{n}" for k, n in sorted(widths.items())),
        "sass": len(instructions),
        "fp64": doubles,
        "loop": len(counted) if loop else 0,
        "loop_per_element": len(counted) / elements if loop else float("nan"),
        **(cost_of(name, case, config, target.arch)._asdict() if execute else {}),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="write the table here")
    parser.add_argument("--arch", type=int, default=90, help="of CUDA (default: %(default)s)")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--megabytes", type=float, default=8.0, help="of the smallest layer")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--layer", nargs="+", help="names in shapes.csv")
    parser.add_argument("--execute", action="store_true", help="and count what is executed")
    options = parser.parse_args(arguments)
    cases = [
        case
        for case in read_cases(suites(), options.dtype, options.layout)
        if (case.layer in options.layer if options.layer else case.bytes >= options.megabytes * 1e6)
    ]
    target = GPUTarget("cuda", options.arch, 32)
    work = [(name, case) for name in options.kernel for case in cases]
    table = pd.DataFrame(
        account(name, case, options.multiprocessors, target, options.execute)
        for name, case in tqdm(work, unit="kernel", dynamic_ncols=True)
    )
    print(table.to_string(index=False, float_format="%.4g"))
    if options.csv:
        table.to_csv(options.csv, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    sys.exit(main())
