"""What result files say of the command that made them."""

from __future__ import annotations

from pathlib import Path

import pytest
from common import circumstances


def test_a_command_names_no_folder_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here, far = tmp_path / "results" / "a.csv", tmp_path.parent / "far" / "b.csv"
    monkeypatch.setattr("sys.argv", ["benchmarks/a.py", "--out", str(here), "--known", str(far), "--names", "torch *"])
    assert circumstances()["command"] == "python benchmarks/a.py --out results/a.csv --known b.csv --names 'torch *'"
