"""What is right, float64 batch normalization of the whole batch, and the distance to it."""

from numerics.oracle import Result, batch_norm, error_in_ulp, relative_error

__all__ = ["Result", "batch_norm", "error_in_ulp", "relative_error"]
