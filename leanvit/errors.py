"""The errors leanvit raises: one line each, naming the thing, its value and what would do."""

from __future__ import annotations


class LeanVitError(Exception):
    """Base of every error that leanvit raises on purpose; the commands turn it into one line and exit code 2."""


class ConfigError(LeanVitError, ValueError):
    """A parameter, option or combination of them that cannot work."""


class UnsupportedModelError(LeanVitError, TypeError):
    """A model or block that leanvit does not know how to slim."""


class LeanVitWarning(UserWarning):
    """Something that a user should know, though the work goes on."""


class MethodError(LeanVitError, ValueError):
    """A method that cannot be applied where it was asked for."""


class InputSizeError(LeanVitError, ValueError):
    """An image or grid size that the model was not made for."""


class RestoreError(LeanVitError, RuntimeError):
    """A lean model whose dense weights are no longer all there."""


class DeployError(LeanVitError, RuntimeError):
    """A lean model that is not ready for its deployed form."""


class ExportError(LeanVitError, RuntimeError):
    """A model that cannot be exported, or a file whose outputs are not the model's."""


class DataError(LeanVitError, ValueError):
    """A data set that is missing, empty, damaged or does not fit the model."""


class CheckpointError(LeanVitError, ValueError):
    """A file or folder of weights that cannot be read or does not fit."""


class TrainingDiverged(LeanVitError, RuntimeError):
    """A loss that is not finite."""
