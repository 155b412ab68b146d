"""
mxmoe: a mixed-precision compiler for Mixture-of-Experts blocks.

The public names load on first use, so that `import mxmoe` brings in neither torch nor numba nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mxmoe.calib import Stats, observe
    from mxmoe.compiled import CompiledMoE, load, save
    from mxmoe.compiler import compile, solve
    from mxmoe.frontend import lift
    from mxmoe.ir import Plan, Scheme, Table, parse_ir, print_ir

__version__ = "0.1.0"

_HOME = {
    "CompiledMoE": "mxmoe.compiled",
    "Plan": "mxmoe.ir",
    "Scheme": "mxmoe.ir",
    "Stats": "mxmoe.calib",
    "Table": "mxmoe.ir",
    "compile": "mxmoe.compiler",
    "lift": "mxmoe.frontend",
    "load": "mxmoe.compiled",
    "observe": "mxmoe.calib",
    "parse_ir": "mxmoe.ir",
    "print_ir": "mxmoe.ir",
    "save": "mxmoe.compiled",
    "solve": "mxmoe.compiler",
}

__all__ = [
    "CompiledMoE",
    "Plan",
    "Scheme",
    "Stats",
    "Table",
    "compile",
    "lift",
    "load",
    "observe",
    "parse_ir",
    "print_ir",
    "save",
    "solve",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # whatever the public name stands for
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mxmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
