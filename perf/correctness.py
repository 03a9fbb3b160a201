"""Is a layer right: one training step against float64, before anything is timed."""

from typing import Any

import torch
import torch.nn.functional as F
from cases import DTYPES, Case
from torch import Tensor

# Of the norm. float32 sums of terms that cancel; half precision is rounded once, by half a unit in
# the last place.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2.0**-8, "fp16": 2.0**-11}
BUFFERS_TOLERANCE = 1e-5


def make_inputs(case: Case, rank: int, world_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """x and dy of this rank, and x and dy of the whole batch in float64. The same on every rank for
    the same seed.
    """
    samples, *rest = case.shape
    generator = torch.Generator(device).manual_seed(0)
    whole = []
    for _ in range(2):
        values = torch.randn(
            (world_size * samples, *rest), generator=generator, device=device, dtype=torch.float32
        )
        whole.append((values + 0.5).to(DTYPES[case.dtype]))
    mine = [tensor[rank * samples : (rank + 1) * samples] for tensor in whole]
    if case.layout == "channels_last":
        mine = [tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in mine]
    return *(tensor.clone() for tensor in mine), *(tensor.double() for tensor in whole)


def error_over_tolerance(
    layer: Any,
    case: Case,
    rank: int,
    world_size: int,
    device: torch.device,
    *,
    synchronized: bool = True,
    in_place: bool = False,
) -> float:
    """Largest error of one training step against float64, in units of what is tolerated; above 1 is
    wrong.

    Compared are y and dx of this rank and the running statistics. A layer that is not
    `synchronized` is held against the batch of this rank; one that works `in_place` gets a copy.
    """
    input, grad_output, whole, whole_grad = make_inputs(case, rank, world_size, device)
    part = slice(rank * case.shape[0], (rank + 1) * case.shape[0])
    if not synchronized:
        whole, whole_grad, part = whole[part].clone(), whole_grad[part], slice(None)
    whole.requires_grad_()
    mean = torch.zeros(case.shape[1], dtype=torch.float64, device=device)
    variance = torch.ones_like(mean)
    expected = F.batch_norm(whole, mean, variance, training=True)
    expected.backward(whole_grad)
    assert whole.grad is not None

    input.requires_grad_()
    output = layer(input.clone() if in_place else input)
    output.backward(grad_output)
    assert input.grad is not None
    # Where few values are normalized, dx cancels to far below dy * rstd, the largest of its terms.
    per_channel = (-1, *[1] * (whole.dim() - 2))
    rstd = (whole.detach().var([0, *range(2, whole.dim())], correction=0) + layer.eps).rsqrt()
    largest_term = (whole_grad[part] * rstd.view(per_channel)).norm()
    tolerance = TOLERANCE[case.dtype]
    ratios = [
        _relative(output.detach(), expected.detach()[part]) / tolerance,
        _relative(input.grad, whole.grad[part], largest_term) / tolerance,
        _relative(layer.running_mean, mean) / BUFFERS_TOLERANCE,
        _relative(layer.running_var, variance) / BUFFERS_TOLERANCE,
    ]
    return torch.tensor(ratios, dtype=torch.float64).nan_to_num(torch.inf).max().item()


def _relative(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    scale = expected.norm() if scale is None else scale
    return ((actual.double() - expected).norm() / scale).item()
