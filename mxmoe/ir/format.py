"""The text of every op of the dialect: `%r = mxmoe.linear(%x, %y) role="gate" experts=4 : (...) -> ...`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from xdsl.dialects.builtin import ArrayAttr, DictionaryAttr, IntegerAttr, StringAttr, i64
from xdsl.ir import Attribute, Region
from xdsl.irdl import IRDLOperation
from xdsl.parser import Parser
from xdsl.printer import Printer

from mxmoe.ir.attrs import SchemeAttr, TableAttr, TileAttr


def _print_list(printer: Printer, values: Sequence[Attribute]) -> None:
    with printer.in_square_brackets():
        printer.print_list(values, lambda value: _print_value(printer, value))


def _print_value(printer: Printer, value: Attribute) -> None:
    """Write a property the short way: a bare number, scheme or tile, `table<...>`, a list, or as MLIR does."""
    match value:
        case IntegerAttr():
            printer.print_string(str(value.value.data))
        case SchemeAttr() | TileAttr():
            printer.print_string(str(value.data))
        case TableAttr():
            printer.print_string("table")
            value.print_parameter(printer)
        case ArrayAttr():
            _print_list(printer, value.data)
        case _:
            printer.print_attribute(value)


def parse_table(parser: Parser) -> Attribute:
    """Read `table<...>`."""
    parser.parse_keyword("table")
    return TableAttr(TableAttr.parse_parameter(parser))


def parse_int(parser: Parser) -> Attribute:
    """Read a bare integer."""
    return IntegerAttr(parser.parse_integer(allow_boolean=False), i64)


def parse_text(parser: Parser) -> Attribute:
    """Read a string literal, in any script: xDSL reads escapes beyond ASCII as bytes."""
    raw = parser.parse_optional_bytes_literal()
    return StringAttr(parser.parse_str_literal() if raw is None else raw.decode("utf-8", errors="replace"))


def parse_dict(parser: Parser) -> Attribute:
    """Read a dictionary `{alpha = 1.5 : f64}`."""
    attribute = parser.parse_attribute()
    if not isinstance(attribute, DictionaryAttr):
        parser.raise_error("a dictionary {name = value, ...} expected")
    return attribute


def list_of(element: Callable[[Parser], Attribute]) -> Callable[[Parser], Attribute]:
    """Read `[a, b, ...]` with a reader for the elements."""
    return lambda parser: ArrayAttr(
        parser.parse_comma_separated_list(parser.Delimiter.SQUARE, lambda: element(parser))
    )


def parse_scheme(parser: Parser) -> Attribute:
    """Read a bare scheme."""
    return SchemeAttr(SchemeAttr.parse_bare(parser))


def parse_tile(parser: Parser) -> Attribute:
    """Read a bare tile."""
    return TileAttr(TileAttr.parse_bare(parser))


def _property_name(parser: Parser) -> str | None:
    """Read the next property's name; the keyword `attributes` opens what does not belong to the dialect."""
    state = parser._parser_state.current_token  # pyright: ignore[reportPrivateUsage]  # xDSL has no public look-ahead
    return None if state.text == "attributes" else parser.parse_optional_identifier()


class ReadableOp(IRDLOperation):
    """
    An op whose text lists its operands, its properties as `key=value` in the order of `READERS`, and its types.

    One mixin writes and reads every op, so a new property is one line in `READERS` and prints and parses at once.
    """

    READERS: ClassVar[dict[str, Callable[[Parser], Attribute]]] = {}
    """Property name -> how its value is read; the order is the order of printing."""

    def print(self, printer: Printer) -> None:
        """Write what follows the op's name."""
        if self.operands:
            with printer.in_parens():
                printer.print_list(self.operands, printer.print_operand)
        for key in self.READERS:
            if key in self.properties:
                printer.print_string(f" {key}=")
                _print_value(printer, self.properties[key])
        if self.attributes:
            printer.print_op_attributes(self.attributes, print_keyword=True)
        if self.operands or self.results:
            printer.print_string(" : ")
            printer.print_operation_type(self)
        for region in self.regions:
            printer.print_string(" ")
            printer.print_region(region)

    @classmethod
    def parse(cls, parser: Parser) -> ReadableOp:
        """Read what follows the op's name; the inverse of `print`."""
        parens = parser.Delimiter.PAREN
        unresolved = parser.parse_optional_comma_separated_list(parens, parser.parse_unresolved_operand) or []
        properties: dict[str, Attribute] = {}
        while (key := _property_name(parser)) is not None:
            if key not in cls.READERS:
                parser.raise_error(f"{cls.name} has no property {key!r}; it has {', '.join(cls.READERS)}")
            parser.parse_punctuation("=")
            properties[key] = cls.READERS[key](parser)
        attributes = parser.parse_optional_attr_dict_with_keyword()
        operand_types: Sequence[Attribute] = ()
        result_types: Sequence[Attribute] = ()
        if parser.parse_optional_punctuation(":"):
            function_type = parser.parse_function_type()
            operand_types, result_types = function_type.inputs.data, function_type.outputs.data
        operands = parser.resolve_operands(unresolved, operand_types, parser.pos)
        regions: list[Region] = []
        while (region := parser.parse_optional_region()) is not None:
            regions.append(region)
        return cls.create(
            operands=operands,
            result_types=result_types,
            properties=properties,
            attributes=attributes.data if attributes else {},
            regions=regions,
        )
