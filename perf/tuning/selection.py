"""When a candidate is better than the default: pure functions of times."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

# Runs the functions of a round in turns: seconds of each name.
Timer = Callable[[Mapping[Any, Callable[[], Any]]], dict[Any, float]]
Name = TypeVar("Name")

GAIN = 0.03  # of the time of the default, in every round
ROUNDS = 3
FINALISTS = 4  # the fastest of a first round, which meet the default in the others


def finalists(first: Mapping[Name, float], default: Name) -> list[Name]:
    """The default, and the fastest of the others in a first round over all of them."""
    others = sorted((name for name in first if name != default), key=first.__getitem__)
    return [default, *others[:FINALISTS]]


def winner(rounds: Sequence[Mapping[Name, float]], default: Name) -> Name | None:
    """The fastest by its median over the rounds, of those that beat the default by `GAIN` in each
    of `ROUNDS` rounds; None where the default stays.
    """
    if len(rounds) < ROUNDS:
        return None
    proven = [
        name
        for name in rounds[0]
        if name != default and all(times[name] <= (1 - GAIN) * times[default] for times in rounds)
    ]
    return min(proven, key=lambda name: median(times[name] for times in rounds), default=None)
