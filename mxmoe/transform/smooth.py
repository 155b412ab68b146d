"""SmoothQuant: outlier channels of activations move into the weights, where there is room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxmoe.calib import Inputs, rereadable
from mxmoe.errors import BadOption, NothingToFold
from mxmoe.frontend import ExpertViews, Lifted, LiftedBlock, lift
from mxmoe.ir import BankShape
from mxmoe.transform.edges import Edge, find_edges
from mxmoe.transform.fold import fold_down, fold_input, power_of_two, why_not_down
from mxmoe.transform.report import Folded, TransformReport, Unfolded
from mxmoe.transform.rows import Routing, agreement, hidden_rows, run_rows

INPUTS = ("gate_up", "down")
"""The two inputs of an expert."""

_LEAST = 1e-5
"""No channel is scaled by less: one that is hardly used would become one that overflows."""


def smooth(
    model: nn.Module,
    inputs: Inputs,
    alpha: float = 0.5,
    *,
    roles: Sequence[str] = INPUTS,
    exact: bool = False,
    quiet: bool = False,
) -> TransformReport:
    """
    Divide the inputs of all experts by one scale per channel, and multiply the weights, in place.

    `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` (Xiao et al., SmoothQuant, 2023, eq. 4), for schemes that quantize
    activations as well as weights. What the experts of a block read is also read by its router and its shared expert,
    so that they share one scale: the largest over experts, each with its own tokens, and the router, with all of them
    (EAQuant, 2025, section 3.1). It goes into the norm in front of the block. What down reads is each expert's own, and
    goes into its up; experts that no token reached stay as they are.

    Args:
        model: a whole model, or a decoder layer; of a block alone only `down` can be folded.
        inputs: calibration data, as for `mxmoe.observe`.
        alpha: how much of an outlier moves, 0 to 1; 0.5 is usual, up to 0.85 for models with large ones.
        roles: which inputs: gate_up, down.
        exact: round scales to powers of two. Nothing is rounded then in any float type, so that the module computes
            bit for bit what it did; scales are off by at most a factor of 1.41.
        quiet: no progress bar.

    Returns:
        What was folded, what was not and why, and how many routing decisions are the same.

    Raises:
        NothingToFold: no input of any block can be folded.
        ScaleOutOfRange: a parameter would leave the range of its element type.
        BadOption: alpha or a role that is none.
        NoMoeBlock, BadCalibration, ...: what `mxmoe.lift` and `mxmoe.observe` raise.
    """
    if not 0 <= alpha <= 1:
        raise BadOption(name="smooth", option=f"alpha={alpha}", reason="it is from 0 to 1")
    inputs = rereadable(inputs)  # they are run before and after
    lifted, edges, skipped = prepare("smooth", model, inputs, roles)
    largest = {edge.block.name: _Largest.of(edge) for edge in edges}

    def receive(block: LiftedBlock, bank: str, expert: int, rows: Tensor) -> None:
        largest[block.name].add(bank, expert, rows)

    before = run_rows(lifted, inputs, receive, title="observing", quiet=quiet)
    folded: list[Folded] = []
    for edge in edges:
        seen = largest[edge.block.name]
        if "gate_up" in roles and edge.gain is not None:
            scale = _rounded(seen.input_scale(alpha), exact)
            fold_input(edge, scale)
            count = sum(map(len, edge.experts.values()))
            folded.append(Folded(edge.block.name, "all", "gate_up", count, *_range([scale]), alpha))
        for bank, experts in edge.experts.items() if "down" in roles else ():
            if why_not_down(edge.block.banks[bank].shape):
                continue
            scales = {i: _rounded(s, exact) for i, s in seen.down_scales(bank, alpha).items()}
            for index, scale in scales.items():
                fold_down(f"{edge.block.name}.{bank}[{index}]", experts[index], scale)
            if scales:
                low, high = _range(list(scales.values()))
                folded.append(Folded(edge.block.name, bank, "down", len(scales), low, high, alpha))
    return finish(lifted, inputs, folded, skipped, before, quiet=quiet)


def prepare(
    what: str, model: nn.Module, inputs: Inputs | None, roles: Sequence[str]
) -> tuple[Lifted, tuple[Edge, ...], list[Unfolded]]:
    """
    Lift a module, find the edges of its blocks, and list which inputs cannot be folded.

    Raises:
        NothingToFold: that is all of them.
        BadOption: a role that is none.
    """
    unknown = [role for role in roles if role not in INPUTS]
    if unknown or not roles:
        raise BadOption(name=what, option=f"roles={list(roles)}", reason=f"they are of {', '.join(INPUTS)}")
    lifted = lift(model)
    edges = find_edges(lifted, inputs)
    skipped: list[Unfolded] = []
    for edge in edges:
        name = edge.block.name
        if "gate_up" in roles and edge.gain is None:
            skipped.append(Unfolded(name, "all", "gate_up", edge.problem))
        if "down" in roles:
            reasons = {bank: why_not_down(held.shape) for bank, held in edge.block.banks.items()}
            skipped += [Unfolded(name, bank, "down", reason) for bank, reason in reasons.items() if reason]
    possible = sum(("gate_up" in roles) + len(edge.experts) * ("down" in roles) for edge in edges)
    if len(skipped) == possible:
        lines = "\n".join(f"  {one.block} {one.bank} {one.role}: {one.reason}" for one in skipped)
        raise NothingToFold(what=what, reasons=lines)
    return lifted, edges, skipped


def finish(
    lifted: Lifted,
    inputs: Inputs,
    folded: Sequence[Folded],
    skipped: Sequence[Unfolded],
    before: Routing,
    *,
    quiet: bool,
) -> TransformReport:
    """Run the data again and report, with the share of routing decisions that stayed."""
    after = run_rows(lifted, inputs, lambda block, bank, expert, rows: None, title="comparing", quiet=quiet)
    return TransformReport(tuple(folded), tuple(skipped), agreement(before, after))


@dataclass(frozen=True)
class _Largest:
    """Largest magnitudes per channel of what each expert of a block is given, in float32."""

    edge: Edge
    inputs: dict[tuple[str, int], Tensor]
    """(bank, expert) -> [hidden]."""
    downs: dict[tuple[str, int], Tensor]
    """(bank, expert) -> [intermediate]."""

    @classmethod
    def of(cls, edge: Edge) -> _Largest:
        return cls(edge, {}, {})

    def add(self, bank: str, expert: int, rows: Tensor) -> None:
        views: ExpertViews = self.edge.experts[bank][expert]
        shape: BankShape = self.edge.block.banks[bank].shape
        for into, found in ((self.inputs, rows.float()), (self.downs, hidden_rows(shape, views, rows))):
            most = found.abs().amax(0)
            held = into.get((bank, expert))
            into[bank, expert] = most if held is None else torch.maximum(held, most)

    def input_scale(self, alpha: float) -> Tensor:
        """The largest scale over all experts that were reached, and the router."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for (bank, expert), most in self.inputs.items():
            views = self.edge.experts[bank][expert]
            columns = [views.weights[role].abs().amax(0).float() for role in ("gate", "up") if role in views.weights]
            pairs.append((most, torch.stack(columns).amax(0)))
        # not the other readers: a gate of one row has channels near zero, whose scales would rule all others
        if self.edge.router is not None:
            everything = torch.stack([most for most, _ in pairs]).amax(0)
            pairs.append((everything, self.edge.router.abs().amax(0).float()))
        scales = [_smoothing(most, weight.to(most.device), alpha) for most, weight in pairs]
        # a channel that no expert sees keeps its size
        largest = torch.stack([torch.where(s > 0, s, 0) for s in scales]).amax(0)
        return torch.where(largest > 0, largest, 1.0)

    def down_scales(self, bank: str, alpha: float) -> dict[int, Tensor]:
        """Expert -> scale [intermediate], for those that were reached."""
        scales: dict[int, Tensor] = {}
        for (name, expert), most in sorted(self.downs.items()):
            if name == bank:
                weight = self.edge.experts[bank][expert].weights["down"].abs().amax(0).float()
                scale = _smoothing(most, weight, alpha)
                scales[expert] = torch.where(scale > 0, scale, 1.0)
        return scales


def _smoothing(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's scale, float64; 0 where activation or weight are 0 and there is nothing to balance."""
    scale = activation.double().pow(alpha) / weight.double().pow(1 - alpha)
    return torch.where((activation > 0) & (weight > 0), scale.clamp(min=_LEAST), 0.0)


def _rounded(scale: Tensor, exact: bool) -> Tensor:
    return power_of_two(scale) if exact else scale


def _range(scales: Sequence[Tensor]) -> tuple[float, float]:
    return min(float(s.min()) for s in scales), max(float(s.max()) for s in scales)
