"""
Ways to say what a scheme of a linear costs in accuracy, one a file; the table SENSITIVITIES.

`annotate-sensitivity{method=pmq}` takes one by name, `annotate-sensitivity{method="pmq{gamma=1}"}` with options. All
read the same statistics. Numpy only: a plan can be made where no torch is loaded.
"""

from mxmoe.passes.sensitivities.base import ByScore, SeenBank, Sensitivity, distortion
from mxmoe.passes.sensitivities.table import SENSITIVITIES, parse_sensitivity

__all__ = ["SENSITIVITIES", "ByScore", "SeenBank", "Sensitivity", "distortion", "parse_sensitivity"]
