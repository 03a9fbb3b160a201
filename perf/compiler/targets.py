"""What the kernels are compiled for, and the GPUs that have it."""

from typing import NamedTuple

from triton.backends.compiler import GPUTarget

# Multiprocessors (compute units), from the data sheets of their makers.
GPUS = {
    "T4": 40,
    "A100": 108,
    "RTX 3090": 82,
    "H100": 132,
    "H200": 132,
    "L4": 58,
    "RTX 4090": 128,
    "B200": 148,
    "RTX 5090": 170,
    "MI250": 104,
    "MI300X": 304,
}


class Architecture(NamedTuple):
    """What a block may have, and a device that has it."""

    target: GPUTarget
    shared_bytes: int  # of a block (CUDA C++ Programming Guide, compute capabilities)
    gpu: str

    @property
    def multiprocessors(self) -> int:
        """Of the device."""
        return GPUS[self.gpu]


ARCHITECTURES = {
    "sm75": Architecture(GPUTarget("cuda", 75, 32), 64 << 10, "T4"),
    "sm80": Architecture(GPUTarget("cuda", 80, 32), 163 << 10, "A100"),
    "sm86": Architecture(GPUTarget("cuda", 86, 32), 99 << 10, "RTX 3090"),
    "sm89": Architecture(GPUTarget("cuda", 89, 32), 99 << 10, "RTX 4090"),
    "sm90": Architecture(GPUTarget("cuda", 90, 32), 227 << 10, "H100"),
    "sm100": Architecture(GPUTarget("cuda", 100, 32), 227 << 10, "B200"),
    "sm120": Architecture(GPUTarget("cuda", 120, 32), 99 << 10, "RTX 5090"),
    "gfx90a": Architecture(GPUTarget("hip", "gfx90a", 64), 64 << 10, "MI250"),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 << 10, "MI300X"),
}
