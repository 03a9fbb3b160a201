"""From the text of a PTX module with one kernel to its instructions."""

import functools
import re
from typing import NamedTuple


class PtxError(Exception):
    """The PTX is beyond what is known here, or it does what it must not."""


class Register(NamedTuple):
    """A register of a thread; `_` is none: what is written there is dropped."""

    name: str


class Literal(NamedTuple):
    """An immediate number: its bits, and how many they are where the text says so (floats)."""

    bits: int
    width: int | None = None


class Address(NamedTuple):
    """Base plus bytes; the base is a register, or a symbol's name."""

    base: Register | str
    offset: int


class Vector(NamedTuple):
    """Operands in braces."""

    parts: tuple["Operand", ...]


Operand = Register | Literal | Address | Vector | str  # str: a symbol or a label


class Instruction(NamedTuple):
    """One instruction, with the register that guards it, if any."""

    line: int
    text: str
    guard: Register | None
    negated: bool  # it runs where the guard is false
    opcode: str
    operands: tuple[Operand, ...]


class Kernel(NamedTuple):
    """A kernel: its parameters in order, registers (name: bits; a predicate has 1), the length of a
    program, instructions, and where each label points.
    """

    name: str
    parameters: dict[str, str]  # name: type
    threads: int
    registers: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @property
    def targets(self) -> set[int]:
        """Where branches lead."""
        return {
            self.labels[str(instruction.operands[0])]
            for instruction in self.instructions
            if instruction.opcode.startswith("bra")
        }


SHARED_SYMBOL = "global_smem"  # what Triton calls the shared memory of a program
_ENTRY = re.compile(r"\.entry (\w+)\((.*?)\)(.*?)\n\{\n(.*?)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param \.(\w+)(?: \.ptr \.global \.align \d+)? (\w+)")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%\w+?)<(\d+)>")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)")
_SKIPPED = (".loc", ".pragma")  # where a line comes from, and hints for ptxas
_NUMBER = re.compile(r"-?\d+|-?0x[0-9a-fA-F]+U?")


@functools.lru_cache(maxsize=64)
def parse(ptx: str) -> Kernel:
    """The one kernel of a module."""
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise PtxError(f"expected a module of one kernel, got {len(entries)}")
    (entry,) = entries
    name, parameters, attributes, body = entry.groups()
    threads = re.search(r"\.reqntid (\d+)", attributes)
    if not threads:
        raise PtxError(f"expected the number of threads (.reqntid) of {name}, got {attributes!r}")
    registers: dict[str, int] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    first_line = ptx.count("\n", 0, entry.start(4)) + 1
    for number, line in enumerate(body.splitlines(), first_line):
        statement = line.split("//")[0].strip()
        if label := re.match(r"(\$\w+):", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :].strip()
        if not statement or statement.startswith(_SKIPPED):
            continue
        if declared := _REGISTERS.match(statement):
            width = 1 if declared[1] == "pred" else int(declared[1][1:])
            registers |= {f"{declared[2]}{index}": width for index in range(int(declared[3]))}
            continue
        found = _INSTRUCTION.fullmatch(statement.removesuffix(";").strip())
        if not found or not statement.endswith(";"):
            raise PtxError(f"line {number}: not understood: {statement}")
        negated, guard, opcode, operands = found.groups()
        instructions.append(
            Instruction(
                number,
                statement,
                Register(guard) if guard else None,
                bool(negated),
                opcode,
                tuple(_operand(text) for text in _split(operands)),
            )
        )
    return Kernel(
        name,
        {parameter: kind for kind, parameter in _PARAMETER.findall(parameters)},
        int(threads[1]),
        registers,
        tuple(instructions),
        labels,
    )


def _split(operands: str) -> list[str]:
    """Cut at the commas that are outside of braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,])+", operands) if part.strip()]


@functools.lru_cache(maxsize=1 << 14)
def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(part) for part in _split(text[1:-1])))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        where = _operand(base)
        if not isinstance(where, Register | str):
            raise PtxError(f"expected a register or a symbol as an address, got {text}")
        return Address(where, int(offset or "0", 0))
    if re.fullmatch(r"%\w+(\.\w)?|_", text):
        return Register(text)
    if float_bits := re.fullmatch(r"0([fd])([0-9A-F]+)", text):
        return Literal(int(float_bits[2], 16), 32 if float_bits[1] == "f" else 64)
    if _NUMBER.fullmatch(text):
        return Literal(int(text.removesuffix("U"), 0))
    return text
