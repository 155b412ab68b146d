"""Packing and unpacking are inverse, lie as stated, and the vectorised unpacking follows the one decode formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import BadPacked
from mxmoe.ir import Scheme
from mxmoe.quant import (
    Packed,
    code_position,
    decode_code,
    n_payload_bytes,
    pack,
    pack_codes,
    quantize,
    unpack,
    unpack_codes,
)

ALL_BITS = range(1, 9)
ISCALE = [f"w{bits}a8_g{group}_sym_iscale" for bits in (2, 3, 4) for group in (7, 32)]


@st.composite
def code_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.integers(1, 8))
    shape = [*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(1, 4)), draw(st.integers(1, 70))]
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator), bits


@given(code_tensors())
@settings(max_examples=200, deadline=None)
def test_unpack_undoes_pack(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    payload = pack_codes(codes, bits)
    assert payload.shape == (*codes.shape[:-1], -(-codes.shape[-1] * bits // 8))
    assert torch.equal(unpack_codes(payload, bits, codes.shape[-1]), codes)


@given(st.data(), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_pack_undoes_unpack_where_no_bit_is_unused(data: st.DataObject, bits: int) -> None:
    periods = data.draw(st.integers(1, 5))
    payload = torch.tensor(list(data.draw(st.binary(min_size=bits * periods, max_size=bits * periods))))
    payload = payload.to(torch.uint8)
    assert torch.equal(pack_codes(unpack_codes(payload, bits, 8 * periods), bits), payload)


@given(code_tensors())
@settings(max_examples=100, deadline=None)
def test_rows_are_little_endian_bit_streams(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    k = codes.shape[-1]
    for row, packed in zip(codes.reshape(-1, k), pack_codes(codes, bits).reshape(-1, -(-k * bits // 8)), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row.tolist()))
        assert bytes(packed.tolist()) == stream.to_bytes(len(packed), "little")


@given(code_tensors())
@settings(max_examples=100, deadline=None)
def test_unpack_follows_the_scalar_formula(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    k = codes.shape[-1]
    payload = pack_codes(codes, bits)
    unpacked = unpack_codes(payload, bits, k).reshape(-1, k)
    for row, packed in zip(unpacked.tolist(), payload.reshape(-1, payload.shape[-1]).tolist(), strict=True):
        for i, code in enumerate(row):
            byte, shift = code_position(i, bits)
            # garbage where the row has ended: a code that needs it would come out wrong
            high = packed[byte + 1] if byte + 1 < len(packed) else 0xA5
            assert decode_code(packed[byte], high, shift, bits) == code


def test_docstring_examples() -> None:
    assert pack_codes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist() == [[209, 0]]
    assert code_position(3, 3) == (1, 1)
    assert decode_code(0b11_010_001, 0, 6, 3) == 0b011


@pytest.mark.parametrize(
    "text",
    [f"w{b}a16_g32_{s}" for b in ALL_BITS for s in ("sym", "asym")]
    + ["w8a8_e4m3", "bf16", "fp16", "w4a8_asym"]
    + ISCALE,
)
@pytest.mark.parametrize("k", [1, 7, 32, 67])
def test_quantized_weights_survive_packing(text: str, k: int) -> None:
    scheme = Scheme.parse(text)
    q = quantize(torch.randn(2, 3, k, generator=torch.Generator().manual_seed(k)), scheme)
    packed = pack(q)
    back = unpack(packed)
    assert packed.payload.shape == (2, 3, n_payload_bytes(k, scheme))
    assert back.codes.dtype == q.codes.dtype
    assert torch.equal(back.codes.view(torch.uint8), q.codes.view(torch.uint8))
    assert q.zero is back.zero
    if scheme.integer_scales:
        assert q.scale is not None
        assert back.scale is not None
        assert torch.equal(q.scale, back.scale)
    else:
        assert q.scale is back.scale


@pytest.mark.parametrize(
    "text",
    ["w4a16_g128_asym", "w3a16_g64_sym", "w1a16_sym", "w8a8_sym", "w8a8_e4m3", "bf16", "w4a8_g128_sym_iscale"],
)
def test_bytes_are_what_the_scheme_accounts_for(text: str) -> None:
    scheme, (n, k) = Scheme.parse(text), (4, 512)
    assert pack(quantize(torch.ones(n, k), scheme)).nbytes * 8 == scheme.effective_bits(k) * n * k


def test_a_strided_weight_packs_like_its_copy() -> None:
    weight = torch.randn(6, 10).T
    for text in ("bf16", "w3a16_sym", "w8a8_e4m3"):
        q = quantize(weight, Scheme.parse(text))
        copy = quantize(weight.contiguous(), Scheme.parse(text))
        assert torch.equal(pack(q).payload, pack(copy).payload)


def test_a_payload_cut_short_is_refused() -> None:
    scheme = Scheme.parse("w3a16_sym")
    packed = pack(quantize(torch.ones(2, 9), scheme))
    with pytest.raises(BadPacked, match=r"uint8 \[2, 3\], not torch.uint8 \[2, 4\]"):
        Packed(scheme, 2, 9, packed.payload[:, :3], packed.scale)
    with pytest.raises(BadPacked, match=r"torch.int32"):
        Packed(scheme, 2, 9, packed.payload.to(torch.int32), packed.scale)


def test_multipliers_are_of_integer_scales_and_of_no_others() -> None:
    plain, whole = Scheme.parse("w4a8_g4_sym"), Scheme.parse("w4a8_g4_sym_iscale")
    packed = pack(quantize(torch.ones(2, 8), whole))
    assert packed.multipliers is not None
    with pytest.raises(BadPacked, match="it has no multipliers"):
        Packed(whole, 2, 8, packed.payload, packed.scale)
    with pytest.raises(BadPacked, match="it takes no multipliers"):
        Packed(plain, 2, 8, packed.payload, packed.scale, None, packed.multipliers)
