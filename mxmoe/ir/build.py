"""Building a lifted module from plain shapes, and walking a module bank by bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    ArrayAttr,
    BFloat16Type,
    DictionaryAttr,
    Float16Type,
    Float32Type,
    FloatAttr,
    IntegerAttr,
    ModuleOp,
    StringAttr,
    TensorType,
    f64,
    i64,
)
from xdsl.ir import Block, Operation, Region, SSAValue

from mxmoe.errors import BadShape
from mxmoe.ir.attrs import RoutingType, SchemeAttr
from mxmoe.ir.chains import BANKS, ROLES
from mxmoe.ir.ops import ActOp, CombineOp, GroupGemmOp, LinearOp, MoeOp, RouteOp, YieldOp
from mxmoe.ir.scheme import Scheme

_ELEMENTS = {"bf16": BFloat16Type(), "fp16": Float16Type(), "fp32": Float32Type()}


@dataclass(frozen=True)
class BankShape:
    """One bank of a block: `experts` MLPs of one shape. A shared MLP is a bank of one expert that every token takes."""

    name: str
    """`routed` or `shared`."""
    experts: int
    """Number of experts; 1 for shared."""
    top_k: int
    """Assignments per token; 1 for shared."""
    intermediate: int
    """Width between up and down."""
    act: str
    """Name of the nonlinearity, e.g. silu."""
    gated: bool
    """Whether there is a gate beside up."""
    weights: Mapping[str, str]
    """Role -> name of the weights [experts, n, k]."""
    biases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Role -> name of the bias [experts, n]; empty without bias."""
    act_params: Mapping[str, float] = field(default_factory=dict[str, float])
    """Named numbers that the nonlinearity takes."""

    def __post_init__(self) -> None:
        roles = ROLES if self.gated else ROLES[1:]
        if self.name not in BANKS:
            raise BadShape(what=f"bank {self.name!r}", reason=f"a bank is one of {', '.join(BANKS)}")
        if min(self.experts, self.top_k, self.intermediate) < 1 or self.top_k > self.experts:
            raise BadShape(
                what=f"bank {self.name!r}",
                reason=f"top_k {self.top_k} of {self.experts} experts of width {self.intermediate}",
            )
        if set(self.weights) != set(roles) or not set(self.biases) <= set(roles):
            raise BadShape(what=f"bank {self.name!r}", reason=f"its weights must be named for {', '.join(roles)}")


@dataclass(frozen=True)
class BlockShape:
    """One MoE block: its path in the model, the width of a token, and its banks."""

    name: str
    """Path in the model, e.g. model.layers.0.mlp."""
    hidden: int
    """Width of a token."""
    banks: tuple[BankShape, ...]
    """Routed first, then shared if present."""
    dtype: str = "bf16"
    """Element type of the tokens: bf16, fp16 or fp32."""

    def __post_init__(self) -> None:
        if self.dtype not in _ELEMENTS or self.hidden < 1 or not self.banks:
            raise BadShape(
                what=f"block {self.name!r}",
                reason=f"{self.dtype} tokens of width {self.hidden} through {len(self.banks)} banks",
            )
        if len({bank.name for bank in self.banks}) != len(self.banks):
            raise BadShape(what=f"block {self.name!r}", reason="two of its banks have one name")


@dataclass(frozen=True)
class Bank:
    """A view of one chain of ops in a block."""

    route: RouteOp
    linears: Mapping[str, LinearOp]
    """Role -> linear; empty once lowered."""
    gemms: tuple[GroupGemmOp, ...]
    """Group GEMMs in order; empty before lowering."""
    act: ActOp
    combine: CombineOp

    @property
    def name(self) -> str:
        """`routed` or `shared`."""
        return self.route.bank

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.route.experts

    @property
    def top_k(self) -> int:
        """Assignments per token."""
        return self.route.top_k


def moe_ops(module: ModuleOp) -> list[MoeOp]:
    """All blocks of a module, in order."""
    return [op for op in module.ops if isinstance(op, MoeOp)]


def linears(module: ModuleOp) -> list[LinearOp]:
    """All linears of a module, in order of blocks, banks and roles."""
    return [op for moe in moe_ops(module) for op in moe.body.block.ops if isinstance(op, LinearOp)]


def banks(moe: MoeOp) -> dict[str, Bank]:
    """The banks of a block by name, in order."""
    found: dict[str, Bank] = {}
    for route in (op for op in moe.body.block.ops if isinstance(op, RouteOp)):
        users = [use.operation for use in route.routing.uses]
        chain = [op for op in moe.body.block.ops if op in users]
        combine = next(op for op in chain if isinstance(op, CombineOp))
        down = combine.rows.owner
        assert isinstance(down, LinearOp | GroupGemmOp), f"combine takes its rows from {down}"
        act = down.rows.owner
        assert isinstance(act, ActOp), f"down takes its rows from {act}"
        found[route.bank] = Bank(
            route=route,
            linears={op.role: op for op in chain if isinstance(op, LinearOp)},
            gemms=tuple(op for op in chain if isinstance(op, GroupGemmOp)),
            act=act,
            combine=combine,
        )
    return found


def rotations(module: ModuleOp) -> dict[str, int]:
    """Weight of a down linear -> channels that are rotated together; a weight that is not there is as it was."""
    found: dict[str, int] = {}
    for moe in moe_ops(module):
        for bank in banks(moe).values():
            if bank.act.hadamard:
                names = [op.weight for role, op in bank.linears.items() if role == "down"]
                names += [name for op in bank.gemms if op.role == "down" for name in op.weights]
                found |= dict.fromkeys(names, bank.act.hadamard)
    return found


def build_module(blocks: Sequence[BlockShape], candidates: Sequence[Scheme]) -> ModuleOp:
    """
    Build the lifted module of some blocks; every block gets the same candidates.

    Raises:
        BadShape: a shape that cannot be (BankShape and BlockShape check themselves), two blocks of one name, or
            candidates that repeat or are none.
    """
    names = [shape.name for shape in blocks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BadShape(what=f"block {repeated[0]!r}", reason="another block has this name")
    if (blocks and not candidates) or len(set(candidates)) != len(candidates):
        raise BadShape(what=f"candidates [{', '.join(map(str, candidates))}]", reason="give at least one, each once")
    return ModuleOp([_build_block(shape, candidates) for shape in blocks])


def _build_block(shape: BlockShape, candidates: Sequence[Scheme]) -> MoeOp:
    tokens = TensorType(_ELEMENTS[shape.dtype], [DYNAMIC_INDEX, shape.hidden])
    body = Block(arg_types=[tokens])
    body.args[0].name_hint = "x"
    outputs: list[SSAValue] = []
    for bank in shape.banks:
        ops = _build_bank(bank, body.args[0], shape)
        body.add_ops(ops)
        outputs.append(ops[-1].results[0])
    body.add_op(YieldOp.create(operands=outputs))
    return MoeOp.create(
        properties={
            "block": StringAttr(shape.name),
            "stage": StringAttr("lifted"),
            "candidates": ArrayAttr([SchemeAttr(scheme) for scheme in candidates]),
        },
        regions=[Region(body)],
    )


def _build_bank(bank: BankShape, tokens: SSAValue, shape: BlockShape) -> list[Operation]:
    element = _ELEMENTS[shape.dtype]
    hidden = TensorType(element, [DYNAMIC_INDEX, shape.hidden])
    inner = TensorType(element, [DYNAMIC_INDEX, bank.intermediate])
    route = RouteOp.create(
        operands=[tokens],
        result_types=[hidden, RoutingType()],
        properties={
            "bank": StringAttr(bank.name),
            "experts": IntegerAttr(bank.experts, i64),
            "top_k": IntegerAttr(bank.top_k, i64),
        },
    )

    def linear(role: str, rows: SSAValue, out: TensorType) -> LinearOp:
        properties = {"role": StringAttr(role), "weight": StringAttr(bank.weights[role])}
        if role in bank.biases:
            properties["bias"] = StringAttr(bank.biases[role])
        return LinearOp.create(operands=[rows, route.routing], result_types=[out], properties=properties)

    entries = [linear(role, route.rows, inner) for role in (ROLES[:2] if bank.gated else ROLES[1:2])]
    params = {key: FloatAttr(float(value), f64) for key, value in bank.act_params.items()}
    act = ActOp.create(
        operands=[op.out for op in entries],
        result_types=[inner],
        properties={"kind": StringAttr(bank.act), **({"params": DictionaryAttr(params)} if params else {})},
    )
    down = linear("down", act.out, hidden)
    combine = CombineOp.create(operands=[down.out, route.routing], result_types=[hidden])
    hints = ("rows", "routing"), *((op.role,) for op in entries), ("act",), ("down",), ("out",)
    ops: list[Operation] = [route, *entries, act, down, combine]
    for op, names in zip(ops, hints, strict=True):
        for result, hint in zip(op.results, names, strict=True):
            result.name_hint = hint
    return ops
