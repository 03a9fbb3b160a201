"""The four steps on a CPU, in torch's own loops; as `reference` in all but time.

A small tensor takes as long as its operations are many; in float64 there are no more of them, and
nothing cancels. A large one takes as long as its bytes travel. It stays in float32, which is as
good but for two things. Where means are far from 0, in units of the deviation, torch's batch norm
with given statistics must be given deviations from them. And its backward, which yields both sums
of a step at once, adds up a long row, or a channel that is a column of memory, in chains, whose
roundings add up, too: there `torch.sum` adds parts of it in a tree. What is not in the precision of
the arithmetic lies in a buffer that a thread keeps: fresh pages cost more than the arithmetic.
"""

import functools
import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import NOISE_OF_VARIANCE

SMALL = 1 << 13  # elements up to which float64 costs nothing, as measured
BLOCK = 1 << 20  # elements of a block of samples: 4 MiB of float32, which a shared cache holds
LARGEST_KEPT = 4 * BLOCK  # elements of a buffer that a thread keeps
NEAR = 1.0  # |mean| in deviations up to which float32 loses no more to it than a few roundings
# Torch's batch norm has a chain for each value of a vector register, at most about 32 long with so
# many values of a row in float32, and of a channel in half precision, where it goes on over rows.
LONGEST_ROW, LONGEST_HALF_CHANNEL = 512, 1024
LONGEST_PART = 256  # values that torch.sum adds up before the sums are added in float64
_kept = threading.local()  # the buffers of a thread, which is in one step at a time
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def moments(input: Tensor) -> Tensor:
    """Moments of each channel of (N, C, *spatial): float64 [2C + 1], sum(x), sum(x**2), count."""
    if input.numel() == 0:
        return input.new_zeros(2 * input.shape[1] + 1, dtype=torch.float64)
    values = input.numel() // input.shape[1]
    dtype = _dtype_of(input)
    total, squares = _sums(None, input, None, dtype)
    if dtype == torch.float32 and not _are_near(squares, total, (1.0 + NEAR**-2) / values):
        high = (total / values).float()
        deviations, squares = _sums(None, input, high, dtype)
        shift = high.double()
        total = shift * values + deviations
        squares = shift * (deviations + total) + squares
    return torch.cat((total, squares, _vector(1, values, torch.float64)))


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
            unbiased = momentum * count / max(count - 1.0, 1.0)
            kept = 1.0 - momentum  # added in float64, which is rounded once
            torch.add(statistics.mean * momentum, running_mean, alpha=kept, out=running_mean)
            torch.add(statistics.variance * unbiased, running_var, alpha=kept, out=running_var)
    return _batch_norm(input, statistics, weight, bias, eps)


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
    dtype = _dtype_of(input)
    shift, mean, _ = statistics.in_dtype(dtype)
    if input.numel() == 0:
        grads, products = torch.zeros_like(mean), torch.zeros_like(mean)
    elif shift is None:
        grads, products = _sums(grad_output, input, mean, dtype)
    else:
        grads, products = _sums(grad_output, input, shift, dtype)
        products = torch.addcmul(products, grads, mean, value=-1.0)
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
    statistics = _statistics_of(moments)
    scale = statistics.rstd(eps)
    if weight is not None:
        scale = scale * weight
    factors = grad_moments.view(2, -1) * (scale * (-1.0 / max(statistics.count, 1.0)))
    grad_mean, slope = factors.to(_dtype_of(input))
    return _batch_norm(input, statistics, slope, grad_mean, eps, grad_output, scale)


def _batch_norm(
    input: Tensor,
    statistics: "_Statistics",
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_output: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """xhat * weight + bias + dy * scale, the last where there is a dy; all of them [C]."""
    dtype = _dtype_of(input)
    shift, mean, variance = statistics.in_dtype(dtype)
    if weight is not None and weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    settings: Any = (weight, bias, mean, variance, False, 0.0, eps)
    if scale is not None:
        scale = _per_channel(scale.to(dtype), input)
    none = _vector(0, 0.0, dtype)
    # torch takes half precision, too, and rounds at the end: before anything is added
    is_one_step = dtype == torch.float32 and shift is None and grad_output is None
    output = torch.empty_like(input)
    for values, grad, result in _blocks(input, input if scale is None else grad_output, output):
        deviations = values if is_one_step else _deviations(values, shift, dtype)
        target = result if is_one_step or result.dtype == dtype else deviations
        torch.native_batch_norm(deviations, *settings, out=(target, none, none))
        if scale is not None:
            target.addcmul_(_widened(grad, dtype, 1), scale)
        if target is not result:
            result.copy_(target)
    return output


class _Statistics:
    """Mean and variance of the global batch, float64 [C], and its count."""

    def __init__(self, moments: Tensor) -> None:
        channels = moments.shape[0] // 2
        self.moments = moments.clone()
        self.count = moments[-1].item()
        per_value = moments / max(self.count, 1.0)
        self.mean, squares = per_value[:channels], per_value[channels:-1]
        self.variance = torch.addcmul(squares, self.mean, self.mean, value=-1.0)
        self.is_near = _are_near(self.variance, self.mean, NEAR**-2)
        if not self.is_near:  # equal values have no variance but what rounding leaves of it
            self.variance.masked_fill_(self.variance < squares * NOISE_OF_VARIANCE, 0.0)
        self._rstd: dict[float, Tensor] = {}
        self._float32: tuple[Tensor | None, Tensor, Tensor] | None = None

    def in_dtype(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
        """What is first taken off the values, or None; the mean of what is left; the variance."""
        if dtype == torch.float64:
            return None, self.mean, self.variance
        if self._float32 is None:
            high, variance = self.mean.float(), self.variance.float()
            self._float32 = None, high, variance
            if not self.is_near:
                self._float32 = high, (self.mean - high).float(), variance
        return self._float32

    def rstd(self, eps: float) -> Tensor:
        """1 / sqrt(variance + eps)."""
        if eps not in self._rstd:
            self._rstd[eps] = (self.variance + eps).rsqrt_()
        return self._rstd[eps]


def _statistics_of(moments: Tensor) -> _Statistics:
    """Kept at the moments, for the other steps of a layer."""
    kept: _Statistics | None = vars(moments).get("statistics")
    if kept is None or not torch.equal(kept.moments, moments):  # no version tells of an all_reduce
        kept = vars(moments)["statistics"] = _Statistics(moments)
    return kept


def _are_near(squares: Tensor, means: Tensor, factor: float) -> bool:
    """Whether squares are at least the factor times means squared, in all channels."""
    return torch.addcmul(squares, means, means, value=-factor).min().item() >= 0.0


def _dtype_of(input: Tensor) -> torch.dtype:
    """Of the arithmetic."""
    is_wide = input.numel() <= SMALL or input.dtype == torch.float64
    return torch.float64 if is_wide else torch.float32


def _sums(
    grad_output: Tensor | None, input: Tensor, shift: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - shift)) of each channel; without a dy it is x - shift itself."""
    grads = input if grad_output is None else grad_output
    centers_both = grad_output is None and shift is not None
    if _has_short_chains(input, dtype) and grads.dtype == input.dtype and not centers_both:
        one = _vector(input.shape[1], 1.0, dtype)
        mean = _vector(input.shape[1], 0.0, dtype) if shift is None else shift
        if dtype == torch.float64:
            input, grads = _widened(input, dtype), _widened(grads, dtype, 1)
        settings = (one, mean, one, None, None, False, 0.0, [False, True, True])
        return _batch_norm_backward(grads, input, *settings)[:0:-1]
    sums: Any = None
    for values, grad in _blocks(input, grads):
        deviations = _deviations(values, shift, dtype)
        grad = deviations if grad_output is None else _widened(grad, dtype, 1)
        first = _sum(grad)
        second = _sum(torch.mul(deviations, grad, out=_buffer(values, dtype)))
        sums = (first, second) if sums is None else (sums[0] + first, sums[1] + second)
    return sums


def _has_short_chains(input: Tensor, dtype: torch.dtype) -> bool:
    """Whether the backward of torch's batch norm adds up few values one by one."""
    samples, channels = input.shape[:2]
    values = input.numel() // channels
    if dtype == torch.float64 and values <= LONGEST_PART:
        return True
    if values == samples or not input.is_contiguous():
        return False
    if input.dtype.itemsize == 2 and dtype == torch.float32:
        return values <= LONGEST_HALF_CHANNEL
    return values <= samples * LONGEST_ROW


def _sum(map: Tensor) -> Tensor:
    """Of each channel of a dense map, float64 [C]."""
    size, strides, within, between = _parts(map.shape, map.is_contiguous())
    return map.as_strided(size, strides).sum(within).sum(between, dtype=torch.float64)


@functools.lru_cache(maxsize=256)
def _parts(shape: torch.Size, is_contiguous: bool) -> tuple[Any, ...]:
    """Memory with each channel in parts: size, strides, dimensions within and between the parts."""
    samples, channels, row = shape[0], shape[1], math.prod(shape[2:])
    by_rows = is_contiguous and row > 1
    values = row if by_rows else samples * row
    least = -(-values // LONGEST_PART)
    parts = next((n for n in range(least, 8 * least) if values % n == 0), 1)
    part = values // parts
    if by_rows:
        return (samples, channels, parts, part), (channels * row, row, part, 1), 3, (0, 2)
    return (parts, part, channels), (part * channels, channels, 1), 1, 0


def _deviations(values: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values less the shift of their channel: themselves, or in the first buffer."""
    if shift is None:
        return _widened(values, dtype)
    shift = _per_channel(shift, values)
    if values.dtype == dtype:
        return torch.sub(values, shift, out=_buffer(values, dtype))
    return _widened(values, dtype).sub_(shift)


def _widened(map: Tensor, dtype: torch.dtype, number: int = 0) -> Tensor:
    """A map in the precision of the arithmetic: itself, or in a buffer."""
    return map if map.dtype == dtype else _buffer(map, dtype, number).copy_(map)


def _buffer(map: Tensor, dtype: torch.dtype, number: int = 0) -> Tensor:
    """Memory for a map in a dtype, with whatever is in it."""
    elements = map.numel()
    kept: dict[Any, Tensor | None] = vars(_kept)
    memory = kept.get((dtype, number))
    if memory is None or memory.numel() < elements:
        with torch.inference_mode(False):  # in which it may be made, and not be used afterwards
            memory = torch.empty(elements, dtype=dtype, device="cpu")
        kept[dtype, number] = memory if elements <= LARGEST_KEPT else None
    return memory.as_strided(map.shape, map.stride())


def _blocks(*maps: Tensor) -> Iterable[Sequence[Tensor]]:
    """Some samples of each map at a time."""
    samples, elements = maps[0].shape[0], maps[0].numel()
    if elements <= BLOCK or samples == 1:
        return (maps,) if elements else ()
    some = max(BLOCK * samples // elements, 1)
    return zip(*(map.split(some) for map in maps), strict=True)


@functools.lru_cache(maxsize=128)
def _vector(size: int, value: float, dtype: torch.dtype) -> Tensor:
    """So many times a value, in a tensor that nobody changes."""
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=dtype, device="cpu")


def _per_channel(value: Tensor, map: Tensor) -> Tensor:
    return value.view(-1, *[1] * (map.dim() - 2))
