"""Passes over the IR, one a file; the tables PASSES and PIPELINES are the compiler as a list."""

from mxmoe.passes.allocate_bits import AllocateBits
from mxmoe.passes.annotate_cost import AnnotateCost, find_cost_model
from mxmoe.passes.annotate_routing import AnnotateRouting
from mxmoe.passes.annotate_sensitivity import AnnotateSensitivity
from mxmoe.passes.apply_plan import ApplyPlan
from mxmoe.passes.base import Environment, Pass
from mxmoe.passes.choose_tiles import ChooseTiles
from mxmoe.passes.lower_to_group_gemm import LowerToGroupGemm
from mxmoe.passes.observers import (
    Dump,
    KeepStages,
    Log,
    LogTables,
    PrintAfterAll,
    TimePasses,
    VerifyEach,
    histogram,
)
from mxmoe.passes.pipeline import PASSES, PIPELINES, Observer, parse_passes, run_passes, spell_passes
from mxmoe.passes.problem import plan_from, problem_of
from mxmoe.passes.rotate_down import RotateDown
from mxmoe.passes.sensitivities import SENSITIVITIES, ByScore, SeenBank, Sensitivity, distortion, parse_sensitivity

__all__ = [
    "PASSES",
    "PIPELINES",
    "SENSITIVITIES",
    "AllocateBits",
    "AnnotateCost",
    "AnnotateRouting",
    "AnnotateSensitivity",
    "ApplyPlan",
    "ByScore",
    "ChooseTiles",
    "Dump",
    "Environment",
    "KeepStages",
    "Log",
    "LogTables",
    "LowerToGroupGemm",
    "Observer",
    "Pass",
    "PrintAfterAll",
    "RotateDown",
    "SeenBank",
    "Sensitivity",
    "TimePasses",
    "VerifyEach",
    "distortion",
    "find_cost_model",
    "histogram",
    "parse_passes",
    "parse_sensitivity",
    "plan_from",
    "problem_of",
    "run_passes",
    "spell_passes",
]
