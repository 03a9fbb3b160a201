"""One step of training a whole model: forward, loss, backward, SGD; with any class of batch norm
layer.
"""

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from layers.cases import DTYPES
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.networks import CLASSES
from triton_syncbn.conversion.convert import convert_layers

LEARNING_RATE = 0.01
MOMENTUM = 0.9
# Relative, of a loss before and after one step. In fp32 right layers differ by 1e-7, and those that
# are wrong by 1% by more than 1e-4. bf16 moves the loss of ResNet-50 by 2e-3 from that of fp32, and
# layers that round at other places may differ as much.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


class TrainingStep:
    """A copy of a model whose batch norm layers are of another class, with its optimizer and data.

    Args:
        name: of the model, as in models.CLASSES.
        model: on the CPU; it is copied, so that all that are made from it have the same weights.
        layer_class: what its batch norm layers become, or None to leave them as they are.
        shape: of the input of one rank, (N, 3, *spatial). Images and labels are drawn from the
            number of the rank: the same for every copy.
        dtype: "fp32", or "bf16" for autocast.
        layout: of input and weights, "channels_first" or "channels_last".
        compiled: whether torch.compile makes one graph of forward, and one of backward.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        layer_class: type[Any] | None,
        shape: Sequence[int],
        device: torch.device,
        dtype: str = "fp32",
        layout: str = "channels_first",
        compiled: bool = False,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(self.rank)
        images = torch.randn(tuple(shape), generator=generator)
        size = shape[:1] if name == "resnet50" else (shape[0], *shape[2:])
        labels = torch.randint(CLASSES[name], tuple(size), generator=generator)
        self.images, self.labels = images.to(device), labels.to(device)

        model = copy.deepcopy(model).to(device).train()
        if layer_class is not None:
            convert_layers(model, layer_class, None)
        if layout == "channels_last":
            dense = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            model = model.to(memory_format=dense)  # type: ignore[call-overload]
            self.images = self.images.to(memory_format=dense)
        if compiled:
            model.compile()
        self.model = model
        if self.world_size > 1:
            devices = [device] if device.type == "cuda" else None
            with warnings.catch_warnings():  # PyTorch 2.13 has another name for it, 2.11 has not
                warnings.simplefilter("ignore", FutureWarning)
                self.model = DistributedDataParallel(model, devices, broadcast_buffers=False)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM
        )

    def __call__(self) -> Tensor:
        """Make a step. Returns the loss of this rank before it."""
        self.optimizer.zero_grad(set_to_none=True)
        bfloat16 = self.dtype == "bf16"
        with torch.autocast(self.device.type, DTYPES["bf16"], enabled=bfloat16):
            loss = F.cross_entropy(self.model(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def losses(self, steps: int = 2) -> list[float]:
        """Make steps. Returns the loss before each, the mean of all ranks."""
        means = torch.stack([self() for _ in range(steps)])
        dist.all_reduce(means)
        return (means / self.world_size).tolist()

    def peak_bytes(self) -> int | None:
        """Make a step. Returns the most memory that was in use at once on a GPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def error_of_losses(losses: Sequence[float], expected: Sequence[float], dtype: str) -> float:
    """Largest relative difference of losses, in units of what is tolerated; above 1 is wrong."""
    errors = [abs(one - other) / abs(other) for one, other in zip(losses, expected, strict=True)]
    return max(
        error / LOSS_TOLERANCE[dtype] if math.isfinite(error) else math.inf for error in errors
    )
