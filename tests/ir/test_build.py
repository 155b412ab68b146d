"""Building from shapes and walking by bank."""

from __future__ import annotations

import pytest

from mxmoe.errors import BadShape
from mxmoe.ir import BankShape, BlockShape, Scheme, banks, build_module, linears, moe_ops

ROLES = ("gate", "up", "down")
WEIGHTS = {role: role for role in ROLES}


def test_a_block_has_its_banks_and_sizes() -> None:
    shared = BankShape("shared", 1, 1, 96, "gelu", False, {"up": "s.up", "down": "s.down"}, {"up": "s.up.bias"})
    routed = BankShape("routed", 8, 3, 32, "silu", True, WEIGHTS, act_params={"limit": 7.0})
    module = build_module([BlockShape("mlp", 64, (routed, shared))], [Scheme.parse("bf16")])
    module.verify()
    (moe,) = moe_ops(module)
    found = banks(moe)
    assert (moe.block, moe.hidden, moe.stage, list(found)) == ("mlp", 64, "lifted", ["routed", "shared"])
    assert (found["routed"].experts, found["routed"].top_k, found["routed"].act.params) == (8, 3, {"limit": 7.0})
    assert {role: (op.n, op.k) for role, op in found["routed"].linears.items()} == {
        "gate": (32, 64),
        "up": (32, 64),
        "down": (64, 32),
    }
    assert list(found["shared"].linears) == ["up", "down"]
    assert found["shared"].linears["up"].bias == "s.up.bias"
    assert found["shared"].linears["down"].bias is None
    assert [op.role for op in linears(module)] == ["gate", "up", "down", "up", "down"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "rooted"},
        {"experts": 0},
        {"top_k": 9},
        {"intermediate": 0},
        {"weights": {"up": "up", "down": "down"}},
        {"biases": {"sideways": "b"}},
    ],
)
def test_banks_that_cannot_be(change: dict[str, object]) -> None:
    fields = {"name": "routed", "experts": 8, "top_k": 2, "intermediate": 32, "act": "silu", "gated": True}
    with pytest.raises(BadShape):
        BankShape(**{**fields, "weights": WEIGHTS, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"hidden": 0}, {"banks": ()}, {"dtype": "int8"}])
def test_blocks_that_cannot_be(change: dict[str, object]) -> None:
    bank = BankShape("routed", 8, 2, 32, "silu", True, WEIGHTS)
    with pytest.raises(BadShape):
        BlockShape(**{"name": "mlp", "hidden": 64, "banks": (bank,), **change})  # type: ignore[arg-type]


def test_names_and_candidates_are_given_once() -> None:
    bank = BankShape("routed", 8, 3, 32, "silu", True, WEIGHTS)
    block, bf16 = BlockShape("mlp", 64, (bank,)), Scheme.parse("bf16")
    with pytest.raises(BadShape, match="'mlp' cannot be: another block has this name"):
        build_module([block, block], [bf16])
    for candidates in ([], [bf16, bf16]):
        with pytest.raises(BadShape, match="at least one, each once"):
            build_module([block], candidates)
    with pytest.raises(BadShape, match="two of its banks"):
        BlockShape("mlp", 64, (bank, bank))
