"""
A mend for Triton's interpreter: with numpy 2.4 it cannot read a number that a kernel is given as the bound of a loop.

The interpreter keeps scalars as arrays of one element, and numpy 2.4 no longer turns those into Python integers
(https://github.com/triton-lang/triton/issues/9171).
"""

from __future__ import annotations

import importlib
from typing import Any


def mend_interpreter() -> None:
    """Let `range` take interpreted scalars; does nothing where it was done before, or where nothing needs it."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None or hasattr(patch, "mended"):
        return

    def mended(tensor: object, scope: Any) -> None:  # noqa: ANN401  # private classes of Triton
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", _to_int)

    setattr(mended, "mended", True)  # noqa: B010  # a function has no such attribute to the type checker
    interpreter._patch_lang_tensor = mended


def _to_int(scalar: Any) -> int:  # noqa: ANN401  # an interpreted tensor
    return int(scalar.handle.data.item())
