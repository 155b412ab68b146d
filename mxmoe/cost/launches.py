"""The launches of a block, read from its ops: gate and up of every bank together, then down of every bank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mxmoe.cost.predict import Gemm, expected_rows
from mxmoe.errors import BadWorkload
from mxmoe.ir import Bank, GroupGemmOp, LinearOp, MoeOp, Scheme, Table, banks


def block_launches(
    moe: MoeOp, tokens: int, *, choices: dict[tuple[str, str], Sequence[int]] | None = None
) -> tuple[tuple[Gemm, ...], tuple[Gemm, ...]]:
    """
    Describe the two launches of an allocated or lowered block for a call of `tokens` tokens.

    Rows per expert follow the block's annotated frequencies, or an even spread without them. `choices` (bank, role)
    -> candidate per expert stands in for the `choice` tables, to cost a mix that the IR does not hold (yet).

    Raises:
        BadWorkload: no choice for some op, or fewer than one token.
    """
    entry: list[Gemm] = []
    exit_: list[Gemm] = []
    for bank in banks(moe).values():
        rows = _rows(bank, tokens)
        gemms = {op.role: _gemm(op, rows, moe.candidates, choices) for op in (*bank.linears.values(), *bank.gemms)}
        exit_.append(gemms.pop("down"))
        entry += fuse_gate_up(gemms)
    return tuple(entry), tuple(exit_)


def fuse_gate_up(gemms: dict[str, Gemm]) -> list[Gemm]:
    """Make gate and up one product of twice the width where their choices are equal, as lowering does."""
    gate, up = gemms.get("gate"), gemms.get("up")
    if gate and up and gate.schemes == up.schemes and gate.tiles == up.tiles:
        return [Gemm(gate.n + up.n, gate.k, gate.rows, gate.schemes, gate.tiles)]
    return list(gemms.values())


def _rows(bank: Bank, tokens: int) -> tuple[int, ...]:
    frequency = bank.route.frequency
    even = np.full(bank.experts, bank.top_k / bank.experts)
    return expected_rows(even if frequency is None else frequency.array, tokens)


def _gemm(
    op: LinearOp | GroupGemmOp,
    rows: tuple[int, ...],
    candidates: tuple[Scheme, ...],
    choices: dict[tuple[str, str], Sequence[int]] | None,
) -> Gemm:
    fused = isinstance(op, GroupGemmOp)
    schemes = [candidates[index] for index in _choice(op.choice, choices, (op.bank_name, op.role))]
    tiles = None
    if fused and op.tile is not None:
        tiles = tuple(op.tiles[index] for index in op.tile.array.tolist())
    width = op.n * (len(op.weights) if fused else 1)
    kept = [expert for expert, scheme in enumerate(schemes) if not scheme.is_dropped]
    return Gemm(width, op.k, tuple(rows[e] for e in kept), tuple(schemes[e] for e in kept), tiles)


def _choice(
    table: Table | None, choices: dict[tuple[str, str], Sequence[int]] | None, key: tuple[str, str]
) -> Sequence[int]:
    if choices is not None and key in choices:
        return [int(index) for index in choices[key]]
    if table is None:
        raise BadWorkload(reason=f"no scheme is chosen for {' '.join(key)}; allocate first, or pass choices")
    return table.array.tolist()
