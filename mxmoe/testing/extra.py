"""Imported first: says what to install where hypothesis is missing."""

from mxmoe.errors import HypothesisMissing

try:
    import hypothesis
except ImportError as error:
    raise HypothesisMissing from error

__all__ = ["hypothesis"]
