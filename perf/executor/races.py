"""Races: two threads touch a byte, one of them writes, and nothing makes one come before the other.

What orders threads is a barrier of their program, or one of their warp if they share it; and across
programs an atomic operation with release and acquire: the program whose operation comes last may
read what the others wrote before theirs. Which of two threads happened to come first in this
execution plays no part, so a race is found in any order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import WARP, Access, Region, SharedMemory
from .parsing import PtxError


def check_races(region: Region, atomics: Sequence[Access], threads_of_program: int) -> None:
    """Raise PtxError for a race in a region. atomics: those of the whole kernel, in the order in
    which they were executed, one thread each.
    """
    if not region.did("store"):
        return
    rows = _Rows(region, threads_of_program)
    rows.check("threads of a warp", rows.thread, rows.warp, rows.warp_barriers)
    rows.check("warps of a program", rows.warp, rows.program, rows.barriers)
    if isinstance(region, SharedMemory):  # each program has its own
        return
    published, received = rows.around(atomics, threads_of_program)
    # Only what was published before an arrival and what the last to arrive does after it are in
    # order, so one of the two is left out in turn.
    rows.check("programs", rows.program, only=rows.plain & ~published)
    rows.check("programs", rows.program, only=rows.plain & ~received)


class _Rows:
    """A row for each byte of each access to a region."""

    def __init__(self, region: Region, threads_of_program: int) -> None:
        self._region = region
        accesses = region.accesses

        def column(values: list[Any]) -> NDArray[Any]:
            return np.concatenate(
                [
                    np.broadcast_to(np.asarray(value)[..., None], (len(a.threads), a.width)).ravel()
                    for value, a in zip(values, accesses, strict=True)
                ]
            )

        self.byte = column([a.offsets for a in accesses]) + np.concatenate(
            [np.tile(np.arange(a.width), len(a.threads)) for a in accesses]
        )
        self.access = column([[n] for n in range(len(accesses))])
        self.write = column([[a.kind != "load"] for a in accesses])
        self.plain = column([[a.kind != "atomic"] for a in accesses])
        self.stored = np.concatenate([a.stored.ravel() for a in accesses])
        self.step = column([[a.moment.step] for a in accesses])
        self.barriers = column([a.moment.barriers for a in accesses])
        self.warp_barriers = column([a.moment.warp_barriers for a in accesses])
        self.thread = column([a.threads for a in accesses])
        self.warp = self.thread // WARP
        self.program = self.thread // threads_of_program

    def check(
        self,
        who: str,
        identity: NDArray[np.int64],
        *groups: NDArray[np.int64],
        only: NDArray[np.bool_] | None = None,
    ) -> None:
        """Raise PtxError where several identities touch a byte within a group and one of them
        writes; unless all are atomic, or all write the same.
        """
        rows = np.arange(len(self.byte)) if only is None else np.flatnonzero(only)
        if not len(rows):
            return
        keys = [group[rows] for group in (*groups, self.byte)]
        order = np.lexsort(keys)
        rows = rows[order]
        differs = [np.diff(key[order]) != 0 for key in keys]
        starts = np.concatenate([[0], np.flatnonzero(np.logical_or.reduce(differs)) + 1])

        def differ(values: NDArray[Any]) -> NDArray[np.bool_]:
            return np.minimum.reduceat(values, starts) != np.maximum.reduceat(values, starts)

        written = np.logical_or.reduceat(self.write[rows], starts)
        plain = np.logical_or.reduceat(self.plain[rows], starts)
        harmful = differ(self.write[rows]) | differ(self.stored[rows])
        for start in starts[differ(identity[rows]) & written & plain & harmful][:1]:
            end = np.append(starts[starts > start], len(rows))[0]
            group = rows[start:end]
            accesses = {self._region.accesses[n].instruction for n in self.access[group]}
            lines = "; ".join(
                f"line {i.line}: {i.text}" for i in sorted(accesses, key=lambda i: i.line)
            )
            raise PtxError(
                f"a race of {who} at byte {self.byte[rows[start]]} of {self._region.name}: {lines}"
            )

    def around(
        self, atomics: Sequence[Access], threads_of_program: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which rows come before an atomic operation of their program, and which after one that was
        the last on its counter.
        """
        before, after = np.zeros((2, len(self.byte)), bool)
        last = {int(atomic.offsets[0]): number for number, atomic in enumerate(atomics)}
        for number, atomic in enumerate(atomics):
            thread, moment = atomic.threads[0], atomic.moment
            same_program = self.program == thread // threads_of_program
            same_warp, same_thread = self.warp == thread // WARP, self.thread == thread
            before |= (
                (same_program & (self.barriers < moment.barriers[0]))
                | (same_warp & (self.warp_barriers < moment.warp_barriers[0]))
                | (same_thread & (self.step < moment.step))
            )
            if last[int(atomic.offsets[0])] == number:
                after |= (
                    (same_program & (self.barriers > moment.barriers[0]))
                    | (same_warp & (self.warp_barriers > moment.warp_barriers[0]))
                    | (same_thread & (self.step > moment.step))
                )
        return before, after
