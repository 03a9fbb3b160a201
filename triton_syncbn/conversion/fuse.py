"""Fold the activation that follows a batch norm layer, and the add between them, into the layer.

What follows is read from a torch.fx trace of the module that holds them. Then

- the layer gets its activation, and where the activation is a module that does nothing else, that
  one passes its input through: all forwards stay what they are;
- an add, a function, or a module that other places share leaves only with the forward that has
  it: the module's class becomes one whose forward is the graph without it, if the source of the
  forward shows that the graph says all (plain_forward.py). Modules are called by their names.

Every layer says in its `fusion` what came of it.
"""

import collections
import functools
import importlib
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch.nn import Module

from . import plain_forward
from .followers import Fold, Folds, Nodes, Tracer, has_hooks, traces
from .method_reader import Unsafe

NOT_FUSED = "not fused: "
DEPENDS = "depends on the mode, or on an optional argument"
logger = logging.getLogger("triton_syncbn")


class Rewritten(NamedTuple):
    """What must stay as it was for a graph to be the forward of its module."""

    passed_over: tuple[Module, ...]  # modules that it does not call any more
    children: tuple[tuple[Module, dict[str, Module | None]], ...]
    settings: tuple[tuple[Module, str, Any], ...]

    def holds(self) -> bool:
        """Whether no module has got a hook, another child or another setting."""
        for module in self.passed_over:
            if has_hooks(module) or "forward" in vars(module):
                return False
        for module, children in self.children:
            if module._modules != children:
                return False
        return all(getattr(module, name) == value for module, name, value in self.settings)


def fuse_layers(model: Module, sync_class: type[Any]) -> None:
    """Fold what follows the `sync_class` layers of a model into them; see
    SyncBN.convert_sync_batchnorm.
    """
    times = collections.Counter(module for _, module in model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    layers: dict[Any, str] = {}  # and what has come of them
    layer: Any
    for layer in names:
        if not isinstance(layer, sync_class):
            continue
        if layer.fused_activation is not None:
            layers[layer] = layer.fusion or f"made with {layer.fused_activation}"
        elif has_hooks(layer):
            layers[layer] = f"{NOT_FUSED}it has hooks"
        elif times[layer] > 1:
            layers[layer] = f"{NOT_FUSED}it has several names"
        elif type(layer).forward is not sync_class.forward:
            layers[layer] = _fold_own_activation(layer, sync_class, times, names[layer])
        else:
            layers[layer] = ""
    for module in reversed(names):  # what a module holds comes before it
        held = [layer for layer in module.modules() if layers.get(layer) == ""]
        if "fused_forward" in vars(module):
            layers.update((layer, layer.fusion) for layer in held)
        elif held and module not in layers and type(module).forward is not Module.forward:
            layers.update(_fold_in(module, held, times, names))
    for layer, fusion in layers.items():
        layer.__dict__["fusion"] = fusion or f"{NOT_FUSED}nothing follows it in the model"
    fused = sum(not layer.fusion.startswith(NOT_FUSED) for layer in layers)
    lines = [f"{names[layer] or layer.layer_name}: {layer.fusion}" for layer in layers]
    logger.info("\n".join([f"{fused} of {len(layers)} layers are fused", *lines]))


def unfuse_layers(module: Module, sync_class: type[Any]) -> None:
    """Undo `fuse_layers`. Raises ValueError where what is fused with each other lies outside."""
    parts: list[Any] = [part for part in module.modules() if "fused_layers" in vars(part)]
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, sync_class)]
    known = {name for part in parts for name in part.fused_layers}
    fused = {layer.fused_as for layer in layers if layer.fused_as is not None}
    if known != fused:
        raise ValueError(
            "module: expected all that is fused with each other, got a part of what is fused with "
            f"layer {min(known ^ fused)!r}"
        )
    for part in parts:
        _restore(part)
    for layer in layers:
        _restore_layer(layer)


def _restore(part: Any) -> None:
    original = vars(type(part))["made_of"][1][0]
    part.__dict__.pop("fused_layers")
    part.__dict__.pop("fused_forward", None)
    part.__class__ = original


def _restore_layer(layer: Any) -> None:
    if layer.fused_as is not None:
        for name in ("fused_activation", "fused_slope", "fused_add", "fused_as"):
            layer.__dict__.pop(name, None)
    layer.__dict__.pop("fusion", None)


def _undo(module: Any) -> None:
    """Give a module its own forward back, as what it was exchanged under does not hold any more."""
    names = module.fused_layers
    _restore(module)
    for layer in module.modules():
        if vars(layer).get("fused_as") in names:
            _restore_layer(layer)
            layer.__dict__["fusion"] = f"{NOT_FUSED}its surroundings have changed"
    logger.warning(
        "no longer fused: %s; a module has got a hook, another child or another setting",
        ", ".join(names),
    )


def _fold_in(
    module: Module, layers: list[Any], times: dict[Module, int], names: dict[Module, str]
) -> dict[Any, str]:
    """Fold what the forward of one module shows; what has come of the layers that it calls."""
    place = f"the forward of {type(module).__name__} {names[module]!r}"
    try:
        graphs, tracers = zip(*traces(module, layers), strict=True)
        folds, *others = (Folds(graph, module, layers) for graph in graphs)
        if any(other.found.keys() != folds.found.keys() for other in others):
            raise Unsafe(DEPENDS)
    except Exception as error:  # a forward may raise anything when it is traced
        return dict.fromkeys(layers, f"{NOT_FUSED}{place} {_explain(error)}")
    faults = tracers[0].hidden | folds.faults
    outcome = {layer: f"{NOT_FUSED}{fault} in {place}" for layer, fault in faults.items()}
    fused = {fold: module.get_submodule(fold.layer) for fold in folds.found}
    passing = folds.passing(times)
    exchanged = {fold: nodes for fold, nodes in folds.found.items() if fold not in passing}
    if exchanged:
        try:
            exchanged_layers = [names[fused[fold]] for fold in exchanged]
            _rewrite(module, graphs, tracers[0], exchanged, exchanged_layers)
        except Unsafe as unsafe:
            for fold in exchanged:
                outcome[fused.pop(fold)] = f"{NOT_FUSED}{place} {unsafe}"
    for fold, layer in fused.items():
        _tell(layer, fold, names[layer])
        outcome[layer] = f"fused: {fold} of {place}"
    for name in {fold.module for fold in passing if fold.module is not None}:
        layer_names = [names[fused[fold]] for fold in passing if fold.module == name]
        _pass_through(module.get_submodule(name), layer_names)
    return outcome


def _explain(error: Exception) -> str:
    if isinstance(error, Unsafe):
        return str(error)
    return f"cannot be traced: {str(error).partition(chr(10))[0]}"


def _fold_own_activation(layer: Any, sync_class: Any, times: dict[Module, int], name: str) -> str:
    """Fold the activation that a subclass of a batch norm layer holds and calls itself."""
    original: Any = type(layer)
    layer.__class__ = _probe_class(original, sync_class)
    found: list[Fold] = []
    try:
        for graph, _ in traces(layer, ()):
            nodes = [node for node in graph.nodes if node.target is _normalized]
            if len(nodes) != 1:
                raise Unsafe("does not normalize once")
            folds = Folds(graph, layer, ())
            folds.find(nodes[0])
            if not folds.found:
                raise Unsafe("calls no activation")
            if len(folds.passing(times)) != 1:
                raise Unsafe("has no module of its own for the activation")
            found += folds.found
        if len(set(found)) != 1:
            raise Unsafe(DEPENDS)
    except Exception as error:  # a forward may raise anything when it is traced
        return f"{NOT_FUSED}the forward of {original.__name__} {_explain(error)}"
    finally:
        layer.__class__ = original
    _tell(layer, found[0], name)
    _pass_through(layer.get_submodule(found[0].module), [name])
    return f"fused: {found[0]} of its own"


def _normalized(input: Any) -> Any:
    """Stands for the normalization in the graph of a forward."""
    raise NotImplementedError


@functools.cache
def _probe_class(layer_class: Any, sync_class: Any) -> Any:
    """The class of layers that leave a node in a graph where they normalize."""

    def normalize(layer: Any, input: Any, *arguments: Any, **settings: Any) -> Any:
        return input.tracer.create_proxy("call_function", _normalized, (input,), {})

    namespace = {"forward": normalize, "_synchronized_batch_norm": normalize}
    # In the order of methods this stands before sync_class, and after classes with a forward.
    probe = type("Probe", (sync_class,), namespace)
    return type(f"Probe{layer_class.__name__}", (layer_class, probe), {})


def _tell(layer: Any, fold: Fold, name: str) -> None:
    layer.__dict__.update(
        fused_activation=fold.activation,
        fused_slope=fold.slope,
        fused_add=fold.add,
        fused_as=name,
    )


def _pass_through(activation: Any, layer_names: list[str]) -> None:
    """Let an activation return its input."""
    activation.__dict__["fused_layers"] = tuple(layer_names)
    activation_class: Any = type(activation)
    activation.__class__ = _passing_class(activation_class)


def _rewrite(
    module: Any,
    graphs: Sequence[torch.fx.Graph],
    tracer: Tracer,
    folds: dict[Fold, Nodes],
    layer_names: list[str],
) -> None:
    """Make the first graph, without these folds, the forward of a module. Raises Unsafe, and then
    has done nothing.
    """
    module_class: Any = type(module)
    reducing = (module_class.__reduce_ex__, module_class.__reduce__)
    if reducing != (object.__reduce_ex__, object.__reduce__):
        raise Unsafe("belongs to a class that is pickled in its own way")
    if module_class.forward is torch.nn.Sequential.forward:
        raise Unsafe("is that of a Sequential, of which parts may be taken")
    forwards = [module, *tracer.inlined]
    settings = [
        (inner, name, value)
        for inner in forwards
        for name, value in plain_forward.settings(inner).items()
    ]
    graph = graphs[0]
    if len({other.python_code("self").src for other in graphs}) > 1:
        raise Unsafe(DEPENDS)
    passed_over = [*tracer.inlined]
    for fold, nodes in folds.items():
        passed_over += [module.get_submodule(str(node.target)) for node in nodes.identities]
        if fold.module is not None:
            passed_over.append(module.get_submodule(fold.module))
    for node in graph.nodes:
        node.type = None
    for nodes in folds.values():
        replacement, gone = nodes.normalization, [nodes.activation, *nodes.identities]
        if nodes.add is not None and nodes.residual is not None:
            with graph.inserting_before(nodes.add):
                arguments = (*nodes.normalization.args, nodes.add.args[nodes.residual])
                replacement = graph.call_module(str(nodes.normalization.target), arguments)
            gone += [nodes.add, nodes.normalization]
        nodes.activation.replace_all_uses_with(replacement)
        for node in sorted(gone, reverse=True):  # users first
            graph.erase_node(node)
    code = graph.python_code("self")
    used = _function_names(code.src)
    names = tuple(
        (name, value.__name__ if isinstance(value, types.ModuleType) else value)
        for name, value in code.globals.items()
        if name in used
    )
    module.__dict__["fused_layers"] = tuple(layer_names)
    module.__dict__["fused_forward"] = Rewritten(
        tuple(passed_over),
        tuple((inner, dict(inner._modules)) for inner in forwards),
        tuple(settings),
    )
    module.__class__ = _rewritten_class(module_class, code.src, names)


def _function_names(source: str) -> tuple[str, ...]:
    """Names that the function of a source uses, which are not its own."""
    constants = compile(source, "<fused>", "exec").co_consts
    return next(code for code in constants if isinstance(code, types.CodeType)).co_names


@functools.cache
def _passing_class(activation_class: Any) -> Any:
    def forward(activation: Any, input: Any) -> Any:
        return input

    def extra_repr(activation: Any) -> str:
        settings = activation_class.extra_repr(activation)
        return f"{settings}, in the layer before" if settings else "in the layer before"

    return _made(_passing_class, (activation_class,), forward, extra_repr=extra_repr)


@functools.cache
def _rewritten_class(module_class: Any, source: str, names: tuple[tuple[str, Any], ...]) -> Any:
    """A class with the forward of a source; names are those that it uses, and modules by name."""
    namespace: dict[str, Any] = {
        name: importlib.import_module(value) if isinstance(value, str) else value
        for name, value in names
    }
    exec(compile(source, f"<{module_class.__name__} with fused layers>", "exec"), namespace)
    rewritten: Callable[..., Any] = namespace["forward"]

    @functools.wraps(module_class.forward)
    def forward(module: Any, *arguments: Any, **named: Any) -> Any:
        if not module.fused_forward.holds():
            _undo(module)
            return module.forward(*arguments, **named)
        return rewritten(module, *arguments, **named)

    return _made(_rewritten_class, (module_class, source, names), forward)


def _made(factory: Any, arguments: tuple[Any, ...], forward: Any, **methods: Any) -> Any:
    """A class that pickle and copy find by what it is made of."""
    original = arguments[0]
    name = f"Fused{original.__name__}"
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{original.__name__} of which layers before it have taken a part.",
        "__reduce_ex__": _reduce,
        "made_of": (factory.__name__, arguments),
        "forward": forward,
    }
    return types.new_class(
        name, (original,), exec_body=lambda body: body.update(namespace, **methods)
    )


def _reduce(part: Any, protocol: Any) -> Any:
    return _new_part, vars(type(part))["made_of"], part.__getstate__()


def _new_part(factory: str, arguments: tuple[Any, ...]) -> Any:
    made = globals()[factory](*arguments)
    return made.__new__(made)
