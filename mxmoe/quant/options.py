"""Options of quantizers: fields of a frozen dataclass, and the one string form that they are read from."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union

from mxmoe.errors import BadOption, BadQuantizer
from mxmoe.registry import near_names

_TEXT = re.compile(r"([A-Za-z0-9][\w.-]*)\s*(?:\{([^{}]*)\})?")
_WORD = re.compile(r"[A-Za-z][\w-]*")


@dataclasses.dataclass(frozen=True)
class WithOptions:
    """
    Base of quantizers with options: a subclass is a frozen dataclass with defaults, and its instances are quantizers.

    `str` writes what differs from the defaults, and `find_quantizer` reads it back:

        gptq{damping=0.05 act-order=false}     <->     Gptq(damping=0.05, act_order=False)

    The table of quantizers holds the instance with all defaults. Fields are int, float, bool, str, a Literal of words,
    or one of these or None.
    """

    name: ClassVar[str]
    """As in the table of quantizers."""
    needs_hessian: ClassVar[bool] = False
    """Whether it is what its name says only with a Hessian; `compile` then wants calibration data."""

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        values = {field.name: getattr(self, field.name) for field in fields}
        given = [f"{_dashed(f.name)}={_spell(values[f.name])}" for f in fields if values[f.name] != f.default]
        return f"{self.name}{{{' '.join(given)}}}" if given else self.name


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """
    Split `name{option=value option=value}` into the name and its options, values unread: "rtn" -> ("rtn", {}).

    Raises:
        BadQuantizer: the text does not parse, or has an option twice.
    """
    match = _TEXT.fullmatch(text.strip())
    if not match:
        raise BadQuantizer(text=text, reason="it does not follow the grammar")
    options: dict[str, str] = {}
    for part in re.sub(r"\s*=\s*", "=", match[2] or "").split():
        option, equals, value = part.partition("=")
        if not equals or not option or not value or "=" in value:
            raise BadQuantizer(text=text, reason=f"{part!r} is not option=value")
        if _dashed(option) in options:
            raise BadQuantizer(text=text, reason=f"{_dashed(option)} is there twice")
        options[_dashed(option)] = value
    return match[1], options


def with_options(quantizer: Any, name: str, options: Mapping[str, str]) -> Any:  # noqa: ANN401  # functions and instances
    """
    Return a registered quantizer with some of its options set from text; any value is one that `str` writes.

    Raises:
        BadOption: it has no such option, or the option does not take the value.
    """
    if not options:
        return quantizer
    fields = dataclasses.fields(quantizer) if isinstance(quantizer, WithOptions) else ()
    known = {_dashed(field.name): field.name for field in fields}
    hints = typing.get_type_hints(type(quantizer)) if fields else {}
    values: dict[str, Any] = {}
    for option, text in options.items():
        if option not in known:
            reason = near_names(option, known) if known else "it has no options"
            raise BadOption(name=name, option=f"the option {option}", reason=reason)
        hint = hints[known[option]]
        try:
            values[known[option]] = _read(text, hint)
        except ValueError:
            raise BadOption(name=name, option=f"{option}={text}", reason=f"it takes {_describe(hint)}") from None
    return dataclasses.replace(quantizer, **values)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _spell(value: bool | float | str | None) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    assert not isinstance(value, str) or _WORD.fullmatch(value), f"{value!r} cannot be read back"
    return repr(value) if isinstance(value, float) else str(value)


def _read(text: str, hint: Any) -> Any:  # noqa: ANN401  # a type hint, and a value of it
    """Read a value of a field; raises ValueError."""
    if typing.get_origin(hint) is Literal:
        return {str(word): word for word in typing.get_args(hint)}[_checked(text, map(str, typing.get_args(hint)))]
    if typing.get_origin(hint) in (Union, types.UnionType):
        left = [one for one in typing.get_args(hint) if one is not type(None)]
        return None if text == "none" and len(left) < len(typing.get_args(hint)) else _read(text, left[0])
    if hint is bool:
        return _checked(text, ("true", "false")) == "true"
    return hint(text)


def _checked(text: str, words: typing.Iterable[str]) -> str:
    if text not in set(words):
        raise ValueError(text)
    return text


def _describe(hint: Any) -> str:  # noqa: ANN401  # a type hint
    """Say a type hint in words: `float | None` is "a number, or none"."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if alternatives := typing.get_args(hint):
        return ", or ".join(map(_describe, alternatives))
    one = {int: "an integer", float: "a number", str: "a word", bool: "true or false", type(None): "none"}
    return one.get(hint, str(hint))
