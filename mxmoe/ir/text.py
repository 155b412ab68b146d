"""The text of a module: print it, whole or for reading, and parse it back exactly."""

from __future__ import annotations

from io import StringIO

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin, ModuleOp
from xdsl.parser import Parser
from xdsl.utils.exceptions import ParseError, VerifyException

from mxmoe.errors import BadText
from mxmoe.ir.attrs import ReadingPrinter
from mxmoe.ir.ops import MXMOE
from mxmoe.ir.table import Table

_WINDOW = 160
"""Characters of a line that a message shows."""


def context() -> Context:
    """Return an xDSL context that knows the builtin dialect and ours."""
    known = Context()
    known.load_dialect(Builtin)
    known.load_dialect(MXMOE)
    return known


def print_ir(module: ModuleOp, *, elide: int | None = Table.ELIDE_ABOVE, generic: bool = False) -> str:
    """
    Write a module as text.

    Args:
        module: the module.
        elide: tables with more values than this are shortened to their shape, minimum and maximum, and the text can
            then be read by people only; None prints every value, and `parse_ir` is the inverse.
        generic: MLIR's generic form, which other tools read, in place of the readable one.
    """
    stream = StringIO()
    printer = ReadingPrinter(stream=stream, print_generic_format=generic)
    printer.elide = elide
    printer.print_op(module)
    return stream.getvalue() + "\n"


def parse_ir(text: str, *, name: str = "<text>") -> ModuleOp:
    """
    Read a module from its text, readable or generic, and verify it.

    Raises:
        BadText: the text does not parse or the module does not verify; the message has the line with a caret.
    """
    try:
        module = Parser(context(), text, name).parse_module()
        module.verify()
    except (ParseError, VerifyException) as error:
        raise BadText(name=name, reason=_shorten(str(error).strip())) from error
    return module


def _shorten(message: str) -> str:
    """Show the text around the caret only: a line of a module may hold a table of thousands of numbers."""
    lines = message.splitlines()
    at = next((i for i, line in enumerate(lines) if i and line.strip() and not line.strip(" ^")), None)
    if at is None or len(lines[at - 1]) <= _WINDOW:
        return message
    start = max(0, lines[at].index("^") - _WINDOW // 2)
    below = [line[start:] if line[:start].isspace() else line for line in lines[at:]]
    return "\n".join([*lines[: at - 1], lines[at - 1][start : start + _WINDOW], *below])
