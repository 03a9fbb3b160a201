"""The four steps in plain torch: for devices without the kernels, and as a second opinion on them.

Shapes, dtypes, meaning and precision are those of the kernels' launchers: float32 arithmetic
(float64 for float64 input) on deviations from the mean, sums and statistics of a channel in
float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .operands import LAYER_ALONE, NOT_TRACKED, BlockOperands, RunningStatistics

NOISE_OF_VARIANCE = 2.0**-50  # see kernels/statistics.py


def moments(input: Tensor) -> Tensor:
    """Moments of each channel of (N, C, *spatial): float64 [2C + 1], sum(x), sum(x**2) and the
    count.
    """
    others = _all_but_channels(input)
    values = input.to(_compute_dtype(input))
    count = values.numel() // values.shape[1]
    shift = values.sum(others) / max(count, 1)
    values = values - _per_channel(shift, input)
    deviations = values.sum(others).double()
    squares = values.square_().sum(others).double()
    shift = shift.double()
    shifted = shift * count
    return torch.cat(
        [
            shifted + deviations,
            squares + shift * (2 * deviations + shifted),
            shift.new_full((1,), count),
        ]
    )


def normalize(
    input: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    running: RunningStatistics = NOT_TRACKED,
    block: BlockOperands = LAYER_ALONE,
) -> Tensor:
    """Normalize with the global moments; update the running statistics in place unless the global
    batch is empty. Without moments the running statistics are those to normalize with.
    """
    mean, variance, count = statistics_of_layer(moments, running)
    if moments is not None:
        update_running_statistics(mean, variance, count, running)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    high, low = _split_high_low(mean, input)
    shift = -low * scale if bias is None else bias.double() - low * scale
    z = _scale_and_shift(input, high, scale, shift)
    if block.residual is not None:
        z += block.residual
    if block.activation is None:
        return z.to(input.dtype)
    function = ACTIVATIONS[block.activation]
    slope = block.activation_slope if function.takes_slope else 0.0
    if block.gates is not None:
        block.gates.copy_(_pack(function.derivative(z, slope) == 1.0, block.gates, input))
    return function.value(z, slope).to(input.dtype)


def grad_moments(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    eps: float,
    block: BlockOperands = LAYER_ALONE,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(dy) and sum(dy * xhat) of each channel, float64 [2C], and from them the gradients of
    weight and bias.
    """
    mean, variance, _ = statistics_of_layer(moments, block.running)
    rstd = (variance + eps).rsqrt()
    high, low = _split_high_low(mean, input)
    normalized = _scale_and_shift(input, high, rstd, -low * rstd)
    grad = _gradient_of_block(
        grad_output.to(normalized.dtype), input, mean, rstd, block.weight, block
    )
    grads = grad.sum(_all_but_channels(input)).double()
    products = normalized.mul_(grad).sum(_all_but_channels(input)).double()
    none = input.new_empty(0)
    return (
        torch.cat([grads, products]),
        none if weight_dtype is None else products.to(weight_dtype, copy=True),
        none.clone() if bias_dtype is None else grads.to(bias_dtype, copy=True),
    )


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor | None,
    grad_moments: Tensor | None,
    weight: Tensor | None,
    eps: float,
    block: BlockOperands = LAYER_ALONE,
) -> Tensor:
    """weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the means over the global batch."""
    mean, variance, count = statistics_of_layer(moments, block.running)
    rstd = (variance + eps).rsqrt()
    if grad_moments is None:
        grad_mean = product_mean = torch.zeros_like(mean)
    else:
        grad_mean, product_mean = (grad_moments / count.clamp(min=1.0)).chunk(2)
    scale = rstd if weight is None else rstd * weight.double()
    slope = -scale * rstd * product_mean
    high, low = _split_high_low(mean, input)
    grad_high, grad_low = _split_high_low(grad_mean, input)
    result = _scale_and_shift(input, high, slope, -scale * grad_low - slope * low)
    grad = _gradient_of_block(grad_output.to(result.dtype), input, mean, rstd, weight, block)
    if block.grad_residual is not None:
        block.grad_residual.copy_(grad)
    grad = grad - _per_channel(grad_high, input)
    return result.addcmul_(grad, _per_channel(scale.to(result.dtype), input)).to(input.dtype)


def update_running_statistics(
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    running: RunningStatistics,
) -> None:
    """Move the running statistics towards those of a batch, in place, and count it, unless it is
    empty. momentum=None: the average over the batches so far, which needs the counter.
    """
    running_mean, running_var, num_batches_tracked, momentum = running
    if num_batches_tracked is not None:
        num_batches_tracked.add_((count > 0).long())
    if running_mean is not None and running_var is not None:
        if momentum is None:
            assert num_batches_tracked is not None
            factor = 1.0 / num_batches_tracked.double().clamp(min=1.0)
        else:
            factor = torch.full_like(count, momentum)
        factor = torch.where(count > 0, factor, 0.0)
        unbiased = variance * (count / (count - 1.0).clamp(min=1.0))
        for buffer, batch in ((running_mean, mean), (running_var, unbiased)):
            buffer.copy_((1.0 - factor) * buffer.double() + factor * batch)


def statistics_of_layer(
    moments: Tensor | None, running: RunningStatistics
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of the batch; where there are no moments, those of the buffers."""
    if moments is None:
        assert running.mean is not None and running.var is not None
        return running.mean.double(), running.var.double(), running.mean.new_ones(())
    return mean_and_variance(moments)


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel, and the count."""
    total, squares, count = moments.tensor_split(((len(moments) - 1) // 2, len(moments) - 1))
    count = count.squeeze(0)
    divisor = count.clamp(min=1.0)
    mean = total / divisor
    mean_of_squares = squares / divisor
    variance = mean_of_squares - mean * mean
    return mean, torch.where(variance < NOISE_OF_VARIANCE * mean_of_squares, 0.0, variance), count


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _split_high_low(value: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """A number of the compute dtype, and what it lacks of a float64 one."""
    high = value.to(_compute_dtype(input))
    return high, value - high.double()


def _scale_and_shift(input: Tensor, high: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(input - high) * scale + shift, in the compute dtype, which is that of `high`."""
    deviations = input.to(high.dtype) - _per_channel(high, input)
    return torch.addcmul(
        _per_channel(shift.to(high.dtype), input),
        deviations,
        _per_channel(scale.to(high.dtype), input),
    )


def _gradient_of_block(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    block: BlockOperands,
) -> Tensor:
    def before_activation() -> Tensor:
        scale = rstd if weight is None else rstd * weight.double()
        high, low = _split_high_low(mean, input)
        shift = -low * scale if block.bias is None else block.bias.double() - low * scale
        z = _scale_and_shift(input, high, scale, shift)
        return z if block.residual is None else z.add_(block.residual)

    if block.activation is None:
        return grad
    return gradient_of_z(
        grad, before_activation, block.gates, input, block.activation, block.activation_slope
    )


def gradient_of_z(
    grad: Tensor,
    before_activation: Callable[[], Tensor],
    gates: Tensor | None,
    input: Tensor,
    activation: str,
    slope: float,
) -> Tensor:
    """The gradient before an activation, from that after it and from the gates or else z."""
    function = ACTIVATIONS[activation]
    slope = slope if function.takes_slope else 0.0
    if not function.gated:
        return grad * function.derivative(before_activation(), slope)
    if gates is not None:
        opened = _unpack(gates, input)
    else:
        opened = function.derivative(before_activation(), slope) == 1.0
    return torch.where(opened, grad, grad * slope if slope else 0.0)


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.movedim(1, -1)


def _pack(opened: Tensor, gates: Tensor, input: Tensor) -> Tensor:
    """Booleans as gates lie in memory: in the order of the input, bit i % 8 of byte i // 8."""
    bits = _bits_of_byte(gates, input)
    flat = _in_memory_order(opened).reshape(-1, len(bits))
    return (flat.to(torch.uint8) << bits).sum(1, dtype=torch.uint8)


def _unpack(gates: Tensor, input: Tensor) -> Tensor:
    model = _in_memory_order(input)
    opened = (gates[:, None] >> _bits_of_byte(gates, input) & 1).bool().view(model.shape)
    return opened if model is input else opened.movedim(-1, 1)


def _bits_of_byte(gates: Tensor, input: Tensor) -> Tensor:
    """The places of the gates in a byte, one or eight; an empty batch has neither."""
    number = max(input.numel() // max(gates.numel(), 1), 1)
    return torch.arange(number, dtype=torch.uint8, device=input.device)


def _all_but_channels(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def _per_channel(value: Tensor, input: Tensor) -> Tensor:
    return value.view(-1, *[1] * (input.dim() - 2))
