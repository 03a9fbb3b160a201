"""Compile every kernel for every architecture, on any machine: registers, spills, shared memory and
the width of each access.

python tests/architectures.py           all layers of perf/shapes.csv, dtypes, layouts and flags
python tests/architectures.py --quick   a few of them

No GPU is needed: Triton compiles for a target, and its wheel carries the assembler and the tool
that reads what it assembled. Kernels are launched by their own launchers, on tensors that have no
memory, with Triton's driver replaced by one that knows the target and nothing else; so what is
compiled is what a GPU would be given.
"""

import argparse
import concurrent.futures
import contextlib
import importlib
import itertools
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before anything imports triton
    root = pathlib.Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "perf")]

import pandas as pd
import torch
import triton
from cases import LAYOUTS, read_cases, suites
from no_gpu import NoGPU
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Architecture(NamedTuple):
    target: GPUTarget
    shared_bytes: int  # that a block may have (CUDA C++ Programming Guide, compute capabilities)
    multiprocessors: int  # of a device that has it
    device: str


ARCHITECTURES = {
    "sm75": Architecture(GPUTarget("cuda", 75, 32), 64 << 10, 40, "T4"),
    "sm80": Architecture(GPUTarget("cuda", 80, 32), 163 << 10, 108, "A100"),
    "sm86": Architecture(GPUTarget("cuda", 86, 32), 99 << 10, 82, "RTX 3090"),
    "sm89": Architecture(GPUTarget("cuda", 89, 32), 99 << 10, 128, "RTX 4090"),
    "sm90": Architecture(GPUTarget("cuda", 90, 32), 227 << 10, 132, "H100"),
    "sm100": Architecture(GPUTarget("cuda", 100, 32), 227 << 10, 148, "B200"),
    "sm120": Architecture(GPUTarget("cuda", 120, 32), 99 << 10, 170, "RTX 5090"),
    "gfx90a": Architecture(GPUTarget("hip", "gfx90a", 64), 64 << 10, 104, "MI250"),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 << 10, 304, "MI300X"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The maps of each kernel, which are what its time goes into.
MAPS = {
    "moments": ("input",),
    "normalize": ("input", "output"),
    "grad_moments": ("grad_output", "input"),
    "grad_input": ("grad_output", "input", "grad_input"),
}


class Flags(NamedTuple):
    """What a layer has: dtypes, or None for what it lacks."""

    weight: torch.dtype | None = torch.float32
    bias: torch.dtype | None = torch.float32
    running: torch.dtype | None = torch.float32
    counter: bool = True
    momentum: float | None = 0.1


FLAGS = [
    Flags(),
    Flags(bias=None),
    Flags(weight=None, bias=None),
    Flags(running=None, counter=False),
    Flags(weight=None, bias=None, running=None, counter=False),
    Flags(counter=False),
    Flags(momentum=None),
    Flags(*[torch.bfloat16] * 3),
    Flags(*[torch.float64] * 3),
]
# One map of each kind: rows of whole vectors, odd rows, rows that share a block, channels alone,
# a single program, and one whose offsets do not fit 32 bits.
KINDS = [
    (32, 64, 112, 112),
    (2, 512, 97, 97),
    (32, 2048, 7, 7),
    (256, 2048),
    (1, 8, 2, 2),
    (5, 37, 3, 61),
    (8, 64, 2048, 2112),
]


class Launch(NamedTuple):
    """A layer that is compiled."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    flags: Flags = Flags()


class Build(NamedTuple):
    """A kernel as compiled for an architecture."""

    kernel: str
    architecture: str
    layout: str
    dtype: str
    shape: str  # of the first map that gave this kernel
    vector: int  # elements of the widest access that the sizes of the map allow
    of_thread: int  # elements of a tile that a thread has, rounded down
    registers: int  # of a thread
    spilled: int  # bytes of a thread, in memory of its own
    shared_bytes: int
    widths: dict[str, list[int]]  # bits of the loads and stores of each map; empty where unknown


@contextlib.contextmanager
def compiled_instead_of_launched(architecture: Architecture) -> Iterator[list[Any]]:
    """Collect the kernels that launches under it would run on a device of the architecture.

    The driver stays replaced: such a process compiles and does nothing else.
    """
    launch_config = importlib.import_module("triton_syncbn.kernels.launch_config")
    tuned_configs = importlib.import_module("triton_syncbn.kernels.tuned_configs")
    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **named))

    driver.set_active(NoGPU(architecture.target))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch_config, "multiprocessors", lambda _: architecture.multiprocessors),
    ):
        tuned_configs.lookup.cache_clear()
        yield compiled


def launch_all(shape: tuple[int, ...], dtype: torch.dtype, layout: str, flags: Flags) -> None:
    """One call of each launcher, on tensors without memory."""

    def launcher(name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"triton_syncbn.kernels.{name}"), name)

    def channels(dtype: torch.dtype | None) -> torch.Tensor | None:
        return None if dtype is None else torch.empty(shape[1], dtype=dtype, device="meta")

    input = torch.empty(shape, dtype=dtype, device="meta")
    if layout == "channels_last":
        input = input.movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias, mean, variance = map(
        channels, (flags.weight, flags.bias, flags.running, flags.running)
    )
    counter = torch.empty((), dtype=torch.int64, device="meta") if flags.counter else None
    moments = launcher("moments")(input)
    launcher("normalize")(
        input,
        moments,
        weight,
        bias,
        running_mean=mean,
        running_var=variance,
        num_batches_tracked=counter,
        momentum=flags.momentum,
        eps=1e-5,
    )
    sums, *_ = launcher("grad_moments")(input, input, moments, flags.weight, flags.bias, 1e-5)
    launcher("grad_input")(input, input, moments, sums, weight, 1e-5)


def few_launches() -> list[Launch]:
    """What stands for all in the tests."""
    launches = [Launch(shape, torch.bfloat16, lay) for shape in KINDS[:4] for lay in LAYOUTS]
    return launches + [Launch(KINDS[1], torch.float32, layout) for layout in LAYOUTS]


def all_launches(dtype: torch.dtype) -> list[Launch]:
    """The layers of perf/shapes.csv, every kind of map, and two of them with all flags."""
    cases = read_cases(suites(), ["fp32"], list(LAYOUTS))
    kinds = [*itertools.product(KINDS, [dtype], LAYOUTS)]
    flags = itertools.product(KINDS[:2], [dtype], LAYOUTS, FLAGS)
    return [
        *(Launch(case.shape, dtype, case.layout) for case in cases),
        *(Launch(*kind) for kind in kinds),
        *(Launch(*launch) for launch in flags),
    ]


def build_all(name: str, launches: list[Launch]) -> list[Build]:
    """Compile the kernels of launches for an architecture; each different one is in the answer
    once.
    """
    from triton_syncbn.kernels.indexing import geometry

    builds: dict[str, Build] = {}
    with compiled_instead_of_launched(ARCHITECTURES[name]) as compiled:
        for shape, dtype, layout, flags in launches:
            compiled.clear()
            launch_all(shape, dtype, layout, flags)
            input = torch.empty(shape, dtype=dtype, device="meta")
            if layout == "channels_last":
                input = input.movedim(1, -1).contiguous().movedim(-1, 1)
            for kernel in compiled:
                if kernel.hash not in builds:
                    builds[kernel.hash] = Build(
                        kernel.metadata.name.removesuffix("_kernel"),
                        name,
                        layout,
                        str(dtype).removeprefix("torch."),
                        "x".join(map(str, shape)),
                        geometry(input).vector,
                        elements_of_thread(kernel),
                        *resources(kernel),
                    )
    return list(builds.values())


def elements_of_thread(kernel: Any) -> int:
    """Elements of a tile for each thread; 0 where there are fewer elements than threads."""
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    threads = kernel.metadata.num_warps * kernel.metadata.warp_size
    return constants["BLOCK_ROWS"] * constants["BLOCK_COLUMNS"] // threads


def resources(kernel: Any) -> tuple[int, int, int, dict[str, list[int]]]:
    """Registers and bytes of local memory of a thread, shared memory of a block, and widths."""
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, spilled, stack = (
            sum(int(number) for number in re.findall(rf"\.{key}:\s+(\d+)", text))
            for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return registers, 4 * spilled + stack, shared, {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    signature = kernel.src.signature
    parameters = [name for name, kind in signature.items() if kind != "constexpr"]
    widths = access_widths(kernel.asm["ptx"], parameters)
    maps = MAPS[kernel.metadata.name.removesuffix("_kernel")]
    return (
        int(used["REG"]),
        int(used["STACK"]) + int(used["LOCAL"]),
        shared,
        {name: sorted(widths[name]) for name in maps},
    )


_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)\s+(.+);", re.MULTILINE)
_ACCESS = re.compile(r"(?:ld|st)\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[bsuf](\d+)$")


def access_widths(ptx: str, parameters: list[str]) -> dict[str, set[int]]:
    """Bits of the loads and stores through each pointer parameter of a kernel.

    An address is computed from one pointer and from numbers, so the parameters that flow into it
    tell which: registers are followed from the parameters on, through all but loads.
    """
    flows: dict[str, set[str]] = {}  # what each register is computed from
    copies, accesses = [], []
    for operation, operands in _INSTRUCTION.findall(ptx):
        if access := _ACCESS.match(operation):
            address = re.search(r"\[\s*(%\w+)", operands)
            accesses.append((address[1], int(access[1] or 1) * int(access[2])))
        elif operation.startswith("ld.param"):
            target, number = re.match(r"(%\w+), \[\w+_param_(\d+)", operands).groups()
            flows[target] = {parameters[int(number)]} if int(number) < len(parameters) else set()
        elif not operation.startswith(("ld.", "st.", "bra", "bar", "atom", "red")):
            target, *sources = re.findall(r"%\w+", operands) or [""]
            copies.append((target, sources))
    moved = True
    while moved:
        moved = False
        for target, sources in copies:
            origins = flows.setdefault(target, set())
            before = len(origins)
            origins.update(*(flows.get(source, ()) for source in sources))
            moved |= len(origins) > before
    pointers = set(re.findall(r"\.param \.u64 \.ptr \.global \.align \d+ \w+_param_(\d+)", ptx))
    widths: dict[str, set[int]] = {name: set() for name in parameters}
    for address, bits in accesses:
        origins = [
            name
            for number, name in enumerate(parameters)
            if str(number) in pointers and name in flows.get(address, ())
        ]
        assert len(origins) == 1, f"an address that comes from {origins}"
        widths[origins[0]].add(bits)
    return widths


def faults(build: Build) -> list[str]:
    """What breaks a promise: spills, more shared memory than there is, narrow accesses."""
    limit = ARCHITECTURES[build.architecture].shared_bytes
    found = []
    if build.spilled and build.architecture != "sm75":
        found.append(f"{build.spilled} bytes of local memory")
    if build.shared_bytes > limit:
        found.append(f"{build.shared_bytes} bytes of shared memory, of {limit}")
    wanted = 8 * build.vector * getattr(torch, build.dtype).itemsize
    for name, bits in build.widths.items():
        if not bits:
            found.append(f"no access of {name}")
        elif bits != [wanted] and build.of_thread >= build.vector:
            found.append(f"{name} is accessed {bits} bits wide, not {wanted}")
    return found


def table(builds: list[Build]) -> str:
    """A line for each kernel, architecture and layout: the most registers and shared memory, and
    the widths of the accesses to maps; and the maps whose accesses are narrower than 16 bytes.
    """
    frame = pd.DataFrame([build._asdict() for build in builds])
    frame["width"] = [
        "/".join(map(str, sorted(set().union(*widths.values())))) or "unknown"
        for widths in frame.widths
    ]
    reason = pd.Series("", frame.index)
    reason[frame.of_thread < frame.vector] = "fewer elements than a vector for each thread"
    bytes_wide = frame.vector * [getattr(torch, name).itemsize for name in frame.dtype]
    reason[bytes_wide < 16] = "sizes that are no multiple of 16 bytes"
    lines = (
        frame[reason == ""]
        .groupby(["kernel", "architecture", "layout"])
        .agg(
            variants=("shape", "size"),
            registers=("registers", "max"),
            spilled=("spilled", "max"),
            shared_bytes=("shared_bytes", "max"),
            width=("width", lambda widths: " ".join(sorted(set(widths)))),
        )
    )
    narrow = frame.assign(reason=reason)[(reason != "") & (frame.width != "128")]
    shapes = narrow.groupby(["reason", "layout", "dtype"]).shape.agg(
        lambda s: " ".join(sorted(set(s)))
    )
    parts = [lines.to_string()]
    if len(narrow):
        parts += [
            "Maps that are accessed less than 16 bytes at a time:",
            shapes.to_frame().to_string(),
        ]
    return "\n\n".join(parts)


@contextlib.contextmanager
def compilers(jobs: int) -> Iterator[concurrent.futures.Executor]:
    """Processes in which Triton compiles, whatever it does in this one."""
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        concurrent.futures.ProcessPoolExecutor(jobs, context) as executor,
    ):
        yield executor


def main() -> int:
    """Compile for the architectures asked for; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few maps, dtypes and flags")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    options = parser.parse_args()
    builds: list[Build] = []
    with compilers(options.jobs) as executor:
        work = [
            executor.submit(build_all, name, launches)
            for name in options.architecture
            for launches in ([few_launches()] if options.quick else map(all_launches, DTYPES))
        ]
        for done in tqdm(concurrent.futures.as_completed(work), total=len(work)):
            builds += done.result()
    print(table(builds))
    wrong = [(build, found) for build in builds if (found := faults(build))]
    for build, found in wrong:
        print(
            f"FAIL: {build.kernel} on {build.architecture}, {build.layout} {build.dtype} "
            f"{build.shape}: {'; '.join(found)}"
        )
    print(f"{len(builds)} kernels, {len(wrong)} of them wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
