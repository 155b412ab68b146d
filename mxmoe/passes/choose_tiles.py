"""`choose-tiles`: a tile for every expert of every group GEMM, from its scheme and the rows it expects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from xdsl.dialects.builtin import ArrayAttr

from mxmoe.cost import CostModel, best_tile
from mxmoe.errors import SchemeCannotRun
from mxmoe.ir import Bank, GroupGemmOp, ModuleOp, Scheme, Table, Tile, TileAttr, banks
from mxmoe.passes.annotate_cost import find_cost_model
from mxmoe.passes.base import Environment, Pass


@dataclass(frozen=True)
class ChooseTiles(Pass):
    """
    Write `tiles` and `tile[expert]` on every group GEMM: the fastest tile by the cost model.

    An expert's rows are frequency x tokens, at least one.
    """

    name = "choose-tiles"
    model: str = "auto"
    """Name of a cost model, as for annotate-cost."""
    device: str | None = None
    """Name of a device; None takes the target's."""
    tokens: int = 512
    """Tokens per call."""

    def run(self, module: ModuleOp, environment: Environment) -> None:
        """Choose for every expert; the blocks stay lowered."""
        model = find_cost_model(self.model, self.device or environment.target.device)
        for moe in self.blocks(module, "lowered", way="run lower-to-group-gemm first"):
            for bank in banks(moe).values():
                for gemm in bank.gemms:
                    self._choose(gemm, bank, moe.candidates, model)

    def _choose(self, gemm: GroupGemmOp, bank: Bank, candidates: tuple[Scheme, ...], model: CostModel) -> None:
        known = bank.route.frequency
        frequency = np.full(bank.experts, bank.top_k / bank.experts) if known is None else known.array
        assert gemm.choice is not None, "the verifier demands a choice of a lowered block"
        picks = [
            _tile(model, candidates[index], gemm, max(float(share) * self.tokens, 1.0))
            for index, share in zip(gemm.choice.array.tolist(), frequency, strict=True)
        ]
        tiles = sorted(set(picks))
        gemm.properties["tiles"] = ArrayAttr([TileAttr(tile) for tile in tiles])
        gemm.set_table("tile", Table(("expert",), np.array([tiles.index(tile) for tile in picks], dtype=np.int8)))


def _tile(model: CostModel, scheme: Scheme, gemm: GroupGemmOp, rows: float) -> Tile:
    tile, _ = best_tile(model, scheme, n=gemm.n * len(gemm.weights), k=gemm.k, rows=rows)
    if tile is None:
        raise SchemeCannotRun(scheme=scheme, device=model.device.name)
    return tile
