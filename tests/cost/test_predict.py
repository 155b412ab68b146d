"""Separable costs, launches and blocks, over every model and device."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.cost import (
    CostModel,
    Gemm,
    Measured,
    Roofline,
    best_tile,
    expected_rows,
    linear_cost_us,
    predict_block_us,
    predict_launch,
)
from mxmoe.device import DEVICES
from mxmoe.errors import BadWorkload
from mxmoe.ir import Scheme, Tile

NAMES = [
    *("bf16", "fp16", "w8a8_sym", "w8a8_e4m3", "w4a8_sym", "w4a8_g128_sym", "w4a8_g128_sym_e4m3", "w4a4_sym"),
    *("w4a4_g128_sym", "w6a6_sym", "w8a16_asym", "w4a16_sym", "w4a16_g128_asym", "w4a16_g128_asym_fp16"),
    *("w4a16_g32_sym", "w3a16_g128_asym", "w2a16_asym", "w2a16_g64_asym", "w1a16_g128_asym"),
]
SCHEMES = [Scheme.parse(name) for name in NAMES]
MODELS: list[CostModel] = [*(Roofline(row) for row in DEVICES.values()), Measured(DEVICES["rtx4090"])]
MODEL = st.sampled_from(MODELS)
FREQUENCY = st.lists(st.floats(0, 1), min_size=1, max_size=6)
RTX4090 = (Roofline(DEVICES["rtx4090"]), Measured(DEVICES["rtx4090"]))


@settings(max_examples=50, deadline=None)
@given(MODEL, FREQUENCY, st.integers(1, 9000), st.integers(1, 5000), st.integers(1, 5000))
def test_cost_is_positive_or_impossible(model: CostModel, frequency: list[float], tokens: int, n: int, k: int) -> None:
    cost = linear_cost_us(model, SCHEMES, n=n, k=k, frequency=frequency, tokens=tokens)
    assert cost.shape == (len(frequency), len(SCHEMES))
    runs = np.array([model.device.runs(scheme) for scheme in SCHEMES])
    assert not np.isnan(cost).any()
    assert (np.isinf(cost) == ~runs).all()
    assert (cost[np.array(frequency) > 1e-12][:, runs] > 0).all()
    assert (cost[np.array(frequency) == 0][:, runs] == 0).all()


@settings(max_examples=50, deadline=None)
@given(MODEL, FREQUENCY, st.integers(1, 5000), st.integers(1, 5000))
def test_cost_grows_with_tokens_and_frequency(model: CostModel, frequency: list[float], tokens: int, more: int) -> None:
    def cost(frequency: list[float], tokens: int) -> np.ndarray:
        return linear_cost_us(model, SCHEMES, n=512, k=256, frequency=frequency, tokens=tokens)

    here = cost(frequency, tokens)
    assert (here <= cost(frequency, tokens + more) * (1 + 1e-9)).all()
    assert (here <= cost([min(1.0, f * 1.25) for f in frequency], tokens) * (1 + 1e-9)).all()


def test_several_token_counts_are_weighted_together() -> None:
    def cost(tokens: object) -> np.ndarray:
        return linear_cost_us(RTX4090[1], SCHEMES, n=2816, k=2048, frequency=[0.1, 0.02], tokens=tokens)  # type: ignore[arg-type]

    both = cost(((1, 3.0), (2048, 1.0)))
    np.testing.assert_allclose(both, 0.75 * cost(1) + 0.25 * cost(2048), rtol=1e-12)
    np.testing.assert_allclose(cost(((64, 5.0),)), cost(64), rtol=1e-12)


def test_decoding_pays_for_top_k_experts_and_not_for_all() -> None:
    scheme = [Scheme.parse("w4a16_g128_asym")]
    model = RTX4090[1]
    cost = linear_cost_us(model, scheme, n=2816, k=2048, frequency=np.full(60, 4 / 60), tokens=1)
    one = best_tile(model, scheme[0], n=2816, k=2048, rows=1)[1]
    assert cost.sum() == pytest.approx(4 * one)


@pytest.mark.parametrize("model", RTX4090, ids=lambda m: m.name)
def test_weight_only_wins_below_the_published_crossover(model: CostModel) -> None:
    # MxMoE publishes 83 tokens per expert on an RTX 4090; tiles come in steps of 16 to 64 rows, hence the band
    w4a16, w8a8 = Scheme.parse("w4a16_asym"), Scheme.parse("w8a8_sym")

    def faster(rows: int) -> bool:
        us = [best_tile(model, scheme, n=2816, k=2048, rows=rows)[1] for scheme in (w4a16, w8a8)]
        return us[0] < us[1]

    crossover = next(rows for rows in range(1, 1000) if not faster(rows))
    assert 83 * 0.75 <= crossover <= 83 * 1.25
    assert not any(faster(rows) for rows in range(crossover, 4 * crossover))


@settings(max_examples=50, deadline=None)
@given(MODEL, st.sampled_from(SCHEMES), st.integers(1, 4000), st.integers(1, 3000))
def test_best_tile_is_best(model: CostModel, scheme: Scheme, n: int, rows: int) -> None:
    tile, us = best_tile(model, scheme, n=n, k=512, rows=rows)
    if not model.device.runs(scheme):
        assert (tile, us) == (None, math.inf)
        return
    for other in model.tiles(scheme):
        count = math.ceil(rows / other.m) * math.ceil(n / other.n)
        assert us <= count * model.tile_us(scheme, other, 512, rows) / model.device.sms + 1e-8


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 5000))
def test_expected_rows_are_whole_and_keep_the_sum(frequency: list[float], tokens: int) -> None:
    rows = np.array(expected_rows(frequency, tokens))
    share = np.array(frequency) * tokens
    assert rows.sum() == round(share.sum())
    assert (np.abs(rows - share) <= 1 + 1e-9).all()


def test_expected_rows_example() -> None:
    assert expected_rows([0.5, 1.0, 0.5], 3) == (2, 3, 1)


def test_a_launch_has_the_tail_wave() -> None:
    model, scheme = RTX4090[1], Scheme.parse("w8a8_sym")
    tile = Tile(128, 128, 128)
    # 129 tiles on 128 SMs: two waves, although the separable cost is 129/128 of one
    gemm = Gemm(128 * 129, 2048, (128,), (scheme,), (tile,))
    launch = predict_launch(model, [gemm])
    assert launch.waves == 129 / 128
    assert launch.makespan_us == pytest.approx(2 * 41.4)
    assert launch.tail_us == pytest.approx(41.4 * (2 - 129 / 128))
    assert predict_block_us(model, [[gemm], [gemm]]) == pytest.approx(4 * 41.4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(SCHEMES)), min_size=1, max_size=8), MODEL)
def test_a_launch_is_at_least_its_separable_cost(experts: list[tuple[int, Scheme]], model: CostModel) -> None:
    rows, schemes = zip(*experts, strict=True)
    launch = predict_launch(model, [Gemm(384, 512, rows, schemes)])
    separable = sum(best_tile(model, s, n=384, k=512, rows=r)[1] for r, s in experts if r)
    assert launch.makespan_us >= separable * (1 - 1e-6)
    assert math.isinf(launch.makespan_us) == any(r and not model.device.runs(s) for r, s in experts)


def test_an_empty_launch_takes_no_time() -> None:
    assert predict_launch(RTX4090[0], [Gemm(8, 8, (0, 0), (SCHEMES[0], SCHEMES[1]))]).makespan_us == 0
    assert predict_block_us(RTX4090[0], [[], []]) == 0


@pytest.mark.parametrize("frequency", [[], [math.nan], [-0.1], [[0.1]]])
def test_bad_frequencies_are_refused(frequency: list[float]) -> None:
    with pytest.raises(BadWorkload):
        linear_cost_us(RTX4090[0], SCHEMES, n=8, k=8, frequency=frequency, tokens=1)


@pytest.mark.parametrize("tokens", [0, (), ((0, 1.0),), ((1, -1.0),), ((1, 0.0),), ((1, math.nan),), ((1, math.inf),)])
def test_bad_token_counts_are_refused(tokens: object) -> None:
    with pytest.raises(BadWorkload):
        linear_cost_us(RTX4090[0], SCHEMES, n=8, k=8, frequency=[0.1], tokens=tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0},
        {"k": 0},
        {"rows": (1,)},
        {"rows": (1, -1)},
        {"tiles": (Tile(16, 16, 16),)},
    ],
)
def test_bad_gemms_are_refused(fields: dict[str, object]) -> None:
    good: dict[str, object] = {"n": 8, "k": 8, "rows": (1, 2), "schemes": (SCHEMES[0], SCHEMES[0])}
    Gemm(**good)  # type: ignore[arg-type]
    with pytest.raises(BadWorkload):
        Gemm(**(good | fields))  # type: ignore[arg-type]
