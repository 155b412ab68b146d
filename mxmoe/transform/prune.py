"""
Taking experts out of a model: the ones that put out least, or the ones that a budget of bits can best do without.

Unlike the other transformations this one changes the function; nothing runs it unasked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mxmoe.calib import BankStats, Stats, find_router
from mxmoe.errors import BadOption, CannotPrune
from mxmoe.frontend import Lifted, LiftedBlock
from mxmoe.ir import BankShape, Scheme
from mxmoe.solver import Budget, Problem, solve

Experts = Mapping[str, tuple[int, ...]]
"""Block -> routed experts."""


@dataclass(frozen=True)
class Pruning:
    """Which experts a budget is better spent without, and what is left for the others."""

    experts: Experts
    weight_bits: float
    """Average bits per weight of what stays, for as many bytes as the budget allowed for the whole."""
    loss: float
    """Forecast: squared change of the blocks' outputs, in parts of these."""


def reap_scores(stats: Stats) -> dict[str, NDArray[np.float64]]:
    """
    Block -> [expert], mean norm of the weighted output over the tokens that reach the expert; 0 if none does.

    REAP (arXiv 2510.13999): mean of c(x) ||f(x)||.

    Raises:
        CannotPrune: statistics that do not have output norms.
    """
    found: dict[str, NDArray[np.float64]] = {}
    for (block, _), sums in _routed(stats):
        if sums.output_norm is None:
            raise CannotPrune(
                what=block, reason="its statistics are from before output norms were summed; observe anew"
            )
        found[block] = sums.output_norm / np.maximum(sums.tokens, 1)
    return found


def lowest(stats: Stats, part: float = 0.25) -> Experts:
    """
    Name the `part` of each block's routed experts that score lowest by `reap_scores`, rounded down, as REAP prunes.

    Raises:
        BadOption: a part outside 0 to 1.
        CannotPrune: as `reap_scores`.
    """
    _check_part("lowest", part)
    ranked = {block: np.argsort(scores, kind="stable") for block, scores in reap_scores(stats).items()}
    return {block: tuple(sorted(order[: int(part * len(order))].tolist())) for block, order in ranked.items()}


def dispensable(
    lifted: Lifted,
    stats: Stats,
    schemes: Sequence[Scheme | str] | None = None,
    *,
    weight_bits: float,
    most: float = 0.5,
) -> Pruning:
    """
    Let an allocation decide, with no bits at all as one of the candidates of an expert.

    One choice for each expert, all blocks under one budget; the loss of a scheme is the sum over its three linears of
    the squared change of the block's output, and that of no bits the squared norm of what the expert puts out, both in
    parts of the block's output; experts with hardly any tokens have their bank's mean. Experts that `reap_scores` ranks
    highest are not up for it, and neither are shared ones. What is left is then to be observed and allocated at
    `Pruning.weight_bits`.

    Args:
        lifted: what the statistics are of.
        stats: statistics.
        schemes: to choose from besides; None takes all that were observed.
        weight_bits: average over all weights, those that go included.
        most: part of a block's routed experts that may go; at least as many as a token takes always stay.

    Raises:
        BadOption: a part outside 0 to 1.
        NotInStats: a scheme, or a block, that was not observed.
        InfeasibleBudget: not even so.
        CannotPrune: as `reap_scores`.
    """
    _check_part("dispensable", most)
    scores = reap_scores(stats)
    columns, candidates = stats.columns(schemes), stats.schemes
    loss, bits, numel, rows = list[NDArray[np.float64]](), list[NDArray[np.float64]](), list[float](), _Rows([])
    for block in lifted.blocks:
        sums = {name: stats.bank(block.name, name) for name in block.banks}
        output = sum(float(one.squared_output.sum()) for one in sums.values()) or 1.0
        for name, bank in block.banks.items():
            sizes = _sizes(bank.shape, block.shape.hidden)
            # an expert that nobody saw is not known to be useless
            seen = max(stats.min_tokens, 1)
            error = sum(sums[name].squared(role, seen)[:, columns] for role in bank.shape.weights)
            gone = sums[name].output(seen)
            if name == "routed":
                few = min(int(most * bank.shape.experts), bank.shape.experts - bank.shape.top_k)
                gone[np.argsort(scores[block.name], kind="stable")[max(few, 0) :]] = np.inf
            else:
                gone[:] = np.inf
            loss.append(np.column_stack([gone, error]) / output)
            weights = {role: n * k for role, (n, k) in sizes.items()}
            whole = sum(weights.values())
            each = [sum(weights[r] * candidates[c].effective_bits(sizes[r][1]) for r in sizes) / whole for c in columns]
            bits.append(np.tile([0.0, *each], (bank.shape.experts, 1)))
            numel += [float(whole)] * bank.shape.experts
            rows.keys += [(block.name, name, expert) for expert in range(bank.shape.experts)]
    problem = Problem(np.concatenate(loss), np.concatenate(bits), numel=np.array(numel), labels=rows.keys)
    found = solve(problem, Budget(weight_bits=weight_bits))
    gone_rows = found.choice == 0
    left = float(np.array(numel)[~gone_rows].sum())
    return Pruning(rows.chosen(gone_rows), weight_bits * sum(numel) / left, found.loss)


def prune(lifted: Lifted, experts: Experts, *, reroute: bool = True) -> None:
    """
    Take experts out of the module that was lifted, in place; lift it anew afterwards.

    `reroute` deletes them with their rows of the router, as REAP does: tokens go to the best of those that stay, whose
    weights the block's own softmax normalises anew. Otherwise weights of the down linear become zero: tokens keep their
    experts and their weights, get nothing from those, and any scheme holds the zeros exactly.

    A config that counts experts is set where all blocks keep as many; with uneven counts the model runs, and cannot be
    built from its config.

    Raises:
        CannotPrune: fewer experts would stay than a token takes, the block routes in groups of experts, its router is
            not found, or experts are not one stack; nothing has been changed then.
    """
    blocks = [block for block in lifted.blocks if experts.get(block.name)]
    if unknown := sorted(set(experts) - {block.name for block in lifted.blocks}):
        raise CannotPrune(what=unknown[0], reason="there is no such block")
    for block in blocks:
        _check(block, experts[block.name], reroute=reroute)
    with torch.no_grad():
        for block in blocks:
            if reroute:
                _delete(block, experts[block.name])
            else:
                lifted.weights[block.banks["routed"].shape.weights["down"]][list(experts[block.name])] = 0
    counts = {
        b.banks["routed"].shape.experts - len(experts.get(b.name, ())) for b in lifted.blocks if "routed" in b.banks
    }
    if reroute and blocks and len(counts) == 1:
        old = blocks[0].banks["routed"].shape.experts
        config: object = getattr(lifted.root, "config", None)
        if config is not None:
            _recount(config, old, counts.pop())


@dataclass
class _Rows:
    keys: list[tuple[str, str, int]]

    def chosen(self, mask: NDArray[np.bool_]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for (block, _, expert), is_in in zip(self.keys, mask.tolist(), strict=True):
            if is_in:
                found[block] = (*found.get(block, ()), expert)
        return found


def _routed(stats: Stats) -> list[tuple[tuple[str, str], BankStats]]:
    return [(key, sums) for key, sums in stats.banks.items() if key[1] == "routed"]


def _check_part(name: str, part: float) -> None:
    if not 0 <= part <= 1:
        raise BadOption(name=name, option=str(part), reason="it is a part, from 0 to 1")


def _sizes(shape: BankShape, hidden: int) -> dict[str, tuple[int, int]]:
    """Role -> (n, k)."""
    inner = shape.intermediate
    return {role: (hidden, inner) if role == "down" else (inner, hidden) for role in shape.weights}


def _check(block: LiftedBlock, experts: Sequence[int], *, reroute: bool) -> None:
    bank = block.banks.get("routed")
    reason = None
    if bank is None or bank.kind not in ("routed", "routed_norm"):
        reason = "its experts are not one stack of parameters"
    elif any(not 0 <= expert < bank.shape.experts for expert in experts):
        reason = f"its experts are 0 to {bank.shape.experts - 1}"
    elif bank.shape.experts - len(set(experts)) < bank.shape.top_k:
        reason = f"a token takes {bank.shape.top_k} of its {bank.shape.experts} experts, fewer would stay"
    elif reroute and find_router(block) is None:
        reason = "its router is not found: a weight [experts, hidden] outside the experts"
    elif reroute and any(_groups(module) > 1 for module in block.block.modules()):
        reason = "it chooses groups of experts before experts, and groups must stay of one size"
    if reason:
        raise CannotPrune(what=block.name, reason=reason)


def _groups(module: nn.Module) -> int:
    found = [getattr(module, name, 1) for name in ("n_group", "num_group", "n_groups")]
    return max((count for count in found if isinstance(count, int)), default=1)


def _delete(block: LiftedBlock, experts: Sequence[int]) -> None:
    """Cut the experts out of every tensor that has one row for each, and out of every count of them."""
    bank, router = block.banks["routed"], find_router(block)
    assert router is not None, f"{block.name} was checked"
    old = bank.shape.experts
    keep = torch.tensor([expert for expert in range(old) if expert not in set(experts)])
    for module in {bank.module, *router.module.modules()}:
        for name, parameter in tuple(module.named_parameters(recurse=False)):
            if parameter.shape[:1] == (old,):
                kept = parameter.detach()[keep.to(parameter.device)].clone()
                setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        for name, buffer in tuple(module.named_buffers(recurse=False)):
            if buffer.shape[:1] == (old,):
                setattr(module, name, buffer[keep.to(buffer.device)].clone())
    for module in {bank.module, block.block, *router.module.modules()}:
        _recount(module, old, len(keep))


def _recount(owner: object, old: int, new: int) -> None:
    """Set every number of experts that an object holds; numbers per token are none."""
    for name, value in tuple(vars(owner).items()):
        counts = "expert" in name and not any(word in name for word in ("per_tok", "top", "shared"))
        if (counts or name == "out_features") and type(value) is int and value == old:
            setattr(owner, name, new)
