"""Where Triton's interpreter differs from a GPU, and what it alone can measure."""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch


def prepare() -> None:
    """Make the interpreter of this process round as GPUs do, and no slower than it must be."""
    _round_to_nearest_bfloat16()
    _patch_language_once_a_launch()
    _look_up_dtypes_once()
    _check_overflow_in_numpy()


def _round_to_nearest_bfloat16() -> None:
    """Convert float32 to bfloat16 as GPUs do, to nearest even; the interpreter truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    truncating = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(
                rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16
            )
        return truncating(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast


def _patch_language_once_a_launch() -> None:
    """The interpreter replaces the functions of triton.language at a launch, and again at each call
    of one jitted function by another, which finds them replaced and took half of all its time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: list[set[int]] = []  # in the present launch

    @functools.cache
    def languages(function):
        return {id(tl), id(tl.core)}.intersection(map(id, function.__globals__.values()))

    def patch_once(function):
        if languages(function) in patched:
            return None
        patched.append(languages(function))
        return patch(function)

    def launch_unpatched(self, *arguments, **named):
        patched.clear()
        return launch(self, *arguments, **named)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_unpatched


def _look_up_dtypes_once() -> None:
    """The interpreter builds a table of all dtypes whenever it looks one up."""
    from triton.runtime import interpreter

    look_up = interpreter._get_np_dtype
    known: dict[str, np.dtype] = {}

    def known_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = known_dtype


def _check_overflow_in_numpy() -> None:
    """The interpreter checks sums and products of integers for overflow by a dozen of its own
    operations, each a hundred times as slow as numpy's.
    """
    from triton.runtime import interpreter

    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(left, right, operation):
        dtype = left.type.scalar
        if dtype.int_bitwidth < 64:
            operands = (side.handle.data.astype(np.int64) for side in (left, right))
            result = exact[operation.__name__](*operands)
            fits = dtype.get_int_min_value() <= result.min() <= result.max()
            assert fits and result.max() <= dtype.get_int_max_value(), f"{dtype} overflow"

    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = check


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
