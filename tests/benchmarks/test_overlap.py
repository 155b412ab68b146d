"""Launches one by one, as far as that can be seen without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from overlap import one_by_one

from mxmoe.backends.triton import mode


def test_no_launch_begins_early_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mode, "ptx_of", lambda _device: mode.HOPPER_PTX)
    gpu = torch.device("cuda")
    assert mode.overlap(gpu)
    with one_by_one():
        assert mode.overlap(gpu) == mode.overlap(gpu, 8) == {}
    assert mode.overlap(gpu)
