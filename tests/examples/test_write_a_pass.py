"""The example is under 40 lines, runs, and keeps its promise."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings

from mxmoe.errors import InfeasibleBudget, NoPossibleScheme, WrongStage
from mxmoe.ir import ModuleOp, banks, moe_ops, plan_of
from mxmoe.passes import AllocateBits, Environment, run_passes
from mxmoe.testing import modules

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("write_a_pass")
    sys.path.remove(str(EXAMPLES))


def test_it_is_under_forty_lines() -> None:
    assert len((EXAMPLES / "write_a_pass.py").read_text().splitlines()) < 40


def test_it_runs_as_a_script_and_prints_a_plan() -> None:
    command = [sys.executable, EXAMPLES / "write_a_pass.py"]
    printed = subprocess.run(command, check=True, text=True, capture_output=True, timeout=120).stdout
    assert set(json.loads(printed)["schemes"]["mlp"].values()) == {"w8a8_sym", "w4a16_sym"}


@given(module=modules("annotated"))
@settings(max_examples=30, deadline=None)
def test_the_busiest_are_protected_within_the_budget(example: ModuleType, module: ModuleOp) -> None:
    step = example.ProtectBusiest(experts=1, bits=4)
    try:
        run_passes(module, [step, AllocateBits(weight_bits=9.0)], Environment())
    except (InfeasibleBudget, NoPossibleScheme):
        return  # no candidate has four bits, or too many rows are busy for the budget
    plan = plan_of(module)
    assert plan.allocation is not None
    assert plan.allocation.weight_bits <= 9.0 * (1 + 1e-9)
    for moe in moe_ops(module):
        for name, bank in banks(moe).items():
            assert bank.route.frequency is not None
            busiest = int(np.argmax(bank.route.frequency.array))
            rows = [row for row in plan.rows if (row.block, row.bank, row.expert) == (moe.block, name, busiest)]
            assert all(plan.rows[row].weight_bits >= 4 for row in rows)


@given(module=modules("allocated"))
@settings(max_examples=3, deadline=None)
def test_it_refuses_to_come_too_late(example: ModuleType, module: ModuleOp) -> None:
    with pytest.raises(WrongStage, match="run it just before allocate-bits"):
        run_passes(module, [example.ProtectBusiest()], Environment())
