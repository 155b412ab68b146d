"""Packing for the kernels: what is put into an arena comes back, and every code lies where the kernels look for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.triton.layout import (
    ALIGN,
    PART,
    ROWS,
    allocate_arena,
    arena_bytes,
    body_of,
    meta_bytes,
    pack_metas,
    pack_payload,
    payload_bytes,
    put,
    unit_channels,
    unpack_metas,
    unpack_payload,
)
from mxmoe.errors import BadQuantized
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, quantize, split_scales

from .small_blocks import KERNEL_SCHEMES

SIZES = st.sampled_from((1, 63, 64, 65, 128, 512)) | st.integers(1, 700)
PACKED = tuple(scheme for scheme in KERNEL_SCHEMES if body_of(scheme) != "dense")


def drawn(scheme: Scheme, n: int, k: int, seed: int = 0) -> Quantized:
    weight = torch.randn((n, k), generator=torch.Generator().manual_seed(seed))
    return quantize(weight, scheme)


def check_equal(found: Quantized, wanted: Quantized) -> None:
    assert found.scheme == wanted.scheme
    for name in ("codes", "scale", "zero"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a.float(), b.float()), name


@given(scheme=st.sampled_from(KERNEL_SCHEMES), n=SIZES, k=SIZES, seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_unpacking_undoes_packing(scheme: Scheme, n: int, k: int, seed: int) -> None:
    q = drawn(scheme, n, k, seed)
    payload = pack_payload(q)
    assert payload.dtype == torch.uint8
    assert len(payload) == payload_bytes(scheme, n, k)
    codes = unpack_payload(payload, scheme, n, k)
    assert codes.dtype == q.codes.dtype
    assert torch.equal(codes.float(), q.codes.float())
    metas = pack_metas(q)
    assert tuple(map(len, metas)) == meta_bytes(scheme, n, k)
    check_equal(Quantized(scheme, codes, *unpack_metas(*metas, scheme, n, k)), q)


@given(
    schemes=st.lists(st.sampled_from(KERNEL_SCHEMES), min_size=1, max_size=4),
    matrices=st.integers(1, 2), n=st.integers(1, 150), k=st.integers(1, 300), is_given=st.booleans(),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_an_arena_gives_back_what_was_put_in(
    schemes: list[Scheme], matrices: int, n: int, k: int, is_given: bool
) -> None:
    size = arena_bytes(n, k, schemes, matrices)
    room = torch.full((size,), 0xA5, dtype=torch.uint8) if is_given else "cpu"
    arena = allocate_arena(n, k, schemes, matrices, room)
    assert len(arena.data) == size
    assert size % ALIGN == 0
    held = {
        (m, lane): drawn(scheme, n, k, 9 * m + lane) for m in range(matrices) for lane, scheme in enumerate(schemes)
    }
    for (matrix, lane), q in held.items():
        put(arena, matrix, lane, q)
    for (matrix, lane), q in held.items():
        check_equal(arena.read(matrix, lane), q)


@given(schemes=st.lists(st.sampled_from(KERNEL_SCHEMES), min_size=1, max_size=5), n=SIZES, k=SIZES)
@settings(max_examples=50, deadline=None)
def test_pieces_begin_at_lines_and_do_not_overlap(schemes: list[Scheme], n: int, k: int) -> None:
    arena = allocate_arena(n, k, schemes, 2, "cpu")
    assert arena.base.tolist() == [
        [list(one) for one in arena.starts[first : first + len(schemes)]] for first in (0, len(schemes))
    ]
    end = 0
    for scheme, starts in zip((*schemes, *schemes), arena.starts, strict=True):
        for start, held in zip(starts, (payload_bytes(scheme, n, k), *meta_bytes(scheme, n, k)), strict=True):
            assert start % ALIGN == 0
            assert start >= end
            end = start + held
    assert end <= len(arena.data)


@pytest.mark.parametrize("scheme", PACKED, ids=str)
def test_byte_c_of_a_unit_holds_the_codes_of_channels_c_and_every_64th_behind(scheme: Scheme) -> None:
    n, k = 70, 600
    q = drawn(scheme, n, k)
    channels = unit_channels(scheme)
    blocks, units = -(-n // ROWS), -(-k // channels)
    words = pack_payload(q).view(blocks, units, -1, ROWS, PART).int()
    for row, channel in ((0, 0), (1, 63), (63, 64), (64, 127), (69, 128), (5, 511), (66, 512), (69, 599)):
        unit, inside = divmod(channel, channels)
        part, byte = divmod(inside, PART)
        at = words[row // ROWS, unit, :, row % ROWS, byte]
        if scheme.weight_bits == 3:  # high bits of all eight parts, then the low two of four parts each
            code = ((at[0] >> part) & 1) << 2 | ((at[1 + part // 4] >> (2 * (part % 4))) & 3)
        elif scheme.act_format == "e4m3":  # sign and magnitude: bits 7, 2..0 or bits 6, 5..3
            negative, magnitude = ((at[0] >> 7, at[0] & 7), ((at[0] >> 6) & 1, (at[0] >> 3) & 7))[part]
            code = 8 - magnitude if negative else 8 + magnitude
        else:
            bits = scheme.weight_bits
            code = (at[0] >> (bits * part)) & ((1 << bits) - 1)
        assert int(code) == int(q.codes[row, channel]), (row, channel)


@pytest.mark.parametrize("name", ["w8a8_sym", "w8a8_e4m3", "bf16", "fp16"])
def test_dense_weights_are_what_the_matrix_unit_reads(name: str) -> None:
    scheme = Scheme.parse(name)
    q = drawn(scheme, 5, 40)
    payload = pack_payload(q)
    if scheme.weight_format == "int":
        assert torch.equal(payload.view(torch.int8).view(5, 40).int(), q.codes.int() - 128)
    else:
        assert torch.equal(payload.view(q.codes.dtype).view(5, 40).float(), q.codes.float())


@pytest.mark.parametrize("scheme", [one for one in PACKED if one.group_size], ids=str)
def test_scales_of_a_block_lie_side_by_side(scheme: Scheme) -> None:
    n, k = 70, 600
    q = drawn(scheme, n, k)
    assert q.scale is not None
    padded = -(-k // unit_channels(scheme)) * unit_channels(scheme)
    groups = -(-padded // (scheme.group_size or 1))
    first, second = pack_metas(q)
    words, metas = first.view(torch.bfloat16), q.scale
    if scheme.integer_scales:
        channel, metas = split_scales(q.scale)
        words = second
        assert torch.equal(first.view(torch.float32)[:n], channel[:, 0])
    for row, group in ((0, 0), (63, 1), (64, 0), (69, scheme.n_groups(k) - 1)):
        assert words[(row // ROWS * groups + group) * ROWS + row % ROWS] == metas[row, group]
    assert len(words) >= 2 * groups * ROWS + ROWS, "the scales of one unit behind the last may be read"


def test_a_code_without_a_sign_and_magnitude_is_refused() -> None:
    scheme = Scheme.parse("w4a8_sym_e4m3")
    q = drawn(scheme, 3, 5)
    q.codes[1, 2] = 0
    with pytest.raises(BadQuantized, match="a code is -8"):
        pack_payload(q)
