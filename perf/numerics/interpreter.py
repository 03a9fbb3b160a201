"""Triton's interpreter, made to round as a GPU does."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

LONGEST_CHAIN_OF_THREAD = 16  # values of a float32 tile of the default config that a thread holds


def round_to_nearest_bfloat16() -> None:
    """Convert float32 to bfloat16 as GPUs do, to nearest even; the interpreter truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    truncating = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(
                rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16
            )
        return truncating(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast


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
