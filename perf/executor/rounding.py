"""Arithmetic that numpy lacks, exact to the last bit: fused multiply-add, bfloat16.

The sum of two floats is a float and an error that is a float as well (Knuth), and so is a product
(Dekker). Rounding to odd keeps in the last bit whether something was cut off, so that a second
rounding, to fewer digits, comes out as if it were the only one (Boldo and Melquiond 2008,
"Emulation of a FMA and Correctly Rounded Sums").
"""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray
SPLITTER = 2.0**27 + 1  # cuts the 53 digits of a float64 in halves
# Within these bounds no step of fma64 overflows and no error term of a product underflows.
SMALLEST_PRODUCT, LARGEST_OPERAND = 2.0**-900, 2.0**450


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once."""
    product = a.astype(np.float64) * b  # exact: 48 digits
    return _add_to_odd(product, c.astype(np.float64)).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float64, rounded once."""
    a, b, c = np.broadcast_arrays(a, b, c)
    product, product_error = _multiply(a, b)
    low, low_error = _add(c, product_error)
    high, high_error = _add(product, low)
    result = high + _add_to_odd(low_error, high_error)
    plain = (a == 0) | (b == 0) | ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(c)
    result = np.where(plain, product + c, result)
    within = (np.abs(a) < LARGEST_OPERAND) & (np.abs(b) < LARGEST_OPERAND)
    within &= (np.abs(c) < LARGEST_OPERAND) & (np.abs(product) > SMALLEST_PRODUCT)
    for index in np.flatnonzero(~(plain | within)):
        result[index] = _fma_of_fractions(float(a[index]), float(b[index]), float(c[index]))
    infinite = np.isinf(c) & np.isfinite(a) & np.isfinite(b)  # where the product overflows
    return np.where(infinite, c, result)


def _fma_of_fractions(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c  # has the sign of zero
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def _add(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _multiply(a: Array, b: Array) -> tuple[Array, Array]:
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _halves(a: Array) -> tuple[Array, Array]:
    scaled = a * SPLITTER
    high = scaled - (scaled - a)
    return high, a - high


def _add_to_odd(a: Array, b: Array) -> Array:
    """a + b, cut off so that its last bit is odd wherever it is not exact."""
    total, error = _add(a, b)
    even = total.view(np.int64) & 1 == 0
    inexact = (error != 0) & np.isfinite(total) & np.isfinite(error)
    beside = np.nextafter(total, np.copysign(np.inf, error))
    return np.where(inexact & even, beside, total)


def round_to_bfloat16(a: Array) -> Array:
    """float32 to the bits of the nearest bfloat16, ties to even."""
    bits = a.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)


def widen_bfloat16(bits: Array) -> Array:
    """The bits of a bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
