"""The weights of experts as views that can be written to: changing them changes the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mxmoe.errors import MetaWeights
from mxmoe.frontend.layout import list_layout, stack_layout
from mxmoe.frontend.lifted import LiftedBank


@dataclass(frozen=True, eq=False)
class ExpertViews:
    """One expert's own storage, by role."""

    weights: Mapping[str, Tensor]
    """Role -> [n, k], whatever way it is stored."""
    biases: Mapping[str, Tensor]
    """Role -> [n]."""


def expert_views(bank: LiftedBank) -> tuple[ExpertViews, ...]:
    """
    Give every expert of a bank as views of the module's parameters, without copying any.

    Unlike the weights of a lift, which stack a list of MLPs, writing to these changes the module for every layout.

    Raises:
        MetaWeights: they were never loaded.
    """
    if bank.kind in ("shared", "module_list"):
        layouts = [list_layout([entry], bank.path) for entry in bank.entries]
        places = [(layout, 0) for layout in layouts]
    else:
        extra = ("post_expert_norm",) if bank.kind == "routed_norm" else ()
        layout = stack_layout(bank.module, bank.path, extra)
        places = [(layout, index) for index in range(layout.experts)]
    if any(layout.is_meta for layout, _ in places):
        raise MetaWeights(name=bank.path)
    return tuple(
        ExpertViews(
            {role: load()[index] for role, load in layout.weights.items()},
            {role: load()[index] for role, load in layout.biases.items()},
        )
        for layout, index in places
    )
