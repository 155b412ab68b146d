"""
The kinds of nonlinearity between the up and the down linear of an expert: the one definition that backends follow.

A kind is named in the IR (`mxmoe.act kind=...`) with its numbers as params. In all formulas g is the output of the gate
linear, u of the up linear; an expert without gate has only u.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mxmoe.errors import UnknownName
from mxmoe.registry import near_names

Act = Callable[[Tensor | None, Tensor, Mapping[str, float]], Tensor]

POINTWISE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
"""Kinds that are a function f of one number: f(g) * u where there is a gate, else f(u). They take no params."""


def _gated(gate: Tensor | None, kind: str) -> Tensor:
    assert gate is not None, f"{kind} needs a gate"
    return gate


def swiglu_oai(gate: Tensor | None, up: Tensor, params: Mapping[str, float]) -> Tensor:
    """(clip(u, -limit, limit) + 1) * g' * sigmoid(alpha * g') with g' = min(g, limit); the gate of gpt-oss."""
    clipped = _gated(gate, "swiglu_oai").clamp(max=params["limit"])
    linear = up.clamp(-params["limit"], params["limit"]) + 1
    return linear * clipped * torch.sigmoid(params["alpha"] * clipped)


def silu_clamped(gate: Tensor | None, up: Tensor, params: Mapping[str, float]) -> Tensor:
    """silu(min(g, limit)) * clip(u, -limit, limit); the gate of DeepSeek-V4."""
    limit = params["limit"]
    return F.silu(_gated(gate, "silu_clamped").clamp(max=limit)) * up.clamp(-limit, limit)


def silu_capped(gate: Tensor | None, up: Tensor, params: Mapping[str, float]) -> Tensor:
    """min(silu(g), limit) * clip(u, -limit, limit): clamped behind the activation; the gate of Step-3.7."""
    limit = params["limit"]
    return F.silu(_gated(gate, "silu_capped")).clamp(max=limit) * up.clamp(-limit, limit)


def swiglu_softcap(gate: Tensor | None, up: Tensor, params: Mapping[str, float]) -> Tensor:
    """cap(g, gate_cap) * sigmoid(g) * cap(u, up_cap) with cap(x, c) = c * tanh(x / c); the gate of Inkling 2."""
    gate = _gated(gate, "swiglu_softcap")
    capped = params["gate_cap"] * torch.tanh(gate / params["gate_cap"])
    return capped * torch.sigmoid(gate) * params["up_cap"] * torch.tanh(up / params["up_cap"])


def _pointwise(kind: str) -> Act:
    f = POINTWISE[kind]

    def act(gate: Tensor | None, up: Tensor, params: Mapping[str, float]) -> Tensor:
        return f(up) if gate is None else f(gate) * up

    return act


ACTS: Mapping[str, Act] = {
    **{kind: _pointwise(kind) for kind in POINTWISE},
    "swiglu_oai": swiglu_oai,
    "silu_clamped": silu_clamped,
    "silu_capped": silu_capped,
    "swiglu_softcap": swiglu_softcap,
}
"""Kind -> act(gate or None, up, params), elementwise over tensors of one shape; computed in the dtype given."""

ACT_PARAMS: Mapping[str, tuple[str, ...]] = {
    "swiglu_oai": ("alpha", "limit"),
    "silu_clamped": ("limit",),
    "silu_capped": ("limit",),
    "swiglu_softcap": ("gate_cap", "up_cap"),
}
"""Kind -> the names of its params, in the order of the formula; kinds that are not listed take none."""


def apply_act(kind: str, gate: Tensor | None, up: Tensor, params: Mapping[str, float] | None = None) -> Tensor:
    """
    Combine gate and up [..., intermediate] by the named kind; `gate` is None for experts without one.

    silu of g = 1, u = 2 is 2 / (1 + e^-1) = 1.462.

    Raises:
        UnknownName: no such kind; the message has the nearest names.
    """
    if kind not in ACTS:
        raise UnknownName(kind="activation", name=kind, near=near_names(kind, ACTS))
    return ACTS[kind](gate, up, params or {})
