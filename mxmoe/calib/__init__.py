"""
Observing a module while it runs: how tokens are routed, and what quantizing each linear costs in accuracy.

`observe` -> `Stats`. The statistics are numpy; torch is loaded with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mxmoe.calib.stats import BANK_MEAN, BankStats, Norm, Stats

if TYPE_CHECKING:
    from mxmoe.calib.inputs import Batch, Inputs
    from mxmoe.calib.observer import observe, observe_weights
    from mxmoe.calib.reduce import Expert, ExpertError, Reduction
    from mxmoe.calib.sources import byte_windows

_HOME = {
    "Batch": "mxmoe.calib.inputs",
    "Expert": "mxmoe.calib.reduce",
    "ExpertError": "mxmoe.calib.reduce",
    "Inputs": "mxmoe.calib.inputs",
    "Reduction": "mxmoe.calib.reduce",
    "byte_windows": "mxmoe.calib.sources",
    "observe": "mxmoe.calib.observer",
    "observe_weights": "mxmoe.calib.observer",
}

__all__ = [
    "BANK_MEAN",
    "BankStats",
    "Batch",
    "Expert",
    "ExpertError",
    "Inputs",
    "Norm",
    "Reduction",
    "Stats",
    "byte_windows",
    "observe",
    "observe_weights",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # whatever the public name stands for
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mxmoe.calib' has no attribute {name!r}")
