"""What the compiler makes of the kernels, with no GPU: registers, spills, shared memory, the width
of every access, and instructions of the main loop.

Kernels are compiled at the default configs of a GPU of that many multiprocessors, for the large
layers of shapes.csv, and disassembled by the tools that come with Triton.
"""

import argparse
import collections
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any
from unittest import mock

import pandas as pd
import torch
import triton
from candidates import KERNELS, empty_input
from cases import DTYPES, LAYOUTS, Case, read_cases, suites
from no_gpu import NoGPU
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_syncbn.kernels import grad_input, grad_moments, launch_config, moments, normalize
from triton_syncbn.kernels.indexing import geometry

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


def compile_kernel(name: str, case: Case, multiprocessors: int, target: GPUTarget) -> Any:
    """Compile the kernel that a layer would launch: Triton's compiled kernel, and the config.

    The tensors have no memory, so a layer may be of any size.
    """
    x = empty_input(case)
    channels = torch.empty(case.shape[1], device="meta")
    sums = torch.empty(2 * case.shape[1] + 1, dtype=torch.float64, device="meta")
    counter = torch.empty((), dtype=torch.int64, device="meta")
    config = launch_config.default_config(name, geometry(x), multiprocessors)
    buffers = {"running_mean": channels, "running_var": channels, "num_batches_tracked": counter}
    launchers: dict[str, Any] = {
        "moments": lambda: moments.moments(x, config),
        "normalize": lambda: normalize.normalize(
            x, sums, channels, channels, **buffers, momentum=0.1, eps=1e-5, config=config
        ),
        "grad_moments": lambda: grad_moments.grad_moments(
            x, x, sums, torch.float32, torch.float32, 1e-5, config
        ),
        "grad_input": lambda: grad_input.grad_input(x, x, sums, sums, channels, 1e-5, config),
    }
    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    driver.set_active(NoGPU(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        launchers[name]()
    (kernel,) = compiled
    return kernel, config


def disassemble(cubin: bytes) -> tuple[str, list[tuple[int, str, str]]]:
    """The compiler's account of resources, and the instructions: address, name, operands."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _output("cuobjdump", "--dump-resource-usage", file.name)
        sass = _output("nvdisasm", "-c", "-hex", file.name)
    # with -c, labels stand for addresses; instructions are numbered anew
    instructions: list[tuple[int, str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*\.?(L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        if found := INSTRUCTION.search(line):
            instructions.append((len(instructions), found[2], found[3]))
    resolved = []
    for address, name, operands in instructions:
        target = re.search(r"(L_x_\d+)", operands)
        if name.startswith("BRA") and target and target[1] in labels:
            operands = str(labels[target[1]])
        resolved.append((address, name, operands))
    return resources, resolved


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


def main_loop(instructions: list[tuple[int, str, str]]) -> range | None:
    """Addresses of the loop that loads most without a loop inside, or None where none loads. The
    loops that add up partial sums and those over statistics compute in float64 and do not count.
    """
    loops = [
        range(int(operands), address + 1)
        for address, name, operands in instructions
        if name.startswith("BRA") and operands.isdecimal() and int(operands) <= address
    ]
    inner = [a for a in loops if not any(b.start >= a.start and b.stop < a.stop for b in loops)]

    def loads(loop: range) -> int:
        names = [name for address, name, _ in instructions if address in loop]
        if any(name.startswith(("DADD", "DFMA")) for name in names):
            return 0
        return sum(wide(name) for name in names if name.startswith("LDG"))

    best = max(inner, key=loads, default=None)
    return best if best is not None and loads(best) else None


def loads_in_flight(instructions: list[tuple[int, str, str]], loop: range | None) -> int:
    """The most loads of the widest kind that are under way when the first of them is waited for.

    Of a loop, two rounds are looked at: what is loaded in one may be used in the next.
    """
    body = [i for i in instructions if loop is None or i[0] in loop]
    widest = max((wide(name) for _, name, _ in body if name.startswith("LDG")), default=0)
    pending: list[set[int]] = []
    most = 0
    for _, name, operands in body if loop is None else body * 2:
        registers = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
        load = name.startswith("LDG") and wide(name) == widest
        used = set(registers[1:] if load else registers)
        needed = [number for number, loaded in enumerate(pending) if loaded & used]
        if needed:  # loads come back in order
            most = max(most, len(pending))
            pending = pending[max(needed) + 1 :]
        if load:
            pending.append(set(range(registers[0], registers[0] + widest // 32)))
    return most


def wide(name: str) -> int:
    """Bits of a load or store."""
    for bits in (128, 64):
        if f".{bits}" in name:
            return bits
    return 8 if ".U8" in name or ".S8" in name else 16 if ".U16" in name else 32


def account(name: str, case: Case, multiprocessors: int, target: GPUTarget) -> dict[str, Any]:
    """One line of the table."""
    kernel, config = compile_kernel(name, case, multiprocessors, target)
    resources, instructions = disassemble(kernel.asm["cubin"])
    loop = main_loop(instructions)
    counted = [i for i in instructions if loop is None or i[0] in loop]
    widths = collections.Counter(
        f"{i[1].split('.')[0]}{wide(i[1])}" for i in counted if i[1][:3] in ("LDG", "STG")
    )
    doubles = sum(i[1].startswith(("DADD", "DMUL", "DFMA", "DSETP")) for i in instructions)
    elements = config.block_rows * config.block_columns / (32 * config.num_warps)
    return {
        "kernel": name,
        "layer": case.layer,
        "dtype": case.dtype,
        "layout": case.layout,
        "tile": f"{config.block_rows}x{config.block_columns}",
        "programs": config.programs,
        "registers": int(re.findall(r"REG:(\d+)", resources)[-1]),
        "stack": int(re.findall(r"STACK:(\d+)", resources)[-1]),
        "shared": kernel.metadata.shared,
        "in_flight": loads_in_flight(instructions, loop),
        "accesses": " ".join(f"{k}x{n}" for k, n in sorted(widths.items())),
        "sass": len(instructions),
        "fp64": doubles,
        "loop": len(counted) if loop else 0,
        "loop_per_element": len(counted) / elements if loop else float("nan"),
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
    options = parser.parse_args(arguments)
    cases = [
        case
        for case in read_cases(suites(), options.dtype, options.layout)
        if (case.layer in options.layer if options.layer else case.bytes >= options.megabytes * 1e6)
    ]
    target = GPUTarget("cuda", options.arch, 32)
    work = [(name, case) for name in options.kernel for case in cases]
    table = pd.DataFrame(
        account(name, case, options.multiprocessors, target)
        for name, case in tqdm(work, unit="kernel", dynamic_ncols=True)
    )
    print(table.to_string(index=False, float_format="%.1f"))
    if options.csv:
        table.to_csv(options.csv, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    sys.exit(main())
