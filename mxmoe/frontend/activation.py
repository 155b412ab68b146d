"""What the experts compute between up and down: a kind by name, with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mxmoe.errors import UnknownActivation, UnknownGate
from mxmoe.frontend.families import family_of
from mxmoe.quant import ACT_PARAMS, ACTS, POINTWISE, apply_act

ACT_ATTRIBUTES = ("act_fn", "activation_fn", "act", "activation", "hidden_act")
"""Where modules keep their activation, in the order of looking."""

_SAME = 1e-5
"""Two activations are the same if they differ by less than this anywhere; the closest two known differ by 5e-4."""


@dataclass(frozen=True)
class Activation:
    """A kind in `mxmoe.quant.acts.ACTS` and its numbers."""

    kind: str
    params: Mapping[str, float] = field(default_factory=dict[str, float])

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Combine gate and up [..., intermediate]."""
        return apply_act(self.kind, gate, up, self.params)

    @property
    def reach(self) -> float:
        """How far inputs must go to meet every clamp: the largest limit or cap, 0 without any."""
        return max((value for name, value in self.params.items() if name != "alpha"), default=0.0)

    def __str__(self) -> str:
        return self.kind + "".join(f" {name}={value:g}" for name, value in self.params.items())


def overrides_gate(module: nn.Module) -> bool:
    """Whether the class brings its own `_apply_gate` in place of the one transformers gives to every experts class."""
    gate = getattr(type(module), "_apply_gate", None)
    return gate is not None and gate.__name__ != "_default_apply_gate"


def describe_activation(module: nn.Module, path: str) -> Activation:
    """
    Say what a bank of experts, or an MLP, computes between up and down.

    A row of the family table decides where there is one. Otherwise the module's activation is compared with every
    pointwise kind on [-20, 20]: what equals one of them has that kind, whatever its class is called.

    Raises:
        UnknownGate: the class overrides `_apply_gate` and has no row.
        UnknownActivation: the module has no activation, or one that equals no known kind.
    """
    row = family_of(module)
    if row is None and overrides_gate(module):
        raise UnknownGate(cls=type(module).__name__, path=path, known=", ".join(k for k in ACTS if k in ACT_PARAMS))
    if row is not None:
        kind, params = row.read(module)
        if kind is not None:
            return Activation(kind, params)
    function = next((f for f in (getattr(module, name, None) for name in ACT_ATTRIBUTES) if callable(f)), None)
    kind = identify(function) if callable(function) else None
    if kind is None:
        raise UnknownActivation(cls=type(module).__name__, path=path, act=repr(function), known=", ".join(POINTWISE))
    return Activation(kind)


def identify(function: object) -> str | None:
    """
    Name the pointwise kind that a function equals on [-20, 20] to 1e-5, or None.

    `identify(torch.nn.SiLU())` and `identify(torch.nn.functional.silu)` are both "silu".
    """
    assert callable(function), f"{function!r} is no function"
    device = next((p.device for p in function.parameters()), None) if isinstance(function, nn.Module) else None
    points = torch.linspace(-20, 20, 2001, device=device)
    with torch.no_grad():
        try:
            values = function(points)
        except TypeError:  # it takes something else than one tensor, so it is no pointwise function
            return None
        if not isinstance(values, Tensor) or values.shape != points.shape or values.is_meta:
            return None
        same = (k for k, f in POINTWISE.items() if torch.allclose(f(points), values.float(), rtol=_SAME, atol=_SAME))
        return next(same, None)
