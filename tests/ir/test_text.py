"""Text: every op and attribute prints and parses back, readable and generic; golden text; errors with a caret."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from xdsl.dialects.builtin import StringAttr

from mxmoe.errors import BadText
from mxmoe.ir import (
    STAGES,
    BankShape,
    BlockShape,
    ModuleOp,
    Scheme,
    Table,
    build_module,
    linears,
    moe_ops,
    parse_ir,
    print_ir,
)
from mxmoe.testing import modules


def names(bank: str, gated: bool) -> dict[str, str]:
    return {role: f"mlp.{bank}.{role}" for role in (("gate", "up", "down") if gated else ("up", "down"))}


def small(experts: int = 4) -> ModuleOp:
    banks = (
        BankShape("routed", experts, 2, 64, "silu", True, names("routed", True)),
        BankShape("shared", 1, 1, 256, "clamped", True, names("shared", True), act_params={"limit": 7.0}),
    )
    candidates = [Scheme.parse(text) for text in ("w4a16_g128_asym", "w8a8_sym", "bf16")]
    return build_module([BlockShape("model.layers.0.mlp", 128, banks)], candidates)


@given(modules())
@settings(max_examples=60, deadline=None)
def test_readable_text_is_an_inverse(module: ModuleOp) -> None:
    text = print_ir(module, elide=None)
    again = parse_ir(text)
    assert print_ir(again, elide=None) == text
    assert again.is_structurally_equivalent(module)


@given(modules())
@settings(max_examples=30, deadline=None)
def test_generic_text_is_an_inverse(module: ModuleOp) -> None:
    again = parse_ir(print_ir(module, elide=None, generic=True))
    assert print_ir(again, elide=None) == print_ir(module, elide=None)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_attributes_that_are_not_ours_survive(data: st.DataObject) -> None:
    module = small()
    value = data.draw(st.text(st.characters(codec="ascii"), max_size=20))
    linears(module)[0].attributes["note"] = StringAttr(value)
    again = parse_ir(print_ir(module, elide=None))
    assert linears(again)[0].attributes["note"] == StringAttr(value)


@given(st.text(st.characters(codec="utf-8"), max_size=20))
@settings(max_examples=60, deadline=None)
def test_a_name_may_be_any_text(name: str) -> None:
    module = small()
    module.ops.first.properties["block"] = StringAttr(name)  # pyright: ignore[reportOptionalMemberAccess]
    text = print_ir(module, elide=None)
    assert moe_ops(parse_ir(text))[0].block == name
    assert print_ir(parse_ir(text), elide=None) == text


def test_a_name_in_another_script_stays_readable_in_both_forms() -> None:
    module = small()
    module.ops.first.properties["block"] = StringAttr("Köpfe.0")  # pyright: ignore[reportOptionalMemberAccess]
    for generic in (False, True):
        text = print_ir(module, elide=None, generic=generic)
        assert '"Köpfe.0"' in text
        assert moe_ops(parse_ir(text))[0].block == "Köpfe.0"


def test_lifted_text(golden: object) -> None:
    assert golden == print_ir(small())


def test_elided_text(golden: object) -> None:
    module = small(experts=8)
    for moe in moe_ops(module):
        moe.stage = "annotated"
    for op in linears(module):
        op.set_table("cost", Table(("expert", "scheme"), np.full((op.experts, 3), 1.5, dtype=np.float32)))
    assert golden == print_ir(module)


def test_elided_text_is_refused_with_a_caret_and_the_way_out() -> None:
    module = small(experts=8)
    for moe in moe_ops(module):
        moe.stage = "annotated"
    linears(module)[0].set_table("cost", Table(("expert", "scheme"), np.zeros((8, 3), dtype=np.float32)))
    with pytest.raises(BadText, match=r"mxmoe opt --full") as caught:
        parse_ir(print_ir(module))
    assert "^" in str(caught.value)


def test_a_complaint_about_a_long_line_shows_the_place_only() -> None:
    module = small(experts=500)
    for moe in moe_ops(module):
        moe.stage = "annotated"
    linears(module)[0].set_table("cost", Table(("expert", "scheme"), np.zeros((500, 3), dtype=np.float32)))
    text = print_ir(module, elide=None).replace('0.0"> :', '0.0 1.5"> :', 1)
    with pytest.raises(BadText, match="1501 words for 500x3") as caught:
        parse_ir(text)
    shown, caret, _ = str(caught.value).splitlines()[-3:]
    assert len(shown) <= 160
    assert shown[: caret.index("^")].endswith('0.0 1.5"')


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("w8a8_sym", "w8b8", "no scheme"),
        ('role="gate"', 'roll="gate"', "has no property 'roll'"),
        ('stage="lifted"', 'stage="lofted"', "none of lifted"),
        ("[w4a16_g128_asym, w8a8_sym, bf16]", "[bf16, bf16]", "distinct"),
        ("mxmoe.combine", "mxmoe.conbine", "conbine"),
    ],
)
def test_text_that_is_no_module(old: str, new: str, complaint: str) -> None:
    text = print_ir(small(), elide=None)
    assert old in text
    with pytest.raises(BadText, match=complaint):
        parse_ir(text.replace(old, new, 1))


def test_every_stage_is_drawn_by_the_strategy() -> None:
    seen: set[str] = set()

    @given(modules())
    @settings(max_examples=60, deadline=None, database=None)
    def collect(module: ModuleOp) -> None:
        seen.update(moe.stage for moe in moe_ops(module))

    collect()
    assert seen == set(STAGES)
