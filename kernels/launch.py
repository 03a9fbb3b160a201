"""Launch a kernel; past Triton, where it would only find out again what it found out before.

Triton looks at every argument of every launch, writes down what it compiles for, and finds the
compiled kernel by that text: some 17 us, as long as an operator of torch takes as a whole. What it
looks at is little: the type of an argument and whether it is None, and of an address whether it is
a multiple of 16. Of that, sizes and tiling belong to the shape of the map, and are kept in a
`Plan`; with them what Triton launched, by what else may differ. The next such launch gives it
addresses.

All that is not so plain is launched by Triton: another address, a first launch, hooks (profilers
have them), debugging, the interpreter, GPUs whose kernels depend on more, other versions of Triton.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .indexing import Tiling, geometry_of
from .launch_config import (
    REDUCTIONS,
    LaunchConfig,
    reduction_blocks,
    tiling,
    writer_programs,
)
from .tuned_configs import lookup

# Versions whose kernels are called as `_Launched` is here, seen in their JITFunction.run.
IS_KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
ALIGNMENT = 16  # bytes; what Triton compiles for depends on it


class _Launched(NamedTuple):
    """A compiled kernel that Triton has launched, and what it was given at compile time."""

    compiled: CompiledKernel  # keeps the kernel in the driver
    run: Any
    function: Any
    packed_metadata: Any
    constants: tuple[Any, ...]


class Plan:
    """How a kernel walks maps of one shape, layout and dtype on one device."""

    def __init__(
        self, blocks: int, programs: int, sizes: tuple[int, ...], tiling: Tiling, num_warps: int
    ) -> None:
        self.blocks = blocks  # of channels that are reduced apart; of a writer, 0
        self.programs = programs
        self.sizes = sizes  # rows, channels, columns, splits, of a writer the reciprocal
        self.tiling = tiling
        self.num_warps = num_warps
        self.launched: dict[tuple[Any, ...], _Launched] = {}

    @property
    def splits(self) -> int:
        """Programs that share a block of channels."""
        return self.sizes[3]


def plan_of(
    kernel: str, input: Tensor, config: LaunchConfig | None, reads_more: bool = False
) -> Plan:
    """The plan of a kernel for (N, C, *spatial), dense in either layout: with a config, or else
    that of `lookup`.
    """
    contiguous = input.is_contiguous()
    return _plan(kernel, input.shape, contiguous, input.dtype, input.device, config, reads_more)


@functools.lru_cache(maxsize=4096)
def _plan(
    kernel: str,
    shape: torch.Size,
    contiguous: bool,
    dtype: torch.dtype,
    device: torch.device,
    config: LaunchConfig | None,
    reads_more: bool,
) -> Plan:
    seen = geometry_of(shape, contiguous, dtype.itemsize)
    config = config or lookup(kernel, seen, dtype, device, reads_more)
    sizes = seen.rows, seen.channels, seen.columns, config.splits
    if kernel in REDUCTIONS:
        blocks = reduction_blocks(seen, config)
        walk = tiling(seen, config, dtype)
        return Plan(blocks, blocks * config.splits, sizes, walk, config.num_warps)
    programs, reciprocal = writer_programs(seen, config)
    walk = tiling(seen, config, dtype, writes_map=True)
    return Plan(0, programs, (*sizes, reciprocal), walk, config.num_warps)


def launch(
    kernel: Any,
    programs: int,
    plan: Plan,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...] = (),
    **constants: Any,
) -> None:
    """Launch a jitted kernel on tensors, float64 numbers, the sizes of the plan, and constants: the
    order of its parameters. TILING is the plan's.
    """
    knows_triton = IS_KNOWN and type(kernel) is JITFunction and not _is_observed(kernel)
    if knows_triton:
        gpu = driver.active
        device = gpu.get_current_device()
        key = [device, *constants.values()]
        addresses: list[int | None] = []
        together = 0
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                addresses.append(None)
            else:
                key.append(tensor.dtype)
                address = tensor.data_ptr()
                addresses.append(address)
                together |= address
        kind = tuple(key)
        is_aligned = together % ALIGNMENT == 0
        launched = plan.launched.get(kind) if is_aligned else None
        if launched is not None:
            launched.run(
                *(programs, 1, 1, gpu.get_current_stream(device), launched.function),
                *(launched.packed_metadata, None, None, None),  # no hooks, nor what they are told
                *(*addresses, *numbers, *plan.sizes, *launched.constants),
            )
            return
    constants["TILING"] = plan.tiling
    arguments = (*tensors, *numbers, *plan.sizes)
    compiled = kernel[(programs,)](*arguments, **constants, num_warps=plan.num_warps)
    if knows_triton and is_aligned and type(compiled) is CompiledKernel:
        # An AMD GPU's kernels depend on the size of storages, too.
        if gpu.get_current_target().backend == "cuda":
            names = kernel.arg_names[len(arguments) :]
            plan.launched[kind] = _Launched(
                compiled,
                compiled.run,
                compiled.function,
                compiled.packed_metadata,
                tuple(constants[name] for name in names),
            )


def _is_observed(kernel: Any) -> bool:
    """Whether somebody sees launches or has changed how Triton compiles, in this process."""
    runtime = knobs.runtime
    return bool(
        vars(runtime)
        or vars(knobs.compilation)
        or runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or kernel.pre_run_hooks
    )
