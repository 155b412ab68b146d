"""Pipelines as text, the driver, and what third parties get wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from xdsl.context import Context

from mxmoe.errors import BadOption, BadPipeline, BrokenEntry, NotAPass, PassFailed, UnknownName
from mxmoe.ir import ModuleOp, linears, moe_ops
from mxmoe.passes import (
    PASSES,
    PIPELINES,
    AllocateBits,
    AnnotateCost,
    AnnotateRouting,
    ApplyPlan,
    Environment,
    LowerToGroupGemm,
    Pass,
    VerifyEach,
    parse_passes,
    run_passes,
    spell_passes,
)
from mxmoe.testing import registered

from .modules import annotated, choose, small

_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\f\v", exclude_categories=("Cs", "Zl", "Zp")))
_NUMBER = st.floats(allow_nan=False)
_VALUES = {
    "int": st.integers(-(2**40), 2**40),
    "int | None": st.none() | st.integers(-(2**40), 2**40),
    "float": _NUMBER,
    "float | None": st.none() | _NUMBER,
    "bool": st.booleans(),
    "str": _TEXT,
    "str | None": st.none() | _TEXT,
    "tuple[int, ...]": st.lists(st.integers(-9, 9**9), min_size=1, max_size=3).map(tuple),
    "tuple[float, ...] | None": st.none() | st.lists(_NUMBER, min_size=1, max_size=3).map(tuple),
}


@dataclass(frozen=True)
class Broken(Pass):
    """Leaves a module that does not verify."""

    name = "broken"
    crash: bool = False

    def run(self, module: ModuleOp, environment: Environment) -> None:
        if self.crash:
            raise KeyError("lost")
        for moe in moe_ops(module):
            moe.stage = "lowered"


@dataclass(frozen=True)
class Nothing(Pass):
    name = "nothing"

    def run(self, module: ModuleOp, environment: Environment) -> None:
        pass


class Undecorated(Pass):
    name = "undecorated"
    bits: int = 4

    def run(self, module: ModuleOp, environment: Environment) -> None:
        pass


@dataclass(frozen=True)
class Demanding(Pass):
    name = "demanding"
    bits: int

    def run(self, module: ModuleOp, environment: Environment) -> None:
        pass


_METHODS = st.sampled_from(("squared", "fisher", "pmq{alpha=2.0 gamma=1.0e-05}", "mopeq{form=hutchinson}"))
"""Text that is looked up at once."""


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    kind = PASSES[draw(st.sampled_from(sorted(PASSES)))]
    options = {
        field.name: draw(_METHODS if field.name == "method" else _VALUES[str(field.type)])
        for field in dataclasses.fields(kind)
    }
    return kind(**options)


@given(st.lists(passes(), max_size=4))
@settings(max_examples=200, deadline=None)
def test_spelling_and_parsing_are_inverse(steps: list[Pass]) -> None:
    text = spell_passes(steps)
    assert parse_passes(text) == tuple(steps)
    assert spell_passes(parse_passes(text)) == text


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_every_pipeline_parses_and_stands_for_its_passes(name: str) -> None:
    steps = parse_passes(name)
    assert tuple(step.name for step in steps) == PIPELINES[name]
    assert parse_passes(f"{name},choose-tiles") == (*steps, *parse_passes("choose-tiles"))


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("allocate-bits{weight-bits=4}", AllocateBits(weight_bits=4.0)),
        ("allocate-bits{weight_bits=4.25 r=1}", AllocateBits(weight_bits=4.25, r=1.0)),
        ("allocate-bits{weight-bits latency-us=1e3}", AllocateBits(weight_bits=None, latency_us=1000.0)),
        ("allocate-bits{weight-bits=none max-bytes=9}", AllocateBits(weight_bits=None, max_bytes=9.0)),
        ("allocate-bits{latency-us=inf}", AllocateBits(latency_us=float("inf"))),
        ("annotate-cost{tokens=8}", AnnotateCost(tokens=(8,))),
        ("annotate-cost{tokens=1,2048 token-weights=9,0.1}", AnnotateCost(tokens=(1, 2048), token_weights=(9.0, 0.1))),
        ("annotate-cost {\n  tokens = 1 , 2\n}", AnnotateCost(tokens=(1, 2))),
        ('apply-plan{file="a {b}, c=\\"d\\".json"}', ApplyPlan(file='a {b}, c="d".json')),
        ("lower-to-group-gemm{fuse=false}", LowerToGroupGemm(fuse=False)),
    ],
)
def test_options_are_read_as_people_write_them(text: str, step: Pass) -> None:
    assert parse_passes(text) == (step,)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("anotate-cost", UnknownName, r"no pass named 'anotate-cost'; did you mean annotate-cost"),
        ("defualt", UnknownName, "did you mean default"),
        ("allocate-bits{weight-bit=4}", BadOption, "the option weight-bit: did you mean weight-bits"),
        ("allocate-bits{weight-bits=four}", BadOption, "weight-bits=four: it takes a number, or none"),
        ("allocate-bits{r=none}", BadOption, "r=none: it takes a number"),
        ("choose-tiles{tokens=1.5}", BadOption, "tokens=1.5: it takes an integer"),
        ("choose-tiles{tokens=1,2}", BadOption, "tokens=1,2: it takes an integer"),
        ("annotate-cost{tokens=many}", BadOption, "tokens=many: it takes integers"),
        ("lower-to-group-gemm{fuse=maybe}", BadOption, "fuse=maybe: it takes true or false"),
        ("allocate-bits{r}", BadOption, "r=nothing: it takes a number"),
        ("default{weight-bits=4}", BadOption, "the pipeline default cannot take weight-bits: options belong to passes"),
        ("allocate-bits{", BadPipeline, "Expected argument name"),
        ("annotate-cost annotate-cost", BadPipeline, "Expected a comma"),
        ("annotate-cost,,choose-tiles", BadPipeline, "Expected pass name"),
        ('apply-plan{file="C:\\new\\plan"}', BadPipeline, "is not a pipeline"),
    ],
)
def test_a_mistake_says_what_is_known(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_passes(text)


def test_options_hold_for_what_the_text_leaves_open() -> None:
    options = {"allocate-bits": {"weight_bits": 3.0, "r": 0.5}, "annotate-cost": {"tokens": (1,)}}
    first, second = parse_passes("allocate-bits{weight-bits=5.0},allocate-bits", options)
    assert first == AllocateBits(weight_bits=5.0, r=0.5)  # spelled out, although it is the default
    assert second == AllocateBits(weight_bits=3.0, r=0.5)


def test_a_pass_that_breaks_the_module_is_named() -> None:
    with pytest.raises(PassFailed, match=r"after annotate-routing,broken the module does not verify: .*lowered"):
        run_passes(small(), [AnnotateRouting(), Broken()], Environment())
    with pytest.raises(PassFailed, match=r"^after broken the module") as caught:
        run_passes(small(), [Broken(), Nothing()], Environment(), [VerifyEach()])
    assert caught.value.blanks["name"] == "broken"


def test_an_exception_of_a_pass_is_passed_on_with_the_pass_as_a_note() -> None:
    with pytest.raises(KeyError, match="lost") as caught:
        run_passes(small(), [Broken(crash=True)], Environment())
    assert caught.value.__notes__ == ["in the pass broken{crash=true}"]


def test_no_pass_is_a_pipeline_too() -> None:
    module = small()
    assert parse_passes("") == ()
    assert run_passes(module, [], Environment()) is module


def test_observers_see_every_pass_in_order() -> None:
    seen: list[tuple[str, str, str]] = []

    class Watch:
        def __init__(self, name: str) -> None:
            self.name = name

        def before(self, step: Pass, module: ModuleOp) -> None:
            seen.append((self.name, "before", step.name))

        def after(self, step: Pass, module: ModuleOp) -> None:
            seen.append((self.name, "after", step.name))

    run_passes(choose(small()), [Nothing(), LowerToGroupGemm()], Environment(), [Watch("a"), Watch("b")])
    assert seen == [
        (watch, when, step)
        for step in ("nothing", "lower-to-group-gemm")
        for when in ("before", "after")
        for watch in ("a", "b")
    ]


def test_xdsl_s_own_driver_can_run_a_pass() -> None:
    module = annotated()
    AllocateBits(weight_bits=None).apply(Context(), module)
    assert all(op.choice is not None for op in linears(module))


def test_a_registered_pass_is_found_while_the_context_lasts() -> None:
    with registered(PASSES, "nothing", Nothing):
        assert parse_passes("nothing,choose-tiles")[0] == Nothing()
        with pytest.raises(UnknownName, match="did you mean nothing"):
            parse_passes("nothin")
    with pytest.raises(UnknownName):
        parse_passes("nothing")


def test_ours_win_over_a_third_party_s_on_a_clash() -> None:
    with registered(PASSES, "choose-tiles", Nothing):
        assert parse_passes("choose-tiles")[0].name == "choose-tiles"


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("context", Context, "no subclass of mxmoe.passes.Pass"),
        ("another-name", Nothing, r"write `name = 'another-name'` in Nothing"),
        ("undecorated", Undecorated, r"decorate Undecorated with @dataclass\(frozen=True\)"),
        ("demanding", Demanding, "give its options bits defaults"),
    ],
)
def test_what_is_no_pass_says_why(name: str, kind: type, reason: str) -> None:
    with registered(PASSES, name, kind), pytest.raises(NotAPass, match=reason):
        parse_passes(name)


def test_a_class_that_cannot_be_found_again_says_so() -> None:
    class Local(Nothing):
        pass

    with registered(PASSES, "local", Local), pytest.raises(BrokenEntry, match="<locals>"):
        parse_passes("local")


def test_every_entry_loads_and_has_its_own_name() -> None:
    kinds: dict[str, Any] = {name: PASSES[name] for name in PASSES}
    for name, kind in kinds.items():
        assert kind.name == name
        assert kind.__module__.rpartition(".")[2] == name.replace("-", "_")
        assert parse_passes(name) == (kind(),)
