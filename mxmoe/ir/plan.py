"""The plan: one scheme per row, with what it was solved for and from, as a JSON file that diffs line by line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from xdsl.dialects.builtin import DictionaryAttr, FloatAttr, ModuleOp, StringAttr, f64
from xdsl.ir import Attribute

from mxmoe.errors import BadPlan, BadRotation, BadScheme, PlanMismatch
from mxmoe.files import write_whole
from mxmoe.ir.build import banks, linears, moe_ops
from mxmoe.ir.drop import broken_experts
from mxmoe.ir.hadamard import check_rotation
from mxmoe.ir.scheme import Scheme
from mxmoe.ir.table import Table
from mxmoe.ir.text import print_ir

FORMAT = "mxmoe-plan-1"
_ATTRIBUTE = "mxmoe.allocation"


class Row(NamedTuple):
    """The key of one decision."""

    block: str
    bank: str
    role: str
    expert: int


@dataclass(frozen=True)
class Allocation:
    """How a plan came about: what was asked, what was reached, and what it was solved from."""

    budget: Mapping[str, float]
    """Limits that were set, by name: weight_bits, bytes, latency_us."""
    objective: Mapping[str, float | str]
    """What was minimised, e.g. {"name": "loss_time", "r": 0.75}."""
    solver: str
    """Name of the solver."""
    value: float
    """Objective reached."""
    bound: float
    """Proved lower bound of the objective."""
    gap: float
    """(value - bound) / value: how much is at most left to gain."""
    loss: float
    """Sum of the sensitivities chosen."""
    time_us: float
    """Sum of the costs chosen, in microseconds."""
    weight_bits: float
    """Average effective bits per weight."""
    nbytes: float
    """Bytes of codes, scales and zero points."""
    solved_from: str
    """SHA-256 of the whole text of the annotated module, see `fingerprint`."""


@dataclass(frozen=True)
class Plan:
    """
    One scheme per (block, bank, role, expert).

    `Plan.from_json(plan.to_json()) == plan`; `plan.hash` changes when any scheme or any of the allocation does.

    Raises:
        BadPlan: text that is no plan, or names a scheme outside the grammar.
        PlanMismatch: the plan is applied to a module with other blocks, experts or candidates.
    """

    rows: Mapping[Row, Scheme]
    """Every decision, in the order of the module."""
    allocation: Allocation | None = None
    """None for a plan written by hand."""
    rotations: Mapping[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """(block, bank) -> channels that are rotated together on their way to down; banks that are not there are not."""

    @property
    def hash(self) -> str:
        """SHA-256 of the JSON form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def dropped(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(block, bank) -> experts that have no bits; banks that keep all are left out."""
        found: dict[tuple[str, str], dict[int, None]] = {}
        for row in (row for row, scheme in self.rows.items() if scheme.is_dropped):
            found.setdefault((row.block, row.bank), {})[row.expert] = None
        return {key: tuple(experts) for key, experts in found.items()}

    def to_json(self) -> str:
        """Write the plan as JSON, one row a line."""
        blocks: dict[str, dict[str, str]] = {}
        for row, scheme in self.rows.items():
            blocks.setdefault(row.block, {})[f"{row.bank}.{row.role}.{row.expert}"] = str(scheme)
        turned: dict[str, dict[str, int]] = {}
        for (block, bank), size in self.rotations.items():
            turned.setdefault(block, {})[bank] = size
        document = {
            "format": FORMAT,
            "allocation": asdict(self.allocation) if self.allocation else None,
            **({"rotations": turned} if turned else {}),
            "schemes": blocks,
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, name: str = "<text>") -> Plan:
        """Read a plan from its JSON form; the inverse of `to_json`."""
        try:
            document: Any = json.loads(text, object_pairs_hook=_distinct)
            found = document.get("format") if isinstance(document, dict) else None
            if found != FORMAT:
                raise ValueError(f"its format is {found!r}, not {FORMAT!r}")
            if missing := {"allocation", "schemes"} - set(document):
                raise ValueError(f"it has no {' and no '.join(sorted(missing))}")
            allocation = document["allocation"]
            return cls(
                dict(_read_rows(document["schemes"])),
                None if allocation is None else _read(allocation),
                dict(_read_rotations(document.get("rotations", {}))),
            )
        except (ValueError, BadScheme) as error:
            raise BadPlan(name=name, reason=error) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form to a file, whole or not at all."""
        write_whole(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadPlan(name=str(path), reason=f"it is no UTF-8 text ({error.reason})") from error
        return cls.from_json(text, name=str(path))

    def histogram(self) -> dict[Scheme, int]:
        """Count the rows of each scheme, most frequent first."""
        counts: dict[Scheme, int] = {}
        for scheme in self.rows.values():
            counts[scheme] = counts.get(scheme, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of a JSON object, whose keys may repeat: the last would win in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _read_rows(blocks: Any) -> Iterator[tuple[Row, Scheme]]:  # noqa: ANN401  # whatever the JSON holds
    if not (isinstance(blocks, dict) and all(isinstance(rows, dict) for rows in blocks.values())):
        raise ValueError("schemes is no object of blocks, each an object of rows")
    for block, rows in blocks.items():
        for key, scheme in rows.items():
            bank, role, expert = (key.split(".") + [""] * 2)[:3]
            if key.count(".") != 2 or not expert.isdecimal() or str(int(expert)) != expert:
                raise ValueError(f"{block!r} has a row {key!r}; write bank.role.expert, e.g. routed.gate.0")
            if not isinstance(scheme, str):
                raise ValueError(f"{block!r} {key!r} is {scheme!r}, no scheme")
            yield Row(block, bank, role, int(expert)), Scheme.parse(scheme)


def _read_rotations(blocks: Any) -> Iterator[tuple[tuple[str, str], int]]:  # noqa: ANN401  # whatever the JSON holds
    if not (isinstance(blocks, dict) and all(isinstance(banks, dict) for banks in blocks.values())):
        raise ValueError("rotations is no object of blocks, each an object of banks")
    for block, found in blocks.items():
        for bank, size in found.items():
            if type(size) is not int:
                raise ValueError(f"the rotation of {block!r} {bank!r} is {size!r}, no number of channels")
            yield (block, bank), size


def _read(allocation: Any) -> Allocation:  # noqa: ANN401  # whatever the JSON holds
    """Make an allocation of its parts once their names and types are seen to be right."""
    kinds = {"str": str, "float": (int, float)}
    known = {field.name: kinds.get(str(field.type), dict) for field in fields(Allocation)}
    found = set(allocation) if isinstance(allocation, dict) else set[str]()
    if odd := sorted(found ^ set(known)):
        raise ValueError(f"its allocation {'has a strange' if odd[0] in found else 'lacks'} {odd[0]!r}")
    for name, kind in known.items():
        if not isinstance(allocation[name], kind):
            raise ValueError(f"{name} of its allocation is {allocation[name]!r}")
    return Allocation(**allocation)


def rows_of(module: ModuleOp) -> list[Row]:
    """All rows of a module that is not lowered yet, in the order in which plans and problems list them."""
    return [
        Row(moe.block, bank.name, role, expert)
        for moe in moe_ops(module)
        for bank in banks(moe).values()
        for role in bank.linears
        for expert in range(bank.experts)
    ]


def fingerprint(module: ModuleOp) -> str:
    """SHA-256 of the whole text of a module as annotated: choices made since change nothing."""
    bare = module.clone()
    bare.attributes.pop(_ATTRIBUTE, None)
    for moe in moe_ops(bare):
        moe.stage = "annotated"
    for op in linears(bare):
        op.set_table("choice", None)
    return hashlib.sha256(print_ir(bare, elide=None).encode()).hexdigest()


def plan_of(module: ModuleOp) -> Plan:
    """
    Read the plan out of an allocated module.

    Raises:
        PlanMismatch: a linear has no choice yet.
    """
    rows: dict[Row, Scheme] = {}
    for moe in moe_ops(module):
        for bank in banks(moe).values():
            for role, op in bank.linears.items():
                if op.choice is None:
                    where = f"{moe.block} {bank.name} {role}"
                    raise PlanMismatch(reason=f"{where} has no choice yet; run allocate-bits first")
                for expert, index in enumerate(op.choice.array.tolist()):
                    rows[Row(moe.block, bank.name, role, expert)] = moe.candidates[index]
    return Plan(rows, allocation_of(module), rotations_of(module))


def rotations_of(module: ModuleOp) -> dict[tuple[str, str], int]:
    """(block, bank) -> channels that are rotated together on their way to down, as a plan lists them."""
    return {
        (moe.block, name): bank.act.hadamard
        for moe in moe_ops(module)
        for name, bank in banks(moe).items()
        if bank.act.hadamard
    }


def allocation_of(module: ModuleOp) -> Allocation | None:
    """Say how the choices of an allocated or lowered module came about; None where they were written by hand."""
    stored = module.attributes.get(_ATTRIBUTE)
    return Allocation(**_from_attribute(stored)) if isinstance(stored, DictionaryAttr) else None


def _to_attribute(value: Mapping[str, Any] | float | str) -> Attribute:
    """Write numbers, text and names for these as an attribute that a person can read."""
    if isinstance(value, Mapping):
        return DictionaryAttr({key: _to_attribute(part) for key, part in value.items()})
    return StringAttr(value) if isinstance(value, str) else FloatAttr(float(value), f64)


def _from_attribute(attribute: Attribute) -> Any:  # noqa: ANN401  # as given to its inverse
    """Undo `_to_attribute`."""
    if isinstance(attribute, DictionaryAttr):
        return {key: _from_attribute(part) for key, part in attribute.data.items()}
    assert isinstance(attribute, StringAttr | FloatAttr), f"{_ATTRIBUTE} holds {attribute}"
    return attribute.data if isinstance(attribute, StringAttr) else attribute.value.data


def apply_plan(module: ModuleOp, plan: Plan) -> None:
    """
    Write a plan's choices and rotations into a module in place, and make its blocks allocated.

    A bank without a rotation in the plan keeps the module's own.

    Raises:
        PlanMismatch: rows that the module lacks, rows that the plan lacks, a scheme that is no candidate, w0 for a part
            of an expert or for too many, or a rotation that does not fit or is another one than the module's; the
            module is left as it was.
    """
    for moe in moe_ops(module):
        if moe.stage == "lowered":
            raise PlanMismatch(reason=f"{moe.block} is lowered already; apply a plan to an earlier stage")
    wanted, given = set(rows_of(module)), set(plan.rows)
    if wanted != given:
        odd = sorted(wanted ^ given)[0]
        side = "the plan lacks" if odd in wanted else "the module lacks"
        raise PlanMismatch(reason=f"{side} {len(wanted ^ given)} rows, the first is {'/'.join(map(str, odd))}")
    for moe in moe_ops(module):
        for row in (row for row in plan.rows if row.block == moe.block and plan.rows[row] not in moe.candidates):
            known = ", ".join(map(str, moe.candidates))
            raise PlanMismatch(reason=f"{'/'.join(map(str, row))} wants {plan.rows[row]}, the candidates are {known}")
        for name, bank in banks(moe).items():
            own = {r: [plan.rows[Row(moe.block, name, r, e)] for e in range(bank.experts)] for r in bank.linears}
            if reason := broken_experts(own, bank.top_k):
                raise PlanMismatch(reason=f"{moe.block} {name}: {reason}")
    _check_rotations(module, plan)
    for moe in moe_ops(module):
        for bank in banks(moe).values():
            bank.act.hadamard = plan.rotations.get((moe.block, bank.name), bank.act.hadamard)
            for role, op in bank.linears.items():
                schemes = [plan.rows[Row(moe.block, bank.name, role, expert)] for expert in range(bank.experts)]
                choice = np.array([moe.candidates.index(scheme) for scheme in schemes], dtype=np.int8)
                op.set_table("choice", Table(("expert",), choice))
        moe.stage = "allocated"
    module.attributes.pop(_ATTRIBUTE, None)  # of a plan that was applied before
    if plan.allocation:
        module.attributes[_ATTRIBUTE] = _to_attribute(asdict(plan.allocation))


def _check_rotations(module: ModuleOp, plan: Plan) -> None:
    """Raise PlanMismatch unless every rotation of the plan can be written into the module."""
    found = {(moe.block, name): bank for moe in moe_ops(module) for name, bank in banks(moe).items()}
    for (block, name), size in plan.rotations.items():
        where = f"{block} {name}"
        if (block, name) not in found:
            raise PlanMismatch(reason=f"it rotates {where}, which the module lacks")
        bank = found[block, name]
        if bank.act.hadamard not in (0, size):
            reason = f"it rotates {where} in blocks of {size}, the module in blocks of {bank.act.hadamard}"
            raise PlanMismatch(reason=reason)
        try:
            check_rotation(bank.linears["down"].k, size)
        except BadRotation as error:
            raise PlanMismatch(reason=f"{where}: {error}") from error
