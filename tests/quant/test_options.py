"""The string form of quantizers: read in one place, written back, and every mistake in it named."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import BadOption, BadQuantizer, UnknownName
from mxmoe.ir import Scheme
from mxmoe.quant import QUANTIZERS, Quantized, WithOptions, find_quantizer, needs_hessian, quantize
from mxmoe.quant.options import split_options, with_options


@dataclass(frozen=True)
class Everything(WithOptions):
    """One option of every kind."""

    name: ClassVar[str] = "everything"
    needs_hessian: ClassVar[bool] = True
    is_on: bool = True
    n_steps: int = 3
    damping: float = 0.01
    bound: float | None = None
    word: str = "plain"
    mode: Literal["fast", "exact"] = "fast"

    def __call__(
        self, weight: torch.Tensor, scheme: Scheme, *, name: str = "weight", hessian: torch.Tensor | None = None
    ) -> Quantized:
        return quantize(weight, scheme, name=name)


@st.composite
def everything(draw: st.DrawFn) -> Everything:
    numbers = st.floats(allow_nan=False)
    return Everything(
        draw(st.booleans()),
        draw(st.integers()),
        draw(numbers),
        draw(st.none() | numbers),
        draw(st.from_regex(r"[a-z][a-z0-9_-]*", fullmatch=True)),
        draw(st.sampled_from(("fast", "exact"))),
    )


@given(everything())
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read_back(quantizer: Everything) -> None:
    name, options = split_options(str(quantizer))
    assert with_options(Everything(), name, options) == quantizer


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert str(Everything()) == "everything"
    assert str(replace(Everything(), is_on=False, bound=2.5)) == "everything{is-on=false bound=2.5}"


@pytest.mark.parametrize("text", ["x{a=1 b-c=d}", " x { a = 1   b_c= d } ", "x{\na=1\nb-c=d}"])
def test_blanks_and_underscores_are_free(text: str) -> None:
    assert split_options(text) == ("x", {"a": "1", "b-c": "d"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not follow the grammar"),
        ("gptq{", "does not follow the grammar"),
        ("gptq}a=1{", "does not follow the grammar"),
        ("gptq{a=1}{b=2}", "does not follow the grammar"),
        ("gptq{a}", "'a' is not option=value"),
        ("gptq{a=b=c}", "'a=b=c' is not option=value"),
        ("gptq{=1}", "'=1' is not option=value"),
        ("gptq{a-b=1 a_b=2}", "a-b is there twice"),
    ],
)
def test_text_that_does_not_parse_says_why(text: str, reason: str) -> None:
    with pytest.raises(BadQuantizer, match=reason):
        find_quantizer(text)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("is-on", "yes", "it takes true or false"),
        ("n-steps", "1.5", "it takes an integer"),
        ("damping", "none", "it takes a number"),
        ("bound", "much", "it takes a number, or none"),
        ("mode", "slow", "it takes fast or exact"),
        ("dampink", "1", "did you mean damping?"),
    ],
)
def test_an_option_that_cannot_be_says_why(option: str, value: str, reason: str) -> None:
    with pytest.raises(BadOption, match=reason):
        with_options(Everything(), "everything", {option: value})


def test_names_and_functions_are_quantizers_too() -> None:
    assert find_quantizer("rtn") is quantize
    assert find_quantizer(quantize) is quantize
    with pytest.raises(UnknownName, match="did you mean rtn"):
        find_quantizer("rtm{a=1}")
    with pytest.raises(BadOption, match="rtn cannot take the option a: it has no options"):
        find_quantizer("rtn{a=1}")


def test_a_quantizer_declares_that_it_needs_hessians() -> None:
    assert needs_hessian(Everything())
    assert not needs_hessian("rtn")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_registered_instances_know_their_name(name: str) -> None:
    quantizer = find_quantizer(name)
    assert not isinstance(quantizer, WithOptions) or str(quantizer) == name
