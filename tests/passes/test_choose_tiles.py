"""Tiles: the fastest by the model, for every expert's own rows and scheme."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from mxmoe.cost import best_tile
from mxmoe.errors import SchemeCannotRun, WrongStage
from mxmoe.ir import BankShape, ModuleOp, Scheme, Table, banks, build_module, moe_ops
from mxmoe.ir import BlockShape as Block
from mxmoe.passes import AnnotateRouting, ChooseTiles, Environment, LowerToGroupGemm, find_cost_model, run_passes
from mxmoe.testing import SCHEMES, Case, cases, check_pass_on

from .modules import before_and_after, choose, small, small_bank

# what every device's model has tiles for
ORDINARY = [scheme for scheme in SCHEMES if scheme.act_bits == 16 and scheme.weight_bits in (2, 4, 16)]


def lowered(module: ModuleOp, index: int = 1) -> ModuleOp:
    return run_passes(choose(module, index), [LowerToGroupGemm()], Environment())


def test_tiles(golden: object) -> None:
    assert golden == before_and_after(ChooseTiles(model="roofline"), lowered(small(small_bank(gated=False))))


@given(cases("lowered", candidates=ORDINARY))
@settings(max_examples=30, deadline=None)
def test_every_expert_has_the_best_tile_for_its_rows(case: Case) -> None:
    module = check_pass_on(ChooseTiles(model="roofline", tokens=100), case)
    model = find_cost_model("roofline", "rtx4090")
    for moe in moe_ops(module):
        for bank in banks(moe).values():
            assert bank.route.frequency is not None
            for gemm in bank.gemms:
                assert gemm.tile is not None
                assert gemm.choice is not None
                assert sorted(set(gemm.tile.array.tolist())) == list(range(len(gemm.tiles)))
                for expert in range(bank.experts):
                    rows = max(float(bank.route.frequency.array[expert]) * 100, 1.0)
                    scheme = moe.candidates[gemm.choice.array[expert]]
                    best, _ = best_tile(model, scheme, n=gemm.n * len(gemm.weights), k=gemm.k, rows=rows)
                    assert gemm.tiles[gemm.tile.array[expert]] == best


def test_busy_experts_get_taller_tiles() -> None:
    bank = BankShape("routed", 2, 1, 4096, "silu", True, {role: role for role in ("gate", "up", "down")})
    module = build_module([Block("mlp", 4096, (bank,))], [Scheme.parse("bf16")])
    run_passes(module, [AnnotateRouting()], Environment())
    route = banks(moe_ops(module)[0])["routed"].route
    route.set_table("frequency", Table(("expert",), np.array([0.001, 0.999], dtype=np.float32)))
    module = run_passes(lowered(module, 0), [ChooseTiles(model="roofline", tokens=8192)], Environment())
    gemm = banks(moe_ops(module)[0])["routed"].gemms[0]
    assert gemm.tile is not None
    idle, busy = (gemm.tiles[index] for index in gemm.tile.array)
    assert idle.m < busy.m


def test_what_cannot_run_is_refused() -> None:
    module = lowered(small(candidates=(Scheme.parse("w8a8_e4m3"),)), 0)
    with pytest.raises(SchemeCannotRun, match="w8a8_e4m3 cannot run on a100"):
        run_passes(module, [ChooseTiles(device="a100")], Environment())
    with pytest.raises(WrongStage, match=r"layers\.0\.mlp is allocated; run lower-to-group-gemm first"):
        run_passes(choose(small()), [ChooseTiles()], Environment())
