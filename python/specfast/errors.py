"""Every exception specfast raises, under one base: messages name the observed value, the limit and the remedy."""

from __future__ import annotations

from ._core import ContextFullError, NumericalError, ShapeError, SpecfastError

__all__ = [
    "ConfigurationError",
    "ContextFullError",
    "DownloadError",
    "IncompatibleDraftError",
    "KernelTrialError",
    "ModelFormatError",
    "NumericalError",
    "RingError",
    "ShapeError",
    "SpecfastError",
    "UnsupportedModelError",
]


class ConfigurationError(SpecfastError):
    """An option outside its range, or options that contradict each other."""


class ModelFormatError(SpecfastError):
    """A model directory or file that is missing, truncated, damaged or inconsistent."""


class UnsupportedModelError(SpecfastError):
    """A sound model whose architecture, quantisation or option is not supported; says what is."""


class IncompatibleDraftError(SpecfastError):
    """A draft whose tokens are not the target's."""


class KernelTrialError(SpecfastError):
    """Kernels that this GPU or its compiler refuses, or that give wrong results there."""


class RingError(SpecfastError):
    """A ring of nodes that cannot go on: a node left, or nodes that do not agree."""


class DownloadError(SpecfastError):
    """A model that could not be fetched from the hub."""
