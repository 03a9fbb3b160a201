"""Launch a kernel; past Triton, where it would only find out again what it found out before.

Triton looks at every argument of every launch, writes down what it compiles for, and finds the
compiled kernel by that text. What it looks at is little: the type of an argument and whether it is
None, and of an address whether it is a multiple of 16. Of that, sizes and tiling belong to the
shape of a map, and are kept in a `Plan`; with them what Triton launched for it, by what else may
differ. The next launch that is like it goes to the driver at once.

All that is not so plain is launched by Triton: a first launch, other addresses, launches that
somebody sees (as profilers of kernels do), knobs that were turned, the interpreter, GPUs whose
kernels depend on more, versions of Triton that nobody has looked into.
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

# Versions whose JITFunction.run was read: it calls a compiled kernel as `launch` does, and finds it
# by no more than is here.
IS_KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
ALIGNMENT = 16  # bytes
# Empty, all of them, unless somebody in this process sees launches or has turned a knob.
_CHANGES: tuple[Any, ...] = ("nothing is known of this Triton",)
if IS_KNOWN:
    _CHANGES = (
        vars(knobs.runtime),
        vars(knobs.compilation),
        knobs.runtime.launch_enter_hook.calls,
        knobs.runtime.launch_exit_hook.calls,
    )


class Launched(NamedTuple):
    """A compiled kernel that Triton has launched, as it is called."""

    compiled: CompiledKernel  # keeps the kernel in the driver
    run: Any
    before: tuple[Any, ...]  # the function, its metadata, and no hooks nor what they are told
    after: tuple[Any, ...]  # sizes and constants


class Plan:
    """How a kernel walks maps of one shape, layout and dtype on one device."""

    def __init__(
        self, blocks: int, programs: int, sizes: tuple[int, ...], tiling: Tiling, num_warps: int
    ) -> None:
        self.blocks = blocks  # of channels that are reduced apart; to write maps, 0
        self.programs = programs
        self.sizes = sizes  # rows, channels, columns, splits; then, to write maps, the reciprocal
        self.splits = sizes[3]
        self.tiling = tiling
        self.num_warps = num_warps
        self.launched: dict[tuple[Any, ...], Launched] = {}


def plan_of(
    kernel: str, input: Tensor, config: LaunchConfig | None, reads_more: bool = False
) -> Plan:
    """The plan of a kernel for (N, C, *spatial), dense in either layout, with a config or else that
    of `lookup`. reads_more: whether there is a residual or its gates, too.
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
    if any(_CHANGES) or type(kernel) is not JITFunction or kernel.pre_run_hooks:
        _launch_by_triton(kernel, programs, plan, tensors, numbers, constants)
        return
    gpu = driver.active
    device = gpu.get_current_device()
    dtypes: list[torch.dtype | None] = []
    addresses: list[int | None] = []
    together = 0
    for tensor in tensors:
        if tensor is not None:
            address = tensor.data_ptr()
            together |= address
            addresses.append(address)
            dtypes.append(tensor.dtype)
        else:
            addresses.append(None)
            dtypes.append(None)
    # The constants are kept, see Launched.after: another one has another id.
    key = (device, *map(id, constants.values()), *dtypes)
    launched = None if together % ALIGNMENT else plan.launched.get(key)
    if launched is None:
        compiled = _launch_by_triton(kernel, programs, plan, tensors, numbers, constants)
        is_kernel = type(compiled) is CompiledKernel
        # An AMD GPU's kernels depend on the size of storages, too.
        if is_kernel and not together % ALIGNMENT and compiled.metadata.target.backend == "cuda":
            plan.launched[key] = _as_called(compiled, kernel, plan, constants)
        return
    _, run, before, after = launched
    stream = gpu.get_current_stream(device)
    run(programs, 1, 1, stream, *before, *addresses, *numbers, *after)


def _launch_by_triton(
    kernel: Any,
    programs: int,
    plan: Plan,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
) -> Any:
    return kernel[(programs,)](
        *tensors,
        *numbers,
        *plan.sizes,
        TILING=plan.tiling,
        **constants,
        num_warps=plan.num_warps,
        enable_fp_fusion=True,  # Triton's default until it changes
    )


def _as_called(
    compiled: CompiledKernel, kernel: Any, plan: Plan, constants: dict[str, Any]
) -> Launched:
    before = compiled.function, compiled.packed_metadata, None, None, None
    names = (kernel.arg_names[number] for number in kernel.constexprs)
    values = ({"TILING": plan.tiling, **constants}[name] for name in names)
    return Launched(compiled, compiled.run, before, (*plan.sizes, *values))
