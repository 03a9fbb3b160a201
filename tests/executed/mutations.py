"""Changes of a compiled kernel, each of which something should notice."""

import random
from collections.abc import Callable
from typing import NamedTuple

from executor.parsing import Address, Instruction, Kernel, Literal, Operand, Register, Vector

BARRIERS = ("bar.sync", "bar.warp.sync")
# Parts of opcodes that are taken for each other.
CONFUSED = {
    ("lt", "le"), ("gt", "ge"), ("eq", "ne"), ("add", "sub"), ("min", "max"), ("shl", "shr"),
    ("and", "or"), ("mul", "add"), ("s32", "u32"), ("bfly", "idx"), ("lo", "hi"),
}  # fmt: skip


class Mutation(NamedTuple):
    """What is done, in words, and the instruction that it is done to; None: it is left out."""

    words: str
    index: int
    instruction: Instruction | None

    def __call__(self, kernel: Kernel) -> Kernel:
        """The kernel as changed."""
        return spliced(kernel, self.index, *[self.instruction] if self.instruction else [])


def spliced(kernel: Kernel, index: int, *instructions: Instruction) -> Kernel:
    """The kernel with some instructions in the place of one."""
    before, after = kernel.instructions[:index], kernel.instructions[index + 1 :]
    labels = {
        name: target + (target > index) * (len(instructions) - 1)
        for name, target in kernel.labels.items()
    }
    return kernel._replace(instructions=(*before, *instructions, *after), labels=labels)


def without_barriers(kernel: Kernel) -> list[Mutation]:
    """Each barrier left out, one at a time."""
    return [
        Mutation(f"line {instruction.line}: without {instruction.text}", index, None)
        for index, instruction in enumerate(kernel.instructions)
        if instruction.opcode in BARRIERS
    ]


def draw(kernel: Kernel, dice: random.Random) -> Mutation:
    """One change of one instruction: left out, another guard, opcode, register or number."""
    while True:
        index = dice.randrange(len(kernel.instructions))
        instruction = kernel.instructions[index]
        change = dice.choice([_leave_out, _guard, _opcode, _operand])
        changed = change(kernel, instruction, dice)
        if changed != instruction:
            words = "left out" if changed is None else _text(changed)
            return Mutation(
                f"line {instruction.line}: {instruction.text} -> {words}", index, changed
            )


Change = Callable[[Kernel, Instruction, random.Random], Instruction | None]


def _leave_out(kernel: Kernel, instruction: Instruction, dice: random.Random) -> Instruction | None:
    return instruction if instruction.opcode == "ret" else None


def _guard(kernel: Kernel, instruction: Instruction, dice: random.Random) -> Instruction:
    if instruction.guard is None:
        return instruction
    if dice.random() < 0.5:
        return instruction._replace(negated=not instruction.negated)
    return instruction._replace(guard=None)


def _opcode(kernel: Kernel, instruction: Instruction, dice: random.Random) -> Instruction:
    parts = instruction.opcode.split(".")
    choices = [
        (number, new)
        for number, part in enumerate(parts)
        for pair in CONFUSED
        for old, new in (pair, pair[::-1])
        if part == old
    ]
    if not choices:
        return instruction
    number, new = dice.choice(choices)
    return instruction._replace(opcode=".".join([*parts[:number], new, *parts[number + 1 :]]))


def _operand(kernel: Kernel, instruction: Instruction, dice: random.Random) -> Instruction:
    operands = list(instruction.operands)
    if not operands:
        return instruction
    number = dice.randrange(len(operands))
    operands[number] = _other(kernel, operands[number], dice)
    return instruction._replace(operands=tuple(operands))


def _other(kernel: Kernel, operand: Operand, dice: random.Random) -> Operand:
    if isinstance(operand, Literal):
        return operand._replace(bits=operand.bits ^ 1 << dice.randrange(operand.width or 5))
    if isinstance(operand, Address):
        return operand._replace(offset=operand.offset + dice.choice([-16, -4, -2, 2, 4, 16]))
    if isinstance(operand, Register) and operand.name in kernel.registers:
        width = kernel.registers[operand.name]
        return Register(dice.choice([n for n, w in kernel.registers.items() if w == width]))
    return operand


def _text(instruction: Instruction) -> str:
    guard = f"@{'!' * instruction.negated}{instruction.guard.name} " if instruction.guard else ""
    return f"{guard}{instruction.opcode} {', '.join(map(_of_operand, instruction.operands))}"


def _of_operand(operand: Operand) -> str:
    if isinstance(operand, Register):
        return operand.name
    if isinstance(operand, Literal):
        return hex(operand.bits)
    if isinstance(operand, Address):
        base = operand.base if isinstance(operand.base, str) else operand.base.name
        return f"[{base}+{operand.offset}]"
    if isinstance(operand, Vector):
        return f"{{ {', '.join(map(_of_operand, operand.parts))} }}"
    return str(operand)
