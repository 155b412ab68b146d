"""numba against the definition, on whole blocks: all schemes, mixes, routings and both banks."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from mxmoe.backends.numba import NumbaBackend
from mxmoe.errors import BadWeightShape, NotLowered
from mxmoe.ir import BankShape, BlockShape, Scheme, Table, Tile, TileAttr, moe_ops
from mxmoe.quant import Weights
from mxmoe.testing import SCHEMES, Case, Routed, assert_backends_agree, at_stage, cases, random_weights


def _bank(name: str, experts: int, top_k: int, intermediate: int) -> BankShape:
    weights = {role: f"mlp.{name}.{role}" for role in ("gate", "up", "down")}
    biases = {role: f"{weight}.bias" for role, weight in weights.items()}
    return BankShape(name, experts, top_k, intermediate, "silu", True, weights, biases)


SHAPE = BlockShape("mlp", 136, (_bank("routed", 4, 2, 72), _bank("shared", 1, 1, 200)), "fp32")
HIDDEN = torch.randn((23, 136), generator=torch.Generator().manual_seed(0))
ROUTINGS = {
    # expert 2 has no token, slots hold padding, and 23 rows divide by nothing
    "routed": Routed(torch.tensor([[0, 1], [1, 4], [3, 0], [4, 4], [1, 3]]).repeat(5, 1)[:23], torch.rand(23, 2)),
    "shared": Routed(torch.zeros((23, 1), dtype=torch.int64), torch.ones(23, 1)),
}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_agrees_with_eager(scheme: Scheme) -> None:
    module = at_stage([SHAPE], "lowered", [scheme])
    assert_backends_agree(module, random_weights([SHAPE]), HIDDEN, ROUTINGS, exact_integers=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_random_blocks_mixes_and_routings_agree_with_eager(case: Case) -> None:
    assert_backends_agree(case.module, case.weights, case.hidden, case.routings, exact_integers=True)


def test_tiles_of_the_module_are_used() -> None:
    module = at_stage([SHAPE], "lowered", [Scheme.parse("w4a16_g32_asym"), Scheme.parse("w8a8_sym")], seed=3)
    for moe in moe_ops(module):
        for op in moe.body.block.ops:
            if op.name == "mxmoe.group_gemm":
                tiles = (Tile(1, 17, 5), Tile(3, 64, 1000))
                op.properties["tiles"] = type(moe.candidates_)([TileAttr(tile) for tile in tiles])
                op.set_table("tile", Table(("expert",), torch.arange(op.experts).remainder(2).to(torch.int8).numpy()))  # type: ignore[attr-defined]
    module.verify()
    compiled = NumbaBackend().compile(module, random_weights([SHAPE]))["mlp"]
    assert compiled.banks["routed"].down.tiles == (Tile(1, 17, 5), Tile(3, 64, 1000)) * 2
    assert_backends_agree(module, random_weights([SHAPE]), HIDDEN, ROUTINGS, exact_integers=True)


@pytest.mark.parametrize(
    ("stage", "passes"),
    [
        ("lifted", "apply-plan, lower-to-group-gemm"),
        ("annotated", "allocate-bits, lower-to-group-gemm"),
        ("allocated", "lower-to-group-gemm"),
    ],
)
def test_other_stages_are_refused_before_any_weight_is_touched(stage: str, passes: str) -> None:
    module = at_stage([SHAPE], stage, [Scheme.parse("w8a8_sym")])  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotLowered, match=f"mlp is {stage}; run the passes {passes} first"):
        NumbaBackend().compile(module, Weights({}))


@pytest.mark.parametrize("name", ["mlp.routed.up", "mlp.shared.down.bias"])
def test_wrong_weights_are_refused_by_name(name: str) -> None:
    weights = random_weights([SHAPE])
    wrong = Weights({**weights, name: weights[name][..., 1:]})
    with pytest.raises(BadWeightShape, match=name):
        NumbaBackend().compile(at_stage([SHAPE], "lowered", [Scheme.parse("w8a8_sym")]), wrong)


def test_every_scheme_is_supported() -> None:
    assert all(NumbaBackend().supports(scheme) for scheme in SCHEMES)
