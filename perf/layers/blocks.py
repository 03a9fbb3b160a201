"""The block that a layer is compared in: what follows it, fused into ours, as torch has it for the
others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from triton_syncbn import SyncBN


class Bytes(NamedTuple):
    """Bytes that a block cannot do without, T the bytes of its input: maps and gates of one bit per
    element, in forward and backward.
    """

    forward: int
    backward: int
    gates_forward: int = 0
    gates_backward: int = 0

    def of_pass(self, pass_name: str, item_size: int) -> float:
        """In units of T."""
        forward = self.forward + self.gates_forward / 8 / item_size
        backward = self.backward + self.gates_backward / 8 / item_size
        return {"forward": forward, "backward": backward, "both": forward + backward}[pass_name]


# Forward reads x for the statistics, reads it again and writes y; backward reads x and dy twice and
# writes dx. A residual is read once, and its gradient is written once; the gates of ReLU tell its
# derivative there.
BLOCKS = {"none": Bytes(3, 5), "relu": Bytes(3, 5), "add_relu": Bytes(4, 6, 1, 2)}


class Eager(torch.nn.Module):
    """A layer, and after it the operations of a block as a network without fusion has them."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(layer(input) + residual), in place where torch allows it."""
        output = self.layer(input)
        if residual is not None:
            output += residual
        return torch.relu_(output)

    @property
    def running_mean(self) -> Tensor:
        """That of the layer."""
        return self.layer.running_mean  # type: ignore[return-value]

    @property
    def running_var(self) -> Tensor:
        """That of the layer."""
        return self.layer.running_var  # type: ignore[return-value]


def in_block(layer: torch.nn.Module, block: str) -> torch.nn.Module:
    """The layer with the block: ours takes it into its kernels."""
    if block == "none":
        return layer
    if isinstance(layer, SyncBN):
        layer.fused_activation = "relu"
        return layer
    return Eager(layer)
