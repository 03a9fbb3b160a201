"""A training step of a whole network with each layer in the place of its own: forward, loss,
backward, SGD; DistributedDataParallel where there are several ranks.
"""

import copy
import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from layers.cases import DTYPES, Case
from layers.implementations import Implementation
from machine.ranks import Place
from measuring.times import Call
from numerics.oracle import relative_error
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models.networks import NETWORKS
from triton_syncbn.conversion.convert import convert_layers

LEARNING_RATE = 0.01
MOMENTUM = 0.9
# Relative, of a loss before and after one step. In fp32 right layers differ by 1e-7, and those that
# are wrong by 1% by more than 1e-4. bf16 moves the loss of ResNet-50 by 2e-3 from that of fp32, and
# layers that round at other places may differ as much.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
CLASSES = 21  # of labels: the fewest that a network tells apart
GPU_SHAPES = {"resnet50": (32, 3, 224, 224), "deeplab": (2, 3, 769, 769)}
CPU_SHAPES = {"resnet50": (2, 3, 64, 64), "deeplab": (2, 3, 33, 33)}


def network_cases(
    names: list[str], dtypes: list[str], layouts: list[str], on_cpu: bool
) -> list[Case]:
    """A case for each network, dtype and layout; fp32, or bf16 for autocast."""
    shapes = CPU_SHAPES if on_cpu else GPU_SHAPES
    every = itertools.product(names, dtypes, layouts)
    return [Case(name, name, shapes[name], dtype, layout) for name, dtype, layout in every]


class Network:
    """A network with its data. All that is made from it has the same weights.

    Images and labels are drawn from the number of the rank.
    """

    def __init__(self, case: Case, place: Place) -> None:
        self.case = case
        self.place = place
        torch.manual_seed(0)
        self.model = NETWORKS[case.suite]()
        generator = torch.Generator().manual_seed(place.rank)
        images = torch.randn(case.shape, generator=generator)
        size = case.shape[:1] if case.suite == "resnet50" else (case.shape[0], *case.shape[2:])
        labels = torch.randint(CLASSES, size, generator=generator)
        self.images, self.labels = images.to(place.device), labels.to(place.device)
        if case.layout == "channels_last":
            self.images = self.images.to(memory_format=torch.channels_last)
        self.expected: Tensor | None = None  # losses of the first that is right, over the ranks

    def enter(self, found: Implementation) -> tuple[float | None, dict[str, Call]]:
        """The error of the losses before a first step and after it, against the first layer that
        may be compared: not one that leaves out other ranks' samples. And the step.
        """
        step = self.step_with(found)
        losses = torch.stack([step() for _ in range(2)])
        dist.all_reduce(losses)
        if not found.synchronized and self.place.world_size > 1:
            return None, {"step": step}
        self.expected = losses if self.expected is None else self.expected
        return error_of_losses(losses, self.expected, self.case.dtype), {"step": step}

    def step_with(self, found: Implementation) -> Callable[[], Tensor]:
        """A training step of a copy of the network; it returns the loss of this rank before it."""
        device = self.place.device
        model = copy.deepcopy(self.model).to(device).train()
        if found.synchronized:
            convert_layers(model, found.layer_class, None)
        if self.case.layout == "channels_last":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if found.compiled:
            model.compile()
        if self.place.world_size > 1:
            model = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        half = self.case.dtype == "bf16"

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, DTYPES["bf16"], enabled=half):
                loss = F.cross_entropy(model(self.images).float(), self.labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step


def error_of_losses(losses: Tensor, expected: Tensor, dtype: str) -> float:
    """Largest relative difference of losses, in units of what is tolerated; above 1 is wrong."""
    return max(map(relative_error, losses, expected)) / LOSS_TOLERANCE[dtype]
