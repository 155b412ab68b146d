"""Where calibration tokens come from: windows of a text's bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mxmoe.errors import TextTooShort


def byte_windows(source: str | Path | bytes, length: int, count: int, *, seed: int = 0) -> Iterator[Tensor]:
    """
    Draw windows of a text as token ids 0 to 255, int64 [1, length], for a model that reads bytes.

    The text is cut into windows that do not overlap, and `count` of them are drawn without repetition, in the order of
    the text. The same seed draws the same windows.

    Args:
        source: a file, or its bytes.
        length: tokens per window.
        count: number of windows.
        seed: of the drawing.

    Raises:
        TextTooShort: the text has fewer windows, or none is asked for.
    """
    text = source if isinstance(source, bytes) else Path(source).read_bytes()
    available = len(text) // length if length > 0 else 0
    if not 0 < count <= available:
        where = "the text" if isinstance(source, bytes) else str(source)
        raise TextTooShort(source=where, size=len(text), available=available, length=length, count=count)
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return (_ids(text[start * length : (start + 1) * length]) for start in drawn.tolist())


def _ids(window: bytes) -> Tensor:
    # a bytearray: torch warns of memory that it may not write to
    return torch.frombuffer(bytearray(window), dtype=torch.uint8).long()[None]
