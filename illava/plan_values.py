"""Whether what a user writes into a plan can be: layers, shares, ratios and counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from illava.errors import PlanError


def layer_tuple(name: str, layers: Any, place: str) -> tuple[Any, ...] | None:
    """Layer numbers, shares of the depth and `place`, each at most once.

    Raises:
        PlanError: anything else.
    """
    if layers is None:
        return None
    if isinstance(layers, int):
        raise PlanError(f"{name}={layers} is a single number; give a tuple, {name}=({layers},)")
    if not isinstance(layers, Iterable) or isinstance(layers, (str, bytes, Mapping)):
        raise PlanError(f"{name}={layers!r} is not a tuple of layers; give for example {name}=(2, 8)")
    layers = tuple(layers)
    wrong = [x for x in layers if x != place and not _is_layer(x)]
    if wrong:
        raise PlanError(
            f"{name}={layers}: {wrong} are not layer numbers; layers count from 0 upwards, a number between "
            f"0 and 1 is a share of the depth (0.25), and {place!r} is the only place that is no layer"
        )
    if len(set(layers)) < len(layers):
        raise PlanError(f"{name}={layers} names a layer twice; each layer merges once")
    return layers


def _is_layer(layer: Any) -> bool:
    if isinstance(layer, float):
        return 0 < layer < 1
    return isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0


def share_tuple(name: str, shares: Any, layers: tuple[Any, ...] | None) -> tuple[float, ...] | None:
    """One share for each of the layers, never rising.

    Raises:
        PlanError: anything else.
    """
    if shares is None:
        return None
    if not isinstance(shares, Iterable) or isinstance(shares, (str, bytes, Mapping)):
        raise PlanError(f"{name}={shares!r} is not a tuple of shares; give one for each merging layer")
    shares = tuple(shares)
    for share in shares:
        if share is None:
            raise PlanError(f"{name}={shares}: None is no share; give one for each merging layer")
        check_range(name, share, 0, 1, lower_open=True, hint="a picture keeps at least one token")
    if any(after > before for before, after in zip(shares, shares[1:], strict=False)):
        raise PlanError(f"{name}={shares} rises; each is the share of all tokens left, not of the last")
    if layers is None or len(layers) != len(shares):
        raise PlanError(
            f"{name} has {len(shares)} shares for {name[:3]}_layers={layers}; give one for each merging "
            "layer, the first for the lowest"
        )
    return shares


def check_range(
    name: str,
    value: float | None,
    low: float,
    high: float,
    *,
    lower_open: bool = False,
    upper_open: bool = False,
    hint: str = "",
) -> None:
    """Whether a number lies between `low` and `high`; `None` does.

    Raises:
        PlanError: it does not; ends with `hint`.
    """
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    too_low = not number or value < low or (lower_open and value == low) or value != value
    too_high = not number or value > high or (upper_open and value == high)
    if too_low or too_high:
        interval = f"{'(' if lower_open else '['}{low}, {high}{')' if upper_open else ']'}"
        raise PlanError(f"{name}={value!r} is outside {interval}{'; ' + hint if hint else ''}")


def check_count(name: str, value: Any, *, minimum: int) -> None:
    """Whether a value is a whole number, or `None`.

    Raises:
        PlanError: it is not, or less than `minimum`.
    """
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise PlanError(f"{name}={value!r} is not a whole number of at least {minimum}")
