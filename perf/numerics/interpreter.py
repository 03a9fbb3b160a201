"""Triton's interpreter, made to round as GPUs do, and no slower than it must be."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

LONGEST_CHAIN_OF_THREAD = 16  # values of a float32 tile of the default config that a thread holds


def prepare() -> None:
    """Make the interpreter of this process round as GPUs do, and no slower than it must be."""
    from triton.runtime import interpreter  # which has to be told to interpret before

    _round_to_nearest_bfloat16(interpreter)
    _patch_language_once_a_launch(interpreter)
    _look_up_dtypes_once(interpreter)
    _check_overflow_in_numpy(interpreter)


def _round_to_nearest_bfloat16(interpreter: Any) -> None:
    """Convert float32 to bfloat16 as GPUs do, to nearest even; the interpreter truncates."""
    import triton.language as tl

    truncating = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(
                rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16
            )
        return truncating(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast


def _patch_language_once_a_launch(interpreter: Any) -> None:
    """The interpreter replaces the functions of triton.language at a launch, and again at each call
    of one jitted function by another, which finds them replaced and took half of all its time.
    """
    import triton.language as tl

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[frozenset[str]] = set()  # in the present launch

    @functools.cache
    def languages(function: Any) -> frozenset[str]:
        modules = {"language": tl, "core": tl.core}
        seen = {id(value) for value in function.__globals__.values()}
        return frozenset(name for name, module in modules.items() if id(module) in seen)

    def patch_once(function: Any) -> Any:
        if languages(function) in patched:
            return None
        patched.add(languages(function))
        return patch(function)

    def launch_unpatched(self: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **named)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_unpatched


def _look_up_dtypes_once(interpreter: Any) -> None:
    """The interpreter builds a table of all dtypes whenever it looks one up."""
    look_up = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def known_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = known_dtype


def _check_overflow_in_numpy(interpreter: Any) -> None:
    """The interpreter checks sums and products of integers for overflow by a dozen of its own
    operations, each a hundred times as slow as numpy's.
    """
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    semantic = interpreter.TritonSemantic  # of which Triton 3.6 makes one for each launch
    plain = semantic.binary_op_sanitize_overflow_impl

    def check(self: Any, left: Any, right: Any, operation: Any) -> None:
        if not isinstance(self.builder, interpreter.InterpreterBuilder):
            plain(self, left, right, operation)
            return
        dtype = left.type.scalar
        if dtype.int_bitwidth < 64:
            operands = (side.handle.data.astype(np.int64) for side in (left, right))
            result = exact[operation.__name__](*operands)
            fits = dtype.get_int_min_value() <= result.min() <= result.max()
            assert fits and result.max() <= dtype.get_int_max_value(), f"{dtype} overflow"

    semantic.binary_op_sanitize_overflow_impl = check


@contextlib.contextmanager
def sums_as_on_a_gpu() -> Iterator[None]:
    """Sum tiles in the interpreter as threads do: a chain in each, and a tree over the threads.

    numpy adds up the rows of a tile one after the other, and loses digits that no GPU loses.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import ReduceOps

    plain = ReduceOps.sum

    def total(self: Any, tile: Any) -> Any:
        if self.axis is None:  # of integers
            return plain(self, tile)
        data = np.moveaxis(tile.handle.data, self.axis, 0)
        chain = min(len(data), LONGEST_CHAIN_OF_THREAD)
        data = data.reshape(chain, len(data) // chain, *data.shape[1:]).sum(0)
        while len(data) > 1:
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        data = np.moveaxis(data, 0, self.axis) if self.keep_dims else data[0]
        return self.to_tensor(data, tile.dtype)

    with mock.patch.object(ReduceOps, "sum", total):
        yield


@contextlib.contextmanager
def products_added_as_on_a_gpu() -> Iterator[None]:
    """Add float32 products in the interpreter with one rounding: `tl.fma`, and a product and a sum,
    which compilers contract. The interpreter rounds twice.
    """
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    multiply = Builder.create_fmul

    def rounded(sum: Any, like: Any) -> Any:
        return TensorHandle(sum.astype(np.float32), like.dtype.scalar)

    def product(self: Any, x: Any, y: Any) -> Any:
        result = multiply(self, x, y)
        if result.data.dtype == np.float32:  # float64 holds it
            result.exact = x.data.astype(np.float64) * y.data
        return result

    def fma(plain: Any) -> Any:
        def run(self: Any, x: Any, y: Any, z: Any) -> Any:
            if z.data.dtype != np.float32:
                return plain(self, x, y, z)
            return rounded(x.data.astype(np.float64) * y.data + z.data, z)

        return run

    def sum_with(plain: Any, operation: Any) -> Any:
        def run(self: Any, x: Any, y: Any) -> Any:
            if hasattr(x, "exact"):
                return rounded(operation(x.exact, y.data), x)
            if hasattr(y, "exact"):
                return rounded(operation(x.data, y.exact), y)
            return plain(self, x, y)

        return run

    with mock.patch.multiple(
        Builder,
        create_fmul=product,
        create_fma=fma(Builder.create_fma),
        create_fadd=sum_with(Builder.create_fadd, np.add),
        create_fsub=sum_with(Builder.create_fsub, np.subtract),
    ):
        yield
