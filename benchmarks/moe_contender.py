"""What `group_gemm.py` measures: a contender, what it makes of one cell, and how its results are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from moe_workloads import PARTS, Cell, Rotation, relative_error
from torch import Tensor

CLASSES = ("bf16", "8bit", "4bit", "mixed")


@dataclass
class Prepared:
    """One cell ready to run: weights, inputs and one launch for each rotation."""

    launches: Sequence[Callable[[], Any]]
    """Each may be captured in a CUDA graph: no host synchronisation, no dependence on the others."""
    check: Callable[[], float]
    """Runs the first launch and gives the relative error of a sample of its rows against float32."""
    counts: np.ndarray
    """[experts] rows of each expert in the first rotation."""
    config: str = ""
    """Tiles or options, as the result file shows them."""
    roof_us: float | None = None
    """Roofline, where bits and unit differ from expert to expert; None: that of the contender's bits and unit."""
    weight_bytes: float | None = None
    """Bytes of the active experts' weights, where they differ; None: from the contender's bits."""


@dataclass(frozen=True)
class Contender:
    """A kernel, or a family of them, in one format."""

    name: str
    weight_class: str
    """bf16, 8bit, 4bit or mixed: who is compared with whom."""
    format: str
    """Scheme or format, as the result file shows it."""
    bits: Callable[[Cell], float]
    """Bits per weight with scales."""
    act_bytes: float
    """Bytes of an activation as the kernel reads it."""
    unit: str
    """Key of `PEAKS`."""
    make: Callable[[Cell, str], Prepared]
    """Cell and device -> prepared; raises `Unsupported` where the kernel refuses the cell."""
    parts: tuple[str, ...] = PARTS
    is_peer: bool = True
    reset: Callable[[], None] = field(default=lambda: None)
    """Drops weights that `make` keeps between cells."""


class Unsupported(Exception):
    """The contender cannot run the cell; the message says why."""


SAMPLE_ROWS, SAMPLE_TOKENS = 32, 6


def sample(count: int, most: int) -> np.ndarray:
    """Seeded numbers below `count`, in order."""
    # the ends are always there: first and last tiles are the ones that go wrong
    inner = np.random.default_rng(0).choice(count, size=min(count, most), replace=False)
    return np.unique(np.concatenate([[0, count - 1], inner]))


def check_rows(found: Tensor, turn: Rotation, inputs: Tensor, weight: Callable[[int], Tensor]) -> float:
    """
    Relative error of a sample of a product's rows.

    Args:
        found: [rows, n] in the order of experts.
        turn: the rotation that was run.
        inputs: [rows, k] in the order of experts, as the kernel saw them, in any float dtype.
        weight: expert -> its weight [n, k], dequantized, in float32.
    """
    experts = turn.ids.flatten()[turn.order].cpu().numpy()
    picked = sample(len(experts), SAMPLE_ROWS)
    exact = torch.empty((len(picked), found.shape[1]), dtype=torch.float32, device=found.device)
    for expert in np.unique(experts[picked]).tolist():
        mine = np.flatnonzero(experts[picked] == expert)
        exact[torch.from_numpy(mine).to(found.device)] = inputs[picked[mine]].float() @ weight(expert).T
    return relative_error(found[picked], exact)


def check_block(
    found: Tensor,
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    gate_up: Callable[[int], Tensor],
    down: Callable[[int], Tensor],
    activate: Callable[[Tensor], Tensor],
) -> float:
    """
    Relative error of a sample of a block's tokens, everything between input and output in float32.

    Args:
        found: [tokens, hidden].
        ids: [tokens, top_k].
        weights: [tokens, top_k].
        hidden: [tokens, hidden].
        gate_up: expert -> [2 x intermediate, hidden], float32.
        down: expert -> [hidden, intermediate], float32.
        activate: [rows, 2 x intermediate] -> [rows, intermediate].
    """
    picked = sample(hidden.shape[0], SAMPLE_TOKENS)
    chosen, shares = ids.cpu().numpy()[picked], weights[picked]
    exact = torch.zeros((len(picked), hidden.shape[1]), dtype=torch.float32, device=hidden.device)
    for expert in np.unique(chosen).tolist():
        token, slot = (torch.from_numpy(axis).to(hidden.device) for axis in np.nonzero(chosen == expert))
        inner = activate(hidden[picked][token].float() @ gate_up(expert).T)
        exact.index_add_(0, token, (inner @ down(expert).T) * shares[token, slot, None])
    return relative_error(found[picked], exact)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Halves side by side: silu(gate) * up, in the dtype given."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def by_name(contenders: Iterable[Contender], names: Sequence[str] | None) -> list[Contender]:
    """Those whose name is given or starts with a given one that ends in `*`; all where nothing is given."""
    every = list(contenders)
    if not names:
        return every
    chosen = [one for one in every if any(_fits(one.name, name) for name in names)]
    missing = [name for name in names if not any(_fits(one.name, name) for one in every)]
    if missing:
        raise SystemExit(f"no contender {', '.join(missing)}; there are {', '.join(one.name for one in every)}")
    return chosen


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
