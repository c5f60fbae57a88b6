"""Views of a training run: each class is one place where losses and pictures go."""

from .base import Sink

__all__ = ["Sink"]
