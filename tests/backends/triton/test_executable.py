"""Compiled blocks in Triton's interpreter: what they compute is the definition; what they hold can be had back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

pytest.importorskip("triton")

import mxmoe
from mxmoe.backends.triton import TritonBackend, executable
from mxmoe.backends.triton.launch import FUSED
from mxmoe.compiled import CompiledBank
from mxmoe.errors import BadHidden, BadRouting, BadWeightShape, NoSuchBank, WrongDevice
from mxmoe.ir import Scheme
from mxmoe.quant import ACT_PARAMS, ACTS, Weights, pack, tolerance
from mxmoe.testing import Case, Routed, assert_backends_agree, cases
from mxmoe.testing.agree import relative_error

from .small_blocks import DEVICE, KERNEL_SCHEMES, Pair, Small, mixes, smalls

pytestmark = [
    # rows of padding hold anything, and numpy says so where kernels are interpreted
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(DEVICE == "cuda", reason="compiles too much; test_on_device.py does it with few shapes"),
]

SIZES = ((72, 64), (64, 104), (136, 72), (40, 136), (128, 160))
MIX = Small(tuple(map(Scheme.parse, ("w4a8_g128_sym", "w8a8_sym", "bf16", "w3a16_g32_asym"))), 72, 136, has_bias=True)


def shrunk(small: Small, at: int) -> Small:
    """A block of few tiles: four experts, so every scheme once."""
    hidden, intermediate = SIZES[at % len(SIZES)]
    turn = small.turn if small.turn and intermediate % small.turn == 0 else (8 if small.turn else 0)
    return replace(small, hidden=hidden, intermediate=intermediate, experts=4, top_k=1 + at % 4, turn=turn)


SMALLS = [shrunk(small, at) for at, small in enumerate(smalls(mixes(4)))]


@pytest.fixture(scope="module")
def mix() -> Pair:
    return Pair.of(MIX)


def test_every_scheme_activation_and_option_is_among_the_blocks() -> None:
    assert {scheme for small in SMALLS for scheme in small.schemes} == set(KERNEL_SCHEMES)
    assert {small.act for small in SMALLS} == set(ACTS)
    assert {small.dtype for small in SMALLS} == {"bf16", "fp16", "fp32"}
    assert {small.is_tied for small in SMALLS} == {small.has_bias for small in SMALLS} == {True, False}
    assert {8, 24, 32} <= {small.turn for small in SMALLS}


@pytest.mark.parametrize("small", SMALLS, ids=str)
def test_every_scheme_equals_the_definition(small: Small) -> None:
    pair = Pair.of(small)
    pair.check(small.tokens(3, 1), small.routing(3, 2), is_traced=True)


@pytest.mark.parametrize("act", sorted(ACTS))
def test_every_activation_is_computed_in_the_kernel(act: str) -> None:
    assert act in FUSED
    for gated in (True, False):
        if gated or act not in ACT_PARAMS:
            small = Small((Scheme.parse("fp16"),), 64, 64, 1, 1, act, gated, dtype="fp16", has_bias=True)
            pair = Pair.of(small)
            assert pair.triton["mlp"].banks["routed"].is_fused  # pyright: ignore[reportAttributeAccessIssue]
            pair.check(small.tokens(4, 0), small.routing(4, 0))


@settings(max_examples=4, deadline=None)
@given(case=cases("lowered", KERNEL_SCHEMES[::5]))
def test_drawn_blocks_equal_the_definition(case: Case) -> None:
    backends = ("eager", "numba", TritonBackend("89"))
    assert_backends_agree(case.module, case.weights, case.hidden, case.routings, backends=backends)


@pytest.mark.parametrize("kind", ["none", "one", "all to one", "padding", "all padding", "beyond", "int32", "many"])
def test_routings(kind: str, mix: Pair) -> None:
    tokens = {"none": 0, "one": 1, "many": 40}.get(kind, 5)
    routed, experts = MIX.routing(tokens, 3), MIX.experts
    index = routed.index
    if kind == "all to one":
        index = torch.full_like(index, experts)
        index[:, 1] = 2
    elif kind == "padding":
        index[::2, 0] = experts
    elif kind == "all padding":
        index = torch.full_like(index, experts)
    elif kind == "int32":
        index = index.int()
    elif kind == "beyond":  # what is no expert is padding: nothing waits for the device to say so
        strange = index.clone()
        strange[0, 0], strange[1, 1] = -1, experts + 7
        hidden = MIX.tokens(tokens, 3)
        found = mix.triton["mlp"]("routed", hidden, strange, routed.weights)
        wanted = mix.triton["mlp"]("routed", hidden, strange.where(strange.clamp(0, 3) == strange, 4), routed.weights)
        assert torch.equal(found, wanted)
        return
    mix.check(MIX.tokens(tokens, 3), Routed(index, routed.weights, kind))


def test_tokens_need_not_lie_side_by_side(mix: Pair) -> None:
    routed, hidden = MIX.routing(3, 0), MIX.tokens(3, 0)
    args = routed.index.T.contiguous().T, routed.weights.T.contiguous().T
    found = mix.triton["mlp"]("routed", hidden.T.contiguous().T, *args)
    assert torch.equal(found, mix.triton["mlp"]("routed", hidden, routed.index, routed.weights))


def test_many_rows_are_run_in_turns(mix: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executable, "MAX_ROWS", 6)
    mix.check(MIX.tokens(7, 1), MIX.routing(7, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("small", [MIX, replace(MIX, gated=False, act="relu"), replace(MIX, act="swiglu_oai")], ids=str)
def test_a_broken_token_spoils_itself_only(small: Small, value: float) -> None:
    pair = Pair.of(small)
    hidden, routed = small.tokens(4, 0), small.routing(4, 0)
    whole = pair.triton["mlp"]("routed", hidden, routed.index, routed.weights)
    hidden[2, 5] = value
    found = pair.triton["mlp"]("routed", hidden, routed.index, routed.weights)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(found[others], whole[others])
    assert found[2].isnan().any()


# What it holds


def test_packed_weights_and_biases_come_back(mix: Pair) -> None:
    held = mix.triton["mlp"]
    for name in ("mlp.gate", "mlp.up", "mlp.down"):
        first = 0 if name != "mlp.down" else 1
        for expert in range(MIX.experts):
            scheme = MIX.schemes[(expert + first) % len(MIX.schemes)]
            wanted, found = pack(mix.weights.quantized(name, expert, scheme)), held.packed(name, expert)
            assert found.scheme == scheme
            for field in ("payload", "scale", "zero"):
                a, b = getattr(found, field), getattr(wanted, field)
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b)
        assert torch.equal(held.bias(f"{name}.bias"), mix.weights[f"{name}.bias"])
    for ask in (lambda: held.packed("mlp.other", 0), lambda: held.bias("mlp.other")):
        with pytest.raises(KeyError):
            ask()


def test_nbytes_are_those_of_the_weights_and_little_more(mix: Pair) -> None:
    small = Small((Scheme.parse("w4a16_g128_sym"),), 256, 512, 4)
    held = Pair.of(small).triton["mlp"].nbytes
    codes = 4 * 3 * 256 * 512 // 2
    scales = 4 * 3 * 256 * 512 // 128 * 2
    assert codes + scales <= held <= 1.02 * (codes + scales)
    biases = sum(4 * MIX.experts * n for n in (MIX.intermediate, MIX.intermediate, MIX.hidden))
    without = Pair.of(replace(MIX, has_bias=False)).triton["mlp"].nbytes
    assert mix.triton["mlp"].nbytes == without + biases


def test_a_weight_of_another_shape_is_named() -> None:
    small = Small((Scheme.parse("w8a8_sym"),), 64, 64)
    module = small.module()
    weights = small.weights(module)
    wrong = Weights({**weights, "mlp.up": torch.zeros(4, 64, 60)})
    with pytest.raises(BadWeightShape, match=r"mlp\.up\[0\]"):
        TritonBackend().compile(module, wrong)


def test_calls_that_do_not_fit(mix: Pair) -> None:
    run, hidden = mix.triton["mlp"], MIX.tokens(2, 0)
    routed = MIX.routing(2, 0)
    index, weights = routed.index, routed.weights
    with pytest.raises(NoSuchBank, match="it has routed"):
        run("shared", hidden, index, weights)
    with pytest.raises(BadHidden):
        run("routed", hidden[:, 1:], index, weights)
    with pytest.raises(BadRouting, match="top_k_weights"):
        run("routed", hidden, index, weights[:, :1])
    with pytest.raises(BadRouting, match="top_k_index"):
        run("routed", hidden, index.double(), weights)
    for wrong in ((hidden.to("meta"), index, weights), (hidden, index.to("meta"), weights)):
        with pytest.raises(WrongDevice, match=r"triton holds mlp on cpu and was given tensors on meta"):
            run("routed", *wrong)


# torch.compile


def test_torch_compile_sees_one_node(mix: Pair) -> None:
    bank = CompiledBank(mix.triton["mlp"], "routed")
    routed = MIX.routing(3, 0)

    def block(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return hidden + bank(hidden * 2, index, weights)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        args = (MIX.tokens(3, seed), routed.index, routed.weights)
        assert torch.equal(compiled(*args), block(*args))


def test_the_operator_keeps_what_it_promises_torch(mix: Pair) -> None:
    run: Any = mix.triton["mlp"]
    routed = MIX.routing(3, 0)
    args = (run.held, "routed", MIX.tokens(3, 0), routed.index, routed.weights)
    found = torch.library.opcheck(torch.ops.mxmoe.run_bank.default, args)
    assert set(found.values()) == {"SUCCESS"}
    assert torch.equal(torch.ops.mxmoe.run_bank(*args), run("routed", *args[2:]))


# A module


def test_a_compiled_module_is_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=64, moe_intermediate_size=72, shared_expert_intermediate_size=64, num_experts=3,
        num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    block = Qwen2MoeSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    schemes = ("w4a16_g32_asym", "w8a8_sym", "w4a8_g128_sym")
    made: Any = mxmoe.compile(block, "triton-sm89", schemes=schemes, weight_bits=6, quiet=True, carry=())
    x = torch.randn((1, 3, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = made(x)
        made.save(tmp_path / "saved")
        back: Any = mxmoe.load(tmp_path / "saved")
        assert back.compilation.target.name == "triton-sm89"
        assert back.report() == made.report()
        assert torch.equal(back(x), wanted)
        other: Any = mxmoe.load(tmp_path / "saved", target="eager")
        assert relative_error(other(x), wanted) <= 3 * max(map(tolerance, made.plan.histogram()))


@pytest.mark.parametrize("further", [{"gated": False, "act": "relu"}, {"is_tied": False}], ids=str)
def test_sums_before_the_nonlinearity_are_whole(further: dict[str, Any]) -> None:
    # k long enough, and tiles few enough, for a GEMM out to be split
    small = Small(tuple(map(Scheme.parse, ("w8a8_sym", "bf16"))), 1408, 64, **further)
    pair = Pair.of(small)
    made = pair.triton["mlp"]
    assert isinstance(made, executable.TritonExecutable)
    entries = made.banks["routed"].configs(2, 2)[:-1]
    assert {shape.parts for config in entries for _, shape in config.shapes} == {1}
    pair.check(small.tokens(2, 0), small.routing(2, 1))
