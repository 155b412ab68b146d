"""Layouts and their inverses: the same bytes in another order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.numba import layout
from mxmoe.backends.numba.kernels import INTEGER, PANEL
from mxmoe.backends.numba.layout import Arena, ArenaBuilder, family_of, from_panels, read_back, to_panels
from mxmoe.ir import Scheme
from mxmoe.quant import Packed, pack, quantize
from mxmoe.testing import SCHEMES, schemes


def test_panels_by_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "PANEL", 2)
    assert to_panels(np.array([[1, 2], [3, 4], [5, 6]])).tolist() == [1, 3, 2, 4, 5, 6]


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 200), width=st.integers(1, 9))
def test_panels_have_an_inverse(n: int, width: int) -> None:
    rows = np.arange(n * width).reshape(n, width)
    flat = to_panels(rows)
    assert sorted(flat.tolist()) == list(range(n * width))
    assert (from_panels(flat, n) == rows).all()
    whole = n // PANEL * PANEL
    if whole:
        assert flat[:PANEL].tolist() == rows[:PANEL, 0].tolist()


def _filled(chosen: list[Scheme], n: int, k: int, bias: np.ndarray | None = None) -> tuple[Arena, list[Packed]]:
    """Two weights of len(chosen) experts each, put in an order that is not that of memory."""
    builder = ArenaBuilder(n, k, chosen, 2, bias)
    generator = torch.Generator().manual_seed(n * k)
    packed = [pack(quantize(torch.randn((n, k), generator=generator), scheme)) for scheme in (*chosen, *chosen)]
    for index in reversed(range(len(packed))):
        builder.put(index // len(chosen), index % len(chosen), packed[index])
    return builder.build(), packed


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.lists(st.sampled_from(SCHEMES) | schemes(), min_size=1, max_size=5),
    n=st.integers(1, 140),
    k=st.integers(1, 70),
)
def test_what_is_put_can_be_read_back(chosen: list[Scheme], n: int, k: int) -> None:
    arena, packed = _filled(chosen, n, k)
    for index, put in enumerate(packed):
        got = read_back(arena, index)
        assert got.scheme == put.scheme
        assert (got.n, got.k) == (n, k)
        assert torch.equal(got.payload, put.payload)
        for a, b in ((got.scale, put.scale), (got.zero, put.zero), (got.multipliers, put.multipliers)):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_arena_is_as_large_as_its_packed_matrices(scheme: Scheme) -> None:
    arena, packed = _filled([scheme, scheme], 48, 128)
    assert arena.nbytes == sum(p.nbytes for p in packed)
    held = arena.payload.nbytes + arena.meta.nbytes + arena.bias.nbytes
    assert 0 <= held - arena.nbytes <= 10 + 3 * len(packed)


def test_biases_are_held_and_counted() -> None:
    bias = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    arena, packed = _filled([Scheme.parse("w8a8_sym")] * 3, 5, 8, bias)
    assert arena.bias.tolist() == list(range(30))
    assert arena.nbytes == sum(p.nbytes for p in packed) + 120


def test_family_follows_the_activations() -> None:
    assert family_of(Scheme.parse("w4a8_g128_sym")) == INTEGER
    assert family_of(Scheme.parse("w4a8_g128_sym_e4m3")) == family_of(Scheme.parse("w4a16_sym"))
    kinds = {family_of(Scheme.parse(name)) for name in ("w8a8_sym", "w8a8_e4m3", "bf16", "fp16", "w2a16_sym")}
    assert len(kinds) == 5
