"""How wide a kernel accesses each of its tensors, from its PTX."""

import re

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)\s+(.+);", re.MULTILINE)
_ACCESS = re.compile(r"(?:ld|st)\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[bsuf](\d+)$")


def access_widths(ptx: str, parameters: list[str]) -> dict[str, set[int]]:
    """Bits of the loads and stores through each pointer parameter of a kernel.

    An address is computed from one pointer and from numbers, so the parameters that flow into it
    tell which: registers are followed from the parameters on, through all but loads.
    """
    declared = re.findall(r"\.param \.u64 \.ptr \.global \.align \d+ \w+_param_(\d+)", ptx)
    pointers = {number: name for number, name in enumerate(parameters) if str(number) in declared}
    flows: dict[str, set[str]] = {}  # the pointers that each register is computed from
    copies, accesses = [], []
    for operation, operands in _INSTRUCTION.findall(ptx):
        if access := _ACCESS.match(operation):
            (address,) = re.findall(r"\[\s*(%\w+)", operands)
            accesses.append((address, int(access[1] or 1) * int(access[2])))
        elif operation.startswith("ld.param"):
            ((target, number),) = re.findall(r"(%\w+), \[\w+_param_(\d+)", operands)
            flows[target] = {pointers[int(number)]} if int(number) in pointers else set()
        elif not operation.startswith(("ld.", "st.", "bra", "bar", "atom", "red")):
            target, *sources = re.findall(r"%\w+", operands) or [""]
            copies.append((target, sources))
    moved = True
    while moved:
        moved = False
        for target, sources in copies:
            origins = flows.setdefault(target, set())
            before = len(origins)
            origins.update(*(flows.get(source, ()) for source in sources))
            moved |= len(origins) > before
    widths: dict[str, set[int]] = {name: set() for name in parameters}
    for address, bits in accesses:
        (name,) = flows[address]
        widths[name].add(bits)
    return widths
