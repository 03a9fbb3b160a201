"""The usual map on a CPU: channels apart, in one block, means near 0, and not float64.

It takes as few calls and lines as there can be. Around an all_reduce, on which a thread sleeps,
code and tables are no longer in the caches, and a call or a line costs several times what it does
in a loop.
"""

import torch
from torch import Tensor

from . import memory
from .general import General
from .memory import buffer
from .statistics import Statistics, are_near
from .sums import Plan, add_in_chains, plan_of


class Plain:
    """The way of one geometry."""

    def __init__(self, general: General, of_values: Plan, of_gradients: Plan) -> None:
        self.general, self.count, self.values = general, general.count, general.values
        self.of_values, self.of_gradients = of_values, of_gradients

    @classmethod
    def of(
        cls, general: General, shape: torch.Size, is_contiguous: bool, dtype: torch.dtype
    ) -> "Plain | None":
        """That of a geometry, if it is usual."""
        is_one_block = shape[0] == 1 or shape.numel() <= memory.BLOCK
        if not (general.values and is_one_block) or general.side_by_side:
            return None
        of_values = plan_of(shape, is_contiguous, (torch.float32, dtype, None), False)
        of_gradients = plan_of(shape, is_contiguous, (torch.float32, dtype, dtype), True, True)
        if dtype == torch.float64 or not (of_values.takes_memory and of_gradients.takes_memory):
            return None
        return cls(general, of_values, of_gradients)

    def sums(self, input: Tensor) -> tuple[Tensor, Tensor, bool | None]:
        """sum(x) and sum(x**2); whether means are near."""
        plan = self.of_values
        total, squares = add_in_chains(None, input.view(plan.pieces.size), None, plan)
        if are_near(total, squares, self.values):
            return total, squares, True
        return self.general.sums(input, total)

    def normalize(
        self,
        input: Tensor,
        statistics: Statistics,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Half precision as it is, as torch's batch norm rounds at the end."""
        factor, added = statistics.factor_and_shift(weight, bias, eps)
        zero, one, _ = self.general.identity
        return torch.native_batch_norm(input, factor, added, zero, one, False, 0.0, 0.0)[0]

    def grad_sums(
        self, grad_output: Tensor, input: Tensor, statistics: Statistics, eps: float
    ) -> tuple[Tensor, Tensor]:
        """sum(dy) and sum(dy * xhat)."""
        if grad_output.dtype != input.dtype:
            return self.general.grad_sums(grad_output, input, statistics, eps)
        plan = self.of_gradients
        grad, values = grad_output.view(plan.pieces.size), input.view(plan.pieces.size)
        grads, products = add_in_chains(grad, values, statistics.mean, plan)
        return grads, products.mul_(statistics.rstd(eps))

    def grad_input(
        self,
        grad_output: Tensor,
        input: Tensor,
        statistics: Statistics,
        grad_moments: Tensor,
        weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        """xhat * slope + grad_mean by torch's batch norm, then + dy * scale."""
        scale, share = statistics.scale_and_share(weight, eps)
        grad_mean, slope = (grad_moments.view(2, -1) * share).float().unbind()
        mean, variance = statistics.mean.float(), statistics.variance.float()
        settings = slope, grad_mean, mean, variance, False, 0.0, eps
        scale = scale.view(self.general.per_channel)
        if input.dtype == torch.float32:
            return torch.native_batch_norm(input, *settings)[0].addcmul_(grad_output, scale)
        values = buffer(input, torch.float32).copy_(input)
        grad = buffer(input, torch.float32, 1).copy_(grad_output)
        none = self.general.none
        torch.native_batch_norm(values, *settings, out=(values, none, none))
        return values.addcmul_(grad, scale).to(input.dtype)
