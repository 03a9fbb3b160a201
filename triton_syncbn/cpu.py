"""The four steps on a CPU, in torch's own loops; as `reference` in all but time.

Where a tensor is small, a step takes as long as its operations are many, those on [C] included. So
it is widened to float64 as a whole, where nothing cancels, and torch's batch norm with given
statistics, or its backward, does most of a step at once.

Where a tensor is large, a step takes as long as its bytes travel. It is then done in float32, which
is as good but for two things. Where means are far from 0, in units of the deviation, torch's batch
norm must be given deviations from them. And a long chain of additions adds up its roundings: the
backward of torch's batch norm has one where a channel is a column of memory, or a long row, but
`torch.sum`, which adds in a tree, has none. What these two ways need, and half precision that must
not be rounded on the way, lies in buffers that a thread keeps: fresh pages would cost more than the
arithmetic.
"""

import functools
import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import NOISE_OF_VARIANCE

SMALL = 1 << 15  # elements up to which float64 is faster, as measured
BLOCK = 1 << 20  # elements of a block of samples: 4 MiB of float32, which a shared cache holds
LARGEST_KEPT = 4 * BLOCK  # elements of the buffers that a thread keeps
NEAR = 1.0  # |mean| in deviations up to which float32 loses no more to it than a few roundings
# Where torch's batch norm has a chain for each value of a vector register, they are about 32 long:
# bytes of a row in float32; and values of a channel in half precision, where chains do not end with
# a row, but terms have so few digits that more of them are added up without a rounding.
LONGEST_ROW, LONGEST_HALF_CHANNEL = 512, 1024
LONGEST_PART = 256  # values that torch.sum adds up, before the sums are added in float64
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_kept = threading.local()  # the buffers of a thread, which is in one step at a time


def moments(input: Tensor) -> Tensor:
    """Moments of each channel of (N, C, *spatial): float64 [2C + 1], sum(x), sum(x**2), count."""
    channels = input.shape[1]
    values = input.numel() // channels
    if values == 0:
        return input.new_zeros(2 * channels + 1, dtype=torch.float64)
    if _has_short_chains(input):
        wide = input.double() if _is_wide(input) else input
        total, squares = _sums_of_torch(wide, wide)
    elif _is_wide(input):
        wide = input.double()
        total, squares = _sum(wide), _sum(wide.square())
    else:
        total, squares = _sums(input, None)
    if not _is_wide(input) and not _are_near(squares, total, (1.0 + NEAR**-2) / values):
        high = (total / values).float()
        deviations, squares = _sums(input, high)
        shift = high.double()
        total = shift * values + deviations
        squares = shift * (deviations + total) + squares
    return torch.cat((total, squares, _constant(1, values, torch.float64)))


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
    statistics = _statistics_of(moments)
    count = statistics.count
    if count > 0.0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None and running_var is not None:
            if momentum is None:
                assert num_batches_tracked is not None
                momentum = 1.0 / max(num_batches_tracked.item(), 1.0)
            moved = statistics.mean * momentum
            torch.add(moved, running_mean, alpha=1.0 - momentum, out=running_mean)
            moved = statistics.variance * (momentum * count / max(count - 1.0, 1.0))
            torch.add(moved, running_var, alpha=1.0 - momentum, out=running_var)
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    if _is_wide(input):
        mean, variance = statistics.mean, statistics.variance
        return output.copy_(_batch_norm(input.double(), weight, bias, mean, variance, eps))
    mean, variance = statistics.float32
    if statistics.is_near:
        return _batch_norm(input, weight, bias, mean, variance, eps, output)
    for values, result in _blocks(input, output):
        deviations = _deviations(values, mean)
        target = result if result.dtype == torch.float32 else deviations
        _batch_norm(deviations, weight, bias, statistics.rest_of_mean, variance, eps, target)
        if target is not result:
            result.copy_(target)
    return output


def grad_moments(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(dy) and sum(dy * xhat) of each channel, float64 [2C]; gradients of weight and bias."""
    statistics = _statistics_of(moments)
    mean, variance = statistics.mean, statistics.variance
    if input.numel() == 0:
        grads, products = torch.zeros_like(mean), torch.zeros_like(mean)
    elif _is_wide(input):
        maps = grad_output.double(), input.double()
        grads, products = _sums_of_torch(*maps, mean, variance, eps)
    else:
        high, _ = statistics.float32
        if _has_short_chains(input) and grad_output.dtype == input.dtype:
            grads, products = _sums_of_torch(grad_output, input, high)
        else:
            grads, products = _sums(input, high, grad_output)
        if not statistics.is_near:
            products = torch.addcmul(products, grads, high - mean)
        products = products * statistics.rstd(eps)
    return (
        torch.cat((grads, products)),
        input.new_empty(0) if weight_dtype is None else products.to(weight_dtype),
        input.new_empty(0) if bias_dtype is None else grads.to(bias_dtype),
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
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    statistics = _statistics_of(moments)
    scale = statistics.rstd(eps)
    if weight is not None:
        scale = scale * weight
    factors = grad_moments.view(2, -1) * (scale * (-1.0 / max(statistics.count, 1.0)))
    if _is_wide(input):
        grad_mean, slope = factors.unbind()
        mean, variance = statistics.mean, statistics.variance
        result = _batch_norm(input.double(), slope, grad_mean, mean, variance, eps)
        return output.copy_(result.addcmul_(grad_output, _per_channel(scale, input)))
    grad_mean, slope = factors.float().unbind()
    scale = _per_channel(scale.float(), input)
    mean, variance = statistics.float32
    shift, mean = (None, mean) if statistics.is_near else (mean, statistics.rest_of_mean)
    for grad, values, result in _blocks(grad_output, input, output):
        deviations = _deviations(values, shift)
        target = result if result.dtype == torch.float32 else deviations
        _batch_norm(deviations, slope, grad_mean, mean, variance, eps, target)
        if target is result:
            result.addcmul_(grad, scale)
        else:
            result.copy_(target.addcmul_(_buffer(1, values).copy_(grad), scale))
    return output


class _Statistics:
    """Mean and variance of the global batch, float64 [C], and its count."""

    def __init__(self, moments: Tensor) -> None:
        channels = len(moments) // 2
        self.moments = moments.clone()
        total, squares, count = moments.split_with_sizes((channels, channels, 1))
        self.count = count.item()
        divisor = max(self.count, 1.0)
        self.mean = total / divisor
        self.variance = torch.addcmul(squares / divisor, self.mean, self.mean, value=-1.0)
        self.is_near = _are_near(self.variance, self.mean, NEAR**-2)
        if not self.is_near:  # equal values have no variance but what rounding leaves of it
            noise = torch.addcmul(self.variance, self.mean, self.mean, value=-NOISE_OF_VARIANCE)
            self.variance.masked_fill_(noise < 0.0, 0.0)
        self._rstd: tuple[float, Tensor] | None = None

    @functools.cached_property
    def float32(self) -> tuple[Tensor, Tensor]:
        """Mean and variance in float32."""
        return self.mean.float(), self.variance.float()

    @functools.cached_property
    def rest_of_mean(self) -> Tensor:
        """What float32 lacks of the mean."""
        return (self.mean - self.float32[0]).float()

    def rstd(self, eps: float) -> Tensor:
        """1 / sqrt(variance + eps)."""
        if self._rstd is None or self._rstd[0] != eps:
            self._rstd = eps, (self.variance + eps).rsqrt_()
        return self._rstd[1]


def _statistics_of(moments: Tensor) -> _Statistics:
    """Kept at the moments, for the other steps of a layer."""
    kept: _Statistics | None = vars(moments).get("statistics")
    if kept is None or not torch.equal(kept.moments, moments):  # no version tells of an all_reduce
        kept = vars(moments)["statistics"] = _Statistics(moments)
    return kept


def _are_near(squares: Tensor, means: Tensor, factor: float) -> bool:
    """Whether squares are at least the factor times means squared, in all channels."""
    return torch.addcmul(squares, means, means, value=-factor).min().item() >= 0.0


def _is_wide(input: Tensor) -> bool:
    """Whether all is done in float64."""
    return input.numel() <= SMALL or input.dtype == torch.float64


def _has_short_chains(input: Tensor) -> bool:
    """Whether the backward of torch's batch norm adds up few values one by one."""
    rows = input.shape[0] * input.shape[1]
    if input.numel() == rows or not input.is_contiguous():
        return False
    if input.dtype == torch.float32:
        return input.numel() <= rows * LONGEST_ROW
    return input.numel() <= input.shape[1] * LONGEST_HALF_CHANNEL


def _sums_of_torch(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * xhat) of each channel, without a mean 0 and a variance 1."""
    channels, dtype = input.shape[1], _compute_dtype(input)
    mean = _constant(channels, 0.0, dtype) if mean is None else mean
    variance = _constant(channels, 1.0, dtype) if variance is None else variance
    settings = (variance, mean, variance, None, None, False, eps, [False, True, True])
    _, products, grads = _batch_norm_backward(grad_output, input, *settings)
    return grads, products


def _sums(
    input: Tensor, shift: Tensor | None, grad_output: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - shift)) of each channel; without a gradient, dy is x - shift."""
    sums: list[list[Tensor]] = [[], []]
    for values, grad in _blocks(input, input if grad_output is None else grad_output):
        deviations = _deviations(values, shift)
        if grad_output is None:
            grad = deviations
        elif grad.dtype != torch.float32:
            grad = _buffer(1, values).copy_(grad)
        sums[0].append(_sum(grad))
        sums[1].append(_sum(torch.mul(deviations, grad, out=_buffer(0, values))))
    return sum(sums[0]), sum(sums[1])


def _sum(map: Tensor) -> Tensor:
    """Of each channel of a dense map, float64 [C]."""
    size, strides, within, between = _parts(map.shape, map.is_contiguous())
    return map.as_strided(size, strides).sum(within).sum(between, dtype=torch.float64)


@functools.lru_cache(maxsize=256)
def _parts(shape: torch.Size, channels_first: bool) -> tuple[Any, ...]:
    """The values of each channel in memory, as size and strides, in parts that float32 may add up;
    and the dimensions within and between parts.
    """
    samples, channels, *spatial = shape
    row = math.prod(spatial)
    channels_first = channels_first and row > 1
    values = row if channels_first else samples * row
    least = -(-values // LONGEST_PART)
    parts = next((n for n in range(least, 8 * least) if values % n == 0), 1)
    length = values // parts
    if channels_first:
        strides = (channels * row, row, length, 1)
        return (samples, channels, parts, length), strides, 3, (0, 2)
    return (parts, length, channels), (length * channels, channels, 1), 1, 0


def _deviations(values: Tensor, shift: Tensor | None) -> Tensor:
    """Values less the shift of their channel, in float32: themselves, or in the first buffer."""
    if shift is None and values.dtype == torch.float32:
        return values
    buffer = _buffer(0, values)
    if shift is None:
        return buffer.copy_(values)
    shift = _per_channel(shift, values)
    if values.dtype == torch.float32:
        return torch.sub(values, shift, out=buffer)
    return buffer.copy_(values).sub_(shift)


def _blocks(*maps: Tensor) -> Iterable[Sequence[Tensor]]:
    """Some samples of each map at a time."""
    samples = max(BLOCK * len(maps[0]) // maps[0].numel(), 1)
    if samples >= len(maps[0]):
        return [maps]
    return zip(*(map.split(samples) for map in maps), strict=True)


def _buffer(number: int, like: Tensor) -> Tensor:
    """One of the thread's buffers of float32, with whatever is in it, laid out as a dense map."""
    memory: Tensor | None = _kept.__dict__.get(str(number))
    if memory is None or len(memory) < like.numel():
        with torch.inference_mode(False):  # in which it may be made, and not be used afterwards
            memory = torch.empty(like.numel(), dtype=torch.float32, device="cpu")
        _kept.__dict__[str(number)] = memory if len(memory) <= LARGEST_KEPT else None
    return memory.as_strided(like.shape, like.stride())


@functools.lru_cache(maxsize=128)
def _constant(size: int, value: float, dtype: torch.dtype) -> Tensor:
    """A vector that nobody changes."""
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=dtype, device="cpu")


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    output: Tensor | None = None,
) -> Tensor:
    """torch's, with given statistics, in the precision of these."""
    weight, bias = (None if value is None else value.to(mean.dtype) for value in (weight, bias))
    none = _constant(0, 0.0, mean.dtype)
    out = {} if output is None else {"out": (output, none, none)}
    settings: Any = (weight, bias, mean, variance, False, 0.0, eps)
    return torch.native_batch_norm(input, *settings, **out)[0]


def _per_channel(value: Tensor, map: Tensor) -> Tensor:
    return value.view(-1, *[1] * (map.dim() - 2))


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32
