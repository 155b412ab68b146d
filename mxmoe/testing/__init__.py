"""
For those who write backends, passes and quantizers: strategies that draw what can go wrong, and the equivalence check.

    @given(case=cases())
    def test_my_backend(case):
        assert_backends_agree(case.module, case.weights, case.hidden, case.routings, backends=("eager", "mine"))

Needs hypothesis (the `test` extra), and is the only package of ours that imports it.
"""

import mxmoe.testing.extra  # noqa: F401  # pyright: ignore[reportUnusedImport]  # must come before hypothesis
from mxmoe.testing.agree import assert_backends_agree
from mxmoe.testing.blocks import Routed, at_stage, random_weights
from mxmoe.testing.check_pass import check_pass, check_pass_on
from mxmoe.testing.register import registered
from mxmoe.testing.strategies import (
    SCHEMES,
    Case,
    blocks,
    cases,
    modules,
    routings,
    schemes,
    tables,
)

__all__ = [
    "SCHEMES",
    "Case",
    "Routed",
    "assert_backends_agree",
    "at_stage",
    "blocks",
    "cases",
    "check_pass",
    "check_pass_on",
    "modules",
    "random_weights",
    "registered",
    "routings",
    "schemes",
    "tables",
]
