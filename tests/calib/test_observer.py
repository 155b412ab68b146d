"""Observing against the definition: one linear replaced in the torch block, the whole block run on all data."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from mxmoe.calib import Stats, observe, observe_weights
from mxmoe.errors import (
    BadCalibration,
    BadOption,
    BadScheme,
    EmptyCalibration,
    NonFiniteCalibration,
    NonFiniteObservation,
    NothingObserved,
)
from mxmoe.frontend import Lifted, lift
from mxmoe.ir import Scheme
from mxmoe.passes import Environment, RotateDown, run_passes
from mxmoe.quant import dequantize, fake_quantize_activation, quantize, rotate

HIDDEN, EXPERTS, TOP_K, INNER, SHARED = 32, 5, 2, 24, 40
SCHEMES = ("bf16", "w4a16_g16_asym", "w2a16_sym", "w8a8_sym", "w4a4_g16_sym", "w8a8_e4m3")
ROLES = ("gate", "up", "down")
TOKENS = 90
ROUNDING = 1e-3
"""Products of other sizes differ in the last bit of a float32, and a code that lies on an edge then flips."""


def config(**changes: Any) -> Qwen2MoeConfig:  # noqa: ANN401
    return Qwen2MoeConfig(
        **{
            **{"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": EXPERTS, "use_cache": True},
            **{"num_experts_per_tok": TOP_K, "moe_intermediate_size": INNER, "decoder_sparse_step": 1},
            **{"shared_expert_intermediate_size": SHARED, "norm_topk_prob": False, "max_position_embeddings": 64},
            **changes,
        }
    )


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


@functools.cache
def small() -> tuple[Lifted, Tensor]:
    """A block and its data; no fixture, because hypothesis would print a fixture's value whole."""
    x = torch.randn((TOKENS, HIDDEN), generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 8  # an outlier channel, so that activation schemes differ
    return lift(randomized(Qwen2MoeSparseMoeBlock(config()))), x


@pytest.fixture
def lifted() -> Lifted:
    return small()[0]


@pytest.fixture
def hidden() -> Tensor:
    return small()[1]


@functools.cache
def whole() -> Stats:
    return observe(small()[0], small()[1], schemes=SCHEMES, min_tokens=0, quiet=True)


@pytest.fixture
def stats() -> Stats:
    return whole()


def fake_forward(block: Any, expert: int, role: str, scheme: Scheme) -> Callable[..., Tensor]:  # noqa: ANN401
    """One routed expert with one linear quantized, the other experts as they are, in plain torch."""
    experts = block.experts

    def linear(weight: Tensor, x: Tensor, touched: bool) -> Tensor:
        if not touched:
            return x @ weight.T
        return fake_quantize_activation(x, scheme) @ dequantize(quantize(weight, scheme)).T

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e in range(EXPERTS):
            gate_w, up_w = experts.gate_up_proj[e].chunk(2)
            row, slot = torch.where(index == e)
            touched = [e == expert and role == r for r in ROLES]
            gate, up = linear(gate_w, hidden[row], touched[0]), linear(up_w, hidden[row], touched[1])
            y = linear(experts.down_proj[e], nn.functional.silu(gate) * up, touched[2])
            out.index_add_(0, row, y * weights[row, slot, None])
        return out

    return forward


def brute_force(block: nn.Module, hidden: Tensor, bank: str, expert: int, role: str, scheme: Scheme) -> float:
    """Squared Frobenius norm of the change of the whole block's output."""
    changed: Any = copy.deepcopy(block)
    if bank == "routed":
        changed.experts.forward = fake_forward(block, expert, role, scheme)
    else:
        linear = changed.shared_expert.get_submodule(f"{role}_proj")
        linear.weight.data = dequantize(quantize(linear.weight.data, scheme))
        linear.register_forward_pre_hook(lambda _, args: (fake_quantize_activation(args[0], scheme),))
    with torch.no_grad():
        difference = changed(hidden[None]) - block(hidden[None])
    return float(difference.double().square().sum())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("bank", "experts"), [("routed", range(EXPERTS)), ("shared", range(1))])
def test_equals_the_definition(
    lifted: Lifted, hidden: Tensor, stats: Stats, scheme: str, bank: str, experts: range
) -> None:
    for role in ROLES:
        got = stats.sensitivity("moe", bank, role, [scheme])[:, 0]
        for expert in experts:
            want = brute_force(lifted.root, hidden, bank, expert, role, Scheme.parse(scheme))
            # squares double a relative error; the difference of two whole outputs in float32 has a floor of its own
            assert got[expert] == pytest.approx(want, rel=1e-4), (role, expert)


def test_a_rotated_module_is_observed_rotated(hidden: Tensor, stats: Stats) -> None:
    lifted = lift(randomized(Qwen2MoeSparseMoeBlock(config())))
    run_passes(lifted.module, [RotateDown(block=8)], Environment())
    got = observe(lifted, hidden, schemes=SCHEMES, min_tokens=0, quiet=True)
    block: Any = lifted.root
    scheme = Scheme.parse("w4a4_g16_sym")
    with torch.no_grad():
        gate, up = block.experts.gate_up_proj[1].chunk(2)
        down = block.experts.down_proj[1]
        _, weights, index = block.gate(hidden)
        row, slot = torch.where(index == 1)
        inner = nn.functional.silu(hidden[row] @ gate.T) * (hidden[row] @ up.T)
        cast = fake_quantize_activation(rotate(inner, 8), scheme) @ dequantize(quantize(rotate(down, 8), scheme)).T
        want = float(((cast - inner @ down.T) * weights[row, slot, None]).double().square().sum())
    assert got.sensitivity("moe", "routed", "down", [scheme])[1, 0] == pytest.approx(want, rel=1e-3)
    assert (
        got.sensitivity("moe", "routed", "down", [scheme])[1, 0]
        != stats.sensitivity("moe", "routed", "down", [scheme])[1, 0]
    )
    for role in ("gate", "up"):
        np.testing.assert_allclose(
            got.sensitivity("moe", "routed", role), stats.sensitivity("moe", "routed", role), rtol=1e-3
        )


def test_unsquared_is_the_norm_of_the_paper(lifted: Lifted, hidden: Tensor, stats: Stats) -> None:
    want = brute_force(lifted.root, hidden, "routed", 2, "down", Scheme.parse("w2a16_sym")) ** 0.5
    got = stats.sensitivity("moe", "routed", "down", ["w2a16_sym"], norm="unsquared")
    assert got[2, 0] == pytest.approx(want, rel=1e-4)


def test_counts_and_mass(lifted: Lifted, hidden: Tensor, stats: Stats) -> None:
    block: Any = lifted.root
    with torch.no_grad():
        _, weights, index = block.gate(hidden)
    routed, shared = stats.bank("moe", "routed"), stats.bank("moe", "shared")
    assert routed.tokens.tolist() == torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
    want = torch.zeros(EXPERTS).index_add_(0, index.flatten(), weights.flatten())
    np.testing.assert_allclose(routed.mass, want, rtol=1e-5)
    assert (routed.n_tokens, shared.n_tokens, shared.tokens.tolist()) == (TOKENS, TOKENS, [TOKENS])
    assert shared.mass.tolist() == [TOKENS]
    assert {routed.measured_at, shared.measured_at} == {"block"}


def same(one: Stats, other: Stats, rtol: float = ROUNDING) -> None:
    assert one.schemes == other.schemes
    assert one.banks.keys() == other.banks.keys()
    for key, sums in one.banks.items():
        assert sums.n_tokens == other.banks[key].n_tokens
        np.testing.assert_array_equal(sums.tokens, other.banks[key].tokens)
        np.testing.assert_allclose(sums.mass, other.banks[key].mass, rtol=rtol)
        np.testing.assert_allclose(sums.squared_output, other.banks[key].squared_output, rtol=rtol)
        for role, error in sums.squared_error.items():
            np.testing.assert_allclose(error, other.banks[key].squared_error[role], rtol=rtol, atol=1e-9)


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    cuts=st.lists(st.integers(1, TOKENS - 1), max_size=4, unique=True),
    megabytes=st.sampled_from((1e-6, 0.002, 0.01)),
    rows=st.integers(8, 60),
)
def test_neither_batches_nor_bounds_matter(cuts: list[int], megabytes: float, rows: int) -> None:
    lifted, hidden = small()
    batches = list(torch.tensor_split(hidden, sorted(cuts)))
    bounds = {"max_buffer_mb": megabytes, "max_rows": rows}
    same(observe(lifted, batches, schemes=SCHEMES, min_tokens=0, quiet=True, **bounds), whole())


def test_two_halves_merge_to_the_whole(lifted: Lifted, hidden: Tensor, stats: Stats) -> None:
    halves = [observe(lifted, h, schemes=SCHEMES, min_tokens=0, quiet=True) for h in hidden.split(TOKENS // 2)]
    same(halves[0].merge(*halves[1:]), stats)
    assert halves[0].merge(halves[1]).macs == sum(half.macs for half in halves) == stats.macs


def test_a_generator_is_read_once(lifted: Lifted, hidden: Tensor, stats: Stats) -> None:
    read: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number, batch in enumerate(hidden.split(40)):
            read.append(number)
            yield batch

    same(observe(lifted, batches(), schemes=SCHEMES, min_tokens=0, quiet=True), stats)
    assert read == [0, 1, 2]


def test_three_axes_and_keyword_arguments_are_taken(lifted: Lifted, hidden: Tensor, stats: Stats) -> None:
    wide = hidden.reshape(3, 30, HIDDEN)
    same(observe(lifted, wide, schemes=SCHEMES, min_tokens=0, quiet=True), stats)
    same(observe(lifted, {"hidden_states": wide}, schemes=SCHEMES, min_tokens=0, quiet=True), stats)
    run = observe(lifted, [wide], schemes=SCHEMES, min_tokens=0, quiet=True, run=lambda root, batch: root(batch))
    same(run, stats)


def test_the_module_is_left_as_it_was(lifted: Lifted, hidden: Tensor) -> None:
    block: Any = lifted.root
    block.train()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        want = block(hidden[None])
    observe(lifted, hidden, schemes=["w4a16_sym"], quiet=True)
    assert all(module.training for module in block.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    assert not any("forward" in vars(module) for module in block.modules())
    assert all(torch.equal(value, block.state_dict()[name]) for name, value in before.items())
    with torch.no_grad():
        assert torch.equal(block(hidden[None]), want)
    block.eval()


def test_arithmetic_is_counted(lifted: Lifted, hidden: Tensor, stats: Stats) -> None:
    per_row = 3 + 5 * len(SCHEMES)
    assert stats.macs == TOKENS * (TOP_K * INNER + SHARED) * HIDDEN * per_row


def test_experts_alone_take_their_routing(lifted: Lifted, hidden: Tensor, stats: Stats) -> None:
    block: Any = lifted.root
    with torch.no_grad():
        _, weights, index = block.gate(hidden)
    alone = lift(block.experts, top_k=TOP_K)
    got = observe(alone, (hidden, index, weights), schemes=SCHEMES, min_tokens=0, quiet=True)
    assert got.routing == "observed"
    sums, want = got.bank("moe", "routed"), stats.bank("moe", "routed")
    for role in ROLES:
        np.testing.assert_allclose(sums.squared_error[role], want.squared_error[role], rtol=1e-5, atol=1e-9)
    padded = torch.cat([index, torch.full((TOKENS, 1), EXPERTS)], dim=1), torch.cat([weights, weights[:, :1]], dim=1)
    same(observe(alone, [(hidden, *padded)], schemes=SCHEMES, min_tokens=0, quiet=True), got)


def test_experts_alone_without_routing_are_spread_evenly(lifted: Lifted, hidden: Tensor) -> None:
    block: Any = lifted.root
    got = observe(lift(block.experts, top_k=TOP_K), hidden, schemes=["w4a16_sym"], quiet=True)
    assert got.routing == "uniform"
    assert "no router" in got.report()
    assert got.bank("moe", "routed").tokens.tolist() == [TOKENS * TOP_K // EXPERTS] * EXPERTS


def test_a_model_is_observed_block_by_block() -> None:
    model = randomized(Qwen2MoeForCausalLM(config()))
    ids = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(2))
    seen: dict[str, Tensor] = {}
    lifted = lift(model)
    for block in lifted.blocks:
        block.block.register_forward_hook(lambda _, args, __, name=block.name: seen.update({name: args[0]}))
    got = observe(lifted, ids, schemes=SCHEMES, min_tokens=0, quiet=True)
    assert {block for block, _ in got.banks} == {"model.layers.0.mlp", "model.layers.1.mlp"}
    for block in lifted.blocks:
        alone = observe(lift(block.block), seen[block.name].detach(), schemes=SCHEMES, min_tokens=0, quiet=True)
        for bank in ("routed", "shared"):
            for role in ROLES:
                want = alone.sensitivity("moe", bank, role)
                np.testing.assert_allclose(got.sensitivity(block.name, bank, role), want, rtol=1e-4, atol=1e-8)
    same(observe(lifted, list(ids), schemes=SCHEMES, min_tokens=0, quiet=True), got)
    same(observe(lifted, [{"input_ids": ids}], schemes=SCHEMES, min_tokens=0, quiet=True), got)


def test_bf16_modules_are_observed(hidden: Tensor) -> None:
    block = randomized(Qwen2MoeSparseMoeBlock(config())).bfloat16()
    got = observe(lift(block), hidden, schemes=["bf16", "w4a16_sym"], min_tokens=0, quiet=True)
    # weights and inputs are bf16 already: only the hidden rows before down are cast
    assert (got.sensitivity("moe", "routed", "gate", ["bf16"]) == 0).all()
    down = got.relative("moe", "routed", "down")
    assert (down[:, 0] > 0).all()
    assert (down[:, 0] < 1e-3 * down[:, 1]).all()


def test_without_data(lifted: Lifted) -> None:
    got = observe_weights(lifted, SCHEMES, tokens_per_expert=20, quiet=True)
    assert got.data_free
    assert "data-free" in got.report()
    routed, shared = got.bank("moe", "routed"), got.bank("moe", "shared")
    assert routed.tokens.tolist() == [20] * EXPERTS
    assert shared.tokens.tolist() == [50]
    assert routed.n_tokens == shared.n_tokens == 50
    for bank in ("routed", "shared"):
        for role in ROLES:
            error = got.per_token("moe", bank, role, ["w8a8_sym", "w4a16_g16_asym", "w2a16_sym"])
            assert (np.diff(error, axis=1) > 0).all()
    same(observe_weights(lifted, SCHEMES, tokens_per_expert=20, quiet=True), got)


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ([], EmptyCalibration, "list"),
        (iter([]), EmptyCalibration, "iterable"),
        (torch.zeros(0, HIDDEN), EmptyCalibration, "batch 0"),
        ([torch.zeros(2, HIDDEN), torch.full((2, HIDDEN), torch.nan)], NonFiniteCalibration, r"batch 1 .*\[0, 0\]"),
        (torch.zeros(4, HIDDEN + 1), BadCalibration, r"\[4, 33\].*32"),
        (torch.zeros(4, HIDDEN).long(), BadCalibration, "int64"),
        (torch.zeros(HIDDEN), BadCalibration, r"\[tokens, 32\]"),
        (["text"], BadCalibration, "str"),
        (5, BadCalibration, "int; a batch is a tensor"),
        ((torch.zeros(4, HIDDEN), torch.zeros(4, 2).long(), torch.zeros(4, 2)), BadCalibration, "routes by itself"),
    ],
)
def test_bad_data_is_refused_before_any_work(lifted: Lifted, inputs: Any, error: type, words: str) -> None:  # noqa: ANN401
    def never(*args: object) -> None:
        pytest.fail("the module ran")

    handle = lifted.root.register_forward_pre_hook(never)
    try:
        with pytest.raises(error, match=words):
            observe(lifted, inputs, schemes=SCHEMES, quiet=True)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.zeros(4, HIDDEN), torch.zeros(4, 2), torch.zeros(4, 2)), "integers"),
        ((torch.zeros(4, HIDDEN), torch.zeros(3, 2).long(), torch.zeros(3, 2)), r"\[tokens, k\]"),
        ({"hidden_states": torch.zeros(4, HIDDEN)}, "take tensors"),
    ],
)
def test_bad_routing_is_refused(lifted: Lifted, batch: Any, words: str) -> None:  # noqa: ANN401
    block: Any = lifted.root
    with pytest.raises(BadCalibration, match=words):
        observe(lift(block.experts, top_k=TOP_K), [batch], schemes=SCHEMES, quiet=True)


def test_a_model_does_not_take_hidden_states() -> None:
    lifted = lift(randomized(Qwen2MoeForCausalLM(config())))
    with pytest.raises(BadCalibration, match="token ids"):
        observe(lifted, torch.zeros(4, HIDDEN), schemes=SCHEMES, quiet=True)


@pytest.mark.parametrize("option", [{"max_buffer_mb": 0}, {"max_rows": 0}, {"min_tokens": -1}, {"schemes": ()}])
def test_bad_options_are_refused(lifted: Lifted, hidden: Tensor, option: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=next(iter(option))):
        observe(lifted, hidden, **{"schemes": SCHEMES, "quiet": True, **option})
    with pytest.raises(BadOption, match="tokens_per_expert"):
        observe_weights(lifted, SCHEMES, tokens_per_expert=0, quiet=True)
    with pytest.raises(BadScheme):
        observe(lifted, hidden, schemes=["w9a9"], quiet=True)


def test_a_run_that_never_reaches_the_experts_is_found_out(lifted: Lifted, hidden: Tensor) -> None:
    with pytest.raises(NothingObserved, match="routed"):
        observe(lifted, [hidden], schemes=SCHEMES, quiet=True, run=lambda root, batch: None)


def test_overflow_within_the_model_is_named(lifted: Lifted, hidden: Tensor) -> None:
    with pytest.raises(NonFiniteObservation, match=r"moe\.routed"):
        observe(lifted, hidden * 1e30, schemes=["w4a16_sym"], quiet=True)


def test_progress_names_the_block(lifted: Lifted, hidden: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    observe(lifted, hidden, schemes=["w4a16_sym"], quiet=True)
    assert capsys.readouterr().err == ""
    observe(lifted, hidden, schemes=["w4a16_sym"])
    shown = capsys.readouterr().err
    assert "observing" in shown
    assert "moe" in shown
