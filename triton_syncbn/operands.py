"""What the four steps are given together, under names: kernels, CPU path and reference share it."""

from typing import Any, NamedTuple

from torch import Tensor


class RunningStatistics(NamedTuple):
    """The buffers that follow the batches: None where a layer has none, or they are to stay.

    Moved in place, unless the global batch is empty; without moments, mean and var are the
    statistics themselves.
    """

    mean: Tensor | None = None  # [C], any floating dtype
    var: Tensor | None = None  # [C], any floating dtype
    num_batches_tracked: Tensor | None = None  # one number, any dtype
    momentum: float | None = None  # None: 1 / num_batches_tracked, which is needed


def by_keyword(running: RunningStatistics) -> dict[str, Any]:
    """As the operators take them."""
    return {
        "running_mean": running.mean,
        "running_var": running.var,
        "num_batches_tracked": running.num_batches_tracked,
        "momentum": running.momentum,
    }


class BlockOperands(NamedTuple):
    """What a step of y = activation(batch_norm(x) + residual) is given beside that of a layer."""

    activation: str | None = None  # a name of activations.py
    activation_slope: float = 0.0
    residual: Tensor | None = None  # like the input
    gates: Tensor | None = None  # uint8, see kernels/blocks.py: forward writes, backward reads them
    # In backward only: the layer, to compute the argument of the activation again, and where the
    # gradient of the residual is left.
    weight: Tensor | None = None  # [C]; grad_input has it anyway
    bias: Tensor | None = None  # [C]
    running: RunningStatistics = RunningStatistics()  # of a frozen layer, which has no moments
    grad_residual: Tensor | None = None  # like the input


NOT_TRACKED = RunningStatistics()
LAYER_ALONE = BlockOperands()
