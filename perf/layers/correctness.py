"""Is a layer right: one training step against float64, before anything is timed."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine.ranks import Place
from torch import Tensor

from layers.cases import DTYPES, Case, laid_out

# Of the norm. float32 sums of terms that cancel; half precision is rounded once, by half a unit in
# the last place.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2.0**-8, "fp16": 2.0**-11}
BUFFERS_TOLERANCE = 1e-5
EPS = 1e-5  # of every layer that is compared


class Exact(NamedTuple):
    """What a training step makes of the part of a rank, in float64."""

    output: Tensor
    grad_input: Tensor
    running_mean: Tensor
    running_var: Tensor
    # Where few values are normalized, dx cancels to far below dy * rstd, the largest of its terms.
    largest_term: Tensor


class Exercise:
    """Data for a layer, and what it has to make of them.

    `input` and `grad_output` are those of this rank; every rank draws the whole batch, from the
    same seed.
    """

    def __init__(self, case: Case, place: Place) -> None:
        self.case = case
        samples = case.shape[0]
        self.mine = slice(place.rank * samples, (place.rank + 1) * samples)
        generator = torch.Generator(place.device).manual_seed(0)
        shape = (place.world_size * samples, *case.shape[1:])
        self.batch = [
            (torch.randn(shape, generator=generator, device=place.device) + 0.5).to(
                DTYPES[case.dtype]
            )
            for _ in range(2)
        ]
        self.input, self.grad_output = (
            laid_out(tensor[self.mine], case.layout).clone() for tensor in self.batch
        )
        self.known: dict[bool, Exact] = {}

    def exact(self, synchronized: bool) -> Exact:
        """The step in float64, made once; of the part of this rank alone, unless synchronized."""
        if synchronized not in self.known:
            everything = slice(None)
            if synchronized:
                self.known[True] = self._exact(everything, self.mine)
            else:
                self.known[False] = self._exact(self.mine, everything)
        return self.known[synchronized]

    def _exact(self, normalized: slice, part: slice) -> Exact:
        input, grad = (tensor[normalized].double() for tensor in self.batch)
        input.requires_grad_()
        mean = torch.zeros(input.shape[1], dtype=torch.float64, device=input.device)
        variance = torch.ones_like(mean)
        output = F.batch_norm(input, mean, variance, training=True, eps=EPS)
        output.backward(grad)
        assert input.grad is not None
        rstd = (input.detach().var([0, *range(2, input.dim())], correction=0) + EPS).rsqrt()
        largest_term = (grad[part] * rstd.view(-1, *[1] * (input.dim() - 2))).norm()
        maps = output.detach()[part].clone(), input.grad[part].clone()
        return Exact(*maps, mean, variance, largest_term)

    def error_of(self, layer: Any, *, synchronized: bool = True, in_place: bool = False) -> float:
        """Largest error of one training step against float64, in units of what is tolerated; above
        1 is wrong.

        Compared are y and dx of this rank and the running statistics. A layer that is not
        `synchronized` is held against the batch of this rank; one that works `in_place` gets a
        copy.
        """
        exact = self.exact(synchronized)
        input = self.input.clone().requires_grad_()
        output = layer(input.clone() if in_place else input)
        output.backward(self.grad_output)
        assert input.grad is not None
        tolerance = TOLERANCE[self.case.dtype]
        ratios = [
            _relative(output.detach(), exact.output) / tolerance,
            _relative(input.grad, exact.grad_input, exact.largest_term) / tolerance,
            _relative(layer.running_mean, exact.running_mean) / BUFFERS_TOLERANCE,
            _relative(layer.running_var, exact.running_var) / BUFFERS_TOLERANCE,
        ]
        return torch.tensor(ratios, dtype=torch.float64).nan_to_num(torch.inf).max().item()


def _relative(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    scale = expected.norm() if scale is None else scale
    return ((actual.double() - expected).norm() / scale).item()
