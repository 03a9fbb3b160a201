"""A driver for Triton where there is no GPU: kernels are compiled for a target, and not run."""

from triton.backends.compiler import GPUTarget


class NoGPU:
    """Names the target; the compiler asks for nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """The architecture that is compiled for."""
        return self.target

    def get_current_device(self) -> str:
        """A device for each target, as Triton keeps what it compiled by device."""
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        """The default stream."""
        return 0
