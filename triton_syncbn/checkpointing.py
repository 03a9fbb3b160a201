"""Activation checkpointing without a second all_reduce: a forward that is computed again takes the
sums over the ranks that it had.
"""

import threading
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts


class _ThisThread(threading.local):
    """The checkpointed regions that the thread is in, outermost first."""

    regions: tuple["_Region", ...] = ()


this_thread = _ThisThread()


class _Region:
    """A block of code whose layers keep their sums or, if `again`, take those that were kept."""

    def __init__(self, sums: list[tuple[str, Tensor]], again: bool) -> None:
        self.sums = sums  # of each forward in the region, in order, with the name of its layer
        self.again = again
        self.position = 0

    def __enter__(self) -> None:
        self.position = 0  # a graph that is retained is computed again for each backward
        this_thread.regions += (self,)

    def __exit__(self, *error: Any) -> None:
        this_thread.regions = this_thread.regions[:-1]

    def take(self, layer_name: str) -> Tensor:
        name, sums = ("none", None)
        if self.position < len(self.sums):
            name, sums = self.sums[self.position]
        if sums is None or name != layer_name:
            raise RuntimeError(
                "checkpoint_contexts: expected the layers of a checkpointed region in the order of "
                f"its first forward; number {self.position} was {name!r}, is {layer_name!r}"
            )
        self.position += 1
        return sums


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint` with which SyncBN communicates once.

        checkpoint(block, input, use_reentrant=False, context_fn=checkpoint_contexts)

    A layer in `block` then keeps the sums over all ranks from its forward, 2C + 1 float64 numbers,
    for the forward that is computed again in backward, which sends nothing. Without it the second
    forward sends what the first one did. Either way the result is the same, to the last bit, and
    running statistics move once. In a graph that torch.compile makes of the whole, the sums are
    kept as well; a compiled graph inside of `block` is not looked into, and sends again.

    Raises RuntimeError in backward where the layers of the block come in another order the second
    time.
    """
    # As torch's checkpoint asks, which in a graph takes no contexts but of this kind; in torch 2.11
    # is_compiling() is not true there.
    proxy = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    if proxy is not None or torch.compiler.is_compiling():
        return create_selective_checkpoint_contexts(
            [
                torch.ops._c10d_functional.all_reduce.default,
                torch.ops._c10d_functional.wait_tensor.default,
            ]
        )
    sums: list[tuple[str, Tensor]] = []
    return _Region(sums, again=False), _Region(sums, again=True)


def take_sums(layer_name: str) -> Tensor | None:
    """The sums of this forward if it is computed again in a region that kept them."""
    sums = None
    for region in this_thread.regions:
        if region.again:
            sums = region.take(layer_name)
    return sums


def keep_sums(sums: Tensor, layer_name: str) -> None:
    """Keep the sums of this forward in the regions that are computed for the first time."""
    for region in this_thread.regions:
        if not region.again:
            region.sums.append((layer_name, sums))
