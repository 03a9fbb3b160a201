"""What a method of a batch norm layer does with its layer, read in its source: how it normalizes,
and what speaks against an exchange of that.
"""

import ast
import builtins
import collections
import types
from typing import Any

import torch
import torch.nn.functional as F

STATISTICS = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"
ARGUMENTS = ("input", *STATISTICS, "weight", "bias", "training", "momentum", "eps")
REDUCTIONS = {"mean", "std", "std_mean", "sum", "var", "var_mean"}
# What ranks have in common of tensors that they do not share; and functions that tell no more.
COMMON = {"device", "dim", "dtype", "is_cuda", "is_floating_point", "ndim"}
TELLING_COMMON = (
    *(bool, callable, float, getattr, hasattr, int, isinstance),
    *(torch.is_grad_enabled, torch.jit.is_scripting, torch.jit.is_tracing),
)
CONDITION = "where a condition on which ranks may disagree decides about it"
PLACES: dict[type[ast.AST], str] = {
    **dict.fromkeys((ast.For, ast.AsyncFor, ast.While), "in a loop"),
    **dict.fromkeys((ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), "in a loop"),
    **dict.fromkeys((ast.FunctionDef, ast.AsyncFunctionDef), "in a nested function"),
    **dict.fromkeys((ast.Lambda, ast.ClassDef), "in a nested function"),
    ast.ExceptHandler: "where an error decides about it",
}


class Unsafe(Exception):
    """Why a method is left alone: what it does, to follow the words "its forward"."""


class Reader(ast.NodeVisitor):
    """Find what a method does with its layer. Raises Unsafe."""

    def __init__(self, function: types.FunctionType, definition: ast.FunctionDef) -> None:
        self.function = function
        self.layer = function.__code__.co_varnames[0]
        self.calls_super = self.names_its_class = False
        self.used: set[tuple[str, str | None]] = set()
        self.normalizations: list[ast.Call] = []
        self.counting: list[ast.stmt] = []  # statements that add 1 to num_batches_tracked
        self.averages: list[ast.expr] = []  # 1 / num_batches_tracked
        self.counts_otherwise = False
        self.places: list[str] = []  # what surrounds a node and speaks against a normalization
        self.returned_early = False
        self._read_variables(definition)
        for statement in definition.body:
            self.visit(statement)

    def replacements(self) -> dict[int, ast.AST]:
        """The nodes that take the place of others, by the id of these."""
        layer = ast.Name(self.layer, ast.Load())
        nodes: dict[int, ast.AST] = {
            id(call.func): ast.Attribute(layer, "_synchronized_batch_norm", ast.Load())
            for call in self.normalizations
        }
        if self.counting and not self.counts_otherwise:
            # SyncBN counts in its kernel, and takes the average there: no work for the host
            for call in self.normalizations:
                counter = ast.Attribute(layer, COUNTER, ast.Load())
                call.keywords.append(ast.keyword(COUNTER, counter))
            nodes |= {id(statement): ast.Pass() for statement in self.counting}
            nodes |= {id(average): ast.Constant(None) for average in self.averages}
        return nodes

    def generic_visit(self, node: ast.AST) -> None:
        """Visit what a node holds, and know on the way that it surrounds that."""
        place = PLACES.get(type(node))
        decides = node if isinstance(node, ast.BoolOp) else None
        decides = getattr(node, "test", getattr(node, "subject", decides))
        if place is None and decides is not None and not self._is_common(decides):
            place = CONDITION
        if place is None:
            super().generic_visit(node)
            return
        self.places.append(place)
        super().generic_visit(node)
        self.places.pop()

    def visit_Return(self, node: ast.Return) -> None:
        self.generic_visit(node)
        self.returned_early |= self.places[:1] == [CONDITION]

    def visit_Call(self, node: ast.Call) -> None:
        callee = node.func
        if isinstance(callee, ast.Attribute) and self._is_super(callee.value):
            if callee.attr == "forward":
                self._check_place("super().forward")
                self.calls_super = True
            else:
                self._use(callee.attr)
            self._visit_all(node.args, node.keywords)
            return
        function = self._resolve(callee)
        if function is F.batch_norm:
            self._check_place("F.batch_norm")
            self._visit_batch_norm(node)
            return
        of_layer = len(node.args) > 1 and self._is_layer(node.args[0])
        if of_layer and function in (getattr, hasattr, isinstance):
            name = getattr(node.args[1], "value", None)
            if function is getattr and not isinstance(name, str):
                raise Unsafe("uses an attribute whose name is computed")
            if function is getattr:
                self._use(str(name))
            self._visit_all(node.args[1:])
            return
        name = getattr(callee, "attr", getattr(callee, "id", None))
        of_layer = isinstance(callee, ast.Attribute) and self._is_layer(callee.value)
        if name in REDUCTIONS and function is not sum and not of_layer:
            raise Unsafe(f"computes statistics by {ast.unparse(callee)}")
        self.generic_visit(node)

    def _visit_batch_norm(self, node: ast.Call) -> None:
        arguments: dict[Any, ast.expr] = dict(zip(ARGUMENTS, node.args, strict=False))
        arguments |= {keyword.arg: keyword.value for keyword in node.keywords}
        if None in arguments or any(isinstance(value, ast.Starred) for value in node.args):
            raise Unsafe("unpacks arguments into F.batch_norm")
        for name in STATISTICS:
            if not self._is_own(arguments.pop(name, None), name):
                raise Unsafe(f"calls F.batch_norm with another {name} than its own")
        if not self._is_common(arguments.get("training", node.func)):
            raise Unsafe(f"calls F.batch_norm {CONDITION}")
        self._visit_all(arguments.values())
        self.normalizations.append(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._is_layer(node.value):
            self._use(node.attr)
        elif self._is_super(node.value):
            if node.attr == "forward":
                raise Unsafe("takes super().forward without calling it")
            self._use(node.attr)
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id == self.layer:
            raise Unsafe("passes its layer to another function")
        if node.id in self.buffers and isinstance(node.ctx, ast.Load):
            raise Unsafe(f"uses self.{self.buffers[node.id]} outside of F.batch_norm")

    def visit_Compare(self, node: ast.Compare) -> None:
        of_buffer = self._is_counter(node.left) or any(
            self._is_own(node.left, name) for name in STATISTICS
        )
        if not (of_buffer and _compares_with_none(node)):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not (isinstance(node.targets[0], ast.Name) and node.targets[0].id in self.buffers):
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        added = node.value if isinstance(node.op, ast.Add) else None
        if not (self._is_counter(node.target) and self._counts(node, added)):
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        match node.value:
            case ast.Call(ast.Attribute(counter, "add_"), [added], []):
                if self._is_counter(counter) and self._counts(node, added):
                    return
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        match node:
            case ast.BinOp(ast.Constant(1), ast.Div(), ast.Call(ast.Name("float"), [counter], [])):
                if self._is_counter(counter):
                    self.averages.append(node)
                    return
        self.generic_visit(node)

    def _visit_all(self, *groups: Any) -> None:
        for group in groups:
            for node in group:
                self.visit(node)

    def _place(self) -> str | None:
        """What speaks against a normalization at the node that is visited."""
        return self.places[0] if self.places else CONDITION if self.returned_early else None

    def _check_place(self, called: str) -> None:
        if place := self._place():
            raise Unsafe(f"calls {called} {place}")

    def _use(self, name: str) -> None:
        if name in (*STATISTICS, "_buffers", "__dict__"):
            raise Unsafe(f"uses self.{name} outside of F.batch_norm")
        self.counts_otherwise |= name == COUNTER
        self.used.add((name, self._place()))

    def _counts(self, node: ast.stmt, added: ast.expr | None) -> bool:
        """Note that a statement counts a batch, if it does."""
        counts = isinstance(added, ast.Constant) and added.value == 1 and not self._place()
        self.counting += [node] * counts
        return counts

    def _is_layer(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.layer

    def _is_counter(self, node: ast.AST) -> bool:
        return (
            isinstance(node, ast.Attribute) and node.attr == COUNTER and self._is_layer(node.value)
        )

    def _is_super(self, node: ast.AST) -> bool:
        found = isinstance(node, ast.Call) and self._resolve(node.func) is super
        self.names_its_class |= found and bool(node.args)  # type: ignore[attr-defined]
        return found

    def _is_own(self, node: ast.AST | None, name: str) -> bool:
        """Whether an expression is a running statistic of the layer, or in some settings None."""
        match node:
            case ast.Attribute(layer, attribute):
                return attribute == name and self._is_layer(layer)
            case ast.Name(variable):
                return self.buffers.get(variable) == name
            case ast.IfExp(test, ast.Constant(None), way) | ast.IfExp(
                test, way, ast.Constant(None)
            ):
                return self._is_common(test) and self._is_own(way, name)
        return False

    def _is_common(self, node: ast.AST) -> bool:
        """Whether ranks get the same from an expression: from settings of the layer, and from what
        their inputs have in common.
        """
        if type(node) in PLACES:
            return False
        match node:
            case ast.Name(name):
                return name not in self.local or name == self.layer or name in self.settings
            case ast.Attribute(value, attribute):
                return attribute in COMMON or self._is_common(value)
            case ast.Compare() if _compares_with_none(node):
                return True
            case ast.Call(ast.Attribute(_, "dim" | "is_floating_point"), []):
                return True
            case ast.Call(function):
                if self._resolve(function) not in TELLING_COMMON:
                    return False
                return self._resolve(function) is isinstance or all(map(self._is_common, node.args))
        return all(map(self._is_common, ast.iter_child_nodes(node)))

    def _resolve(self, node: ast.AST) -> Any:
        """What an expression of modules and names stands for, or None if it is anything else."""
        match node:
            case ast.Attribute(value, attribute):
                module = self._resolve(value)
                if isinstance(module, types.ModuleType):
                    return getattr(module, attribute, None)
            case ast.Name(name) if name not in self.local:
                return self.names.get(name)
        return None

    def _read_variables(self, definition: ast.FunctionDef) -> None:
        """Find the variables that hold settings, and those that hold running statistics."""
        code, cells = self.function.__code__, self.function.__closure__ or ()
        free = dict(zip(code.co_freevars, cells, strict=True))
        self.names = {**vars(builtins), **self.function.__globals__}
        self.names |= {name: getattr(cell, "cell_contents", None) for name, cell in free.items()}
        self.local = {*code.co_varnames, *code.co_cellvars}
        self.settings: set[str] = set()
        self.buffers: dict[str, str] = {}
        values, deciders = _assignments(definition)
        size = -1
        while size < len(self.settings):  # a setting may be made from another
            size = len(self.settings)
            self.settings |= {
                name
                for name in values
                if all(map(self._is_common, [*values[name], *deciders[name]]))
            }
        for name, group in values.items():
            for statistic in STATISTICS:
                rest = [value for value in group if not self._is_own(value, statistic)]
                none = all(map(_is_none, rest))
                if len(rest) < len(group) and none and all(map(self._is_common, deciders[name])):
                    self.buffers[name] = statistic


def _assignments(
    definition: ast.FunctionDef,
) -> tuple[dict[str, list[ast.expr]], dict[str, list[ast.AST]]]:
    """What is assigned to variables that are bound by `name = value` alone; and what decides
    whether it is, a condition or a loop.
    """
    values: dict[str, list[ast.expr]] = {}
    deciders: dict[str, list[ast.AST]] = {}
    bound: collections.Counter[str] = collections.Counter()

    def collect(node: ast.AST, around: list[ast.AST]) -> None:
        match node:
            case ast.Assign([ast.Name(name)], value):
                values.setdefault(name, []).append(value)
                deciders.setdefault(name, []).extend(around)
            case ast.arg(name) | ast.Name(name, ast.Store()):
                bound[name] += 1
        decider = node if type(node) in PLACES else None
        decider = getattr(node, "test", getattr(node, "subject", decider))
        for child in ast.iter_child_nodes(node):
            collect(child, around if decider is None else [*around, decider])

    for node in [definition.args, *definition.body]:
        collect(node, [])
    simple = {name: group for name, group in values.items() if bound[name] == len(group)}
    return simple, deciders


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _compares_with_none(node: ast.Compare) -> bool:
    identity = len(node.ops) == 1 and isinstance(node.ops[0], ast.Is | ast.IsNot)
    return identity and _is_none(node.comparators[0])
