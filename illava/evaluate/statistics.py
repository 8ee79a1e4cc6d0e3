"""Intervals of shares, means and medians, so that no figure stands alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

DRAWS = 2000  # of a bootstrap
MANY = 5000  # items from which a bootstrap and the normal approximation say the same


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its 95 % interval, or of its quartiles where it says so."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """As plain values."""
        return asdict(self)


def wilson(right: int, items: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927), in 0 to 1."""
    z, p = 1.96, right / items
    middle = p + z * z / (2 * items)
    half = z * np.sqrt(p * (1 - p) / items + z * z / (4 * items * items))
    whole = 1 + z * z / items
    return (middle - half) / whole, (middle + half) / whole


def share(right: Sequence[bool]) -> Estimate:
    """The share that is true, with Wilson's interval.

    Raises:
        ValueError: nothing was counted.
    """
    if not right:
        raise ValueError("a share of nothing")
    low, high = wilson(sum(right), len(right))
    return Estimate(sum(right) / len(right), float(max(0.0, low)), float(min(1.0, high)))


def mean_of_items(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """A mean over all tokens, with a bootstrap over the items they belong to: tokens of one answer are alike.

    Args:
        sums, counts: of each item, the sum over its tokens and how many they are.

    Raises:
        ValueError: no token was counted.
    """
    total, tokens = np.asarray(sums, float), np.asarray(counts, float)
    if not tokens.sum():
        raise ValueError("a mean over nothing")
    value = float(total.sum() / tokens.sum())
    if len(total) >= MANY:
        half = 1.96 * float(np.sqrt(((total - value * tokens) ** 2).sum()) / tokens.sum())
        return Estimate(value, value - half, value + half)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(total), size=(DRAWS, len(total)))
    means = total[drawn].sum(1) / np.maximum(tokens[drawn].sum(1), 1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def middle(values: Sequence[float]) -> Estimate:
    """The median, and the quartiles as its ends.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a median of nothing")
    if len(values) == 1:
        return Estimate(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Estimate(median, low, high)
