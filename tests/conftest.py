"""Shared fixtures: golden text, and small blocks."""

from __future__ import annotations

import os
from pathlib import Path

# two pytest workers on two cores: a second thread of torch waits at every barrier for a core that is busy; set before
# torch loads, and inherited by what tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

# kernels are interpreted where there is no GPU; Triton looks for this when it is loaded, and it is loaded once
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the same examples in every run, so that a red test is the change's; `--hypothesis-profile=explore` draws new ones
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files; read the diff afterwards")
    parser.addoption("--all-kernels", action="store_true", help="compile every scheme and tile for sm_89: half an hour")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is compiled on demand only."""
    if not config.getoption("--all-kernels"):
        dropped = [item for item in items if item.get_closest_marker("every_kernel")]
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=dropped)


class Golden:
    """Compares like a string with the file of the running test; `--update-golden` rewrites the file."""

    def __init__(self, path: Path, update: bool) -> None:
        self.path, self.update = path, update

    def __eq__(self, text: object) -> bool:
        if self.update and isinstance(text, str):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text)
        return self.path.exists() and self.path.read_text() == text

    __hash__ = None  # type: ignore[assignment]  # only compared

    def __repr__(self) -> str:
        return self.path.read_text() if self.path.exists() else f"<no golden file {self.path.name}: --update-golden>"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden text of this test, in tests/golden/<test file>/<test name>.txt."""
    path = GOLDEN / request.path.stem / f"{request.node.name}.txt"
    return Golden(path, request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def study_model() -> Path:
    """The folder of the trained study model; the test is skipped where MXMOE_STUDY_MODEL names none."""
    from mxmoe.settings import study_model

    folder = study_model()
    if folder is None:
        pytest.skip("set MXMOE_STUDY_MODEL to what examples/train_study_moe.py --small wrote")
    return folder
