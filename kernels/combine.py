"""Add up the sums of programs that share a channel, in the same launch and in a fixed order."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

COMBINED_AT_ONCE = tl.constexpr(1024)  # partial sums that one program reads in a step


class Part(NamedTuple):
    """What a program reduces: part `split` of `splits` of a block of channels."""

    block: tl.tensor
    split: tl.tensor
    splits: tl.tensor


@triton.jit
def part_of_program(splits):
    """Programs that share a block of channels are numbered one after the other."""
    return Part(tl.program_id(0) // splits, tl.program_id(0) % splits, splits)


@triton.jit
def add_splits(first, second, partials, arrivals, part, channel, sizes):
    """Leave this program's two sums per channel; the program that comes last adds those of all.

    first, second: float64 [1, K]. partials: float64 [splits, 2, C], or None where each program has
    its channels to itself. arrivals: int32, one per block of channels, 0 between launches. Returns
    the totals, and whether this program holds them.
    """
    if partials is None:
        holds_totals = part.split == 0
    else:
        mine = partials + 2 * part.split.to(tl.int64) * sizes.channels
        tl.store(mine + channel.index, first, mask=channel.mask)
        tl.store(mine + sizes.channels + channel.index, second, mask=channel.mask)
        tl.debug_barrier()  # every thread's stores come before the arrival that publishes them
        arrived = tl.atomic_add(arrivals + part.block, 1, sem="acq_rel")
        holds_totals = arrived == part.splits - 1
        BLOCK: tl.constexpr = COMBINED_AT_ONCE // first.shape[1] if first.shape[1] > 8 else 128
        first = tl.zeros_like(first)
        second = tl.zeros_like(second)
        for start in range(0, tl.where(holds_totals, part.splits, 0), BLOCK):
            split = start + tl.arange(0, BLOCK)[:, None].to(tl.int64)
            theirs = partials + 2 * split * sizes.channels + channel.index
            mask = (split < part.splits) & channel.mask
            one = tl.load(theirs, mask=mask, other=0.0, cache_modifier=".cg")
            two = tl.load(theirs + sizes.channels, mask=mask, other=0.0, cache_modifier=".cg")
            first += tl.sum(one, axis=0, keep_dims=True)
            second += tl.sum(two, axis=0, keep_dims=True)
        tl.store(arrivals + part.block, 0, mask=holds_totals)
    return first, second, holds_totals


# Partial sums that are kept for the next launch on a stream, 1 MiB: it takes longer to add up more
# than to allocate it.
MOST_KEPT = 1 << 17
_kept: dict[tuple[int | None, int | None], tuple[torch.Tensor, torch.Tensor]] = {}


def workspace(
    input: torch.Tensor, channels: int, blocks: int, splits: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The `partials` and `arrivals` of one launch, or None and None where no channel is shared.
    They may be larger than that.

    Launches on one stream run one after the other and leave `arrivals` at zero, so a stream keeps
    one of each. A launch that is captured in a CUDA graph may be replayed beside others and gets
    its own, zeroed within the graph.
    """
    if splits == 1:
        return None, None
    size = 2 * splits * channels
    index = stream = None
    if input.is_cuda:
        index = input.device.index
        stream = driver.active.get_current_stream(index)
        if torch.cuda.is_current_stream_capturing():
            return _new_workspace(input, size, blocks)
    partials, arrivals = _kept.get((index, stream), (None, None))
    if partials is None or arrivals is None or arrivals.numel() < blocks:
        partials, arrivals = _new_workspace(input, MOST_KEPT, blocks)
        _kept[index, stream] = partials, arrivals
    if size > MOST_KEPT:
        partials = input.new_empty(size, dtype=torch.float64)
    return partials, arrivals


def _new_workspace(
    input: torch.Tensor, size: int, blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    partials = input.new_empty(size, dtype=torch.float64)
    return partials, input.new_zeros(blocks, dtype=torch.int32)
