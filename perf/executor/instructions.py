"""Instructions that do more than compute: memory, other threads' registers, branches, barriers.

To add one, write a function that takes the machine, the instruction and what its pattern matched,
and returns what is done for some threads.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .memory import WARP, Region
from .opcodes import TYPES
from .parsing import Address, Instruction, Literal, Operand, PtxError, Vector

if TYPE_CHECKING:
    from .machine import Machine

Threads = NDArray[np.int64]
Action = Callable[[Threads], None]
Binder = Callable[["Machine", Instruction, re.Match[str]], Action]
OTHER: list[tuple[re.Pattern[str], Binder]] = []
CONTROL = ("bra", "bra.uni", "ret", "bar.sync")  # after these, threads may go different ways
MATRIX_ROW = 16  # bytes: ldmatrix and stmatrix move 8 x 8 numbers of 16 bits
ALL_LANES = (-1, 0xFFFFFFFF)
# What changes where data is cached, and nothing else.
_HINTS = r"(?:\.cg|\.L1::evict_first|\.L1::evict_last)?(\.L2::cache_hint)?"


@functools.cache
def find(opcode: str) -> tuple[Binder, re.Match[str]] | None:
    """What binds instructions of an opcode, and what its pattern matched; None where none does."""
    for pattern, binder in OTHER:
        if form := pattern.fullmatch(opcode):
            return binder, form
    return None


def _form(pattern: str) -> Callable[[Binder], Binder]:
    def enter(binder: Binder) -> Binder:
        OTHER.append((re.compile(pattern), binder))
        return binder

    return enter


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _locate(machine: Machine, space: str, operand: Operand, width: int) -> Callable[..., Any]:
    """Region and offsets that some threads access at an address."""
    if not isinstance(operand, Address):
        raise ValueError(f"expected an address, got {operand}")
    read = machine.reader(operand.base, "u64" if space == "global" else "u32")
    added = np.array([operand.offset % 2**64], np.uint64)

    def locate(threads: Threads) -> tuple[Region, NDArray[np.int64]]:
        addresses = np.broadcast_to(read(threads).astype(np.uint64) + added, threads.shape)
        if space == "global":
            return machine.memory.find(addresses, width)
        programs = threads // machine.kernel.threads
        return machine.shared, machine.shared.find(addresses.view(np.int64), width, programs)

    return locate


@_form(rf"ld\.(global|shared)(?:::cta)?{_HINTS}(?:\.v([248]))?\.([busf]\d+)")
def _load(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    space, hint, count, kind = form.groups()
    target, address, *policy = instruction.operands
    writers = [machine.writer(part, kind, wider=True) for part in _parts(target)]
    if len(writers) != int(count or 1) or len(policy) != bool(hint):
        raise ValueError("the number of operands")
    width = np.dtype(TYPES[kind]).itemsize
    locate = _locate(machine, space, address, width * len(writers))

    def load(threads: Threads) -> None:
        region, offsets = locate(threads)
        loaded = machine.load(region, threads, offsets, width * len(writers)).view(f"u{width}")
        for number, write in enumerate(writers):
            write(threads, np.ascontiguousarray(loaded[:, number]))

    return load


@_form(rf"st\.(global|shared)(?:::cta)?{_HINTS}(?:\.v([248]))?\.([busf]\d+)")
def _store(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    space, hint, count, kind = form.groups()
    address, source, *policy = instruction.operands
    readers = [machine.reader(part, kind, wider=True) for part in _parts(source)]
    if len(readers) != int(count or 1) or len(policy) != bool(hint):
        raise ValueError("the number of operands")
    width = np.dtype(TYPES[kind]).itemsize
    locate = _locate(machine, space, address, width * len(readers))

    def store(threads: Threads) -> None:
        region, offsets = locate(threads)
        parts = [np.broadcast_to(read(threads), threads.shape) for read in readers]
        machine.store(region, threads, offsets, np.stack(parts, axis=1).view(np.uint8))

    return store


@_form(r"ld\.param\.([busf]\d+)")
def _load_parameter(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    target, address = instruction.operands
    if not isinstance(address, Address) or address.offset or not isinstance(address.base, str):
        raise ValueError("a part of a parameter")
    write = machine.writer(target, form[1], wider=True)
    width = np.dtype(TYPES[form[1]]).itemsize
    value = np.array([machine.parameters[address.base] % 2 ** (8 * width)], f"u{width}")
    return lambda threads: write(threads, value)


@_form(r"atom\.global\.gpu\.acq_rel\.add\.(u32)")
def _atomic_add(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    target, address, operand = instruction.operands
    write = machine.writer(target, form[1])
    read = machine.reader(operand, form[1])
    width = np.dtype(TYPES[form[1]]).itemsize
    locate = _locate(machine, "global", address, width)

    def add(threads: Threads) -> None:
        region, offsets = locate(threads)
        values = np.broadcast_to(read(threads), threads.shape)
        write(threads, machine.add(region, threads, offsets, values))

    return add


@_form(r"createpolicy\.fractional\.L2::evict_first\.b64")
def _create_policy(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    write = machine.writer(instruction.operands[0], "b64")
    return lambda threads: write(threads, machine.garbage("b64", len(threads)))


@_form(r"mov\.(b32|b64)")
def _move(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    """Of registers, or of parts of one: the lowest bits come first."""
    kind = form[1]
    target, source = instruction.operands
    of_target = f"b{int(kind[1:]) // len(_parts(target))}"
    of_source = f"b{int(kind[1:]) // len(_parts(source))}"
    writers = [machine.writer(part, of_target) for part in _parts(target)]
    readers = [machine.reader(part, of_source) for part in _parts(source)]

    def move(threads: Threads) -> None:
        parts = [np.broadcast_to(read(threads), threads.shape) for read in readers]
        bits = np.stack(parts, axis=1).view(TYPES[of_target])
        for number, write in enumerate(writers):
            write(threads, np.ascontiguousarray(bits[:, number]))

    return move


@_form(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def _shuffle(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    """The specification's words, but that all lanes take part."""
    target, *sources, members = instruction.operands
    _check_members(members)
    write = machine.writer(target, "b32")
    values, other, clamp = (machine.reader(source, "b32") for source in sources)

    def shuffle(threads: Threads) -> None:
        lane = _whole_warps(threads) % WARP
        b, c = (
            np.broadcast_to(read(threads).astype(np.int64), threads.shape).reshape(lane.shape)
            for read in (other, clamp)
        )
        b, segment = b & 31, c >> 8 & 31
        last = (lane & segment) | (c & 31 & ~segment)
        source = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": (lane & segment) | (b & ~segment),
        }[form[1]]
        source = np.where(source >= last if form[1] == "up" else source <= last, source, lane)
        of_warps = np.broadcast_to(values(threads), threads.shape).reshape(lane.shape)
        write(threads, np.take_along_axis(of_warps, source, 1).ravel())

    return shuffle


@_form(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared(?:::cta)?\.b16")
def _matrix(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    """Lanes 8 m to 8 m + 7 name the rows of matrix m; lane n holds two numbers of row n / 4."""
    registers, address = instruction.operands[:: 1 if form[1] == "ld" else -1]
    lane = np.arange(WARP)
    readers = [machine.reader(part, "b32") for part in _parts(registers) if form[1] == "st"]
    writers = [machine.writer(part, "b32") for part in _parts(registers) if form[1] == "ld"]
    if len(_parts(registers)) != int(form[2]):
        raise ValueError("the number of operands")
    locate = _locate(machine, "shared", address, MATRIX_ROW)

    def move(threads: Threads) -> None:
        warps = _whole_warps(threads)
        for number in range(int(form[2])):
            naming = warps[:, 8 * number : 8 * number + 8].ravel()
            region, rows = locate(naming)
            offsets = (rows.reshape(-1, 8)[:, lane // 4] + lane % 4 * 4).ravel()
            if writers:
                loaded = machine.load(region, threads, offsets, 4)
                writers[number](threads, loaded.view(np.uint32)[:, 0])
            else:
                values = np.broadcast_to(readers[number](threads), threads.shape)
                machine.store(region, threads, offsets, values[:, None].copy().view(np.uint8))

    return move


@_form(r"bra(?:\.uni)?")
def _branch(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    (label,) = instruction.operands
    target = machine.kernel.labels[str(label)]

    def branch(threads: Threads) -> None:
        machine.next[threads] = target

    return branch


@_form(r"ret")
def _return(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    def leave(threads: Threads) -> None:
        machine.next[threads] = len(machine.kernel.instructions)

    return leave


@_form(r"bar\.sync")
def _barrier(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    if instruction.operands != (Literal(0),):
        raise ValueError("another barrier than that of all threads")
    return machine.wait


@_form(r"bar\.warp\.sync")
def _warp_barrier(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Action:
    _check_members(*instruction.operands)

    def wait(threads: Threads) -> None:
        _whole_warps(threads)
        machine.wait_in_warp(threads)

    return wait


def _check_members(members: Operand) -> None:
    if not isinstance(members, Literal) or members.bits not in ALL_LANES:
        raise ValueError("members of a warp that are not all")


def _whole_warps(threads: Threads) -> NDArray[np.int64]:
    """The threads, [warps, 32]."""
    if len(threads) % WARP == 0:
        warps = threads.reshape(-1, WARP)
        if (warps == warps[:, :1] // WARP * WARP + np.arange(WARP)).all():
            return warps
    raise PtxError("only a part of a warp comes here")
