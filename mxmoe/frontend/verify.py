"""Comparing what was read off a module's structure with what the module computes: a reading that is wrong raises."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mxmoe.errors import LiftMismatch
from mxmoe.frontend.activation import Activation
from mxmoe.frontend.layout import Layout, halves, list_layout

ALLOWED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative Frobenius difference to a module that computes in this element type; a wrong reading is off by tenths."""

_TOKENS = 4
_FAR = 3.0
"""How many times beyond the last clamp the second probe reaches."""
_LIMIT = 10.0
"""Where to expect a clamp that was not read; families that clamp do so at 7 or 10."""


def check_gate(module: nn.Module, path: str, act: Activation, *, is_gated: bool, is_concatenated: bool) -> None:
    """
    Compare an activation with the module's own `_apply_gate` (or `act_fn` without a gate) on random numbers.

    Raises:
        LiftMismatch: they differ.
    """
    own = getattr(module, "_apply_gate" if is_gated else "act_fn", None)
    if own is None:
        return
    for reach in (1.0, _FAR * max(act.reach, _LIMIT)):
        columns = _random((16, _TOKENS), torch.float32) * reach
        with torch.no_grad():
            gate, up = halves(columns.unsqueeze(0), is_concatenated=is_concatenated)
            ours = act(gate[0], up[0]) if is_gated else act(None, columns)
            _compare(module, path, act, "gate", ours.T, own(columns.T))


def check_stack(module: nn.Module, path: str, layout: Layout, act: Activation, *, is_shared: bool) -> None:
    """
    Compare the first and the last expert of a stack with the module's own eager forward.

    Raises:
        LiftMismatch: they differ.
    """
    # the decorator of transformers dispatches by config; beneath it is the plain loop over experts
    forward = getattr(type(module).forward, "__wrapped__", type(module).forward)
    norm = getattr(module, "post_expert_norm", None) if getattr(module, "has_post_expert_norm", False) else None
    for index in sorted({0, layout.experts - 1}):

        def theirs(rows: Tensor, index: int = index) -> Tensor:
            choice = torch.full((len(rows), 1), index, device=rows.device)
            if is_shared:
                return forward(module, rows, rows.new_zeros(len(rows), layout.experts).scatter_(1, choice, 1))
            return forward(module, rows, choice, rows.new_ones(len(rows), 1))

        def ours(rows: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
            out, inner = evaluate(layout, index, act, rows)
            return (out if norm is None else norm(out), inner)

        _probe(module, path, layout, act, ours, theirs)


def check_mlps(entries: Sequence[nn.Module], path: str, act: Activation) -> None:
    """
    Compare the first and the last MLP of a list with its own forward, in evaluation mode.

    Raises:
        LiftMismatch: they differ.
    """
    for entry in dict.fromkeys((entries[0], entries[-1])):
        layout = list_layout([entry], path)
        forward = type(entry).forward

        def theirs(rows: Tensor, entry: nn.Module = entry, forward: Callable[..., Tensor] = forward) -> Tensor:
            return forward(entry, rows)

        def ours(rows: Tensor, layout: Layout = layout) -> tuple[Tensor, Tensor]:
            return evaluate(layout, 0, act, rows)

        with _evaluating(entry):
            _probe(entry, path, layout, act, ours, theirs)


def evaluate(layout: Layout, index: int, act: Activation, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Run one expert on rows [m, hidden] in float32: its output [m, hidden], and what goes into the activation."""
    weights, biases = layout.expert(index)

    def linear(role: str, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weights[role], biases.get(role))

    x = rows.float()
    gate = linear("gate", x) if layout.is_gated else None
    up = linear("up", x)
    return linear("down", act(gate, up)), up if gate is None else torch.cat((gate, up), dim=-1)


def _probe(
    module: nn.Module,
    path: str,
    layout: Layout,
    act: Activation,
    ours: Callable[[Tensor], tuple[Tensor, Tensor]],
    theirs: Callable[[Tensor], Tensor],
) -> None:
    """Compare near zero and beyond the last clamp: rows are scaled so that the activation's input reaches that far."""
    rows = _random((_TOKENS, layout.hidden), layout.dtype, layout.parameters[0].device)
    with torch.no_grad():
        largest = float(ours(rows)[1].abs().max())
        for reach in (1.0, _FAR * max(act.reach, _LIMIT)):
            scaled = rows * (reach / largest) if largest > 0 else rows
            _compare(module, path, act, "forward", ours(scaled)[0], theirs(scaled), layout.dtype)


def _compare(
    module: nn.Module,
    path: str,
    act: Activation,
    what: str,
    ours: Tensor,
    theirs: object,
    dtype: torch.dtype = torch.float32,
) -> None:
    allowed = ALLOWED[dtype]
    error = float("inf")
    if isinstance(theirs, Tensor) and theirs.shape == ours.shape:
        difference, size = (ours - theirs.float()).norm(), theirs.float().norm()
        if not torch.isfinite(size):
            return  # it overflows its element type, or has weights that are not finite: the quantizer names those
        error = float(difference / size) if size > 0 else float(difference)
    if not error <= allowed:
        cls = type(module).__name__
        raise LiftMismatch(cls=cls, path=path, described=str(act), what=what, error=error, allowed=allowed)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device=device, dtype=dtype)


@contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
