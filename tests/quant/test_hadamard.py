"""Matrices are exact, rotations are orthogonal, and the fast one is the dense one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import BadActivation, BadRotation
from mxmoe.ir import hadamard_base, rotation_blocks
from mxmoe.quant import hadamard, random_signs, rotate

SMALL = [n for n in range(1, 301) if hadamard_base(n)]
BASES = [44, 684, 100, 180, 36, 28, 20, 12, 52]
"""Those behind the widths of models, and one over a field of 25 elements."""


@pytest.mark.parametrize("n", [*SMALL, *BASES, 1408])
def test_a_matrix_is_exact(n: int) -> None:
    h = hadamard(n)
    assert h.dtype == torch.int8
    assert set(h.unique().tolist()) <= {-1, 1}
    # integers below 2^24 are exact in float32, and its product is much quicker than that of integers
    assert torch.equal(h.float() @ h.float().T, n * torch.eye(n))


@pytest.mark.parametrize("n", [2560, 2816, 2880, 5632, 6400, 10944, 14336, 768, 1536, 6144, 18432])
def test_widths_of_models_are_rotated_and_back(n: int) -> None:
    x = torch.randn((2, n), dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    y = rotate(x)
    torch.testing.assert_close(rotate(y, inverse=True), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y.square().sum(-1), x.square().sum(-1), rtol=1e-12, atol=0)
    spike = torch.zeros((1, n), dtype=torch.float64)
    spike[0, n // 3] = 1.0
    torch.testing.assert_close(rotate(spike).abs(), torch.full((1, n), n**-0.5, dtype=torch.float64))


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int | None, int]:
    width = draw(
        st.sampled_from([n for n in range(1, 400) if hadamard_base(n)]) | st.integers(2, 60).map(lambda i: 4 * i)
    )
    blocks = [*rotation_blocks(width), *([None] if hadamard_base(width) else [])]
    return width, draw(st.sampled_from(blocks)), draw(st.integers(0, 2**16))


@given(cases(), st.booleans(), st.sampled_from([(), (3,), (2, 5), (0,)]))
@settings(max_examples=60, deadline=None)
def test_fast_is_dense(case: tuple[int, int | None, int], has_signs: bool, lead: tuple[int, ...]) -> None:
    width, block, seed = case
    size = block or width
    x = torch.randn((*lead, width), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    signs = random_signs(width, seed) if has_signs else None
    dense = torch.block_diag(*[hadamard(size).double() / size**0.5] * (width // size))
    dense = dense if signs is None else signs[:, None] * dense
    found = rotate(x, block, signs=signs)
    torch.testing.assert_close(found, x @ dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate(x, block, signs=signs, inverse=True), x @ dense.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate(found, block, signs=signs, inverse=True), x, rtol=0, atol=1e-12)
    single = rotate(x.float(), block, signs=signs)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=0, atol=1e-5)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_products_stay(case: tuple[int, int | None, int]) -> None:
    width, block, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn((4, width), dtype=torch.float64, generator=generator) for _ in range(2))
    torch.testing.assert_close(rotate(x, block) @ rotate(w, block).T, x @ w.T, rtol=0, atol=1e-11)


def test_a_row_does_not_depend_on_the_others() -> None:
    x = torch.randn((64, 256), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(x, 128)[7:8], rotate(x[7:8], 128))
    x[3, 5] = float("nan")
    found = rotate(x, 128)
    assert found[3, :128].isnan().all()
    assert found[:3].isfinite().all()
    assert found[3, 128:].isfinite().all()


def test_examples() -> None:
    assert rotate(torch.tensor([3.0, 1.0])).tolist() == pytest.approx([2.828427, 1.414214])
    assert hadamard(2).tolist() == [[1, 1], [1, -1]]
    assert rotate(torch.tensor([5.0])).tolist() == [5.0]
    largest = torch.full((1, 128), 3e38)
    assert rotate(largest * torch.where(torch.arange(128) == 0, 1, 1e-30)).isfinite().all()
    assert rotate(torch.ones((2, 4), dtype=torch.bfloat16)).dtype == torch.float32


def test_an_outlier_is_spread() -> None:
    x = torch.randn((256, 1408), generator=torch.Generator().manual_seed(0))
    x[:, 100] *= 100
    before = (x.abs().amax(-1) / x.square().mean(-1).sqrt()).median()
    after = (rotate(x).abs().amax(-1) / rotate(x).square().mean(-1).sqrt()).median()
    assert after < before / 5


def test_signs_are_those_of_the_seed() -> None:
    assert torch.equal(random_signs(99, 3), random_signs(99, 3))
    assert not torch.equal(random_signs(99, 3), random_signs(99, 4))
    assert set(random_signs(99).tolist()) == {-1.0, 1.0}


def test_what_cannot_be_rotated() -> None:
    with pytest.raises(BadRotation, match=r"92 channels .* in blocks of 92: no Hadamard matrix .* blocks of 2, 4 work"):
        rotate(torch.ones(3, 92))
    with pytest.raises(BadRotation, match=r"1408 channels .* in blocks of 256: it must divide"):
        rotate(torch.ones(3, 1408), 256)
    with pytest.raises(BadRotation, match="172"):
        hadamard(172)
    with pytest.raises(BadActivation):
        rotate(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(BadActivation):
        rotate(torch.ones(3, 0))
