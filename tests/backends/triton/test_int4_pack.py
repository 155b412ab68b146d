"""How the INT4 launch's numbers are packed: what goes in comes out; rows are quantized as defined."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# before anything of ours, which would have kernels interpreted where there is no GPU: other files compile
pytest.importorskip("triton")

from triton import knobs

from mxmoe.backends.triton.int4_pack import (
    pack_channels,
    pack_int4,
    pack_int4_pair,
    pack_rows,
    pack_rows_torch,
    pair,
    quantize_rows,
    quantize_rows_torch,
    runs_on_int4,
    unpack_channels,
    unpack_int4,
    unpack_rows,
    unpair,
)
from mxmoe.errors import BadInt4
from mxmoe.ir import Scheme
from mxmoe.quant import quantize_activation

from .child import run_in_child
from .int4_cases import CHANNEL, GROUPED, weight

BOTH = pytest.mark.parametrize("scheme", [GROUPED, CHANNEL], ids=str)
EVERY = settings(max_examples=30, deadline=None)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(
    not (knobs.runtime.interpret or torch.cuda.is_available()), reason="run by test_kernels_in_the_interpreter"
)


@BOTH
@EVERY
@given(n=st.integers(1, 40), k=st.integers(1, 300), experts=st.integers(1, 3))
def test_weights_come_back(scheme: Scheme, n: int, k: int, experts: int) -> None:
    given_ = [weight(n, k, scheme, seed) for seed in range(experts)]
    packed = pack_int4(given_)
    assert packed.words.shape == (experts, -(-n // 16), -(-k // 128), 2, 32, 4)
    for one, again in zip(given_, unpack_int4(packed), strict=True):
        assert one.scale is not None
        assert again.scale is not None
        assert torch.equal(one.codes, again.codes)
        assert torch.equal(one.scale, again.scale)


@EVERY
@given(rows=st.integers(0, 5), k=st.integers(1, 300), seed=st.integers(0, 9))
def test_rows_come_back(rows: int, k: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_rows(pack_rows_torch(codes), k), codes)


@EVERY
@given(n=st.integers(1, 50), sixteens=st.integers(1, 4))
def test_channels_come_back(n: int, sixteens: int) -> None:
    values = torch.randn((2, n))
    assert torch.equal(unpack_channels(pack_channels(values), n), values)
    gate, up = torch.randn((2, 3, 16 * sixteens))
    for one, again in zip((gate, up), unpair(pair(gate, up)), strict=True):
        assert torch.equal(one, again)


def test_a_step_of_a_lane_is_sixteen_bytes() -> None:
    """Lane 4 g + t reads words 4 t to 4 t + 3 of row g, which begin at channels 8 t, 32 + 8 t, 64 + 8 t, 96 + 8 t."""
    codes = torch.zeros((1, 128), dtype=torch.int8)
    codes[0, [16, 48, 80, 112]] = torch.tensor([1, 2, 3, 4], dtype=torch.int8)
    assert pack_rows_torch(codes)[0, 8:12].tolist() == [1, 2, 3, 4]


@runs_kernels
@BOTH
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 3), k=st.integers(1, 1300), seed=st.integers(0, 99))
def test_kernel_quantizes_as_defined(scheme: Scheme, rows: int, k: int, seed: int) -> None:
    x = torch.randn((rows, k), generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)
    words, scale = quantize_rows(x, scheme)
    wanted_words, wanted_scale = quantize_rows_torch(x, scheme)
    assert torch.equal(words, wanted_words)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(pack_rows(quantize_activation(x, scheme)[0]), wanted_words)


@runs_kernels
@BOTH
def test_kernel_lets_rows_that_are_no_numbers_spoil_themselves_only(scheme: Scheme) -> None:
    x = torch.randn((6, 256))
    x[0, 3], x[1, 200], x[2] = float("nan"), float("inf"), 0.0
    x[3, 0], x[4] = 3.4028234663852886e38, 1e-45
    x = x.to(DEVICE)
    words, scale = quantize_rows(x, scheme)
    wanted_words, wanted_scale = quantize_rows_torch(x, scheme)
    assert torch.equal(words, wanted_words)
    assert torch.equal(scale.isnan(), wanted_scale.isnan())
    assert torch.equal(scale.nan_to_num(), wanted_scale.nan_to_num())


@pytest.mark.skipif(knobs.runtime.interpret, reason="is run by itself")
def test_kernels_in_the_interpreter() -> None:
    """Triton decides when it is loaded whether it interprets, so this takes a process of its own."""
    assert run_in_child(__file__, "test_kernel_", TRITON_INTERPRET="1").count("PASSED") == 4


def test_schemes() -> None:
    runs = {name for name in ("w4a4_sym", "w4a4_g128_sym", "w4a4_g64_sym", "w4a4_g128_asym", "w4a8_sym", "w3a4_sym")
            if runs_on_int4(Scheme.parse(name))}  # fmt: skip
    assert runs == {"w4a4_sym", "w4a4_g128_sym"}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda: pack_int4([]), "no weight"),
        (lambda: pack_int4([weight(16, 128, Scheme.parse("w4a8_g128_sym"))]), "w4a8_g128_sym"),
        (lambda: pack_int4([weight(16, 128, GROUPED), weight(32, 128, GROUPED)]), "weights are"),
        (lambda: pack_int4_pair([weight(24, 128, GROUPED)], [weight(24, 128, GROUPED)]), "24 channels"),
        (lambda: pack_int4_pair([weight(16, 128, GROUPED)], [weight(16, 128, CHANNEL)]), "alike"),
        (lambda: quantize_rows(torch.zeros((1, 8)), Scheme.parse("w4a4_g64_sym")), "w4a4_g64_sym"),
    ],
)
def test_what_cannot_be_packed(wrong: Callable[[], object], reason: str) -> None:
    with pytest.raises(BadInt4, match=reason):
        wrong()
