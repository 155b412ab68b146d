"""Names, and the values of the IR: schemes, tables, tiles, shapes, text and plans."""

from __future__ import annotations

from mxmoe.errors.base import MxmoeError


class UnknownName(MxmoeError):
    """A name that no table and no entry point knows."""

    message = "no {kind} named {name!r}; {near}"


class BrokenEntry(MxmoeError):
    """A registered name whose module or attribute cannot be loaded."""

    message = "the {kind} {name!r} is registered as {path!r}, which cannot be loaded: {reason}"


class BadScheme(MxmoeError):
    """A scheme string outside the grammar, or a combination of fields that has no meaning."""

    message = (
        "{text!r} is no scheme: {reason};"
        " write w<bits>a<bits>[_g<group>][_sym|_asym][_e4m3|_fp16][_iscale], bf16 or fp16"
    )


class BadTable(MxmoeError):
    """A table whose axes, shape, dtype or text do not fit together."""

    message = "bad table: {reason}"


class BadTile(MxmoeError):
    """A tile with an extent that is not a positive number."""

    message = "{text!r} is not a tile: {reason}; write m<rows>n<columns>k<depth>, e.g. m64n128k64"


class ElidedTable(MxmoeError):
    """Text that was printed for reading is being parsed."""

    message = (
        "table<{axes}> was printed elided, its values are gone; print the module whole with"
        " `mxmoe opt --full` or mxmoe.ir.print_ir(module, elide=None)"
    )


class BadRotation(MxmoeError):
    """A width that no Hadamard matrix rotates in blocks of the size that was asked for."""

    message = "{width} channels cannot be rotated in blocks of {block}: {reason}; {known}"


class BadShape(MxmoeError):
    """A block or bank whose sizes or names do not fit together."""

    message = "{what} cannot be: {reason}"


class BadText(MxmoeError):
    """Text that is no module of this dialect, or a module that its stage forbids."""

    message = "{name} is not a valid module:\n{reason}"


class BadPlan(MxmoeError):
    """A file that is no plan."""

    message = "{name} is not a plan: {reason}"


class PlanMismatch(MxmoeError):
    """A plan for another module."""

    message = "the plan does not fit the module: {reason}"
