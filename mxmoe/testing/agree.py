"""The equivalence check: two backends run the same block, and the first op and expert that differs is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from mxmoe.errors import BackendsDisagree
from mxmoe.ir import Bank, ModuleOp, MoeOp, Scheme, banks, moe_ops
from mxmoe.quant import block_tolerance, tolerance
from mxmoe.target import BACKENDS, Backend, Executable, WeightSource
from mxmoe.testing.blocks import Routed

_FLOAT32_ONLY = 2.0**-16
"""Allowed before anything is quantized: orders of float32 sums."""


class Traced(Protocol):
    """An executable that can also say what every op made, as those of eager and numba can."""

    def trace(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> dict[str, Tensor]:
        """Give role, `act` and `out` -> float32; rows are ordered by expert and within an expert by token."""
        ...


def assert_backends_agree(
    module: ModuleOp,
    weights: WeightSource,
    hidden: Tensor,
    routings: Mapping[str, Routed],
    *,
    backends: Sequence[str | Backend] = ("eager", "numba"),
    exact_integers: bool = False,
) -> None:
    """
    Run every block and bank of a module on each backend and compare with the first, the definition.

    Outputs may differ by `mxmoe.quant.block_tolerance` of the schemes in use, relative to the norm of the output. Where
    both executables have a `trace`, every role and expert is held to its own bound too, so that a wrong expert cannot
    hide behind large ones; otherwise, experts are run one by one to find the culprit.

    Args:
        module: at a stage that all backends compile.
        weights: where their weights are.
        hidden: [tokens, hidden].
        routings: bank -> router output for these tokens.
        backends: names, or backends themselves; at least two.
        exact_integers: demand equal bits of what linears with integer activations make of equal inputs.

    Raises:
        BackendsDisagree: naming block, bank, and the first op and expert that differs.
    """
    first, *others = [BACKENDS[name]() if isinstance(name, str) else name for name in backends]
    reference = first.compile(module, weights)
    for other in others:
        compiled = other.compile(module, weights)
        for moe in moe_ops(module):
            for name, bank in banks(moe).items():
                pair = _Pair(moe, bank, first.name, other.name, reference[moe.block], compiled[moe.block])
                pair.compare(hidden, routings[name], exact_integers)


class _Pair:
    """One bank on two backends."""

    def __init__(self, moe: MoeOp, bank: Bank, left: str, right: str, a: Executable, b: Executable) -> None:
        self._moe, self._bank, self._names, self._pair = moe, bank, (left, right), (a, b)
        self._schemes = schemes_of(moe, bank)

    def compare(self, hidden: Tensor, routed: Routed, exact_integers: bool) -> None:
        """Raise at the first difference; traces first, because they name it best."""
        args = (self._bank.name, hidden, routed.index, routed.weights)
        if all(hasattr(executable, "trace") for executable in self._pair):
            left, right = (cast(Traced, executable).trace(*args) for executable in self._pair)
            counts = torch.bincount(routed.index.reshape(-1), minlength=self._bank.experts)[: self._bank.experts]
            self._compare_traces(left, right, counts.tolist(), exact_integers)
        out = [executable(*args) for executable in self._pair]
        for name, tensor in zip(self._names, out, strict=True):
            if tensor.shape != hidden.shape or tensor.dtype != hidden.dtype:
                self._raise(float("inf"), 0.0, f"the shape: {name} gives {tensor.dtype} {list(tensor.shape)}")
        allowed = self._allowed() + 2 * torch.finfo(hidden.dtype).eps
        error = relative_error(out[0], out[1])
        if error > allowed:
            self._raise(error, allowed, self._first_expert(hidden, routed, allowed))

    def _compare_traces(
        self, left: Mapping[str, Tensor], right: Mapping[str, Tensor], counts: Sequence[int], exact: bool
    ) -> None:
        for role, schemes in self._schemes.items():
            parts = zip(left[role].split(counts), right[role].split(counts), strict=True)
            for expert, (a, b) in enumerate(parts):
                scheme = schemes[expert] if schemes else None
                if exact and role != "down" and scheme and scheme.act_format == "int" and not _same(a, b):
                    self._raise(relative_error(a, b), 0.0, f"{role} of expert {expert} in {scheme}")
                allowed = self._allowed(expert) if role == "down" else tolerance(scheme) if scheme else _FLOAT32_ONLY
                if (error := relative_error(a, b)) > allowed:
                    self._raise(error, allowed, f"{role} of expert {expert} in {scheme or 'dense weights'}")

    def _allowed(self, expert: int | None = None) -> float:
        """Bound of a whole expert, or of all."""
        chosen = [schemes for schemes in self._schemes.values() if schemes]
        mine = slice(None) if expert is None else slice(expert, expert + 1)
        return block_tolerance(scheme for schemes in chosen for scheme in schemes[mine])

    def _first_expert(self, hidden: Tensor, routed: Routed, allowed: float) -> str:
        """Run the experts one by one, all others padded out."""
        experts = self._bank.experts
        for expert in range(experts):
            index = routed.index.where(routed.index == expert, experts)
            a, b = (e(self._bank.name, hidden, index, routed.weights) for e in self._pair)
            if relative_error(a, b) > allowed:
                return f"expert {expert}"
        return "combining the experts"

    def _raise(self, error: float, allowed: float, where: str) -> None:
        left, right = self._names
        block, bank = self._moe.block, self._bank.name
        raise BackendsDisagree(
            block=block, bank=bank, left=left, right=right, error=error, allowed=allowed, where=where
        )


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |a| in the Frobenius norm, 0 where both are empty; inf where they differ in shape, in NaN or in inf."""
    if a.shape != b.shape:
        return float("inf")
    fine = a.isfinite() & b.isfinite()
    if not _same(a[~fine], b[~fine]):
        return float("inf")
    left, right = a[fine].double(), b[fine].double()
    return float((left - right).norm() / left.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def schemes_of(moe: MoeOp, bank: Bank) -> dict[str, tuple[Scheme, ...]]:
    """Role -> each expert's scheme, in the order in which they run; empty tuples before allocation."""
    found: dict[str, tuple[Scheme, ...]] = {}
    for op in (*bank.linears.values(), *bank.gemms):
        chosen = () if op.choice is None else tuple(moe.candidates[int(index)] for index in op.choice.array)
        found |= {role: chosen for role in op.role.split("_")}
    return found
