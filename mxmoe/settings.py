"""
What the environment says, read here and nowhere else.

    MXMOE_DEBUG=1   one line a pass with its time; the budget and what was reached
    MXMOE_DEBUG=2   and one line for every table that a pass wrote, and how many rows chose each scheme
    MXMOE_DEBUG=3   and the module after each pass, long tables elided (4 and above: as 3)
    MXMOE_DUMP=dir  the whole module before the first pass and after each, as files that `mxmoe opt` reads

Lines go to standard error. Without the variables nothing is observed.

    MXMOE_STUDY_MODEL=dir  what `examples/train_study_moe.py` wrote, for tests that want a trained model
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mxmoe.errors import BadSetting
from mxmoe.passes import Dump, Log, LogTables, Observer, PrintAfterAll


def observers(environ: Mapping[str, str] = os.environ) -> tuple[Observer, ...]:
    """
    Make the observers that the environment asks for; every call makes new ones.

    Raises:
        BadSetting: `MXMOE_DEBUG` is no number from 0 on.
    """
    ladder: tuple[type[Log | LogTables | PrintAfterAll], ...] = (Log, LogTables, PrintAfterAll)
    found: list[Observer] = [kind() for kind in ladder[: debug_level(environ)]]
    if folder := environ.get("MXMOE_DUMP"):
        found.append(Dump(Path(folder)))
    return tuple(found)


def debug_level(environ: Mapping[str, str] = os.environ) -> int:
    """Read `MXMOE_DEBUG`; 0 when it is not set."""
    value = environ.get("MXMOE_DEBUG", "").strip() or "0"
    if not value.isdecimal():
        raise BadSetting(variable="MXMOE_DEBUG", value=value, reason="it is 0, 1, 2 or 3")
    return int(value)


def study_model(environ: Mapping[str, str] = os.environ) -> Path | None:
    """
    Find the folder that `MXMOE_STUDY_MODEL` names; None when it is not set.

    Raises:
        BadSetting: the folder holds no training.json.
    """
    value = environ.get("MXMOE_STUDY_MODEL", "").strip()
    if not value:
        return None
    if not (Path(value) / "training.json").is_file():
        raise BadSetting(variable="MXMOE_STUDY_MODEL", value=value, reason="there is no training.json in that folder")
    return Path(value)
