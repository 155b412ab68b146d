"""
Transformations of a torch model that keep its function and change what is quantized: scales that move, outliers; and
one that takes experts away.

They work in place on a model before it is lifted and compiled.
"""

from mxmoe.transform.awq import awq
from mxmoe.transform.outliers import Planted, plant_outliers
from mxmoe.transform.profile import ActivationProfile, RoleProfile, activation_profile
from mxmoe.transform.prune import Pruning, dispensable, lowest, prune, reap_scores
from mxmoe.transform.report import Folded, TransformReport, Unfolded
from mxmoe.transform.rotate import RotationReport, rotate_model
from mxmoe.transform.smooth import smooth

__all__ = [
    "ActivationProfile",
    "Folded",
    "Planted",
    "Pruning",
    "RoleProfile",
    "RotationReport",
    "TransformReport",
    "Unfolded",
    "activation_profile",
    "awq",
    "dispensable",
    "lowest",
    "plant_outliers",
    "prune",
    "reap_scores",
    "rotate_model",
    "smooth",
]
