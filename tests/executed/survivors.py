"""Why a change of a compiled kernel was not noticed: what can be checked of it.

The kernel is executed with and without the change, and what the changed instruction leaves in its
registers is compared, thread by thread.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from executor import instructions
from executor.machine import Machine, Threads
from executor.opcodes import FLOATS, OPCODES, TYPES
from executor.parsing import Instruction, Kernel, PtxError, Register, Vector
from numpy.typing import NDArray

from .mutations import Mutation, spliced
from .variants import Variant, run

WITHOUT_RESULT = ("st.", "bra", "bar.", "ret")
DRAWN = 4096  # operands of each of two opcodes that are compared
SPECIAL = (0, 1, 2, 31, 32, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


def _watching(machine: Machine, instruction: Instruction, form: re.Match[str]) -> Callable:
    (watch,) = instruction.operands
    return functools.partial(watch, machine)


instructions.OTHER.append((re.compile("watch"), _watching))


class Watch:
    """An instruction that notes what registers hold; `garbage`: for each time, the threads in which
    they hold garbage afterwards.
    """

    def __init__(
        self, registers: Sequence[str], garbage: Sequence[NDArray[np.bool_]] | None = None
    ) -> None:
        self.registers = registers
        self.garbage = garbage
        self.threads: list[Threads] = []
        self.values: list[list[NDArray]] = []

    def __call__(self, machine: Machine, threads: Threads) -> None:
        self.threads.append(threads)
        self.values.append([machine.registers[name][threads] for name in self.registers])
        if self.garbage is not None:
            where = threads[self.garbage[len(self.threads) - 1]]
            for name in self.registers:
                bits = machine.kernel.registers[name]
                kind = "pred" if bits == 1 else f"b{bits}"
                machine.registers[name][where] = machine.garbage(kind, len(where))

    @property
    def instruction(self) -> Instruction:
        """What to put into a kernel."""
        return Instruction(0, "watch", None, False, "watch", (self,))


class Execution(NamedTuple):
    """Of a kernel with or without a change: what was noticed, and what it left."""

    noticed: str
    error: float  # the largest, in units of what is allowed
    outputs: list[bytes]
    instructions: int  # executed, by a thread


def execute(
    variant: Variant,
    like: Variant,
    capability: int,
    seed: int | None,
    name: str,
    change: Callable[[Kernel], Kernel] | None,
) -> Execution:
    """Execute one kernel of a variant, launched like another, and look at what it wrote."""
    try:
        errors, (launch,) = run(variant, capability, seed, name, change, like=like)
    except PtxError as error:
        return Execution(str(error), np.inf, [], 0)
    wrong = [f"{e.what}: {e.error:.3g}" for e in errors if not e.error <= 1]
    machine = launch.machine
    outputs = [r.content.tobytes() for r in machine.memory.regions if not r.did("atomic")]
    return Execution(
        ", ".join(wrong),
        max((e.error for e in errors), default=0.0),
        outputs,
        int(machine.executed.sum()),
    )


def explain(
    variants: Sequence[Variant], capability: int, name: str, kernel: Kernel, mutation: Mutation
) -> str:
    """Why variants, whose kernel is the same, do not notice a change of it."""
    old = kernel.instructions[mutation.index]
    registers = sorted({*_results(old), *_results(mutation.instruction)})
    sources = [part.name for part in old.operands[1:] if isinstance(part, Register)]
    seen = ran = different = more = 0
    errors, identical = [], True
    largest, not_read = 0.0, True
    ranges = dict[str, list[int | float]]()
    for variant in variants:
        before, first, second = Watch(sources), Watch(registers), Watch(registers)
        at = mutation.index
        watched = (before.instruction, old, first.instruction)
        changed = (*watched[:1], *filter(None, [mutation.instruction]), second.instruction)
        execution = functools.partial(execute, variant, variants[0], capability, None, name)
        plain = execution(lambda k, w=watched, at=at: spliced(k, at, *w))
        other = execution(lambda k, at=at, c=changed: spliced(k, at, *c))
        assert not plain.noticed
        errors.append(other.error)
        identical &= plain.outputs == other.outputs
        more += other.instructions - plain.instructions
        _widen(ranges, old, sources, before)
        places = [t.tolist() for t in first.threads]
        if places != [t.tolist() for t in second.threads]:
            return _of_outputs("another way through the kernel", identical, errors, more)
        masks = (
            [
                np.logical_or.reduce([_bits(a) != _bits(b) for a, b in zip(*pair, strict=True)])
                for pair in zip(first.values, second.values, strict=True)
            ]
            if registers
            else []
        )
        seen += sum(map(len, masks))
        ran += sum(len(threads) for threads in first.threads)
        different += sum(int(mask.sum()) for mask in masks)
        largest = max(largest, _apart(old.opcode, first.values, second.values))
        if any(mask.any() for mask in masks) and not_read:
            garbage = Watch(registers, masks)
            spoilt = (old, garbage.instruction)
            not_read &= not execution(lambda k, s=spoilt, at=at: spliced(k, at, *s)).noticed
    if not ran:
        return "never executed: no thread comes here"
    if not registers:
        return _of_outputs("no result in a register", identical, errors, more)
    if not different:
        if mutation.instruction and same_function(old, mutation.instruction):
            return "equivalent: the two opcodes give the same of any operands"
        return f"equal here: the same in all {seen} results" + _of_ranges(ranges)
    if not_read:
        where = f"{different} of {seen} results"
        if _is_policy(kernel, registers):
            return f"a hint: {where} differ, and only policies of caches are made of them"
        return f"not read: {where} differ, and garbage in their place is not noticed either"
    by = f" by {largest:.2g} at most" if largest else ""
    what = f"small: {different} of {seen} results differ{by}"
    return _of_outputs(what, identical, errors, more)


def _apart(opcode: str, first: list[list[NDArray]], second: list[list[NDArray]]) -> float:
    """How far numbers that an opcode computes are apart, at most; 0 where they are not floats."""
    if opcode not in OPCODES or OPCODES[opcode].result not in FLOATS:
        return 0.0
    kind = TYPES[OPCODES[opcode].result]
    return max(
        float(np.abs(a.view(kind) - b.view(kind)).max(initial=0))
        for values in zip(first, second, strict=True)
        for a, b in zip(*values, strict=True)
        if a.itemsize == np.dtype(kind).itemsize
    )


def _of_outputs(what: str, identical: bool, errors: list[float], more: int) -> str:
    same = (
        "all outputs are the same to the last bit"
        if identical
        else (f"outputs are off by {max(errors):.2g} of what is allowed")
    )
    return f"{what}, {more:+} instructions; {same}"


def _results(instruction: Instruction | None) -> list[str]:
    if instruction is None or instruction.opcode.startswith(WITHOUT_RESULT):
        return []
    target = instruction.operands[0]
    parts = target.parts if isinstance(target, Vector) else (target,)
    return [part.name for part in parts if isinstance(part, Register) and part.name != "_"]


def _bits(values: NDArray) -> NDArray:
    return values if values.dtype == np.bool_ else values.view(f"u{values.itemsize}")


def _is_policy(kernel: Kernel, registers: Sequence[str]) -> bool:
    """Whether registers are read as the policies of caches alone."""
    readers = [
        (instruction, place)
        for instruction in kernel.instructions
        for place, operand in enumerate(instruction.operands)
        if place and isinstance(operand, Register) and operand.name in registers
    ]
    return all("cache_hint" in i.opcode and place == 2 for i, place in readers)


def same_function(old: Instruction, new: Instruction) -> bool:
    """Whether two opcodes, on the same operands, give the same bits of whatever they may be."""
    if old.opcode not in OPCODES or new.opcode not in OPCODES:
        return False
    if old._replace(opcode=new.opcode, text="") != new._replace(text=""):
        return False
    first, second = OPCODES[old.opcode], OPCODES[new.opcode]
    widths = [[np.dtype(TYPES[kind]).itemsize for kind in o.operands] for o in (first, second)]
    if widths[0] != widths[1] or "pred" in first.operands:
        return False
    dice = np.random.default_rng(0)
    special = np.array(list(itertools.product(SPECIAL, repeat=len(widths[0]))), np.uint64).T
    drawn = dice.integers(0, 2**64, (len(widths[0]), DRAWN), np.uint64, endpoint=False)
    results = []
    with np.errstate(all="ignore"):
        for opcode in (first, second):
            operands = [
                bits.astype(f"u{np.dtype(TYPES[kind]).itemsize}").view(TYPES[kind])
                for bits, kind in zip(np.hstack([special, drawn]), opcode.operands, strict=True)
            ]
            results.append(_bits(opcode.function(*operands)))
    return results[0].dtype == results[1].dtype and bool((results[0] == results[1]).all())


def _widen(
    ranges: dict[str, list[int | float]], instruction: Instruction, sources: list[str], seen: Watch
) -> None:
    """Note from where to where the operands of arithmetic lie."""
    if instruction.opcode not in OPCODES:
        return
    kinds = {
        operand.name: np.dtype(TYPES[kind])
        for operand, kind in zip(
            instruction.operands[1:], OPCODES[instruction.opcode].operands, strict=True
        )
        if isinstance(operand, Register)
    }
    for values in seen.values:
        for name, value in zip(sources, values, strict=True):
            if kinds[name].itemsize < value.itemsize:  # the lower bits count
                value = value.astype(f"u{kinds[name].itemsize}")
            typed = value.view(kinds[name])
            low, high = ranges.get(name, [np.inf, -np.inf])
            ranges[name] = [min(low, typed.min().item()), max(high, typed.max().item())]


def _of_ranges(ranges: dict[str, list[int | float]]) -> str:
    if not ranges:
        return ""
    return " of " + ", ".join(f"{n} {low:.6g} to {high:.6g}" for n, (low, high) in ranges.items())
