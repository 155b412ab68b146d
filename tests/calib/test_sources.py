"""Windows of a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.calib import byte_windows
from mxmoe.errors import TextTooShort


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 20), st.integers(1, 30), st.integers(0, 5))
def test_windows_are_parts_of_the_text_that_do_not_overlap(text: bytes, length: int, count: int, seed: int) -> None:
    if count > len(text) // length:
        with pytest.raises(TextTooShort, match=str(len(text))):
            byte_windows(text, length, count, seed=seed)
        return
    windows = list(byte_windows(text, length, count, seed=seed))
    assert [(w.dtype, tuple(w.shape)) for w in windows] == [(torch.int64, (1, length))] * count
    numbered = [text[i * length : (i + 1) * length] for i in range(len(text) // length)]
    rest = iter(numbered)
    # in the order of the text, each at most once
    assert all(any(bytes(w[0].tolist()) == n for n in rest) for w in windows)


def test_the_same_seed_draws_the_same_windows(tmp_path: Path) -> None:
    text = bytes(range(256)) * 4
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    one, two = (torch.cat(list(byte_windows(source, 16, 9, seed=3))) for source in (text, path))
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.cat(list(byte_windows(text, 16, 9, seed=4))))


@pytest.mark.parametrize(("length", "count"), [(0, 1), (-1, 1), (4, 0), (4, 3), (11, 1)])
def test_too_much_is_refused(length: int, count: int) -> None:
    with pytest.raises(TextTooShort, match="the text has 10 bytes"):
        byte_windows(b"0123456789", length, count)
