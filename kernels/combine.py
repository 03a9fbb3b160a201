"""Add up the sums of programs that share a channel, in the same launch and in a fixed order."""

import torch
import triton
import triton.language as tl
from triton.runtime import driver

COMBINED_AT_ONCE = tl.constexpr(1024)  # partial sums that one program reads in a step


@triton.jit
def add_splits(
    first,
    second,
    partials,
    arrivals,
    block,
    channel,
    mask,
    channels,
    split,
    splits,
    SPLIT: tl.constexpr,
):
    """Leave this program's two sums a channel; the program that comes last adds those of all.

    first, second: float64 [1, K]. partials: float64 [splits, 2, channels]. arrivals: int32, one a
    block of channels, 0 between launches. Returns the totals, and whether this program holds them.
    """
    if SPLIT:
        mine = partials + 2 * split.to(tl.int64) * channels
        tl.store(mine + channel, first, mask=mask)
        tl.store(mine + channels + channel, second, mask=mask)
        tl.debug_barrier()  # every thread's stores come before the arrival that publishes them
        last = tl.atomic_add(arrivals + block, 1, sem="acq_rel") == splits - 1
        BLOCK: tl.constexpr = COMBINED_AT_ONCE // first.shape[1] if first.shape[1] > 8 else 128
        first = tl.zeros_like(first)
        second = tl.zeros_like(second)
        for start in range(0, tl.where(last, splits, 0), BLOCK):
            index = start + tl.arange(0, BLOCK)[:, None].to(tl.int64)
            theirs = partials + 2 * index * channels + channel
            present = (index < splits) & mask
            one = tl.load(theirs, mask=present, other=0.0, cache_modifier=".cg")
            two = tl.load(theirs + channels, mask=present, other=0.0, cache_modifier=".cg")
            first += tl.sum(one, axis=0, keep_dims=True)
            second += tl.sum(two, axis=0, keep_dims=True)
        tl.store(arrivals + block, 0, mask=last)
    else:
        last = split == 0
    return first, second, last


_arrivals: dict[tuple[int | None, int], torch.Tensor] = {}


def workspace(
    input: torch.Tensor, channels: int, blocks: int, splits: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The `partials` and `arrivals` of one launch, or None and None where no channel is shared.

    Launches on one stream run one after the other and leave `arrivals` at zero, so a stream keeps
    one tensor. A launch that is captured in a CUDA graph may be replayed beside others and gets its
    own, zeroed within the graph.
    """
    if splits == 1:
        return None, None
    partials = torch.empty((splits, 2, channels), dtype=torch.float64, device=input.device)
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        return partials, torch.zeros(blocks, dtype=torch.int32, device=input.device)
    index = input.device.index
    key = index, driver.active.get_current_stream(index) if input.is_cuda else 0
    arrivals = _arrivals.get(key)
    if arrivals is None or arrivals.numel() < blocks:
        arrivals = torch.zeros(blocks, dtype=torch.int32, device=input.device)
        _arrivals[key] = arrivals
    return partials, arrivals
