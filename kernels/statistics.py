"""From the all-reduced moments of a channel to what the kernels multiply with. All arithmetic here
is float64.

The moments of a batch are float64 [2C + 1]: for each channel sum(x) = n * mean, for each channel
sum(x**2) = M2 + n * mean**2, and n, the number of values of a channel.

Every multiplication that feeds an addition is written as `tl.fma`: left to the compiler, the
contraction could differ between two variants of a kernel, and with it the running statistics of two
ranks whose inputs differ in layout.
"""

import triton
import triton.language as tl

# What rounding leaves of the variance of equal values, in units of the mean of squares: a few times
# 2**-53. A computed variance below it says nothing, so it is taken as 0, which for equal values is
# right.
NOISE_OF_VARIANCE = tl.constexpr(2.0**-50)


@triton.jit
def inverse(count):
    """1 / count, to two units in the last place, of float64 counts of 1 and more.

    Newton's steps, as in `inverse_root`: the division that the compiler knows calls a routine for
    what lies near the ends of the range, and around that call it spills.
    """
    result = (1.0 / count.to(tl.float32)).to(tl.float64)
    for _ in tl.static_range(2):  # from 22 bits to 44 and to all
        result = tl.fma(result, tl.fma(-count, result, tl.zeros_like(count) + 1.0), result)
    return result


@triton.jit
def inverse_root(value):
    """value ** -0.5, to two units in the last place, of normal float64 numbers; infinity of 0.

    value = part * 4**k with part from 0.5 to 2, whose float32 root is the guess; the exponents are
    moved as integers. Each of Newton's steps doubles the guess's 22 bits.
    """
    bits = value.to(tl.int64, bitcast=True)
    part = (bits >> 29 & 0xFFFFFF | 126 << 23).to(tl.int32).to(tl.float32, bitcast=True)
    root = tl.rsqrt(part).to(tl.int32, bitcast=True).to(tl.int64) << 29
    root += 1023 - 127 + 511 - (bits >> 53) << 52
    result = root.to(tl.float64, bitcast=True)
    half = -0.5 * value
    for _ in tl.static_range(2):
        result *= tl.fma(half * result, result, tl.zeros_like(value) + 1.5)
    return tl.where(bits == 0, float("inf"), result)


@triton.jit
def load_channels(values, channel):
    """One value per channel; 0 for channels that do not exist."""
    return tl.load(values + channel.index, mask=channel.mask, other=0.0)


@triton.jit
def mean_and_variance(moments, channel, sizes):
    """Mean and biased variance of each channel, float64, and the count; an empty batch has mean and
    variance 0. Equal values have variance 0, and a NaN stays one.
    """
    count = tl.load(moments + 2 * sizes.channels)
    inverse_count = inverse(tl.maximum(count, 1.0))
    mean = load_channels(moments, channel) * inverse_count
    mean_of_squares = load_channels(moments + sizes.channels, channel) * inverse_count
    variance = -tl.fma(mean, mean, -mean_of_squares)  # -mean would be one more instruction
    return mean, tl.where(variance < mean_of_squares * NOISE_OF_VARIANCE, 0.0, variance), count


@triton.jit
def split_high_low(value, TILING: tl.constexpr):
    """A number of the compute dtype, and what it lacks of a float64 one."""
    high = value.to(TILING.compute)
    return high, value - high.to(tl.float64)


@triton.jit
def convert_to(value, dtype: tl.constexpr):
    """Convert to the dtype of a tensor in memory; float64 to half precision by way of float32."""
    if dtype == tl.float64:
        return value.to(tl.float64)
    else:
        return value.to(tl.float32).to(dtype)


@triton.jit
def load_parameter(parameter, channel, default):
    """weight or bias of each channel in float64, or the default where the layer has none."""
    if parameter is None:
        return tl.zeros_like(channel.index).to(tl.float64) + default
    else:
        return load_channels(parameter, channel).to(tl.float64)


@triton.jit
def statistics_of_layer(moments, running_mean, running_var, channel, sizes):
    """Mean, variance and count of the batch; where there are no moments, those of the buffers."""
    if moments is None:
        mean = load_channels(running_mean, channel).to(tl.float64)
        return mean, load_channels(running_var, channel).to(tl.float64), 1.0
    else:
        return mean_and_variance(moments, channel, sizes)
