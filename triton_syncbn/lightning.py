"""A plugin of Lightning's Trainer. This file can be imported without Lightning."""

import sys
from typing import Literal

import torch

from .groups import sync_group
from .module import SyncBN

# The same Lightning under its two names, which have a class each.
_LAYER_SYNC_MODULES = (
    "lightning.pytorch.plugins.layer_sync",
    "pytorch_lightning.plugins.layer_sync",
)


class SyncBNPlugin:
    """Synchronizes the batch norm layers of a model while Lightning fits it:

        Trainer(strategy="ddp", plugins=[SyncBNPlugin()])

    It is a `LayerSync` to Lightning, which calls `apply` before it wraps the model, in the DDP and
    FSDP strategies, and `revert` after the fit.

    Args:
        group_size: the ranks that synchronize, as for `sync_group`: so many consecutive ranks, or
            "node" for those of a node. None leaves layers the group that they have, or all ranks.
            A group itself cannot be passed, as there is none before the Trainer has started.

    Raises:
        RuntimeError: Lightning has not been imported.
    """

    def __init__(self, group_size: int | Literal["node"] | None = None) -> None:
        bases = [sys.modules[name].LayerSync for name in _LAYER_SYNC_MODULES if name in sys.modules]
        if not bases:
            raise RuntimeError(
                "SyncBNPlugin: expected lightning.pytorch or pytorch_lightning to be imported; "
                "import it before the plugin is made"
            )
        for base in bases:
            base.register(type(self))  # an abstract class; the Trainer asks for an instance of it
        self.group_size = group_size
        self._converted: list[torch.nn.Module] = []

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Convert the batch norm layers of a model in place, and return it."""
        made_as_ours = {layer for layer in model.modules() if isinstance(layer, SyncBN)}
        group = None if self.group_size is None else sync_group(self.group_size)
        SyncBN.convert_sync_batchnorm(model, group)
        self._converted = [
            layer
            for layer in model.modules()
            if isinstance(layer, SyncBN) and layer not in made_as_ours
        ]
        return model

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        """Give the layers that `apply` converted their class back, and return the model. A layer
        that was a SyncBN before stays one.
        """
        for layer in self._converted:
            SyncBN.revert_sync_batchnorm(layer)
        self._converted = []
        return model
