"""Experts that go: which, and that the others compute what they did."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import mxmoe
from mxmoe.calib import Stats, observe
from mxmoe.errors import BadOption, CannotPrune, InfeasibleBudget
from mxmoe.frontend import Lifted, lift
from mxmoe.transform import dispensable, lowest, prune, reap_scores

EXPERTS, HIDDEN, INNER, TOP_K = 6, 32, 24, 2
SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": TOP_K},
    **{"max_position_embeddings": 64, "experts_implementation": "eager", "pad_token_id": 0},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2Moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    "Qwen3Moe": {"num_experts": EXPERTS, "decoder_sparse_step": 1, "head_dim": 16},
    "Mixtral": {"num_local_experts": EXPERTS},
    "Olmoe": {"num_experts": EXPERTS},
    "DeepseekV3": {
        **{"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16},
        **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1},
    },
}


def build(family: str = "Qwen2Moe", **changes: Any) -> Any:  # noqa: ANN401  # a model of any family
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def ids() -> Tensor:
    return torch.randint(64, (4, 20), generator=torch.Generator().manual_seed(1))


def observed(model: nn.Module) -> tuple[Lifted, Stats]:
    lifted = lift(model)
    schemes = ["w2a16_g8_sym", "w4a16_g8_sym", "w8a16_g8_sym"]
    return lifted, observe(lifted, ids(), schemes=schemes, min_tokens=0, quiet=True)


def called(experts: nn.Module, run: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401  # what runs the block
    """What the experts of a block are given."""
    seen: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        run()
    handle.remove()
    hidden, index, weights = seen[0][:3]
    return hidden, index, weights


@pytest.mark.parametrize("family", FAMILIES)
def test_those_that_stay_compute_what_they_did(family: str) -> None:
    model = build(family)
    whole = copy.deepcopy(model)
    gone = {block.name: (1, 4) for block in lift(model).blocks}
    prune(lift(model), gone)
    again = lift(model)
    keep = torch.tensor([0, 2, 3, 5])
    for block, old in zip(again.blocks, lift(whole).blocks, strict=True):
        assert block.shape.banks[0].experts == 4
        experts, original = block.banks["routed"].module, old.banks["routed"].module
        x = torch.randn((1, 30, HIDDEN), generator=torch.Generator().manual_seed(2))
        hidden, index, weights = called(experts, lambda block=block, x=x: block.block(x))
        assert int(index.max()) < 4
        with torch.no_grad():
            got, want = experts(hidden, index, weights), original(hidden, keep[index], weights)
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        out = model(ids()).logits
    assert out.isfinite().all()
    config = model.config
    assert 4 in (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    assert config.num_experts_per_tok == TOP_K
    rebuilt = type(model)(config)
    rebuilt.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(ids()).logits, out)


def test_a_token_whose_experts_all_stay_gets_what_it_got() -> None:
    """Where weights are those of a softmax over all experts, times a factor; normalised over the chosen, none."""
    model = build("Mixtral")
    block = lift(model).blocks[0]
    x = torch.randn((1, 60, HIDDEN), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = block.block(x)
    _, index, _ = called(block.banks["routed"].module, lambda: block.block(x))
    prune(lift(model), {block.name: (2,)})
    with torch.no_grad():
        after = block.block(x)
    untouched = (index != 2).all(dim=-1)
    assert 0 < int(untouched.sum()) < 60
    torch.testing.assert_close(after[0, untouched], before[0, untouched])
    assert not torch.allclose(after[0, ~untouched], before[0, ~untouched])


def test_a_pruned_model_is_compiled() -> None:
    model = build()
    prune(lift(model), {"model.layers.0.mlp": (0,), "model.layers.1.mlp": (3, 5)})
    with torch.no_grad():
        plain = model(ids()).logits
    made: Any = mxmoe.compile(model, "eager", inputs=ids(), schemes="bf16", quiet=True)
    assert len(made.plan.rows) == 3 * (5 + 4 + 2)
    with torch.no_grad():
        assert (made(ids()).logits - plain).norm() < 0.03 * plain.norm()


def test_without_rerouting_an_expert_gives_nothing() -> None:
    model = build()
    block = lift(model).blocks[1]
    x = torch.randn((1, 40, HIDDEN), generator=torch.Generator().manual_seed(4))
    experts = block.banks["routed"].module
    hidden, index, weights = called(experts, lambda: block.block(x))
    with torch.no_grad():
        want = experts(hidden, index, weights.masked_fill(index == 2, 0.0))
        prune(lift(model), {block.name: (2,)}, reroute=False)
        torch.testing.assert_close(experts(hidden, index, weights), want)
    assert lift(model).blocks[1].shape.banks[0].experts == EXPERTS
    lifted, stats = observed(model)
    assert stats.sensitivity(block.name, "routed", "down")[2].max() == 0
    assert lowest(stats, 0.2)[block.name] == (2,)
    del lifted


def test_scores_are_reaps() -> None:
    model = build()
    lifted, stats = observed(model)
    for block in lifted.blocks:
        experts = block.banks["routed"].module
        hidden, index, weights = called(experts, lambda: model(ids()))
        for expert in range(EXPERTS):
            row, slot = torch.where(index == expert)
            with torch.no_grad():
                out = experts(hidden[row], torch.full((len(row), 1), expert), weights[row, slot, None])
            want = float(out.norm(dim=-1).mean()) if len(row) else 0.0
            assert reap_scores(stats)[block.name][expert] == pytest.approx(want, rel=1e-4)
    scores = reap_scores(stats)
    for block, gone in lowest(stats, 0.5).items():
        assert len(gone) == 3
        left = [score for expert, score in enumerate(scores[block]) if expert not in gone]
        assert max(scores[block][list(gone)]) <= min(left)


def test_a_budget_below_all_schemes_is_met_by_pruning() -> None:
    model = build()
    lifted, stats = observed(model)
    rich = dispensable(lifted, stats, weight_bits=10.0)
    assert rich.experts == {}
    assert rich.weight_bits == pytest.approx(10.0)
    poor = dispensable(lifted, stats, weight_bits=3.7)  # the narrowest scheme has 4 bits with its scales
    assert poor.experts
    assert all(len(gone) <= 3 for gone in poor.experts.values())
    scores = reap_scores(stats)
    for block, gone in poor.experts.items():
        assert max(scores[block][list(gone)]) <= np.median(scores[block])
    weights = 2 * (EXPERTS * INNER + 40)
    gone = sum(map(len, poor.experts.values())) * INNER
    assert poor.weight_bits == pytest.approx(3.7 * weights / (weights - gone))
    prune(lifted, poor.experts)
    made: Any = mxmoe.compile(
        model, "eager", inputs=ids(), schemes=["w2a16_g8_sym", "w4a16_g8_sym"], weight_bits=poor.weight_bits, quiet=True
    )
    assert made.plan.allocation.weight_bits <= poor.weight_bits
    with pytest.raises(InfeasibleBudget):
        dispensable(lift(build()), stats, weight_bits=1.0)


def test_what_cannot_be_pruned_is_left_as_it_was() -> None:
    model = build("DeepseekV3", n_group=2, topk_group=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = lift(model).blocks[0].name
    with pytest.raises(CannotPrune, match="groups of experts"):
        prune(lift(model), {first: (0,)})
    plain = build()
    for experts, words in (((0, 1, 2, 3, 4), "a token takes 2 of its 6"), ((6,), "its experts are 0 to 5")):
        with pytest.raises(CannotPrune, match=words):
            prune(lift(plain), {"model.layers.0.mlp": (1,), "model.layers.1.mlp": experts})
    with pytest.raises(CannotPrune, match="no such block"):
        prune(lift(plain), {"model.layers.7.mlp": (0,)})
    assert lift(plain).blocks[0].shape.banks[0].experts == EXPERTS
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    stats = observed(plain)[1]
    for part in (-0.1, 1.1):
        with pytest.raises(BadOption, match="a part"):
            lowest(stats, part)
