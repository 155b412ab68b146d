"""Predictions for the RTX 4090: the workload, the mixes, and that the page says what is whose."""

from __future__ import annotations

import pytest
from predict_rtx4090 import (
    BLOCKS,
    UNIFORM,
    W4A4,
    W4A8,
    W4A16,
    W8A8,
    Block,
    _only,
    block_us,
    markdown,
    mix_for_accuracy,
    mix_for_time,
    predict,
)

from mxmoe.cost import cost_model
from mxmoe.ir import Scheme

MODEL = cost_model("roofline", "rtx4090")
SMALL = Block("small", 256, 128, 8, 2, 512, {(64, W8A8): 1.0})


def bits(block: Block, schemes: tuple[str, ...]) -> float:
    held = [block.weights(lane) for lane in range(block.lanes)]
    return sum(Scheme.parse(one).weight_bits * n for one, n in zip(schemes, held, strict=True)) / sum(held)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
@pytest.mark.parametrize("tokens", [512, 8192])
def test_every_row_is_somewhere(block: Block, tokens: int) -> None:
    rows = block.rows(tokens)
    assert len(rows) == block.lanes
    assert sum(rows[: block.experts]) == tokens * block.top_k
    assert rows[block.experts :] == ((tokens,) if block.shared else ())
    assert max(rows[: block.experts]) / min(rows[: block.experts]) == pytest.approx(2.6, rel=0.15)


def test_operations_are_counted_as_published() -> None:
    """451, 361, 71 and 71 GFLOP a layer at 512 tokens, the biggest model first."""
    found = sorted((block.operations(512) / 1e9 for block in BLOCKS), reverse=True)
    assert found == pytest.approx([451, 361, 71, 71], rel=0.01)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_mixes_have_the_bits_that_they_are_named_after(block: Block) -> None:
    assert 4.0 <= bits(block, mix_for_time(MODEL, block, 512, 1 / 16)) <= 4.25
    for low in (W4A4, W4A8):
        assert bits(block, mix_for_accuracy(block, low, low)) == pytest.approx(5, abs=0.05)
    if block.shared:
        assert mix_for_accuracy(block, W4A4, W8A8)[-1] == W8A8
        assert bits(block, mix_for_accuracy(block, W4A4, W8A8)) == pytest.approx(5, abs=0.05)


def test_eight_bits_go_where_they_save_time() -> None:
    """With 8192 tokens int8 is faster for every expert: the room is used up. With 8 none has rows enough."""
    many = mix_for_time(MODEL, BLOCKS[1], 8192, 1 / 16)
    assert many.count(W8A8) in range(1, 5)
    assert set(mix_for_time(MODEL, BLOCKS[1], 8, 1 / 16)) == {W4A16}


def test_int4_experts_have_a_launch_of_their_own() -> None:
    schemes = (W4A4, W8A8) * 4 + (W4A4,)
    entry, _ = SMALL.products(64, schemes)
    int4, others = _only(entry, True), _only(entry, False)
    assert [len(gemm.rows) for gemm in int4] == [4, 1]
    assert [len(gemm.rows) for gemm in others] == [4]
    apart = block_us(MODEL, SMALL, 64, schemes)
    assert apart > max(block_us(MODEL, SMALL, 64, (one,) * 9) for one in (W4A4, W8A8)) / 2


def test_the_page_tells_predicted_from_published() -> None:
    lines = predict(MODEL, SMALL, 64)
    assert {line["plan"] for line in lines} >= set(UNIFORM)
    known = [line for line in lines if line["published_tflops"] is not None]
    assert [line["plan"] for line in known] == [W8A8]
    assert known[0]["predicted_over_published"] == pytest.approx(known[0]["predicted_tflops"], abs=0.01)
    page = markdown(lines)
    assert "predictions" in page
    assert "Nothing of ours ran on such a card" in page
    assert "| predicted us | predicted TFLOPS | published TFLOPS |" in page
