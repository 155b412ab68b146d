"""Hessians against their definition, computed token by token from what the module's own router says."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from mxmoe.calib import BankHessians, HessianOptions, Hessians, HessiansByBlock, collect_hessians, rereadable
from mxmoe.errors import (
    BadOption,
    BrokenHessians,
    EmptyCalibration,
    NonFiniteObservation,
    NoSuchExpert,
    NothingObserved,
    UnknownName,
)
from mxmoe.frontend import Lifted, lift

HIDDEN, EXPERTS, TOP_K, INNER, SHARED, TOKENS = 24, 5, 2, 16, 20, 70
ROLES = ("gate", "up", "down")


def config() -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=SHARED,
        norm_topk_prob=False,
        max_position_embeddings=64,
    )


def randomized(module: nn.Module) -> Any:  # noqa: ANN401  # torch types every attribute as a module
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


@functools.cache
def small() -> tuple[Any, Lifted, Tensor]:
    block = randomized(Qwen2MoeSparseMoeBlock(config()))
    return block, lift(block), torch.randn((TOKENS, HIDDEN), generator=torch.Generator().manual_seed(1))


@functools.cache
def model() -> tuple[Any, Lifted, Tensor]:
    whole = randomized(Qwen2MoeForCausalLM(config()))
    return whole, lift(whole), torch.randint(64, (6, 9), generator=torch.Generator().manual_seed(2))


def raw(**options: Any) -> HessianOptions:  # noqa: ANN401  # fields of the class
    """Options without the blend for experts with few tokens."""
    return HessianOptions(prior=0.0, **options)


def between(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(x @ gate.mT) * (x @ up.mT)


def by_definition(block: Any, x: Tensor, *, affinity: bool) -> dict[str, list[Tensor]]:  # noqa: ANN401  # as above
    """Role of the routed bank -> sum of c x x^T for each expert, float64; and of the shared one under "shared"."""
    with torch.no_grad():
        score = torch.softmax(x @ block.gate.weight.mT, dim=-1)
        found: dict[str, list[Tensor]] = {"up": [], "down": []}
        for expert in range(EXPERTS):
            chosen = (score.argsort(dim=-1, descending=True)[:, :TOP_K] == expert).any(-1)
            weight = score[chosen, expert] if affinity else torch.ones(int(chosen.sum()))
            mine = x[chosen].double()
            gate, up = block.experts.gate_up_proj[expert].double().chunk(2)
            inner = between(mine, gate, up)
            for role, rows in (("up", mine), ("down", inner)):
                found[role].append((rows * weight.double()[:, None]).mT @ rows)
        shared = torch.sigmoid(x @ block.shared_expert_gate.weight.mT).double() if affinity else torch.ones(len(x), 1)
        found["shared"] = [(x.double() * shared).mT @ x.double()]
    return found


@pytest.mark.parametrize("affinity", [True, False])
def test_they_are_the_sums_that_are_promised(affinity: bool) -> None:
    block, lifted, x = small()
    found = collect_hessians(lifted, x, options=raw(affinity=affinity), quiet=True)
    wanted = by_definition(block, x, affinity=affinity)
    for role in ROLES:
        for expert in range(EXPERTS):
            one = found(f"moe.routed.{role}", expert)
            assert one is not None
            assert one.dtype == torch.float32
            other = wanted["down" if role == "down" else "up"][expert]
            assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-4)
    shared = found("moe.shared.up", 0)
    assert shared is not None
    # the gate of the shared expert is asked of the block, whose output is a float32 sum
    assert torch.allclose(shared.double(), wanted["shared"][0], rtol=1e-3, atol=1e-3)
    assert found("moe.shared.down", 0) is not None


@given(st.lists(st.integers(1, TOKENS - 1), max_size=4), st.sampled_from((1e-9, 512.0)), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_neither_batches_nor_bounds_change_them(cuts: list[int], megabytes: float, rows: int) -> None:
    _, lifted, x = small()
    whole = collect_hessians(lifted, x, options=raw(), quiet=True)
    batches = [part for part in torch.tensor_split(x, sorted(set(cuts))) if len(part)]
    options = raw(max_buffer_mb=megabytes, max_rows=rows)
    parts = collect_hessians(lifted, iter(batches), options=options, quiet=True)
    for name, bank in whole.banks.items():
        assert torch.equal(bank.tokens, parts.banks[name].tokens)
        assert torch.allclose(bank.total, parts.banks[name].total, rtol=1e-4, atol=1e-4)


def test_gate_and_up_share_their_sums_and_memory_is_what_it_says() -> None:
    _, lifted, x = small()
    found = collect_hessians(lifted, x, quiet=True)
    assert found.banks["moe.routed.gate"] is found.banks["moe.routed.up"]
    assert set(found.banks) == set(lifted.blocks[0].banks["routed"].shape.weights.values()) | {
        f"moe.shared.{role}" for role in ROLES
    }
    assert found.n_bytes == 4 * (EXPERTS * (HIDDEN**2 + INNER**2) + HIDDEN**2 + SHARED**2)
    assert int(found.banks["moe.routed.up"].tokens.sum()) == TOKENS * TOP_K


def test_rows_are_transformed_before_they_are_summed() -> None:
    _, lifted, x = small()
    plain = collect_hessians(lifted, x, options=raw(), quiet=True)
    turn = torch.linalg.qr(torch.randn((INNER, INNER), generator=torch.Generator().manual_seed(0))).Q

    def transform(name: str) -> Callable[[Tensor], Tensor] | None:
        return (lambda rows: rows @ turn) if name == "moe.routed.down" else None

    turned = collect_hessians(lifted, x, options=raw(transform=transform), quiet=True)
    for expert in range(EXPERTS):
        before, after = plain("moe.routed.down", expert), turned("moe.routed.down", expert)
        assert before is not None
        assert after is not None
        assert torch.allclose(after, turn.mT @ before @ turn, rtol=1e-3, atol=1e-3)
    assert torch.equal(plain.banks["moe.routed.up"].total, turned.banks["moe.routed.up"].total)


def test_the_module_is_left_as_it_was() -> None:
    block, lifted, x = small()
    state = copy.deepcopy(block.state_dict())
    block.train()
    collect_hessians(lifted, x, quiet=True)
    assert block.training
    block.eval()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())
    assert all(torch.equal(state[name], value) for name, value in block.state_dict().items())


def test_experts_alone_take_routed_batches() -> None:
    block, _, x = small()
    lifted = lift(block.experts)
    index = torch.tensor([[0, EXPERTS], [3, 0]] * (TOKENS // 2))  # one past the last expert is padding
    weights = torch.full((TOKENS, 2), 0.5)
    found = collect_hessians(lifted, (x, index, weights), options=raw(), quiet=True)
    name = lifted.blocks[0].banks["routed"].shape.weights["up"]
    assert found.banks[name].tokens.tolist() == [TOKENS, 0, 0, TOKENS // 2, 0]
    one = found(name, 0)
    assert one is not None
    assert torch.allclose(one, 0.5 * x.mT @ x, rtol=1e-4, atol=1e-4)
    assert found(name, 1) is None
    assert torch.equal(found.stack(name)[1], torch.zeros(HIDDEN, HIDDEN))
    assert torch.equal(found.stack(name, [3, 0])[1], one)


def test_blocks_of_a_model_and_a_run_of_the_callers_own() -> None:
    whole, lifted, ids = model()
    every = collect_hessians(lifted, ids, quiet=True)
    names = [block.name for block in lifted.blocks]
    one = collect_hessians(lifted, ids, blocks=names[1:2], quiet=True)
    assert {name.split(".routed")[0].split(".shared")[0] for name in one.banks} == {names[1]}
    for name, bank in one.banks.items():
        assert torch.equal(bank.total, every.banks[name].total)
    mine = collect_hessians(
        lifted, [{"input_ids": ids}], run=lambda module, batch: whole(**batch), blocks=names[1:2], quiet=True
    )
    assert all(torch.equal(mine.banks[name].total, bank.total) for name, bank in one.banks.items())


def test_by_block_they_are_the_same_and_the_data_is_read_once_per_group() -> None:
    _, lifted, ids = model()
    every = collect_hessians(lifted, ids, quiet=True)
    of_a_block = every.n_bytes / len(lifted.blocks)
    passes: list[int] = []

    def batches() -> Any:  # noqa: ANN401  # a generator
        passes.append(1)
        yield ids[:4]
        yield ids[4:]

    for bound, groups in ((of_a_block * 1.5, 3), (of_a_block * 2.5, 2), (of_a_block * 9, 1), (1.0, 3)):
        lazy = HessiansByBlock(lifted, batches(), max_gb=bound / 1e9, quiet=True)
        assert len(lazy.groups) == groups
        assert [name for group in lazy.groups for name in group] == [block.name for block in lifted.blocks]
        for name in every.banks:
            one, other = lazy(name, 0), every(name, 0)
            assert one is not None
            assert other is not None
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
    assert len(passes) == 4, "an iterator is read into memory"
    with pytest.raises(UnknownName, match="no Hessian named 'x'"):
        HessiansByBlock(lifted, ids)("x", 0)
    with pytest.raises(BadOption, match="max_gb=0"):
        HessiansByBlock(lifted, ids, max_gb=0)


def test_what_can_be_read_twice_is_left_as_it_is() -> None:
    x = torch.zeros(1)
    assert rereadable(x) is x
    assert rereadable(None) is None
    assert rereadable(iter([1, 2])) == [1, 2]


def bank(tokens: list[int], *, is_common: bool) -> tuple[Hessians, BankHessians]:
    """Hessians of made-up sums over so many tokens, 4 channels."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn((n, 4), generator=generator) for n in tokens]
    sums = BankHessians(torch.stack([part.mT @ part for part in x]), torch.tensor(tokens), is_common)
    return Hessians({"up": sums}), sums


def test_experts_with_few_tokens_are_filled_up_with_mean_ones() -> None:
    hessians, sums = bank([20, 2, 0], is_common=True)
    mean = sums.total.sum(0) / 22
    for expert, missing in ((0, 0), (1, 2), (2, 4)):
        one = hessians("up", expert)
        assert one is not None
        assert torch.allclose(one, sums.total[expert] + 0.1 * missing * mean)
    more = hessians.blended(prior=0.5, min_tokens=30)("up", 0)
    assert more is not None
    assert torch.allclose(more, sums.total[0] + 0.5 * 10 * mean)
    assert hessians.blended(prior=0.0)("up", 2) is None


def test_channels_of_an_experts_own_are_only_damped() -> None:
    hessians, sums = bank([20, 2, 0], is_common=False)
    few = hessians("up", 1)
    assert few is not None
    per_token = sums.total[1].diagonal().mean() / 2
    assert torch.allclose(few, sums.total[1] + 0.1 * 2 * per_token * torch.eye(4))
    assert hessians("up", 2) is None
    plenty = hessians("up", 0)
    assert plenty is not None
    assert torch.equal(plenty, sums.total[0])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans(), st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_blended_hessians_are_still_positive(tokens: list[int], is_common: bool, prior: float) -> None:
    hessians = bank(tokens, is_common=is_common)[0].blended(prior=prior)
    for expert in range(len(tokens)):
        one = hessians("up", expert)
        if one is not None:
            assert torch.linalg.eigvalsh(one.double()).amin() > -1e-4
        if one is None:
            assert tokens[expert] == 0


def test_a_file_keeps_them(tmp_path: Path) -> None:
    _, lifted, x = small()
    found = collect_hessians(lifted, x, options=HessianOptions(prior=0.3, min_tokens=50), quiet=True)
    path = tmp_path / "h.safetensors"
    found.save(path)
    back = Hessians.load(path)
    assert (back.prior, back.min_tokens) == (0.3, 50)
    assert back.n_bytes == found.n_bytes, "gate and up are written once"
    for name, bank in found.banks.items():
        other = back.banks[name]
        assert torch.equal(bank.total, other.total)
        assert torch.equal(bank.tokens, other.tokens)
        assert bank.is_common == other.is_common
    for damaged in (b"", path.read_bytes()[:-5], b"{}" * 40):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(BrokenHessians, match="is not a readable file of Hessians"):
            Hessians.load(tmp_path / "bad")
    with pytest.raises(BrokenHessians):
        Hessians.load(tmp_path / "missing")


def test_mistakes_are_named() -> None:
    block, lifted, x = small()
    found = collect_hessians(lifted, x, quiet=True)
    with pytest.raises(UnknownName, match=r"no Hessian named 'moe.routed.upp'; did you mean moe\.routed\.up"):
        found("moe.routed.upp", 0)
    with pytest.raises(NoSuchExpert, match="has experts 0 to 4, not 5"):
        found("moe.routed.up", 5)
    with pytest.raises(NoSuchExpert):
        found("moe.routed.up", -1)
    with pytest.raises(UnknownName, match="no block named 'mo'; did you mean moe"):
        collect_hessians(lifted, x, blocks=["mo"], quiet=True)
    with pytest.raises(EmptyCalibration):
        collect_hessians(lifted, x[:0], quiet=True)
    with pytest.raises(NothingObserved):
        collect_hessians(lifted, [x], run=lambda module, batch: None, quiet=True)
    for option in ({"max_rows": 0}, {"max_buffer_mb": -1.0}):
        with pytest.raises(BadOption, match="it must be positive"):
            raw(**option)
    with pytest.raises(BadOption, match="prior=-1"):
        collect_hessians(lifted, x, options=HessianOptions(prior=-1), quiet=True)
    broken = copy.deepcopy(block)
    broken.experts.gate_up_proj.data[2] = torch.inf
    with pytest.raises(NonFiniteObservation, match=r"expert 2 of moe\.routed"):
        collect_hessians(lift(broken), x, quiet=True)
