"""The kernels of many layers compiled for many architectures, and what is promised of each."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from layers.cases import DTYPES, LAYOUTS, Case, read_cases, suites
from triton_syncbn.kernels.indexing import geometry
from triton_syncbn.kernels.launch_config import default_config

from compiler.binaries import Resources, resources_of
from compiler.compiling import Flags, compile_kernel, operands_without_memory
from compiler.ptx import access_widths
from compiler.targets import ARCHITECTURES

# The maps of each kernel, which are what its time goes into.
MAPS = {
    "moments": ("input",),
    "normalize": ("input", "output"),
    "grad_moments": ("grad_output", "input"),
    "grad_input": ("grad_output", "input", "grad_input"),
}
FLAGS = [
    Flags(),
    Flags(bias=None),
    Flags(weight=None, bias=None),
    Flags(running=None, counter=False),
    Flags(weight=None, bias=None, running=None, counter=False),
    Flags(counter=False),
    Flags(momentum=None),
    *(Flags(dtype, dtype, dtype) for dtype in (torch.bfloat16, torch.float64)),
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

    case: Case
    flags: Flags = Flags()


class Build(NamedTuple):
    """A kernel as compiled for an architecture."""

    kernel: str
    architecture: str
    case: Case  # the first that gave this kernel
    vector: int  # elements of the widest access that the sizes of the map allow
    of_thread: int  # elements of a tile that a thread has, rounded down; 0: fewer than threads
    resources: Resources
    widths: dict[str, list[int]]  # bits of the loads and stores of each map; empty where unknown


def launches_of_kinds(dtype: str, kinds: list[tuple[int, ...]] = KINDS) -> list[Launch]:
    """Every kind of map in both layouts."""
    return [
        Launch(Case("kinds", "", shape, dtype, layout))
        for shape, layout in itertools.product(kinds, LAYOUTS)
    ]


def few_launches() -> list[Launch]:
    """What stands for all in the tests."""
    return launches_of_kinds("bf16", KINDS[:4]) + launches_of_kinds("fp32", KINDS[1:2])


def all_launches(dtype: str) -> list[Launch]:
    """The layers of shapes.csv, every kind of map, and two of them with all flags."""
    return [
        *map(Launch, read_cases(suites(), [dtype], list(LAYOUTS))),
        *launches_of_kinds(dtype),
        *(
            launch._replace(flags=flags)
            for launch, flags in itertools.product(launches_of_kinds(dtype, KINDS[:2]), FLAGS)
        ),
    ]


def build_all(name: str, launches: list[Launch]) -> list[Build]:
    """Compile the kernels of launches for an architecture; each different one is in the answer
    once.
    """
    architecture = ARCHITECTURES[name]
    builds: dict[str, Build] = {}
    for case, flags in launches:
        input = case.without_memory()
        shape = geometry(input)
        operands = operands_without_memory(input, flags)
        for kernel_name, maps in MAPS.items():
            config = default_config(kernel_name, shape, architecture.multiprocessors)
            kernel = compile_kernel(kernel_name, operands, config, architecture.target)
            if kernel.hash in builds:
                continue
            widths = {}
            if "ptx" in kernel.asm:
                kinds = kernel.src.signature.items()
                parameters = [parameter for parameter, kind in kinds if kind != "constexpr"]
                bits = access_widths(kernel.asm["ptx"], parameters)
                widths = {tensor: sorted(bits[tensor]) for tensor in maps}
            threads = config.num_warps * architecture.target.warp_size
            builds[kernel.hash] = Build(
                kernel_name,
                name,
                case,
                shape.vector,
                config.block_rows * config.block_columns // threads,
                resources_of(kernel),
                widths,
            )
    return list(builds.values())


def faults(build: Build) -> list[str]:
    """What breaks a promise: spills, more shared memory than there is, narrow accesses."""
    limit = ARCHITECTURES[build.architecture].shared_bytes
    found = []
    if build.resources.spilled and build.architecture != "sm75":
        found.append(f"{build.resources.spilled} bytes of local memory")
    if build.resources.shared_bytes > limit:
        found.append(f"{build.resources.shared_bytes} bytes of shared memory, of {limit}")
    wanted = 8 * build.vector * DTYPES[build.case.dtype].itemsize
    for name, bits in build.widths.items():
        if not bits:
            found.append(f"no access of {name}")
        elif bits != [wanted] and build.of_thread >= build.vector:
            found.append(f"{name} is accessed {bits} bits wide, not {wanted}")
    return found


@contextlib.contextmanager
def compilers(jobs: int) -> Iterator[concurrent.futures.Executor]:
    """Processes in which Triton compiles, whatever it does in this one."""
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        concurrent.futures.ProcessPoolExecutor(jobs, context) as executor,
    ):
        yield executor
