"""Both ways of launching, as far as they can be told apart without a GPU."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

pytest.importorskip("triton")

from overlap import LAUNCHERS, one_by_one

import mxmoe.backends.triton
from mxmoe.backends.triton import mode


def test_no_launcher_lets_a_launch_begin_early_one_by_one() -> None:
    modules = [importlib.import_module(f"mxmoe.backends.triton.{name}") for name in LAUNCHERS]
    with one_by_one():
        assert all(module.overlap("any device", 1) == {} for module in modules)
    assert all(module.overlap is mode.overlap for module in modules)


def test_these_are_all_launchers_that_ask() -> None:
    folder = Path(mxmoe.backends.triton.__file__).parent
    asking = {
        path.stem
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and "overlap" in {name.name for name in node.names}
    }
    assert asking == set(LAUNCHERS)
