"""Exchange the class of the batch norm layers of a model, in place.

A layer keeps its identity, so whatever holds it or its parameters (optimizers, hooks, other names)
still does. It also stays what it was: its new class is made of its old one and SyncBN.
"""

import functools
import sys
import types
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from . import subclass_forward
from .fuse import fuse_layers, unfuse_layers

# What a layer says its module is: torch.fx takes layers of torch.nn, and no others, for one node of
# a graph. It is said by the layer and not by its class, which pickle finds by its module.
FX_LEAF = "torch.nn"


class BatchNorm(_BatchNorm):
    """Batch normalization of (N, C, *spatial) with this process's samples, for any number of
    spatial dimensions.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input: expected shape (N, C, *spatial), got {input.shape}")


def convert_layers(
    module: torch.nn.Module, sync_class: Any, process_group: Any, fuse: bool = False
) -> torch.nn.Module:
    """Make every batch norm layer of a module a `sync_class`; see SyncBN.convert_sync_batchnorm."""
    _, sync_class = vars(sync_class).get("made_of", (None, sync_class))
    synchronized: dict[str, Any] = {}
    classes: dict[str, type[Any]] = {}
    layer: Any
    for name, layer in module.named_modules():
        if isinstance(layer, sync_class):
            synchronized[name] = layer
        elif isinstance(layer, _BatchNorm):
            _check_exchangeable(name, layer)
            layer_class: Any = type(layer)
            fault = subclass_forward.fault(layer_class)
            if "forward" in vars(layer):
                fault = "has been replaced in this one layer"
            if fault:
                warnings.warn(
                    f"layer {name!r} is left unsynchronized: "
                    f"the forward of {layer_class.__name__} {fault}",
                    stacklevel=3,
                )
                continue
            synchronized[name] = layer
            classes[name] = synchronized_class(layer_class, sync_class)
    for name, layer in synchronized.items():  # nothing is changed before all have been checked
        if name in classes:
            layer.__dict__.update(
                __module__=FX_LEAF,
                converted_from=type(layer),
                process_group=getattr(layer, "process_group", None),
                layer_name=type(layer).__name__,
            )
            layer.__class__ = classes[name]
        layer.__dict__["layer_name"] = name or layer.layer_name
        if process_group is not None:
            layer.__dict__["process_group"] = process_group
    if fuse:
        fuse_layers(module, sync_class)
    return module


def revert_layers(module: torch.nn.Module, sync_class: type[Any]) -> torch.nn.Module:
    """Give every `sync_class` of a module the class it had; see SyncBN.revert_sync_batchnorm."""
    layers: dict[str, Any] = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, sync_class)
    }
    for name, layer in layers.items():
        _check_exchangeable(name, layer)
        if layer.frozen_statistics:
            raise ValueError(
                f"module: expected layers that are not frozen, got {name!r}; unfreeze it first"
            )
        if layer.fused_activation is not None and layer.fused_as is None:
            raise ValueError(
                "module: expected layers without an activation of their own, got "
                f"{name!r} that was made with {layer.fused_activation}"
            )
    if any(layer.fusion for layer in layers.values()):
        unfuse_layers(module, sync_class)
    for layer in layers.values():
        original = layer.__dict__.pop("converted_from", BatchNorm)
        del layer.layer_name
        for setting in ("frozen_statistics", "fused_activation", "fused_slope"):
            layer.__dict__.pop(setting, None)
        if not issubclass(original, torch.nn.SyncBatchNorm):
            del layer.process_group
        if original is not BatchNorm:
            layer.__dict__.pop("__module__", None)
        layer.__class__ = original
    return module


@functools.cache
def synchronized_class(layer_class: Any, sync_class: Any) -> Any:
    """The class of layers of a class whose batch normalization is that of `sync_class`.

    It derives from both, with `sync_class` in the place of torch's batch norm layer: `super()` in
    a method of the layer's class finds it there. A torch.nn.SyncBatchNorm it is not, as
    DistributedDataParallel refuses that on a CPU: of such a class it is a copy, on other bases.
    """
    if layer_class in (_BatchNorm, torch.nn.SyncBatchNorm):
        return sync_class
    name = f"Sync{layer_class.__name__.removeprefix('Sync')}"
    namespace: dict[str, Any] = {}
    class_cell = None
    if issubclass(layer_class, torch.nn.SyncBatchNorm):
        class_cell = types.CellType()
        namespace.update(vars(layer_class))
        namespace.pop("__dict__", None)
        namespace.pop("__weakref__", None)
    for method_name, method in vars(layer_class).items():
        if isinstance(method, types.FunctionType):
            exchanged = subclass_forward.read(method).exchanged
            if exchanged or class_cell:
                namespace[method_name] = subclass_forward.rebuilt(
                    exchanged or method, class_cell=class_cell
                )
    namespace.update(
        __module__=__name__,
        __qualname__=name,
        __doc__=f"{layer_class.__name__} with the batch normalization of {sync_class.__name__}.",
        __reduce_ex__=_reduce,
        made_of=(layer_class, sync_class),
    )
    bases = tuple(
        synchronized_class(base, sync_class) if issubclass(base, _BatchNorm) else base
        for base in layer_class.__bases__
        if class_cell or issubclass(base, _BatchNorm)
    )
    if class_cell is None:
        bases = (layer_class, *bases)
    made = types.new_class(name, bases, exec_body=lambda body: body.update(namespace))
    if class_cell is not None:
        class_cell.cell_contents = made
    return made


def _reduce(layer: Any, protocol: Any) -> Any:
    """What pickle and copy make a layer of: its class is found by those that it is made of."""
    return _new_layer, vars(type(layer))["made_of"], layer.__getstate__()


def _new_layer(layer_class: Any, sync_class: Any) -> Any:
    made = synchronized_class(layer_class, sync_class)
    return made.__new__(made)


def _check_exchangeable(name: str, layer: _BatchNorm) -> None:
    """Raise ValueError where something holds on to the class of a layer."""
    kind = type(layer).__name__
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        raise ValueError(
            f"module: expected initialized layers, got the lazy {kind} {name!r}; "
            "run a forward first"
        )
    if is_parametrized(layer):
        raise ValueError(
            f"module: expected layers without parametrizations, got {kind} {name!r}; "
            "convert or revert a model before its layers are parametrized"
        )
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was not imported, none is wrapped
    if fsdp is not None and isinstance(layer, fsdp.FSDPModule):
        raise ValueError(
            f"module: expected layers that fully_shard has not wrapped, got {kind} {name!r}; "
            "convert or revert a model before it is sharded"
        )
