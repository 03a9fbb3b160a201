"""The machine: all threads of a grid, side by side, each register an array with a value a thread.

Threads that took different branches wait at the smallest block; so those that part meet again where
their ways do. In step, all programs go together; else, warps run ahead of each other at random.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from . import instructions
from .memory import SHARED_BASE, WARP, Access, GlobalMemory, Moment, Region, SharedMemory
from .opcodes import OPCODES, TYPES, Array
from .parsing import SHARED_SYMBOL, Instruction, Kernel, Literal, Operand, PtxError, Register

Threads = NDArray[np.int64]  # numbers of threads of the grid, ascending
MIXER = np.uint64(0x9E3779B97F4A7C15)  # makes of a number one that looks random (Knuth, 6.4)
MOST_STEPS = 2_000_000  # instructions of a launch; more is a loop that does not end
BURST = 8  # blocks that the warps which were chosen run before others are, on average


class Machine:
    """A launch of a kernel.

    parameters: the bits of each argument. seed: of the order of warps and of what approximate
    instructions are put off by; None: in step, and as exact as their type.
    """

    def __init__(
        self,
        kernel: Kernel,
        programs: int,
        parameters: list[int],
        memory: GlobalMemory,
        shared_bytes: int,
        seed: int | None = None,
    ) -> None:
        self.kernel = kernel
        self.memory = memory
        self.in_step = seed is None
        self.random = np.random.default_rng(seed or 0)
        self.size = programs * kernel.threads
        self.shared = SharedMemory(programs, shared_bytes, self.random)
        self.registers = {
            name: self.garbage("pred" if bits == 1 else f"b{bits}")
            for name, bits in kernel.registers.items()
        }
        thread = np.arange(self.size)
        self.registers["%tid.x"] = (thread % kernel.threads).astype(np.uint32)
        self.registers["%ctaid.x"] = (thread // kernel.threads).astype(np.uint32)
        self.parameters = dict(zip(kernel.parameters, parameters, strict=True))
        self.executed = np.zeros(len(kernel.instructions), np.int64)  # times, by a thread
        self.atomics: list[Access] = []  # of one thread each, in order
        self.next = np.zeros(self.size, np.int64)  # the instruction where each thread is
        self._waiting = np.zeros(self.size, bool)
        self._barriers = np.zeros(self.size, np.int64)
        self._warp_barriers = np.zeros(self.size, np.int64)
        self._favoured = np.zeros(self.size, bool)
        self._salt = self.random.integers(2**63, dtype=np.uint64)
        self._step = 0
        self._running = kernel.instructions[0]
        self._actions = [self._bind(instruction) for instruction in kernel.instructions]
        control = [n for n, i in enumerate(kernel.instructions) if i.opcode in instructions.CONTROL]
        ends = {*control, *(target - 1 for target in kernel.targets)}
        self._ends = sorted(ends)

    def run(self) -> None:
        """Run all programs to their end."""
        end = len(self.kernel.instructions)
        with np.errstate(all="ignore"):
            while len(ready := np.flatnonzero(~self._waiting & (self.next < end))):
                ready = self._choose(ready)
                start = self.next[ready].min()
                if self._step > MOST_STEPS:
                    line = self.kernel.instructions[start].line
                    raise PtxError(f"line {line}: no end after {MOST_STEPS} instructions")
                self._run_block(start, ready[self.next[ready] == start])
        self._actions.clear()  # they know the machine, which so is gone as soon as nobody needs it
        if self._waiting.any():
            barrier = self.kernel.instructions[self.next[self._waiting].min() - 1]
            raise PtxError(f"line {barrier.line}: {barrier.text}: not all threads come here")

    def garbage(self, kind: str, size: int | None = None) -> Array:
        """Random bits: what is in a register before anything was written there."""
        size = self.size if size is None else size
        width = np.dtype(TYPES[kind]).itemsize
        bits = np.frombuffer(self.random.bytes(size * width), f"u{width}").copy()
        return bits & 1 == 1 if kind == "pred" else bits

    def _choose(self, ready: Threads) -> Threads:
        """Those of the threads that run now: all, or those of some warps."""
        if self.in_step:
            return ready
        if self.random.random() < 1 / BURST or not self._favoured[ready].any():
            warps = self.random.random(self.size // WARP) < self.random.random()
            self._favoured = np.repeat(warps, WARP)
        chosen = ready[self._favoured[ready]]
        return chosen if len(chosen) else ready

    def _run_block(self, start: int, threads: Threads) -> None:
        """From an instruction to the next branch, barrier or label."""
        end = self._ends[np.searchsorted(self._ends, start)]
        for index in range(start, end + 1):
            instruction = self.kernel.instructions[index]
            running = threads
            if instruction.guard:
                guard = self.registers[instruction.guard.name][threads]
                running = threads[guard != instruction.negated]
            if index == end:
                self.next[threads] = end + 1
            self.executed[index] += len(running)
            self._step += 1
            self._running = instruction
            if len(running):
                try:
                    self._actions[index](running)
                except PtxError as error:
                    where = f"line {instruction.line}: {instruction.text}"
                    raise PtxError(f"{where}: {error}") from None

    def _bind(self, instruction: Instruction) -> Callable[[Threads], None]:
        """The function that executes an instruction, for some threads."""
        try:
            if found := instructions.find(instruction.opcode):
                bind, form = found
                return bind(self, instruction, form)
            return self._bind_arithmetic(instruction)
        except (KeyError, ValueError, PtxError) as error:
            where = f"line {instruction.line}: {instruction.text}"
            raise PtxError(f"{where}: an instruction that is not known ({error!r})") from error

    def _bind_arithmetic(self, instruction: Instruction) -> Callable[[Threads], None]:
        opcode = OPCODES[instruction.opcode]
        target, *sources = instruction.operands
        converts = instruction.opcode.startswith("cvt.")
        write = self.writer(target, opcode.result, wider=converts)
        read = [
            self.reader(source, kind, wider=converts)
            for source, kind in zip(sources, opcode.operands, strict=True)
        ]
        put_off = 0 if self.in_step else opcode.approximate

        def compute(threads: Threads) -> None:
            result = opcode.function(*[operand(threads) for operand in read])
            write(threads, self._put_off(result, put_off) if put_off else result)

        return compute

    def _put_off(self, values: Array, most: int) -> Array:
        """Up to so many units in the last place away, the same for equal values; not what is 0,
        infinite or near to either.
        """
        limits = np.finfo(values.dtype)
        far = (np.abs(values) > 4 * limits.tiny) & (np.abs(values) < limits.max / 4)
        bits = values.view(f"i{values.itemsize}")
        mixed = (bits.astype(np.uint64) + self._salt) * MIXER >> np.uint64(40)
        units = (mixed % np.uint64(2 * most + 1)).astype(bits.dtype) - bits.dtype.type(most)
        return np.where(far, bits + units, bits).view(values.dtype)

    def reader(
        self, operand: Operand, kind: str, wider: bool = False
    ) -> Callable[[Threads], Array]:
        """The values that an operand has for some threads; a constant is an array of one. wider:
        the register may be, and its lower bits count.
        """
        dtype = np.dtype(TYPES[kind])
        if operand == SHARED_SYMBOL:
            operand = Literal(SHARED_BASE)
        if isinstance(operand, Literal):
            width = 8 * dtype.itemsize
            if operand.width not in (None, width):
                raise ValueError(f"a number of {operand.width} bits as {kind}")
            if kind == "pred":
                constant = np.array([operand.bits != 0])
            else:
                bits = operand.bits % (1 << width)
                constant = np.array([bits], f"u{dtype.itemsize}").view(dtype)
            return lambda threads: constant
        if not isinstance(operand, Register):
            raise ValueError(f"{operand} as a value")
        values = self.registers[operand.name]
        if values.dtype.itemsize == dtype.itemsize:
            return lambda threads: values[threads].view(dtype)
        narrow = np.dtype(f"u{dtype.itemsize}")
        if not wider or values.dtype.itemsize < dtype.itemsize or kind == "pred":
            raise ValueError(f"{operand.name} as {kind}")
        return lambda threads: values[threads].astype(narrow).view(dtype)

    def writer(
        self, operand: Operand, kind: str, wider: bool = False
    ) -> Callable[[Threads, Array], None]:
        """Write values, for some threads, to a register. wider: the register may be, and the values
        are extended, by their sign if they have one.
        """
        if not isinstance(operand, Register):
            raise ValueError(f"{operand} as a register")
        if operand.name == "_":
            return lambda threads, values: None
        target = self.registers[operand.name]
        dtype = np.dtype(TYPES[kind])
        to_predicate = target.dtype == np.bool_
        too_wide = target.dtype.itemsize > dtype.itemsize and not wider
        if too_wide or target.dtype.itemsize < dtype.itemsize or to_predicate != (kind == "pred"):
            raise ValueError(f"{kind} to {operand.name}")
        wide = np.dtype(f"{dtype.kind if dtype.kind in 'iu' else 'u'}{target.itemsize}")

        def write(threads: Threads, values: Array) -> None:
            assert values.itemsize == dtype.itemsize, f"{values.dtype} as {kind}"
            if dtype.itemsize < target.itemsize:
                values = values.view(dtype).astype(wide)
            target[threads] = values.view(target.dtype)

        return write

    def load(
        self, region: Region, threads: Threads, offsets: NDArray[np.int64], width: int
    ) -> NDArray[np.uint8]:
        """The bytes that each thread loads from an offset of its own, [threads, width]."""
        self._record(region, "load", threads, offsets, np.zeros((len(threads), width), np.uint8))
        return region.load(offsets, width)

    def store(
        self,
        region: Region,
        threads: Threads,
        offsets: NDArray[np.int64],
        content: NDArray[np.uint8],
    ) -> None:
        """Store bytes, [threads, width]."""
        self._record(region, "store", threads, offsets, content)
        region.store(offsets, content)

    def add(
        self,
        region: Region,
        threads: Threads,
        offsets: NDArray[np.int64],
        values: Array,
    ) -> Array:
        """Add to memory, one thread after the other; what each found there."""
        old = np.empty_like(values)
        order = range(len(threads))
        for index in order if self.in_step else self.random.permutation(order):
            one = slice(index, index + 1)
            old[one] = region.load(offsets[one], values.itemsize).view(values.dtype)[:, 0]
            content = (old[one] + values[one]).view(np.uint8)[None]
            region.store(offsets[one], content)
            self.atomics.append(self._record(region, "atomic", threads[one], offsets[one], content))
        return old

    def _record(
        self,
        region: Region,
        kind: str,
        threads: Threads,
        offsets: NDArray[np.int64],
        content: NDArray[np.uint8],
    ) -> Access:
        moment = Moment(self._barriers[threads], self._warp_barriers[threads], self._step)
        access = Access(self._running, kind, content.shape[1], threads, offsets, moment, content)
        region.accesses.append(access)
        return access

    def wait(self, threads: Threads) -> None:
        """Threads come to a barrier; programs of which all threads have come go on."""
        self._waiting[threads] = True
        waiting = self._waiting.reshape(-1, self.kernel.threads)
        where = self.next.reshape(waiting.shape)
        complete = waiting.all(1)
        if (where != where[:, :1])[complete].any():
            raise PtxError("threads of a program wait at different barriers")
        going_on = np.repeat(complete, self.kernel.threads)
        self._waiting &= ~going_on
        self._barriers += going_on
        self._warp_barriers += going_on

    def wait_in_warp(self, threads: Threads) -> None:
        """Threads that share a warp come to a barrier."""
        self._warp_barriers[threads] += 1
