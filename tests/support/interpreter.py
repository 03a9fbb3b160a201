"""What Triton's interpreter alone can measure, and where it hides what a GPU would show."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from numerics.interpreter import prepare as prepare
from numerics.interpreter import products_added_as_on_a_gpu as products_added_as_on_a_gpu
from numerics.interpreter import sums_as_on_a_gpu as sums_as_on_a_gpu


class Meter:
    """Every access of the kernels launched under it, by the lanes that their masks let through."""

    def __init__(self) -> None:
        self.arguments: list[torch.Tensor] = []  # of all launches; held, so no address comes twice
        self.accesses: list[tuple[str, np.ndarray, int]] = []

    def launch(self, arguments) -> None:
        """Take note of the tensors that a kernel may touch."""
        self.arguments += [
            argument
            for argument in arguments
            if isinstance(argument, torch.Tensor) and argument.numel()
        ]

    def access(self, kind: str, pointers, mask) -> None:
        """Count an access, a "load" or a "store"; AssertionError if it leaves the arguments."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        lanes = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[lanes].astype(np.int64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for argument in self.arguments:
            inside |= _lies_in(argument, addresses, size)
        strays = addresses[~inside].tolist()
        assert not strays, f"{kind} outside of every argument of the kernel, at {strays[:8]}"
        self.accesses.append((kind, addresses, size))

    def bytes(self, kind: str) -> int:
        """Bytes loaded or stored, of all tensors together."""
        return sum(
            addresses.size * size for its_kind, addresses, size in self.accesses if its_kind == kind
        )

    def counts(self, kind: str, tensor: torch.Tensor) -> np.ndarray:
        """How often each element of a dense tensor was loaded or stored, in the order of memory."""
        total = np.zeros(tensor.numel(), dtype=np.int64)
        for its_kind, addresses, size in self.accesses:
            if its_kind == kind:
                offsets = addresses[_lies_in(tensor, addresses, size)] - tensor.data_ptr()
                assert not offsets.size or size == tensor.itemsize, "an access of another width"
                assert not (offsets % size).any(), "an access between two elements"
                total += np.bincount(offsets // size, minlength=tensor.numel())
        return total


def _lies_in(tensor: torch.Tensor, addresses: np.ndarray, size: int) -> np.ndarray:
    """Which accesses of so many bytes lie wholly in the elements of a dense tensor."""
    start = tensor.data_ptr()
    return (addresses >= start) & (addresses + size <= start + tensor.numel() * tensor.itemsize)


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Count what interpreted kernels load and store; an atomic does both.

    A lane that touches memory of no tensor argument of a launch raises, before it does so.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )
    launch = executor.__call__
    meter = Meter()

    # Accesses without a mask come here too, from create_load and create_store.
    def metered_load(self, pointers, mask, *others):
        meter.access("load", pointers, mask)
        return load(self, pointers, mask, *others)

    def metered_store(self, pointers, value, mask, *others):
        meter.access("store", pointers, mask)
        return store(self, pointers, value, mask, *others)

    def metered_atomic(self, operation, pointers, value, mask, *others):
        meter.access("load", pointers, mask)
        meter.access("store", pointers, mask)
        return atomic(self, operation, pointers, value, mask, *others)

    def metered_launch(self, *arguments, **named):
        meter.launch([*arguments, *named.values()])
        return launch(self, *arguments, **named)

    with (
        mock.patch.object(builder, "create_masked_load", metered_load),
        mock.patch.object(builder, "create_masked_store", metered_store),
        mock.patch.object(builder, "create_atomic_rmw", metered_atomic),
        mock.patch.object(executor, "__call__", metered_launch),
    ):
        yield meter


@contextlib.contextmanager
def undefined_masked_lanes() -> Iterator[None]:
    """Make lanes that a mask keeps from loading hold NaN, or a large integer, where the load gives
    no `other`: a GPU leaves them undefined, the interpreter makes them 0.
    """
    from triton.runtime import interpreter

    load = interpreter.InterpreterBuilder.create_masked_load

    def undefined_load(self, pointers, mask, other, *others):
        if other is None:
            dtype = pointers.get_element_ty()
            # All bits but the sign: NaN of any floating dtype, the largest of any integer.
            data = np.zeros(pointers.data.shape, interpreter._get_np_dtype(dtype))
            bits = data.view(f"u{data.itemsize}")
            bits[...] = np.iinfo(bits.dtype).max >> 1
            other = interpreter.TensorHandle(data, dtype)
        return load(self, pointers, mask, other, *others)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_masked_load", undefined_load):
        yield
