"""Granularity is a partition of the rows, and coarser ones contain finer ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxmoe.errors import UnknownName
from mxmoe.solver import GRANULARITIES, tie
from mxmoe.solver.tie import Key

KEYS = st.tuples(
    st.sampled_from(["a", "b"]),
    st.sampled_from(["routed", "shared"]),
    st.sampled_from(["gate", "up", "down"]),
    st.integers(0, 3),
)
FINER = [("linear", "expert"), ("expert", "layer"), ("linear", "role"), ("role", "layer"), ("layer", "model")]


def _same(groups: np.ndarray) -> np.ndarray:
    return groups[:, None] == groups[None, :]


def test_one_expert_with_three_roles() -> None:
    keys = [("b", "routed", role, 0) for role in ("gate", "up", "down")]
    assert tie(keys).tolist() == [0, 0, 1]
    assert tie(keys, gate_up=False).tolist() == [0, 1, 2]
    assert tie(keys, "expert").tolist() == [0, 0, 0]
    assert tie(keys, "role").tolist() == [0, 0, 1]
    assert tie([("b", "routed", "up", 0), ("b", "routed", "down", 0)]).tolist() == [0, 1]
    assert tie([]).dtype == np.int64


def test_numbers_of_groups_of_a_model() -> None:
    keys = list(itertools.product(["a", "b"], ["routed"], ["gate", "up", "down"], range(5)))
    keys += [(block, "shared", role, 0) for block in ("a", "b") for role in ("gate", "up", "down")]
    counts = {name: len(set(tie(keys, name).tolist())) for name in GRANULARITIES}
    assert counts == {"model": 1, "layer": 2, "role": 4, "expert": 12, "linear": 24}
    assert len(set(tie(keys, gate_up=False).tolist())) == len(keys)
    assert len(set(tie(keys, "role", gate_up=False).tolist())) == 6


@given(st.lists(KEYS, min_size=1, unique=True), st.sampled_from(FINER), st.booleans())
def test_coarser_ties_contain_finer_ones(keys: list[Key], pair: tuple[str, str], gate_up: bool) -> None:
    finer, coarser = (_same(tie(keys, name, gate_up=gate_up)) for name in pair)
    assert (coarser | ~finer).all()


@given(st.lists(KEYS, min_size=1, unique=True))
def test_the_gate_up_tie_ties_only_gate_and_up_of_one_expert(keys: list[Key]) -> None:
    same = _same(tie(keys))
    for (i, a), (j, b) in itertools.combinations(enumerate(keys), 2):
        partners = (a[0], a[1], a[3]) == (b[0], b[1], b[3]) and {a[2], b[2]} == {"gate", "up"}
        assert same[i, j] == partners


@given(st.lists(KEYS, min_size=1), st.sampled_from(sorted(GRANULARITIES)))
def test_groups_are_numbered_by_first_appearance(keys: list[Key], name: str) -> None:
    groups = tie(keys, name)
    first = list(dict.fromkeys(groups.tolist()))
    assert first == list(range(len(first)))


def test_unknown_granularity_answers_with_near_names() -> None:
    with pytest.raises(UnknownName, match="did you mean layer"):
        tie([], "layers")
