"""One kernel of one layer, launched alone with a config, and whether its result is right."""

import torch
from layers.cases import DTYPES, Case, laid_out
from layers.exercise import TOLERANCE
from layers.steps import Operands, run_step
from torch import Tensor
from triton_syncbn.kernels.launch_config import LaunchConfig

REDUCTIONS_TOLERANCE = 1e-5  # of the norm of the sums of sizes; float64 has that of a map


class KernelOfLayer:
    """A kernel with tensors to work on, and what it has to make of them, from float64."""

    def __init__(self, kernel: str, case: Case, device: torch.device) -> None:
        self.kernel = kernel
        self.case = case
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device) + 0.5

        x, dy = (laid_out(draw(*case.shape).to(DTYPES[case.dtype]), case.layout) for _ in range(2))
        weight, bias, mean, variance = draw(4, case.shape[1]).unbind()
        exact = Operands(x.double(), dy.double(), weight=weight.double(), bias=bias.double())
        exact = exact._replace(moments=run_step("moments", exact, "reference"))
        exact = exact._replace(grad_moments=run_step("grad_moments", exact, "reference"))
        self.expected = run_step(kernel, exact, "reference")
        # the size of the result, or of the terms of a sum that may cancel
        sizes = exact._replace(grad_output=exact.grad_output.abs())
        self.scale = (
            run_step(kernel, sizes, "reference") if kernel == "grad_moments" else self.expected
        ).norm()
        self.operands = Operands(
            x,
            dy,
            exact.moments,
            exact.grad_moments,
            weight,
            bias,
            mean,
            variance,
            torch.tensor(0, device=device),
        )

    def launch(self, config: LaunchConfig) -> Tensor:
        """Run the kernel once, as the layer does."""
        return run_step(self.kernel, self.operands, config=config)

    def error_of(self, config: LaunchConfig) -> float:
        """Error of a launch in units of what is tolerated; above 1 is wrong, and so is NaN, which
        comes back as infinity.
        """
        error = (self.launch(config).double() - self.expected).norm() / self.scale
        tolerance = TOLERANCE[self.case.dtype]
        if self.kernel in ("moments", "grad_moments") and self.case.dtype != "fp64":
            tolerance = REDUCTIONS_TOLERANCE
        return (error / tolerance).nan_to_num(torch.inf, torch.inf).item()
