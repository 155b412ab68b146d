"""The shape of a block: one chain of ops per bank, of matching widths, whose outputs are summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xdsl.dialects.builtin import TensorType
from xdsl.ir import Block, Operation, SSAValue
from xdsl.utils.exceptions import VerifyException

from mxmoe.errors import BadRotation
from mxmoe.ir.hadamard import check_rotation

ROLES = ("gate", "up", "down")
BANKS = ("routed", "shared")
_ENTRIES = (["gate", "up"], ["up"], ["gate_up"])


def verify_chains(block: Block) -> None:
    """
    Check that every bank of a block is route, gate and up (or up, or both in one), act, down, combine; and the yield.

    Raises:
        VerifyException: the tokens are no tensor [tokens, hidden], an unknown or repeated bank, numbers of experts that
            cannot be, roles that do not make an expert, an op that reads from the wrong place, widths that differ.
    """
    if [isinstance(arg.type, TensorType) and arg.type.get_num_dims() for arg in block.args] != [2]:
        raise VerifyException("the block takes one argument, the tokens [tokens, hidden]")
    ops = list(block.ops)
    routes = [op for op in ops if op.name == "mxmoe.route"]
    names = [_property(op, "bank") for op in routes]
    if not names or len(set(names)) != len(names) or not set(names) <= set(BANKS):
        found = ", ".join(names) or "none"
        raise VerifyException(f"the banks are {found}; they can be {' and '.join(BANKS)}, each once")
    outs = [_verify_bank(route, block.args[0], ops) for route in routes]
    last = ops[-1]
    if last.name != "mxmoe.yield" or set(last.operands) != set(outs) or len(last.operands) != len(outs):
        raise VerifyException("mxmoe.yield takes the combined output of every bank, each once")


def _verify_bank(route: Operation, tokens: SSAValue, ops: Sequence[Operation]) -> SSAValue:
    """Follow the chain of one bank and return its output."""
    bank, experts, top_k = (_property(route, key) for key in ("bank", "experts", "top_k"))
    if not 1 <= top_k <= experts:
        raise VerifyException(f"bank {bank} chooses {top_k} of {experts} experts")
    _expect(route, [tokens], f"route of bank {bank} takes the tokens")
    chain = [op for op in ops if len(op.operands) > 1 and op.operands[1] is route.results[1]]
    gemms = [op for op in chain if "role" in op.properties]
    combines = [op for op in chain if "role" not in op.properties]
    roles = [_property(op, "role") for op in gemms]
    if roles[-1:] != ["down"] or roles[:-1] not in _ENTRIES or [op.name for op in combines] != ["mxmoe.combine"]:
        found = ", ".join([*roles, *(op.name for op in combines)]) or "nothing"
        raise VerifyException(f"bank {bank} is gate, up, down (or up, down) and one mxmoe.combine, not {found}")
    *entries, down = gemms
    for op in gemms:
        _verify_names(op, bank)
    for op in entries:
        _expect(op, route.results[:1], f"{_property(op, 'role')} of bank {bank} takes the rows of its route")
    act = down.operands[0].owner
    if not (isinstance(act, Operation) and act.name == "mxmoe.act"):
        raise VerifyException(f"down of bank {bank} takes its rows from mxmoe.act")
    inner = [result for op in entries for result in op.results]
    if list(act.operands) != inner:
        wanted = " and ".join(roles[:-1])
        raise VerifyException(f"mxmoe.act of bank {bank} takes the results of {wanted}, in this order")
    _expect(combines[0], down.results, f"mxmoe.combine of bank {bank} takes the rows of down")
    _verify_widths(bank, "hidden", [tokens, route.results[0], down.results[0], combines[0].results[0]])
    _verify_widths(bank, "inner", [*inner, act.results[0]])
    _verify_rotation(act)
    return combines[0].results[0]


def _verify_names(op: Operation, bank: str) -> None:
    """Check that a group GEMM has a result and a weight for each of its roles, and a bias for each or for none."""
    role, n_results = _property(op, "role"), len(op.results)
    n_weights = len(op.properties["weights"].data) if "weights" in op.properties else 1  # pyright: ignore  # an array
    n_biases = len(op.properties["biases"].data) if "biases" in op.properties else 0  # pyright: ignore  # an array
    if not (role.count("_") + 1 == n_results == n_weights and n_biases in (0, n_weights)):
        found = f"{n_results} results, {n_weights} weights and {n_biases} biases"
        raise VerifyException(f"{role} of bank {bank} has {found}")


def _verify_rotation(act: Operation) -> None:
    """Check that the channels behind a nonlinearity can be rotated as it says."""
    kind = act.results[0].type
    if "hadamard" in act.properties and isinstance(kind, TensorType):
        try:
            check_rotation(kind.get_shape()[-1], _property(act, "hadamard"))
        except BadRotation as error:
            raise VerifyException(f"mxmoe.act hadamard={_property(act, 'hadamard')}: {error}") from error


def _expect(op: Operation, values: Sequence[SSAValue], rule: str) -> None:
    if list(op.operands[:1]) != list(values):
        raise VerifyException(rule)


def _verify_widths(bank: str, what: str, values: Sequence[SSAValue]) -> None:
    types = [value.type for value in values]
    shapes: list[tuple[int, ...]] = [kind.get_shape() if isinstance(kind, TensorType) else () for kind in types]
    if {len(shape) for shape in shapes} != {2} or len({shape[-1] for shape in shapes}) != 1 or shapes[0][-1] < 1:
        found = ", ".join("x".join("?" if extent < 0 else str(extent) for extent in shape) for shape in shapes)
        raise VerifyException(f"bank {bank} has {what} tensors of {found}; all are [rows, width] of one width")


def _property(op: Operation, key: str) -> Any:  # noqa: ANN401  # a str or int, by the op's definition
    attribute: Any = op.properties[key]
    return attribute.value.data if key in ("experts", "top_k", "hadamard") else attribute.data
