"""Exchange the class of the batch norm layers of a model, in place.

A layer keeps its identity, so whatever holds it or its parameters (optimizers, hooks, other names)
still does.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

_KNOWN_FORWARDS = (_BatchNorm.forward, torch.nn.SyncBatchNorm.forward)


class BatchNorm(_BatchNorm):
    """Batch normalization of (N, C, *spatial) with this process's samples, for any number of
    spatial dimensions.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input: expected shape (N, C, *spatial), got {tuple(input.shape)}")


def convert_layers(
    module: torch.nn.Module, sync_class: type[Any], process_group: Any
) -> torch.nn.Module:
    """Make every batch norm layer of a module a `sync_class`; see SyncBN.convert_sync_batchnorm."""
    for name, layer in module.named_modules():
        if isinstance(layer, sync_class):
            layer.layer_name = name or layer.layer_name
            if process_group is not None:
                layer.process_group = process_group
        elif isinstance(layer, _BatchNorm) and _may_convert(name, layer):
            group = process_group or getattr(layer, "process_group", None)
            layer.__dict__.update(
                converted_from=type(layer),
                process_group=group,
                layer_name=name or type(layer).__name__,
            )
            layer.__class__ = sync_class
    return module


def revert_layers(module: torch.nn.Module, sync_class: type[Any]) -> torch.nn.Module:
    """Give every `sync_class` of a module the class it had; see SyncBN.revert_sync_batchnorm."""
    for layer in module.modules():
        if isinstance(layer, sync_class):
            original = layer.__dict__.pop("converted_from", BatchNorm)
            del layer.layer_name
            if not issubclass(original, torch.nn.SyncBatchNorm):
                del layer.process_group
            layer.__class__ = original
    return module


def _may_convert(name: str, layer: _BatchNorm) -> bool:
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        raise ValueError(
            f"module: expected initialized layers, got the lazy {type(layer).__name__} {name!r}; "
            "run a forward first"
        )
    if type(layer).forward in _KNOWN_FORWARDS:
        return True
    warnings.warn(
        f"layer {name!r} is left unsynchronized: {type(layer).__name__} has a forward of its own, "
        "which SyncBN would not run",
        stacklevel=4,
    )
    return False
