"""Fixtures of the compiler's tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .blocks import HIDDEN, qwen_block


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn((2, 20, HIDDEN), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def block() -> nn.Module:
    return qwen_block()
