"""Checked calls, and assignments in the order of experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.routing import check_call, sort_assignments
from mxmoe.errors import BadHidden, BadRouting
from mxmoe.testing import Routed, routings


def test_example() -> None:
    r = sort_assignments(torch.tensor([[2, 0], [2, 3]]), torch.tensor([[0.5, 0.25], [1.0, 9.0]]), 3)
    assert r.token.tolist() == [0, 0, 1]
    assert r.slot.tolist() == [1, 0, 0]
    assert r.expert.tolist() == [0, 2, 2]
    assert r.counts.tolist() == [1, 0, 2]
    assert r.weight.tolist() == [0.25, 0.5, 1.0]


@st.composite
def _routed(draw: st.DrawFn) -> tuple[int, Routed]:
    experts = draw(st.integers(1, 9))
    return experts, draw(routings(experts, draw(st.integers(1, experts))))


@settings(max_examples=100, deadline=None)
@given(drawn=_routed())
def test_every_assignment_once_in_order_and_no_padding(drawn: tuple[int, Routed]) -> None:
    experts, routed = drawn
    r = sort_assignments(routed.index, routed.weights, experts)
    pairs = list(zip(r.token.tolist(), r.slot.tolist(), strict=True))
    wanted = [(t, j) for t, row in enumerate(routed.index.tolist()) for j, e in enumerate(row) if e < experts]
    assert sorted(pairs) == wanted
    assert torch.equal(routed.index[r.token, r.slot], r.expert)
    assert torch.equal(routed.weights[r.token, r.slot], r.weight)
    assert list(zip(r.expert.tolist(), pairs, strict=True)) == sorted(zip(r.expert.tolist(), pairs, strict=True))
    assert r.counts.tolist() == [r.expert.tolist().count(e) for e in range(experts)]


_HIDDEN = torch.zeros(2, 8)
_INDEX = torch.tensor([[0, 1], [2, 3]])
_WEIGHTS = torch.ones(2, 2)


def test_a_good_call_passes() -> None:
    check_call("mlp", 8, 3, _HIDDEN, _INDEX, _WEIGHTS)
    check_call("mlp", 8, 3, _HIDDEN[:0], _INDEX[:0], _WEIGHTS[:0])
    check_call("mlp", 8, 3, _HIDDEN.bfloat16(), _INDEX.int(), _WEIGHTS.bfloat16())


@pytest.mark.parametrize("hidden", [torch.zeros(2, 9), torch.zeros(2, 1, 8), torch.zeros(2, 8, dtype=torch.int64)])
def test_bad_hidden(hidden: torch.Tensor) -> None:
    with pytest.raises(BadHidden, match=r"mlp: hidden states are torch\..*must be \[tokens, 8\]"):
        check_call("mlp", 8, 3, hidden, _INDEX, _WEIGHTS)


@pytest.mark.parametrize(
    ("index", "weights", "message"),
    [
        (_INDEX[:1], _WEIGHTS[:1], r"top_k_index is torch.int64 \[1, 2\], it must be int64 \[2, top_k\]"),
        (_INDEX.float(), _WEIGHTS, r"top_k_index is torch.float32"),
        (_INDEX.flatten(), _WEIGHTS, r"top_k_index is torch.int64 \[4\]"),
        (_INDEX, _WEIGHTS[:, :1], r"top_k_weights is torch.float32 \[2, 1\]"),
        (_INDEX, _INDEX, r"top_k_weights is torch.int64"),
        (_INDEX + 1, _WEIGHTS, r"from 1 to 4, it must be within 0 to 3, where 3 is padding"),
        (_INDEX - 1, _WEIGHTS, r"from -1 to 2"),
    ],
)
def test_bad_routing(index: torch.Tensor, weights: torch.Tensor, message: str) -> None:
    with pytest.raises(BadRouting, match=message):
        check_call("mlp", 8, 3, _HIDDEN, index, weights)
