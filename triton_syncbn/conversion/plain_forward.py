"""Whether a graph that torch.fx traced of a module says all that its forward does.

A trace shows the operators of one call. It drops what Python did around them (context managers,
checkpointing, types and values that were looked at), so a forward is exchanged for its graph only
where its source shows that there is nothing of that.
"""

import ast
import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from . import subclass_forward
from .method_reader import Unsafe

_FUNCTIONS = frozenset(
    id(function)
    for namespace in (torch, F, operator)
    for name, function in vars(namespace).items()
    if callable(function) and not isinstance(function, type)
)
_EXPRESSIONS = (
    *(ast.Attribute, ast.BinOp, ast.BoolOp, ast.Call, ast.Compare, ast.Constant, ast.IfExp),
    *(ast.keyword, ast.Name, ast.Tuple, ast.UnaryOp),
    *(ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
_STATEMENTS = (ast.Assign, ast.AugAssign, ast.Expr, ast.If, ast.Pass, ast.Return)
_VALUES = (bool, int, float, str, type(None))


def settings(module: torch.nn.Module) -> dict[str, Any]:
    """The attributes of a module, other than modules and parameters, that its forward uses.

    Raises Unsafe unless that forward does nothing but call modules and functions of torch on
    tensors, and decide by settings of the module which of them.
    """
    forward: Any = type(module).forward
    if forward is torch.nn.Sequential.forward:
        return {}
    definition, layer = _definition(forward)
    found: dict[str, Any] = {}
    for statement in definition.body:
        for node in ast.walk(statement):
            if not isinstance(node, _EXPRESSIONS + _STATEMENTS):
                raise Unsafe(f"has a {type(node).__name__}")
            if isinstance(node, ast.If | ast.IfExp):
                _check_condition(node.test, layer)
            elif isinstance(node, ast.Compare | ast.BoolOp) or (
                isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
            ):
                _check_condition(node, layer)
            elif isinstance(node, ast.Call):
                _check_call(node, module, forward, layer)
        known = {id(node) for node in _calls_and_conditions(statement)}
        for node, attribute in _attributes(statement, layer).items():
            value = _follow(module, attribute)
            name = attribute[0]
            if isinstance(value, torch.nn.Module) and id(node) not in known:
                raise Unsafe(f"does more with {'.'.join(attribute)} than to call it")
            if isinstance(value, torch.nn.Module | torch.Tensor) or name == "training":
                continue  # the graph names them; it is traced in each mode
            if len(attribute) > 1 or not isinstance(value, _VALUES):
                raise Unsafe(f"uses {'.'.join(attribute)}")
            found[name] = value
    return found


@functools.cache
def _definition(forward: Any) -> tuple[ast.FunctionDef, str]:
    """The source of a forward, and how it names its module."""
    if hasattr(forward, "__wrapped__"):
        raise Unsafe("is wrapped by a decorator")
    _, definition = subclass_forward.source(forward)
    arguments = definition.args
    if definition.decorator_list:
        raise Unsafe("is wrapped by a decorator")
    if arguments.defaults or arguments.vararg or arguments.kwarg or arguments.kwonlyargs:
        raise Unsafe("has optional arguments")
    body = definition.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]  # what it says of itself
    return definition, (arguments.posonlyargs + arguments.args)[0].arg


def _path(node: ast.AST) -> tuple[str, ...] | None:
    """("a", "b") of a.b, None of what is not made of names alone."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        path = _path(node.value)
        return None if path is None else (*path, node.attr)
    return None


def _follow(start: Any, path: tuple[str, ...]) -> Any:
    try:
        return functools.reduce(getattr, path, start)
    except AttributeError as error:
        raise Unsafe(f"uses {'.'.join(path)}, which it has not") from error


def _calls_and_conditions(statement: ast.AST) -> Iterator[ast.AST]:
    """The nodes by which a statement calls something, or decides."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call):
            yield node.func
        elif isinstance(node, ast.If | ast.IfExp):
            yield from ast.walk(node.test)


def _attributes(statement: ast.AST, layer: str) -> dict[ast.AST, tuple[str, ...]]:
    """Where a statement reads its module, and the paths, such as ("block", "conv")."""
    paths = {}
    inner = set()
    for node in ast.walk(statement):
        path = _path(node)
        if path is None or path[0] != layer or id(node) in inner:
            continue
        if len(path) == 1 or not isinstance(getattr(node, "ctx", None), ast.Load):
            raise Unsafe("passes its module on, or changes it")
        paths[node] = path[1:]
        while isinstance(node, ast.Attribute):
            node = node.value
            inner.add(id(node))
    return paths


def _check_condition(test: ast.AST, layer: str) -> None:
    for node in ast.walk(test):
        if isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id != layer):
            raise Unsafe("decides by more than the settings of its module")


def _check_call(call: ast.Call, module: torch.nn.Module, forward: Any, layer: str) -> None:
    path = _path(call.func)
    if path is None:
        if not isinstance(call.func, ast.Attribute):
            raise Unsafe("calls what a call returned")
        return  # a method of a tensor
    name = ".".join(path)
    if path[0] == layer:
        # None is called where a condition on it, which is a setting, keeps that from happening
        if not isinstance(_follow(module, path[1:]), torch.nn.Module | None):
            raise Unsafe(f"calls {name}")
    elif path[0] in forward.__code__.co_varnames:
        if len(path) == 1:
            raise Unsafe(f"calls {name}")
    elif (
        path[0] not in forward.__globals__
        or id(_follow(forward.__globals__[path[0]], path[1:])) not in _FUNCTIONS
    ):
        raise Unsafe(f"calls {name}")
