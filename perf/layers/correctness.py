"""Is a layer right: one training step against float64, before anything is timed."""

from typing import Any

import torch
from machine.ranks import Place
from numerics import oracle
from torch import Tensor

from layers.cases import DTYPES, Case, laid_out

# Of the norm. float32 sums of terms that cancel; half precision is rounded once, by half a unit in
# the last place.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2.0**-8, "fp16": 2.0**-11}
BUFFERS_TOLERANCE = 1e-5
EPS = 1e-5  # of every layer that is compared


class Exercise:
    """Data for a layer, and what it has to make of them.

    `input` and `grad_output` are those of this rank; every rank draws the whole batch, from the
    same seed.
    """

    def __init__(self, case: Case, place: Place) -> None:
        self.case = case
        samples, *rest = case.shape
        self.mine = slice(place.rank * samples, (place.rank + 1) * samples)
        generator = torch.Generator(place.device).manual_seed(0)
        shape = (place.world_size * samples, *rest)
        self.batch = [
            (torch.randn(shape, generator=generator, device=place.device) + 0.5).to(
                DTYPES[case.dtype]
            )
            for _ in range(2)
        ]
        self.input, self.grad_output = (
            laid_out(tensor[self.mine], case.layout).clone() for tensor in self.batch
        )

    def error_of(self, layer: Any, *, synchronized: bool = True, in_place: bool = False) -> float:
        """Largest error of one training step against float64, in units of what is tolerated; above
        1 is wrong.

        Compared are y and dx of this rank and the running statistics. A layer that is not
        `synchronized` is held against the batch of this rank; one that works `in_place` gets a
        copy.
        """
        everything = slice(None)
        normalized, part = (everything, self.mine) if synchronized else (self.mine, everything)
        batch, grad = (tensor[normalized].double() for tensor in self.batch)
        exact = oracle.batch_norm(batch, grad, eps=EPS)
        input = self.input.clone().requires_grad_()
        output = layer(input.clone() if in_place else input)
        output.backward(self.grad_output)
        assert input.grad is not None
        # Where few values are normalized, dx cancels to far below dy * rstd, the largest of its
        # terms.
        others = [0, *range(2, batch.dim())]
        rstd = (batch.var(others, correction=0, keepdim=True) + EPS).rsqrt()
        largest_term = (grad * rstd)[part].norm()
        tolerance = TOLERANCE[self.case.dtype]
        ratios = [
            _relative(output.detach(), exact.output[part]) / tolerance,
            _relative(input.grad, exact.grad_input[part], largest_term) / tolerance,
            _relative(layer.running_mean, exact.running_mean) / BUFFERS_TOLERANCE,
            _relative(layer.running_var, exact.running_var) / BUFFERS_TOLERANCE,
        ]
        return torch.tensor(ratios, dtype=torch.float64).nan_to_num(torch.inf).max().item()


def _relative(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    scale = expected.norm() if scale is None else scale
    return ((actual.double() - expected).norm() / scale).item()
