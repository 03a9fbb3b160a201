"""How far what a kernel wrote is from what is right, in units of what is allowed.

Up to float32, maps are compared with reference.py, which takes the same steps in float32 on the
same moments: equal, or neighbours where the two contract differently. Sums are compared with sums
of 80-bit numbers, and so are float64 maps.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Long = NDArray[np.longdouble]
# Of a float32 sum, in units of the sum of magnitudes. A value that is rounded to 24 bits is off by
# 2**-24 of itself at most; what adding up adds is random, and less.
ROUNDING = 2.0**-24
OF_SUMS = 2 * ROUNDING  # of deviations, whose magnitudes are at most twice those of the values
OF_SQUARES = 3 * ROUNDING  # a deviation counts twice in its square, which is rounded as well
OF_PRODUCTS = 4 * ROUNDING  # a deviation, rstd, xhat and the product
# Of an element of a map, in units of its terms: where one contracts two products and the other does
# not, both products are rounded, and the inner of the sums differs by a rounding of each.
OF_TERMS = 4 * ROUNDING
OF_ACTIVATION = 6 * ROUNDING  # of the norm of a map behind a smooth activation; dx cancels
# Of a float64 sum: a lane adds up 64 numbers, and each addition may be off by half a unit.
OF_FLOAT64_SUMS = 64 * 2.0**-53
UNIT = 2.0**-52  # of float64, relative
NOISE_OF_VARIANCE = 2.0**-50  # below it, a variance is 0: see kernels/statistics.py


class Error(NamedTuple):
    """The largest error of what a kernel wrote; more than 1 is a fault."""

    kernel: str
    what: str
    dtype: str
    error: float
    identical: bool


def _long(tensor: torch.Tensor) -> Long:
    return tensor.detach().double().numpy().astype(np.longdouble)


def _worst(difference: NDArray, allowed: NDArray) -> float:
    """The largest ratio; where nothing is allowed there must be no difference."""
    difference, allowed = np.broadcast_arrays(np.abs(difference), allowed)
    if not difference.size:
        return 0.0
    ratio = np.where(difference == 0, 0, difference / np.where(allowed == 0, 1e-300, allowed))
    return float(np.inf if np.isnan(ratio).any() else ratio.max())


def _apart(actual: torch.Tensor, expected: torch.Tensor) -> NDArray:
    """Floats between the values of two tensors of any dtype: 1 where they are neighbours."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]

    def rank(tensor: torch.Tensor) -> NDArray:
        bits = tensor.detach().contiguous().view(kind).numpy().astype(np.longdouble)
        lowest = -(2.0 ** (8 * actual.element_size() - 1))
        return np.where(bits < 0, lowest - bits, bits)

    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    apart = np.abs(rank(actual) - rank(expected))
    if actual.is_floating_point():
        apart[~actual.isfinite().numpy()] = np.inf
    return apart


def of_neighbours(kernel: str, what: str, actual: torch.Tensor, expected: torch.Tensor) -> Error:
    """The most floats between two tensors."""
    largest = float(_apart(actual, expected).max(initial=0))
    return Error(kernel, what, _name(actual), largest, largest == 0)


def of_equal(kernel: str, what: str, actual: torch.Tensor, expected: torch.Tensor) -> Error:
    """What has to be the same to the last bit."""
    same = torch.equal(actual, expected)
    return Error(kernel, what, _name(actual), 0.0 if same else np.inf, same)


def of_norm(kernel: str, what: str, actual: torch.Tensor, expected: torch.Tensor) -> Error:
    """The norm of what is between two float32 maps, of which either is some roundings off: what an
    activation rounds may cancel in an element.
    """
    difference, size = _long(actual) - _long(expected), _long(expected)
    error = float(np.sqrt((difference**2).sum() / (size**2).sum()) / OF_ACTIVATION)
    return Error(kernel, what, _name(actual), error, torch.equal(actual, expected))


def of_block_sums(actual: torch.Tensor, expected: torch.Tensor, grad: torch.Tensor) -> Error:
    """Sums in a block, against the reference's: of terms near 1, as many as a channel has values;
    each of the two has a rounding of the activation's gradient in every term, and those of a sum.
    """
    terms = max(grad.numel() // grad.shape[1], 1)
    error = _worst(_long(actual) - _long(expected), OF_PRODUCTS * 4 * terms)
    return Error(
        "grad_moments", "sums of a block", _name(grad), error, torch.equal(actual, expected)
    )


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class Exact:
    """The four steps in 80-bit numbers."""

    def __init__(
        self,
        input: torch.Tensor,
        grad_output: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> None:
        self.is_double = input.dtype == torch.float64
        self.dtype = _name(input)
        self.channels = input.shape[1]
        self.x, self.dy = self._rows(input), self._rows(grad_output)
        one, zero = torch.ones(self.channels), torch.zeros(self.channels)
        self.weight = _long(one if weight is None else weight)[:, None]
        self.bias = _long(zero if bias is None else bias)[:, None]
        self.eps = np.longdouble(eps)

    def _rows(self, tensor: torch.Tensor) -> Long:
        """The values of each channel, [C, N * S]."""
        return _long(tensor.movedim(1, 0).reshape(self.channels, -1))

    def _statistics(self, sums: torch.Tensor) -> tuple[Long, Long, Long]:
        """Mean, 1 / deviation, and the mean of squares in units of variance + eps, [C, 1] each."""
        total, squares, count = np.split(_long(sums)[:, None], [self.channels, 2 * self.channels])
        count = np.maximum(count, 1)
        mean, mean_of_squares = total / count, squares / count
        variance = mean_of_squares - mean**2
        variance = np.where(variance < NOISE_OF_VARIANCE * mean_of_squares, 0, variance)
        return mean, (variance + self.eps) ** -0.5, mean_of_squares / (variance + self.eps)

    def _of_sums(
        self,
        kernel: str,
        what: str,
        actual: torch.Tensor,
        terms: Long,
        limit: float = OF_SUMS,
        beside: Long | float = 0.0,
    ) -> Error:
        limit = OF_FLOAT64_SUMS if self.is_double else limit
        difference = _long(actual) - terms.sum(1)
        error = _worst(difference, limit * np.abs(terms).sum(1) + beside)
        return Error(kernel, what, self.dtype, error, not difference.any())

    def of_moments(self, sums: torch.Tensor) -> Iterable[Error]:
        """Sums, and the count, which is exact."""
        first, second, count = sums.split((self.channels, self.channels, 1))
        yield self._of_sums("moments", "sum(x)", first, self.x)
        yield self._of_sums("moments", "sum(x**2)", second, self.x**2, OF_SQUARES)
        right = count.item() == self.x.shape[1]
        yield Error("moments", "count", self.dtype, 0.0 if right else np.inf, right)

    def of_grad_moments(
        self,
        sums: torch.Tensor,
        grads: torch.Tensor,
        grad_weight: torch.Tensor,
        grad_bias: torch.Tensor,
    ) -> Iterable[Error]:
        """Sums, and the gradients of the parameters, which are those sums, rounded."""
        mean, rstd, cancelled = self._statistics(sums)
        first, second = grads.split(self.channels)
        yield self._of_sums("grad_moments", "sum(dy)", first, self.dy)
        terms = self.dy * (self.x - mean) * rstd
        beside = self._of_terms(cancelled, np.abs(terms), np.abs(self.dy * mean * rstd)).sum(1)
        yield self._of_sums("grad_moments", "sum(dy*xhat)", second, terms, OF_PRODUCTS, beside)
        for what, total, made in (("weight", second, grad_weight), ("bias", first, grad_bias)):
            if len(made):
                if made.dtype != torch.float64:  # by way of float32
                    total = total.float()
                yield of_neighbours("grad_moments", f"grad_{what}", made, total.to(made.dtype))

    def of_normalize(
        self,
        sums: torch.Tensor,
        actual: torch.Tensor,
        expected: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> Iterable[Error]:
        """y."""
        mean, rstd, cancelled = self._statistics(sums)
        scaled = self.weight * rstd * (self.x - mean)
        of_mean = self.weight * rstd * mean
        magnitude = np.abs(scaled) + np.abs(self.bias)
        if residual is not None:
            magnitude = magnitude + np.abs(self._rows(residual))
        allowed = self._of_terms(cancelled, magnitude, np.abs(of_mean))
        exact = scaled + self.bias
        yield self._of_map("normalize", "y", actual, expected, exact, allowed, magnitude)

    def of_buffers(
        self,
        sums: torch.Tensor,
        before: dict[str, torch.Tensor | None],
        actual: dict[str, torch.Tensor | None],
        expected: dict[str, torch.Tensor | None],
    ) -> Iterable[Error]:
        """Running statistics: those of the reference or their neighbours; the counter: equal.

        Of float64, mean and variance have the errors that `_of_terms` says, and the reference its
        own; what is added to them is no larger than the buffers before and after.
        """
        mean, rstd, cancelled = self._statistics(sums)
        mean_of_squares = cancelled / rstd**2
        for name, tensor in actual.items():
            if tensor is None:
                continue
            if tensor.dtype != torch.float64:
                error = of_neighbours("normalize", name, tensor, expected[name])
                if name == "num_batches_tracked" and not error.identical:
                    error = error._replace(error=np.inf)
                yield error
                continue
            of_batch = np.abs(mean if name == "running_mean" else mean_of_squares)[:, 0]
            new, old = _long(expected[name]), _long(before[name])
            allowed = UNIT * (6 * of_batch + 2 * (np.abs(new) + np.abs(old)))
            difference = _long(tensor) - new
            yield Error(
                *("normalize", name, "float64"), _worst(difference, allowed), not difference.any()
            )

    def of_grad_input(
        self,
        sums: torch.Tensor,
        products: torch.Tensor,
        actual: torch.Tensor,
        expected: torch.Tensor,
    ) -> Iterable[Error]:
        """dx."""
        mean, rstd, cancelled = self._statistics(sums)
        first, second = np.split(_long(products)[:, None] / max(self.x.shape[1], 1), 2)
        scale, slope = self.weight * rstd, rstd * second
        terms = scale * (self.dy - first), scale * slope * (self.x - mean)
        of_means = np.abs(scale * first) + np.abs(scale * slope * mean)
        magnitude = sum(map(np.abs, terms))
        allowed = self._of_terms(cancelled, magnitude, of_means)
        exact = terms[0] - terms[1]
        yield self._of_map("grad_input", "dx", actual, expected, exact, allowed, magnitude)

    def _of_map(
        self,
        kernel: str,
        what: str,
        actual: torch.Tensor,
        of_reference: torch.Tensor,
        exact: Long,
        allowed: Long,
        magnitude: Long,
    ) -> Error:
        """Against the reference, or for float64 against 80-bit numbers.

        An element that cancels to far below its terms, whose magnitudes add up to `magnitude`, is
        one of many floats beside it: it is measured in float32 units of the terms. What float64
        coefficients may be off by, in both, is as good as equal.
        """
        if not self.is_double:
            difference = np.abs(self._rows(actual) - self._rows(of_reference))
            maps = (t.movedim(1, 0).reshape(self.channels, -1) for t in (actual, of_reference))
            apart = np.fmin(_apart(*maps), difference / np.maximum(OF_TERMS * magnitude, 1e-300))
            apart = np.where(difference <= allowed, 0, apart)
            largest = float(apart.max(initial=0))
            return Error(kernel, what, self.dtype, largest, largest == 0)
        difference = self._rows(actual) - exact
        return Error(kernel, what, self.dtype, _worst(difference, allowed), not difference.any())

    def _of_terms(self, cancelled: Long, scaled: Long, of_means: Long) -> Long:
        """What float64 arithmetic may be off by in terms that are multiplied with rstd (`scaled`)
        and in those that are a mean, or a multiple of one (`of_means`).

        1 / count is good to 2 units in the last place, so a mean is to 2.5. The variance is the
        difference of two such means: their error counts as often as the mean of squares is larger
        than the variance, and half of that is the error of the root. Each of the two factors rstd
        of a term in dx has it, with 2 units of the root itself; 2 more come from the products.
        """
        return UNIT * (2.5 * of_means + (6 + 6 * cancelled) * scaled)
