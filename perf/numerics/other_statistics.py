"""Mean and 1/std of a batch in float32, as other layers come by them; a training step with them."""

import torch
from torch import Tensor

from numerics.errors import per_channel
from numerics.examples import Example, parts
from numerics.oracle import Result


def gathered(example: Example) -> tuple[Tensor, Tensor]:
    """As torch.nn.SyncBatchNorm does: ranks send mean and 1/std, which are merged one by one
    (batch_norm_gather_stats_with_counts). A rank's own are exact here, but for their rounding.
    """
    mean = torch.zeros(example.input.shape[1])
    squares, count = torch.zeros_like(mean), 0.0
    for (share,) in parts(example, example.input):
        of_rank = torch.var_mean(share.double(), _samples(share), correction=0)
        variance_of_rank, mean_of_rank = of_rank
        rstd_of_rank = (variance_of_rank + example.eps).rsqrt().float()
        mean_of_rank, count_of_rank = mean_of_rank.float(), float(share[:, 0].numel())
        total = count + count_of_rank
        apart = (mean - mean_of_rank).square() * (count * count_of_rank / total)
        squares += (rstd_of_rank.reciprocal().square() - example.eps) * count_of_rank + apart
        mean = mean * (count / total) + mean_of_rank * (count_of_rank / total)
        count = total
    return mean, (squares / count + example.eps).rsqrt()


def of_raw_sums(example: Example) -> tuple[Tensor, Tensor]:
    """E[x^2] - E[x]^2, with a variance of no less than 0."""
    mean = example.input.mean(_samples(example.input))
    mean_of_squares = example.input.square().mean(_samples(example.input))
    return mean, ((mean_of_squares - mean.square()).clamp(min=0.0) + example.eps).rsqrt()


def train_with(statistics: tuple[Tensor, Tensor], example: Example) -> Result:
    """Output and gradient of a batch norm with these; for an example with weight and bias."""
    assert example.weight is not None and example.bias is not None
    mean, rstd = (per_channel(value, example) for value in statistics)
    weight, bias = (per_channel(value, example) for value in (example.weight, example.bias))
    grad, centred = example.grad_output, example.input - mean
    output = centred * (rstd * weight) + bias
    samples = _samples(grad)
    mean_of_products = (grad * centred).mean(samples, keepdim=True)
    deviation = grad - grad.mean(samples, keepdim=True) - centred * rstd.square() * mean_of_products
    return Result(output, deviation * (rstd * weight))


def _samples(tensor: Tensor) -> list[int]:
    return [0, *range(2, tensor.dim())]
