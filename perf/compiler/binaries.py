"""A compiled kernel read by the tools that come with Triton: resources and instructions."""

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


class Resources(NamedTuple):
    """What a kernel takes."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread, in memory of its own
    shared_bytes: int  # of a block


class Instruction(NamedTuple):
    """Of SASS; instructions are numbered from 0, and a branch has the number of its target."""

    number: int
    name: str
    operands: str


def resources_of(kernel: Any) -> Resources:
    """Resources, from the assembler of NVIDIA or the assembly of AMD."""
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        registers, spilled, stack = (
            sum(int(number) for number in re.findall(rf"\.{key}:\s+(\d+)", kernel.asm["amdgcn"]))
            for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return Resources(registers, 4 * spilled + stack, shared)
    text = _read(kernel, triton.knobs.nvidia.cuobjdump, "--dump-resource-usage")
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return Resources(int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"]), shared)


def instructions_of(kernel: Any) -> list[Instruction]:
    """The SASS of a kernel for NVIDIA."""
    # with -c, labels stand for addresses; instructions are numbered anew
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in _read(kernel, triton.knobs.nvidia.nvdisasm, "-c", "-hex").splitlines():
        if label := re.match(r"\s*\.?(L_x_\d+):", line.strip()):
            labels[label[1]] = len(found)
        if match := INSTRUCTION.search(line):
            found.append(Instruction(len(found), match[1], match[2]))
    resolved = []
    for instruction in found:
        target = re.search(r"(L_x_\d+)", instruction.operands)
        if instruction.name.startswith("BRA") and target and target[1] in labels:
            instruction = instruction._replace(operands=str(labels[target[1]]))
        resolved.append(instruction)
    return resolved


def _read(kernel: Any, tool: Any, *options: str) -> str:
    """What a tool prints of the kernel's cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool.path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
