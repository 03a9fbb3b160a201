"""The four steps of a layer, called one at a time: their kernels, or torch's operations."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from triton_syncbn import cpu, reference

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

    def block(self) -> dict[str, Any]:
        """What a step is given of the block that a layer is in: nothing for a layer alone."""
        if self.activation is None and self.residual is None:
            return {}
        return {"activation": self.activation, "residual": self.residual, "gates": self.gates}

    def block_in_backward(self) -> dict[str, Any]:
        """The same in backward, where gates stand for the residual, and z is computed again."""
        if self.activation is None:
            return {}
        block = {**self.block(), "bias": self.bias}
        return {**block, "residual": None} if self.gates is not None else block


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
        named = ("running_mean", "running_var", "num_batches_tracked", "momentum", "eps")
        settings = {key: getattr(of, key) for key in named} | of.block()
        return step(of.input, of.moments, of.weight, of.bias, **settings, **config)
    block = of.block_in_backward()
    if name == "grad_moments":
        dtypes = [None if tensor is None else tensor.dtype for tensor in (of.weight, of.bias)]
        if block:
            block["weight"] = of.weight
        return step(of.grad_output, of.input, of.moments, *dtypes, of.eps, **block, **config)[0]
    if block:
        block["grad_residual"] = of.grad_residual
    sums = of.moments, of.grad_moments
    return step(of.grad_output, of.input, *sums, of.weight, of.eps, **block, **config)
