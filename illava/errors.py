"""Every error illava raises. Each message says the value, the reason and the remedy."""

from __future__ import annotations


class IllavaError(Exception):
    """Base class: `except illava.IllavaError` catches whatever illava itself raises."""


class PlanError(IllavaError, ValueError):
    """A plan that cannot be carried out: layers out of range, two budgets at once, nothing left."""


class UnsupportedModelError(IllavaError, TypeError):
    """A model of a family illava does not know."""


class SeamError(IllavaError, RuntimeError):
    """A part of the model that illava needs is missing in this version of transformers."""


class AlreadyPatchedError(IllavaError, RuntimeError):
    """Another tool has replaced the code at a place illava needs."""


class UnsupportedInputError(IllavaError, ValueError):
    """An argument of the model's call that merging cannot serve (mask, packing, features)."""


class CacheError(IllavaError, RuntimeError):
    """A key-value cache that cannot hold layers of different lengths, or that another plan filled."""


class DataError(IllavaError, ValueError):
    """A folder or file of items, or of results, that cannot be used."""


class JobError(IllavaError, RuntimeError):
    """A job that cannot go on: its work fails on everything, or another job writes to its results."""


class MissingExtraError(IllavaError, ImportError):
    """A package that only this part of illava needs, and that is not installed."""


class CheckpointError(IllavaError, RuntimeError):
    """A model that cannot be loaded or asked: no checkpoint, no weights, no processor, no such device."""


class NoPlanError(IllavaError, LookupError):
    """A search in which no plan held what was asked for."""


class OutOfMemoryError(IllavaError, MemoryError):
    """A model and its inputs that do not fit; says what would."""


class PictureError(IllavaError, ValueError):
    """Pictures to draw that are not those of the report, or a report with nothing to draw."""


class UploadError(IllavaError, ValueError):
    """An uploaded file that the web page does not take: no picture or video, or too large."""


class DemoError(IllavaError, RuntimeError):
    """The web page cannot do what it is asked: no model there, a busy port, nothing to ask about."""
