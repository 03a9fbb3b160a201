"""What ptxas may do to a product that feeds a sum if neither says `.rn`: make the sum an fma."""

import re

from .parsing import Instruction, Kernel, Literal, Register

_SUM = re.compile(r"(add|sub)\.(f32|f64|f32x2)")
_BOTH_SIGNS = Literal(0x8000000080000000)  # of two float32 numbers, for which there is no neg
_BITS = {"f32": 32, "f64": 64, "f32x2": 64}


def contract(kernel: Kernel) -> Kernel:
    """The kernel with every sum contracted that may be."""
    written = [_target(instruction) for instruction in kernel.instructions]
    products = {
        instruction.operands[0]: instruction
        for instruction in kernel.instructions
        if instruction.opcode in ("mul.f32", "mul.f64", "mul.f32x2") and instruction.guard is None
    }
    registers = dict(kernel.registers)
    instructions: list[Instruction] = []
    places: list[int] = []  # where each of the old instructions went
    for instruction in kernel.instructions:
        places.append(len(instructions))
        form = _SUM.fullmatch(instruction.opcode)
        product = next((p for p in instruction.operands[1:] if p in products), None)
        if form and product and products[product].opcode == f"mul.{form[2]}":
            name, kind = form.groups()
            target, first, second = instruction.operands
            _, a, b = products[product].operands
            # Values must be what they were at the product: registers that are written once.
            if all(written.count(r) <= 1 for r in (product, a, b) if isinstance(r, Register)):
                addend = second if first == product else first
                if name == "sub":  # a * b - second, or first - a * b
                    minus = Register(f"%minus{len(instructions)}")
                    registers[minus.name] = _BITS[kind]
                    negated = addend if first == product else a
                    opcode, *others = ("xor.b64", _BOTH_SIGNS) if "x2" in kind else (f"neg.{kind}",)
                    instructions.append(
                        instruction._replace(opcode=opcode, operands=(minus, negated, *others))
                    )
                    a, addend = (a, minus) if first == product else (minus, addend)
                instruction = instruction._replace(
                    opcode=f"fma.rn.{kind}", operands=(target, a, b, addend)
                )
        instructions.append(instruction)
    places.append(len(instructions))
    return kernel._replace(
        registers=registers,
        instructions=tuple(instructions),
        labels={name: places[target] for name, target in kernel.labels.items()},
    )


def _target(instruction: Instruction) -> object:
    return instruction.operands[0] if instruction.operands else None
