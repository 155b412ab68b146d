"""Options as fields of a frozen dataclass, spelled and read as `name{option=value option=value}`."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from xdsl.utils.arg_spec import ArgSpec, ArgSpecConvertible, parse_pipeline
from xdsl.utils.exceptions import ArgSpecParseError, ParseError

from mxmoe.errors import BadOption, BadPipeline
from mxmoe.registry import near_names

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_QUOTED = re.compile(r'("(?:[^"\\]|\\.)*")')


class Optioned(ArgSpecConvertible):
    """Something with a name and options: `allocate-bits{weight-bits=4.25}`, `pmq{gamma=1.0}`."""

    def __str__(self) -> str:
        """Spell it with the options that differ from their defaults, as it is read back."""
        options = " ".join(self.spelled_options(all_of_them=False))
        return f"{self.name}{{{options}}}" if options else self.name

    def spelled_options(self, *, all_of_them: bool = True) -> list[str]:
        """Spell the options, or those that differ from their defaults: ["tokens=1,2", "device"], the latter unset."""
        given = self.spec(include_default=all_of_them).parameters.items()
        return [f"{key.replace('_', '-')}{_equals(values)}" for key, values in given]


Kind = TypeVar("Kind", bound=ArgSpecConvertible)


def read_specs(text: str) -> list[ArgSpec]:
    """
    Read names and options; blanks and line breaks are free but within quotes.

    Raises:
        BadPipeline: the text does not parse.
    """
    parts = _QUOTED.split(text.strip())
    parts[::2] = [re.sub(r"\s*([,{}=])\s*", r"\1", part) for part in parts[::2]]
    try:
        return list(parse_pipeline("".join(parts)))
    except (ArgSpecParseError, ParseError) as error:
        raise BadPipeline(text=text, reason=_reason(error)) from error


def build_step(kind: type[Kind], spec: ArgSpec, options: Mapping[str, Any]) -> Kind:
    """
    Make an instance from its parsed spec and from the options that the spec leaves open.

    Raises:
        BadOption: an option that it does not have, or a value of another type.
    """
    hints = typing.get_type_hints(kind)
    # an ArgSpecConvertible is a dataclass by its own contract, which its type does not say
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(typing.cast("Any", kind))}
    values: dict[str, Any] = {}
    for option, given in spec.normalize_parameter_names().parameters.items():
        dashed = option.replace("_", "-")
        if dashed not in fields:
            raise BadOption(name=spec.name, option=f"the option {dashed}", reason=near_names(dashed, fields))
        if given == ("none",) and set(typing.get_args(hints[option])) in ({type(None), float}, {type(None), int}):
            given = ()  # a limit that is lifted, as the command line spells it; text may well be "none"
        values[option] = tuple(_number(value) if "float" in str(hints[option]) else value for value in given)
        try:
            kind.from_spec(ArgSpec(spec.name, {option: values[option]}))
        except ValueError as error:
            written = ",".join(map(str, given)) or "nothing"
            reason = f"it takes {_describe(hints[option])}"
            raise BadOption(name=spec.name, option=f"{dashed}={written}", reason=reason) from error
    step = kind.from_spec(ArgSpec(spec.name, values))
    left = {name: value for name, value in options.items() if name not in values}
    return dataclasses.replace(typing.cast("Any", step), **left) if left else step


def _reason(error: BaseException) -> str:
    """Take the sentence out of xDSL's message, whose other lines show the place in the text."""
    return str(error).strip().splitlines()[-1].strip(" ^").rstrip(".") or "it does not follow the grammar"


def _number(value: Any) -> Any:  # noqa: ANN401  # any option value; what is no number is left to the type check
    """Read an integer, and words like inf and 1e-5, where a float is wanted."""
    if type(value) is int:
        return float(value)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _describe(hint: Any) -> str:  # noqa: ANN401  # a type hint
    """Say a type hint in words: `tuple[float, ...] | None` is "numbers, or none"."""
    one = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    many = {int: "integers", float: "numbers", str: "texts", bool: "trues and falses"}
    if typing.get_origin(hint) is tuple:
        return many.get(typing.get_args(hint)[0], str(hint))
    if alternatives := typing.get_args(hint):
        return ", or ".join(map(_describe, alternatives))
    return one.get(hint, str(hint))


def _equals(values: tuple[bool | int | float | str, ...]) -> str:
    return f"={','.join(map(_spell, values))}" if values else ""


def _spell(value: bool | int | float | str) -> str:
    """Write one value so that it is read back as it is: 1e-05 as 1.0e-05, text in quotes unless it is one word."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa}{'' if '.' in mantissa or not e else '.0'}{e}{exponent}"
    if isinstance(value, int) or (_BARE.fullmatch(value) and value not in ("true", "false")):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'
