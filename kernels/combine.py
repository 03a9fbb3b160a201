"""Add up the sums of programs that share a channel, in the same launch and in a fixed order."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

MEMBERS = tl.constexpr(32)  # programs of a group, where there are more than twice as many
# Partial sums that a program reads in a step: reading waits for the L2 cache, not for its bytes.
COMBINED_AT_ONCE = tl.constexpr(1024)


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
    """Leave this program's two sums per channel; the program that comes last adds those of all. So
    that it has not many to wait for, the last of each group adds up those of its group before.

    first, second: float64 [1, K]. partials: float64 [splits + groups, 2, C], or None where each
    program has its channels to itself. arrivals: int32 [blocks of channels, groups + 1], 0 between
    launches. Returns the totals, and whether this program holds them.
    """
    if partials is None:
        holds_totals = part.split == 0
    else:
        members = tl.where(part.splits > 2 * MEMBERS, MEMBERS, part.splits)
        groups = tl.cdiv(part.splits, members)
        group = part.split // members
        before = group * members
        arrivals += part.block * (groups + 1)
        first, second, holds_totals = add_when_last(
            first,
            second,
            partials + 2 * sizes.channels * before.to(tl.int64),
            arrivals + group,
            part.split - before,
            tl.minimum(part.splits - before, members),
            channel,
            sizes,
        )
        if holds_totals & (groups > 1):
            first, second, holds_totals = add_when_last(
                first,
                second,
                partials + 2 * sizes.channels * part.splits.to(tl.int64),
                arrivals + groups,
                group,
                groups,
                channel,
                sizes,
            )
    return first, second, holds_totals


@triton.jit
def add_when_last(first, second, partials, arrivals, number, count, channel, sizes):
    """Leave two sums as those of `number`; what comes last of `count` gets those of all, added in
    a fixed order. Returns sums, and whether they are of all.
    """
    mine = partials + 2 * sizes.channels * number.to(tl.int64)
    tl.store(mine + channel.index, first, mask=channel.mask)
    tl.store(mine + sizes.channels + channel.index, second, mask=channel.mask)
    tl.debug_barrier()  # every thread's stores come before the arrival that publishes them
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
    is_last = arrived == count - 1
    BLOCK: tl.constexpr = COMBINED_AT_ONCE // first.shape[1] if first.shape[1] > 32 else 32
    first = tl.zeros_like(first)
    second = tl.zeros_like(second)
    for start in range(0, tl.where(is_last, count, 0), BLOCK):
        split = start + tl.arange(0, BLOCK)[:, None].to(tl.int64)
        theirs = partials + 2 * sizes.channels * split + channel.index
        mask = (split < count) & channel.mask
        one = tl.load(theirs, mask=mask, other=0.0, cache_modifier=".cg")
        two = tl.load(theirs + sizes.channels, mask=mask, other=0.0, cache_modifier=".cg")
        first += tl.sum(one, axis=0, keep_dims=True)
        second += tl.sum(two, axis=0, keep_dims=True)
    tl.store(arrivals, 0, mask=is_last)
    return first, second, is_last


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
    size, counters = _sizes(channels, blocks, splits)
    index = stream = None
    if input.is_cuda:
        index = input.device.index
        stream = driver.active.get_current_stream(index)
        if torch.cuda.is_current_stream_capturing():
            return _new_workspace(input, size, counters)
    partials, arrivals = _kept.get((index, stream), (None, None))
    if partials is None or arrivals is None or arrivals.numel() < counters:
        partials, arrivals = _new_workspace(input, MOST_KEPT, counters)
        _kept[index, stream] = partials, arrivals
    if size > MOST_KEPT:
        partials = input.new_empty(size, dtype=torch.float64)
    return partials, arrivals


@functools.lru_cache(maxsize=4096)
def _sizes(channels: int, blocks: int, splits: int) -> tuple[int, int]:
    """Partial sums and arrivals of a launch."""
    groups = triton.cdiv(splits, MEMBERS.value) if splits > 2 * MEMBERS.value else 1
    return 2 * (splits + groups) * channels, blocks * (groups + 1)


def _new_workspace(
    input: torch.Tensor, size: int, counters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    partials = input.new_empty(size, dtype=torch.float64)
    return partials, input.new_zeros(counters, dtype=torch.int32)
