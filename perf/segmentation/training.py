"""Training of one arm: the same weights, batches and schedule as in every other one."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from machine.ranks import Place
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from segmentation.arms import BATCH, Arm
from segmentation.data import CLASSES, Data, Images
from segmentation.network import Network

LEARNING_RATE = 0.05
DECAY = 0.9  # the rate falls with this power of the steps that are left, as segmentation has it
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
SCORED_AT_ONCE = 64  # images


class Run(NamedTuple):
    """What an arm has come to."""

    losses: Tensor  # [steps], float64: of the whole batch, before its step
    mean_iou: float  # of held-out images, in eval mode
    statistics: Tensor  # all running means and variances, one after the other, float64
    predictions: Tensor  # classes of the held-out images


def train(
    arm: Arm,
    place: Place,
    group: Any,
    data: Data,
    seed: int,
    steps: int,
    dtype: torch.dtype,
    tick: Callable[[], object],
) -> Run | None:
    """Train this rank's share. Only the first rank scores, and returns something: its buffers are
    what a checkpoint holds. `tick` is called after each step.
    """
    images, held_out = (
        Images(part.pixels.to(place.device, dtype), part.labels.to(place.device)) for part in data
    )
    torch.manual_seed(seed)
    network = Network().to(place.device, dtype)
    model = arm.prepare(network, group, images.pixels)
    if len(arm.shares) > 1:
        # Buffers need not be sent: those that count are the first rank's.
        model = DistributedDataParallel(model, process_group=group, broadcast_buffers=False)
    optimizer = torch.optim.SGD(
        model.parameters(),
        arm.learning_rate * LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 - step / steps) ** DECAY
    )
    share = arm.shares[place.rank] / BATCH
    losses = torch.zeros(steps, dtype=torch.float64, device=place.device)
    for step, batch in enumerate(batches(len(images.pixels), seed, steps)):
        mine = batch.split(arm.shares)[place.rank]
        loss = F.cross_entropy(model(images.pixels[mine]), images.labels[mine])
        losses[step] = share * loss.detach()
        # DistributedDataParallel averages over ranks: a rank counts by its samples.
        (loss * share * len(arm.shares)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        tick()
    if len(arm.shares) > 1:
        dist.all_reduce(losses, group=group)
    if place.rank > 0:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or threads)  # the other ranks wait
    predictions = predict(network, held_out.pixels)
    torch.set_num_threads(threads)
    return Run(
        losses.cpu(),
        mean_iou(predictions, held_out.labels),
        statistics_of(network).cpu(),
        predictions.cpu(),
    )


def batches(image_count: int, seed: int, steps: int) -> list[Tensor]:
    """Which images are in the batch of each step: all of them in turn, in a drawn order."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * BATCH // image_count)
    order = torch.cat([torch.randperm(image_count, generator=generator) for _ in range(epochs)])
    return list(order[: steps * BATCH].split(BATCH))


@torch.no_grad()
def predict(network: nn.Module, pixels: Tensor) -> Tensor:
    """The likeliest class of each pixel, [N, H, W], in eval mode."""
    network.eval()
    return torch.cat([network(part).argmax(1) for part in pixels.split(SCORED_AT_ONCE)])


def mean_iou(predictions: Tensor, labels: Tensor) -> float:
    """Intersection over union of each class, over the pixels of all images; the mean of classes."""
    pairs = (labels * CLASSES + predictions).flatten()
    counts = torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES).double()
    intersection = counts.diagonal()
    return (intersection / (counts.sum(0) + counts.sum(1) - intersection)).mean().item()


def statistics_of(network: nn.Module) -> Tensor:
    """Running means, then variances, of all layers."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    buffers: list[Any] = [layer.running_mean for layer in layers]
    buffers += [layer.running_var for layer in layers]
    return torch.cat(buffers).double()
