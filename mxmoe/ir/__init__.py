"""The `mxmoe` dialect on xDSL: schemes, tables and tiles; the ops of a block; its four stages; its text."""

from xdsl.dialects.builtin import ModuleOp

from mxmoe.ir.attrs import RoutingType, SchemeAttr, TableAttr, TileAttr
from mxmoe.ir.build import Bank, BankShape, BlockShape, banks, build_module, linears, moe_ops, rotations
from mxmoe.ir.chains import BANKS, ROLES
from mxmoe.ir.drop import drop_experts, kept_experts
from mxmoe.ir.graph import critical_path, op_graph
from mxmoe.ir.hadamard import check_rotation, hadamard_base, paley_field, rotation_blocks
from mxmoe.ir.ops import (
    MXMOE,
    ActOp,
    CombineOp,
    GroupGemmOp,
    LinearOp,
    MoeOp,
    RouteOp,
    YieldOp,
)
from mxmoe.ir.plan import Allocation, Plan, Row, allocation_of, apply_plan, fingerprint, plan_of, rotations_of, rows_of
from mxmoe.ir.scheme import Scheme
from mxmoe.ir.stages import RULES, STAGES, Stage
from mxmoe.ir.table import Table
from mxmoe.ir.text import context, parse_ir, print_ir
from mxmoe.ir.tile import Tile

__all__ = [
    "BANKS",
    "MXMOE",
    "ROLES",
    "RULES",
    "STAGES",
    "ActOp",
    "Allocation",
    "Bank",
    "BankShape",
    "BlockShape",
    "CombineOp",
    "GroupGemmOp",
    "LinearOp",
    "ModuleOp",
    "MoeOp",
    "Plan",
    "RouteOp",
    "RoutingType",
    "Row",
    "Scheme",
    "SchemeAttr",
    "Stage",
    "Table",
    "TableAttr",
    "Tile",
    "TileAttr",
    "YieldOp",
    "allocation_of",
    "apply_plan",
    "banks",
    "build_module",
    "check_rotation",
    "context",
    "critical_path",
    "drop_experts",
    "fingerprint",
    "hadamard_base",
    "kept_experts",
    "linears",
    "moe_ops",
    "op_graph",
    "paley_field",
    "parse_ir",
    "plan_of",
    "print_ir",
    "rotation_blocks",
    "rotations",
    "rotations_of",
    "rows_of",
]
