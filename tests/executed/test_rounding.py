"""The fused multiply-add of the executor is rounded once, whatever the numbers are."""

import math
from fractions import Fraction

import numpy as np
import pytest
from executor.rounding import fma32, fma64, round_to_bfloat16, widen_bfloat16
from hypothesis import example, given, settings
from hypothesis import strategies as st

FLOAT64 = st.floats(width=64, allow_nan=False, allow_infinity=False)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rounded(exact: Fraction, dtype: type) -> float:
    """The nearest float, by the definition: of the two around it, the nearer, then the even one."""
    if dtype is np.float64:
        try:
            return float(exact)  # Python divides integers with one rounding
        except OverflowError:
            return math.inf if exact > 0 else -math.inf
    limit = Fraction(float(np.finfo(np.float32).max)) + Fraction(2) ** 103
    if abs(exact) >= limit:
        return math.inf if exact > 0 else -math.inf
    exponent = -149 if exact == 0 else max(-149, _exponent(exact) - 23)
    return float(round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def _exponent(exact: Fraction) -> int:
    guess = abs(exact).numerator.bit_length() - exact.denominator.bit_length()
    return guess if abs(exact) >= Fraction(2) ** guess else guess - 1


def fused(a, b, c, dtype) -> float:
    function = {np.float32: fma32, np.float64: fma64}[dtype]
    with np.errstate(all="ignore"):
        return float(function(*(np.array([value], dtype) for value in (a, b, c)))[0])


@settings(max_examples=400, deadline=None)
@given(FLOAT64, FLOAT64, FLOAT64)
@example(1 + 2**-52, 1 - 2**-53, -1.0)
@example(1 + 2**-27, 1 + 2**-27, 2.0**-54)
@example(2.0**-600, 2.0**-600, 5e-324)
@example(2.0**600, 2.0**600, -math.ldexp(1, 1023))
def test_float64_is_that_of_fractions(a, b, c):
    assert fused(a, b, c, np.float64) == rounded(
        Fraction(a) * Fraction(b) + Fraction(c), np.float64
    )


@settings(max_examples=400, deadline=None)
@given(FLOAT32, FLOAT32, FLOAT32)
@example(1 + 2**-23, 1 + 2**-23, 2.0**-70)
@example(2.0**-100, 2.0**-49, 2.0**-149)
def test_float32_is_that_of_fractions(a, b, c):
    assert fused(a, b, c, np.float32) == rounded(
        Fraction(a) * Fraction(b) + Fraction(c), np.float32
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_that_cancel_and_ties_are_those_of_fractions(dtype):
    """A million drawn cases reach few of these: c near -a * b, and results half between two."""
    random = np.random.default_rng(0)
    digits = np.finfo(dtype).nmant
    a, b = (random.uniform(1, 2, 2000).astype(dtype) for _ in range(2))
    near = (-(a * b) * (1 + random.integers(-2, 3, 2000) * 2.0**-digits)).astype(dtype)
    half = np.ldexp(random.integers(2**digits, 2 ** (digits + 1), 2000), 0).astype(dtype)
    tie = np.full(2000, 0.5, dtype)
    beside = dtype(1) + random.integers(-1, 2, 2000).astype(dtype) * np.finfo(dtype).eps
    function = {np.float32: fma32, np.float64: fma64}[dtype]
    for operands in ((a, b, near), (tie, beside, half), (-tie, beside, half)):
        exact = (
            Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            for x, y, z in zip(*operands, strict=True)
        )
        expected = [rounded(value, dtype) for value in exact]
        assert function(*operands).tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("a", "b", "c", "result"),
    [
        (math.inf, 0.0, 1.0, math.nan),
        (math.inf, 1.0, -math.inf, math.nan),
        (1.0, math.nan, 1.0, math.nan),
        (1e30, 1e30, -math.inf, -math.inf),
        (0.0, 5.0, -2.0, -2.0),
    ],
)
def test_infinity_and_nan(a, b, c, result, dtype):
    assert fused(a, b, c, dtype) == pytest.approx(result, nan_ok=True)


def test_the_sign_of_zero():
    assert math.copysign(1, fused(-1.0, 0.0, -0.0, np.float64)) == -1
    assert math.copysign(1, fused(-1.0, 1.0, 1.0, np.float64)) == 1


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even():
    """Every float32 whose upper 17 bits are any, and that ends below, at or above a tie."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | np.uint32(lower)).view(np.float32)
        finite = np.isfinite(values)
        bits = round_to_bfloat16(values)
        up = (lower > 0x8000) | ((lower == 0x8000) & (upper >> 16 & 1 == 1))
        expected = ((upper >> 16) + up).astype(np.uint16)
        assert (bits[finite] == expected[finite]).all()
        assert (bits[np.isnan(values)] == 0x7FFF).all()
    kept = widen_bfloat16(np.arange(1 << 16, dtype=np.uint16))
    number = ~np.isnan(kept)
    assert (round_to_bfloat16(kept)[number] == np.arange(1 << 16)[number]).all()
