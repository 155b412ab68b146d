"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Generator[BinaryIO]:
    """
    Open a file beside `path`, and put it in the place of `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part; after an error nothing is left behind.

    Raises:
        OSError: the folder is not there or cannot be written.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write text, as UTF-8, or bytes to `path`, whole or not at all; raises what `whole_file` raises."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
