"""Named arrays and a JSON header in one npz file, written whole or not at all."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe.errors import BrokenStats
from mxmoe.files import whole_file

FORMAT = "mxmoe-stats-1"
_HEADER = "header"
# what zipfile and numpy raise on a damaged archive
_DAMAGE = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, IndexError, AttributeError, TypeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, MemoryError),
)


def write_arrays(path: Path, header: Mapping[str, Any], arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write a header and arrays to `path`; a reader sees the old file or the new one, never a part."""
    text = json.dumps({"format": FORMAT, **header})
    stored = {_HEADER: np.frombuffer(text.encode(), dtype=np.uint8), **arrays}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        np.savez(file, allow_pickle=False, **stored)


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """
    Read what `write_arrays` wrote; every array is checked against the archive's CRC.

    Raises:
        BrokenStats: the file is missing, cut short or damaged.
    """
    try:
        # opened here: numpy leaves a damaged file open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays: dict[str, NDArray[Any]] = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop(_HEADER).tobytes())
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, not {FORMAT}")
    except _DAMAGE as error:
        raise BrokenStats(path=path, reason=f"{type(error).__name__}: {error}") from error
    return header, arrays
