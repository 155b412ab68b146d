"""Compiled modules on disk."""

from mxmoe.checkpoint.store import Checkpoint, read_checkpoint, write_checkpoint

__all__ = ["Checkpoint", "read_checkpoint", "write_checkpoint"]
