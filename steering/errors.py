"""The exceptions of the method. Each message names the file or field at fault and says what to do."""

from __future__ import annotations


class SteeringError(Exception):
    """Root of everything `steering` raises on purpose."""


class ShapeError(SteeringError):
    """A tensor does not have the shape that its user promised."""


class ProfileError(SteeringError):
    """A profile cannot be used: missing or damaged files, wrong version, wrong model, impossible numbers."""


class ModelError(SteeringError):
    """A model cannot be steered or served: no decoder layers found, no tokenizer, no chat template."""


class TrainingDataError(SteeringError):
    """The examples given to the trainer cannot make a profile; names the file, the row and the remedy."""
