"""Weights that are rotated on their way to the quantizer, and Hessians with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxmoe.errors import PackedOnly
from mxmoe.ir import Scheme, rotation_blocks
from mxmoe.quant import PackedWeights, Quantized, Weights, pack, quantize, rotate

UP, DOWN = "moe.routed.up", "moe.routed.down"
SCHEME = Scheme.parse("w4a16_g8_asym")


def tensors(k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn((3, 8, k), generator=generator).to(dtype) for name in (UP, DOWN)}


def same(one: Quantized, other: Quantized) -> bool:
    pairs = ((one.codes, other.codes), (one.scale, other.scale), (one.zero, other.zero))
    return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)


@given(st.sampled_from([16, 24, 44]), st.integers(0, 99), st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_quantized_is_the_rotated_weight(k: int, seed: int, data: st.DataObject) -> None:
    block = data.draw(st.sampled_from(rotation_blocks(k)))
    dense = tensors(k, seed, data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    weights = Weights(dense).rotated({DOWN: block})
    assert torch.equal(weights[DOWN], rotate(dense[DOWN], block))
    assert torch.equal(weights[UP], dense[UP])
    for expert in range(3):
        assert same(weights.quantized(DOWN, expert, SCHEME), quantize(rotate(dense[DOWN][expert], block), SCHEME))
        assert same(weights.quantized(UP, expert, SCHEME), quantize(dense[UP][expert], SCHEME))


def test_hessians_are_rotated_from_both_sides() -> None:
    x = torch.randn((50, 16), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor | None] = []

    def spy(weight: Tensor, scheme: Scheme, *, name: str = "", hessian: Tensor | None = None) -> Quantized:
        seen.append(hessian)
        return quantize(weight, scheme, name=name)

    weights = Weights(tensors(16)).rotated({DOWN: 8}).using(spy, lambda name, expert: x.T @ x)
    weights.quantized(DOWN, 0, SCHEME)
    weights.quantized(UP, 0, SCHEME)
    turned = rotate(x, 8)
    torch.testing.assert_close(seen[0], turned.T @ turned, rtol=0, atol=1e-10)
    torch.testing.assert_close(seen[1], x.T @ x, rtol=0, atol=0)


def test_a_later_call_takes_the_place_of_an_earlier_one() -> None:
    dense = tensors(16)
    weights = Weights(dense).rotated({DOWN: 8})
    assert torch.equal(weights.rotated({DOWN: 8})[DOWN], weights[DOWN])
    assert torch.equal(weights.rotated({})[DOWN], dense[DOWN])
    assert torch.equal(weights.using("rtn")[DOWN], weights[DOWN])


def test_loaders_are_asked_when_needed_and_not_before() -> None:
    asked: list[str] = []

    def load() -> Tensor:
        asked.append(DOWN)
        return tensors(16)[DOWN]

    weights = Weights({DOWN: load}).rotated({DOWN: 16})
    assert not asked
    for expert in range(3):
        weights.quantized(DOWN, expert, SCHEME)
    assert asked == [DOWN]


def test_packed_weights_stay_as_they_are() -> None:
    held = PackedWeights({DOWN: [pack(quantize(weight, SCHEME)) for weight in tensors(16)[DOWN]]})
    with pytest.raises(PackedOnly):
        held.rotated({DOWN: 8})
