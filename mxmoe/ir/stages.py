"""The four stages of a block, and what each admits and demands: the verifier's rules as one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from xdsl.ir import Operation
from xdsl.utils.exceptions import VerifyException

from mxmoe.ir.attrs import TableAttr
from mxmoe.ir.scheme import Scheme
from mxmoe.ir.table import Table

Stage = Literal["lifted", "annotated", "allocated", "lowered"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_STATISTICS = frozenset({"frequency", "mass"})
_ANNOTATIONS = frozenset({"sensitivity", "cost"})
_DECISIONS = frozenset({"choice"})


@dataclass(frozen=True)
class Rule:
    """What a block of one stage may and must hold, by op name without the dialect's prefix."""

    gemm: str
    """The op that stands for the matrix products: linear, or group_gemm once lowered."""
    may: frozenset[str] = frozenset()
    """Tables that ops of this stage may carry."""
    must: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """Op -> tables it must carry."""


RULES: Mapping[Stage, Rule] = {
    "lifted": Rule("linear"),
    "annotated": Rule("linear", may=_STATISTICS | _ANNOTATIONS),
    "allocated": Rule("linear", may=_STATISTICS | _ANNOTATIONS | _DECISIONS, must={"linear": _DECISIONS}),
    "lowered": Rule("group_gemm", may=_STATISTICS | _DECISIONS | {"tile", "kept"}, must={"group_gemm": _DECISIONS}),
}
_EVERYWHERE = frozenset({"route", "act", "combine", "yield"})
_AXES: Mapping[str, tuple[str, ...]] = {
    "frequency": ("expert",),
    "mass": ("expert",),
    "sensitivity": ("expert", "scheme"),
    "cost": ("expert", "scheme"),
    "choice": ("expert",),
    "kept": ("expert",),
    "tile": ("expert",),
}


def verify_block(stage: str, candidates: tuple[Scheme, ...], ops: Iterable[Operation]) -> None:
    """
    Check the ops of one block against the rules of its stage.

    Raises:
        VerifyException: an op or table that the stage does not admit or demands, a table whose axes do not match
            the bank's experts and the block's candidates, an index out of range, repeated candidates.
    """
    if stage not in STAGES:
        raise VerifyException(f"stage {stage!r} is none of {', '.join(STAGES)}")
    if not candidates or len(set(candidates)) != len(candidates):
        raise VerifyException(f"candidates must be distinct and at least one: [{', '.join(map(str, candidates))}]")
    rule = RULES[stage]
    for op in ops:
        kind = op.name.removeprefix("mxmoe.")
        if kind != rule.gemm and kind not in _EVERYWHERE:
            wrong = f"{_say(op)} does not belong in a block that is {stage}"
            raise VerifyException(f"{wrong}, whose products are mxmoe.{rule.gemm}")
        tables = {key: value.data for key, value in op.properties.items() if isinstance(value, TableAttr)}
        _verify_admitted(stage, rule, op, frozenset(tables))
        for key, table in tables.items():
            _verify_table(op, key, table, len(candidates))


def _verify_admitted(stage: str, rule: Rule, op: Operation, present: frozenset[str]) -> None:
    if extra := present - rule.may:
        names = ", ".join(sorted(extra))
        raise VerifyException(f"{_say(op)} carries {names}, which a block that is {stage} does not admit")
    if missing := rule.must.get(op.name.removeprefix("mxmoe."), frozenset()) - present:
        names = ", ".join(sorted(missing))
        raise VerifyException(f"{_say(op)} lacks {names}, which a block that is {stage} demands")


def _say(op: Operation) -> str:
    """Name an op by its role or bank: `mxmoe.linear role="gate"`."""
    return op.name + "".join(f" {key}={op.properties[key]}" for key in ("role", "bank") if key in op.properties)


def _experts(op: Operation) -> int:
    route = op if op.name == "mxmoe.route" else op.operands[1].owner
    return route.properties["experts"].value.data  # pyright: ignore  # an int property by the op's definition


def _verify_table(op: Operation, key: str, table: Table, n_candidates: int) -> None:
    """Axes by name, extents by the bank and the candidates, indices within what they point into."""
    extents = {"expert": _experts(op), "scheme": n_candidates}
    wanted = tuple(extents[axis] for axis in _AXES[key])
    if table.axes != _AXES[key] or table.shape != wanted:
        spelled = " x ".join(f"{axis}={extents[axis]}" for axis in _AXES[key])
        raise VerifyException(f"{key} of {_say(op)} is table<{table.head()}>, it must be over {spelled}")
    if key not in ("choice", "tile"):
        return
    limit = n_candidates if key == "choice" else len(getattr(op, "tiles", ()))
    if table.dtype not in ("i8", "i32", "i64"):
        raise VerifyException(f"{key} of {_say(op)} holds indices, so i8, i32 or i64, not {table.dtype}")
    if table.array.size and not (int(table.array.min()) >= 0 and int(table.array.max()) < limit):
        raise VerifyException(f"{key} of {_say(op)} points outside the {limit} entries it indexes")
