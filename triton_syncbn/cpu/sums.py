"""Both sums of a step on a CPU, over the values of each channel.

The backward of torch's batch norm yields both at once, but adds up in chains, whose roundings add
up, too. So it is given memory in pieces, each as a channel of its own; or, where they would have to
be too short, `torch.sum` adds parts in a tree.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .memory import blocks, buffer, constant, wide

# Terms of a chain, for moments and for their gradients, by the bytes of a term. Terms of half
# precision have so few digits that more are added up without a rounding, and products of gradients
# have both signs; float64 has digits to spare, but not for moments, which cancel.
LONGEST_CHAIN = {2: (64, 2048), 4: (32, 32), 8: (64, 1 << 13)}
LANES = 16  # of a vector register: torch has a chain for each, along a row
MOST_CHAINS = 1 << 12  # of channels that are side by side; the fastest cache holds so many sums
LONGEST_PART = 256  # values that torch.sum adds up before the sums are added in float64
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def add_up(
    grad_output: Tensor | None,
    input: Tensor,
    shift: Tensor | None,
    dtype: torch.dtype,
    is_near: bool = False,
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - shift)) of each channel, float64 [C], with arithmetic of a dtype;
    without a dy it is x - shift itself. A shift that is near 0 is taken off the sums, where to take
    it off the values costs time, or digits: products of half precision are exact in float32.
    """
    of_moments = grad_output is None
    # torch's batch norm takes half precision as it is, if it takes all of it
    as_it_is = dtype == torch.float32 and (
        shift is None if grad_output is None else grad_output.dtype == input.dtype
    )
    bytes_of_term = input.itemsize if as_it_is else dtype.itemsize
    longest = LONGEST_CHAIN[bytes_of_term][0 if of_moments else 1]
    if of_moments and shift is not None:  # such deviations may be on a coarse lattice
        longest = 0
    sums = None
    for values, grad in blocks(input, grad_output):
        pieces = _pieces(values.shape, values.is_contiguous(), longest, bytes_of_term)
        original = values
        of_sums = is_near and (bytes_of_term == 2 or pieces.between != ())
        if pieces.within or not as_it_is:
            values = wide(values, dtype, shift if pieces.within and not of_sums else None)
            grad = grad if of_moments else wide(grad, dtype, None, 1)
        is_fresh = values is not original
        values = values.as_strided(pieces.size, pieces.strides)
        grad = values if of_moments else grad.as_strided(pieces.size, pieces.strides)
        if pieces.within:
            first = grad.sum(pieces.within)
            target = values if is_fresh else buffer(values, dtype)
            second = torch.mul(values, grad, out=target).sum(pieces.within)
        else:
            mean = None if of_sums else shift
            first, second = _sums_in_chains(grad, values, mean, pieces, dtype)
        if pieces.between:
            first = first.sum(pieces.between, dtype=torch.float64)
            second = second.sum(pieces.between, dtype=torch.float64)
        else:
            first, second = first.double(), second.double()
        if of_sums and shift is not None:
            second.addcmul_(first, shift, value=-1.0)
        sums = (first, second) if sums is None else (sums[0] + first, sums[1] + second)
    if sums is None:
        zero = torch.zeros(input.shape[1], dtype=torch.float64)
        return zero, zero
    return sums


class Pieces(NamedTuple):
    """Memory of a map in pieces, of which each makes a sum."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    within: tuple[int, ...]  # dimensions to sum over; none if torch's batch norm does it in chains
    sums: tuple[int, ...]  # their size, with one dimension of channels
    between: tuple[int, ...]  # their dimensions to sum over


def _sums_in_chains(
    grad: Tensor, map: Tensor, mean: Tensor | None, pieces: Pieces, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - mean)) of each piece, which has a channel of its own."""
    channels = map.shape[1]
    one = constant(channels, 1.0, dtype)
    if mean is None:
        mean = constant(channels, 0.0, dtype)
    else:
        mean = mean.to(dtype)
        if pieces.between:
            mean = mean.view(-1, 1).expand(pieces.sums).reshape(-1)
    settings = (one, mean, one, None, None, False, 0.0, [False, True, True])
    _, second, first = _batch_norm_backward(grad, map, *settings)
    return first.view(pieces.sums), second.view(pieces.sums)


@functools.lru_cache(maxsize=256)
def _pieces(shape: torch.Size, is_contiguous: bool, longest: int, bytes_of_term: int) -> Pieces:
    """Those of which the backward of torch's batch norm adds up so many terms one by one at most,
    if there are any.
    """
    samples, channels, row = shape[0], shape[1], math.prod(shape[2:])
    values = samples * row
    if is_contiguous and row > 1:
        if bytes_of_term == 2:  # chains go on over all rows of a channel
            if values <= longest * LANES:
                chains = (samples, channels, row), (channels * row, row, 1)
                return Pieces(*chains, (), (channels,), ())
        elif number := _divisor(row, longest * LANES):
            # Of each row, as float32 would round a sum of all rows once more
            part, width = row // number, samples * channels * number
            chains = (1, width, part), (width * part, part, 1)
            if width == channels:
                return Pieces(*chains, (), (channels,), ())
            return Pieces(*chains, (), (samples, channels, number), (0, 2))
        number = _divisor(row, LONGEST_PART) or 1
        part = row // number
        rows = (samples, channels, number, part), (channels * row, row, part, 1)
        return Pieces(*rows, (3,), (samples, channels, number), (0, 2))
    number = _divisor(values, longest)
    width = channels * number
    if number == 1 or 0 < width <= MOST_CHAINS:
        columns = (1, width, values // number, 1), (values * channels, 1, width, width)
        if number == 1:
            return Pieces(*columns, (), (channels,), ())
        return Pieces(*columns, (), (number, channels, 1), (0, 2))
    number = _divisor(values, LONGEST_PART) or 1
    part = values // number
    parts = (number, part, channels), (part * channels, channels, 1)
    return Pieces(*parts, (1,), (number, channels), (0,))


def _divisor(number: int, most: int) -> int:
    """A number of parts of at most so many, or of less by not too much; 0 if there is none."""
    if most == 0:
        return 0
    least = -(-number // most)
    return next((n for n in range(least, 8 * least) if number % n == 0), 0)
