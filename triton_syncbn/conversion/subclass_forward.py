"""The forward that a subclass of torch's batch norm layers brings along: whether its batch
normalization can be synchronized, and the same forward with that exchanged.

`super().forward(x)` needs no exchange: the class that convert.py makes has SyncBN's forward there.
Of `F.batch_norm(x, self.running_mean, ...)` the function alone is exchanged, for a method of SyncBN
with the same arguments. That makes a function which is compiled from the source of the original and
shares its globals, closure, defaults and line numbers. So a call costs nothing more, torch.compile
sees plain Python, and nothing is patched that others use.
"""

import __future__

import ast
import functools
import linecache
import types
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from .method_reader import Reader, Unsafe

TORCH_FORWARDS = (_BatchNorm.forward, torch.nn.SyncBatchNorm.forward)
TORCH_LAYERS = (
    torch.nn.BatchNorm1d,
    torch.nn.BatchNorm2d,
    torch.nn.BatchNorm3d,
    torch.nn.SyncBatchNorm,
)
TORCH_CLASSES = frozenset(base for layer in TORCH_LAYERS for base in layer.__mro__)

FUTURES = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag,
    __future__.all_feature_names,
    0,
)


class Method(NamedTuple):
    """What a method of a batch norm layer does, as far as its batch normalization is concerned."""

    fault: str | None = None  # why it cannot be synchronized
    calls_super: bool = False  # it calls super().forward
    names_its_class: bool = False  # as in super(Class, self)
    used: frozenset[tuple[str, str | None]] = frozenset()  # attributes of its layer, and where
    exchanged: types.FunctionType | None = None  # its like, if it calls F.batch_norm


@functools.cache
def fault(layer_class: Any) -> str | None:
    """Why layers of a class cannot be synchronized, as what their forward does; None if they can.

    They can if their forward is that of torch's layers, or if it normalizes by `super().forward` or
    by `F.batch_norm` on the layer's own running_mean and running_var, and neither it nor the
    methods of its class that it uses

    - use running_mean and running_var otherwise, but to compare them with None;
    - compute a mean, a sum or a variance of anything;
    - pass the layer to other functions;
    - normalize in a loop or a nested function, or where a condition or an early return that ranks
      may disagree on decides about it: such as x.numel() > 0, but not self.training or x.ndim == 4;
    - are wrapped by a decorator, or have no source at hand.

    All else that they do stays as it is.
    """
    normalizes = False
    used: set[tuple[str, str | None]] = set()
    for owner in layer_class.__mro__:
        function = vars(owner).get("forward")
        if function is None:
            continue
        if function in TORCH_FORWARDS:
            normalizes = True
            break
        method = read(function)
        if found := method.fault or _misfit(method, owner, layer_class):
            return found
        used |= method.used
        normalizes |= method.exchanged is not None
        if not method.calls_super:
            break
    seen: set[tuple[str, str | None]] = set()
    while used - seen:
        name, place = min(used - seen, key=str)
        seen.add((name, place))
        for owner in layer_class.__mro__:
            attribute = vars(owner).get(name)
            function = attribute.fget if isinstance(attribute, property) else attribute
            if owner in TORCH_CLASSES or not isinstance(function, types.FunctionType):
                continue
            method = read(function)
            found = method.fault or _misfit(method, owner, layer_class)
            if found is None and (method.calls_super or method.exchanged):
                found = f"normalizes {place}" if place else None
                found = "normalizes in a property" if function is not attribute else found
            if found:
                return f"uses {name}, which {found}"
            used |= {(inner, place or inner_place) for inner, inner_place in method.used}
            normalizes |= method.exchanged is not None
    if not normalizes:
        return "calls neither super().forward nor F.batch_norm on its own running statistics"
    return None


def _misfit(method: Method, owner: type[Any], layer_class: type[Any]) -> str | None:
    """Why a method that is safe by itself cannot be exchanged in the class that owns it."""
    if method.exchanged is not None and not issubclass(owner, _BatchNorm):
        return f"calls F.batch_norm in {owner.__name__}, which is no batch norm layer"
    if method.names_its_class and issubclass(layer_class, torch.nn.SyncBatchNorm):
        return "names its class in super(), which a layer on a CPU cannot stay"
    return None


@functools.cache
def read(function: Any) -> Method:
    """What a method does; see Method and `fault`."""
    try:
        if not isinstance(function, types.FunctionType):
            raise Unsafe(f"is no Python function but of {type(function).__name__}")
        if hasattr(function, "__wrapped__"):
            raise Unsafe("is wrapped by a decorator")
        if not function.__code__.co_argcount:
            raise Unsafe("has no parameter for its layer")
        tree, definition = source(function)
        reader = Reader(function, definition)
        exchanged = None
        if reader.normalizations:
            _Replacing(reader.replacements()).visit(definition)
            code = _compiled(ast.fix_missing_locations(tree), function.__code__)
            exchanged = rebuilt(function, code)
    except Unsafe as unsafe:
        return Method(str(unsafe))
    return Method(
        None, reader.calls_super, reader.names_its_class, frozenset(reader.used), exchanged
    )


def rebuilt(
    function: Any,
    code: types.CodeType | None = None,
    class_cell: types.CellType | None = None,
) -> types.FunctionType:
    """A function like another one, with other code, or with another class for its `super()`."""
    code = code or function.__code__
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if class_cell is not None and "__class__" in cells:
        cells["__class__"] = class_cell
    duplicate = types.FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    duplicate.__kwdefaults__ = function.__kwdefaults__
    duplicate.__qualname__ = function.__qualname__
    duplicate.__dict__.update(function.__dict__)
    return duplicate


class _Replacing(ast.NodeTransformer):
    """Put nodes in the place of others, which are known by their id."""

    def __init__(self, nodes: dict[int, ast.AST]) -> None:
        self.nodes = nodes

    def visit(self, node: ast.AST) -> Any:
        if id(node) in self.nodes:
            return ast.copy_location(self.nodes[id(node)], node)
        return self.generic_visit(node)


def source(function: types.FunctionType) -> tuple[ast.Module, ast.FunctionDef]:
    """The file that a function comes from, and its definition there.

    Raises Unsafe where it cannot be found, or is not what the function was made from.
    """
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    try:
        tree = ast.parse("".join(lines))
        same = _traits(_compiled(tree, code)) == _traits(code)
    except (SyntaxError, LookupError):
        same = False
    if same:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
                first = [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
                if min(first) == code.co_firstlineno:
                    return tree, node
    raise Unsafe("has no source at hand that it was made from")


def _compiled(tree: ast.Module, code: types.CodeType) -> types.CodeType:
    """The code of a function, from the file that it comes from.

    The file is compiled as a whole, since a function's code depends on what surrounds it: on the
    name of its class, variables of functions around it, and even on what the file imports.
    """
    flags = code.co_flags & FUTURES
    codes = [compile(tree, code.co_filename, "exec", flags=flags, dont_inherit=True)]
    for made in codes:
        if (made.co_qualname, made.co_firstlineno) == (code.co_qualname, code.co_firstlineno):
            return made
        codes += [constant for constant in made.co_consts if isinstance(constant, types.CodeType)]
    raise LookupError(code.co_qualname)


def _traits(code: types.CodeType) -> tuple[Any, ...]:
    """What a function does, wherever it stands."""
    constants = [
        _traits(constant) if isinstance(constant, types.CodeType) else repr(constant)
        for constant in code.co_consts
    ]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return code.co_code, *names, constants
