"""The kernels against the definition of a linear, scheme by scheme; decoders against every word there is."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.numba import kernels
from mxmoe.backends.numba.executable import GroupGemm
from mxmoe.backends.numba.kernels import PANEL
from mxmoe.backends.numba.layout import ArenaBuilder
from mxmoe.backends.routing import sort_assignments
from mxmoe.ir import Scheme, Tile
from mxmoe.quant import Quantized, matmul, pack, quantize, tolerance
from mxmoe.testing import SCHEMES, schemes

# measured, like the schemes of the definition: float32 sums in another order
FLOAT32_ORDER = 1e-5


def _gemm(weights: Sequence[Quantized], tile: Tile, bias: torch.Tensor | None = None) -> GroupGemm:
    builder = ArenaBuilder(
        weights[0].n, weights[0].k, [q.scheme for q in weights], 1, None if bias is None else bias.numpy()
    )
    for expert, q in enumerate(weights):
        builder.put(0, expert, pack(q))
    arena = builder.build()
    arena.matrices[:, kernels.CHUNK] = tile.k
    return GroupGemm(arena, weights[0].n, (tile,) * len(weights), ("w",), () if bias is None else ("w.bias",))


def _error(chosen: Sequence[Scheme], n: int, k: int, tile: Tile, tokens: int = 9) -> tuple[float, bool]:
    """Error of a launch against the definition, and whether integer experts are equal to the bit."""
    generator = torch.Generator().manual_seed(n + k)
    weights = [quantize(torch.randn((n, k), generator=generator), scheme) for scheme in chosen]
    bias = torch.randn((1, len(chosen), n), generator=generator)
    x = torch.randn((tokens, k), generator=generator)
    index = torch.randint(0, len(chosen) + 1, (tokens, 2), generator=generator)
    routing = sort_assignments(index, torch.ones(tokens, 2), len(chosen))
    y = _gemm(weights, tile, bias)(x, routing.token, routing)[0]
    wanted, exact = torch.empty_like(y), True
    for row, (token, expert) in enumerate(zip(routing.token, routing.expert, strict=True)):
        wanted[row] = matmul(x[token], weights[expert]) + bias[0, expert]
        if chosen[expert].act_format == "int":
            exact &= torch.equal(wanted[row], y[row])
    return float((y - wanted).norm() / wanted.norm().clamp(min=1e-30)), exact


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_follows_the_definition(scheme: Scheme) -> None:
    assert tolerance(scheme) >= FLOAT32_ORDER
    for n, k in ((70, 203), (64, 256), (3, 7)):
        error, exact = _error([scheme] * 2, n, k, Tile(4, 64, 32))
        assert error < FLOAT32_ORDER, (n, k)
        assert exact, (n, k)


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.lists(schemes(), min_size=1, max_size=4),
    n=st.integers(1, 150),
    k=st.integers(1, 150),
    tile=st.builds(Tile, st.integers(1, 20), st.integers(1, 150), st.sampled_from((8, 32, 64))),
)
def test_any_mix_shape_and_tile(chosen: list[Scheme], n: int, k: int, tile: Tile) -> None:
    error, exact = _error(chosen, n, k, tile)
    assert error < FLOAT32_ORDER
    assert exact


@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a8_sym", "w8a8_e4m3"])
def test_rows_and_columns_of_a_tile_change_no_bit(scheme: str) -> None:
    q = quantize(torch.randn(130, 96), Scheme.parse(scheme))
    x = torch.randn(13, 96)
    routing = sort_assignments(torch.zeros(13, 1, dtype=torch.int64), torch.ones(13, 1), 1)
    tiles = (Tile(64, 128, 32), Tile(8, 64, 32), Tile(4, 7, 32))
    outs = [_gemm([q], tile)(x, routing.token, routing) for tile in tiles]
    # a lone row is summed in another order than four together: tiles of 4 rows, or all rows in one tile, are alike
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_extreme_integers_do_not_overflow() -> None:
    scheme, k = Scheme.parse("w8a8_asym"), 4096
    codes = torch.full((2, k), 255, dtype=torch.uint8)
    q = Quantized(scheme, codes, torch.ones(2, 1), torch.zeros(2, 1))
    routing = sort_assignments(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), 1)
    y = _gemm([q], Tile(8, 8, 8))(torch.full((1, k), 127.0), routing.token, routing)
    assert y.tolist() == [[[127.0 * 255 * k] * 2]]


def test_integer_scales_are_summed_over_a_whole_row_without_overflow() -> None:
    """131,072 channels of the largest magnitudes that int8 and the multipliers allow: below 2^31 in one int32."""
    scheme, k = Scheme.parse("w4a8_g128_sym_iscale"), 2**17
    codes = torch.zeros((2, k), dtype=torch.uint8)
    q = Quantized(scheme, codes, torch.full((2, k // 128), 16.0))
    routing = sort_assignments(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), 1)
    x = torch.full((1, k), 127.0)
    y = _gemm([q], Tile(8, 8, 8))(x, routing.token, routing)
    assert y.tolist() == [[[-127.0 * 128 * k] * 2]]
    assert torch.equal(y[0], matmul(x, q))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a8_sym", "w4a4_g32_sym", "w4a8_g32_sym_iscale"])
def test_a_spoilt_token_spoils_no_other(scheme: str, bad: float) -> None:
    q = quantize(torch.randn(40, 64), Scheme.parse(scheme))
    x = torch.randn(6, 64)
    routing = sort_assignments(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), 1)
    gemm = _gemm([q], Tile(64, 64, 64))
    clean = gemm(x, routing.token, routing)[0]
    x[2, 3] = bad
    spoilt = gemm(x, routing.token, routing)[0]
    assert not spoilt[2].isfinite().any()
    others = torch.arange(6) != 2
    assert torch.equal(spoilt[others], clean[others])


def test_every_finite_half_is_decoded() -> None:
    words = np.arange(2**16, dtype=np.uint16)
    words = words[(words & 0x7C00) != 0x7C00]
    width = len(words) // PANEL
    assert width * PANEL == len(words)
    out = np.empty(len(words), np.float32)
    u = np.uint64
    kernels.decode_fp16(words, u(0), u(PANEL), u(0), u(width), out, u(0))
    assert (out == words.view(np.float16).astype(np.float32)).all()


def test_every_e4m3_is_decoded() -> None:
    codes = np.array([code for code in range(256) if code & 127 != 127] + [0, 0], dtype=np.uint8)
    out = np.empty(256, np.float32)
    u = np.uint64
    kernels.decode_e4m3(codes, u(0), u(PANEL), u(0), u(4), np.ones(PANEL, np.float32), out, u(0))
    assert (out == torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32).numpy()).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_at_every_position_is_decoded_to_columns_and_rows(bits: int) -> None:
    u = np.uint64
    codes = np.arange(2**bits, dtype=np.uint8).repeat(8)
    codes = np.stack([np.roll(codes, shift) for shift in range(8)]).astype(np.uint8)
    scheme = Scheme(bits)
    packed = pack(Quantized(scheme, torch.from_numpy(codes), torch.ones(8, 1))).payload.numpy()
    k = u(codes.shape[1])
    columns = np.zeros(int(k) * PANEL, np.float32)
    zero, one = np.zeros(PANEL, np.float32), np.ones(PANEL, np.float32)
    flat = np.append(packed.T.reshape(-1), np.uint8(0))
    kernels.decode_codes(flat, u(0), u(bits), u(8), u(0), k, np.float32(1), one, zero, columns, u(0))
    assert (codes == columns.reshape(-1, PANEL)[:, :8].T).all()
    row = np.zeros(int(k), np.int16)
    for r in range(8):
        stream = np.append(packed[r], np.uint8(0))
        kernels.decode_row(stream, u(0), u(bits), k, np.int16(1), row, u(0))
        assert (row == codes[r]).all()


def test_combine_adds_in_the_order_of_the_slots() -> None:
    rows = np.array([[1.0], [2.0**-24], [-1.0]], np.float32)
    slots = np.array([[0, 1, 2], [0, 2, 1], [-1, 1, -1]])
    out = np.full((3, 1), np.nan, np.float32)
    kernels.combine(rows, slots, np.ones((3, 3), np.float32), out)
    assert out.ravel().tolist() == [0.0, 2.0**-24, 2.0**-24]


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def njit(cache: bool = False, **options: object) -> object:
        seen.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'f': no locator available for file 'kernels.py'")
        return lambda function: function

    monkeypatch.setattr(kernels, "njit", njit)
    assert kernels.kernel()(len) is len
    assert seen == [True, False]
