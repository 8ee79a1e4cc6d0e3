"""Packages that only a part of illava needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from illava.errors import MissingExtraError


def required(name: str, extra: str) -> Any:
    """A module of an optional package.

    Args:
        name: for example `"PIL.Image"`.
        extra: the extra of illava that brings it.

    Raises:
        MissingExtraError: it is not installed; says how to install it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as missing:
        raise MissingExtraError(
            f'{missing.name} is not installed; run `pip install "illava[{extra}]"`'
        ) from missing


def pillow() -> Any:
    """The package PIL with its `Image` and `ImageOps`; raises MissingExtraError where it is missing."""
    for name in ("PIL.Image", "PIL.ImageOps"):
        required(name, "jobs")
    return import_module("PIL")
