"""Whole networks, and the time of a training step with each layer."""
