"""The four steps of a layer, one launch each."""

import torch

from tests.support import oracle
from triton_syncbn import ops
from triton_syncbn.operands import RunningStatistics

EPS = 0.01  # large enough that a gradient shows how often it was added


def kernel(name: str, device: torch.device):
    """The launcher of a kernel, behind the operator."""
    step = getattr(ops._backend(device.type), name)
    assert step.__module__ == f"triton_syncbn.kernels.{name}"
    return step


def run_steps(step, input, grad_output, weight, bias, momentum=0.1, eps=EPS):
    """All four steps on one tensor; `step` finds the implementation of each."""
    channels = input.shape[1]
    running_mean = torch.zeros(channels, dtype=torch.float32, device=input.device)
    running_var = torch.ones_like(running_mean)
    counter = torch.tensor(0, device=input.device)
    moments = step("moments")(input)
    output = step("normalize")(
        input,
        moments,
        weight,
        bias,
        eps=eps,
        running=RunningStatistics(running_mean, running_var, counter, momentum),
    )
    sums, grad_weight, grad_bias = step("grad_moments")(
        grad_output, input, moments, weight.dtype, bias.dtype, eps
    )
    grad_input = step("grad_input")(grad_output, input, moments, sums, weight, eps)
    return oracle.Result(
        output, grad_input, grad_weight, grad_bias, running_mean, running_var, counter
    )
