"""What a choice costs in time: cost models of one tile, the launch they add up to, and the tables that a pass needs."""

from mxmoe.cost.fit import Observation, fit_profile
from mxmoe.cost.launches import block_launches, fuse_gate_up
from mxmoe.cost.measured import Law, Measured, Profile, TileTime
from mxmoe.cost.model import COST_MODELS, CostModel, cost_model
from mxmoe.cost.predict import (
    Gemm,
    best_tile,
    expected_rows,
    linear_cost_us,
    predict_block_us,
    predict_launch,
    predict_launch_us,
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
    "Law",
    "Measured",
    "Observation",
    "Profile",
    "Roofline",
    "Schedule",
    "TileList",
    "TileTime",
    "best_tile",
    "block_launches",
    "cost_model",
    "expected_rows",
    "fit_profile",
    "fixed_stride",
    "fuse_gate_up",
    "in_order",
    "lay_tiles",
    "linear_cost_us",
    "longest_first",
    "plan_launch",
    "predict_block_us",
    "predict_launch",
    "predict_launch_us",
    "simulate_launch",
    "start_times",
]
