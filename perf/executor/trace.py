"""What an executed kernel would have cost: instructions, memory transactions, bank conflicts.

Memory is moved in sectors of 32 bytes. A load or store by a warp is one request; it takes as many
sectors as its threads touch. Shared memory has 32 banks, 4 bytes wide, each of which serves one
word at a time (CUDA C++ Programming Guide, "Maximize Memory Throughput").
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .memory import WARP, Region

SECTOR = 32
BANKS, BANK_BYTES = 32, 4


class Passes(NamedTuple):
    """Over the banks, for all requests; and the least that would have done."""

    taken: int
    least: int


def sectors(region: Region) -> int:
    """Sectors of global memory that all requests take."""
    taken = 0
    for access in region.accesses:
        first = access.offsets // SECTOR
        span = -(-access.width // SECTOR)  # aligned: what is narrower lies in one
        warps = np.repeat(access.threads // WARP, span)
        taken += _unique(warps, (first[:, None] + np.arange(span)).ravel()).shape[1]
    return taken


def bank_conflicts(shared: Region) -> Passes:
    """Of shared memory."""
    taken = least = 0
    for access in shared.accesses:
        words = max(access.width // BANK_BYTES, 1)
        lanes_at_once = WARP // words  # wide accesses go by halves and quarters of a warp
        warp = access.threads // WARP
        part = warp * words + access.threads % WARP // lanes_at_once
        word = access.offsets[:, None] // BANK_BYTES + np.arange(words)
        parts, addresses = _unique(np.repeat(part, words), word.ravel())
        banks, passes = np.unique(parts * BANKS + addresses % BANKS, return_counts=True)
        starts = np.flatnonzero(np.diff(banks // BANKS, prepend=-1))
        taken += int(np.maximum.reduceat(passes, starts).sum())
        least += len(starts)
    return Passes(taken, least)


def _unique(*columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Different rows of a table, given and returned by columns."""
    return np.unique(np.stack(columns), axis=1)
