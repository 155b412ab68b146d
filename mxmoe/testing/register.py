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
def registered(registry: Registry, name: str, thing: object) -> Generator[None]:
    """
    Register a class, function or instance, as if a package with the entry point were installed, until the context ends.

        with registered(PASSES, "protect-busiest", ProtectBusiest):
            parse_passes("protect-busiest{bits=8},allocate-bits")

    A folder with a package's entry_points.txt is put on `sys.path`, so what is tested is the real thing. It must
    stand at the top of a module, or of a script or notebook, where an entry point can find it.
    """
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / f"mxmoe_registered_{id(thing)}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mxmoe_registered_{id(thing)}\nVersion: 0\n")
        entry = f"[{registry.group}]\n{name} = {thing.__module__}:{_attribute(thing)}\n"
        (info / "entry_points.txt").write_text(entry)
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(folder)


def _attribute(thing: object) -> str:
    """Say under which name a thing stands in its module; an instance, in that of its class."""
    named = getattr(thing, "__qualname__", None)
    found = [name for name, value in vars(sys.modules[thing.__module__]).items() if value is thing]
    assert named or found, f"{thing!r} does not stand at the top of {thing.__module__}"
    return named or found[0]
