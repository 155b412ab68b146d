"""What every benchmark writes beside its figures: machine, versions, command, date."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("mxmoe", "numpy", "torch", "numba", "xdsl", "transformers", "highspy", "pulp")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def circumstances() -> dict[str, Any]:
    """Machine, versions and the command, as every result file carries them."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {"python": platform.python_version(), **versions},
        "command": shlex.join(["python", *map(_shown, sys.argv)]),
    }


def _shown(word: str) -> str:
    """Word of a command as another machine can take it: of a path from the root on, what is below here, or its end."""
    path = Path(word)
    if not path.is_absolute():
        return word
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Print the figures and write them to `benchmarks/results/<name>.json`, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps({"benchmark": name, **circumstances(), "figures": figures}, indent=1) + "\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
    sys.stdout.write(json.dumps(figures, indent=1) + f"\nwritten to {path}\n")
    return path
