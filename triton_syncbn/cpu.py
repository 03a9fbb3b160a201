"""The four steps on a CPU, in torch's own loops; as `reference` in all but time.

A small tensor takes as long as the operations are many. It is widened to float64 as a whole, where
nothing cancels, and torch's batch norm with given statistics does most of a step at once.

A large tensor takes as long as its bytes travel. Torch's batch norm does in one pass, in float32,
what that is exact for: sums of products, and the output where means are near 0. The rest is done on
deviations from the mean. Memory is seen as a matrix, whose rows are the channels of the samples
(channels first) or whose columns are the channels (channels last), and all operations run on one
block of rows before the next: it stays in the cache, and so does the buffer for what comes between.
Large temporaries would be fresh pages of memory, which cost more than the arithmetic. An operation
takes one vector of channels at most, as torch's loops are slow with two.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import NOISE_OF_VARIANCE

SMALL = 1 << 14  # elements up to which float64 is faster, as measured
BLOCK = 1 << 18  # elements of a block for each thread: 1 MiB of float32, about a core's own cache
NEAR = 2.0  # |mean| in deviations up to which float32 loses no more to it than a few roundings
# Values in a sum of torch's batch norm: a row goes through 16 chains of float32, a column through
# one, and where values repeat, the roundings of a chain have one sign. Short rows are slow in half.
LONGEST_ROW, LONGEST_COLUMN, SHORTEST_ROW_OF_HALF = 1024, 128, 256

_kept = threading.local()  # the buffers of a thread, which is in one step at a time


@torch.no_grad()
def moments(input: Tensor) -> Tensor:
    """Moments of each channel of (N, C, *spatial): float64 [2C + 1], sum(x), sum(x**2), count."""
    values = input.numel() // input.shape[1]
    count = input.new_full((1,), values, dtype=torch.float64)
    if input.numel() <= SMALL:
        others = [0, *range(2, input.dim())]
        wide = input.double()
        return torch.cat((wide.sum(others), wide.square().sum(others), count))
    zero = input.new_zeros(input.shape[1], dtype=_compute_dtype(input))
    total, squares = _sums(input, input, zero)
    mean = total / values
    if not _is_near(mean, squares / values - mean * mean):
        shift = mean.to(zero.dtype).double()
        deviations, squares = _sums_of_blocks(None, input, shift)
        total = deviations + shift * values
        squares = squares + shift * (deviations + total)
    return torch.cat((total, squares, count))


@torch.no_grad()
def normalize(
    input: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = None,
    eps: float,
) -> Tensor:
    """Normalize with the global moments; move the running statistics unless the batch is empty."""
    mean, variance, count = _mean_and_variance(moments)
    if count > 0.0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None and running_var is not None:
            if momentum is None:
                assert num_batches_tracked is not None
                momentum = 1.0 / max(num_batches_tracked.item(), 1.0)
            unbiased = variance * (count / max(count - 1.0, 1.0))
            for running, batch in ((running_mean, mean), (running_var, unbiased)):
                running.copy_(torch.lerp(running.double(), batch, momentum))
    if input.numel() == 0:
        return torch.empty_like(input)
    if input.numel() <= SMALL or _is_near(mean, variance):
        values = input if input.numel() > SMALL else input.double()
        result = _batch_norm(values, mean, variance, weight, bias, eps)
        if result.dtype == input.dtype and result.stride() == input.stride():
            return result
        return torch.empty_like(input).copy_(result)
    scale = (variance + eps).rsqrt_()
    if weight is not None:
        scale *= weight
    high = mean.to(_compute_dtype(input))  # what it lacks of the mean is in the shift
    shift = (high - mean) * scale
    if bias is not None:
        shift += bias
    output = torch.empty_like(input)
    matrix = _matrix_of(input)
    buffer, _ = matrix.buffers()
    maps = matrix.blocks(input), matrix.blocks(output)
    vectors = matrix.vectors(high, scale, shift)
    for block, result, (high, scale, shift) in zip(*maps, vectors, strict=True):
        work = result if result.dtype == buffer.dtype else buffer[: len(block)]
        torch.sub(_widened(block, work), high, out=work).mul_(scale).add_(shift)
        if work is not result:
            result.copy_(work)
    return output


@torch.no_grad()
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
        wide = grad_output.double(), input.double()
        grads, products = _sums_of_torch(*wide, mean, variance, eps)
    else:
        high = mean.to(_compute_dtype(input))
        grads, products = _sums(grad_output.to(input.dtype), input, high)
        products = (products + grads * (high - mean)) * (variance + eps).rsqrt_()
    return (
        torch.cat((grads, products)),
        input.new_empty(0) if weight_dtype is None else products.to(weight_dtype, copy=True),
        input.new_empty(0) if bias_dtype is None else grads.to(bias_dtype, copy=True),
    )


@torch.no_grad()
def grad_input(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor,
    grad_moments: Tensor,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    """weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the means over the global batch."""
    if input.numel() == 0:
        return torch.empty_like(input)
    mean, variance, count = _mean_and_variance(moments)
    rstd = (variance + eps).rsqrt_()
    scale = rstd if weight is None else rstd * weight
    sums = grad_moments.view(2, -1)
    dtype = _compute_dtype(input)
    small = input.numel() <= SMALL
    if small or (input.dtype == dtype and _is_near(mean, variance)):
        maps = (input.double(), grad_output.double()) if small else (input, grad_output)
        grad_mean, slope = (sums * (scale / -count)).unbind()
        result = _batch_norm(maps[0], mean, variance, slope, grad_mean, eps)
        scale = scale.to(result.dtype).view(-1, *[1] * (input.dim() - 2))
        result.addcmul_(maps[1], scale)
        if result.dtype == input.dtype and result.stride() == input.stride():
            return result
        return torch.empty_like(input).copy_(result)
    output = torch.empty_like(input)
    grad_mean, product_mean = (sums / count).unbind()
    slope = product_mean * rstd
    high = mean.to(_compute_dtype(input))
    shift = grad_mean + (high - mean) * slope
    matrix = _matrix_of(input)
    buffer, buffer_of_grad = matrix.buffers()
    maps = matrix.blocks(input), matrix.blocks(grad_output), matrix.blocks(output)
    vectors = matrix.vectors(high, shift, slope, scale)
    for block, grad, result, (high, shift, slope, scale) in zip(*maps, vectors, strict=True):
        deviations = torch.sub(_widened(block, buffer), high, out=buffer[: len(block)])
        work = result if result.dtype == buffer.dtype else buffer_of_grad[: len(block)]
        torch.sub(_widened(grad, work), shift, out=work)
        work.addcmul_(deviations, slope, value=-1.0).mul_(scale)
        if work is not result:
            result.copy_(work)
    return output


class _Matrix(NamedTuple):
    """The memory of a dense (N, C, *spatial)."""

    rows: int
    columns: int
    rows_of_channel: int  # N, or 0 if a channel is a column
    height: int  # rows of a block
    dtype: torch.dtype  # of the arithmetic

    def blocks(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.as_strided((self.rows, self.columns), (self.columns, 1)).split(self.height)

    def vectors(self, *values: Tensor) -> Sequence[Sequence[Tensor]]:
        """What belongs to channels, [C] each, as vectors along one side of each block."""
        stacked = torch.stack(values).to(self.dtype)
        if not self.rows_of_channel:
            return [stacked.unsqueeze(1).unbind()] * -(-self.rows // self.height)
        rows = stacked.unsqueeze(1).expand(-1, self.rows_of_channel, -1).reshape(len(values), -1, 1)
        return [block.unbind() for block in rows.split(self.height, 1)]

    def buffers(self) -> Sequence[Tensor]:
        """Two of the size of a block, with whatever is in them."""
        height = min(self.height, self.rows)
        size = height * self.columns
        memory = getattr(_kept, "memory", None)
        if memory is None or memory.dtype != self.dtype or memory.numel() < 2 * size:
            with torch.inference_mode(False):
                memory = torch.empty(2 * size, dtype=self.dtype, device="cpu")
            _kept.memory = memory
        return memory.as_strided((2, height, self.columns), (size, self.columns, 1)).unbind()


def _matrix_of(input: Tensor) -> _Matrix:
    values = input.numel() // input.shape[1]
    rows_of_channel = len(input) if values > len(input) and input.is_contiguous() else 0
    columns = values // len(input) if rows_of_channel else input.shape[1]
    height = max(BLOCK * torch.get_num_threads() // columns, 1)
    rows = input.numel() // columns
    return _Matrix(rows, columns, rows_of_channel, height, _compute_dtype(input))


def _sums(grad_output: Tensor, input: Tensor, mean: Tensor) -> Sequence[Tensor]:
    """sum(dy) and sum(dy * (x - mean)) of each channel, float64 [C]."""
    rows, columns, rows_of_channel, *_ = _matrix_of(input)
    length, longest = (columns, LONGEST_ROW) if rows_of_channel else (rows, LONGEST_COLUMN)
    if rows_of_channel and input.dtype.itemsize == 2:
        longest = length
        if length < SHORTEST_ROW_OF_HALF:
            return _sums_of_blocks(grad_output, input, mean)
    # Longer ones are cut into pieces, which are channels to torch, if some number of them divides.
    least = -(-length // longest)
    pieces = next((n for n in range(least, 16 * least) if length % n == 0), 1)
    lines, length = input.shape[1] * pieces, length // pieces
    if rows_of_channel:
        cut, size = (-1, pieces), (len(input), lines, length)
        strides = (lines * length, length, 1)
    else:
        cut, size = (pieces, -1), (1, lines, length, 1)
        strides = (1, 1, lines, lines)
    maps = (map.as_strided(size, strides) for map in (grad_output, input))
    if pieces > 1:
        mean = mean.expand(pieces, -1).T.reshape(-1) if rows_of_channel else mean.repeat(pieces)
    axis = 1 if rows_of_channel else 0
    sums = _sums_of_torch(*maps, mean, torch.ones_like(mean), 0.0)
    return [sum.double().view(cut).sum(axis) for sum in sums]


def _sums_of_blocks(grad_output: Tensor | None, input: Tensor, mean: Tensor) -> Sequence[Tensor]:
    """The same in another way: no matter how short rows are, and without dy, of dy = x - mean."""
    matrix = _matrix_of(input)
    axis = 1 if matrix.rows_of_channel else 0
    buffer, buffer_of_grad = matrix.buffers()
    maps = matrix.blocks(input), matrix.blocks(input if grad_output is None else grad_output)
    sums = []
    for block, grad, (high,) in zip(*maps, matrix.vectors(mean), strict=True):
        deviations = torch.sub(_widened(block, buffer), high, out=buffer[: len(block)])
        grad = deviations if grad_output is None else _widened(grad, buffer_of_grad)
        total = grad.sum(axis, keepdim=True)
        sums.append(torch.stack((total, deviations.mul_(grad).sum(axis, keepdim=True))))
    return torch.cat(sums, 1).double().view(2, -1, len(mean)).sum(1).unbind()


def _sums_of_torch(
    grad_output: Tensor, input: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * xhat) of each channel, in the dtype of the statistics."""
    maps = grad_output, input
    _, products, grads = torch.ops.aten.native_batch_norm_backward(
        *maps, variance, mean, variance, None, None, False, eps, [False, True, True]
    )
    return grads, products


def _batch_norm(
    input: Tensor, mean: Tensor, variance: Tensor, *affine_and_eps: Tensor | float | None
) -> Tensor:
    """torch's, with given statistics, in the precision of the input."""
    dtype = _compute_dtype(input)
    *affine, eps = affine_and_eps
    affine = (None if value is None else value.to(dtype) for value in affine)
    mean, variance = mean.to(dtype), variance.to(dtype)
    return torch.native_batch_norm(input, *affine, mean, variance, False, 0.0, eps)[0]


def _mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor, float]:
    channels = len(moments) // 2
    count = moments[-1].item()
    mean, mean_of_squares, _ = (moments / max(count, 1.0)).split_with_sizes((channels, channels, 1))
    variance = mean_of_squares - mean * mean
    variance.masked_fill_(variance < mean_of_squares * NOISE_OF_VARIANCE, 0.0)
    return mean, variance, count


def _is_near(mean: Tensor, variance: Tensor) -> bool:
    return bool((mean.square() <= variance * NEAR**2).all())


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _widened(block: Tensor, buffer: Tensor) -> Tensor:
    """The block in the dtype of the buffer, which it is copied to if it has another."""
    return block if block.dtype == buffer.dtype else buffer[: len(block)].copy_(block)
