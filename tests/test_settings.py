"""The environment: what each variable turns on, and what it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxmoe.errors import BadSetting
from mxmoe.passes import Dump, Log, LogTables, PrintAfterAll
from mxmoe.settings import debug_level, observers, study_model


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        (None, []),
        ("", []),
        ("0", []),
        ("1", [Log]),
        ("2", [Log, LogTables]),
        (" 3 ", [Log, LogTables, PrintAfterAll]),
        ("4", [Log, LogTables, PrintAfterAll]),
    ],
)
def test_the_ladder(value: str | None, kinds: list[type]) -> None:
    environ = {} if value is None else {"MXMOE_DEBUG": value}
    assert [type(observer) for observer in observers(environ)] == kinds


def test_a_dump_is_asked_for_by_its_folder(tmp_path: Path) -> None:
    (dump,) = observers({"MXMOE_DUMP": str(tmp_path)})
    assert isinstance(dump, Dump)
    assert dump.folder == tmp_path


def test_every_call_makes_new_observers() -> None:
    environ = {"MXMOE_DEBUG": "2", "MXMOE_DUMP": "x"}
    first, second = observers(environ), observers(environ)
    assert len(first) == 3
    assert all(one is not other for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("value", ["yes", "-1", "1.5"])
def test_what_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(BadSetting, match=f"MXMOE_DEBUG='{value}': it is 0, 1, 2 or 3"):
        debug_level({"MXMOE_DEBUG": value})


def test_the_study_model_is_a_folder_with_a_record(tmp_path: Path) -> None:
    assert study_model({}) is None
    assert study_model({"MXMOE_STUDY_MODEL": " "}) is None
    with pytest.raises(BadSetting, match=r"there is no training\.json"):
        study_model({"MXMOE_STUDY_MODEL": str(tmp_path)})
    (tmp_path / "training.json").write_text("{}")
    assert study_model({"MXMOE_STUDY_MODEL": str(tmp_path)}) == tmp_path
