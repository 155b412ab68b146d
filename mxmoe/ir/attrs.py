"""Attributes and types of the dialect: scheme, table and tile as xDSL data, and the routing type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from xdsl.ir import Data, ParametrizedAttribute, TypeAttribute
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer

from mxmoe.errors import MxmoeError
from mxmoe.ir.scheme import Scheme
from mxmoe.ir.table import Table
from mxmoe.ir.tile import Tile

_Value = TypeVar("_Value")


class ReadingPrinter(Printer):
    """A printer that elides tables of more than `elide` values; what it prints is for people, not for the parser."""

    elide: int | None = None

    def print_string_literal(self, string: str) -> None:
        """Write text as it is where nothing needs an escape: xDSL escapes all but ASCII, which nobody can read."""
        if string.isprintable() and not set(string) & {'"', "\\"}:
            self.print_string(f'"{string}"')
        else:
            super().print_string_literal(string)


def _word(parser: AttrParser) -> str:
    return parser.parse_identifier(context_msg=" expected, a scheme or a tile")


@irdl_attr_definition
class SchemeAttr(Data[Scheme]):
    """`#mxmoe.scheme<w4a16_g128_asym>`."""

    name = "mxmoe.scheme"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Scheme:
        """Read `<w4a16_g128_asym>`."""
        with parser.in_angle_brackets():
            return cls.parse_bare(parser)

    @classmethod
    def parse_bare(cls, parser: AttrParser) -> Scheme:
        """Read a scheme without brackets, as it stands in a candidate list."""
        return _or_parse_error(parser, lambda: Scheme.parse(_word(parser)))

    def print_parameter(self, printer: Printer) -> None:
        """Write `<w4a16_g128_asym>`."""
        printer.print_string(f"<{self.data}>")


@irdl_attr_definition
class TileAttr(Data[Tile]):
    """`#mxmoe.tile<m64n128k64>`."""

    name = "mxmoe.tile"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Tile:
        """Read `<m64n128k64>`."""
        with parser.in_angle_brackets():
            return cls.parse_bare(parser)

    @classmethod
    def parse_bare(cls, parser: AttrParser) -> Tile:
        """Read a tile without brackets, as it stands in a tile list."""
        return _or_parse_error(parser, lambda: Tile.parse(_word(parser)))

    def print_parameter(self, printer: Printer) -> None:
        """Write `<m64n128k64>`."""
        printer.print_string(f"<{self.data}>")


@irdl_attr_definition
class TableAttr(Data[Table]):
    """`#mxmoe.table<expert=2 x scheme=2, f32: "1.0 inf; 2.5 nan">`."""

    name = "mxmoe.table"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Table:
        """Read `<expert=2 x scheme=2, f32: "1.0 inf; 2.5 nan">`; elided text is refused."""
        with parser.in_angle_brackets():
            extents = [_extent(parser)]
            while parser.parse_optional_keyword("x"):
                extents.append(_extent(parser))
            parser.parse_punctuation(",")
            dtype = parser.parse_identifier()
            if parser.parse_optional_keyword("elided"):
                return _or_parse_error(parser, lambda: Table.from_text(tuple(extents), dtype, None))
            parser.parse_punctuation(":")
            body = parser.parse_str_literal()
            return _or_parse_error(parser, lambda: Table.from_text(tuple(extents), dtype, body))

    def print_parameter(self, printer: Printer) -> None:
        """Write the table, elided if the printer is one for reading and the table is long."""
        table = self.data
        limit = printer.elide if isinstance(printer, ReadingPrinter) else None
        if limit is not None and table.array.size > limit:
            printer.print_string(f"<{table.head()} {table.summary()}>")
        else:
            printer.print_string(f'<{table.head()}: "{table.body()}">')


@irdl_attr_definition
class RoutingType(ParametrizedAttribute, TypeAttribute):
    """`!mxmoe.routing`: which assignment (token, slot) each dispatched row belongs to, and to which expert it went."""

    name = "mxmoe.routing"


def _extent(parser: AttrParser) -> tuple[str, int]:
    axis = parser.parse_identifier()
    parser.parse_punctuation("=")
    return axis, parser.parse_integer(allow_boolean=False, allow_negative=False)


def _or_parse_error(parser: AttrParser, read: Callable[[], _Value]) -> _Value:
    """Put the place in the text beside a mistake in a value: xDSL prints the line with a caret."""
    start = parser.pos
    try:
        return read()
    except MxmoeError as error:
        parser.raise_error(str(error), start, parser.pos)
