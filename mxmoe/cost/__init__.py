"""What a choice costs in time: cost models of one tile, the launch they add up to, and the tables that a pass needs."""

from mxmoe.cost.launches import block_launches, fuse_gate_up
from mxmoe.cost.measured import Measured, Profile
from mxmoe.cost.model import COST_MODELS, CostModel, cost_model
from mxmoe.cost.predict import (
    Gemm,
    best_tile,
    expected_rows,
    linear_cost_us,
    predict_block_us,
    predict_launch,
)
from mxmoe.cost.roofline import Roofline
from mxmoe.cost.schedule import Schedule, fixed_stride, in_order, longest_first, start_times
from mxmoe.cost.simulate import LaunchClass, LaunchPlan, TileList, lay_tiles, plan_launch, simulate_launch

__all__ = [
    "COST_MODELS",
    "CostModel",
    "Gemm",
    "LaunchClass",
    "LaunchPlan",
    "Measured",
    "Profile",
    "Roofline",
    "Schedule",
    "TileList",
    "best_tile",
    "block_launches",
    "cost_model",
    "expected_rows",
    "fixed_stride",
    "fuse_gate_up",
    "in_order",
    "lay_tiles",
    "linear_cost_us",
    "longest_first",
    "plan_launch",
    "predict_block_us",
    "predict_launch",
    "simulate_launch",
    "start_times",
]
