"""Registering a thing for the length of a test or a notebook, by the way that installed packages take."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mxmoe.registry import Registry


@contextmanager
def registered(registry: Registry, name: str, thing: type) -> Generator[None]:
    """
    Register a class under a name, as if a package with the entry point were installed, until the context ends.

        with registered(PASSES, "protect-busiest", ProtectBusiest):
            parse_passes("protect-busiest{bits=8},allocate-bits")

    A folder with a package's entry_points.txt is put on `sys.path`, so what is tested is the real thing. The class
    must stand at the top of a module, or of a script or notebook, where an entry point can find it.
    """
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / f"mxmoe_registered_{id(thing)}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mxmoe_registered_{id(thing)}\nVersion: 0\n")
        entry = f"[{registry.group}]\n{name} = {thing.__module__}:{thing.__qualname__}\n"
        (info / "entry_points.txt").write_text(entry)
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(folder)
