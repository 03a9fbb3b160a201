"""A training step of an example: by the four steps of a layer one by one, and by torch."""

import torch
import torch.nn.functional as F
from layers.steps import Operands, run_step
from torch import Tensor

from numerics.examples import Example, parts
from numerics.interpreter import sums_as_on_a_gpu
from numerics.oracle import Result

MOMENTUM = 0.1
COMPARED = ("output", "grad_input", "running_mean", "running_var")


def joined(results: list[Result]) -> Result:
    """The ranks' results as that of one process; statistics must be the same to the last bit."""
    for result in results[1:]:
        assert torch.equal(result.running_mean, results[0].running_mean)
        assert torch.equal(result.running_var, results[0].running_var)
    output, grad_input = (
        torch.cat([getattr(result, name) for result in results]) for name in COMPARED[:2]
    )
    statistics = {name: getattr(results[0], name) for name in COMPARED[2:]}
    return Result(output, grad_input, **statistics)


@sums_as_on_a_gpu()
def train_steps(implementation: str, example: Example, copies: float = 1) -> Result:
    """The four steps of "kernels", "cpu" or "reference" for each rank in turn, their sums added up
    here, and multiplied as if there were so many copies of the batch.
    """
    affine = example.weight, example.bias
    ranks = []
    for input, grad in parts(example, example.input, example.grad_output):
        mean, variance = torch.zeros(2, input.shape[1], device=input.device).unbind()
        buffers = mean, variance, None
        ranks.append(Operands(input, grad, None, None, *affine, *buffers, MOMENTUM, example.eps))

    def step(name: str) -> list[Tensor]:
        return [run_step(name, rank, implementation) for rank in ranks]

    moments = copies * torch.stack(step("moments")).sum(0)
    ranks = [rank._replace(moments=moments) for rank in ranks]
    sums = copies * torch.stack(step("grad_moments")).sum(0)
    ranks = [rank._replace(grad_moments=sums) for rank in ranks]
    maps = zip(step("normalize"), step("grad_input"), ranks, strict=True)
    return joined(
        [
            Result(output, grad_input, running_mean=rank.running_mean, running_var=rank.running_var)
            for output, grad_input, rank in maps
        ]
    )


def train_torch(example: Example) -> Result:
    """torch's float32 batch norm of the whole batch, the arithmetic of torch.nn.BatchNorm2d."""
    input = example.input.clone().requires_grad_()
    mean, variance = torch.zeros((2, input.shape[1])).unbind()
    output = F.batch_norm(
        input, mean, variance, example.weight, example.bias, True, MOMENTUM, example.eps
    )
    output.backward(example.grad_output)
    return Result(output.detach(), input.grad, running_mean=mean, running_var=variance)
