"""A folder is written whole or not at all, and nothing that is not ours is deleted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxmoe.checkpoint import Checkpoint, read_checkpoint, store, write_checkpoint
from mxmoe.errors import BrokenCheckpoint, FolderInUse, NoCheckpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn)


def checkpoint(word: str = "one") -> Checkpoint:
    return Checkpoint({"word": word}, {"plan.json": f"{word}\n"}, {"a": torch.arange(6.0), "b": torch.zeros(0, 2)})


def word(folder: Path) -> str:
    return read_checkpoint(folder).about["word"]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    data = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    return data.to(dtype)


@given(
    texts=st.dictionaries(st.from_regex(r"[a-z]{1,8}\.mlir", fullmatch=True), st.text(max_size=40), max_size=3),
    held=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda key: key != "__metadata__"), tensors()),
    about=st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.floats(allow_nan=False), max_size=3),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(
    texts: dict[str, str], held: dict[str, Tensor], about: dict[str, Any], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "folder", Checkpoint(about, texts, held))
    back = read_checkpoint(tmp_path / "folder")
    assert back.about == about
    assert back.texts == texts
    assert back.tensors.keys() == held.keys()
    for key, tensor in held.items():
        assert back.tensors[key].dtype == tensor.dtype
        assert torch.equal(back.tensors[key].to(torch.float64), tensor.to(torch.float64))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_tensors_that_share_storage(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    write_checkpoint(tmp_path / "c", Checkpoint({}, {}, {"whole": whole, "column": whole[:, 1], "again": whole}))
    back = read_checkpoint(tmp_path / "c").tensors
    assert torch.equal(back["column"], whole[:, 1])
    assert torch.equal(back["again"], whole)


def test_a_checkpoint_replaces_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_checkpoint(folder, Checkpoint({}, {"a.mlir": "", "b.mlir": ""}, {}))
    write_checkpoint(folder, checkpoint("two"))
    assert word(folder) == "two"
    assert not (folder / "a.mlir").exists()


def test_a_broken_checkpoint_can_be_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, checkpoint())
    (tmp_path / "manifest.json").write_text("{")
    write_checkpoint(tmp_path, checkpoint("two"))
    assert word(tmp_path) == "two"


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b"):
        write_checkpoint(folder, checkpoint())
        assert word(folder) == "one"


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    write_checkpoint("c/", checkpoint())
    assert word(tmp_path / "inside" / "c") == "one"


def test_a_folder_with_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(FolderInUse, match=r"holds thesis\.tex"):
        write_checkpoint(tmp_path, checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FolderInUse):
        write_checkpoint(tmp_path / "thesis.tex", checkpoint())


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_checkpoint_beside_which_somebody_keeps_a_file_is_left_alone(tmp_path: Path, is_broken: bool) -> None:
    write_checkpoint(tmp_path / "c", checkpoint())
    (tmp_path / "c" / "notes.txt").write_text("mine")
    if is_broken:
        (tmp_path / "c" / "manifest.json").write_text("{")
    with pytest.raises(FolderInUse, match=r"holds notes\.txt"):
        write_checkpoint(tmp_path / "c", checkpoint("two"))
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"


def test_another_tools_manifest_does_not_make_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "my extension"}')
    (tmp_path / "background.js").write_text("")
    with pytest.raises(FolderInUse, match=r"background\.js"):
        write_checkpoint(tmp_path, checkpoint())


@pytest.mark.parametrize("step", ["save_file", "_canonical", "first replace", "second replace"])
def test_an_interrupted_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder = tmp_path / "c"
    write_checkpoint(folder, checkpoint())
    calls = 0
    replace = os.replace

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    def fail_at(*args: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == (1 if step == "first replace" else 2):
            fail()
        replace(*args)

    with monkeypatch.context() as patch:
        if "replace" in step:
            patch.setattr(store.os, "replace", fail_at)
        else:
            patch.setattr(store, step, fail)
        with pytest.raises(OSError, match="no space"):
            write_checkpoint(folder, checkpoint("two"))
    assert word(folder) == "one"
    write_checkpoint(folder, checkpoint("two"))
    assert word(folder) == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("then", ["read", "write"])
def test_a_write_that_was_killed_between_its_two_moves_is_undone(tmp_path: Path, then: str) -> None:
    folder = tmp_path / "c"
    write_checkpoint(folder, checkpoint())
    os.replace(folder, tmp_path / ".c.old")  # as left by a process that died there
    if then == "read":
        assert word(folder) == "one"
    else:
        write_checkpoint(folder, checkpoint("two"))
        assert word(folder) == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_another_format_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "FORMAT", "mxmoe-checkpoint-9")
    write_checkpoint(tmp_path / "c", checkpoint())
    monkeypatch.undo()
    with pytest.raises(BrokenCheckpoint, match=r"its format is 'mxmoe-checkpoint-9', this version reads"):
        read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{}", b"\xff\xfe", b'{"sha256": ""}'])
def test_a_manifest_that_is_none(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path / "c", checkpoint())
    (tmp_path / "c" / "manifest.json").write_bytes(content)
    with pytest.raises(BrokenCheckpoint, match=r"manifest\.json"):
        read_checkpoint(tmp_path / "c")


def test_blanks_in_the_manifest_are_bytes_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", checkpoint())
    path = tmp_path / "c" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2) + "\n")
    with pytest.raises(BrokenCheckpoint, match="SHA-256"):
        read_checkpoint(tmp_path / "c")


def test_an_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match="no manifest"):
        read_checkpoint(tmp_path / "absent")
