"""Unpatched: the model as it is, for the share of its answers that others keep."""

from __future__ import annotations

from rivals.common import Rival

RIVAL = Rival("unpatched", "the model as it is", "none")
