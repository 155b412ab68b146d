"""The kernels of a compiled block, compiled for a GPU that is not here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

# loaded before anything of ours, which would have kernels interpreted: compiling in this process is quicker
import triton  # noqa: F401

from mxmoe.backends.triton import TritonBackend
from mxmoe.backends.triton.ahead import compile_all
from mxmoe.backends.triton.binaries import bank_requests
from mxmoe.backends.triton.kernels import group_gemm
from mxmoe.ir import BankShape, BlockShape, Scheme
from mxmoe.testing import at_stage, random_weights

NAMES = {"gate": "gate", "up": "up", "down": "down"}
BIASES = {"gate": "gate_bias", "up": "up_bias", "down": "down_bias"}


def requests(act: str, *, tokens: tuple[int, ...] = (4,), arch: int = 89, gated: bool = True) -> dict[str, object]:
    names = NAMES if gated else {"up": "up", "down": "down"}
    biases = {role: BIASES[role] for role in names}
    shape = BlockShape("block", 256, (BankShape("routed", 3, 2, 128, act, gated, names, biases),))
    module = at_stage([shape], "lowered", [Scheme.parse("w8a8_sym")])
    block = TritonBackend("89").compile(module, random_weights([shape]))["block"]
    return bank_requests(block.banks["routed"], arch=arch, tokens=tokens, top_k=2)


def test_a_block_has_two_gemms_a_call() -> None:
    found = requests("silu", tokens=(4, 600))
    assert list(found) == ["gate_up4", "down4", "gate_up600", "down600"]
    heights = [{one[1] for one in request.constexprs["CLASSES"]} for request in found.values()]
    assert heights == [{16}, {16}, {32, 64, 128}, {32, 64, 128}]
    assert all(request.signature["y_ptr"] == "*bf16" for request in found.values())
    gate_up, down = list(found.values())[:2]
    assert (gate_up.constexprs["GATHER"], gate_up.constexprs["ACT"], gate_up.constexprs["GATED"]) == (
        True,
        "silu",
        True,
    )
    assert (down.constexprs["GATHER"], down.constexprs["ACT"], down.constexprs["GATED"]) == (False, "none", False)
    assert all(request.constexprs["HAS_BIAS"] for request in found.values())


def test_requests_name_every_argument_of_the_kernel() -> None:
    for request in requests("silu").values():
        assert tuple(request.signature) == tuple(group_gemm.arg_names)
        constants = {name for name, kind in request.signature.items() if kind == "constexpr"}
        assert constants == set(request.constexprs)


def test_a_block_compiles_for_ada() -> None:
    for binary in compile_all(list(requests("silu").values())):
        facts = binary.facts()
        assert facts.arch == 89
        assert facts.count("IMMA.16832.S8.S8") > 0
        assert facts.spill_loads == 0


def test_without_a_gate_there_is_up_alone() -> None:
    assert list(requests("relu", gated=False)) == ["up4", "down4"]
