"""Kernels compiled for a target instead of launched, on any machine.

They are launched by their own launchers, on tensors that have no memory, with Triton's driver
replaced by one that knows the target and nothing else; so what is compiled is what a GPU would be
given. Once a process has compiled, it can do nothing else with Triton.
"""

from typing import Any, NamedTuple
from unittest import mock

import torch
from layers.steps import Operands, run_step
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_syncbn.kernels.launch_config import LaunchConfig


class NoGPU:
    """A driver for Triton that names the target; the compiler asks for nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """The architecture that is compiled for."""
        return self.target

    def get_current_device(self) -> str:
        """A device for each target, as Triton keeps what it compiled by device."""
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        """The default stream."""
        return 0


class Flags(NamedTuple):
    """What a layer has: dtypes, or None for what it lacks."""

    weight: torch.dtype | None = torch.float32
    bias: torch.dtype | None = torch.float32
    running: torch.dtype | None = torch.float32
    counter: bool = True
    momentum: float | None = 0.1


def operands_without_memory(input: Tensor, flags: Flags) -> Operands:
    """What a layer gives its kernels, for an input on the meta device."""
    channels = input.shape[1]

    def vector(dtype: torch.dtype | None, size: int = channels) -> Tensor | None:
        return None if dtype is None else torch.empty(size, dtype=dtype, device="meta")

    return Operands(
        input,
        input,
        vector(torch.float64, 2 * channels + 1),
        vector(torch.float64, 2 * channels),
        vector(flags.weight),
        vector(flags.bias),
        vector(flags.running),
        vector(flags.running),
        torch.empty((), dtype=torch.int64, device="meta") if flags.counter else None,
        flags.momentum,
    )


def compile_kernel(name: str, operands: Operands, config: LaunchConfig, target: GPUTarget) -> Any:
    """Triton's compiled kernel for what a step would launch on the target."""
    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    driver.set_active(NoGPU(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        run_step(name, operands, config=config)
    (kernel,) = compiled
    return kernel
