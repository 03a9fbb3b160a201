"""Memory for the steps on a CPU: blocks of samples that a cache holds, and buffers that a thread
keeps, as fresh pages cost more than the arithmetic.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements of a block of samples: 4 MiB of float32, which a shared cache holds
LARGEST_KEPT = 4 * BLOCK  # elements of a buffer that a thread keeps
_kept = threading.local()  # the buffers of a thread, which is in one step at a time


def wide(map: Tensor, dtype: torch.dtype, shift: Tensor | None = None, index: int = 0) -> Tensor:
    """A map, less a shift of each channel, in the precision of the arithmetic."""
    if shift is None and (map.dtype == dtype or dtype == torch.float64):
        return map.to(dtype)
    memory = buffer(map, dtype, index)
    if shift is None:
        return memory.copy_(map)
    shift = shift.view(-1, *[1] * (map.dim() - 2))
    if map.dtype == dtype:
        return torch.sub(map, shift, out=memory)
    return memory.copy_(map).sub_(shift)


def buffer(map: Tensor, dtype: torch.dtype, index: int = 0) -> Tensor:
    """Memory for a map, with whatever is in it."""
    kept: dict[Any, Tensor | None] = vars(_kept)
    memory, elements = kept.get((dtype, index)), map.numel()
    if memory is None or memory.numel() < elements:
        with torch.inference_mode(False):  # in which it may be made, and not be used afterwards
            memory = torch.empty(elements, dtype=dtype, device="cpu")
        kept[dtype, index] = memory if elements <= LARGEST_KEPT else None
    return memory.as_strided(map.shape, map.stride())


def blocks(input: Tensor, *others: Tensor | None) -> Iterable[Sequence[Any]]:
    """Some samples of each map at a time."""
    maps = [input, *(input if map is None else map for map in others)]
    samples, elements = input.shape[0], input.numel()
    if elements <= BLOCK or samples == 1:
        return (maps,) if elements else ()
    return zip(*(map.split(max(BLOCK * samples // elements, 1)) for map in maps), strict=True)
