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
batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


class Pieces(NamedTuple):
    """Memory of a map in pieces, of which each makes a sum."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    # Dimensions to sum over; None if torch's batch norm does it in chains
    within: tuple[int, ...] | None = None
    sums: tuple[int, ...] = ()  # their size, with one dimension of channels
    between: tuple[int, ...] | None = None  # their dimensions to sum over, if there are any


class Plan(NamedTuple):
    """How both sums of a block are added up."""

    pieces: Pieces
    takes_memory: bool  # of the block, as it is; else a copy in the dtype of the arithmetic
    shifts_sums: bool  # the shift is taken off the sums, not off the values
    zero: Tensor  # of each piece, in the dtype of the arithmetic
    one: Tensor


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
    dtypes = dtype, input.dtype, None if grad_output is None else grad_output.dtype
    sums = None
    for values, grad in blocks(input, grad_output):
        plan = plan_of(values.shape, values.is_contiguous(), dtypes, shift is not None, is_near)
        if plan.takes_memory:
            values = values.as_strided(plan.pieces.size, plan.pieces.strides)
            if grad is not None:
                grad = grad.as_strided(plan.pieces.size, plan.pieces.strides)
            block = add_in_chains(grad, values, shift, plan)
        else:
            block = _add_copies(grad, values, shift, plan)
        sums = block if sums is None else (sums[0] + block[0], sums[1] + block[1])
    if sums is None:
        zero = torch.zeros(input.shape[1], dtype=torch.float64)
        return zero, zero
    return sums


def add_in_chains(
    grad: Tensor | None, values: Tensor, shift: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Those of a block in pieces, by torch's batch norm, to which each is a channel of its own."""
    mean = plan.zero
    if shift is not None and not plan.shifts_sums:
        mean = shift.to(mean.dtype)
        if plan.pieces.between is not None:
            mean = mean.view(-1, 1).expand(plan.pieces.sums).reshape(-1)
    settings = plan.one, mean, plan.one, None, None, False, 0.0, [False, True, True]
    _, second, first = batch_norm_backward(values if grad is None else grad, values, *settings)
    return _of_channels(first, second, shift, plan)


def _add_copies(
    grad: Tensor | None, map: Tensor, shift: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Those of a block, copied to the dtype of the arithmetic if it is not in it."""
    pieces, dtype = plan.pieces, plan.zero.dtype
    shifts_values = pieces.within is not None and not plan.shifts_sums
    copy = wide(map, dtype, shift if shifts_values else None)
    values = copy.as_strided(pieces.size, pieces.strides)
    if grad is not None:
        grad = wide(grad, dtype, None, 1).as_strided(pieces.size, pieces.strides)
    if pieces.within is None:
        return add_in_chains(grad, values, shift, plan)
    grad = values if grad is None else grad
    first = grad.sum(pieces.within)
    target = buffer(values, dtype) if copy is map else values
    second = torch.mul(values, grad, out=target).sum(pieces.within)
    return _of_channels(first, second, shift, plan)


def _of_channels(
    first: Tensor, second: Tensor, shift: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Sums of channels, float64, from those of pieces."""
    pieces = plan.pieces
    if pieces.between is None:
        first, second = first.double(), second.double()
    else:
        first = first.view(pieces.sums).sum(pieces.between, dtype=torch.float64)
        second = second.view(pieces.sums).sum(pieces.between, dtype=torch.float64)
    if plan.shifts_sums and shift is not None:
        second.addcmul_(first, shift, value=-1.0)
    return first, second


@functools.lru_cache(maxsize=256)
def plan_of(
    shape: torch.Size,
    is_contiguous: bool,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    has_shift: bool,
    is_near: bool = False,
) -> Plan:
    """That of a block, by the dtypes of the arithmetic, the input and the gradient."""
    dtype, dtype_of_input, dtype_of_grad = dtypes
    of_moments = dtype_of_grad is None
    # torch's batch norm takes half precision as it is, if it takes all of it
    as_it_is = dtype == torch.float32 and (
        not has_shift if of_moments else dtype_of_grad == dtype_of_input
    )
    bytes_of_term = dtype_of_input.itemsize if as_it_is else dtype.itemsize
    longest = LONGEST_CHAIN[bytes_of_term][0 if of_moments else 1]
    if of_moments and has_shift:  # such deviations may be on a coarse lattice
        longest = 0
    pieces = _pieces(shape, is_contiguous, longest, bytes_of_term)
    shifts_sums = has_shift and is_near and (bytes_of_term == 2 or pieces.between is not None)
    zero, one = (constant(pieces.size[1], value, dtype) for value in (0.0, 1.0))
    return Plan(pieces, as_it_is and pieces.within is None, shifts_sums, zero, one)


def _pieces(shape: torch.Size, is_contiguous: bool, longest: int, bytes_of_term: int) -> Pieces:
    """Those of which the backward of torch's batch norm adds up so many terms one by one at most,
    if there are any.
    """
    samples, channels, row = shape[0], shape[1], math.prod(shape[2:])
    values = samples * row
    if is_contiguous and row > 1:
        if bytes_of_term == 2:  # chains go on over all rows of a channel
            if values <= longest * LANES:
                return Pieces((samples, channels, row), (channels * row, row, 1))
        elif number := _divisor(row, longest * LANES):
            # Of each row, as float32 would round a sum of all rows once more
            part, width = row // number, samples * channels * number
            chains = (1, width, part), (width * part, part, 1)
            if width == channels:
                return Pieces(*chains)
            return Pieces(*chains, None, (samples, channels, number), (0, 2))
        number = _divisor(row, LONGEST_PART) or 1
        part = row // number
        rows = (samples, channels, number, part), (channels * row, row, part, 1)
        return Pieces(*rows, (3,), (samples, channels, number), (0, 2))
    number = _divisor(values, longest)
    width = channels * number
    if number == 1 or 0 < width <= MOST_CHAINS:
        columns = (1, width, values // number, 1), (values * channels, 1, width, width)
        if number == 1:
            return Pieces(*columns)
        return Pieces(*columns, None, (number, channels, 1), (0, 2))
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
