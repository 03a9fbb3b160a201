"""What instructions for NVIDIA say of a kernel: its main loop, and the loads under way in it."""

import re

from compiler.binaries import Instruction


def main_loop(instructions: list[Instruction]) -> range | None:
    """Numbers of the loop that loads most without a loop inside, or None where none loads. The
    loops that add up partial sums and those over statistics compute in float64 and do not count.
    """
    loops = [
        range(int(operands), number + 1)
        for number, name, operands in instructions
        if name.startswith("BRA") and operands.isdecimal() and int(operands) <= number
    ]
    inner = [a for a in loops if not any(b.start >= a.start and b.stop < a.stop for b in loops)]

    def loads(loop: range) -> int:
        names = [name for number, name, _ in instructions if number in loop]
        if any(name.startswith(("DADD", "DFMA")) for name in names):
            return 0
        return sum(bits_of(name) for name in names if name.startswith("LDG"))

    best = max(inner, key=loads, default=None)
    return best if best is not None and loads(best) else None


def loads_in_flight(body: list[Instruction], repeats: bool) -> int:
    """The most loads of the widest kind that are under way when the first of them is waited for.

    Of a loop, which repeats, two rounds are looked at: what is loaded in one may be used in the
    next.
    """
    widest = max((bits_of(name) for _, name, _ in body if name.startswith("LDG")), default=0)
    pending: list[set[int]] = []
    most = 0
    for _, name, operands in body * 2 if repeats else body:
        registers = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
        load = name.startswith("LDG") and bits_of(name) == widest
        used = set(registers[1:] if load else registers)
        needed = [number for number, loaded in enumerate(pending) if loaded & used]
        if needed:  # loads come back in order
            most = max(most, len(pending))
            pending = pending[max(needed) + 1 :]
        if load:
            pending.append(set(range(registers[0], registers[0] + widest // 32)))
    return most


def bits_of(name: str) -> int:
    """Bits of a load or store."""
    for bits in (128, 64):
        if f".{bits}" in name:
            return bits
    return 8 if ".U8" in name or ".S8" in name else 16 if ".U16" in name else 32
