"""How much of the GPU's own language kernels speak, and which launches begin early."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mxmoe.backends.triton import mode
from mxmoe.backends.triton.mode import ANY_PTX, HOPPER_PTX, MOST_EARLY, NO_PTX, overlap, ptx_for, ptx_of


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU of sm_90 that is not interpreted; only its name is needed."""
    monkeypatch.setattr(mode, "interpreting", lambda: False)
    monkeypatch.setattr(mode, "arch_of", lambda _device: 90)
    ptx_of.cache_clear()
    yield torch.device("cuda", 7)
    ptx_of.cache_clear()


@pytest.mark.parametrize(("arch", "spoken"), [(80, ANY_PTX), (89, ANY_PTX), (90, HOPPER_PTX), (100, ANY_PTX)])
def test_language_of_a_capability(arch: int, spoken: int) -> None:
    assert ptx_for(arch) == spoken


def test_the_interpreter_speaks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mode, "interpreting", lambda: True)
    ptx_of.cache_clear()
    assert ptx_of(torch.device("cpu")) == NO_PTX
    assert overlap(torch.device("cpu")) == {}
    ptx_of.cache_clear()


def test_small_launches_begin_early_on_hopper(gpu: torch.device) -> None:
    assert overlap(gpu) == overlap(gpu, MOST_EARLY) == {"launch_pdl": True}
    assert overlap(gpu, MOST_EARLY + 1) == {}


def test_nothing_begins_early_elsewhere(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mode, "arch_of", lambda _device: 89)
    assert ptx_of(gpu) == ANY_PTX
    assert overlap(gpu) == {}
