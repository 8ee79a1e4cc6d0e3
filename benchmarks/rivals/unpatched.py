"""No-op: the model as it is, for the share of its answers that others keep."""

from __future__ import annotations

from rivals.common import Rival

RIVAL = Rival("no-op", "the unpatched model", "none")
