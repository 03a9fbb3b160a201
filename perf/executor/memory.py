"""Memory that an executed kernel sees: tensors at addresses of their own, shared memory of each
program, and an account of who touched what.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .parsing import Instruction, PtxError

ALIGNMENT = 512  # bytes: where torch's allocator begins a tensor on a GPU
GUARD = 1 << 16  # bytes between two tensors, at least
BASE = 0x7F00_0000_0000  # so that an address that lost its upper half points nowhere
SHARED_BASE = 1 << 10  # address of the shared memory of each program
WARP = 32


class Moment(NamedTuple):
    """How far each of some threads has come: barriers of its program, and of its warp or program,
    that it has passed, and the number of the instruction in the execution as a whole.
    """

    barriers: NDArray[np.int64]
    warp_barriers: NDArray[np.int64]
    step: int


class Access(NamedTuple):
    """One instruction that loads or stores `width` bytes for each of some threads."""

    instruction: Instruction
    kind: str  # "load", "store" or "atomic"
    width: int
    threads: NDArray[np.int64]  # of the whole grid
    offsets: NDArray[np.int64]  # in the tensor, or in the shared memory of the program
    moment: Moment
    stored: NDArray[np.uint8]  # the bytes, [threads, width]; of loads, zeros


class Region:
    """Bytes that are accessed, and the accesses."""

    def __init__(self, name: str, content: NDArray[np.uint8]) -> None:
        self.name = name
        self.content = content
        self.accesses: list[Access] = []

    def did(self, kind: str) -> bool:
        """Whether there was a "load", "store" or "atomic"."""
        return any(access.kind == kind for access in self.accesses)

    @property
    def is_output(self) -> bool:
        """Whether it was stored to and not read."""
        return self.did("store") and not (self.did("load") or self.did("atomic"))

    def load(self, offsets: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
        """The bytes from each of the offsets on, [offsets, width]."""
        return self.content[offsets[:, None] + np.arange(width)]

    def store(self, offsets: NDArray[np.int64], content: NDArray[np.uint8]) -> None:
        """Store bytes, [offsets, width]; of two to the same place, the last."""
        self.content[offsets[:, None] + np.arange(content.shape[1])] = content

    def check_stored_once(self) -> None:
        """Raise PtxError unless each byte was stored exactly once."""
        times = np.zeros(len(self.content), np.uint32)
        for access in self.accesses:
            if access.kind == "store":
                np.add.at(times, access.offsets[:, None] + np.arange(access.width), 1)
        for what, wrong in (("never", times == 0), ("more than once", times > 1)):
            if wrong.any():
                first, count = int(np.argmax(wrong)), np.count_nonzero(wrong)
                raise PtxError(
                    f"{self.name}: {count} of {times.size} bytes stored {what}, from {first} on"
                )


class GlobalMemory:
    """Tensors at random addresses with gaps between them. What is stored is in the tensor."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._end = BASE
        self._tensors: dict[tuple[int, int], tuple[int, Region]] = {}  # by place: base and content

    @property
    def regions(self) -> list[Region]:
        """One for each tensor."""
        return [region for _, region in self._tensors.values()]

    def place(self, name: str, tensor: torch.Tensor) -> int:
        """The address of a tensor, as far from a multiple of 16 as it is on the CPU."""
        size = tensor.numel() * tensor.element_size()
        key = tensor.data_ptr(), size
        if key not in self._tensors:
            start = tensor.storage_offset() * tensor.element_size()
            bytes_ = torch.empty(0, dtype=torch.uint8).set_(
                tensor.untyped_storage(), start, (size,), (1,)
            )
            gap = GUARD + ALIGNMENT * int(self._random.integers(1 << 12))
            base = -(-(self._end + gap) // ALIGNMENT) * ALIGNMENT + key[0] % 16
            self._end = base + size
            self._tensors[key] = base, Region(name, bytes_.numpy())
        return self._tensors[key][0]

    def region(self, tensor: torch.Tensor) -> Region:
        """What became of a tensor that was placed."""
        return self._tensors[tensor.data_ptr(), tensor.numel() * tensor.element_size()][1]

    def find(self, addresses: NDArray[np.uint64], width: int) -> tuple[Region, NDArray[np.int64]]:
        """The tensor that all of some accesses lie in, and their offsets there."""
        if (addresses % np.uint64(width)).any():
            raise PtxError(f"an address is no multiple of {width}")
        for base, region in self._tensors.values():
            offsets = (addresses - np.uint64(base)).view(np.int64)
            inside = (offsets >= 0) & (offsets <= len(region.content) - width)
            if inside.all():
                return region, offsets
            if inside.any():
                wrong = addresses[~inside][0]
                raise PtxError(
                    f"{hex(wrong)}: {width} bytes outside of {region.name} at {hex(base)}"
                )
        raise PtxError(f"{hex(addresses[0])}: {width} bytes outside of every tensor")


class SharedMemory(Region):
    """The shared memory of all programs, one after the other, with garbage in it."""

    def __init__(self, programs: int, size: int, random: np.random.Generator) -> None:
        super().__init__("shared memory", random.integers(0, 256, programs * size, np.uint8))
        self.size = size

    def find(
        self, addresses: NDArray[np.int64], width: int, programs: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Offsets of accesses by threads of the programs."""
        if (addresses % width).any():
            raise PtxError(f"an address in shared memory is no multiple of {width}")
        offsets = addresses - SHARED_BASE
        if ((offsets < 0) | (offsets > self.size - width)).any():
            raise PtxError(f"an access outside of the {self.size} bytes of shared memory")
        return offsets + programs * self.size
