"""An exercise for a layer: one training step, which is checked against float64 before its passes
are timed.
"""

from typing import Any

import torch
from machine.ranks import Place
from measuring.times import Call
from numerics.oracle import batch_norm, relative_error
from torch import Tensor

from layers.cases import DTYPES, Case, laid_out
from layers.implementations import Implementation
from triton_syncbn import SyncBN
from triton_syncbn.conversion.convert import BatchNorm

# Of the norm. float32 sums of terms that cancel; half precision is rounded once, by half a unit in
# the last place.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2.0**-8, "fp16": 2.0**-11}
BUFFERS_TOLERANCE = 1e-5
KINK = 2.0**-4  # some units in the last place of a bfloat16 sum of a few deviations


class Eager(torch.nn.Module):
    """A layer, and after it the operations of a block as a network without fusion has them."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(layer(input) + residual), in place where torch allows it."""
        output = self.layer(input)
        if residual is not None:
            output += residual
        return torch.relu_(output)


def in_block(layer: Any, block: str) -> Any:
    """The layer with the block: ours takes it into its kernels."""
    if block == "none":
        return layer
    if isinstance(layer, SyncBN):
        layer.fused_activation = "relu"
        return layer
    return Eager(layer)


class Exercise:
    """Data for a layer, and what it has to make of them.

    `input` and `grad_output` are those of this rank; every rank draws the whole batch, from the
    same seed.
    """

    def __init__(self, case: Case, place: Place) -> None:
        self.case = case
        self.device = place.device
        samples, *rest = case.shape
        self.mine = slice(place.rank * samples, (place.rank + 1) * samples)
        generator = torch.Generator(place.device).manual_seed(0)
        shape = (place.world_size * samples, *rest)
        self.batch = [
            (torch.randn(shape, generator=generator, device=place.device) + 0.5).to(
                DTYPES[case.dtype]
            )
            for _ in range(3 if case.block == "add_relu" else 2)
        ]
        if case.block != "none":
            self._take_gradients_off_the_kink(samples)
        self.input, self.grad_output, *self.residual = (
            laid_out(tensor[self.mine], case.layout).clone() for tensor in self.batch
        )

    def _take_gradients_off_the_kink(self, samples: int) -> None:
        """Where the argument of ReLU is so near to 0 that a rounding decides its sign, nothing
        comes back; whether the statistics are those of the batch or of a rank.
        """
        batch, grad, *residual = self.batch
        for parts in ([batch], batch.split(samples)):
            z = torch.cat([batch_norm(part, part).output for part in parts])
            grad[sum(residual, z).abs() < KINK] = 0.0

    def enter(self, found: Implementation) -> tuple[float, dict[str, Call]]:
        """The error of an implementation on this rank, and a call for each pass."""
        layer = found.layer_class(self.case.shape[1])
        # parameters are float32, as under autocast, or float64
        layer.to(self.device, torch.promote_types(self.input.dtype, torch.float32))
        block = in_block(layer, self.case.block)
        if found.compiled:
            torch._dynamo.reset()  # torch makes only so many graphs of one function
            # a backward that frees what forward saved cannot be run twice
            torch._functorch.config.donated_buffer = False
            block.compile(fullgraph=True)
        error = self.error_of(block, layer, synchronized=found.synchronized)
        return error, calls_of_passes(block, self.input, self.grad_output, *self.residual)

    def error_of(self, block: Any, layer: Any, *, synchronized: bool = True) -> float:
        """Largest error of one training step against float64, in units of what is tolerated; above
        1 is wrong.

        Compared are y and dx of this rank, and the running statistics of the layer in the block.
        One that is not `synchronized` is held against the batch of this rank.
        """
        everything = slice(None)
        normalized, part = (everything, self.mine) if synchronized else (self.mine, everything)
        batch, grad, *residual = (tensor[normalized].double() for tensor in self.batch)
        exact: Any = BatchNorm(batch.shape[1], dtype=torch.float64, device=self.device)
        expected = in_block(exact, self.case.block)(batch.requires_grad_(), *residual)
        expected.backward(grad)
        input = self.input.clone().requires_grad_()
        output = block(input, *self.residual)
        output.backward(self.grad_output)
        assert input.grad is not None and batch.grad is not None
        # Where few values are normalized, dx cancels to far below dy * rstd, the largest of its
        # terms.
        others = [0, *range(2, batch.dim())]
        rstd = (batch.detach().var(others, correction=0, keepdim=True) + exact.eps).rsqrt()
        largest_term = (grad * rstd)[part].norm().item()
        tolerance = TOLERANCE[self.case.dtype]
        return max(
            relative_error(output.detach(), expected[part].detach()) / tolerance,
            relative_error(input.grad, batch.grad[part], largest_term) / tolerance,
            relative_error(layer.running_mean, exact.running_mean) / BUFFERS_TOLERANCE,
            relative_error(layer.running_var, exact.running_var) / BUFFERS_TOLERANCE,
        )


def calls_of_passes(
    layer: torch.nn.Module, input: Tensor, grad_output: Tensor, *residual: Tensor
) -> dict[str, Call]:
    """A call for each of PASSES. That of backward is always of the same forward, and what a forward
    saved is retained, as a CUDA graph replays a backward many times.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (input, *residual)]
    needed = [*leaves, *layer.parameters()]
    retained = layer(*leaves)

    def backward(output: Tensor = retained) -> Any:
        return torch.autograd.grad(output, needed, grad_output, retain_graph=True)

    return {
        "forward": lambda: layer(*leaves),
        "backward": backward,
        "both": lambda: backward(layer(*leaves)),
    }
