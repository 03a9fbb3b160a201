"""The four steps of a layer, called one at a time: their kernels, or torch's operations."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from triton_syncbn import cpu, reference
from triton_syncbn.operands import LAYER_ALONE, BlockOperands, RunningStatistics

IN_TORCH = {"cpu": cpu, "reference": reference}
KERNELS = ("moments", "grad_moments", "normalize", "grad_input")


class Operands(NamedTuple):
    """What the steps of a layer are given; a step takes what it needs of it."""

    input: Tensor
    grad_output: Tensor
    moments: Tensor | None = None
    grad_moments: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    activation: str | None = None
    residual: Tensor | None = None
    gates: Tensor | None = None
    grad_residual: Tensor | None = None

    def running(self) -> RunningStatistics:
        """The buffers, together."""
        counter = self.num_batches_tracked
        return RunningStatistics(self.running_mean, self.running_var, counter, self.momentum)

    def block(self) -> BlockOperands:
        """What normalize is given of the block that a layer is in."""
        if self.activation is None and self.residual is None:
            return LAYER_ALONE
        return BlockOperands(self.activation, residual=self.residual, gates=self.gates)

    def block_in_backward(self) -> BlockOperands:
        """The same in backward, where gates stand for the residual, and z is computed again."""
        if self.activation is None:
            return LAYER_ALONE
        residual = None if self.gates is not None else self.residual
        return self.block()._replace(residual=residual, weight=self.weight, bias=self.bias)


def step_of(name: str, implementation: str) -> Callable[..., Any]:
    """The function of a step: the launcher of its kernel for "kernels", or that of "cpu" or
    "reference".
    """
    if implementation in IN_TORCH:
        return getattr(IN_TORCH[implementation], name)
    launchers = importlib.import_module("triton_syncbn.kernels.launchers")  # needs Triton
    return getattr(launchers, name)


def run_step(name: str, of: Operands, implementation: str = "kernels", **config: Any) -> Tensor:
    """Run a step. Returns the map that it writes, or its sums. A kernel may be given a `config`."""
    step = step_of(name, implementation)
    if name == "moments":
        return step(of.input, **config)
    if name == "normalize":
        return step(
            of.input,
            of.moments,
            of.weight,
            of.bias,
            eps=of.eps,
            running=of.running(),
            **_of_block(of.block()),
            **config,
        )
    block = of.block_in_backward()
    if name == "grad_moments":
        dtypes = [None if tensor is None else tensor.dtype for tensor in (of.weight, of.bias)]
        arguments = of.grad_output, of.input, of.moments, *dtypes, of.eps
        return step(*arguments, **_of_block(block), **config)[0]
    if block is not LAYER_ALONE:
        block = block._replace(grad_residual=of.grad_residual)
    return step(
        *(of.grad_output, of.input, of.moments, of.grad_moments, of.weight, of.eps),
        **_of_block(block),
        **config,
    )


def _of_block(block: BlockOperands) -> dict[str, Any]:
    """Nothing for a layer alone, of which the CPU path has no word for a block."""
    return {} if block is LAYER_ALONE else {"block": block}
