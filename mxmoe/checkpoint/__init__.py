"""Compiled modules on disk."""

from mxmoe.checkpoint.origin import Origin
from mxmoe.checkpoint.store import Checkpoint, read_checkpoint, write_checkpoint

__all__ = ["Checkpoint", "Origin", "read_checkpoint", "write_checkpoint"]
