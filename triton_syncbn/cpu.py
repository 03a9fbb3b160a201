"""The four steps on a CPU, in torch's own loops; as `reference` in all but time.

A small tensor takes as long as the operations are many. It is widened to float64 as a whole, where
nothing cancels, and torch's batch norm with given statistics does most of a step at once.

A large tensor takes as long as its bytes travel. Torch's batch norm takes one pass, and in float32
it is exact where means are near 0, in units of the deviation; if not, it is given deviations from
them. One step has another way, where half precision must not be rounded on the way, or means are
far: elementwise operations, all of them on a block of memory before the next. It stays in the
cache, and so do the buffers; fresh pages would cost more than the arithmetic.
"""

import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .operands import NOT_TRACKED, RunningStatistics
from .reference import NOISE_OF_VARIANCE

SMALL = 1 << 15  # elements up to which float64 is faster, as measured
BLOCK = 1 << 18  # elements of a block for each thread: 1 MiB of float32, about a core's own cache
NEAR = 2.0  # |mean| in deviations up to which float32 loses no more to it than a few roundings
# Torch's batch norm adds up a row in as many chains as a vector register holds values, a column in
# one. In a chain of float32 roundings add up, too: so it is about 32 values long at most.
LONGEST_ROW_BYTES, LONGEST_COLUMN = 2048, 32
_kept = threading.local()  # the buffers of a thread, which is in one step at a time


def moments(input: Tensor) -> Tensor:
    """Moments of each channel of (N, C, *spatial): float64 [2C + 1], sum(x), sum(x**2), count."""
    values = input.numel() // input.shape[1]
    count = input.new_full((1,), values, dtype=torch.float64)
    others = [0, *range(2, input.dim())]
    if input.numel() <= SMALL:
        wide = input.double()
        return torch.cat((wide.sum(others), wide.square().sum(others), count))
    total, squares = _sums(input, input, None)
    if not _is_near(total, squares * values - total * total):  # times the count, squared
        shift, centered = _centered(input, total / values)
        deviations = centered.sum(others)
        total = deviations + shift * values
        squares = centered.square_().sum(others) + shift * (deviations + total)
    return torch.cat((total, squares, count))


def normalize(
    input: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    running: RunningStatistics = NOT_TRACKED,
) -> Tensor:
    """Normalize with the global moments; move the running statistics unless the batch is empty."""
    running_mean, running_var, num_batches_tracked, momentum = running
    mean, variance, count = _mean_and_variance(moments)
    if count > 0.0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None and running_var is not None:
            if momentum is None:
                assert num_batches_tracked is not None
                momentum = 1.0 / max(num_batches_tracked.item(), 1.0)
            unbiased = variance * (count / max(count - 1.0, 1.0))
            for buffer, batch in ((running_mean, mean), (running_var, unbiased)):
                buffer.copy_(torch.lerp(buffer.double(), batch, momentum))
    small = input.numel() <= SMALL
    values = input.double() if small else input
    if small or not _is_near(mean, variance):
        shift, values = _centered(values, mean)
        mean = mean - shift
    return _result_like(input, _batch_norm(values, mean, variance, weight, bias, eps))


def grad_moments(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(dy) and sum(dy * xhat) of each channel, float64 [2C]; gradients of weight and bias."""
    mean, variance, _ = _mean_and_variance(moments)
    if input.numel() == 0:
        grads = products = torch.zeros_like(mean)
    elif input.numel() <= SMALL:
        grads, products = _sums_of_torch(grad_output.double(), input.double(), mean, variance, eps)
    else:
        high = mean.to(_compute_dtype(input))
        grads, products = _sums(grad_output, input, high)
        products = (products + grads * (high - mean)) * (variance + eps).rsqrt_()
    return (
        torch.cat((grads, products)),
        input.new_empty(0) if weight_dtype is None else products.to(weight_dtype, copy=True),
        input.new_empty(0) if bias_dtype is None else grads.to(bias_dtype, copy=True),
    )


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor,
    grad_moments: Tensor,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    """weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the means over the global batch."""
    mean, variance, count = _mean_and_variance(moments)
    rstd = (variance + eps).rsqrt_()
    scale = rstd if weight is None else rstd * weight
    sums = grad_moments.view(2, -1)
    count = max(count, 1.0)
    dtype = torch.float64 if input.numel() <= SMALL else input.dtype
    if dtype == torch.float64 or (dtype == torch.float32 and _is_near(mean, variance)):
        grad_mean, slope = (sums * (scale / -count)).unbind()
        result = _batch_norm(input.to(dtype), mean, variance, slope, grad_mean, eps)
        scale = scale.to(dtype).view(-1, *[1] * (input.dim() - 2))
        return _result_like(input, result.addcmul_(grad_output.to(dtype), scale))
    grad_mean, product_mean = (sums / count).unbind()
    slope = product_mean * rstd
    high = mean.float()  # what it lacks of the mean is in the shift
    shift = grad_mean + (high - mean) * slope
    output = torch.empty_like(input)
    rows, columns, axis = _matrix_of(input)
    maps = [map.as_strided((rows, columns), (columns, 1)) for map in (grad_output, input, output)]
    vectors = torch.stack((high, shift, slope, scale)).float().unsqueeze(1)
    if axis == 1:
        vectors = vectors.expand(-1, rows // len(mean), -1).reshape(4, -1, 1)
    height = min(max(BLOCK * torch.get_num_threads() // columns, 1), rows)
    buffers = _buffers(height, columns)
    for first in range(0, rows, height):
        block = slice(first, first + height)
        grad, values, result = (map[block] for map in maps)
        work, deviations = (buffer[: len(result)] for buffer in buffers)
        high, shift, slope, scale = (vectors[:, block] if axis == 1 else vectors).unbind()
        deviations.copy_(values).sub_(high)
        work.copy_(grad).sub_(shift).addcmul_(deviations, slope, value=-1.0).mul_(scale)
        result.copy_(work)
    return output


def _buffers(*shape: int) -> Sequence[Tensor]:
    """Two of float32, with whatever is in them; larger than a block if a row is: not kept then."""
    size = 2 * math.prod(shape)
    memory = getattr(_kept, "memory", None)
    if memory is None or len(memory) < size:
        with torch.inference_mode(False):  # which may make the first of them, and not use the last
            memory = torch.empty(size, dtype=torch.float32, device="cpu")
        _kept.memory = memory if size <= 2 * BLOCK * torch.get_num_threads() else None
    return memory[:size].view(2, *shape).unbind()


def _sums(grad_output: Tensor, input: Tensor, mean: Tensor | None) -> Sequence[Tensor]:
    """sum(dy) and sum(dy * (x - mean)) of each channel of a large tensor, float64 [C]. None: 0."""
    dtype = _compute_dtype(input)
    rows, columns, axis = _matrix_of(input)
    longest_row = LONGEST_ROW_BYTES // input.dtype.itemsize
    length, longest = (columns, longest_row) if axis == 1 else (rows, LONGEST_COLUMN)
    # What is longer is cut into pieces, each a channel to torch, if a number of them divides it.
    least = -(-length // longest)
    numbers = itertools.chain(range(least, 16 * least), range(least // 4 + 1, least))
    pieces = next((n for n in numbers if length % n == 0), 0)
    if not pieces or grad_output.dtype != input.dtype:
        others = [0, *range(2, input.dim())]
        deviations = input.to(dtype, copy=True) if mean is None else _centered(input, mean)[1]
        maps = grad_output, deviations.mul_(grad_output)
        return [map.sum(others, dtype=torch.float64) for map in maps]
    lines, length = input.shape[1] * pieces, length // pieces
    size, strides, cut = [1, lines, length, 1], [1, 1, lines, lines], (pieces, -1)
    if axis == 1:
        size, strides, cut = [len(input), lines, length], [lines * length, length, 1], (-1, pieces)
    grad_output, input = (map.as_strided(size, strides) for map in (grad_output, input))
    one = input.new_ones(lines, dtype=dtype)
    means = one - one if mean is None else mean.unsqueeze(axis).expand(cut).reshape(-1)
    parts = _sums_of_torch(grad_output, input, means, one, 0.0)
    return [part.view(cut).sum(axis, dtype=torch.float64) for part in parts]


def _sums_of_torch(
    grad_output: Tensor, input: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * xhat) of each channel, in the dtype of the statistics."""
    settings = (variance, mean, variance, None, None, False, eps, [False, True, True])
    return torch.ops.aten.native_batch_norm_backward(grad_output, input, *settings)[:0:-1]


def _matrix_of(input: Tensor) -> tuple[int, int, int]:
    """Memory of a dense tensor: rows, columns, and along which axis the values of a channel lie."""
    samples, channels = input.shape[:2]
    if input.numel() > samples * channels and input.is_contiguous():
        return samples * channels, input.numel() // (samples * channels), 1
    return input.numel() // channels, channels, 0


def _centered(input: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """A shift near the mean, float64 [C], and what is left of the input: exact, or nearly."""
    shift = mean.to(_compute_dtype(input))
    return shift.double(), input - shift.view(-1, *[1] * (input.dim() - 2))


def _batch_norm(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Any, bias: Any, eps: float
) -> Tensor:
    """torch's, with given statistics, in the precision of the input."""
    if input.numel() == 0:
        return input.clone()
    dtype = _compute_dtype(input)
    weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
    statistics: Any = (mean.to(dtype), variance.to(dtype), False, 0.0, eps)
    return torch.native_batch_norm(input, weight, bias, *statistics)[0]


def _result_like(input: Tensor, result: Tensor) -> Tensor:
    """The result in the input's dtype and layout."""
    if result.dtype == input.dtype and result.stride() == input.stride():
        return result
    return torch.empty_like(input).copy_(result)


def _mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of the global batch, with its count; kept at the moments, for the other steps of a layer."""
    kept = vars(moments)
    count = moments[-1].item()  # an all_reduce changes it, but no version
    state = count, None if moments.is_inference() else moments._version
    if kept.get("state") != state:
        sizes = (len(moments) // 2, len(moments) // 2, 1)
        mean, mean_of_squares, _ = (moments / max(count, 1.0)).split_with_sizes(sizes)
        variance = mean_of_squares - mean * mean
        variance.masked_fill_(variance < mean_of_squares * NOISE_OF_VARIANCE, 0.0)
        kept.update(state=state, statistics=(mean, variance))
    return *kept["statistics"], count


def _is_near(mean: Tensor, variance: Tensor) -> bool:
    if "is_near" not in vars(mean):
        vars(mean)["is_near"] = bool((mean * mean <= variance * NEAR**2).all())
    return vars(mean)["is_near"]


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32
