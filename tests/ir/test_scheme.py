"""The scheme's grammar, its combinations, its bit accounting and its reference page."""

import itertools
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxmoe.errors import BadScheme
from mxmoe.ir import Scheme

DOCS = Path(__file__).parents[2] / "docs" / "schemes.md"


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    """Every scheme there is, group sizes up to 4096."""
    weight_bits = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16]))
    if weight_bits == 16:
        return Scheme(16, act_format=draw(st.sampled_from(["bf16", "fp16"])))
    act_bits = draw(st.sampled_from([4, 5, 6, 7, 8, 16]))
    formats = {16: ["bf16", "fp16"], 8: ["int", "e4m3"]}.get(act_bits, ["int"])
    act_format = draw(st.sampled_from(formats))
    symmetric = (act_format == "e4m3" and weight_bits == 8) or draw(st.booleans())
    group = draw(st.none() | st.integers(1, 4096))
    may = 2 <= weight_bits <= 4 and 5 <= act_bits <= 8 and act_format == "int" and symmetric and group is not None
    return Scheme(weight_bits, act_bits, group, symmetric, act_format, may and draw(st.booleans()))


@given(schemes())
def test_parse_undoes_str(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


@given(schemes(), schemes())
def test_two_schemes_have_two_names_and_an_order(a: Scheme, b: Scheme) -> None:
    assert (a == b) == (str(a) == str(b))
    assert (hash(a) == hash(b)) or a != b
    assert (a < b) + (b < a) + (a == b) == 1


@given(schemes(), st.integers(1, 20_000))
def test_effective_bits_count_what_is_stored(scheme: Scheme, k: int) -> None:
    groups = scheme.n_groups(k)
    size = scheme.group_size or k
    assert (groups - 1) * size < k <= groups * size
    meta = (scheme.scale_bits + scheme.zero_bits) * groups + scheme.channel_bits
    stored = Fraction(scheme.weight_bits * k + meta, k)
    assert scheme.effective_bits(k) == pytest.approx(float(stored), rel=1e-15)
    assert scheme.effective_bits(k) == scheme.payload_bits + scheme.meta_bits(k)
    assert (scheme.zero_bits == 0) == scheme.symmetric


def test_integer_scales_take_a_byte_for_a_group_and_a_float32_for_a_channel() -> None:
    scheme = Scheme.parse("w4a8_g128_sym_iscale")
    assert (scheme.scale_bits, scheme.channel_bits, Scheme.parse("w4a8_g128_sym").channel_bits) == (8, 32, 0)
    assert scheme.effective_bits(2048) == 4 + 8 / 128 + 32 / 2048 == 4.078125


@given(st.text(alphabet="wag0123456789_symefpbicl", max_size=24))
def test_any_text_parses_to_a_scheme_or_is_refused(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except BadScheme:
        return
    assert Scheme.parse(str(scheme)) == scheme


# text -> weight bits, activation bits, group, symmetric, activation format, weight format
FIELDS = {
    "w4a16_g128_asym": (4, 16, 128, False, "bf16", "int"),
    "w4a16_g128_sym_fp16": (4, 16, 128, True, "fp16", "int"),
    "w1a16_sym": (1, 16, None, True, "bf16", "int"),
    "w8a8_sym": (8, 8, None, True, "int", "int"),
    "w4a8_g128_sym": (4, 8, 128, True, "int", "int"),
    "w4a4_g128_sym": (4, 4, 128, True, "int", "int"),
    "w4a8_g128_sym_iscale": (4, 8, 128, True, "int", "int"),
    "w2a5_g7_sym_iscale": (2, 5, 7, True, "int", "int"),
    "w8a8_e4m3": (8, 8, None, True, "e4m3", "e4m3"),
    "w8a8_g128_e4m3": (8, 8, 128, True, "e4m3", "e4m3"),
    "w4a8_g128_asym_e4m3": (4, 8, 128, False, "e4m3", "int"),
    "bf16": (16, 16, None, True, "bf16", "bf16"),
    "fp16": (16, 16, None, True, "fp16", "fp16"),
}


@pytest.mark.parametrize(("text", "fields"), FIELDS.items())
def test_fields_of_common_schemes(text: str, fields: tuple[object, ...]) -> None:
    s = Scheme.parse(text)
    assert str(s) == text
    assert (s.weight_bits, s.act_bits, s.group_size, s.symmetric, s.act_format, s.weight_format) == fields
    assert s.integer_scales == text.endswith("_iscale")


def test_absent_symmetry_is_symmetric() -> None:
    assert str(Scheme.parse("w4a16_g128")) == "w4a16_g128_sym"
    assert str(Scheme.parse("w8a8_sym_e4m3")) == "w8a8_e4m3"
    assert str(Scheme.parse("w4a8_g128_iscale")) == "w4a8_g128_sym_iscale"


@pytest.mark.parametrize(
    ("text", "floating", "weight_only", "act_group"),
    [
        ("bf16", True, False, None),
        ("w4a16_g64_asym", False, True, None),
        ("w8a8_g128_sym", False, False, None),
        ("w4a4_g128_sym", False, False, 128),
        ("w4a4_sym", False, False, None),
    ],
)
def test_kinds(text: str, floating: bool, weight_only: bool, act_group: int | None) -> None:
    s = Scheme.parse(text)
    assert (s.is_float, s.is_weight_only, s.act_group_size) == (floating, weight_only, act_group)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int8", "does not follow the grammar"),
        ("w4a16_sym_g128", "does not follow the grammar"),
        (" w4a16", "does not follow the grammar"),
        ("w4a16_sym\n", "does not follow the grammar"),
        ("w0a16", "weights have 1 to 8 or 16 bits, not 0"),
        ("w9a16", "weights have 1 to 8 or 16 bits, not 9"),
        ("w4a3", "activations have 4 to 8 or 16 bits, not 3"),
        ("w4a16_g0", "a group holds at least one channel, not 0"),
        ("w8a8_fp16", "8-bit activations cannot be fp16"),
        ("w8a16_e4m3", "16-bit activations cannot be e4m3"),
        ("w4a4_e4m3", "e4m3 is an 8-bit format"),
        ("w8a8_asym_e4m3", "e4m3 weights have no zero point"),
        ("w16a8", "16-bit weights take no group, no zero point and 16-bit activations"),
        ("w16a16_g128", "16-bit weights take no group"),
        ("w16a16_asym", "16-bit weights take no group"),
        ("bf16_iscale", "does not follow the grammar"),
        ("w0_iscale", "does not follow the grammar"),
        ("w4a8_iscale_g128", "does not follow the grammar"),
        ("w4a8_g128_sym_int_iscale", "does not follow the grammar"),
        ("w4a8_sym_iscale", "integer scales are of groups, and there are none"),
        ("w4a8_g128_asym_iscale", "integer scales take no zero point"),
        ("w1a8_g128_sym_iscale", "integer scales take integer weights of 2 to 4 bits, not 1"),
        ("w5a8_g128_sym_iscale", "integer scales take integer weights of 2 to 4 bits, not 5"),
        ("w8a8_g128_e4m3_iscale", "integer scales take integer weights of 2 to 4 bits, not 8"),
        ("w16a16_iscale", "integer scales take integer weights of 2 to 4 bits, not 16"),
        ("w4a4_g128_sym_iscale", "5 to 8 bits with one scale per token, not 4 bits"),
        ("w4a16_g128_sym_iscale", "5 to 8 bits with one scale per token, not bf16"),
        ("w4a16_g128_sym_fp16_iscale", "5 to 8 bits with one scale per token, not fp16"),
        ("w4a8_g128_sym_e4m3_iscale", "5 to 8 bits with one scale per token, not e4m3"),
    ],
)
def test_meaningless_schemes_are_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(BadScheme, match=re.escape(reason)):
        Scheme.parse(text)


def test_mixed_schemes_sort() -> None:
    texts = ["bf16", "w8a8_sym", "w4a16_sym", "w4a16_g128_sym", "w4a4_g128_sym", "w2a16_g128_asym"]
    in_order = ["w2a16_g128_asym", "w4a4_g128_sym", "w4a16_g128_sym", "w4a16_sym", "w8a8_sym", "bf16"]
    assert [str(s) for s in sorted(map(Scheme.parse, texts))] == in_order


def test_the_table_of_the_reference_page_is_computed() -> None:
    k = 2048
    rows = re.findall(r"^\| `(\S+)` \| (\S+) \| (\S+) \| (\S+) \|$", DOCS.read_text(), flags=re.MULTILINE)
    assert len(rows) >= 12
    for text, *figures in rows:
        s = Scheme.parse(text)
        computed = (s.payload_bits, s.meta_bits(k), s.effective_bits(k))
        assert [f"{figure:.4f}" for figure in computed] == figures, f"{text} at k={k}"


def test_bits_groups_and_symmetries_all_combine() -> None:
    for bits, group, symmetry in itertools.product(range(1, 9), ("", "_g32", "_g64", "_g128"), ("sym", "asym")):
        for suffix in ("", "_fp16"):
            text = f"w{bits}a16{group}_{symmetry}{suffix}"
            assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize("bits", [0, 16])
def test_what_has_no_codes_has_no_integer_scales(bits: int) -> None:
    with pytest.raises(BadScheme, match=f"_iscale' is no scheme: .* 2 to 4 bits, not {bits}"):
        Scheme(bits, integer_scales=True)


@pytest.mark.parametrize("text", ["w4a17", "w8a8_asym_e4m3", "w4a16_g0", "w4a8_sym_iscale"])
def test_a_mistake_shows_what_was_written(text: str) -> None:
    with pytest.raises(BadScheme, match=f"^'{text}' is no scheme"):
        Scheme.parse(text)
