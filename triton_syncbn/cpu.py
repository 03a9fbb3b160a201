"""The four steps on a CPU, in torch's own loops; as `reference` in all but time.

A small tensor takes as long as its operations are many. It is widened to float64 as a whole, where
nothing cancels; torch's batch norm with given statistics, or its backward, does most of a step.

A large tensor takes as long as its bytes travel. It stays in float32, which is as good but for two
things. Where means are far from 0, in units of the deviation, torch's batch norm must be given
deviations from them. And its backward adds up a long row, or a channel that is a column of memory,
in long chains, in which roundings add up, too: `torch.sum` adds parts of it in a tree. What these
ways need, and half precision that must not be rounded on the way, lies in buffers that a thread
keeps: fresh pages would cost more than the arithmetic.
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
    channels, elements = input.shape[1], input.numel()
    if elements == 0:
        return input.new_zeros(2 * channels + 1, dtype=torch.float64)
    values = elements // channels
    is_wide = _is_wide(input)
    map = input.double() if is_wide else input
    if _has_short_chains(input):
        standard = _vector(channels, 0.0, is_wide), _vector(channels, 1.0, is_wide)
        total, squares = _sums_of_torch(map, map, *standard, 0.0)
    elif is_wide:
        total, squares = _sum(map), _sum(map.square())
    else:
        total, squares = _sums(None, map, None)
    if not is_wide and not _are_near(squares, total, (1.0 + NEAR**-2) / values):
        high = (total / values).float()
        deviations, squares = _sums(None, map, high)
        shift = high.double()
        total = shift * values + deviations
        squares = shift * (deviations + total) + squares
    return torch.cat((total, squares, _vector(1, values, True)))


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
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    if _is_wide(input):
        float64 = statistics.mean, statistics.variance
        return output.copy_(_batch_norm(input.double(), weight, bias, *float64, eps))
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
            one = _vector(input.shape[1], 1.0, False)
            grads, products = _sums_of_torch(grad_output, input, high, one, 0.0)
        else:
            grads, products = _sums(grad_output, input, high)
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
        float64 = statistics.mean, statistics.variance
        result = _batch_norm(input.double(), factors[1], factors[0], *float64, eps)
        return output.copy_(result.addcmul_(grad_output, _per_channel(scale, input)))
    factors = factors.float()
    slope, grad_mean, scale = factors[1], factors[0], _per_channel(scale.float(), input)
    mean, variance = statistics.float32
    shift, mean = (None, mean) if statistics.is_near else (mean, statistics.rest_of_mean)
    for grad, values, result in _blocks(grad_output, input, output):
        deviations = _deviations(values, shift)
        target = result if result.dtype == torch.float32 else deviations
        _batch_norm(deviations, slope, grad_mean, mean, variance, eps, target)
        if target is result:
            result.addcmul_(grad, scale)
        else:
            result.copy_(target.addcmul_(_buffer("second", values).copy_(grad), scale))
    return output


class _Statistics:
    """Mean and variance of the global batch, float64 [C], and its count."""

    def __init__(self, moments: Tensor) -> None:
        self.moments = moments.clone()
        channels = moments.shape[0] // 2
        self.count = moments[-1].item()
        per_value = moments / max(self.count, 1.0)
        self.mean, squares = per_value[:channels], per_value[channels:-1]
        self.variance = torch.addcmul(squares, self.mean, self.mean, value=-1.0)
        self.is_near = _are_near(self.variance, self.mean, NEAR**-2)
        if not self.is_near:  # equal values have no variance but what rounding leaves of it
            self.variance.masked_fill_(self.variance < squares * NOISE_OF_VARIANCE, 0.0)
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
    if input.dtype.itemsize >= 4:
        return input.numel() <= rows * LONGEST_ROW
    return input.numel() <= input.shape[1] * LONGEST_HALF_CHANNEL


def _sums_of_torch(
    grad_output: Tensor, input: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * xhat) of each channel, in the dtype of the statistics."""
    settings = (variance, mean, variance, None, None, False, eps, [False, True, True])
    _, products, grads = _batch_norm_backward(grad_output, input, *settings)
    return grads, products


def _sums(grad_output: Tensor | None, input: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - shift)) of each channel, float64 [C]; without a dy it is the
    deviation itself.
    """
    sums: Any = None
    for values, grad in _blocks(input, input if grad_output is None else grad_output):
        deviations = _deviations(values, shift)
        if grad_output is None:
            grad = deviations
        elif grad.dtype != torch.float32:
            grad = _buffer("second", values).copy_(grad)
        first = _sum(grad)
        second = _sum(torch.mul(deviations, grad, out=_buffer("first", values)))
        sums = (first, second) if sums is None else (sums[0] + first, sums[1] + second)
    return sums


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


def _deviations(values: Tensor, shift: Tensor | None) -> Tensor:
    """Values less the shift of their channel, in float32: themselves, or in the first buffer."""
    if values.dtype != torch.float32:
        buffer = _buffer("first", values).copy_(values)
        return buffer if shift is None else buffer.sub_(_per_channel(shift, values))
    if shift is None:
        return values
    return torch.sub(values, _per_channel(shift, values), out=_buffer("first", values))


def _blocks(*maps: Tensor) -> Iterable[Sequence[Tensor]]:
    """Some samples of each map at a time."""
    samples, elements = maps[0].shape[0], maps[0].numel()
    if elements <= BLOCK or samples == 1:
        return (maps,)
    some = max(BLOCK * samples // elements, 1)
    return zip(*(map.split(some) for map in maps), strict=True)


def _buffer(name: str, map: Tensor) -> Tensor:
    """Memory for a map in float32, with whatever is in it."""
    elements = map.numel()
    memory: Tensor | None = getattr(_kept, name, None)
    if memory is None or memory.numel() < elements:
        with torch.inference_mode(False):  # in which it may be made, and not be used afterwards
            memory = torch.empty(elements, dtype=torch.float32, device="cpu")
        setattr(_kept, name, memory if elements <= LARGEST_KEPT else None)
    return memory.as_strided(map.shape, map.stride())


@functools.lru_cache(maxsize=128)
def _vector(size: int, value: float, is_wide: bool) -> Tensor:
    """So many times a value, in a tensor that nobody changes."""
    with torch.inference_mode(False):
        dtype = torch.float64 if is_wide else torch.float32
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
    """torch's, with given mean and variance, whose dtype is that of the arithmetic."""
    dtype = mean.dtype
    if weight is not None and weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    settings: Any = (weight, bias, mean, variance, False, 0.0, eps)
    if output is None:
        return torch.native_batch_norm(input, *settings)[0]
    none = _vector(0, 0.0, dtype == torch.float64)
    return torch.native_batch_norm(input, *settings, out=(output, none, none))[0]


def _per_channel(value: Tensor, map: Tensor) -> Tensor:
    return value.view(-1, *[1] * (map.dim() - 2))
