"""What follows the batch norm layers in the forward of a module, read from its torch.fx trace."""

import collections
import inspect
import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from .method_reader import Unsafe

MODULES: dict[type[Module], str] = {
    torch.nn.ReLU: "relu",
    torch.nn.ReLU6: "relu6",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.ELU: "elu",
    torch.nn.SiLU: "silu",
    torch.nn.GELU: "gelu",
    torch.nn.Hardswish: "hardswish",
}
FUNCTIONS: dict[Any, Any] = {  # and methods, by their names
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), torch.nn.ReLU),
    F.relu6: torch.nn.ReLU6,
    F.leaky_relu: torch.nn.LeakyReLU,
    F.elu: torch.nn.ELU,
    F.silu: torch.nn.SiLU,
    F.gelu: torch.nn.GELU,
    F.hardswish: torch.nn.Hardswish,
}
ADDS: dict[Any, Any] = {  # and methods, by their names
    **dict.fromkeys((operator.add, torch.add, "add"), operator.add),
    **dict.fromkeys((operator.iadd, "add_"), operator.iadd),
}
# What these return is new: no view of anything.
FRESH = (torch.nn.modules.conv._ConvNd, torch.nn.Linear, _BatchNorm)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
DEFAULT_SLOPE = 0.01


class Fold(NamedTuple):
    """What a layer can do beside its normalization."""

    layer: str
    activation: str
    slope: float
    module: str | None  # that is the activation, None of a function
    add: Any  # the operator, None without one

    def __str__(self) -> str:
        return f"{'add and ' if self.add is not None else ''}{self.activation}"


class Nodes(NamedTuple):
    """The nodes of one fold in a graph, in their order but for identities."""

    normalization: torch.fx.Node
    add: torch.fx.Node | None
    residual: int | None  # which argument of the add
    activation: torch.fx.Node
    identities: list[torch.fx.Node]


def add_into(output: Any, residual: Any) -> Any:
    """An add in place of the residual."""
    return operator.iadd(residual, output)


def has_hooks(module: Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)


class InPlaceProxy(torch.fx.Proxy):
    """Records x += y as such, and not as x = x + y."""


def _recorded(operation: Any) -> Any:
    return lambda proxy, other: proxy.tracer.create_proxy(
        "call_function", operation, (proxy, other), {}
    )


for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"):
    setattr(InPlaceProxy, f"__i{_name}__", _recorded(getattr(operator, f"i{_name}")))


class Tracer(torch.fx.Tracer):
    """Takes modules for one node, but those that hold layers of which nothing is known yet."""

    proxy_buffer_attributes = True  # what is done to them shall not be done by tracing

    def __init__(self, layers: Iterable[Any]) -> None:
        super().__init__()
        self.layers = set(layers)
        self.inlined: list[Module] = []
        self.hidden: dict[Any, str] = {}  # layers in modules that hooks, or others, make opaque

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        held = self.layers.intersection(m.modules())
        if m in held or not held:
            return True
        if has_hooks(m) or "forward" in vars(m):
            what = "has hooks" if has_hooks(m) else "has a forward that has been replaced"
            self.hidden |= dict.fromkeys(held, f"{module_qualified_name} {what}")
            return True
        self.inlined.append(m)
        return False

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return InPlaceProxy(node, self)


def traces(module: Module, layers: Iterable[Any]) -> Iterator[tuple[torch.fx.Graph, Tracer]]:
    """Trace a forward in all modes. Raises Unsafe, and what the forward raises."""
    if "forward" in vars(module):
        raise Unsafe("has been replaced")
    parameters = inspect.signature(module.forward).parameters.values()
    absent = {parameter.name: None for parameter in parameters if parameter.default is None}
    before = {inner: dict(vars(inner)) for inner in module.modules()}
    for training, arguments in itertools.product(
        (True, False), (None, absent) if absent else (None,)
    ):
        tracer = Tracer(layers)
        try:
            for inner in before:
                inner.training = training
            with torch.set_grad_enabled(training):
                graph = tracer.trace(module, arguments)
        finally:
            changed = [inner for inner, state in before.items() if _restore(inner, state)]
        if changed:
            raise Unsafe("changes attributes of its module")
        yield graph, tracer


def _restore(module: Module, state: dict[str, Any]) -> bool:
    """Whether attributes of a module are not what they were, and no more."""
    now = vars(module)
    now["training"] = state["training"]
    changed = now.keys() != state.keys() or any(now[name] is not state[name] for name in state)
    now.clear()
    now.update(state)
    return changed


class Folds:
    """What follows the layers in a graph, and why it cannot be folded into others."""

    def __init__(self, graph: torch.fx.Graph, module: Module, layers: Iterable[Any]) -> None:
        self.graph, self.module = graph, module
        self.found: dict[Fold, Nodes] = {}
        self.faults: dict[Any, str] = {}
        self.adds: set[torch.fx.Node] = set()
        calls: dict[Any, list[torch.fx.Node]] = {layer: [] for layer in layers}
        for node in graph.nodes:
            calls.get(self.called(node), []).append(node)
        called = {layer: nodes for layer, nodes in calls.items() if nodes}
        # An add of two layers' outputs goes to the one that runs last: no layer runs out of turn.
        for node in reversed(graph.nodes):
            layer = self.called(node)
            if layer not in called:
                continue
            try:
                if len(called[layer]) > 1:
                    raise Unsafe("it is called several times")
                if len(node.args) != 1 or node.kwargs:
                    raise Unsafe("it is called with other arguments than one input")
                self.find(node)
            except Unsafe as unsafe:
                self.faults[layer] = str(unsafe)

    def called(self, node: torch.fx.Node) -> Module | None:
        """The module that a node calls."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def find(self, start: torch.fx.Node) -> None:
        """Find what follows one layer. There is nothing if its output is returned: what follows is
        for other modules to say. Raises Unsafe where something else follows.
        """
        identities: list[torch.fx.Node] = []
        last, after = self.following(start, identities)
        if after.op == "output":
            return
        add = residual = operation = None
        activation = self.activation(after, last)
        if activation is None and after.target in ADDS:
            add = after
            if add in self.adds:
                raise Unsafe("its output is the residual of another layer")
            residual = self.residual(start, last, add)
            operation = ADDS[add.target]
            if operation is operator.iadd and residual == 0:
                operation = add_into
            last, after = self.following(add, identities)
            activation = self.activation(after, last)
        if activation is None:
            what = "no activation" if after.op == "output" else self.describe(after)
            raise Unsafe(f"{what} follows {'it' if add is None else 'the add after it'}")
        if add is not None:
            self.adds.add(add)
        module = str(after.target) if after.op == "call_module" else None
        fold = Fold(str(start.target), *activation, module, operation)
        self.found[fold] = Nodes(start, add, residual, after, identities)

    def following(
        self, node: torch.fx.Node, identities: list[torch.fx.Node]
    ) -> tuple[torch.fx.Node, torch.fx.Node]:
        """The one node that uses another one, past nn.Identity, and what it uses."""
        while len(node.users) == 1:
            after = next(iter(node.users))
            called = self.called(after)
            if type(called) is not torch.nn.Identity or has_hooks(called):
                return node, after
            identities.append(after)
            node = after
        raise Unsafe("its output is used several times" if node.users else "nothing follows it")

    def activation(self, node: torch.fx.Node, input: torch.fx.Node) -> tuple[str, float] | None:
        """Name and slope of the activation of an input that a node is."""
        if not node.args or node.args[0] is not input:
            return None
        module = self.called(node)
        if module is not None:
            if len(node.args) > 1 or node.kwargs or has_hooks(module):
                return None
            return _name_and_slope(module)
        if node.op not in ("call_function", "call_method") or node.target not in FUNCTIONS:
            return None
        arguments: dict[str, Any] = {}
        if len(node.args) > 1 or node.kwargs:
            if not inspect.isfunction(node.target):  # a method, or one in C: without a signature
                return None
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
            arguments = dict(itertools.islice(bound.arguments.items(), 1, None))
        if any(isinstance(value, torch.fx.Node) for value in arguments.values()):
            return None
        return _name_and_slope(FUNCTIONS[node.target](**arguments))

    def residual(self, start: torch.fx.Node, last: torch.fx.Node, add: torch.fx.Node) -> int:
        """Which argument of an add is added to the output of a layer.

        Raises Unsafe where the layer, when it runs in the place of the add, could meet other values
        than in its own, or an add in place would be missed.
        """
        if add.kwargs or len(add.args) != 2 or add.args.count(last) != 1:
            raise Unsafe("an add with more arguments than two tensors follows it")
        position = 1 - add.args.index(last)
        other = add.args[position]
        if not isinstance(other, torch.fx.Node):
            raise Unsafe("an add of a number follows it")
        in_place = ADDS[add.target] is operator.iadd
        if in_place and position == 0 and not self.is_fresh(other):
            raise Unsafe("an add in place of another tensor follows it")
        between = itertools.takewhile(lambda node: node is not add, _after(start))
        others = [
            node
            for node in between
            if node.op != "get_attr" and type(self.called(node)) is not torch.nn.Identity
        ]
        modules = [called for node in others if (called := self.called(node)) is not None]
        if any(isinstance(inner, _BatchNorm) for module in modules for inner in module.modules()):
            raise Unsafe("another layer runs before the add that follows it")
        if others and not self.is_fresh(start.args[0]):
            raise Unsafe("its input might change before the add that follows it")
        return position

    def is_fresh(self, node: Any) -> bool:
        """Whether nobody else has the output of a node."""
        while isinstance(node, torch.fx.Node) and len(node.users) == 1:
            called = self.called(node)
            if type(called) is not torch.nn.Identity:
                return isinstance(called, FRESH)
            node = node.args[0]
        return False

    def describe(self, node: torch.fx.Node) -> str:
        called = self.called(node)
        if called is not None:
            return type(called).__name__
        return str(getattr(node.target, "__name__", node.target))

    def passing(self, times: dict[Module, int]) -> list[Fold]:
        """The folds of modules that do nothing but follow a layer; times: how many names each
        module has.
        """
        folds = [fold for fold in self.found if fold.module is not None and fold.add is None]
        modules = {fold: self.module.get_submodule(fold.module or "") for fold in folds}
        following = collections.Counter(modules.values())
        calls = collections.Counter(self.called(node) for node in self.graph.nodes)
        return [
            fold
            for fold, module in modules.items()
            if times[module] == 1 and calls[module] == following[module]
        ]


def _after(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    while True:
        node = node.next
        yield node


def _name_and_slope(module: Module) -> tuple[str, float] | None:
    """What a layer is told to do what a module of torch does, None if it cannot."""
    name = MODULES.get(type(module))
    if name is None or "forward" in vars(module):
        return None
    if getattr(module, "alpha", 1.0) != 1.0 or getattr(module, "approximate", "none") != "none":
        return None
    return name, float(getattr(module, "negative_slope", DEFAULT_SLOPE))
