"""Memory for the steps on a CPU: blocks of samples that a cache holds, and buffers that a thread
keeps, as fresh pages cost more than the arithmetic.
"""

import itertools
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements of a block of samples: 4 MiB of float32, which a shared cache holds
LARGEST_KEPT = 4 * BLOCK  # elements of a buffer that a thread keeps
_kept = threading.local()  # the buffers of a thread, which is in one step at a time
_constants: dict[tuple[float, torch.dtype], Tensor] = {}


def wide(
    map: Tensor,
    dtype: torch.dtype,
    shift: Tensor | None = None,
    index: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """A map, less a shift of each channel, in the precision of the arithmetic; in a buffer or, if
    something is taken off, in `out`.
    """
    if shift is None:
        return map if map.dtype == dtype else buffer(map, dtype, index).copy_(map)
    shift = shift.view(-1, *[1] * (map.dim() - 2))
    memory = buffer(map, dtype, index) if out is None else out
    if map.dtype == dtype:
        return torch.sub(map, shift, out=memory)
    return memory.copy_(map).sub_(shift)


def buffer(map: Tensor, dtype: torch.dtype, index: int = 0) -> Tensor:
    """Memory for a map, with whatever is in it."""
    kept: dict[Any, Any] = vars(_kept)
    size, strides, elements = map.shape, map.stride(), map.numel()
    view, capacity = kept.get((dtype, index), (None, -1))
    if view is not None and view.shape == size and view.stride() == strides:
        return view
    with torch.inference_mode(False):  # in which it may be made, and not be used afterwards
        if capacity < elements:
            view, capacity = torch.empty(elements, dtype=dtype, device="cpu"), elements
        view = view.as_strided(size, strides, 0)
    if elements <= LARGEST_KEPT:
        kept[dtype, index] = view, capacity
    return view


def blocks(input: Tensor, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """Some samples of each map at a time, or None for each."""
    samples, elements = input.shape[0], input.numel()
    if elements <= BLOCK or samples == 1:
        return ((input, *others),) if elements else ()
    size = max(BLOCK * samples // elements, 1)
    return zip(
        *(itertools.repeat(None) if map is None else map.split(size) for map in (input, *others)),
        strict=False,  # as nothing can be repeated without an end
    )


def constant(size: int, value: float, dtype: torch.dtype) -> Tensor:
    """So many times a value, in memory that nobody changes, and that all sizes share."""
    kept = _constants.get((value, dtype))
    with torch.inference_mode(False):
        if kept is None or kept.numel() < size:
            size_kept = max(size, 0 if kept is None else 2 * kept.numel())
            kept = torch.full((size_kept,), value, dtype=dtype, device="cpu")
            _constants[value, dtype] = kept
        return kept[:size]
