"""What the kernels are compiled for."""

from typing import NamedTuple

from triton.backends.compiler import GPUTarget


class Architecture(NamedTuple):
    """What a block may have, and how large a GPU is that has it."""

    target: GPUTarget
    multiprocessors: int  # compute units; from the data sheets
    shared_bytes: int  # of a block (CUDA C++ Programming Guide, compute capabilities)


ARCHITECTURES = {
    "sm75": Architecture(GPUTarget("cuda", 75, 32), 40, 64 << 10),  # T4
    "sm80": Architecture(GPUTarget("cuda", 80, 32), 108, 163 << 10),  # A100
    "sm86": Architecture(GPUTarget("cuda", 86, 32), 82, 99 << 10),  # RTX 3090
    "sm89": Architecture(GPUTarget("cuda", 89, 32), 128, 99 << 10),  # RTX 4090
    "sm90": Architecture(GPUTarget("cuda", 90, 32), 132, 227 << 10),  # H100, H200
    "sm100": Architecture(GPUTarget("cuda", 100, 32), 148, 227 << 10),  # B200
    "sm120": Architecture(GPUTarget("cuda", 120, 32), 170, 99 << 10),  # RTX 5090
    "gfx90a": Architecture(GPUTarget("hip", "gfx90a", 64), 104, 64 << 10),  # MI250
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 304, 64 << 10),  # MI300X
}
