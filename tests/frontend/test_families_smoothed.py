"""Real families whose blocks are wired in unusual ways: what can be folded is, and the model computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mxmoe.frontend import lift
from mxmoe.transform import smooth
from mxmoe.transform.edges import find_edges

from .zoo import Family, families, tiny_model

WIRED = {
    "Cohere2MoeExperts": ("input_layernorm", {"q_proj", "k_proj", "v_proj", "gate"}, ""),  # attention reads it too
    "Gemma4TextExperts": ("pre_feedforward_layernorm_2", set[str](), ""),  # the router has a norm of its own
    "GptOssExperts": ("post_attention_layernorm", {"router"}, "not linear in up"),
    "GraniteMoeHybridExperts": ("post_attention_layernorm", {"router"}, ""),
    "NemotronHExperts": ("norm", {"gate"}, "not linear in up"),  # without a gate
    "PhimoeExperts": ("post_attention_layernorm", {"router"}, ""),  # a norm with a bias
    "Qwen3NextExperts": ("post_attention_layernorm", {"gate", "shared_expert_gate"}, ""),  # stores gain - 1
}
"""Experts -> their norm, what reads it beside them, and why down is left."""

LEFT = {
    "Ernie4_5_VLMoeMoeExperts": "something else reads",  # experts of text and of pictures behind one norm
    "FlexOlmoExperts": "no norm makes its input",  # the norm is behind the block
    "MiniMaxExperts": "something else reads",  # the residual starts behind the norm
}
"""Experts -> why the input of their last block cannot be folded."""


def family(experts: str) -> Family:
    return next(one for one in families() if one.experts == experts)


def output_of(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False)[0]


@pytest.mark.parametrize("experts", WIRED)
def test_what_reads_the_input_is_found_and_the_model_computes_the_same(experts: str) -> None:
    norm, readers, left = WIRED[experts]
    model = tiny_model(family(experts))
    edge = find_edges(lift(model))[-1]
    assert edge.gain is not None, edge.problem
    assert edge.gain.path.endswith(f".{norm}")
    assert {path.rpartition(".")[2] for path in edge.readers or {}} == readers
    before = output_of(model)
    report = smooth(model, torch.arange(64).reshape(4, 16), exact=True, quiet=True)
    assert (output_of(model) - before).norm() < 1e-5 * before.norm()
    assert any(one.role == "gate_up" and one.high > 1 for one in report.folded)
    reasons = [one.reason for one in report.skipped if one.role == "down"]
    assert bool(reasons) == bool(left)
    assert all(reason.endswith(left) for reason in reasons)


@pytest.mark.parametrize("experts", LEFT)
def test_what_cannot_be_folded_is_left_with_a_reason_and_unchanged(experts: str) -> None:
    model = tiny_model(family(experts))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edge = find_edges(lift(model))[-1]
    assert edge.gain is None
    assert edge.problem.startswith(LEFT[experts])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
