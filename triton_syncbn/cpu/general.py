"""A map of any kind on a CPU, a block at a time.

The arithmetic stays in float32, which is as good as float64 if sums are formed with care (see
sums.py) and if, where means are far from 0 in units of the deviation, deviations from them are
what is added up and scaled.
"""

import torch
from torch import Tensor

from .memory import blocks, constant, wide
from .statistics import NEAR, Statistics, are_near
from .sums import add_up

GUESSED_FROM = 64  # values: a mean of so many is an eighth of a deviation away


class General:
    """The way of one geometry."""

    def __init__(self, shape: torch.Size, is_contiguous: bool, dtype: torch.dtype) -> None:
        samples, channels = shape[:2]
        self.values = shape.numel() // channels
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.side_by_side = not is_contiguous or self.values == samples
        has_enough = dtype == torch.float32 and self.values >= GUESSED_FROM
        self.can_guess = self.side_by_side and has_enough
        self.were_far = False  # whether means ever were: decides time, and no bit
        self.per_channel = -1, *[1] * (len(shape) - 2)
        with torch.inference_mode(False):
            self.count = torch.full((1,), self.values, dtype=torch.float64, device="cpu")
            self.none = torch.empty(0, dtype=self.dtype, device="cpu")
        zero, one = (constant(channels, value, self.dtype) for value in (0.0, 1.0))
        # Mean, variance and eps with which torch's batch norm leaves a map as it is
        self.identity = zero, one, 0.0

    def sums(
        self, input: Tensor, total: Tensor | None = None, may_guess: bool = True
    ) -> tuple[Tensor, Tensor, bool | None]:
        """sum(x) and sum(x**2); whether means are near, None if there are no values. total: the
        first sum, of float32, if it is known, and means are far.

        Where they are far, deviations are added up: from what the first values say the means are,
        if these are far, else from what the first sum says.
        """
        values, guess = self.values, None
        guesses_first = total is None and self.were_far and may_guess
        if guesses_first:
            guess = self._means_if_far(input)
        if total is None and guess is None:
            total, squares = add_up(None, input, None, self.dtype)
            is_near = are_near(total, squares, max(values, 1))
            if is_near or self.dtype == torch.float64:
                return total, squares, is_near if values else None
            if self.can_guess:
                self.were_far, guess = True, self._means_if_far(input)
        high = guess
        if high is None:
            assert total is not None
            high = (total / values).float()
        rest, squares = add_up(None, input, high, self.dtype)
        if guess is not None and not are_near(rest, squares, values):
            high = ((rest + high.double() * values) / values).float()
            rest, squares = add_up(None, input, high, self.dtype)
        shift = high.double()
        total = shift * values + rest
        squares = squares + shift * (rest + total)
        if guesses_first and guess is not None and are_near(total, squares, values, 2 * NEAR):
            # So near that only the sums themselves, which would have come first, may tell
            return self.sums(input, may_guess=False)
        return total, squares, False

    def normalize(
        self,
        input: Tensor,
        statistics: Statistics,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """By torch's batch norm, or, where channels are side by side, faster without it."""
        shift, _ = statistics.shift_and_rest(self.dtype)
        factor, added = statistics.factor_and_shift(weight, bias, eps, self.dtype)
        if self.side_by_side and not (input.itemsize == 2 and shift is None):
            return self._write(input, shift, factor, added, None)
        return self._write(input, shift, factor, added, self.identity)

    def grad_sums(
        self, grad_output: Tensor, input: Tensor, statistics: Statistics, eps: float
    ) -> tuple[Tensor, Tensor]:
        """sum(dy) and sum(dy * xhat)."""
        if statistics.is_near:
            mean = statistics.mean
            grads, products = add_up(grad_output, input, mean, self.dtype, is_near=True)
        else:
            shift, rest = statistics.shift_and_rest(self.dtype)
            grads, products = add_up(grad_output, input, shift, self.dtype)
            products = torch.addcmul(products, grads, rest, value=-1.0)
        return grads, products * statistics.rstd(eps)

    def grad_input(
        self,
        grad_output: Tensor,
        input: Tensor,
        statistics: Statistics,
        grad_moments: Tensor,
        weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        """weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat))."""
        dtype, channels = self.dtype, input.shape[1]
        shift, rest = statistics.shift_and_rest(dtype)
        scale, share = statistics.scale_and_share(weight, eps, dtype)
        grad_mean, slope = grad_moments[:channels] * share, grad_moments[channels:] * share
        dy = grad_output, scale
        if not self.side_by_side:
            batch = rest.to(dtype), statistics.variance.to(dtype), eps
            return self._write(input, shift, slope.to(dtype), grad_mean.to(dtype), batch, *dy)
        factor = statistics.rstd(eps) * slope
        added = torch.addcmul(grad_mean, factor, rest, value=-1.0)
        return self._write(input, shift, factor.to(dtype), added.to(dtype), None, *dy)

    def _means_if_far(self, input: Tensor) -> Tensor | None:
        """Means of the first values of each channel, if they are far from 0, where to find it out
        takes few calls, and spares a pass.
        """
        channels = input.shape[1]
        rows = input.as_strided((GUESSED_FROM, channels), (channels, 1))
        total, squares = rows.sum(0), (rows * rows).sum(0)
        return None if are_near(total, squares, GUESSED_FROM) else total / GUESSED_FROM

    def _write(
        self,
        input: Tensor,
        shift: Tensor | None,
        factor: Tensor,
        added: Tensor,
        batch: tuple[Tensor, Tensor, float] | None,
        grad_output: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """(x - shift) * factor + added, and + dy * scale if there is a dy; the vectors are [C].
        With a batch's mean, variance and eps, by torch's batch norm, of (x - shift - mean) /
        deviation.
        """
        dtype, output = self.dtype, torch.empty_like(input)
        # Of half precision only before anything can be added, as it rounds at the end
        takes_all = dtype == torch.float32 and shift is None and grad_output is None
        if batch is None:
            takes_all = takes_all and input.dtype == dtype
            factor, added = factor.view(self.per_channel), added.view(self.per_channel)
        if scale is not None:
            scale = scale.view(self.per_channel)
        for values, grad, result in blocks(input, grad_output, output):
            out = result if result.dtype == dtype else None
            deviations = values if takes_all else wide(values, dtype, shift, out=out)
            target = result if takes_all or result.dtype == dtype else deviations
            if batch is None:
                torch.addcmul(added, deviations, factor, out=target)
            else:
                mean, variance, eps = batch
                settings = factor, added, mean, variance, False, 0.0, eps
                torch.native_batch_norm(deviations, *settings, out=(target, self.none, self.none))
            if scale is not None:
                target.addcmul_(wide(grad, dtype, None, 1), scale)
            if target is not result:
                result.copy_(target)
        return output
