"""A driver for Triton where there is no GPU: kernels are compiled for a target, and not run."""

from triton.backends.compiler import GPUTarget


class NoGPU:
    """Names the target; the compiler asks for nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """The architecture that is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """One device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0
