"""The candidate w0: one column more in the tables, and one solve that decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from mxmoe.calib import observe
from mxmoe.errors import BadOption
from mxmoe.frontend import Lifted, lift
from mxmoe.ir import Scheme, banks, moe_ops, plan_of
from mxmoe.passes import Environment, parse_passes, run_passes

CANDIDATES = tuple(map(Scheme.parse, ("w2a16_g32_asym", "w0", "w8a16_g32_asym")))
EXPERTS, TOP_K = 6, 2


@pytest.fixture
def lifted() -> Lifted:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
        initializer_range=0.2,
    )
    model: Any = Qwen2MoeForCausalLM(config).eval()
    with torch.no_grad():  # an expert that puts out next to nothing
        model.model.layers[0].mlp.experts.down_proj[3] *= 1e-3
    return lift(model, candidates=CANDIDATES)


def annotated(lifted: Lifted, method: str) -> None:
    ids = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(1))
    runs = [scheme for scheme in CANDIDATES if not scheme.is_dropped]
    stats = observe(lifted, ids, schemes=runs, gradients=True, quiet=True, min_tokens=0)
    steps = f"annotate-routing,annotate-sensitivity{{method={method}}},annotate-cost"
    run_passes(lifted.module, parse_passes(steps), Environment(stats))


@pytest.mark.parametrize("method", ["squared", "mxmoe", "fisher"])
def test_the_loss_of_dropping_is_in_the_unit_of_the_others(lifted: Lifted, method: str) -> None:
    annotated(lifted, method)
    for moe in moe_ops(lifted.module):
        for name, bank in banks(moe).items():
            tables = {role: op.sensitivity.array for role, op in bank.linears.items() if op.sensitivity is not None}
            gone = {role: table[:, 1] for role, table in tables.items()}
            up_for_it = np.isfinite(gone["down"])
            assert up_for_it.sum() == (EXPERTS // 2 if name == "routed" else 0)
            assert all(np.array_equal(np.isfinite(column), up_for_it) for column in gone.values())
            assert (gone["up"][up_for_it] == 0).all()
            # nothing at all is worse than two bits of everything in a sound expert, and eight bits are better
            assert (tables["down"][up_for_it, 1] > tables["down"][up_for_it, 2]).all()
            assert all(op.cost is not None and (op.cost.array[:, 1] == 0).all() for op in bank.linears.values())
    first = banks(moe_ops(lifted.module)[0])["routed"].linears["down"].sensitivity
    assert first is not None
    assert first.array[:, 1].argmin() == 3


def test_one_solve_drops_the_expert_that_says_nothing_first(lifted: Lifted) -> None:
    annotated(lifted, "squared")
    run_passes(lifted.module, parse_passes("allocate-bits{weight-bits=8.0 r=1}"), Environment())
    plan = plan_of(lifted.module)
    assert 3 in plan.dropped[moe_ops(lifted.module)[0].block, "routed"]
    assert plan.allocation is not None
    assert plan.allocation.weight_bits <= 8.0
    assert plan.allocation.objective["granularity"] == "expert"


def test_a_method_that_does_not_say_is_refused(lifted: Lifted) -> None:
    with pytest.raises(BadOption, match="squared, mxmoe and fisher do"):
        annotated(lifted, "pmq")
