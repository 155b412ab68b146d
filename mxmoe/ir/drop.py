"""Experts that were given no bits: a choice of whole experts, which leave the module when it is lowered."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, ModuleOp, i64

from mxmoe.ir.attrs import SchemeAttr, TableAttr
from mxmoe.ir.build import Bank, banks, moe_ops
from mxmoe.ir.ops import MoeOp
from mxmoe.ir.scheme import Scheme
from mxmoe.ir.table import Table


def drop_experts(moe: MoeOp) -> None:
    """
    Take the experts of the scheme w0 out of a block of group GEMMs, and w0 out of its candidates, in place.

    The tables of a bank lose their rows, its experts are counted anew, and `kept` on its route says which number each
    had: 4 experts of which 1 is dropped -> experts=3 kept=[0, 2, 3]. Weights keep their names, and stand for those that
    are kept. A block where none is dropped, and which could not have dropped any, is left as it is.
    """
    for bank in banks(moe).values():
        kept = _kept(moe, bank)
        if len(kept) < bank.experts:
            for op in (bank.route, *bank.gemms):
                tables = {key: value.data for key, value in op.properties.items() if isinstance(value, TableAttr)}
                for key, table in tables.items():
                    op.set_table(key, Table(table.axes, table.array[kept]))
            bank.route.properties["experts"] = IntegerAttr(len(kept), i64)
            bank.route.set_table("kept", Table(("expert",), kept.astype(np.int32)))
    left = [index for index, scheme in enumerate(moe.candidates) if not scheme.is_dropped]
    if len(left) == len(moe.candidates):
        return
    for gemm in (gemm for bank in banks(moe).values() for gemm in bank.gemms):
        assert gemm.choice is not None, f"{moe.block} is allocated"
        moved = [left.index(index) for index in gemm.choice.array.tolist()]
        gemm.set_table("choice", Table(("expert",), np.array(moved, dtype=np.int8)))
    moe.properties["candidates"] = ArrayAttr([SchemeAttr(moe.candidates[index]) for index in left])


def kept_experts(module: ModuleOp) -> dict[str, tuple[int, ...]]:
    """Give, of an allocated module, weight or bias -> the experts that have bits; banks that keep all are left out."""
    found: dict[str, tuple[int, ...]] = {}
    for moe in moe_ops(module):
        for bank in banks(moe).values():
            kept = tuple(_kept(moe, bank).tolist())
            if len(kept) < bank.experts:
                for op in bank.linears.values():
                    found |= dict.fromkeys(filter(None, (op.weight, op.bias)), kept)
    return found


def broken_experts(schemes: dict[str, list[Scheme]], top_k: int) -> str | None:
    """Say what is wrong with the w0 of one bank, role -> scheme of every expert; None where nothing is."""
    columns = list(zip(*schemes.values(), strict=True))
    gone = [any(scheme.is_dropped for scheme in column) for column in columns]
    for expert, column in enumerate(columns):
        if gone[expert] and not all(scheme.is_dropped for scheme in column):
            listed = ", ".join(f"{role} {scheme}" for role, scheme in zip(schemes, column, strict=True))
            return f"w0 takes whole experts, and expert {expert} has {listed}"
    if any(gone) and len(gone) - sum(gone) < top_k:
        return f"w0 leaves {len(gone) - sum(gone)} of {len(gone)} experts, and a token takes {top_k}"
    return None


def _kept(moe: MoeOp, bank: Bank) -> NDArray[np.int64]:
    """[kept], the experts of an allocated or lowered bank that have bits."""
    choice = (*bank.linears.values(), *bank.gemms)[-1].choice
    assert choice is not None, f"{moe.block} is allocated"
    return np.flatnonzero([not moe.candidates[index].is_dropped for index in choice.array.tolist()])
