"""The kernels of many layers compiled for many architectures, and what is promised of each."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from layers.cases import DTYPES, LAYOUTS, Case, read_cases, suites
from triton_syncbn.kernels.indexing import geometry
from triton_syncbn.kernels.launch_config import (
    LaunchConfig,
    default_config,
    fit_splits,
    tile_beside_residual,
)

from compiler.binaries import Resources, resources_of
from compiler.compiling import Flags, compile_kernel, operands_without_memory
from compiler.ptx import access_widths
from compiler.targets import ARCHITECTURES
from triton_syncbn.activations import ACTIVATIONS

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
BLOCKS = [
    *(Flags(activation=activation) for activation in ACTIVATIONS),
    *(Flags(activation=activation, residual=True) for activation in (None, *ACTIVATIONS)),
]
# Gates of a byte, where those of bfloat16 are of a bit; and none.
BLOCKS_OF_OTHER_DTYPES = [Flags(activation=name, residual=True) for name in ("relu", "silu")]
# One map of each kind: rows of whole vectors, odd rows, rows that share a block, channels alone,
# a single program, and one whose offsets do not fit 32 bits.
WHOLE_ROWS, ODD_ROWS, SHORT_ROWS = (32, 64, 112, 112), (2, 512, 97, 97), (32, 2048, 7, 7)
KINDS = [
    *(WHOLE_ROWS, ODD_ROWS, SHORT_ROWS, (256, 2048), (1, 8, 2, 2), (5, 37, 3, 61)),
    (8, 64, 2048, 2112),
]

Launch = tuple[Case, Flags]


class Build(NamedTuple):
    """A kernel as compiled for an architecture."""

    kernel: str
    architecture: str
    case: Case  # the first that gave this kernel
    vector: int  # elements of the widest access that the sizes of the map allow
    of_thread: int  # elements of a tile that a thread has, rounded down; 0: fewer than threads
    resources: Resources
    widths: dict[str, list[int]]  # bits of the loads and stores of each map; empty where unknown


def launches(
    dtype: str, shapes: Sequence[tuple[int, ...]] = KINDS, flags: Sequence[Flags] = FLAGS[:1]
) -> list[Launch]:
    """Every map in both layouts and with all flags."""
    return [
        (Case("kinds", "", shape, dtype, layout), given)
        for shape, layout, given in itertools.product(shapes, LAYOUTS, flags)
    ]


def all_launches(dtype: str) -> list[Launch]:
    """The layers of shapes.csv; every kind of map; some with all flags, and in every block."""
    blocks = BLOCKS if dtype == "bf16" else BLOCKS_OF_OTHER_DTYPES
    return [
        *((case, Flags()) for case in read_cases(suites(), [dtype], list(LAYOUTS))),
        *launches(dtype),
        *launches(dtype, [WHOLE_ROWS, ODD_ROWS], FLAGS),
        *launches(dtype, [WHOLE_ROWS, SHORT_ROWS], blocks),
    ]


def config_of(kernel: str, case: Case, flags: Flags, multiprocessors: int) -> LaunchConfig:
    """The default config of a launch."""
    input = case.without_memory()
    shape = geometry(input)
    config = default_config(kernel, shape, multiprocessors)
    if flags.residual and kernel != "moments":
        config = tile_beside_residual(shape, config, input.dtype.itemsize)
        config = fit_splits(kernel, shape, config)
    return config


def build_all(name: str, launches: list[Launch]) -> list[Build]:
    """Compile the kernels of launches for an architecture; each different one is in the answer
    once.
    """
    target, multiprocessors, _ = ARCHITECTURES[name]
    builds: dict[str, Build] = {}
    for (case, flags), kernel_name in itertools.product(launches, MAPS):
        input = case.without_memory()
        shape = geometry(input)
        config = config_of(kernel_name, case, flags, multiprocessors)
        operands = operands_without_memory(input, flags)
        kernel = compile_kernel(kernel_name, operands, config, target)
        if kernel.hash in builds:
            continue
        widths = {}
        if "ptx" in kernel.asm:
            kinds = kernel.src.signature.items()
            bits = access_widths(
                kernel.asm["ptx"], [parameter for parameter, kind in kinds if kind != "constexpr"]
            )
            beside = [name for name in ("residual", "grad_residual") if bits.get(name)]
            widths = {tensor: sorted(bits[tensor]) for tensor in (*MAPS[kernel_name], *beside)}
        threads = config.num_warps * target.warp_size
        of_thread = config.block_rows * config.block_columns // threads
        resources = resources_of(kernel)
        builds[kernel.hash] = Build(
            kernel_name, name, case, shape.vector, of_thread, resources, widths
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
