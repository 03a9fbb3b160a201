"""What the instructions compute that touch nothing but registers: a table from the dotted form to a
function of numpy arrays.

To add an opcode, `define` it: the form, the function, and the types of its operands. A form that is
not in the table is an error, so that no modifier is overlooked.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .rounding import Array, fma32, fma64, round_to_bfloat16, widen_bfloat16

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),  # its bits: numpy has no such number
}
SIGNED = ("s16", "s32", "s64")
UNSIGNED = ("u16", "u32", "u64")
BITS = ("b16", "b32", "b64")
FLOATS = ("f32", "f64")


class Opcode(NamedTuple):
    """A function of arrays. `approximate`: the hardware's result may be up to that many units in
    the last place beside it.
    """

    function: Callable[..., NDArray]
    operands: tuple[str, ...]
    result: str
    approximate: int = 0


OPCODES: dict[str, Opcode] = {}


def define(form: str, function: Any, *operands: str, to: str = "", approximate: int = 0) -> None:
    """Enter a form; its result has the type `to`, or that of the first operand."""
    OPCODES[form] = Opcode(function, operands, to or operands[0], approximate)


def _flush(a: Array) -> Array:
    """.ftz: subnormal numbers are zeros, of their sign."""
    return np.where(np.abs(a) < np.finfo(a.dtype).tiny, np.copysign(a.dtype.type(0), a), a)


# Integers: modulo 2**bits.


def _divide(a: Array, b: Array) -> Array:
    """Towards zero. What a division by 0 gives the specification leaves open: here, all ones."""
    quotient = np.floor_divide(a, b)
    quotient = quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)
    return np.where(b == 0, ~np.zeros_like(a), quotient)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, ~np.zeros_like(a), np.fmod(a, b))


def _multiply_wide(kind: str) -> Callable[..., Array]:
    wide = TYPES[f"{kind[0]}{2 * int(kind[1:])}"]
    return lambda a, b: a.astype(wide) * b.astype(wide)


def _upper_half(multiply: Callable[..., Array]) -> Callable[..., Array]:
    return lambda a, b: (multiply(a, b) >> (8 * a.itemsize)).astype(a.dtype)


def _shift_left(a: Array, by: Array) -> Array:
    width = 8 * a.itemsize
    return np.where(by < width, a << np.minimum(by, width - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Array, by: Array) -> Array:
    """Of a signed number, copies of the sign come in, and are all that a wide shift leaves."""
    width = 8 * a.itemsize
    shifted = a >> np.minimum(by, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < width, shifted, a.dtype.type(0))


def _extract(a: Array, position: Array, length: Array) -> Array:
    """bfe: a field of bits, extended by zeros or by the field's highest bit."""
    width = 8 * a.itemsize
    position, length = position & 0xFF, length & 0xFF
    empty = length == 0
    length = np.minimum(length, width - np.minimum(position, width))  # up to the highest bit
    bits = a.view(f"u{a.itemsize}")
    one = bits.dtype.type(1)
    field = _shift_right(bits, position)
    kept = _shift_left(np.full_like(field, one), length) - one
    if a.dtype.kind == "u":
        return field & kept
    top = np.minimum(position + np.maximum(length, 1) - 1, width - 1)
    sign = (_shift_right(bits, top) & one).astype(bool) & ~empty
    return np.where(sign, field | ~kept, field & kept).view(a.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of eight; a selector's high bit asks for copies of the byte's sign."""
    eight = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(eight)
    for byte in range(4):
        choice = (selector >> np.uint32(4 * byte)).astype(np.uint64)
        chosen = eight >> (np.uint64(8) * (choice & np.uint64(7))) & np.uint64(0xFF)
        sign = np.where(chosen >= 0x80, np.uint64(0xFF), np.uint64(0))
        chosen = np.where(choice & np.uint64(8), sign, chosen)
        result = result | chosen << np.uint64(8 * byte)
    return result.astype(np.uint32)


for _kind in SIGNED + UNSIGNED:
    define(f"add.{_kind}", np.add, _kind, _kind)
    define(f"sub.{_kind}", np.subtract, _kind, _kind)
    define(f"mul.lo.{_kind}", np.multiply, _kind, _kind)
    define(f"mad.lo.{_kind}", lambda a, b, c: a * b + c, _kind, _kind, _kind)
    define(f"div.{_kind}", _divide, _kind, _kind)
    define(f"rem.{_kind}", _remainder, _kind, _kind)
    define(f"min.{_kind}", np.minimum, _kind, _kind)
    define(f"max.{_kind}", np.maximum, _kind, _kind)
    define(f"shr.{_kind}", _shift_right, _kind, "u32")
for _kind in ("s16", "s32", "u16", "u32"):
    _wide, _multiply = f"{_kind[0]}{2 * int(_kind[1:])}", _multiply_wide(_kind)
    define(f"mul.wide.{_kind}", _multiply, _kind, _kind, to=_wide)
    define(f"mul.hi.{_kind}", _upper_half(_multiply), _kind, _kind)
    define(
        f"mad.wide.{_kind}", lambda a, b, c, f=_multiply: f(a, b) + c, _kind, _kind, _wide, to=_wide
    )
for _kind in SIGNED:
    define(f"neg.{_kind}", np.negative, _kind)
for _kind in ("s32", "s64", "u32", "u64"):
    define(f"bfe.{_kind}", _extract, _kind, "u32", "u32")
for _kind in (*BITS, "pred"):
    define(f"and.{_kind}", np.bitwise_and, _kind, _kind)
    define(f"or.{_kind}", np.bitwise_or, _kind, _kind)
    define(f"xor.{_kind}", np.bitwise_xor, _kind, _kind)
    define(f"not.{_kind}", np.bitwise_not, _kind)
for _kind in BITS:
    define(f"shl.{_kind}", _shift_left, _kind, "u32")
define("prmt.b32", _permute, "b32", "b32", "b32")


# Floating point: IEEE 754, to nearest even. A result that is not a number has one pattern of bits.


def _canonical(function: Callable[..., Array]) -> Callable[..., Array]:
    def quiet(*operands: Array) -> Array:
        result = function(*operands)
        return np.where(np.isnan(result), _NAN[result.dtype.itemsize], result)

    return quiet


_NAN: dict[int, Array] = {
    4: np.array([0x7FFFFFFF], np.uint32).view(np.float32),
    8: np.array([0x7FF8000000000000], np.uint64).view(np.float64),
}


def _least(a: Array, b: Array) -> Array:
    """A number rather than a NaN; and -0 is less than +0."""
    least = np.where(np.signbit(a) & (a == b), a, np.fmin(a, b))
    return np.where(np.signbit(b) & (a == b), b, least)


def _greatest(a: Array, b: Array) -> Array:
    return -_least(-a, -b)


def _reciprocal_root(a: Array) -> Array:
    root = 1.0 / np.sqrt(_flush(a).astype(np.float64))
    return _flush(root.astype(np.float32))


for _kind, _fma in (("f32", fma32), ("f64", fma64)):
    for _name, _function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        define(f"{_name}.{_kind}", _canonical(_function), _kind, _kind)
        define(f"{_name}.rn.{_kind}", _canonical(_function), _kind, _kind)
    define(f"fma.rn.{_kind}", _canonical(_fma), _kind, _kind, _kind)
    define(f"div.rn.{_kind}", _canonical(np.divide), _kind, _kind)
    define(f"neg.{_kind}", np.negative, _kind)
    define(f"min.{_kind}", _canonical(_least), _kind, _kind)
    define(f"max.{_kind}", _canonical(_greatest), _kind, _kind)
define("abs.f32", np.abs, "f32")
define("ex2.approx.f32", _canonical(np.exp2), "f32", approximate=2)
define("div.full.f32", _canonical(np.divide), "f32", "f32", approximate=2)
define("rsqrt.approx.ftz.f32", _canonical(_reciprocal_root), "f32", approximate=2)


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    return _canonical(lambda *operands: _flush(function(*map(_flush, operands))))


define("abs.ftz.f32", _flushing(np.abs), "f32")
define("ex2.approx.ftz.f32", _flushing(np.exp2), "f32", approximate=2)
define("fma.rn.ftz.f32", _flushing(fma32), "f32", "f32", "f32")


def _pairs(function: Callable[..., Array]) -> Callable[..., Array]:
    """The same of two float32 numbers in 64 bits."""

    def both(*operands: Array) -> Array:
        return function(*(a.view(np.float32) for a in np.broadcast_arrays(*operands))).view("u8")

    return both


def _with_narrow(function: Callable[..., Array], widen: Callable[[Array], Array]) -> Any:
    """The first operand is a shorter float, which is widened."""
    return lambda a, b: function(widen(a), b)


define("fma.rn.f32x2", _pairs(_canonical(fma32)), "b64", "b64", "b64")
for _name, _function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    define(f"{_name}.f32x2", _pairs(_canonical(_function)), "b64", "b64")
    define(f"{_name}.rn.f32x2", _pairs(_canonical(_function)), "b64", "b64")
for _name, _function in (("add", np.add), ("sub", np.subtract)):
    for _kind, _widen in (("bf16", widen_bfloat16), ("f16", lambda a: a.astype(np.float32))):
        _narrow = _with_narrow(_canonical(_function), _widen)
        define(f"{_name}.rn.f32.{_kind}", _narrow, _kind, "f32", to="f32")


# Comparisons: those of floats are false where one is NaN, those with a u at the end are true.

_COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


for _name, _compare in _COMPARISONS.items():
    for _kind in SIGNED + UNSIGNED + (BITS if _name in ("eq", "ne") else ()):
        define(f"setp.{_name}.{_kind}", _compare, _kind, _kind, to="pred")
    for _kind in FLOATS:
        define(
            f"setp.{_name}.{_kind}",
            lambda a, b, f=_compare: f(a, b) & ~_unordered(a, b),
            *(_kind, _kind),
            to="pred",
        )
        define(
            f"setp.{_name}u.{_kind}",
            lambda a, b, f=_compare: f(a, b) | _unordered(a, b),
            *(_kind, _kind),
            to="pred",
        )
for _kind in FLOATS:
    define(f"setp.nan.{_kind}", _unordered, _kind, _kind, to="pred")
    define(f"setp.num.{_kind}", lambda a, b: ~_unordered(a, b), _kind, _kind, to="pred")
for _kind in (*SIGNED, *UNSIGNED, *BITS, *FLOATS):
    define(f"selp.{_kind}", lambda a, b, p: np.where(p, a, b), _kind, _kind, "pred")
for _kind in (*SIGNED, *UNSIGNED, *BITS, *FLOATS, "pred"):
    define(f"mov.{_kind}", np.positive if _kind != "pred" else np.array, _kind)


# Conversions. Between integers: the value, modulo 2**bits; the operand may lie in a wider register.


def _pair(narrow: Callable[[Array], Array]) -> Callable[..., Array]:
    """Two numbers in one register, the first operand in the upper half."""

    def both(upper: Array, lower: Array) -> Array:
        high, low = (narrow(part).view(np.uint16).astype(np.uint32) for part in (upper, lower))
        return high << np.uint32(16) | low

    return both


def _to_float16(a: Array) -> Array:
    return np.where(np.isnan(a), 0x7FFF, a.astype(np.float16).view(np.uint16)).astype(np.uint16)


def _to_integer(a: np.ndarray) -> np.ndarray:
    """Towards zero; what is too large becomes the nearest 64-bit integer, and NaN 0."""
    whole = np.trunc(np.where(np.isnan(a), 0.0, a))
    inside = np.abs(whole) < 2.0**63
    limits = np.where(whole > 0, np.iinfo(np.int64).max, np.iinfo(np.int64).min)
    return np.where(inside, np.where(inside, whole, 0.0).astype(np.int64), limits)


def _convert(kind: str) -> Callable[[Array], Array]:
    return lambda a: a.astype(TYPES[kind])


_INTEGERS = ("s8", "u8", *SIGNED, *UNSIGNED)
for _kind in _INTEGERS:
    for _to in _INTEGERS:
        define(f"cvt.{_to}.{_kind}", _convert(_to), _kind, to=_to)
    for _to in FLOATS:
        define(f"cvt.rn.{_to}.{_kind}", _convert(_to), _kind, to=_to)
for _kind in FLOATS:
    define(f"cvt.rzi.s64.{_kind}", _to_integer, _kind, to="s64")
define("cvt.f64.f32", _convert("f64"), "f32", to="f64")
define("cvt.rn.f32.f64", _canonical(_convert("f32")), "f64", to="f32")
define("cvt.f32.f16", _convert("f32"), "f16", to="f32")
define("cvt.f64.f16", _convert("f64"), "f16", to="f64")
define("cvt.rn.f16.f32", _to_float16, "f32", to="b16")
define("cvt.rn.f16x2.f32", _pair(_to_float16), "f32", "f32", to="b32")
define("cvt.f32.bf16", widen_bfloat16, "bf16", to="f32")
define("cvt.f64.bf16", lambda a: widen_bfloat16(a).astype(np.float64), "bf16", to="f64")
define("cvt.rn.bf16.f32", round_to_bfloat16, "f32", to="b16")
define("cvt.rn.bf16x2.f32", _pair(round_to_bfloat16), "f32", "f32", to="b32")
