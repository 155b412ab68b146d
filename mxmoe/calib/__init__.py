"""
Observing a module while it runs: how tokens are routed, and what quantizing each linear costs in accuracy.

`observe` -> `Stats`. The statistics are numpy; torch is loaded with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mxmoe.calib.stats import BANK_MEAN, BankStats, Coverage, Norm, Stats

if TYPE_CHECKING:
    from mxmoe.calib.balanced import Balanced, sample_balanced, select_balanced
    from mxmoe.calib.facts import CHEAP, FACTS, Fact
    from mxmoe.calib.gather import HessianOptions, HessiansByBlock, collect_hessians, rereadable
    from mxmoe.calib.gradients import Loss, next_token_loss
    from mxmoe.calib.hessians import BankHessians, Hessians
    from mxmoe.calib.inputs import Batch, Feed, Inputs
    from mxmoe.calib.observer import evaluating, observe, observe_weights
    from mxmoe.calib.reduce import Expert, ExpertError, Reduction
    from mxmoe.calib.repair import Agreement, RouterRepair, repair_routers
    from mxmoe.calib.router import Router, find_router
    from mxmoe.calib.sources import byte_windows

_HOME = {
    "Agreement": "mxmoe.calib.repair",
    "CHEAP": "mxmoe.calib.facts",
    "FACTS": "mxmoe.calib.facts",
    "Balanced": "mxmoe.calib.balanced",
    "BankHessians": "mxmoe.calib.hessians",
    "Batch": "mxmoe.calib.inputs",
    "Expert": "mxmoe.calib.reduce",
    "ExpertError": "mxmoe.calib.reduce",
    "Fact": "mxmoe.calib.facts",
    "Feed": "mxmoe.calib.inputs",
    "HessianOptions": "mxmoe.calib.gather",
    "Hessians": "mxmoe.calib.hessians",
    "HessiansByBlock": "mxmoe.calib.gather",
    "Inputs": "mxmoe.calib.inputs",
    "Loss": "mxmoe.calib.gradients",
    "Reduction": "mxmoe.calib.reduce",
    "Router": "mxmoe.calib.router",
    "RouterRepair": "mxmoe.calib.repair",
    "byte_windows": "mxmoe.calib.sources",
    "collect_hessians": "mxmoe.calib.gather",
    "find_router": "mxmoe.calib.router",
    "next_token_loss": "mxmoe.calib.gradients",
    "evaluating": "mxmoe.calib.observer",
    "observe": "mxmoe.calib.observer",
    "observe_weights": "mxmoe.calib.observer",
    "repair_routers": "mxmoe.calib.repair",
    "rereadable": "mxmoe.calib.gather",
    "sample_balanced": "mxmoe.calib.balanced",
    "select_balanced": "mxmoe.calib.balanced",
}

__all__ = [
    "BANK_MEAN",
    "CHEAP",
    "FACTS",
    "Agreement",
    "Balanced",
    "BankHessians",
    "BankStats",
    "Batch",
    "Coverage",
    "Expert",
    "ExpertError",
    "Fact",
    "Feed",
    "HessianOptions",
    "Hessians",
    "HessiansByBlock",
    "Inputs",
    "Loss",
    "Norm",
    "Reduction",
    "Router",
    "RouterRepair",
    "Stats",
    "byte_windows",
    "collect_hessians",
    "evaluating",
    "find_router",
    "next_token_loss",
    "observe",
    "observe_weights",
    "repair_routers",
    "rereadable",
    "sample_balanced",
    "select_balanced",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # whatever the public name stands for
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mxmoe.calib' has no attribute {name!r}")
