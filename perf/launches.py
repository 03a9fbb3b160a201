"""One kernel of one layer, launched alone with a config, and whether its result is right."""

import torch
from cases import DTYPES, Case
from torch import Tensor
from triton_syncbn.kernels.grad_input import grad_input
from triton_syncbn.kernels.grad_moments import grad_moments
from triton_syncbn.kernels.launch_config import LaunchConfig
from triton_syncbn.kernels.moments import moments
from triton_syncbn.kernels.normalize import normalize

from triton_syncbn import reference

EPS = 1e-5
# Of the norm; of sums, of the norm of the sums of sizes. Half precision is rounded once, by half a
# unit in the last place; float32 sums are of terms that cancel.
MAP_TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2.0**-8, "fp16": 2.0**-11}
SUM_TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 1e-5, "fp16": 1e-5}


class KernelOfLayer:
    """A kernel with tensors to work on, and what it has to make of them, from float64."""

    def __init__(self, kernel: str, case: Case, device: torch.device) -> None:
        self.kernel = kernel
        self.case = case
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device) + 0.5

        self.x, self.dy = (self._lay_out(draw(*case.shape)) for _ in range(2))
        self.weight, self.bias, self.mean, self.variance = draw(4, case.shape[1]).unbind()
        self.counter = torch.tensor(0, device=device)
        x, dy = self.x.double(), self.dy.double()
        self.moments = reference.moments(x)
        self.sums = reference.grad_moments(dy, x, self.moments, None, None, EPS)[0]
        self.expected, self.scale = self._expect(x, dy)

    def _lay_out(self, values: Tensor) -> Tensor:
        values = values.to(DTYPES[self.case.dtype])
        if self.case.layout == "channels_last":
            values = values.movedim(1, -1).contiguous().movedim(-1, 1)
        return values

    def _expect(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """The result in float64, and the size of it or of its terms."""
        if self.kernel == "moments":
            return self.moments, self.moments.norm()
        if self.kernel == "grad_moments":
            sizes = reference.grad_moments(dy.abs(), x, self.moments, None, None, EPS)[0]
            return self.sums, sizes.norm()
        if self.kernel == "normalize":
            weight, bias = self.weight.double(), self.bias.double()
            expected = reference.normalize(x, self.moments, weight, bias, eps=EPS)
        else:
            expected = reference.grad_input(
                dy, x, self.moments, self.sums, self.weight.double(), EPS
            )
        return expected, expected.norm()

    def launch(self, config: LaunchConfig) -> Tensor:
        """Run the kernel once, as the layer does."""
        dtype = torch.float32
        if self.kernel == "moments":
            return moments(self.x, config)
        if self.kernel == "grad_moments":
            return grad_moments(self.dy, self.x, self.moments, dtype, dtype, EPS, config)[0]
        if self.kernel == "normalize":
            return normalize(
                self.x,
                self.moments,
                self.weight,
                self.bias,
                running_mean=self.mean,
                running_var=self.variance,
                num_batches_tracked=self.counter,
                momentum=0.1,
                eps=EPS,
                config=config,
            )
        return grad_input(self.dy, self.x, self.moments, self.sums, self.weight, EPS, config)

    def error_over_tolerance(self, config: LaunchConfig) -> float:
        """Error of a launch in units of what is tolerated; above 1 is wrong, and so is NaN, which
        comes back as infinity.
        """
        error = (self.launch(config).double() - self.expected).norm() / self.scale
        sums = self.kernel in ("moments", "grad_moments")
        tolerance = (SUM_TOLERANCE if sums else MAP_TOLERANCE)[self.case.dtype]
        return (error / tolerance).nan_to_num(torch.inf, torch.inf).item()
